"""--shard: runs whose state is divided among real processes, against the same runs in one process."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import ending, losses, metrics

from nanogpt.commands import cli
from nanogpt.config import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import make_optimizer, state_tensors
from nanogpt.run import checkpoint, distributed, memory
from nanogpt.run.distributed import Dist
from nanogpt.run.shards import Shards

# 12 sequences, which 1 to 4 processes share; 3 batches of an evaluation, which they do not; rows that 3 does not divide
BATCH = ["--batch_size=2", "--gradient_accumulation_steps=12", "--eval_iters=3"]
RUNS = [(a, o) for a in ("gpt2", "qwen3") for o in ("adamw", "muon")]


def evaluations(out_dir):
    names = ("train_loss", "val_loss", "exact_loss")
    return {(r["step"], name): r[name] for r in metrics(out_dir) for name in names if name in r}


def assert_same_losses(out_dir, other, steps=8):
    assert len(losses(out_dir)) == len(losses(other)) == steps
    assert losses(out_dir) == pytest.approx(losses(other), abs=1e-5)
    norms, expected = ([r["grad_norm"] for r in metrics(o) if "loss" in r] for o in (out_dir, other))
    assert norms == pytest.approx(expected, rel=1e-3)
    assert len(evaluations(out_dir)) == 7 and evaluations(out_dir) == pytest.approx(evaluations(other), abs=1e-5)


@pytest.fixture
def ranks(start_ranks):
    """ranks(3, "--shard=full") runs to the end and returns what rank 0 printed."""

    def ranks(processes, *args, **more):
        doors = start_ranks(processes, *BATCH, *args, **more)
        assert [door.end() for door in doors] == [0] * processes, "\n".join(door.printed for door in doors)
        return doors[0].printed

    return ranks


@pytest.mark.parametrize("architecture, optimizer", RUNS)
def test_shards_learn_as_one_process_does(architecture, optimizer, run, ranks, undrawn):
    args = [f"--architecture={architecture}", f"--optimizer={optimizer}"]
    if architecture == "gpt2":
        args += ["--bias=True"]
    else:
        args += ["--checkpoint_activations=True", "--norm_gain=True", "--n_kv_head=1", "--tied=False"]
    args += ["--grad_clip=0.5"]  # less than some norms
    run(*BATCH, *args, "--out_dir=one")
    ranks(3, *args, "--shard=full", "--out_dir=three")
    assert_same_losses("three", "one")
    tensors, expected = (checkpoint.newest(out_dir).model_tensors() for out_dir in ("three", "one"))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-3, rtol=0, msg=name)


def test_shards_learn_in_float16_as_one_process_does(run, ranks, undrawn):
    """Gradients are scaled, and all processes agree on the scale."""
    run(*BATCH, "--dtype=float16", "--out_dir=one")
    ranks(2, "--dtype=float16", "--shard=full", "--out_dir=two")
    assert losses("two") == pytest.approx(losses("one"), abs=1e-3)
    scales = [checkpoint.newest(out_dir).scaler for out_dir in ("two", "one")]
    assert scales[0] == scales[1] and scales[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_machine_holds_one_copy_of_a_hybrid_run(optimizer, run, ranks, undrawn):
    run(*BATCH, f"--optimizer={optimizer}", "--out_dir=one")
    ranks(4, f"--optimizer={optimizer}", "--shard=hybrid", "--out_dir=four", env={"LOCAL_WORLD_SIZE": "2"})
    assert_same_losses("four", "one")


@pytest.mark.parametrize(
    "processes, optimizer",
    [(2, "muon"), (3, "adamw"), (3, "muon"), (4, "muon"), pytest.param(8, "muon", marks=pytest.mark.slow)],
)
def test_a_resumed_sharded_run_is_the_same_run(processes, optimizer, ranks, tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent.parent)
    args = ["--shard=full", f"--optimizer={optimizer}", "--dropout=0.1"]
    ranks(processes, *args, "--out_dir=whole")
    ranks(processes, *args, "--out_dir=parts", "--max_iters=4")
    ranks(processes, "--out_dir=parts", "--init_from=resume", "--max_iters=8")
    (weights, _), expected = ending("parts")[0], ending("whole")[0]
    assert [weights, ending("parts")[0][1]] == expected
    assert losses("parts") == losses("whole")


def test_a_checkpoint_does_not_depend_on_who_wrote_it(run, ranks, undrawn):
    """3 processes, 2 without sharding, 4 in two copies, and one: each goes on from where the one before stopped."""
    args = ["--optimizer=muon", "--max_iters=8"]
    run(*BATCH, *args, "--out_dir=one")
    ranks(3, *args, "--shard=full", "--out_dir=many", "--max_iters=2")
    assert layout("many") == layout("one")
    ranks(2, "--shard=none", "--out_dir=many", "--init_from=resume", "--max_iters=4")
    ranks(4, "--shard=hybrid", "--out_dir=many", "--init_from=resume", "--max_iters=6", env={"LOCAL_WORLD_SIZE": "2"})
    run("--out_dir=many", "--init_from=resume", "--max_iters=8", *BATCH)
    assert losses("many") == pytest.approx(losses("one"), abs=1e-5)


def layout(out_dir):
    """{file: {name of a tensor: its shape and dtype}} of a run's newest checkpoint."""
    folder = checkpoint.newest(out_dir).folder
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {name: {n: (t.shape, t.dtype) for n, t in sorted(tensors.items())} for name, tensors in files.items()}


