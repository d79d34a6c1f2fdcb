#!/bin/sh
""":"
# OpenWebText in GPT-2's tokens: train.bin, val.bin and meta.json in this folder; 9 billion tokens, 18 GB.
#
#     sh data/openwebtext/prepare.py [SOURCE ...] [--key=value ...]
#
# The room to read is nanogpt/text/prepare.py, whose settings it takes; SOURCEs are read instead of the download.
# A shell reads these lines, finds a Python, and starts this file once more with it; for Python they are text.
python="$(dirname "$0")/../../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$0" "$@"
":"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # works without the package being installed

from nanogpt.commands.cli import enter  # noqa: E402

if __name__ == "__main__":
    given = sys.argv[1:]
    source = [] if any(not a.startswith("-") for a in given) else ["hf:Skylion007/openwebtext"]
    settings = [f"--dataset={HERE.name}", f"--root={HERE.parent}", "--tokenizer=gpt2", "--val_fraction=0.0005"]
    enter("prepare", *source, *settings)
