"""THE loop: train a GPT on a dataset, on one process or on many.

`train` at the end is the whole run; `train_step` is one update; above them is what prepares a run. The rest
lives in the modules that their lines name.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nanogpt import (
    checkpoint,
    config,
    data,
    distributed,
    evaluate,
    export,
    health,
    metrics,
    optim,
    schedule,
    signals,
    tokenizer,
)
from nanogpt.config import GPT2_NAMES, RunFailed, TrainConfig, UserError
from nanogpt.model import GPT, GPTConfig

SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias")  # the settings that shape a model's weights


@dataclass
class TrainState:
    """Where a run stands: what resuming needs beside tensors."""

    step: int = 0  # updates done
    evaluated: int = -1  # the step at which the last evaluation was made
    losses: dict | None = None  # what it found
    improved: bool = False  # whether its val loss was the best so far
    best_val_loss: float | None = None
    spikes: int = 0  # losses far above the recent ones, so far

    def note(self, losses):
        """Take note of an evaluation at this step."""
        self.evaluated, self.losses = self.step, losses
        self.improved = self.best_val_loss is None or losses["val"] < self.best_val_loss
        if self.improved:
            self.best_val_loss = losses["val"]


@dataclass
class Run:
    """All that a run changes and a checkpoint holds."""

    model: GPT
    optimizer: optim.AdamW
    scaler: torch.amp.GradScaler
    health: health.Health
    state: TrainState
    datasets: dict  # {"train": data.Dataset, "val": data.Dataset}

    def tensors(self):
        """Everything but the weights, by name; the very tensors that are in use."""
        return optim.state_tensors(self.model, self.optimizer) | self.health.state


def main(argv):
    """`train.py`, given its arguments."""
    cfg = config.load(TrainConfig, argv, "train.py", inherit=settings_to_resume)
    with distributed.setup(cfg) as dist:
        train(cfg, dist)


def settings_to_resume(cfg):
    """The settings of the run that is to go on, and its folder; none where there is none."""
    if cfg.init_from not in ("resume", "auto"):
        return {}, None
    found = checkpoint.peek(cfg.out_dir) or export.from_nanogpt(cfg.out_dir)
    if found is None:
        return {}, None
    return {k: v for k, v in found.settings.items() if k not in ("init_from", "out_dir", "eval_only")}, str(found.folder)


def find_start(cfg, dist):
    """What `init_from` means: None (from scratch), a Checkpoint, or the name or folder of a GPT-2 for `export`."""
    if cfg.init_from == "scratch":
        return None
    if cfg.init_from in ("resume", "auto"):
        found = checkpoint.newest(cfg.out_dir, dist.say) or export.from_nanogpt(cfg.out_dir)
        if found is None and cfg.init_from == "resume":
            raise UserError(
                f"--init_from=resume: {cfg.out_dir}/ holds no checkpoint; "
                "--init_from=scratch starts a run there, --out_dir=... names another folder"
            )
        return found
    if cfg.init_from in GPT2_NAMES or export.is_hugging_face(cfg.init_from):
        return cfg.init_from
    found = checkpoint.best(cfg.init_from, dist.say) or export.from_nanogpt(cfg.init_from)
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
    """Refuse to resume with another shape than the checkpoint's."""
    wrong = [name for name in SHAPE if getattr(cfg, name) != found.model_config[name]]
    if wrong:
        raise UserError(
            *(f"{cfg.sources.get(n, n)}: {found.folder}, to be resumed, has {n} = {found.model_config[n]}" for n in wrong)
        )


def padded(vocab_size, dist):
    """A large vocabulary, rounded up to a multiple of 64."""
    size = -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size
    if size != vocab_size:
        dist.say(f"vocabulary: {vocab_size} tokens, padded to {size}, because matrix units like multiples of 64")
    return size


