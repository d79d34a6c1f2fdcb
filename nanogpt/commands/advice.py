"""A model size and a number of iterations that suit a dataset and this machine, after a short trial.

`nanogpt prepare` runs this in a process of its own, so that PyTorch's memory is freed at its end.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanogpt.config import TrainConfig
from nanogpt.run import distributed, settings
from nanogpt.run.distributed import Dist
from nanogpt.run.plan import MINUTES, SHAPES, TOKENS_PER_PARAMETER, UNMEASURED, Plan, choose, padded, try_out
from nanogpt.run.speed import duration

SMALL, LARGE = "config/fast_shakespeare_cpu.py", "config/fast_shakespeare_char.py"  # config files of the commands


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
    vocab_size, tokens = padded(about.vocab_size, dist), about.train_tokens
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
    door = "sh train.py" if Path("train.py").is_file() else "nanogpt train"
    root = [] if about.root == TrainConfig.root else [f"--root={about.root}"]
    args = [f"--dataset={about.name}", *root, f"--out_dir=out-{about.name}", "--minutes=10"]
    yield f"in the minutes you have: {door} {shlex.join(args)}"
    yield f"next: {command(about.name, about.root, plan, dist.device.type)}"


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
