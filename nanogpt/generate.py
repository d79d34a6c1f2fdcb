"""Writing with a model: token ids in, token ids out.

`generate` is all that a script needs. `Engine`, under it, writes many texts together, each as if it were alone; they
may come and go at any time. Shapes: B rows (texts), T tokens, S places of a row in the cache, V entries in the
vocabulary, H heads, D channels of a head.
"""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, seed=None, vocab_size=None):
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

    @classmethod
    def of(cls, cfg, **others):
        """The Options that the settings of a program mean."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
        return cls(**{name: getattr(cfg, name) for name in names} | others)

    def candidates(self, V):
        """How many of the likeliest of V tokens `sample` has to find; 1 for the likeliest token, 0 for no limit."""
        if self.temperature == 0 or self.top_k == 1:
            return 1
        if 0 < self.top_k < V:
            return self.top_k
        return V if self.top_p < 1 else 0


def sample(logits, k, temperature, top_p, min_p, uniform):
    """One token id (B) for each row of logits (B, V).

    k: `Options.candidates`. temperature, top_p, min_p: (B, 1) each. uniform: (B, 1), random numbers in [0, 1), of
    which each row has its own: what it gets depends on no other row. The tokens lie side by side on a line, each
    as wide as it is likely, and the one under the point `uniform` of the line is taken.
    """
    if k == 1:
        return logits.argmax(dim=-1)
    logits = logits.float()
    if k:
        logits, ids = logits.topk(k, dim=-1)  # likeliest first: what each limit allows is a beginning of the line
    width = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()  # so that no temperature overflows
    if not k:
        width = width.where(width >= min_p, 0.0)
    ends = width.cumsum(dim=-1, dtype=torch.float64)
    length = ends[:, -1:]
    if k:
        allowed = (ends - width < top_p * length) & (width >= min_p)
        length = ends.gather(-1, allowed.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    choice = torch.searchsorted(ends, uniform * length, right=True).clamp(max=ends.shape[-1] - 1)
    return (ids.gather(-1, choice) if k else choice)[:, 0]


class Token(NamedTuple):
    """A new token of a row."""

    row: "Row"
    id: int
    logprob: float | None  # at temperature 1 and without limits; None if it was not asked for
    likeliest: tuple  # ((id, logprob), ...) of the likeliest tokens that were asked for
    finish: str | None  # "stop" or "length" if the text ends here, which frees the row


@dataclass(eq=False)
class Row:
    """A text that an Engine writes."""

    options: Options
    ids: list  # its tokens so far, from the beginning of the prompt
    random: random.Random
    index: int  # its place in the engine; -1 when it has left
    pending: list = field(default_factory=list)  # tokens that are not in the cache yet
    length: int = 0  # tokens that are
    leader: "Row | None" = None  # the row that encodes the prompt for this one too
    new: int = 0  # tokens written
    parked: tuple = ()  # its keys and values, while it has no place

    @property
    def writes(self):
        """Whether it has begun to write, and its last token alone may be pending."""
        return self.new > 0 and self.length > 0


class Engine:
    """Continues up to `rows` texts as a batch. Not thread-safe; sets the model to eval mode.

    vocab_size: larger ids are never sampled. length: the maximum length of a text in tokens, if it is known, which
    limits the size of the cache. chunk: the maximum number of prompt tokens that a step encodes, so that a long prompt
    does not delay the other rows; None: no limit. fast: the compiled model, for steps of one token. They always read
    the whole cache, so that their shapes do not change.

    A text may become longer than the context. In rotary models (`qwen3`), each token attends to the last block_size
    tokens. Models with learned positions (`gpt2`) encode the second half of the context again when it is full, so that
    a new token attends to between block_size / 2 and block_size tokens. They see the last block_size tokens of a prompt.
    """

    def __init__(self, model, rows, vocab_size=None, length=None, chunk=None, fast=None):
        config = model.config
        self.model, self.vocab_size, self.chunk = model.eval(), vocab_size or config.vocab_size, chunk or 2**62
        self.fast = self.model if fast is None else fast
        self.device = model.transformer.wte.weight.device
        self.context = config.block_size
        self.window = None if model.rotary else max(1, config.block_size // 2)
        self.cache = KVCache(config, rows, min(length or self.context, self.context), model.transformer.wte.weight)
        self.capacity, self.rows = rows, []

    @property
    def free(self):
        """Number of rows that can be added."""
        return self.capacity - len(self.rows)

    def add(self, ids, options, n=1):
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
        if min(len(ids), self.context) + options.max_new_tokens > self.cache.size < self.context:
            raise ValueError(f"{len(ids)} + {options.max_new_tokens} tokens are more than the length given before")
        rows = [Row(options, list(ids), random.Random(options.seed + i), len(self.rows) + i) for i in range(n)]
        rows[0].pending = ids[-self.context :]
        for row in rows[1:]:
            row.leader = rows[0]
        self.rows += rows
        return rows

    def remove(self, row):
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

    def park(self, row):
        """Take a text in any state out of the batch; `resume` continues it."""
        if row.leader:  # nothing of its prompt is encoded yet
            row.leader, row.pending = None, row.ids[-self.context :]
        row.parked = self.cache.take(row.index, min(row.length, self.context))
        self.remove(row)

    def resume(self, row):
        """Put a parked text back into the batch, where it continues unchanged. Raises ValueError if there is no room."""
        if not self.free:
            raise ValueError("there is no room for a parked row")
        row.index = len(self.rows)
        self.rows.append(row)
        self.cache.put(row.index, row.parked)
        row.parked = ()

    @torch.inference_mode()
    def step(self):
        """Encode some of the waiting prompts, then sample. Returns a Token for each row whose prompt is encoded.

        A row whose text ends with its token is removed.
        """
        for row in self.rows:
            if self.window and row.length == self.context:
                row.length, row.pending = 0, row.ids[-self.window :]
        ready, logits = [], []
        rows = [row for row in self.rows if row.writes and len(row.pending) == 1]
        if rows:
            ready += rows
            logits.append(self._run(rows))
        rows, T = self._prompts()
        if rows:
            found = self._run(rows, T)
            for i, row in enumerate(rows):
                if not row.pending:
                    family = [row, *self._share(row)]
                    ready += family
                    logits.append(found[i].expand(len(family), -1))
        tokens = self._choose(ready, torch.cat(logits)) if ready else []
        for row in [token.row for token in reversed(tokens) if token.finish]:
            self.remove(row)
        return tokens

    def _prompts(self):
        """The rows to encode in the next forward pass, which have the same shape, and the number of tokens of each."""
        waiting = [row for row in self.rows if row.pending and not (row.writes and len(row.pending) == 1)]
        if not waiting:
            return [], 0
        T = min(len(waiting[0].pending), self.chunk)
        alike = [r for r in waiting if r.length == waiting[0].length and min(len(r.pending), self.chunk) == T]
        return alike[: max(1, self.chunk // T)], T

    def _run(self, rows, T=None):
        """Encode T pending tokens of each row, or one if T is None. Returns the logits (B, V) of the next token."""
        beside, model, whole = rows, self.model, False
        if T is None:  # rows in between are computed too, so that the cache is read without a copy
            beside, model, whole = self.rows[: rows[-1].index + 1], self.fast, self.fast is not self.model
        idx = torch.tensor([(row.pending or [0])[: T or 1] for row in beside], device=self.device)
        view = KVCacheView(self.cache, [row.index for row in beside], [row.length for row in beside], T or 1, whole)
        logits = model(idx, kv_cache=view)[0][:, -1, : self.vocab_size]
        for row in rows:
            row.length += T or 1
            del row.pending[: T or 1]
        return logits if len(beside) == len(rows) else logits[[row.index for row in rows]]

    def _share(self, leader):
        """Copy the prompt that the leader has encoded to the rows that wait for it. Returns these rows."""
        rows = [row for row in self.rows if row.leader is leader]
        for row in rows:
            self.cache.copy(leader.index, row.index, leader.length)
            row.leader, row.length = None, leader.length
        return rows

    def _choose(self, rows, logits):
        """A Token for each row, from its logits (B, V)."""
        alike = {}  # rows that `sample` treats alike, so that a row's token does not depend on the other rows
        for i, row in enumerate(rows):
            alike.setdefault(row.options.candidates(logits.shape[-1]), []).append(i)
        ids = [0] * len(rows)
        for k, members in alike.items():
            own = [(o.temperature, o.top_p, o.min_p) for o in (rows[i].options for i in members)]
            own = torch.tensor(own, device=self.device).split(1, dim=1)  # (B, 1) each
            uniform = [[rows[i].random.random()] for i in members]
            uniform = torch.tensor(uniform, dtype=torch.float64, device=self.device)
            chosen = sample(logits if len(alike) == 1 else logits[members], k, *own, uniform)
            for i, id in zip(members, chosen.tolist(), strict=True):
                ids[i] = id
        reports = self._logprobs(rows, ids, logits)
        return [self._take(row, ids[i], *reports.get(i, (None, ()))) for i, row in enumerate(rows)]

    def _logprobs(self, rows, ids, logits):
        """{place in rows: (log-probability of its id, ((id, log-probability) of the likeliest, ...))}."""
        asked = [i for i, row in enumerate(rows) if row.options.logprobs is not None]
        if not asked:
            return {}
        logprobs = logits[asked].float().log_softmax(dim=-1)
        values, likeliest = logprobs.topk(min(max(rows[i].options.logprobs for i in asked), logprobs.shape[-1]))
        own = logprobs.gather(-1, torch.tensor([[ids[i]] for i in asked], device=self.device))[:, 0]
        pairs = [tuple(zip(*both, strict=True)) for both in zip(likeliest.tolist(), values.tolist(), strict=True)]
        return {
            i: (logprob, best[: rows[i].options.logprobs])
            for i, logprob, best in zip(asked, own.tolist(), pairs, strict=True)
        }

    def _take(self, row, id, logprob, likeliest):
        """Append a token to a row. Returns the Token."""
        row.ids.append(id)
        row.new += 1
        row.pending = [id]
        finish = "stop" if id in row.options.stop else "length" if row.new == row.options.max_new_tokens else None
        return Token(row, id, logprob, likeliest, finish)


class KVCache:
    """The keys and values of each row's tokens, allocated once: (layers, rows, S, H, D) each."""

    def __init__(self, config, rows, size, like):
        shape = (config.n_layer, rows, size, config.n_head, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.size = size

    def copy(self, source, target, length):
        """Copy the first `length` tokens of row `source` to row `target`."""
        for kept in (self.keys, self.values):
            kept[:, target, :length] = kept[:, source, :length]

    def take(self, row, length):
        """Copies of the keys and values of the first `length` tokens of a row."""
        return tuple(kept[:, row, :length].clone() for kept in (self.keys, self.values))

    def put(self, row, taken):
        """Write keys and values that `take` returned to the beginning of a row."""
        for kept, values in zip((self.keys, self.values), taken, strict=True):
            kept[:, row, : values.shape[1]] = values


class KVCacheView:
    """The rows of a KVCache that one forward pass continues.

    rows: their indices. lengths: the number of tokens in each; all equal if T > 1. T: the number of new tokens per row.
    If a row is longer than the cache, a new token overwrites the oldest. whole: whether to read the whole cache, and
    not only the part that is in use.
    """

    def __init__(self, cache, rows, lengths, T, whole=False):
        device = cache.keys.device
        self.cache, self.first = cache, max(lengths) == 0
        self.positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        self.rows, self.places = torch.tensor(rows, device=device), self.positions % cache.size
        end = cache.size if whole else min(max(lengths) + T, cache.size)
        in_order = rows == list(range(len(rows)))
        self.seen = (slice(len(rows)) if in_order else self.rows, slice(end))  # slices are read without a copy
        self.mask = None  # (B, 1, T, end): the positions that a new token attends to
        if whole or T > 1 or min(lengths) + 1 < end:
            self.mask = (torch.arange(end, device=device) <= self.positions[..., None])[:, None]

    def update(self, layer, k, v):
        """Store the keys and values (B, T, H, D) of new tokens. Returns the (k, v, mask) for `kernels.attention`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (rows, S, H, D)
        at = self.rows[:, None], self.places
        keys[at], values[at] = k, v
        return (k, v, None) if self.first else (keys[self.seen], values[self.seen], self.mask)
