"""Where a run begins: from scratch, from a checkpoint, or from another project's weights.

`start` at the end puts together what the functions above it find and check. The loop is in train.py.
"""

import math
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from nanogpt import config, data, optim
from nanogpt.config import GPT2_NAMES, RunFailed, UserError
from nanogpt.formats import export
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint, distributed, health, memory, metrics
from nanogpt.text import tokenizer

# the settings that shape a model's weights
SHAPE = ("block_size", "architecture", "n_layer", "n_head", "n_embd", "bias")


@dataclass
class TrainState:
    """Where a run stands: what resuming needs beside tensors. No integer is ever below its default, nor beyond MANY."""

    step: int = 0  # updates done
    evaluated: int = -1  # the step at which the last evaluation was made
    losses: dict | None = None  # what it found
    improved: bool = False  # whether its val loss was the best so far
    best_val_loss: float | None = None
    best_step: int = 0  # where it was found
    stale: int = 0  # evaluations since then
    spikes: int = 0  # losses far above the recent ones, so far
    micro_batch: int | None = None  # the most sequences at a time, where that is not batch_size: see memory.py
    windows: int = 0  # windows of the training data read so far, which is the number of the next one: see data.py
    epoch_windows: int = 0  # how many of them an epoch has

    @classmethod
    def of_json(cls, found):
        """The TrainState that a checkpoint holds. Raises TypeError or ValueError if it is not as declared above."""
        state, kinds = cls(**found), typing.get_type_hints(cls)
        for f in fields(cls):
            value, allowed = getattr(state, f.name), typing.get_args(kinds[f.name]) or (kinds[f.name],)
            sound = type(value) in allowed
            if type(value) is int:
                sound = sound and (1 if f.default is None else f.default) <= value <= config.MANY
            elif type(value) is float:
                sound = sound and math.isfinite(value)
            elif type(value) is dict:
                sound = sound and all(type(number) is float for number in value.values())
            if not sound:
                raise ValueError(f"{f.name} is {value!r:.60}")
        return state

    def note(self, losses):
        """Take note of an evaluation at this step."""
        self.evaluated, self.losses = self.step, losses
        self.improved = losses["val"] < (math.inf if self.best_val_loss is None else self.best_val_loss)
        self.stale = 0 if self.improved else self.stale + 1
        if self.improved:
            self.best_val_loss, self.best_step = losses["val"], self.step

    def forget_best(self):
        """Have the best loss, and the patience with it, begin anew; an evaluation at this very step is made again."""
        self.best_val_loss, self.best_step, self.stale = None, 0, 0
        self.evaluated = min(self.evaluated, self.step - 1)


@dataclass
class Run:
    """A run: all that it changes and a checkpoint holds, and the data that it reads."""

    model: GPT
    optimizer: optim.AdamW | optim.Muon
    scaler: torch.amp.GradScaler
    health: health.Health
    state: TrainState
    datasets: dict  # {"train": data.Dataset, "val": data.Dataset}
    wandb: object = None  # the W&B run that it is logged in, on the main process

    def tensors(self):
        """Everything but the weights, by name; the very tensors that are in use."""
        return optim.state_tensors(self.model, self.optimizer) | self.health.state


def settings_to_resume(cfg):
    """The settings of the run that is to go on, and its folder; none where there is none."""
    if cfg.init_from not in ("resume", "auto"):
        return {}, None
    found = checkpoint.peek(cfg.out_dir) or export.from_nanogpt(cfg.out_dir)
    return ({}, None) if found is None else (settings_before(found), str(found.folder))


def settings_before(found):
    """The settings of the run that a Checkpoint is of, but those that every start has anew."""
    new = ["init_from", "out_dir", "eval_only"]
    if found.in_memory:  # from another project: the machine was another one too
        new += ["backend", "device", "dtype", "compile"]
    kept = {k: v for k, v in found.settings.items() if k not in new}
    return kept | {name: found.model_config[name] for name in SHAPE}


def say_what_differs(cfg, found, dist):
    """Announce the settings that are not what they were in the run that goes on."""
    before, now = settings_before(found), config.settings(cfg)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        dist.say(f"settings: not those of the run so far: {', '.join(changed)}")


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
        gpt_config = GPTConfig(**shape, dropout=cfg.dropout, vocab_size=padded(dataset.vocab_size, dist))
        memory.check_size(gpt_config, "the settings", memory.TO_TRAIN[cfg.optimizer], dist.device)
        model = GPT(gpt_config)
    elif isinstance(found, checkpoint.Checkpoint):
        if resuming:
            keep_shape(cfg, found)
        origin = cfg.out_dir if resuming else cfg.init_from
        tokenizer.refuse_another(cfg.dataset, dataset.tokenizer_json, found.tokenizer, origin)
        model = checkpoint.load_model(found, cfg.dropout)
    else:
        tokenizer.refuse_another(cfg.dataset, dataset.tokenizer_json, export.read_tokenizer(found), found)
        model = export.from_pretrained(found, cfg.dropout)
        if dataset.vocab_size > model.config.vocab_size:
            raise UserError(
                f"--dataset={cfg.dataset}: its vocabulary of {dataset.vocab_size} does not fit "
                f"the {model.config.vocab_size} of {found}"
            )
    if cfg.block_size > model.config.block_size:
        raise UserError(
            f"--block_size={cfg.block_size}: longer than the {model.config.block_size} tokens of context of {cfg.init_from}"
        )
    if cfg.block_size < model.config.block_size:
        dist.say(f"context: cropped from {model.config.block_size} to {cfg.block_size} tokens (--block_size)")
        model.crop_block_size(cfg.block_size)
    memory.check_size(model.config, f"--init_from={cfg.init_from}", memory.TO_TRAIN[cfg.optimizer], dist.device)
    return model.to(dist.device)


