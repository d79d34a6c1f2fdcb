"""Checkpoints: written whole or not at all, found again, and checked before use.

    OUT_DIR/checkpoints/step-00000250/
        model.safetensors       weights, by parameter name
        optimizer.safetensors   AdamW's moments and step counts, as exp_avg.NAME and so on
        checkpoint.json         step, losses, the model's shape, the tokenizer, all settings
        manifest.json           format version; size and SHA-256 of each file above

A folder by that name is complete: it is written under a temporary name, flushed to disk, and renamed.
Only tensors and JSON are read; nothing in a checkpoint can run code.
"""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanogpt.config import UserError
from nanogpt.model import GPT, GPTConfig

FORMAT = 1
RUN_FILES = ("checkpoints", "config.json", "metrics.jsonl", "loss.png")  # what a run leaves in its out_dir


@dataclass
class Checkpoint:
    """A checkpoint's folder and what its `checkpoint.json` says."""

    folder: Path
    step: int
    val_loss: float
    best_val_loss: float
    model_config: dict
    tokenizer: dict
    settings: dict
    scaler: dict

    def model_tensors(self):
        """{parameter name: tensor}."""
        return _tensors(self.folder / "model.safetensors")

    def optimizer_tensors(self):
        """{'exp_avg.NAME': tensor, ...}, as `optim.state_tensors` gave them."""
        return _tensors(self.folder / "optimizer.safetensors")


def save(out_dir, model, optimizer_tensors, *, step, val_loss, best_val_loss, tokenizer, settings, scaler):
    """Write the checkpoint of `step` into `out_dir`, then remove those that are neither the newest nor the best.

    Returns its folder. Raises OSError where the disk refuses; older checkpoints are intact then.
    """
    parent = Path(out_dir) / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    folder = parent / f"step-{step:08d}"
    temporary = parent / f".{folder.name}.tmp"
    temporary.mkdir()
    try:
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, temporary / "model.safetensors")
        save_file({n: t.contiguous() for n, t in optimizer_tensors.items()}, temporary / "optimizer.safetensors")
        info = dict(step=step, val_loss=val_loss, best_val_loss=best_val_loss, model_config=asdict(model.config))
        info |= dict(tokenizer=tokenizer, settings=settings, scaler=scaler)
        _write_json(temporary / "checkpoint.json", info)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        _write_json(temporary / "manifest.json", {"format": FORMAT, "files": files})
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if folder.exists():  # this step once more, after a resume
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        _flush(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    keep = {folder, best(out_dir).folder}
    for other in _folders(out_dir):
        if other not in keep:
            shutil.rmtree(other)
    return folder


def newest(out_dir):
    """The Checkpoint with the highest step in `out_dir`, or None where there is none."""
    folders = _folders(out_dir)
    return read(folders[-1]) if folders else None


def best(out_dir):
    """The Checkpoint with the lowest validation loss in `out_dir`, or None where there is none."""
    found = [read(f) for f in _folders(out_dir)]
    return min(found, key=lambda c: (c.val_loss, c.step), default=None)


def read(folder):
    """The Checkpoint in `folder`. Raises UserError where a file is missing, cut short or not what it should be."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder}: is of format {manifest['format']}; this version reads format {FORMAT}")
        for name, entry in manifest["files"].items():
            size = (folder / Path(name).name).stat().st_size
            if size != entry["bytes"]:
                raise UserError(f"{folder / name}: has {size} bytes instead of {entry['bytes']}")
        info = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        return Checkpoint(folder, **info)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{folder}: is no sound checkpoint ({type(e).__name__}: {e})") from None


def load_model(checkpoint, dropout=0.0):
    """The checkpoint's GPT with its weights, on the CPU. UserError where they do not fit each other."""
    tensors = checkpoint.model_tensors()
    try:
        model = GPT(GPTConfig(**checkpoint.model_config | {"dropout": dropout}))
        model.load_weights(tensors)
    except (TypeError, ValueError) as e:
        raise UserError(f"{checkpoint.folder}: holds no model that this version knows ({e})") from None
    return model


def set_aside(out_dir):
    """Move an earlier run in `out_dir` into a dated folder inside it. Returns that folder, or None if there was none."""
    out_dir = Path(out_dir)
    present = [out_dir / n for n in RUN_FILES if (out_dir / n).exists()]
    if not present:
        return None
    aside = out_dir / time.strftime("earlier-%Y%m%d-%H%M%S")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    aside.mkdir()
    for path in present:
        os.rename(path, aside / path.name)
    return aside


def write_settings(out_dir, settings, sources):
    """Write the resolved settings, and where each came from, to `out_dir/config.json`."""
    out_dir = Path(out_dir)
    temporary = out_dir / ".config.json.tmp"
    _write_json(temporary, {"settings": settings, "sources": sources})
    _flush(temporary)
    os.replace(temporary, out_dir / "config.json")


def _folders(out_dir):
    """Complete checkpoints in `out_dir`, oldest first."""
    parent = Path(out_dir) / "checkpoints"
    return sorted(p for p in parent.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def _tensors(path):
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path):
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
