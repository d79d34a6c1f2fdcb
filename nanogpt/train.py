"""THE loop: train a GPT on a dataset, on one process or on many.

`train` at the end is the whole run; `train_step` is one update; above them is what prepares a run. The rest
lives in the modules that their lines name.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanogpt import checkpoint, config, data, distributed, evaluate, export, metrics, optim, schedule, tokenizer
from nanogpt.config import GPT2_NAMES, TrainConfig, UserError
from nanogpt.model import GPT, GPTConfig

SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias")  # the settings that shape a model's weights


@dataclass
class TrainState:
    """Where a run stands: what resuming needs beside weights and optimizer state."""

    step: int = 0  # updates done
    best_val_loss: float = math.inf


def main(argv):
    """`train.py`, given its arguments."""
    cfg = config.load(TrainConfig, argv, "train.py")
    with distributed.setup(cfg) as dist:
        train(cfg, dist)


def find_start(cfg):
    """What `init_from` means: None (from scratch), a Checkpoint, or the name or folder of a GPT-2 for `export`."""
    if cfg.init_from == "scratch":
        return None
    if cfg.init_from in ("resume", "auto"):
        found = checkpoint.newest(cfg.out_dir)
        if found is None and cfg.init_from == "resume":
            raise UserError(
                f"--init_from=resume: {cfg.out_dir}/ holds no checkpoint; "
                "--init_from=scratch starts a run there, --out_dir=... names another folder"
            )
        return found
    if cfg.init_from in GPT2_NAMES or export.is_hugging_face(cfg.init_from):
        return cfg.init_from
    found = checkpoint.best(cfg.init_from)
    if found is None:
        known = ("scratch", "resume", "auto", *GPT2_NAMES)
        raise UserError(
            f"--init_from={cfg.init_from}: expected {', '.join(known)}, a folder in Hugging Face's format, "
            f"or the out_dir of another run{config.nearest(cfg.init_from, known)}"
        )
    return found


def make_model(cfg, found, dataset, dist):
    """The model that `find_start` found, or a new one, on the device. UserError where it does not fit the settings."""
    torch.manual_seed(cfg.seed)
    resuming = cfg.init_from in ("resume", "auto")
    if found is None:
        shape = {name: getattr(cfg, name) for name in SHAPE}
        model = GPT(GPTConfig(**shape, dropout=cfg.dropout, vocab_size=padded(dataset.vocab_size, dist)))
    elif isinstance(found, checkpoint.Checkpoint):
        if resuming:
            keep_shape(cfg, found)
        if found.tokenizer != dataset.tokenizer_json:
            raise UserError(f"--dataset={cfg.dataset}: its tokenizer is not the one of the model in {found.folder}")
        model = checkpoint.load_model(found, cfg.dropout)
    else:
        model = export.from_pretrained(found, cfg.dropout)
        if dataset.vocab_size > model.config.vocab_size:
            raise UserError(
                f"--dataset={cfg.dataset}: its vocabulary of {dataset.vocab_size} does not fit "
                f"the {model.config.vocab_size} of {found}"
            )
    if cfg.block_size > model.config.block_size:
        raise UserError(f"--block_size={cfg.block_size}: longer than the {model.config.block_size} tokens of context of {cfg.init_from}")
    if cfg.block_size < model.config.block_size:
        dist.say(f"context: cropped from {model.config.block_size} to {cfg.block_size} tokens (--block_size)")
        model.crop_block_size(cfg.block_size)
    return model.to(dist.device)


def keep_shape(cfg, found):
    """Take the checkpoint's shape; refuse where a file or flag asks for another."""
    wrong = [name for name in SHAPE if name in cfg.sources and getattr(cfg, name) != found.model_config[name]]
    if wrong:
        raise UserError(*(f"{cfg.sources[n]}: {found.folder}, to be resumed, has {n} = {found.model_config[n]}" for n in wrong))
    for name in SHAPE:
        setattr(cfg, name, found.model_config[name])


def padded(vocab_size, dist):
    """A large vocabulary, rounded up to a multiple of 64."""
    size = -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size
    if size != vocab_size:
        dist.say(f"vocabulary: {vocab_size} tokens, padded to {size}, because matrix units like multiples of 64")
    return size


def restore(found, model, optimizer, scaler):
    """Put back optimizer and scaler as the checkpoint has them; returns its TrainState."""
    try:
        optim.load_state_tensors(model, optimizer, found.optimizer_tensors())
        if found.scaler and scaler.is_enabled():
            scaler.load_state_dict(found.scaler)
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{found.folder}: its optimizer state does not fit the model ({e})") from None
    return TrainState(found.step, found.best_val_loss)