def restore(run, found):
    """Put the run where the checkpoint left it. UserError where that does not fit."""
    try:
        tensors = found.optimizer_tensors()
        for name in run.health.state.keys() & tensors.keys():
            run.health.state[name].copy_(tensors.pop(name))
        optim.load_state_tensors(run.model, run.optimizer, tensors)
        if found.scaler and run.scaler.is_enabled():
            run.scaler.load_state_dict(found.scaler)
        run.state = TrainState(**found.state)
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{found.folder}: its state does not fit the model ({e})") from None


def start(cfg, dist):
    """The run that the settings describe, ready to go on, and its checkpoint's folder where it goes on from one."""
    distributed.choose_seed(cfg, dist)
    distributed.share_batch(cfg, dist.world_size)  # refuses a number of processes that does not divide the batch
    metrics.require_wandb(cfg)
    found = find_start(cfg, dist)
    resuming = found is not None and cfg.init_from in ("resume", "auto")
    datasets = {split: data.Dataset(cfg.dataset, split, cfg.block_size) for split in ("train", "val")}
    model = make_model(cfg, found, datasets["train"], dist)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    run = Run(model, optim.make_optimizer(model, cfg), scaler, health.Health(cfg, dist.device), TrainState(), datasets)
    if resuming:
        restore(run, found)
        dist.say(f"resuming {found.folder} at step {run.state.step}")
        if run.state.step >= cfg.max_iters and not cfg.eval_only:
            dist.say(f"nothing is left to train: --max_iters is {cfg.max_iters}")
    if dist.sum([run.state.step])[0] != run.state.step * dist.world_size:
        raise UserError(f"--out_dir={cfg.out_dir}: the processes see different checkpoints there; it must be a folder that all nodes share")
    if not cfg.eval_only:
        dist.barrier()  # all have read what they need
        open_out_dir(cfg, dist, resuming)
    return run, found.folder if resuming else None


def open_out_dir(cfg, dist, resuming):
    """Make `out_dir`, set an earlier run in it aside, and save the settings there."""
    if not dist.is_main:
        return
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        aside = None if resuming else checkpoint.set_aside(cfg.out_dir)
        if aside:
            dist.say(f"{cfg.out_dir}/ held an earlier run, which is now in {aside}/")
        checkpoint.write_settings(cfg.out_dir, config.settings(cfg), cfg.sources)
    except OSError as e:
        raise RunFailed(f"--out_dir={cfg.out_dir}: cannot be written to ({e.strerror}: {e.filename})") from None


def start_log(cfg, dist, run, watch):
    """Say what is about to be trained, and open its log."""
    micro_steps, size = distributed.share_batch(cfg, dist.world_size)
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops = run.model.flops_per_token(cfg.block_size) * tokens
    train, val = (f"{len(run.datasets[split].tokens):,}" for split in ("train", "val"))
    dist.say(f"data: {cfg.dataset}, {train} tokens to train on, {val} to validate on")
    dist.say(f"model: {run.model.num_params() / 1e6:.2f}M parameters, {cfg.block_size} tokens of context")
    processes = f"{dist.world_size} processes x " if dist.world_size > 1 else ""
    dist.say(f"iteration: {tokens:,} tokens ({processes}{micro_steps} x {size} sequences), {flops / 1e9:,.2f} GFLOP")
    peak = metrics.device_peak(dist) if dist.is_main and not cfg.eval_only else math.nan
    return metrics.Log(cfg, dist, watch, run.state, tokens_per_iter=tokens, flops_per_iter=flops, peak=peak)


def byte_lengths(tokenizer_json, dist):
    """The UTF-8 length of each token id, for bits per byte; None where the tokenizer's package is missing."""
    try:
        tok = tokenizer.from_json(tokenizer_json)
    except (ImportError, OSError) as e:
        dist.say(f"no bits per byte: {e}")
        return None
    return np.array([len(tok.token_bytes(i)) for i in range(tok.vocab_size)])


def train_step(model, run, batches, cfg, dist):
    """One update on one global batch. Returns its mean loss, gradient norm and whether it was a spike.

    They are tensors; nobody waits for them. A loss or gradient that is not finite is never applied.
    """
    step, optimizer, scaler = run.state.step, run.optimizer, run.scaler
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
    loss, grad_norm = dist.mean(total), optim.clip_gradients(run.model, cfg.grad_clip)
    skip, spike = run.health.judge(step, loss, grad_norm)
    scaler.step(optimizer, skip)
    scaler.update()
    optimizer.zero_grad()
    run.state.step += 1
    return loss, grad_norm, spike


