"""Advice for a dataset and a machine: a model, a run, its duration, and a command that starts it."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanogpt.commands import advice
from nanogpt.commands.advice import About, advise, command, duration
from nanogpt.config import TrainConfig
from nanogpt.model import GPT
from nanogpt.run import plan
from nanogpt.run.distributed import Dist
from nanogpt.run.plan import Plan, choose, measure, rounded
from nanogpt.run.settings import load

ROOT = Path(__file__).parents[2]
CPU = Dist(torch.device("cpu"), torch.float32)
SMALLEST, LARGEST = plan.SHAPES[0], plan.SHAPES[-1]


def run(tokens=10**6, vocab_size=66, shape=SMALLEST, val=10**5):
    return Plan(shape, vocab_size, tokens, val)


def test_a_plan_counts_parameters_and_flops_as_the_model_does():
    model = GPT(run().model)
    assert (run().params, run().flops) == (model.num_params(), model.flops_per_token())


def test_iterations_follow_from_the_model_and_the_text():
    enough, little = run(10**9), run(18_000)
    assert enough.max_iters * enough.batch == pytest.approx(20 * enough.params, rel=0.1)
    assert little.epochs == pytest.approx(plan.MAX_EPOCHS, rel=0.1)
    assert not enough.overfits and little.overfits and (enough.dropout, little.dropout) == (0.0, 0.2)


def test_a_short_text_gets_a_shorter_context():
    assert run(val=40).model.block_size == 39 and run(100, val=40).model.block_size == 39


def test_larger_texts_and_faster_machines_get_larger_models():
    def chosen(tokens, rate):
        return choose([run(tokens, shape=shape) for shape in plan.SHAPES], rate, CPU).model.n_embd

    sizes = [[chosen(tokens, rate) for tokens in (10**5, 10**6, 10**8, 10**10)] for rate in (1e8, 1e12, 1e15)]
    assert sizes[0] == [64, 64, 64, 64]
    assert all(row == sorted(row) for row in sizes) and sizes[2][0] < sizes[2][3] == LARGEST["n_embd"]
    assert all(a <= b for row, faster in zip(sizes, sizes[1:], strict=False) for a, b in zip(row, faster, strict=True))


def test_a_model_fits_the_gpu(monkeypatch):
    runs, gpu = [run(10**10, shape=shape) for shape in plan.SHAPES], Dist(torch.device("cuda"), torch.bfloat16)
    for room, chosen in ((1e12, -1), (runs[-1].memory(), -2), (runs[3].memory(), 2), (1e6, 0)):
        about = SimpleNamespace(total_memory=room)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, about=about: about)
        assert choose(runs, 1e16, gpu) is runs[chosen]


def test_a_run_ends_within_the_hour():
    slow = run(10**9)
    slow.fit(rate=slow.batch * slow.flops)  # an iteration a second
    assert slow.max_iters == min(3600, run(10**9).max_iters)
    slow.fit(rate=slow.batch * slow.flops / 10)
    assert slow.max_iters == 360


def test_a_trial_measures_a_rate_and_how_much_it_varies():
    found = measure(run(), memory=1e9, dist=CPU, end=0.0)
    fast, median, slow = found.rates
    assert 1e6 < slow <= median <= fast < 1e16 and found.rate == median


def test_a_trial_needs_no_more_memory_than_is_allowed(monkeypatch):
    large = run(vocab_size=50257)
    seen = []
    monkeypatch.setattr(
        GPT, "forward", lambda model, x, y: seen.append(len(x)) or (None, sum(p.sum() for p in model.parameters()))
    )
    clock = itertools.count()  # which moves a bit each time that it is looked at
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 1000))
    measure(large, memory=large.memory() - 1, dist=CPU, end=0.1)
    assert max(seen) == large.batch_size // 2 and min(seen) == 1
    lines = advise(About("own", "data", 50257, 10**6, 10**5, memory=1e6, trial=True), CPU)
    assert any(re.match("no trial was made: .* MB, and --memory does not allow it", line) for line in lines)


@pytest.mark.parametrize("trial", [True, False])
def test_the_advice_in_words(trial, monkeypatch):
    monkeypatch.setattr(plan, "TRIAL", 0.0)
    monkeypatch.chdir(ROOT)
    lines = list(advise(About("own", "data", 66, 10**5, 10**4, 1e9, trial), CPU))
    assert re.match(r"a model that fits: \d+ layers, .* [\d.]+M parameters, [\d.]+ tokens of text for each", lines[0])
    told = r"on this cpu at about [\d.,]+ ms (to [\d.,]+ ms )?each" if trial else r"tokens a parameter; about"
    assert re.search(
        rf"a run that fits: [\d,]+ iterations of [\d,]+ tokens, .* times through the text, .*{told}", lines[1]
    )
    assert re.search(r"about [\d.]+ GB of memory$", lines[1])
    assert any(line.startswith("small data: ") for line in lines)
    assert lines[-1].startswith("next: sh train.py config/fast_shakespeare_c")
    assert ("no trial (--trial=True measures how long it takes)" in lines) != trial


def test_a_vocabulary_too_large_for_the_text_is_reported():
    said = list(advice.warnings(run(vocab_size=50257), 50257))
    assert any("97% of the parameters are its 50,257 tokens" in line for line in said)
    assert not any("vocabulary" in line for line in advice.warnings(run(), 66))


@pytest.mark.parametrize("where", ["root", "elsewhere"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [10**4, 10**9])
@pytest.mark.parametrize("shape", plan.SHAPES)
def test_the_suggested_command_starts_the_planned_run(where, device, tokens, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if where == "root" else tmp_path)
    described = run(tokens, shape=shape)
    words = shlex.split(command("own", "data", described, device))
    assert words[:2] == (["sh", "train.py"] if where == "root" else ["nanogpt", "train"])
    cfg = load(TrainConfig, words[2:], "train.py")
    assert (cfg.dataset, cfg.out_dir, cfg.max_iters) == ("own", "out-own", described.max_iters)
    assert cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size == described.batch
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout) == (*list(shape.values())[:3], described.dropout)
    assert cfg.min_lr == 0.0 and cfg.warmup_iters < cfg.max_iters == cfg.lr_decay_iters
    assert (cfg.architecture, cfg.optimizer, cfg.lr_schedule) == ("qwen3", "muon", "linear")
    assert (cfg.muon_lr, cfg.learning_rate) == (shape["muon_lr"], shape["learning_rate"])
    assert (cfg.patience > 0) == described.overfits


def test_rounded_numbers():
    assert [rounded(n) for n in (3, 154, 1999, 20833)] == [100, 150, 1900, 20000]
    assert [duration(s) for s in (5, 600, 7200)] == ["about 5 seconds", "about 10 minutes", "about 2.0 hours"]


def test_varying_measurements_are_printed_as_a_range():
    for seconds, told in [
        ((600, 610, 620), "about 10 minutes"),
        ((600, 700, 900), "about 10 to 15 minutes"),
        ((60, 100, 300), "about 60 seconds to 5 minutes"),
    ]:
        assert advice.span(seconds, duration) == told
    assert advice.span((0.1, 0.2, 0.4), advice.milliseconds) == "about 100 to 400 ms"


def test_trials_end_in_time(monkeypatch):
    """Only steps advance the clock, so the result does not depend on the speed of the machine."""
    runs, now, tried = [run(10**9, shape=shape) for shape in plan.SHAPES], [0.0], []

    def slow(speed):
        def measure(run, memory, dist, end):
            tried.append((runs.index(run), end))
            now[0] = max(end, now[0] + 3 * run.work(1) / speed)
            rate = run.batch * run.flops / (run.work(run.batch_size) / speed)
            return plan.Trial([rate, rate, rate], 1 / speed, 0.0)

        return measure

    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for speed, largest in ((1e8, 0), (3e10, 2), (1e12, 4), (1e16, 6)):
        monkeypatch.setattr(plan, "measure", slow(speed))
        now[0], tried[:] = 0.0, []
        found = plan.try_out(runs, 1e12, CPU)
        assert max(n for n, _ in tried) == largest and found.rate > 0
        assert all(end <= plan.TRIAL for _, end in tried)
        assert len(tried) == 1 if speed == 1e8 else now[0] <= plan.TRIAL  # then the first glimpse took too long already


@pytest.mark.parametrize("share, chosen", [(1.2, 2), (0.9, 1)])
def test_a_glimpse_does_not_rule_a_model_out(monkeypatch, share, chosen):
    """In a glimpse, models compute at half of the rate that they have in a longer trial; small ones are slower in both."""
    runs, now = [run(10**9, shape=shape) for shape in plan.SHAPES], [0.0]
    rate = share * 2 * runs[2].params * runs[2].flops / 600  # for two tokens a parameter of the third in ten minutes

    def measure(run, memory, dist, end):
        found = rate * run.model.n_embd / 128 / (1 if end - now[0] > plan.GLIMPSE + 0.01 else 2)
        now[0] = end
        return plan.Trial([found] * 3, 1e-13, 0.0)

    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(plan, "measure", measure)
    found = plan.try_out(runs, 1e12, CPU, 600)
    assert choose(runs, found.rate, CPU, 600) is runs[chosen] and now[0] <= plan.TRIAL


def test_the_advice_process_never_fails():
    about = dict(name="own", root="data", vocab_size=66, train_tokens=10**6, val_tokens=10**5, memory=1e9, trial=False)
    for given, expected in ((about, "next: "), (about | {"val_tokens": 0}, "no advice on how to train")):
        result = subprocess.run(
            [sys.executable, "-c", "from nanogpt.commands.advice import main; main()"],
            input=json.dumps(given), cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, "") and expected in result.stdout
