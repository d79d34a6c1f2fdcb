"""Tasks of `nanogpt eval --tasks`: files in lm-evaluation-harness's formats, and its metrics.

What is scored, from which context, and how it becomes a metric follow lm-evaluation-harness 0.4 (its ConfigurableTask,
TemplateLM and get_rolling_token_windows), without examples in the prompt, so that results are comparable.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nanogpt import evaluate, files
from nanogpt.config import EvalConfig, UserError
from nanogpt.model import GPT
from nanogpt.run.distributed import Dist


class Request(NamedTuple):
    """Token ids, of which the last `n` are to be scored."""

    ids: list[int]
    n: int


@dataclass(frozen=True)
class Question:
    """A query and its choices, of which those numbered `gold` are right."""

    query: str
    choices: list[str]
    gold: list[int]


@dataclass
class MultipleChoice:
    """Questions. Each choice is scored as the continuation of the query, after a space."""

    questions: list[Question]
    lines: list[int]  # their numbers in the file

    def requests(self, number: int, tok: Any, context: int) -> list[Request]:
        """What to score for question `number`. Raises ValueError if the tokenizer cannot encode it."""
        question = self.questions[number]
        return [encode_pair(question.query, f" {choice}", tok) for choice in question.choices]

    def metrics(self, scores: list[list[float]]) -> dict[str, tuple[float, float]]:
        """{metric: (its mean, its standard error)}, from the log-likelihoods of the choices of each question.

        The answer is the likeliest choice: acc by the log-likelihood itself, acc_norm by that per character of the
        choice, and acc_bytes by that per byte in UTF-8.
        """
        lengths: dict[str, Callable[[str], int]] = {
            "acc": lambda choice: 1,
            "acc_norm": len,
            "acc_bytes": lambda choice: len(choice.encode()),
        }
        found = {}
        for name, length in lengths.items():
            right = []
            for question, values in zip(self.questions, scores, strict=True):
                each = np.array(values) / [length(choice) for choice in question.choices]
                right.append(int(each.argmax()) in question.gold)
            n = len(right)
            found[name] = float(np.mean(right)), float(np.std(right, ddof=1) / math.sqrt(n)) if n > 1 else 0.0
        return found

    def line(self, scores: list[list[float]]) -> str:
        """The result in words."""
        found = (f"{name} {mean:.4f} ± {error:.4f}" for name, (mean, error) in self.metrics(scores).items())
        return f"{len(self.questions):,} questions, {', '.join(found)}"


@dataclass
class Perplexity:
    """Texts, each scored as a whole, in windows laid end to end."""

    texts: list[str]
    lines: list[int]  # their numbers in the file

    def requests(self, number: int, tok: Any, context: int) -> list[Request]:
        """What to score for text `number`. Raises ValueError if the tokenizer cannot encode it."""
        ids = tok.encode(self.texts[number])
        return list(rolling_windows(ids if tok.eot is None else [tok.eot, *ids], context))

    def metrics(self, scores: list[list[float]]) -> dict[str, float]:
        """Perplexities per word and byte, and bits per byte, of all texts together."""
        nats = -sum(map(sum, scores))
        words = sum(len(re.split(r"\s+", text)) for text in self.texts)
        size = sum(len(text.encode()) for text in self.texts)
        per_word, per_byte = (math.exp(min(nats / count, 700)) for count in (words, size))
        return dict(word_perplexity=per_word, byte_perplexity=per_byte, bits_per_byte=nats / size / math.log(2))

    def line(self, scores: list[list[float]]) -> str:
        """The result in words."""
        found = (f"{name} {value:.4f}" for name, value in self.metrics(scores).items())
        return f"{len(self.texts):,} texts, {', '.join(found)}"


Task = MultipleChoice | Perplexity


# -- reading


def read_task(cfg: EvalConfig) -> Task:
    """The task in the file that `--tasks` names. Raises UserError, with the number of the first line that is broken."""
    try:
        lines = files.read(cfg.tasks).split(b"\n")
    except OSError as e:
        raise UserError(f"--tasks={cfg.tasks}: cannot be read ({e.strerror})") from None
    rows: list[Question | str] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(read_row(line, cfg.field))
                numbers.append(number)
                if type(rows[-1]) is not type(rows[0]):
                    raise ValueError("questions and texts cannot be mixed in a file")
            except ValueError as e:
                raise UserError(f"--tasks={cfg.tasks}:{number}: {e}") from None
    questions, texts = [r for r in rows if isinstance(r, Question)], [r for r in rows if isinstance(r, str)]
    if not rows:
        raise UserError(f"--tasks={cfg.tasks}: is empty")
    return MultipleChoice(questions, numbers) if questions else Perplexity(texts, numbers)


def read_row(line: bytes, field: str) -> Question | str:
    """What a line of JSON holds. Raises ValueError, which says what is expected."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"is not JSON ({e})") from None
    if not isinstance(row, dict) or not ({"query", "choices", "gold"} <= row.keys() or field in row):
        has = ", ".join(row) if isinstance(row, dict) else json.dumps(row)
        raise ValueError(f"expected an object with query, choices and gold, or with {field}, not {has[:60]}")
    if "choices" not in row:
        if not isinstance(row[field], str) or not row[field]:
            raise ValueError(f"{field}: expected text, not {json.dumps(row[field])[:60]}")
        return row[field]
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not isinstance(query, str):
        raise ValueError(f"query: expected text, not {json.dumps(query)[:60]}")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"choices: expected a list of texts, none of them empty, not {json.dumps(choices)[:60]}")
    right = [choices.index(g) if g in choices else g for g in (gold if isinstance(gold, list) else [gold])]
    if not right or not all(type(g) is int and 0 <= g < len(choices) for g in right):
        raise ValueError(
            f"gold: expected a number from 0 to {len(choices) - 1}, one of the choices, or a list of such, "
            f"not {json.dumps(gold)[:60]}"
        )
    return Question(query, choices, right)


