"""Text generation: token ids in, token ids out.

`generate` is all that a script needs. `Engine`, which it uses, generates many texts as a batch, each as it would be
alone; texts can be added and removed at any time. Shapes: B rows (texts), T tokens, S positions of a row in the cache,
V vocabulary, G heads of keys, D channels of a head.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt.model import GPT, GPTConfig


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` new tokens one by one, each (B, 1), that continue `idx` (B, T).

    seed: row i draws from seed + i, whatever the other rows are; None takes one from PyTorch's own generator.
    vocab_size: ids from it on are never chosen, for a model whose vocabulary is padded. The others: see `Options`.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    was_training = model.training
    try:
        engine = Engine(model, len(idx), vocab_size, idx.shape[1] + max_new_tokens)
        for i, ids in enumerate(idx.tolist() if max_new_tokens else ()):
            engine.add(ids, Options(max_new_tokens, temperature, top_k or 0, top_p, min_p, seed + i))
        for _ in range(max_new_tokens):
            ids = [token.id for token in engine.step()]  # rows of one length go in step
            yield torch.tensor(ids, device=idx.device)[:, None]
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Options:
    """How a text is continued, and when it ends."""

    max_new_tokens: int = 16
    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # sample from the k likeliest, exactly k even if several tie (Fan et al. 2018); 0: from all
    top_p: float = 1.0  # among the likeliest that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # among those at least so likely, relative to the likeliest (Nguyen et al. 2024)
    seed: int = 0
    stop: frozenset = frozenset()  # token ids that end the text
    logprobs: int | None = None  # report the log-probabilities of the token and of this many of the likeliest
    prompt_logprobs: bool = False  # report those of the prompt's tokens too, if `logprobs` is given; see `Row.prompt`
    # what `adjust` does to the logits; the defaults leave them as they are
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)

    @classmethod
    def of(cls, cfg: Any, **others: Any) -> "Options":
        """The Options of a program's settings."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
        return cls(**{name: getattr(cfg, name) for name in names} | others)

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes anything."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        return bool(self.logit_bias) or penalties != (1, 0, 0)

    def candidates(self, V: int) -> int:
        """How many of the likeliest of V tokens `sample` has to find; 1 for the likeliest token, 0 for no limit."""
        if self.temperature == 0 or self.top_k == 1:
            return 1
        if 0 < self.top_k < V:
            return self.top_k
        return V if self.top_p < 1 else 0


