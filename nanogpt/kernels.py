"""Operations of the model that have two forms: PyTorch's own, and a faster one for CPUs that computes the same function.

The model calls these functions. The form depends on the device, for products and attention also on `use_matmul`, and
for the norm on whether the model is being compiled. `tests/test_kernels.py` compares the forms.
Shapes: B batch, T queries, S keys, H heads, D channels of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_cast = False  # whether `linear` multiplies in bfloat16


def use_matmul(name: str) -> None:
    """Choose how this process multiplies float32 matrices on CPUs: one of config.MATMULS.

    default: the library that PyTorch takes by default, on x86 usually Intel's MKL. onednn: oneDNN's kernels, which
    compute in float32 on CPUs without matrix units for bfloat16, and on others round the operands to bfloat16
    (run/products.py finds out which). cast: in addition, linear layers multiply bfloat16 tensors.
    """
    global _cast
    _cast = name == "cast"
    torch.set_float32_matmul_precision("highest" if name == "default" else "medium")


def multiplies_with_onednn() -> bool:
    """Whether PyTorch gives products of float32 matrices on CPUs to oneDNN."""
    return torch.get_float32_matmul_precision() == "medium"


def casts_to_bfloat16() -> bool:
    """Whether linear layers on CPUs multiply bfloat16 tensors."""
    return _cast


# for the compiler they are constants; torch.compiler.assume_constant_result does the same and imports the compiler
for _constant in (multiplies_with_onednn, casts_to_bfloat16):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def default_products() -> Iterator[None]:
    """Context in which PyTorch's default library multiplies float32 matrices, whatever `use_matmul` chose."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in the dtype of x: (..., in), (out, in), (out) -> (..., out)."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not casts_to_bfloat16():
        return F.linear(x, weight, bias)
    y = F.linear(x.bfloat16(), weight.bfloat16()).float()  # the backward pass multiplies in bfloat16, too
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """For each query, the mean of the values weighted by softmax(q . k / sqrt(D)): (B, T, H, D).

    q: (B, T, H, D). k, v: (B, S, H, D), or with fewer heads that divide H; then each serves several heads of q. mask:
    booleans that broadcast to (B, H, T, S), True for a key that a query attends to. Without a mask, query t of several
    attends to keys 0 to t, and a single query to all keys.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, D)
    causal = mask is None and q.shape[2] > 1
    if q.device.type == "cpu" and multiplies_with_onednn():
        return Float32Attention.apply(q, k, v, mask, dropout, causal).transpose(1, 2)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped).transpose(1, 2)


class Float32Attention(torch.autograd.Function):
    """Attention with PyTorch's default kernels while oneDNN's multiply all other matrices, perhaps in bfloat16.

    PyTorch's fused attention consists of many tiny products, and looking up oneDNN's kernel for each of them makes it
    ten times slower. This is an autograd function so that its backward pass is in float32, too: `forward` records the
    graph of the fused attention alone, and `backward` differentiates it.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, dropout, causal):
        with torch.enable_grad(), default_products():
            ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in (q, k, v)]
            grouped = k.shape[1] != q.shape[1]
            ctx.y = F.scaled_dot_product_attention(*ctx.inputs, mask, dropout, causal, enable_gqa=grouped)
        return ctx.y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with default_products():
            return *torch.autograd.grad(ctx.y, ctx.inputs, grad), None, None, None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Each vector of the last dimension divided by its root mean square (Zhang & Sennrich 2019), without a gain."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return CPURMSNorm.apply(x, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class CPURMSNorm(torch.autograd.Function):
    """`F.rms_norm` in half as many passes over memory; PyTorch has no kernel for it on CPUs."""

    @staticmethod
    def forward(ctx, x, eps):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # (..., 1)
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        coefficient = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-y.shape[-1])  # of y = x s
        return torch.addcmul(grad, y, coefficient).mul_(scale), None  # dx = s (g - y (g . y) / D)


class Dropout(nn.Dropout):
    """`nn.Dropout`, on CPUs with faster random numbers: one byte per element, so p is rounded to n/256."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)  # 64 random bits each
        dropped = min(255, round(self.p * 256))  # bytes below this are dropped; something is always kept
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * (kept * (256 / (256 - dropped)))