def test_sharded_runs_stop_together_and_are_saved(start_ranks):
    doors = start_ranks(3, *BATCH, "--shard=full", "--max_iters=100000", "--eval_interval=100000")
    doors[0].wait_for("^iter 3:")
    doors[2].send(15)
    assert [door.end() for door in doors] == [143] * 3, doors[0].printed
    assert "saved in out/checkpoints/step-" in doors[0].printed


def test_a_diverged_sharded_run_ends_on_all_processes(start_ranks):
    doors = start_ranks(2, *BATCH, "--shard=full", "--learning_rate=1e18", "--grad_clip=0", "--warmup_iters=0")
    assert [door.end() for door in doors] == [1, 1]
    said = "\n".join(door.printed for door in doors)  # by the process that ended first
    assert "this update was not applied" in said, said


def test_another_runs_weights_and_compiled_blocks(run, ranks, undrawn):
    """A run that starts from another's weights, compiled block by block."""
    run(*BATCH, "--out_dir=first", "--max_iters=2")
    run(*BATCH, "--out_dir=one", "--init_from=first", "--block_size=8")
    said = ranks(2, "--shard=full", "--out_dir=two", "--init_from=first", "--block_size=8", "--compile=True")
    assert "compile: block by block, since the model is sharded (--shard)" in said and "failed" not in said
    assert_same_losses("two", "one")


def hold_shards():
    """In each of three processes: it holds a third of the state, and rank 0's weights; others build no model."""
    config = SimpleNamespace(device="cpu", dtype="float32", backend="auto")
    shape = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=20)
    torch.manual_seed(1)
    expected = {name: p.detach() for name, p in GPT(shape).named_parameters()}
    with distributed.setup(config) as dist:
        dist.shards = Shards(3, 1, dist.rank)
        torch.manual_seed(1)
        with torch.device("meta" if dist.rank else "cpu"):
            model = GPT(shape)
        model = dist.place(model)
        cfg = SimpleNamespace(
            optimizer="muon",
            weight_decay=0.1,
            learning_rate=1e-3,
            beta1=0.9,
            beta2=0.95,
            muon_lr=0.02,
            muon_momentum=0.9,
        )
        optimizer = make_optimizer(model, cfg, dist)
        assert model.lm_head.weight is model.transformer.wte.weight
        held = dict(model.named_parameters()) | state_tensors(model, optimizer)
        sharded = [t for t in held.values() if t.dim()]
        for t in sharded:
            assert t.to_local().shape[0] == len(dist.shards.rows(t.shape[0]))
        for name, p in model.named_parameters():
            whole = dist.whole(p)
            assert (whole is None) == (dist.rank > 0)
            assert whole is None or torch.equal(whole, expected[name])
        counts = [len(dist.shards.rows(7, i)) for i in range(3)]
        assert counts == [3, 3, 1] and [len(dist.shards.rows(4, i)) for i in range(3)] == [2, 2, 0]
    cli.leave(0)


