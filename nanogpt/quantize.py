"""Weights in 8 bits, for generation on a CPU, where reading the weights takes most of the time.

Shapes: M inputs of K channels each, N outputs.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.config import ServeConfig, TextConfig, UserError
from nanogpt.model import GPT

LARGE = 100e6  # parameters; smaller models fit into the caches and are fast enough
FASTER = 1.5  # the least speed-up for which `auto` uses int8
CANNOT = RuntimeError, AttributeError, NotImplementedError  # raised by operations that a build of PyTorch lacks
MOST, SHIFT = 63, 64  # the parts of an input are integers from -MOST to MOST, and SHIFT makes them positive


class Int8Linear(nn.Module):
    """A linear layer with its weights rounded to integers from -127 to 127, with a scale for each output.

    Inputs are hardly rounded. In trained models, some of them are many times larger than the others, which would be lost
    with 8 bits each (Dettmers et al. 2022, LLM.int8(), section 3). So each input is the sum of a coarse and a fine
    integer, which are two rows of the same integer product. They have 7 bits, shifted to be positive: CPUs without
    AVX-512 add products of bytes in pairs, in 16 bits, which 127 * 127 + 127 * 127 fits and products of 8 bits do not.
    So the integer product is exact on every CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (N)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)  # in the order that oneDNN needs
        self.scale = scale
        self.ones, self.zeros = torch.ones_like(scale), torch.zeros(len(scale), dtype=torch.int64)
        self.unshift = -SHIFT * rounded.sum(dim=1, dtype=torch.int32).float()  # (N)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) times the weights: (..., N)."""
        shape, x = x.shape, x.flatten(0, -2)  # (M, K)
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30).div_(MOST)
        x = x / scale
        coarse = x.round()
        fine = x.sub_(coarse).mul_(2 * MOST).round_()
        both = torch.cat([coarse, fine]).add_(SHIFT).to(torch.uint8)  # (2 M, K), from 1 to 127
        y = self.product(both)
        y = torch.add(y[: len(x)], y[len(x) :], alpha=1 / (2 * MOST)).mul_(scale).mul_(self.scale)  # (M, N)
        if self.bias is not None:
            y += self.bias
        return y.view(*shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """(x - SHIFT) times the integers of the weights, for x (2 M, K) of uint8: (2 M, N), integers in float32."""
        weight = self.packed, self.ones, self.zeros, self.unshift
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, *weight, 1.0, 0, torch.float32, "none", [], "")


def quantize(model: GPT) -> GPT:
    """Replace all linear layers of a GPT by Int8Linear, in place. It can then generate and be evaluated, but not train."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def made_ready(model: GPT, cfg: TextConfig | ServeConfig, dist: Any) -> GPT:
    """The model as `device`, `dtype` and `int8` specify it for generation. Raises UserError if int8 is not possible."""
    model = model.to(dist.device, dist.dtype).eval()
    if cfg.int8 is True and dist.device.type != "cpu":
        raise UserError(f"--int8=True: works on CPUs only, and the device is {dist.device.type}; --device=cpu")
    if cfg.int8 is False or dist.device.type != "cpu":
        return model
    if cfg.int8 == "auto":
        on, why = choose(model, cfg)
        dist.say(f"int8: {on}, because {why} (--int8)")
        return quantize(model) if on else model
    try:
        require_exact()
    except CANNOT as e:
        raise UserError(f"--int8=True: this PyTorch cannot multiply in int8 ({str(e).splitlines()[0]})") from None
    return quantize(model)


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
def choose(model: GPT, cfg: TextConfig | ServeConfig) -> tuple[bool, str]:
    """(whether the model is faster in int8 on this CPU, measured on its largest layer; the reason)."""
    if cfg.dtype != "auto":
        return False, f"dtype is {cfg.dtype}"
    if model.num_params() < LARGE:
        return False, f"the model has less than {LARGE / 1e6:.0f}M parameters"
    x = torch.ones(1, 1, model.config.n_embd)
    try:
        require_exact()
    except CANNOT:
        return False, "this PyTorch cannot multiply in int8"
    fast = Int8Linear(model.lm_head)
    times = [min(seconds(layer, x) for _ in range(5)) for layer in (model.lm_head, fast)]
    ratio = f"the largest layer takes {times[1] * 1e3:.1f} ms in int8 and {times[0] * 1e3:.1f} in float32"
    return times[0] >= FASTER * times[1], ratio


def seconds(layer: nn.Module, x: Tensor) -> float:
    """The time of a forward pass."""
    began = time.perf_counter()
    layer(x)
    return time.perf_counter() - began
