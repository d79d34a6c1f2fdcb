"""One training step: the gradients of the global batch, then the update. The only backward pass of the package.

`run` is a run.run.Run; used here are cfg, dist (a run.distributed.Dist), gpt (the model, to read parameters from), model
(gpt, perhaps compiled and wrapped by DDP, to call; FSDP2 changes gpt itself), optimizer, scaler (a GradScaler, which
does nothing unless the products are float16), health, batches, and state. A window is a sequence of block_size tokens
and their targets.
Shapes: B windows in a micro-batch, T block_size. Scalars are tensors of no dimension; the host does not wait for them.
"""

import torch
from torch import Tensor

from nanogpt import data, optim


def train_step(run) -> dict[str, Tensor]:
    """Update the model on one global batch; returns the step's metrics, {name: scalar}."""
    loss = run.retry_smaller(gradients)  # gradients(run, micro_batch), and again with half of it if memory runs out
    metrics = update(run, loss)
    run.advance()
    return metrics


def loss_terms(model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(objective, nats) of a micro-batch: what is optimized, and the mean cross-entropy, which is reported.

    A term added to the objective, such as a z-loss, changes neither the reported losses nor --patience.
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
    """Compute the gradient of the global batch in `.grad`. Returns this rank's part of the loss, in nats.

    The mean of the parts over all ranks is the mean loss of the batch. A micro-batch has at most `micro_batch` windows.
    This function must change nothing but `.grad`, since it is called again if memory runs out.
    """
    cfg, dist, batches, state = run.cfg, run.dist, run.batches, run.state
    micro_steps, B = data.share_batch(cfg, dist.world_size, micro_batch)
    mine = data.part_of_rank(batches.per_step, dist.rank, dist.world_size)
    dist.clear_gradients(run.model)  # of an attempt that ran out of memory
    if cfg.dropout:
        torch.manual_seed(data.step_seed(cfg.seed, state.step, dist.rank))  # so no random state has to be saved
    loss = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        part = mine[micro_step * B :][:B]  # fewer than B, or none, if the processes do not divide the batch
        first = state.windows + part.start  # state.windows: read before this step
        x, y = batches.get(first, len(part), padded_to=B)
        # micro_steps, unless parts differ or windows are partly empty: all targets of the step count the same
        divisor = batches.divisor(first, len(part), state.windows)
        with dist.averaging(run.model, when=micro_step == micro_steps - 1):  # over all ranks, in the last one
            loss += forward_backward(run.model, x, y, dist, divisor, run.scaler)
    return loss


def update(run, loss: Tensor) -> dict[str, Tensor]:
    """Clip the gradient and apply it; returns the step's metrics, {name: scalar}.

    It is not applied if it or the loss is not finite or, with --skip_spikes, if the loss is a spike.
    """
    run.scaler.unscale_(run.optimizer)
    loss = run.dist.mean_loss(loss)  # of the global batch from here on
    # metrics of gradients belong here: .grad is averaged and unscaled, the next line clips it
    grad_norm = optim.clip_gradients(run.gpt, run.cfg.grad_clip, run.dist)
    skip, spike = run.health.judge(run.step, loss, grad_norm)
    run.scaler.step(run.optimizer, skip)  # calls optimizer.step(skip): the device decides, and the host does not wait
    run.scaler.update()
    run.dist.clear_gradients(run.model)  # frees their memory for an evaluation
    return {"loss": loss, "grad_norm": grad_norm, "spike": spike}
