"""Weights of one byte: nearly the same products, nearly the same loss, and the original weights where they are as fast."""

from types import SimpleNamespace

import pytest
import torch
from support import SMALL
from torch import nn

from nanogpt import quantize, train
from nanogpt.config import ARCHITECTURES, UserError
from nanogpt.generate import Engine, Options
from nanogpt.model import GPT, GPTConfig
from nanogpt.quantize import Int8Linear, made_ready
from nanogpt.run import checkpoint
from nanogpt.text.dataset import open_dataset


@pytest.fixture(autouse=True)
def supported():
    try:
        Int8Linear(nn.Linear(8, 8))(torch.ones(1, 8))
    except (RuntimeError, AttributeError, NotImplementedError):
        pytest.skip("this PyTorch cannot multiply in int8")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (1, 40)])
@torch.inference_mode()
def test_products_are_nearly_those_of_the_layer(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias)
    x = torch.randn(*shape, 96)
    x[..., 7] *= 50  # trained models have such channels; they must not drown the others
    expected = layer(x)
    error = (Int8Linear(layer)(x) - expected).norm() / expected.norm()
    assert error < 0.01


@pytest.mark.parametrize("rows", [1, 2, 16, 80])
@torch.inference_mode()
def test_no_sum_of_products_overflows(rows):
    """CPUs without AVX-512 add products in pairs, in 16 bits: the largest numbers are those to try."""
    layer = nn.Linear(256, 40, bias=False)
    layer.weight.data = torch.ones(40, 256) * (-1) ** torch.arange(40)[:, None]
    x = torch.ones(rows, 256) * (-1) ** torch.arange(rows)[:, None]
    assert torch.allclose(Int8Linear(layer)(x), layer(x), rtol=1e-4)


@torch.inference_mode()
def test_inputs_are_not_what_is_rounded():
    """With weights that are whole numbers already, nothing is lost but the inputs' fourteenth bit."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=False)
    layer.weight.data = torch.randint(-127, 128, (40, 96)).float()
    layer.weight.data[:, 0] = 127
    x = torch.randn(4, 96) * torch.tensor([1e-3, 1, 50, 1e6])[:, None]
    expected = layer(x)
    assert ((Int8Linear(layer)(x) - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 2e-4


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others():
    layer = Int8Linear(nn.Linear(64, 32))
    x = torch.randn(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@torch.inference_mode()
def test_nothing_stays_nothing():
    layer = nn.Linear(16, 4, bias=False)
    assert torch.equal(Int8Linear(layer)(torch.zeros(2, 16)), torch.zeros(2, 4))
    layer.weight.data.zero_()
    assert torch.equal(Int8Linear(layer)(torch.ones(2, 16)), torch.zeros(2, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_equal_to_half_a_percent(tiny, monkeypatch, architecture):
    monkeypatch.chdir(tiny.parent.parent)
    options = ["--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150", f"--architecture={architecture}"]
    train.main([*SMALL, *options])
    model = checkpoint.load_model(checkpoint.best("out")).eval()
    windows = open_dataset("tiny", "val", 16)
    x, y = (torch.stack(part) for part in zip(*(windows_of(windows.tokens, i) for i in range(38)), strict=True))
    with torch.inference_mode():
        before = model(x, y)[1].item()
        assert before < 2  # it has learned something
        after = quantize.quantize(model)(x, y)[1].item()
    assert after == pytest.approx(before, rel=0.005) and after != before


def windows_of(tokens, i):
    window = torch.as_tensor([int(t) for t in tokens[16 * i : 16 * i + 17]])
    return window[:-1], window[1:]


def test_a_model_writes_in_it(tiny):
    torch.manual_seed(1)
    model = quantize.quantize(GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=16)))
    assert not any(type(m) is nn.Linear for m in model.modules())
    engine = Engine(model, 3)
    rows = engine.add([1, 2], Options(max_new_tokens=40), n=3)
    while engine.rows:
        engine.step()
    assert all(len(row.ids) == 42 for row in rows)


# The choice


def choice(dist, model=None, int8="auto", dtype="auto", **changes):
    """Whether `made_ready` takes int8 for a model, and what it says."""
    said = []
    dist.say = said.append
    model = model or GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8))
    for name, value in changes.items():
        setattr(dist, name, value)
    ready = made_ready(model, SimpleNamespace(int8=int8, dtype=dtype, pack=False), dist)
    return isinstance(ready.lm_head, Int8Linear), said


def test_a_small_model_keeps_its_weights(dist):
    assert choice(dist) == (False, ["int8: False, because the model has less than 100M parameters (--int8)"])


@pytest.mark.parametrize("times, on", [((0.010, 0.004), True), ((0.010, 0.009), False)])
def test_a_large_one_keeps_them_unless_int8_is_much_faster(dist, monkeypatch, times, on):
    monkeypatch.setattr(quantize, "LARGE", 100)
    monkeypatch.setattr(quantize, "seconds", lambda layer, x: times[isinstance(layer, Int8Linear)])
    taken, said = choice(dist)
    assert taken is on
    assert f"int8: {on}, because the largest layer takes {times[1] * 1e3:.1f} ms in int8 and 10.0 in float32" in said[0]


def test_what_the_user_says_counts(dist, monkeypatch):
    assert choice(dist, int8=True) == (True, [])
    monkeypatch.setattr(quantize, "LARGE", 100)
    assert choice(dist, int8=False) == (False, [])
    taken, said = choice(dist, dtype="float32")
    assert not taken and "dtype is float32" in said[0]


def test_what_writes_drops_nothing_and_has_the_dtype_that_was_asked_for(dist):
    dist.dtype = torch.bfloat16
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8, dropout=0.5)).train()
    ready = made_ready(model, SimpleNamespace(int8=False, dtype="bfloat16", pack=False), dist)
    assert not ready.training and {p.dtype for p in ready.parameters()} == {torch.bfloat16}


def test_it_is_for_cpus(dist, monkeypatch):
    monkeypatch.setattr(quantize, "LARGE", 100)
    monkeypatch.setattr(quantize, "seconds", lambda layer, x: 1.0 if isinstance(layer, nn.Linear) else 0.1)
    assert choice(dist, device=torch.device("meta")) == (False, [])
    with pytest.raises(UserError, match="--int8=True: works on CPUs only, and the device is meta"):
        choice(dist, int8=True, device=torch.device("meta"))


def test_where_pytorch_cannot_the_weights_are_kept(dist, monkeypatch):
    def cannot(*args):
        raise NotImplementedError("no kernel\nmore")

    monkeypatch.setattr(quantize, "LARGE", 100)
    monkeypatch.setattr(quantize.Int8Linear, "product", cannot)
    taken, said = choice(dist)
    assert not taken and "cannot multiply in int8" in said[0]
    with pytest.raises(UserError, match=r"--int8=True: this PyTorch cannot multiply in int8 \(no kernel\)"):
        choice(dist, int8=True)


def test_where_products_are_wrong_the_weights_are_kept(dist, monkeypatch):
    """As those of PyTorch are for signed inputs on a CPU without AVX-512."""
    real = quantize.Int8Linear.product
    monkeypatch.setattr(quantize, "LARGE", 100)
    monkeypatch.setattr(quantize, "seconds", lambda layer, x: 1.0 if isinstance(layer, nn.Linear) else 0.1)
    monkeypatch.setattr(quantize.Int8Linear, "product", lambda layer, x: real(layer, x).clamp(-256, 256))
    assert not choice(dist)[0]
    with pytest.raises(UserError, match="--int8=True: .*its products are wrong on this CPU"):
        choice(dist, int8=True)
