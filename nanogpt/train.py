"""THE loop: train a GPT on a dataset, on one process or on many.

`train` is the whole run and `train_step` one update. Where a run begins is in start.py; what its lines name is in
the modules that they name.
"""

import gc
import math
import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from nanogpt import config, data, evaluate, files, optim, schedule
from nanogpt.commands import advice
from nanogpt.config import TrainConfig
from nanogpt.run import checkpoint, distributed, health, memory, metrics, signals
from nanogpt.run.start import settings_to_resume, start
from nanogpt.text import tokenizer

HOURS = 2 * 3600.0  # seconds from which on a run is said to be long: the estimate may be twice what it takes


def main(argv):
    """`train.py`, given its arguments."""
    cfg = config.load(TrainConfig, argv, "train.py", inherit=settings_to_resume)
    with distributed.setup(cfg) as dist:
        train(cfg, dist)


def train(cfg, dist):
    """The whole run. Raises Stopped, saved, where it was asked to stop before its end."""
    with signals.stopping(dist) as stop, files.Lock(Path(cfg.out_dir) / ".lock") as lock:
        run, saved_in = start(cfg, dist, lock)
        state = run.state
        writer = checkpoint.Writer(cfg.out_dir, cfg.keep_checkpoints, cfg.always_save_checkpoint, saved_in, state.step)
        per_step = cfg.gradient_accumulation_steps * cfg.batch_size
        batches = data.Batches(
            run.datasets["train"], "train", cfg.seed, cfg.block_size, dist, cfg.sampling, per_step=per_step
        )
        eval_batches = {
            s: data.Batches(d, f"eval {s}", cfg.seed, cfg.block_size, dist) for s, d in run.datasets.items()
        }
        with dist.together():
            log = start_log(cfg, dist, run, batches.epoch_windows, health.Watch(cfg, dist, state, writer))
        stop.failed = lambda: writer.failure is not None or log.failure is not None
        try:
            with log.paused():
                compiled_model = compile_model(run, log, cfg, dist, stop)  # the same weights
                ddp_model = dist.wrap(compiled_model)
            gc.freeze()  # what is here stays, and need not be looked through again and again
            while not stop.requested():
                lr = optim.set_lr(run.optimizer, schedule.lr_at(state.step, cfg), cfg)
                finished = cfg.eval_only or state.step >= cfg.max_iters
                if evaluation_is_due(state, cfg):
                    with log.paused():
                        asked = log.batches(f"evaluating at step {state.step}", stop.requested, 2 * cfg.eval_iters)
                        evaluation = partial(evaluate.losses, compiled_model, eval_batches, cfg, dist, asked)
                        losses = memory.fitting(evaluation, state, cfg, dist)
                        if losses is None:
                            break
                        state.note(losses)
                        log.evaluation(state.step, losses, lr)
                        with dist.together():
                            if state.step > 0 and dist.is_main and not cfg.eval_only:
                                save(run, writer, cfg)
                if finished or is_out_of_patience(state, cfg, log):
                    finish(run, compiled_model, log, cfg, dist, stop)
                    break
                loss, grad_norm, spike = train_step(ddp_model, run, batches, cfg, dist)
                log.step(state.step, lr, loss, grad_norm, spike)
            if stop.requested():
                save_and_stop(run, writer, log, cfg, dist, stop)
        finally:
            gc.unfreeze()
            try:
                log.close()
            finally:
                writer.wait()


def train_step(model, run, batches, cfg, dist):
    """One update on one global batch. Returns its mean loss, gradient norm and whether it was a spike.

    They are tensors; nobody waits for them. A loss or gradient that is not finite is never applied.
    """
    optimizer, scaler = run.optimizer, run.scaler
    total = memory.fitting(partial(gradients, model, run, batches, cfg, dist), run.state, cfg, dist)
    scaler.unscale_(optimizer)
    loss, grad_norm = dist.mean(total), optim.clip_gradients(run.model, cfg.grad_clip)
    skip, spike = run.health.judge(run.state.step, loss, grad_norm)
    scaler.step(optimizer, skip)
    scaler.update()
    optimizer.zero_grad()
    run.state.step += 1
    run.state.windows += batches.per_step
    return loss, grad_norm, spike


