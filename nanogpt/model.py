"""GPT: the classic architecture of GPT-2, and the modern one of Qwen3 and Llama.

The classic parts come first, then the modern ones; `GPT` assembles either. Faster forms of the operations are in
kernels.py, and everything that uses a model is elsewhere. Shapes:
    B batch    T time (tokens)    C channels (n_embd)    H heads    D channels of a head    V vocabulary
    G heads of keys and values, each for H / G heads of queries
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanogpt.kernels import Dropout, Linear, attention, rms_norm
from nanogpt.shape import GPTConfig, flops_per_token, gated_width, numbers_held  # noqa: F401  (for others, too)


class CausalSelfAttention(nn.Module):  # a new kind also needs a case in GPT._init_weights, and in shape.py
    """Multi-head attention in which a token attends to itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x: Tensor, cos_sin: tuple | None = None, kv_cache=None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # each (B, T, H, D)
        k, v, mask = kv_cache.update(self.layer, k, v) if kv_cache else (k, v, None)
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))  # the heads side by side again


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.c_proj = Linear(config.hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if config.norm_gain else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        x = rms_norm(x, self.eps)
        return x if self.weight is None else x * self.weight


class Rotary(nn.Module):
    """RoPE: the angles by which queries and keys are rotated, given their positions (Su et al. 2021, section 3.2.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.theta = config.rope_theta
        angles = torch.arange(config.block_size).outer(self.frequencies(config.head_size))  # (block_size, D/2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1), persistent=False)  # signed

    def frequencies(self, D: int, device: torch.device | None = None) -> Tensor:
        """The angle from one position to the next of each pair of channels: (D/2)."""
        return self.theta ** (-torch.arange(0, D, 2, device=device) / D)

    def forward(self, T: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions 0 to T - 1, the same for all heads: (T, 1, D) each."""
        return self.cos[:T, None], self.sin[:T, None]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions (B, T), which generation takes beyond the context: (B, T, 1, D) each."""
        frequencies = self.frequencies(self.cos.shape[-1], positions.device)
        angles = positions[..., None, None] * frequencies  # (B, T, 1, D/2)
        cos, sin = angles.cos().to(self.cos.dtype), angles.sin().to(self.cos.dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels i and i + D/2 of x (B, T, H, D) by its angle: rolling by D/2 swaps the two."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class RotaryAttention(nn.Module):
    """Attention with RoPE, several heads of queries for one of keys and values (Ainslie et al. 2023, GQA).

    In Qwen3, queries and keys have unit RMS (Henry et al. 2020).
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, H, G, D = config.n_embd, config.n_head, config.kv_heads, config.head_size
        self.q_proj = Linear(C, H * D, bias=False)
        self.k_proj = Linear(C, G * D, bias=False)
        self.v_proj = Linear(C, G * D, bias=False)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(D, config) if config.architecture == "qwen3" else nn.Identity() for _ in range(2)
        )
        self.resid_dropout = Dropout(config.dropout)
        self.head_size, self.layer = D, layer

    def forward(self, x: Tensor, cos_sin: tuple | None, kv_cache=None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_size) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *cos_sin), rotate(self.k_norm(k), *cos_sin)  # (B, T, H, D) and (B, T, G, D)
        k, v, mask = kv_cache.update(self.layer, k, v) if kv_cache else (k, v, None)
        # no dropout of attention weights: fused kernels on CPUs have none, and the model learns as well without it
        y = attention(q, k, v, mask)
        return self.resid_dropout(self.o_proj(y.reshape(B, T, -1)))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): a third linear layer gates each channel of the hidden layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.hidden, bias=False)
        self.down_proj = Linear(config.hidden, config.n_embd, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


def make_norm(config: GPTConfig) -> nn.Module:
    """A norm of the residual stream."""
    return RMSNorm(config.n_embd, config) if config.modern else nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = (RotaryAttention if config.modern else CausalSelfAttention)(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = (GatedMLP if config.modern else MLP)(config)

    def forward(self, x: Tensor, cos_sin: tuple | None, kv_cache=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cos_sin, kv_cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """A decoder-only transformer.

    `gpt2`: learned positions, layer norms, GELU. Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.3. `llama`: RoPE, RMS norms, SwiGLU. Touvron et al. 2023, "LLaMA: Open and Efficient Foundation
    Language Models", section 2.2. `qwen3`: the same with normalised queries and keys. Yang et al. 2025, "Qwen3 Technical
    Report", section 2. The defaults of GPTConfig simplify both: no gains, as many heads for keys as for queries.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.modern:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = (Dropout if config.modern else nn.Dropout)(config.dropout)  # gpt2: PyTorch's draws
        self.transformer["h"] = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.transformer["ln_f"] = make_norm(config)
        self.rotary = Rotary(config) if config.modern else None
        self.checkpoint_activations = False  # whether training keeps only the inputs of blocks, and repeats the rest
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """Normal with standard deviation 0.02, as in GPT-2, and less in layers that write to the residual stream.

        Modern blocks begin as the identity: their output layers are zero (Zhang et al. 2019, Fixup). Their other layers
        have 0.5 / sqrt(n_embd), 0.018 at 768 channels. `apply` visits children first, so blocks' cases come last.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):
            # 2 * n_layer such layers add up; with this, the variance of the stream does not depend on the depth
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
        if isinstance(module, (RotaryAttention, GatedMLP)):
            for name, layer in module.named_children():
                if name in ("o_proj", "down_proj"):
                    nn.init.zeros_(layer.weight)
                elif isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.5 * self.config.n_embd**-0.5)

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache=None) -> tuple[Tensor, Tensor | None]:
        """Logits and, if targets are given, the mean cross-entropy in nats.

        idx: token ids (B, T), T <= block_size. targets: the id that follows each (B, T); -1 is ignored.
        kv_cache: a `generate.KVCacheView` with the keys and values of the tokens before idx.
        Returns (logits (B, T, V), loss) with targets, (logits of the last position (B, 1, V), None) without.
        Raises ValueError if T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens does not fit the context of {self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        cos_sin = None
        if self.rotary is not None:
            cos_sin = self.rotary.at(kv_cache.positions) if kv_cache else self.rotary(T)
        else:
            x = x + (self.transformer.wpe(kv_cache.positions) if kv_cache else self.transformer.wpe.weight[:T])
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, cos_sin, use_reentrant=False)  # Chen et al. 2016; dropout is repeated, too
            else:
                x = block(x, cos_sin, kv_cache)
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, [-1]])), None
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """`idx` (B, T) continued by `max_new_tokens` tokens: (B, T + max_new_tokens). Options: see `nanogpt.generate`."""
        from nanogpt.generate import generate  # a convenience; generation is built on top of the model

        return torch.cat([idx, *generate(self, idx, max_new_tokens, *args, **options)], dim=1)

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy {parameter name: tensor} into the parameters. Raises ValueError if names or shapes differ."""
        params = dict(self.named_parameters())
        odd = sorted(params.keys() ^ tensors.keys())
        odd += [name for name in params if name in tensors and params[name].shape != tensors[name].shape]
        if odd:
            raise ValueError(f"the weights do not fit the model; the first that differs is {odd[0]}")
        for name, tensor in tensors.items():
            params[name].data.copy_(tensor)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, for example to finetune GPT-2 with 256 instead of 1024 tokens."""
        if block_size > self.config.block_size:
            raise ValueError(f"a context of {self.config.block_size} cannot be cropped to {block_size}: it is shorter")
        self.config.block_size = block_size
        if self.rotary is not None:
            return  # the angles do not depend on the context
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
        )

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the position embedding, as is usually quoted."""
        positions = 0 if self.rotary else self.transformer.wpe.weight.numel()
        return sum(p.numel() for p in self.parameters()) - (positions if non_embedding else 0)

    def flops_per_token(self, T: int | None = None) -> float:
        """Floating-point operations of the forward and backward pass per token of a sequence of T (block_size).

        As `shape.flops_per_token` counts them. The backward pass through weights that are not trained costs one forward
        pass instead of two.
        """
        layers = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        weights = sum(w.numel() * (1 if w.requires_grad else 2 / 3) for w in layers)
        return flops_per_token(self.config, weights, T or self.config.block_size)
