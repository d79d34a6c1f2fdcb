"""The classic run on a CPU: how long an iteration takes, and how long it would take at the machine's own rate.

    python benchmarks/cpu.py [--max_iters=2000] [--repeats=3]

Needs data/shakespeare_char prepared. It runs DESIGN's CPU command line as real processes, and between them, in the
same minutes, multiplies matrices of the model's own shapes: the yardstick. Everything else on the machine should
be quiet. Prints a table in Markdown; results/ holds dated ones.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nanogpt  # noqa: E402, F401  (before PyTorch: it says how the threads wait)

# isort: split
import torch  # noqa: E402

from nanogpt.model import GPT, GPTConfig  # noqa: E402
from nanogpt.run.device import prepare_device  # noqa: E402
from nanogpt.run.distributed import Dist  # noqa: E402
from nanogpt.run.speed import products_rate  # noqa: E402

COMMAND = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
SHAPE = dict(block_size=64, n_layer=4, n_head=4, n_embd=128, vocab_size=65, bias=False)
TOKENS = 12 * 64


def yardstick():
    """FLOP/s of one iteration's matrix products alone, forward and backward."""
    return products_rate(GPT(GPTConfig(**SHAPE)), Dist(torch.device("cpu"), torch.float32), TOKENS, repeats=100)


def run(max_iters):
    """One real run: (ms an iteration, exact validation loss, seconds to the first step, seconds in all)."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, "train.py", *COMMAND, f"--max_iters={max_iters}", f"--out_dir={out_dir}"]
        begin, first = time.perf_counter(), None
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if first is None and line.startswith("iter 1:"):
                    first = time.perf_counter() - begin
                if found := re.match(r"exact val loss ([\d.]+)", line):
                    loss = float(found[1])
        seconds = time.perf_counter() - begin
        records = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(r["ms"] for r in records if "ms" in r), loss, first, seconds


def first_step():
    """Seconds from the start of a process to the line of its first step, without the evaluation before it."""
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, "train.py", *COMMAND, "--max_iters=1", "--eval_iters=1", f"--out_dir={out_dir}"]
        begin = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            return next(time.perf_counter() - begin for line in process.stdout if line.startswith("iter 1:"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_iters", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    prepare_device(torch.device("cpu"))
    gflop = GPT(GPTConfig(**SHAPE)).flops_per_token() * TOKENS / 1e9
    print(
        f"commit {commit()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {cpu()}"
    )
    print(f"`python train.py {' '.join(COMMAND)}` with max_iters {args.max_iters}; {gflop:.2f} GFLOP an iteration\n")
    print(
        "| run | matrix products, GFLOP/s | ms an iteration | of that rate | exact val loss | first step, s | process, s |"
    )
    print("|---|---|---|---|---|---|---|")
    rows = []
    for number in range(args.repeats):
        before = yardstick()
        ms, loss, _, seconds = run(args.max_iters)
        rate = (before + yardstick()) / 2
        rows.append((rate / 1e9, ms, gflop / (ms / 1e3) / (rate / 1e9), loss, first_step(), seconds))
        print_row(number + 1, rows[-1])
    print_row("median", [statistics.median(column) for column in zip(*rows, strict=True)])


def print_row(name, row):
    rate, ms, share, loss, first, seconds = row
    print(f"| {name} | {rate:.0f} | {ms:.2f} | {share:.0%} | {loss:.4f} | {first:.2f} | {seconds:.1f} |", flush=True)


def commit():
    """The commit that is measured."""
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def cpu():
    """The processor's name, as far as the system tells it."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
