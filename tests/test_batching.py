"""The thread that writes for everybody: jobs take their turn, leave when they like, and hear of every failure."""

import asyncio
import time

import pytest
import torch

from nanogpt.batching import Batcher, Failed, Job, Outbox, Stopping
from nanogpt.generate import Engine, Options
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import CharTokenizer


class Slow(Engine):
    """An engine that can be told to wait, or to fail."""

    delay, fail = 0.0, False

    def step(self):
        time.sleep(self.delay)
        if self.fail:
            raise RuntimeError("as the test wants it")
        return super().step()


@pytest.fixture
def batcher():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8))
    made = Batcher(lambda: Slow(model, 4, chunk=4), CharTokenizer("abcd"))
    yield made
    made.stop()
    made.thread.join(timeout=30)
    assert not made.thread.is_alive()


def job(outbox, max_new_tokens=5, n=1, stops=(), first=0):
    return Job([0, 1], Options(max_new_tokens, seed=1), list(stops), range(first, first + n), outbox)


async def texts(outbox, n=1):
    """{index: (text, finish reason)} of n texts, when all have ended."""
    found, ended = {}, {}
    while len(ended) < n:
        for part in await outbox.take(time.monotonic() + 60):
            found[part.index] = found.get(part.index, "") + part.text
            if part.finish:
                ended[part.index] = part.finish
    return {index: (found[index], ended[index]) for index in ended}


def test_more_jobs_than_rows_are_all_done_in_their_turn(batcher):
    async def ask():
        boxes = [Outbox() for _ in range(10)]
        for i, box in enumerate(boxes):
            batcher.submit([job(box, n=1 + i % 4)])
        return [await texts(box, 1 + i % 4) for i, box in enumerate(boxes)]

    found = asyncio.run(ask())
    assert all(reason == "length" and len(text) == 5 for texts in found for text, reason in texts.values())
    assert len({texts[0] for texts in found}) == 1  # the same seed, whoever was beside it
    assert batcher.figures.tokens == 5 * sum(1 + i % 4 for i in range(10)) and batcher.engine.free == 4


def test_who_asks_for_many_texts_is_not_overtaken_for_ever(batcher):
    """First come, first served: small jobs do not take the rows that a large one waits for."""
    batcher.engine.delay = 0.01

    async def ask():
        first, large, small = Outbox(), Outbox(), Outbox()
        batcher.submit([job(first, 20)])
        batcher.submit([job(large, 1, n=4)])
        batcher.submit([job(small, 1)])
        done = [asyncio.create_task(texts(large, 4)), asyncio.create_task(texts(small))]
        await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
        return [task.done() for task in done], await asyncio.gather(*done)

    assert asyncio.run(ask())[0][0]


def test_a_cancelled_job_is_gone_within_a_step(batcher):
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
    assert batcher.figures.tokens < 1000


def test_a_stop_string_frees_the_row(batcher):
    async def ask(stops):
        box = Outbox()
        batcher.submit([job(box, 200, stops=stops)])
        return (await texts(box))[0]

    text, _ = asyncio.run(ask([]))
    stop = text[20:23]
    assert asyncio.run(ask([stop])) == (text[: text.index(stop)], "stop")
    assert batcher.engine.free == 4


def test_what_might_have_become_a_stop_string_is_shown_when_the_text_ends(batcher):
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


def test_a_job_that_cannot_begin_is_told(batcher, capsys):
    async def ask():
        box = Outbox()
        batcher.submit([Job([0, 99], Options(5), [], range(1), box)])
        await box.take(time.monotonic() + 60)

    with pytest.raises(Failed):
        asyncio.run(ask())
    batcher.stop()
    batcher.thread.join()  # it prints after it has told
    assert "outside the vocabulary" in capsys.readouterr().err


def test_a_failure_is_told_to_those_concerned_and_the_next_one_is_served(batcher, capsys):
    async def ask(delay=0.0, fail=False):
        box = Outbox()
        batcher.engine.delay = delay
        batcher.submit([job(box, 1000)])
        await box.take(time.monotonic() + 60)
        batcher.engine.fail = fail
        return await texts(box)

    with pytest.raises(Failed):
        asyncio.run(ask(0.01, fail=True))
    assert "as the test wants it" in capsys.readouterr().err
    assert asyncio.run(ask())[0][1] == "length"
    assert batcher.figures.failures == 1


def test_the_end_is_told_to_all_who_wait(batcher):
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


def test_a_deadline_ends_the_waiting_even_while_text_comes(batcher):
    batcher.engine.delay = 0.01

    async def ask():
        box, deadline = Outbox(), time.monotonic() + 0.3
        batcher.submit([one := job(box, 10**6)])
        with pytest.raises(TimeoutError):
            while True:
                assert await box.take(deadline)
        batcher.cancel([one])
        with pytest.raises(TimeoutError):
            await Outbox().take(time.monotonic() + 0.05)

    asyncio.run(ask())


def test_the_thread_computes_on_the_cores_that_it_was_given():
    seen = []

    class Counting(Slow):
        def step(self):
            seen.append(torch.get_num_threads())
            return super().step()

    async def ask(batcher):
        box = Outbox()
        batcher.submit([job(box)])
        await texts(box)

    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=1, n_embd=8))
    for cores in (2, 1):
        batcher = Batcher(lambda: Counting(model, 4), CharTokenizer("abcd"), cores)
        asyncio.run(ask(batcher))
        batcher.stop()
        batcher.thread.join(timeout=30)
        assert set(seen) == {cores}
        seen.clear()
