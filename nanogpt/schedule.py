"""The learning rate as a pure function of the step."""

import math


def lr_at(step, cfg):
    """Learning rate of update `step` (0 is the first): linear warm-up, then a cosine down to min_lr.

    Loshchilov & Hutter 2017, SGDR, equation 5, without restarts. Constant where `decay_lr` is off.
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)  # 0 to 1
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)