def test_each_process_holds_its_rows_alone(start_ranks):
    doors = start_ranks(3, before=hold_shards)
    assert [door.end() for door in doors] == [0] * 3, "\n".join(door.printed for door in doors)


def gather_in_bfloat16():
    """In each of two processes: blocks whose weights are gathered in bfloat16 compute what autocast does, as on GPUs."""
    with distributed.setup(SimpleNamespace(device="cpu", dtype="float32", backend="auto")) as dist:
        torch.manual_seed(1)
        model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=20, architecture="qwen3"))
        idx = torch.randint(50, (2, 16))
        gradients = []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(idx, idx)[1].backward()
            gradients.append([dist.whole(p.grad) for p in model.parameters()])
            if dist.shards is None:
                model.zero_grad()
                dist.shards = Shards(2, 1, dist.rank)
                dist.shards.split(model, dist.device, torch.bfloat16)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        for one, several in zip(*gradients, strict=True):
            assert several is None or torch.allclose(one, several, atol=1e-2)
    cli.leave(0)


def test_blocks_may_be_gathered_in_bfloat16(start_two):
    doors = start_two(before=gather_in_bfloat16)
    assert [door.end() for door in doors] == [0, 0], "\n".join(door.printed for door in doors)


def own_matrices():
    """In each of three processes: every matrix is worked on once, by one of them, and its rows return."""
    with distributed.setup(SimpleNamespace(device="cpu", dtype="float32", backend="auto")) as dist:
        shards = Shards(3, 1, dist.rank, torch.distributed.group.WORLD)
        for n in (1, 2, 5):
            matrices = torch.randn(n, 7, 4, generator=torch.Generator().manual_seed(n))
            own, worked = shards.rows(7), []
            held = [[len(shards.rows(7, i)) for i in range(3)]] * n
            pieces = [m[own.start : own.stop] for m in matrices]
            done = shards.by_owners(
                pieces, held, 1, lambda stack, worked=worked: worked.append(len(stack)) or stack * 2
            )
            assert all(torch.equal(d, 2 * p) for d, p in zip(done, pieces, strict=True))
            assert dist.sum([sum(worked)]) == [n] and sum(worked) <= math.ceil(n / 3)
    cli.leave(0)


def test_an_owner_works_on_whole_matrices(start_ranks):
    doors = start_ranks(3, before=own_matrices)
    assert [door.end() for door in doors] == [0] * 3, "\n".join(door.printed for door in doors)


@pytest.mark.parametrize(
    "memory_there, shard, reason",
    [(10**12, "none", "fit the 1,000.0 GB of its GPU"), (10**9, "full", "do not fit the 1.0 GB of its GPU")],
)
def test_auto_shards_what_does_not_fit(memory_there, shard, reason, monkeypatch, capsys):
    monkeypatch.setattr(memory, "total_memory", lambda device: memory_there)
    dist = Dist(torch.device("cuda"), torch.bfloat16, world_size=8, out=sys.stdout)
    cfg = SimpleNamespace(shard="auto", lora_rank=0, optimizer="adamw", block_size=1024)
    memory.choose_shards(cfg, GPTConfig(), dist)
    assert dist.shards == (Shards(8, 1, 0) if shard == "full" else None)
    said = capsys.readouterr().out
    assert said.startswith(f"shard: {shard}, because ") and said.endswith(f"{reason} (--shard)\n")


def test_what_cannot_be_sharded_is_a_line(monkeypatch, capsys, run):
    dist = Dist(torch.device("cpu"), torch.float32, world_size=6)
    cfg = SimpleNamespace(shard="hybrid", lora_rank=0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--shard=hybrid: 6 processes .* 4, on each machine; --shard=full"):
        memory.choose_shards(cfg, GPTConfig(), dist)
    with pytest.raises(UserError, match="--batch_size=auto: what fits is found by trial"):
        dist.shards = Shards(6, 1, 0)
        cfg = SimpleNamespace(auto_batch=True, batch_size=6, gradient_accumulation_steps=6)
        memory.choose_micro_batch(SimpleNamespace(cfg=cfg, dist=dist))
    with pytest.raises(UserError, match="takes no --lora_rank"):
        run("--shard=full", "--lora_rank=4", "--init_from=gpt2")
    assert "shard: none, because there is one process (--shard)" in run("--shard=full", "--max_iters=1")
