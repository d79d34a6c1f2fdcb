"""What the machine decides: number formats, compilation. Several processes are tested where they train."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanogpt import distributed
from nanogpt.distributed import Dist, choose_compile, choose_dtype, prepare_device
from nanogpt.model import GPT, GPTConfig, attend

CPU = torch.device("cpu")


@pytest.fixture
def said():
    return []


@pytest.fixture(autouse=True)
def exact_products_again():
    yield
    torch.set_float32_matmul_precision("highest")


def units(monkeypatch, present):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": present}, raising=False)


@pytest.mark.parametrize(
    "asked, present, chosen, line",
    [
        ("auto", True, torch.float32, "dtype: float32, .*bfloat16 is faster on this CPU"),
        ("auto", False, torch.float32, "dtype: float32, "),
        ("bfloat16", True, torch.bfloat16, None),
        ("bfloat16", False, torch.float32, "dtype: float32, because this CPU has no units for bfloat16"),
        ("float32", True, torch.float32, None),
    ],
)
def test_a_cpu_multiplies_in_bfloat16_where_it_is_asked_to_and_can(monkeypatch, said, asked, present, chosen, line):
    units(monkeypatch, present)
    assert choose_dtype(SimpleNamespace(dtype=asked), CPU, said.append) == chosen
    assert len(said) == (line is not None)
    if line:
        assert re.match(line, said[0])


def model_and_batch(architecture, dropout=0.0):
    torch.manual_seed(3)
    shape = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=64, bias=False)
    model = GPT(GPTConfig(**shape, architecture=architecture, dropout=dropout))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model, torch.randint(50, (4, 32))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_bfloat16_on_a_cpu_keeps_tensors_in_float32_and_the_gradients_close(architecture):
    model, idx = model_and_batch(architecture)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        prepare_device(CPU, dtype)
        dist = Dist(CPU, dtype)
        assert dist.operand_dtype == torch.float32
        with dist.autocast():
            logits, loss = model(idx, idx)
        assert logits.dtype == torch.float32
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_the_next_model_on_the_cpu_is_exact_again():
    prepare_device(CPU, torch.bfloat16)
    assert torch.get_float32_matmul_precision() == "medium"
    prepare_device(CPU)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("grad", [True, False])
def test_attention_stays_exact_beside_products_in_bfloat16(grad):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 16, 3, 8, requires_grad=grad) for _ in range(3)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        prepare_device(CPU, dtype)
        before = torch.get_float32_matmul_precision()
        y = attend(*tensors, dropout=0.0)
        results.append([y, *(torch.autograd.grad(y.square().sum(), tensors) if grad else ())])
        assert torch.get_float32_matmul_precision() == before
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_the_model_is_compiled_whole_and_once_for_each_mode(monkeypatch, architecture):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(distributed, "CompileErrors", lambda: SimpleNamespace(reasons=[], note=pytest.fail))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(distributed, "find_vector_units", lambda: None)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, architecture=architecture))
    cfg, dist = SimpleNamespace(compile=True), Dist(CPU, torch.float32)
    distributed.compiled(model, cfg, dist)  # to write text, which needs another graph
    assert counter.frame_count == 0
    fast = distributed.compiled(model, cfg, dist, (4, 8), (3, 8))
    assert counter.frame_count == 2  # with gradients, and without
    idx, targets = torch.randint(11, (3, 8)), torch.randint(11, (3, 8))
    loss = fast(idx, targets)[1]
    loss.backward()
    with torch.no_grad():
        model.eval()
        fast(*torch.randint(11, (2, 4, 8)))
    assert counter.frame_count == 2
    assert loss.item() == pytest.approx(model(idx, targets)[1].item(), abs=1e-5)


@pytest.mark.slow
def test_what_the_cpu_can_do_is_found_out_once(monkeypatch):
    from torch._inductor import cpu_vec_isa

    distributed.find_vector_units()
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: pytest.fail("it is asked again"))
    assert cpu_vec_isa.pick_vec_isa()


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
    assert choose_compile(SimpleNamespace(compile="auto"), torch.device(device), said.append, seconds) is on
    assert said[0].startswith(f"compile: {on}, because ") and line in said[0] and "--compile" in said[0]


@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_of_ones_own_is_followed_without_a_word(said, choice):
    assert choose_compile(SimpleNamespace(compile=choice), CPU, said.append, 1e9) is choice
    assert not said


def test_cpus_without_known_capabilities_count_as_without(monkeypatch, said):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype(SimpleNamespace(dtype="bfloat16"), CPU, said.append) == torch.float32
    assert distributed.choose_dtype(SimpleNamespace(dtype="auto"), CPU, said.append) == torch.float32
