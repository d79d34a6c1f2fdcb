"""Writing on any device: tokens a second of random weights, for one text and for many, eager and compiled.

    python benchmarks/writing.py [--device=cuda] [--shape='n_layer=24, n_head=16, n_embd=1024']

The model is GPT-2 (124M) unless `--shape` changes it. The first texts of each kind are not counted. Prints a table in
Markdown. benchmarks/sampling.py compares with other programs, on CPUs.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nanogpt  # noqa: E402, F401  (before PyTorch: it says how the threads wait)

# isort: split
import torch  # noqa: E402

from nanogpt.generate import Engine, Options  # noqa: E402
from nanogpt.model import GPT, GPTConfig  # noqa: E402
from nanogpt.run.device import prepare_device  # noqa: E402


def write(model, fast, rows, tokens):
    """Tokens a second."""
    began = time.perf_counter()
    engine = Engine(model, rows, length=1 + tokens, fast=fast)
    engine.add([0], Options(max_new_tokens=tokens, temperature=0.8, top_k=200), n=rows)
    while engine.rows:
        engine.step()  # waits for the device, since it returns the tokens
    return rows * tokens / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="", help="fields of GPTConfig")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a text, at most the context less one")
    parser.add_argument("--compile", choices=("True", "False"), default="True", help="False: eager alone")
    args = parser.parse_args()
    config = GPTConfig(**{name.strip(): int(n) for name, n in (f.split("=") for f in args.shape.split(",") if f)})
    tokens = min(args.tokens, config.block_size - 1)
    device, dtype = torch.device(args.device), torch.float32 if args.device == "cpu" else torch.bfloat16
    prepare_device(device, dtype)
    model = GPT(config).to(device, dtype).eval()
    print(f"{model.num_params() / 1e6:.1f}M parameters in {dtype}, texts of {tokens} tokens; tokens a second\n")
    ways = {"eager": None} | ({"compiled": torch.compile(model)} if args.compile == "True" else {})
    print(f"| texts together | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for rows in (1, 64):
        rates = []
        for fast in ways.values():
            write(model, fast, rows, tokens)
            rates.append(f"{write(model, fast, rows, tokens):,.0f}")
        print(f"| {rows} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
