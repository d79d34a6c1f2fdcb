"""How long until the model is good: two recipes in turn, as whole processes.

    python benchmarks/time_to_loss.py [--target=1.898] [--seeds=1337,1,2] [--new='...'] [--old='...']

Needs data/shakespeare_char prepared, and a quiet machine. A recipe is what follows `train.py` on a command line. The
seconds are those of the whole process: start-up, evaluation and saving included. Prints a table in Markdown;
results/ holds dated ones. With --start it measures how long the first step takes to come instead.
"""

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu import COMMAND, commit, cpu  # which sees to how the threads of PyTorch wait

# isort: split
import torch

ROOT = Path(__file__).resolve().parents[1]
CLASSIC = " ".join(COMMAND) + " --dtype=float32"
FAST = "config/fast_shakespeare_cpu.py"


def train(recipe, *more, env=None, until=None):
    """One run: (seconds in all, exact validation loss), or the seconds until a line begins with `until`."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, "train.py", *shlex.split(recipe), f"--out_dir={out_dir}", *more]
        begin, loss = time.perf_counter(), None
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env) as process:
            for line in process.stdout:
                if until and line.startswith(until):
                    seconds = time.perf_counter() - begin
                    process.communicate()
                    return seconds
                if found := re.match(r"exact val loss ([\d.]+)", line):
                    loss = float(found[1])
        if process.returncode or loss is None:
            sys.exit(f"{' '.join(command)}: ended with exit code {process.returncode}")
        return time.perf_counter() - begin, loss


def compare(old, new, target, seeds):
    """Run both with each seed, in turn, and print a row for each and one of the medians."""
    print(f"old: `train.py {old}`\n\nnew: `train.py {new}`\n\ntarget: an exact validation loss of {target}\n")
    print("| seed | old, s | loss | new, s | loss | times as fast | target met |")
    print("|---|---|---|---|---|---|---|")
    rows, met = [], True
    for seed in seeds:
        rows.append((*train(old, f"--seed={seed}"), *train(new, f"--seed={seed}")))
        met = met and rows[-1][3] <= target
        print_row(seed, *rows[-1], rows[-1][3] <= target)
    print_row("median", *(statistics.median(column) for column in zip(*rows, strict=True)), met)


def print_row(name, old_seconds, old_loss, new_seconds, new_loss, met):
    ratio = old_seconds / new_seconds
    print(
        f"| {name} | {old_seconds:.1f} | {old_loss:.4f} | {new_seconds:.2f} | {new_loss:.4f} | {ratio:.1f} | "
        f"{'yes' if met else 'no'} |",
        flush=True,
    )


def alone(recipe, target, seeds):
    """One recipe only: its time and loss with each seed, and the medians."""
    print(f"`train.py {recipe}`; target: an exact validation loss of {target}\n")
    print("| seed | s | loss | target met |\n|---|---|---|---|")
    rows = []
    for seed in seeds:
        rows.append(train(recipe, f"--seed={seed}"))
        print(
            f"| {seed} | {rows[-1][0]:.1f} | {rows[-1][1]:.4f} | {'yes' if rows[-1][1] <= target else 'no'} |",
            flush=True,
        )
    seconds, losses = zip(*rows, strict=True)
    met = "yes" if max(losses) <= target else "no"
    print(f"| median | {statistics.median(seconds):.1f} | {statistics.median(losses):.4f} | {met} |")


def starts(recipe, repeats=3):
    """Seconds from the start of a process to its first step: eager, compiled with an empty cache, and with a warm one."""
    short = ["--max_iters=1", "--eval_iters=1", "--log_interval=1"]
    print(f"`train.py {recipe}`\n\n| | to the first step, s |\n|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        eager = [train(recipe, *short, "--compile=False", until="iter 1:") for _ in range(repeats)]
        cold = train(recipe, *short, "--compile=True", env=env, until="iter 1:")
        warm = [train(recipe, *short, "--compile=True", env=env, until="iter 1:") for _ in range(repeats)]
    print(f"| eager | {statistics.median(eager):.2f} |\n| compiled, empty cache | {cold:.1f} |")
    print(f"| compiled, warm cache | {statistics.median(warm):.2f} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", default=CLASSIC, help="a recipe; empty: measure the new one alone")
    parser.add_argument("--new", default=FAST)
    parser.add_argument("--target", type=float, default=1.898)
    parser.add_argument("--seeds", default="1337,1,2")
    parser.add_argument("--start", action="store_true", help="measure the time to the first step, of the new one")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    print(f"commit {commit()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {cpu()}\n")
    if args.start:
        starts(args.new)
    elif args.old:
        compare(args.old, args.new, args.target, seeds)
    else:
        alone(args.new, args.target, seeds)


if __name__ == "__main__":
    main()
