"""How big a model and how many steps fit a dataset and this machine, after a moment of training on it.

A process of its own: `nanogpt prepare` runs `main`, and gives back the memory that PyTorch takes.
"""

import json
import math
import os
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanogpt import optim
from nanogpt.config import TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed, settings
from nanogpt.run.device import choose_dtype, prepare_device
from nanogpt.run.speed import duration, synchronize
from nanogpt.step import forward_backward

HOUR = 3600  # seconds that a run may take, so that nobody waits in vain
TOKENS_PER_PARAMETER = 20  # the best use of a given amount of arithmetic (Hoffmann et al. 2022, "Chinchilla")
MAX_EPOCHS = 10  # so often repeated, text has nothing left to teach to a run with Muon; see benchmarks/LOG.md
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


def main():
    """Print advice about the dataset that standard input describes, as JSON: see `advise`. The exit code."""
    try:
        about = json.load(sys.stdin)
        with open("/dev/null" if sys.platform != "win32" else "nul", "w") as nowhere:
            with distributed.setup(TrainConfig(compile=False), out=nowhere) as dist:
                for line in advise(**about, dist=dist):
                    print(line, flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141  # nobody reads any more
    except Exception as e:  # of any kind: the dataset is made all the same
        print(f"no advice on how to train: {str(e).splitlines()[0] if str(e) else type(e).__name__}")


def advise(name, root, vocab_size, train_tokens, val_tokens, memory, trial, dist):
    """Yield lines: what to train on the dataset `name` in `root`, and how long that takes.

    `memory`: bytes that a trial may take.
    """
    runs = [Run(shape, vocab_size, train_tokens, val_tokens) for shape in SHAPES]
    found, why_not = try_out(runs, memory, dist) if trial else (None, "(--trial=True measures how long it takes)")
    run = choose(runs, found.rate if found else UNMEASURED, dist)
    if found:
        run.fit(found.rate)
    yield (
        f"a model that fits: {run.n_layer} layers, {run.n_head} heads, {run.n_embd} channels, {run.block_size} tokens of "
        f"context: {run.params / 1e6:.2f}M parameters, {two_digits(train_tokens / run.params)} tokens of text for each of them"
    )
    speed = ""
    if found:
        whole, each = ([run.seconds(rate, n) for rate in found.rates] for n in (run.max_iters, 1))
        speed = f", {span(*whole, duration)} on this {dist.device.type} at {span(*each, milliseconds)} each"
    yield (
        f"a run that fits: {run.max_iters:,} iterations of {run.batch:,} tokens, {run.epochs:.1f} times through the text, "
        f"{two_digits(run.epochs * train_tokens / run.params)} tokens a parameter{speed}; about {run.memory() / 1e9:.1f} GB of memory"
    )
    if not found:
        yield f"no trial {why_not}"
    yield from warnings(run, vocab_size)
    yield f"next: {command(name, root, run, dist.device.type)}"


class Run:
    """A model and a run of it, fitted to the data and, by `fit`, to the machine."""

    def __init__(self, shape, vocab_size, train_tokens, val_tokens):
        vars(self).update(shape)
        self.block_size = min(self.block_size, val_tokens - 1, train_tokens - 1)
        self.vocab_size = -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size
        with torch.device("meta"):  # counts without memory
            model = GPT(self.model_config())
        self.params, self.flops = model.num_params(), model.flops_per_token()
        self.vocabulary = model.transformer.wte.weight.numel() / self.params  # its part of the parameters
        self.train_tokens, self.batch = train_tokens, self.batch_size * self.block_size
        wanted = min(TOKENS_PER_PARAMETER * self.params, MAX_EPOCHS * train_tokens)
        self.max_iters = rounded(wanted / self.batch)

    def model_config(self):
        shape = dict(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, block_size=self.block_size)
        return GPTConfig(vocab_size=self.vocab_size, architecture=RECIPE["architecture"], **shape)

    def settings(self, device):
        """Those of `train.py` that make it this run, on a device of that type."""
        names = ("batch_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "muon_lr", "learning_rate")
        return RECIPE | {name: getattr(self, name) for name in names} | {
            "gradient_accumulation_steps": 1,
            "muon_momentum": 0.7 if self.max_iters < 500 else 0.9 if self.max_iters < 3000 else 0.95,
            "max_iters": self.max_iters, "lr_decay_iters": self.max_iters, "warmup_iters": min(100, self.max_iters // 50),
            "eval_interval": min(max(self.max_iters // 15, 50), self.max_iters),
            "patience": PATIENCE if self.overfits else 0,
            "dtype": "bfloat16" if device == "cpu" and self.n_embd >= IN_BFLOAT16 else "auto",
        }  # fmt: skip

    def fit(self, rate):
        """Shorten the run to an hour at `rate` FLOP/s."""
        self.max_iters = min(self.max_iters, rounded(HOUR / self.seconds(rate, 1)))

    def work(self, batch_size):
        """Operations in a step, roughly: of forward and backward, and of Muon's Newton-Schulz iterations."""
        return batch_size * self.block_size * self.flops + 30 * self.params * self.n_embd

    def seconds(self, rate, iterations):
        return iterations * self.batch * self.flops / rate

    @property
    def epochs(self):
        return self.max_iters * self.batch / self.train_tokens

    @property
    def overfits(self):
        return self.epochs > MAX_EPOCHS / 2

    @property
    def dropout(self):
        """None where a model cannot learn the text by heart; more, the larger it is beside the text."""
        if not self.overfits or self.params < 2 * self.train_tokens:
            return 0.0
        return 0.1 if self.params < 5 * self.train_tokens else 0.2

    def memory(self, batch_size=None):
        """Bytes that training takes, roughly: weights, gradients, moments; activations; logits and their gradients."""
        tokens = (batch_size or self.batch_size) * self.block_size
        activations = tokens * self.n_layer * (20 * self.n_embd + self.n_head * self.block_size)
        return 16 * self.params + 4 * activations + 12 * tokens * self.vocab_size + 250e6  # and PyTorch itself


def rounded(iterations):
    """A number of iterations with two digits that count, at least 100."""
    iterations = max(iterations, 100)
    unit = 10 ** (int(math.log10(iterations)) - 1)
    return int(iterations // unit * unit)


def choose(runs, rate, dist):
    """The run of the largest model that has enough text, can learn enough in the hour at `rate`, and fits the device."""
    room = torch.cuda.get_device_properties(dist.device).total_memory * 0.8 if dist.device.type == "cuda" else math.inf
    fitting = [
        run
        for run in runs
        if MAX_EPOCHS * run.train_tokens >= LEAST[0] * run.params
        and HOUR * rate / run.flops >= LEAST[1] * run.params
        and run.memory() <= room
    ]
    return fitting[-1] if fitting else runs[0]


@dataclass
class Trial:
    """What a moment of training has shown."""

    rates: tuple  # FLOP/s of a whole iteration: the quartiles of its steps, the fastest first
    each: float  # seconds for an operation of `work`
    build: float  # seconds for a parameter, to make the model

    @property
    def rate(self):
        return self.rates[1]

    def seconds(self, run):
        """How long it takes at least to try another run."""
        return self.build * run.params + 3 * self.each * run.work(1)


def try_out(runs, memory, dist):
    """(the Trial of the run that fits, or of the largest that there is time to try, None); or (None, why there is none).

    Glimpses at the runs from the smallest on show how long the next one may take, and which one is worth the rest of the
    time.
    """
    end, found, last = time.perf_counter() + TRIAL, None, 0
    for n, run in enumerate(runs[: runs.index(choose(runs, math.inf, dist)) + 1]):
        left = end - time.perf_counter()
        if found and found.seconds(run) > left / 2:
            break
        tried, why_not = measure(run, memory, dist, end - left + min(GLIMPSE, left))
        if not tried:
            if not found:
                return None, why_not
            break
        found, last = tried, n
        if choose(runs, found.rate, dist) in runs[:n]:
            break
    run = runs[min(last, runs.index(choose(runs, found.rate, dist)))]
    if found.seconds(run) < end - time.perf_counter():
        found, _ = measure(run, memory, dist, end)
    return found, None


def measure(run, memory, dist, end):
    """(the Trial of a run, which takes until `end` by the clock, None), or (None, why it needs too much memory)."""
    most = run.batch_size
    if dist.device.type == "cpu":
        while most > 1 and run.memory(most) > memory:
            most //= 2
        if run.memory(most) > memory:
            return None, f"was made: it would take {run.memory(most) / 1e6:,.0f} MB, and --memory does not allow it"
    cfg = TrainConfig(**run.settings(dist.device.type))
    before = torch.get_float32_matmul_precision()
    if dist.device.type == "cpu":
        prepare_device(dist.device, choose_dtype(cfg, dist.device, dist.say))
    try:
        return train_a_moment(run, most, cfg, dist, end), None
    finally:
        torch.set_float32_matmul_precision(before)


def train_a_moment(run, most, cfg, dist, end):
    """The Trial of a run, in batches of at most `most` sequences, and of so few that there is time for several."""
    began = time.perf_counter()
    model = GPT(run.model_config()).to(dist.device)
    optimizer = optim.make_optimizer(model, cfg)
    build = (time.perf_counter() - began) / run.params

    def step(size):
        """Seconds of a step: forward and backward, and the update, which a larger batch does not make longer."""
        idx = torch.randint(run.vocab_size, (size, run.block_size + 1), device=dist.device)
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
    whole = sorted(forth * run.batch_size / size + update for forth, update in steps)
    rates = tuple(run.batch * run.flops / whole[int(q * (len(whole) - 1))] for q in (0.25, 0.5, 0.75))
    return Trial(rates, statistics.median(map(sum, steps)) / run.work(size), build)


def warnings(run, vocab_size):
    """Yield what may go wrong with this text."""
    if run.overfits:
        yield (
            f"small data: going through it {run.epochs:.0f} times, a model begins to learn it by heart, and validation loss "
            "rises again; dropout works against that, and --patience ends the run when it has; the best checkpoint is kept"
        )
    if run.vocabulary > 0.5:
        yield (
            f"large vocabulary: {run.vocabulary:.0%} of the parameters are its {vocab_size:,} tokens; "
            "for so much text, fewer tokens (byte, or a smaller bpe:N) may make a better model"
            if run.train_tokens < TOKENS_PER_PARAMETER * run.params
            else f"large vocabulary: {run.vocabulary:.0%} of the parameters are its {vocab_size:,} tokens"
        )


def command(name, root, run, device):
    """The command line to start, as a shell takes it: a config, and what is another than there."""
    base = SMALL if device == "cpu" and run.n_embd < IN_BFLOAT16 else LARGE
    here = Path(base).is_file() and Path("train.py").is_file()
    cfg = settings.load(TrainConfig, [base] if here else [], "train.py")
    wanted = asdict(cfg) | {"dataset": name, "root": root, "out_dir": f"out-{name}"} | run.settings(device)
    if not here:
        wanted |= {"eval_iters": 20, "log_interval": 10}
    if os.path.realpath(root) == os.path.realpath(cfg.root):
        wanted["root"] = cfg.root
    changed = [f"--{k}={v}" for k, v in wanted.items() if v != getattr(cfg, k)]
    return shlex.join(["sh", "train.py", base, *changed] if here else ["nanogpt", "train", *changed])


def two_digits(x):
    """0.32, 3.2, 320."""
    return f"{x:.2g}" if x < 100 else f"{float(f'{x:.2g}'):,.0f}"


def span(fast, median, slow, in_words):
    """A quantity in words; where what was measured varies, from the fast quarter to the slow one."""
    if slow < 1.2 * fast or in_words(fast) == in_words(slow):
        return in_words(median)
    low, unit = in_words(fast).rsplit(" ", 1)
    high = in_words(slow).removeprefix("about ")
    return f"{low} to {high}" if high.endswith(unit) else f"{low} {unit} to {high}"


def milliseconds(seconds):
    """'about 220 ms'."""
    return f"about {two_digits(1000 * seconds)} ms"
