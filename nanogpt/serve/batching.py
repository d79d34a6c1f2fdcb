"""Many requests, one model: a thread that continues all texts together, token by token.

    handlers (asyncio)                 the thread
    Batcher.submit(jobs)    ->         their texts wait for places; prompts are read piece by piece
    Outbox.take()           <-         after each step, what the step has added to each text

A text joins the batch and leaves it between steps, whatever the others do. Knows no HTTP.

Places are shared like this. Half of them belong to whoever came first: the first unfinished text of each request in the
order of arrival, then the second of each, and so on. The other half belong to the texts with the fewest tokens left to
write. A text that loses its place is parked, with its part of the KV cache, and goes on later exactly as it would have;
so that texts do not change places for nothing, one loses its place only to a text with less than half as much left.
A short request therefore never waits for long ones to end, and a long one always advances.
"""

import asyncio
import threading
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from nanogpt.generate import Token
from nanogpt.serve.metrics import Metrics
from nanogpt.text.tokenizer import Stream


class Part(NamedTuple):
    """What a step has added to a text."""

    index: int  # by which the request knows the text
    text: str  # what can be shown now
    token: Token | None  # None where it only ends the text
    start: int  # where in the text the token begins
    finish: str | None  # "stop" or "length" where the text ends here


class Outbox:
    """What has been made for a request and not yet been fetched. It holds no more than the texts' max_tokens."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.parts = deque()
        self.ready = asyncio.Event()
        self.awaited = False  # whether somebody waits for `ready`

    def put(self, part):
        """Add a Part, or an exception, and wake who waits for it. For the thread."""
        self.parts.append(part)
        if self.awaited:
            self.awaited = False
            try:
                self.loop.call_soon_threadsafe(self.ready.set)
            except RuntimeError:
                pass  # the loop has ended, and nobody waits any more

    async def take(self, deadline):
        """All parts since the last call, one at least; an exception among them is raised when it is the next one.

        TimeoutError from the time.monotonic() of `deadline` on.
        """
        if time.monotonic() > deadline:
            raise TimeoutError
        while not self.parts:
            self.ready.clear()
            self.awaited = True
            if self.parts:  # they came just before `awaited` was set
                break
            try:
                await asyncio.wait_for(self.ready.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise TimeoutError from None
        taken = []
        while self.parts and isinstance(self.parts[0], Part):
            taken.append(self.parts.popleft())
        if not taken:
            raise self.parts[0]
        return taken


@dataclass(eq=False)
class Job:
    """One prompt and the texts that continue it, which share the reading of the prompt."""

    ids: list  # of the prompt
    options: object  # generate.Options, with the seed of the first text; each next one's is one more
    stops: list
    indices: range  # by which the outbox knows the texts
    outbox: Outbox
    cancelled: bool = False


@dataclass(eq=False)
class Writing:
    """A text, before and while it is written."""

    job: Job
    index: int
    arrival: int  # of its request
    stream: Stream
    row: object = None  # generate.Row, once it has begun
    shown: int = 0  # characters

    @property
    def left(self):
        """How many tokens it may still write."""
        return self.job.options.max_new_tokens - (self.row.new if self.row else 0)


class Stopping(Exception):
    """The server ends before the text does."""


class Failed(Exception):
    """The model could not be run."""


@dataclass(eq=False)
class Batcher:
    """The thread and its batch."""

    make_engine: object  # a function that returns a generate.Engine
    tok: object
    cores: int = 1  # on which the thread computes
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self):
        self.waiting, self.running = [], {}  # Writings, new and parked; {generate.Row: Writing}
        self.condition = threading.Condition()  # for `waiting`, `arrivals`, `changed` and `stopping`
        self.arrivals = 0  # requests so far
        self.changed = False  # whether somebody came or left, and the places are to be shared anew
        self.stopping = False
        self.engine = self.make_engine()
        self.thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self.thread.start()

    # called by the handlers

    def submit(self, jobs):
        """Have the jobs of a request done. Raises Stopping when it is too late."""
        with self.condition:
            if self.stopping:
                raise Stopping
            self.arrivals, self.changed = self.arrivals + 1, True
            for job in jobs:
                self.waiting += [Writing(job, i, self.arrivals, Stream(self.tok, job.stops)) for i in job.indices]
            self.condition.notify()

    def cancel(self, jobs):
        """Leave the jobs as they are; their places are free after the step that is under way."""
        with self.condition:
            for job in jobs:
                job.cancelled = True
            self.waiting = [writing for writing in self.waiting if not writing.job.cancelled]

    def stop(self):
        """End all texts, and the thread."""
        with self.condition:
            self.stopping = True
            self.condition.notify()

    # the thread

    def _run(self):
        torch.set_num_threads(self.cores)
        try:
            while self._wait():
                try:
                    self._advance()
                except Exception:  # of any kind, such as a GPU out of memory; the next one may have better luck
                    traceback.print_exc()
                    self.metrics.failures.inc()
                    self._end_running(Failed())
                    self.engine = None  # before there is another: it may be the memory that is short
                    self.engine = self.make_engine()
        finally:
            self._end_all()

    def _advance(self):
        """Let go who is gone, share the places, and give every text a token."""
        for row in [row for row, writing in self.running.items() if writing.job.cancelled]:
            self.engine.remove(row)
            del self.running[row]
            self.changed = True
        if self.changed and self.waiting:
            self._share()
        if self.running:
            self._step()

    def _wait(self):
        """Return when there is something to do; False when the thread is to end."""
        with self.condition:
            while not (self.waiting or self.running or self.stopping):
                self.condition.wait()
            return not self.stopping

    def _share(self):
        """Give each place to the text that is to have it, as the top of this file says."""
        capacity, half = self.engine.capacity, self.engine.capacity // 2
        with self.condition:
            self.changed = False
            running, waiting = set(self.running.values()), list(self.waiting)
            ranks, seen = {}, Counter()  # {text: how many of its request come before it}
            for writing in sorted([*running, *waiting], key=lambda w: (w.arrival, w.index)):
                ranks[writing] = seen[writing.arrival]
                seen[writing.arrival] += 1
            by_turn = sorted(ranks, key=ranks.get)
            by_length = sorted(by_turn[half:], key=lambda w: w.left / 2 if w in running else w.left)
            chosen = {*by_turn[:half], *by_length[: capacity - half]}
            for writing in running - chosen:
                self.engine.park(writing.row)
                del self.running[writing.row]
                self.waiting.append(writing)
            together = {}  # texts of one job that begin now share the reading of its prompt
            for writing in waiting:
                if writing in chosen:
                    together.setdefault(writing.row or writing.job, []).append(writing)
            for writings in together.values():
                self._enter(writings)

    def _enter(self, writings):
        """Take a parked text into the batch, or new ones of one job."""
        self.waiting = [writing for writing in self.waiting if writing not in writings]
        first, job = writings[0], writings[0].job
        try:
            if first.row:
                self.engine.resume(first.row)
            else:
                options = replace(job.options, seed=job.options.seed + first.index - job.indices[0])
                for writing, row in zip(writings, self.engine.add(job.ids, options, len(writings)), strict=True):
                    writing.row = row
                self.metrics.prompt_tokens.inc(len(job.ids))
        except Exception:
            job.outbox.put(Failed())
            raise
        self.running |= {writing.row: writing for writing in writings}

    def _step(self):
        """A token for every text whose prompt has been read."""
        tokens = self.engine.step()
        self.metrics.steps.inc()
        self.metrics.tokens.inc(len(tokens))
        for token in tokens:
            self._take(token)

    def _take(self, token):
        """Put what a token adds to its text into the outbox."""
        row, finish, writing = token.row, token.finish, self.running[token.row]
        stream, start = writing.stream, writing.shown + len(writing.stream.held)
        if finish == "stop":  # a token that ends the text is no part of it
            token, text = None, stream.flush()
        else:
            text = stream.push(token.id)
            if stream.stopped:
                finish = "stop"
                self.engine.remove(row)
            elif finish:
                text += stream.flush()
        writing.shown += len(text)
        if finish:
            del self.running[row]
            self.changed = True
        writing.job.outbox.put(Part(writing.index, text, token, start, finish))

    def _end_running(self, error):
        """Tell those whose texts are in the batch that they are lost."""
        outboxes = {writing.job.outbox for writing in self.running.values()}
        self.running, self.changed = {}, True
        for outbox in outboxes:
            outbox.put(error)

    def _end_all(self):
        """The thread ends: tell everybody, those who wait too."""
        with self.condition:
            self.stopping, waiting, self.waiting = True, self.waiting, []
        self._end_running(Stopping())
        for outbox in {writing.job.outbox for writing in waiting}:
            outbox.put(Stopping())
