"""Which model learns most in a given time: a scaling law, fitted to small runs.

    python benchmarks/law.py run --dataset=shakespeare_char [--root=data] [--out=law.jsonl] [--seeds=1337]
    python benchmarks/law.py fit law.jsonl [more.jsonl ...]

`run` trains the small models of nanogpt/run/plan.py, and one between them, on different numbers of tokens, with the
settings that `--minutes` would choose, and appends a line of JSON for each to --out; what is there already is not run
again. `fit` prints, for each dataset, the law

    loss = E + A / (parameters / 1e6)^a + B / (tokens / 1e6)^b

(Hoffmann et al. 2022, section 3.3), in which repeated tokens count less and less: D tokens, of which U are different, are
worth U + U R (1 - exp(-(D / U - 1) / R)) (Muennighoff et al. 2023, equation 5). The exponents and R are searched on a
grid, and E, A and B follow by least squares. Then it prints which model the law would take for an amount of arithmetic.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanogpt.run import plan  # noqa: E402
from nanogpt.shape import padded  # noqa: E402
from nanogpt.text.dataset import open_dataset  # noqa: E402

TOKENS = [0.25e6, 0.5e6, 1e6, 2e6, 4e6]  # of the runs
MOST = 1.1e13  # FLOPs of a run, at most
BETWEEN = dict(  # a shape besides those of the plan, with learning rates between theirs
    n_layer=4, n_head=4, n_embd=192, block_size=192, batch_size=16, muon_lr=0.03, learning_rate=7e-3
)
FEW = 200  # iterations; runs with fewer are printed, and not fitted: they learn little a step, whatever the model


def runs(dataset, root):
    """The Plans to run, each with its number of iterations."""
    train, val = (open_dataset(dataset, split, 1, root) for split in ("train", "val"))
    shapes = sorted([*plan.SHAPES[:4], BETWEEN], key=lambda shape: shape["n_embd"])
    for shape, tokens in product(shapes, TOKENS):
        found = plan.Plan(shape, padded(train.vocab_size), len(train.tokens), len(val.tokens))
        found.max_iters = int(tokens / found.batch)
        if found.flops * tokens <= MOST and found.epochs <= plan.MAX_EPOCHS:
            yield found


def train(args):
    """Run what --out lacks."""
    out = Path(args.out)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(d["dataset"], d["n_embd"], d["iterations"], d["seed"]) for d in done}
    for found, seed in product(list(runs(args.dataset, args.root)), args.seeds.split(",")):
        key = args.dataset, found.model.n_embd, found.max_iters, int(seed)
        if key in known:
            continue
        settings = found.settings("cpu") | dict(patience=0, eval_interval=10**6, eval_iters=1, log_interval=10**6)
        settings |= dict(dataset=args.dataset, root=args.root, seed=seed, dtype="float32", compile=False, device="cpu")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", f"--out_dir={folder}", *(f"--{k}={v}" for k, v in settings.items())]
            printed = subprocess.run(
                [*command, *args.more], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        loss = float(re.search(r"exact val loss ([\d.]+)", printed)[1])
        line = dict(
            dataset=args.dataset, n_layer=found.model.n_layer, n_embd=found.model.n_embd, params=found.params,
            flops=found.flops, iterations=found.max_iters, tokens=found.max_iters * found.batch,
            different=found.train_tokens, dropout=found.dropout, seed=int(seed), loss=loss,
        )  # fmt: skip
        with open(out, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def worth(tokens, different, R):
    """How many different tokens are worth as much as these, which are repeated."""
    repeats = np.maximum(tokens / different - 1, 0)
    return np.minimum(tokens, different) + different * R * (1 - np.exp(-repeats / R))


def predict(law, params, tokens, different):
    """The loss by a law (E, A, a, B, b, R)."""
    E, A, a, B, b, R = law
    return E + A * (params / 1e6) ** -a + B * (worth(tokens, different, R) / 1e6) ** -b


def fit(found):
    """(the law that fits best, the root mean square of its errors)."""
    params, tokens, different, loss = (
        np.array([d[k] for d in found], float) for k in ("params", "tokens", "different", "loss")
    )
    best = (np.inf,)
    for a, b, R in product(np.arange(0.1, 1.01, 0.05), np.arange(0.1, 1.21, 0.05), [4, 8, 15, 30, 1e6]):
        rows = np.stack([np.ones_like(loss), (params / 1e6) ** -a, (worth(tokens, different, R) / 1e6) ** -b], axis=1)
        found_here, *_ = np.linalg.lstsq(rows, loss, rcond=None)
        error = float(np.sqrt(np.mean((rows @ found_here - loss) ** 2)))
        if error < best[0] and (found_here >= 0).all():
            best = error, found_here[0], found_here[1], a, found_here[2], b, R
    error, *law = best
    return law, error


def report(paths):
    """Print the laws, how well they fit, and what they would choose."""
    found = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    for dataset in sorted({d["dataset"] for d in found}):
        runs = [d for d in found if d["dataset"] == dataset]
        law, error = fit([d for d in runs if d["iterations"] >= FEW])
        E, A, a, B, b, R = law
        print(
            f"\n{dataset}, {len(runs)} runs: {E:.3f} + {A:.3f} / N^{a:.2f} + {B:.3f} / D^{b:.2f}, R = {R:g}; ", end=""
        )
        print(f"error {error:.4f}\n")
        print("| model | parameters | tokens | epochs | loss | by the law |\n|---|---|---|---|---|---|")
        for d in sorted(runs, key=lambda d: (d["params"], d["tokens"])):
            print(
                f"| {d['n_layer']} x {d['n_embd']} | {d['params'] / 1e6:.2f}M | {d['tokens'] / 1e6:.2f}M | "
                f"{d['tokens'] / d['different']:.1f} | {d['loss']:.4f} | "
                f"{predict(law, d['params'], d['tokens'], d['different']):.4f} |"
            )
        print(
            "\n| TFLOP | best model by the law, tokens a parameter | its loss | the two next to it |\n|---|---|---|---|"
        )
        models = {d["n_embd"]: d for d in runs}.values()
        for tflop in (1, 3, 10, 30, 100):
            losses = []
            for m in models:
                tokens = tflop * 1e12 / m["flops"]
                losses.append((predict(law, m["params"], tokens, m["different"]), tokens / m["params"], m))
            losses.sort(key=lambda found: found[0])
            name = f"{losses[0][2]['n_layer']} x {losses[0][2]['n_embd']}"
            others = ", ".join(f"{m['n_layer']} x {m['n_embd']}: {loss:.4f}" for loss, _, m in losses[1:3])
            print(f"| {tflop} | {name}, {losses[0][1]:.1f} | {losses[0][0]:.4f} | {others} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--dataset", required=True)
    running.add_argument("--root", default="data")
    running.add_argument("--out", default="law.jsonl")
    running.add_argument("--seeds", default="1337")
    running.add_argument("more", nargs="*", help="settings of train.py, such as -- --threads=1")
    fitting = commands.add_parser("fit")
    fitting.add_argument("paths", nargs="+")
    args = parser.parse_args()
    train(args) if args.command == "run" else report(args.paths)


if __name__ == "__main__":
    main()
