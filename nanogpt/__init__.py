"""NanoGPT: train your own GPT on the machine you have.

Importing this package loads nothing else; import the module that you need: `from nanogpt.model import GPT, GPTConfig`.
"""

import os

# PyTorch's threads (GNU OpenMP) spin for milliseconds after each operation while they wait for the next one. Beside
# another busy program that costs ten times what it gains. GNU OpenMP reads this variable when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
