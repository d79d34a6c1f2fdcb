"""What a run reports: lines on standard output, a progress bar, metrics.jsonl, trackers."""

import errno
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanogpt import data, files
from nanogpt.config import RunFailed
from nanogpt.run.distributed import Dist
from nanogpt.run.picture import draw_losses
from nanogpt.run.records import drop_after
from nanogpt.run.speed import PLAUSIBLE, device_peak, expected_seconds, peak_beside, takes_hours
from nanogpt.run.threads import Others, available_cores, threads_beside
from nanogpt.run.trackers import Tracker, name_of, one_line

Step = tuple[int, float, dict[str, float]]  # (number of the update, learning rate, metrics)
SILENCE = 6.0  # seconds without a line, before the first iteration is reported, after which one says what goes on


class Progress:
    """Prints what the run is doing after SILENCE seconds without a line, then after twice as long, and so on.

    It uses a thread, since a single batch may take minutes. Set `ended` to stop it.
    """

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.doing, self.began, self.ended = "", time.perf_counter(), threading.Event()
        self.said = self.began  # when the last line was printed
        self.thread = threading.Thread(target=self._watch, args=(say,), daemon=True)

    def at(self, doing: str) -> None:
        """Set the words for what the run does from now on."""
        self.doing = doing
        if not self.thread.ident:
            self.thread.start()

    def _watch(self, say: Callable[[str], Any]) -> None:
        silence = SILENCE
        while not self.ended.wait(max(self.said + silence - time.perf_counter(), 0)):
            if time.perf_counter() >= self.said + silence:
                silence *= 2
                with suppress(OSError, ValueError):  # nobody reads: the run's next line handles that
                    say(f"after {time.perf_counter() - self.began:.0f} s: {self.doing}")


