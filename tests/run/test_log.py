"""What a run reports, to the file, the terminal, the picture and W&B."""

import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT, SMALL, free_port, losses, metrics

import nanogpt.run.log
from nanogpt.config import RunFailed, TrainConfig, UserError
from nanogpt.run import records, speed
from nanogpt.run.log import Log, Unread
from nanogpt.run.picture import draw_losses
from nanogpt.run.start import TrainState


def test_wandb_receives_losses_rate_and_mfu_and_a_resumed_run_goes_on_in_its_run(start, tmp_path):
    """The real package, offline: its own files are read back."""
    pytest.importorskip("wandb")
    args, offline = ["--wandb_project=owls", "--wandb_run_name=barn", "--wandb_log=True"], {"WANDB_MODE": "offline"}
    door = start(*args, "--max_iters=4", env=offline)
    assert door.end() == 0, door.printed
    ((rows, run),) = logged(tmp_path)
    assert (run.project, run.display_name) == ("owls", "barn")
    by_step = losses(tmp_path / "out")
    assert rows["loss"] == pytest.approx([by_step[s] for s in (1, 2, 3, 4)])
    assert len(rows["train_loss"]) == len(rows["val_loss"]) == 2
    assert {name for record in metrics(tmp_path / "out") for name in record} <= rows.keys()
    place = next(tmp_path.glob("out/wandb/*")).relative_to(tmp_path)
    said = [line for line in door.printed.splitlines() if "W&B" in line or "wandb" in line]
    assert said == [f"W&B: offline; wandb sync {place} sends the log"]
    for wandb_log, steps in ((False, 5), (True, 6)):
        door = start("--init_from=resume", f"--wandb_log={wandb_log}", f"--max_iters={steps}", env=offline)
        assert door.end() == 0, door.printed
    runs = [(again.run_id, rows["step"][-1]) for rows, again in logged(tmp_path)]
    assert sorted(runs) == [(run.run_id, 4), (run.run_id, 6)]


def logged(folder):
    """({name: values}, run) of each W&B log in the run's folder."""
    from wandb.proto import wandb_internal_pb2

    for path in folder.glob("out/wandb/offline-run-*/*.wandb"):
        rows, run = {}, None
        for raw in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            for item in record.history.item:
                rows.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
            run = record.run if record.HasField("run") else run
        yield rows, run


def break_wandb():
    """In another process: W&B is installed, and cannot be imported."""
    Path("broken").mkdir(exist_ok=True)
    Path("broken/wandb.py").write_text("raise ImportError('its packages\\ndo not fit')")
    sys.path.insert(0, "broken")


