"""Finds and loads the trained model and tokenizer that `init_from` names."""

import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt import lora, optim
from nanogpt.config import (
    EvalConfig,
    ExportConfig,
    ServeConfig,
    TextConfig,
    TrainConfig,
    UserError,
    is_path,
    is_published,
    on_the_hub,
)
from nanogpt.formats import hugging_face, pretrained
from nanogpt.formats.nanogpt import from_nanogpt
from nanogpt.model import GPT
from nanogpt.run import checkpoint, memory, settings
from nanogpt.run.checkpoint import Checkpoint
from nanogpt.run.distributed import Dist
from nanogpt.text import tokenizer

LORA = ("lora_rank", "lora_alpha", "lora_layers", "lora_base")  # the settings that say how a model is adapted
KEPT = "../../base"  # from a checkpoint's folder to that of the model that the run's LoRA adapts


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


def load_model(found: Checkpoint, dropout: float = 0.0, merged: bool = True) -> GPT:
    """The GPT of a checkpoint, on the CPU; that of a run with LoRA is merged, or as it was trained.

    Raises UserError if the checkpoint does not fit, or the model that LoRA's matrices adapt is not where it was.
    """
    if not found.base:
        return checkpoint.load_model(found, dropout)
    check_base(found)
    model = load_base(found, dropout)
    adapt(model, found.base)
    matrices, tensors = optim.trained_parameters(model), found.model_tensors()
    odd = sorted(matrices.keys() ^ tensors.keys()) or [n for n in matrices if matrices[n].shape != tensors[n].shape]
    if odd:
        raise UserError(f"{found.folder}: its LoRA matrices do not fit the model that they adapt ({odd[0]})")
    for name, tensor in tensors.items():
        matrices[name].data.copy_(tensor)
    if merged:
        lora.merge(model)
    return model


def check_base(found: Checkpoint) -> None:
    """Raise UserError if what a checkpoint says of the model that LoRA adapts is not as `describe_base` writes it."""
    base, source = found.base, f"{found.folder}: LoRA"
    kinds = {"from": str, "sha256": str} | {name: type(getattr(TrainConfig, name)) for name in LORA}
    if odd := [name for name, kind in kinds.items() if type(base.get(name)) is not kind]:
        raise UserError(f"{source}: {odd[0]} is {base.get(odd[0])!r:.60}")
    settings.check_bounds(TrainConfig, {name: base[name] for name in LORA}, source)
    config = checkpoint.shape_of(found)
    memory.check_size(config, found.folder)
    if base["lora_rank"] > max(config.n_embd, config.hidden):
        raise UserError(f"{source}: lora_rank is {base['lora_rank']}, more than the model's channels")


def load_base(found: Checkpoint, dropout: float) -> GPT:
    """The model that a checkpoint's LoRA matrices adapt. Raises UserError if it is not where it was, or another one."""
    needs = f"{found.folder}: its LoRA matrices need the model that they were trained with"
    name, expected = found.base["from"], found.model_config
    try:
        if name == KEPT:
            kept = found.folder / KEPT
            if problem := checkpoint.damage(kept):
                raise UserError(f"{kept}: damaged ({problem})")
            model = checkpoint.load_model(checkpoint.read(kept), dropout)
        elif (old := from_nanogpt(Path(name).parent) if Path(name).name == "ckpt.pt" else None) is not None:
            model = checkpoint.load_model(old, dropout)
        elif not (is_published(name) or (is_path(name) and Path(name).is_dir())):
            raise UserError(f"{name:.200} is gone")
        else:
            model = pretrained.from_pretrained(name, dropout)
        same = lora.fingerprint(model) == found.base["sha256"]
        if expected["block_size"] < model.config.block_size:
            model.crop_block_size(expected["block_size"])
    except UserError as e:
        raise UserError(*(f"{needs}: {p}" for p in e.problems)) from None
    if not same or asdict(model.config) | {"dropout": 0} != expected | {"dropout": 0}:
        raise UserError(f"{needs}, and {name} is another one now")
    return model


def describe_base(model: GPT, found: Checkpoint | str, cfg: TrainConfig) -> dict[str, Any]:
    """What a run's checkpoints say of the model that LoRA adapts: where it is, a hash of its weights, and how.

    A checkpoint of another run is kept in the run's own folder, since that run may remove it: see `checkpoint.keep`.
    Raises UserError if that run has LoRA, too.
    """
    if isinstance(found, Checkpoint) and found.base:
        raise UserError(
            f"--init_from={cfg.init_from}: is a run with LoRA itself; nanogpt export --init_from={cfg.init_from} "
            f"--to=FOLDER makes a model of it, which --init_from=FOLDER takes"
        )
    name = found if isinstance(found, str) and is_published(found) else str(Path(source(found)).resolve())
    name = KEPT if isinstance(found, Checkpoint) and not found.in_memory else name
    return {"from": name, "sha256": lora.fingerprint(model)} | {name: getattr(cfg, name) for name in LORA}


def source(found: Checkpoint | str) -> Path | str:
    """The file, folder or name of a model that `find` returned."""
    return found.folder if isinstance(found, Checkpoint) else found


def adapt(model: GPT, base: dict[str, Any]) -> None:
    """Freeze a model and add LoRA's matrices, as `describe_base` says."""
    dtype = dict(float32=torch.float32, bfloat16=torch.bfloat16)[base["lora_base"]]
    lora.adapt(model, base["lora_rank"], base["lora_alpha"], base["lora_layers"], dtype)


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
    return with_tokenizer(load_model(found), found.tokenizer, latest.settings, folder, found)


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
