"""Processes that turn blocks of raw bytes into token ids, each one block at a time, on all cores.

Their results come in the order of the blocks, so that the number of processes changes nothing. What goes between
processes is JSON and bytes.
"""

import contextlib
import hashlib
import json
import os
import queue
import re
import struct
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import numpy as np

from nanogpt.config import RunFailed
from nanogpt.text import sources, tokenizer
from nanogpt.text.sources import BLOCK

FRAGMENT = np.dtype([("key", "<u8"), ("digest", "<u8"), ("tokens", "<u4"), ("first", "u1")])
# A document, or a block's worth of a larger one. `digest` is a hash of its bytes, `tokens` how many ids it became,
# `first` whether a document begins with it. `key`, the digest of the document's first fragment, is filled in later.

COUNT = np.dtype([("id", "<u4"), ("n", "<u4")])
TRAINING = 300, 45  # bytes of memory that training BPE takes for each distinct word, and for each byte of it
SLICE = 2**15  # characters that are given to the training at a time
WORD = re.compile(r"\w+|[^\w\s]+")  # much like GPT-2's words, to count how many there are
LENGTHS = struct.Struct("<QQ")  # before each message: of its two parts
AHEAD = 2  # blocks that a process is given before its first result is taken


class Worker:
    """Does what a process of the pool does; `setup` is a dict, see prepare.worker_settings."""

    def __init__(self, setup):
        self.setup = setup
        self.field, self.replace, self.separate = setup["field"], setup["replace"], setup["separate"]
        self.kept, self.stride, self.number = [], 1, 0  # texts to train a tokenizer on: of each stride-th block
        self.words, self.cost = set(), 0
        self.told = b""  # ASCII characters that `survey` has found
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
        """The code points that occur, but for ASCII that was told before, and how many characters there are."""
        text = "".join(text for text, _, _ in documents)
        characters = len(text)
        if text.isascii():
            new = text.encode("ascii").translate(None, self.told)
            self.told += bytes(set(new))
            text = new.decode("ascii")
        present = np.zeros(0x110000, dtype=bool)
        present[tokenizer.code_points(text)] = True
        return {"characters": characters}, [np.flatnonzero(present).astype(np.uint32)]

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
        self.workers, self.local, self.peak = [start_worker() for _ in range(processes)], None, 0

    def setup(self, **settings):
        """Give all workers their settings; see Worker."""
        for process in self.workers:
            self.give(process, settings)
        if not self.workers:
            self.local = Worker(settings)

    def map(self, blocks, task):
        """Yield (block, dict, arrays) for each block, in order. `task()` names what to do with the next one."""
        if not self.workers:
            for block in blocks:
                yield (block, *self.local.do(task(), block.kind, block.parts, block.data))
            return
        waiting = deque()
        for number, block in enumerate(blocks):
            process = self.workers[number % len(self.workers)]
            if len(waiting) == AHEAD * len(self.workers):
                yield self.take(*waiting.popleft())
            self.give(process, [task(), block.kind, block.parts], block.data)
            block.data = b""
            waiting.append((process, block))
        while waiting:
            yield self.take(*waiting.popleft())

    def give(self, process, header, data=b""):
        """Send a worker a message."""
        try:
            send(process.stdin, header, data)
        except OSError:
            raise died(process) from None

    def take(self, process, block):
        """Wait for the result of a block."""
        try:
            about, data = receive(process.stdout)
        except EOFError:
            raise died(process) from None
        arrays, data = [], memoryview(data)
        for name, size in about.pop("arrays"):
            dtype = {"fragment": FRAGMENT, "count": COUNT}.get(name) or np.dtype(name)
            arrays.append(np.frombuffer(data, dtype, size))
            data = data[size * dtype.itemsize :]
        return block, about, arrays

    def close(self):
        """End the workers, and note how much memory they took at most."""
        for process in self.workers:
            with contextlib.suppress(OSError, EOFError):
                send(process.stdin, None)
                self.peak += receive(process.stdout)[0]
        self.kill()

    def kill(self):
        """End the workers at once; they have nothing to lose."""
        for process in self.workers:
            process.kill()
        for process in self.workers:
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()
        self.workers = []


def run_module(name, **settings):
    """Start a Python that runs `nanogpt.NAME.main`, whose lines nobody need read; the Popen."""
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    code = f"from nanogpt.commands.cli import as_process; from nanogpt.{name} import main; as_process(main)"
    return subprocess.Popen([sys.executable, "-c", code], env=env, **settings)


def start_worker():
    """A worker process. It is apart from the terminal, so that Ctrl-C reaches the first process alone."""
    process = run_module("pool", stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(
            ImportError, AttributeError, OSError
        ):  # Linux can; 64 KB would be filled 30 times a block
            import fcntl

            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, BLOCK)
    return process


def send(pipe, header, data=b""):
    """Write a message: something as JSON, and bytes."""
    text = json.dumps(header).encode()
    pipe.write(LENGTHS.pack(len(text), len(data)) + text)
    pipe.write(data)
    pipe.flush()


def receive(pipe):
    """(what was sent as JSON, the bytes). Raises EOFError where nothing comes any more."""
    lengths = pipe.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        raise EOFError
    text, data = (pipe.read(n) for n in LENGTHS.unpack(lengths))
    return json.loads(text), data


def died(process):
    """The RunFailed about a worker process that is no more."""
    code = process.wait()
    why = f"signal {-code}" if code < 0 else f"exit code {code}"
    return RunFailed(
        f"a worker process ended with {why}, perhaps for want of memory; the same command goes on, with fewer "
        "--workers in less memory"
    )


def main():
    """What a worker process does: answer messages until there are no more. Its exit code."""
    read, write = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed may come between the messages
    jobs, worker = queue.Queue(), None
    threading.Thread(target=listen, args=(read, jobs), daemon=True).start()
    try:
        while (job := jobs.get()) is not None:
            header, data = job
            if header is None:
                send(write, peak_memory())
            elif isinstance(header, dict):
                worker = Worker(header)
            else:
                answer(write, *worker.do(*header, data))
    except BrokenPipeError:
        pass  # nobody listens any more
    return 0


def answer(pipe, about, arrays):
    """Send what a Worker's `do` returned."""
    names = {FRAGMENT: "fragment", COUNT: "count"}
    about["arrays"] = [(names.get(a.dtype) or a.dtype.name, len(a)) for a in arrays]
    send(pipe, about, b"".join(a.view(np.uint8).data for a in arrays if len(a)))


def listen(pipe, jobs):
    """Take messages as soon as they are sent, so that neither side ever waits for the other to listen."""
    with contextlib.suppress(EOFError):
        while True:
            jobs.put(receive(pipe))
    jobs.put(None)


def peak_memory():
    """The most bytes of memory that this process has had, as far as the system tells it; else 0."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