ONLINE = dict(WANDB_MODE="online", WANDB_INIT_TIMEOUT="1", HOME="nowhere", NETRC="nowhere")  # and so no login
UNREACHABLE = dict(WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:PORT")


@pytest.mark.parametrize(
    "env, before, why",
    [
        (dict(WANDB_API_KEY=""), None, "No API key"),
        (UNREACHABLE, None, "connection refused"),
        ({}, break_wandb, "its packages do not fit"),
    ],
    ids=["no login", "no network", "no import"],
)
def test_wandb_that_cannot_start_gets_one_line_and_the_earlier_run_stays(run, start, tmp_path, env, before, why):
    pytest.importorskip("wandb")
    run("--max_iters=2")
    earlier = {p: p.read_bytes() for p in tmp_path.rglob("out/**/*") if p.is_file()}
    env = ONLINE | {name: value.replace("PORT", str(free_port())) for name, value in env.items()}
    for out_dir in ("out", "another/out"):
        door = start("--wandb_log=True", f"--out_dir={out_dir}", before=before, env=env)
        assert door.end() == 2
        (line,) = [line for line in door.printed.splitlines() if not line.startswith(("dtype: ", "device: "))]
        assert line.startswith("error: --wandb_log=True: Weights & Biases cannot start (") and why in line
        assert "WANDB_MODE=offline" in line and "--wandb_log=False" in line
    assert {p: p.read_bytes() for p in tmp_path.rglob("out/**/*") if p.is_file()} == earlier
    assert not Path("another").exists() and not Path("out/wandb").exists()


def test_a_run_goes_on_without_wandb_if_that_is_killed(start):
    psutil, _ = pytest.importorskip("psutil"), pytest.importorskip("wandb")
    args = ["--wandb_log=True", "--max_iters=1000000", "--eval_interval=1000000"]
    door = start(*args, env=dict(WANDB_MODE="offline"))
    door.wait_for("^iter 3:")
    (service,) = [p for p in psutil.Process(door.process.pid).children() if p.name() == "wandb-core"]
    service.kill()
    door.wait_for("^W&B: nothing more is sent .*; the run goes on")
    door.send(signal.SIGTERM)
    assert door.end() == 128 + signal.SIGTERM
    assert "saved in out/checkpoints/" in door.printed


TRACKIO = """import json, os
def init(project, name=None, config=None, resume="never"):  # as trackio has it: no `dir`
    open("told.json", "w").write(json.dumps([project, name, config["out_dir"], os.environ.get("WANDB_DIR")]))
    return __import__("sys").modules[__name__]
def log(metrics, step=None): pass
def finish(): pass
"""


def test_what_goes_by_the_name_of_wandb_is_told_the_folder(tiny, run_door, tmp_path):
    """A small module in wandb's place, with trackio's arguments: it has to be on the path, as trackio then is."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(TRACKIO)
    args = ["--wandb_log=True", "--wandb_project=owls", "--wandb_run_name=barn", "--max_iters=1"]
    done = run_door("train.py", *SMALL, *args, PYTHONPATH=str(tmp_path / "lib"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "told.json").read_text()) == ["owls", "barn", "out", "out"]


def test_tensorboard_receives_what_metrics_jsonl_does(run, undrawn):
    """TensorBoard's own reader finds the values, of a resumed run too."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    printed = run("--tensorboard=True", "--max_iters=4")
    assert "TensorBoard: tensorboard --logdir=out/tensorboard shows the run" in printed
    run("--tensorboard=True", "--max_iters=6", "--init_from=resume")
    events = EventAccumulator("out/tensorboard").Reload()
    expected = {}
    for record in metrics():
        for name, value in record.items():
            if name != "step" and value is not None:
                expected.setdefault(name, {})[record["step"]] = value
    found = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert found.keys() == expected.keys() and {"loss", "train_loss", "val_loss", "lr"} <= found.keys()
    for name, values in expected.items():
        if name.startswith("exact_"):  # the end of the first run, which metrics.jsonl drops
            found[name].pop(4)
        assert found[name] == pytest.approx(values, rel=1e-5), name


def test_a_tracker_that_is_not_installed_gets_one_line(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        run("--tensorboard=True", "--wandb_log=True")
    assert [line.partition(" is not installed; pip install ")[0] for line in caught.value.problems] == [
        "--wandb_log=True: wandb",
        "--tensorboard=True: tensorboard",
    ]
    assert not Path("out").exists()


class Scripted:
    """A Tracker that keeps what it gets, and fails at some steps."""

    def __init__(self, fails=()):
        self.got, self.fails, self.finished = [], fails, False

    def log(self, values, /, *, step):
        if step in self.fails:
            raise RuntimeError("it is gone")
        self.got.append((step, values["lr"]))

    def finish(self):
        self.finished = True


def test_a_tracker_that_fails_gets_no_more_and_the_others_go_on(tmp_path, dist, undrawn, monkeypatch):
    cfg = TrainConfig(out_dir=str(tmp_path))
    fails, lasts = Scripted(fails=(2,)), Scripted()
    run = a_run(cfg, dist)
    run.trackers = [fails, lasts]
    log, said = Log(run, tokens_per_iter=1, flops_per_iter=1.0, peak=math.inf), []
    monkeypatch.setattr(log, "say", said.append)
    for step in (1, 2, 3):
        log.evaluation(step, {"train": 1.0, "val": 2.0}, lr=0.5)
    log.close()
    assert (fails.got, fails.finished) == ([(1, 0.5)], False)
    assert (lasts.got, lasts.finished) == ([(1, 0.5), (2, 0.5), (3, 0.5)], True)
    assert sum("nothing more is sent (it is gone); the run goes on" in line for line in said) == 1


def log_records(raw, block=2**15):
    """The records of a .wandb file, which is a LevelDB log (its doc/log_format.md) behind 7 bytes of W&B's own."""
    assert raw.startswith(b":W&B")
    at, record = 7, b""
    while at + 7 <= len(raw):
        if block - at % block < 7:
            at += block - at % block  # too little is left of the block for a header
            continue
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_a_terminal_gets_a_progress_bar_and_the_same_lines(tiny, tmp_path):
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--max_iters=6"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # the terminal's end, on Linux
                break
            if not part:
                break
            shown += part
    os.close(master)
    assert process.returncode == 0
    assert b"/6 [" in shown and b"iter 6: loss" in shown and b"step 6: train loss" in shown


def test_no_terminal_no_bar(tiny, run_door):
    done = run_door("train.py", *SMALL, "--max_iters=2")
    assert "\r" not in done.stdout + done.stderr and done.stderr == ""


def write(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))


def test_going_on_from_a_step_forgets_what_came_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train, evaluation = [{"step": s, "loss": 1.0} for s in (1, 2, 3)], {"step": 2, "val_loss": 1.0}
    for evaluated, kept in ((2, [*train[:2], evaluation]), (0, train[:2])):  # at 0, that at 2 is about to be made again
        write(path, *train[:2], {"step": 2, "exact_loss": 1.0}, evaluation, train[2], '{"step": 4, "lo')
        records.drop_after(path, 2, evaluated)
        assert records.read_metrics(path) == kept
        assert path.read_text().count("\n") == len(kept)


def test_a_loss_that_is_not_finite_leaves_valid_json(tmp_path, dist):
    log = Log(a_run(TrainConfig(out_dir=str(tmp_path)), dist), tokens_per_iter=1, flops_per_iter=1.0, peak=1.0)
    log.evaluation(0, {"train": float("nan"), "val": float("inf")}, 0.1)
    log.close()
    assert json.loads(Path(tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "epoch": 0.0,
        "train_loss": None,
        "val_loss": None,
        "lr": 0.1,
    }
    assert (tmp_path / "loss.png").exists()  # an empty picture, not a crash


def picture(folder, monkeypatch, *records):
    """The axes of what `draw_losses` draws of these records."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    write(folder / "metrics.jsonl", *records)
    assert draw_losses(folder) == f"loss curves: {folder / 'loss.png'}"
    return drawn[0].axes[0]


def test_the_untrained_model_is_not_in_the_picture_of_what_it_learned(tmp_path, monkeypatch):
    steps = [{"step": s, "loss": 4 - s / 5} for s in range(1, 11)]
    evals = [{"step": s, "train_loss": t, "val_loss": v} for s, t, v in ((0, 9.0, 9.1), (5, 2.9, 2.5), (10, 2.0, 4.0))]
    axes = picture(tmp_path, monkeypatch, *steps, *evals)
    assert axes.get_ylim()[1] == pytest.approx(1.05 * 4.0)
    assert axes.get_title() == "best validation loss 2.5000 at iteration 5"
    assert [list(line.get_ydata()) for line in axes.lines[1:3]] == [[2.9, 2.0], [2.5, 4.0]]


def test_a_model_that_was_trained_before_is_in_the_picture_from_the_beginning(tmp_path, monkeypatch):
    evals = [{"step": s, "train_loss": v, "val_loss": v} for s, v in ((0, 3.1), (5, 2.5))]
    axes = picture(tmp_path, monkeypatch, {"step": 1, "loss": 3.0}, *evals)
    assert [list(line.get_ydata()) for line in axes.lines[1:3]] == [[3.1, 2.5]] * 2


def test_losses_that_were_no_numbers_leave_gaps_in_the_picture(tmp_path, monkeypatch):
    evals = [{"step": s, "train_loss": None, "val_loss": v} for s, v in ((5, 2.0), (10, 2.5))]
    axes = picture(tmp_path, monkeypatch, {"step": 1, "loss": 3.0}, *evals)
    assert axes.get_ylim()[1] == pytest.approx(1.05 * 3.0)


def test_the_peak_is_this_devices_own_and_named(dist):
    dist.out = io.StringIO()
    assert 0 < speed.device_peak(dist) < 1e16
    assert "measured on this CPU" in dist.out.getvalue()


def test_the_peak_counts_every_process(dist, monkeypatch):
    monkeypatch.setattr(speed, "measured_peak", lambda dist: 7.0)
    dist.world_size = 4
    assert speed.device_peak(dist) == 28.0


@pytest.mark.parametrize(
    "name, tflops",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("Tesla T4", 65)]
    + [
        (n, None)
        for n in (
            "NVIDIA RTX A1000",
            "NVIDIA RTX A4000",
            "NVIDIA T400",
            "NVIDIA A100 MIG 1g.5gb",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
        )
    ],
)
def test_a_peak_is_never_another_devices(name, tflops, dist, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(speed, "measured_peak", lambda dist: 7.0)
    dist.device, dist.dtype = torch.device("cuda", 0), torch.bfloat16
    assert speed.device_peak(dist) == (tflops * 1e12 if tflops else 7.0)


# A Log by itself


def a_run(cfg, dist, step=0):
    """What a Log has to know of a run, which has read as many windows as it says."""
    batches = SimpleNamespace(epoch_windows=10, per_step=cfg.gradient_accumulation_steps * cfg.batch_size)
    state = TrainState(step=step, windows=step * batches.per_step)
    return SimpleNamespace(cfg=cfg, dist=dist, state=state, batches=batches, trackers=[])


@pytest.fixture
def make_log(tmp_path, dist, undrawn):
    """make_log(step=3, log_interval=2) is the Log of a run that stands at this step, with these settings."""
    logs = []

    def make_log(step=0, peak=0.5, **given):
        run = a_run(TrainConfig(out_dir=str(tmp_path), **given), dist, step)
        logs.append(Log(run, tokens_per_iter=100, flops_per_iter=1.0, peak=peak))
        return logs[-1]

    yield make_log
    for made in logs:
        made.close()


SOUND = {"loss": 1.0, "grad_norm": 1.0, "spike": 0.0}


def test_only_the_time_of_the_steps_counts_and_each_has_its_share(make_log, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(nanogpt.run.log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = make_log(step=3, peak=2.0, log_interval=4)  # goes on: its first line is about one step, the second about four
    for step in range(4, 9):
        now[0] += 2.0
        log.step(step, 0.1, SOUND)
        if step in (4, 6):
            with log.paused():
                now[0] += 50.0
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["ms"], r["tokens_per_second"]) for r in found] == [(4, 2000.0, 50.0), (8, 2000.0, 50.0)]
    assert [r["mfu"] for r in found] == [0.25, 0.25]


@pytest.mark.parametrize("again, shares", [(2.0, [0.5, 0.25]), (0.25, [None, None]), (0.05, [None, None])])
def test_a_peak_that_was_measured_too_low_is_measured_again(make_log, tmp_path, monkeypatch, again, shares):
    """As it is while another program uses the machine. If that goes on, no share is printed rather than a wrong one."""
    now, measured = [0.0], []
    monkeypatch.setattr(nanogpt.run.log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(speed, "measured_peak", lambda dist: measured.append(1) or again)
    log = make_log(peak=0.1, log_interval=1)
    log.dist.out = io.StringIO()
    for step, seconds in enumerate([1.0, 2.0, *[1.0] * 20], 1):
        now[0] += seconds
        log.step(step, 0.1, SOUND)
    found = [json.loads(line)["mfu"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found[:2] == shares and 1 <= len(measured) <= 4  # and not at every line
    lines = [line for line in log.dist.out.getvalue().splitlines() if line.startswith("iter ")]
    assert [", mfu 50.00%, " in lines[0], "mfu" in lines[0]] == [shares[0] == 0.5] * 2
    assert ("measured again" in log.dist.out.getvalue()) == (again > 0.1)


def test_steps_are_read_soon_even_if_lines_are_far_apart(dist):
    """So that a sick one is found."""
    unread, metrics = Unread(dist, log_interval=10**6), {"loss": torch.tensor(3.0), "lucky": torch.tensor(7.0)}
    found = [step for step in range(1, 200) if unread.add(step, 0.1, metrics)]
    assert found == [101]
    assert unread.read() == [(step, 0.1, {"loss": 3.0, "lucky": 7.0}) for step in range(101, 200)]
    assert unread.read() == []


def test_a_report_that_cannot_be_opened_ends_the_run_with_a_line(make_log, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFailed, match=r"metrics\.jsonl: cannot be written to \(Is a directory\)"):
        make_log()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_report_on_a_full_disk_ends_the_run_with_a_line(make_log):
    log = make_log()
    log.file.close()
    log.file = open("/dev/full", "w", buffering=1)
    log.step(1, 0.1, SOUND)
    assert "No space left on device); the run stops; its checkpoints are safe" in str(log.dist.failure)


def test_a_picture_that_cannot_be_drawn_ends_no_run(make_log, dist, monkeypatch):
    def fail(out_dir):
        raise ValueError("no font")

    monkeypatch.setattr(nanogpt.run.log, "draw_losses", fail)
    dist.out = io.StringIO()
    make_log().close()
    assert dist.out.getvalue() == "no picture of the losses: no font\n"


def test_what_a_crash_left_behind_the_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n\0\0\xff')
    assert records.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


# What a run says before its first iteration is done


def impatient():
    nanogpt.run.log.SILENCE = 0.05


def test_a_run_that_takes_long_says_so_and_what_it_is_doing(start):
    """Before the first iteration's line, which comes after minutes, and whatever log_interval is."""
    slow = ["--batch_size=1", "--block_size=1", "--eval_iters=3000", "--gradient_accumulation_steps=100000"]
    door = start(*slow, "--max_iters=100", "--log_interval=50", before=impatient)
    door.wait_for(r"^after \d+ s: evaluating at step 0, batch [\d,]+ \(--eval_iters\)$")
    door.wait_for(r"^after \d+ s: iteration 1 of 100 \(--log_interval=50\)$")
    (said,) = re.findall(r"^time: .*$", door.printed, re.M)
    assert re.match(r"time: about [\d.,]+ hours for 100 iterations, by a rough estimate; smaller --max_iters, ", said)
    assert said.endswith("; sh train.py config/fast_shakespeare_cpu.py --dataset=tiny takes seconds")


def test_a_short_run_has_nothing_to_say_about_time(run):
    assert "time: " not in run("--max_iters=2")


def test_a_run_beside_other_programs_names_a_better_number_of_threads_once(run, monkeypatch):
    monkeypatch.setattr(nanogpt.run.log.Others, "busy_cores", lambda others: 1.0)
    monkeypatch.setattr(nanogpt.run.log, "available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line = "threads: other programs keep 1.0 of 2 cores busy; --threads=1 is faster beside them"
    assert run("--log_interval=1").splitlines().count(line) == 1
    assert line not in run("--log_interval=1", "--threads=1")
