"""The start of a run: from scratch, from a checkpoint, or from another model's weights.

`start` returns a Run for the loop in train.py; the other functions find, check and assemble its parts.
"""

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanogpt import __version__, config, data, files, optim
from nanogpt.config import GPT2_NAMES, RunFailed, TrainConfig, UserError
from nanogpt.data import Dataset
from nanogpt.formats import pretrained
from nanogpt.formats.nanogpt import from_nanogpt
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import (
    checkpoint,
    compile,
    distributed,
    health,
    launch,
    memory,
    minutes,
    products,
    signals,
    trackers,
    trained,
)
from nanogpt.run.checkpoint import Checkpoint
from nanogpt.run.distributed import Dist
from nanogpt.run.plan import padded
from nanogpt.run.run import Run, TrainState
from nanogpt.shape import SHAPE, shape
from nanogpt.text.dataset import open_dataset, require_same_tokenizer


def settings_to_resume(cfg: TrainConfig) -> tuple[dict, str | None]:
    """The settings of the run to resume and the folder of its checkpoint; {} and None if there is none."""
    if cfg.init_from not in ("resume", "auto") and not to_go_on(cfg):
        return {}, None
    found = checkpoint.peek(cfg.out_dir) or from_nanogpt(cfg.out_dir)
    return ({}, None) if found is None else (settings_before(found), str(found.folder))


def to_go_on(cfg: TrainConfig) -> bool:
    """Whether torchrun has restarted this launch, and `out_dir` holds a checkpoint that it wrote before."""
    mine = launch.restarted() and checkpoint.launch_of(cfg.out_dir) == launch.launch_id()
    return mine and checkpoint.peek(cfg.out_dir) is not None


def settings_before(found: Checkpoint) -> dict[str, Any]:
    """The settings of a Checkpoint's run, except those that are not inherited."""
    new = ["init_from", "out_dir", "eval_only"]
    if found.in_memory:  # from another project, and so another machine
        new += ["backend", "device", "dtype", "compile"]
    kept = {k: v for k, v in found.settings.items() if k not in new}
    return kept | {name: found.model_config[name] for name in SHAPE}


def say_what_differs(cfg: TrainConfig, found: Checkpoint, dist: Dist) -> None:
    """Announce the settings that differ from those of the run so far."""
    before, now = settings_before(found), asdict(cfg)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        dist.say(f"settings: not those of the run so far: {', '.join(changed)}")


def find_weights(cfg: TrainConfig, dist: Dist) -> Checkpoint | str | None:
    """What `init_from` refers to: None (scratch), a Checkpoint, or the name or folder of a pretrained model."""
    if cfg.init_from == "scratch":
        return None
    found = trained.find(cfg, dist.say, newest=cfg.init_from in ("resume", "auto"))
    if found is None and cfg.init_from == "resume":
        raise UserError(
            f"--init_from=resume: {cfg.out_dir}/ holds no checkpoint; "
            "--init_from=scratch starts a run there, --out_dir=... names another folder"
        )
    if found is None and cfg.init_from != "auto":
        known = ("scratch", "resume", "auto", *GPT2_NAMES)
        raise UserError(
            f"--init_from={cfg.init_from}: expected {', '.join(known)}, hf:OWNER/NAME, a folder in Hugging Face's format, "
            f"or the out_dir of another run{config.on_the_hub(cfg.init_from) or config.nearest(cfg.init_from, known)}"
        )
    return found


def open_chosen(name: str, cfg: TrainConfig, dist: Dist) -> Checkpoint:
    """The checkpoint of this name, which process 0 chose and verified; each other machine verifies what it sees of it.

    Raises UserError if it is not sound here.
    """
    folder = Path(cfg.out_dir if cfg.init_from in ("resume", "auto") else cfg.init_from) / "checkpoints" / name
    if dist.local_rank == 0 and (problem := checkpoint.damage(folder)):
        raise UserError(f"{folder}: process 0 took it, and here it is damaged ({problem}); all machines must share it")
    return checkpoint.read(folder)


