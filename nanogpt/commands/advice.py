"""A model size and a number of iterations that suit a dataset and this machine, after a short trial.

`nanogpt prepare` runs this in a process of its own, so that PyTorch's memory is freed at its end.
"""

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt import optim
from nanogpt.config import TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed, products, settings, start
from nanogpt.run.distributed import Dist
from nanogpt.run.memory import TO_TRAIN, total_memory
from nanogpt.run.speed import duration, synchronize
from nanogpt.step import forward_backward

HOUR = 3600  # seconds that a suggested run may take
TOKENS_PER_PARAMETER = 20  # the best use of a given amount of arithmetic (Hoffmann et al. 2022, "Chinchilla")
MAX_EPOCHS = 10  # with Muon, more repetitions of the text teach nothing; see benchmarks/LOG.md
TRIAL, GLIMPSE = 3.0, 0.4  # seconds for all trials, and for one that only shows whether to try a larger model
STEADY = 6  # steps, at least, for which a trial's batch leaves time
UNMEASURED = 2e11  # FLOP/s assumed without a trial, about those of two cores of a Xeon

# From small to large, with batch sizes and learning rates. The first three were tried (benchmarks/LOG.md); the rates of
# the others follow from them and from what others report.
SHAPES: list[dict[str, Any]] = [
    dict(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=24, muon_lr=0.05, learning_rate=0.03),
    dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, muon_lr=0.03, learning_rate=0.01),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=16, muon_lr=0.03, learning_rate=5e-3),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, muon_lr=0.03, learning_rate=5e-3),
    dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=64, muon_lr=0.02, learning_rate=4e-3),
    dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32, muon_lr=0.02, learning_rate=3e-3),
]
RECIPE: dict[str, Any] = dict(architecture="qwen3", optimizer="muon", lr_schedule="linear", min_lr=0.0, grad_clip=0.0)
SMALL, LARGE = "config/fast_shakespeare_cpu.py", "config/fast_shakespeare_char.py"  # config files of the commands
MINUTES = 256  # channels from which on a model takes minutes, so that it is tried in bfloat16 and compared with LARGE


@dataclass
class About:
    """A dataset, and what a trial may use: what `nanogpt prepare` sends."""

    name: str
    root: str
    vocab_size: int
    train_tokens: int
    val_tokens: int
    memory: float  # bytes
    trial: bool


def main() -> None:
    """Print advice about the dataset that standard input describes, an `About` in JSON."""
    try:
        about = About(**json.load(sys.stdin))
        with open(os.devnull, "w") as nowhere, distributed.setup(TrainConfig(compile=False), out=nowhere) as dist:
            for line in advise(about, dist):
                print(line, flush=True)
    except Exception as e:  # of any kind: the dataset is written already
        print(f"no advice on how to train: {str(e).splitlines()[0] if str(e) else type(e).__name__}")


def advise(about: About, dist: Dist) -> Iterator[str]:
    """Yield lines: a model and a run for the dataset, how long the run takes, and a command that starts it."""
    vocab_size, tokens = start.padded(about.vocab_size, dist), about.train_tokens
    plans = [Plan(shape, vocab_size, tokens, about.val_tokens) for shape in SHAPES]
    found = try_out(plans, about.memory, dist) if about.trial else None
    plan, speed = choose(plans, found.rate if found else UNMEASURED, dist), ""
    if found:
        plan.fit(found.rate)
        whole, each = ([plan.seconds(rate, n) for rate in found.rates] for n in (plan.max_iters, 1))
        speed = f", {span(whole, duration)} on this {dist.device.type} at {span(each, milliseconds)} each"
    model = plan.model
    yield (
        f"a model that fits: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} channels, {model.block_size} tokens "
        f"of context: {plan.params / 1e6:.2f}M parameters, {two_digits(tokens / plan.params)} tokens of text for each of them"
    )
    yield (
        f"a run that fits: {plan.max_iters:,} iterations of {plan.batch:,} tokens, {plan.epochs:.1f} times through the text, "
        f"{two_digits(plan.epochs * tokens / plan.params)} tokens a parameter{speed}; about {plan.memory() / 1e9:.1f} GB of memory"
    )
    if not about.trial:
        yield "no trial (--trial=True measures how long it takes)"
    elif not found:
        least = plans[0].memory(1) / 1e6
        yield f"no trial was made: it would take {least:,.0f} MB, and --memory does not allow it"
    yield from warnings(plan, about.vocab_size)
    yield f"next: {command(about.name, about.root, plan, dist.device.type)}"


