"""torch.compile: whether it is worth its time, a trial before the run, and a fallback if it fails."""

import logging
import math
import time
from typing import Any

import torch

from nanogpt.run.device import Say, out_of_memory
from nanogpt.run.distributed import Dist
from nanogpt.step import forward_backward

COMPILE_PAYS = {"cuda": 60, "cpu": 600}  # worth it from this many seconds of training on: see docs/speed.md


def choose_compile(cfg: Any, device: torch.device, say: Say, seconds: float) -> bool:
    """Whether to compile a run of about `seconds`: `cfg.compile`, or with `auto`, whether it is worth it on this device."""
    if cfg.compile != "auto":
        return cfg.compile
    least = COMPILE_PAYS.get(device.type, math.inf)
    if least == math.inf or not seconds:
        why = f"it does not pay {'without training' if not seconds else 'on ' + device.type}"
    else:
        ahead = f"about {seconds / 60:.0f} minutes" if seconds >= 90 else "a minute or less"
        why = f"on {device.type} it pays in runs of more than {least} seconds, and this one takes {ahead}"
    say(f"compile: {seconds >= least}, because {why} (--compile)")
    return seconds >= least


def compiled(
    model: torch.nn.Module,
    cfg: Any,
    dist: Dist,
    eval_shape: tuple[int, int] | None = None,
    train_shape: tuple[int, int] | None = None,
    seconds: float = 0.0,
) -> Any:
    """The compiled model, which may be one that DDP wraps, with the same weights, or the model itself if `cfg.compile` is off or compilation fails.

    eval_shape, train_shape: the (B, T) with which to try a forward pass, and a forward and backward pass; without
    eval_shape nothing is tried. seconds: estimated training time. Raises if the trial runs out of memory.
    """
    if not choose_compile(cfg, dist.device, dist.say, seconds):
        return model
    errors = CompileErrors()
    dist.say(f"compile: takes a while before the first {'step' if eval_shape else 'token'}")
    began = time.perf_counter()
    fast = compile_blocks(model, dist) if dist.shards else torch.compile(model)
    if eval_shape:
        try:
            try_out(fast, model, dist, eval_shape, train_shape)
        except Exception as e:  # of any kind: a compiler, its driver, or PyTorch's own
            if out_of_memory(e):
                raise
            errors.note(e)
        if errors.reasons:
            uncompile_blocks(model)
            dist.say(f"compile: failed, going on without it ({errors.reasons[0]})")
            return model
        dist.say(f"compile: took {time.perf_counter() - began:.0f} s")
    errors.say = dist.say
    return fast


def compile_blocks(model: Any, dist: Dist) -> Any:
    """Compile each block of a sharded model: between them its weights are gathered, which is not compiled."""
    dist.say("compile: block by block, since the model is sharded (--shard)")
    for block in model.transformer["h"]:
        block.forward = torch.compile(block.forward)
    return model


def uncompile_blocks(model: Any) -> None:
    """Undo what `compile_blocks` did, if it did."""
    for block in model.modules():
        block.__dict__.pop("forward", None)


def try_out(
    fast: Any, model: torch.nn.Module, dist: Dist, eval_shape: tuple[int, int], train_shape: tuple[int, int] | None
) -> None:
    """Compile the graphs that a run needs, without averaging gradients: a failure here may be of this process alone.

    If the targets were the same tensor as idx, compilation would rely on it.
    """
    try:
        if train_shape:
            idx = torch.zeros(train_shape, dtype=torch.int64, device=dist.device)
            with dist.averaging(fast, when=False):
                forward_backward(fast, idx, idx.clone(), dist)
        model.eval()
        idx = torch.zeros(eval_shape, dtype=torch.int64, device=dist.device)
        with torch.no_grad(), dist.autocast():
            fast(idx, idx.clone())
    finally:
        model.train(train_shape is not None)
        dist.clear_gradients(model)


class CompileErrors(logging.Filter):
    """Lets parts that fail to compile run uncompiled, and records the reasons instead of logging pages of them."""

    def __init__(self) -> None:
        super().__init__()
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
        self.reasons: list[str] = []
        self.say: Say | None = None  # set once the trial is over
        logging.getLogger("torch._dynamo.convert_frame").addFilter(self)

    def note(self, error: object) -> None:
        """Record an error's first line that says something; after the trial, print the first of them."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lines = [line for line in lines if not line.endswith("raised:")] or lines  # a heading of PyTorch's
        self.reasons.append(lines[0] if lines else type(error).__name__)
        if self.say and len(self.reasons) == 1:
            self.say(f"compile: a part runs uncompiled ({self.reasons[0]})")

    def filter(self, record: logging.LogRecord) -> bool:
        """Called by logging with each record; False keeps it from being printed."""
        self.note(record.exc_info[1] if record.exc_info else record.getMessage())
        return False
