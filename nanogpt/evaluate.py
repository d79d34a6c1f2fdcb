"""How good the model is: a quick estimate during training, and the exact loss over a whole split."""

import math
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from nanogpt.distributed import largest_divisor


@contextmanager
def evaluating(model):
    """No dropout and no gradients within."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def losses(model, batches, cfg, dist, stop=lambda: False, most=None):
    """Mean loss over the first `eval_iters` batches of each stream: {'train': nats, 'val': nats}.

    Always the same batches, so that evaluations compare. Each process takes every world_size-th batch. A split
    with no more windows than that is read once, whole: the loss is then `exact`, and costs less than the estimate.
    `stop` is asked before each batch; where it answers True, None is returned. At most `most` sequences are worked
    on at a time.
    """
    result = {}
    size = largest_divisor(cfg.batch_size, most or cfg.batch_size)
    with evaluating(model):
        for split, stream in batches.items():
            if stream.epoch_windows <= cfg.eval_iters * cfg.batch_size:
                whole = exact(model, stream.dataset, cfg, dist, None, stop, most, f"{split} loss")
                if whole is None:
                    return None
                result[split] = whole["loss"]
                continue
            total = torch.zeros((), device=dist.device)
            for first in range(0, cfg.eval_iters, dist.world_size):
                if stop():
                    return None
                i = first + dist.rank
                if i >= cfg.eval_iters:
                    break
                for window in range(i * cfg.batch_size, (i + 1) * cfg.batch_size, size):
                    x, y = stream.get(window, size)
                    with dist.autocast():
                        total += model(x, y)[1]
            result[split] = dist.sum([total.item()])[0] / (cfg.eval_iters * (cfg.batch_size // size))
    return result


def exact(model, dataset, cfg, dist, token_bytes, stop=lambda: False, most=None, what="exact val loss"):
    """The loss over all of a split, each token predicted once, from windows laid end to end.

    `token_bytes`: the UTF-8 length of each token id, or None. Returns a dict: `loss` (nats a token), `tokens`,
    `perplexity`, and with token_bytes `bits_per_byte`. No randomness: the same to the last digit every time.
    `stop` is asked before each batch; where it answers True, None is returned. At most `most` sequences are
    worked on at a time. `what` names the progress bar.
    """
    T, B, n = cfg.block_size, min(cfg.batch_size, most or cfg.batch_size), len(dataset.tokens)
    nats = count = n_bytes = 0
    starts = np.arange(0, n - 1, T)
    rounds = range(0, len(starts), dist.world_size * B)  # in each, every process takes a batch
    with evaluating(model):
        for first in tqdm(rounds, desc=what, leave=False, disable=None if dist.is_main else True, mininterval=0.5):
            if stop():
                return None
            mine = starts[first + dist.rank * B :][:B]
            if not len(mine):
                break
            ids = padded_windows(dataset, mine, B, T)
            targets = ids[:, 1:]
            x, y = dist.to_device(ids[:, :-1].clamp(min=0)), dist.to_device(targets.contiguous())
            with dist.autocast():
                loss = model(x, y)[1].item()
            real = targets[targets >= 0]
            nats += loss * real.numel()
            count += real.numel()
            if token_bytes is not None:
                n_bytes += int(token_bytes[real.numpy()].sum())
    nats, count, n_bytes = dist.sum([nats, count, n_bytes])
    result = {"loss": nats / count, "tokens": int(count), "perplexity": math.exp(min(nats / count, 700))}
    if n_bytes:
        result["bits_per_byte"] = nats / math.log(2) / n_bytes
    return result


def padded_windows(dataset, starts, B, T):
    """Windows of T + 1 ids from each start, filled with -1 (not counted) to the one shape (B, T + 1)."""
    ids = torch.full((B, T + 1), -1, dtype=torch.int64)
    for row, start in enumerate(starts):
        window = dataset.tokens[start : start + T + 1]
        dataset.check(window)
        ids[row, : len(window)] = torch.from_numpy(window.astype(np.int64))
    return ids
