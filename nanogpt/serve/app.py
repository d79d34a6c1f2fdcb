"""OpenAI's completions API over HTTP, and a web page: the model, the routes, how text is sent.

completions.py defines what a request may contain, access.py who may send one, batching.py generates the texts of all
requests together, and connections.py accepts connections.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterable
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
from starlette.types import ASGIApp, Receive, Scope, Send

from nanogpt import quantize
from nanogpt.config import ServeConfig
from nanogpt.generate import Engine, Options
from nanogpt.run import distributed, memory, trained
from nanogpt.run.checkpoint import Checkpoint
from nanogpt.run.records import read_metrics
from nanogpt.serve import access, batching
from nanogpt.serve.completions import ApiError, Choice, Completion, CompletionRequest, read_request
from nanogpt.serve.metrics import Metrics
from nanogpt.text.tokenizer import check_id

CHUNK = 128  # prompt tokens read in one step, at most: the other texts wait that long for their next token

# Seconds.
PAUSE = 0.015  # between two events of a stream: tokens generated meanwhile are sent together, which costs far less
BODY_TIME = 10  # for a request's body to arrive
STALL_TIME = 10  # for a client to read the end of its response


class Server:
    """The model, the batcher, and what all requests share."""

    def __init__(
        self, cfg: ServeConfig, key: str | None, found: trained.Trained, dist: distributed.Dist, cores: int
    ) -> None:
        self.cfg, self.key, self.dist, self.tok = cfg, key, dist, found.tokenizer
        folder = Path(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from)
        self.name = folder.resolve().name  # of a published model, too
        self.losses = curves(folder / "metrics.jsonl", found.checkpoint)
        of_openai = dict(id=self.name, object="model", created=int(time.time()), owned_by="nanogpt")
        memory.crop_to_fit(found.model, cfg.max_batch, "--max_batch", dist)
        self.context = found.model.config.block_size
        size = dict(context=self.context, parameters=found.model.num_params())
        limits = dict(max_tokens=cfg.max_tokens, max_n=cfg.max_n, max_prompt=cfg.max_prompt)
        self.model_body = of_openai | size | limits | dict(vocab_size=self.tok.vocab_size)
        model = quantize.made_ready(found.model, cfg, dist, [1, cfg.max_batch])
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


def curves(path: Path, found: Checkpoint | None) -> dict[str, list]:
    """The losses of the run up to a checkpoint, for the page: {"train": [[step, loss], ...], "val": ...}.

    They are empty if the last evaluation of the checkpoint is not in `path`: then another run wrote the file.
    """
    records: list[dict] = []
    if found and found.state.get("losses"):
        with suppress(OSError):
            records = [r for r in read_metrics(path) if r["step"] <= found.step]
        last = found.state.get("evaluated"), found.state["losses"].get("val")
        if last not in [(r["step"], r.get("val_loss")) for r in records]:
            records = []
    return {"train": curve(records, "loss"), "val": curve(records, "val_loss")}


def curve(records: list[dict], name: str, most: int = 500) -> list[list]:
    """[[step, value], ...] of `name` in these records: at most `most` points, evenly spaced, with the last one."""
    found = [[r["step"], round(r[name], 4)] for r in records if isinstance(r.get(name), float) and isfinite(r[name])]
    return found[::-1][:: -(-len(found) // most) or 1][::-1]


# -- routes


def make_app(server: Server) -> ASGIApp:
    """The whole server as an ASGI application."""
    app = FastAPI(openapi_url=None)  # this also disables its documentation pages, whose scripts are on other servers
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    add_routes(app, server, page)

    async def refuse(request: Request, error: Exception) -> Response:
        """Any error in OpenAI's format."""
        if isinstance(error, HTTPException):
            there = "; this server has POST /v1/completions, GET /v1/models, /health and /metrics"
            message = f"{request.method} {request.url.path}: {error.detail}"
            error = ApiError(error.status_code, message + there * (error.status_code == 404))
        elif not isinstance(error, ApiError):
            error = ApiError(500, "the server failed; see its output")
        return error.response()

    async def ignore(request: Request, error: Exception) -> None:
        """The client disconnected, so nobody would read a response."""

    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(ClientDisconnect, ignore)  # type: ignore[arg-type]  # no response is sent
    app.add_middleware(access.with_access_control, key=server.key, listens_on=server.cfg.host)
    if origin := server.cfg.allow_origin:
        app.add_middleware(CORSMiddleware, allow_origins=[origin], allow_methods=["GET", "POST"], allow_headers=["*"])
    return access.with_headers_and_counts(app, access.security_headers(page), server.metrics)


