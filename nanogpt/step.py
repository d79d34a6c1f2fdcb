"""One training step: the gradients of the global batch, then the update. The only forward and backward of the package.

Shapes: B sequences of a micro-batch, T block_size. Scalars are tensors of no dimension, for which nobody waits.
"""

import torch

from nanogpt import data, optim


def train_step(run):
    """One update on one global batch. Its metrics, {name: scalar}: one more is one line in `update`."""
    loss = run.repeat_smaller(gradients)  # in smaller micro-batches if the memory runs out
    return update(run, loss)


def loss_terms(model, x, y):
    """(objective, nats) of a micro-batch: what is optimized, and the mean cross-entropy, which is reported.

    A term that is added to the objective, such as a z-loss, reaches no loss that is printed, compared or waited for.
    """
    _, nats = model(x, y)
    return nats, nats


def forward_backward(model, x, y, dist, divisor=1.0, scaler=None):
    """Add the gradients of the objective / divisor of a micro-batch to `.grad`; its nats / divisor.

    x, y: (B, T). scaler: a GradScaler, which multiplies the objective before its backward pass.
    """
    with dist.autocast():
        objective, nats = loss_terms(model, x, y)
    objective = objective / divisor
    (scaler.scale(objective) if scaler else objective).backward()
    return nats.detach() / divisor


def gradients(run, micro_batch):
    """Leave this process's part of the gradient of the global batch in `.grad`, averaged over the processes; its loss.

    At most `micro_batch` sequences are worked on at a time. Nothing else changes, so it can be repeated with fewer.
    """
    cfg, dist, batches, state = run.cfg, run.dist, run.batches, run.state
    micro_steps, B = data.share_batch(cfg, dist.world_size, micro_batch)
    mine = state.windows + dist.rank * micro_steps * B  # the first of this process's windows
    run.optimizer.zero_grad()  # those of an attempt that ran out of memory
    if cfg.dropout:
        torch.manual_seed(data.step_seed(cfg.seed, state.step, dist.rank))  # so no random state has to be saved
    loss = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        first = mine + micro_step * B
        x, y = batches.get(first, B)
        divisor = micro_steps / batches.weight(first, B, state.windows)
        with dist.synchronised(run.model, last=micro_step == micro_steps - 1):  # the last one averages over processes
            loss += forward_backward(run.model, x, y, dist, divisor, run.scaler)
    return loss


def update(run, loss):
    """Clip the gradient and apply it, unless it or the loss is not finite. The step's metrics, {name: scalar}."""
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
