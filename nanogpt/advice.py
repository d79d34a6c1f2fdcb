"""How big a model and how many steps fit a dataset and this machine, after a moment of training on it.

A process of its own: `nanogpt prepare` runs `main`, and gives back the memory that PyTorch takes.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from nanogpt import config, distributed, metrics, optim
from nanogpt.config import TrainConfig, UserError, settings
from nanogpt.model import GPT, GPTConfig

HOUR = 3600  # seconds that a run may take, so that nobody waits in vain
TOKENS_PER_PARAMETER = 20  # the best use of a given amount of arithmetic (Hoffmann et al. 2022, "Chinchilla")
MAX_EPOCHS = 10  # so often repeated, text has nothing left to teach to a run with Muon; see benchmarks/LOG.md
LEAST = 1, 2  # tokens for each parameter that the repeated text, and the hour, must allow: a larger model is too large
TRIAL = 2.0  # seconds
UNMEASURED = 2e11  # FLOP/s that a machine is taken for without a trial, about those of two cores of a Xeon
TRIED = 2  # of SHAPES; the first ones are too small to show what the machine can do
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
    except (UserError, RuntimeError, OSError) as e:  # the dataset is made all the same
        print(f"no advice on how to train: {str(e).splitlines()[0] if str(e) else type(e).__name__}")


def advise(name, vocab_size, train_tokens, val_tokens, memory, trial, dist):
    """Yield lines: what to train on the dataset `name` and how long that takes. `memory`: bytes that a trial may take."""
    runs = [Run(shape, vocab_size, train_tokens, val_tokens) for shape in SHAPES]
    rate, why_not = None, "(--trial=True measures how long it takes)"
    if trial:
        rate, why_not = measure(runs[TRIED], memory, dist)
        if not rate:
            rate, why_not = measure(runs[0], memory, dist)
    run = choose(runs, rate or UNMEASURED, dist)
    measured, _ = measure(run, memory, dist) if rate and run is not runs[TRIED] else (rate, None)
    rate = measured or rate
    if rate:
        run.fit(rate)
    yield (
        f"a model that fits: {run.n_layer} layers, {run.n_head} heads, {run.n_embd} channels, {run.block_size} tokens of "
        f"context: {run.params / 1e6:.2f}M parameters, {two_digits(train_tokens / run.params)} tokens of text for each of them"
    )
    speed = ""
    if rate:
        ms = run.seconds(rate, 1) * 1000
        speed = f", {duration(run.seconds(rate, run.max_iters))} on this {dist.device.type} at {ms:.3g} ms each"
    yield (
        f"a run that fits: {run.max_iters:,} iterations of {run.batch:,} tokens, {run.epochs:.1f} times through the text, "
        f"{two_digits(run.epochs * train_tokens / run.params)} tokens a parameter{speed}; about {run.memory() / 1e9:.1f} GB of memory"
    )
    if not rate:
        yield f"no trial {why_not}"
    yield from warnings(run, vocab_size)
    yield f"next: {command(name, run, dist.device.type)}"


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


def measure(run, memory, dist):
    """(FLOP/s of training this model, None), or (None, why it cannot be tried in so much memory)."""
    batch_size = run.batch_size
    if dist.device.type == "cpu":
        while batch_size > 1 and run.memory(batch_size) > memory:
            batch_size //= 2
        if run.memory(batch_size) > memory:
            return (
                None,
                f"was made: it would take {run.memory(batch_size) / 1e6:,.0f} MB, and --memory does not allow it",
            )
    cfg = TrainConfig(**run.settings(dist.device.type))
    before = torch.get_float32_matmul_precision()
    if dist.device.type == "cpu":
        distributed.prepare_device(dist.device, distributed.choose_dtype(cfg, dist.device, dist.say))
    try:
        return train_a_moment(run, batch_size, cfg, dist), None
    finally:
        torch.set_float32_matmul_precision(before)


def train_a_moment(run, batch_size, cfg, dist):
    """FLOP/s of training this model for a moment."""
    model = GPT(run.model_config()).to(dist.device)
    optimizer = optim.make_optimizer(model, cfg)
    idx = torch.randint(run.vocab_size, (batch_size, run.block_size + 1), device=dist.device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    times, end = [], time.perf_counter() + TRIAL
    while len(times) < 5 or time.perf_counter() < end:
        metrics.synchronize(dist.device)
        begin = time.perf_counter()
        with dist.autocast():
            loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics.synchronize(dist.device)
        times.append(time.perf_counter() - begin)
        if times[-1] > TRIAL and len(times) > 1:
            break
    return x.numel() * run.flops / statistics.median(times[1:])  # the first loads what it needs


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


def command(name, run, device):
    """The command line to start: a config, and what is another than there."""
    base = SMALL if device == "cpu" and run.n_embd < IN_BFLOAT16 else LARGE
    here = Path(base).is_file() and Path("train.py").is_file()
    cfg = config.load(TrainConfig, [base] if here else [], "train.py")
    wanted = settings(cfg) | {"dataset": name, "out_dir": f"out-{name}"} | run.settings(device)
    if not here:
        wanted |= {"eval_iters": 20, "log_interval": 10}
    changed = [f"--{k}={v}" for k, v in wanted.items() if v != getattr(cfg, k)]
    return " ".join(["sh train.py", base, *changed] if here else ["nanogpt train", *changed])


def two_digits(x):
    """0.32, 3.2, 320."""
    return f"{x:.2g}" if x < 100 else f"{float(f'{x:.2g}'):,.0f}"


def duration(seconds):
    """'about 9 minutes'."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
