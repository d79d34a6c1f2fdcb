"""Many requests, one model: a thread that continues all texts together, token by token. It knows nothing of HTTP.

    handlers (asyncio)                 the thread
    Batcher.submit(jobs)    ->         the texts wait for places; prompts are read in pieces
    Outbox.take()           <-         after each step, what the step has added to each text

Between two steps a text can join or leave the batch, whatever the others do.

If there are more texts than places, half of the places go in order of arrival: to the first unfinished text of each
request, then to the second of each, and so on. The other half go to the texts with the fewest tokens left to generate. A
text that loses its place is parked with its part of the KV cache and later continues exactly as it would have. To avoid
needless changes, it gives way only to a text with less than half as many tokens left. So a short request never waits for
long ones to end, and a long one always advances.
"""

import asyncio
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from nanogpt.generate import Engine, Options, Row, Token
from nanogpt.serve.metrics import Metrics
from nanogpt.text.tokenizer import Stream, Tokenizer


class Stopping(Exception):
    """The server is stopping, and the text is not finished."""


class Failed(Exception):
    """The model could not be run."""


@dataclass(frozen=True)
class Part:
    """What a step has added to a text."""

    index: int  # number of the text in its request
    text: str  # what can be shown now
    token: Token | None  # None if the step only ended the text
    start: int  # offset of the token in the text
    finish: str | None  # "stop" or "length" if the text ends here
    end: Token | None = None  # the token that ended the text and is not part of it
    prompt: Sequence[Token] = ()  # the prompt's tokens, with the first Part of a text, if they are to be reported
    mean_logprob: float = 0.0  # of the text so far, if log-probabilities are reported


