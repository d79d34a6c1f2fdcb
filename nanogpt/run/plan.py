"""A model and a run that suit a dataset, a machine and a time: for `train.py --minutes`, and as advice on a dataset.

The speed of the machine comes from a short trial.
"""

import io
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt import config, optim
from nanogpt import shape as shapes
from nanogpt.config import TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import products
from nanogpt.run.distributed import Dist
from nanogpt.run.memory import TO_TRAIN, total_memory
from nanogpt.run.speed import synchronize
from nanogpt.step import forward_backward

HOUR = 3600  # seconds that a suggested run may take
TOKENS_PER_PARAMETER = 20  # the best use of a given amount of arithmetic (Hoffmann et al. 2022, "Chinchilla")
MAX_EPOCHS = 10  # with Muon, more repetitions of the text teach nothing; see benchmarks/LOG.md
TRIAL, GLIMPSE = 3.0, 0.4  # seconds for all trials, and for one that only shows whether to try a larger model
UNMEASURED = 2e11  # FLOP/s assumed without a trial, about those of two cores of a Xeon
DOUBT = 3.0  # times the rate that a glimpse finds may be the rate in a run
STEADY = 6  # steps, at least, for which a trial's batch leaves time

# From small to large, with batch sizes and learning rates. The first four were tried (benchmarks/LOG.md); the rates of
# the others follow from them and from what others report.
SHAPES: list[dict[str, Any]] = [
    dict(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=24, muon_lr=0.05, learning_rate=0.03),
    dict(n_layer=3, n_head=3, n_embd=96, block_size=96, batch_size=20, muon_lr=0.04, learning_rate=0.02),
    dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, muon_lr=0.03, learning_rate=0.01),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=16, muon_lr=0.03, learning_rate=5e-3),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, muon_lr=0.03, learning_rate=5e-3),
    dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=64, muon_lr=0.02, learning_rate=4e-3),
    dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32, muon_lr=0.02, learning_rate=3e-3),
]
RECIPE: dict[str, Any] = dict(architecture="qwen3", optimizer="muon", lr_schedule="linear", min_lr=0.0, grad_clip=0.0)
MINUTES = 256  # channels from which on a model takes minutes, so that it is tried in bfloat16 and compared with LARGE


def padded(vocab_size: int, dist: Dist) -> int:
    """`shape.padded`, announced."""
    size = shapes.padded(vocab_size)
    if size != vocab_size:
        dist.say(
            f"vocabulary: {vocab_size} tokens, padded to {size}, because matrix units like multiples of {config.PADDING}"
        )
    return size


class Plan:
    """A model and its training run, chosen to suit the data and, by `fit`, the machine."""

    def __init__(self, shape: dict[str, Any], vocab_size: int, train_tokens: int, val_tokens: int) -> None:
        self.shape = shape | dict(block_size=min(shape["block_size"], val_tokens - 1, train_tokens - 1))
        self.model = GPTConfig(**shapes.shape(TrainConfig(**RECIPE | self.shape)), vocab_size=vocab_size)
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

    def repeat(self, epochs: int) -> None:
        """Lengthen the run to this many times through the text."""
        self.max_iters = max(1, epochs * self.train_tokens // self.batch)

    def fit(self, rate: float, seconds: float = HOUR) -> None:
        """Shorten the run to these seconds at `rate` FLOP/s."""
        self.max_iters = min(self.max_iters, rounded(seconds / self.seconds(rate, 1)))

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
        if self.epochs <= 2 or self.params < 2 * self.train_tokens:
            return 0.0
        return 0.1 if self.params < 5 * self.train_tokens or not self.overfits else 0.2


def rounded(iterations: float) -> int:
    """A number of iterations, rounded down to two significant digits, at least 100."""
    iterations = max(iterations, 100)
    unit = 10 ** (int(math.log10(iterations)) - 1)
    return int(iterations // unit * unit)


def choose(plans: list[Plan], rate: float, dist: Dist, seconds: float = HOUR) -> Plan:
    """The largest model for which there is enough text, enough time at `rate` FLOP/s, and enough memory on a GPU."""
    fitting = [plan for plan in plans if fits(plan, rate, dist, seconds)]
    return fitting[-1] if fitting else plans[0]


def fits(plan: Plan, rate: float, dist: Dist, seconds: float) -> bool:
    """Whether the text, read MAX_EPOCHS times, has a token for each parameter, the seconds suffice for two, and so on."""
    room = 0.8 * total_memory(dist.device) if dist.device.type == "cuda" else math.inf
    return (
        MAX_EPOCHS * plan.train_tokens >= plan.params
        and seconds * rate / plan.flops >= 2 * plan.params
        and plan.memory() <= room
    )


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


def try_out(plans: list[Plan], memory: float, dist: Dist, seconds: float = HOUR) -> Trial | None:
    """The Trial of the plan that fits, or of the largest that there is time for; None if `memory` bytes do not allow any.

    seconds: that the run may take. First come glimpses of the plans, from the smallest on, as far as there may be time
    for one in a run: larger models compute faster, and small batches, which a glimpse has time for, more slowly. Then the
    largest of them is tried for longer, and the one before it if it does not fit after all.
    """
    end = time.perf_counter() + min(TRIAL, seconds / 20)
    tried: list[tuple[Plan, Trial]] = []
    for plan in plans:
        now, found = time.perf_counter(), tried[-1][1] if tried else None
        if found and (found.seconds(plan) > (end - now) / 2 or not fits(plan, DOUBT * found.rate, dist, seconds)):
            break
        if dist.device.type == "cpu" and plan.memory(1) > memory:
            break
        tried.append((plan, measure(plan, memory, dist, min(now + GLIMPSE, end))))
    found = None
    for plan, found in reversed(tried):
        now = time.perf_counter()
        if found.seconds(plan) < end - now:
            last = plan is plans[0]
            found = measure(plan, memory, dist, end if last else now + (end - now) * 2 / 3)
        if fits(plan, found.rate, dist, seconds):
            break
    return found


def measure(plan: Plan, memory: float, dist: Dist, end: float) -> Trial:
    """The Trial of a plan, which takes until time.perf_counter() is `end` and, on a CPU, `memory` bytes.

    Batches are as large as this allows, and small enough that there is time for several steps.
    """
    most = plan.batch_size
    dist = Dist(dist.device, dist.dtype, out=io.StringIO())  # silent, and alone: processes need not try the same
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
        model.zero_grad()
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