def save(run, writer, cfg):
    """Give the run as it stands to the writer, which copies it and returns."""
    state = run.state
    evaluated = state.evaluated == state.step
    state = replace(state, losses=state.losses if evaluated else None, improved=state.improved and evaluated)
    info = dict(step=state.step, state=asdict(state), model_config=asdict(run.model.config))
    info |= dict(tokenizer=run.datasets["train"].tokenizer_json, settings=config.settings(cfg), scaler=run.scaler.state_dict())
    writer.save(dict(run.model.named_parameters()), run.tensors(), info)


def train(cfg, dist):
    """The whole run. Raises Stopped, saved, where it was asked to stop before its end."""
    with signals.stopping(dist) as stop:
        run, saved_in = start(cfg, dist)
        state, writer = run.state, checkpoint.Writer(cfg.out_dir, cfg.keep_checkpoints, cfg.always_save_checkpoint, saved_in)
        compiled_model = compile_model(run.model, cfg, dist, stop)  # the same weights
        ddp_model = dist.wrap(compiled_model)
        batches = data.Batches(run.datasets["train"], "train", cfg.seed, cfg.block_size, dist)
        eval_batches = {s: data.Batches(d, f"eval {s}", cfg.seed, cfg.block_size, dist) for s, d in run.datasets.items()}
        log = start_log(cfg, dist, run, health.Watch(cfg, dist, state, writer))
        try:
            while not stop.requested():
                lr = optim.set_lr(run.optimizer, schedule.lr_at(state.step, cfg))
                finished = cfg.eval_only or state.step >= cfg.max_iters
                if (finished or state.step % cfg.eval_interval == 0) and (cfg.eval_only or state.evaluated != state.step):
                    with log.paused():
                        losses = evaluate.losses(compiled_model, eval_batches, cfg, dist, stop.requested)
                        if losses is None:
                            break
                        state.note(losses)
                        log.evaluation(state.step, losses, lr)
                        if state.step > 0 and dist.is_main and not cfg.eval_only:
                            save(run, writer, cfg)
                if finished:
                    finish(run, compiled_model, log, cfg, dist, stop)
                    break
                loss, grad_norm, spike = train_step(ddp_model, run, batches, cfg, dist)
                log.step(state.step, lr, loss, grad_norm, spike)
                writer.check()
            if stop.requested():
                save_and_stop(run, writer, log, cfg, dist, stop)
        finally:
            log.close()
            writer.wait()


def compile_model(model, cfg, dist, stop):
    """The compiled model, or the model itself where a request to stop comes meanwhile; the loop then sees it first."""
    shape = distributed.share_batch(cfg, dist.world_size)[1], cfg.block_size
    try:
        with stop.at_once():
            return distributed.compiled(model, cfg, dist, shape, training=True)
    except signals.Interrupted:
        return model


def finish(run, model, log, cfg, dist, stop):
    """The exact validation loss, at the end of a run."""
    with log.paused():
        lengths = byte_lengths(run.datasets["val"].tokenizer_json, dist)
        result = evaluate.exact(model, run.datasets["val"], cfg, dist, lengths, stop.requested)
        if result:
            log.exact(run.state.step, result)


def save_and_stop(run, writer, log, cfg, dist, stop):
    """Save the run unless that has been done, and end it with a line on how to go on."""
    with log.paused():
        pass  # a sick step is found before it is saved
    if not cfg.eval_only and dist.is_main:
        if writer.step != run.state.step:
            save(run, writer, cfg)
        writer.wait()
    dist.barrier()
    how = "" if cfg.eval_only else f", saved in {writer.folder}; the same command with --init_from=resume goes on"
    raise signals.Stopped(f"stopped at step {run.state.step}{how}", stop.signum)
