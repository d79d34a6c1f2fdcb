"""Processes that turn blocks of raw bytes into token ids, each one block at a time, on all cores.

Their results come in the order of the blocks, so that the number of processes changes nothing. What goes between
processes is JSON and bytes.
"""

import hashlib
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
from collections import deque

import numpy as np

from nanogpt import sources, tokenizer
from nanogpt.config import RunFailed
from nanogpt.sources import BLOCK

FRAGMENT = np.dtype([("key", "<u8"), ("digest", "<u8"), ("tokens", "<u4"), ("first", "u1")])
# A document, or a block's worth of a larger one. `digest` is a hash of its bytes, `tokens` how many ids it became,
# `first` whether a document begins with it. `key`, the digest of the document's first fragment, is filled in later.

COUNT = np.dtype([("id", "<u4"), ("n", "<u4")])
TRAINING = 300, 45  # bytes of memory that training BPE takes for each distinct word, and for each byte of it
SLICE = 2**15  # characters that are given to the training at a time
WORD = re.compile(r"\w+|[^\w\s]+")  # much like GPT-2's words, to count how many there are
AHEAD = 2  # blocks that a process is given before its first result is taken


class Worker:
    """Does what a process of the pool does; `setup` is a dict, see prepare.worker_settings."""

    def __init__(self, setup):
        self.setup = setup
        self.field, self.replace, self.separate = setup["field"], setup["replace"], setup["separate"]
        self.kept, self.stride, self.number = [], 1, 0  # texts to train a tokenizer on: of each stride-th block
        self.words, self.cost = set(), 0
        self.salt = setup["seed"].to_bytes(8, "little")
        self.tokenizer = tokenizer.from_json(setup["tokenizer"]) if setup["tokenizer"] else None
        if self.tokenizer:
            self.dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "uint32"

    def do(self, task, kind, parts, data):
        """(a dict, arrays) that come of a block; `task` is the name of one of the methods below."""
        documents, problems = sources.read_block(kind, parts, data, self.field, self.replace)
        about, arrays = getattr(self, task)(documents)
        return about | {"problems": [[*key, *value] for key, value in problems.items()]}, arrays

    def check(self, documents):
        """Nothing but the problems."""
        return {}, []

    def survey(self, documents):
        """The code points that occur, and how many characters there are."""
        present = np.zeros(0x110000, dtype=bool)
        codes = tokenizer.code_points("".join(text for text, _, _ in documents))
        present[codes] = True
        return {"characters": len(codes)}, [np.flatnonzero(present).astype(np.uint32)]

    def sample(self, documents):
        """Keep the texts to train a tokenizer on; where they become too many, forget every other block's."""
        if self.number % self.stride == 0:
            self.kept.append([text for text, _, _ in documents])
            self.add_words(self.kept[-1])
            while self.cost > self.setup["budget"] and len(self.kept) > 1:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
                self.words, self.cost = set(), 0
                for texts in self.kept:
                    self.add_words(texts)
        self.number += 1
        return {}, []

    def add_words(self, texts):
        """Add up what training on these texts takes: most of it is kept for each distinct word."""
        for text in texts:
            self.cost += 2 * len(text)
            new = {word[0] for word in WORD.finditer(text)} - self.words
            self.words |= new
            self.cost += sum(TRAINING[0] + TRAINING[1] * len(word.encode("utf-8")) for word in new)

    def train(self, documents):
        """The tokenizer that is trained on the sample."""
        self.words = set()
        texts = (text[i : i + SLICE] for part in self.kept for text in part for i in range(0, len(text), SLICE))
        tok = tokenizer.BPETokenizer.train(texts, self.setup["vocab_size"])
        return {"tokenizer": tok.to_json(), "stride": self.stride}, []

    def encode(self, documents):
        """The ids of a block's documents, the FRAGMENTs that they consist of, and how often each id occurs."""
        pieces = [piece for document in documents for piece in self.pieces(*document)]
        fragments = np.zeros(len(pieces), FRAGMENT)
        for i, (_, raw, first) in enumerate(pieces):
            fragments[i] = (0, self.digest(raw), 0, first)
        ids, lengths = self.ids([text for text, _, _ in pieces])
        if self.separate:
            begins = fragments["first"] != 0
            ids = np.insert(ids, (np.cumsum(lengths) - lengths)[begins], self.tokenizer.eot)
            lengths = lengths + begins
        fragments["tokens"] = lengths
        counts = np.bincount(ids, minlength=1)
        found = np.flatnonzero(counts)
        sparse = np.empty(len(found), COUNT)
        sparse["id"], sparse["n"] = found, counts[found]
        return {"bytes": sum(len(raw) for _, raw, _ in pieces)}, [ids, fragments, sparse]

    def pieces(self, text, raw, first):
        """Yield a document in parts of at most a block, cut as a file of text is cut; nearly always it is one."""
        begin = 0
        while len(raw) - begin >= BLOCK:
            part = raw[begin : begin + BLOCK]
            place = self.tokenizer.cut(part) or sources.last_whole(part)
            yield part[:place].decode("utf-8", "replace"), part[:place], first
            begin, first = begin + place, False
        if begin < len(raw):
            yield (text if begin == 0 else raw[begin:].decode("utf-8", "replace")), raw[begin:], first

    def ids(self, texts):
        """All ids in one array, and how many there are of each text."""
        kind = type(self.tokenizer)
        if kind in (tokenizer.CharTokenizer, tokenizer.ByteTokenizer):  # neither looks beyond a character
            joined = "".join(texts)
            in_bytes = kind is tokenizer.ByteTokenizer
            lengths = [len(text.encode("utf-8")) if in_bytes else len(text) for text in texts]
            return self.tokenizer.encode_numpy(joined).astype(self.dtype, copy=False), np.array(lengths, np.int64)
        arrays = [self.tokenizer.encode_numpy(text) for text in texts]
        lengths = np.array([len(a) for a in arrays], np.int64)
        return np.concatenate([np.zeros(0, self.dtype), *arrays], dtype=self.dtype, casting="unsafe"), lengths

    def digest(self, raw):
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=self.salt).digest(), "little")


