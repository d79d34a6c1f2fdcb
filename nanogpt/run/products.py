"""How a CPU multiplies the matrices of a training run: the fastest way at the model's own shapes, measured at the start.

kernels.py has the ways, `--dtype` says whether products must be exact, and `--matmul` skips the measurement. What was
found is remembered for this machine and PyTorch, so that the same run takes the same way again.
"""

import hashlib
import json
import math
import os
import platform
import re
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nanogpt import files, kernels
from nanogpt.config import MATMULS, EvalConfig, TrainConfig
from nanogpt.model import GPT

EXACT = 1e-5  # relative to the largest; float32 rounds products of 1,024 terms to 1e-6 of it, bfloat16 to 1e-3
WORTH = 1.15  # how much faster another way must be: results that differ in the last bit are not worth less
LARGEST = 1024  # a product is measured with at most this many rows, columns and terms, so that it takes milliseconds
ENOUGH = 0.03  # seconds for the turns of one shape
NAMES = {"default": "PyTorch's default library", "onednn": "oneDNN", "cast": "bfloat16 tensors"}

Rates = dict[str, float]  # {one of MATMULS: FLOP/s}


def choose_products(model: GPT, cfg: TrainConfig | EvalConfig, dist: Any, tokens: int) -> None:
    """Choose how this model multiplies on a CPU, and announce it; sets `cfg.matmul`, `dist.dtype` and the kernels.

    tokens: in a forward pass. With `--dtype=bfloat16`, products are in bfloat16 if that is faster. A collective
    operation.
    """
    if dist.device.type != "cpu" or cfg.dtype == "float16":
        return
    if cfg.matmul == "auto" and dist.max(int(memory_is_limited())):
        dist.say(
            "matmul: default, because ulimit limits this process's memory, and oneDNN crashes when it runs out (--matmul)"
        )
        cfg.matmul = "default"
    inexact, rates = measured(model, tokens)
    exact = not dist.max(int(inexact > EXACT))  # oneDNN's products in float32, on all processes
    rates = dict(zip(MATMULS, dist.sum([rates[name] for name in MATMULS]), strict=True))
    rounds = cfg.dtype == "bfloat16"
    if cfg.matmul == "onednn" and not exact and not rounds:
        dist.say("matmul: not oneDNN's, as in the run so far, because on this CPU they are not exact in float32")
        cfg.matmul = "auto"
    allowed = [name for name in MATMULS if rounds or name == "default" or (name == "onednn" and exact)]
    chosen = best(rates, allowed) if cfg.matmul == "auto" else cfg.matmul
    in_bfloat16 = chosen == "cast" or (chosen == "onednn" and not exact)
    dist.say(announcement(chosen, exact, rates, cfg))
    kernels.use_matmul(chosen)
    cfg.matmul, dist.dtype = chosen, torch.bfloat16 if in_bfloat16 else torch.float32


def memory_is_limited() -> bool:
    """Whether the system refuses memory to this process beyond a limit, which is not that of a container."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    limits = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def best(rates: Rates, allowed: list[str]) -> str:
    """The fastest of the allowed ways; of similar ones the first."""
    chosen = allowed[0]
    for name in allowed[1:]:
        if rates[name] > WORTH * rates[chosen]:
            chosen = name
    return chosen


def announcement(chosen: str, exact: bool, rates: Rates, cfg: TrainConfig | EvalConfig) -> str:
    """The line that names the number format of products and what multiplies them. exact: whether oneDNN's are float32."""
    names = dict(NAMES, onednn="oneDNN" if exact else "oneDNN in bfloat16")
    in_bfloat16 = chosen == "cast" or (chosen == "onednn" and not exact)
    others = [f"{names[name]} {rates[name] / 1e9:,.0f}" for name in MATMULS if name != chosen]
    return (
        f"dtype: {'bfloat16' if in_bfloat16 else 'float32'}, products by {names[chosen]} at {rates[chosen] / 1e9:,.0f} "
        f"GFLOP/s{' (--matmul)' if cfg.matmul != 'auto' else f'; {others[0]}, {others[1]} (--dtype, --matmul)'}"
    )


def measured(model: GPT, tokens: int) -> tuple[float, Rates]:
    """(relative error of oneDNN's float32 products, the Rates of the model's products), perhaps from an earlier run."""
    layers = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    counts = Counter((min(k, LARGEST), min(n, LARGEST)) for k, n in layers)
    tokens = min(tokens, LARGEST)
    path, name = cache_file(), f"{tokens} tokens, {sorted(counts.items())}"
    known = read(path)
    if name not in known:
        known[name] = [inexactness(max(k for k, _ in counts)), *measure(counts, tokens).values()]
        with suppress(OSError):  # a folder that cannot be written to: measure again the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, json.dumps(known).encode())
    error, *rates = known[name]
    return error, dict(zip(MATMULS, rates, strict=True))


def measure(counts: dict[tuple[int, int], int], tokens: int, rounds: int = 10) -> Rates:
    """The FLOP/s of linear layers, forward and backward, in each way of MATMULS.

    counts: {(in, out): number of layers}. In each round all ways take turns; the shortest time of each counts.
    Large products have fewer rounds, at least 4. The first one also loads the kernels.
    Afterwards the last one is set.
    """
    seconds = dict.fromkeys(MATMULS, 0.0)
    for (k, n), count in counts.items():
        x, weight = torch.ones(tokens, k, requires_grad=True), torch.ones(n, k, requires_grad=True)
        grad, shortest = torch.ones(tokens, n), dict.fromkeys(MATMULS, math.inf)
        end = time.perf_counter() + ENOUGH
        for turn in range(rounds):
            if turn >= 4 and time.perf_counter() > end:
                break
            for name in MATMULS:
                kernels.use_matmul(name)
                began = time.perf_counter()
                torch.autograd.grad(kernels.linear(x, weight), (x, weight), grad)
                shortest[name] = min(shortest[name], time.perf_counter() - began)
        for name in MATMULS:
            seconds[name] += count * shortest[name]
    flops = sum(6 * tokens * k * n * count for (k, n), count in counts.items())
    return {name: flops / seconds[name] for name in MATMULS}


@torch.no_grad()
def inexactness(terms: int) -> float:
    """The largest error of oneDNN's float32 products of this many terms, relative to the largest product."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, terms, generator=generator) for _ in range(2))
    kernels.use_matmul("onednn")
    y = kernels.linear(x, weight)
    right = x.double() @ weight.double().t()
    return ((y - right).abs().max() / right.abs().max()).item()


# -- what was found is remembered


def cache_file() -> Path:
    """The file of what was measured on this machine, with this PyTorch and this number of threads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanogpt"
    simulated = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")]
    machine = [cpu(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads(), *simulated]
    return folder / f"products-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"


def cpu() -> str:
    """The processor's name and abilities, as far as the system reports them."""
    with suppress(OSError):
        lines = re.findall(r"^(?:model name|flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return "\n".join(sorted(set(lines)))
    return platform.processor()


def read(path: Path) -> dict[str, list[float]]:
    """What an earlier run found; nothing if there is no such file, or it is damaged."""
    try:
        found = json.loads(files.read(path))
        sound = isinstance(found, dict) and all(
            isinstance(v, list) and len(v) == 1 + len(MATMULS) and all(isinstance(x, float) and x > 0 for x in v)
            for v in found.values()
        )
    except (OSError, ValueError):
        return {}
    return found if sound else {}
