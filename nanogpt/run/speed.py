"""The speed of this machine: peak rates, the rate of a model's matrix products, and estimates of a run's length."""

import math
import shlex
import statistics
import time
from functools import partial
from typing import Any

import torch

from nanogpt.config import TrainConfig
from nanogpt.kernels import casts_to_bfloat16
from nanogpt.model import GPT
from nanogpt.run import gpus


def device_peak(dist: Any) -> float:
    """Peak FLOP/s of the devices of all processes at this dtype: the datasheet's if it is known, otherwise measured."""
    if dist.device.type == "cuda" and dist.dtype != torch.float32:
        name = torch.cuda.get_device_name(dist.device)
        if tflops := gpus.peak_tflops(name):
            dist.say(
                f"peak: {tflops} TFLOP/s, the datasheet's for {name} at {str(dist.dtype)[6:]}; MFU is relative to it"
            )
            return tflops * 1e12 * dist.world_size
    rate = measured_peak(dist) * dist.world_size
    if dist.device.type == "cpu":
        threads = torch.get_num_threads()
        what = f"this CPU with {threads} thread{'s' if threads > 1 else ''}"
    else:
        what = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "this GPU"
    dist.say(f"peak: {rate / 1e12:.3g} TFLOP/s, measured on {what} at {str(dist.dtype)[6:]}; MFU is relative to it")
    return rate


PLAUSIBLE = 0.9  # of the peak of a large product; no model reaches more


def peak_beside(flops_rate: float, peak: float, dist: Any) -> float:
    """The peak of `device_peak`, measured again if `flops_rate` is so near to it that it must be too low.

    A peak is too low if another program used the machine meanwhile. NaN, as on all processes but the main one, stays.
    """
    if flops_rate > PLAUSIBLE * peak:
        again = measured_peak(dist) * dist.world_size
        if again > peak:
            dist.say(f"peak: {again / 1e12:.3g} TFLOP/s, measured again, since {peak / 1e12:.3g} was too low")
        peak = max(peak, again)
    return peak


def yardstick_dtype(dist: Any) -> torch.dtype:
    """The dtype of the tensors that the model's layers multiply on this device."""
    return torch.bfloat16 if dist.device.type == "cpu" and casts_to_bfloat16() else dist.operand_dtype


def measured_peak(dist: Any) -> float:
    """FLOP/s of a large matrix product on the device: the fastest of those that fit in a tenth of a second."""
    n = 1024 if dist.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=dist.device, dtype=yardstick_dtype(dist)) for _ in range(2))
    a @ b  # the first product loads the library
    synchronize(dist.device)
    fastest, end = math.inf, time.perf_counter() + 0.1
    while fastest == math.inf or time.perf_counter() < end:
        synchronize(dist.device)
        begin = time.perf_counter()
        a @ b
        synchronize(dist.device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * n**3 / fastest


def products_rate(model: GPT, dist: Any, tokens: int, repeats: int = 50) -> float:
    """FLOP/s of the model's matrix products alone, forward and backward, over this number of tokens.

    Each product has its own buffers, since in a real iteration its operands are not in the CPU's cache either.
    """
    layers = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    new = partial(torch.randn, device=dist.device, dtype=yardstick_dtype(dist))
    x, w, g = [new(tokens, k) for k, _ in layers], [new(n, k) for k, n in layers], [new(tokens, n) for _, n in layers]
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - began < 5):
        synchronize(dist.device)
        begin = time.perf_counter()
        for xi, wi in zip(x, w, strict=True):
            xi @ wi.t()
        for xi, wi, gi in zip(x, w, g, strict=True):
            gi @ wi, gi.t() @ xi
        synchronize(dist.device)
        times.append(time.perf_counter() - begin)
    return sum(3 * 2 * tokens * k * n for k, n in layers) / statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def expected_seconds(steps: int, flops_per_iter: float, peak: float, layers: int) -> float:
    """Estimated seconds for `steps` iterations, right within a factor of about two.

    Assumes that models reach a third of the device's peak, and that a block takes a millisecond at least. layers:
    blocks computed per iteration, over all micro-steps.
    """
    return steps * max(flops_per_iter / peak * 3, layers * 1e-3)


HOURS = 2 * 3600.0  # seconds from which on a run is called long; the estimate may be twice the true time


def takes_hours(cfg: TrainConfig, dist: Any, step: int, flops: float, peak: float, micro_steps: int) -> str | None:
    """A line about the estimated time of the rest of the run, and what would shorten it; None if it takes no hours.

    flops: of an iteration. peak: FLOP/s of the device. An evaluation is a forward pass, a third of the work, over
    both splits.
    """
    if not math.isfinite(peak):
        return None
    steps = cfg.max_iters - step
    evaluated = 2 * cfg.eval_iters / (3 * cfg.gradient_accumulation_steps)  # in iterations
    each = expected_seconds(1, flops, peak, micro_steps * cfg.n_layer)
    seconds = each * (steps + steps / cfg.eval_interval * evaluated)
    if seconds < HOURS:
        return None
    smaller = "--max_iters, --gradient_accumulation_steps, --batch_size, --block_size, --n_layer or --n_embd"
    quick = f"; sh train.py config/fast_shakespeare_cpu.py --dataset={shlex.quote(cfg.dataset)} takes seconds"
    return (
        f"time: {duration(seconds)} for {steps:,} iterations, by a rough estimate; smaller {smaller} make it "
        f"shorter{quick if dist.device.type == 'cpu' else ''}"
    )


def duration(seconds: float) -> str:
    """'about 9 minutes'."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
