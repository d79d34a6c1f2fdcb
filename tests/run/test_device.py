"""What the machine decides: the device and its number formats."""

import re
from types import SimpleNamespace

import pytest
import torch

from nanogpt.config import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import device
from nanogpt.run.device import choose_device, choose_dtype, prepare_device
from nanogpt.run.distributed import Dist

CPU = torch.device("cpu")


@pytest.fixture
def said():
    return []


@pytest.mark.parametrize("slow", [False, True])
def test_a_cpu_writes_in_bfloat16_if_that_is_asked_for_and_faster(monkeypatch, said, slow):
    reason = "this CPU is 3.0 times slower in bfloat16"
    monkeypatch.setattr(device, "slow_in_bfloat16", lambda: reason if slow else None)
    chosen = choose_dtype(SimpleNamespace(dtype="bfloat16"), CPU, said.append)
    assert (chosen, said) == (
        (torch.float32, [f"dtype: float32, because {reason} (--dtype)"]) if slow else (torch.bfloat16, [])
    )


def test_the_speed_in_bfloat16_is_measured():
    reason = device.slow_in_bfloat16()
    assert reason is None or re.fullmatch(r"this CPU is [\d.]+ times slower in bfloat16", reason)


@pytest.mark.parametrize("asked, chosen", [("auto", torch.float32), ("float32", torch.float32)])
def test_a_cpu_is_exact_unless_told_otherwise(said, asked, chosen):
    assert choose_dtype(SimpleNamespace(dtype=asked), CPU, said.append) == chosen
    assert len(said) == (asked == "auto")


def model_and_batch(architecture):
    torch.manual_seed(3)
    shape = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=64, bias=False)
    model = GPT(GPTConfig(**shape, architecture=architecture))
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


@pytest.mark.parametrize("emulated, chosen", [(True, torch.float16), (False, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, said, emulated, chosen):
    def supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_dtype(SimpleNamespace(dtype="auto"), torch.device("cuda", 0), said.append) == chosen


# Devices that this machine may not have


@pytest.fixture
def two_gpus(monkeypatch):
    """PyTorch sees two GPUs; the list of those that were made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    "name, local_rank, several, index",
    [("cuda", 0, False, 0), ("cuda:1", 0, False, 1), ("auto", 1, True, 1), ("cuda:0", 1, True, 1)],
)
def test_each_process_has_a_gpu_of_its_own(two_gpus, said, name, local_rank, several, index):
    device = choose_device(SimpleNamespace(device=name), said.append, local_rank, several)
    assert device == torch.device("cuda", index) and two_gpus == [device]


@pytest.mark.parametrize(
    "name, local_rank, several, problem",
    [
        ("cuda:2", 0, False, "--device=cuda:2: there is no device 2, and this machine has 2"),
        ("cuda", 2, True, "--device=cuda: 3 processes need as many GPUs, and this machine has 2"),
        ("meta", 0, False, "--device=meta: expected cpu, cuda, cuda:N or mps"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line(two_gpus, said, name, local_rank, several, problem):
    with pytest.raises(UserError) as caught:
        choose_device(SimpleNamespace(device=name), said.append, local_rank, several)
    assert caught.value.problems == (problem,) and not two_gpus


@pytest.mark.parametrize("several, expected", [(False, "mps"), (True, "cpu")])
def test_apples_gpu_is_for_one_process(monkeypatch, said, several, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(SimpleNamespace(device="auto"), said.append, 0, several).type == expected
    assert said[0].startswith(f"device: {expected}, because ")


def test_what_is_to_give_the_same_bits_is_told_to_pytorch():
    try:
        prepare_device(CPU, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
