"""How good a model is: a quick estimate during training, and the exact loss over a whole split."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nanogpt.data import Documents, largest_divisor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context without dropout and gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def losses(run, micro_batch: int) -> dict[str, float]:
    """Mean loss over the first `eval_iters` batches of each of the run's splits: {'train': nats, 'val': nats}.

    Always the same batches, so that evaluations can be compared. Each rank takes every world_size-th batch, at most
    `micro_batch` sequences at a time; all call the model equally often, since that may be a collective operation. A split
    of at most eval_iters * batch_size windows is read once as a whole: its loss is then `exact`, and costs less than the
    estimate. run.tick() is called before each batch and may raise.
    """
    cfg, dist, result = run.cfg, run.dist, {}
    B = largest_divisor(cfg.batch_size, micro_batch)
    with evaluating(run.model):
        for split, batches in run.eval_batches.items():
            if batches.epoch_windows <= cfg.eval_iters * cfg.batch_size:
                how = dict(micro_batch=micro_batch, tick=run.tick, what=f"{split} loss")
                result[split] = exact(run.model, batches.dataset, cfg, dist, **how)["loss"]
                continue
            total = torch.zeros((), device=dist.device)
            for first in range(0, cfg.eval_iters, dist.world_size):
                run.tick()
                i = first + dist.rank
                for window in range(i * cfg.batch_size, (i + 1) * cfg.batch_size, B):
                    x, y = batches.get(window, B)
                    with dist.autocast():
                        loss = run.model(x, y)[1]
                    if i < cfg.eval_iters:
                        total += loss * batches.filled(window, B)
            filled = batches.filled(0, cfg.eval_iters * cfg.batch_size)  # all targets count the same
            result[split] = dist.sum([total.item()])[0] / (cfg.eval_iters * (cfg.batch_size // B) * filled)
    return result


def exact_validation(run, micro_batch: int) -> dict:
    """`exact` on the run's validation split, at most `micro_batch` sequences at a time."""
    dataset, how = run.eval_batches["val"].dataset, dict(micro_batch=micro_batch, tick=run.tick)
    return exact(run.model, dataset, run.cfg, run.dist, run.token_bytes(), **how)


def exact(
    model: nn.Module,
    dataset,
    cfg,
    dist,
    token_bytes: np.ndarray | None = None,
    *,
    micro_batch: int | None = None,
    tick: Callable[[], None] = lambda: None,
    layout: Documents | None = None,
    each: bool = False,
    what: str = "exact val loss",
) -> dict:
    """The loss over a whole split, in which each token is predicted once, from windows laid end to end.

    cfg: has `block_size` and `batch_size`. token_bytes: the UTF-8 length of each token id, or None. micro_batch:
    maximum number of sequences at a time. tick: called before each batch; may raise. layout: the `data.Documents` to
    read; by default the dataset's own, or, if it has none, the whole split as one document. what: the label of the
    progress bar.

    Returns a dict with `loss` (nats per token), `tokens`, `perplexity` and, with token_bytes, `bits_per_byte`. If
    `each`, `documents` is a list of such dicts, with None for a document that has no token to predict. There is no
    randomness: the result is the same to the last digit every time.
    """
    T, B = cfg.block_size, min(cfg.batch_size, micro_batch or cfg.batch_size)
    layout = layout or dataset.documents or Documents([0, len(dataset.tokens)], T)
    sums = np.zeros((len(layout.begins) - 1 if each else 1, 3))  # nats, tokens and bytes, by document or of all
    rounds = range(0, len(layout), dist.world_size * B)  # in each, every process takes a batch
    with evaluating(model):
        for first in tqdm(rounds, desc=what, leave=False, disable=None if dist.is_main else True, mininterval=0.5):
            tick()
            mine = np.arange(first + dist.rank * B, min(first + (dist.rank + 1) * B, len(layout)))
            x, y = padded_windows(dataset, layout, mine, B, T)
            with dist.autocast():
                logits, loss = model(dist.to_device(x), dist.to_device(y))
            if not len(mine):  # in the last round, if there is no batch left for this process
                break
            counts = (y >= 0).sum(1).numpy()
            # the mean loss of the batch, spread over its windows by their targets, or that of each window
            nats = window_nats(logits, dist.to_device(y)) if each else loss.item() * counts
            lengths = np.zeros(B) if token_bytes is None else np.where(y >= 0, token_bytes[y.numpy()], 0).sum(1)
            rows = layout.which(mine) if each else np.zeros(len(mine), dtype=np.int64)
            np.add.at(sums, rows, np.stack([nats, counts, lengths], axis=1)[: len(mine)])
    sums = np.reshape(dist.sum(sums.ravel().tolist()), sums.shape)
    result = summary(*sums.sum(0))
    if each:
        result["documents"] = [summary(*row) if row[1] else None for row in sums]
    return result


def summary(nats: float, count: float, n_bytes: float) -> dict:
    """The result for `count` tokens, `n_bytes` bytes in UTF-8, whose negative log-probabilities add up to `nats`."""
    result = {"loss": float(nats / count), "tokens": int(count), "perplexity": math.exp(min(nats / count, 700))}
    if n_bytes:
        result["bits_per_byte"] = float(nats / math.log(2) / n_bytes)
    return result


def padded_windows(dataset, layout: Documents, numbers: np.ndarray, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of these windows, padded to the shape (B, T) with targets -1, which are ignored."""
    starts, stops = (np.pad(ends, (0, B - len(numbers))) for ends in layout.windows(numbers))
    x, y = dataset.windows(starts, stops, T)
    for row, repeated in enumerate(layout.repeated(numbers)):
        y[row, :repeated] = -1
    return x, y


def window_nats(logits: Tensor, y: Tensor) -> np.ndarray:
    """The sum of -log p over the targets (B, T) of each window: (B,)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction="none")
    return losses.view_as(y).cpu().double().sum(1).numpy()


def byte_lengths(tok, separator: int | None = None) -> np.ndarray | None:
    """The UTF-8 length of each token id; 0 for the separator, which stands for no text.

    None if the tokenizer changes the text.
    """
    if not getattr(tok, "lossless", True):
        return None
    lengths = np.array([len(tok.token_bytes(i)) for i in range(tok.vocab_size)])
    if separator is not None:
        lengths[separator] = 0
    return lengths
