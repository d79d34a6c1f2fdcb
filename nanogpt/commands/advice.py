"""A model size and a number of iterations that suit a dataset and this machine, after a short trial.

A process of its own: `nanogpt prepare` starts it, so that PyTorch's memory is freed when it ends.
"""

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanogpt import optim
from nanogpt.config import TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed, settings
from nanogpt.run.device import choose_dtype, prepare_device
from nanogpt.run.distributed import Dist
from nanogpt.run.memory import total_memory
from nanogpt.run.speed import duration, synchronize
from nanogpt.step import forward_backward

HOUR = 3600  # seconds that a suggested run may take
TOKENS_PER_PARAMETER = 20  # the best use of a given amount of arithmetic (Hoffmann et al. 2022, "Chinchilla")
MAX_EPOCHS = 10  # with Muon, more repetitions of the text teach nothing; see benchmarks/LOG.md
LEAST = 1, 2  # tokens for each parameter that the repeated text, and the hour, must allow: a larger model is too large
TRIAL, GLIMPSE = 3.0, 0.4  # seconds, of all that is tried, and of what only shows whether to try something larger
STEADY = 6  # steps, at least, that a trial's batch leaves time for
UNMEASURED = 2e11  # FLOP/s that a machine is taken for without a trial, about those of two cores of a Xeon
PATIENCE = 5

# From small to large, with what a batch takes, and learning rates. The first three were tried (benchmarks/LOG.md), the
# rates of the others follow from them and from what others report.
SHAPES = [
    dict(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=24, muon_lr=0.05, learning_rate=0.03),
    dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, muon_lr=0.03, learning_rate=0.01),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=16, muon_lr=0.03, learning_rate=5e-3),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, muon_lr=0.03, learning_rate=5e-3),
    dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=64, muon_lr=0.02, learning_rate=4e-3),
    dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32, muon_lr=0.02, learning_rate=3e-3),
]
RECIPE = dict(architecture="qwen3", optimizer="muon", lr_schedule="linear", min_lr=0.0, grad_clip=0.0)
SMALL, LARGE = "config/fast_shakespeare_cpu.py", "config/fast_shakespeare_char.py"  # what a command starts from
IN_BFLOAT16 = 256  # channels from which on a CPU's products are faster in it


def main() -> int | None:
    """Print advice about the dataset that standard input describes, as JSON: see `advise`. Returns the exit code."""
    try:
        about = json.load(sys.stdin)
        with open("/dev/null" if sys.platform != "win32" else "nul", "w") as nowhere:
            with distributed.setup(TrainConfig(compile=False), out=nowhere) as dist:
                for line in advise(**about, dist=dist):
                    print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # its reader has ended
    except Exception as e:  # of any kind: the dataset is there already
        print(f"no advice on how to train: {str(e).splitlines()[0] if str(e) else type(e).__name__}")


def advise(
    name: str, root: str, vocab_size: int, train_tokens: int, val_tokens: int, memory: float, trial: bool, dist: Dist
) -> Iterator[str]:
    """Yield lines: what to train on the dataset `name` in `root`, and how long it takes. A trial uses `memory` bytes."""
    plans = [Plan(shape, vocab_size, train_tokens, val_tokens) for shape in SHAPES]
    found, why_not = try_out(plans, memory, dist) if trial else (None, "(--trial=True measures how long it takes)")
    plan = choose(plans, found.rate if found else UNMEASURED, dist)
    if found:
        plan.fit(found.rate)
    yield (
        f"a model that fits: {plan.n_layer} layers, {plan.n_head} heads, {plan.n_embd} channels, {plan.block_size} tokens of "
        f"context: {plan.params / 1e6:.2f}M parameters, {two_digits(train_tokens / plan.params)} tokens of text for each of them"
    )
    speed = ""
    if found:
        whole, each = ([plan.seconds(rate, n) for rate in found.rates] for n in (plan.max_iters, 1))
        speed = f", {span(*whole, duration)} on this {dist.device.type} at {span(*each, milliseconds)} each"
    yield (
        f"a run that fits: {plan.max_iters:,} iterations of {plan.batch:,} tokens, {plan.epochs:.1f} times through the text, "
        f"{two_digits(plan.epochs * train_tokens / plan.params)} tokens a parameter{speed}; about {plan.memory() / 1e9:.1f} GB of memory"
    )
    if not found:
        yield f"no trial {why_not}"
    yield from warnings(plan, vocab_size)
    yield f"next: {command(name, root, plan, dist.device.type)}"


