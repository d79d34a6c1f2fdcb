"""What a training batch costs that is drawn from a file larger than one would like to keep in memory.

    python benchmarks/batches.py [--gigabytes=10] [--batches=100000] [--sparse]

Writes that many gigabytes of tokens into a temporary folder (TMPDIR says where), with --sparse as a file of holes
that takes no disk. Each way of reading gets a process of its own. `from memory`: the time of a batch of 12 x 1024
where the system holds the file already, as far as it can; `from disk`: where it was made to forget it, with a pause
for computing after each batch. The yardstick is the same batch out of an array in memory. Prints a table in Markdown.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

B, T, SEED = 12, 1024, 1337
VOCAB, SEPARATOR = 50257, 50256
PAUSE, COLD = 0.02, 300  # seconds of computing after a batch, and batches, where the disk is measured

WAYS = {  # name: the columns of its row
    "memory": "yardstick: random windows of an array in memory",
    "original": "the original: random windows, the file mapped anew for each batch",
    "mapped": "the same, mapped once",
    "epochs": "`--sampling=epochs`, the default",
    "random": "`--sampling=random`",
    "documents": "`--documents=True`",
}


def write_dataset(folder, gigabytes, sparse):
    """A dataset of random ids in two bytes each, a separator after every 700 of them."""
    block = np.random.default_rng(SEED).integers(0, SEPARATOR, 2**25, dtype=np.uint16)
    block[::700] = SEPARATOR
    size = int(gigabytes * 1e9) // 2 * 2
    with open(folder / "train.bin", "wb") as f:
        if sparse:
            f.truncate(size)
        while f.tell() < size and not sparse:
            f.write(memoryview(block).cast("B")[: size - f.tell()])
        f.flush()
        os.fsync(f.fileno())
    meta = {"tokenizer": {"type": "gpt2"}, "vocab_size": VOCAB, "dtype": "uint16", "separator": SEPARATOR}
    (folder / "meta.json").write_text(json.dumps(meta))


def reader(way, folder):
    """A function that returns batch number i, read in this way."""
    import torch

    from nanogpt import data
    from nanogpt.run.distributed import Dist
    from nanogpt.text.dataset import open_dataset

    path, generator = folder / "train.bin", torch.Generator().manual_seed(SEED)

    def random_windows(ids):
        starts = torch.randint(len(ids) - T, (B,), generator=generator).tolist()
        windows = [torch.from_numpy(ids[i : i + T + 1].astype(np.int64)) for i in starts]
        return torch.stack([w[:-1] for w in windows]), torch.stack([w[1:] for w in windows])

    if way == "memory":
        held = np.fromfile(path, np.uint16, count=2**26)
        return lambda i: random_windows(held)
    if way == "mapped":
        mapped = np.memmap(path, np.uint16, "r")
        return lambda i: random_windows(mapped)
    if way == "original":
        return lambda i: random_windows(np.memmap(path, np.uint16, "r"))
    dataset = open_dataset(folder.name, "train", T, root=folder.parent, documents=way == "documents")
    dist, sampling = Dist(torch.device("cpu"), torch.float32), "random" if way == "random" else "epochs"
    batches = data.Batches(dataset, "train", SEED, T, dist, sampling, per_step=B)
    return lambda i: batches.get(i * B, B)


def measure(way, folder, n):
    """Print what this way of reading costs, as JSON."""
    forget(folder / "train.bin")
    begin = time.perf_counter()
    get = reader(way, folder)
    opening = time.perf_counter() - begin
    forget(folder / "train.bin")
    cold = seconds(get, range(COLD), PAUSE)
    with open(folder / "train.bin", "rb", buffering=0) as f:
        while f.read(2**24):  # so that the system holds what it can of it
            pass
    seconds(get, range(COLD, 1000))
    before = resident()
    warm = seconds(get, range(1000, 1000 + n))
    us = {"cold": np.median(cold), "median": np.median(warm), "mean": warm.mean(), "p99": np.percentile(warm, 99)}
    us = {name: value * 1e6 for name, value in us.items()}
    print(json.dumps(us | {"opening": opening, "before": before, "after": resident()}))


def seconds(get, numbers, pause=0.0):
    """The time that each of these batches takes."""
    times = []
    for i in numbers:
        begin = time.perf_counter()
        get(i)
        times.append(time.perf_counter() - begin)
        if pause:
            time.sleep(pause)
    return np.array(times)


def forget(path):
    """Have the system drop what it holds of a file, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident():
    """This process's resident memory in MB; where the system does not tell, the most that it ever was."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.folder, args.batches)
        return
    free, needed = shutil.disk_usage(tempfile.gettempdir()).free, 0 if args.sparse else args.gigabytes * 1e9
    if free < needed * 1.1:
        sys.exit(
            f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free, too few for {args.gigabytes:g}; "
            "TMPDIR=FOLDER names another place, --sparse needs none"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "large"
        folder.mkdir()
        write_dataset(folder, args.gigabytes, args.sparse)
        table(args, folder)


def table(args, folder):
    """Measure each way in a process of its own, and print its row."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    kind = "a sparse file" if args.sparse else "random ids"
    print(f"commit {commit}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    print(f"{args.gigabytes:g} GB of {kind}, batches of {B} x {T}, {args.batches:,} of them from memory\n")
    print(
        f"| read how | from memory, µs | mean | 99 % within | from disk, µs | resident before, MB | after {args.batches:,} | to open, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way, title in WAYS.items():
        command = [sys.executable, __file__, f"--way={way}", f"--folder={folder}", f"--batches={args.batches}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        r = json.loads(done.stdout)
        cold = f"{r['cold']:.0f}" if way != "memory" else ""
        times = f"{r['median']:.0f} | {r['mean']:.0f} | {r['p99']:.0f} | {cold}"
        print(f"| {title} | {times} | {r['before']:.0f} | {r['after']:.0f} | {r['opening']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
