"""Token files and the batches drawn from them.

A dataset is a folder with `train.bin` and `val.bin`, streams of token ids, and `meta.json`, which says how
wide an id is and which tokenizer wrote it. The batch of a step is a pure function of (seed, step): there is no
loader state, so a resumed run or another number of processes reads the same tokens in the same order.
Shapes: B sequences of T tokens.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

from nanogpt import legacy
from nanogpt.config import UserError, nearest

DTYPES = ("uint16", "uint32")
SCAN_LIMIT = 100_000_000  # tokens; a larger file's ids are checked batch by batch alone


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
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in sorted(contents, key="meta.json".__eq__)}
    try:
        for name, path in temporary.items():
            with open(path, "wb") as f:
                f.write(contents[name])
                f.flush()
                os.fsync(f.fileno())
        if "meta.json" in contents:
            (folder / "meta.json").unlink(missing_ok=True)
        for name, path in temporary.items():
            os.replace(path, folder / name)
        if hasattr(os, "O_DIRECTORY"):  # where a folder can be flushed at all
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


class Dataset:
    """One split of a dataset, memory-mapped.

    Attributes: `tokens` (a read-only array of ids), `vocab_size`, `tokenizer_json`, `path`.
    Raises UserError where the folder, a file or an id is not what it should be.
    """

    def __init__(self, name, split, block_size, root="data"):
        folder = Path(root) / name
        self.path = folder / f"{split}.bin"
        meta = read_meta(folder)
        self.vocab_size, self.tokenizer_json = meta["vocab_size"], meta["tokenizer"]
        if not self.path.is_file():
            raise UserError(f"--dataset={name}: {self.path} is missing{how_to_prepare(folder)}")
        size, width = self.path.stat().st_size, np.dtype(meta["dtype"]).itemsize
        n = size // width
        if size % width:
            raise UserError(f"{self.path}: {size} bytes are no whole number of {meta['dtype']} ids; prepare it again")
        if n <= block_size:
            raise UserError(
                f"{self.path}: {n} tokens are too few for a block_size of {block_size}; at most {max(n - 1, 0)} would do"
            )
        self.tokens = np.memmap(self.path, dtype=meta["dtype"], mode="r")
        for start in range(0, min(n, SCAN_LIMIT), 2**22):
            self.check(self.tokens[start : start + 2**22])

    def check(self, ids):
        """Raise UserError where an id lies outside the vocabulary; an embedding would read past its end."""
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.path}: token id {ids.max()} lies outside the vocabulary of {self.vocab_size}; prepare it again"
            )

    def windows(self, offsets, block_size):
        """Inputs and targets (B, T), int64: the T tokens from each offset on, and those one later."""
        ids = self.tokens[np.asarray(offsets)[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
        self.check(ids)
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def read_meta(folder):
    """The checked contents of a dataset's `meta.json`; UserError says what is missing and what makes it."""
    path = folder / "meta.json"
    if not path.is_file() and (folder / "meta.pkl").is_file():  # prepared by the original nanoGPT
        chars = legacy.read_meta(folder / "meta.pkl")
        return {"tokenizer": {"type": "char", "chars": chars}, "vocab_size": len(chars), "dtype": "uint16"}
    if not path.is_file():
        what = "is not there" if not folder.is_dir() else "has no meta.json"
        raise UserError(f"--dataset={folder.name}: {folder}/ {what}{how_to_prepare(folder)}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        vocab_size, dtype = meta["vocab_size"], meta["dtype"]
        sound = (
            type(vocab_size) is int
            and 0 < vocab_size < 2**31
            and dtype in DTYPES
            and isinstance(meta["tokenizer"], dict)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path}: does not describe a dataset{how_to_prepare(folder)}")
    return meta


def how_to_prepare(folder):
    """'; COMMAND makes it', or what is prepared already, for the end of a message."""
    if (folder / "prepare.py").is_file():
        return f"; python {folder}/prepare.py makes it"
    present = sorted(p.parent.name for p in folder.parent.glob("*/meta.json"))
    recipes = sorted(p.parent.name for p in folder.parent.glob("*/prepare.py"))
    return nearest(folder.name, recipes + present) or (f"; prepared here: {', '.join(present)}" if present else "")


MIX = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
SHIFTS = np.array([30, 27, 31], dtype=np.uint64)


def hash64(seed, stream, counters):
    """Random uint64s, one for each counter: SplitMix64's output function (Steele et al. 2014, figure 20).

    A pure function, the same on every machine and with every version of every library.
    """
    z = np.atleast_1d(np.asarray(counters, dtype=np.uint64)) * MIX[0]  # arrays wrap around, as they should here
    for key in (seed, stream):
        z = splitmix(z ^ splitmix(np.array([key], dtype=np.uint64) + MIX[0]))
    return z.reshape(np.shape(counters))


def splitmix(z):
    """SplitMix64's mixing of an array of uint64."""
    z = (z ^ (z >> SHIFTS[0])) * MIX[1]
    z = (z ^ (z >> SHIFTS[1])) * MIX[2]
    return z ^ (z >> SHIFTS[2])


STREAMS = {"train": 0, "eval train": 1, "eval val": 2, "dropout": 3}  # draws that have nothing to do with each other


def step_seed(seed, step, rank):
    """The seed of dropout in one step on one process: a pure function of its arguments, like the batches."""
    return int(hash64(seed, STREAMS["dropout"], step * 2**16 + rank) >> np.uint64(1))


class Batches:
    """The windows of a dataset, in a random order: each epoch has every one once, and begins at another offset.

    `stream` names the sequence. Window number w of it begins at the same token whatever the batch size, the step
    it falls into, or the process that reads it.
    """

    def __init__(self, dataset, stream, seed, block_size, dist):
        self.dataset, self.stream, self.seed, self.block_size, self.dist = (
            dataset,
            STREAMS[stream],
            seed,
            block_size,
            dist,
        )
        n = len(dataset.tokens)
        self.epoch_windows = max(1, (n - block_size) // block_size)  # in an epoch, whatever its offset
        self.offsets = min(block_size, n - self.epoch_windows * block_size)  # that an epoch can begin at

    def get(self, first, size):
        """Windows number `first` to `first + size - 1`, on the device: inputs and targets (B=size, T)."""
        x, y = self.dataset.windows(self.starts(np.arange(first, first + size)), self.block_size)
        return self.dist.to_device(x), self.dist.to_device(y)

    def starts(self, numbers):
        """The token at which each window begins, for an array of window numbers."""
        epochs, numbers = np.divmod(numbers, self.epoch_windows)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            key = hash64(self.seed, self.stream, epoch)
            mine = epochs == epoch
            offset = int(key) % self.offsets
            starts[mine] = permutation(numbers[mine], self.epoch_windows, key) * self.block_size + offset
        return starts


def permutation(i, n, key):
    """Where each of the indices i < n goes in a random permutation of n, without memory for the others.

    A Feistel network of four rounds (Luby & Rackoff 1988) permutes the next power of four; what lands beyond n
    goes through it again until it lands below (Black & Rogaway 2002, cycle walking).
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = hash64(0, 0, np.arange(4, dtype=np.uint64) ^ key)
    i = i.astype(np.uint64)
    todo = np.ones(i.shape, dtype=bool)
    while todo.any():
        left, right = i[todo] >> half, i[todo] & mask
        for k in keys:
            left, right = right, left ^ (splitmix(right ^ k) & mask)
        i[todo] = (left << half) | right
        todo = i >= np.uint64(n)
    return i.astype(np.int64)