def make_model(cfg: TrainConfig, found: Any, dataset: Dataset, dist: Dist) -> tuple[GPT, dict]:
    """(the model that `find_weights` found, or a new one, on the CPU; with LoRA, `trained.describe_base` of it).

    Decides whether it is to be sharded: then it is on the device `meta`, without weights, on all ranks but 0. Raises
    UserError if it does not fit the settings.
    """
    torch.manual_seed(cfg.seed)
    resuming = cfg.init_from in ("resume", "auto")
    assert dataset.tokenizer_json is not None, "open_dataset sets it"
    if found is None:
        gpt_config = GPTConfig(**shape(cfg), vocab_size=padded(dataset.vocab_size, dist))
    else:
        gpt_config = checkpoint.shape_of(found) if isinstance(found, Checkpoint) else pretrained.read_config(found)
    gpt_config.dropout = cfg.dropout
    memory.choose_shards(cfg, gpt_config, dist)
    to_load = max(memory.TO_USE, memory.bytes_to_train(cfg, dist))  # before anything is frozen in fewer bytes
    elsewhere = dist.shards is not None and not dist.is_main  # whether the weights come from rank 0
    if found is None:
        memory.check_size(gpt_config, "the settings", memory.bytes_to_train(cfg, dist), dist.device)
    elif isinstance(found, Checkpoint):
        memory.check_size(gpt_config, found.folder, to_load, dist.device)
        if resuming:
            keep_shape(cfg, found)
        origin = cfg.out_dir if resuming else cfg.init_from
        require_same_tokenizer(cfg.dataset, dataset.tokenizer_json, found.tokenizer, origin)
    else:
        memory.check_size(gpt_config, f"--init_from={found}", to_load, dist.device)
        require_same_tokenizer(cfg.dataset, dataset.tokenizer_json, pretrained.read_tokenizer(found), found)
        if dataset.vocab_size > gpt_config.vocab_size:
            raise UserError(
                f"--dataset={cfg.dataset}: its vocabulary of {dataset.vocab_size} does not fit "
                f"the {gpt_config.vocab_size} of {found}"
            )
    if found is None or elsewhere:
        with torch.device("meta" if elsewhere else "cpu"):
            model = GPT(gpt_config)
    elif isinstance(found, Checkpoint):
        model = trained.load_model(found, cfg.dropout, merged=not resuming)
    else:
        model = pretrained.from_pretrained(found, cfg.dropout)
    if cfg.block_size > model.config.block_size:
        raise UserError(
            f"--block_size={cfg.block_size}: longer than the {model.config.block_size} tokens of context of {cfg.init_from}"
        )
    base = found.base if resuming and isinstance(found, Checkpoint) else {}
    if cfg.lora_rank and not base:
        if found is None:
            raise UserError(f"--lora_rank={cfg.lora_rank}: needs a model to adapt: --init_from names one")
        base = trained.describe_base(model, found, cfg)
    if cfg.block_size < model.config.block_size:
        dist.say(f"context: cropped from {model.config.block_size} to {cfg.block_size} tokens (--block_size)")
        model.crop_block_size(cfg.block_size)
    memory.check_size(model.config, f"--init_from={cfg.init_from}", memory.bytes_to_train(cfg, dist), dist.device)
    if base:
        if not resuming:
            trained.adapt(model, base)
        n, of = (sum(p.numel() for p in ps) for ps in (optim.trained_parameters(model).values(), model.parameters()))
        dist.say(f"LoRA: {n:,} parameters of {of:,} are trained ({n / of:.2%}), beside a model in {base['lora_base']}")
    model.checkpoint_activations = cfg.checkpoint_activations
    return model, base


def choose_context(cfg: TrainConfig, found: Any, dist: Dist) -> None:
    """Use the model's own context if it is shorter than the default and the settings name none."""
    if found is None or found in GPT2_NAMES or "block_size" in cfg.sources:
        return
    of = found.model_config["block_size"] if isinstance(found, Checkpoint) else pretrained.read_config(found).block_size
    if of < cfg.block_size:
        dist.say(f"context: {of} tokens, as the model has (--block_size)")
        cfg.block_size = of


def keep_shape(cfg: TrainConfig, found: Checkpoint) -> None:
    """Raise UserError if the shape, the optimizer, or what is trained is not the checkpoint's."""
    others = ("optimizer", *trained.LORA)
    had = {name: found.settings.get(name, getattr(TrainConfig, name)) for name in others}
    had = {name: found.model_config[name] for name in SHAPE} | had
    wrong = [name for name in had if getattr(cfg, name) != had[name]]
    if wrong:
        raise UserError(*(f"{cfg.sources.get(n, n)}: {found.folder}, to be resumed, has {n} = {had[n]}" for n in wrong))