class Log:
    """Reports a run: on the main process alone, and to files only if something is trained.

    A write that fails is recorded by `dist.fail`, as a RunFailed.
    """

    def __init__(self, run: Any, *, tokens_per_iter: int, flops_per_iter: float, peak: float) -> None:
        self.cfg, self.dist, self.state, self.trackers = run.cfg, run.dist, run.state, list(run.trackers)
        self.tokens_per_iter, self.flops_per_iter, self.peak = tokens_per_iter, flops_per_iter, peak
        self.epoch_windows, self.per_step = run.batches.epoch_windows, run.batches.per_step
        cfg, dist, state = run.cfg, run.dist, run.state
        self.windows_before = state.windows - state.step * self.per_step  # 0 unless the batch size has changed
        alone = dist.device.type == "cpu" and dist.world_size == 1 and cfg.threads == "auto"
        self.others = Others() if alone else None  # whose load has not been mentioned yet
        self.measurements = 3  # how many more measurements of the peak may bring nothing
        self.last_step, self.seconds, self.mark = state.step, 0.0, time.perf_counter()
        self.file = self.bar = None
        self.progress = Progress(self.say)
        self.iteration = state.step + 1  # the next one
        if not dist.is_main or cfg.eval_only:
            return
        path = Path(cfg.out_dir) / "metrics.jsonl"
        try:
            drop_after(path, state.step, state.evaluated)
            self.file = files.append_to(path)
        except OSError as e:
            raise RunFailed(f"{path}: cannot be written to ({e.strerror})") from None
        if sys.stderr.isatty():
            self.bar = tqdm(total=cfg.max_iters, initial=state.step, unit="it", leave=False, dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Print a line on the main process, above the progress bar."""
        self.progress.said = time.perf_counter()
        if self.bar:
            tqdm.write(line)
        else:
            self.dist.say(line)

    def seconds_ahead(self, layers: int) -> float:
        """`expected_seconds` of the rest of the run on the main process; 0 on the others."""
        if not self.dist.is_main or not math.isfinite(self.peak):
            return 0.0
        return expected_seconds(self.cfg.max_iters - self.state.step, self.flops_per_iter, self.peak, layers)

    def begins(self, step: int) -> None:
        """Report that update number `step` begins."""
        self.iteration = step
        if self.bar:
            self.bar.update(step - 1 - self.bar.n)
        self.progress.at(f"iteration {step:,} of {self.cfg.max_iters:,} (--log_interval={self.cfg.log_interval})")

    def step(self, step: int, lr: float, metrics: dict) -> None:
        """Report update number `step` by its metrics {name: number}."""
        metrics = dict(metrics)
        if metrics.pop("spike"):
            skipped = ", and was skipped" if self.cfg.skip_spikes else ""
            loss = metrics["loss"]
            self.say(
                f"iter {step}: spike number {self.state.spikes}: loss {loss:.4f} is far above the recent ones{skipped}"
            )
            self._record(step=step, spike=loss)
        if step % self.cfg.log_interval == 0:
            self._line(step, lr, metrics)
        self._end_of_epoch(step)

    def counted(self, step: int, check: Callable[[], None]) -> Callable[[], None]:
        """A function for an evaluation at this step to call before each batch: it counts them and calls `check`."""
        numbers = itertools.count(1)

        def tick() -> None:
            self.progress.at(f"evaluating at step {step:,}, batch {next(numbers):,} (--eval_iters)")
            check()

        return tick

    def _epoch(self, step: int) -> float:
        """How many times the training data has been read after `step` updates."""
        return (self.windows_before + step * self.per_step) / self.epoch_windows

    def _end_of_epoch(self, step: int) -> None:
        """Report the end of an epoch, unless epochs are shorter than the interval between lines."""
        epoch = int(self._epoch(step))
        longer_than_a_line = self.cfg.log_interval * self.per_step <= self.epoch_windows
        if self.cfg.sampling == "epochs" and longer_than_a_line and epoch > int(self._epoch(step - 1)):
            self.say(
                f"epoch {epoch} ends at iter {step}: all {self.epoch_windows:,} windows of the data have been read"
            )

    def _line(self, step: int, lr: float, metrics: dict) -> None:
        self.progress.ended.set()
        now = time.perf_counter()
        seconds = (self.seconds + now - self.mark) / (step - self.last_step)  # of one step
        flops = self.flops_per_iter / seconds
        if self.measurements > 0:
            before, self.peak = self.peak, peak_beside(flops, self.peak, self.dist)
            self.measurements -= self.peak == before and flops > PLAUSIBLE * before
        self.last_step, self.seconds, self.mark = step, 0.0, time.perf_counter()
        rate, mfu = self.tokens_per_iter / seconds, flops / self.peak if flops <= self.peak else None
        epoch, loss, grad_norm = self._epoch(step), metrics["loss"], metrics["grad_norm"]
        share = "" if mfu is None else f"mfu {mfu * 100:.2f}%, "  # none rather than a wrong one
        self.say(
            f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {share}"
            f"{rate:,.0f} tok/s, lr {lr:.2e}, grad norm {grad_norm:.2f}, epoch {epoch:.2f}"
        )
        self._mention_others()
        self._record(step=step, epoch=epoch, lr=lr, **metrics, ms=seconds * 1000, tokens_per_second=rate, mfu=mfu)
        if self.bar:
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def _mention_others(self) -> None:
        """Say once if this run would be faster with fewer threads, since other programs use some of the cores.

        The run does not take fewer by itself: their number changes the last bits of its results.
        """
        if not self.others or (busy := self.others.busy_cores()) is None:
            return
        cores = available_cores()
        if better := threads_beside(busy, cores, torch.get_num_threads()):
            self.others = None
            self.say(
                f"threads: other programs keep {busy:.1f} of {cores} cores busy; --threads={better} is faster beside them"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time is excluded from the time of steps."""
        self.seconds += time.perf_counter() - self.mark
        yield
        self.mark = time.perf_counter()
        self.begins(self.iteration)

    def evaluation(self, step: int, losses: dict[str, float], lr: float) -> None:
        """Report the estimated losses {'train': nats, 'val': nats} after `step` updates."""
        self.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        found = {f"{split}_loss": loss for split, loss in losses.items()}
        self._record(step=step, epoch=self._epoch(step), **found, lr=lr)

    def exact(self, step: int, result: dict) -> None:
        """Report what `evaluate.exact` found."""
        per_byte = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
        count = f"over all {result['tokens']:,} validation tokens"
        self.say(f"exact val loss {result['loss']:.6f} {count}, perplexity {result['perplexity']:.4f}{per_byte}")
        self._record(step=step, **{f"exact_{k}": v for k, v in result.items()})

    def _record(self, **values: Any) -> None:
        """Append a record to metrics.jsonl; trackers get the same names and units."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        for tracker in [*self.trackers]:
            self._send(tracker, values["step"], values)
        if self.file:
            try:
                if files.identity(self.file.fileno()) != files.identity(self.file.name):
                    raise OSError(errno.ESTALE, files.REMOVED)
                self.file.write(json.dumps(values) + "\n")
            except OSError as e:
                rest = "" if e.errno == errno.ESTALE else "; its checkpoints are safe"
                line = f"{self.file.name}: cannot be written to ({e.strerror}); the run stops{rest}"
                self.dist.fail(RunFailed(line))

    def _send(self, tracker: Tracker, step: int, values: dict) -> None:
        try:
            tracker.log(values, step=step)
        except Exception as e:  # its own process may have been killed
            why = f"nothing more is sent ({one_line(e)}); the run goes on, and metrics.jsonl has it all"
            self.say(f"{name_of(tracker)}: {why}")
            self.trackers.remove(tracker)

    def close(self) -> None:
        """Close what is open, and draw the loss curves."""
        self.progress.ended.set()
        if self.bar:
            self.bar.close()
            self.bar = None
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as e:
                self.say(f"{name_of(tracker)}: not all of the run could be sent ({one_line(e)})")
        if self.file:
            try:
                self.file.close()
                self.say(draw_losses(self.cfg.out_dir))
            except Exception as e:  # a missing picture is no reason to fail
                self.say(f"no picture of the losses: {e}")


class Unread:
    """Metrics of steps that the host has not read yet, so that a GPU never waits for the host."""

    def __init__(self, dist: Dist, log_interval: int) -> None:
        self.on_cpu, self.log_interval = dist.device.type == "cpu", log_interval
        self.steps: list[tuple] = []  # (number, lr, names, values on the device, the event that ends their copy)

    def add(self, step: int, lr: float, metrics: dict) -> list[Step]:
        """Add a step's metrics {name: scalar}. Returns the steps that it has read, in the form of `read`.

        A step is read after the next one has been queued on the device; on a CPU, at once.
        """
        found = []
        if self.steps and (self.steps[-1][0] % self.log_interval == 0 or len(self.steps) == 100):
            found = self.read()
        numbers, done = torch.stack(list(metrics.values())), None
        if numbers.is_cuda:  # copied as soon as this step is done, without waiting for the next one
            numbers, done = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            done.record()
        self.steps.append((step, lr, list(metrics), numbers, done))
        return found + self.read() if self.on_cpu and step % self.log_interval == 0 else found

    def read(self) -> list[Step]:
        """Wait for all steps that were added and return them: [(step, lr, {name: number}), ...]."""
        steps, self.steps = self.steps, []
        if not steps:
            return []
        if steps[-1][-1]:
            steps[-1][-1].synchronize()
        numbers = torch.stack([tensors for *_, tensors, _ in steps]).tolist()
        return [
            (step, lr, dict(zip(names, n, strict=True)))
            for (step, lr, names, _, _), n in zip(steps, numbers, strict=True)
        ]


def start_log(run: Any) -> Log:
    """Announce what will be trained, and open the Log. Raises RunFailed if it cannot be written."""
    cfg, dist = run.cfg, run.dist
    micro_steps, size = data.share_batch(cfg, dist.world_size, run.state.micro_batch)
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    flops = run.gpt.flops_per_token(cfg.block_size) * tokens
    train, val = (f"{len(run.eval_batches[split].dataset.tokens):,}" for split in ("train", "val"))
    epoch = run.batches.epoch_windows / run.batches.per_step
    dist.say(
        f"data: {cfg.dataset}, {train} tokens to train on, {val} to validate on; an epoch is {epoch:,.1f} iterations"
    )
    if cfg.documents:
        documents = run.batches.dataset.documents
        dist.say(
            f"documents: {len(documents.begins) - 1:,} in {len(documents):,} windows of {cfg.block_size} tokens, "
            f"{1 - documents.filled():.0%} of which stay empty (--documents, --block_size)"
        )
    dist.say(f"model: {run.gpt.num_params() / 1e6:.2f}M parameters, {cfg.block_size} tokens of context")
    processes = f"{dist.world_size} processes x " if dist.world_size > 1 else ""
    shares = f"{processes}{micro_steps} x {size} sequences"
    fewest, more = divmod(run.batches.per_step, dist.world_size)
    if more:
        shares = f"{dist.world_size} processes with {fewest} or {fewest + 1} sequences each, at most {size} at a time"
    dist.say(f"iteration: {tokens:,} tokens ({shares}), {flops / 1e9:,.2f} GFLOP")
    peak = device_peak(dist) if dist.is_main and not cfg.eval_only else math.nan
    if line := takes_hours(cfg, dist, run.state.step, flops, peak, micro_steps):
        dist.say(line)
    return Log(run, tokens_per_iter=tokens, flops_per_iter=flops, peak=peak)
