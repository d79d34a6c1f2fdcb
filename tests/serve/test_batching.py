"""The batching thread: how texts share places, leave the batch, and are told about failures."""

import asyncio
import threading
import time

import pytest
import torch

from nanogpt.generate import Engine, Options
from nanogpt.model import GPT, GPTConfig
from nanogpt.serve.batching import Batcher, Failed, Job, Outbox, Stopping
from nanogpt.text.tokenizer import CharTokenizer


class Slow(Engine):
    """An engine that can be told to wait, or to fail."""

    delay, fail, gate = 0.0, False, None

    def step(self):
        if self.gate:
            self.gate.wait(60)
        time.sleep(self.delay)
        if self.fail:
            raise RuntimeError("as the test wants it")
        return super().step()


def small_model(**shape):
    """A model with large weights, so that its output depends on all of the context."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=2, n_head=2, n_embd=16, bias=False, **shape))
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(std=0.4)
    return model


@pytest.fixture
def batcher():
    made = Batcher(lambda: Slow(small_model(), 4, chunk=4), CharTokenizer("abcd"))
    yield made
    made.stop()
    made.thread.join(timeout=30)
    assert not made.thread.is_alive()


def job(outbox, max_new_tokens=5, n=1, stops=(), first=0):
    return Job([0, 1], Options(max_new_tokens, seed=1), list(stops), range(first, first + n), outbox)


def counted(batcher, name):
    """The value of a metric."""
    return batcher.metrics.registry.get_sample_value(f"nanogpt_{name}")


async def texts(outbox, n=1):
    """{index: (text, finish reason)} of n texts, when all have ended."""
    found, ended = {}, {}
    while len(ended) < n:
        for part in await outbox.take(time.monotonic() + 60):
            found[part.index] = found.get(part.index, "") + part.text
            if part.finish:
                ended[part.index] = part.finish
    return {index: (found[index], ended[index]) for index in ended}


def test_more_texts_than_places_are_all_generated(batcher):
    async def ask():
        boxes = [Outbox() for _ in range(10)]
        for i, box in enumerate(boxes):
            batcher.submit([job(box, n=1 + i % 4)])
        return [await texts(box, 1 + i % 4) for i, box in enumerate(boxes)]

    found = asyncio.run(ask())
    assert all(reason == "length" and len(text) == 5 for texts in found for text, reason in texts.values())
    assert len({texts[0] for texts in found}) == 1  # the same seed, whoever was beside it
    assert counted(batcher, "tokens_total") == 5 * sum(1 + i % 4 for i in range(10)) and batcher.engine.free == 4


class Noting(Outbox):
    """An outbox that adds its name to a list when one of its texts ends."""

    def __init__(self, name, ended):
        super().__init__()
        self.name, self.ended = name, ended

    def put(self, part):
        if part.finish:
            self.ended.append(self.name)
        super().put(part)


def test_short_texts_do_not_wait_for_long_ones_to_end(batcher):
    """All places are taken, more long texts of one or several requests wait, and a short request comes last."""
    batcher.engine.gate, ended = threading.Event(), []

    async def ask():
        many, few = Noting("long", ended), Noting("short", ended)
        batcher.submit([job(many, 60, n=2, first=2 * i) for i in range(4)])
        for i in range(8, 12):
            batcher.submit([job(many, 60, first=i)])
        batcher.submit([job(few, 10)])
        batcher.engine.gate.set()
        return await asyncio.gather(texts(many, 12), texts(few))

    long, short = asyncio.run(ask())
    assert ended == ["short"] + ["long"] * 12
    assert len({text for text, _ in long.values()}) == 2  # each text of a prompt has its own seed, and nothing else
    assert short[0][0] == long[0][0][:10]


@pytest.mark.parametrize("places", [2, 4])
def test_long_texts_advance_while_short_ones_keep_coming(places):
    """Eight short texts always wait, but the long request ends, because half of the places go in order of arrival."""

    async def ask(batcher):
        long, short = Outbox(), Outbox()
        batcher.submit([job(long, 30, n=places)])
        for i in range(8):
            batcher.submit([job(short, 2, first=i)])
        waiting, shorts = asyncio.create_task(texts(long, places)), 0
        while not waiting.done():
            for part in await short.take(time.monotonic() + 60):
                if part.finish:
                    shorts += 1
                    batcher.submit([job(short, 2)])
            assert shorts < 1000
        return await waiting

    batcher = Batcher(lambda: Slow(small_model(), places), CharTokenizer("abcd"))
    try:
        assert {reason for _, reason in asyncio.run(ask(batcher)).values()} == {"length"}
    finally:
        batcher.stop()
        batcher.thread.join(timeout=30)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_parked_texts_are_the_same_as_if_generated_alone(architecture):
    """The texts are longer than the context, which requires that their part of the cache is restored exactly."""
    model = small_model(architecture=architecture)

    async def ask(batcher, asked):
        boxes = [Outbox() for _ in asked]
        jobs = [
            Job(ids, Options(tokens, seed=seed), [], range(1), box)
            for box, (ids, tokens, seed) in zip(boxes, asked, strict=True)
        ]
        batcher.engine.later = [(batcher, job) for job in jobs[1:]]
        batcher.submit(jobs[:1])
        return [(await texts(box))[0] for box in boxes]

    asked = [([i % 4] * (1 + 5 * i), tokens, i) for i, tokens in enumerate((90, 80, 70, 30, 25, 12, 10, 5, 4, 2, 1))]
    batcher = Batcher(lambda: Counting(model, 3, chunk=4), CharTokenizer("abcd"))
    try:
        alone = [asyncio.run(ask(batcher, [one]))[0] for one in asked]
        assert batcher.engine.parkings == 0
        assert asyncio.run(ask(batcher, asked)) == alone
        assert batcher.engine.parkings > 3
    finally:
        batcher.stop()
        batcher.thread.join(timeout=30)


class Counting(Slow):
    """An engine that submits the next job in every third step."""

    parkings, steps, later = 0, 0, ()

    def step(self):
        self.steps += 1
        if self.later and self.steps % 3 == 0:
            batcher, job = self.later.pop(0)
            batcher.submit([job])
        return super().step()

    def park(self, row):
        self.parkings += 1
        super().park(row)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_row_can_be_parked_in_any_state(architecture):
    """With a prompt not read, read in part, or read by another row; at the end of the context and beyond."""
    model = small_model(architecture=architecture)

    def write(parked, step=None):
        engine, found = Engine(model, 4, chunk=2), {}
        rows = engine.add([0, 1, 2, 3, 0], Options(20, seed=1), 2) + engine.add([1], Options(20, seed=3))
        for i in range(60):
            if i == step and rows[parked].index >= 0:
                engine.park(rows[parked])
                engine.add([2], Options(3))  # which takes its place
            if i == (step or 0) + 5 and parked is not None and rows[parked].parked:
                engine.resume(rows[parked])
            for token in engine.step() if engine.rows else ():
                found.setdefault(token.row, []).append(token.id)
        return [found[row] for row in rows]

    alone = write(None)
    assert [len(ids) for ids in alone] == [20, 20, 20]
    for parked in range(3):
        for step in (0, 1, 2, 3, 4, 7, 8, 9, 13):
            assert write(parked, step) == alone


def test_a_cancelled_job_ends_after_the_current_step(batcher):
    batcher.engine.delay = 0.01

    async def ask():
        gone, stays, waits = Outbox(), Outbox(), Outbox()
        jobs = [job(gone, 10**6, n=3), job(stays, 50), job(waits, 10**6)]
        batcher.submit(jobs)
        await gone.take(time.monotonic() + 60)
        batcher.cancel(jobs[:1] + jobs[2:])
        return await texts(stays)

    assert asyncio.run(ask())[0][1] == "length"
    assert not batcher.waiting and not batcher.running and batcher.engine.free == 4
    assert counted(batcher, "tokens_total") < 1000


def test_a_stop_string_frees_the_row(batcher):
    async def ask(stops):
        box = Outbox()
        batcher.submit([job(box, 200, stops=stops)])
        return (await texts(box))[0]

    text, _ = asyncio.run(ask([]))
    stop = text[20:23]
    assert asyncio.run(ask([stop])) == (text[: text.index(stop)], "stop")
    assert batcher.engine.free == 4


def test_the_held_beginning_of_a_stop_string_is_shown_when_the_text_ends(batcher):
    async def ask(stops=(), end=frozenset()):
        box, parts = Outbox(), []
        batcher.submit([Job([0, 1], Options(20, seed=1, stop=end), list(stops), range(1), box)])
        while not parts or not parts[-1].finish:
            parts += await box.take(time.monotonic() + 60)
        return "".join(part.text for part in parts), parts[-1].finish, [part.start for part in parts if part.token]

    text, _, starts = asyncio.run(ask())
    assert starts == list(range(20))
    assert asyncio.run(ask([text[-1] + "?"])) == (text, "length", starts)
    last = next(i for i in range(2, 20) if text[i] not in text[:i])  # a token that ends the text
    expected = text[:last], "stop", starts[:last]
    assert asyncio.run(ask([text[last - 1] + "?"], frozenset(["abcd".index(text[last])]))) == expected


def test_a_job_that_cannot_begin_gets_failed(batcher, capsys):
    async def ask():
        box = Outbox()
        batcher.submit([Job([0, 99], Options(5), [], range(1), box)])
        await box.take(time.monotonic() + 60)

    with pytest.raises(Failed):
        asyncio.run(ask())
    batcher.stop()
    batcher.thread.join()  # it prints after it has told
    assert "outside the vocabulary" in capsys.readouterr().err


def test_a_failure_is_reported_and_later_jobs_succeed(batcher, capsys):
    async def ask(delay=0.0, fail=False):
        box = Outbox()
        while not hasattr(batcher, "engine"):  # the next one is being made
            await asyncio.sleep(0.01)
        batcher.engine.delay = delay
        batcher.submit([job(box, 1000)])
        await box.take(time.monotonic() + 60)
        batcher.engine.fail = fail
        return await texts(box)

    with pytest.raises(Failed):
        asyncio.run(ask(0.01, fail=True))
    assert "as the test wants it" in capsys.readouterr().err
    assert asyncio.run(ask())[0][1] == "length"
    assert counted(batcher, "failures_total") == 1


def test_stopping_is_reported_to_all_that_wait(batcher):
    batcher.engine.delay = 0.01

    async def ask():
        boxes = [Outbox() for _ in range(6)]
        for box in boxes:
            batcher.submit([job(box, 10**6)])
        await boxes[0].take(time.monotonic() + 60)
        batcher.stop()
        for box in boxes:
            with pytest.raises(Stopping):
                await texts(box)
        with pytest.raises(Stopping):
            batcher.submit([job(boxes[0])])

    asyncio.run(ask())


def test_take_raises_after_the_deadline_even_while_text_arrives(batcher):
    batcher.engine.delay = 0.01

    async def ask():
        box, deadline = Outbox(), time.monotonic() + 0.3
        batcher.submit([one := job(box, 10**6)])
        with pytest.raises(asyncio.TimeoutError):
            while True:
                assert await box.take(deadline)
        batcher.cancel([one])
        with pytest.raises(asyncio.TimeoutError):
            await Outbox().take(time.monotonic() + 0.05)

    asyncio.run(ask())


def test_the_thread_uses_the_given_number_of_cores():
    seen = []

    class Seeing(Slow):
        def step(self):
            seen.append(torch.get_num_threads())
            return super().step()

    async def ask(batcher):
        box = Outbox()
        batcher.submit([job(box)])
        await texts(box)

    model = small_model()
    for cores in (2, 1):
        batcher = Batcher(lambda: Seeing(model, 4), CharTokenizer("abcd"), cores)
        asyncio.run(ask(batcher))
        batcher.stop()
        batcher.thread.join(timeout=30)
        assert set(seen) == {cores}
        seen.clear()
