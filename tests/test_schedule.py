"""The learning rate: warm-up, cosine or straight line, floor."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.config import TrainConfig
from nanogpt.schedule import lr_at

CFG = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
LINEAR = replace(CFG, lr_schedule="linear", lr_decay_iters=100, cooldown_frac=0.4)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 10),
        (4, 5 / 10),
        (8, 9 / 10),
        (9, 1.0),
        (34, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        (59, 0.55),
        (84, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (109, 0.1),
        (10**9, 0.1),
    ],
)
def test_the_rate_at_a_step(step, expected):
    assert lr_at(step, CFG) == pytest.approx(expected, rel=1e-12)


def test_the_rate_rises_then_falls_then_stays():
    rates = [lr_at(step, CFG) for step in range(130)]
    differences = [b - a for a, b in zip(rates, rates[1:], strict=False)]
    assert all(d > 0 for d in differences[:9])
    assert all(d < 0 for d in differences[9:109])
    assert all(d == 0 for d in differences[109:])


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 10),
        (8, 9 / 10),
        (9, 1.0),
        (60, 1.0),
        (70, 0.1 + 0.9 * 3 / 4),
        (80, 0.55),
        (99, 0.1 + 0.9 / 40),
        (100, 0.1),
        (10**9, 0.1),
    ],
)
def test_the_rate_at_a_step_of_the_straight_line(step, expected):
    assert lr_at(step, LINEAR) == pytest.approx(expected, rel=1e-12)


def test_the_straight_rate_rises_then_stays_then_falls_evenly():
    rates = [lr_at(step, LINEAR) for step in range(130)]
    differences = [b - a for a, b in zip(rates, rates[1:], strict=False)]
    assert all(d > 0 for d in differences[:9])
    assert all(d == 0 for d in differences[9:60] + differences[100:])
    assert differences[60:100] == pytest.approx([-0.9 / 40] * 40)


@pytest.mark.parametrize("warmup", [0, 9, 70, 99])
def test_a_straight_line_begins_at_the_top_where_the_warm_up_ends_late(warmup):
    cfg = replace(LINEAR, cooldown_frac=1.0, warmup_iters=warmup)
    assert lr_at(warmup, cfg) == 1.0
    assert lr_at((warmup + 100) / 2, cfg) == pytest.approx(0.55)


@pytest.mark.parametrize("lr_schedule", ["cosine", "linear"])
def test_without_decay_it_is_constant(lr_schedule):
    cfg = TrainConfig(learning_rate=0.3, decay_lr=False, lr_schedule=lr_schedule)
    assert {lr_at(step, cfg) for step in (0, 1, 2000, 10**9)} == {0.3}


def test_without_warm_up_it_begins_at_the_top():
    assert lr_at(0, TrainConfig(warmup_iters=0)) == 6e-4


@pytest.mark.parametrize("lr_decay_iters", [0, 5, 9])
def test_a_decay_that_ends_within_the_warm_up_follows_the_warm_up(lr_decay_iters):
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=lr_decay_iters)
    assert lr_at(7, cfg) == pytest.approx(0.8)
    assert lr_at(9, cfg) == 0.1


counts = st.integers(0, 10**6)


schedules = st.sampled_from(["cosine", "linear"])
shares = st.floats(0, 1)


@given(schedules, shares.filter(bool), counts, counts, counts, st.floats(1e-8, 10), shares)
def test_the_rate_never_leaves_its_bounds(lr_schedule, cooldown_frac, step, warmup, decay, lr, share):
    cfg = TrainConfig(learning_rate=lr, min_lr=lr * share, warmup_iters=warmup, lr_decay_iters=decay)
    cfg = replace(cfg, lr_schedule=lr_schedule, cooldown_frac=cooldown_frac)
    low = min(cfg.min_lr, lr / (warmup + 1))
    assert low * (1 - 1e-9) <= lr_at(step, cfg) <= lr * (1 + 1e-9)
