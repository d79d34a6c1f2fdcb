"""That a run cannot be lost: exact resume, atomic and durable checkpoints, damage, kills, full disks."""

import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import (
    CASES,
    FAST,
    FILES,
    REST,
    flip,
    limit_files,
    lost,
    raise_at,
    record_windows,
    snapshot,
    stop_at,
    truncate,
    windows,
)
from safetensors.torch import load_file, save_file
from support import ROOT, SMALL, ending, losses, metrics

from nanogpt import train
from nanogpt.commands import cli, sample
from nanogpt.config import RunFailed, UserError
from nanogpt.model import GPTConfig
from nanogpt.run import checkpoint
from nanogpt.run.signals import Stopped
from nanogpt.run.start import TrainState

pytestmark = pytest.mark.usefixtures("undrawn")


def stopped(run, *args):
    with pytest.raises(Stopped):
        run(*args)


# -- exact resume


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_twice_ends_as_one_that_never_was(run, monkeypatch, case):
    args = ["--max_iters=12", "--lr_decay_iters=12", *CASES[case]]
    run(*args, "--out_dir=whole")
    stop_at(monkeypatch, 2, 7)  # saved within an interval, and where an evaluation was due
    stopped(run, *args, "--out_dir=parts")
    torch.rand(5)  # what else draws random numbers must not matter
    stopped(run, *args, "--out_dir=parts", "--init_from=resume")
    run(*args, "--out_dir=parts", "--init_from=auto")
    assert ending("whole") == ending("parts")
    assert list(losses("parts")) == list(range(1, 13))


def test_a_checkpoint_between_two_evaluations_claims_neithers_losses(run, monkeypatch):
    stop_at(monkeypatch, 5)
    stopped(run)
    found = checkpoint.newest("out")
    assert (found.step, found.state["losses"], found.state["improved"]) == (6, None, False)
    assert checkpoint.best("out").step == 4


@pytest.mark.parametrize("recipe", [[], FAST], ids=["adamw", "muon"])
def test_two_processes_stopped_twice_end_as_two_that_never_were(start_two, recipe):
    args = [*recipe, "--dropout=0.2", "--out_dir=whole"]
    assert [d.end() for d in start_two(*args)] == [0, 0]
    args[-1] = "--out_dir=parts"
    for step in (3, 6):
        doors = start_two(*args, "--init_from=auto", before=partial(raise_at, [step], "1"))
        assert [d.end() for d in doors] == [128 + signal.SIGTERM] * 2
    assert [d.end() for d in start_two(*args, "--init_from=auto")] == [0, 0]
    root = doors[0].log.parent
    assert ending(root / "whole") == ending(root / "parts")


