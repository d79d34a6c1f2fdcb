#!/bin/sh
""":"
# OpenWebText in GPT-2's tokens: train.bin, val.bin and meta.json in this folder; 9 billion tokens, 18 GB.
#
#     sh data/openwebtext/prepare.py [--source=NAME_OR_PATH] [--num_proc=N] [--out=DIR]
#
# The room to read is nanogpt/tokenizer.py. The corpus is never held in memory: documents are read from disk
# by the batch, and their tokens appended to a file.
# A shell reads these lines, finds a Python, and starts this file once more with it; for Python they are text.
python="$(dirname "$0")/../../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$0" "$@"
":"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # works without the package being installed

from nanogpt.config import UserError  # noqa: E402
from nanogpt.data import meta_json, write_files  # noqa: E402
from nanogpt.tokenizer import GPT2Tokenizer  # noqa: E402

HUB = "Skylion007/openwebtext"
DOCUMENTS = 8_013_769  # in the whole corpus
VAL_SHARE, SEED = 0.0005, 2357  # the validation documents of nanoGPT's published losses
BATCH = 1024  # documents read and tokenized at a time


def main():
    """Write the dataset. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Prepare documents in GPT-2's tokens.", allow_abbrev=False)
    flag, cores = parser.add_argument, os.cpu_count() or 1
    flag("--source", default="openwebtext", help="a dataset of the Hugging Face hub, a folder, a .jsonl file")
    flag("--num_proc", type=int, default=min(8, cores), help="documents tokenized at once (%(default)s)")
    flag("--out", metavar="DIR", type=Path, default=HERE, help="the dataset's folder (this script's)")
    args = parser.parse_args()
    if args.num_proc < 1:
        parser.error(f"--num_proc={args.num_proc}: expected an integer >= 1")
    try:
        tokenizer = GPT2Tokenizer()
        documents = load(args.source, args.num_proc)
        counts = write(args.out, documents, tokenizer, args.num_proc)
    except (UserError, OSError, ImportError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    folder = os.path.relpath(args.out)
    print(f"{len(documents):,} documents in GPT-2's tokens, each followed by the end-of-text token")
    print(f"{counts['train']:,} tokens in train.bin, {counts['val']:,} in val.bin, in {folder}")
    if args.out == HERE:
        print("next: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py")
    return 0


def load(source, num_proc):
    """The documents: a `datasets.Dataset` with a column `text`, which stays on disk."""
    try:
        import datasets
    except ImportError:
        raise ImportError('this needs Hugging Face datasets: pip install -e ".[data]" brings it') from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below, once
    path = Path(source)
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
    try:
        if path.is_file() and path.suffix in kinds:
            found = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        elif path.is_dir():
            found = datasets.load_dataset(str(path), split="train", num_proc=num_proc)
        else:
            found = from_hub(datasets, HUB if source == "openwebtext" else source, num_proc)
    except Exception as e:  # every kind of source raises its own
        cause = e.__cause__ or e
        why = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise UserError(f"--source={source}: cannot be loaded: {why}") from None
    if "text" not in found.column_names:
        raise UserError(f"--source={source}: expected a column text; it has {', '.join(found.column_names)}")
    if found.features["text"].dtype not in ("string", "large_string"):
        raise UserError(f"--source={source}: expected text in the column text, not {found.features['text'].dtype}")
    if len(found) < 2:
        raise UserError(f"--source={source}: {len(found)} documents are too few to split")
    if source == "openwebtext" and len(found) != DOCUMENTS:
        print(f"Note: {len(found):,} documents, not {DOCUMENTS:,}; published losses do not apply to them.")
    return found


def from_hub(datasets, name, num_proc):
    """A dataset of the hub. No loading script of its own is run: `datasets` has not done so since 4.0."""
    try:
        return datasets.load_dataset(name, split="train", num_proc=num_proc)
    except (RuntimeError, ValueError) as e:
        if "script" not in str(e) and "trust_remote_code" not in str(e):
            raise
    print(f"Using the hub's conversion of {name} to Parquet, since the original needs a script to load it.")
    return datasets.load_dataset(name, revision="refs/convert/parquet", split="train", num_proc=num_proc)


def write(folder, documents, tokenizer, num_proc):
    """Write both bins and `meta.json`, all whole or none; returns {split: tokens}."""
    order = np.random.default_rng(SEED).permutation(len(documents))
    n_val = int(np.ceil(VAL_SHARE * len(documents)))
    splits = {"val": order[:n_val], "train": np.sort(order[n_val:])}  # in the disk's order, which is faster
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {split: folder / f".{split}.bin.{os.getpid()}.tmp" for split in splits}
    try:
        counts = {}
        for split, rows in splits.items():
            with open(temporary[split], "wb") as f:
                counts[split] = 0
                for ids in tokens(documents, rows, tokenizer, num_proc, split):
                    ids.tofile(f)
                    counts[split] += len(ids)
                f.flush()
                os.fsync(f.fileno())
        (folder / "meta.json").unlink(missing_ok=True)  # until both are there, no dataset
        for split, path in temporary.items():
            os.replace(path, folder / f"{split}.bin")
        write_files(folder, {"meta.json": meta_json(tokenizer, "uint16")})
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return counts


def tokens(documents, rows, tokenizer, num_proc, split):
    """Yield the ids of each document of `rows` and its end-of-text token, uint16."""
    progress = tqdm(total=len(rows), desc=split, unit=" documents", disable=None)  # on a terminal only
    with ThreadPoolExecutor(num_proc) as pool, progress:
        for start in range(0, len(rows), BATCH):
            texts = documents[rows[start : start + BATCH]]["text"]
            # threads will do: tiktoken computes outside Python's lock
            for ids in pool.map(tokenizer.encode, (text or "" for text in texts)):
                yield np.array(ids + [tokenizer.eot], dtype=np.uint16)
            progress.update(len(texts))


if __name__ == "__main__":
    sys.exit(main())
