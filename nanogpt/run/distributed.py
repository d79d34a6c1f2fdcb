"""Processes and devices: which one this is, what it computes on, and how several act as one.

One process unless `torchrun` started several (LOCAL_RANK is set). Every `auto` that depends on the machine is
settled here, and said in one line.
"""

import ctypes
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TextIO

import torch
import torch.distributed as td

from nanogpt.config import RunFailed, UserError


class PeerLost(RunFailed):
    """Another process ended while this one waited for it."""

    second_hand = True


@dataclass
class Dist:
    """This process among all: its rank, its device, and the collective operations that the loop needs."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    out: TextIO = sys.stdout  # where `say` prints
    host_group: object = None  # connects the hosts; their devices go on meanwhile

    @property
    def is_main(self):
        """Whether this process prints, logs and saves."""
        return self.rank == 0

    def say(self, line):
        """Print a line, once however many processes there are."""
        if self.is_main:
            print(line, file=self.out, flush=True)

    def to_device(self, tensor):
        """A copy on the device; on a GPU it is made while the host goes on."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @property
    def operand_dtype(self):
        """The dtype of a product's operands: a CPU that multiplies in bfloat16 rounds them itself, on the way in."""
        return torch.float32 if self.device.type == "cpu" and self.dtype == torch.bfloat16 else self.dtype

    def autocast(self):
        """Matrix products in `dtype` within the context; nothing changes where their operands are float32."""
        if self.operand_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def wrap(self, model):
        """The model with gradients averaged over all processes; the model itself where there is one."""
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        same = dict(broadcast_buffers=False)  # tables of angles are the same everywhere
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **same)

    def synchronised(self, model, last):
        """Context of a micro-step: only the last one's backward pass averages gradients."""
        return nullcontext() if last or self.world_size == 1 else model.no_sync()

    def mean(self, tensor):
        """The mean of a tensor over all processes, without waiting for the device."""
        if self.world_size > 1:
            tensor = tensor.clone()
            td.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def sum(self, numbers):
        """Python numbers, each summed over all processes in float64."""
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        td.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, tensor):
        """The tensors of all processes, of one shape, one after another along the first dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        td.all_gather(parts, tensor)
        return torch.cat(parts)

    def max(self, number):
        """The largest of an integer over all processes."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        td.all_reduce(tensor, op=td.ReduceOp.MAX, group=self.host_group)
        return int(tensor)

    @contextmanager
    def agree(self):
        """If a process fails within this context, all fail at its end: it with its own error, the others with its reason.

        Nothing within may wait for another process.
        """
        failure = None
        try:
            yield
        except Exception as e:
            failure = e
        if self.max(int(failure is not None)):
            reasons = [None] * self.world_size
            if self.world_size > 1:
                td.all_gather_object(reasons, failure and (str(failure) or type(failure).__name__), self.host_group)
            told = (f"process {i} could not go on: {reason}" for i, reason in enumerate(reasons) if reason)
            raise failure or RunFailed(*told)

    def barrier(self):
        """Wait until every process has come here."""
        if self.world_size > 1:
            td.barrier(group=self.host_group)


@contextmanager
def setup(cfg, out=None):
    """The Dist of this process, its process group open; closed at the end, also after an error.

    `out`: where its announcements are printed, by default standard output.
    """
    out = out or sys.stdout
    several = "LOCAL_RANK" in os.environ  # some clusters set the other two where one process is all there is
    rank, local_rank, world_size = place() if several else (0, 0, 1)
    say = partial(print, file=out, flush=True) if rank == 0 else lambda line: None
    if not several and (os.environ.get("WORLD_SIZE") or "1") != "1":
        say("processes: one, because LOCAL_RANK is not set, whatever RANK and WORLD_SIZE say; torchrun sets all three")
    device = choose_device(cfg, say, local_rank, several)
    dist = Dist(device, choose_dtype(cfg, device, say), rank, local_rank, world_size, out)
    prepare_device(device, dist.dtype, getattr(cfg, "deterministic", False))
    if device.type == "cuda" and dist.dtype == torch.float32:
        say("float32 products: in TF32, with 10 bits of mantissa, many times faster (--dtype)")
    if not several:
        yield dist
        return
    backend = getattr(cfg, "backend", "auto")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
        say(f"backend: {backend}, the one for {device.type} devices (--backend)")
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"--backend=nccl: works on GPUs alone, and the device is {device.type}; --backend=gloo")
    try:
        td.init_process_group(backend, device_id=device if backend == "nccl" else None)
    except (RuntimeError, ValueError) as e:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        why = str(e).strip().partition("\n")[0]
        raise RunFailed(f"{where}: the {world_size} processes did not meet there ({why}); torchrun sets both") from None
    try:
        dist.host_group = td.new_group(backend="gloo") if backend != "gloo" else td.group.WORLD
        yield dist
    except RuntimeError as e:
        if not re.search("Connection (closed|reset) by peer", str(e)):
            raise
        raise PeerLost("another process ended, and its own lines say why; the run stops") from None
    finally:
        td.destroy_process_group()


