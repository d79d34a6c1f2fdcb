"""The long proof that a run cannot be lost: `make torture` runs it and prints a table of promises and figures."""

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import partial

import faults
import numpy as np
import pytest
import torch
from faults import (
    ALL,
    BAD,
    FILES,
    PHASES,
    PLACES,
    REST,
    Watched,
    announce,
    flip,
    limit_files,
    lost,
    raise_at,
    record_windows,
    snapshot,
    truncate,
    windows,
)
from support import ROOT, SMALL, ending

from nanogpt import optim
from nanogpt.config import RunFailed, TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint, settings

pytestmark = [pytest.mark.slow, pytest.mark.torture]

KILLS = 200
CASES = faults.CASES | {
    "compiled": ["--compile=True", "--dropout=0.1"],
    "compiled, bfloat16": ["--compile=True", "--dtype=bfloat16"],
}


def differing_bits(a, b):
    """How many bits of two byte strings differ."""
    assert len(a) == len(b)
    return int(np.unpackbits(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


def compare(root):
    """Bits of the tensors that differ between the runs in whole/ and parts/, whose reports must be the same."""
    whole, parts = ending(root / "whole"), ending(root / "parts")
    assert whole[1:] == parts[1:]
    return sum(differing_bits(a, b) for a, b in zip(whole[0], parts[0], strict=True))


def stop_twice(start, draw, args):
    """An uninterrupted run in whole/, and one in parts/ that is stopped at two random steps."""
    assert all(d.end(600) == 0 for d in start(*args, "--out_dir=whole"))
    for step in sorted(draw.sample(range(1, 12), 2)):
        doors = start(*args, "--out_dir=parts", "--init_from=auto", before=partial(raise_at, [step], "0"))
        assert all(d.end(600) == 128 + signal.SIGTERM for d in doors), doors[0].printed
    assert all(d.end(600) == 0 for d in start(*args, "--out_dir=parts", "--init_from=auto"))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_stopped_twice_and_uninterrupted_are_the_same_bits(start, start_two, tmp_path, figure, case, processes):
    draw = random.Random(f"{case} {processes}")
    args = ["--max_iters=12", "--lr_decay_iters=12", *CASES[case]]
    start_it = start_two if processes == 2 else lambda *a, **k: [start(*a, **k, env={"RANK": "0"})]
    stop_twice(start_it, draw, args)
    bits = compare(tmp_path)
    figure(f"stopped twice, {case}, {processes} process{'es' * (processes > 1)}", f"{bits} differing bits")
    assert bits == 0
    if case.startswith("compiled"):
        assert "compile: took" in (tmp_path / ("log-0.txt" if processes == 2 else "log.txt")).read_text()


def test_processes_come_and_go_and_every_token_is_read_once(start, start_two, tmp_path, figure):
    args = ["--max_iters=40", "--lr_decay_iters=40", "--dataset=tiny"]
    assert start(*args, "--out_dir=whole", before=partial(record_windows, "whole-read")).end() == 0
    for i in range(10):
        go = [*args, "--out_dir=parts", "--init_from=auto", f"--max_iters={4 * i + 4}"]
        doors = (start_two if i % 2 else lambda *a, **k: [start(*a, **k)])(
            *go, before=partial(record_windows, "parts-read")
        )
        assert all(d.end() == 0 for d in doors), doors[0].printed
    read = windows(tmp_path, "parts-read")
    whole, parts = (dict(r[:2] for r in ending(tmp_path / o)[3] if len(r) == 2) for o in ("whole", "parts"))
    off = max(abs(whole[s] - parts[s]) for s in whole)
    once = [number for number, _ in read] == list(range(40 * 8)) and read == windows(tmp_path, "whole-read")
    figure(
        "1, 2, 1, 2, ... processes",
        f"{len(read)} windows, {'each read once' if once else 'NOT each once'}; losses within {off:.1e}",
    )
    assert once and off < 1e-4


def slow_disk(seconds):
    """In another process: whatever touches the disk takes so long that a kill finds it at work."""
    for module, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (shutil, "copymode")):
        real = getattr(module, name)

        def slow(*args, real=real, **kwargs):
            time.sleep(seconds)
            return real(*args, **kwargs)

        setattr(module, name, slow)


def watched(marker, seconds):
    """In another process: a disk that takes `seconds` longer, and a file `marker` from asking for a save to its end.

    What lies in the folder does not tell: a save asked for may not have made its own folder yet.
    """
    slow_disk(seconds)
    save, write = checkpoint.Writer.save, checkpoint.Writer._write

    def save_and_mark(self, *args):
        self.wait()
        marker.touch()
        save(self, *args)

    def write_and_unmark(self, *args):
        write(self, *args)
        marker.unlink()

    checkpoint.Writer.save, checkpoint.Writer._write = save_and_mark, write_and_unmark


def killed_again_and_again(start, root, draw, n, *args, interval):
    """Kill a run `n` times at random moments, each time resuming it; then let it end.

    Returns [(updates lost, whether a checkpoint was being written), ...] of all kills.
    """
    done, marker = [], root / "saving"
    while len(done) < n:
        marker.unlink(missing_ok=True)
        slowness = 0.003 if draw.random() < 0.7 else 0
        door = start(*args, "--init_from=auto", before=partial(watched, marker, slowness))
        try:
            door.wait_for(r"^iter \d")
        except AssertionError:
            assert door.end() == 0, door.printed  # it came to its end
            break
        time.sleep(draw.uniform(0, 0.3))
        door.process.kill()  # SIGKILL
        code = door.end()
        assert code in (0, -signal.SIGKILL), door.printed
        if code == -signal.SIGKILL:
            done.append((lost(root / "out")[0], marker.exists()))
            assert done[-1][0] <= interval * (2 if done[-1][1] else 1), door.printed
    door = start(*args, "--init_from=auto")
    assert door.end() == 0, door.printed
    return done


def test_killed_at_random_moments(start, tmp_path, figure):
    draw, kills, rounds, changed = random.Random(7), [], 0, 0
    while len(kills) < KILLS:
        interval = draw.choice([1, 2, 5])
        args = [
            f"--eval_interval={interval}",
            "--max_iters=150",
            "--lr_decay_iters=150",
            "--dropout=0.1",
            f"--seed={rounds}",
        ]
        whole = start(*args, f"--out_dir=whole-{rounds}", name="whole")
        got = killed_again_and_again(start, tmp_path, draw, KILLS - len(kills), *args, interval=interval)
        kills += [(updates, half, interval) for updates, half in got]
        assert whole.end() == 0
        changed += ending(tmp_path / f"whole-{rounds}") != ending(tmp_path / "out")
        os.rename(tmp_path / "out", tmp_path / f"out-{rounds}")
        rounds += 1
    inside = sum(half for _, half, _ in kills)
    worst = max(updates / interval for updates, half, interval in kills if not half)
    worst_inside = max(updates / interval for updates, half, interval in kills if half)
    figure("SIGKILL at random moments", f"{len(kills)} of {len(kills)} resumable, {inside} of them inside saving")
    figure("  lost, in evaluation intervals", f"at most {worst:.1f}; where killed inside saving, {worst_inside:.1f}")
    figure("  ended otherwise than uninterrupted", f"{changed} of {rounds} runs")
    assert inside >= KILLS // 10 and changed == 0


def test_damage_of_every_kind(run, tmp_path, figure):
    run()
    folder = checkpoint.newest("out").folder
    found = tried = 0
    draw = np.random.default_rng(0)
    for name in FILES:
        path = folder / name
        sound = path.read_bytes()
        few = 2000 if name.endswith("safetensors") else len(sound) * 8
        bits = range(len(sound) * 8) if few == len(sound) * 8 else draw.choice(len(sound) * 8, few, replace=False)
        harms = [partial(flip, bit=int(bit)) for bit in bits]
        harms += [truncate, os.remove, partial(os.truncate, length=0)]
        harms += [partial(os.truncate, length=int(n)) for n in draw.integers(0, len(sound) - 2, 100)]
        for harm in harms:
            harm(path)
            tried += 1
            found += checkpoint.damage(folder) is not None
            path.write_bytes(sound)
    assert checkpoint.damage(folder) is None
    figure("damage to a file of the newest checkpoint", f"{found} of {tried} found")
    assert found == tried


# -- a disk that refuses, steps that are sick, files that would do harm


def test_no_room_while_saving(start, tmp_path, figure):
    limits = [3000, 5000, 10_000, 28_000, 29_000, 40_000, 59_000]  # the files have 1.4, 29 and 60 kB
    assert start("--max_iters=4").end() == 0
    before = snapshot(tmp_path / "out/checkpoints")
    for limit in limits:
        door = start("--init_from=resume", before=partial(limit_files, limit))
        assert door.end() == 1 and "Traceback" not in door.printed, door.printed
        assert re.search(r"^error: .*File too large", door.printed, re.M)
        assert snapshot(tmp_path / "out/checkpoints") == before
    n = len(limits)
    figure("file size limits", f"{n} of {n} times the older checkpoints intact, a message, exit code 1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_sick_update_is_applied(run, figure, dtype):
    tried = applied = 0
    for place, put in PLACES.items():
        for value in BAD.values():
            for step in (1, 4, 7):
                with pytest.MonkeyPatch.context() as patch:
                    watched = Watched(patch)
                    watched.sick_at = {step}
                    put(patch, value, watched.sick)
                    if dtype == "float16":
                        run(f"--dtype={dtype}")
                        before, after = watched.before[step], watched.before[step + 1]
                        unchanged = all(torch.equal(before[name], after[name]) for name in before)
                    else:
                        with pytest.raises(RunFailed, match=f"step {step}: "):
                            run(f"--dtype={dtype}", f"--out_dir={place}-{value}-{step}")
                        unchanged = watched.unchanged_since(step)
                    tried += 1
                    applied += not unchanged
    figure(f"nan and infinity in loss, gradient, input, {dtype}", f"{applied} of {tried} bad updates applied")
    assert not applied


# -- signals


def saved(seconds):
    """Of signals that were answered by saving, as was asserted for each, after so many seconds."""
    n = len(seconds)
    return f"{n} of {n} saved, exit after {statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s"


def both_dwell(phase, seconds):
    """In another process: dwell in this phase, whichever the rank."""
    faults.announce = lambda **more: announce(seconds, only=os.environ.get("RANK", "0"))
    PHASES[phase]()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("phase", [p for p in PHASES if p != "compiling"])
def test_signals_in_every_phase(start, start_two, tmp_path, figure, phase, processes):
    seconds, draw = [], random.Random(f"{phase}{processes}")
    args = ["--dropout=0.1", "--out_dir=parts"]
    whole = (
        start_two("--dropout=0.1", "--out_dir=whole") if processes == 2 else [start("--dropout=0.1", "--out_dir=whole")]
    )
    assert all(d.end() == 0 for d in whole)
    for signum in ALL * 2:
        before = partial(both_dwell, phase, 0.3)
        doors = start_two(*args, before=before) if processes == 2 else [start(*args, before=before)]
        for door in doors if phase != "saving" else doors[:1]:  # rank 0 alone saves
            door.wait_for("^NOW")
        time.sleep(draw.uniform(0, 0.2))
        began = time.monotonic()
        for door in doors if draw.random() < 0.5 else [draw.choice(doors)]:
            door.send(signum)
        codes = [d.end() for d in doors]
        assert 128 + signum in codes and all(c > 128 for c in codes), doors[0].printed
        seconds.append(time.monotonic() - began)
        folder = re.search(r"^stopped at step \d+, saved in (\S+);", doors[0].printed, re.M)[1]
        assert checkpoint.damage(tmp_path / folder) is None
        go = start_two if processes == 2 else lambda *a: [start(*a)]
        assert all(d.end() == 0 for d in go(*args, "--init_from=resume"))
        assert compare(tmp_path) == 0
    name = f"signals in {phase}, {processes} process{'es' * (processes > 1)}"
    figure(name, saved(seconds))


def fresh_compiler(folder):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def test_signals_while_compiling(start, tmp_path, figure):
    seconds, draw = [], random.Random(5)
    args = ["--compile=True", "--n_layer=4"]
    for i, signum in enumerate(ALL * 3):
        door = start(*args, f"--out_dir=out-{i}", before=partial(fresh_compiler, str(tmp_path / f"cache-{i}")))
        door.wait_for("^compile: takes a while")
        time.sleep(draw.uniform(0, 6))
        compiling = "compile: took" not in door.printed
        began = time.monotonic()
        door.send(signum)
        assert door.end() == 128 + signum, door.printed
        if compiling:
            seconds.append(time.monotonic() - began)
        assert "Traceback" not in door.printed, door.printed
        assert checkpoint.newest(tmp_path / f"out-{i}"), door.printed
    figure("signals while compiling", saved(seconds))
    assert len(seconds) >= 6


@pytest.mark.parametrize("signum", ALL[:2], ids=lambda s: s.name)
def test_a_signal_to_torchrun_itself(tiny, tmp_path, figure, signum):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    with open(tmp_path / "log.txt", "w") as log:
        job = subprocess.Popen(
            [*command, *SMALL, "--max_iters=100000"], cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while "iter 20:" not in (tmp_path / "log.txt").read_text():
            assert time.monotonic() < end and job.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
        began = time.monotonic()
        os.killpg(job.pid, signum)  # as a terminal or a cluster does
        assert job.wait(60) != 0
        seconds = time.monotonic() - began
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    log = (tmp_path / "log.txt").read_text()
    step = int(re.search(r"^stopped at step (\d+), saved in", log, re.M)[1])
    assert checkpoint.newest(tmp_path / "out").step == step
    figure(f"{signum.name} to torchrun, 2 processes", f"saved, exit after {seconds:.1f} s")


# -- speed


def test_the_pause_for_a_save_of_124m_parameters(tmp_path, figure):
    torch.set_num_threads(os.cpu_count())
    try:
        cfg = settings.load(TrainConfig, ["--device=cpu", f"--out_dir={tmp_path}"], "train.py")
        model = GPT(GPTConfig())
        tensors = optim.state_tensors(model, optim.make_optimizer(model, cfg))
        writer = checkpoint.Writer(tmp_path, 1, True, pytest.fail)
        info = dict(step=0, state={"losses": None, "improved": False}, **REST)
        pauses, blocking = [], []
        for step in (1, 2, 3):
            began = time.perf_counter()
            writer.save(dict(model.named_parameters()), tensors, info | {"step": step})
            pauses.append(time.perf_counter() - began)
            writer.wait()
            blocking.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(1)
    size = sum(p.stat().st_size for p in checkpoint.newest(tmp_path).folder.iterdir())
    name = f"pause for a save, 124M parameters, {size / 1e9:.1f} GB"
    figure(
        name,
        f"{pauses[0]:.2f} s the first time, then {min(pauses[1:]):.2f} s; a blocking save takes {min(blocking):.2f} s",
    )
    assert min(pauses[1:]) < min(blocking) / 2
