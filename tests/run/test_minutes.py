"""--minutes: what it chooses, what it leaves to the user, and how a run keeps to the clock."""

import io
import re

import pytest
from support import SMALL, metrics

from nanogpt import config
from nanogpt.config import TrainConfig, UserError
from nanogpt.run import checkpoint, minutes, plan, settings
from nanogpt.run.minutes import Clock

RATE = 1e11  # FLOP/s of the machine of these tests


@pytest.fixture
def place(tiny, monkeypatch):
    """A folder with the dataset `tiny`, on a machine whose speed is known."""
    monkeypatch.chdir(tiny.parent.parent)
    monkeypatch.setattr(plan, "try_out", lambda plans, *args: plan.Trial([RATE] * 3, 0.0, 0.0))


def chosen(dist, *args):
    cfg = settings.load(TrainConfig, ["--dataset=tiny", *args], "train.py")
    minutes.choose_run(cfg, dist)
    return cfg


def test_more_minutes_never_choose_less(place, dist, monkeypatch):
    monkeypatch.setattr(plan, "MAX_EPOCHS", 10**9)
    runs = [chosen(dist, f"--minutes={n}") for n in (0.1, 1, 30, 1000, 100_000)]
    sizes = [cfg.n_embd for cfg in runs]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert all(cfg.max_iters == cfg.lr_decay_iters and cfg.optimizer == "muon" for cfg in runs)


def test_what_is_set_stays(place, dist):
    cfg = chosen(dist, "--minutes=1", "--n_embd=96", "--n_layer=3", "--n_head=3", "--optimizer=adamw", "--dropout=0.3")
    assert (cfg.n_embd, cfg.n_layer, cfg.optimizer, cfg.dropout) == (96, 3, "adamw", 0.3)


def test_a_small_text_ends_early_and_says_so(place, dist):
    dist.out = io.StringIO()
    cfg = chosen(dist, "--minutes=1000")
    per_epoch = cfg.max_iters * cfg.batch_size * cfg.block_size / plan.MAX_EPOCHS
    assert per_epoch < 10**4
    assert re.search(
        r"minutes: about .* suffice to read this text 10 times; more would teach little", dist.out.getvalue()
    )


@pytest.mark.parametrize("args, line", [
    (["--max_iters=3"], "--max_iters=3: follows from --minutes=1; give one of them"),
    (["--n_embd=5", "--n_head=5"], "--minutes: finds no model with the settings that are given: n_embd = 5 must be a multiple of 2 x n_head"),
])  # fmt: skip
def test_what_cannot_be_is_said(place, dist, args, line):
    with pytest.raises(UserError) as error:
        chosen(dist, "--minutes=1", *args)
    assert str(error.value).startswith(line)


def test_a_config_files_iterations_give_way(place, dist, tmp_path):
    (tmp_path / "own.py").write_text("max_iters = 12345\nn_embd = 64\nn_head = 2\nn_layer = 2\nblock_size = 32\n")
    cfg = chosen(dist, "own.py", "--minutes=0.5")
    assert cfg.max_iters == cfg.lr_decay_iters != 12345 and cfg.block_size == 32


