"""Stopping on request: SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop all processes together at the next safe point."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nanogpt.config import UserError

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
FAILED = 1000  # stands for a failure where others have a signal's number


class StopRequested(Exception):
    """Ends an evaluation on all processes at the same batch, because one of them was asked to stop."""


class Interrupted(BaseException):
    """Ends what can be aborted at any point, such as compilation. Not an Exception, so that no fallback catches it."""


class Stopped(UserError):
    """The run was saved and stopped on request. The exit code is the shell's for the signal."""

    def __init__(self, line: str, signum: int) -> None:
        super().__init__(line)
        self.exit_code = 128 + signum


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self, dist: Any) -> None:
        self.dist, self.breakable = dist, False
        self.signum: int | None = None  # the first signal that this process received
        self.interrupted = False  # whether it received SIGINT
        self.agreed = 0  # the signal, or FAILED, that all processes know of

    def agree_to_stop(self) -> bool:
        """Whether any process was asked to stop or has failed. A collective operation: all processes must call it."""
        self.agreed = self.dist.max(FAILED if self.dist.failure else self.signum or 0)
        return self.agreed > 0

    def check(self) -> None:
        """Raise StopRequested on all processes if `agree_to_stop` is true. A collective operation."""
        if self.agree_to_stop():
            raise StopRequested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises Interrupted at once instead of waiting for a safe point."""
        self.breakable = True
        try:
            if self.signum is not None:
                raise Interrupted
            yield
        finally:
            self.breakable = False

    def _handle(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self.interrupted:
            os._exit(130)  # the second one stops at once
        self.interrupted = self.interrupted or signum == signal.SIGINT
        self.dist.asked = True
        if self.signum is None:
            self.signum = signum
            if self.dist.is_main:
                again = "; once more stops at once" if signum == signal.SIGINT else ""
                line = f"\n{signal.Signals(signum).name}: saving, then stopping{again}\n"
                with suppress(OSError):  # after SIGHUP the terminal may be gone
                    os.write(2, line.encode())  # print must not be called while another print may be under way
        if self.breakable:
            raise Interrupted


@contextmanager
def stopping(dist: Any) -> Iterator[Stop]:
    """Context of a Stop that handles the signals; the previous handlers are restored at its end.

    If SIGHUP is ignored, as under nohup, it stays so.
    """
    stop = Stop(dist)
    ignored = {s for s in SIGNALS if s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN}
    before = {s: signal.signal(s, stop._handle) for s in SIGNALS if s not in ignored}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