def gradients(model, run, batches, cfg, dist, most):
    """Gradients of this process's part of the global batch, in `.grad`, `most` sequences at a time; its mean loss."""
    step = run.state.step
    micro_steps, size = distributed.share_batch(cfg, dist.world_size, most)
    mine = run.state.windows + dist.rank * micro_steps * size  # the first of this process's windows
    run.optimizer.zero_grad()  # those of an attempt that ran out of memory
    if cfg.dropout:
        torch.manual_seed(data.step_seed(cfg.seed, step, dist.rank))  # so that no random state need be kept
    total = torch.zeros((), device=dist.device)
    for micro_step in range(micro_steps):
        first = mine + micro_step * size
        x, y = batches.get(first, size)
        with dist.synchronised(model, last=micro_step == micro_steps - 1):
            with dist.autocast():
                loss = model(x, y)[1] / (micro_steps / batches.weight(first, size, run.state.windows))
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def evaluation_is_due(state, cfg):
    """Whether to evaluate at this step; not again where a run goes on that has done so."""
    at_end = state.step >= cfg.max_iters
    return cfg.eval_only or ((at_end or state.step % cfg.eval_interval == 0) and state.evaluated != state.step)


def is_out_of_patience(state, cfg, log):
    """Whether the last evaluations brought nothing, so that the run may as well end."""
    if not cfg.patience or state.stale < cfg.patience:
        return False
    best = "none was a number"
    if state.best_val_loss is not None:
        best = f"the best, {state.best_val_loss:.4f} at step {state.best_step}, is kept"
    log.say(f"no improvement in {state.stale} evaluations: the run ends; {best} (--patience)")
    return True


def start_log(cfg, dist, run, epoch_windows, watch):
    """Say what is about to be trained, and open its log."""
    micro_steps, size = distributed.share_batch(cfg, dist.world_size, run.state.micro_batch)
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops = run.model.flops_per_token(cfg.block_size) * tokens
    train, val = (f"{len(run.datasets[split].tokens):,}" for split in ("train", "val"))
    epoch = epoch_windows / (cfg.gradient_accumulation_steps * cfg.batch_size)
    dist.say(
        f"data: {cfg.dataset}, {train} tokens to train on, {val} to validate on; an epoch is {epoch:,.1f} iterations"
    )
    if cfg.documents:
        documents = run.datasets["train"].documents
        dist.say(
            f"documents: {len(documents.begins) - 1:,} in {len(documents):,} windows of {cfg.block_size} tokens, "
            f"{1 - documents.filled():.0%} of which stay empty (--documents, --block_size)"
        )
    dist.say(f"model: {run.model.num_params() / 1e6:.2f}M parameters, {cfg.block_size} tokens of context")
    processes = f"{dist.world_size} processes x " if dist.world_size > 1 else ""
    dist.say(f"iteration: {tokens:,} tokens ({processes}{micro_steps} x {size} sequences), {flops / 1e9:,.2f} GFLOP")
    peak = metrics.device_peak(dist) if dist.is_main and not cfg.eval_only else math.nan
    if line := takes_hours(cfg, dist, run, flops, peak, micro_steps):
        dist.say(line)
    return metrics.Log(
        cfg,
        dist,
        watch,
        run.state,
        tokens_per_iter=tokens,
        flops_per_iter=flops,
        peak=peak,
        epoch_windows=epoch_windows,
        wandb=run.wandb,
    )


