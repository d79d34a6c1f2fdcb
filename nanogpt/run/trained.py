"""Finds and loads the trained model and tokenizer that `init_from` names."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.config import (
    EvalConfig,
    ExportConfig,
    ServeConfig,
    TextConfig,
    TrainConfig,
    UserError,
    is_published,
    on_the_hub,
)
from nanogpt.formats import hugging_face, pretrained
from nanogpt.formats.nanogpt import from_nanogpt
from nanogpt.model import GPT
from nanogpt.run import checkpoint
from nanogpt.run.checkpoint import Checkpoint
from nanogpt.run.distributed import Dist
from nanogpt.text import tokenizer


@dataclass
class Trained:
    """A model on the CPU, its tokenizer, and its origin."""

    model: GPT
    tokenizer: Any
    tokenizer_json: dict
    settings: dict  # the latest settings of the run that trained it; {} for a pretrained model
    folder: str  # or the name of a published model
    checkpoint: Checkpoint | None = None  # that it was read from; None for a pretrained model


def find(
    cfg: TrainConfig | TextConfig | EvalConfig | ExportConfig | ServeConfig, say: Callable, newest: bool = False
) -> Checkpoint | str | None:
    """What `init_from` names: the name of a published model, a folder in Hugging Face's format, or a Checkpoint; else None.

    `resume` and `auto` mean the run in `out_dir`, any other value the run in that folder. Returns its best checkpoint,
    or its newest one.
    """
    resuming = cfg.init_from in ("resume", "auto")
    if is_published(cfg.init_from) or (not resuming and hugging_face.is_hugging_face(cfg.init_from)):
        return cfg.init_from
    folder = cfg.out_dir if resuming else cfg.init_from
    return (checkpoint.newest if newest else checkpoint.best)(folder, say) or from_nanogpt(folder)


def load(cfg: TextConfig | EvalConfig | ExportConfig | ServeConfig, dist: Dist) -> Trained:
    """Load the model that `init_from` names (see `find`) and its tokenizer. Raises UserError if there is none."""
    found = find(cfg, dist.say)
    if isinstance(found, str):
        tokenizer_json = pretrained.read_tokenizer(found)  # first, since it is quick
        return with_tokenizer(pretrained.from_pretrained(found), tokenizer_json, {}, found)
    name = "out_dir" if cfg.init_from in ("resume", "auto") else "init_from"
    folder = getattr(cfg, name)
    if found is None:
        there = sorted(str(p.parent) for p in Path().glob("*/checkpoints"))
        hint = f"; there are some in {', '.join(there)}" if there else "; train.py makes one"
        hint = on_the_hub(cfg.init_from) or hint
        raise UserError(f"--{name}={folder}: holds no checkpoint{hint}")
    dist.say(f"model: {found.folder}, step {found.step}, val loss {found.val_loss:.4f}")
    latest = checkpoint.peek(folder) or found
    return with_tokenizer(checkpoint.load_model(found), found.tokenizer, latest.settings, folder, found)


def with_tokenizer(
    model: GPT, tokenizer_json: dict, settings: dict, folder: str, found: Checkpoint | None = None
) -> Trained:
    """The Trained of a model and its tokenizer. Raises UserError if the tokenizer has ids that the model lacks."""
    tok, V = open_tokenizer(tokenizer_json), model.config.vocab_size
    if tok.vocab_size > V:
        raise UserError(
            f"{folder}: the model's vocabulary of {V} is smaller than the {tok.vocab_size} of its tokenizer"
        )
    return Trained(model, tok, tokenizer_json, settings, folder, found)


def known(text: str, tok: Any) -> tuple[str, str | None]:
    """(the prompt, its accents composed or decomposed as in the vocabulary; a line about unknown characters, or None)."""
    if not isinstance(tok, tokenizer.CharTokenizer):
        return text, None
    text = min((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))), key=tok.count_unknown)
    if tok.unknown is None or not tok.count_unknown(text):  # without an unknown token, encoding raises
        return text, None
    return text, f"{tok.about_unknown(text)}; the model sees its token for unknown characters there"


def open_tokenizer(tokenizer_json: dict) -> Any:
    """The tokenizer that a checkpoint describes. Raises UserError if it cannot be loaded."""
    try:
        return tokenizer.from_json(tokenizer_json)
    except (ImportError, OSError, ValueError) as e:
        raise UserError(str(e)) from None