def restore(run: Run, found: Checkpoint, cfg: TrainConfig) -> None:
    """Restore the run's state from the checkpoint. UserError if it does not fit."""
    try:
        sharded = run.dist.shards.slices(run.tensors()) if run.dist.shards else {}
        tensors = found.optimizer_tensors(sharded)
        for name in run.health.state.keys() & tensors.keys():
            run.health.state[name].copy_(tensors.pop(name))
        optim.load_state_tensors(run.gpt, run.optimizer, tensors)
        if found.scaler and run.scaler.is_enabled():
            kinds = {name: type(value) for name, value in run.scaler.state_dict().items()}
            if {name: type(value) for name, value in found.scaler.items()} != kinds:
                raise ValueError(f"the loss scale is {found.scaler!r:.60}")
            run.scaler.load_state_dict(found.scaler)
        settings = asdict(cfg) | found.settings
        batch = int(settings["gradient_accumulation_steps"]) * int(settings["batch_size"])
        place = {"windows": found.step * batch, "epoch_windows": run.state.epoch_windows}  # for earlier checkpoints
        run.state = TrainState.of_json(place | found.state)
        if run.state.step != found.step:
            raise ValueError(f"it is of step {run.state.step}, and the checkpoint of step {found.step}")
        if not run.state.epoch_windows:
            raise ValueError("it is nowhere in its data")
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{found.folder}: its state does not fit the model ({e})") from None


