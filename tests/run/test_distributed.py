"""What the machine decides: number formats, compilation. Several processes are tested where they train."""

import logging
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanogpt.commands import cli
from nanogpt.config import RunFailed, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed
from nanogpt.run.distributed import Dist, choose_compile, choose_device, choose_dtype, prepare_device

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


@pytest.mark.slow
def test_what_the_cpu_can_do_is_found_out_once(monkeypatch):
    from torch._inductor import cpu_vec_isa

    compile.find_vector_units()
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


# Processes

ONE = SimpleNamespace(device="cpu", dtype="float32", backend="auto")


def test_ranks_that_a_cluster_sets_for_one_process_do_not_silence_it(monkeypatch, capsys):
    """Kubernetes sets RANK and WORLD_SIZE for each of its machines, whatever is started there."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with distributed.setup(SimpleNamespace(**vars(ONE) | dict(device="auto"))) as dist:
        assert (dist.rank, dist.local_rank, dist.world_size, dist.is_main) == (0, 0, 1, True)
    said = capsys.readouterr().out
    assert said.startswith("processes: one, because LOCAL_RANK is not set") and "\ndevice: " in said


def test_a_backend_for_gpus_is_refused_without_one(monkeypatch):
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="here", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--backend=nccl: works on GPUs alone, and the device is cpu; --backend=gloo"):
        with distributed.setup(SimpleNamespace(**vars(ONE) | dict(backend="nccl"))):
            pass


PLACE = dict(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@pytest.mark.parametrize(
    "env, words",
    [
        (dict(LOCAL_RANK="5"), "LOCAL_RANK=5: RANK and WORLD_SIZE and MASTER_ADDR and MASTER_PORT must be set too"),
        (PLACE | dict(MASTER_ADDR=""), "LOCAL_RANK=0: MASTER_ADDR must be set too, as torchrun does"),
        (PLACE | dict(WORLD_SIZE="x"), "WORLD_SIZE=x: expected a whole number from 1 on"),
        (PLACE | dict(WORLD_SIZE="0"), "WORLD_SIZE=0: expected a whole number from 1 on"),
        (PLACE | dict(RANK="-1"), "RANK=-1: expected a whole number from 0 on"),
        (PLACE | dict(RANK="1.5"), "RANK=1.5: expected a whole number from 0 on"),
        (PLACE | dict(LOCAL_RANK="²"), "LOCAL_RANK=²: expected a whole number from 0 on"),
        (PLACE | dict(LOCAL_WORLD_SIZE="x"), "LOCAL_WORLD_SIZE=x: expected a whole number from 1 on"),
        (PLACE | dict(RANK="3"), "RANK=3: expected less than WORLD_SIZE=1"),
        (PLACE | dict(LOCAL_RANK="3"), "LOCAL_RANK=3: expected less than WORLD_SIZE=1"),
    ],
)
def test_a_place_among_processes_that_cannot_be_is_a_line(env, words, monkeypatch):
    for name in (*PLACE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        with distributed.setup(ONE):
            pass
    assert all(problem.startswith(words) for problem in caught.value.problems)


def test_processes_that_do_not_meet_end_with_a_line(monkeypatch):
    for name, value in (PLACE | dict(MASTER_PORT="70000")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunFailed, match="MASTER_ADDR=127.0.0.1 MASTER_PORT=70000: the 1 processes did not meet there"):
        with distributed.setup(ONE):
            pass


@pytest.mark.parametrize("size", ["1", "x", ""])
def test_a_size_that_nobody_asked_for_stops_nothing(size, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with distributed.setup(ONE) as dist:
        assert dist.world_size == 1


def lose_the_other():
    """In each of two processes: the second one ends, and the first one waits for it."""
    cli.run = waits_for_the_other


def waits_for_the_other(argv):
    with distributed.setup(ONE) as dist:
        if dist.rank == 1:
            raise RunFailed("out of luck")
        dist.max(1)


def test_a_process_that_lost_another_says_so_in_a_line(start_two):
    doors = start_two(before=lose_the_other)
    assert [d.end() for d in doors] == [1, 1]
    assert [d.printed.splitlines()[-1] for d in doors] == [
        "error: another process ended, and its own lines say why; the run stops",
        "error: out of luck",
    ]
    assert "Traceback" not in doors[0].printed + doors[1].printed


def work_together():
    """In each of two processes: what they do together, and its results."""
    with distributed.setup(ONE) as dist:
        assert dist.world_size == 2
        assert dist.max(5 + dist.rank) == 6
        assert dist.sum([dist.rank + 1, 0.5]) == [3, 1.0]
        mine = torch.tensor([1.0, 4.0 * dist.rank])
        assert dist.mean(mine).tolist() == [1.0, 2.0] and mine.tolist() == [1.0, 4.0 * dist.rank]
        assert dist.gather(mine).tolist() == [1.0, 0.0, 1.0, 4.0]
        for failure in (UserError("no room"), ZeroDivisionError()):
            why = str(failure) or "ZeroDivisionError"
            with pytest.raises((RunFailed, type(failure))[dist.rank]) as caught:
                with dist.agree():
                    if dist.rank == 1:
                        raise failure
            assert dist.rank == 1 or caught.value.problems == (f"process 1 could not go on: {why}",)
        cfg = SimpleNamespace(seed="auto")
        distributed.choose_seed(cfg, dist)
        assert dist.max(cfg.seed) == cfg.seed == -dist.max(-cfg.seed)
        dist.say("both agree")
    cli.leave(0)


def test_what_two_processes_do_together(start_two):
    doors = start_two(before=work_together)
    assert [d.end() for d in doors] == [0, 0], doors[0].printed + doors[1].printed
    assert ["both agree" in d.printed for d in doors] == [True, False]


# Compilation


def test_a_part_that_fails_to_compile_later_is_told_once(monkeypatch, capsys):
    import torch._dynamo

    logger = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(distributed, "find_vector_units", lambda: None)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
    dist = Dist(CPU, torch.float32, out=sys.stdout)
    with torch._dynamo.config.patch(suppress_errors=False):  # puts back what is set meanwhile
        compile.compiled(model, SimpleNamespace(compile=True), dist, (4, 8), (3, 8))
    logger.warning("no C++ compiler\nand why")
    logger.warning("again")
    assert capsys.readouterr().out.splitlines()[2:] == ["compile: a part runs uncompiled (no C++ compiler)"]
