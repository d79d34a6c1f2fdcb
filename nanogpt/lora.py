"""LoRA (Hu et al. 2021): the weights of a model stay as they are, and thin matrices beside its linear layers are trained.

`adapt` freezes a GPT and adds the matrices; `merge` makes a plain GPT of it again.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.kernels import Linear
from nanogpt.model import GPT


class LoRALinear(nn.Linear):
    """x W' + b + alpha / rank (x A') B', where W (out, in) and b are frozen, A (rank, in) and B (out, rank) are trained.

    B begins as zeros, so the layer begins as it was. With rank 0, W and b are all. W may be in bfloat16.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale = rank, alpha / max(1, rank)
        if rank:
            self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
            self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = FrozenProduct.apply(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b) if self.rank else y

    def merged(self) -> Tensor:
        """The weights (out, in) of a plain linear layer that computes the same, in float32."""
        weight = self.weight.float()
        return weight + self.scale * (self.lora_b @ self.lora_a) if self.rank else weight


class FrozenProduct(torch.autograd.Function):
    """F.linear with weights that are not trained: they are converted to x's number format when used, and kept in theirs."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        converts = torch.is_autocast_enabled(x.device.type)  # autocast does it itself, to the format of products
        return F.linear(x, weight if converts else weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class FrozenEmbedding(nn.Embedding):
    """An embedding whose rows are used in float32, whatever format they are kept in."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight  # the same parameter, which may also be the output layer's

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def adapt(model: GPT, rank: int, alpha: float, layers: str, dtype: torch.dtype) -> None:
    """Freeze all weights of a model on the CPU, and add LoRA's matrices to the linear layers of its blocks.

    layers: `all` of them, or those of the `attention`. dtype: number format in which matrices and embeddings are kept.
    """
    model.requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(dtype) if p.dim() == 2 else p.data
    put(model, "transformer.wte", FrozenEmbedding(model.transformer["wte"]))  # type: ignore[arg-type]
    for name, linear in linear_layers(model):
        chosen = name.startswith("transformer.h.") and (layers == "all" or ".attn." in name)
        put(model, name, LoRALinear(linear, rank if chosen else 0, alpha))


@torch.no_grad()
def merge(model: GPT) -> None:
    """Make a model that `adapt` changed a plain one, in float32, that computes the same."""
    for name, layer in linear_layers(model):
        layer.weight.data = layer.merged() if isinstance(layer, LoRALinear) else layer.weight
        plain = Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        put(model, name, plain)
    embedding = nn.Embedding(model.config.vocab_size, model.config.n_embd, device="meta")
    embedding.weight = model.transformer["wte"].weight  # type: ignore[assignment]
    put(model, "transformer.wte", embedding)
    for p in model.parameters():
        p.data = p.data.float()
    model.requires_grad_(True)


def linear_layers(model: GPT) -> list[tuple[str, nn.Linear]]:
    """The linear layers by name, as a list, so that they can be replaced."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def put(model: GPT, name: str, layer: nn.Module) -> None:
    """Replace the module of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def fingerprint(model: GPT) -> str:
    """The SHA-256 of a model's names and weights, by which a base is recognised."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(p.detach().float().contiguous().numpy().data)
    return digest.hexdigest()