def go_on_in_data(run: Run, found: Checkpoint, cfg: TrainConfig, dist: Dist) -> None:
    """Keep the run's position in its data, or begin a new epoch if the data or their order have changed."""
    state, settings, train = run.state, asdict(cfg), run.batches.dataset
    fingerprints = run.fingerprints()
    if not found.saw(fingerprints, settings):
        changed = [
            b.dataset.path
            for split, b in run.eval_batches.items()
            if found.data.get(split) not in (None, fingerprints[split])
        ]
        changed += [f"--{n}={settings[n]}" for n in ("dataset", "documents") if is_new(n, settings, found.settings)]
        dist.say(f"data: not what the run has seen so far ({', '.join(changed)}); best loss and patience begin anew")
        state.forget_best()
    same_windows = found.saw({"train": train.fingerprint}, settings)
    if not same_windows or any(is_new(name, settings, found.settings) for name in ("sampling", "seed")):
        epochs, windows = -(-state.windows // state.epoch_windows), data.epoch_windows(train, cfg.block_size)
        state.windows, state.epoch_windows = epochs * windows, windows
        dist.say(f"epoch: number {epochs + 1} begins, as the run reads other windows now, or in another order")


def is_new(name: str, settings: dict, earlier: dict) -> bool:
    """Whether a setting has changed, as far as the earlier value is known."""
    return earlier.get(name, settings[name]) != settings[name]


@contextmanager
def start(cfg: TrainConfig, dist: Dist) -> Iterator[Run]:
    """Context of a Run as the settings describe it; the log and the writer are closed at its end.

    Raises Stopped, after saving, if the run was asked to stop; RunFailed, on all processes, if one cannot go on.
    """
    with signals.stopping(dist) as stop, files.Lock(Path(cfg.out_dir) / ".lock") as lock:
        run, saved_in = prepare_run(cfg, dist, lock)
        run.open_outputs(stop, saved_in)
        try:
            with run.paused():
                run.model = dist.wrap(run.gpt)
                run.model = compile_model(run)
            gc.freeze()  # exempt what exists by now from garbage collection: it stays for the whole run
            with suppress(signals.StopRequested):
                yield run
            if stop.agree_to_stop():
                run.save_and_stop()
            run.check_writes()
        finally:
            gc.unfreeze()
            run.close()


def prepare_run(cfg: TrainConfig, dist: Dist, lock: files.Lock) -> tuple[Run, Path | None]:
    """(the Run that the settings describe, the folder of the checkpoint that it resumes or None).

    lock: the files.Lock of `out_dir`, which is taken before anything is written.
    """
    if to_go_on(cfg) and cfg.init_from not in ("resume", "auto"):
        dist.say(
            f"restarted by torchrun: the run goes on from its last checkpoint, not from --init_from={cfg.init_from}"
        )
        cfg.init_from = "resume"
    dist.require_same(facts_of(cfg))
    distributed.choose_seed(cfg, dist)
    new = cfg.minutes and not cfg.eval_only and settings_to_resume(cfg)[1] is None
    clock = minutes.choose_run(cfg, dist) if new else None
    trackers.require_installed(cfg)
    with dist.agree():
        if dist.is_main and not cfg.eval_only:
            checkpoint.check_out_dir(cfg.out_dir)
        if cfg.init_from in ("resume", "auto") and not cfg.eval_only:
            take(lock, cfg, dist, create=False)  # before the checkpoint is chosen: another run may be adding one
        found = find_weights(cfg, dist) if dist.is_main else None
    chosen = dist.of_main(found.folder.name if isinstance(found, Checkpoint) and not found.in_memory else None)
    with dist.agree():
        if not dist.is_main:
            found = open_chosen(chosen, cfg, dist) if chosen else find_weights(cfg, dist)
        resuming = found is not None and cfg.init_from in ("resume", "auto")
        datasets, model, base = make_parts(cfg, found, resuming, dist)
    model = dist.place(model)
    with dist.agree():
        run = make_run(cfg, (found, resuming), datasets, (model, base), dist)
        run.clock = clock
    resumed: dict[str, Any] = {
        f"the step of the checkpoint in --out_dir={cfg.out_dir}, which all machines must share,": run.step
    }
    resumed |= {"the hash of the model that LoRA adapts": run.base.get("sha256")}
    dist.require_same(resumed | {f"the fingerprint of {s}.bin": found for s, found in run.fingerprints().items()})
    products.choose_products(run.gpt, cfg, dist, cfg.batch_size * cfg.block_size)
    if not cfg.eval_only:
        run.state.micro_batch = run.state.micro_batch or memory.choose_micro_batch(run)
        with dist.agree():
            kept = None
            if run.base.get("from") == trained.KEPT and isinstance(found, Checkpoint) and not resuming:
                kept = found.folder
            run.trackers = open_out_dir(cfg, dist, run.step if resuming else None, lock, kept)
    return run, found.folder if isinstance(found, Checkpoint) and resuming else None


def facts_of(cfg: TrainConfig) -> dict[str, Any]:
    """What must be the same on all processes: versions, and all settings but the names of folders and devices."""
    settings = asdict(cfg) | {"batch_size": "auto" if cfg.auto_batch else cfg.batch_size}
    own = ("out_dir", "root", "device")
    return {
        "Python's version": platform.python_version(),
        "PyTorch's version": torch.__version__,
        "NanoGPT's version": __version__,
    } | {f"--{name}": value for name, value in settings.items() if name not in own}


def compile_model(run: Run) -> Any:
    """The compiled model, or the model itself if the run is asked to stop meanwhile, which the loop then sees."""
    cfg, dist = run.cfg, run.dist
    micro_steps, _ = data.share_batch(cfg, dist.world_size, run.state.micro_batch)
    seconds = dist.sum([run.log.seconds_ahead(micro_steps * cfg.n_layer)])[0]

    def compiled(run: Run, micro_batch: int) -> Any:
        evaluated = data.largest_divisor(cfg.batch_size, micro_batch), cfg.block_size
        trained = data.share_batch(cfg, dist.world_size, micro_batch)[1], cfg.block_size
        return compile.compiled(run.model, cfg, dist, evaluated, None if cfg.eval_only else trained, seconds)

    run.log.progress.at("compiling the model (--compile)")  # instantaneous if it is not compiled
    try:
        with run.stop.at_once():
            return run.retry_smaller(compiled)
    except signals.Interrupted:
        return run.model


def make_parts(cfg: TrainConfig, found: Any, resuming: bool, dist: Dist) -> tuple[dict[str, Dataset], GPT, dict]:
    """(the dataset of each split, and what `make_model` returns) for a run that starts from what `find_weights` found."""
    if not resuming:
        choose_context(cfg, found, dist)
    splits = ("train", "val")
    datasets = {s: open_dataset(cfg.dataset, s, cfg.block_size, cfg.root, cfg.documents) for s in splits}
    return datasets, *make_model(cfg, found, datasets["train"], dist)


def make_run(
    cfg: TrainConfig, origin: tuple[Any, bool], datasets: dict[str, Dataset], weights: tuple[GPT, dict], dist: Dist
) -> Run:
    """The Run of these parts. origin: what `find_weights` found, and whether it is resumed. weights: see `make_model`."""
    (found, resuming), (model, base) = origin, weights
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    state = TrainState(epoch_windows=data.epoch_windows(datasets["train"], cfg.block_size))
    optimizer = optim.make_optimizer(model, cfg, dist)
    new = partial(data.Batches, seed=cfg.seed, block_size=cfg.block_size, dist=dist)
    per_step = cfg.gradient_accumulation_steps * cfg.batch_size
    batches = new(datasets["train"], "train", sampling=cfg.sampling, per_step=per_step)
    eval_batches = {split: new(dataset, f"eval {split}") for split, dataset in datasets.items()}
    run = Run(cfg, dist, model, optimizer, scaler, health.Health(cfg, dist.device), state, batches, eval_batches, base)
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
    say_what_the_schedule_lacks(cfg, dist)
    return run


def say_what_the_schedule_lacks(cfg: TrainConfig, dist: Dist) -> None:
    """Warn if the run ends during its warm-up, or goes on after the learning rate has reached 0."""
    if cfg.eval_only or not cfg.decay_lr:
        return
    if 0 < cfg.max_iters < cfg.warmup_iters:
        reached = cfg.learning_rate * cfg.max_iters / cfg.warmup_iters
        dist.say(
            f"learning rate: the run ends in its warm-up, at about {reached:.2g} of {cfg.learning_rate:g}; "
            f"--warmup_iters={cfg.max_iters // 20} or --max_iters beyond {cfg.warmup_iters} would do"
        )
    if cfg.min_lr == 0 and cfg.lr_decay_iters < cfg.max_iters:
        end = cfg.lr_decay_iters
        dist.say(
            f"from iteration {end} on the learning rate is 0; --lr_decay_iters={cfg.max_iters} stretches its decline"
        )


def take(lock: files.Lock, cfg: TrainConfig, dist: Dist, create: bool) -> None:
    """Lock `out_dir` against other runs, on the main process. UserError names the run that holds the lock."""
    try:
        if dist.is_main:
            lock.take(create)
    except BlockingIOError as e:
        raise UserError(
            f"--out_dir={cfg.out_dir}: another run is at work there ({e.strerror}); --out_dir=... names another folder"
        ) from None
    except OSError as e:
        raise RunFailed(f"--out_dir={cfg.out_dir}: cannot be written to ({lock.path}: {e.strerror})") from None


def open_out_dir(
    cfg: TrainConfig, dist: Dist, resumed: int | None, lock: files.Lock, base: Path | None
) -> list[trackers.Tracker]:
    """Create and lock `out_dir`, move an earlier run in it aside, and save the settings. Returns the run's trackers.

    resumed: the number of updates that a resumed run has made, or None. base: the checkpoint that LoRA adapts, to be kept
    there. W&B comes first, since it may fail: then the
    earlier run stays where it is.
    """
    if not dist.is_main:
        return []
    run_id, run = trackers.kept_wandb_id(cfg.out_dir) if resumed is not None else None, None
    found: list[trackers.Tracker] = []
    try:
        if cfg.wandb_log:
            run = trackers.start_wandb(cfg, run_id, dist.say)
            run_id = getattr(run, "id", None)  # a stand-in may have none
            found.append(run)
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        take(lock, cfg, dist, create=True)
        lock.sign()
        copy = checkpoint.keep(base, cfg.out_dir) if base else None  # first, since it may be in the run that is moved
        aside = None if resumed is not None else checkpoint.set_aside(cfg.out_dir)
        if copy:
            os.rename(copy, Path(cfg.out_dir) / "base")
        if aside:
            dist.say(f"{cfg.out_dir}/ held an earlier run, which is now in {aside}/")
        more = {"wandb_run_id": run_id, "launch": launch.launch_id()}
        more = {name: value for name, value in more.items() if value}
        checkpoint.write_settings(cfg.out_dir, asdict(cfg), cfg.sources, **more)
        if cfg.tensorboard:
            found.append(trackers.start_tensorboard(cfg, resumed or 0, dist.say))
    except OSError as e:
        for tracker in found:
            tracker.finish(**({"exit_code": 1} if tracker is run else {}))
        raise RunFailed(f"--out_dir={cfg.out_dir}: cannot be written to ({e.strerror})") from None
    return found
