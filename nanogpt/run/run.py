"""A training run: the experiment, and what keeps it alive around the loop in train.py.

`start.start` makes a Run and closes it.

Failures: what may fail on one process alone happens within `dist.agree()`, at whose end all processes raise. What must
not raise there and then (the thread that writes, the log between collective operations) calls `dist.fail`: the loop's
`agree_to_go_on` then ends it on all processes, and the next `dist.agree()` raises the failure.
"""

import math
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt import config, data, evaluate, optim
from nanogpt.config import TrainConfig
from nanogpt.model import GPT
from nanogpt.run import checkpoint, memory, signals
from nanogpt.run.distributed import Dist
from nanogpt.run.health import Health, Watch
from nanogpt.run.log import Log, Step, Unread, start_log
from nanogpt.run.minutes import Clock
from nanogpt.run.trackers import Tracker
from nanogpt.text import tokenizer


@dataclass
class TrainState:
    """The state of a run that is not tensors."""

    step: int = 0  # steps done; those whose update was skipped count, too
    evaluated: int = -1  # the step of the last evaluation
    losses: dict | None = None  # its losses
    improved: bool = False  # whether its validation loss was the best so far
    best_val_loss: float | None = None
    best_step: int = 0  # the step at which it was found
    stale: int = 0  # evaluations since then
    spikes: int = 0  # number of loss spikes so far: see health.py
    micro_batch: int | None = None  # sequences at a time, if not batch_size: see memory.py
    windows: int = 0  # windows of the training data read so far: the number of the next one, see data.py
    epoch_windows: int = 0  # windows in an epoch

    @classmethod
    def of_json(cls, found: dict) -> "TrainState":
        """The TrainState that a checkpoint holds. Raises TypeError or ValueError if it is not as declared above."""
        state, kinds = cls(**found), typing.get_type_hints(cls)
        for f in fields(cls):
            value, allowed = getattr(state, f.name), typing.get_args(kinds[f.name]) or (kinds[f.name],)
            sound = type(value) in allowed
            if type(value) is int:  # at least its default; micro_batch at least 1
                sound = sound and (f.default if type(f.default) is int else 1) <= value <= config.MANY
            elif type(value) is float:
                sound = sound and math.isfinite(value)
            elif type(value) is dict:
                sound = sound and all(type(number) is float for number in value.values())
            if not sound:
                raise ValueError(f"{f.name} is {value!r:.60}")
        return state

    def note(self, losses: dict[str, float]) -> None:
        """Record the losses of an evaluation at this step."""
        self.evaluated, self.losses = self.step, losses
        self.improved = losses["val"] < (math.inf if self.best_val_loss is None else self.best_val_loss)
        self.stale = 0 if self.improved else self.stale + 1
        if self.improved:
            self.best_val_loss, self.best_step = losses["val"], self.step

    def forget_best(self) -> None:
        """Forget the best loss, so that patience starts anew; an evaluation at this step is repeated."""
        self.best_val_loss, self.best_step, self.stale = None, 0, 0
        self.evaluated = min(self.evaluated, self.step - 1)


