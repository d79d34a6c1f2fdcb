"""A trained model and its tokenizer, from a run's folder or from GPT-2's weights, for the programs that use one."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from nanogpt.config import GPT2_NAMES, UserError
from nanogpt.formats import export
from nanogpt.model import GPT
from nanogpt.run import checkpoint
from nanogpt.text import tokenizer


@dataclass
class Trained:
    """A model on the CPU, and what is known of it."""

    model: GPT
    tokenizer: object
    tokenizer_json: dict
    settings: dict  # the latest of the run that trained it; none of GPT-2's
    folder: str  # that it lies in, or GPT-2's name
    checkpoint: object = None  # the checkpoint.Checkpoint that it was read from; none of Hugging Face's


def load(cfg, dist):
    """The Trained that `init_from` names: the best of the run in `out_dir`, a GPT-2, or a folder. UserError where there is none."""
    if cfg.init_from in GPT2_NAMES or (cfg.init_from != "resume" and export.is_hugging_face(cfg.init_from)):
        tokenizer_json = export.read_tokenizer(cfg.init_from)
        return fitting(export.from_pretrained(cfg.init_from), tokenizer_json, {}, cfg.init_from)
    folder = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    found = checkpoint.best(folder, dist.say) or export.from_nanogpt(folder)
    if found is None:
        there = sorted(str(p.parent) for p in Path().glob("*/checkpoints"))
        hint = f"; there are some in {', '.join(there)}" if there else "; train.py makes one"
        raise UserError(
            f"--{'out_dir' if cfg.init_from == 'resume' else 'init_from'}={folder}: holds no checkpoint{hint}"
        )
    dist.say(f"model: {found.folder}, step {found.step}, val loss {found.val_loss:.4f}")
    latest = checkpoint.peek(folder) or found
    return fitting(checkpoint.load_model(found), found.tokenizer, latest.settings, folder, found)


def fitting(model, tokenizer_json, settings, folder, found=None):
    """The Trained of a model and its tokenizer. UserError if the tokenizer has ids that the model does not have."""
    tok, V = open_tokenizer(tokenizer_json), model.config.vocab_size
    if tok.vocab_size > V:
        raise UserError(
            f"{folder}: the model's vocabulary of {V} is smaller than the {tok.vocab_size} of its tokenizer"
        )
    return Trained(model, tok, tokenizer_json, settings, folder, found)


def known(text, tok):
    """(a prompt, with accents composed or decomposed as the vocabulary has them; a line about what it lacks, or None)."""
    if not isinstance(tok, tokenizer.CharTokenizer):
        return text, None
    text = min((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))), key=tok.count_unknown)
    if tok.unknown is None or not tok.count_unknown(text):  # without a token for unknown characters, they are refused
        return text, None
    return text, f"{tok.about_unknown(text)}; the model sees its token for unknown characters there"


def open_tokenizer(tokenizer_json):
    """The tokenizer that a checkpoint describes. UserError where it cannot be had."""
    try:
        return tokenizer.from_json(tokenizer_json)
    except (ImportError, OSError, ValueError) as e:
        raise UserError(str(e)) from None
