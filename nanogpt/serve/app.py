"""A trained model for programs and browsers: OpenAI's completions interface over HTTP, and a page to play on.

This file is the way from a connection to the batch and back: who is let in, what is refused, how text leaves.
What a request may say is in completions.py, how texts are continued together in batching.py, the page in page.html.
"""

import asyncio
import base64
import errno
import hashlib
import hmac
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import time
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from functools import partial
from math import isfinite
from pathlib import Path

import torch

from nanogpt import config, quantize
from nanogpt.config import GPT2_NAMES, ServeConfig, UserError
from nanogpt.generate import Engine, Options
from nanogpt.run import distributed, settings, trained
from nanogpt.run.records import read_metrics
from nanogpt.run.signals import Stopped
from nanogpt.serve import batching
from nanogpt.serve.completions import ApiError, Choice, Completion, read_request
from nanogpt.text.tokenizer import check_id

PAGE = Path(__file__).with_name("page.html")
KEY = "NANOGPT_API_KEY"  # the environment variable
OPEN = ("/", "/health")  # what needs no key
PATHS = (*OPEN, "/metrics", "/losses", "/v1/models", "/v1/completions")
GONE = 499  # counted where the client went away before an answer, as nginx does
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOPPING = "the server is stopping"

SPARE_CONNECTIONS = 1000  # that may be open beside those of the requests that are being answered
SPARE_FILES = 16  # that can be opened when there are as many connections as there may be
CHUNK = 128  # tokens of prompts that are read in one step, at most: the other texts wait that long for their next token

# Seconds.
PAUSE = 0.015  # between two parts of a stream: what comes meanwhile leaves together, at a fraction of the cost
BODY_TIME = 10  # for a request's body to arrive
IDLE_TIME = 15  # for a connection without a request
STALL_TIME = 10  # for a client to read the last of its answer
GRACE_TIME = 5  # for the texts that are being written when the server is to end
REMIND_TIME = 60  # between two lines about too many connections
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # of the histograms


def main(argv):
    """`nanogpt serve`, given its arguments."""
    cfg = settings.load(ServeConfig, argv, "nanogpt serve")
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"nanogpt serve needs {package}: {config.installs('serve')} brings it")
    key = read_key(cfg)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stopped)
    with listen(cfg) as sock, distributed.setup(cfg) as dist:  # a port in use is known before a model is loaded
        serve(cfg, sock, key, dist)


def stopped(signum, frame):
    """What a signal does, at once while the model is loaded, and otherwise when the server has ended."""
    raise Stopped(f"{signal.Signals(signum).name}: stopped", signum)


def read_key(cfg):
    """The API key that clients must send, or None. Never an argument, which everybody on a machine can read."""
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


def listen(cfg):
    """A socket that listens where `cfg` says. UserError where that cannot be."""
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


def serve(cfg, sock, key, dist):
    """Load the model and serve it until a signal ends that."""
    cores = torch.get_num_threads()
    # Helpers of this thread would stay, and OpenMP's barriers are several times slower when there are more helpers than
    # cores: all of them are to be the batch thread's (benchmarks/LOG.md).
    torch.set_num_threads(1)
    found = trained.load(cfg, dist)
    server = Server(cfg, key, found, dist, cores)
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if host not in LOOPBACK and key is None:
        dist.say(f"no key: whoever can reach {address} can use the model (--api_key_file)")
    dist.say(f"serving {server.name} at {address} (Ctrl-C stops)")
    try:
        run(server, sock)
    finally:
        server.batcher.stop()
        server.batcher.thread.join(timeout=10)


def run_folder(cfg):
    """Where the model came from, unless it was from elsewhere."""
    return Path(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from)


