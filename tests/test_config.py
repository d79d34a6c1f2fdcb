"""The promises of the fixed interface: the classic settings and their defaults, and the config files built on them."""

from dataclasses import asdict
from pathlib import Path

import pytest

from nanogpt.config import TrainConfig
from nanogpt.run.settings import load

ROOT = Path(__file__).parent.parent

CLASSIC = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from="scratch", wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", dataset="openwebtext",
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
    bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, seed=1337,
)  # fmt: skip


@pytest.mark.parametrize("name", CLASSIC)
def test_a_classic_setting_keeps_its_name_and_default(name):
    value = getattr(load(TrainConfig, [], "train.py"), name)
    assert (value, type(value)) == (CLASSIC[name], type(CLASSIC[name]))


def changed(name):
    found = load(TrainConfig, [str(ROOT / "config" / name)], "train.py")
    return {k: v for k, v in asdict(found).items() if v != getattr(TrainConfig, k)}


def test_train_shakespeare_char_is_as_promised():
    assert changed("train_shakespeare_char.py") == dict(
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        batch_size=64,
        dropout=0.2,
        learning_rate=1e-3,
        min_lr=1e-4,
        beta2=0.99,
        warmup_iters=100,
        max_iters=5000,
        lr_decay_iters=5000,
        eval_interval=250,
        log_interval=10,
        always_save_checkpoint=False,
        out_dir="out-shakespeare-char",
        dataset="shakespeare_char",
        gradient_accumulation_steps=1,
        wandb_project="shakespeare-char",
        wandb_run_name="mini-gpt",
    )


def test_train_gpt2_is_as_promised():
    expected = dict(eval_interval=1000, log_interval=10, wandb_run_name="gpt2-124M")
    assert changed("train_gpt2.py") == expected
