"""A sick step is never applied: infinity and nan in loss, gradient and input; spikes; float16's scaling."""

import itertools
import math
import os
import re
import signal

import pytest
import torch
from faults import BAD, PLACES, Watched, in_loss
from support import losses, metrics

from nanogpt.config import RunFailed, TrainConfig
from nanogpt.run import checkpoint, health
from nanogpt.run.start import TrainState

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_never_reaches_the_weights(run, watched, monkeypatch, place, value):
    watched.sick_at = {6}
    PLACES[place](monkeypatch, BAD[value], watched.sick)
    with pytest.raises(RunFailed) as caught:
        run()
    assert watched.step == 6 and watched.unchanged_since(6)
    [line] = caught.value.problems
    loss, norm = re.match(r"step 6: the loss is (\S+), the gradient's norm (\S+): the run stops", line).groups()
    assert "this update was not applied" in line
    assert not (math.isfinite(float(loss)) and math.isfinite(float(norm)))
    assert "the last sound checkpoint is out/checkpoints/step-00000004" in line
    assert "two things to try: --learning_rate=0.005 and --grad_clip=0.5" in line
    assert caught.value.exit_code == 1
    assert checkpoint.newest("out").step == 4


def test_without_a_checkpoint_the_message_says_so(run, watched, monkeypatch):
    watched.sick_at = {2}
    in_loss(monkeypatch, math.nan, watched.sick)
    with pytest.raises(RunFailed, match="there is no checkpoint yet; .* and --grad_clip=1$"):
        run("--grad_clip=0.0")
    assert checkpoint.newest("out") is None


def test_a_sick_step_that_no_line_shows_is_found_before_anything_is_saved(run, watched, monkeypatch):
    watched.sick_at = {4}
    in_loss(monkeypatch, math.nan, watched.sick)
    with pytest.raises(RunFailed, match="step 4: the loss is nan"):
        run("--log_interval=100")
    assert checkpoint.newest("out") is None


def test_a_sick_run_that_is_asked_to_stop_is_not_saved(run, watched, monkeypatch):
    watched.sick_at = {6}
    in_loss(monkeypatch, math.nan, lambda: watched.sick() and (signal.raise_signal(signal.SIGTERM), True))
    with pytest.raises(RunFailed, match="step 6"):
        run("--log_interval=100")
    assert checkpoint.newest("out").step == 4


@pytest.mark.parametrize("place", PLACES)
def test_float16_skips_a_bad_step_lowers_its_scale_and_goes_on(run, watched, monkeypatch, place):
    watched.sick_at = {6}
    PLACES[place](monkeypatch, math.inf, watched.sick)
    run("--dtype=float16")
    before, after = watched.before[6], watched.before[7]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not watched.unchanged_since(7)
    assert list(losses()) == list(range(1, 9))
    state = checkpoint.newest("out").optimizer_tensors()
    assert {int(t) for name, t in state.items() if name.startswith("step.")} == {7}  # of 8
    if place != "gradient":  # put in after the scaler had looked
        assert checkpoint.newest("out").scaler["scale"] == 2.0**15


def test_float16_gives_up_where_no_scale_helps(run, watched, monkeypatch):
    monkeypatch.setattr(health, "PATIENCE", 3)
    watched.sick_at = set(range(5, 100))
    in_loss(monkeypatch, math.inf, watched.sick)
    with pytest.raises(RunFailed, match="step 7: .*--dtype=bfloat16 or float32"):
        run("--dtype=float16")
    assert watched.unchanged_since(5)


LONG = ["--max_iters=72", "--lr_decay_iters=72", "--eval_interval=100", "--learning_rate=1e-3"]


def high(monkeypatch, watched):
    """A loss ten times as high at steps 70 and 71."""
    watched.sick_at = {70, 71}
    in_loss(monkeypatch, 10.0, watched.sick)


