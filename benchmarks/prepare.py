"""`nanogpt prepare`: how fast, in how much memory, and whether being killed changes a byte. Against plain library calls.

    python benchmarks/prepare.py [--text=FILE] [--megabytes=100] [--corpus=2000] [--kills=10] [--strings=100000]

Makes its corpora out of a text, repeated, in a temporary folder that needs 10 GB of disk. Everything else on the
machine should be quiet. Needs the extras `data` and `test`. Prints a table in Markdown; results/ holds dated ones.

A time is from the start of the process until it says that it is done: Python's own start is in it, the advice on
how to train that follows is not. The plain calls are timed within a process, without any start, reading or writing.
"""

import argparse
import filecmp
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROGRAM = (
    "import sys; from nanogpt.text import prepare; prepare.advise = lambda **about: None; prepare.main(sys.argv[1:])"
)
OFTEN = PROGRAM.replace("prepare.main", "prepare.COMMIT = 0.2; prepare.main")  # so that even short runs are resumed
MB = 10**6


def start(code, *args, cwd):
    """The program as a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)


def seconds(*args, cwd):
    """How long a preparation takes, and the megabytes that it says it took at most."""
    began = time.perf_counter()
    with start(PROGRAM, *args, cwd=cwd) as process:
        for line in process.stdout:
            if line.startswith("took "):
                took = time.perf_counter() - began
                memory = re.search(r"at most ([\d,.]+) MB", line)
    if process.returncode:
        raise SystemExit(f"prepare {' '.join(args)} failed")
    return took, memory[1] if memory else "?"


def corpus(path, text, megabytes):
    """A file of the text, repeated."""
    data = text.encode()
    with open(path, "wb") as f:
        for _ in range(megabytes * MB // len(data) + 1):
            f.write(data)
    os.truncate(path, megabytes * MB)
    return path.name


def plain_char(text):
    """MB/s of a dictionary look-up for each character, one core."""
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    began = time.perf_counter()
    [ids[c] for c in text]
    return len(text.encode()) / MB / (time.perf_counter() - began)


def plain_gpt2(path):
    """MB/s of tiktoken's encode_ordinary, one core, a megabyte at a time."""
    from nanogpt.text.tokenizer import GPT2Tokenizer

    encode, spent, size = GPT2Tokenizer().encoding.encode_ordinary, 0.0, 0
    with open(path, encoding="utf-8", errors="replace") as f:
        while piece := f.read(2**20):
            began = time.perf_counter()
            encode(piece)
            spent += time.perf_counter() - began
            size += len(piece.encode())
    return size / MB / spent


def peak(*args, cwd):
    """The most memory (MB) that a preparation's processes hold together, looked at every 20 ms."""
    import psutil

    most = 0
    with start(PROGRAM, *args, cwd=cwd) as process:
        while process.poll() is None:
            try:
                top = psutil.Process(process.pid)
                most = max(most, sum(p.memory_info().rss for p in [top, *top.children(recursive=True)]))
            except psutil.Error:
                pass
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"prepare {' '.join(args)} failed")
    return most / MB


def killed(kills, *args, cwd):
    """(kills before the end, whether the bytes are the same as in one go)."""
    began = time.perf_counter()
    start(OFTEN, *args, "--dataset=whole", cwd=cwd).communicate()
    whole, count, draw = time.perf_counter() - began, 0, random.Random(0)
    while count < kills:
        process = start(OFTEN, *args, "--dataset=killed", cwd=cwd)
        try:
            process.wait(draw.uniform(0.1, 0.9) * whole)
            shutil.rmtree(cwd / "data" / "killed")  # it came to its end, so another one is killed
        except subprocess.TimeoutExpired:
            process.kill()
            count += 1
        process.communicate()
    start(OFTEN, *args, "--dataset=killed", cwd=cwd).communicate()
    names = ["train.bin", "val.bin", "meta.json"]
    _, differ, missing = filecmp.cmpfiles(cwd / "data" / "whole", cwd / "data" / "killed", names, shallow=False)
    return count, not differ and not missing


def round_trips(strings):
    """{tokenizer: failures} over so many generated strings of any script."""
    from nanogpt.text import tokenizer as t

    draw = random.Random(0)
    planes = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x530), (0x900, 0xE00), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF)]
    planes += [(0, 0xD800), (0xE000, 0x110000)]

    def string():
        spans = draw.choices(planes, k=3)
        return "".join(chr(draw.randrange(*draw.choice(spans))) for _ in range(draw.randrange(40)))

    texts = [string() for _ in range(strings)]
    made = {"byte": t.ByteTokenizer(), "gpt2": t.GPT2Tokenizer(), "bpe:4096": t.BPETokenizer.train(texts, 4096)}
    found = {name: sum(tok.decode(tok.encode_numpy(s)) != s for s in texts) for name, tok in made.items()}
    char = t.CharTokenizer(sorted({c for s in texts for c in s} | {t.UNKNOWN}), unknown=t.UNKNOWN)
    return found | {"char": sum(char.decode(char.encode_numpy(s)) != s for s in texts)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "shakespeare_char" / "input.txt")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--corpus", type=int, default=2000, help="megabytes of the corpus for the peak of memory")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not args.text.is_file():
        parser.error(f"{args.text} is not there: --text=FILE names another; data/shakespeare_char/prepare.py makes it")
    text = args.text.read_text(encoding="utf-8")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    print(f"commit {commit.stdout.strip()}, Python {platform.python_version()}, {os.cpu_count()} cores, {cpu()}")
    print(f"out of {args.text.name}, repeated; the best of {args.repeats} runs\n")
    print("| | measured | against | goal |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        name, size = corpus(cwd / "text.txt", text, args.megabytes), args.megabytes
        for kind in ("char", "byte", "gpt2", "bpe:4096"):
            runs = [seconds(name, "--dataset=d", f"--tokenizer={kind}", cwd=cwd) for _ in range(args.repeats)]
            rate = size / min(took for took, _ in runs)
            against, goal = "", ""
            if kind == "char":
                against, goal = (
                    f"{plain_char(text * 10):.0f} MB/s, a dictionary look-up for each character",
                    "≥ 100 MB/s",
                )
            elif kind == "gpt2":
                plain = plain_gpt2(cwd / name)
                against, goal = f"{plain:.1f} MB/s, `encode_ordinary` on one core: {rate / plain:.2f} ×", "≥ 1.8 ×"
            row(f"`{kind}`, {size} MB", f"{rate:.0f} MB/s, {runs[0][1]} MB of memory", against, goal)
        count, same = killed(args.kills, name, "--tokenizer=gpt2", cwd=cwd)
        row(
            f"`gpt2`, {size} MB, killed",
            f"{count} times, {'the same' if same else 'OTHER'} bytes",
            "in one go",
            "the same",
        )
        os.remove(cwd / name)
        big = corpus(cwd / "big.txt", text, args.corpus)
        for kind in ("char", "gpt2", "bpe:4096"):
            most = peak(big, "--dataset=d", f"--tokenizer={kind}", "--memory=500", cwd=cwd)
            row(f"`{kind}`, {args.corpus} MB, bound 500 MB", f"{most:.0f} MB at most", "", "≤ 500 MB")
    for kind, failures in round_trips(args.strings).items():
        row(f"round trip, `{kind}`", f"{failures} failures in {args.strings:,}", "", "0")


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def cpu():
    """The processor's name, as far as the system tells it."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
