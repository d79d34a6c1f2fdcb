"""Memory that runs out: the micro-batch gives way, the iteration stays the same; `auto` finds what fits.

What runs out is the memory of real processes under a real limit, and the errors are PyTorch's own.
"""

import ctypes
import os
import re
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exporting import ARCHITECTURES
from support import ending, losses

from nanogpt import data, optim
from nanogpt.commands import cli
from nanogpt.config import RunFailed, TrainConfig
from nanogpt.model import GPT, GPTConfig, numbers_held
from nanogpt.run import checkpoint, compile, device, memory
from nanogpt.run.start import TrainState

MiB = 2**20
LARGE = (  # 256 sequences an iteration; all at a time take some 300 MiB
    "--n_embd=64 --block_size=128 --batch_size=256 --gradient_accumulation_steps=1 --max_iters=2 --lr_decay_iters=2 "
    "--eval_iters=1"
).split()


def allow(room, rank=None):
    """In another process: it gets `room` bytes beyond what it has, and what it frees counts as free at once."""
    if rank in (None, os.environ.get("RANK")):
        device.keep_memory = lambda: ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
        has = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (has + room, has + room))


def report_free(size, rank=None):
    """In another process: the system says that so many bytes are free."""
    if rank in (None, os.environ.get("RANK")):
        memory.free_memory = lambda: size


def at_most(size):
    """In another process: there is memory for so many sequences at a time."""
    real = GPT.forward

    def forward(self, idx, targets=None):
        if len(idx) > size:
            raise ERRORS[0]
        return real(self, idx, targets)

    GPT.forward = forward


def trial(model, cfg, dist):
    """As much of a Run as a trial uses."""
    return SimpleNamespace(gpt=model, cfg=cfg, dist=dist, optimizer=optim.make_optimizer(model, cfg, dist))


def sizes(printed):
    """The micro-batches that were announced."""
    return [int(n) for n in re.findall(r"^micro-batch: (\d+)[, ].*\(--batch_size\)$", printed, re.M)]


@pytest.fixture
def end(start):
    """end("--flag", room=bytes) trains in a process of its own and returns what it printed."""

    def end(*args, room=None, before=None, code=0):
        door = start(*LARGE, *args, before=partial(allow, room) if room else before)
        assert door.end() == code, door.printed
        assert "Traceback" not in door.printed, door.printed
        return door.printed

    return end


def test_a_step_that_runs_out_of_memory_is_repeated_with_less_at_a_time(end, tmp_path):
    end("--out_dir=whole")
    printed = end("--out_dir=short", room=150 * MiB)
    halved = sizes(printed)
    assert halved and halved == [128 >> i for i in range(len(halved))]  # how often, the allocator decides
    assert f"an iteration is now {256 // halved[-1]} x {halved[-1]} of them, and the same tokens" in printed
    whole, short = losses(tmp_path / "whole"), losses(tmp_path / "short")
    assert list(short) == [1, 2]  # each reported once
    assert short == pytest.approx(whole, abs=1e-4)


