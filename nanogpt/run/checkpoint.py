"""Checkpoints: written whole or not at all, found again, and checked before use.

    OUT_DIR/checkpoints/step-00000250/
        model.safetensors       weights, by parameter name
        optimizer.safetensors   AdamW's moments and step counts, as exp_avg.NAME and so on
        checkpoint.json         step, losses, the model's shape, the tokenizer, all settings
        manifest.json           format version; size and SHA-256 of each file above

A folder by that name is complete: it is written under a temporary name, flushed to disk, and renamed.
Only tensors and JSON are read; nothing in a checkpoint can run code.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt import files
from nanogpt.config import RunFailed, UserError
from nanogpt.files import flush, write_json
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import memory
from nanogpt.run.device import out_of_memory

FORMAT = 1
FILES = ("checkpoint.json", "model.safetensors", "optimizer.safetensors")
NAME = re.compile(r"step-(\d{8,18})(?:-(\d{1,9}))?")
RUN_FILES = ("checkpoints", "config.json", "metrics.jsonl", "loss.png", "base")  # what a run leaves in its out_dir


@dataclass
class Checkpoint:
    """A checkpoint's folder and what its `checkpoint.json` says."""

    folder: Path
    step: int
    state: dict  # the fields of a run.TrainState
    model_config: dict
    tokenizer: dict
    settings: dict
    scaler: dict
    data: dict = field(default_factory=dict)  # the fingerprint of each split; earlier checkpoints have none
    base: dict = field(default_factory=dict)  # of a run with LoRA: what `trained.describe_base` returns
    in_memory: tuple | None = None  # the tensors of model and optimizer, if they come from another format

    @property
    def val_loss(self) -> float:
        """The validation loss estimated at this step; infinity if none was estimated or it is not a number."""
        losses = self.state["losses"]
        return losses["val"] if losses and not math.isnan(losses["val"]) else math.inf

    def saw(self, data: Mapping[str, str | None], settings: dict) -> bool:
        """Whether its run read this data in the same way; only then can losses be compared.

        data: {split: fingerprint}. Without fingerprints, as in earlier checkpoints, the dataset's name decides.
        """
        if known := self.data.keys() & data.keys():
            same = all(self.data[split] == data[split] for split in known)
        else:
            same = self.settings.get("dataset") == settings.get("dataset")
        return same and self.settings.get("documents", False) == settings.get("documents", False)

    def model_tensors(self) -> dict[str, Tensor]:
        """{parameter name: tensor}."""
        return self.in_memory[0] if self.in_memory else _tensors(self.folder / "model.safetensors")

    def optimizer_tensors(self, slices: Mapping[str, slice] | None = None) -> dict[str, Tensor]:
        """The tensors of `optim.state_tensors`, and the health of the run: {'exp_avg.NAME': tensor, ...}.

        slices: the rows to read of some tensors, by name; all of the others.
        """
        if not self.in_memory:
            return _tensors(self.folder / "optimizer.safetensors", slices or {})
        rows = {name: slice(None) for name in self.in_memory[1]} | dict(slices or {})
        return {name: tensor[rows[name]] if tensor.dim() else tensor for name, tensor in self.in_memory[1].items()}