def adjust(logits: Tensor, options: Options, prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    """The logits (V) of the token after `prompt` and `new`, the tokens generated so far, with penalties and biases.

    First, the repetition penalty (Keskar et al. 2019): of each token that occurs in `prompt` or `new`, a positive logit
    is divided by it, and a negative one multiplied. Then, as OpenAI's API defines them: each token that occurs c > 0
    times in `new` loses c * frequency_penalty + presence_penalty. Last, the logit biases are added.
    """
    V, logits = len(logits), logits.float()

    def count(ids: Sequence[int]) -> Tensor:  # (V)
        return torch.tensor(ids, dtype=torch.long, device=logits.device).bincount(minlength=V)[:V]

    if options.repetition_penalty != 1:
        penalty, seen = options.repetition_penalty, count([*prompt, *new]) > 0
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if options.frequency_penalty or options.presence_penalty:
        c = count(new)
        logits = logits - c * options.frequency_penalty - (c > 0) * options.presence_penalty
    if options.logit_bias:
        ids, biases = zip(*options.logit_bias, strict=True)
        index = torch.tensor(ids, device=logits.device)
        logits = logits.index_add(0, index, torch.tensor(biases, dtype=torch.float32, device=logits.device))
    return logits


def logprobs_of(logits: Tensor, ids: Sequence[int], most: int) -> list[tuple[float, tuple]]:
    """The log-probability of the id of each row of logits (B, V), and ((id, log-probability), ...) of the likeliest."""
    logprobs = logits.float().log_softmax(dim=-1)
    values, likeliest = logprobs.topk(min(most, logprobs.shape[-1]))
    own = logprobs.gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
    pairs = [tuple(zip(*both, strict=True)) for both in zip(likeliest.tolist(), values.tolist(), strict=True)]
    return list(zip(own.tolist(), pairs, strict=True))


def sample(logits: Tensor, k: int, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Sample one token id (B) for each row of logits (B, V) by inverse transform sampling.

    k, `Options.candidates`: 1 takes the likeliest token, 0 samples from all tokens without sorting them, and any other k
    samples from the k likeliest. temperature, top_p, min_p: (B, 1) each. uniform: (B, 1), a random number in [0, 1) of
    each row, so that its token does not depend on the other rows.
    """
    if k == 1:
        return logits.argmax(dim=-1)
    logits = logits.float()
    if k:
        logits, ids = logits.topk(k, dim=-1)  # likeliest first, so that top_p and min_p keep a prefix
    # p divided by the largest p; subtracting the largest logit keeps exp() from overflowing at any temperature
    p = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    if not k:
        p = p.where(p >= min_p, 0.0)
    ends = p.cumsum(dim=-1, dtype=torch.float64)
    total = ends[:, -1:]
    if k:
        kept = (ends - p < top_p * total) & (p >= min_p)  # ends - p: the probability before a token
        total = ends.gather(-1, kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    choice = torch.searchsorted(ends, uniform * total, right=True).clamp(max=ends.shape[-1] - 1)
    return (ids.gather(-1, choice) if k else choice)[:, 0]


class Token(NamedTuple):
    """A new token of a row."""

    row: "Row"
    id: int
    logprob: float | None  # at temperature 1, without limits and penalties; None if it was not asked for
    likeliest: tuple  # ((id, logprob), ...) of the likeliest tokens that were asked for
    finish: str | None  # "stop" or "length" if the text ends here, which frees the row


@dataclass(eq=False)
class Row:
    """A text that an Engine generates."""

    options: Options
    ids: list  # its tokens so far, from the beginning of the prompt
    random: random.Random
    index: int  # its place in the engine; -1 after it was removed
    pending: list = field(default_factory=list)  # tokens that are not in the cache yet
    length: int = 0  # tokens that are
    leader: "Row | None" = None  # the row that encodes the prompt for this one too
    new: int = 0  # tokens written
    parked: tuple = ()  # its keys and values, while it is parked
    prompt: list[Token] = field(default_factory=list)  # with Options.prompt_logprobs; the first one has no logprob
    total_logprob: float = 0.0  # of the tokens written, if Options.logprobs is given

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token written, by which OpenAI's `best_of` chooses."""
        return self.total_logprob / max(self.new, 1)

    @property
    def decodes(self) -> bool:
        """Whether only its newest token is missing in the cache: no prompt or window is being encoded."""
        return self.new > 0 and self.length > 0 and len(self.pending) == 1


class Engine:
    """Continues up to `rows` texts as a batch. Not thread-safe; sets the model to eval mode.

    vocab_size: larger ids are never sampled. length: the maximum length of a text in tokens, if it is known, which
    limits the size of the cache. chunk: the maximum number of prompt tokens that a step encodes, so that a long prompt
    does not delay the other rows; None: no limit. fast: the compiled model, for steps of one token. They always read
    the whole cache, so that their shapes do not change.

    A text may become longer than the context. In rotary models (`qwen3`, `llama`), each token attends to the last block_size
    tokens. Models with learned positions (`gpt2`) encode the second half of the context again when it is full, so that
    a new token attends to between block_size / 2 and block_size tokens. They see the last block_size tokens of a prompt.
    """

    def __init__(
        self,
        model: GPT,
        rows: int,
        vocab_size: int | None = None,
        length: int | None = None,
        chunk: int | None = None,
        fast: Any = None,
    ) -> None:
        config = model.config
        self.model, self.vocab_size, self.chunk = model.eval(), vocab_size or config.vocab_size, chunk or 2**62
        self.fast = self.model if fast is None else fast
        weight: Tensor = model.transformer["wte"].weight  # type: ignore[assignment]
        self.device = weight.device
        self.context = config.block_size
        # tokens that are encoded again when the context is full; rotary models overwrite the oldest instead
        self.window = None if model.rotary else max(1, config.block_size // 2)
        self.cache = KVCache(config, rows, min(length or self.context, self.context), weight)
        self.capacity = rows
        self.rows: list[Row] = []

    @property
    def free(self) -> int:
        """Number of rows that can be added."""
        return self.capacity - len(self.rows)

    def add(self, ids: Sequence[int], options: Options, n: int = 1) -> list[Row]:
        """Add n texts that continue `ids`, which are encoded once. Returns their Rows; row i uses seed + i.

        Raises ValueError if there is no room, the prompt is empty or has unknown ids, or no token is asked for.
        """
        ids = list(ids)
        if not ids or options.max_new_tokens < 1 or not 1 <= n <= self.free:
            raise ValueError(
                f"{n} rows of {options.max_new_tokens} tokens after {len(ids)} do not fit {self.free} rows"
            )
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self.model.config.vocab_size}")
        if options.prompt_logprobs and len(ids) > self.context:
            raise ValueError(
                f"the log-probabilities of {len(ids)} tokens need a context of as many, not {self.context}"
            )
        if min(len(ids), self.context) + options.max_new_tokens > self.cache.size < self.context:
            raise ValueError(f"{len(ids)} + {options.max_new_tokens} tokens are more than the length given before")
        rows = [Row(options, list(ids), random.Random(options.seed + i), len(self.rows) + i) for i in range(n)]
        rows[0].pending = ids[-self.context :]
        for row in rows[1:]:
            row.leader = rows[0]
        self.rows += rows
        return rows

    def remove(self, row: Row) -> None:
        """Remove a text in any state. The other texts are not affected."""
        if row.index < 0:
            return
        heirs = [other for other in self.rows if other.leader is row]
        for heir in heirs:
            heir.leader = heirs[0]
        if heirs:  # the prompt was not encoded yet: another row encodes it from its beginning
            heirs[0].leader, heirs[0].pending = None, heirs[0].ids[-self.context :]
        last = self.rows.pop()
        if last is not row:  # the last row takes its place, so that the rows in use stay contiguous
            self.cache.copy(last.index, row.index, min(last.length, self.context))
            self.rows[row.index], last.index = last, row.index
        row.index = -1

    def park(self, row: Row) -> None:
        """Take a text in any state out of the batch; `resume` continues it."""
        if row.leader:  # nothing of its prompt is encoded yet
            row.leader, row.pending = None, row.ids[-self.context :]
        row.parked = self.cache.take(row.index, min(row.length, self.context))
        self.remove(row)

    def resume(self, row: Row) -> None:
        """Put a parked text back into the batch, where it continues unchanged. Raises ValueError if there is no room."""
        if not self.free:
            raise ValueError("there is no room for a parked row")
        row.index = len(self.rows)
        self.rows.append(row)
        self.cache.put(row.index, row.parked)
        row.parked = ()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Encode some of the waiting prompts, then sample. Returns a Token for each row whose prompt is encoded.

        A row whose text ends with its token is removed.
        """
        for row in self.rows:
            if self.window and row.length == self.context:
                row.length, row.pending = 0, row.ids[-self.window :]
        ready, logits = [], []
        rows = [row for row in self.rows if row.decodes]
        if rows:
            ready += rows
            logits.append(self._run(rows, decode=True))
        rows, T = self._prompts()
        if rows:
            found = self._run(rows, T)
            for i, row in enumerate(rows):
                if not row.pending:
                    family = [row, *self._share(row)]
                    ready += family
                    logits.append(found[i].expand(len(family), -1))
        tokens = self._choose(ready, torch.cat(logits) if len(logits) > 1 else logits[0]) if ready else []
        for row in [token.row for token in reversed(tokens) if token.finish]:  # from the end, so that fewer are moved
            self.remove(row)
        return tokens

    def _prompts(self) -> tuple[list[Row], int]:
        """The rows to encode in the next forward pass, which have the same shape, and the number of tokens of each."""
        waiting = [row for row in self.rows if row.pending and not row.decodes]
        if not waiting:
            return [], 0
        T = min(len(waiting[0].pending), self.chunk)
        alike = [r for r in waiting if r.length == waiting[0].length and min(len(r.pending), self.chunk) == T]
        return alike[: max(1, self.chunk // T)], T

    def _run(self, rows: list[Row], T: int = 1, decode: bool = False) -> Tensor:
        """Encode T pending tokens of each row. Returns the logits (B, V) of the next token.

        decode: whether they are the newest tokens of their rows, for which `fast` is used.
        """
        batch, model = rows, self.model
        if decode:
            # All rows up to the last one, since a contiguous part of the cache is read without a copy. The results of
            # rows in between are not used, and the rows overwrite what they have written to the cache later on.
            batch, model = self.rows[: rows[-1].index + 1], self.fast
        idx = torch.tensor([(row.pending or [0])[:T] for row in batch], device=self.device)
        indices, lengths = [row.index for row in batch], [row.length for row in batch]
        view = KVCacheView(self.cache, indices, lengths, T, whole=model is not self.model)
        scored = [] if decode else [row for row in rows if row.options.prompt_logprobs]
        targets = {"targets": idx} if scored else {}  # with which the model returns the logits of all T positions
        logits = model(idx, **targets, kv_cache=view)[0][..., : self.vocab_size]
        for row in scored:
            self._score(row, logits[batch.index(row)])
        logits = logits[:, -1]
        for row in rows:
            row.length += T
            del row.pending[:T]
        return logits if len(batch) == len(rows) else logits[[row.index for row in rows]]

    def _score(self, row: Row, logits: Tensor) -> None:
        """Append to `row.prompt` the tokens of its prompt that follow the pending ones, whose logits (T, V) these are."""
        if row.new:  # its prompt was reported before; this is a window
            return
        if not row.length:
            row.prompt = [Token(row, row.ids[0], None, (), None)]
        ids = row.ids[row.length + 1 :][: len(logits)]
        if ids:
            found = logprobs_of(logits[: len(ids)], ids, row.options.logprobs or 0)
            row.prompt += [Token(row, id, *report, None) for id, report in zip(ids, found, strict=True)]

    def _share(self, leader: Row) -> list[Row]:
        """Copy the prompt that the leader has encoded to the rows that wait for it. Returns these rows."""
        rows = [row for row in self.rows if row.leader is leader]
        for row in rows:
            self.cache.copy(leader.index, row.index, leader.length)
            row.leader, row.length, row.prompt = None, leader.length, leader.prompt
        return rows

    def _choose(self, rows: list[Row], logits: Tensor) -> list[Token]:
        """A Token for each row, from its logits (B, V)."""
        # rows that `sample` treats alike, so that a row's token does not depend on the other rows
        alike: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(row.options.candidates(logits.shape[-1]), []).append(i)
        adjusted = self._adjust(rows, logits)
        ids = [0] * len(rows)
        for k, members in alike.items():
            limits = [(o.temperature, o.top_p, o.min_p) for o in (rows[i].options for i in members)]
            temperature, top_p, min_p = torch.tensor(limits, device=self.device).split(1, dim=1)  # (B, 1) each
            drawn = [[rows[i].random.random()] for i in members]
            uniform = torch.tensor(drawn, dtype=torch.float64, device=self.device)
            some = adjusted if len(alike) == 1 else adjusted[members]
            chosen = sample(some, k, temperature, top_p, min_p, uniform)
            for i, id in zip(members, chosen.tolist(), strict=True):
                ids[i] = id
        reports = self._logprobs(rows, ids, logits)
        return [self._take(row, ids[i], *reports.get(i, (None, ()))) for i, row in enumerate(rows)]

    def _adjust(self, rows: list[Row], logits: Tensor) -> Tensor:
        """The logits (B, V) with the penalties and biases of each row; the same tensor if there are none."""
        if not any(row.options.adjusts for row in rows):
            return logits
        logits = logits.float().clone()
        for i, row in enumerate(rows):
            if row.options.adjusts:
                begin = len(row.ids) - row.new  # of what was generated
                logits[i] = adjust(logits[i], row.options, row.ids[:begin], row.ids[begin:])
        return logits

    def _logprobs(self, rows: list[Row], ids: list[int], logits: Tensor) -> dict:
        """{place in rows: (log-probability of its id, ((id, log-probability) of the likeliest, ...))}."""
        asked = {i: row.options.logprobs for i, row in enumerate(rows) if row.options.logprobs is not None}
        if not asked:
            return {}
        found = logprobs_of(logits[list(asked)], [ids[i] for i in asked], max(asked.values()))
        return {i: (own, best[:most]) for (i, most), (own, best) in zip(asked.items(), found, strict=True)}

    def _take(self, row: Row, id: int, logprob: float | None, likeliest: tuple) -> Token:
        """Append a token to a row. Returns the Token."""
        row.ids.append(id)
        row.new += 1
        row.total_logprob += logprob or 0.0
        row.pending = [id]
        finish = "stop" if id in row.options.stop else "length" if row.new == row.options.max_new_tokens else None
        return Token(row, id, logprob, likeliest, finish)


def bytes_per_token(config: GPTConfig, like: Tensor) -> int:
    """The memory that a KVCache in the number format of `like` takes for each token of a text."""
    return 2 * config.n_layer * config.kv_heads * config.head_size * like.element_size()


class KVCache:
    """The keys and values of each row's tokens, allocated once: (layers, rows, S, G, D) each."""

    def __init__(self, config: GPTConfig, rows: int, size: int, like: Tensor) -> None:
        shape = (config.n_layer, rows, size, config.kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.size = size

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        for kept in (self.keys, self.values):
            kept[:, target, :length] = kept[:, source, :length]

    def take(self, row: int, length: int) -> tuple:
        """Copies of the keys and values of the first `length` tokens of a row."""
        return tuple(kept[:, row, :length].clone() for kept in (self.keys, self.values))

    def put(self, row: int, taken: tuple) -> None:
        """Write keys and values that `take` returned to the beginning of a row."""
        for kept, values in zip((self.keys, self.values), taken, strict=True):
            kept[:, row, : values.shape[1]] = values


class KVCacheView:
    """The rows of a KVCache that one forward pass continues.

    rows: their indices. lengths: the number of tokens in each; all equal if T > 1. T: the number of new tokens per row.
    If a row is longer than the cache, a new token overwrites the oldest. whole: whether to read the whole cache, and
    not only the part that is in use.
    """

    def __init__(self, cache: KVCache, rows: list[int], lengths: list[int], T: int, whole: bool = False) -> None:
        device = cache.keys.device
        self.cache, self.first = cache, max(lengths) == 0
        self.positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        self.rows, self.places = torch.tensor(rows, device=device), self.positions % cache.size
        end = cache.size if whole else min(max(lengths) + T, cache.size)
        in_order = rows == list(range(len(rows)))
        self.seen = (slice(len(rows)) if in_order else self.rows, slice(end))  # slices are read without a copy
        self.at: tuple = (self.rows[:, None], self.places)  # where the new tokens are written
        start = lengths[0] % cache.size
        if in_order and not whole and lengths == lengths[:1] * len(rows) and start + T <= cache.size:
            self.at = slice(len(rows)), slice(start, start + T)
        # (B, 1, T, end): the positions that a new token attends to; None if it attends to all that are read. In a row
        # longer than the cache, every position is at least `end`, so it attends to the whole cache.
        self.mask = None
        if whole or T > 1 or min(lengths) + 1 < end:
            self.mask = (torch.arange(end, device=device) <= self.positions[..., None])[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values (B, T, G, D) of new tokens. Returns the (k, v, mask) for `kernels.attention`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (rows, S, G, D)
        keys[self.at], values[self.at] = k, v
        return (k, v, None) if self.first else (keys[self.seen], values[self.seen], self.mask)
