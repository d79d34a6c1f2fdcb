"""Whether a model that was written for other programs still computes the same logits, as far as its number format allows."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.model import GPT

# Largest difference of logits, relative to the largest logit, that each number format may cause. Measured: 1e-6 and below
# in float32, a few times the format's own precision (5e-4 and 4e-3) in the others.
CLOSE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}

MANY = 1024  # tokens to compare; the logits of more take gigabytes


class Difference(NamedTuple):
    """How far the logits of two models are apart."""

    largest: float  # absolute difference
    logit: float  # the largest absolute logit, to compare it with

    def allowed(self, dtype: str) -> bool:
        """Whether rounding the weights to `dtype` explains it; NaN never is."""
        return self.largest <= CLOSE[dtype] * self.logit

    def __str__(self) -> str:
        return f"{self.largest:.1e}; the largest logit is {self.logit:.1f}"


def context(model: GPT, V: int) -> Tensor:
    """A full context of random token ids below V, or the first MANY tokens of one, (1, T): always the same."""
    return torch.randint(V, (1, min(model.config.block_size, MANY)), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: GPT, idx: Tensor, V: int) -> Tensor:
    """The model's logits for the V first ids at each position, without dropout: (1, T, V)."""
    return model.eval()(idx, idx)[0][..., :V]


def difference(found: Tensor, expected: Tensor) -> Difference:
    """The Difference of two tensors of logits."""
    return Difference((found - expected).abs().max().item(), expected.abs().max().item())
