"""Weights in 8 bits, for generation on a CPU, where reading the weights takes most of the time.

Shapes: M inputs of K channels each, N outputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt import packed
from nanogpt.config import ServeConfig, TextConfig, UserError
from nanogpt.model import GPT
from nanogpt.packed import CANNOT

LARGE = 100e6  # parameters; smaller models fit into the caches and are fast enough
FASTER = 1.5  # the least speed-up for which `auto` uses int8
# The largest input of a row becomes MOST. An integer n becomes n + MIDDLE = 128 a + b, so that n = 128 (a - 64) + (b - 64).
MOST, MIDDLE = 8127, 128 * 64 + 64
# Tensors, because PyTorch makes one of each number, which takes as long as the operation itself.
TINY, ROUNDED = torch.tensor(1e-30), torch.tensor(MIDDLE + 0.5)
HALVES = torch.tensor([7, 0], dtype=torch.int16)[:, None, None]  # the shifts that leave a and b
SEVEN_BITS = torch.tensor(127, dtype=torch.int16)
SMALL = 2**15  # numbers that a GELU takes; more are worth several threads


class Int8Linear(nn.Module):
    """A linear layer with its weights rounded to integers from -127 to 127, with a scale for each output.

    Inputs are hardly rounded. In trained models, some of them are many times larger than the others, which would be lost
    with 8 bits each (Dettmers et al. 2022, LLM.int8(), section 3). So each input is an integer of 14 bits, whose halves
    are two rows of the same integer product. The halves have 7 bits and are positive: CPUs without AVX-512 add products of
    bytes in pairs, in 16 bits, which 127 * 127 + 127 * 127 fits and products of 8 bits do not. So the integer product
    is exact on every CPU.
    """

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        """gelu: `F.gelu`'s approximation, "none" or "tanh", or None if no GELU follows."""
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (N)
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)  # in the order that oneDNN needs
        self.zeros = torch.zeros(len(rounded), dtype=torch.int64)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) times the weights: (..., N)."""
        shape, x = x.shape, x.flatten(0, -2)  # (M, K)
        M, K = x.shape
        largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True)
        scale = torch.add(TINY, largest, alpha=1 / MOST)  # (M, 1)
        whole = torch.addcdiv(ROUNDED, x, scale).to(torch.int16)  # from 129 to 2^14 - 1
        halves = (whole >> HALVES).bitwise_and_(SEVEN_BITS).to(torch.uint8)  # (2, M, K)
        coarse, fine = self.product(halves.view(2 * M, K)).view(2, M, -1)
        y = torch.add(fine, coarse, alpha=128)
        y = y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale)
        return (y if self.gelu is None else gelu(y, self.gelu)).view(*shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """(x - 64) times the rounded weights, for x (2 M, K) of uint8: (2 M, N) in float32."""
        weight = self.packed, self.scale, self.zeros, None
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, 64, *weight, 1.0, 0, torch.float32, "none", [], "")


def gelu(x: Tensor, approximate: str) -> Tensor:
    """`F.gelu`; for a few rows without oneDNN, whose kernel takes longer to start than to compute."""
    if approximate == "tanh" or x.numel() > SMALL:
        return F.gelu(x, approximate=approximate)
    return torch.erf(x * 0.5**0.5).add_(1).mul_(x).mul_(0.5)


def quantize(model: GPT) -> GPT:
    """Replace all linear layers of a GPT by Int8Linear, in place. It can then generate and be evaluated, but not train."""
    return packed.pack(model, Int8Linear)


def made_ready(model: GPT, cfg: TextConfig | ServeConfig, dist: Any, rows: Sequence[int] = (1,)) -> GPT:
    """The model as `device`, `dtype`, `int8` and `pack` specify it for generation.

    rows: the numbers of texts at the same time with which `pack=auto` measures. UserError if int8 is not possible.
    """
    model = model.to(dist.device, dist.dtype).eval()
    if cfg.int8 is True and dist.device.type != "cpu":
        raise UserError(f"--int8=True: works on CPUs only, and the device is {dist.device.type}; --device=cpu")
    if dist.device.type != "cpu":
        return model
    if cfg.int8 is True:
        try:
            require_exact()
        except CANNOT as e:
            raise UserError(f"--int8=True: this PyTorch cannot multiply in int8 ({str(e).splitlines()[0]})") from None
        return quantize(model)
    packs = packed.choose(model, cfg, rows, dist.say)
    if cfg.int8 == "auto":
        on, why = choose(model, cfg, packs)
        dist.say(f"int8: {on}, because {why} (--int8)")
        if on:
            return quantize(model)
    return packed.pack(model) if packs else model


@torch.inference_mode()
def require_exact() -> None:
    """Raise one of CANNOT unless int8 products are right here, also for the largest numbers."""
    layer = nn.Linear(256, 16, bias=False)
    layer.weight.data = torch.ones(16, 256) - 2 * (torch.arange(16) % 2)[:, None]
    for rows in (1, 16):  # which use different kernels
        x = torch.ones(rows, 256) - 2 * (torch.arange(rows) % 3 == 1)[:, None]
        if not torch.allclose(Int8Linear(layer)(x), layer(x), rtol=1e-3):
            raise RuntimeError("its products are wrong on this CPU")


@torch.inference_mode()
def choose(model: GPT, cfg: TextConfig | ServeConfig, packs: bool = False) -> tuple[bool, str]:
    """(whether the model is faster in int8 on this CPU, measured on its largest layer; the reason).

    packs: whether its weights would be packed otherwise.
    """
    if cfg.dtype != "auto":
        return False, f"dtype is {cfg.dtype}"
    if model.num_params() < LARGE:
        return False, f"the model has less than {LARGE / 1e6:.0f}M parameters"
    x = torch.ones(1, 1, model.config.n_embd)
    try:
        require_exact()
    except CANNOT:
        return False, "this PyTorch cannot multiply in int8"
    usual = packed.PackedLinear(model.lm_head) if packs else model.lm_head
    times = [min(seconds(layer, x) for _ in range(5)) for layer in (usual, Int8Linear(model.lm_head))]
    ratio = f"the largest layer takes {times[1] * 1e3:.1f} ms in int8 and {times[0] * 1e3:.1f} in float32"
    return times[0] >= FASTER * times[1], ratio


def seconds(layer: nn.Module, x: Tensor) -> float:
    """The time of a forward pass."""
    return packed.seconds([layer], [x])
