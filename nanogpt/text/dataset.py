"""Dataset folders: `meta.json` and token files are written and opened here; data.py reads tokens and draws batches.

Nothing here imports PyTorch until a dataset is opened, since `nanogpt prepare` does not need it.
"""

import glob
import json
import os
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from nanogpt import files
from nanogpt.config import UserError, is_published, nearest
from nanogpt.text import hub, hugging_face_tokenizer, tokenizer
from nanogpt.text.tokenizer import id_dtype

if TYPE_CHECKING:
    from nanogpt.data import Dataset

DTYPES = ("uint16", "uint32")
GPT2_META = '{"tokenizer": {"type": "gpt2"}, "vocab_size": 50257, "dtype": "uint16"}'  # the smallest valid meta.json


# -- writing


def write_dataset(folder: str | Path, tok: tokenizer.Tokenizer, train_ids: ArrayLike, val_ids: ArrayLike) -> None:
    """Write `train.bin`, `val.bin` and `meta.json` into `folder`: either all of them or none.

    Raises ValueError if an id is outside the vocabulary and OSError if the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for split, split_ids in (("train", train_ids), ("val", val_ids)):
        ids = np.asarray(split_ids)
        if ids.size and (ids.min() < 0 or ids.max() >= tok.vocab_size):
            raise ValueError(f"{split}: a token id is outside the vocabulary of {tok.vocab_size}")
        contents[f"{split}.bin"] = ids.astype(id_dtype(tok.vocab_size)).tobytes()
    contents["meta.json"] = meta_json(tok.to_json(), tok.vocab_size)
    temporary = {name: files.temporary(folder / name) for name in contents}
    try:
        for name, path in temporary.items():
            with files.create(path) as f:
                f.write(contents[name])
                files.sync(f)
        (folder / "meta.json").unlink(missing_ok=True)  # first removed, and last renamed
        for name, path in temporary.items():
            os.replace(path, folder / name)
        files.flush(folder)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def meta_json(tokenizer_json: dict, vocab_size: int, **optional: Any) -> bytes:
    """The bytes of `meta.json`. `optional` may hold `separator` and `files`."""
    meta = {"tokenizer": tokenizer_json, "vocab_size": vocab_size, "dtype": id_dtype(vocab_size), **optional}
    return (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode()


# -- opening


def open_dataset(
    name: str, split: str, block_size: int, root: str | Path = "data", documents: bool = False
) -> "Dataset":
    """Open one split of the dataset `root`/`name`; with `documents`, windows begin at documents.

    Raises UserError if the folder, a file or an id is invalid.
    """
    from nanogpt import data

    folder = Path(root) / name
    meta = read_meta(folder)
    paths = [folder / file for file in meta.get("files", {}).get(split, [f"{split}.bin"])]
    for path in paths:
        if not is_file(path):
            raise UserError(f"--dataset={name}: {path} is missing{how_to_prepare(folder)}")
    label = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    tokens, separator = data.Tokens(paths, meta["dtype"]), meta.get("separator")
    n = len(tokens)
    if n <= block_size:
        raise UserError(
            f"{label}: {n} tokens are too few for a block_size of {block_size}; the largest that fits is {max(n - 1, 0)}"
        )
    if documents and separator is None:
        raise UserError(
            f"--documents=True: {folder / 'meta.json'} has no separator, so document boundaries are unknown; "
            "use --documents=False"
        )
    dataset = data.Dataset(tokens, meta["vocab_size"], separator, label, meta["tokenizer"])
    dataset.scan()
    if documents and separator is not None:
        dataset.documents = data.Documents(data.find_documents(tokens, separator), block_size, shared=True)
    return dataset


def read_meta(folder: Path) -> dict:
    """The validated contents of a dataset's `meta.json`, or of nanoGPT's `meta.pkl`. Raises UserError."""
    path, pickled = folder / "meta.json", folder / "meta.pkl"
    if not is_file(path) and is_file(pickled):  # prepared by the original nanoGPT
        from nanogpt.formats import legacy  # imports PyTorch

        chars = legacy.read_meta(pickled)
        return {"tokenizer": {"type": "char", "chars": chars}, "vocab_size": len(chars), "dtype": "uint16"}
    if not is_file(path):
        what = "has no meta.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        hint = how_to_prepare(folder)
        if os.path.lexists(folder / "train.bin"):
            hint += f"; for GPT-2 tokens prepared by the original nanoGPT, write {GPT2_META}"
        raise UserError(f"--dataset={folder.name}: {folder}/ {what}{hint}")
    try:
        meta = json.loads(files.read(path))
        vocab_size, separator = meta["vocab_size"], meta.get("separator", 0)
        valid = (
            type(vocab_size) is int
            and 0 < vocab_size < 2**31
            and meta["dtype"] in DTYPES
            and isinstance(meta["tokenizer"], dict)
            and all(is_list_of_files(names) for names in meta.get("files", {}).values())
            and type(separator) is int
            and 0 <= separator < vocab_size
        )
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(
            f"{path}: does not describe a dataset{how_to_prepare(folder)}; for GPT-2 tokens, write {GPT2_META}"
        )
    return meta


def is_file(path: Path) -> bool:
    """Whether a regular file exists at `path`. Raises UserError if it is something else or cannot be examined."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if not regular:
        raise UserError(f"{path}: is not a regular file")
    return True


