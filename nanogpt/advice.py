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
FREE_EPOCHS = 4  # so often repeated, text is nearly as good as new text (Muennighoff et al. 2023)
MAX_EPOCHS = 40  # so often repeated, it has nothing left to teach (the same)
LEAST = 2, 8  # tokens for each parameter that the repeated text, and the hour, must allow: a larger model is too large
TRIAL = 2.0  # seconds
PATIENCE = 10

SHAPES = [  # from small to large, with what a batch takes
    dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12),
    dict(n_layer=6, n_head=6, n_embd=192, block_size=128, batch_size=16),
    dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64),
    dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=64),
    dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32),
]
BASE = {"cpu": "config/train_shakespeare_cpu.py"}  # the config that a command starts from; on other devices:
BASE_GPU = "config/train_shakespeare_char.py"


def main():
    """Print advice about the dataset that standard input describes, as JSON: see `advise`."""
    try:
        about = json.load(sys.stdin)
        with open("/dev/null" if sys.platform != "win32" else "nul", "w") as nowhere:
            with distributed.setup(TrainConfig(compile=False), out=nowhere) as dist:
                for line in advise(**about, dist=dist):
                    print(line, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, RuntimeError, OSError) as e:  # the dataset is made all the same
        print(f"no advice on how to train: {str(e).splitlines()[0] if str(e) else type(e).__name__}")


def advise(name, vocab_size, train_tokens, val_tokens, memory, trial, dist):
    """Yield lines: what to train on the dataset `name` and how long that takes. `memory`: bytes that a trial may take."""
    runs = [Run(shape, vocab_size, train_tokens, val_tokens) for shape in SHAPES]
    rate, why_not = None, "(--trial=True measures how long it takes)"
    if trial:
        rate, why_not = measure(runs[0], memory, dist)
    run = choose(runs, rate, dist) if rate else runs[0]
    measured, more = measure(run, memory, dist) if rate and run is not runs[0] else (rate, None)
    rate = measured or rate
    if rate:
        run.fit(rate)
    yield (
        f"a model that fits: {run.n_layer} layers, {run.n_head} heads, {run.n_embd} channels, {run.block_size} tokens of "
        f"context: {run.params / 1e6:.2f}M parameters, {train_tokens / run.params:.2g} tokens of text for each"
    )
    speed = ""
    if rate:
        ms = run.seconds(rate, 1) * 1000
        speed = f", {duration(run.seconds(rate, run.max_iters))} on this {dist.device.type} at {ms:.3g} ms each"
    yield (
        f"a run that fits: {run.max_iters:,} iterations of {run.batch:,} tokens, {run.epochs:.1f} times through the text, "
        f"{run.epochs * train_tokens / run.params:.2g} tokens a parameter{speed}; about {run.memory() / 1e9:.1f} GB of memory"
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
        return GPTConfig(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd, bias=False)

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
        return self.epochs > FREE_EPOCHS

    @property
    def dropout(self):
        """None where a model cannot learn the text by heart; more, the larger it is beside the text."""
        if not self.overfits or self.params < self.train_tokens / 2:
            return 0.0
        return 0.1 if self.params < 2 * self.train_tokens else 0.2

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
    model = GPT(run.model_config()).to(dist.device)
    cfg = TrainConfig(n_layer=run.n_layer, n_head=run.n_head, n_embd=run.n_embd, block_size=run.block_size)
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
    return x.numel() * run.flops / statistics.median(times[1:]), None  # the first loads what it needs


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
            "for so much text, char or a smaller bpe:N makes a better model"
            if run.train_tokens < TOKENS_PER_PARAMETER * run.params
            else f"large vocabulary: {run.vocabulary:.0%} of the parameters are its {vocab_size:,} tokens"
        )


def command(name, run, device):
    """The command line to start: a config, and what is another than there."""
    base = BASE.get(device, BASE_GPU)
    here = Path(base).is_file() and Path("train.py").is_file()
    cfg = config.load(TrainConfig, [base] if here else [], "train.py")
    wanted = settings(cfg) | {
        "dataset": name, "out_dir": f"out-{name}", "gradient_accumulation_steps": 1,
        "batch_size": run.batch_size, "block_size": run.block_size,
        "n_layer": run.n_layer, "n_head": run.n_head, "n_embd": run.n_embd,
        "dropout": run.dropout,
        "learning_rate": 1e-3 if run.n_embd < 512 else 6e-4, "beta2": 0.99 if run.n_embd < 512 else 0.95,
        "max_iters": run.max_iters, "lr_decay_iters": run.max_iters, "warmup_iters": min(100, run.max_iters // 10),
        "eval_interval": max(run.max_iters // 20, min(250, run.max_iters)),
        "patience": PATIENCE if run.overfits else 0,
    }  # fmt: skip
    wanted["min_lr"] = wanted["learning_rate"] / 10
    if not here:
        wanted |= {"eval_iters": 20, "log_interval": 10}
    changed = [f"--{k}={v}" for k, v in wanted.items() if v != getattr(cfg, k)]
    return " ".join(["sh train.py", base, *changed] if here else ["nanogpt train", *changed])


def duration(seconds):
    """'about 9 minutes'."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
