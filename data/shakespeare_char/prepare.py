#!/bin/sh
""":"
# Tiny Shakespeare, one token a character: input.txt, train.bin, val.bin and meta.json in this folder.
#
#     sh data/shakespeare_char/prepare.py [--input=FILE] [--out=DIR]
#
# The room to read is nanogpt/text/shakespeare.py, where the text comes from; then nanogpt/text/tokenizer.py.
# A shell reads these lines, finds a Python, and starts this file once more with it; for Python they are text.
python="$(dirname "$0")/../../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$0" "$@"
":"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # works without the package being installed

try:
    from nanogpt.commands.cli import as_process
    from nanogpt.config import UserError
    from nanogpt.text.dataset import write_dataset
    from nanogpt.text.shakespeare import get_text
    from nanogpt.text.tokenizer import CharTokenizer
except ModuleNotFoundError as e:
    sys.exit(f"error: the Python package {e.name} is missing from {sys.executable}; `make install` brings it")


def main():
    """Write the dataset. Returns the exit code."""
    what = "Prepare tiny Shakespeare, or any text, one token a character."
    parser = argparse.ArgumentParser(description=what, allow_abbrev=False)
    flag = parser.add_argument
    flag("--input", metavar="FILE", help="a UTF-8 text to use instead")
    flag("--out", metavar="DIR", type=Path, default=HERE, help="the dataset's folder (this script's)")
    args = parser.parse_args()
    try:
        text = get_text(args.out, args.input)
        n = int(0.9 * len(text))
        if len(text) - n < 2:  # an input and its target
            source = args.input or args.out / "input.txt"
            raise UserError(f"{source}: {len(text)} characters are too few to split; 11 would do")
        tokenizer = CharTokenizer.train(text)
        train_ids, val_ids = tokenizer.encode(text[:n]), tokenizer.encode(text[n:])
        write_dataset(args.out, tokenizer, train_ids, val_ids)
    except (UserError, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    print(f"{len(text):,} characters, {tokenizer.vocab_size} different ones: {''.join(tokenizer.chars)!r}")
    folder = os.path.relpath(args.out)
    print(f"{len(train_ids):,} tokens in train.bin, {len(val_ids):,} in val.bin, in {folder}")
    if args.out == HERE:
        import torch  # loaded before, after nanogpt has said how its threads wait

        size = "char" if torch.cuda.is_available() else "cpu"  # as `make demo` chooses
        print(f"next: sh train.py config/fast_shakespeare_{size}.py")
    return 0


if __name__ == "__main__":
    as_process(main)
