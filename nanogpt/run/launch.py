"""The processes of a launch: where they meet, and what is printed if one of them fails.

They share a store, a small server of keys and values. It connects them (distributed.py), and holds what failed first.
"""

import ipaddress
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as td

from nanogpt.config import RunFailed, UserError

COLLECTIVE = re.compile("gloo|NCCL|Connection (closed|reset)|Broken pipe|recvValue|sendBytes|recvBytes")
SAME = 3.0  # seconds that process 0 has to report a mistake in the settings, which all processes have probably found
SILENT = 10.0  # seconds after which a process that a lost connection leaves without a word counts as ended
TELLING = 30.0  # seconds after which a process gives up on the store, and reports what it knows


class PeerFailed(RunFailed):
    """Another process failed, and reports it."""


def meet(rank: int, timeout: timedelta) -> tuple[Any, Any]:
    """(the store for this attempt's connections, the store for failures): torchrun's variables say where.

    torchrun's own store outlives its processes. With --max-restarts it still has the addresses of the attempt before,
    so process 0 opens another one for each attempt, and torchrun's says where it is.
    """
    found, _, _ = next(td.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return found, found
    if rank == 0:
        host, attempt = address_towards(os.environ["MASTER_ADDR"]), uuid.uuid4().hex
        store = td.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        store.set("attempt", attempt)
        found.set("nanogpt/attempt", json.dumps([host, store.port, attempt]))
        return store, td.PrefixStore(attempt, found)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        found.wait(["nanogpt/attempt"], timeout)
        host, port, attempt = json.loads(found.get("nanogpt/attempt"))
        try:
            socket.create_connection((host, port), timeout=5).close()
            store = td.TCPStore(host, port, is_master=False, timeout=timeout)
            if store.check(["attempt"]) and store.get("attempt").decode() == attempt:
                return store, td.PrefixStore(attempt, found)
        except (OSError, RuntimeError):  # of an earlier attempt, whose process has ended
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def launch_id() -> str | None:
    """What this launch by torchrun, with all its restarts, has alone; None if torchrun did not start this process."""
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"none-{os.getppid()}" if given == "none" else given  # the default of --rdzv_id; then torchrun's own process


def restarted() -> bool:
    """Whether torchrun has started this launch's processes again, after one of them failed: --max-restarts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def address_towards(host: str) -> str:
    """This machine's address on the route to a host: the one that the other machines reach it by."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket sends nothing by that
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None if none has it, or the system does not say."""
    with suppress(OSError, AttributeError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl  # not on Windows

        for _, name in socket.if_nameindex():
            with suppress(OSError):
                SIOCGIFADDR = 0x8915
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def choose_interface(say: Callable[[str], Any]) -> None:
    """Have gloo and NCCL use the interface on the route to MASTER_ADDR, unless the user has named one.

    gloo would look up this machine's own name, which Debian maps to 127.0.1.1. UserError if MASTER_ADDR is such a name,
    and torchrun was started several times: on other machines, or, with the address 127.0.0.1 itself, on this one.
    """
    host = os.environ["MASTER_ADDR"]
    try:
        address = address_towards(host)
    except OSError as e:
        raise UserError(f"MASTER_ADDR={host}: there is no route to it ({e.strerror})") from None
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        one_machine = host in ("localhost", address) or "GROUP_RANK" not in os.environ
        if not one_machine and int(os.environ.get("LOCAL_WORLD_SIZE") or 1) < int(os.environ["WORLD_SIZE"]):
            raise UserError(
                f"MASTER_ADDR={host}: is a loopback address here, which other machines cannot reach; "
                "--master_addr or --rdzv_endpoint takes this machine's address, such as 10.0.0.1"
            )
        return
    names = [n for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if n not in os.environ]
    interface = interface_of(address)
    if interface and names:
        os.environ.update(dict.fromkeys(names, interface))
        say(f"network: {interface}, the interface on the route to MASTER_ADDR={host} ({', '.join(names)})")


class Failures:
    """What failed first among the processes of a launch, printed once however many of them notice.

    The store has `first`, the failure as JSON; `printing`, how many have wanted to print it; `told`, once it is printed;
    `lost`, if a connection broke; and of each process its `host/RANK`, its answer `here/RANK` to `lost`, and its answer
    `knows/RANK` to `told`.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.me = f"process {rank} on {socket.gethostname()}"
        self.ended, self.exit_code = threading.Event(), RunFailed.exit_code
        self.knows = False  # whether this process knows that the first failure is printed
        store.set(f"host/{rank}", socket.gethostname())

    @contextmanager
    def told(self) -> Iterator[None]:
        """Context in which the first failure of any process is printed, once, and ends all processes.

        Raises a RunFailed without lines, which has the exit code of the first failure. What ends all processes alike,
        such as a signal, is raised as it is.
        """
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield
        except Exception as e:
            if isinstance(e, UserError) and e.exit_code > 128:
                raise
            with without_sigterm():  # which torchrun sends to the others as soon as a process has ended
                within(
                    TELLING, partial(self._tell, e), f"{self.me}: the other processes do not answer ({reason_of(e)})"
                )
            silent = RunFailed()
            silent.exit_code = self.exit_code
            raise silent from None
        finally:
            self.ended.set()

    def _tell(self, error: Exception) -> None:
        """Print `error` if it is the first, and wait until the first failure is printed and, if the store ends here, known."""
        try:
            if not self.knows:
                self._tell_first(error)
            deadline = time.monotonic() + SILENT
            everybody = [f"knows/{r}" for r in range(self.world_size)]
            while self.hosts_store and not self.store.check(everybody) and time.monotonic() < deadline:
                time.sleep(0.1)
        except RuntimeError:
            self._tell_without_store(error)

    def _tell_first(self, error: Exception) -> None:
        if isinstance(error, PeerFailed) or is_collective(error):
            first = self._first_of_others(error)
        else:
            first = self._first(lines_of(error, self), exit_code_of(error))
        if first["rank"] != self.rank:
            self._wait_for("told", SILENT)
        if not self.store.check(["told"]) and self.store.add("printing", 1) == 1:
            show(first["lines"])
            self.store.set("told", "")
        self._know()

    def _first(self, lines: str, exit_code: int) -> dict:
        """The first failure: this one, or one that was in the store before."""
        if exit_code == UserError.exit_code and self.rank:
            self._wait_for("first", SAME)
        mine = json.dumps(dict(rank=self.rank, lines=lines, exit_code=exit_code))
        return json.loads(self.store.compare_set("first", "", mine))

    def _first_of_others(self, error: Exception) -> dict:
        """The failure that another process reports; if none does, which processes do not answer."""
        self.store.set("lost", "")
        self.store.set(f"here/{self.rank}", "")
        if self._wait_for("first", SILENT):
            return json.loads(self.store.get("first"))
        lost = [r for r in range(self.world_size) if not self.store.check([f"here/{r}"])]
        names = " and ".join(f"process {r} on {self.store.get(f'host/{r}').decode()}" for r in lost)
        why = "ended without a word, or does not answer: killed, stopped, or cut off"
        line = f"{names}: {why}" if lost else f"{self.me}: {reason_of(error)}"
        return self._first(f"error: {line}; the run stops\n", RunFailed.exit_code)

    def _know(self) -> None:
        """Take the exit code of the first failure, which is printed, and answer that this process knows."""
        self.exit_code, self.knows = json.loads(self.store.get("first"))["exit_code"], True
        self.store.set(f"knows/{self.rank}", "")

    def _tell_without_store(self, error: Exception) -> None:
        if self.knows:
            return
        if self.rank > 1:
            time.sleep(SAME)  # then torchrun has ended this process, because process 1 has ended
        show(f"error: {self.me}: process 0 has ended, or cannot be reached ({reason_of(error)}); the run stops\n")

    def _wait_for(self, key: str, seconds: float) -> bool:
        """Whether the store has a key, now or within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _watch(self) -> None:
        """Answer for this process while it waits, and end it if a failure does not reach it there."""
        while not self.ended.wait(0.5):
            try:
                if self.store.check(["lost"]):
                    self.store.set(f"here/{self.rank}", "")
                if not self.store.check(["told"]):
                    continue
                self._know()
            except RuntimeError as e:  # this thread may notice first
                if self.ended.wait(TELLING):
                    return
                self._tell_without_store(e)
            if not self.ended.wait(SILENT):
                os._exit(self.exit_code)


def is_collective(error: Exception) -> bool:
    """Whether an error comes from a collective operation or the store, so that another process is its cause."""
    return isinstance(error, td.DistError) or (isinstance(error, RuntimeError) and bool(COLLECTIVE.search(str(error))))


def reason_of(error: Exception) -> str:
    """An error's first line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def exit_code_of(error: Exception) -> int:
    """The exit code of a process that ends with this error."""
    return error.exit_code if isinstance(error, UserError) else RunFailed.exit_code


def lines_of(error: Exception, failures: Failures) -> str:
    """What is printed of an error: a line for each problem, which names the process unless all have the same problem."""
    if isinstance(error, UserError):
        whose = "" if error.exit_code == UserError.exit_code and not failures.rank else f"{failures.me}: "
        return "".join(f"error: {whose}{problem}\n" for problem in error.problems)
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return f"{trace}error: {failures.me}: {type(error).__name__}: {reason_of(error)}\n"


def show(lines: str) -> None:
    """Print lines at once and as a whole: other processes print, too."""
    with suppress(OSError, ValueError):
        sys.stderr.write(lines)
        sys.stderr.flush()


@contextmanager
def without_sigterm() -> Iterator[None]:
    """Context in which SIGTERM does not end this process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def within(seconds: float, work: Callable[[], None], otherwise: str) -> None:
    """Call `work`; if it has not returned after so many seconds, print the line `otherwise`, and leave it to itself."""
    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there is no memory for a thread
        work()
        return
    thread.join(seconds)
    if thread.is_alive():
        show(f"error: {otherwise}\n")
