"""The device of a process, its number format, and PyTorch's global options for it.

Each `auto` is announced in one line with its reason. `operand_dtype` alone decides how a CPU computes in bfloat16.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nanogpt.config import UserError
from nanogpt.kernels import use_matmul

Say = Callable[[str], Any]


def choose_device(cfg: Any, say: Say, local_rank: int = 0, several: bool = False) -> torch.device:
    """The torch.device that `cfg.device` means for this local rank. UserError if there is no such device."""
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


def choose_dtype(cfg: Any, device: torch.device, say: Say) -> torch.dtype:
    """The dtype of matrix products that `cfg.dtype` means on this device.

    Training on a CPU, that is, with a `cfg.matmul`, products.py decides and announces it once the model is known.
    """
    trains = device.type == "cpu" and hasattr(cfg, "matmul")
    if cfg.dtype == "bfloat16" and device.type == "cpu" and not trains and (why := slow_in_bfloat16()):
        say(f"dtype: float32, because {why} (--dtype)")
        return torch.float32
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type != "cuda":
        name, why = "float32", "matrix products in it are exact"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        name, why = "bfloat16", "this GPU multiplies in it at full speed"
    else:
        name, why = "float16", "this GPU has no bfloat16; gradients are scaled"
    if not trains:
        say(f"dtype: {name}, because {why} (--dtype)")
    return getattr(torch, name)


@torch.inference_mode()
def slow_in_bfloat16() -> str | None:
    """A reason not to multiply in bfloat16 on this CPU, which is measured; None if it is faster."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        a @ b  # loads the library
        times = []
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        seconds.append(min(times))
    if seconds[1] < seconds[0]:
        return None
    return f"this CPU is {seconds[1] / seconds[0]:.1f} times slower in bfloat16"


def operand_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands of matrix products computed in `dtype`.

    On a CPU, bfloat16 products have float32 operands, which oneDNN rounds itself: casting them, as autocast does,
    costs more than the products of a small model gain.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def prepare_device(
    device: torch.device, dtype: torch.dtype = torch.float32, deterministic: bool = False, say: Say = lambda line: None
) -> None:
    """Set PyTorch's global options for this device: number formats, determinism, the allocator."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; with fp32_precision alone, torch.compile raises
        if dtype == torch.float32:
            say("float32 products: in TF32, with 10 bits of mantissa, many times faster (--dtype)")
    if device.type == "cpu":
        use_matmul("onednn" if dtype == torch.bfloat16 else "default")  # for training, products.py chooses
        if sys.platform == "linux":
            keep_memory()


def keep_memory() -> None:
    """Have glibc keep freed memory instead of returning it to the system.

    Activations are freed and allocated again at every step; each return costs a page fault for every 4 KiB.
    benchmarks/cpu.py measures what that is worth.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent outside glibc
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):  # the limit of older glibc
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the host is out of memory."""
    words = ["out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED"]  # PyTorch's, C++'s, cuBLAS's
    words += ["could not create a primitive", "could not create a memory"]  # oneDNN's
    said = isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))