def add_routes(app: FastAPI, server: Server, page: str) -> None:
    """Add all routes to `app`."""
    get = partial(app.api_route, methods=["GET", "HEAD"])

    @get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page

    @get("/health")
    async def health() -> dict:
        if not server.batcher.thread.is_alive():
            raise ApiError(503, "the model can no longer be run")
        return {"status": "ok"}

    @get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @get("/losses")
    async def losses() -> dict:
        return server.losses

    @get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [server.model_body]}

    @get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        server.check_model(name)
        return server.model_body

    async def room() -> AsyncIterator[None]:
        """One of the max_requests, held until the response has been sent."""
        if server.open >= server.cfg.max_requests:
            raise ApiError(429, f"{server.open} requests are being processed already; try again soon")
        server.open += 1
        try:
            yield
        finally:
            server.open -= 1

    @app.post("/v1/completions", dependencies=[Depends(room)])
    async def completions(request: Request) -> Response:
        began = time.monotonic()
        try:
            body = await asyncio.wait_for(read_body(request, server.cfg.max_body), BODY_TIME)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request took longer than {BODY_TIME} s to arrive") from None
        return CompletionResponse(server, read_request(body, server.cfg), began)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises ApiError if its type is not JSON or it has more than `limit` bytes."""
    headers = request.headers
    kind = headers.get("content-type", "").lower()
    # A page of another server can send the types that `curl -d` sends, but browsers add headers that reveal it.
    from_page = "origin" in headers or "sec-fetch-site" in headers
    by_hand = not from_page and kind in ("", "application/x-www-form-urlencoded")
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


# -- the response to a completion request


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
            prompt, logprobs = server.tok.decode(job.ids) if asked.echo else "", asked.logprobs is not None
            self.choices += [Choice(i, prompt, logprobs, server.tok, asked.max_tokens == 0) for i in job.indices]

    def make_job(self, number: int, prompt: str | list[int]) -> batching.Job:
        """The Job of one prompt. Raises ApiError if the model cannot continue it with these options."""
        asked, field = self.asked, "prompt"
        try:
            ids = self.encode(prompt)
            field = "logit_bias"
            bias = tuple((check_id(id, self.server.tok.vocab_size), bias) for id, bias in asked.logit_bias.items())
        except ValueError as e:
            raise ApiError(400, f"{field}: {e}", field) from None
        indices = range(number * asked.texts, (number + 1) * asked.texts)
        return batching.Job(ids, self.options(indices[0], bias), asked.stop, indices, self.outbox)

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a prompt. Raises ValueError if there are too many, or some that the model lacks."""
        asked, tok, most = self.asked, self.server.tok, self.server.cfg.max_prompt
        if not prompt and tok.eot is None:
            raise ValueError("is empty; a text has to begin with at least one token, such as a newline")
        if not prompt:
            return [tok.eot]  # from the beginning of a document
        if isinstance(prompt, str):
            ids = tok.encode(trained.known(prompt, tok)[0])
        else:
            ids = [check_id(id, tok.vocab_size) for id in prompt]
        if not 0 < len(ids) <= most:
            raise ValueError(f"has {len(ids)} tokens; expected 1 to {most}")
        if asked.reports_prompt and len(ids) > self.server.context:
            limit = f"the limit is the {self.server.context} of the model's context"
            raise ValueError(f"has {len(ids)} tokens; with echo and logprobs, {limit}")
        return ids

    def options(self, first: int, logit_bias: tuple[tuple[int, float], ...]) -> Options:
        """How the texts of a prompt are generated, of which number `first` of the request is the first one."""
        asked, eot = self.asked, self.server.tok.eot
        seed = int.from_bytes(os.urandom(7), "little") if asked.seed is None else asked.seed
        limits, penalties = ("top_k", "top_p", "min_p"), ("repetition_penalty", "frequency_penalty", "presence_penalty")
        logprobs = 0 if asked.logprobs is None and asked.texts > asked.n else asked.logprobs
        return Options(
            max(asked.max_tokens, 1),  # of a single one, nothing is shown if none was asked for
            asked.temperature,
            **{name: getattr(asked, name) for name in (*limits, *penalties)},
            seed=seed + first,
            stop=frozenset(() if eot is None else [eot]),
            logprobs=logprobs,
            prompt_logprobs=asked.reports_prompt,
            logit_bias=logit_bias,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send it, unless the client disconnects or stops reading."""
        sending = asyncio.create_task(self.respond(scope, receive, send))
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

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send server-sent events while the texts grow, or one JSON object when all of them have ended."""
        progress = self.progress()
        if self.asked.stream:
            first = await anext(progress)  # an error before the first token gets a status of its own
            events = StreamingResponse(self.events(first, progress), media_type="text/event-stream")
            await events.stream_response(send)
        else:
            async for _ in progress:
                pass
            body = self.completion.body([choice.body() for choice in self.best_choices()], self.tokens)
            await JSONResponse(body)(scope, receive, send)

    def best_choices(self) -> list[Choice]:
        """The n texts of each prompt, of `best_of`, that have the highest log-probability per token, best first."""
        asked = self.asked
        if asked.texts == asked.n:
            return self.choices
        each = [self.choices[i : i + asked.texts] for i in range(0, len(self.choices), asked.texts)]
        best = [sorted(choices, key=lambda choice: -choice.mean_logprob)[: asked.n] for choices in each]
        found = [choice for choices in best for choice in choices]
        for index, choice in enumerate(found):
            choice.index = index
        return found

    async def events(self, grown: list[Choice], progress: AsyncIterator[list[Choice]]) -> AsyncIterator[bytes]:
        """Yield the events of a stream; those that are sent together are one item."""
        last: list[dict] = []
        try:
            while grown:
                choices = [choice.body() for choice in grown]
                yield encode_events(self.completion.body([c]) for c in choices if c["text"] or c["finish_reason"])
                await asyncio.sleep(PAUSE)
                grown = await anext(progress, [])
            if self.asked.stream_options.include_usage:
                last = [self.completion.body([], self.tokens)]
        except ApiError as e:
            last = [e.body()]
        yield encode_events(last) + b"data: [DONE]\n\n"

    async def progress(self) -> AsyncIterator[list[Choice]]:
        """Have the texts generated. Yield the choices that have grown, until all have ended. Raises ApiError."""
        unfinished, first = len(self.choices), True
        try:
            self.server.batcher.submit(self.jobs)
            while unfinished:
                parts = await self.outbox.take(self.deadline)
                if first:
                    self.server.metrics.first_token.observe(time.monotonic() - self.began)
                    first = False
                for part in parts:
                    self.choices[part.index].add(part)
                    unfinished -= part.finish is not None
                yield [self.choices[index] for index in dict.fromkeys(part.index for part in parts)]
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request took longer than {self.server.cfg.max_seconds:g} s") from None
        except batching.Stopping:
            raise ApiError(503, "the server is stopping") from None
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


def encode_events(values: Iterable[Any]) -> bytes:
    """Server-sent events."""
    return b"".join(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n" for value in values)
