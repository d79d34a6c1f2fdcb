"""NanoGPT: train your own GPT on the machine you have.

Importing this package loads nothing; import the room you need: `from nanogpt.model import GPT, GPTConfig`.
"""

__version__ = "0.1.0"