class Writer:
    """Writes checkpoints in the background from a copy in memory, one at a time.

    keep, always: see `clean`. fail: called with a RunFailed if a write fails; no further one is begun.
    newest: (step, folder) of the newest checkpoint, if there is one.
    """

    def __init__(
        self,
        out_dir: Path | str,
        keep: int,
        always: bool,
        fail: Callable[[Exception], None],
        newest: tuple[int | None, Path | None] = (None, None),
    ) -> None:
        self.out_dir, self.keep, self.always, self.fail = Path(out_dir), keep, always, fail
        self.step, self.folder = newest  # the step is that of the checkpoint being written, while one is
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pool.submit(int)  # starts its thread: later, if memory is short, Python may wait for one for ever
        self.writing: Future | None = None
        self.failed = False
        self.place = files.identity(out_dir)

    def save(
        self,
        model_tensors: Mapping[str, Tensor],
        other_tensors: Mapping[str, Tensor],
        info: dict,
        whole: Callable[[Tensor], Tensor | None] = lambda tensor: tensor,
    ) -> None:
        """Copy the tensors, then write them and `info` (a dict for JSON) in the background.

        whole: called with each tensor in turn, also after a failure, since it may gather shards from other processes.
        """
        self.wait()
        self.step = self.step if self.failed else info["step"]
        model, others = self._copy("model", model_tensors, whole), self._copy("optimizer", other_tensors, whole)
        if self.failed:
            return
        self.writing = self.pool.submit(self._write, model, others, info)

    def _copy(self, group: str, tensors: Mapping[str, Tensor], whole: Callable) -> dict[str, Tensor]:
        """CPU copies, in memory that is reused by each save: new pages cost more than the copying."""
        kept = self.copies.setdefault(group, {})
        for name, part in tensors.items():
            tensor = whole(part)
            if self.failed:
                continue
            try:
                if name not in kept:
                    kept[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                kept[name].copy_(tensor.detach())
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
                self._failed(e)
        return kept

    def _write(self, model_tensors: dict[str, Tensor], other_tensors: dict[str, Tensor], info: dict) -> None:
        try:
            if self.place and self.place != files.identity(self.out_dir):
                raise OSError(errno.ESTALE, files.REMOVED)
            self.folder = write(self.out_dir, model_tensors, other_tensors, info)
            clean(self.out_dir, self.keep, self.always)
        except Exception as e:  # of any kind: the run must learn of it
            self._failed(e)

    def _failed(self, error: Exception) -> None:
        """Report an error that occurred while the checkpoint of `self.step` was being made."""
        self.failed = True
        reason, room = getattr(error, "strerror", None) or str(error) or type(error).__name__, "room on the disk"
        if out_of_memory(error):
            reason, room = "out of memory", "more memory"
        then = "there is no checkpoint before it"
        if self.folder and Path(self.folder).exists():
            then = f"the checkpoints before it are as they were; with {room}, --init_from=resume goes on"
        line = f"{self.out_dir}/checkpoints: step {self.step} could not be saved ({reason}); the run stops, and {then}"
        self.fail(RunFailed(line))

    def last(self) -> Path | None:
        """Wait until nothing is being written; returns the folder of the newest checkpoint, or None."""
        self.wait()
        return self.folder

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.writing:
            self.writing.result()
            self.writing = None


def write(out_dir: Path | str, model_tensors: dict[str, Tensor], other_tensors: dict[str, Tensor], info: dict) -> Path:
    """Write a checkpoint durably and return its folder. On OSError or SafetensorError, nothing is left behind."""
    parent = Path(out_dir) / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(".*.tmp"):
        stale.unlink() if stale.is_symlink() or stale.is_file() else shutil.rmtree(stale)
    temporary = parent / f".step-{info['step']:08d}.tmp"
    temporary.mkdir()
    try:
        save_file(model_tensors, temporary / "model.safetensors")
        save_file(other_tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "checkpoint.json", info)
        listed = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", {"format": FORMAT, "files": listed})
        for path in [*sorted(temporary.iterdir()), temporary]:
            if path.suffix == ".safetensors":
                shutil.copymode(temporary / "checkpoint.json", path)  # safetensors lets nobody else read
            flush(path)
        folder = _free_name(parent, info["step"])
        os.rename(temporary, folder)
        flush(parent)
        flush(parent.parent)  # the first time, `checkpoints` itself is new
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def clean(out_dir: Path | str, keep: int, always: bool) -> None:
    """Remove all checkpoints but the newest one, the `keep` newest, and the best on the data of the newest.

    Unless `always` is set, only improvements count among the `keep` newest.
    """
    found = []
    for folder in _folders(out_dir):
        try:
            found.append(read(folder))
        except UserError:
            continue  # damaged: not counted, and left alone
    counted = [c for c in found if always or c.state["improved"]]
    comparable = [c for c in found if c.saw(found[-1].data, found[-1].settings)]
    kept = {c.folder for c in [found[-1], *counted[-keep:], min(comparable, key=lambda c: (c.val_loss, c.step))]}
    for checkpoint in found:
        if checkpoint.folder not in kept:
            remove(checkpoint.folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint. If that is interrupted, nothing that looks complete is left."""
    stale = folder.with_name(f".{folder.name}.tmp")
    os.rename(folder, stale)
    shutil.rmtree(stale)


def newest(out_dir: Path | str, say: Callable[[str], Any] = print) -> Checkpoint | None:
    """The newest sound Checkpoint in `out_dir`, or None if there are no checkpoints.

    Damaged ones are reported by `say` and skipped. Raises UserError if all are damaged.
    """
    return _first_sound(out_dir, list(reversed(_folders(out_dir))), say)


def peek(out_dir: Path | str) -> Checkpoint | None:
    """The newest Checkpoint in `out_dir` that can be read, unverified, or None."""
    for folder in reversed(_folders(out_dir)):
        try:
            return read(folder)
        except UserError:
            continue
    return None


def best(out_dir: Path | str, say: Callable[[str], Any] = print) -> Checkpoint | None:
    """The sound Checkpoint with the lowest validation loss on the data of the newest one; otherwise like `newest`."""
    order, latest = {}, None  # newest first
    for folder in reversed(_folders(out_dir)):
        try:
            found = read(folder)
            latest = latest or found
            order[folder] = not found.saw(latest.data, latest.settings), found.val_loss
        except UserError:
            order[folder] = True, math.inf
    return _first_sound(out_dir, sorted(order, key=order.__getitem__), say)


def _first_sound(out_dir: Path | str, folders: list[Path], say: Callable[[str], Any]) -> Checkpoint | None:
    for folder in folders:
        problem = damage(folder)
        if not problem:
            return read(folder)
        say(f"{folder}: damaged ({problem}); it is left alone, and the next best is taken")
    if folders:
        raise UserError(f"{out_dir}/checkpoints: none of the {len(folders)} checkpoints is sound; nothing was touched")
    return None


def damage(folder: Path | str) -> str | None:
    """What is wrong with the checkpoint in `folder`, found by reading every byte; None if it is sound."""
    try:
        listed = _manifest(folder)["files"]
        present = {p.name for p in Path(folder).iterdir()}
        if missing := sorted(listed.keys() - present):
            return f"{missing[0]} is missing"
        for name, entry in listed.items():
            path = Path(folder) / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
        read(folder)
    except (OSError, UserError, KeyError, TypeError) as e:
        return str(e)
    return None


def read(folder: Path | str) -> Checkpoint:
    """The Checkpoint in `folder`, without its tensors. Raises UserError if it cannot be read."""
    folder = Path(folder)
    try:
        _manifest(folder)
        info = json.loads(files.read(folder / "checkpoint.json"))
        defaults = {f.name: f.default for f in fields(GPTConfig)}  # of fields that earlier checkpoints do not have
        info["model_config"] = defaults | info["model_config"]
        checkpoint = Checkpoint(folder, **info)
        _check(checkpoint)
        return checkpoint
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"checkpoint.json cannot be read ({type(e).__name__}: {e})") from None


def _check(checkpoint: Checkpoint) -> None:
    """Raise TypeError, ValueError or KeyError if a field that others rely on is missing or of another type."""
    kinds = dict(
        step=int, state=dict, model_config=dict, tokenizer=dict, settings=dict, scaler=dict, data=dict, base=dict
    )
    held = [(name, getattr(checkpoint, name), kind) for name, kind in kinds.items()]
    if not any(type(value) is not kind for _, value, kind in held):
        held += [(f.name, checkpoint.model_config[f.name], type(f.default)) for f in fields(GPTConfig)]
        held += [("improved", checkpoint.state["improved"], bool)]
    for name, value, kind in held:
        if type(value) is not kind or (type(value) is int and not 0 <= value < 2**63):
            raise TypeError(f"{name} is {value!r:.60}")
    if not isinstance(checkpoint.val_loss, float):
        raise TypeError(f"the loss is {checkpoint.val_loss!r:.60}")


def _manifest(folder: Path | str) -> dict:
    """The contents of `manifest.json`. Raises UserError if they are not as `write` writes them."""
    try:
        manifest = json.loads(files.read(Path(folder) / "manifest.json"))
        known = manifest["format"] == FORMAT
        if (
            known
            and set(manifest["files"]) == set(FILES)
            and all(set(e) == {"bytes", "sha256"} for e in manifest["files"].values())
        ):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"manifest.json cannot be read ({type(e).__name__}: {e})") from None
    raise UserError(f"manifest.json is not of format {FORMAT}, which this version reads")


def shape_of(checkpoint: Checkpoint, dropout: float = 0.0) -> GPTConfig:
    """The checkpoint's GPTConfig. Raises UserError if there can be no such model."""
    try:
        return GPTConfig(**checkpoint.model_config | {"dropout": dropout})
    except (TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{checkpoint.folder}: holds no model that this version knows ({e})") from None


def load_model(checkpoint: Checkpoint, dropout: float = 0.0) -> GPT:
    """The checkpoint's GPT with its weights, on the CPU. Raises UserError if they do not fit each other."""
    tensors = checkpoint.model_tensors()
    model_config = shape_of(checkpoint, dropout)
    memory.check_size(model_config, checkpoint.folder)
    try:
        model = GPT(model_config)
        model.load_weights(tensors)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        raise UserError(f"{checkpoint.folder}: holds no model that this version knows ({e})") from None
    return model


def check_out_dir(out_dir: Path | str) -> None:
    """Raise UserError if a run in `out_dir` would overwrite a file that no run wrote, such as a model's config.json."""
    out_dir = Path(out_dir)
    present = [n for n in RUN_FILES if n != "checkpoints" and os.path.lexists(out_dir / n)]
    config = ["config.json"] if "config.json" in present and not is_settings(out_dir / "config.json") else []
    if others := config or ([] if is_run(out_dir) else present):
        raise UserError(
            f"--out_dir={out_dir}: expected a run's folder or a new one, and its {', '.join(others)} "
            f"{'is' if len(others) == 1 else 'are'} not a run's; --out_dir={out_dir}/run keeps the two apart"
        )


def is_run(out_dir: Path | str) -> bool:
    """Whether `out_dir` is a run's folder: it holds a run's settings or a checkpoint."""
    return is_settings(Path(out_dir) / "config.json") or bool(_folders(out_dir))


def is_settings(path: Path | str) -> bool:
    """Whether this is the file that `write_settings` writes; models of Hugging Face have a config.json as well."""
    try:
        return isinstance(json.loads(files.read(path))["settings"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def set_aside(out_dir: Path | str) -> Path | None:
    """Move an earlier run in `out_dir` to a dated folder in it. Returns that folder, or None if there was no run.

    Files that no run wrote stay where they are. Call `check_out_dir` first.
    """
    out_dir = Path(out_dir)
    present = [out_dir / n for n in RUN_FILES if os.path.lexists(out_dir / n)]
    if not present or not is_run(out_dir):
        return None
    aside = out_dir / time.strftime("earlier-%Y%m%d-%H%M%S")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    aside.mkdir()
    for path in present:
        os.rename(path, aside / path.name)
    return aside


def keep(folder: Path, out_dir: Path | str) -> Path:
    """Copy the checkpoint in `folder`, by hard links if possible, to a new hidden folder in `out_dir`, and return that."""
    copy = Path(out_dir) / ".base.tmp"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        try:
            os.link(path, copy / path.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, copy / path.name)
    return copy


def write_settings(out_dir: Path | str, settings: dict, sources: dict[str, str], **more: Any) -> None:
    """Write the resolved settings, their sources, and `more` to `out_dir/config.json`."""
    write_json(Path(out_dir) / "config.json", {"settings": settings, "sources": sources} | more)


def launch_of(out_dir: Path | str) -> str | None:
    """The launch that started the run in `out_dir`, as `launch.launch_id` names it, or None."""
    try:
        return json.loads(files.read(Path(out_dir) / "config.json"))["launch"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _folders(out_dir: Path | str) -> list[Path]:
    """The checkpoints in `out_dir`, oldest first. A folder gets such a name only when it is complete."""
    found = [(NAME.fullmatch(p.name), p) for p in (Path(out_dir) / "checkpoints").glob("step-*")]
    return [p for _, p in sorted(((int(m[1]), int(m[2] or 1)), p) for m, p in found if m)]


def _free_name(parent: Path, step: int) -> Path:
    """step-00000250, or step-00000250-2 if that exists, since a folder cannot be replaced atomically."""
    taken = [int(m[2] or 1) for p in parent.glob("step-*") if (m := NAME.fullmatch(p.name)) and int(m[1]) == step]
    return parent / (f"step-{step:08d}" + (f"-{max(taken) + 1}" if taken else ""))


def _tensors(path: Path | str, slices: Mapping[str, slice] | None = None) -> dict[str, Tensor]:
    try:
        if not slices:
            return load_file(path)
        with safe_open(path, "pt") as f:
            return {n: f.get_slice(n)[slices[n]] if n in slices else f.get_tensor(n) for n in f.keys()}
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def _sha256(path: Path | str) -> str:
    digest = hashlib.sha256()
    with open(files.open_regular(path), "rb") as f:
        while chunk := f.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
