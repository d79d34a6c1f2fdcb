"""How many sequences are worked on at a time: as many as the settings say, or fit the memory. The iteration stays the same.

`repeat_smaller` is around whatever may run out of memory in the loop; `choose_micro_batch` tries before it begins.
"""

import math
import os
import re
from collections import defaultdict
from pathlib import Path

import torch

from nanogpt.config import BenchConfig, RunFailed, UserError
from nanogpt.data import divisors, share_batch
from nanogpt.model import numbers_held
from nanogpt.run.device import out_of_memory
from nanogpt.run.settings import check_bounds
from nanogpt.step import forward_backward

SPARE = 0.2  # of a CPU's free memory is left for others
MORE = 0.2  # of the sequences are tried in addition with `auto`: another allocator, or the next step, may need more
LATER = 32 * 2**20  # bytes that are left for what a run takes later on: stacks of threads, libraries
TO_USE = 4  # bytes a parameter: its float32
TO_TRAIN = defaultdict(lambda: 16, muon=12)  # with its gradient and the optimizer's moments: two, and one of Muon's


def check_size(model_config, source, each=TO_USE, device=None):
    """Refuse a model that the bounds of the settings exclude, or that cannot fit the memory, before it is built.

    source: what an error names. each: bytes a parameter, at the least. device: of its tensors, or the main memory.
    """
    check_bounds(BenchConfig, vars(model_config), source)
    params, others = numbers_held(model_config)
    needed, there = params * each + others * 4, total_memory(device)
    if needed > there:
        what = "to be trained" if each > TO_USE else "to be used"
        raise UserError(
            f"{source}: a model of {params / 1e6:,.2f}M parameters takes at least {needed / 1e9:,.1f} GB {what}, and there "
            f"are {there / 1e9:,.1f} GB of memory; n_embd, n_layer, block_size and the vocabulary make it smaller"
        )


def repeat_smaller(work, state, cfg, dist):
    """work(micro_batch), which works on at most `micro_batch` sequences at a time.

    If the memory runs out in it, it is repeated with half as many, which `state.micro_batch` remembers; until then it
    must not have changed anything. With several processes the others would wait in vain for this one: RunFailed.
    """
    while True:
        micro_batch = state.micro_batch or cfg.batch_size
        try:
            return work(micro_batch)
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            why = f" ({str(e).strip().partition(chr(10))[0]})"
        give_back(dist.device)  # here, where the error no longer holds on to the tensors of the place it came from
        if dist.world_size > 1:
            hint = "--batch_size=auto finds how many fit"
            if cfg.auto_batch:
                total, half = cfg.gradient_accumulation_steps * cfg.batch_size, max(1, micro_batch // 2)
                half = share_batch(cfg, dist.world_size, half)[1]
                hint = f"half of them: --batch_size={half} --gradient_accumulation_steps={total // half}"
            raise RunFailed(f"out of memory with {micro_batch} sequences at a time; {hint}{why}")
        state.micro_batch = halved(micro_batch, cfg, dist, why)


def halved(size, cfg, dist, why=""):
    """Half as many sequences at a time, or what divides the batch; says so. RunFailed where one is too many."""
    if size <= 1:
        raise RunFailed(
            "out of memory with a single sequence at a time; smaller are "
            f"--block_size={max(1, cfg.block_size // 2)} and another --n_layer or --n_embd{why}"
        )
    steps, half = share_batch(cfg, dist.world_size, size // 2)
    dist.say(
        f"micro-batch: {half}, because {size} sequences at a time do not fit the memory; "
        f"an iteration is now {steps} x {half} of them, and the same tokens (--batch_size)"
    )
    return half


def choose_micro_batch(model, cfg, dist):
    """How many sequences a process takes at a time, where trying has to tell; None where batch_size does.

    With `batch_size=auto`, the most that fit. Several processes on GPUs try what they are to take: none of them
    can repeat a step by itself.
    """
    steps, size = share_batch(cfg, dist.world_size)
    if cfg.auto_batch:
        return largest_micro_batch(model, steps * size, cfg, dist)
    if dist.world_size == 1 or dist.device.type != "cuda":
        return None
    while not fits(model, size, cfg, dist):
        size = halved(size, cfg, dist)
    return size


def largest_micro_batch(model, n, cfg, dist):
    """The largest part of this process's n sequences that fits the memory of every process; tried from the least on.

    What is tried is more than what is taken: see MORE and LATER. A CPU that runs out of memory ends the process, so
    there the memory that the last trials took says, before the next one, what it will take.
    """
    if not fits(model, 1, cfg, dist):  # which loads libraries too, so that the trials to come measure sequences alone
        halved(1, cfg, dist)
    size, last, each, peak = 1, 1, 0.0, peak_memory(dist.device)
    for more in divisors(n):
        tried = math.ceil((1 + MORE) * more)
        too_much = dist.device.type == "cpu" and each * (tried - last) > (1 - SPARE) * free_memory()
        if dist.max(int(too_much)) or not fits(model, tried, cfg, dist, later(model, dist)):
            break
        before, peak = peak, peak_memory(dist.device)
        size, last, each = more, tried, max(each, (peak - before) / (tried - last))
    whose = "an iteration" if dist.world_size == 1 else "a process's part of an iteration"
    why = "all" if size == n else "the most that fit the memory"
    dist.say(f"micro-batch: {size} of the {n} sequences of {whose}, {why} (--batch_size)")
    return size


def later(model, dist):
    """Bytes that a run takes later on: copies of gradients where several processes average them, and of what is saved."""
    copies = int(dist.world_size > 1) + 3 * (dist.device.type == "cpu")  # a checkpoint is copied to main memory
    return LATER + copies * sum(p.nbytes for p in model.parameters())


def fits(model, size, cfg, dist, beside=0):
    """Whether a forward and a backward pass of `size` sequences fit the memory of every process, with `beside` bytes free."""
    failed = 0
    with dist.agree():
        try:
            kept = torch.empty(beside, dtype=torch.uint8, device=dist.device)  # on a CPU, address space alone
            try_step(model, size, cfg, dist)
            del kept
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            failed = 1
    model.zero_grad(set_to_none=True)
    give_back(dist.device)
    return not dist.max(failed)


def try_step(model, size, cfg, dist):
    """The memory of a micro-step that is not the first: gradients are there already."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    idx = torch.zeros((size, cfg.block_size), dtype=torch.int64, device=dist.device)
    forward_backward(model, idx, idx, dist)


def give_back(device):
    """Return what PyTorch keeps for later to a GPU, so that other sizes find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device):
    """The most bytes in use so far: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac


def total_memory(device=None):
    """The bytes of memory that a process may take at the most: of a GPU, or of its share of the main memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container's limit
        pass
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory():
    """The bytes of main memory that each of this machine's processes may still take."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used, stat = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current", "stat")
        )
        cached = int(re.search(r"^inactive_file (\d+)", stat, re.M)[1])  # files, which give way
        free = min(free, int(limit) - int(used) + cached)
    except (OSError, TypeError, ValueError):  # no container's limit
        pass
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # without LOCAL_RANK, nobody has looked at it
    return free / (int(processes) if processes.isdigit() and int(processes) else 1)
