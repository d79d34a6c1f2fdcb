"""The size of micro-batches: batch_size, or what fits in memory. The tokens of an iteration stay the same.

`choose_micro_batch` tries sizes before the run; `retry_smaller` repeats what ran out of memory during it.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import BenchConfig, RunFailed, TrainConfig, UserError
from nanogpt.data import largest_divisor, micro_batch_sizes, share_batch
from nanogpt.generate import bytes_per_token
from nanogpt.model import GPT, GPTConfig, numbers_held
from nanogpt.optim import trained_parameters
from nanogpt.run.device import out_of_memory
from nanogpt.run.distributed import Dist
from nanogpt.run.settings import check_bounds
from nanogpt.run.shards import Shards
from nanogpt.step import forward_backward

SPARE = 0.2  # fraction of a CPU's free memory to leave free
MORE = 0.2  # `auto` tries this fraction more sequences, since another allocator, or a later step, may need more memory
LATER = 32 * 2**20  # bytes to leave for what a run allocates later: stacks of threads, libraries
SHORTEST = 256  # tokens of context that `crop_to_fit` leaves
TO_USE = 4  # bytes per parameter: its float32
TO_TRAIN = defaultdict(lambda: 16, muon=12)  # plus its gradient and the optimizer's moments: two of AdamW, one of Muon
FROZEN = dict(float32=4, bfloat16=2)  # bytes per parameter that is not trained


def bytes_to_train(cfg: TrainConfig, dist: Dist) -> float:
    """The least bytes per parameter of the model that training takes here; with LoRA, hardly any is trained."""
    shards = dist.shards.count if dist.shards else 1
    return FROZEN[cfg.lora_base] if cfg.lora_rank else TO_TRAIN[cfg.optimizer] / shards


def choose_shards(cfg: TrainConfig, model_config: GPTConfig, dist: Dist) -> None:
    """Set `dist.shards` as `cfg.shard` says; None if the model is not sharded. UserError if it cannot be."""
    processes, how = dist.world_size, cfg.shard
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)  # processes of this machine
    dist.shards = None
    if processes == 1:
        if how in ("full", "hybrid"):
            dist.say("shard: none, because there is one process (--shard)")
        return
    if how == "auto":
        how, why = whether_to_shard(cfg, model_config, dist)
        dist.say(f"shard: {how}, because {why} (--shard)")
    if how == "hybrid" and processes % here:
        raise UserError(
            f"--shard=hybrid: {processes} processes are not the same number, {here}, on each machine; --shard=full"
        )
    count = {"none": 1, "full": processes, "hybrid": here}[how]
    if count > 1:
        dist.shards = Shards(count, processes // count, dist.rank)


def whether_to_shard(cfg: TrainConfig, model_config: GPTConfig, dist: Dist) -> tuple[str, str]:
    """(`none` or `full`, the reason): full if the state of the run and a single sequence do not fit in memory."""
    if cfg.lora_rank:
        return "none", "hardly any parameters are trained with LoRA"
    if dist.device.type == "cpu":
        return "none", "processes on CPUs share their memory, and exchange weights slowly"
    params, others = numbers_held(model_config)
    state = params * (TO_TRAIN[cfg.optimizer] + 4) + others * 4 + LATER  # plus the gradients of a micro-batch
    C, F, T = model_config.n_embd, model_config.hidden, cfg.block_size
    a_sequence = 4 * T * (model_config.n_layer * (10 * C + 3 * F) + 3 * model_config.vocab_size)
    needed, there = (state + a_sequence) / 1e9, total_memory(dist.device) / 1e9
    fits = "fit" if needed <= there else "do not fit"
    how = "none" if needed <= there else "full"
    return how, f"about {needed:,.1f} GB a process {fits} the {there:,.1f} GB of its GPU"


def check_size(model_config: GPTConfig, source: Any, each: float = TO_USE, device: torch.device | None = None) -> None:
    """Raise UserError, before a model is built, if its shape is out of bounds or it cannot fit in memory.

    source: named in errors. each: the least bytes per parameter. device: whose memory counts; None: main memory.
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


def crop_to_fit(model: GPT, texts: int, name: str, dist: Dist) -> None:
    """Shorten a rotary model's context until the keys and values of so many texts take at most half the free memory.

    name: of the setting or program that determines `texts`. Beyond its context, such a model attends to the last tokens.
    """
    config = model.config
    each = bytes_per_token(config, model.get_parameter("lm_head.weight"))
    free = torch.cuda.mem_get_info(dist.device)[0] if dist.device.type == "cuda" else free_memory()
    longest = config.block_size
    while config.modern and longest > SHORTEST and texts * longest * each > free / 2:
        longest //= 2
    if longest < config.block_size:
        dist.say(f"context: {longest} of the model's {config.block_size} tokens, for {texts} texts in memory ({name})")
        model.crop_block_size(longest)