def place():
    """(rank, local rank, number of processes), as torchrun sets them. UserError unless all that it sets is there and right."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if len(given) < len(names):
        missing = " and ".join(name for name in names if name not in given)
        raise UserError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']}: {missing} must be set too, as torchrun does; "
            "without LOCAL_RANK one process is all there is"
        )
    least = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_PORT=0, LOCAL_WORLD_SIZE=1)
    wrong = [
        f"{name}={text}: expected a whole number from {low} on, as torchrun sets it"
        for name, low in least.items()
        if (text := os.environ.get(name, str(low))) and not (text.isascii() and text.isdigit() and int(text) >= low)
    ]
    if wrong:
        raise UserError(*wrong)
    rank, local_rank, world_size = (int(given[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    for name, number in dict(RANK=rank, LOCAL_RANK=local_rank).items():
        if number >= world_size:
            raise UserError(f"{name}={number}: expected less than WORLD_SIZE={world_size}, as torchrun sets them")
    return rank, local_rank, world_size


def choose_device(cfg, say, local_rank=0, several=False):
    """The torch.device that `cfg.device` means for this local rank. UserError where there is none such."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = {"cuda": "a GPU is there", "mps": "Apple's GPU is there", "cpu": "no GPU was found"}[name]
        if several and name == "mps":
            name, why = "cpu", "several processes cannot share Apple's GPU"
        say(f"device: {name}, because {why} (--device)")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: expected cpu, cuda, cuda:N or mps") from None
    if device.type == "cpu":
        return device
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in available:
        raise UserError(f"--device={name}: expected cpu, cuda, cuda:N or mps")
    if not available[device.type]:
        raise UserError(
            f"--device={name}: this PyTorch ({torch.__version__}) sees no {device.type} device; --device=cpu works everywhere"
        )
    index = local_rank if several else device.index or 0
    if index >= available[device.type]:
        asked = f"{local_rank + 1} processes need as many GPUs" if several else f"there is no device {index}"
        raise UserError(f"--device={name}: {asked}, and this machine has {available[device.type]}")
    if device.type == "cuda":
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def choose_dtype(cfg, device, say):
    """The torch.dtype that `cfg.dtype` means on this device."""
    units = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    if cfg.dtype == "bfloat16" and device.type == "cpu" and not units:
        say("dtype: float32, because this CPU has no units for bfloat16 (AMX) and would be slower in it")
        return torch.float32
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if units:
        name, why = "float32", "matrix products in it are exact; bfloat16 is faster on this CPU"
    elif device.type != "cuda":
        name, why = "float32", f"matrix products in it are exact, and not slower at small sizes on {device.type}"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        name, why = "bfloat16", "this GPU multiplies in it at full speed"
    else:
        name, why = "float16", "this GPU has no bfloat16; gradients are scaled"
    say(f"dtype: {name}, because {why} (--dtype)")
    return getattr(torch, name)


def choose_seed(cfg, dist):
    """Settle `seed=auto` in the config itself, the same on all processes, so that it is saved with the run."""
    if cfg.seed == "auto":
        drawn = int.from_bytes(os.urandom(4), "little") if dist.is_main else 0
        cfg.seed = int(dist.sum([drawn])[0])
        dist.say(f"seed: {cfg.seed}, from the operating system (--seed={cfg.seed} repeats this run)")


def prepare_device(device, dtype=torch.float32, deterministic=False):
    """What makes every model faster on this device; or, where `deterministic`, give the same bits every time."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; fp32_precision alone makes the compiler's look-ups raise
    if device.type == "cpu":
        # in bfloat16 the operands and results stay float32 in memory: casting them, as autocast does, costs more
        # than the products of a small model gain
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    if device.type == "cpu" and sys.platform == "linux":
        keep_memory()


def keep_memory():
    """Tell glibc to keep freed memory instead of returning it to the system.

    Activations are freed and allocated again at every step; each return costs a page fault for every 4 KiB.
    benchmarks/cpu.py measures what that is worth.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent outside glibc
    if mallopt:
        if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):  # an older glibc allows no more
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error):
    """Whether an exception says that the device, or on a CPU this process, got no more memory."""
    words = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")  # PyTorch's, C++'s, cuBLAS's
    words += ("could not create a primitive", "could not create a memory")  # oneDNN's
    said = isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))
