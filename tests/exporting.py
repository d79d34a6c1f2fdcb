"""Every kind of model and tokenizer that can be exported: for the tests of the formats and of the programs that read them."""

import pytest
import torch

from nanogpt.model import GPT, GPTConfig
from nanogpt.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer

TEXT = "Hello hello world, it's the world's Ünbekanntes é 東京 naïve 東京 🎭!\n\n\tThe  end \u0000.\n" * 3
CHARS = sorted({*TEXT, "\ufffd"})
TOKENIZERS = {
    "char": lambda: CharTokenizer(CHARS),
    "char with unknown": lambda: CharTokenizer(CHARS, unknown="\ufffd"),
    "char with an end": lambda: CharTokenizer(CHARS, unknown="\ufffd", separated=True),
    "ascii": lambda: CharTokenizer.train("\n !',.abcdefghijklmnopqrstuvwxyz"),
    "byte": ByteTokenizer,
    "gpt2": GPT2Tokenizer,
    "bpe": lambda: BPETokenizer.train([TEXT], 300),
}
PUBLISHED = dict(rope_theta=5e5, norm_eps=1e-5, norm_gain=True, tied=False)
ARCHITECTURES = {
    "gpt2": dict(architecture="gpt2", activation="gelu_new"),
    "gpt2 with biases": dict(architecture="gpt2", activation="gelu_new", bias=True),
    "qwen3": dict(architecture="qwen3"),
    "qwen3 as published": dict(architecture="qwen3", n_kv_head=1, head_dim=24, n_hidden=40, **PUBLISHED),
    "llama": dict(architecture="llama", n_kv_head=1, **PUBLISHED),
    "gpt2 with a wide MLP": dict(architecture="gpt2", activation="gelu_new", n_hidden=160),
}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def sample_text(kind):
    """A text that a tokenizer of TOKENIZERS can encode."""
    return "hello, it's the end.\n" if kind == "ascii" else TEXT


def make(architecture, tok, padding=5):
    """A model whose every parameter is random, with a vocabulary that is padded."""
    torch.manual_seed(4)
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=48)
    config = GPTConfig(**shape, vocab_size=tok.vocab_size + padding, **{"bias": False} | ARCHITECTURES[architecture])
    model = GPT(config).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model
