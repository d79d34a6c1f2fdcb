"""Weights of one byte each, to write on a CPU: reading the weights is what takes the time there.

Shapes: M inputs of K channels each, N outputs.
"""

import time

import torch
from torch import nn

from nanogpt.config import UserError

LARGE = 100e6  # parameters; smaller models fit the caches, and are fast enough
FASTER = 1.5  # so many times, or the original weights are kept


class Int8Linear(nn.Module):
    """A linear layer with its weights rounded to whole numbers from -127 to 127, each output with its own scale.

    Its inputs are hardly rounded: single ones are many times larger than the others in trained models, and with
    one byte for each, the others would be lost (Dettmers et al. 2022, LLM.int8(), section 3). So each is the sum
    of a coarse byte and a fine one, as two rows of one product of whole numbers, which is exact.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (N)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)  # in the order that the processor likes
        self.scale, self.zeros = scale, torch.zeros(len(scale), dtype=torch.int64)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x):
        """x (..., K) times the weights: each row as two numbers of 8 bits, a coarse one and a fine one for what it leaves."""
        shape, x = x.shape, x.flatten(0, -2)  # (M, K)
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30).div_(127)
        x = x / scale
        coarse = x.round()
        fine = x.sub_(coarse).mul_(254).round_()
        both = torch.cat([coarse, fine]).to(torch.int8)  # (2 M, K)
        y = self.product(both)
        y = torch.add(y[: len(x)], y[len(x) :], alpha=1 / 254).mul_(scale)  # (M, N)
        if self.bias is not None:
            y += self.bias
        return y.view(*shape[:-1], -1)

    def product(self, x):
        """x (2 M, K), of int8, times the weights with their scales: (2 M, N), in float32."""
        weight = self.packed, self.scale, self.zeros
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, *weight, None, 1.0, 0, torch.float32, "none", [], "")


def quantize(model):
    """Make all linear layers of a GPT Int8Linear, in place. It can write and be evaluated then, and not be trained."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model


def made_ready(model, cfg, dist):
    """The model as `device`, `dtype` and `int8` want it for writing. UserError where int8 cannot be had."""
    model = model.to(dist.device, dist.dtype).eval()
    if cfg.int8 is True and dist.device.type != "cpu":
        raise UserError(f"--int8=True: works on CPUs alone, and the device is {dist.device.type}; --device=cpu")
    if cfg.int8 is False or dist.device.type != "cpu":
        return model
    if cfg.int8 == "auto":
        on, why = choose(model, cfg)
        dist.say(f"int8: {on}, because {why} (--int8)")
        return quantize(model) if on else model
    try:
        with torch.inference_mode():
            Int8Linear(model.lm_head)(torch.ones(1, 1, model.config.n_embd))
        return quantize(model)
    except (RuntimeError, AttributeError, NotImplementedError) as e:
        raise UserError(f"--int8=True: this PyTorch cannot multiply in it ({str(e).splitlines()[0]})") from None


@torch.inference_mode()
def choose(model, cfg):
    """Whether the model writes faster in int8 on this CPU, tried on its largest layer, and why."""
    if cfg.dtype != "auto":
        return False, f"dtype is {cfg.dtype}"
    if model.num_params() < LARGE:
        return False, f"the model has less than {LARGE / 1e6:.0f}M parameters"
    x = torch.ones(1, 1, model.config.n_embd)
    try:
        fast = Int8Linear(model.lm_head)
        fast(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False, "this PyTorch cannot multiply in it"
    times = [min(seconds(layer, x) for _ in range(5)) for layer in (model.lm_head, fast)]
    ratio = f"the largest layer takes {times[1] * 1e3:.1f} ms in it and {times[0] * 1e3:.1f} in float32"
    return times[0] >= FASTER * times[1], ratio


def seconds(layer, x):
    began = time.perf_counter()
    layer(x)
    return time.perf_counter() - began
