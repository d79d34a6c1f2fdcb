"""Shuffles documents of token ids on disk and splits them into the files of `train` and `val`.

While a corpus is read, each document goes to the bucket that its key selects: a hash of its text and of the seed.
Afterwards the buckets are read in turn, each sorted by key, which is a random order of all documents at any size.
Equal documents have equal keys, so they are adjacent: they can be dropped, and are never in both splits.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanogpt import files
from nanogpt.text.workers import FRAGMENT

MAX_BITS = 6  # 64 buckets, of two open files each
FEW = 10  # fewer documents are not enough to train on, if more are validated on
GATHER = 2**20  # ids that are sorted at a time


class Buckets:
    """2**bits pairs of files in `folder`: the ids of documents, and their FRAGMENTs."""

    def __init__(self, folder: Path, bits: int, dtype: str, sizes: list[int] | None = None) -> None:
        """Create the files, or reopen them, truncated to the `sizes` that were saved.

        Raises ValueError or OSError if they are shorter than that.
        """
        self.folder, self.bits, self.dtype = folder, bits, np.dtype(dtype)
        self.unique = False  # whether duplicates are left out when buckets are read
        paths = [self.path(i // 2, ("ids", "index")[i % 2]) for i in range(2 << bits)]
        if sizes and any(os.path.getsize(path) < size for path, size in zip(paths, sizes, strict=True)):
            raise ValueError("the buckets are not complete")
        self.files: list[BinaryIO] = [
            open(path, "r+b", buffering=2**17) if sizes else files.create(path, "x+b", buffering=2**17)
            for path in paths
        ]
        for f, size in zip(self.files, sizes or [0] * len(paths), strict=True):
            f.truncate(size)
            f.seek(size)

    def path(self, bucket: int, kind: str) -> Path:
        return self.folder / f"bucket-{bucket:02}.{kind}"

    def add(self, ids: np.ndarray, fragments: np.ndarray) -> None:
        """Append the ids of fragments, whose keys are known, to their buckets."""
        if not self.bits:
            return self.append(0, ids, fragments)
        bucket = (fragments["key"] >> np.uint64(64 - self.bits)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        lengths = fragments["tokens"].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        for group in np.split(order, np.flatnonzero(np.diff(bucket[order])) + 1):
            if len(group):
                self.append(bucket[group[0]], gather(ids, starts[group], lengths[group]), fragments[group])

    def append(self, bucket: int, ids: np.ndarray, fragments: np.ndarray) -> None:
        self.files[2 * bucket].write(ids.data)
        self.files[2 * bucket + 1].write(fragments.data)

    def sizes(self) -> list[int]:
        """Flush everything to disk and return the sizes of the files."""
        for f in self.files:
            files.sync(f)
        return [f.tell() for f in self.files]

    def close(self) -> None:
        for f in self.files:
            f.close()

    def __iter__(self) -> "Iterator[Bucket]":
        """Yield each bucket that is not empty."""
        for i in range(1 << self.bits):
            fragments = np.fromfile(self.path(i, "index"), FRAGMENT)
            if len(fragments):
                bucket = Bucket(self.path(i, "ids"), fragments, self.dtype)
                if self.unique:
                    bucket.drop_duplicates()
                yield bucket


class Bucket:
    """The fragments of a bucket in the order of their keys; fragments with the same key are a group."""

    def __init__(self, path: Path, fragments: np.ndarray, dtype: np.dtype) -> None:
        self.path, self.dtype, self.dropped = path, dtype, 0
        lengths = fragments["tokens"].astype(np.int64)
        order = np.argsort(fragments["key"], kind="stable")  # so the fragments of a document stay in order
        self.starts, self.lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
        self.fragments = fragments[order]
        self.groups = np.concatenate([[0], np.flatnonzero(np.diff(self.fragments["key"])) + 1])  # where they begin

    def drop_duplicates(self) -> None:
        """Drop all but the first of equal documents. They are compared by the digests of all their fragments."""
        kept = np.ones(len(self.fragments), dtype=bool)
        ends = np.append(self.groups[1:], len(self.fragments))
        first = self.fragments["first"] != 0
        several = self.documents() > 1
        for begin, end in zip(self.groups[several], ends[several], strict=True):
            seen = set()
            for document in np.split(np.arange(begin, end), np.flatnonzero(first[begin:end])[1:]):
                content = tuple(self.fragments["digest"][document].tolist())
                if content in seen:
                    kept[document] = False
                    self.dropped += 1
                seen.add(content)
        self.starts, self.lengths, self.fragments = self.starts[kept], self.lengths[kept], self.fragments[kept]
        self.groups = (np.cumsum(kept) - 1)[self.groups]  # the first document of a group is kept

    def sizes(self) -> np.ndarray:
        """The number of ids in each group."""
        return np.add.reduceat(self.lengths, self.groups)

    def documents(self) -> np.ndarray:
        """The number of documents in each group."""
        return np.add.reduceat(self.fragments["first"] != 0, self.groups, dtype=np.int64)

    def members(self, chosen: np.ndarray) -> np.ndarray:
        """The indices of the fragments in the groups that a mask chooses."""
        return np.flatnonzero(np.repeat(chosen, np.diff(np.append(self.groups, len(self.fragments)))))

    def read(self, which: np.ndarray, limit: int) -> Iterator[np.ndarray]:
        """Yield the ids of these fragments, in order. A file of at most `limit` bytes is read whole."""
        if os.path.getsize(self.path) <= limit:
            ids = np.fromfile(self.path, self.dtype)
            lengths = self.lengths[which]
            chunk = (np.cumsum(lengths) - lengths) // GATHER
            for part in np.split(which, np.flatnonzero(np.diff(chunk)) + 1):
                yield gather(ids, self.starts[part], self.lengths[part])
            return
        with open(self.path, "rb", buffering=0) as f:
            for i in which:
                f.seek(self.starts[i] * self.dtype.itemsize)
                yield np.fromfile(f, self.dtype, self.lengths[i])


def gather(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `ids[start : start + length]` for each pair."""
    if len(starts) == 1:
        return ids[starts[0] : starts[0] + lengths[0]]
    ends = np.cumsum(lengths)
    return ids[np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)]


