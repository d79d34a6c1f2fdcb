"""torch.compile: when it pays, what it compiles, and what a failure costs."""

import logging
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func

from nanogpt import step, train
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import compile, distributed
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


def begins_to_average():
    """In each of two processes: train compiled, and tell when buckets are averaged and parts of the backward pass run."""
    from torch._dynamo.backends.common import aot_autograd

    events, real = [], torch.compile

    def backward_graph(module, inputs):
        def run(*args):
            events.append("backward")
            return module(*args)

        return make_boxed_func(run)

    def forward_graph(module, inputs):
        return make_boxed_func(module.forward)

    def average(world_size, bucket, real=distributed.average):
        events.append("average")
        return real(world_size, bucket)

    def train_step(run, real=step.train_step):
        events.clear()
        metrics = real(run)
        run.dist.say("events: " + " ".join(events))
        return metrics

    backend = aot_autograd(fw_compiler=forward_graph, bw_compiler=backward_graph)
    torch.compile = lambda model: real(model, backend=backend)
    distributed.average = average
    train.train_step = train_step


def test_gradients_are_averaged_while_others_are_computed(start_two):
    """The graph ends where a bucket of gradients is full."""
    args = ["--compile=True", "--n_embd=256", "--n_layer=4", "--max_iters=2", "--eval_iters=1"]
    doors = start_two(*args, before=begins_to_average)
    assert [d.end() for d in doors] == [0, 0], doors[0].printed
    assert "compile: took" in doors[0].printed
    steps = [line.split()[1:] for line in doors[0].printed.splitlines() if line.startswith("events: ")]
    assert len(steps) == 2
    for events in steps:
        assert events.index("average") < len(events) - 1 - events[::-1].index("backward"), events


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
    logger.warning("backend='inductor' raised:\nno C++ compiler\nand why")  # the first line is PyTorch's heading
    logger.warning("again")
    assert capsys.readouterr().out.splitlines()[2:] == ["compile: a part runs uncompiled (no C++ compiler)"]