def run(server, sock):
    """Run uvicorn until a signal comes; then let those that are being answered finish, but not for long."""
    import uvicorn

    class Uvicorn(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets=[])  # connections are accepted below: uvicorn takes more than can be open

        async def main_loop(self):
            kept = Connections(self.server_state.connections, most_connections(server.cfg), server.dist.say)
            tasks = [asyncio.create_task(kept.close_idle()), asyncio.create_task(kept.accept(sock, self.protocol))]
            await super().main_loop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        def protocol(self):
            shared = dict(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
            return self.config.http_protocol_class(**shared)

        def handle_exit(self, signum, frame):
            if self.should_exit and signum == signal.SIGINT:
                os._exit(130)  # asked twice: at once
            super().handle_exit(signum, frame)

        async def shutdown(self, sockets=None):
            asyncio.get_running_loop().call_later(GRACE_TIME, give_up, server)
            if server.open:
                again = "; once more stops at once"
                with suppress(OSError):  # nobody may be reading that any more
                    server.dist.say(f"stopping: {server.open} answers may take another {GRACE_TIME} s to finish{again}")
            await super().shutdown(sockets)

    options = dict(loop="asyncio", http="h11", ws="none", lifespan="off", proxy_headers=False)
    silent = dict(log_config=None, log_level="error", access_log=False, server_header=False)
    grace = dict(timeout_keep_alive=IDLE_TIME, timeout_graceful_shutdown=GRACE_TIME + 5)
    Uvicorn(uvicorn.Config(make_app(server), **options, **silent, **grace)).run([sock])


def give_up(server):
    """End all texts; what is broken off from now on is no error worth a traceback."""
    server.batcher.stop()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def most_connections(cfg):
    """How many connections may be open at a time: fewer than the files that the system lets this process open."""
    most = cfg.max_requests + SPARE_CONNECTIONS
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        taken = len(os.listdir("/dev/fd")) + SPARE_FILES
    except (ImportError, OSError):  # Windows, which has no such limit
        return most
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit - taken))


class Connections:
    """Takes connections as long as there is room, closes those that are idle, and lets further ones wait outside.

    open: uvicorn's set of the connections that are open. most: how many there may be.
    """

    def __init__(self, open, most, say):
        self.open, self.most, self.say = open, most, say
        self.idle = {}  # {(connection, its last request): since when}
        self.reminded = -REMIND_TIME

    async def accept(self, sock, protocol):
        """Accept connections one by one, each with a `protocol()` of its own; the system lets the others wait."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        while True:
            try:
                while len(self.open) >= self.most:
                    await self.make_room()
                connection, _ = await loop.sock_accept(sock)
                await loop.connect_accepted_socket(protocol, connection)
            except Exception as e:  # the client has left already, or others have taken all files of the system
                if getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await self.make_room()
                await asyncio.sleep(0)

    async def make_room(self):
        """Close an eighth of the connections, those that have been idle longest; if there are none, wait a little."""
        self.look()
        for connection, _ in sorted(self.idle, key=self.idle.get)[: 1 + self.most // 8]:
            connection.transport.abort()
        if time.monotonic() - self.reminded >= REMIND_TIME:
            self.reminded = time.monotonic()
            fit = "the most that fit (--max_requests, ulimit -n)"
            with suppress(OSError):  # nobody may be reading that any more
                self.say(f"{len(self.open)} connections are open, {fit}: idle ones are closed, further ones wait")
        await asyncio.sleep(0 if self.idle else 0.05)

    async def close_idle(self):
        """Close those on which nothing is asked: uvicorn waits forever for headers that come a byte at a time."""
        while True:
            await asyncio.sleep(1)
            self.look()
            for (connection, _), since in self.idle.items():
                if time.monotonic() - since > IDLE_TIME:
                    connection.transport.abort()

    def look(self):
        """Note which connections are idle."""
        now = time.monotonic()
        busy = {c for c in self.open if c.cycle and not c.cycle.response_complete and not c.transport.is_closing()}
        self.idle = {(c, c.cycle): self.idle.get((c, c.cycle), now) for c in self.open if c not in busy}


class Server:
    """What is served, and what all requests share."""

    def __init__(self, cfg, key, found, dist, cores):
        self.cfg, self.key, self.dist, self.tok = cfg, key, dist, found.tokenizer
        self.name = cfg.init_from if cfg.init_from in GPT2_NAMES else run_folder(cfg).resolve().name
        self.created = int(time.time())
        shape = found.model.config
        self.losses = curves(run_folder(cfg) / "metrics.jsonl", found.checkpoint)
        self.info = dict(context=shape.block_size, vocab_size=self.tok.vocab_size, parameters=found.model.num_params())
        model = quantize.made_ready(found.model, cfg, dist)
        make_engine = partial(Engine, model, cfg.max_batch, self.tok.vocab_size, chunk=CHUNK)
        self.batcher = batching.Batcher(make_engine, self.tok, cores)
        self.open = 0  # completions that are being answered
        self.requests = Counter()  # {(path, status): how many}
        self.times = {"first_token": Histogram(), "completion": Histogram()}

    @property
    def model_body(self):
        """The model in OpenAI's shape, and what the page wants to know."""
        shape = dict(id=self.name, object="model", created=self.created, owned_by="nanogpt")
        limits = dict(max_tokens=self.cfg.max_tokens, max_n=self.cfg.max_n, max_prompt=self.cfg.max_prompt)
        return shape | self.info | limits

    def check_model(self, name):
        """Raise ApiError where another model is asked for."""
        if name not in ("", self.name):
            message = f"there is no model {name[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")