class Machine:
    """A machine on which time passes only when something is computed."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        for name, clock in (("perf_counter", lambda: self.now), ("process_time", lambda: 0.0)):
            monkeypatch.setattr(minutes.time, name, clock)

    def train(self, clock, cfg, iteration, evaluation=0.0, val_tokens=1000):
        """Run to the end; iteration: seconds, as a function of the step. Returns the seconds of the whole run."""
        began, step = self.now, 0
        while step < cfg.max_iters:
            if step % cfg.eval_interval == 0:
                self.now += evaluation
                clock.evaluated(evaluation)
            self.now += iteration(step)
            step += 1
            clock.follow(step, val_tokens)
        if not clock.refuses_exact(val_tokens):
            self.now += evaluation * val_tokens / (2 * cfg.eval_iters * cfg.batch_size * cfg.block_size)
        return self.now - began


@pytest.mark.parametrize("iteration, evaluation", [(0.01, 0.0), (0.01, 0.5), (0.4, 3.0), (0.0007, 0.1)])
@pytest.mark.parametrize("guess", [50, 10**5])
def test_a_run_takes_its_minutes_whatever_the_trial_found(monkeypatch, dist, iteration, evaluation, guess):
    machine, cfg = (
        Machine(monkeypatch),
        TrainConfig(minutes=2.0, lr_schedule="linear", warmup_iters=10, eval_interval=100),
    )
    clock = Clock(cfg, dist)
    clock.most = config.MANY
    clock.set(guess)
    took = machine.train(clock, cfg, lambda step: iteration, evaluation)
    assert 0.9 * 120 < took < 1.1 * 120


@pytest.mark.parametrize("val_tokens, refused", [(20_000, False), (50_000, True)])
def test_the_exact_loss_takes_its_part_of_the_time_or_is_left_out(monkeypatch, dist, val_tokens, refused):
    sizes = dict(eval_iters=10, batch_size=4, block_size=16, gradient_accumulation_steps=1)  # 1,280 tokens in a second
    machine, cfg = Machine(monkeypatch), TrainConfig(minutes=2.0, lr_schedule="linear", eval_interval=1000, **sizes)
    clock = Clock(cfg, dist)
    clock.most = config.MANY
    clock.set(10**5)
    took = machine.train(clock, cfg, lambda step: 0.01, 1.0, val_tokens)
    assert 0.9 * 120 < took < 1.1 * 120
    line = clock.refuses_exact(val_tokens)
    assert bool(line) == refused
    assert not refused or line == (
        "exact val loss: left out, since it would take about 39 seconds of --minutes=2; "
        "nanogpt eval --out_dir=out computes it"
    )


def test_a_machine_that_becomes_slower_gets_fewer_iterations(monkeypatch, dist):
    machine, cfg = Machine(monkeypatch), TrainConfig(minutes=2.0, lr_schedule="linear", eval_interval=1000)
    clock = Clock(cfg, dist)
    clock.most = config.MANY
    clock.set(12_000)
    took = machine.train(clock, cfg, lambda step: 0.01 if step < 1500 else 0.03)
    assert 0.9 * 120 < took < 1.1 * 120 and cfg.max_iters < 6000


def test_once_the_rate_falls_the_iterations_are_settled(monkeypatch, dist):
    machine, cfg = Machine(monkeypatch), TrainConfig(minutes=2.0, lr_schedule="linear", eval_interval=1000)
    clock = Clock(cfg, dist)
    clock.most = config.MANY
    clock.set(12_000)
    machine.train(clock, cfg, lambda step: 0.01 if step < 9000 else 0.1)
    assert 11_000 < cfg.max_iters < 13_000 and clock.next is None


def test_a_run_of_seconds_and_its_resumption(tiny, run, monkeypatch):
    small = [a for a in SMALL if not a.startswith(("--max_iters", "--lr_decay"))]
    monkeypatch.setattr("support.SMALL", small)
    printed = run("--minutes=0.05", "--lr_schedule=linear", "--cooldown_frac=0.5")
    assert re.search(r"^minutes: 0.05, for about \d+ iterations", printed, re.M)
    saved = checkpoint.peek("out")
    iterations = saved.settings["max_iters"]
    assert saved.step == iterations == saved.settings["lr_decay_iters"] == metrics("out")[-1]["step"]
    printed = run("--init_from=resume")
    assert f"nothing is left to train: --max_iters is {iterations}" in printed


@pytest.mark.parametrize("share, measured", [(0.0, False), (1e9, True)])
def test_a_run_without_time_for_the_exact_loss_says_so(tiny, run, monkeypatch, share, measured):
    small = [a for a in SMALL if not a.startswith(("--max_iters", "--lr_decay"))]
    monkeypatch.setattr("support.SMALL", small)
    monkeypatch.setattr(minutes, "EXACT", share)
    printed = run("--minutes=0.02", "--lr_schedule=linear")
    assert ("exact val loss: left out" in printed) == (not measured)
    assert any("exact_loss" in record for record in metrics("out")) == measured
