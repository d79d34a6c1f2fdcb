"""NanoGPT: train your own GPT on the machine you have.

Importing this package loads nothing; import the room you need: `from nanogpt.model import GPT, GPTConfig`.
"""

import os

# PyTorch's threads (GNU OpenMP) spin for milliseconds at the end of each operation, in the hope of the next one; beside
# another busy program that costs ten times as much as it gains. They read this when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