class Pool:
    """`processes` workers, or none: then this process does their work."""

    def __init__(self, processes):
        context = multiprocessing.get_context("spawn")  # nothing of this process is copied, threads least of all
        self.workers, self.local, self.peak = [], None, 0
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def setup(self, **settings):
        """Give all workers their settings; see Worker."""
        for _, connection in self.workers:
            connection.send_bytes(json.dumps(settings).encode())
            connection.send_bytes(b"")
        if not self.workers:
            self.local = Worker(settings)

    def map(self, blocks, task):
        """Yield (block, dict, arrays) for each block, in order. `task()` names what to do with the next one."""
        if not self.workers:
            for block in blocks:
                yield (block, *self.local.do(task(), block.kind, block.parts, block.data))
            return
        waiting, number = deque(), 0
        for block in blocks:
            worker = self.workers[number % len(self.workers)]
            number += 1
            if len(waiting) == AHEAD * len(self.workers):
                yield self.take(*waiting.popleft())
            try:
                worker[1].send_bytes(json.dumps([task(), block.kind, block.parts]).encode())
                worker[1].send_bytes(block.data)
            except OSError:
                raise died(worker[0]) from None
            block.data = b""
            waiting.append((worker, block))
        while waiting:
            yield self.take(*waiting.popleft())

    def take(self, worker, block):
        """Wait for the result of a block."""
        try:
            about = json.loads(worker[1].recv_bytes())
            if "failed" in about:
                raise RunFailed(about["failed"])
            return block, about, [np.frombuffer(worker[1].recv_bytes(), name_to_dtype(d)) for d in about["dtypes"]]
        except (EOFError, OSError):
            raise died(worker[0]) from None

    def close(self):
        """End the workers, and note how much memory they took at most."""
        for process, connection in self.workers:
            try:
                connection.send_bytes(b"null")
                connection.send_bytes(b"")
                self.peak += json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                pass
            process.join()
        self.workers = []

    def kill(self):
        """End the workers at once."""
        for process, connection in self.workers:
            connection.close()
            process.terminate()
            process.join()
        self.workers = []


def died(process):
    process.join(5)
    why = f"signal {-process.exitcode}" if (process.exitcode or 0) < 0 else f"exit code {process.exitcode}"
    return RunFailed(
        f"a worker process ended with {why}, perhaps for want of memory; the same command goes on, with fewer "
        "--workers in less memory"
    )


def name_to_dtype(name):
    return {"fragment": FRAGMENT, "count": COUNT}.get(name) or np.dtype(name)


def dtype_to_name(dtype):
    return {FRAGMENT: "fragment", COUNT: "count"}.get(dtype) or dtype.name


def serve(connection):
    """What a worker process does: messages in pairs, of JSON and of bytes, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    jobs = queue.Queue()
    threading.Thread(target=receive, args=(connection, jobs), daemon=True).start()
    worker = None
    while (job := jobs.get()) is not None:
        header, data = job
        try:
            if header is None:
                connection.send_bytes(str(peak_memory()).encode())
                return
            if isinstance(header, dict):
                worker = Worker(header)
                continue
            about, arrays = worker.do(*header, data)
            about["dtypes"] = [dtype_to_name(a.dtype) for a in arrays]
            connection.send_bytes(json.dumps(about).encode())
            for array in arrays:
                connection.send_bytes(array.view(np.uint8).data if len(array) else b"")
        except OSError:
            return  # nobody listens any more
        except Exception as e:
            connection.send_bytes(json.dumps({"failed": f"{type(e).__name__}: {e}"}).encode())
            raise


def receive(connection, jobs):
    """Take jobs as soon as they are sent, so that neither side ever waits for the other to listen."""
    try:
        while True:
            jobs.put((json.loads(connection.recv_bytes()), connection.recv_bytes()))
    except (EOFError, OSError):
        jobs.put(None)


def peak_memory():
    """The most bytes of memory that this process has had, as far as the system tells it; else 0."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
