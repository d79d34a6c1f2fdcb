"""GPT: the architecture of GPT-2, its initialisation, and what it costs to run.

Knows no optimizer, process, file or tokenizer. Shapes are named
    B batch    T time (tokens)    C channels (n_embd)    H heads    D channels of a head (C / H)    V vocabulary
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 (124M), its vocabulary padded for speed."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms
    activation: str = "gelu"  # or "gelu_new", the tanh approximation that OpenAI's weights were trained with

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.activation not in ("gelu", "gelu_new"):
            raise ValueError(f"activation must be gelu or gelu_new, not {self.activation!r}")


# The four sizes that OpenAI released, by their Hugging Face names.
GPT2_SHAPES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # each (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    """Communication (attention), then computation (MLP), each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and an output layer tied to the token embedding.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # Press & Wolf 2017
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal with deviation 0.02, less on the layers that write to the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            # 2 * n_layer such layers add up, so this keeps the stream's variance independent of depth
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None):
        """Logits, and with targets the mean cross-entropy in nats.

        idx: token ids (B, T), T <= block_size. targets: (B, T), the id that follows each; -1 is not counted.
        Returns (logits (B, T, V), loss) with targets, (logits of the last position (B, 1, V), None) without.
        Raises ValueError where T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens does not fit the context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, [-1]])), None
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """`idx` (B, T) continued by `max_new_tokens` tokens: (B, T + max_new_tokens). See `nanogpt.generate`."""
        from nanogpt.generate import generate  # a convenience; generation lives above the model

        new = list(generate(self, idx, max_new_tokens, temperature, top_k, generator))
        return torch.cat([idx, *new], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """GPT-2's weights, by name (`gpt2`, ...) or from a Hugging Face folder. See `nanogpt.export`."""
        from nanogpt.export import from_pretrained  # a convenience; files live above the model

        return from_pretrained(name_or_folder, dropout)

    def load_weights(self, tensors):
        """Copy {parameter name: tensor} into the parameters. Raises ValueError where names or shapes differ."""
        params = dict(self.named_parameters())
        odd = sorted(params.keys() ^ tensors.keys())
        odd += [name for name in params if name in tensors and params[name].shape != tensors[name].shape]
        if odd:
            raise ValueError(f"the weights do not fit the model, first of all {odd[0]}")
        for name, tensor in tensors.items():
            params[name].data.copy_(tensor)

    def crop_block_size(self, block_size):
        """Shorten the context, for example to finetune GPT-2 at 256 instead of 1024 tokens."""
        if block_size > self.config.block_size:
            raise ValueError(f"a context of {self.config.block_size} cannot be cropped to {block_size}: it is shorter")
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
        )

    def num_params(self, non_embedding=True):
        """Number of parameters; by default without the position embedding, as they are usually quoted."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self, T=None):
        """Floating-point operations to train on one token of a sequence of T (block_size), forward and backward.

        Counted from the matrix products alone: 2 operations a weight, and 2 for each query-key and each
        probability-value product; position t has t + 1 keys, so causal attention counts once. The backward
        pass costs two forward passes (Chowdhery et al. 2022, PaLM, appendix B, counts the same way, but
        attention in full).
        """
        T = T or self.config.block_size
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = self.config.n_layer * 2 * self.config.n_embd * (T + 1) / 2
        return 3 * 2 * (weights + attention)