def choose_context(cfg, found, dist):
    """Where the settings name no context, take the model's own, if that is shorter than the default."""
    if found is None or found in GPT2_NAMES or "block_size" in cfg.sources:
        return
    of = (
        found.model_config["block_size"]
        if isinstance(found, checkpoint.Checkpoint)
        else export.read_config(Path(found), 0.0).block_size
    )
    if of < cfg.block_size:
        dist.say(f"context: {of} tokens, as the model has (--block_size)")
        cfg.block_size = of


def keep_shape(cfg, found):
    """Refuse to resume with another shape or optimizer than the checkpoint's."""
    had = {name: found.model_config[name] for name in SHAPE} | {"optimizer": found.settings.get("optimizer", "adamw")}
    wrong = [name for name in had if getattr(cfg, name) != had[name]]
    if wrong:
        raise UserError(*(f"{cfg.sources.get(n, n)}: {found.folder}, to be resumed, has {n} = {had[n]}" for n in wrong))


def padded(vocab_size, dist):
    """A large vocabulary, rounded up to a multiple of 64."""
    size = -(-vocab_size // 64) * 64 if vocab_size > 1024 else vocab_size
    if size != vocab_size:
        dist.say(f"vocabulary: {vocab_size} tokens, padded to {size}, because matrix units like multiples of 64")
    return size


def restore(run, found, cfg):
    """Put the run where the checkpoint left it. UserError where that does not fit."""
    try:
        tensors = found.optimizer_tensors()
        for name in run.health.state.keys() & tensors.keys():
            run.health.state[name].copy_(tensors.pop(name))
        optim.load_state_tensors(run.model, run.optimizer, tensors)
        if found.scaler and run.scaler.is_enabled():
            kinds = {name: type(value) for name, value in run.scaler.state_dict().items()}
            if {name: type(value) for name, value in found.scaler.items()} != kinds:
                raise ValueError(f"the loss scale is {found.scaler!r:.60}")
            run.scaler.load_state_dict(found.scaler)
        settings = config.settings(cfg) | found.settings
        batch = int(settings["gradient_accumulation_steps"]) * int(settings["batch_size"])
        place = {"windows": found.step * batch, "epoch_windows": run.state.epoch_windows}  # of earlier checkpoints
        run.state = TrainState.of_json(place | found.state)
        if run.state.step != found.step:
            raise ValueError(f"it is of step {run.state.step}, and the checkpoint of step {found.step}")
        if not run.state.epoch_windows:
            raise ValueError("it is nowhere in its data")
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{found.folder}: its state does not fit the model ({e})") from None


def go_on_in_data(run, found, cfg, dist):
    """Keep the run's place in its data, or, if they are others than before, begin a new epoch of them."""
    state, settings, train = run.state, config.settings(cfg), run.datasets["train"]
    fingerprints = {split: dataset.fingerprint for split, dataset in run.datasets.items()}
    if not found.saw(fingerprints, settings):
        changed = [d.path for split, d in run.datasets.items() if found.data.get(split, d.fingerprint) != d.fingerprint]
        changed += [f"--{n}={settings[n]}" for n in ("dataset", "documents") if is_new(n, settings, found.settings)]
        dist.say(f"data: not what the run has seen so far ({', '.join(changed)}); best loss and patience begin anew")
        state.forget_best()
    same_windows = found.saw({"train": train.fingerprint}, settings)
    if not same_windows or any(is_new(name, settings, found.settings) for name in ("sampling", "seed")):
        epochs, windows = -(-state.windows // state.epoch_windows), data.epoch_windows(train, cfg.block_size)
        state.windows, state.epoch_windows = epochs * windows, windows
        dist.say(f"epoch: number {epochs + 1} begins, as the run reads other windows now, or in another order")


def is_new(name, settings, earlier):
    """Whether a setting is another than it was earlier, as far as that is known."""
    return earlier.get(name, settings[name]) != settings[name]


def start(cfg, dist, lock):
    """The run that the settings describe, ready to go on, and its checkpoint's folder where it goes on from one.

    lock: the files.Lock of `out_dir`, which is taken before anything is written.
    """
    distributed.choose_seed(cfg, dist)
    distributed.share_batch(cfg, dist.world_size)  # refuses a number of processes that does not divide the batch
    metrics.require_wandb(cfg)
    with dist.together():
        if dist.is_main and not cfg.eval_only:
            checkpoint.check_out_dir(cfg.out_dir)
        if cfg.init_from in ("resume", "auto") and not cfg.eval_only:
            take(lock, cfg, dist, create=False)  # before it is looked at: another run may be adding to it
        found = find_start(cfg, dist)
        resuming = found is not None and cfg.init_from in ("resume", "auto")
        run = make_run(cfg, found, resuming, dist)
    if dist.sum([run.state.step])[0] != run.state.step * dist.world_size:
        raise UserError(
            f"--out_dir={cfg.out_dir}: the processes see different checkpoints there; all nodes must share that folder"
        )
    if not cfg.eval_only:
        run.state.micro_batch = run.state.micro_batch or memory.choose_micro_batch(run.model, cfg, dist)
        with dist.together():
            run.wandb = open_out_dir(cfg, dist, resuming, lock)
    return run, found.folder if resuming else None


def make_run(cfg, found, resuming, dist):
    """The Run that begins with what `find_start` found."""
    if not resuming:
        choose_context(cfg, found, dist)
    splits = ("train", "val")
    datasets = {s: data.Dataset(cfg.dataset, s, cfg.block_size, cfg.root, cfg.documents) for s in splits}
    model = make_model(cfg, found, datasets["train"], dist)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    state = TrainState(epoch_windows=data.epoch_windows(datasets["train"], cfg.block_size))
    run = Run(model, optim.make_optimizer(model, cfg, dist), scaler, health.Health(cfg, dist.device), state, datasets)
    if resuming:
        restore(run, found, cfg)
        dist.say(f"resuming {found.folder} at step {run.state.step}")
        say_what_differs(cfg, found, dist)
        go_on_in_data(run, found, cfg, dist)
        if cfg.batch_size != found.settings.get("batch_size"):
            run.state.micro_batch = None
        if run.state.micro_batch:
            dist.say(f"micro-batch: {run.state.micro_batch}, as in the run so far (--batch_size)")
        if run.state.step >= cfg.max_iters and not cfg.eval_only:
            dist.say(f"nothing is left to train: --max_iters is {cfg.max_iters}")
    if cfg.decay_lr and 0 < cfg.max_iters < cfg.warmup_iters and not cfg.eval_only:
        reached = cfg.learning_rate * cfg.max_iters / cfg.warmup_iters
        dist.say(
            f"learning rate: the run ends in its warm-up, at about {reached:.2g} of {cfg.learning_rate:g}; "
            f"--warmup_iters={cfg.max_iters // 20} or --max_iters beyond {cfg.warmup_iters} would do"
        )
    if cfg.decay_lr and cfg.min_lr == 0 and cfg.lr_decay_iters < cfg.max_iters and not cfg.eval_only:
        end = cfg.lr_decay_iters
        dist.say(
            f"from iteration {end} on the learning rate is 0; --lr_decay_iters={cfg.max_iters} stretches its decline"
        )
    return run


def take(lock, cfg, dist, create):
    """Lock `out_dir` against other runs, on the main process. UserError names the one that is at work there."""
    try:
        if dist.is_main:
            lock.take(create)
    except BlockingIOError as e:
        raise UserError(
            f"--out_dir={cfg.out_dir}: another run is at work there ({e.strerror}); --out_dir=... names another folder"
        ) from None
    except OSError as e:
        raise RunFailed(f"--out_dir={cfg.out_dir}: cannot be written to ({lock.path}: {e.strerror})") from None


def open_out_dir(cfg, dist, resuming, lock):
    """Make and lock `out_dir`, set an earlier run in it aside, and save the settings; the W&B run, if there is one.

    What can fail for reasons of its own, as W&B can, comes first: then the earlier run stays where it is.
    """
    if not dist.is_main:
        return None
    run_id, run = metrics.kept_wandb_id(cfg.out_dir) if resuming else None, None
    try:
        if cfg.wandb_log:
            run = metrics.start_wandb(cfg, run_id, dist.say)
            run_id = getattr(run, "id", None)  # a stand-in may have none
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        take(lock, cfg, dist, create=True)
        lock.sign()
        aside = None if resuming else checkpoint.set_aside(cfg.out_dir)
        if aside:
            dist.say(f"{cfg.out_dir}/ held an earlier run, which is now in {aside}/")
        more = {"wandb_run_id": run_id} if run_id else {}
        checkpoint.write_settings(cfg.out_dir, config.settings(cfg), cfg.sources, **more)
    except OSError as e:
        if run:
            run.finish(exit_code=1)
        raise RunFailed(f"--out_dir={cfg.out_dir}: cannot be written to ({e.strerror})") from None
    return run