@dataclass(eq=False)
class Run:
    """The experiment: its state and the data that it reads."""

    cfg: TrainConfig
    dist: Dist
    gpt: GPT  # to read, initialize and save its parameters
    optimizer: optim.Optimizer
    scaler: torch.amp.GradScaler
    health: Health
    state: TrainState
    batches: data.Batches  # to train on
    eval_batches: dict  # {"train": data.Batches, "val": data.Batches}
    base: dict = field(default_factory=dict)  # with LoRA, the model that it adapts: see trained.describe_base
    clock: Clock | None = None  # of a run that is to take `--minutes`
    trackers: list[Tracker] = field(default_factory=list)  # on the main process
    model: Any = None  # to call: gpt, perhaps compiled, and wrapped to average gradients
    tick: Callable[[], None] = lambda: None  # called before each batch of an evaluation

    # what `open_outputs` opens; a benchmark has none of it
    stop: signals.Stop = field(init=False)
    writer: checkpoint.Writer = field(init=False)
    watch: Watch = field(init=False)
    unread: Unread = field(init=False)
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.model or self.gpt

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state.step

    def advance(self) -> None:
        """Count a step. A skipped update counts, too: its windows are not read again."""
        self.state.step += 1
        self.state.windows += self.batches.per_step or 0
        if self.clock:
            self.clock.follow(self.step, self.val_tokens)

    @property
    def val_tokens(self) -> int:
        """Number of tokens of the validation split."""
        return len(self.eval_batches["val"].dataset.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state but the weights, by name; not copies."""
        return optim.state_tensors(self.gpt, self.optimizer) | self.health.state

    def fingerprints(self) -> dict[str, str | None]:
        """The fingerprint of each split's data: {'train': str, 'val': str}."""
        return {split: batches.dataset.fingerprint for split, batches in self.eval_batches.items()}

    # The methods below need `open_outputs` to have been called.

    def open_outputs(self, stop: signals.Stop, saved_in: Path | None) -> None:
        """Open the log and the checkpoint writer. stop: a signals.Stop. saved_in: the folder of the resumed checkpoint."""
        cfg, state = self.cfg, self.state
        self.stop = stop
        self.writer = checkpoint.Writer(
            cfg.out_dir,
            cfg.keep_checkpoints,
            cfg.always_save_checkpoint,
            self.dist.fail,
            (state.step, saved_in) if saved_in else (None, None),
        )
        self.watch = Watch(cfg, self.dist, state, self.writer)
        self.unread = Unread(self.dist, cfg.log_interval)
        with self.dist.agree():
            self.log = start_log(self)

    def agree_to_go_on(self) -> bool:
        """Whether no process was asked to stop or has failed. A collective operation: all processes must call it.

        Several processes learn it from the reduction of the loss, on a GPU a step later, and then agree.
        """
        return not (self.dist.may_stop() and self.stop.agree_to_stop())

    def evaluation_is_due(self) -> bool:
        """Whether to evaluate at this step; a resumed run does not repeat an evaluation."""
        cfg, step = self.cfg, self.step
        at_interval = step >= cfg.max_iters or step % cfg.eval_interval == 0
        return cfg.eval_only or (at_interval and self.state.evaluated != step)

    def is_finished(self) -> bool:
        """Whether nothing is left to train, or the last `patience` evaluations were no improvement."""
        cfg, state = self.cfg, self.state
        if cfg.eval_only or state.step >= cfg.max_iters:
            return True
        if not cfg.patience or state.stale < cfg.patience:
            return False
        best = "none was a number"
        if state.best_val_loss is not None:
            best = f"the best, {state.best_val_loss:.4f} at step {state.best_step}, is kept"
        self.log.say(f"no improvement in {state.stale} evaluations: the run ends; {best} (--patience)")
        return True

    def retry_smaller(self, work: "Callable[[Run, int], Any]") -> Any:
        """Call work(run, micro_batch), and again with a smaller micro_batch if it runs out of memory."""
        return memory.retry_smaller(partial(work, self), self.state, self.cfg, self.dist)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time is excluded from the time of steps."""
        self._take(self.unread.read())
        with self.log.paused():
            yield

    def measure(self, evaluation: "Callable[[Run, int], dict]") -> dict:
        """Call evaluation(run, micro_batch), off the clock. Raises StopRequested if the run is asked to stop meanwhile."""
        self.dist.require_same_bits(optim.trained_parameters(self.gpt).values(), f"step {self.step}: the weights")
        began = time.perf_counter()
        with self.paused():
            self.tick = self.log.counted(self.step, self.stop.check)
            self.stop.check()  # a failed save may mean that memory is short
            found = self.retry_smaller(evaluation)
        if self.clock:
            self.clock.evaluated(time.perf_counter() - began)
        return found

    def record(self, losses: dict[str, float], lr: float) -> None:
        """Record and report the losses {'train': nats, 'val': nats} of an evaluation at this step."""
        self.state.note(losses)
        self.log.evaluation(self.step, losses, lr)

    def record_exact(self, evaluation: "Callable[[Run, int], dict]") -> None:
        """Measure and report the exact loss, unless that takes too much of `--minutes`. Raises as `measure` does."""
        if self.clock and (why := self.clock.refuses_exact(self.val_tokens)):
            self.log.say(why)
        else:
            self.log.exact(self.step, self.measure(evaluation))

    def report(self, metrics: dict[str, Tensor], lr: float) -> None:
        """Report a step by its metrics {name: scalar}, at once or a few steps later: the host does not wait for them.

        Raises RunFailed, on all processes, if the run has diverged.
        """
        self._take(self.unread.add(self.step, lr, metrics))
        self.log.begins(self.step + 1)

    def _take(self, steps: list[Step]) -> None:
        for step, lr, metrics in steps:
            self.watch.check(step, metrics)
            self.log.step(step, lr, metrics)

    def token_bytes(self) -> np.ndarray | None:
        """The UTF-8 length of each token, for bits per byte; None if the tokenizer's package is missing."""
        dataset = self.eval_batches["val"].dataset
        try:
            tok = tokenizer.from_json(dataset.tokenizer_json)
        except (ImportError, OSError) as e:
            self.dist.say(f"no bits per byte: {e}")
            return None
        return evaluate.byte_lengths(tok, dataset.separator)

    def save(self) -> None:
        """Copy the state to the main process, tensor by tensor, and write it in the background. A collective operation.

        An untrained model is saved only if the run was asked to stop.
        """
        if self.cfg.eval_only or (self.step == 0 and not self.stop.agreed):
            return
        model_tensors, other_tensors = optim.trained_parameters(self.gpt), self.tensors()
        if not self.dist.is_main:
            for tensor in (*model_tensors.values(), *other_tensors.values()):
                self.dist.whole(tensor)
            return
        with self.paused():
            state = self.state
            if state.evaluated != state.step:
                state = replace(state, losses=None, improved=False)
            info = dict(
                step=state.step,
                state=asdict(state),
                model_config=asdict(self.gpt.config),
                tokenizer=self.batches.dataset.tokenizer_json,
                data=self.fingerprints(),
                settings=asdict(self.cfg),
                scaler=self.scaler.state_dict(),
                **({"base": self.base} if self.base else {}),
            )
            self.writer.save(model_tensors, other_tensors, info, self.dist.whole)

    def check_writes(self) -> None:
        """Wait for what is being written. Raises RunFailed, on all processes, if a write has failed."""
        with self.dist.agree():
            self.writer.wait()

    def save_and_stop(self) -> None:
        """Save the run, if this step is not saved yet, and raise Stopped with a line on how to resume."""
        with self.dist.agree():
            self._take(self.unread.read())  # finds a diverged step before it is saved
        if self.writer.step != self.step:
            self.save()
        self.check_writes()
        how = (
            ""
            if self.cfg.eval_only
            else f", saved in {self.writer.folder}; the same command with --init_from=resume goes on"
        )
        raise signals.Stopped(f"stopped at step {self.step}{how}", self.stop.agreed)

    def close(self) -> None:
        """Close the log and wait for the writer."""
        try:
            self.log.close()
        finally:
            self.writer.wait()