class Outbox:
    """Parts of a request that were generated and not fetched yet: no more than the max_tokens of its texts."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.parts: deque[Part | Exception] = deque()
        self.ready = asyncio.Event()
        self.awaited = False  # whether a handler waits for `ready`: only then is the loop woken, which is expensive

    def put(self, part: Part | Exception) -> None:
        """Add a Part or an exception, and wake the handler that waits for it. Called by the thread."""
        self.parts.append(part)
        if self.awaited:
            self.awaited = False
            with suppress(RuntimeError):  # the loop has ended, and no handler waits any more
                self.loop.call_soon_threadsafe(self.ready.set)

    async def take(self, deadline: float) -> list[Part]:
        """The Parts since the last call, at least one. An exception is raised once the Parts before it are taken.

        Raises asyncio.TimeoutError when time.monotonic() exceeds `deadline`.
        """
        if time.monotonic() > deadline:
            raise asyncio.TimeoutError
        while not self.parts:
            self.ready.clear()
            self.awaited = True
            if not self.parts:  # none came just before `awaited` was set
                await asyncio.wait_for(self.ready.wait(), deadline - time.monotonic())
        taken = []
        while self.parts and isinstance(part := self.parts[0], Part):
            taken.append(part)
            self.parts.popleft()
        if not taken and isinstance(part, Exception):
            raise part
        return taken


@dataclass(eq=False)
class Job:
    """A prompt and the texts that continue it; the prompt is read once for all of them."""

    ids: list[int]  # of the prompt
    options: Options  # with the seed of the first text; the next one has that seed + 1, and so on
    stops: list[str]
    indices: range  # numbers of the texts in the request
    outbox: Outbox
    cancelled: bool = False


@dataclass(eq=False)
class Text:
    """A text that waits, is being generated, or is parked."""

    job: Job
    index: int
    arrival: int  # number of its request
    stream: Stream
    row: Row | None = None  # once it has begun
    shown: int = 0  # characters

    @property
    def left(self) -> int:
        """The number of tokens that it may still get."""
        return self.job.options.max_new_tokens - (self.row.new if self.row else 0)


class Batcher:
    """The thread and its batch. It computes on `cores` cores."""

    def __init__(
        self, make_engine: Callable[[], Engine], tok: Tokenizer, cores: int = 1, metrics: Metrics | None = None
    ) -> None:
        self.make_engine, self.tok, self.cores, self.metrics = make_engine, tok, cores, metrics or Metrics()
        self.engine = make_engine()
        self.waiting: list[Text] = []  # new and parked
        self.running: dict[Row, Text] = {}
        self.condition = threading.Condition()  # for `waiting`, `arrivals`, `changed` and `stopping`
        self.arrivals = 0  # requests so far
        self.changed = False  # whether texts came or left since places were assigned
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self.thread.start()

    # called by the handlers

    def submit(self, jobs: list[Job]) -> None:
        """Generate the texts of a request. Raises Stopping if the server is stopping."""
        with self.condition:
            if self.stopping:
                raise Stopping
            self.arrivals, self.changed = self.arrivals + 1, True
            for job in jobs:
                self.waiting += [Text(job, i, self.arrivals, Stream(self.tok, job.stops)) for i in job.indices]
            self.condition.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Drop what is left of these jobs. Their places are free after the current step."""
        with self.condition:
            for job in jobs:
                job.cancelled = True
            self.waiting = [text for text in self.waiting if not text.job.cancelled]

    def stop(self) -> None:
        """End all texts, and the thread."""
        with self.condition:
            self.stopping = True
            self.condition.notify()

    # the thread

    def _run(self) -> None:
        torch.set_num_threads(self.cores)
        try:
            while self._wait():
                try:
                    self._advance()
                except Exception:  # of any kind, such as a GPU out of memory; the next texts may succeed
                    traceback.print_exc()
                    self.metrics.failures.inc()
                    fail(self.running.values(), Failed())
                    self.running, self.changed = {}, True
                    del self.engine  # before the next one is made: memory may be short
                    self.engine = self.make_engine()
        finally:
            with self.condition:
                self.stopping = True
                fail([*self.running.values(), *self.waiting], Stopping())
                self.running, self.waiting = {}, []

    def _wait(self) -> bool:
        """Wait until there is something to do. Returns False if the thread should end."""
        with self.condition:
            self.condition.wait_for(lambda: self.waiting or self.running or self.stopping)
            return not self.stopping

    def _advance(self) -> None:
        """Remove cancelled texts, assign the places, and run a step."""
        for row in [row for row, text in self.running.items() if text.job.cancelled]:
            self.engine.remove(row)
            del self.running[row]
            self.changed = True
        if self.changed and self.waiting:
            self._assign_places()
        if self.running:
            tokens = self.engine.step()
            self.metrics.steps.inc()
            self.metrics.tokens.inc(len(tokens))
            for token in tokens:
                self._deliver(token)

    def _assign_places(self) -> None:
        """Give each place to the text that should have it, as described at the top of this file."""
        capacity, half = self.engine.capacity, self.engine.capacity // 2
        with self.condition:
            self.changed = False
            running, waiting = set(self.running.values()), list(self.waiting)
            turns: dict[Text, int] = {}  # how many texts of the same request come before it
            seen: Counter[int] = Counter()
            for text in sorted([*running, *waiting], key=lambda t: (t.arrival, t.index)):
                turns[text] = seen[text.arrival]
                seen[text.arrival] += 1
            by_turn = sorted(turns, key=turns.__getitem__)
            by_length = sorted(by_turn[half:], key=lambda t: t.left / 2 if t in running else t.left)
            chosen = {*by_turn[:half], *by_length[: capacity - half]}
            for row, text in list(self.running.items()):
                if text not in chosen:
                    self.engine.park(row)
                    del self.running[row]
                    self.waiting.append(text)
            together: dict[Row | Job, list[Text]] = {}  # new texts of a job share the reading of its prompt
            for text in waiting:
                if text in chosen:
                    together.setdefault(text.row or text.job, []).append(text)
            for texts in together.values():
                self._enter(texts)

    def _enter(self, texts: list[Text]) -> None:
        """Take a parked text into the batch, or new texts of one job."""
        self.waiting = [text for text in self.waiting if text not in texts]
        first, job = texts[0], texts[0].job
        try:
            if first.row:
                self.engine.resume(first.row)
                rows = [first.row]
            else:
                options = replace(job.options, seed=job.options.seed + first.index - job.indices[0])
                rows = self.engine.add(job.ids, options, len(texts))
                self.metrics.prompt_tokens.inc(len(job.ids))
        except Exception:
            job.outbox.put(Failed())
            raise
        for text, row in zip(texts, rows, strict=True):
            text.row = row
            self.running[row] = text

    def _deliver(self, token: Token) -> None:
        """Put what a token adds to its text into the outbox."""
        text, finish = self.running[token.row], token.finish
        stream, start = text.stream, text.shown + len(text.stream.held)
        new = "" if finish == "stop" else stream.push(token.id)  # a token that ends the text is not part of it
        if stream.stopped:
            finish = "stop"
            self.engine.remove(token.row)
        elif finish:
            new += stream.flush()
        text.shown += len(new)
        if finish:
            del self.running[token.row]
            self.changed = True
        shown, end = (None, token) if token.finish == "stop" else (token, None)
        prompt = token.row.prompt if token.row.new == 1 else ()
        text.job.outbox.put(Part(text.index, new, shown, start, finish, end, prompt, token.row.mean_logprob))


def fail(texts: Iterable[Text], error: Exception) -> None:
    """Report an error to the requests of these texts."""
    for outbox in {text.job.outbox for text in texts}:
        outbox.put(error)
