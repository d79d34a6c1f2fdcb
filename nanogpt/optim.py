"""The optimizers: AdamW, and Muon for the matrices of the blocks; gradient clipping; their state by parameter name."""

from typing import Protocol

import torch
from torch import Tensor

from nanogpt.config import TrainConfig
from nanogpt.kernels import casts_to_bfloat16
from nanogpt.model import GPT


class Optimizer(Protocol):
    """What a run needs of an optimizer, besides `_step_supports_amp_scaling` and `found_inf`, which are for float16.

    One whose update allocates much has a `peak_bytes`, as Muon.

    param_groups: dicts with `params` and `lr`; see `set_lr`. state: {parameter: {name: tensor}}, complete before the
    first step; it is saved and restored.
    """

    param_groups: list[dict]
    state: dict[Tensor, dict[str, Tensor]]

    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters, unless the scalar `skip` on the device is 1."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), in one fused kernel for all parameters.

    Bit for bit the same as `torch.optim.AdamW(fused=True)`, which imports the compiler in its first step: that takes as
    long as importing the rest of PyTorch.

    groups: [{'params': [...], 'weight_decay': float}, ...]. `state` maps each parameter to its `step`, `exp_avg` and
    `exp_avg_sq`.
    """

    _step_supports_amp_scaling = True  # tells GradScaler to set found_inf instead of waiting for it

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float = 1e-8):
        self.param_groups = [{**group, "lr": lr} for group in groups if group["params"]]
        self.betas, self.eps = betas, eps
        self.state = {p: self._zero_state(p) for group in self.param_groups for p in group["params"]}

    def _zero_state(self, p):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, unless the scalar `skip` on the device is 1.

        The host does not wait to learn which. `torch.amp.GradScaler` sets `found_inf`, which has the same effect.
        """
        skip = either(skip, getattr(self, "found_inf", None))
        if skip is not None and skip.device.type == "mps" and skip.item():
            return  # Metal's kernel may ignore found_inf (PyTorch #186360), so this waits for the device
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [{name: local(value) for name, value in self.state[p].items()} for p in params]
            steps = [s["step"] for s in states]
            torch._foreach_add_(steps, 1 if skip is None else 1 - skip)
            torch._fused_adamw_(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )


