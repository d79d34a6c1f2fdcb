"""Operations of the model that have two forms: PyTorch's own, and a faster one for CPUs that computes the same function.

The model calls these functions. The form depends on the device, for attention also on the number format of products, and
for the norm on whether the model is being compiled. `tests/test_kernels.py` compares the forms.
Shapes: B batch, T queries, S keys, H heads, D channels of a head.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """For each query, the mean of the values weighted by softmax(q . k / sqrt(D)): (B, T, H, D).

    q: (B, T, H, D). k, v: (B, S, H, D), or with fewer heads that divide H; then each serves several heads of q. mask:
    booleans that broadcast to (B, H, T, S), True for a key that a query attends to. Without a mask, query t of several
    attends to keys 0 to t, and a single query to all keys.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, D)
    causal = mask is None and q.shape[2] > 1
    if q.device.type == "cpu" and multiplies_in_bfloat16():
        return Float32Attention.apply(q, k, v, mask, dropout, causal).transpose(1, 2)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped).transpose(1, 2)


def multiplies_in_bfloat16() -> bool:
    """Whether PyTorch multiplies float32 matrices in bfloat16 on CPUs, which `--dtype=bfloat16` asks for."""
    return torch.get_float32_matmul_precision() == "medium"


# for the compiler it is a constant; torch.compiler.assume_constant_result does the same and imports the compiler
multiplies_in_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Float32Attention(torch.autograd.Function):
    """Attention in float32 while all other products are in bfloat16.

    PyTorch's fused attention consists of many tiny products, and looking up the bfloat16 kernel for each of them makes it
    ten times slower. This is an autograd function so that its backward pass is in float32, too: `forward` records the
    graph of the fused attention alone, and `backward` differentiates it.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, dropout, causal):
        with torch.enable_grad(), float32_products():
            ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in (q, k, v)]
            grouped = k.shape[1] != q.shape[1]
            ctx.y = F.scaled_dot_product_attention(*ctx.inputs, mask, dropout, causal, enable_gqa=grouped)
        return ctx.y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with float32_products():
            return *torch.autograd.grad(ctx.y, ctx.inputs, grad), None, None, None


@contextmanager
def float32_products():
    """Context of float32 products, regardless of `torch.set_float32_matmul_precision` outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
