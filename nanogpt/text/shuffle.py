"""Token ids on their way to `train.bin` and `val.bin`: in buckets, from which documents are drawn in random order.

While a corpus is read, each document goes to the bucket that its key names: a hash of its text and of the seed.
Afterwards the buckets are gone through in turn, each sorted by key, which is a random order of all documents that
no memory limits. Documents that are equal have equal keys, so they lie together: they can be dropped, and those
that are not never come to lie in both splits.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import files
from nanogpt.text.workers import FRAGMENT

MAX_BITS = 6  # 64 buckets, of two open files each
FEW = 10  # documents are too few to train on where more are validated on
GATHER = 2**20  # ids that are put in order at a time


class Buckets:
    """2**bits pairs of files in `folder`: the ids of documents, and their FRAGMENTs."""

    def __init__(self, folder: str | Path, bits: int, dtype: str, sizes: list[int] | None = None) -> None:
        """Open them, new, or cut to the `sizes` that were noted. ValueError or OSError where they have lost something."""
        self.folder, self.bits, self.dtype = Path(folder), bits, np.dtype(dtype)
        paths = [self.path(i // 2, ("ids", "index")[i % 2]) for i in range(2 << bits)]
        if sizes and any(os.path.getsize(path) < size for path, size in zip(paths, sizes, strict=True)):
            raise ValueError("the buckets have lost something")
        self.files = [
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
        """Flush everything to disk and return how large the files are."""
        for f in self.files:
            files.sync(f)
        return [f.tell() for f in self.files]

    def close(self) -> None:
        for f in self.files:
            f.close()

    def __iter__(self) -> "Iterator[Bucket]":
        """Yield each bucket as a Bucket."""
        for i in range(1 << self.bits):
            yield Bucket(self.path(i, "ids"), np.fromfile(self.path(i, "index"), FRAGMENT), self.dtype)


class Bucket:
    """The fragments of a bucket in the order of their keys, as groups of those that have the same key."""

    def __init__(self, path: Path, fragments: np.ndarray, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        lengths = fragments["tokens"].astype(np.int64)
        order = np.argsort(fragments["key"], kind="stable")  # so the fragments of a document stay in order
        self.starts, self.lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
        self.fragments = fragments[order]
        keys = self.fragments["key"]
        self.groups = np.concatenate([[0], np.flatnonzero(np.diff(keys)) + 1]) if len(keys) else np.zeros(0, np.int64)

    def drop_duplicates(self) -> int:
        """Leave out all but the first of documents that are equal, fragment by fragment. Returns how many went."""
        kept, dropped = np.ones(len(self.fragments), dtype=bool), 0
        ends = np.append(self.groups[1:], len(self.fragments))
        first = self.fragments["first"] != 0
        begun = np.add.reduceat(first, self.groups, dtype=np.int64) if len(self.groups) else self.groups
        for begin, end in zip(self.groups[begun > 1], ends[begun > 1], strict=True):
            documents = np.split(np.arange(begin, end), np.flatnonzero(first[begin:end])[1:])
            seen = set()
            for document in documents:
                content = tuple(self.fragments["digest"][document].tolist())
                if content in seen:
                    kept[document] = False
                    dropped += 1
                seen.add(content)
        self.starts, self.lengths, self.fragments = self.starts[kept], self.lengths[kept], self.fragments[kept]
        self.groups = (np.cumsum(kept) - 1)[self.groups]  # a group keeps its first
        return dropped

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, documents) in each group."""
        if not len(self.groups):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        first = self.fragments["first"] != 0
        return np.add.reduceat(self.lengths, self.groups), np.add.reduceat(first, self.groups, dtype=np.int64)

    def members(self, chosen: np.ndarray) -> np.ndarray:
        """The numbers of the fragments in the groups that a mask chooses."""
        sizes = np.diff(np.append(self.groups, len(self.fragments)))
        return np.flatnonzero(np.repeat(chosen, sizes))

    def read(self, which: np.ndarray, limit: int) -> Iterator[np.ndarray]:
        """Yield the ids of these fragments, in order. The file is read whole where it has at most `limit` bytes."""
        if os.path.getsize(self.path) <= limit:
            ids = np.fromfile(self.path, self.dtype)
            for part in at_most(which, self.lengths[which], GATHER):
                yield gather(ids, self.starts[part], self.lengths[part])
            return
        with open(self.path, "rb", buffering=0) as f:
            for i in which:
                f.seek(self.starts[i] * self.dtype.itemsize)
                yield np.fromfile(f, self.dtype, self.lengths[i])


