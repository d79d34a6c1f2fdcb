"""Each faster form against the plain one: attention, RMS norm, dropout."""

import math

import pytest
import torch
from torch.nn import functional as F

from nanogpt.config import MATMULS
from nanogpt.kernels import Dropout, Linear, attention, rms_norm, use_matmul
from nanogpt.run.device import prepare_device

CPU, EPS = torch.device("cpu"), 1e-6


def plain_attention(q, k, v, mask):
    """Softmax attention as its definition says. Shapes as in `attention`; mask (T, S)."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize(
    "T, S, mask, sees",
    [
        (5, 5, None, torch.ones(5, 5, dtype=torch.bool).tril()),
        (1, 7, None, torch.ones(1, 7, dtype=torch.bool)),
        (2, 7, torch.arange(7) <= torch.tensor([[3], [4]]), torch.arange(7) <= torch.tensor([[3], [4]])),
    ],
    ids=["causal", "one query sees all", "mask"],
)
def test_attention_is_what_its_definition_says(matmul, T, S, mask, sees):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, requires_grad=True) for n in (T, S, S))
    use_matmul(matmul)
    y = attention(q, k, v, mask)
    grads = torch.autograd.grad(y.square().sum(), (q, k, v))
    use_matmul("default")
    expected = plain_attention(q, k, v, sees)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, torch.ones(16, 16, dtype=torch.bool).tril(2)], ids=["causal", "mask"])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_stays_exact_beside_products_in_bfloat16(grad, mask):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 16, 3, 8, requires_grad=grad) for _ in range(3)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        prepare_device(CPU, dtype)
        before = torch.get_float32_matmul_precision()
        y = attention(*tensors, mask)
        results.append([y, *(torch.autograd.grad(y.square().sum(), tensors) if grad else ())])
        assert torch.get_float32_matmul_precision() == before
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_beside_products_in_bfloat16_still_has_its_dropout():
    prepare_device(CPU, torch.bfloat16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 16, 3, 8) for _ in range(3))
    assert not torch.equal(attention(q, k, v, dropout=0.5), attention(q, k, v, dropout=0.5))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_casts_has_the_gradients_of_rounded_operands(bias):
    torch.manual_seed(0)
    layer, x, grad = Linear(48, 24, bias=bias), torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 24)
    use_matmul("cast")
    y = layer(x)
    found = [y, *torch.autograd.grad(y, (x, *layer.parameters()), grad)]
    assert all(t.dtype == torch.float32 for t in found)
    xr, wr, gr = (t.detach().bfloat16().double() for t in (x, layer.weight, grad))
    right = [xr @ wr.mT, gr @ wr, gr.flatten(0, 1).mT @ xr.flatten(0, 1)]
    if bias:
        right = [right[0] + layer.bias.detach(), *right[1:], grad.sum((0, 1)).double()]
    for mine, expected in zip(found, right, strict=True):
        torch.testing.assert_close(mine.detach().double(), expected, atol=0.02, rtol=1e-2)
    use_matmul("default")
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_rms_norm_and_its_gradient_are_those_of_pytorch():
    x = torch.randn(4, 5, 32, dtype=torch.float64, requires_grad=True)
    y, expected = rms_norm(x, EPS), F.rms_norm(x, (32,), eps=EPS)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0], atol=1e-12, rtol=1e-12
    )
    assert rms_norm(torch.zeros(2, 8), EPS).abs().max() == 0


def test_dropout_drops_its_share_keeps_the_mean_and_repeats_with_the_seed():
    dropout, x = Dropout(0.2), torch.ones(1000, 301, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(51 / 256, abs=0.005)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    rows, columns = (y == 0).float().mean(0), (y == 0).float().mean(1)
    assert rows.std() < 0.02 and columns.std() < 0.03  # no row and no column is special
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7)], ids=str)
def test_dropout_takes_any_shape_and_share(shape):
    x = torch.ones(shape)
    assert set(Dropout(0.5)(x).flatten().tolist()) <= {0.0, 2.0}
    assert Dropout(0.5)(x).shape == shape
    assert torch.isfinite(Dropout(0.999)(x)).all()  # of 256 steps the last one still keeps something
