"""Token files and the batches drawn from them.

A dataset is a folder with `train.bin` and `val.bin`, streams of token ids, and `meta.json`, which has the dtype of
the ids and the tokenizer; a long stream may be split into several files. Windows of tokens are numbered, and the
position of a window is a pure function of the seed and its number. The only state is the number of windows read, so a
resumed run or another number of processes reads the same tokens in the same order. docs/batches.md has the details.
Shapes: B sequences of T tokens.
"""

import bisect
import functools
import itertools
import math
import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from nanogpt import files
from nanogpt.config import RunFailed, UserError

PIECE = 2**22  # tokens that are read at a time
SCAN_LIMIT = 100_000_000  # tokens that are checked when a split is opened
SAMPLE = 2**20  # tokens of each piece that the fingerprint covers
AT_ONCE = 256  # windows whose positions are computed at a time, at hardly more cost than one


class Tokens:
    """The ids of a split: one stream, in one or several files. Slices are read from disk on demand.

    The files are not mapped into memory: pages read from a mapping count as the process's own memory, which would grow
    to the size of the files, and a file that is truncated meanwhile would crash the process instead of raising an
    error. Reading at an offset is faster, too (benchmarks/batches.py).
    """

    def __init__(self, paths: Sequence[Path], dtype: str) -> None:
        self.paths, self.dtype, self.handles, sizes = paths, np.dtype(dtype), [], []
        for path in paths:
            try:
                self.handles.append(files.open_regular(path))
            except OSError as e:
                raise UserError(f"{path}: cannot be read ({e.strerror})") from None
            weakref.finalize(self, os.close, self.handles[-1])
            sizes.append(os.fstat(self.handles[-1]).st_size)
            if sizes[-1] % self.dtype.itemsize:
                raise UserError(f"{path}: {sizes[-1]} bytes are no whole number of {dtype} ids; prepare it again")
        self.begins = list(itertools.accumulate((size // self.dtype.itemsize for size in sizes), initial=0))

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        """The ids of a slice, read-only. Raises RunFailed if a file no longer holds them."""
        assert span.step is None, "slices are contiguous"
        start, stop, _ = span.indices(len(self))
        parts = []
        for i, first, last in self._files(start, stop):
            raw = read_at(self.handles[i], (last - first) * self.dtype.itemsize, first * self.dtype.itemsize)
            if len(raw) != (last - first) * self.dtype.itemsize:
                raise RunFailed(f"{self.paths[i]}: has been cut short since the run began")
            parts.append(raw)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self.dtype)

    def expect(self, start: int, stop: int) -> None:
        """Ask the operating system, if it supports that, to read these ids from disk in the background."""
        if hasattr(os, "posix_fadvise"):
            for i, first, last in self._files(start, stop):
                first, size = first * self.dtype.itemsize, (last - first) * self.dtype.itemsize
                os.posix_fadvise(self.handles[i], first, size, os.POSIX_FADV_WILLNEED)

    def _files(self, start, stop):
        """Yield (file, first, last) for each file's part of a span; first and last count from the beginning of the file."""
        while start < stop:
            i = bisect.bisect_right(self.begins, start) - 1
            end = min(stop, self.begins[i + 1], start + PIECE)
            yield i, start - self.begins[i], end - self.begins[i]
            start = end


def read_at(handle: int, size: int, offset: int) -> bytes:
    """`size` bytes of an open file, starting at `offset`."""
    if hasattr(os, "pread"):
        return os.pread(handle, size, offset)
    os.lseek(handle, offset, os.SEEK_SET)  # Windows, where only one thread reads
    return os.read(handle, size)


class Dataset:
    """One split of a dataset: its tokens and the size of its vocabulary.

    tokens: `Tokens`, or an array of ids, which are checked against the vocabulary when they are read. separator: the id
    before every document, or None. path: names the tokens in messages. tokenizer_json: describes the tokenizer.
    `documents` is set if windows start at the beginning of documents.
    """

    def __init__(
        self,
        tokens: Tokens | np.ndarray,
        vocab_size: int,
        separator: int | None,
        path: str,
        tokenizer_json: dict | None = None,
    ) -> None:
        self.tokens, self.vocab_size, self.separator = tokens, vocab_size, separator
        self.path, self.tokenizer_json = path, tokenizer_json
        self.documents: Documents | None = None
        self.fingerprint: str | None = None

    def scan(self) -> None:
        """Check the ids of a small split, or SCAN_LIMIT ids from all over a large one, and set the fingerprint.

        The fingerprint covers the first SAMPLE ids of each piece that is read. Batches check their own ids.
        """
        pieces, digest = -(-len(self.tokens) // PIECE), 0
        for i in np.linspace(0, pieces - 1, min(pieces, -(-SCAN_LIMIT // PIECE)), dtype=np.int64).tolist():
            ids = self.tokens[i * PIECE : (i + 1) * PIECE]
            self.check(ids)
            digest = zlib.crc32(ids[:SAMPLE].tobytes(), digest)
        self.fingerprint = f"{len(self.tokens)} tokens, CRC-32 {digest:08x}"

    def check(self, ids: np.ndarray) -> None:
        """Raise UserError if an id is outside the vocabulary, for which an embedding would read past its end."""
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.path}: token id {ids.max()} lies outside the vocabulary of {self.vocab_size}; prepare it again"
            )

    def windows(self, starts: np.ndarray, stops: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T), int64, of the windows tokens[start:stop], each of at most T + 1 ids.

        A target is the token after its input. A window shorter than T + 1 is padded: targets are -1, which losses
        ignore, and the padding of the inputs is after all positions that count.
        """
        array = np.zeros((len(starts), block_size + 1), dtype=np.int64)
        for row, start, stop in zip(array, starts.tolist(), stops.tolist(), strict=True):
            row[: stop - start] = self.tokens[start:stop]
        self.check(array)
        ids, targets = torch.from_numpy(array), stops - starts - 1
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].clone(memory_format=torch.contiguous_format)
        for i in np.flatnonzero(targets < block_size):
            y[i, max(targets[i], 0) :] = -1
        return x, y


def find_documents(tokens: Tokens | np.ndarray, separator: int) -> np.ndarray:
    """The positions at which documents begin: 0 and each separator; then the position of the last token."""
    n = len(tokens)
    found = [np.flatnonzero(tokens[i : i + PIECE] == separator) + i for i in range(0, n, PIECE)]
    begins = np.concatenate([*found, [n - 1]])
    return begins if begins[0] == 0 else np.insert(begins, 0, 0)


class Documents:
    """The windows of documents; no window has tokens of two documents.

    Document i begins at token `begins[i]` and ends before `begins[i + 1]`, or, if `shared`, with that token: then its
    last target is the next document's separator, from which the model learns where to end. Its windows follow each
    other from its beginning, so that each of its tokens but the first is a target in one window, and only the last
    window may have fewer than `block_size` targets. With a `stride`, each window begins that many tokens after the
    previous one and repeats its last block_size - stride targets.

    Takes 16 bytes of memory per document.
    """

    def __init__(self, begins: ArrayLike, block_size: int, stride: int | None = None, shared: bool = False) -> None:
        self.begins, self.block_size, self.stride = np.asarray(begins), block_size, stride or block_size
        self.shared = int(shared)
        targets = self._targets()
        counts = np.where(targets > 0, 1 + np.maximum(0, -((block_size - targets) // self.stride)), 0)
        self.firsts = np.concatenate([[0], np.cumsum(counts)])  # the number of each document's first window

    def __len__(self):
        """Number of windows."""
        return int(self.firsts[-1])

    def filled(self) -> float:
        """Fraction of positions that have a target."""
        return int(self._targets().sum()) / (len(self) * self.block_size)

    def _targets(self):
        return np.maximum(np.diff(self.begins) - 1 + self.shared, 0)

    def which(self, numbers: np.ndarray) -> np.ndarray:
        """The documents of these windows."""
        return np.searchsorted(self.firsts, numbers, side="right") - 1

    def repeated(self, numbers: np.ndarray) -> np.ndarray:
        """How many of the first targets of each of these windows are also targets of the window before it."""
        return np.where(numbers > self.firsts[self.which(numbers)], self.block_size - self.stride, 0)

    def windows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positions of these windows: arrays (starts, stops); tokens[start:stop] is a window."""
        i = self.which(numbers)
        starts = self.begins[i] + (numbers - self.firsts[i]) * self.stride
        return starts, np.minimum(starts + self.block_size + 1, self.begins[i + 1] + self.shared)


MIX = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
SHIFTS = np.array([30, 27, 31], dtype=np.uint64)


def hash64(seed: int, stream: int, counters: ArrayLike) -> np.ndarray:
    """Random uint64s, one per counter: SplitMix64's output function (Steele et al. 2014, figure 20).

    A pure function, which does not depend on the machine or on the version of any library.
    """
    z = np.atleast_1d(np.asarray(counters, dtype=np.uint64)) * MIX[0]  # arrays wrap around, as intended
    for key in (seed, stream):
        z = splitmix(z ^ splitmix(np.array([key], dtype=np.uint64) + MIX[0]))
    return z.reshape(np.shape(counters))


def splitmix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing of an array of uint64."""
    z = (z ^ (z >> SHIFTS[0])) * MIX[1]
    z = (z ^ (z >> SHIFTS[1])) * MIX[2]
    return z ^ (z >> SHIFTS[2])


STREAMS = {"train": 0, "eval train": 1, "eval val": 2, "dropout": 3}  # independent random streams


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout for one step on one rank: a pure function, like the batches."""
    return int(hash64(seed, STREAMS["dropout"], step * 2**16 + rank) >> np.uint64(1))


def epoch_windows(dataset: Dataset, block_size: int) -> int:
    """Number of windows in an epoch; without documents, it is the same for every offset of an epoch."""
    if dataset.documents:
        return len(dataset.documents)
    return max(1, (len(dataset.tokens) - block_size) // block_size)


class Batches:
    """The windows of a dataset in random order, each of them once per epoch.

    stream: the name of the sequence. Its window number w does not depend on the batch size, the step that reads it, or
    the rank. Windows follow each other in the data, starting at another offset in each epoch; if the dataset has
    `documents`, they are the windows of its documents. With sampling="random", each window is drawn independently: T
    tokens from anywhere, or any window of any document. `epoch_windows` is the number of windows in an epoch.

    per_step: windows per step, over all processes, or None if they are not read step by step. If it is given, the
    windows that this process reads one step later are prefetched from disk.
    """

    def __init__(
        self,
        dataset: Dataset,
        stream: str,
        seed: int,
        block_size: int,
        dist: Any,
        sampling: str = "epochs",
        per_step: int | None = None,
    ) -> None:
        self.dataset, self.stream, self.seed, self.block_size = dataset, STREAMS[stream], seed, block_size
        self.dist, self.sampling, self.per_step = dist, sampling, per_step
        self.documents, self.epoch_windows = dataset.documents, epoch_windows(dataset, block_size)
        fitting = len(dataset.tokens) - self.epoch_windows * block_size
        self.offsets = 1 if self.documents else min(block_size, fitting)  # that an epoch can begin at
        self._cached = functools.lru_cache(maxsize=8)(self._block)

    def get(self, first: int, size: int, padded_to: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) of windows `first` to `first + size - 1`, on the device; B is `size` or `padded_to`.

        Rows of padding have no targets. If there is nothing else, they have some, so that the mean loss, which then must
        be given no weight, is a number.
        """
        padding = np.zeros((2, max(0, padded_to - size)), dtype=np.int64)
        starts, stops = np.concatenate([self._places(first, size), padding], axis=1)
        x, y = self.dataset.windows(starts, stops, self.block_size)
        if not size:
            y.zero_()
        if self.per_step and isinstance(self.dataset.tokens, Tokens):
            for start, stop in self._places(first + self.per_step, size).T.tolist():
                self.dataset.tokens.expect(start, stop)
        return self.dist.to_device(x), self.dist.to_device(y)

    def filled(self, first: int, size: int) -> float:
        """Fraction of positions in these windows that have a target: 1.0 except for the last windows of documents."""
        if not self.documents:
            return 1.0
        starts, stops = self._places(first, size)
        return int((stops - starts - 1).sum()) / (size * self.block_size)

    def divisor(self, first: int, size: int, begin: int) -> float:
        """What the mean loss of these windows is divided by, in the step that begins with window number `begin`.

        The sums of these losses, averaged over the processes, are then the mean over all targets of the step. Infinity
        if there are no windows.
        """
        assert self.per_step, "the windows are read step by step"
        if not size:
            return math.inf
        weight = self.filled(first, size) / self.filled(begin, self.per_step)
        return self.per_step / (self.dist.world_size * size) / weight

    def _places(self, first, size):
        """`places` of windows `first` to `first + size - 1`: an array (2, size)."""
        blocks = range(first // AT_ONCE, (first + max(size, 1) - 1) // AT_ONCE + 1)
        found = [self._cached(b)[:, max(0, first - b * AT_ONCE) : first + size - b * AT_ONCE] for b in blocks]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

    def _block(self, block):
        return np.stack(self.places(np.arange(block * AT_ONCE, (block + 1) * AT_ONCE)))

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the windows with these numbers: arrays (starts, stops); tokens[start:stop] is a window."""
        T, n = self.block_size, len(self.dataset.tokens)
        if self.sampling == "random":
            choices = len(self.documents) if self.documents else n - T
            which = (hash64(self.seed, self.stream, numbers) % np.uint64(choices)).astype(np.int64)
            starts = which
        else:
            which, offsets = self._shuffled(numbers)
            starts = which * T + offsets
        return self.documents.windows(which) if self.documents else (starts, starts + T + 1)

    def _shuffled(self, numbers):
        """Which window of its epoch each of these is, and at which token its epoch begins."""
        epochs, numbers = np.divmod(numbers, self.epoch_windows)
        which, offsets = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            key = hash64(self.seed, self.stream, epoch)
            mine = epochs == epoch
            which[mine] = permutation(numbers[mine], self.epoch_windows, key)
            offsets[mine] = int(key) % self.offsets
        return which, offsets


def permutation(i: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
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


def share_batch(cfg: Any, world_size: int, micro_batch: int | None = None) -> tuple[int, int]:
    """How each process works through its part of the global batch: (micro-steps, sequences in each).

    The global batch is gradient_accumulation_steps * batch_size whatever the number of processes. A micro-step
    holds at most `micro_batch` sequences, or batch_size. All processes make the same micro-steps. If the number of
    processes does not divide the batch, their parts differ by one sequence, and smaller parts are padded.
    """
    total, most = cfg.gradient_accumulation_steps * cfg.batch_size, micro_batch or cfg.batch_size
    largest = -(-total // world_size)
    if total % world_size == 0:
        size = largest_divisor(largest, most)
        return largest // size, size
    micro_steps = -(-largest // most)
    return micro_steps, -(-largest // micro_steps)


def part_of_rank(per_step: int, rank: int, world_size: int) -> range:
    """Which of a step's windows, counted from 0, a process reads. The numbers of two processes differ by at most one."""
    return range(rank * per_step // world_size, (rank + 1) * per_step // world_size)


def micro_batch_sizes(cfg: Any, world_size: int) -> list[int]:
    """Sizes of micro-batches to choose from, the least first; the last is a process's whole part of the global batch."""
    total = cfg.gradient_accumulation_steps * cfg.batch_size
    if total % world_size == 0:
        return divisors(total // world_size)
    largest = -(-total // world_size)
    return sorted({-(-largest // 2**halvings) for halvings in range(largest.bit_length() + 1)})


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in divisors(n) if d <= most)


def divisors(n: int) -> list[int]:
    """All divisors of n, the least first. They come in pairs, of which one is at most the square root."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]
