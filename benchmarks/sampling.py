"""Writing on a CPU: tokens a second with the cache, without it as the original does, and in Hugging Face's `generate`.

    python benchmarks/sampling.py [--repeats=5] [--quick]

Random weights of three sizes; the contenders take turns, in the same minutes and on the same weights, and the table
holds medians. Hugging Face's GPT-2 ends with its context, so it writes no more than that. The yardstick of the
largest model is how fast this machine reads memory, because each token reads every weight once. Everything else on
the machine should be quiet. Needs transformers. Prints tables in Markdown; results/ holds dated ones.
"""

import argparse
import os
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

from nanogpt import packed, quantize  # noqa: E402
from nanogpt.formats import hugging_face as hf  # noqa: E402
from nanogpt.generate import Engine, Options  # noqa: E402
from nanogpt.model import GPT, GPTConfig  # noqa: E402
from nanogpt.run import checkpoint  # noqa: E402
from nanogpt.run.device import prepare_device  # noqa: E402
from nanogpt.text.tokenizer import CharTokenizer  # noqa: E402

CHARS = CharTokenizer(["\n", *(chr(32 + i) for i in range(64))])
SMALL = dict(block_size=64, n_layer=4, n_head=4, n_embd=128, vocab_size=65, bias=False)  # 0.8 M
MIDDLE = dict(block_size=256, n_layer=6, n_head=6, n_embd=384, vocab_size=65, bias=False)  # 10 M
LARGE = dict(block_size=1024, n_layer=12, n_head=12, n_embd=768, vocab_size=50257, bias=True)  # 124 M
CHOICE = dict(temperature=0.8, top_k=200)


class Gpt2Size:
    """In the place of a tokenizer with GPT-2's vocabulary, which nothing here reads or writes."""

    vocab_size, eot = 50257, None


@torch.no_grad()
def uncached(model, rows, n):
    """As the original: one text after the other, the whole context again for every token."""
    for _ in range(rows):
        idx = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(n):
            logits = model(idx[:, -model.config.block_size :])[0][:, -1] / CHOICE["temperature"]
            least = logits.topk(min(CHOICE["top_k"], logits.shape[-1]))[0][:, -1:]
            logits[logits < least] = -torch.inf
            idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], dim=1)


def cached(model, rows, n):
    """All texts together, with the cache."""
    engine = Engine(model, rows, length=1 + n)
    engine.add([0], Options(max_new_tokens=n, **CHOICE), n=rows)
    while engine.rows:
        engine.step()


def theirs(model, rows, n):
    """The same with Hugging Face's `generate` and its cache."""
    idx = torch.zeros(rows, 1, dtype=torch.int64)
    options = dict(do_sample=True, eos_token_id=None, pad_token_id=0, **CHOICE)
    model.generate(idx, attention_mask=torch.ones_like(idx), min_new_tokens=n, max_new_tokens=n, **options)