def is_list_of_files(names: object) -> bool:
    """Whether these are names of files inside the dataset's folder, with no path that leads out of it."""
    return (
        isinstance(names, list)
        and len(names) > 0
        and all(name == Path(name).name and not set(name) & set("\\\0") and name not in ("", "..") for name in names)
    )


def how_to_prepare(folder: Path) -> str:
    """The end of a message: the command that prepares the dataset, the nearest name, or the prepared datasets."""
    recipe = f"{folder / 'prepare.py'}"
    if os.path.isfile(recipe):
        return f"; python {shlex.quote(recipe)} prepares it"
    recipes, present = (
        sorted({os.path.dirname(path) for path in glob.glob(f"*/{name}", root_dir=folder.parent)} - {folder.name})
        for name in ("prepare.py", "meta.json")
    )
    return nearest(folder.name, recipes + present) or (f"; prepared datasets: {', '.join(present)}" if present else "")


# -- tokenizers in the folders of models and datasets


def tokenizer_of(folder: str | Path) -> dict:
    """The tokenizer, as JSON, of the run, published model or dataset in `folder`. Raises UserError if it has none."""
    folder = hub.download(str(folder), weights=False) if is_published(str(folder)) else Path(folder)
    described = [*sorted(folder.glob("checkpoints/step-*/checkpoint.json"), reverse=True), folder / "meta.json"]
    for path in filter(Path.is_file, described):
        try:
            return tokenizer.from_json(json.loads(path.read_text(encoding="utf-8"))["tokenizer"]).to_json()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{path}: cannot read its tokenizer ({e})") from None
    if (folder / "meta.pkl").is_file():
        return read_meta(folder)["tokenizer"]
    if (folder / "ckpt.pt").is_file():
        raise UserError(f"{folder}: the original nanoGPT keeps the tokenizer with the data; name the dataset's folder")
    return hugging_face_tokenizer.read(folder)


def require_same_tokenizer(dataset: str, of_dataset: dict, of_model: dict, model: str | Path) -> None:
    """Raise UserError unless a dataset and the model named or stored at `model` have the same tokenizer, as JSON."""
    try:
        if tokenizer.same(of_dataset, of_model):
            return
    except (ImportError, OSError) as e:
        raise UserError(f"--dataset={dataset}: cannot compare its tokenizer with the model's: {e}") from None
    kind = of_model["type"] if of_model["type"] in ("byte", "gpt2") else shlex.quote(str(model))
    raise UserError(
        f"--dataset={dataset}: its tokenizer is not the one of the model in {model}; "
        f"nanogpt prepare SOURCE --dataset=NAME --tokenizer={kind} prepares a matching dataset"
    )