@pytest.mark.parametrize("processes", [3, 4, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_more_processes_stopped_once_end_as_those_that_never_were(start_ranks, tmp_path, processes):
    """From three on, sums depend on where DDP puts a gradient; the recipe has more than one bucket of them.

    Five processes do not divide the batch.
    """
    args = ["--n_embd=128", "--n_layer=1", "--n_head=2", "--batch_size=3", "--gradient_accumulation_steps=8"]
    args += ["--max_iters=6", "--eval_iters=5"]
    assert [d.end() for d in start_ranks(processes, *args, "--out_dir=whole")] == [0] * processes
    args += ["--out_dir=parts", "--init_from=auto"]
    doors = start_ranks(processes, *args, before=partial(raise_at, [3], "1"))
    assert [d.end() for d in doors] == [128 + signal.SIGTERM] * processes
    assert [d.end() for d in start_ranks(processes, *args)] == [0] * processes
    assert ending(tmp_path / "whole") == ending(tmp_path / "parts")


@pytest.mark.parametrize(
    "recipe, numbers",
    [
        ([], (1, 2, 1)),
        (FAST, (8, 7, 3, 1, 8)),  # 7 and 3 do not divide the batch
        pytest.param([], (8, 7, 3, 1, 8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes_come_and_go_and_the_run_is_the_same(start_ranks, tmp_path, recipe, numbers):
    args, steps = [*recipe, f"--lr_decay_iters={3 * len(numbers)}", "--timeout=60"], 0

    def train(processes, *more, record):
        doors = start_ranks(processes, *args, *more, f"--max_iters={steps}", before=partial(record_windows, record))
        assert [d.end() for d in doors] == [0] * processes, doors[0].printed

    for processes in numbers:
        steps += 3
        train(processes, "--out_dir=parts", "--init_from=auto", record="parts-read")
    train(1, "--out_dir=whole", record="whole-read")
    read = windows(tmp_path, "parts-read")
    assert [number for number, _ in read] == list(range(steps * 8))  # none twice, none left out
    assert read == windows(tmp_path, "whole-read")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), abs=1e-5)


# -- killed


def dies_at(n):
    """In another process: SIGKILL comes at the n-th time that a save, or what it clears away, touches the disk."""
    calls = itertools.count(1)
    for module, name in (
        (checkpoint, "save_file"),
        (checkpoint, "write_json"),
        (checkpoint, "flush"),
        (os, "rename"),
        (os, "unlink"),
    ):
        real = getattr(module, name)

        def deadly(*args, real=real, **kwargs):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, name, deadly)


def test_ten_kills_while_saving_cost_at_most_two_intervals_each_and_change_nothing(start, tmp_path):
    args = ["--eval_interval=2", "--max_iters=80", "--lr_decay_iters=80", "--dropout=0.1"]
    whole, draw, inside = start(*args, "--out_dir=whole"), random.Random(3), 0
    for _ in range(10):
        door = start(*args, "--init_from=auto", before=partial(dies_at, draw.randint(3, 40)))
        assert door.end() == -signal.SIGKILL, door.printed
        updates, half_written = lost(tmp_path / "out")
        assert updates <= 2 * (2 if half_written else 1), door.printed
        inside += half_written
    assert inside > 2
    assert [start(*args, "--init_from=auto").end(), whole.end()] == [0, 0]
    assert ending(tmp_path / "whole") == ending(tmp_path / "out")
    assert not list((tmp_path / "out/checkpoints").glob(".*"))


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_complete(run, monkeypatch):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder

    def killed(path):
        os.unlink(Path(path) / "model.safetensors")
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.remove(folder)
    assert checkpoint.newest("out") is None
    run("--max_iters=4", "--init_from=auto")
    assert [p.name for p in Path("out/checkpoints").iterdir()] == ["step-00000004"]


# -- damage


def empty(path):
    os.truncate(path, 0)


@pytest.fixture
def trained(run, tmp_path):
    """A finished run in out/ with two checkpoints."""
    run()
    return tmp_path / "out"


@pytest.mark.parametrize("harm", [truncate, empty, flip, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_the_newest_checkpoint_is_named_and_the_one_before_it_taken(run, trained, harm, name):
    whole = ending()
    harm(trained / "checkpoints/step-00000008" / name)
    before = snapshot(trained / "checkpoints/step-00000008")
    out = run("--init_from=resume")
    [line] = re.findall(r"^.*damaged.*$", out, re.M)
    assert line.startswith("out/checkpoints/step-00000008: damaged (") and name in line
    assert "resuming out/checkpoints/step-00000004 at step 4" in out
    assert ending() == whole
    assert snapshot(trained / "checkpoints/step-00000008") == before
    assert checkpoint.newest("out").folder.name == "step-00000008-2"


@pytest.mark.parametrize("name", ["manifest.json", "checkpoint.json"])
def test_a_single_flipped_bit_is_found_wherever_it_is(trained, name):
    path = checkpoint.newest("out").folder / name
    sound = path.read_bytes()
    assert checkpoint.damage(path.parent) is None
    for bit in range(0, len(sound) * 8, 3 if name == "manifest.json" else 11):
        flip(path, bit)
        assert checkpoint.damage(path.parent), f"bit {bit} of {name}"
        path.write_bytes(sound)


def test_flipped_bits_in_the_tensors_are_found(trained):
    draw = np.random.default_rng(1)
    for name in ("model.safetensors", "optimizer.safetensors"):
        path = checkpoint.newest("out").folder / name
        sound = path.read_bytes()
        for bit in [0, len(sound) * 8 - 1, *draw.integers(0, len(sound) * 8, 100).tolist()]:
            flip(path, bit)
            assert name in checkpoint.damage(path.parent)
            path.write_bytes(sound)


@pytest.mark.parametrize("command", ["train --init_from=auto", "train --init_from=resume", "sample --device=cpu"])
def test_where_all_are_damaged_nothing_starts_and_nothing_is_touched(trained, capsys, command):
    for name in ("step-00000004", "step-00000008"):
        flip(trained / "checkpoints" / name / "model.safetensors")
    before = snapshot(trained)
    name, flag = command.split()
    assert cli.main([name, *(SMALL if name == "train" else []), flag]) == 2
    assert "error: out/checkpoints: none of the 2 checkpoints is sound; nothing was touched" in capsys.readouterr().err
    assert snapshot(trained) == before


def test_sampling_skips_a_damaged_best(trained, capsys):
    best = checkpoint.best("out").folder
    flip(best / "model.safetensors")
    sample.main(["--device=cpu", "--num_samples=1", "--max_new_tokens=5"])
    assert f"{best}: damaged (model.safetensors has changed" in capsys.readouterr().err


def test_a_checkpoint_without_a_field_of_the_model_gets_its_default(trained, monkeypatch):
    @dataclass
    class Wider(GPTConfig):
        softcap: float = 30.0

    weights = checkpoint.load_model(checkpoint.newest("out")).state_dict()
    monkeypatch.setattr(checkpoint, "GPTConfig", Wider)
    found = checkpoint.newest("out")
    assert found.step == 8 and found.model_config["softcap"] == 30.0
    model = checkpoint.load_model(found)
    assert model.config.softcap == 30.0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_folder_that_was_never_renamed_is_no_checkpoint(run, trained):
    folder = trained / "checkpoints/step-00000008"
    os.rename(folder, trained / "checkpoints/.step-00000008.tmp")
    assert checkpoint.newest("out").step == 4
    run("--init_from=resume")
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]


# -- written whole, flushed, then renamed


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_seen_from_outside_every_file_is_flushed_before_the_rename(tiny, tmp_path):
    calls = "openat,write,pwrite64,ftruncate,fsync,rename,renameat,renameat2"
    command = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-y",
        "-o",
        "trace",
        "-e",
        f"trace={calls}",
        sys.executable,
        str(ROOT / "train.py"),
        *SMALL,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    if "ptrace" in done.stderr:
        pytest.skip("tracing is not permitted here")
    assert done.returncode == 0, done.stderr
    for step in ("step-00000004", "step-00000008"):
        check_order(written_events((tmp_path / "trace").read_text()), step)


def written_events(trace):
    """[(call, paths)] in the order in which the calls began; an fsync counts where it began, and must succeed."""
    events = []
    for line in trace.splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)", line)
        if not match or " = -1 " in line:
            continue
        call, rest = match[1].rstrip("246"), match[2]
        if call.startswith("rename"):
            events.append(("rename", [inside(p) for p in re.findall(r'"([^"]*)"', rest)]))
        elif path := re.match(r"\d+<([^>]*)>", rest):
            events.append(("fsync" if call == "fsync" else "write", [inside(path[1])]))
    return events


def inside(path):
    """A path relative to the run's out_dir, which is `out` in tmp_path."""
    return re.sub(r"^(.*/)?out(/|$)", "", path)


def check_order(events, step):
    temporary, final = f"checkpoints/.{step}.tmp", f"checkpoints/{step}"
    renamed = events.index(("rename", [temporary, final]))
    before = events[:renamed]
    names = {}  # under which name the bytes were written
    for call, paths in before:
        if call == "rename" and paths[1].startswith(temporary):
            names[paths[1]] = paths[0]
    for name in FILES:
        path = f"{temporary}/{name}"
        writes = [i for i, e in enumerate(before) if e[0] == "write" and e[1][0] in (path, names.get(path))]
        flushes = [i for i, e in enumerate(before) if e == ("fsync", [path])]
        assert writes and flushes and max(writes) < max(flushes), name
    assert ("fsync", [temporary]) in before and before.index(("fsync", [temporary])) > max(writes)
    after = events[renamed:]
    assert ("fsync", ["checkpoints"]) in after and ("fsync", [""]) in after
    assert not [e for e in after if e[0] == "write" and e[1][0].startswith((temporary, final))]


def test_a_checkpoint_can_be_read_by_those_who_can_read_its_folder(trained):
    modes = {p.stat().st_mode for p in checkpoint.newest("out").folder.iterdir()}
    assert len(modes) == 1


# -- which are kept


def steps_kept():
    return sorted(p.name for p in Path("out/checkpoints").iterdir())


def save_all(val_losses, **cfg):
    """Write a checkpoint for each of these validation losses, as a run would, and yield after each."""
    settings = dict(keep=2, always=True, fail=pytest.fail) | cfg
    writer = checkpoint.Writer("out", **settings)
    state = TrainState()
    for step, val in enumerate(val_losses, 1):
        state.step = step
        state.note({"train": val, "val": val})
        info = dict(step=step, state=dict(vars(state)), **REST)
        writer.save({"w": torch.tensor([val])}, {"m": torch.tensor([val])}, info)
        writer.wait()
        yield step


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_ones_and_the_best_are_kept(tmp_path, monkeypatch, keep):
    monkeypatch.chdir(tmp_path)
    vals = [5.0, 3.0, 4.0, 4.5, 2.0, 6.0, 7.0, 8.0]
    for step in save_all(vals, keep=keep):
        best = min(range(step), key=lambda i: vals[i]) + 1
        expected = {best, *range(max(1, step - keep + 1), step + 1)}
        assert steps_kept() == [f"step-{s:08d}" for s in sorted(expected)]
        assert checkpoint.newest("out").step == step
        assert checkpoint.best("out").step == best


def test_without_always_those_that_are_no_improvement_give_way_but_the_last_one_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vals = [5.0, 3.0, 4.0, 4.5, 2.0, 6.0, 7.0, 8.0]
    kept = [steps_kept() for _ in save_all(vals, keep=2, always=False)]
    expected = [[1], [1, 2], [1, 2, 3], [1, 2, 4], [2, 5], [2, 5, 6], [2, 5, 7], [2, 5, 8]]
    assert kept == [[f"step-{s:08d}" for s in row] for row in expected]


@pytest.mark.parametrize("always", [True, False])
def test_the_best_is_the_best_on_the_data_of_the_newest(tmp_path, monkeypatch, always):
    monkeypatch.chdir(tmp_path)
    best = []
    monkeypatch.setitem(REST, "data", {"train": "a", "val": "v"})
    for step in save_all([1.0, 2.0, 5.0, 4.0, 4.5], keep=2, always=always):
        best.append(checkpoint.best("out").step)
        monkeypatch.setitem(REST, "data", {"train": "a" if step < 2 else "b", "val": "v"})
    assert best == [1, 1, 3, 4, 4]


def test_without_fingerprints_the_name_of_the_dataset_decides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(list(save_all([1.0, 2.0, 4.0, 3.0], keep=9))) == 4
    assert checkpoint.best("out").step == 1  # neither is known
    for folder, name in zip(sorted(Path("out/checkpoints").iterdir()), "aabb", strict=True):
        info = json.loads((folder / "checkpoint.json").read_text())
        forge(folder, info | {"settings": {"dataset": name}})
    assert checkpoint.best("out").step == 4


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(save_all([math.nan, 5.0, math.nan, math.nan], keep=1))
    assert checkpoint.best("out").step == 2


@pytest.mark.parametrize("always", ["True", "False"])
def test_a_crash_costs_at_most_an_interval_whatever_is_kept(run, always):
    run(f"--always_save_checkpoint={always}", "--max_iters=12", "--learning_rate=10", "--min_lr=10", "--warmup_iters=0")
    vals = {r["step"]: r["val_loss"] for r in metrics() if "val_loss" in r}
    assert vals[12] > min(vals.values())  # it got worse, and was saved all the same
    assert checkpoint.newest("out").step == 12
    run(
        f"--always_save_checkpoint={always}",
        "--max_iters=13",
        "--init_from=resume",
        "--learning_rate=1e-3",
        "--decay_lr=False",
    )


def test_a_damaged_one_does_not_count_among_the_kept(trained):
    flip(trained / "checkpoints/step-00000008/manifest.json")
    checkpoint.clean("out", keep=1, always=True)
    assert checkpoint.newest("out").step == 4


# -- the disk refuses


def test_a_file_size_limit_leaves_the_older_checkpoints_intact_and_ends_the_run(start, tmp_path):
    assert start("--max_iters=4").end() == 0
    before = snapshot(tmp_path / "out/checkpoints")
    door = start("--init_from=resume", before=partial(limit_files, 40_000))  # the optimizer's state is larger
    assert door.end() == 1
    [line] = re.findall(r"^error:.*", door.printed, re.M)
    assert "step 8 could not be saved" in line and "File too large" in line and "--init_from=resume goes on" in line
    assert "Traceback" not in door.printed
    after = snapshot(tmp_path / "out/checkpoints")
    assert after == before
    assert start("--init_from=resume").end() == 0


@pytest.mark.parametrize("every, lines, file", [(400, 100, "checkpoints"), (10**6, 1, "metrics.jsonl")])
def test_what_the_main_process_cannot_write_ends_the_others_too(start_two, every, lines, file):
    """At once, and as quietly: they would wait for it, on GPUs for minutes."""
    args = [f"--eval_interval={every}", f"--log_interval={lines}", "--max_iters=1000000"]
    doors = start_two(*args, before=partial(limit_files, 40_000))
    assert [d.end() for d in doors] == [1, 1]
    reported = [
        re.findall(r"^error: process 0 on .*: out/(checkpoints|metrics.jsonl):", d.printed, re.M) for d in doors
    ]
    assert reported == [[file], []]
    assert "Traceback" not in doors[0].printed + doors[1].printed and "step 800:" not in doors[0].printed


def fail_late():
    """In another process: a checkpoint fails when the next one is due."""
    save, due, first = checkpoint.Writer.save, threading.Event(), threading.Event()

    def write(*args):
        assert due.wait(60)
        raise OSError(28, "No space left on device")

    def save_and_tell(self, *args):
        if first.is_set():
            due.set()
        first.set()
        save(self, *args)

    checkpoint.Writer.save, checkpoint.write = save_and_tell, write


def test_a_save_that_fails_when_the_next_is_due_ends_the_others_too(start_two):
    doors = start_two("--eval_interval=1", before=fail_late)
    assert [d.end() for d in doors] == [1, 1]
    assert ["step 1 could not be saved (No space left" in d.printed for d in doors] == [True, False]
    assert "Traceback" not in doors[0].printed + doors[1].printed


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 300 kB in tmp_path/disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_the_older_checkpoints_intact_and_ends_the_run(start, small_disk):
    args = ["--out_dir=disk/out", "--eval_interval=1", "--keep_checkpoints=100"]
    door = start(*args)
    assert door.end() == 1
    assert re.search(r"^error: .*No space left on device", door.printed, re.M)
    assert "Traceback" not in door.printed
    folders = checkpoint._folders(small_disk / "out")
    assert len(folders) >= 2 and not any(checkpoint.damage(f) for f in folders)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert start(*args, "--init_from=resume").end() == 0


def test_a_read_only_folder_is_refused_in_one_line(start, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    door = start("--out_dir=disk/out")
    assert door.end() == 1
    assert re.findall(r"^error: --out_dir=disk/out: cannot be written to \(Read-only file system", door.printed, re.M)
    assert "Traceback" not in door.printed


def test_an_out_dir_under_a_file_is_refused_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert cli.main(["train", *SMALL, "--out_dir=file/out"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out_dir=file/out: cannot be written to (Not a directory")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError("no more"), RuntimeError("unforeseen")]
)
@pytest.mark.parametrize("step", [4, 8])
def test_a_write_that_fails_in_the_background_is_never_swallowed(run, monkeypatch, error, step):
    real = checkpoint.save_file

    def save_file(tensors, path):
        if f"step-{step:08d}" in str(path):
            raise error
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(RunFailed, match=f"step {step} could not be saved") as caught:
        run()
    assert caught.value.exit_code == 1 and len(caught.value.problems) == 1
    assert [p.name for p in Path("out/checkpoints").iterdir()] == [f"step-{s:08d}" for s in (4,) if s < step]
    monkeypatch.setattr(checkpoint, "save_file", real)
    run("--init_from=auto")
    assert list(losses()) == list(range(1, 9))


def test_a_save_that_runs_out_of_memory_says_so(start):
    """Where the tensors are copied, under a real limit; there is no checkpoint to go on from."""

    door = start("--n_embd=512", "--max_iters=4", "--eval_iters=1", before=limit_memory_when_saving)
    assert door.end() == 1
    assert re.findall(r"^error: .*", door.printed, re.M) == [
        "error: out/checkpoints: step 4 could not be saved (out of memory); the run stops, and there is no checkpoint "
        "before it"
    ]
    assert "Traceback" not in door.printed and "--init_from=resume" not in door.printed


def limit_memory_when_saving():
    """In another process: from the first save on, it gets no memory beyond what it has."""
    real = checkpoint.Writer.save

    def save(*args):
        has = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (has, has))
        real(*args)

    checkpoint.Writer.save = save


def test_an_error_without_words_is_named(run, monkeypatch):
    def write(*args):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(
        RunFailed, match=r"step 4 could not be saved \(out of memory\); .* there is no checkpoint before"
    ):
        run()


# -- two runs in one folder, and one that loses its folder


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_one_is_gone(start, run, tmp_path, capsys):
    door = start("--max_iters=1000000", "--eval_interval=1000000")
    door.wait_for("^iter 3:")
    there = sorted(os.listdir("out"))
    for args in ([], ["--init_from=auto"], ["--init_from=resume"]):
        assert cli.main(["train", *SMALL, *args]) == 2
        [line] = capsys.readouterr().err.splitlines()
        holder = f"process {door.process.pid} on {socket.gethostname()}"
        assert line == (
            f"error: --out_dir=out: another run is at work there ({holder}); --out_dir=... names another folder"
        )
    assert sorted(os.listdir("out")) == there
    run("--max_iters=2", "--out_dir=out/other")  # another folder is free
    door.process.kill()  # as kill -9
    door.end()
    run("--max_iters=2")


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda path: os.rename(path, "moved")], ids=["deleted", "moved"])
@pytest.mark.parametrize("another", [False, True], ids=["gone", "replaced"])
def test_a_run_whose_folder_is_taken_away_ends_with_a_line(run, monkeypatch, harm, another):
    def train_step(run, real=train.train_step):
        if run.state.step == 5:
            harm("out")
            if another:
                os.mkdir("out")
        return real(run)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(
        RunFailed, match=r"^out/metrics.jsonl: .* \(it was removed or replaced during the run\); the run stops"
    ):
        run("--eval_interval=100", "--max_iters=7")
    assert os.path.isdir("out") == another and (not another or os.listdir("out") == [])


def test_a_checkpoint_is_not_written_into_a_folder_that_took_the_runs_place(tmp_path):
    failures = []
    writer = checkpoint.Writer(tmp_path / "out", 2, True, failures.append)
    info = dict(step=1, state={"losses": None, "improved": False}, **REST)
    writer.save({"w": torch.ones(1)}, {"m": torch.ones(1)}, info)  # a folder that was not there is made
    writer.wait()
    assert not failures
    writer = checkpoint.Writer(tmp_path / "out", 2, True, failures.append)
    os.rename(tmp_path / "out", tmp_path / "moved")
    writer.save({"w": torch.ones(1)}, {"m": torch.ones(1)}, info | {"step": 2})
    writer.wait()
    assert "step 2 could not be saved (it was removed or replaced during the run)" in str(*failures)
    assert not (tmp_path / "out").exists()


# -- only data is read


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-00000008/checkpoint.json"])
def test_a_pipe_in_the_place_of_a_file_ends_resume_with_a_line(trained, capsys, name):
    os.remove(trained / name)
    os.mkfifo(trained / name)
    size = json.loads((trained / "checkpoints/step-00000008/manifest.json").read_text())
    size["files"]["checkpoint.json"]["bytes"] = 0  # as a pipe has
    (trained / "checkpoints/step-00000008/manifest.json").write_text(json.dumps(size))
    failed = cli.main(["train", *SMALL, "--init_from=resume"])
    shown = capsys.readouterr()
    assert "it is not a regular file" in shown.out + shown.err and "Traceback" not in shown.err
    assert failed == (name == "metrics.jsonl")  # of the checkpoints, the one before is taken


def test_no_link_is_followed_where_a_run_writes(run, tmp_path):
    (tmp_path / "victim").write_text("mine")
    os.mkdir("out")
    for name in (".config.json.tmp", f".config.json.{os.getpid()}.tmp"):
        os.symlink(tmp_path / "victim", f"out/{name}")
    run("--max_iters=2")
    assert (tmp_path / "victim").read_text() == "mine" and not os.path.islink("out/config.json")


def forge(folder, info):
    """Replace checkpoint.json and make the manifest agree, as someone with a purpose would."""
    (folder / "checkpoint.json").write_text(json.dumps(info))
    agree(folder)


def agree(folder):
    files = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": checkpoint._sha256(folder / n)} for n in checkpoint.FILES
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


NESTED = "[" * 100_000 + "]" * 100_000
HEADERS = {
    "huge length": (2**62).to_bytes(8, "little") + b"{}",
    "length past the end": (1000).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"\xff\xfe{}",
    "deep JSON": len(NESTED).to_bytes(8, "little") + NESTED.encode(),
    "offsets outside": b"",
    "overlapping": b"",
    "empty": b"",
}
for name, offsets in (("offsets outside", [[0, 2**40]]), ("overlapping", [[0, 8], [4, 12]])):
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": o} for i, o in enumerate(offsets)})
    HEADERS[name] = len(header).to_bytes(8, "little") + header.encode() + bytes(12)


def commands(out_dir):
    """Every command that reads a checkpoint in `out_dir`."""
    return [
        ["train", *SMALL, f"--out_dir={out_dir}", "--init_from=resume"],
        ["train", *SMALL, f"--out_dir={out_dir}", "--init_from=auto"],
        ["train", *SMALL, "--out_dir=other", f"--init_from={out_dir}"],
        ["sample", "--device=cpu", f"--out_dir={out_dir}"],
        ["sample", "--device=cpu", f"--init_from={out_dir}"],
    ]


def refused_everywhere(capsys, out_dir="out"):
    """All commands end with 2 and one error line, and nothing is written."""
    before = snapshot(Path())
    for command in commands(out_dir):
        capsys.readouterr()
        assert cli.main(command) == 2, command
        shown = capsys.readouterr()
        assert shown.err.count("error: ") == 1 and "Traceback" not in shown.err + shown.out
    assert snapshot(Path()) == before


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("name", ["model.safetensors"])
def test_a_malicious_safetensors_header_is_refused_everywhere(run, capsys, kind, name):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder
    (folder / name).write_bytes(HEADERS[kind])
    agree(folder)
    refused_everywhere(capsys)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_malicious_optimizer_header_is_refused_on_resume(run, capsys, kind):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder
    (folder / "optimizer.safetensors").write_bytes(HEADERS[kind])
    agree(folder)
    assert cli.main(commands("out")[0]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


JSONS = {
    "deep": NESTED,
    "a list": "[]",
    "a number": "1",
    "nan": "NaN",
    "not UTF-8": "\udcff",
    "cut": '{"step": 4',
    "a huge number": '{"step": ' + "9" * 10_000 + "}",
    "nothing": "",
    "files as a list": json.dumps({"format": 1, "files": checkpoint.FILES}),
}


@pytest.mark.parametrize("kind", JSONS)
@pytest.mark.parametrize("name", ["checkpoint.json", "manifest.json"])
def test_malicious_json_is_refused_everywhere(run, capsys, kind, name):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder
    (folder / name).write_bytes(JSONS[kind].encode(errors="surrogateescape"))
    if name == "checkpoint.json":
        agree(folder)
    refused_everywhere(capsys)


WRONG = {
    "step": ["4", None, [], {}, math.nan, -1, 1.5, 10**30],
    "state": ["x", [], None, {}, {"losses": {"val": "low"}, "improved": True}, {"losses": 3, "improved": True}],
    "model_config": ["x", [], None, {"n_layer": "2"}, {"n_embd": -16}, {"n_layer": True}, {"bias": 0}],
    "tokenizer": ["x", [], None],
    "scaler": [1],
    "settings": [None],
    "surplus": [1],
}


def test_wrong_types_in_checkpoint_json_are_damage(run):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder
    sound = json.loads((folder / "checkpoint.json").read_text())
    for name, values in WRONG.items():
        for value in values:
            if isinstance(value, dict) and name == "model_config":
                value = sound[name] | value
            forge(folder, sound | {name: value})
            assert "checkpoint.json cannot be read" in (checkpoint.damage(folder) or ""), (name, value)
    forge(folder, sound)
    assert checkpoint.damage(folder) is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokenizer", {"type": "evil"}),
        ("tokenizer", {"type": "char", "chars": 5}),
        ("model_config", {"n_head": 0}),
        ("model_config", {"n_embd": 4}),
        ("model_config", {"activation": "evil"}),
        ("model_config", {"n_layer": 10**9}),
        ("model_config", {"n_embd": 10**12}),
        ("model_config", {"vocab_size": 10**12}),
        ("model_config", {"vocab_size": 2**31 - 1, "n_embd": 10**6}),
        ("state", {"improved": 1}),
    ],
)
def test_wrong_values_in_checkpoint_json_are_refused_everywhere(run, capsys, name, value):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder
    sound = json.loads((folder / "checkpoint.json").read_text())
    forge(folder, sound | {name: sound[name] | value})
    refused_everywhere(capsys)


FORGED = {
    "step": ["4", 4.5, None, -1, 10**18, True, 3],
    "evaluated": ["4", 4.5, None, -2],
    "losses": ["low", 4.5, {"train": "low", "val": 4.5}],
    "best_val_loss": ["low", 4, math.nan, {}],
    "best_step": ["4", 4.5],
    "stale": ["0", 0.5, -1, 10**400],
    "spikes": ["0", None],
    "micro_batch": ["2", 2.5, 0, -2],
    "unheard_of": [1],
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_is_refused_on_resume_in_one_line(run, capsys, name):
    run("--max_iters=4", "--eval_iters=1")
    folder = checkpoint.newest("out").folder
    sound = json.loads((folder / "checkpoint.json").read_text())
    for value in FORGED[name]:
        forge(folder, sound | {"state": sound["state"] | {name: value}})
        before = snapshot(Path())
        assert cli.main(["train", *SMALL, "--init_from=resume"]) == 2, value
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: out/checkpoints"), value
        assert snapshot(Path()) == before


@pytest.mark.parametrize("scaler", [{"scale": "x"}, {}])
def test_a_forged_loss_scale_is_refused_on_resume_in_one_line(run, capsys, scaler):
    run("--max_iters=4", "--eval_iters=1", "--dtype=float16")
    folder = checkpoint.newest("out").folder
    info = json.loads((folder / "checkpoint.json").read_text())
    info["scaler"] |= scaler
    if not scaler:
        del info["scaler"]["growth_factor"]
    forge(folder, info)
    assert cli.main(["train", *SMALL, "--init_from=resume", "--dtype=float16"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "its state does not fit the model (the loss scale is" in line


def test_a_forged_model_that_does_not_fit_its_weights_is_refused(run, capsys):
    run("--max_iters=4")
    folder = checkpoint.newest("out").folder
    weights = load_file(folder / "model.safetensors")
    save_file({n: t[:1].clone() for n, t in weights.items()}, folder / "model.safetensors")
    agree(folder)
    refused_everywhere(capsys)


def test_an_unknown_format_is_refused_with_its_reason(trained):
    for folder in checkpoint._folders("out"):
        manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 2}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert "format 1, which this version reads" in checkpoint.damage(folder)
    with pytest.raises(UserError, match="none of the 2 checkpoints is sound"):
        checkpoint.newest("out", lambda line: None)


# -- saving does not hold up the loop


def test_the_loop_goes_on_while_a_checkpoint_is_being_written(run, monkeypatch):
    two_more, held, real = threading.Event(), [], checkpoint.save_file

    def save_file(tensors, path):
        if path.match("*00000004*/model*"):
            held.append(two_more.wait(timeout=600))
        real(tensors, path)

    def train_step(run, real=train.train_step):
        if run.state.step == 6:
            two_more.set()
        return real(run)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(train, "train_step", train_step)
    run()
    assert held == [True]


def test_what_is_written_is_the_state_at_the_save_and_not_what_came_after(tmp_path, monkeypatch):
    changed, real = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (changed.wait(120), real(*args)))
    writer = checkpoint.Writer(tmp_path, 2, True, pytest.fail)
    weight = torch.ones(3)
    info = dict(step=1, state={"losses": None, "improved": False}, **REST)
    writer.save({"w": weight}, {"m": weight}, info)
    weight.zero_()
    changed.set()
    writer.wait()
    assert torch.equal(checkpoint.newest(tmp_path).model_tensors()["w"], torch.ones(3))


def test_a_save_needs_no_new_thread(tmp_path, monkeypatch):
    """Python may wait for ever for one that gets no memory."""
    writer = checkpoint.Writer(tmp_path, 2, True, pytest.fail)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    for step in (1, 2):
        info = dict(step=step, state={"losses": None, "improved": False}, **REST)
        writer.save({"w": torch.ones(3)}, {"m": torch.ones(1)}, info)
    writer.wait()
    assert checkpoint.newest(tmp_path).step == 2


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    at_work, most, real = [], [], checkpoint.save_file

    def save_file(tensors, path):
        at_work.append(path)
        most.append(len(at_work))
        time.sleep(0.02)
        real(tensors, path)
        at_work.remove(path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    writer = checkpoint.Writer(tmp_path, 9, True, pytest.fail)
    for step in (1, 2, 3):
        info = dict(step=step, state={"losses": None, "improved": False}, **REST)
        writer.save({"w": torch.full((3,), step)}, {"m": torch.zeros(1)}, info)
    writer.wait()
    assert max(most) == 1
    for folder in checkpoint._folders(tmp_path):
        found = checkpoint.read(folder)
        assert torch.equal(found.model_tensors()["w"], torch.full((3,), found.step))