def test_what_a_failed_attempt_had_done_is_forgotten(run, monkeypatch, undrawn):
    """The memory runs out in the second micro-step, when the first has left its gradients."""
    run("--out_dir=small", "--batch_size=2", "--gradient_accumulation_steps=4", "--eval_interval=100")
    real, calls = GPT.forward, []

    def forward(self, idx, targets=None):
        calls.append(len(idx)) if self.training else None
        if len(calls) == 2 and calls[-1] == 4:
            raise ERRORS[0]
        return real(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", forward)
    assert sizes(run("--out_dir=halved", "--eval_interval=100")) == [2]
    assert calls == [4, 4] + [2] * 4 * 8
    small, halved = (checkpoint.newest(out_dir).folder / "model.safetensors" for out_dir in ("small", "halved"))
    assert small.read_bytes() == halved.read_bytes()


def test_an_evaluation_that_runs_out_of_memory_is_repeated_with_less_at_a_time(end):
    whole, short = end("--eval_only=True"), end("--eval_only=True", room=60 * MiB)
    exact = r"exact val loss (\d\.\d{6})"
    assert sizes(short) and not sizes(whole)
    assert float(re.search(exact, short)[1]) == pytest.approx(float(re.search(exact, whole)[1]), abs=1e-5)
    estimates = [float(re.search(r"^step 0: train loss (\d\.\d+)", text, re.M)[1]) for text in (short, whole)]
    assert estimates[0] == pytest.approx(estimates[1], abs=2e-4)


def test_auto_takes_the_most_that_fit(end, tmp_path):
    assert sizes(end("--out_dir=all", "--batch_size=auto")) == [256]
    printed = end("--out_dir=some", "--batch_size=auto", room=150 * MiB)
    (size,) = sizes(printed)
    assert size < 256 and f"({256 // size} x {size} sequences)" in printed
    assert losses(tmp_path / "some") == pytest.approx(losses(tmp_path / "all"), abs=1e-4)


def test_auto_does_not_try_what_a_cpu_would_not_survive(end):
    """The system ends a process that takes too much; there is no error to wait for."""
    printed = end("--batch_size=auto", before=partial(report_free, 20 * MiB))
    (size,) = sizes(printed)
    assert 1 < size < 256


def test_auto_leaves_room_for_what_comes_later(dist):
    """A fifth of the sequences, and for copies: another allocator may need as much more."""
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    bytes_of_it = sum(p.nbytes for p in model.parameters())
    assert memory.later(model, dist) > 3 * bytes_of_it  # a checkpoint's copy
    tried = []
    model.register_forward_pre_hook(lambda _, args: tried.append(len(args[0])))
    cfg = TrainConfig(block_size=8, batch_size=12, gradient_accumulation_steps=1)
    assert memory.largest_micro_batch(trial(model, cfg, dist)) == 12
    assert tried == [1, 2, 3, 4, 5, 8, 15]


def test_auto_looks_at_every_process(start_two, tmp_path):
    """The second is short of memory, and the first takes no more than it."""
    args = [*LARGE, "--batch_size=auto", "--max_iters=1"]
    doors = start_two(*args, before=partial(allow, 100 * MiB, "1"))
    assert [d.end() for d in doors] == [0, 0], doors[0].printed
    (size,) = sizes(doors[0].printed)
    assert size < 128 and f"(2 processes x {128 // size} x {size} sequences)" in doors[0].printed


def test_auto_asks_every_process_what_is_free(start_two):
    """Each may be on a machine of its own, and they have to stop trying together."""
    args = [*LARGE, "--batch_size=auto", "--max_iters=1"]
    doors = start_two(*args, before=partial(report_free, 20 * MiB, "1"))
    assert [d.end() for d in doors] == [0, 0], doors[0].printed
    (size,) = sizes(doors[0].printed)
    assert 1 < size < 128


@pytest.mark.parametrize("args", [["--batch_size=auto"], []], ids=["auto", "halved"])
def test_a_resumed_run_keeps_its_micro_batch_and_is_the_same_run(end, tmp_path, args):
    args, little = [*args, "--eval_interval=1"], partial(at_most, 80)
    end(*args, "--out_dir=whole", before=little)
    end(*args, "--out_dir=parts", "--max_iters=1", before=little)
    assert sizes(end(*args, "--out_dir=parts", "--init_from=auto")) == [64]  # though all would fit now
    assert ending(tmp_path / "whole") == ending(tmp_path / "parts")
    found = checkpoint.newest(tmp_path / "parts")
    assert (found.settings["batch_size"], found.state["micro_batch"]) == (256, 64)


def test_another_batch_size_is_obeyed_on_resume(end):
    end("--batch_size=auto", "--max_iters=1")
    printed = end("--init_from=resume", "--batch_size=32", "--gradient_accumulation_steps=8")
    assert not sizes(printed) and "(8 x 32 sequences)" in printed


def test_auto_on_resume_is_looked_for_where_the_run_has_none(end):
    end("--max_iters=1", "--gradient_accumulation_steps=2", "--batch_size=32")
    printed = end("--init_from=resume", "--batch_size=auto", "--gradient_accumulation_steps=2", "--batch_size=auto")
    assert sizes(printed) == [512]


# Without a process


CFG = TrainConfig(block_size=8, batch_size=4, gradient_accumulation_steps=1)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it."),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 7 TiB"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: str(e)[:12])
def test_half_and_half_again_until_it_fits(dist, capsys, error):
    state, tried = TrainState(), []

    def work(most):
        tried.append(most)
        if most > 1:
            raise error
        return "done"

    assert memory.retry_smaller(work, state, CFG, dist) == "done"
    assert tried == [4, 2, 1] and state.micro_batch == 1


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: str(e)[:12])
def test_one_sequence_that_does_not_fit_ends_the_run_with_a_line(dist, capsys, error):
    def work(most):
        raise error

    with pytest.raises(RunFailed, match=r"a single sequence at a time; smaller are --block_size=4 .*\(.+\)$") as caught:
        memory.retry_smaller(work, TrainState(), CFG, dist)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "processes, auto, hint",
    [
        (2, False, "--batch_size=auto finds how many fit"),
        (2, True, "half of them: --batch_size=2 --gradient_accumulation_steps=10"),
        (3, True, "half of them: --batch_size=2 --gradient_accumulation_steps=10"),  # 6 or 7 of 20, in 4 steps of 2
    ],
)
def test_among_several_processes_the_run_ends_with_a_line(dist, processes, auto, hint):
    def work(most):
        raise ERRORS[0]

    cfg = TrainConfig(block_size=8, batch_size=4, gradient_accumulation_steps=5)
    cfg.auto_batch, dist.world_size = auto, processes
    with pytest.raises(RunFailed, match=f"with 4 sequences at a time; {hint}"):
        memory.retry_smaller(work, TrainState(), cfg, dist)