def curves(path, checkpoint):
    """How a checkpoint (or None) learned, for the page: {"train": [[step, loss], ...], "val": ...}.

    Up to its step, and empty if the records in `path` lack its last evaluation: then another run has written them.
    """
    records, state = [], checkpoint.state if checkpoint else {}
    if state.get("losses") and path.is_file():
        with suppress(OSError):
            records = [r for r in read_metrics(path) if r["step"] <= checkpoint.step]
    last = state.get("evaluated"), (state.get("losses") or {}).get("val")
    if last not in [(r["step"], r.get("val_loss")) for r in records]:
        records = []
    return {"train": curve(records, "loss"), "val": curve(records, "val_loss")}


def curve(records, name, most=500):
    """[[step, value], ...] of what metrics.jsonl calls `name`: at most so many, evenly spread, the last among them."""
    found = [[r["step"], round(r[name], 4)] for r in records if isinstance(r.get(name), float) and isfinite(r[name])]
    return found[::-1][:: -(-len(found) // most) or 1][::-1]


# -- who is let in, and what every answer carries


class Guard:
    """Around all the rest: checks the host and the key, adds the headers, counts."""

    def __init__(self, app, server):
        self.app, self.server = app, server
        self.headers = [(name.encode(), value.encode()) for name, value in security_headers().items()]

    async def __call__(self, scope, receive, send):
        headers, status = dict(scope["headers"]), GONE
        shared = self.shared(headers)
        # If the length is given twice, a proxy may go by the one and we by the other: what it takes for part of this
        # request, we would take for the next one (RFC 9112, section 6.3).
        lengths = {value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}
        closing = [(b"connection", b"close")] if len(lengths) > 1 else []

        async def reply(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.headers, *shared, *closing]
            await send(message)

        try:
            if closing:
                raise ApiError(400, "expected a single Content-Length or Transfer-Encoding")
            if shared and scope["method"] == "OPTIONS":
                await send_start(reply, 204, "text/plain")
                await send_part(reply, b"", more=False)
            else:
                self.check(scope["path"], headers)
                await self.app(scope, receive, reply)
        except ApiError as e:
            await send_error(reply, e)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.server.requests[path, status] += 1

    def check(self, path, headers):
        """Raise ApiError where the request must not go on."""
        key = self.server.key
        if key is None and self.server.cfg.host in LOOPBACK:
            # A page elsewhere may let its own name point to this machine, and could then read what we answer.
            host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
            if host not in LOOPBACK:
                why = "without an API key, this server answers to localhost and 127.0.0.1 only"
                raise ApiError(403, f"{why}; with one ({KEY} or --api_key_file), to every name")
        if key is not None and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                why = "wrong API key" if given else "this server wants an API key, as Authorization: Bearer KEY"
                raise ApiError(401, why, code="invalid_api_key")

    def shared(self, headers):
        """The headers that let a page of another origin ask and read, where that is allowed."""
        allowed, origin = self.server.cfg.allow_origin.encode(), headers.get(b"origin")
        if origin is None or allowed not in (b"*", origin):
            return []
        asked = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", asked),
            (b"vary", b"origin"),
        ]


def security_headers():
    """Every answer's: a browser runs the page's own script and no other, and shows the page in no other page."""
    digests = {"script": [], "style": []}
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", PAGE.read_text(encoding="utf-8"), re.S):
        digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
        digests[tag].append(f"'sha256-{digest}'")
    policy = [
        "default-src 'none'",
        "script-src " + " ".join(digests["script"]),
        "style-src " + " ".join(digests["style"]),
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }


# -- what is answered


def make_app(server):
    """The paths, as an ASGI application."""
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    app = FastAPI(openapi_url=None)  # and so without its pages of documentation, whose scripts lie elsewhere
    page = PAGE.read_text(encoding="utf-8")
    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/", response_class=HTMLResponse)
    async def index():
        return page

    @get("/health")
    async def health():
        if not server.batcher.thread.is_alive():
            raise ApiError(503, "the model cannot be run any more")
        return {"status": "ok"}

    @get("/metrics", response_class=PlainTextResponse)
    async def prometheus():
        return PlainTextResponse(metrics_text(server), media_type="text/plain; version=0.0.4")

    @get("/losses")
    async def losses():
        return server.losses

    @get("/v1/models")
    async def models():
        return {"object": "list", "data": [server.model_body]}

    @get("/v1/models/{name:path}")
    async def model(name: str):
        server.check_model(name)
        return server.model_body

    app.router.routes.append(Route("/v1/completions", Completions(server), methods=["POST"]))

    async def refuse(request, error):
        """Any error as OpenAI's clients expect it."""
        if isinstance(error, HTTPException) and error.status_code == 404:
            there = "this server has POST /v1/completions, GET /v1/models, /health and /metrics"
            error = ApiError(404, f"{request.method} {request.url.path}: {error.detail}; {there}")
        elif isinstance(error, HTTPException):
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        elif not isinstance(error, ApiError):
            error = ApiError(500, "the server failed; what it printed says why")
        return JSONResponse(error.body(), error.status, HINTS.get(error.status))

    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    return Guard(app, server)


class Gone(Exception):
    """The client went away."""


class Completions:
    """POST /v1/completions, from the request's first byte to the answer's last."""

    def __init__(self, server):
        self.server = server

    async def __call__(self, scope, receive, send):
        server, began = self.server, time.monotonic()
        if server.open >= server.cfg.max_requests:
            raise ApiError(429, f"{server.open} requests are being answered already; try again soon")
        server.open += 1
        try:
            body = await self.body(scope, receive)
            await self.answer(read_request(body, server.cfg), began, receive, send)
        except Gone:
            pass
        finally:
            server.open -= 1

    async def body(self, scope, receive):
        """The request's body. Raises ApiError where it is not what it should be, Gone where it does not end."""
        try:
            return await asyncio.wait_for(self.read(scope, receive), BODY_TIME)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request took longer than {BODY_TIME} s to arrive") from None

    async def read(self, scope, receive):
        """The bytes of a request's body. Raises ApiError where it is not JSON or too large, Gone where its sender left."""
        limit, headers = self.server.cfg.max_body, dict(scope["headers"])
        kind = headers.get(b"content-type", b"").lower()
        # A page elsewhere cannot send application/json, only what curl sends, and browsers say that it is a page.
        from_page = b"origin" in headers or b"sec-fetch-site" in headers
        by_hand = not from_page and (not kind or kind == b"application/x-www-form-urlencoded")
        if not kind.startswith(b"application/json") and not by_hand:
            raise ApiError(415, "expected the header Content-Type: application/json")
        declared, body, more = headers.get(b"content-length", b"0"), b"", True
        while more:
            if len(body) > limit or int(declared) > limit:
                raise ApiError(413, f"the request has more than {limit} bytes")
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body, more = body + message["body"], message["more_body"]
        return body

    async def answer(self, ask, began, receive, send):
        """Have the texts written and send them, unless the client goes away or stops reading."""
        reply = Reply(self.server, ask, began)
        try:
            self.server.batcher.submit(reply.jobs)
        except batching.Stopping:
            raise ApiError(503, STOPPING) from None
        sending = asyncio.create_task(reply.stream(send) if ask.stream else reply.whole(send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            time_left = reply.deadline + STALL_TIME - time.monotonic()
            await asyncio.wait({sending, leaving}, timeout=time_left, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # or what it raised
                self.server.times["completion"].note(time.monotonic() - began)
        finally:
            self.server.batcher.cancel(reply.jobs)
            for task in (sending, leaving):
                task.cancel()


async def disconnected(receive):
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply:
    """The answer to one request while it is made."""

    def __init__(self, server, ask, began):
        self.server, self.ask, self.began = server, ask, began
        self.deadline = began + server.cfg.max_seconds
        server.check_model(ask.model)
        self.outbox = batching.Outbox()
        self.jobs = [self.job(number, prompt) for number, prompt in enumerate(ask.prompt)]
        self.shape = Completion(ask, server.name, sum(len(job.ids) for job in self.jobs))
        self.choices = []
        for job in self.jobs:
            prompt = server.tok.decode(job.ids) if ask.echo else ""
            self.choices += [Choice(index, prompt, ask.logprobs is not None, server.tok) for index in job.indices]

    def job(self, number, prompt):
        """The batching.Job of prompt so-and-so. Raises ApiError where it is not in the model's vocabulary."""
        ask, tok = self.ask, self.server.tok
        try:
            if isinstance(prompt, str):
                ids = tok.encode(trained.known(prompt, tok)[0])
            else:
                ids = [check_id(id, tok.vocab_size) for id in prompt]
        except ValueError as e:
            raise ApiError(400, f"prompt: {e}", "prompt") from None
        if not 0 < len(ids) <= self.server.cfg.max_prompt:
            why = f"has {len(ids)} tokens; 1 to {self.server.cfg.max_prompt} are taken"
            raise ApiError(400, f"prompt: {why}", "prompt")
        seed = int.from_bytes(os.urandom(7), "little") if ask.seed is None else ask.seed
        ends = frozenset(() if tok.eot is None else [tok.eot])
        indices = range(number * ask.n, (number + 1) * ask.n)
        sampling = (ask.max_tokens, ask.temperature, ask.top_k, ask.top_p, ask.min_p, seed + indices[0])
        return batching.Job(ids, Options(*sampling, ends, ask.logprobs), ask.stop, indices, self.outbox)

    async def parts(self):
        """Yield {index of a choice: the parts that have come} until all have ended. Raises ApiError."""
        unfinished, first = len(self.choices), True
        while unfinished:
            added = {}
            for part in await self.take():
                added.setdefault(part.index, []).append(part)
                unfinished -= part.finish is not None
            if first:
                self.server.times["first_token"].note(time.monotonic() - self.began)
                first = False
            yield added

    async def take(self):
        """The next parts of text, as `Outbox.take`; what ends the waiting is an ApiError."""
        try:
            return await self.outbox.take(self.deadline)
        except TimeoutError:
            raise ApiError(408, f"the request took longer than {self.server.cfg.max_seconds:g} s") from None
        except batching.Stopping:
            raise ApiError(503, STOPPING) from None
        except batching.Failed:
            raise ApiError(500, "the model could not be run; what the server printed says why") from None

    async def whole(self, send):
        """Send it when all of it is there."""
        parts = {choice.index: [] for choice in self.choices}
        async for added in self.parts():
            for index in added:
                parts[index] += added[index]
        choices = [choice.body(parts[choice.index]) for choice in self.choices]
        await send_json(send, 200, self.shape.body(choices, self.tokens))

    async def stream(self, send):
        """Send it as it is made, as server-sent events; its status when the first token is there."""
        began, last = False, []
        try:
            async for added in self.parts():
                if not began:
                    await send_start(send, 200, EVENTS)
                    began = True
                choices = [self.choices[index].body(parts) for index, parts in added.items()]
                told = [self.shape.body([choice]) for choice in choices if choice["text"] or choice["finish_reason"]]
                await send_part(send, b"".join(map(event, told)))
                await asyncio.sleep(PAUSE)
            if self.ask.stream_options.include_usage:
                last = [self.shape.body([], self.tokens)]
        except ApiError as e:
            if not began:
                raise
            last = [e.body()]
        await send_part(send, b"".join(map(event, last)) + b"data: [DONE]\n\n", more=False)

    @property
    def tokens(self):
        return sum(choice.tokens for choice in self.choices)


# -- what ASGI wants to hear

JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
HINTS = {  # headers that clients heed
    401: {"www-authenticate": "Bearer"},
    408: {"x-should-retry": "false"},
    429: {"retry-after": "1"},
    503: {"retry-after": "5"},
}


def event(value):
    """A server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def send_start(send, status, kind, *headers):
    headers = [("content-type", kind), *headers]
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})


async def send_part(send, body, more=True):
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def send_json(send, status, value):
    body = json.dumps(value).encode()
    await send_start(send, status, JSON, ("content-length", str(len(body))), *HINTS.get(status, {}).items())
    await send_part(send, body, more=False)


async def send_error(send, error):
    await send_json(send, error.status, error.body())


# -- figures, in Prometheus's text format


class Histogram:
    """How long something took, how often."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def note(self, seconds):
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def samples(self, name):
        total = 0
        for bound, count in zip([*BUCKETS, "+Inf"], self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}}', total
        yield f"{name}_sum", self.sum
        yield f"{name}_count", total


def metrics_text(server):
    """Everything that is counted."""
    batcher, figures = server.batcher, server.batcher.figures
    requests = [(f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(server.requests.items())]
    simple = [
        ("requests_total", "counter", "Requests, by path and status; 499: the client went away.", requests),
        ("prompt_tokens_total", "counter", "Tokens of the prompts that were read.", figures.prompt_tokens),
        ("tokens_total", "counter", "Tokens that were written.", figures.tokens),
        ("steps_total", "counter", "Steps of the model; each writes a token of every text.", figures.steps),
        ("failures_total", "counter", "Steps that failed.", figures.failures),
        ("texts", "gauge", "Texts that are being written.", len(batcher.running)),
        ("texts_limit", "gauge", "Texts that can be written at the same time.", server.cfg.max_batch),
        ("waiting", "gauge", "Texts that wait for a place.", len(batcher.waiting)),
        ("completions", "gauge", "Completions that are being answered.", server.open),
    ]
    lines = []
    for name, kind, help, value in simple:
        lines += [f"# HELP nanogpt_{name} {help}", f"# TYPE nanogpt_{name} {kind}"]
        values = value if isinstance(value, list) else [("", value)]
        lines += [f"nanogpt_{name}{labels} {n}" for labels, n in values]
    for name, help in (("first_token", "Until the first token was there."), ("completion", "Until all was answered.")):
        lines += [f"# HELP nanogpt_{name}_seconds {help}", f"# TYPE nanogpt_{name}_seconds histogram"]
        lines += [f"{sample} {value}" for sample, value in server.times[name].samples(f"nanogpt_{name}_seconds")]
    return "\n".join(lines) + "\n"
