"""Packed layers against the original ones: the same products, logits and text; and when they are chosen."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nanogpt import packed
from nanogpt.config import ARCHITECTURES
from nanogpt.generate import Engine, Options
from nanogpt.model import GPT, GPTConfig
from nanogpt.packed import PackedBlock, PackedLinear, pack
from nanogpt.quantize import Int8Linear, made_ready


@pytest.fixture(autouse=True)
def supported():
    try:
        PackedLinear(nn.Linear(8, 8))(torch.ones(1, 8))
    except packed.CANNOT:
        pytest.skip("this PyTorch has no packed products")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize("shape", [(1,), (2, 5), (1, 40), (3, 100)])
@torch.inference_mode()
def test_products_are_those_of_the_layer(shape, gelu, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40, bias=bias), torch.randn(*shape, 96)
    expected = layer(x) if gelu is None else F.gelu(layer(x), approximate=gelu)
    torch.testing.assert_close(PackedLinear(layer, gelu)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@torch.inference_mode()
def test_int8_has_the_gelu_too(gelu):
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40), torch.randn(3, 96)
    torch.testing.assert_close(Int8Linear(layer, gelu)(x), F.gelu(layer(x), approximate=gelu), atol=0.02, rtol=0.02)


def models(architecture, **shape):
    """A model and the same one packed."""
    torch.manual_seed(3)
    shape = dict(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16, architecture=architecture) | shape
    model = GPT(GPTConfig(**shape, dropout=0.3)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)  # far enough from uniform that choices differ
    return model, pack(copy.deepcopy(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [{}, dict(bias=False, tied=False, activation="gelu_new")], ids=["default", "other"])
@torch.inference_mode()
def test_logits_and_loss_are_those_of_the_model(architecture, shape):
    shape = shape if architecture == "gpt2" else {key: shape[key] for key in shape if key == "tied"}
    model, other = models(architecture, **shape)
    assert not any(type(m) is nn.Linear for m in other.modules())
    idx = torch.randint(20, (3, 8))
    torch.testing.assert_close(other(idx, idx), model(idx, idx), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_are_those_of_the_model(architecture):
    """Alone and beside others, through the end of the context, greedy and drawn."""
    texts = []
    for model in models(architecture):
        engine = Engine(model, 4)
        rows = [engine.add(ids, Options(40, t, seed=7), n=n) for ids, t, n in (([1, 2], 0.8, 2), ([3], 0, 1))]
        while engine.rows:
            engine.step()
        texts.append([row.ids for family in rows for row in family])
    assert texts[0] == texts[1]


# The choice


def choice(dist, monkeypatch, times=(1.0, 1.0), pack="auto", dtype=torch.float32, **others):
    """Whether `made_ready` packs, given the seconds that the usual and the packed products take; and what it says."""
    said: list[str] = []
    dist.say, dist.dtype = said.append, dtype
    monkeypatch.setattr(packed, "seconds", lambda layers, inputs: times[isinstance(layers[0], PackedLinear)])
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8))
    cfg = SimpleNamespace(int8="auto", dtype="auto", pack=pack, **others)
    ready = made_ready(model, cfg, dist, [1, 4])
    assert isinstance(ready.transformer.h[0], PackedBlock) == isinstance(ready.lm_head, PackedLinear)
    return isinstance(ready.lm_head, PackedLinear), "\n".join(line for line in said if "--pack" in line)


@pytest.mark.parametrize("times, on", [((0.010, 0.004), True), ((0.010, 0.0099), False)])
def test_the_faster_form_is_taken(dist, monkeypatch, times, on):
    taken, said = choice(dist, monkeypatch, times)
    assert taken is on
    why = f"the products of a step take {times[1] * 1e3:.2f} ms with it and 10.00 without"
    assert said == f"pack: {on}, because {why} (--pack)"


def test_it_must_be_faster_with_every_number_of_rows(dist, monkeypatch):
    fast = dict(zip((1, 4), (0.5, 1.5), strict=True))
    layers = [nn.Linear(8, 8)]
    monkeypatch.setattr(
        packed, "seconds", lambda layers, x: fast[len(x[0])] if isinstance(layers[0], PackedLinear) else 1.0
    )
    assert packed.measured(nn.Sequential(*layers), [1])[0]
    assert not packed.measured(nn.Sequential(*layers), [1, 4])[0]


def test_what_the_user_says_counts(dist, monkeypatch):
    assert choice(dist, monkeypatch, (1.0, 2.0), pack=True) == (True, "")
    assert choice(dist, monkeypatch, (2.0, 1.0), pack=False) == (False, "")


def test_other_weights_stay_as_they_are(dist, monkeypatch):
    for asked in ("auto", True):
        taken, said = choice(dist, monkeypatch, (2.0, 1.0), pack=asked, dtype=torch.bfloat16)
        assert not taken and "the weights are in bfloat16" in said
        taken, said = choice(dist, monkeypatch, (2.0, 1.0), pack=asked, compile=True)
        assert not taken and "compiled" in said


def test_less_exact_products_are_not_taken(dist, monkeypatch):
    """As they would be in bfloat16."""
    real = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda layer, x: real(layer, x.bfloat16().float()))
    taken, said = choice(dist, monkeypatch, (2.0, 1.0))
    assert not taken and "less exact" in said


def test_where_pytorch_cannot_the_weights_stay_as_they_are(dist, monkeypatch):
    def cannot(*args):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(PackedLinear, "forward", cannot)
    taken, said = choice(dist, monkeypatch, (2.0, 1.0))
    assert not taken and "this PyTorch has no such products" in said
