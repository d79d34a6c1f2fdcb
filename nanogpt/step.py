"""One training step: the gradients of the global batch, then the update. The only forward and backward of the package.

Shapes: B sequences in a micro-batch, T block_size. Scalars are tensors of no dimension; the host does not wait for them.
"""

import torch
from torch import Tensor

from nanogpt import data, optim


def train_step(run) -> dict[str, Tensor]:
    """Update the model on one global batch; returns the step's metrics, {name: scalar}."""
    loss = run.repeat_smaller(gradients)  # with smaller micro-batches if the memory runs out
    return update(run, loss)


def loss_terms(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(objective, nats) of a micro-batch: what is optimized, and the mean cross-entropy, which is reported.

    A term added to the objective, such as a z-loss, changes no loss that is printed, validated or waited for.
    """
    _, nats = model(x, y)
    return nats, nats


def forward_backward(model, x: Tensor, y: Tensor, dist, divisor: float = 1.0, scaler=None) -> Tensor:
    """Add the gradients of a micro-batch's objective / divisor to `.grad`; returns its nats / divisor.

    x, y: (B, T). scaler: a GradScaler, which multiplies the objective before the backward pass.
    """
    with dist.autocast():
        objective, nats = loss_terms(model, x, y)
    objective = objective / divisor
    (scaler.scale(objective) if scaler else objective).backward()
    return nats.detach() / divisor


def gradients(run, micro_batch: int) -> Tensor:
    """Compute the gradient of the global batch, averaged over all ranks, in `.grad`; returns this rank's mean loss.

    A micro-batch has at most `micro_batch` sequences. Nothing else changes, so it can be repeated with smaller ones.
    """
    cfg, dist, batches, state = run.cfg, run.dist, run.batches, run.state
    micro_steps, B = data.share_batch(cfg, dist.world_size, micro_batch)
    mine = state.windows + dist.rank * micro_steps * B  # the first window of this rank
    run.optimizer.zero_grad()  # discards an attempt that ran out of memory
    if cfg.dropout:
        torch.manual_seed(data.step_seed(cfg.seed, state.step, dist.rank))  # so no random state has to be saved
    loss = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        first = mine + micro_step * B
        x, y = batches.get(first, B)
        divisor = micro_steps / batches.weight(first, B, state.windows)
        with dist.synchronised(run.model, last=micro_step == micro_steps - 1):  # the last one averages over all ranks
            loss += forward_backward(run.model, x, y, dist, divisor, run.scaler)
    return loss


def update(run, loss: Tensor) -> dict[str, Tensor]:
    """Clip the gradient and apply it, unless it or the loss is not finite; returns the step's metrics, {name: scalar}."""
    run.scaler.unscale_(run.optimizer)
    loss = run.dist.mean(loss)
    grad_norm = optim.clip_gradients(run.gpt, run.cfg.grad_clip)
    skip, spike = run.health.judge(run.step, loss, grad_norm)
    run.scaler.step(run.optimizer, skip)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.state.step += 1
    run.state.windows += run.batches.per_step
    return {"loss": loss, "grad_norm": grad_norm, "spike": spike}