def takes_hours(cfg, dist, run, flops, peak, micro_steps):
    """A line about how long the rest of the run takes, and what makes it shorter; None if it is no matter of hours.

    A rough estimate: `flops` and `peak` are those of an iteration and of the device. An evaluation is a forward pass,
    a third of the work, over both splits.
    """
    if not math.isfinite(peak):
        return None
    steps = cfg.max_iters - run.state.step
    evaluated = 2 * cfg.eval_iters / (3 * cfg.gradient_accumulation_steps)  # in iterations
    each = metrics.expected_seconds(1, flops, peak, micro_steps * cfg.n_layer)
    seconds = each * (steps + steps / cfg.eval_interval * evaluated)
    if seconds < HOURS:
        return None
    smaller = "--max_iters, --gradient_accumulation_steps, --batch_size, --block_size, --n_layer or --n_embd"
    quick = f"; sh train.py config/fast_shakespeare_cpu.py --dataset={shlex.quote(cfg.dataset)} takes seconds"
    return (
        f"time: {advice.duration(seconds)} for {steps:,} iterations, by a rough estimate; smaller {smaller} make it "
        f"shorter{quick if dist.device.type == 'cpu' else ''}"
    )


def byte_lengths(dataset, dist):
    """The UTF-8 length of each token id, for bits per byte; None where the tokenizer's package is missing."""
    try:
        tok = tokenizer.from_json(dataset.tokenizer_json)
    except (ImportError, OSError) as e:
        dist.say(f"no bits per byte: {e}")
        return None
    return evaluate.byte_lengths(tok, dataset.separator)


def compile_model(run, log, cfg, dist, stop):
    """The compiled model, or the model itself where a request to stop comes meanwhile; the loop then sees it first."""
    micro_steps, _ = distributed.share_batch(cfg, dist.world_size, run.state.micro_batch)
    seconds = dist.sum([log.seconds_ahead(cfg.max_iters - run.state.step, micro_steps * cfg.n_layer)])[0]

    def compiled(most):
        evaluated = distributed.largest_divisor(cfg.batch_size, most), cfg.block_size
        trained = distributed.share_batch(cfg, dist.world_size, most)[1], cfg.block_size
        return distributed.compiled(run.model, cfg, dist, evaluated, None if cfg.eval_only else trained, seconds)

    log.progress.at("compiling the model (--compile)")  # a matter of an instant if it is not compiled
    try:
        with stop.at_once():
            return memory.fitting(compiled, run.state, cfg, dist)
    except signals.Interrupted:
        return run.model


def save(run, writer, cfg):
    """Give the run as it stands to the writer, which copies it and returns."""
    state = run.state
    evaluated = state.evaluated == state.step
    state = replace(state, losses=state.losses if evaluated else None, improved=state.improved and evaluated)
    info = dict(step=state.step, state=asdict(state), model_config=asdict(run.model.config))
    info |= dict(
        tokenizer=run.datasets["train"].tokenizer_json,
        data={split: dataset.fingerprint for split, dataset in run.datasets.items()},
        settings=config.settings(cfg),
        scaler=run.scaler.state_dict(),
    )
    writer.save(dict(run.model.named_parameters()), run.tensors(), info)


def finish(run, model, log, cfg, dist, stop):
    """The exact validation loss, at the end of a run."""
    with log.paused():
        lengths = byte_lengths(run.datasets["val"], dist)
        asked = log.batches("exact validation loss", stop.requested)
        evaluation = partial(evaluate.exact, model, run.datasets["val"], cfg, dist, lengths, asked)
        result = memory.fitting(evaluation, run.state, cfg, dist)
        if result:
            log.exact(run.state.step, result)


def save_and_stop(run, writer, log, cfg, dist, stop):
    """Save the run unless that has been done, and end it with a line on how to go on."""
    with dist.together():
        log.read()  # a sick step is found before it is saved
        writer.check()
        log.check()
        if not cfg.eval_only and dist.is_main and stop.agreed != signals.FAILED:
            if writer.step != run.state.step:
                save(run, writer, cfg)
            writer.wait()
    how = "" if cfg.eval_only else f", saved in {writer.folder}; the same command with --init_from=resume goes on"
    raise signals.Stopped(f"stopped at step {run.state.step}{how}", stop.agreed)
