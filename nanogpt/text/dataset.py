"""A dataset's folder: `train.bin`, `val.bin` and `meta.json`, written whole or not at all, and opened.

docs/data.md describes the files; the tokens themselves and the batches drawn from them are in nanogpt/data.py.
"""

import glob
import json
import os
import shlex
import stat
from pathlib import Path

import numpy as np

from nanogpt import files
from nanogpt.config import UserError, nearest
from nanogpt.data import DTYPES, Dataset, Documents, Tokens, find_documents
from nanogpt.formats import legacy

GPT2_META = '{"tokenizer": {"type": "gpt2"}, "vocab_size": 50257, "dtype": "uint16"}'  # the least that it can say


def open_dataset(name, split, block_size, root="data", documents=False):
    """The `data.Dataset` of one split of the dataset `name` in the folder `root`.

    documents: windows begin where documents begin. Raises UserError if the folder, a file or an id is not what it should
    be; of a large split, samples are checked.
    """
    folder = Path(root) / name
    meta = read_meta(folder)
    paths = [folder / file for file in meta.get("files", {}).get(split, [f"{split}.bin"])]
    for path in paths:
        if not is_there(path):
            raise UserError(f"--dataset={name}: {path} is missing{how_to_prepare(folder)}")
    where = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    tokens = Tokens(paths, meta["dtype"])
    dataset = Dataset(tokens, meta["vocab_size"], meta.get("separator"), where, meta["tokenizer"])
    n = len(tokens)
    if n <= block_size:
        raise UserError(
            f"{where}: {n} tokens are too few for a block_size of {block_size}; at most {max(n - 1, 0)} would do"
        )
    if documents and dataset.separator is None:
        raise UserError(
            f"--documents=True: {folder / 'meta.json'} names no separator, so where a document begins is unknown; "
            "--documents=False trains on it"
        )
    dataset.scan()
    if documents:
        dataset.documents = Documents(find_documents(tokens, dataset.separator), block_size, shared=True)
    return dataset


def write_dataset(folder, tokenizer, train_ids, val_ids):
    """Write `train.bin`, `val.bin` and `meta.json` into `folder`: all whole, or none changed.

    The ids are written as uint16 where the vocabulary fits, as uint32 where not. Raises ValueError on an id
    outside the vocabulary and OSError where the disk refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    contents = {}
    for split, ids in (("train", train_ids), ("val", val_ids)):
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
            raise ValueError(f"{split}: a token id lies outside the vocabulary of {tokenizer.vocab_size}")
        contents[f"{split}.bin"] = ids.astype(dtype).tobytes()
    contents["meta.json"] = meta_json(tokenizer, dtype)
    write_files(folder, contents)


def meta_json(tokenizer, dtype):
    """The bytes of `meta.json`."""
    meta = {"tokenizer": tokenizer.to_json(), "vocab_size": tokenizer.vocab_size, "dtype": dtype}
    return (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode()


def write_files(folder, contents):
    """Write {name: bytes} under temporary names, flush them to disk, and only then rename them all.

    An old meta.json goes first and the new one comes last, so that a dataset is whole or absent at every moment.
    """
    temporary = {name: files.temporary(folder / name) for name in sorted(contents, key="meta.json".__eq__)}
    try:
        for name, path in temporary.items():
            with files.create(path) as f:
                f.write(contents[name])
                files.sync(f)
        if "meta.json" in contents:
            (folder / "meta.json").unlink(missing_ok=True)
        for name, path in temporary.items():
            os.replace(path, folder / name)
        files.flush(folder)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def read_meta(folder):
    """The checked contents of a dataset's `meta.json`; UserError says what is missing and what makes it."""
    path, pickled = folder / "meta.json", folder / "meta.pkl"
    if not is_there(path) and is_there(pickled):  # prepared by the original nanoGPT
        chars = legacy.read_meta(pickled)
        return {"tokenizer": {"type": "char", "chars": chars}, "vocab_size": len(chars), "dtype": "uint16"}
    if not is_there(path):
        what = "has no meta.json" if folder.is_dir() else "is no folder" if folder.exists() else "is not there"
        hint = how_to_prepare(folder)
        if os.path.lexists(folder / "train.bin"):
            hint += f"; for GPT-2's tokens, as the original nanoGPT prepares them, it would be {GPT2_META}"
        raise UserError(f"--dataset={folder.name}: {folder}/ {what}{hint}")
    try:
        meta = json.loads(files.read(path))
        vocab_size, dtype = meta["vocab_size"], meta["dtype"]
        sound = (
            type(vocab_size) is int
            and 0 < vocab_size < 2**31
            and dtype in DTYPES
            and isinstance(meta["tokenizer"], dict)
            and all(is_list_of_files(names) for names in meta.get("files", {}).values())
            and ("separator" not in meta or is_id(meta["separator"], vocab_size))
        )
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(
            f"{path}: does not describe a dataset{how_to_prepare(folder)}; for GPT-2's tokens it would be {GPT2_META}"
        )
    return meta


def is_there(path):
    """Whether there is such a file. UserError where there is something else, or the system does not say."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if not regular:
        raise UserError(f"{path}: is no regular file")
    return True


def is_list_of_files(names):
    """Whether these are names of files in the dataset's own folder, and no way out of it."""
    sound = type(names) is list and len(names) > 0
    return sound and all(
        name == Path(name).name and not set(name) & set("\\\0") and name not in ("", "..") for name in names
    )


def is_id(value, vocab_size):
    """Whether this is a token id."""
    return type(value) is int and 0 <= value < vocab_size


def how_to_prepare(folder):
    """'; COMMAND makes it', or what is prepared already, for the end of a message."""
    recipe = f"{folder / 'prepare.py'}"
    if os.path.isfile(recipe):
        return f"; python {shlex.quote(recipe)} makes it"
    recipes, present = (
        sorted({os.path.dirname(path) for path in glob.glob(f"*/{name}", root_dir=folder.parent)} - {folder.name})
        for name in ("prepare.py", "meta.json")
    )
    return nearest(folder.name, recipes + present) or (f"; prepared here: {', '.join(present)}" if present else "")
