"""What a run reports: lines and a progress bar, metrics.jsonl, W&B, throughput and MFU, the picture of the losses."""

import errno
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from nanogpt import files
from nanogpt.config import RunFailed, UserError, installs, settings

# Dense peak in TFLOP/s without sparsity, bfloat16 (float16 where the chip has no bfloat16), from the vendors' datasheets.
# The first name that is part of the device's counts.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148, "B200": 2250, "GH200": 989,
    "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "A6000": 155,
    "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65,
    "RTX 4090": 165, "RTX 4080": 98, "RTX 3090": 71, "RTX 3080": 60,
}  # fmt: skip


def device_peak(dist):
    """The most FLOP/s that the devices of all processes can do at this dtype: from the datasheet where it is known, otherwise measured."""
    if dist.device.type == "cuda" and dist.dtype != torch.float32:
        name = torch.cuda.get_device_name(dist.device)
        for known, tflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b(?! (Ti|SUPER|Laptop))", name) and "MIG" not in name:
                dist.say(
                    f"peak: {tflops} TFLOP/s, the datasheet's for {name} at {str(dist.dtype)[6:]}; MFU is relative to it"
                )
                return tflops * 1e12 * dist.world_size
    rate = measured_peak(dist) * dist.world_size
    if dist.device.type == "cpu":
        what = f"this CPU with {torch.get_num_threads()} threads"
    else:
        what = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "this GPU"
    dist.say(f"peak: {rate / 1e12:.3g} TFLOP/s, measured on {what} at {str(dist.dtype)[6:]}; MFU is relative to it")
    return rate


PLAUSIBLE = 0.9  # of the peak; no model comes so near to that of a large product


def peak_beside(flops_rate, peak, dist):
    """The peak of `device_peak`, measured again if a model comes so near to it that it must have been measured too low.

    That happens while another program uses the machine. With a NaN, as on other than the main process, nothing does.
    """
    if flops_rate > PLAUSIBLE * peak:
        again = measured_peak(dist) * dist.world_size
        if again > peak:
            dist.say(f"peak: {again / 1e12:.3g} TFLOP/s, measured again, since {peak / 1e12:.3g} was too low")
        peak = max(peak, again)
    return peak


def measured_peak(dist):
    """FLOP/s of a large matrix product on the device: the fastest within a tenth of a second."""
    n = 1024 if dist.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=dist.device, dtype=dist.operand_dtype) for _ in range(2))
    a @ b  # the first one loads the library
    synchronize(dist.device)
    fastest, end = math.inf, time.perf_counter() + 0.1
    while fastest == math.inf or time.perf_counter() < end:
        synchronize(dist.device)
        begin = time.perf_counter()
        a @ b
        synchronize(dist.device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * n**3 / fastest


def products_rate(model, dist, tokens, repeats=50):
    """FLOP/s of the model's matrix products alone, forward and backward, with so many tokens: the yardstick.

    Each product has buffers of its own, because in a real iteration none finds its operands in the cache either.
    """
    layers = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    new = partial(torch.randn, device=dist.device, dtype=dist.operand_dtype)
    x, w, g = [new(tokens, k) for k, _ in layers], [new(n, k) for k, n in layers], [new(tokens, n) for _, n in layers]
    times, began = [], time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - began < 5):
        synchronize(dist.device)
        begin = time.perf_counter()
        for xi, wi in zip(x, w, strict=True):
            xi @ wi.t()
        for xi, wi, gi in zip(x, w, g, strict=True):
            gi @ wi, gi.t() @ xi
        synchronize(dist.device)
        times.append(time.perf_counter() - begin)
    return sum(3 * 2 * tokens * k * n for k, n in layers) / statistics.median(times)


def synchronize(device):
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def expected_seconds(steps, flops_per_iter, peak, layers):
    """About how long so many steps take, through so many blocks each: a guess to within a factor of two or so.

    Small models reach a third of the device's peak, and no block is done in less than a millisecond.
    """
    return steps * max(flops_per_iter / peak * 3, layers * 1e-3)


SILENCE = 6.0  # seconds without a line before the first iteration's, after which one says what the run is doing


