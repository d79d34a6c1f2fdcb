"""The learning rate as a pure function of the step."""

import math

from nanogpt.config import TrainConfig


def lr_at(step: int, cfg: TrainConfig) -> float:
    """Learning rate of update `step`, counted from 0: linear warm-up, then decay to min_lr; constant without decay_lr.

    A schedule sets `share`: 1 is learning_rate, 0 is min_lr. From lr_decay_iters on, the rate is min_lr.
    `cosine`: Loshchilov & Hutter 2017, SGDR, equation 5, without restarts. `linear`: constant, then a linear decay over
    the last `cooldown_frac` of lr_decay_iters, or over what the warm-up leaves of them (Hägele et al. 2024, section 3).
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    if cfg.lr_schedule == "linear":
        falling = min(cfg.cooldown_frac * cfg.lr_decay_iters, cfg.lr_decay_iters - cfg.warmup_iters)  # iterations
        share = min(1.0, (cfg.lr_decay_iters - step) / falling)
    elif cfg.lr_schedule == "cosine":
        progress = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)  # 0 to 1
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"lr_at does not know {cfg.lr_schedule}")
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)
