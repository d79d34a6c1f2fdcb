"""The learning rate: warm-up, cosine, floor."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.config import TrainConfig
from nanogpt.schedule import lr_at

CFG = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)


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


def test_without_decay_it_is_constant():
    cfg = TrainConfig(learning_rate=0.3, decay_lr=False)
    assert {lr_at(step, cfg) for step in (0, 1, 2000, 10**9)} == {0.3}


def test_without_warm_up_it_begins_at_the_top():
    assert lr_at(0, TrainConfig(warmup_iters=0)) == 6e-4


@pytest.mark.parametrize("lr_decay_iters", [0, 5, 9])
def test_a_decay_that_ends_within_the_warm_up_follows_the_warm_up(lr_decay_iters):
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=lr_decay_iters)
    assert lr_at(7, cfg) == pytest.approx(0.8)
    assert lr_at(9, cfg) == 0.1


counts = st.integers(0, 10**6)


@given(step=counts, warmup=counts, decay=counts, lr=st.floats(1e-8, 10), share=st.floats(0, 1))
def test_the_rate_never_leaves_its_bounds(step, warmup, decay, lr, share):
    cfg = TrainConfig(learning_rate=lr, min_lr=lr * share, warmup_iters=warmup, lr_decay_iters=decay)
    low = min(cfg.min_lr, lr / (warmup + 1))
    assert low * (1 - 1e-9) <= lr_at(step, cfg) <= lr * (1 + 1e-9)