class Sink:
    """Writes the files of one split: `train.bin`, and when it is full, `train-00001.bin` and so on."""

    def __init__(self, folder: Path, split: str, dtype: str | np.dtype, shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard = folder, split, np.dtype(dtype), shard_tokens
        self.names: list[str] = []
        self.file: BinaryIO | None = None
        self.room = self.tokens = self.documents = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids, to as many files as they need."""
        self.tokens += len(ids)
        while len(ids):
            if not self.file or not self.room:
                self.close()
                self.names.append(f"{self.split}-{len(self.names):05}.bin" if self.names else f"{self.split}.bin")
                self.file, self.room = files.create(self.folder / self.names[-1]), self.shard
            part, ids = ids[: self.room], ids[self.room :]
            self.file.write(np.ascontiguousarray(part, self.dtype).data)
            self.room -= len(part)

    def close(self) -> None:
        """Flush the last file to disk and close it."""
        if self.file:
            files.sync(self.file)
            self.file.close()
            self.file = None


Masks = list[np.ndarray]  # for each bucket that was looked at, which of its groups are validated on


def choose(buckets: Buckets, target: Callable[[int], int]) -> tuple[Masks | None, int, int]:
    """Choose documents for validation, in random order, each that fits, until they have `target(ids in all)` ids.

    Returns (masks, ids in all, duplicates dropped). The masks are None if the target is missed by far, or if fewer than
    FEW documents, all of them larger, would be left to train on.
    """
    total = documents = dropped = 0
    for bucket in buckets:
        dropped += bucket.dropped
        total += int(bucket.sizes().sum())
        documents += int(bucket.documents().sum())
    wanted, val, taken = target(total), 0, 0
    masks: Masks = []
    for bucket in buckets:
        if val >= wanted:
            break
        masks.append(np.zeros(len(bucket.groups), dtype=bool))
        for i, (size, count) in enumerate(zip(bucket.sizes().tolist(), bucket.documents().tolist(), strict=True)):
            if val < wanted and val + size <= 1.25 * wanted:
                masks[-1][i] = True
                val, taken = val + size, taken + count
    fair = val >= 0.75 * wanted and documents > 1 and documents - taken >= min(taken, FEW)
    return (masks if fair else None), total, dropped


def write_documents(buckets: Buckets, masks: Masks, train: Sink, val: Sink, limit: int) -> Iterator[int]:
    """Write whole documents in random order: those of `masks` to `val`, the others to `train`.

    Yields the number of ids of each write. `limit`: see `Bucket.read`.
    """
    for number, bucket in enumerate(buckets):
        chosen = masks[number] if number < len(masks) else np.zeros(len(bucket.groups), dtype=bool)
        for sink, mask in ((val, chosen), (train, ~chosen)):
            which = bucket.members(mask)
            sink.documents += int((bucket.fragments["first"][which] != 0).sum())
            for ids in bucket.read(which, limit):
                sink.write(ids)
                yield len(ids)


def write_ends(buckets: Buckets, fraction: float, separator: int | None, train: Sink, val: Sink) -> Iterator[int]:
    """Write the last `fraction` of each document, after a separator, to `val`, the rest to `train`, in random order.

    Yields the number of ids of each write.
    """
    for bucket in buckets:
        first = np.flatnonzero(bucket.fragments["first"])
        for document in np.split(np.arange(len(bucket.fragments)), first[1:]):
            n = int(bucket.lengths[document].sum())
            left = int(n * (1 - fraction))
            if left < n and separator is not None:
                val.write(np.array([separator], bucket.dtype))
            train.documents, val.documents = train.documents + 1, val.documents + (left < n)
            for ids in bucket.read(document, limit=0):
                train.write(ids[:left])
                val.write(ids[left:])
                left = max(left - len(ids), 0)
                yield len(ids)
