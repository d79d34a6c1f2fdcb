"""OpenAI's completions API over HTTP, and a page to play on: who is let in, the routes, how text leaves.

completions.py knows what a request may contain, batching.py generates the texts of all requests together, and
connections.py accepts connections.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.requests import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt import quantize
from nanogpt.config import GPT2_NAMES, ServeConfig
from nanogpt.generate import Engine, Options
from nanogpt.run import distributed, trained
from nanogpt.run.records import read_metrics
from nanogpt.serve import KEY, batching
from nanogpt.serve.completions import ApiError, Choice, Completion, CompletionRequest, read_request
from nanogpt.serve.metrics import Metrics
from nanogpt.text.tokenizer import check_id

PAGE = Path(__file__).with_name("page.html")
OPEN = ("/", "/health")  # paths that need no key
PATHS = (*OPEN, "/metrics", "/losses", "/v1/models", "/v1/completions")
GONE = 499  # counted if the client disconnects before the response starts; nginx's number
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STOPPING = "the server is stopping"
CHUNK = 128  # prompt tokens read in one step, at most: the other texts wait that long for their next token
HINTS = {  # headers that clients heed
    401: {"www-authenticate": "Bearer"},
    408: {"x-should-retry": "false"},
    429: {"retry-after": "1"},
    503: {"retry-after": "5"},
}

# Seconds.
PAUSE = 0.015  # between two events of a stream: tokens that come meanwhile leave together, at a fraction of the cost
BODY_TIME = 10  # for a request's body to arrive
STALL_TIME = 10  # for a client to read the end of its response


class Server:
    """The model, the batcher, and what all requests share."""

    def __init__(
        self, cfg: ServeConfig, key: str | None, found: trained.Trained, dist: distributed.Dist, cores: int
    ) -> None:
        self.cfg, self.key, self.dist, self.tok = cfg, key, dist, found.tokenizer
        folder = Path(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from)
        self.name = cfg.init_from if cfg.init_from in GPT2_NAMES else folder.resolve().name
        self.losses = curves(folder / "metrics.jsonl", found.checkpoint)
        shape, created = found.model.config, int(time.time())
        self.model_body = dict(id=self.name, object="model", created=created, owned_by="nanogpt")  # OpenAI's fields
        self.model_body |= dict(context=shape.block_size, vocab_size=self.tok.vocab_size)  # and the page's
        self.model_body |= dict(parameters=found.model.num_params(), max_tokens=cfg.max_tokens)
        self.model_body |= dict(max_n=cfg.max_n, max_prompt=cfg.max_prompt)
        model = quantize.made_ready(found.model, cfg, dist)
        make_engine = partial(Engine, model, cfg.max_batch, self.tok.vocab_size, chunk=CHUNK)
        self.metrics = Metrics()
        self.batcher = batching.Batcher(make_engine, self.tok, cores, self.metrics)
        self.open = 0  # completion requests being processed
        self.metrics.texts_limit.set(cfg.max_batch)
        self.metrics.texts.set_function(lambda: len(self.batcher.running))
        self.metrics.waiting.set_function(lambda: len(self.batcher.waiting))
        self.metrics.completions.set_function(lambda: self.open)

    def check_model(self, name: str) -> None:
        """Raise ApiError if another model is requested."""
        if name not in ("", self.name):
            message = f"there is no model {name[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")


def curves(path: Path, checkpoint: Any) -> dict[str, list]:
    """The losses of the run up to a checkpoint (or None), for the page: {"train": [[step, loss], ...], "val": ...}.

    They are empty if the last evaluation of the checkpoint is not in `path`: then another run wrote the file.
    """
    records, state = [], checkpoint.state if checkpoint else {}
    if state.get("losses") and path.is_file():
        with suppress(OSError):
            records = [r for r in read_metrics(path) if r["step"] <= checkpoint.step]
    last = state.get("evaluated"), (state.get("losses") or {}).get("val")
    if last not in [(r["step"], r.get("val_loss")) for r in records]:
        records = []
    return {"train": curve(records, "loss"), "val": curve(records, "val_loss")}


def curve(records: Sequence[dict], name: str, most: int = 500) -> list[list]:
    """[[step, value], ...] of `name` in these records: at most `most` points, evenly spaced, with the last one."""
    found = [[r["step"], round(r[name], 4)] for r in records if isinstance(r.get(name), float) and isfinite(r[name])]
    return found[::-1][:: -(-len(found) // most) or 1][::-1]


# -- access, and what every response carries


class Guard:
    """ASGI middleware around everything: refuses ambiguous lengths, adds the security headers, counts requests."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server
        self.headers = [(name.encode(), value.encode()) for name, value in security_headers().items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = GONE
        # If the length is given twice, a proxy may use one and we the other: the end of this request, as the proxy
        # sees it, would be the next request for us (RFC 9112, section 6.3).
        lengths = {value for name, value in scope["headers"] if name in (b"content-length", b"transfer-encoding")}

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        try:
            if len(lengths) > 1:
                response = error_response(ApiError(400, "expected a single Content-Length or Transfer-Encoding"))
                response.headers["connection"] = "close"
                await response(scope, receive, counted_send)
            else:
                await self.app(scope, receive, counted_send)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.server.metrics.requests.labels(path, status).inc()


class Access:
    """ASGI middleware that checks the host and the key, also for paths that do not exist."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.check(scope["path"], dict(scope["headers"]))
        except ApiError as e:
            await error_response(e)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError if the request is not allowed."""
        key = self.server.key
        if key is None and self.server.cfg.host in LOOPBACK:
            # A page elsewhere may let its own name point to this machine, and could then read our responses.
            host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
            if host not in LOOPBACK:
                why = "without an API key, this server responds to the names localhost and 127.0.0.1 only"
                raise ApiError(403, f"{why}; with one ({KEY} or --api_key_file), to every name")
        if key is not None and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                why = "wrong API key" if given else "this server requires an API key, as Authorization: Bearer KEY"
                raise ApiError(401, why, code="invalid_api_key")


def security_headers() -> dict[str, str]:
    """With these, a browser runs the page's own script and no other, and shows the page in no other page."""
    digests: dict[str, list] = {"script": [], "style": []}
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


# -- routes


def make_app(server: Server) -> ASGIApp:
    """The whole server as an ASGI application."""
    app = FastAPI(openapi_url=None)  # this also disables its documentation pages, whose scripts lie elsewhere
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

    @get("/metrics")
    async def metrics():
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

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

    async def room():
        """One of the max_requests, held until the response has been sent."""
        if server.open >= server.cfg.max_requests:
            raise ApiError(429, f"{server.open} requests are being processed already; try again soon")
        server.open += 1
        try:
            yield
        finally:
            server.open -= 1

    @app.post("/v1/completions", dependencies=[Depends(room)])
    async def completions(request: Request):
        began = time.monotonic()
        try:
            body = await asyncio.wait_for(read_body(request, server.cfg.max_body), BODY_TIME)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request took longer than {BODY_TIME} s to arrive") from None
        return CompletionResponse(server, read_request(body, server.cfg), began)

    async def refuse(request: Request, error: Exception) -> Response:
        """Any error in OpenAI's shape."""
        if isinstance(error, HTTPException):
            there = "; this server has POST /v1/completions, GET /v1/models, /health and /metrics"
            message = f"{request.method} {request.url.path}: {error.detail}"
            error = ApiError(error.status_code, message + there * (error.status_code == 404))
        elif not isinstance(error, ApiError):
            error = ApiError(500, "the server failed; see its output")
        return error_response(error)

    async def ignore(request: Request, error: Exception) -> None:
        """The client disconnected: nobody is left to respond to."""

    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(ClientDisconnect, ignore)
    app.add_middleware(Access, server=server)
    if origin := server.cfg.allow_origin:
        allowed = dict(allow_origins=[origin], allow_methods=["GET", "POST"], allow_headers=["*"])
        app.add_middleware(CORSMiddleware, **allowed)
    return Guard(app, server)


def error_response(error: ApiError) -> Response:
    """The response that reports an error."""
    return JSONResponse(error.body(), error.status, HINTS.get(error.status))


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises ApiError if its type is not JSON or it has more than `limit` bytes."""
    headers = request.headers
    kind = headers.get("content-type", "").lower()
    # A page elsewhere cannot send application/json, only what `curl -d` sends, and browsers say that it is a page.
    from_page = "origin" in headers or "sec-fetch-site" in headers
    by_hand = not from_page and (not kind or kind == "application/x-www-form-urlencoded")
    if not kind.startswith("application/json") and not by_hand:
        raise ApiError(415, "expected the header Content-Type: application/json")
    too_large = ApiError(413, f"the request has more than {limit} bytes")
    if int(headers.get("content-length", 0)) > limit:
        raise too_large
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return body


class CompletionResponse(Response):
    """The response to a completion request, generated while it is sent. Raises ApiError if the request is impossible."""

    def __init__(self, server: Server, asked: CompletionRequest, began: float) -> None:
        super().__init__()
        self.server, self.asked, self.began = server, asked, began
        self.deadline = began + server.cfg.max_seconds
        server.check_model(asked.model)
        self.outbox = batching.Outbox()
        self.jobs = [self.make_job(number, prompt) for number, prompt in enumerate(asked.prompt)]
        self.completion = Completion(asked, server.name, sum(len(job.ids) for job in self.jobs))
        self.choices: list[Choice] = []
        for job in self.jobs:
            prompt = server.tok.decode(job.ids) if asked.echo else ""
            self.choices += [Choice(index, prompt, asked.logprobs is not None, server.tok) for index in job.indices]

    def make_job(self, number: int, prompt: str | list[int]) -> batching.Job:
        """The Job of one prompt. Raises ApiError if the model's vocabulary lacks some of it."""
        asked, tok, most = self.asked, self.server.tok, self.server.cfg.max_prompt
        try:
            if isinstance(prompt, str):
                ids = tok.encode(trained.known(prompt, tok)[0])
            else:
                ids = [check_id(id, tok.vocab_size) for id in prompt]
            if not 0 < len(ids) <= most:
                raise ValueError(f"has {len(ids)} tokens; expected 1 to {most}")
        except ValueError as e:
            raise ApiError(400, f"prompt: {e}", "prompt") from None
        seed = int.from_bytes(os.urandom(7), "little") if asked.seed is None else asked.seed
        ends = frozenset(() if tok.eot is None else [tok.eot])
        indices = range(number * asked.n, (number + 1) * asked.n)
        sampling = (asked.max_tokens, asked.temperature, asked.top_k, asked.top_p, asked.min_p, seed + indices[0])
        return batching.Job(ids, Options(*sampling, ends, asked.logprobs), asked.stop, indices, self.outbox)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send it, unless the client disconnects or stops reading."""
        try:
            self.server.batcher.submit(self.jobs)
        except batching.Stopping:
            raise ApiError(503, STOPPING) from None
        sending = asyncio.create_task(self.stream(send) if self.asked.stream else self.whole(scope, receive, send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            time_left = self.deadline + STALL_TIME - time.monotonic()
            await asyncio.wait({sending, leaving}, timeout=time_left, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # or its exception
                self.server.metrics.completion.observe(time.monotonic() - self.began)
        finally:
            self.server.batcher.cancel(self.jobs)
            for task in (sending, leaving):
                task.cancel()

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it when all texts have ended."""
        parts: dict[int, list] = {choice.index: [] for choice in self.choices}
        async for added in self.parts():
            for index in added:
                parts[index] += added[index]
        choices = [choice.body(parts[choice.index]) for choice in self.choices]
        await JSONResponse(self.completion.body(choices, self.tokens))(scope, receive, send)

    async def stream(self, send: Send) -> None:
        """Send it as server-sent events. An error before the first token has a status of its own."""
        parts = self.parts()
        first = await anext(parts)
        events = StreamingResponse(self.events(first, parts), media_type="text/event-stream")
        await events.stream_response(send)

    async def events(self, added: dict, parts: AsyncIterator[dict]) -> AsyncIterator[bytes]:
        """The events of a stream, which begins with `added`; those that are sent together are one item."""
        last: list[dict] = []
        try:
            while added:
                choices = [self.choices[index].body(new) for index, new in added.items()]
                yield encode_events(self.completion.body([c]) for c in choices if c["text"] or c["finish_reason"])
                await asyncio.sleep(PAUSE)
                added = await anext(parts, {})
            if self.asked.stream_options.include_usage:
                last = [self.completion.body([], self.tokens)]
        except ApiError as e:
            last = [e.body()]
        yield encode_events(last) + b"data: [DONE]\n\n"

    async def parts(self) -> AsyncIterator[dict[int, list[batching.Part]]]:
        """Yield {index of a choice: its new Parts} until all texts have ended. Raises ApiError."""
        unfinished, first = len(self.choices), True
        while unfinished:
            added: dict[int, list] = {}
            for part in await self.take():
                added.setdefault(part.index, []).append(part)
                unfinished -= part.finish is not None
            if first:
                self.server.metrics.first_token.observe(time.monotonic() - self.began)
                first = False
            yield added

    async def take(self) -> list[batching.Part]:
        """The next Parts, as Outbox.take returns them; its exceptions become ApiErrors."""
        try:
            return await self.outbox.take(self.deadline)
        except TimeoutError:
            raise ApiError(408, f"the request took longer than {self.server.cfg.max_seconds:g} s") from None
        except batching.Stopping:
            raise ApiError(503, STOPPING) from None
        except batching.Failed:
            raise ApiError(500, "the model could not be run; see the server's output") from None

    @property
    def tokens(self) -> int:
        """The number of tokens generated so far."""
        return sum(choice.tokens for choice in self.choices)


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def encode_events(values: Any) -> bytes:
    """Server-sent events."""
    return b"".join(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n" for value in values)
