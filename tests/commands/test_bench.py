"""bench.py: its output, and that it writes no files."""

import re
from types import SimpleNamespace

import pytest
import torch
from support import Door, free_port

from nanogpt.commands import bench
from nanogpt.config import BenchConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import memory, speed
from nanogpt.run.settings import load
from nanogpt.shape import SHAPE

SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=2", "--device=cpu"]
SMALL += ["--gradient_accumulation_steps=2", "--iters=3", "--warmup=1", "--compile=False"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        bench.main([*SMALL, *flags])
        return capsys.readouterr().out

    return run


def test_the_phases_add_up_to_the_iteration(run, tmp_path):
    out = run("--optimizer=muon", "--architecture=qwen3", "--iters=1")  # of one iteration, the medians add up
    rows = {name: float(ms) for name, ms in re.findall(r"^(\w+) +([\d.]+) +\d+%$", out, re.M)}
    assert set(rows) == set(bench.PHASES)
    whole = float(re.search(r"^iteration +([\d.]+)$", out, re.M)[1])
    assert sum(rows.values()) == pytest.approx(whole, abs=0.03)  # each is rounded to 0.01
    for name in ("speed", "MFU", "yardstick", "of that", "memory"):
        assert re.search(rf"^{name} +[\d,.]+", out, re.M), name
    assert re.search(r"^iteration +32 tokens, ", out, re.M)  # 2 x 2 sequences of 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_bench_measures_the_model_of_the_settings(dist, tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    cfg = load(BenchConfig, [*SMALL, f"--architecture={architecture}", "--dropout=0.25"], "bench.py")
    run, _, seconds = bench.measure(cfg, dist)
    assert all(getattr(run.gpt.config, name) == getattr(cfg, name) for name in (*SHAPE, "dropout"))
    assert len(seconds) == cfg.iters and run.step == cfg.warmup + cfg.iters


def test_each_phase_has_its_own_time(dist, tmp_path, monkeypatch):
    """Only the work advances the clock: an hour for a batch, 20 minutes for a forward pass, a minute for an update."""
    monkeypatch.chdir(tmp_path)
    now = [0.0]

    def takes(seconds, owner, name):
        real = getattr(owner, name)

        def work(*args, **kwargs):
            now[0] += seconds
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, work)

    takes(3600.0, bench.data.Batches, "get")
    takes(1200.0, GPT, "forward")
    takes(2400.0, torch.Tensor, "backward")
    takes(60.0, bench.optim.AdamW, "step")
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    _, _, seconds = bench.measure(load(BenchConfig, SMALL, "bench.py"), dist)
    assert seconds == [{"data": 7200.0, "forward": 2400.0, "backward": 4800.0, "optimizer": 60.0}] * 3


def test_two_processes_share_an_iteration(tmp_path):
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    doors = [Door(tmp_path, ["bench", *SMALL], f"log-{r}", place | dict(RANK=r, LOCAL_RANK=r)) for r in "01"]
    assert [door.end() for door in doors] == [0, 0], doors[0].printed
    assert re.search(r"^iteration +32 tokens, ", doors[0].printed, re.M)
    assert "iteration " not in doors[1].printed


def test_without_a_dataset_the_tokens_are_random_and_one_line_says_so(run):
    assert re.search(r"^data: 65 kinds of random tokens \(--vocab_size\); --dataset=openwebtext", run(), re.M)


def test_a_prepared_dataset_is_read(run, tmp_path):
    from nanogpt.text.dataset import write_dataset
    from nanogpt.text.tokenizer import CharTokenizer

    tok = CharTokenizer.train("abc")
    write_dataset(tmp_path / "data" / "d", tok, tok.encode("abc" * 50), tok.encode("abc" * 50))
    assert "random tokens" not in run("--dataset=d")


def test_the_yardstick_counts_the_operations_of_the_linear_layers(dist):
    model = GPT(GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=16, bias=False))
    assert speed.products_rate(model, dist, tokens=64, repeats=2) > 1e6
    assert memory.peak_memory(torch.device("cpu")) > 2**24


def test_expected_seconds():
    assert speed.expected_seconds(100, flops_per_iter=1e12, peak=3e12, layers=4) == pytest.approx(100)
    assert speed.expected_seconds(100, flops_per_iter=1e3, peak=3e12, layers=4) == pytest.approx(0.4)
    assert BenchConfig().iters > 0
