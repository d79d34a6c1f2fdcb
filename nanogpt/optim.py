"""The optimizer: AdamW, its parameter groups, gradient clipping, and its state as named tensors."""

import torch


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), all parameters in one fused kernel.

    Bit for bit what `torch.optim.AdamW(fused=True)` does. That class imports the compiler at its first step, which
    takes as long as importing all the rest of PyTorch, and looks every parameter up anew at each one.

    groups: [{'params': [...], 'weight_decay': float}, ...]. `state` maps each parameter to its `step`,
    `exp_avg` and `exp_avg_sq`.
    """

    _step_supports_amp_scaling = True  # tells GradScaler to set found_inf instead of waiting for it

    def __init__(self, groups, lr, betas, eps=1e-8):
        self.param_groups = [{**group, "lr": lr} for group in groups if group["params"]]
        self.betas, self.eps = betas, eps
        self.state = {p: self._zero_state(p) for group in self.param_groups for p in group["params"]}

    def _zero_state(self, p):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, skip=None):
        """Update every parameter that has a gradient; where the tensor `skip` holds 1, change nothing.

        So the device decides, and nobody waits for it. `torch.amp.GradScaler` adds its own found_inf.
        """
        found = [s for s in (skip, getattr(self, "found_inf", None)) if s is not None]
        skip = torch.stack(found).amax() if found else None
        if skip is not None and skip.device.type == "mps" and skip.item():
            return  # Metal's kernel may ignore found_inf (PyTorch #186360); this waits for the device
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            steps = [s["step"] for s in states]
            torch._foreach_add_(steps, 1 if skip is None else 1 - skip)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
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

    def zero_grad(self):
        """Forget the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def make_optimizer(model, cfg):
    """AdamW with weight decay on matrices and embeddings only, not on biases and norms."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, cfg.learning_rate, (cfg.beta1, cfg.beta2))


def set_lr(optimizer, lr):
    """Set the learning rate of every group; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def clip_gradients(model, max_norm):
    """Scale the gradients so that their joint norm is at most `max_norm` (0.0: leave them alone).

    Returns the norm before that, as a tensor, so that nobody waits for the device. Pascanu et al. 2013.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def state_tensors(model, optimizer):
    """The optimizer's state as {'exp_avg.NAME': tensor, ...}, NAME being the parameter's."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{key}.{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_state_tensors(model, optimizer, tensors):
    """Copy what `state_tensors` gave back into the state. Raises ValueError where names or shapes differ."""
    present = state_tensors(model, optimizer)
    odd = sorted(present.keys() ^ tensors.keys()) or [n for n in present if present[n].shape != tensors[n].shape]
    if odd:
        raise ValueError(f"the optimizer's state does not fit the model, first of all {odd[0]}")
    for name, tensor in tensors.items():
        present[name].copy_(tensor)
