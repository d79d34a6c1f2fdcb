"""`nanogpt estimate`: its counts are those of real models and runs, and its page shows what it computes."""

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exporting import ARCHITECTURES
from torch.nn import functional as F

import nanogpt.model
from nanogpt.commands import cli
from nanogpt.config import TrainConfig, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import make_optimizer
from nanogpt.run import checkpoint, forecast, gpus
from nanogpt.run.forecast import Job
from nanogpt.run.gpus import FAST, GPUS, SLOW
from nanogpt.shape import count_parameters, flops_per_token, linear_weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
GPT2 = GPTConfig()
JOB = Job(GPT2, sequences=480, micro_batch=12, gpus=64, gpu=GPUS["H100"])


def meta(config):
    with torch.device("meta"):
        return GPT(config)


def estimate(capsys, *args, code=0):
    assert cli.main(["estimate", *args]) == code
    out, err = capsys.readouterr()
    return err if code else out


def benchmark():
    spec = importlib.util.spec_from_file_location("published_runs", ROOT / "benchmarks" / "estimate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- counts


@pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_parameters_arithmetic_and_state_are_those_of_a_real_model(kind):
    config = GPTConfig(16, 31, n_layer=3, n_head=2, n_embd=12, **kind)
    model, counts = meta(config), count_parameters(config)
    blocks = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert (counts.matrices, counts.vectors) == (blocks, vectors)
    assert counts.total == model.num_params(non_embedding=False)
    assert flops_per_token(config, linear_weights(config), 8) == model.flops_per_token(8)
    for optimizer in ("adamw", "muon"):
        state = make_optimizer(model, TrainConfig(optimizer=optimizer)).state
        moments = [t for tensors in state.values() for t in tensors.values() if t.dim()]  # without the step counts
        assert forecast.optimizer_state(counts, optimizer == "muon") == sum(t.nbytes for t in moments)


@pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_activations_are_what_a_real_block_keeps(kind, monkeypatch):
    """On a CPU, with norms in float32 as autocast has them on a GPU; two more blocks keep twice as much more."""
    monkeypatch.setattr(nanogpt.model, "rms_norm", lambda x, eps: F.rms_norm(x.float(), x.shape[-1:], eps=eps))

    def kept(n_layer):
        model = GPT(GPTConfig(96, 31, n_layer=n_layer, n_head=4, n_embd=128, **kind))
        idx, own = torch.zeros((3, 96), dtype=torch.int64), {p.untyped_storage().data_ptr() for p in model.parameters()}
        own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(idx, idx)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        casts = sum(2 * p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
        return sum(size for pointer, size in storages.items() if pointer not in own) - casts, model.config

    (two, config), (four, _) = kept(2), kept(4)
    assert forecast.activations_kept(config) == pytest.approx((four - two) / 2 / (3 * 96), rel=0.02)
    assert forecast.activations_kept(config, compiled=True) <= forecast.activations_kept(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_activations_of_a_compiled_block_are_what_the_partitioner_keeps(kind):
    B, T = 3, 96

    def kept(n_layer):
        torch._dynamo.reset()
        model = GPT(GPTConfig(T, 512, n_layer=n_layer, n_head=4, n_embd=256, **kind))
        idx = torch.zeros((B, T), dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = torch.compile(model, backend="aot_eager_decomp_partition")(idx, idx)
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        tensors = [t for t in loss.grad_fn.saved_tensors if t is not None and (t.dim() != 2 or B * T in t.shape)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
        }  # no casts of weights
        return sum(size for pointer, size in storages.items() if pointer not in own), model.config

    (two, config), (three, _) = kept(2), kept(3)
    assert forecast.activations_kept(config, compiled=True) == pytest.approx((three - two) / (B * T), rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_as_large_as_estimated(optimizer, run, tmp_path):
    run(f"--optimizer={optimizer}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1", "--eval_interval=1")
    [folder] = (tmp_path / "out" / "checkpoints").glob("step-*1")
    written = sum((folder / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    config = GPTConfig(**checkpoint.peek(tmp_path / "out").model_config)
    expected = forecast.checkpoint_size(Job(config, 1, 1, 1, GPUS["H100"], muon=optimizer == "muon"))
    assert 0 <= written - expected < 20_000  # names, shapes, and step counts


# -- published runs


def test_the_page_has_the_table_that_the_benchmark_prints():
    assert benchmark().table() in PAGE


def test_published_runs_are_near_the_estimate():
    for name, (job, measured) in benchmark().RUNS.items():
        low, high = (job.tokens / forecast.iteration(job, end).total for end in (SLOW, FAST))
        assert 0.95 * low < measured < 1.05 * high, name


def test_the_page_has_every_constant():
    for end in (SLOW, FAST):
        for value in (end.products, end.attention, end.memory, end.network, end.exposed):
            assert f"{value:.0%}" in PAGE
    assert f"{gpus.HOURS_BETWEEN_FAILURES:,}" in PAGE and f"{gpus.RESERVED} GiB" in PAGE
    assert round(16384 * 54 * 24 / 419, -2) == gpus.HOURS_BETWEEN_FAILURES


# -- arithmetic


def test_sharding_divides_the_state_and_nothing_else():
    none, hybrid, full = (forecast.memory(replace(JOB, shard=shard)) for shard in ("none", "hybrid", "full"))
    for part in ("weights in float32", "optimizer state"):
        assert none[part] == 8 * hybrid[part] == 64 * full[part]
    assert none["activations"] == full["activations"] and none["logits"] == full["logits"]
    assert (
        sum(v for k, v in none.items() if k in ("weights in float32", "gradients", "optimizer state")) == 16 * 124475904
    )


def test_checkpointing_activations_saves_memory_and_costs_time():
    less = replace(JOB, checkpointed=True)
    assert forecast.memory(less)["activations"] < forecast.memory(JOB)["activations"] / 4
    assert 1.1 < forecast.iteration(less, FAST).device / forecast.iteration(JOB, FAST).device < 4 / 3


def test_a_model_that_one_gpu_cannot_hold_is_sharded():
    large = replace(JOB, model=GPTConfig(n_layer=32, n_head=32, n_embd=4096), micro_batch=1)
    assert not forecast.fits(large) and forecast.fits(replace(large, shard="full"))
    assert forecast.largest_micro_batch(replace(large, shard="full")) > 1
    assert forecast.largest_micro_batch(large) == 1


def test_slow_links_make_communication_the_bottleneck():
    slow = replace(GPUS["H100"], network=0.1)
    assert forecast.iteration(replace(JOB, gpu=slow), FAST).bottleneck == "communication between machines"
    alone = forecast.iteration(replace(JOB, gpus=1, sequences=8), FAST)
    assert alone.within == alone.between == 0
    tiny_model = GPTConfig(64, 65, n_layer=4, n_head=4, n_embd=128)
    assert forecast.iteration(Job(tiny_model, 12, 12, 1, GPUS["H100"]), SLOW).bottleneck.startswith("the host")


def test_the_same_batch_gains_ever_less_from_more_gpus():
    times = [forecast.iteration(replace(JOB, gpus=n), FAST).total for n in (8, 16, 32, 64, 128)]
    speedups = [a / b for a, b in zip(times, times[1:], strict=False)]
    assert all(1 < s < 2 for s in speedups) and speedups == sorted(speedups, reverse=True)
    assert forecast.helpful_gpus(JOB, FAST) < 480 < forecast.helpful_gpus(replace(JOB, sequences=48000), FAST)
    assert forecast.helpful_batch(replace(JOB, gpus=8), SLOW) < forecast.helpful_batch(replace(JOB, gpus=256), SLOW)


@pytest.mark.parametrize("cost, between", [(1, 1e4), (60, 3600), (900, 3600)])
def test_no_other_interval_loses_less_time(cost, between):
    def lost(interval):  # Daly 2006, eq. 20, without the restart
        return between * math.expm1((interval + cost) / between) / interval

    best = forecast.best_interval(cost, between)
    least = min(lost(best * 1.01**i) for i in range(-200, 200))
    assert lost(best) <= 1.002 * least


# -- the command


def test_torch_is_not_imported():
    code = (
        "import sys; from nanogpt.commands import cli; "
        "assert cli.main(['estimate', 'config/train_gpt2.py', '--gpus=64', '--price=2']) == 0; "
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_report_has_everything(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = estimate(capsys, "config/train_gpt2.py", "--gpus=64", "--gpu=h100", "--price=2")
    for words in (
        "GiB per GPU",
        "tokens/s",
        "MFU",
        "hours",
        "cost",
        "checkpoint",
        "interval",
        "bottleneck",
        "this batch",
    ):
        assert words in out
    assert "32 GPUs take 8 sequences and 32 take 7" in out and "6.2% of the GPUs' time" in out
    assert "cost" not in estimate(capsys, "--gpus=8")


def test_a_run_is_its_iterations_checkpoints_and_failures():
    job = replace(JOB, gpus=8)
    plan = forecast.Plan(1000, 500, 0, 1e9)
    whole = forecast.whole_run(job, FAST, plan)
    pure = 1000 * forecast.iteration(job, FAST).total + 3 * whole.stall
    assert whole.seconds == pytest.approx(pure, rel=1e-4)
    assert forecast.whole_run(job, FAST, replace(plan, hours_between_failures=10)).seconds > 1.04 * whole.seconds


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--gpu=h10O", "did you mean h100?"),
        ("--gpu=rtx-4009", "did you mean rtx-4090?"),
        ("--gpu=toaster", "expected one of h200"),
        ("--gpus=481", "work for at most 480 GPUs"),
        ("--shard=ful", "did you mean full?"),
        ("--dtype=float32", "bfloat16 and float16 only"),
    ],
)
def test_a_mistake_gets_one_line(flag, expected, capsys):
    err = estimate(capsys, flag, code=2)
    assert expected in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("typed", ["h100", "H100", "NVIDIA H100", "a100-40gb", "A100 40GB", "RTX4090"])
def test_a_gpu_is_found_as_people_write_it(typed):
    assert gpus.find_gpu(typed)[1].memory in (80, 40, 24)


def test_a_gpu_known_by_its_peak_only_is_not_offered():
    assert gpus.peak_tflops("NVIDIA A30") == 165
    with pytest.raises(UserError):
        gpus.find_gpu("a30")


def test_auto_shards_only_what_does_not_fit(capsys):
    assert "none, it fits" in estimate(capsys, "--gpus=8")
    large = [
        "--n_layer=32",
        "--n_head=32",
        "--n_embd=4096",
        "--gpus=64",
        "--batch_size=1",
        "--gradient_accumulation_steps=64",
    ]
    assert "sharding     full, what is not sharded does not fit" in estimate(capsys, *large)
    assert "does not fit" in estimate(capsys, *large, "--shard=none")
    assert "1 micro-step\n" in estimate(capsys, "--gpus=8", "--batch_size=auto", "--gradient_accumulation_steps=8")


def test_the_vocabulary_is_the_datasets(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny.parent.parent)
    assert f"({Path('data/tiny')}'s)" in estimate(capsys, "--dataset=tiny")
    assert "vocabulary 50,304" in estimate(capsys, "--dataset=other")
    assert "vocabulary 70 (--vocab_size)" in estimate(capsys, "--vocab_size=70")