class Plan:
    """A model and its training run, chosen to suit the data and, by `fit`, the machine."""

    def __init__(self, shape: dict, vocab_size: int, train_tokens: int, val_tokens: int):
        vars(self).update(shape)
        self.block_size = min(self.block_size, val_tokens - 1, train_tokens - 1)
        self.vocab_size = -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size
        with torch.device("meta"):  # counts without memory
            model = GPT(self.model_config())
        self.params, self.flops = model.num_params(), model.flops_per_token()
        self.vocabulary = model.transformer.wte.weight.numel() / self.params  # its share of the parameters
        self.train_tokens, self.batch = train_tokens, self.batch_size * self.block_size
        wanted = min(TOKENS_PER_PARAMETER * self.params, MAX_EPOCHS * train_tokens)
        self.max_iters = rounded(wanted / self.batch)

    def model_config(self) -> GPTConfig:
        """The shape of the model."""
        shape = dict(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, block_size=self.block_size)
        return GPTConfig(vocab_size=self.vocab_size, architecture=RECIPE["architecture"], **shape)

    def settings(self, device: str) -> dict:
        """The settings that make `train.py` follow this plan on a device of that type."""
        names = ("batch_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "muon_lr", "learning_rate")
        return RECIPE | {name: getattr(self, name) for name in names} | {
            "gradient_accumulation_steps": 1,
            "muon_momentum": 0.7 if self.max_iters < 500 else 0.9 if self.max_iters < 3000 else 0.95,
            "max_iters": self.max_iters, "lr_decay_iters": self.max_iters, "warmup_iters": min(100, self.max_iters // 50),
            "eval_interval": min(max(self.max_iters // 15, 50), self.max_iters),
            "patience": PATIENCE if self.overfits else 0,
            "dtype": "bfloat16" if device == "cpu" and self.n_embd >= IN_BFLOAT16 else "auto",
        }  # fmt: skip

    def fit(self, rate: float) -> None:
        """Shorten the run to an hour at `rate` FLOP/s."""
        self.max_iters = min(self.max_iters, rounded(HOUR / self.seconds(rate, 1)))

    def work(self, batch_size: int) -> float:
        """Approximate FLOPs of a step: forward and backward, and Muon's Newton-Schulz iterations."""
        return batch_size * self.block_size * self.flops + 30 * self.params * self.n_embd

    def seconds(self, rate: float, iterations: int) -> float:
        """How long so many iterations take at `rate` FLOP/s."""
        return iterations * self.batch * self.flops / rate

    @property
    def epochs(self) -> float:
        """How often the run reads the training data."""
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

    def memory(self, batch_size: int | None = None) -> float:
        """Approximate bytes to train: weights, gradients, moments; activations; logits and their gradients."""
        tokens = (batch_size or self.batch_size) * self.block_size
        activations = tokens * self.n_layer * (20 * self.n_embd + self.n_head * self.block_size)
        return 16 * self.params + 4 * activations + 12 * tokens * self.vocab_size + 250e6  # and PyTorch itself


def rounded(iterations: float) -> int:
    """A number of iterations, rounded down to two significant digits, at least 100."""
    iterations = max(iterations, 100)
    unit = 10 ** (int(math.log10(iterations)) - 1)
    return int(iterations // unit * unit)


def choose(plans: list[Plan], rate: float, dist: Dist) -> Plan:
    """The largest model for which there is enough text, enough time at `rate` FLOP/s, and enough memory on a GPU."""
    room = 0.8 * total_memory(dist.device) if dist.device.type == "cuda" else math.inf
    fitting = [
        plan
        for plan in plans
        if MAX_EPOCHS * plan.train_tokens >= LEAST[0] * plan.params
        and HOUR * rate / plan.flops >= LEAST[1] * plan.params
        and plan.memory() <= room
    ]
    return fitting[-1] if fitting else plans[0]


@dataclass
class Trial:
    """What a short training run has shown."""

    rates: tuple  # FLOP/s of an iteration: quartiles over steps, the fastest first
    each: float  # seconds for an operation of `work`
    build: float  # seconds for a parameter, to make the model

    @property
    def rate(self) -> float:
        """The median FLOP/s."""
        return self.rates[1]

    def seconds(self, plan: Plan) -> float:
        """The least time that a trial of another plan takes."""
        return self.build * plan.params + 3 * self.each * plan.work(1)


def try_out(plans: list[Plan], memory: float, dist: Dist) -> tuple[Trial | None, str | None]:
    """(the Trial of the plan that fits, or of the largest that there is time to try, None), or (None, the reason).

    Glimpses at the plans from the smallest on show how long the next one may take, and which one is worth the rest of the
    time.
    """
    end, found, last = time.perf_counter() + TRIAL, None, 0
    for n, plan in enumerate(plans[: plans.index(choose(plans, math.inf, dist)) + 1]):
        left = end - time.perf_counter()
        if found and found.seconds(plan) > left / 2:
            break
        tried, why_not = measure(plan, memory, dist, end - left + min(GLIMPSE, left))
        if not tried:
            if not found:
                return None, why_not
            break
        found, last = tried, n
        if choose(plans, found.rate, dist) in plans[:n]:
            break
    plan = plans[min(last, plans.index(choose(plans, found.rate, dist)))]
    if found.seconds(plan) < end - time.perf_counter():
        found, _ = measure(plan, memory, dist, end)
    return found, None


def measure(plan: Plan, memory: float, dist: Dist, end: float) -> tuple[Trial | None, str | None]:
    """(the Trial of a plan, which takes until `end` by the clock, None), or (None, why it needs too much memory)."""
    most = plan.batch_size
    if dist.device.type == "cpu":
        while most > 1 and plan.memory(most) > memory:
            most //= 2
        if plan.memory(most) > memory:
            return None, f"was made: it would take {plan.memory(most) / 1e6:,.0f} MB, and --memory does not allow it"
    cfg = TrainConfig(**plan.settings(dist.device.type))
    before = torch.get_float32_matmul_precision()
    if dist.device.type == "cpu":
        prepare_device(dist.device, choose_dtype(cfg, dist.device, dist.say))
    try:
        return train_briefly(plan, most, cfg, dist, end), None
    finally:
        torch.set_float32_matmul_precision(before)


def train_briefly(plan: Plan, most: int, cfg: TrainConfig, dist: Dist, end: float) -> Trial:
    """The Trial of a plan, in batches of at most `most` sequences, and of so few that there is time for several."""
    began = time.perf_counter()
    model = GPT(plan.model_config()).to(dist.device)
    optimizer = optim.make_optimizer(model, cfg)
    build = (time.perf_counter() - began) / plan.params

    def step(size):
        """Seconds of a step: forward and backward, and the update, which a larger batch does not make longer."""
        idx = torch.randint(plan.vocab_size, (size, plan.block_size + 1), device=dist.device)
        x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        times = []
        for work in (lambda: forward_backward(model, x, y, dist), optimizer.step):
            synchronize(dist.device)
            begin = time.perf_counter()
            work()
            synchronize(dist.device)
            times.append(time.perf_counter() - begin)
        optimizer.zero_grad()
        return times

    step(1)  # loads what it needs
    size, steps = 1, [step(1)]
    while size < most and 2 * STEADY * sum(steps[-1]) < end - time.perf_counter():
        size = min(2 * size, most)
        step(size)
        steps = [step(size)]
    while sum(steps[-1]) < end - time.perf_counter():
        steps.append(step(size))
    whole = sorted(forth * plan.batch_size / size + update for forth, update in steps)
    rates = tuple(plan.batch * plan.flops / whole[int(q * (len(whole) - 1))] for q in (0.25, 0.5, 0.75))
    return Trial(rates, statistics.median(map(sum, steps)) / plan.work(size), build)


def warnings(plan: Plan, vocab_size: int) -> Iterator[str]:
    """Yield what may go wrong with this text."""
    if plan.overfits:
        yield (
            f"small data: going through it {plan.epochs:.0f} times, a model begins to learn it by heart, and validation loss "
            "rises again; dropout works against that, and --patience ends the run when it has; the best checkpoint is kept"
        )
    if plan.vocabulary > 0.5:
        yield (
            f"large vocabulary: {plan.vocabulary:.0%} of the parameters are its {vocab_size:,} tokens; "
            "for so much text, fewer tokens (byte, or a smaller bpe:N) may make a better model"
            if plan.train_tokens < TOKENS_PER_PARAMETER * plan.params
            else f"large vocabulary: {plan.vocabulary:.0%} of the parameters are its {vocab_size:,} tokens"
        )


def command(name: str, root: str, plan: Plan, device: str) -> str:
    """The shell command: a config file, and flags for settings that differ from it."""
    base = SMALL if device == "cpu" and plan.n_embd < IN_BFLOAT16 else LARGE
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


def span(fast: float, median: float, slow: float, in_words: Callable[[float], str]) -> str:
    """A quantity in words; a range, from one quartile to the other, if the measurements vary."""
    if slow < 1.2 * fast or in_words(fast) == in_words(slow):
        return in_words(median)
    low, unit = in_words(fast).rsplit(" ", 1)
    high = in_words(slow).removeprefix("about ")
    return f"{low} to {high}" if high.endswith(unit) else f"{low} {unit} to {high}"


def milliseconds(seconds: float) -> str:
    """'about 220 ms'."""
    return f"about {two_digits(1000 * seconds)} ms"
