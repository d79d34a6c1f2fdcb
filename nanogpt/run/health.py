"""The health of a run: each step is judged on the device, so that a bad update is never applied and nothing waits.

Shapes: scalars are tensors of no dimension; `recent` holds the losses of the last RECENT sound steps.
"""

import math
from typing import Any

import torch
from torch import Tensor

from nanogpt.config import RunFailed, TrainConfig
from nanogpt.run.distributed import Dist

RECENT = 64  # number of steps that a loss is compared with
REFRESH = 8  # steps from one computation of the limit to the next
FAR = 6.0  # standard deviations above their mean from which on a loss is a spike
PATIENCE = 100  # steps in a row that may be skipped while float16's loss scaling finds its scale


class Health:
    """Judges each step by its loss and gradient norm. `state` holds all of its state, {name: tensor}."""

    def __init__(self, cfg: TrainConfig, device: torch.device) -> None:
        self.skip_spikes = cfg.skip_spikes
        recent = torch.full((RECENT,), math.inf, device=device)  # no loss is a spike until they are known
        self.state = {"health.recent": recent, "health.limit": recent.max()}

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """(skip, spike) of a step, each a tensor holding 0 or 1.

        skip: the update must not be applied, because the loss or the norm is not finite, or because of a spike if
        those are to be skipped. spike: the loss is far above the recent ones.
        """
        recent, limit = self.state["health.recent"], self.state["health.limit"]
        sound = torch.isfinite(loss + grad_norm)
        spike = sound & (loss > limit)
        slot = recent[step % RECENT]
        slot.copy_(torch.where(sound, loss, slot))
        if step % REFRESH == 0:
            std, mean = torch.std_mean(recent)
            limit.copy_((mean + FAR * std).nan_to_num(nan=math.inf))
        skip = ~sound | spike if self.skip_spikes else ~sound
        return skip.float(), spike.float()


class Watch:
    """Checks on the host what `Health` found: counts spikes, and stops a diverged run."""

    def __init__(self, cfg: TrainConfig, dist: Dist, state: Any, writer: Any) -> None:
        self.cfg, self.state, self.writer = cfg, state, writer
        self.scaled = dist.dtype == torch.float16
        self.skipped_in_a_row = 0

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Check a step's metrics {name: number}. Raises RunFailed if the run cannot go on."""
        loss, grad_norm = metrics["loss"], metrics["grad_norm"]
        self.state.spikes += int(metrics["spike"])
        finite = all(abs(x) < math.inf for x in (loss, grad_norm))  # nan compares false
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite or (self.scaled and self.skipped_in_a_row < PATIENCE):
            return
        last = self.writer.last()
        last = f"the last sound checkpoint is {last}" if last else "there is no checkpoint yet"
        hint = "--dtype=bfloat16 or float32" if self.scaled else f"--grad_clip={self.cfg.grad_clip / 2 or 1.0:g}"
        raise RunFailed(
            f"step {step}: the loss is {loss}, the gradient's norm {grad_norm}: the run stops, and this update was not "
            f"applied; {last}; two things to try: --learning_rate={self.cfg.learning_rate / 2:g} and {hint}"
        )