# -- scoring


def encode_pair(query: str, continuation: str, tok: Any) -> Request:
    """The tokens of a query and its continuation, encoded together; spaces at the end of the query belong to the latter.

    An empty query is the token before every document. Raises ValueError if there is none.
    """
    context = query.rstrip()
    continuation = query[len(context) :] + continuation
    if not context:
        if tok.eot is None:
            raise ValueError("query: is empty, and the tokenizer has no end-of-text token to begin with")
        ids = tok.encode(continuation)
        return Request([tok.eot, *ids], len(ids))
    ids = tok.encode(context + continuation)
    return Request(ids, len(ids) - len(tok.encode(context)))


def rolling_windows(ids: list[int], context: int) -> Iterator[Request]:
    """Windows that score each of `ids` but the first once. The last window reaches back as far as the context does."""
    for scored in range(1, len(ids), context):
        end = min(scored + context, len(ids))
        yield Request(ids[max(0, end - context - 1) : end], end - scored)


def all_requests(cfg: EvalConfig, task: Task, tok: Any) -> list[list[Request]]:
    """The requests of each row of the task. Raises UserError if one cannot be scored."""
    found, context = [], int(cfg.block_size)
    for number, line in enumerate(task.lines):
        try:
            found.append(task.requests(number, tok, context))
            longest = max((request.n for request in found[-1]), default=0)
            if longest > context:
                raise ValueError(f"a choice of {longest} tokens does not fit the context of {context}")
        except ValueError as e:
            raise UserError(f"--tasks={cfg.tasks}:{line}: {e}") from None
    return found


def score(model: GPT, requests: Sequence[Request], cfg: EvalConfig, dist: Dist) -> list[float]:
    """The log-likelihood of each request in nats, from a context of at most `block_size` tokens, cut at its beginning."""
    T, B = int(cfg.block_size), cfg.batch_size
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))  # those of a batch have similar lengths
    found = np.zeros(len(requests))
    batches = range(dist.rank * B, len(order), dist.world_size * B)  # of this process
    with evaluate.evaluating(model):
        for first in tqdm(batches, desc="scoring", leave=False, disable=None if dist.is_main else True):
            mine = order[first : first + B]
            x, y = padded([requests[i] for i in mine], T)
            with dist.autocast():
                logits, _ = model(dist.to_device(x), dist.to_device(y))
            found[mine] = -evaluate.window_nats(logits, dist.to_device(y))
    return dist.sum(found.tolist())


def padded(requests: list[Request], T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) of these requests; targets that are not scored are -1. Padding follows, unseen by them."""
    windows = [request.ids[-(T + 1) :] for request in requests]
    shape = len(requests), max(map(len, windows)) - 1
    x, y = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for row, (ids, request) in enumerate(zip(windows, requests, strict=True)):
        x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        y[row, len(ids) - 1 - request.n : len(ids) - 1] = torch.tensor(ids[len(ids) - request.n :])
    return x, y


def evaluate_task(model: GPT, requests: list[list[Request]], task: Task, cfg: EvalConfig, dist: Dist) -> str:
    """Score all requests of the task. Returns the line to print."""
    scores = iter(score(model.to(dist.device), [r for row in requests for r in row], cfg, dist))
    return f"{Path(cfg.tasks).name}: {task.line([[next(scores) for _ in row] for row in requests])}"
