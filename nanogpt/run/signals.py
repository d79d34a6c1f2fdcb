"""Stopping on request: SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the run at the next safe place, on all processes at once."""

import os
import signal
from contextlib import contextmanager, suppress

from nanogpt.config import UserError

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
FAILED = 1000  # agreed on instead of a signal's number


class StopRequested(Exception):
    """Ends an evaluation, on all processes at the same batch, since one of them was asked to stop."""


class Interrupted(BaseException):
    """Ends what may be broken off at once, such as compiling. Not an Exception, so that no fallback catches it."""


class Stopped(UserError):
    """The run ended on request, saved. The exit code is a shell's for the signal."""

    def __init__(self, line, signum):
        super().__init__(line)
        self.exit_code = 128 + signum


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self, dist):
        self.dist, self.breakable = dist, False
        self.signum = None  # what this process got
        self.interrupted = False  # whether SIGINT was among what it got
        self.agreed = 0  # what they all know of
        self.failed = lambda: False  # whether this process cannot go on, and all must stop

    def agree(self):
        """Agree with all processes on whether to stop: whether one was asked to, or failed. They all have to ask."""
        self.agreed = self.dist.max(FAILED if self.failed() else self.signum or 0)
        return self.agreed > 0

    def check(self):
        """Raise StopRequested, on all processes, if they agree to stop. They all have to ask."""
        if self.agree():
            raise StopRequested

    @contextmanager
    def at_once(self):
        """Within, a request raises Interrupted instead of waiting for a safe place."""
        self.breakable = True
        try:
            if self.signum is not None:
                raise Interrupted
            yield
        finally:
            self.breakable = False

    def _handle(self, signum, frame):
        if signum == signal.SIGINT and self.interrupted:
            os._exit(130)  # asked twice: at once
        self.interrupted = self.interrupted or signum == signal.SIGINT
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
def stopping(dist):
    """A Stop that listens to the signals within; afterwards they do what they did before.

    SIGHUP stays ignored if it was, as under nohup.
    """
    stop = Stop(dist)
    ignored = {s for s in SIGNALS if s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN}
    before = {s: signal.signal(s, stop._handle) for s in SIGNALS if s not in ignored}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
