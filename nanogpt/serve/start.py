"""`nanogpt serve`: settings, API key, socket and model. The other modules import FastAPI, which is optional."""

import errno
import importlib.util
import os
import re
import signal
import socket
from pathlib import Path
from types import FrameType

import torch

from nanogpt.config import ServeConfig, UserError, installs
from nanogpt.run import distributed, settings, trained
from nanogpt.run.signals import Stopped
from nanogpt.serve import KEY


def main(argv: list[str]) -> None:
    """`nanogpt serve` with these arguments."""
    cfg = settings.load(ServeConfig, argv, "nanogpt serve")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"nanogpt serve needs {package}: {installs('serve')} brings it")
    key = read_key(cfg)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stopped)
    with listen(cfg) as sock, distributed.setup(cfg) as dist:  # a port in use is reported before the model loads
        serve(cfg, sock, key, dist)


def stopped(signum: int, frame: FrameType | None) -> None:
    """Stop on a signal: at once while the model loads; after that, uvicorn raises it again when it has shut down."""
    raise Stopped(f"{signal.Signals(signum).name}: stopped", signum)


def read_key(cfg: ServeConfig) -> str | None:
    """The API key that clients must send, if any. It is never an argument, because other users can read arguments."""
    source, key = KEY, os.environ.get(KEY)
    if cfg.api_key_file:
        source = f"--api_key_file={cfg.api_key_file}"
        try:
            key = Path(cfg.api_key_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise UserError(f"{source}: cannot be read ({getattr(e, 'strerror', None) or 'it is not text'})") from None
    if key is None:
        return None
    if not re.fullmatch(r"[!-~]+", key.strip()):
        raise UserError(f"{source}: expected one word of ASCII characters")
    return key.strip()


def listen(cfg: ServeConfig) -> socket.socket:
    """A socket that listens on the host and port of `cfg`. Raises UserError."""
    where = f"--host={cfg.host}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(cfg.host or None, cfg.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as e:
        code = getattr(e, "errno", None)
        if code == errno.EADDRINUSE:
            where, why = f"--port={cfg.port}", "another program listens there; --port=0 takes a free one"
        elif code == errno.EACCES:
            where, why = f"--port={cfg.port}", "not allowed; ports from 1024 on are"
        else:
            why = f"not an address of this machine ({getattr(e, 'strerror', None) or e})"
        raise UserError(f"{where}: {why}") from None


def serve(cfg: ServeConfig, sock: socket.socket, key: str | None, dist: distributed.Dist) -> None:
    """Load the model and serve it until a signal arrives."""
    from nanogpt.serve.access import LOOPBACK
    from nanogpt.serve.app import Server
    from nanogpt.serve.connections import run

    cores = torch.get_num_threads()
    # Only the batch thread should have OpenMP worker threads. Those of this thread would stay, and barriers are several
    # times slower with more workers than cores (benchmarks/LOG.md).
    torch.set_num_threads(1)
    found = trained.load(cfg, dist)
    server = Server(cfg, key, found, dist, cores)
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if host not in LOOPBACK and key is None:
        dist.say(f"no key: anyone who can reach {address} can use the model (--api_key_file)")
    dist.say(f"serving {server.name} at {address} (Ctrl-C stops)")
    try:
        run(server, sock)
    finally:
        server.batcher.stop()
        server.batcher.thread.join(timeout=10)