class Muon:
    """Gradient descent with momentum and orthogonalized updates for the blocks' matrices; AdamW for the rest.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Matrices of one shape are processed
    as one batch, and each rank orthogonalizes its share of them. If they are sharded, their rows go to the rank that does
    so, and return; the momentum stays where the rows are.

    matrices: [(parameter, parts), ...]; a parameter of several parts, such as queries, keys and values in one, counts as
    that many matrices. `state` maps each of them to its `momentum_buffer`, and the other parameters to AdamW's state.
    """

    _step_supports_amp_scaling = True

    def __init__(self, matrices, adamw, lr, momentum, weight_decay, dist=None):
        self.adamw, self.momentum, self.dist = adamw, momentum, dist
        self.shards = getattr(dist, "shards", None)
        self.group = {"params": [p for p, _ in matrices], "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}
        self.param_groups = [self.group, *adamw.param_groups]
        buffers = {p: torch.zeros_like(p) for p in self.group["params"]}
        self.state = {p: {"momentum_buffer": buffer} for p, buffer in buffers.items()} | adamw.state
        self.by_shape = {}  # {(rows, columns): [(parameter, its buffer, parts, which of them), ...]}
        for p, parts in matrices:
            for i in range(parts):
                shape = p.shape[0] // parts, p.shape[1]
                self.by_shape.setdefault(shape, []).append((p, buffers[p], parts, i))
        every = [m for matrices in self.by_shape.values() for m in matrices]
        self.first = {(p, i): number for number, (p, _, _, i) in enumerate(every)}

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, unless the scalar `skip` on the device is 1."""
        skip = either(skip, getattr(self, "found_inf", None))
        if skip is not None and skip.device.type != "cuda":
            if skip.item():  # on a CPU there is nothing to wait for
                return
            skip = None
        for shape, matrices in self.by_shape.items():
            matrices = [m for m in matrices if m[0].grad is not None]
            if matrices:
                self.step_shape(shape, matrices, skip)
        self.adamw.step(skip)

    def step_shape(self, shape: tuple[int, int], matrices: list[tuple], skip: Tensor | None = None) -> None:
        """Update the matrices of one shape, (rows, columns), unless the scalar `skip` is 1."""
        rows = [self.rows_here(p, parts, i) for p, _, parts, i in matrices]
        grads, buffers, weights = (
            [local(t)[own] for t, own in zip(tensors, rows, strict=True)]
            for tensors in ([m[0].grad for m in matrices], [m[1] for m in matrices], [m[0] for m in matrices])
        )
        lr = self.group["lr"]
        ahead = torch.cat(grads)  # a copy, which becomes the steps in place; peak_bytes counts what is allocated
        steps = list(ahead.split([len(g) for g in grads]))
        if skip is not None:  # keeps a gradient that is not finite out of the buffers
            lr = lr * (1 - skip)
            for buffer, step in zip(buffers, steps, strict=True):
                torch.where(skip > 0, buffer, step, out=step)
        torch._foreach_lerp_(buffers, steps, 1 - self.momentum)
        torch._foreach_lerp_(steps, buffers, self.momentum)  # Nesterov momentum
        self.orthogonalize_all(ahead, matrices)
        if self.group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * self.group["weight_decay"])
        height, width = shape
        torch._foreach_mul_(steps, lr * max(1, height / width) ** 0.5)
        torch._foreach_sub_(weights, steps)

    def rows_here(self, p: Tensor, parts: int, i: int, shard: int | None = None) -> slice:
        """Where the rows of part i of a parameter are in what this rank, or another shard, holds of it."""
        n = p.shape[0]
        held = self.shards.rows(n, shard) if self.shards else range(n)
        start, stop = (min(max(row, held.start), held.stop) for row in (i * n // parts, (i + 1) * n // parts))
        return slice(start - held.start, stop - held.start)

    def orthogonalize_all(self, rows: Tensor, matrices: list[tuple]) -> None:
        """Orthogonalize matrices of one shape in place; in bfloat16 on a GPU, and beside layers in it.

        rows: those of the matrices that this rank holds, one matrix after the other.
        """
        work = rows.bfloat16() if in_bfloat16(rows) else rows
        if self.shards is None:
            self.orthogonalize_share(work.unflatten(0, (len(matrices), -1)))
        else:
            held = []
            for p, _, parts, i in matrices:
                slices = [self.rows_here(p, parts, i, shard) for shard in range(self.shards.count)]
                held.append([s.stop - s.start for s in slices])
            first = self.first[matrices[0][0], matrices[0][3]]  # in turn over all shapes: the owners' work is even
            pieces = work.split([of_matrix[self.shards.mine] for of_matrix in held])
            work = torch.cat(self.shards.by_owners(list(pieces), held, first, orthogonalize))
        if work is not rows:
            rows.copy_(work)

    def orthogonalize_share(self, stack: Tensor) -> None:
        """`orthogonalize` a stack (N, rows, columns) in place, each rank its share."""
        rank, ranks = (self.dist.rank, self.dist.world_size) if self.dist else (0, 1)
        shares = stack.split(-(-len(stack) // ranks))  # fewer than ranks, if matrices are
        if rank < len(shares):
            shares[rank].copy_(orthogonalize(shares[rank]))
        if ranks > 1:
            self.dist.complete(shares)

    def peak_bytes(self) -> int:
        """The most that an update of a model that is not sharded allocates at a time, besides gradients and state."""
        most, ranks = 0, self.dist.world_size if self.dist else 1
        for (height, width), matrices in self.by_shape.items():
            cast = in_bfloat16(matrices[0][0])
            stack, share, square = len(matrices) * height * width, -(-len(matrices) // ranks), min(height, width) ** 2
            work = share * (2 * height * width + square)  # one step of the iteration: x, the next x, a square
            most = max(most, 4 * stack + (2 * (stack + work) if cast else 4 * work))
        return most


def in_bfloat16(tensor: Tensor) -> bool:
    """Whether a matrix is orthogonalized in bfloat16: on GPUs, and beside layers in it."""
    return tensor.is_cuda or casts_to_bfloat16()


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately U Vᵀ for each matrix U S Vᵀ of a stack (N, rows, columns).

    Newton-Schulz iteration with the quintic polynomial of Jordan et al. 2024. Singular values become 0.68 to 1.21;
    those below 1/600 of the matrix's norm grow at most 485 times and may stay smaller.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # singular values are at most 1
    for _ in range(steps):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)  # frees the one before
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return x.mT if tall else x


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, if it is sharded (a DTensor), else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def either(*skips: Tensor | None) -> Tensor | None:
    """A scalar that is 1 if any of the given scalars is; None if none is given."""
    given = [s for s in skips if s is not None]
    return torch.stack(given).amax() if given else None


def trained_parameters(model: GPT) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name: all of them, unless the others are frozen, as by LoRA."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model: GPT, cfg: TrainConfig, dist=None) -> Optimizer:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest. Biases and norms are not decayed."""
    blocks = [p for p in model.transformer.h.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    params = [p for p in trained_parameters(model).values() if all(p is not b for b in blocks)]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, cfg.learning_rate, (cfg.beta1, cfg.beta2))
    if cfg.optimizer == "adamw":
        return adamw
    if cfg.optimizer != "muon":
        raise ValueError(f"make_optimizer does not know {cfg.optimizer}")
    fused = {p for name, p in model.named_parameters() if name.endswith("c_attn.weight")}  # queries, keys, values
    matrices = [(p, 3 if p in fused else 1) for p in blocks]
    return Muon(matrices, adamw, cfg.muon_lr, cfg.muon_momentum, cfg.weight_decay, dist)


def set_lr(optimizer: Optimizer, lr: float, cfg: TrainConfig) -> None:
    """Set the learning rate of all groups. One with a `peak_lr` of its own, as Muon's, gets that in the same ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr / cfg.learning_rate * group["peak_lr"] if "peak_lr" in group else lr


def grad_norm(module: torch.nn.Module) -> Tensor:
    """The norm of all gradients of a module, a scalar on the device."""
    grads = [local(p.grad) for p in module.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def clip_gradients(model: GPT, max_norm: float, dist=None) -> Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; 0.0 does not scale (Pascanu et al. 2013).

    dist: makes the norm that of all shards, if the model is sharded. Returns the norm before clipping, a scalar on the
    device, so that the host does not wait for it.
    """
    norm = dist.norm(grad_norm(model)) if dist else grad_norm(model)
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if max_norm:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def state_tensors(model: GPT, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as {'exp_avg.NAME': tensor, ...}, where NAME is the parameter's."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{key}.{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_state_tensors(model: GPT, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Copy tensors as `state_tensors` returned them into the state: this rank's rows of those that are sharded.

    Raises ValueError if names or shapes differ.
    """
    present = {name: local(value) for name, value in state_tensors(model, optimizer).items()}
    odd = sorted(present.keys() ^ tensors.keys()) or [n for n in present if present[n].shape != tensors[n].shape]
    if odd:
        raise ValueError(f"the optimizer's state does not fit the model; the first that differs is {odd[0]}")
    for name, tensor in tensors.items():
        present[name].copy_(tensor)