def start_log(cfg, dist, model, datasets, state):
    """Say what is about to be trained, and open its log."""
    micro_steps, size = distributed.share_batch(cfg, dist.world_size)
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops = model.flops_per_token(cfg.block_size) * tokens
    counts = [f"{len(datasets[split].tokens):,} {what}" for split, what in (("train", "to train on"), ("val", "to validate on"))]
    dist.say(f"data: {cfg.dataset}, tokens: {', '.join(counts)}")
    dist.say(f"model: {model.num_params() / 1e6:.2f}M parameters, {cfg.block_size} tokens of context")
    processes = f"{dist.world_size} processes x " if dist.world_size > 1 else ""
    dist.say(f"iteration: {tokens:,} tokens ({processes}{micro_steps} x {size} sequences), {flops / 1e9:,.2f} GFLOP")
    peak = metrics.device_peak(dist) if dist.is_main and not cfg.eval_only else math.nan
    return metrics.Log(cfg, dist, start_step=state.step, tokens_per_iter=tokens, flops_per_iter=flops, peak=peak)


def open_out_dir(cfg, dist, resuming):
    """Make `out_dir`, set an earlier run in it aside, and save the settings there."""
    if not dist.is_main:
        return
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    aside = None if resuming else checkpoint.set_aside(cfg.out_dir)
    if aside:
        dist.say(f"{cfg.out_dir}/ held an earlier run, which is now in {aside}/")
    checkpoint.write_settings(cfg.out_dir, config.settings(cfg), cfg.sources)


def byte_lengths(tokenizer_json, dist):
    """The UTF-8 length of each token id, for bits per byte; None where the tokenizer's package is missing."""
    try:
        tok = tokenizer.from_json(tokenizer_json)
    except ImportError as e:
        dist.say(f"no bits per byte: {e}")
        return None
    return np.array([len(tok.token_bytes(i)) for i in range(tok.vocab_size)])


def train_step(model, optimizer, scaler, batches, step, cfg, dist):
    """One update on one global batch. Returns its mean loss and gradient norm as tensors, without waiting for them."""
    micro_steps, size = distributed.share_batch(cfg, dist.world_size)
    window = step * cfg.gradient_accumulation_steps * cfg.batch_size + dist.rank * micro_steps * size
    if cfg.dropout:
        torch.manual_seed(data.step_seed(cfg.seed, step, dist.rank))  # so that no random state need be kept
    total = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        x, y = batches.get(window + micro_step * size, size)
        with dist.synchronised(model, last=micro_step == micro_steps - 1):
            with dist.autocast():
                loss = model(x, y)[1] / micro_steps
            scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = optim.clip_gradients(model, cfg.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return dist.mean(total), grad_norm


def train(cfg, dist):
    """The whole run. Returns the exact validation loss at its end, as `evaluate.exact` gives it."""
    distributed.choose_seed(cfg, dist)
    distributed.share_batch(cfg, dist.world_size)  # refuses a number of processes that does not divide the batch
    metrics.require_wandb(cfg)
    found = find_start(cfg)
    resuming = found is not None and cfg.init_from in ("resume", "auto")
    datasets = {split: data.Dataset(cfg.dataset, split, cfg.block_size) for split in ("train", "val")}
    model = make_model(cfg, found, datasets["train"], dist)
    optimizer = optim.make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    state = restore(found, model, optimizer, scaler) if resuming else TrainState()
    start_step = state.step
    if resuming:
        dist.say(f"resuming {found.folder} at step {state.step}")
    if not cfg.eval_only:
        open_out_dir(cfg, dist, resuming)

    batches = data.Batches(datasets["train"], "train", cfg.seed, cfg.block_size, dist)
    eval_batches = {s: data.Batches(datasets[s], f"eval {s}", cfg.seed, cfg.block_size, dist) for s in datasets}
    micro_batch = distributed.share_batch(cfg, dist.world_size)[1], cfg.block_size
    compiled_model = distributed.compiled(model, cfg, dist, micro_batch, training=True)  # the same weights
    ddp_model = dist.wrap(compiled_model)
    log = start_log(cfg, dist, model, datasets, state)

    while True:
        lr = optim.set_lr(optimizer, schedule.lr_at(state.step, cfg))
        finished = cfg.eval_only or state.step >= cfg.max_iters
        if finished or state.step % cfg.eval_interval == 0:
            with log.paused():
                losses = evaluate.losses(compiled_model, eval_batches, cfg, dist)
                log.evaluation(state.step, losses, lr)
                improved = losses["val"] < state.best_val_loss
                state.best_val_loss = min(losses["val"], state.best_val_loss)
                if state.step > start_step and (improved or cfg.always_save_checkpoint) and dist.is_main:
                    save(cfg, model, optimizer, scaler, state, losses, datasets["train"])
        if finished:
            break
        loss, grad_norm = train_step(ddp_model, optimizer, scaler, batches, state.step, cfg, dist)
        state.step += 1
        log.step(state.step, loss, grad_norm, lr)

    with log.paused():
        result = evaluate.exact(compiled_model, datasets["val"], cfg, dist, byte_lengths(datasets["val"].tokenizer_json, dist))
        log.exact(state.step, result)
    log.close()
    return result


def save(cfg, model, optimizer, scaler, state, losses, dataset):
    """Write a checkpoint of the run as it stands."""
    checkpoint.save(
        cfg.out_dir,
        model,
        optim.state_tensors(model, optimizer),
        step=state.step,
        val_loss=losses["val"],
        best_val_loss=state.best_val_loss,
        tokenizer=dataset.tokenizer_json,
        settings=config.settings(cfg),
        scaler=scaler.state_dict(),
    )
