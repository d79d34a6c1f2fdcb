"""The shape of a GPT, and what follows from it alone: how many parameters it has, and how much arithmetic a token takes.

Never imports torch, so that `nanogpt estimate` needs no PyTorch. The model itself is in model.py.
"""

from dataclasses import dataclass, fields
from typing import Any

from nanogpt.config import PADDING, TrainConfig, shape_problems


@dataclass
class GPTConfig:
    """The architecture and shape of a GPT. The defaults are GPT-2 (124M), its vocabulary padded for speed."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms
    activation: str = "gelu"  # or "gelu_new", the tanh approximation that OpenAI's weights were trained with
    architecture: str = "gpt2"  # or "qwen3" or "llama", which have neither biases nor a choice of activation
    n_kv_head: int = 0  # heads of keys and values; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_hidden: int = 0  # channels of the hidden layer of MLPs; 0: 4 n_embd, or `gated_width`
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # added to the mean square in RMS norms
    norm_gain: bool = False  # whether RMS norms have gains
    tied: bool = True  # whether the output layer is the token embedding (Press & Wolf 2017)

    def __post_init__(self):
        for (name, *_), problem in shape_problems(self):
            raise ValueError(f"{name} = {getattr(self, name)} {problem}")
        if self.activation not in ("gelu", "gelu_new"):
            raise ValueError(f"activation must be gelu or gelu_new, not {self.activation!r}")

    @property
    def modern(self) -> bool:
        """Whether this is Qwen3's or Llama's architecture, and not GPT-2's."""
        return self.architecture != "gpt2"

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """Channels of the hidden layer of MLPs."""
        return self.n_hidden or (gated_width(self.n_embd) if self.modern else 4 * self.n_embd)


# the settings that determine a model's shape: fields of both classes, in the order of GPTConfig
SHAPE = [f.name for f in fields(GPTConfig) if hasattr(TrainConfig, f.name) and f.name != "dropout"]


def shape(cfg: TrainConfig) -> dict[str, Any]:
    """The settings that determine a model's shape, {name: value}."""
    return {name: getattr(cfg, name) for name in SHAPE}


def padded(vocab_size: int) -> int:
    """The size of the embedding: a large vocabulary is rounded up to a multiple of 64."""
    return -(-vocab_size // PADDING) * PADDING if vocab_size > 1024 else vocab_size


def gated_width(n_embd: int) -> int:
    """Width of a GatedMLP's hidden layer: a multiple of 32 near 8/3 n_embd, which gives it as many parameters as `MLP`."""
    return max(32, round(n_embd * 8 / 3 / 32) * 32)


def block_linears(config: GPTConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a block. Queries, keys and values are three, also if computed as one."""
    C, F, D = config.n_embd, config.hidden, config.head_size
    queries, keys = D * config.n_head, D * config.kv_heads
    mlp = [(C, F), (C, F), (F, C)] if config.modern else [(C, F), (F, C)]
    return [(C, queries), (C, keys), (C, keys), (queries, C), *mlp]


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a GPT, by what optimizers do with them."""

    embeddings: int  # of tokens and positions, and an output layer that is not tied
    matrices: int  # of the blocks' linear layers: Muon's
    vectors: int  # gains and biases

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return self.embeddings + self.matrices + self.vectors


def count_parameters(config: GPTConfig) -> Counts:
    """The numbers of parameters of a GPT of this shape, without building it."""
    C, V, D = config.n_embd, config.vocab_size, config.head_size
    embeddings = (1 if config.tied else 2) * V * C + (0 if config.modern else config.block_size * C)
    matrices = config.n_layer * sum(n_in * n_out for n_in, n_out in block_linears(config))
    if config.modern:
        norms = 2 * C + (2 * D if config.architecture == "qwen3" else 0)
        vectors = (config.n_layer * norms + C) * config.norm_gain
    else:
        norm = 2 * C if config.bias else C
        biases = sum(n_out for _, n_out in block_linears(config)) if config.bias else 0
        vectors = config.n_layer * (2 * norm + biases) + norm
    return Counts(embeddings, matrices, vectors)


def numbers_held(config: GPTConfig) -> tuple[int, int]:
    """Number of parameters, and of elements of buffers, of a GPT of this shape, without building it."""
    return count_parameters(config).total, 2 * config.block_size * config.head_size if config.modern else 0


def linear_weights(config: GPTConfig) -> int:
    """Number of weights that each token is multiplied with: those of the blocks and of the output layer."""
    return count_parameters(config).matrices + config.vocab_size * config.n_embd


def attention_flops(config: GPTConfig, T: int) -> float:
    """Half the operations of attention per token in the forward pass, on average over a sequence of T, counted as causal.

    2 per query-key and per probability-value product, so half of them count like weights. Position t has t + 1 keys.
    """
    return config.n_layer * 2 * config.n_head * config.head_size * (T + 1) / 2


def flops_per_token(config: GPTConfig, weights: float, T: int) -> float:
    """Floating-point operations of the forward and backward pass per token of a sequence of T.

    weights: the number of weights of linear layers; see `linear_weights`. Matrix products only: 2 operations per weight,
    and those of attention. A backward pass costs two forward passes (as in Chowdhery et al. 2022, PaLM, appendix B, who
    count attention in full).
    """
    return 3 * 2 * (weights + attention_flops(config, T))