def gather(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`ids[start : start + length]` for each pair, one after the other."""
    if len(starts) == 1:
        return ids[starts[0] : starts[0] + lengths[0]]
    ends = np.cumsum(lengths)
    return ids[np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)]


def at_most(which: np.ndarray, lengths: np.ndarray, limit: int) -> list[np.ndarray]:
    """Yield `which` in parts of at most `limit` ids, or of one fragment."""
    part = (np.cumsum(lengths) - lengths) // limit
    return np.split(which, np.flatnonzero(np.diff(part)) + 1) if len(which) else []


class Sink:
    """Writes the files of one split: `train.bin`, and where it is full, `train-00001.bin` and so on."""

    def __init__(self, folder: str | Path, split: str, dtype: str | np.dtype, shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard = Path(folder), split, np.dtype(dtype), shard_tokens
        self.names: list[str] = []
        self.file: Any = None
        self.room = self.tokens = self.documents = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids, over as many files as they take."""
        self.tokens += len(ids)
        while len(ids):
            if not self.room:
                self.close()
                self.names.append(f"{self.split}-{len(self.names):05}.bin" if self.names else f"{self.split}.bin")
                self.file, self.room = files.create(self.folder / self.names[-1]), self.shard
            part, ids = ids[: self.room], ids[self.room :]
            self.file.write(np.ascontiguousarray(part, self.dtype).data)
            self.room -= len(part)

    def close(self) -> None:
        """Flush what has been written to disk."""
        if self.file:
            files.sync(self.file)
            self.file.close()
            self.file = None


def choose(
    buckets: Buckets, target: Callable[[int], int], drop_duplicates: bool
) -> tuple[dict[int, np.ndarray] | None, int, int, int]:
    """Which documents are validated on: of those in random order, each that fits, until there are `target` ids.

    Returns ({a bucket's number: mask of its groups}, or None where they come nowhere near that, or only FEW others, all
    the larger, would be left to train on; ids in all; documents in all; duplicates dropped). `target` is a function of
    the ids in all.
    """
    total = documents = dropped = 0
    for bucket in buckets:
        dropped += bucket.drop_duplicates() if drop_duplicates else 0
        sizes, counts = bucket.sizes()
        total, documents = total + int(sizes.sum()), documents + int(counts.sum())
    wanted, val, taken, masks = target(total), 0, 0, {}
    for number, bucket in enumerate(buckets):
        if val >= wanted:
            break
        if drop_duplicates:
            bucket.drop_duplicates()
        sizes, counts = bucket.sizes()
        masks[number] = np.zeros(len(sizes), dtype=bool)
        for i, (size, count) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True)):
            if val < wanted and val + size <= 1.25 * wanted:
                masks[number][i] = True
                val, taken = val + size, taken + count
    fair = val >= 0.75 * wanted and documents > 1 and documents - taken >= min(taken, FEW)
    return (masks if fair else None), total, documents, dropped


def write_documents(
    buckets: Buckets,
    masks: dict[int, np.ndarray],
    drop_duplicates: bool,
    train: Sink,
    val: Sink,
    limit: int,
    progress: Callable[[int], object],
) -> None:
    """Write whole documents in random order, those of `masks` to the sink `val`, all others to `train`."""
    for number, bucket in enumerate(buckets):
        if drop_duplicates:
            bucket.drop_duplicates()
        chosen = masks.get(number, np.zeros(len(bucket.groups), dtype=bool))
        for sink, mask in ((val, chosen), (train, ~chosen)):
            which = bucket.members(mask)
            sink.documents += int((bucket.fragments["first"][which] != 0).sum())
            for ids in bucket.read(which, limit):
                sink.write(ids)
                progress(len(ids))


def write_ends(
    buckets: Buckets,
    fraction: float,
    drop_duplicates: bool,
    separator: int | None,
    train: Sink,
    val: Sink,
    progress: Callable[[int], object],
) -> None:
    """Write the last `fraction` of each document to the sink `val`, the rest to `train`, in random order.

    A document's end gets a separator of its own, where documents have one.
    """
    for bucket in buckets:
        if drop_duplicates:
            bucket.drop_duplicates()
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
                progress(len(ids))