class Progress:
    """What is being done, said when there has been no line for SILENCE seconds, then for twice as long, and so on.

    A thread of its own says it, since a single batch may take minutes. `ended` is set when it is no longer needed.
    """

    def __init__(self, say):
        self.doing, self.began, self.ended = None, time.perf_counter(), threading.Event()
        self.said = self.began  # when the last line was printed
        self.thread = threading.Thread(target=self._watch, args=(say,), daemon=True)

    def at(self, doing):
        """What is being done from now on, in words."""
        self.doing = doing
        if not self.thread.ident:
            self.thread.start()

    def _watch(self, say):
        silence = SILENCE
        while not self.ended.wait(max(self.said + silence - time.perf_counter(), 0)):
            if time.perf_counter() >= self.said + silence:
                silence *= 2
                with suppress(OSError, ValueError):  # nobody reads: the run's own next line meets that too
                    say(f"after {time.perf_counter() - self.began:.0f} s: {self.doing}")


class Log:
    """Reports a run: on the main process alone, and to files only where something is trained.

    Steps are read in arrears, when the next step has been given to the device, so that a GPU never waits for the
    host. All processes read the same numbers and give them to `watch`, which ends a sick run on all of them. A write
    that fails concerns the main process alone, so it is kept, and raised by `check`, when all have agreed to stop.
    """

    def __init__(self, cfg, dist, watch, state, *, tokens_per_iter, flops_per_iter, peak, epoch_windows, wandb=None):
        self.cfg, self.dist, self.watch, self.wandb = cfg, dist, watch, wandb
        self.tokens_per_iter, self.flops_per_iter, self.peak = tokens_per_iter, flops_per_iter, peak
        self.epoch_windows, self.per_step = epoch_windows, cfg.gradient_accumulation_steps * cfg.batch_size
        self.windows_before = state.windows - state.step * self.per_step  # 0, but in a run that had another batch
        self.measurements = 3  # of the peak, that may still be made and bring nothing
        self.unread = []  # steps whose numbers are still on the device
        self.last_step, self.seconds, self.mark = state.step, 0.0, time.perf_counter()
        self.file = self.bar = self.failure = None
        self.progress = Progress(self.say)
        self.iteration = state.step + 1  # the one that comes next
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

    def say(self, line):
        """Print a line on the main process, above the progress bar."""
        self.progress.said = time.perf_counter()
        if self.bar:
            tqdm.write(line)
        else:
            self.dist.say(line)

    def seconds_ahead(self, steps, layers):
        """`expected_seconds` of so many steps; 0 on other than the main process, so that the sum is the main one's."""
        if not self.dist.is_main or not math.isfinite(self.peak):
            return 0.0
        return expected_seconds(steps, self.flops_per_iter, self.peak, layers)

    def step(self, step, lr, loss, grad_norm, spike):
        """Report update number `step`; loss, grad_norm and spike are tensors, perhaps still being computed.

        Raises RunFailed where an earlier step turns out to have been sick.
        """
        if self.unread and (self.unread[-1][0] % self.cfg.log_interval == 0 or len(self.unread) == 100):
            self.read()
        numbers, done = torch.stack([loss, grad_norm, spike]), None
        if numbers.is_cuda:  # copied to the host as soon as this step, and not the next one too, is done
            numbers, done = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            done.record()
        self.unread.append((step, lr, numbers, done))
        self.iteration = step + 1
        self._begins()
        if self.bar:
            self.bar.update()
        if self.dist.device.type == "cpu" and step % self.cfg.log_interval == 0:
            self.read()  # there is nothing to overlap with

    def read(self):
        """Report all unread steps, at the price of waiting for the last of them."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        if unread[-1][3]:
            unread[-1][3].synchronize()
        numbers = torch.stack([tensors for _, _, tensors, _ in unread]).tolist()
        for (step, lr, _, _), (loss, grad_norm, spike) in zip(unread, numbers, strict=True):
            self.watch.look(step, loss, grad_norm, spike)
            if spike:
                skipped = ", and was skipped" if self.cfg.skip_spikes else ""
                self.say(
                    f"iter {step}: spike number {self.watch.spikes}: loss {loss:.4f} is far above the recent ones{skipped}"
                )
                self._record(step=step, spike=loss)
            if step % self.cfg.log_interval == 0:
                self._line(step, lr, loss, grad_norm)
            self._end_of_epoch(step)

    def _begins(self):
        self.progress.at(
            f"iteration {self.iteration:,} of {self.cfg.max_iters:,} (--log_interval={self.cfg.log_interval})"
        )

    def batches(self, what, stop, total=None):
        """`stop`, which an evaluation asks before each batch, and which notes how far it is; `total` batches, if known."""
        numbers = itertools.count(1)

        def counted():
            self.progress.at(f"{what}, batch {next(numbers):,}" + (f" of {total:,} (--eval_iters)" if total else ""))
            return stop()

        return counted

    def _epoch(self, step):
        """How many times the training data has been read after `step` updates."""
        return (self.windows_before + step * self.per_step) / self.epoch_windows

    def _end_of_epoch(self, step):
        """Say that an epoch has ended in this step, unless they are so short that the steps' own lines say enough."""
        epoch = int(self._epoch(step))
        longer_than_a_line = self.cfg.log_interval * self.per_step <= self.epoch_windows
        if self.cfg.sampling == "epochs" and longer_than_a_line and epoch > int(self._epoch(step - 1)):
            self.say(
                f"epoch {epoch} ends at iter {step}: all {self.epoch_windows:,} windows of the data have been read"
            )

    def _line(self, step, lr, loss, grad_norm):
        self.progress.ended.set()
        now = time.perf_counter()
        seconds = (self.seconds + now - self.mark) / (step - self.last_step)  # of one step
        flops = self.flops_per_iter / seconds
        if self.measurements > 0:
            before, self.peak = self.peak, peak_beside(flops, self.peak, self.dist)
            self.measurements -= self.peak == before and flops > PLAUSIBLE * before
        self.last_step, self.seconds, self.mark = step, 0.0, time.perf_counter()
        rate, mfu = self.tokens_per_iter / seconds, flops / self.peak if flops <= self.peak else None
        epoch = self._epoch(step)
        share = "" if mfu is None else f"mfu {mfu * 100:.2f}%, "  # no figure rather than a wrong one
        self.say(
            f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {share}"
            f"{rate:,.0f} tok/s, lr {lr:.2e}, grad norm {grad_norm:.2f}, epoch {epoch:.2f}"
        )
        measured = dict(ms=seconds * 1000, tokens_per_second=rate, mfu=mfu)
        self._record(step=step, epoch=epoch, loss=loss, lr=lr, grad_norm=grad_norm, **measured)
        sent = {"train/iter_loss": loss, "lr": lr, "grad_norm": grad_norm, "epoch": epoch}
        self._send(step, sent | ({} if mfu is None else {"mfu": mfu * 100}))
        if self.bar:
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    @contextmanager
    def paused(self):
        """Time spent within (evaluating, saving) counts for no step."""
        self.read()
        self.seconds += time.perf_counter() - self.mark
        yield
        self.mark = time.perf_counter()
        self._begins()

    def evaluation(self, step, losses, lr):
        """Report the estimated losses {'train': nats, 'val': nats} after `step` updates."""
        self.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        epoch = self._epoch(step)
        self._record(step=step, epoch=epoch, train_loss=losses["train"], val_loss=losses["val"], lr=lr)
        self._send(step, {"train/loss": losses["train"], "val/loss": losses["val"], "lr": lr, "epoch": epoch})

    def exact(self, step, result):
        """Report what `evaluate.exact` found."""
        per_byte = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
        count = f"over all {result['tokens']:,} validation tokens"
        self.say(f"exact val loss {result['loss']:.6f} {count}, perplexity {result['perplexity']:.4f}{per_byte}")
        self._record(step=step, **{f"exact_{k}": v for k, v in result.items()})
        self._send(step, {"val/exact_loss": result["loss"]})

    def _record(self, **values):
        if self.file:
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            try:
                if files.identity(self.file.fileno()) != files.identity(self.file.name):
                    raise OSError(errno.ESTALE, files.REMOVED)
                self.file.write(json.dumps(values) + "\n")
            except OSError as e:
                rest = "" if e.errno == errno.ESTALE else "; its checkpoints are safe"
                self.failure = RunFailed(f"{self.file.name}: cannot be written to ({e.strerror}); the run stops{rest}")

    def check(self):
        """Raise the failure of a write."""
        if self.failure:
            raise self.failure

    def _send(self, step, values):
        if self.wandb:
            try:
                self.wandb.log({"iter": step} | values, step=step)
            except Exception as e:  # its own process may have been killed
                self.say(f"W&B: nothing more is sent ({one_line(e)}); the run goes on, and {self.file.name} has it all")
                self.wandb = None

    def close(self):
        """Close what is open, and draw the picture of the losses."""
        self.progress.ended.set()
        if self.bar:
            self.bar.close()
            self.bar = None
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as e:
                self.say(f"W&B: not all of the run could be sent ({one_line(e)})")
        if self.file:
            try:
                self.file.close()
                self.say(draw_losses(self.cfg.out_dir))
            except Exception as e:  # a picture that cannot be drawn ends no run
                self.say(f"no picture of the losses: {e}")


