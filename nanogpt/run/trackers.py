"""Trackers, which draw the metrics of a run: TensorBoard, and Weights & Biases or a package in its place, as trackio.

Each gets the records of metrics.jsonl through the two methods of `Tracker`. A resumed run continues its W&B run.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from nanogpt import files
from nanogpt.config import TrainConfig, UserError, installs


class Tracker(Protocol):
    """What a run needs of a tracker; the runs of W&B and trackio have these methods."""

    def log(self, values: dict[str, Any], /, *, step: int) -> Any:
        """Record {metric: value} after `step` updates. A value that is None was not finite."""

    def finish(self) -> Any:
        """Send or write what is left."""


class TensorBoard:
    """A Tracker that writes TensorBoard's event files to a folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)  # hides what a resumed run repeats

    def log(self, values: dict[str, Any], /, *, step: int) -> None:
        """Write a scalar for each number."""
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write and close the file."""
        self.writer.close()


def require_installed(cfg: TrainConfig) -> None:
    """Raise UserError if a tracker is asked for and not installed."""
    missing = []
    if cfg.wandb_log and importlib.util.find_spec("wandb") is None:
        missing.append(f"--wandb_log=True: wandb is not installed; {installs('wandb')} brings it")
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        missing.append(f"--tensorboard=True: tensorboard is not installed; {installs('tensorboard')} brings it")
    if missing:
        raise UserError(*missing)


def start_tensorboard(cfg: TrainConfig, step: int, say: Callable[[str], Any]) -> Tracker:
    """A TensorBoard of a run that has made `step` updates, in `out_dir`/tensorboard. Raises OSError."""
    folder = Path(cfg.out_dir) / "tensorboard"
    tracker = TensorBoard(folder, step)
    say(f"TensorBoard: tensorboard --logdir={folder} shows the run")
    return tracker


def start_wandb(cfg: TrainConfig, run_id: str | None, say: Callable[[str], Any]) -> Any:
    """Start the W&B run with this id, or a new one if the id is None. WANDB_MODE=offline keeps it on this machine.

    It is written to `out_dir`, unless WANDB_DIR names another folder. A replacement such as trackio is installed under
    the name of wandb and reads the folder from the environment only. Raises UserError, and leaves nothing behind, if
    W&B cannot start within WANDB_INIT_TIMEOUT, by default 30 seconds; OSError if `out_dir` cannot be created.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # otherwise it prints a page, and asks for a login at a terminal
    folder = Path(os.environ.setdefault("WANDB_DIR", str(cfg.out_dir))) / "wandb"
    missing, there = [p for p in (folder, *folder.parents) if not p.exists()], set(folder.glob("*"))
    folder.parent.mkdir(parents=True, exist_ok=True)  # if it is missing, W&B writes elsewhere
    try:
        import wandb

        own: dict[str, Any] = {}
        if hasattr(wandb, "Settings"):  # replacements have none
            timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", 30))
            own = dict(settings=wandb.Settings(init_timeout=timeout, symlink=False))
        if run_id and "WANDB_RUN_ID" not in os.environ:
            own |= dict(id=run_id, resume="allow")
        run = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg), **own)
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


def kept_wandb_id(out_dir: Path | str) -> str | None:
    """The id of the W&B run in which the run in `out_dir` was logged, or None."""
    path = Path(out_dir) / "config.json"
    try:
        found = json.loads(files.read(path))["wandb_run_id"]
        return found if re.fullmatch(r"[\w-]{1,64}", found) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def name_of(tracker: Tracker) -> str:
    """What a line calls this tracker."""
    return "TensorBoard" if isinstance(tracker, TensorBoard) else "W&B"


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
