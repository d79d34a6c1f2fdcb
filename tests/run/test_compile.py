"""torch.compile: when it pays, what it compiles, and what a failure costs."""

import logging
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanogpt.model import GPT, GPTConfig
from nanogpt.run import compile
from nanogpt.run.distributed import Dist

CPU = torch.device("cpu")


@pytest.fixture
def said():
    return []


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_the_model_is_compiled_whole_and_once_for_each_mode(monkeypatch, architecture):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(compile, "CompileErrors", lambda: SimpleNamespace(reasons=[], note=pytest.fail))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, architecture=architecture))
    cfg, dist = SimpleNamespace(compile=True), Dist(CPU, torch.float32)
    compile.compiled(model, cfg, dist)  # to write text, which needs another graph
    assert counter.frame_count == 0
    fast = compile.compiled(model, cfg, dist, (4, 8), (3, 8))
    assert counter.frame_count == 2  # with gradients, and without
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    loss = fast(idx, targets)[1]
    loss.backward()
    with torch.no_grad():
        model.eval()
        fast(*torch.randint(11, (2, 4, 8)))
    assert counter.frame_count == 2
    assert loss.item() == pytest.approx(model(idx, targets)[1].item(), abs=1e-5)


@pytest.mark.parametrize(
    "device, seconds, on, line",
    [
        ("cpu", 5, False, "on cpu it pays in runs of more than 600 seconds, and this one takes a minute or less"),
        ("cpu", 3000, True, "this one takes about 50 minutes"),
        ("cuda", 30, False, "on cuda it pays in runs of more than 60 seconds"),
        ("cuda", 90, True, "this one takes about 2 minutes"),
        ("mps", 1e6, False, "it does not pay on mps"),
        ("cpu", 0.0, False, "it does not pay without training"),
    ],
)
def test_auto_compiles_where_the_run_is_long_enough(said, device, seconds, on, line):
    assert compile.choose_compile(SimpleNamespace(compile="auto"), torch.device(device), said.append, seconds) is on
    assert said[0].startswith(f"compile: {on}, because ") and line in said[0] and "--compile" in said[0]


@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_of_ones_own_is_followed_without_a_word(said, choice):
    assert compile.choose_compile(SimpleNamespace(compile=choice), CPU, said.append, 1e9) is choice
    assert not said


def test_a_part_that_fails_to_compile_later_is_told_once(monkeypatch, capsys):
    import torch._dynamo

    logger = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
    dist = Dist(CPU, torch.float32, out=sys.stdout)
    with torch._dynamo.config.patch(suppress_errors=False):  # puts back what is set meanwhile
        compile.compiled(model, SimpleNamespace(compile=True), dist, (4, 8), (3, 8))
    logger.warning("no C++ compiler\nand why")
    logger.warning("again")
    assert capsys.readouterr().out.splitlines()[2:] == ["compile: a part runs uncompiled (no C++ compiler)"]