def test_spikes_are_counted_and_logged_and_applied(run, watched, monkeypatch):
    high(monkeypatch, watched)
    out = run(*LONG)
    found = re.findall(r"^iter (\d+): spike number (\d+): loss .* is far above the recent ones$", out, re.M)
    assert found[0] == ("70", "1")
    assert [r["step"] for r in metrics() if "spike" in r][0] == 70
    assert checkpoint.newest("out").state["spikes"] == len(found)
    assert not watched.unchanged_since(70) and watched.before[71].keys()
    before, after = watched.before[70], watched.before[71]
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_spikes_are_skipped_where_that_is_asked_for(run, watched, monkeypatch):
    high(monkeypatch, watched)
    out = run(*LONG, "--skip_spikes=True")
    assert re.search(r"^iter 70: spike number 1: .*, and was skipped$", out, re.M)
    before, after = watched.before[70], watched.before[71]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_ordinary_run_has_no_spikes(run):
    assert "spike" not in run(*LONG)
    assert checkpoint.newest("out").state["spikes"] == 0


def test_what_is_remembered_of_the_losses_is_resumed(run, watched, monkeypatch):
    high(monkeypatch, watched)
    run(*LONG, "--max_iters=69", "--out_dir=parts")
    out = run(*LONG, "--init_from=resume", "--out_dir=parts")
    assert "iter 70: spike number 1" in out  # after 69 steps, not after none


def sick_on_rank_1():
    """In another process: step 3 of rank 1 has a loss that is nan."""
    watched = Watched(pytest.MonkeyPatch())
    watched.sick_at = {3} if os.environ["RANK"] == "1" else set()
    in_loss(pytest.MonkeyPatch(), math.nan, watched.sick)


def test_both_processes_of_two_stop_and_say_why(start_two):
    doors = start_two(before=sick_on_rank_1)
    assert [d.end() for d in doors] == [1, 1]
    assert len(re.findall(r"^error: .*: step 3: the loss is nan", doors[0].printed + doors[1].printed, re.M)) == 1
    assert not (doors[0].log.parent / "out/checkpoints").exists()


def test_the_judge_alone():
    cfg = type("Cfg", (), dict(skip_spikes=False))
    judge, step = health.Health(cfg, torch.device("cpu")), itertools.count()

    def verdict(loss, norm=1.0):
        return tuple(float(t) for t in judge.judge(next(step), torch.tensor(loss), torch.tensor(norm)))

    assert verdict(1e9) == (0, 0)  # nothing to compare with yet
    judge, step = health.Health(cfg, torch.device("cpu")), itertools.count()
    for i in range(health.RECENT):
        assert verdict(2.0 + 0.1 * (i % 2)) == (0, 0)
    assert verdict(2.1) == (0, 0) and verdict(-50.0) == (0, 0)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)):
        assert verdict(loss, norm) == (1, 0)
    assert verdict(200.0) == (0, 1)
    assert all(torch.isfinite(t).all() for t in judge.state.values())


def test_only_steps_skipped_in_a_row_end_a_float16_run(dist):
    """In a long run the scale is raised, and a step skipped, again and again."""
    dist.dtype = torch.float16
    watch = health.Watch(TrainConfig(), dist, TrainState(), None)
    for step in range(3 * health.PATIENCE):
        watch.check(step, {"loss": 2.0, "grad_norm": math.inf if step % 2 else 1.0, "spike": 0.0})
    assert watch.skipped_in_a_row == 1


@pytest.mark.parametrize("skip_spikes", [False, True])
def test_a_loss_that_stays_high_is_a_spike_only_at_first(skip_spikes):
    """Or a run that skips spikes would never make another update."""
    judge = health.Health(TrainConfig(skip_spikes=skip_spikes), torch.device("cpu"))
    found = []
    rise = health.RECENT + health.REFRESH
    for step in range(rise + 2 * health.REFRESH):
        loss = 2.0 + 0.1 * (step % 2) if step < rise else 20.0
        skip, spike = judge.judge(step, torch.tensor(loss), torch.tensor(1.0))
        found.append((skip.item(), spike.item()))
    assert found[rise] == (float(skip_spikes), 1.0) and found[-1] == (0.0, 0.0)