def retry_smaller(work: Callable[[int], Any], state: Any, cfg: TrainConfig, dist: Dist) -> Any:
    """Call work(micro_batch), where micro_batch is the maximum number of sequences to process at a time.

    If it runs out of memory, halve `state.micro_batch` and call it again; `work` must not have changed anything by
    then. With several processes, raises RunFailed instead, since the others wait for this one.
    """
    while True:
        micro_batch = state.micro_batch or cfg.batch_size
        try:
            return work(micro_batch)
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            why = f" ({str(e).strip().partition(chr(10))[0]})"
        give_back(dist.device)  # not in the except clause, where the traceback still refers to the tensors
        if dist.world_size > 1:
            hint = "--batch_size=auto finds how many fit"
            if cfg.auto_batch:
                total, half = cfg.gradient_accumulation_steps * cfg.batch_size, max(1, micro_batch // 2)
                half = largest_divisor(total, share_batch(cfg, dist.world_size, half)[1])
                hint = f"half of them: --batch_size={half} --gradient_accumulation_steps={total // half}"
            raise RunFailed(f"out of memory with {micro_batch} sequences at a time; {hint}{why}")
        state.micro_batch = halved(micro_batch, cfg, dist, why)


def halved(size: int, cfg: TrainConfig, dist: Dist, why: str = "") -> int:
    """Half as many sequences at a time, or what divides the batch. Raises RunFailed if one sequence is too many."""
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


def choose_micro_batch(run: Any) -> int | None:
    """The number of sequences that a process processes at a time, found by trial; None if batch_size decides.

    With `batch_size=auto`, as many as fit. Several processes on GPUs try batch_size beforehand, since none of them
    can repeat a step alone. run: a run.run.Run whose model is not wrapped yet; used are gpt, optimizer, cfg, dist.
    """
    cfg, dist = run.cfg, run.dist
    _, size = share_batch(cfg, dist.world_size)
    if dist.shards:
        if cfg.auto_batch:
            raise UserError(
                "--batch_size=auto: what fits is found by trial, at which one process may fail alone, and a sharded model "
                "needs all of them; expected a number, such as --batch_size=1"
            )
        return None
    if cfg.auto_batch:
        return largest_micro_batch(run)
    if dist.world_size == 1 or dist.device.type != "cuda":
        return None
    while not fits(run, size):
        size = halved(size, cfg, dist)
    return size


def largest_micro_batch(run: Any) -> int:
    """The largest of `data.micro_batch_sizes` that fits in every process's memory, trying from 1 upward.

    Each trial takes more memory than the size needs: see MORE and LATER. A process that exhausts main memory is
    killed, so on a CPU the memory of the next trial is first predicted from the trials before it.
    """
    cfg, dist = run.cfg, run.dist
    if not fits(run, 1):  # also loads libraries, so that later trials measure only the sequences
        halved(1, cfg, dist)
    size, last, each, peak = 1, 1, 0.0, peak_memory(dist.device)
    sizes = micro_batch_sizes(cfg, dist.world_size)
    for more in sizes:
        tried = math.ceil((1 + MORE) * more)
        too_much = dist.device.type == "cpu" and each * (tried - last) > (1 - SPARE) * free_memory()
        if dist.max(int(too_much)) or not fits(run, tried, later(run.gpt, dist)):
            break
        before, peak = peak, peak_memory(dist.device)
        size, last, each = more, tried, max(each, (peak - before) / (tried - last))
    whose = "an iteration" if dist.world_size == 1 else "a process's part of an iteration"
    why = "all" if size == sizes[-1] else "the most that fit the memory"
    dist.say(f"micro-batch: {size} of the {sizes[-1]} sequences of {whose}, {why} (--batch_size)")
    return size


def later(model: GPT, dist: Dist) -> int:
    """Bytes that a run allocates later: gradients that are averaged over processes, and copies for checkpoints."""
    copies = int(dist.world_size > 1) + 3 * (dist.device.type == "cpu")  # a checkpoint is copied to main memory
    return LATER + copies * sum(p.nbytes for p in trained_parameters(model).values())


def fits(run: Any, size: int, beside: int = 0) -> bool:
    """Whether a step with micro-batches of `size` sequences, and `beside` bytes, fit in every process's memory."""
    model, dist, failed = run.gpt, run.dist, 0
    with dist.agree():
        try:
            kept = torch.empty(beside, dtype=torch.uint8, device=dist.device)  # on a CPU, only address space
            try_step(run, size)
            del kept
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            failed = 1
    model.zero_grad(set_to_none=True)
    give_back(dist.device)
    return not dist.max(failed)


def try_step(run: Any, size: int) -> None:
    """Allocate what a micro-step after the first takes, which has gradients already, and then what the update takes."""
    for p in trained_parameters(run.gpt).values():
        p.grad = torch.zeros_like(p)
    idx = torch.zeros((size, run.cfg.block_size), dtype=torch.int64, device=run.dist.device)
    forward_backward(run.gpt, idx, idx, run.dist)
    update = getattr(run.optimizer, "peak_bytes", lambda: 0)()
    torch.empty(update, dtype=torch.uint8, device=run.dist.device)  # no update: it would exchange shares


def give_back(device: torch.device) -> None:
    """Release GPU memory that PyTorch caches, so that other sizes fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        return 1024 * number(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except (OSError, ValueError):  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac


def number(pattern: str, text: str) -> int:
    """The integer in the group of a regular expression. Raises ValueError if the text does not match."""
    match = re.search(pattern, text)
    if not match:
        raise ValueError(f"{pattern} is not there")
    return int(match[1])


def total_memory(device: torch.device | None = None) -> float:
    """Memory in bytes that a process may use at most: all of a GPU, or its share of main memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container's limit
        pass
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory() -> float:
    """Main memory in bytes that each of this machine's processes may still use."""
    try:
        free = 1024 * number(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except (OSError, ValueError):  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        limit, used, stat = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current", "stat")
        )
        cached = number(r"(?m)^inactive_file (\d+)", stat)  # of files, freed on demand
        free = min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError):  # no container's limit
        pass
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # checked only if LOCAL_RANK is set
    return free / (int(processes) if processes.isdigit() and int(processes) else 1)