def test_another_error_is_another_matter(dist):
    def work(most):
        raise RuntimeError("the loop fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        memory.retry_smaller(work, TrainState(), CFG, dist)


def test_trying_leaves_no_trace(dist, capsys):
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    before, ready = {name: p.clone() for name, p in model.named_parameters()}, []
    model.register_forward_pre_hook(lambda *_: ready.append(all(p.grad is not None for p in model.parameters())))
    assert memory.fits(trial(model, CFG, dist), 4)
    assert ready == [True]  # a step that is not the first has gradients in memory already
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_trial_leaves_room_for_the_update(dist):
    """Where a sequence fits and the update does not, nothing fits."""
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    run = trial(model, replace(CFG, optimizer="muon"), dist)
    assert memory.fits(run, 1)
    run.optimizer.peak_bytes = lambda: 2**60
    assert not memory.fits(run, 1)


def test_auto_ends_with_a_line_where_not_one_sequence_fits(dist, monkeypatch):
    def forward(self, idx, targets=None):
        raise ERRORS[0]

    monkeypatch.setattr(GPT, "forward", forward)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(RunFailed, match="out of memory with a single sequence at a time"):
        memory.largest_micro_batch(trial(model, CFG, dist))


def test_the_peak_is_that_of_this_process(dist):
    before = memory.peak_memory(dist.device)
    block = torch.ones(before // 4 + 64 * MiB)
    assert memory.peak_memory(dist.device) >= 4 * block.numel()


def test_some_memory_is_free():
    assert 2**20 < memory.free_memory() < 2**50


def test_what_is_free_is_shared_by_processes_and_no_more_than_a_container_may_take(monkeypatch):
    system = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n"}
    container = {"max": "600000\n", "current": "500000\n", "stat": "anon 5\ninactive_file 100000\n"}
    files = system | {f"/sys/fs/cgroup/memory.{name}": text for name, text in container.items()}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_memory() == 200_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory() == 50_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.free_memory() == 256_000


def test_a_compiler_that_runs_out_of_memory_is_no_compiler_that_fails(dist, monkeypatch):
    """The micro-batch gives way then, not the compiler."""

    def out_of_memory(*args):
        raise ERRORS[0]

    monkeypatch.setattr(torch, "compile", lambda model: out_of_memory)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(torch.OutOfMemoryError):
        compile.compiled(model, TrainConfig(compile=True), dist, (4, 8), (4, 8))
    assert model.training


# -- a model that cannot fit


@pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_numbers_that_a_model_holds_are_counted_without_building_it(kind):
    config = GPTConfig(8, 31, n_layer=3, n_head=2, n_embd=12, **kind)
    model = GPT(config)
    held = sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())
    assert numbers_held(config) == held


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    large = ["--n_layer=5000", "--n_embd=1000000", "--n_head=10", "--block_size=16"]
    for command in (["train", "--dataset=tiny"], ["bench", "--dataset=tiny"]):
        assert cli.main([*command, *large, "--device=cpu"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        size = r"a model of [\d,.]+M parameters takes at least [\d,.]+ GB to be trained, and there are [\d,.]+ GB of memory"
        assert re.match(f"error: the settings: {size}", line)
    assert not (tmp_path / "out").exists()


def test_divisors_are_found_without_trying_every_number():
    for n in range(1, 200):
        assert data.divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
        assert data.largest_divisor(n, 7) == max(d for d in range(1, 8) if n % d == 0)
    assert data.largest_divisor(10**12, 10**12 - 1) == 10**12 // 2  # at once