def hugging_face(model, tok):
    """The same weights as transformers' model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        hf.to_hugging_face(model, tok, Path(folder) / "hf")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").eval()


def rate(write, model, rows, n):
    """Tokens a second."""
    began = time.perf_counter()
    write(model, rows, n)
    return rows * n / (time.perf_counter() - began)


def in_turns(contenders, repeats):
    """{name: the median of what each function returns}, the first round not counted."""
    rounds = [{name: run() for name, run in contenders.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(r[name] for r in rounds) for name in contenders}


def bandwidth(buffer):
    """Bytes a second at which all threads read `buffer`, which is larger than the caches, in the faster of two ways."""
    rows = buffer.view(-1, 4096)
    vector = torch.ones(4096)
    times = []
    for read in (buffer.sum, lambda: rows @ vector):
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)
    return buffer.numel() * 4 / min(times)


def process(out_dir, argv, n):
    """Seconds of a whole process that writes ten texts."""
    began = time.perf_counter()
    flags = [f"--out_dir={out_dir}", f"--max_new_tokens={n}", "--device=cpu"]
    done = subprocess.run([sys.executable, *argv, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def process_of_the_original(argv):
    """What `sample.py` did before there was a cache, as a process of its own: load, write uncached, print."""
    from nanogpt import config
    from nanogpt.run import distributed, settings, trained

    cfg = settings.load(config.SampleConfig, argv, "sampling.py")
    with distributed.setup(cfg, out=sys.stderr) as dist:
        uncached(trained.load(cfg, dist).model.eval(), cfg.num_samples, cfg.max_new_tokens)


def make(shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape)).eval()


def save_run(model, out_dir):
    """A checkpoint of the model, as `sample.py` reads it."""
    info = dict(step=1, state={"losses": {"val": 1.0}, "improved": True}, model_config=vars(model.config))
    info |= dict(tokenizer=CHARS.to_json(), settings={}, scaler={})
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.write(out_dir, tensors, {"nothing": torch.zeros(1)}, info)


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(name, model, rows, n, repeats, their_n):
    """Print a row: generation alone, three ways."""
    contenders = {"here": lambda: rate(cached, model, rows, n), "uncached": lambda: rate(uncached, model, 1, n)}
    if their_n:
        other = hugging_face(model, CHARS if model.config.vocab_size == 65 else Gpt2Size())
        contenders["theirs"] = lambda: rate(theirs, other, rows, their_n)
    got = in_turns(contenders, repeats)
    here, before, they = got["here"], got["uncached"], got.get("theirs")
    ahead = (f"{they:,.0f}", f"{here / they:.2f}") if they else ("none: its context is too short", "")
    print_row(name, f"{before:,.0f}", ahead[0], f"{here:,.0f}", f"{here / before:.1f}", ahead[1])


def compare_processes(model, n, repeats):
    with tempfile.TemporaryDirectory() as out_dir:
        save_run(model, out_dir)
        before = [str(Path(__file__).resolve()), "--original"]
        contenders = {"here": ["sample.py"], "uncached": before}
        runs = {name: lambda argv=argv: process(out_dir, argv, n) for name, argv in contenders.items()}
        got = in_turns(runs, repeats)
    print(f"\nThe whole process, `python sample.py`, ten texts of {n} tokens by the 0.8 M model: {got['here']:.2f} s; "
          f"uncached, one by one: {got['uncached']:.2f} s; {got['uncached'] / got['here']:.1f} times as long")  # fmt: skip


def read_prompt(model, T):
    """Tokens a second of a prompt of T tokens, up to its first new token."""
    engine = Engine(model, 1, length=T + 1)
    engine.add([0] * T, Options(max_new_tokens=1))
    began = time.perf_counter()
    engine.step()
    return T / (time.perf_counter() - began)


@torch.inference_mode()
def products_of_prompt(model, T):
    """Tokens a second of the products of a prompt alone; the last one is for a single token."""
    x = {C: torch.randn(1, T, C) for C in (LARGE["n_embd"], 4 * LARGE["n_embd"])}
    blocks = [(b.qkv, b.attn_proj, b.fc, b.mlp_proj) for b in model.transformer.h]
    began = time.perf_counter()
    for *others, last in blocks:
        for layer in others:
            layer(x[LARGE["n_embd"]])
        last(x[4 * LARGE["n_embd"]])
    model.lm_head(x[LARGE["n_embd"]][:, -1:])
    return T / (time.perf_counter() - began)


def compare_prompts(T, repeats):
    """The 124 M model reads a prompt: the usual weights, packed ones, int8, and packed products alone."""
    model, ready, small = make(LARGE), packed.pack(make(LARGE)), quantize.quantize(make(LARGE))
    contenders = {
        "float32": lambda: read_prompt(model, T),
        "packed": lambda: read_prompt(ready, T),
        "its products alone": lambda: products_of_prompt(ready, T),
        "int8": lambda: read_prompt(small, T),
        "int8's products alone": lambda: products_of_prompt(small, T),
    }
    got = in_turns(contenders, repeats)
    print(f"\nA prompt of {T} tokens, tokens a second: " + ", ".join(f"{k} {v:,.0f}" for k, v in got.items()))


def compare_large(n, repeats):
    """The 124 M model, one text: float32, packed, and int8 against memory's speed, Hugging Face, and no cache."""
    model = make(LARGE)
    ready = packed.pack(make(LARGE))
    other = hugging_face(model, Gpt2Size())
    small = quantize.quantize(make(LARGE))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    buffer = torch.ones(2**28)  # 1 GiB
    got = in_turns(
        {
            "memory": lambda: bandwidth(buffer),
            "float32": lambda: rate(cached, model, 1, n),
            "packed": lambda: rate(cached, ready, 1, n),
            "theirs": lambda: rate(theirs, other, 1, n),
            "int8": lambda: rate(cached, small, 1, n),
            "uncached": lambda: rate(uncached, model, 1, n),
        },
        repeats,
    )
    allowed = got["memory"] / (4 * weights)
    print(f"\nThe 124 M model, one text of {n} tokens. Memory is read at {got['memory'] / 1e9:.1f} GB/s, each token reads "
          f"{weights / 1e6:.0f} M weights: in float32, {allowed:.1f} tokens a second can be had\n")  # fmt: skip
    print_row("", "tokens a second", "of what memory allows in float32", "times packed")
    print_row(*["---"] * 4)
    names = dict(
        float32="here, float32",
        packed="here, packed",
        int8="here, int8",
        theirs="Hugging Face, cache",
        uncached="uncached",
    )
    for key, name in names.items():
        print_row(name, f"{got[key]:.1f}", f"{got[key] / allowed:.0%}", f"{got[key] / got['packed']:.2f}")


def main():
    if "--original" in sys.argv:
        return process_of_the_original([a for a in sys.argv[1:] if a != "--original"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few tokens, once, to see that it runs")
    args = parser.parse_args()
    n, repeats = (20, 1) if args.quick else (500, args.repeats)
    prepare_device(torch.device("cpu"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    print(
        f"commit {commit.strip()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores\n"
    )
    print(f"Generation alone, ten texts of {n} tokens, temperature 0.8, top_k 200; tokens a second\n")
    print_row("", "uncached, one by one", "Hugging Face, cache, 10 together", "here, 10 together", "times uncached", "times theirs")  # fmt: skip
    print_row(*["---"] * 6)
    small = make(SMALL)
    compare("0.8 M, context 64", small, 10, n, repeats, their_n=None)
    compare("10 M, context 256", make(MIDDLE), 10, n, repeats, their_n=min(n, 255))
    compare_processes(small, n, repeats)
    compare_large(min(n, 256), repeats)
    compare_prompts(min(50 * n, 1000), repeats)


if __name__ == "__main__":
    main()
