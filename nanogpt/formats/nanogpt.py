"""Checkpoints of the original nanoGPT, as ours. legacy.py reads the files without running code."""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from nanogpt.config import UserError
from nanogpt.formats import legacy
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import memory
from nanogpt.run.checkpoint import Checkpoint
from nanogpt.text import tokenizer
from nanogpt.text.dataset import read_meta

GPT2_SIZES = (50257, 50304)  # vocabulary sizes of nanoGPT's models with GPT-2's tokenizer; it pads the second


def from_nanogpt(out_dir: str | Path) -> Checkpoint | None:
    """The Checkpoint in the original nanoGPT's `ckpt.pt`, or None if `out_dir` has no such file.

    Raises UserError if it is damaged or holds anything but data.
    """
    path = Path(out_dir) / "ckpt.pt"
    if not path.is_file():
        return None
    found = legacy.read_checkpoint(path)
    try:
        settings, step = found["config"], int(found["iter_num"])
        tokenizer_json = find_tokenizer(settings["dataset"], found["model_args"]["vocab_size"], path)
        config = GPTConfig(**found["model_args"])
        memory.check_size(config, path)
        moments = adamw_state(GPT(config), found["optimizer"]["state"])
        losses = {"val": float(found["best_val_loss"])}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{path}: is no checkpoint of nanoGPT that this version knows ({type(e).__name__}: {e})"
        ) from None
    state = {"step": step, "losses": losses, "best_val_loss": losses["val"]}
    return Checkpoint(
        path, step, state, asdict(config), tokenizer_json, settings, {}, in_memory=(found["model"], moments)
    )


def adamw_state(model: GPT, state: dict) -> dict[str, torch.Tensor]:
    """nanoGPT's AdamW state under our names; there, parameters have numbers: matrices first, then vectors."""
    params = list(model.named_parameters())
    ordered = [n for n, p in params if p.dim() >= 2] + [n for n, p in params if p.dim() < 2]
    return {
        f"{key}.{name}": torch.as_tensor(state[i][key], dtype=torch.float32)
        for i, name in enumerate(ordered)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def find_tokenizer(dataset: str, vocab_size: int, path: Path) -> dict:
    """The tokenizer, as JSON, of a nanoGPT model, which is stored with its dataset. Raises UserError if it is missing."""
    meta = Path("data") / Path(dataset).name / "meta.pkl"
    found: dict
    found, size = {"type": "gpt2"}, tokenizer.GPT2Tokenizer.vocab_size  # what nanoGPT assumes without a meta.pkl
    if os.path.isfile(meta):
        chars = legacy.read_meta(meta)
        found, size = {"type": "char", "chars": chars}, len(chars)
    elif os.path.lexists(meta.with_suffix(".json")):
        meta = meta.with_suffix(".json")
        described = read_meta(meta.parent)
        found, size = described["tokenizer"], described["vocab_size"]
    elif vocab_size not in GPT2_SIZES:
        raise UserError(f"{path}: its characters are in {meta}, which is missing")
    if vocab_size != size and (found["type"] != "gpt2" or vocab_size not in GPT2_SIZES):
        raise UserError(f"{path}: has {vocab_size} tokens, and {meta}, which should be its tokenizer, has {size}")
    return found
