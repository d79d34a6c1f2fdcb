"""Worker processes that turn blocks of raw bytes into token ids, one block at a time.

Results come back in the order of the blocks, so the number of processes does not change them.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from nanogpt.config import RunFailed
from nanogpt.text import tokenizer
from nanogpt.text.cutting import code_points, last_character
from nanogpt.text.sources import BLOCK, Block, Document, read_block

FRAGMENT = np.dtype([("key", "<u8"), ("digest", "<u8"), ("tokens", "<u4"), ("first", "u1")])
# A document, or one block of a larger document: `digest` is a hash of its bytes, `tokens` its number of ids, `first`
# whether it starts a document. `key`, the digest of the document's first fragment, is filled in later.

TRAINING = 300, 45  # bytes of memory that BPE training takes per distinct word, and per byte of it
SLICE = 2**15  # characters passed to BPE training at a time
WORD = re.compile(r"\w+|[^\w\s]+")  # roughly GPT-2's words, to count how many there are
AHEAD = 2  # blocks submitted per process before the first result is awaited
WAIT = 5.0  # seconds to wait before looking whether a worker process has died

Result = tuple[dict[str, Any], list[np.ndarray]]


class Worker:
    """Processes blocks. `settings` are those of `prepare.worker_settings`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.kept: list[list[str]] = []  # texts to train a tokenizer on: of every stride-th block
        self.stride, self.number = 1, 0
        self.words: set[str] = set()
        self.cost = 0
        self.salt = settings["seed"].to_bytes(8, "little")
        self.tokenizer: Any = tokenizer.from_json(settings["tokenizer"]) if settings["tokenizer"] else None

    def do(self, task: str, block: Block) -> Result:
        """(dict, arrays) from a block; `task` is the name of one of the methods below."""
        documents, problems = read_block(block, self.settings["field"], self.settings["replace"])
        about, arrays = getattr(self, task)(documents)
        return about | {"problems": problems}, arrays

    def check(self, documents: list[Document]) -> Result:
        """Find problems only."""
        return {}, []

    def survey(self, documents: list[Document]) -> Result:
        """The code points that occur, and the number of characters."""
        text = "".join(document.text for document in documents)
        present = np.zeros(0x110000, dtype=bool)
        present[code_points(text)] = True
        return {"characters": len(text)}, [np.flatnonzero(present).astype(np.uint32)]

    def sample(self, documents: list[Document]) -> Result:
        """Keep the texts to train a tokenizer on. If they exceed the budget, drop every other block."""
        if self.number % self.stride == 0:
            self.kept.append([document.text for document in documents])
            self.add_words(self.kept[-1])
            while self.cost > self.settings["budget"] and len(self.kept) > 1:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
                self.words, self.cost = set(), 0
                for texts in self.kept:
                    self.add_words(texts)
        self.number += 1
        return {}, []

    def add_words(self, texts: list[str]) -> None:
        """Add the memory that training on these texts takes: most of it is spent on distinct words."""
        for text in texts:
            self.cost += 2 * len(text)
            new = {word[0] for word in WORD.finditer(text)} - self.words
            self.words |= new
            self.cost += sum(TRAINING[0] + TRAINING[1] * len(word.encode("utf-8")) for word in new)

    def train(self, documents: list[Document]) -> Result:
        """The tokenizer trained on the sample."""
        self.words = set()
        texts = (text[i : i + SLICE] for part in self.kept for text in part for i in range(0, len(text), SLICE))
        tok = tokenizer.BPETokenizer.train(texts, self.settings["vocab_size"])
        return {"tokenizer": tok.to_json(), "stride": self.stride}, []

    def encode(self, documents: list[Document]) -> Result:
        """The ids of a block's documents, their FRAGMENTs, the ids that occur, and how often each does."""
        pieces = [piece for document in documents for piece in self.pieces(document)]
        fragments = np.array([(0, self.digest(piece.raw), 0, piece.first) for piece in pieces], FRAGMENT)
        ids, lengths = self.ids([piece.text for piece in pieces])
        if self.settings["separate"]:
            begins = fragments["first"] != 0
            ids = np.insert(ids, (np.cumsum(lengths) - lengths)[begins], self.tokenizer.eot)
            lengths = lengths + begins
        fragments["tokens"] = lengths
        counts = np.bincount(ids, minlength=1)
        found = np.flatnonzero(counts)
        return {"bytes": sum(len(piece.raw) for piece in pieces)}, [ids, fragments, found, counts[found]]

    def pieces(self, document: Document) -> Iterator[Document]:
        """Yield a document in parts of at most one block, cut like a text file; nearly always there is one part."""
        begin, (text, raw, first, _) = 0, document
        while len(raw) - begin >= BLOCK:
            part = raw[begin : begin + BLOCK]
            place = self.tokenizer.cut(part) or last_character(part)
            yield Document(part[:place].decode("utf-8", "replace"), part[:place], first)
            begin, first = begin + place, False
        if begin < len(raw):
            yield Document(raw[begin:].decode("utf-8", "replace") if begin else text, raw[begin:], first)

    def ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids in one array, and the number of ids of each text."""
        dtype = tokenizer.id_dtype(self.tokenizer.vocab_size)
        if isinstance(self.tokenizer, tokenizer.CharTokenizer | tokenizer.ByteTokenizer):  # one call for all texts
            in_bytes = isinstance(self.tokenizer, tokenizer.ByteTokenizer)
            sizes = [len(text.encode("utf-8")) if in_bytes else len(text) for text in texts]
            return self.tokenizer.encode_numpy("".join(texts)).astype(dtype, copy=False), np.array(sizes, np.int64)
        arrays = [self.tokenizer.encode_numpy(text) for text in texts]
        lengths = np.array([len(a) for a in arrays], np.int64)
        return np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype, casting="unsafe"), lengths

    def digest(self, raw: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=self.salt).digest(), "little")


worker: Worker  # of this process, if it is one of the pool


class Pool:
    """`processes` workers with the settings of `Worker`; without any, this process does the work."""

    def __init__(self, processes: int, **settings: Any) -> None:
        self.processes = processes
        self.peaks: dict[int, int] = {}  # peak memory of each worker, by process id
        self.local = None if processes else Worker(settings)
        if processes:
            context = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(processes, context, start_worker, (settings,))

    def map(self, blocks: Iterable[Block], task: Callable[[], str]) -> Iterator[tuple[Block, dict, list[np.ndarray]]]:
        """Yield (block, dict, arrays) for each block, in order. `task()` names the `Worker` method for the next one."""
        if self.local:
            for block in blocks:
                yield block, *self.local.do(task(), block)
            return
        pending: deque[tuple[Block, Future]] = deque()
        try:
            for block in blocks:
                if len(pending) == AHEAD * self.processes:
                    yield self.result(*pending.popleft())
                pending.append((block, self.submit(task(), block)))
            while pending:
                yield self.result(*pending.popleft())
        except BrokenProcessPool:
            raise RunFailed(
                "a worker process ended abruptly, perhaps out of memory; run the same command again to continue, with "
                "fewer --workers to use less memory"
            ) from None

    def submit(self, task: str, block: Block) -> Future:
        """Start a task. Worker processes start here, and inherit a blocked SIGINT: Ctrl-C is for the main process."""
        set_mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
        before = set_mask and set_mask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self.executor.submit(do, task, block)
        finally:
            if set_mask:
                set_mask(signal.SIG_SETMASK, before)

    def result(self, block: Block, future: Future) -> tuple[Block, dict, list[np.ndarray]]:
        """Wait for the result of a block. Raises BrokenProcessPool if a worker process has died.

        The executor raises it itself, except if the worker died while it wrote a result: then it waits for the rest.
        """
        while not wait([future], WAIT).done:
            if any(not process.is_alive() for process in (self.executor._processes or {}).values()):
                raise BrokenProcessPool
        about, arrays, pid, peak = future.result()
        self.peaks[pid] = peak
        block.data = b""
        return block, about, arrays

    @property
    def peak(self) -> int:
        """The peak memory of all workers together, in bytes."""
        return sum(self.peaks.values())

    def close(self) -> None:
        """End the workers at once; all results that matter have been taken."""
        if self.processes:
            for process in list((self.executor._processes or {}).values()):  # public from Python 3.14: kill_workers
                process.kill()
            # If a worker was killed while it wrote a result, the executor waits for the rest of it, unless the pipe ends.
            self.executor._result_queue._writer.close()  # type: ignore[attr-defined]
            end = threading.Thread(target=self.executor.shutdown, kwargs=dict(cancel_futures=True), daemon=True)
            end.start()
            end.join(WAIT)
            self.processes = 0


def start_worker(settings: dict[str, Any]) -> None:
    """Set up a worker process. It ends when its parent does, even if the parent is killed."""
    global worker

    def follow_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    worker = Worker(settings)


def do(task: str, block: Block) -> tuple[dict, list[np.ndarray], int, int]:
    """What a worker process does with a block, its process id and its peak memory."""
    return *worker.do(task, block), os.getpid(), peak_memory()


def peak_memory() -> int:
    """The peak memory of this process in bytes; 0 if the system does not report it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
