"""Runs uvicorn, limits the number of open connections, and closes idle ones."""

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogpt.config import ServeConfig
from nanogpt.serve.app import Server, make_app

SPARE_CONNECTIONS = 1000  # open connections beyond those of the requests that are being processed
SPARE_FILES = 16  # that can still be opened when the maximum number of connections is open

# Seconds.
IDLE_TIME = 15  # for a connection without a request
NEW_TIME = 0.2  # for the request of a connection to arrive, even if there are too many
GRACE_TIME = 5  # for unfinished texts when the server shuts down
REPORT_TIME = 60  # between two lines about too many connections


def run(server: Server, sock: socket.socket) -> None:
    """Run uvicorn until a signal arrives. Requests that are being processed then get GRACE_TIME to finish."""

    class Uvicorn(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=[])  # main_loop accepts: uvicorn itself accepts more than can be open

        async def main_loop(self) -> None:
            kept = Connections(self.server_state.connections, most_connections(server.cfg), server.dist.say)
            tasks = [asyncio.create_task(kept.close_idle()), asyncio.create_task(kept.accept(sock, self.protocol))]
            await super().main_loop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        def protocol(self) -> H11Protocol:
            return H11Protocol(self.config, self.server_state, self.lifespan.state)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit and sig == signal.SIGINT:
                os._exit(130)  # the second Ctrl-C
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: Any = None) -> None:
            asyncio.get_running_loop().call_later(GRACE_TIME, give_up, server)
            if server.open:
                again = "; Ctrl-C again stops at once"
                server.dist.say(f"stopping: {server.open} responses have {GRACE_TIME} s to finish{again}")
            await super().shutdown(sockets)

    settings: dict[str, Any] = dict(loop="asyncio", ws="none", lifespan="off", proxy_headers=False)
    settings |= dict(log_config=None, log_level="error", access_log=False, server_header=False)
    settings |= dict(timeout_keep_alive=IDLE_TIME, timeout_graceful_shutdown=GRACE_TIME + 5)
    Uvicorn(uvicorn.Config(make_app(server), **settings)).run([sock])


def give_up(server: Server) -> None:
    """End all texts. Interrupted responses are expected now, and uvicorn prints no traceback about them."""
    server.batcher.stop()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def most_connections(cfg: ServeConfig) -> int:
    """The maximum number of open connections, below the number of files that this process may open."""
    most = cfg.max_requests + SPARE_CONNECTIONS
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        taken = len(os.listdir("/dev/fd")) + SPARE_FILES
    except (ImportError, OSError):  # Windows has no such limit
        return most
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit - taken))


class Connections:
    """Accepts connections while there is room, closes idle ones, and leaves further ones in the system's backlog.

    open: uvicorn's set of open connections. most: its maximum size. say: prints a line.
    """

    def __init__(self, open: set, most: int, say: Callable[[str], None]) -> None:
        self.open, self.most, self.say = open, most, say
        self.idle: dict[tuple[H11Protocol, Any], float] = {}  # {(connection, its last request): since when}
        self.reported: float = -REPORT_TIME

    async def accept(self, sock: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections one by one, each with its own `protocol()`."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        while True:
            try:
                while len(self.open) >= self.most:
                    await self.make_room()
                connection, _ = await loop.sock_accept(sock)
                await loop.connect_accepted_socket(protocol, connection)
            except Exception as e:  # the client has disconnected, or the system cannot open more files
                if getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await self.make_room()
                await asyncio.sleep(0)

    async def make_room(self) -> None:
        """Close up to an eighth of the connections, those idle for longest; if there are none, wait briefly."""
        self.update_idle()
        latest = time.monotonic() - NEW_TIME  # the request of one that was just accepted is not read yet
        idle = sorted((c for c, since in self.idle.items() if since <= latest), key=self.idle.__getitem__)
        for connection, _ in idle[: 1 + self.most // 8]:
            connection.transport.abort()
        if time.monotonic() - self.reported >= REPORT_TIME:
            self.reported = time.monotonic()
            fit = "the most that fit (--max_requests, ulimit -n)"
            self.say(f"{len(self.open)} connections are open, {fit}: idle ones are closed, further ones wait")
        await asyncio.sleep(0 if idle else 0.05)

    async def close_idle(self) -> None:
        """Close connections without a request: uvicorn waits forever for headers that arrive a byte at a time."""
        while True:
            await asyncio.sleep(1)
            self.update_idle()
            for (connection, _), since in self.idle.items():
                if time.monotonic() - since > IDLE_TIME:
                    connection.transport.abort()

    def update_idle(self) -> None:
        """Find the connections that are idle now; those that were idle before keep their time."""
        now = time.monotonic()
        busy = {c for c in self.open if c.cycle and not c.cycle.response_complete and not c.transport.is_closing()}
        self.idle = {(c, c.cycle): self.idle.get((c, c.cycle), now) for c in self.open - busy}
