"""Processes: what torchrun sets, how they meet, and what they do together. Training is tested elsewhere."""

from types import SimpleNamespace

import pytest
import torch

from nanogpt.commands import cli
from nanogpt.config import RunFailed, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed
from nanogpt.step import forward_backward

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
    with pytest.raises(UserError, match="--backend=nccl: needs GPUs, and the device is cpu; --backend=gloo"):
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


def work_together():
    """In each of two processes: what they do together, and its results."""
    with distributed.setup(ONE) as dist:
        assert dist.world_size == 2
        assert dist.max(5 + dist.rank) == 6
        assert dist.sum([dist.rank + 1, 0.5]) == [3, 1.0]
        mine = torch.tensor([1.0, 4.0 * dist.rank])
        assert dist.may_stop()  # nothing says no
        for asked, failure in ((False, None), (True, None), (False, RunFailed())):
            dist.asked, dist.failure = (asked, failure) if dist.rank else (False, None)
            assert dist.mean_loss(mine[1]).item() == 2.0
            assert dist.may_stop() == (asked or failure is not None)
        dist.failure = None
        assert dist.gather(mine).tolist() == [1.0, 0.0, 1.0, 4.0]
        parts = torch.full((3,), 7.0 + dist.rank).split(2)
        dist.complete(parts)
        assert torch.cat(parts).tolist() == [7.0, 7.0, 8.0]
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


def accumulate():
    """In each of three processes: DDP's buckets hold the gradients of all micro-batches, not of the last one alone."""
    with distributed.setup(ONE) as dist:
        torch.manual_seed(1)
        gpt = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
        parameters, windows = list(gpt.parameters()), torch.randint(20, (6, 8))
        for mine in windows.chunk(3):  # the mean over all, in one process
            forward_backward(gpt, mine, mine, dist, divisor=3)
        expected = [p.grad for p in parameters]
        gpt.zero_grad()
        model = dist.wrap(gpt)
        buckets = memory_of(parameters)
        for _ in range(2):  # steps
            for i, when in enumerate((False, True)):
                mine = windows[[2 * dist.rank + i]]
                with dist.averaging(model, when):
                    forward_backward(model, mine, mine, dist, divisor=2)
                assert memory_of(parameters) == buckets
            for p, grad in zip(parameters, expected, strict=True):
                torch.testing.assert_close(p.grad, grad)
            dist.clear_gradients(model)
            assert not any(p.grad.any() for p in parameters)
    cli.leave(0)


def look_up():
    """In each of two processes: the tables of rotary embeddings are sent once, when the model is wrapped."""
    with distributed.setup(ONE) as dist:
        gpt = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16, architecture="qwen3"))
        table = next(gpt.buffers())
        sent = table.clone()
        table += dist.rank
        model = dist.wrap(gpt)
        assert torch.equal(table, sent)
        table += dist.rank
        idx = torch.zeros((1, 8), dtype=torch.int64)
        for _ in range(2):  # DDP would send them from the second on, since the model was wrapped without averaging
            forward_backward(model, idx, idx, dist)
        assert torch.equal(table, sent + dist.rank)  # as it was, on both
    cli.leave(0)


def test_a_step_does_not_send_the_rotary_tables(start_two):
    doors = start_two(before=look_up)
    assert [d.end() for d in doors] == [0, 0], doors[0].printed + doors[1].printed


def memory_of(parameters):
    """{address: bytes} of what the gradients of parameters are stored in."""
    stored = [p.grad.untyped_storage() for p in parameters]
    found = {storage.data_ptr(): storage.nbytes() for storage in stored}
    assert sum(found.values()) == sum(p.nbytes for p in parameters)
    return found


def test_gradients_are_accumulated_where_they_are_averaged(start_ranks):
    doors = start_ranks(3, before=accumulate)
    assert [d.end() for d in doors] == [0] * 3, doors[0].printed


def test_what_two_processes_do_together(start_two):
    doors = start_two(before=work_together)
    assert [d.end() for d in doors] == [0, 0], doors[0].printed + doors[1].printed
    assert ["both agree" in d.printed for d in doors] == [True, False]