class Plan:
    """A model and its training run, chosen to suit the data and, by `fit`, the machine."""

    def __init__(self, shape: dict[str, Any], vocab_size: int, train_tokens: int, val_tokens: int) -> None:
        self.shape = shape | dict(block_size=min(shape["block_size"], val_tokens - 1, train_tokens - 1))
        self.model = GPTConfig(**start.shape(TrainConfig(**RECIPE, **self.shape)), vocab_size=vocab_size)
        with torch.device("meta"):  # counts without memory
            model = GPT(self.model)
        self.params, self.flops = model.num_params(), model.flops_per_token()
        self.in_bfloat16 = False  # whether bfloat16 is faster on this CPU: see `measure`
        self.train_tokens, self.batch_size = train_tokens, shape["batch_size"]
        self.batch = self.batch_size * self.model.block_size  # in tokens
        self.max_iters = rounded(min(TOKENS_PER_PARAMETER * self.params, MAX_EPOCHS * train_tokens) / self.batch)

    def settings(self, device: str) -> dict[str, Any]:
        """The settings with which `train.py` follows this plan on a device of that type."""
        return RECIPE | self.shape | {
            "gradient_accumulation_steps": 1, "dropout": self.dropout,
            "muon_momentum": 0.7 if self.max_iters < 500 else 0.9 if self.max_iters < 3000 else 0.95,
            "max_iters": self.max_iters, "lr_decay_iters": self.max_iters, "warmup_iters": min(100, self.max_iters // 50),
            "eval_interval": min(max(self.max_iters // 15, 50), self.max_iters),
            "patience": 5 if self.overfits else 0,
            "dtype": "bfloat16" if device == "cpu" and self.in_bfloat16 else "auto",
        }  # fmt: skip

    def fit(self, rate: float) -> None:
        """Shorten the run to an hour at `rate` FLOP/s."""
        self.max_iters = min(self.max_iters, rounded(HOUR / self.seconds(rate, 1)))

    def work(self, batch_size: int) -> float:
        """Approximate FLOPs of a step: forward and backward, and Muon's Newton-Schulz iterations."""
        return batch_size * self.model.block_size * self.flops + 30 * self.params * self.model.n_embd

    def seconds(self, rate: float, iterations: int) -> float:
        """The time that this many iterations take at `rate` FLOP/s."""
        return iterations * self.batch * self.flops / rate

    def memory(self, batch_size: int | None = None) -> float:
        """Approximate bytes to train: weights, gradients, moments; activations; logits and their gradients."""
        model, tokens = self.model, (batch_size or self.batch_size) * self.model.block_size
        activations = tokens * model.n_layer * (20 * model.n_embd + model.n_head * model.block_size)
        of_weights = TO_TRAIN[RECIPE["optimizer"]] * self.params
        return of_weights + 4 * activations + 12 * tokens * model.vocab_size + 250e6  # and PyTorch itself

    @property
    def epochs(self) -> float:
        """The number of times that the run reads the training data."""
        return self.max_iters * self.batch / self.train_tokens

    @property
    def overfits(self) -> bool:
        """Whether the data are repeated so often that the model may overfit."""
        return self.epochs > MAX_EPOCHS / 2

    @property
    def dropout(self) -> float:
        """0 unless the model may overfit; more for a larger model."""
        if not self.overfits or self.params < 2 * self.train_tokens:
            return 0.0
        return 0.1 if self.params < 5 * self.train_tokens else 0.2


def rounded(iterations: float) -> int:
    """A number of iterations, rounded down to two significant digits, at least 100."""
    iterations = max(iterations, 100)
    unit = 10 ** (int(math.log10(iterations)) - 1)
    return int(iterations // unit * unit)


def choose(plans: list[Plan], rate: float, dist: Dist) -> Plan:
    """The largest model for which there is enough text, enough time at `rate` FLOP/s, and enough memory on a GPU.

    The repeated text must have a token for each parameter, and an hour must suffice for two.
    """
    room = 0.8 * total_memory(dist.device) if dist.device.type == "cuda" else math.inf
    fitting = [
        plan
        for plan in plans
        if MAX_EPOCHS * plan.train_tokens >= plan.params
        and HOUR * rate / plan.flops >= 2 * plan.params
        and plan.memory() <= room
    ]
    return fitting[-1] if fitting else plans[0]


# -- trials


@dataclass
class Trial:
    """What a short training run has shown."""

    rates: list[float]  # FLOP/s of an iteration: quartiles over steps, the fastest first
    each: float  # seconds for an operation of `Plan.work`
    build: float  # seconds per parameter to make the model

    @property
    def rate(self) -> float:
        """The median FLOP/s."""
        return self.rates[1]

    def seconds(self, plan: Plan) -> float:
        """The shortest time that a trial of another plan takes."""
        return self.build * plan.params + 3 * self.each * plan.work(1)


def try_out(plans: list[Plan], memory: float, dist: Dist) -> Trial | None:
    """The Trial of the plan that fits, or of the largest that there is time for; None if `memory` bytes do not allow any.

    Short trials of the plans, from the smallest on, show how long the next one may take, and which plan is worth the
    rest of the time.
    """
    end, found, last = time.perf_counter() + TRIAL, None, 0
    for n, plan in enumerate(plans[: plans.index(choose(plans, math.inf, dist)) + 1]):
        now = time.perf_counter()
        if dist.device.type == "cpu" and plan.memory(1) > memory or found and found.seconds(plan) > (end - now) / 2:
            break
        found, last = measure(plan, memory, dist, min(now + GLIMPSE, end)), n
        if choose(plans, found.rate, dist) in plans[:n]:
            break
    if found:
        plan = plans[min(last, plans.index(choose(plans, found.rate, dist)))]
        if found.seconds(plan) < end - time.perf_counter():
            found = measure(plan, memory, dist, end)
    return found


def measure(plan: Plan, memory: float, dist: Dist, end: float) -> Trial:
    """The Trial of a plan, which takes until time.perf_counter() is `end` and, on a CPU, `memory` bytes.

    Batches are as large as this allows, and small enough that there is time for several steps.
    """
    most = plan.batch_size
    began = time.perf_counter()
    model = GPT(plan.model).to(dist.device)
    if dist.device.type == "cpu":
        while most > 1 and plan.memory(most) > memory:
            most //= 2
        wanted = TrainConfig(dtype="bfloat16" if plan.model.n_embd >= MINUTES else "auto")
        products.choose_products(model, wanted, dist, plan.batch)
        plan.in_bfloat16 = dist.dtype == torch.bfloat16
    cfg = TrainConfig(**plan.settings(dist.device.type))
    optimizer = optim.make_optimizer(model, cfg)
    build = (time.perf_counter() - began) / plan.params

    def step(size: int) -> tuple[float, float]:
        """Seconds of the forward and backward pass, and of the update, which takes the same time for any batch."""
        idx = torch.randint(plan.model.vocab_size, (size, plan.model.block_size + 1), device=dist.device)
        x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        times = []
        for work in (lambda: None, lambda: forward_backward(model, x, y, dist), optimizer.step):
            work()
            synchronize(dist.device)
            times.append(time.perf_counter())
        optimizer.zero_grad()
        return times[1] - times[0], times[2] - times[1]

    step(1)  # loads what it needs
    size, steps = 1, [step(1)]
    while size < most and 2 * STEADY * sum(steps[-1]) < end - time.perf_counter():
        size = min(2 * size, most)
        step(size)
        steps = [step(size)]
    while sum(steps[-1]) < end - time.perf_counter():
        steps.append(step(size))
    whole = sorted(forth * plan.batch_size / size + update for forth, update in steps)
    rates = [plan.batch * plan.flops / whole[int(q * (len(whole) - 1))] for q in (0.25, 0.5, 0.75)]
    return Trial(rates, statistics.median(map(sum, steps)) / plan.work(size), build)


# -- in words


def warnings(plan: Plan, vocab_size: int) -> Iterator[str]:
    """Yield what may go wrong with this text."""
    if plan.overfits:
        yield (
            f"small data: after reading it {plan.epochs:.0f} times, a model begins to memorize it, and the validation loss "
            "rises again; dropout works against that, --patience then ends the run, and the best checkpoint is kept"
        )
    share = vocab_size * plan.model.n_embd / plan.params
    if share > 0.5:
        fewer = "; for so much text, fewer tokens (byte, or a smaller bpe:N) may make a better model"
        hint = fewer if plan.train_tokens < TOKENS_PER_PARAMETER * plan.params else ""
        yield f"large vocabulary: {share:.0%} of the parameters are its {vocab_size:,} tokens{hint}"


def command(name: str, root: str, plan: Plan, device: str) -> str:
    """The shell command: a config file, and flags for settings that differ from it."""
    base = SMALL if device == "cpu" and plan.model.n_embd < MINUTES else LARGE
    here = Path(base).is_file() and Path("train.py").is_file()
    cfg = settings.load(TrainConfig, [base] if here else [], "train.py")
    wanted = asdict(cfg) | {"dataset": name, "root": root, "out_dir": f"out-{name}"} | plan.settings(device)
    if not here:
        wanted |= {"eval_iters": 20, "log_interval": 10}
    if os.path.realpath(root) == os.path.realpath(cfg.root):
        wanted["root"] = cfg.root
    changed = [f"--{k}={v}" for k, v in wanted.items() if v != getattr(cfg, k)]
    return shlex.join(["sh", "train.py", base, *changed] if here else ["nanogpt", "train", *changed])


def two_digits(x: float) -> str:
    """0.32, 3.2, 320."""
    return f"{x:.2g}" if x < 100 else f"{float(f'{x:.2g}'):,.0f}"


def span(quartiles: Sequence[float], in_words: Callable[[float], str]) -> str:
    """A quantity in words: the median of [fast, median, slow], or a range if the measurements vary."""
    fast, median, slow = quartiles
    if slow < 1.2 * fast or in_words(fast) == in_words(slow):
        return in_words(median)
    low, unit = in_words(fast).rsplit(" ", 1)
    high = in_words(slow).removeprefix("about ")
    return f"{low} to {high}" if high.endswith(unit) else f"{low} {unit} to {high}"


def milliseconds(seconds: float) -> str:
    """'about 220 ms'."""
    return f"about {two_digits(1000 * seconds)} ms"
