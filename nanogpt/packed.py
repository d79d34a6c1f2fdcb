"""Layers for generation on a CPU: weights in the order in which they are read, and few operations between products.

A step of one token reads every weight once and does little else. Each form here computes what its original in model.py
does; `tests/test_packed.py` compares them, and quantize.py chooses. Shapes as in model.py.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.config import ServeConfig, TextConfig
from nanogpt.kernels import attention
from nanogpt.model import GPT, Block

CANNOT = RuntimeError, AttributeError, NotImplementedError  # raised by operations that a build of PyTorch lacks
ROWS = 16  # oneDNN chooses the order of weights for a number of rows; this order is fast for one row and for many
SAMPLE = 2**25  # weights on which the forms are compared: more than caches hold
FASTER = 0.95  # the largest share of the usual time for which `auto` packs
EXACT = 1e-5  # the largest relative difference of products that are computed in float32


class PackedLinear(nn.Module):
    """A linear layer with its weights in oneDNN's order, and perhaps a GELU after it."""

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        """gelu: `F.gelu`'s approximation, "none" or "tanh", or None if no GELU follows."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.after: tuple = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) times the weights: (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.after)


class PackedBlock(nn.Module):
    """GPT-2's `Block` for generation, from linear layers that `make` has made of its own.

    It has fewer modules and operations: while a token's weights stream through the caches, even Python's own code has
    to be read from memory again.
    """

    def __init__(self, block: Block, make: Callable) -> None:
        super().__init__()
        attn: Any = block.attn
        mlp: Any = block.mlp
        self.ln_1: Any = block.ln_1
        self.ln_2: Any = block.ln_2
        self.qkv, self.attn_proj = make(attn.c_attn), make(attn.c_proj)
        self.fc, self.mlp_proj = make(mlp.c_fc, mlp.approximate), make(mlp.c_proj)
        self.n_head: int = attn.n_head
        self.layer: int = attn.layer

    def forward(self, x: Tensor, cos_sin: tuple | None, kv_cache=None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(norm(self.ln_1, x)).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        k, v, mask = kv_cache.update(self.layer, k, v) if kv_cache else (k, v, None)
        x = x + self.attn_proj(attention(q, k, v, mask).reshape(B, T, C))
        return x + self.mlp_proj(self.fc(norm(self.ln_2, x)))


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """The layer applied to x, in one operation."""
    return torch.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def pack(model: GPT, make: Callable = PackedLinear) -> GPT:
    """Replace all linear layers of a GPT by what `make` returns for each, in place. It can then not be trained."""
    if not model.config.modern:
        blocks: Any = model.transformer["h"]
        for i in range(len(blocks)):
            blocks[i] = PackedBlock(blocks[i], make)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child))
    return model


def choose(model: GPT, cfg: TextConfig | ServeConfig, rows: Sequence[int], say: Callable[[str], Any]) -> bool:
    """Whether to pack the weights of a float32 model, measured with each of these numbers of rows unless `pack` is set."""
    unpackable = unpacked_because(model, cfg)
    if cfg.pack != "auto" and not (cfg.pack and unpackable):
        return bool(cfg.pack)
    on, why = (False, unpackable) if unpackable else measured(model, rows)
    say(f"pack: {on}, because {why} (--pack)")
    return on


def unpacked_because(model: GPT, cfg: TextConfig | ServeConfig) -> str:
    """Why the weights cannot be packed; nothing if they can."""
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        return f"the weights are in {str(dtype).removeprefix('torch.')}"
    if getattr(cfg, "compile", False) is True:
        return "the compiled model takes them as they are"
    try:
        PackedLinear(nn.Linear(8, 8))(torch.ones(1, 8))
    except CANNOT:
        return "this PyTorch has no such products"
    return ""


@torch.inference_mode()
def measured(model: GPT, rows: Sequence[int]) -> tuple[bool, str]:
    """(whether packed weights give the same products in less time, whatever the number of rows; the reason)."""
    layers, held = [], 0
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        if held < SAMPLE:
            layers.append(layer)
            held += layer.weight.numel()
    packed = [PackedLinear(layer) for layer in layers]
    times = []
    for n in rows:
        inputs = [torch.randn(n, layer.in_features) for layer in layers]
        if max(difference(a(x), b(x)) for a, b, x in zip(packed, layers, inputs, strict=True)) > EXACT:
            return False, "its products are less exact here"
        turns = [(seconds(layers, inputs), seconds(packed, inputs)) for _ in range(5)]
        times.append([min(way) * 1e3 for way in zip(*turns, strict=True)])
    usual, other = max(times, key=lambda pair: pair[1] / pair[0])
    what = "the products of a step take" if held < SAMPLE else "some products of a step take"
    return other < FASTER * usual, f"{what} {other:.2f} ms with it and {usual:.2f} without"


def difference(y: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to that of what was expected."""
    return float((y - expected).norm() / expected.norm().clamp(min=1e-30))


def seconds(layers: Sequence[nn.Module], inputs: list[Tensor]) -> float:
    """The time of a pass through all layers."""
    began = time.perf_counter()
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    return time.perf_counter() - began
