#!/bin/sh
""":"  # The model. The room to read is nanogpt/model.py; this file is for `from model import GPT, GPTConfig`.

# A shell obeys the next three lines, which start Python on this file; Python takes them for a docstring.
python=$(dirname "$0")/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$0" "$@"
"""

from nanogpt.formats.pretrained import from_pretrained
from nanogpt.model import GPT, GPTConfig

GPT.from_pretrained = staticmethod(from_pretrained)  # as the original nanoGPT is called

__all__ = ["GPT", "GPTConfig"]