def drop_after(path, step, evaluated):
    """Remove from metrics.jsonl what a run reported after `step`, from where it now goes on.

    evaluated: the last step whose evaluation is not going to be repeated.
    """
    if not os.path.lexists(path):
        return
    kept = [
        r for r in read_metrics(path) if r["step"] <= (evaluated if "val_loss" in r else step) and "exact_loss" not in r
    ]
    files.write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def read_metrics(path):
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in files.read(path).decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def require_wandb(cfg):
    """Raise UserError where W&B is asked for and not installed."""
    if cfg.wandb_log and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb_log=True: wandb is not installed; {installs('wandb')} brings it")


def start_wandb(cfg, run_id, say):
    """A W&B run: the one with this id, or, without an id, a new one. WANDB_MODE=offline keeps it on this machine.

    It is written to `out_dir`, unless WANDB_DIR names another folder. What is installed by the name of wandb may be a
    stand-in, such as trackio, which takes the folder from the environment alone. Raises UserError if W&B cannot start, after at most half a minute or WANDB_INIT_TIMEOUT, and leaves nothing behind;
    OSError if `out_dir` cannot be made.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # it would print a page, and ask for a login at a terminal
    folder = Path(os.environ.setdefault("WANDB_DIR", str(cfg.out_dir))) / "wandb"
    missing, there = [p for p in (folder, *folder.parents) if not p.exists()], set(folder.glob("*"))
    folder.parent.mkdir(parents=True, exist_ok=True)  # if it is missing, W&B writes elsewhere
    try:
        import wandb

        own = {}
        if hasattr(wandb, "Settings"):  # a stand-in has none
            timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", 30))
            own = dict(settings=wandb.Settings(init_timeout=timeout, symlink=False))
        if run_id and "WANDB_RUN_ID" not in os.environ:
            own |= dict(id=run_id, resume="allow")
        run = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=settings(cfg), **own)
    except Exception as e:  # of any kind: its packages, its settings, no login, no network
        for path in set(folder.glob("*")) - there:
            shutil.rmtree(path, ignore_errors=True)
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise UserError(
            f"--wandb_log=True: Weights & Biases cannot start ({one_line(e)}); WANDB_MODE=offline keeps its log on this "
            "machine, --wandb_log=False goes without"
        ) from None
    if getattr(run, "offline", False):
        say(f"W&B: offline; wandb sync {Path(run.dir).parent} sends the log")
    elif hasattr(run, "url"):
        say(f"W&B: {run.url}")
    return run


def kept_wandb_id(out_dir):
    """The id of the W&B run that the run in `out_dir` has been logged in, or None."""
    path = Path(out_dir) / "config.json"
    try:
        found = json.loads(files.read(path))["wandb_run_id"]
        return found if re.fullmatch(r"[\w-]{1,64}", found) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def one_line(error):
    """What an exception says, on one line of no great length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def draw_losses(out_dir):
    """Draw `loss.png` from `metrics.jsonl`: training and validation loss over the iterations. Returns a line about it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"no picture of the losses: {installs('plot')} brings matplotlib"
    records = read_metrics(Path(out_dir) / "metrics.jsonl")
    steps = [r for r in records if r.get("loss") is not None]
    evals = [r for r in records if r.get("val_loss") is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [r["step"] for r in steps],
        [r["loss"] for r in steps],
        color="#b8c4d6",
        linewidth=0.8,
        label="train, each batch",
    )
    seen = [r["loss"] for r in steps] + [r[name] for r in evals[1:] for name in ("train_loss", "val_loss")]
    top = 1.05 * max((loss for loss in seen if loss is not None and math.isfinite(loss)), default=math.inf)
    shown = [r for r in evals if r["val_loss"] <= top]  # without the untrained model: a line down from it is no curve
    marks = dict(marker="o", markersize=3.5, linewidth=1.8)
    axes.plot([r["step"] for r in shown], [r["train_loss"] for r in shown], color="#2f6db5", label="train", **marks)
    axes.plot([r["step"] for r in shown], [r["val_loss"] for r in shown], color="#d9662b", label="validation", **marks)
    if evals:
        best = min(evals, key=lambda r: r["val_loss"])
        axes.axhline(best["val_loss"], color="#d9662b", linewidth=0.7, linestyle=":")
        axes.set_title(f"best validation loss {best['val_loss']:.4f} at iteration {best['step']:,}", fontsize=11)
        if top < math.inf:
            axes.set_ylim(top=top)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(out_dir) / "loss.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write(path, picture.getvalue())
    return f"loss curves: {path}"
