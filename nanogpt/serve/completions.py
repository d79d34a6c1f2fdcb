"""OpenAI's completions API: what a request may contain, and the format of the response.

This module uses neither the server nor the model. Names and formats are those of OpenAI's API reference (Completions) and
of the types of its Python client. `top_k`, `min_p` and `repetition_penalty` are extensions.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse, Response

from nanogpt.config import ServeConfig, nearest
from nanogpt.generate import Token
from nanogpt.serve.batching import Part
from nanogpt.text.tokenizer import Stream, Tokenizer

MAX_LOGPROBS = 20  # alternatives reported for each token
MIN_LOGPROB = -9999.0  # reported instead of minus infinity, which JSON does not have
MAX_STOPS, MAX_STOP_LENGTH = 4, 256
MAX_BIASES = 1024  # tokens in logit_bias
MAX_TEXTS = 20  # in the response to one request, unless max_n is larger
ERROR_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
ERROR_HEADERS = {  # which clients obey
    401: {"www-authenticate": "Bearer"},
    408: {"x-should-retry": "false"},
    429: {"retry-after": "1"},
    503: {"retry-after": "5"},
}


class ApiError(Exception):
    """What a client gets instead of a completion: an HTTP status and a message of one line."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        """The error in OpenAI's format."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The response that reports the error."""
        return JSONResponse(self.body(), self.status, ERROR_HEADERS.get(self.status))


# -- the request


def whole_number(value: Any) -> Any:
    """16 for 16.0, because some clients write every number as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def at_most(setting: str) -> AfterValidator:
    """The upper bound of a number, from this setting of the server."""

    def check(value: int, info: ValidationInfo) -> int:
        limit = getattr(info.context, setting)
        if value > limit:
            raise ValueError(f"should be less than or equal to {limit}, not {value}")
        return value

    return AfterValidator(check)


def only(*accepted: Any) -> AfterValidator:
    """A field that is not supported, except with these values: they change nothing, and some clients send them unasked."""

    def check(value: Any) -> Any:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in accepted):
            raise ValueError(f"is not supported, except with {' or '.join(map(shorten, accepted))}")
        return value

    return AfterValidator(check)


def token_id(key: str) -> Any:
    """5 for "5", because names of JSON objects are strings."""
    return int(key) if key.isdecimal() and len(key) < 20 else key


Int = Annotated[int, BeforeValidator(whole_number)]
TokenId = Annotated[int, BeforeValidator(token_id)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """What is sent besides the events of a stream."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of a request to /v1/completions. A field that is absent or null has its default."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ""  # the one that is loaded
    max_tokens: Annotated[
        Int, Field(ge=0, validation_alias=AliasChoices("max_tokens", "max_completion_tokens")), at_most("max_tokens")
    ] = 16  # 0: only the prompt, with echo
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Int, Field(ge=0, lt=2**31)] = 0  # 0: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[Int, Field(ge=1), at_most("max_n")] = 1
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None  # choice number i draws from seed + i
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] = {}
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    best_of: Annotated[Int, at_most("max_n")] | None = None  # generates as many, returns the n most probable per token
    prompt: Annotated[list[str | list[int]], Field(validate_default=True)] = [""]  # also a single text or list of ids
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)
    ] = []  # also a single text

    suffix: Annotated[Any, only("")] = None
    ignore_eos: Annotated[Any, only(False)] = None
    stop_token_ids: Annotated[Any, only([])] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    add_special_tokens: Annotated[Any, only(True, False)] = None  # no prompt gets any
    cache_prompt: Annotated[Any, only(True, False)] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    tools: Annotated[Any, only([])] = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    metadata: dict = {}
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def clean(cls, given: Any) -> Any:
        """Drop what is null, and the second name of the length."""
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        if "max_tokens" in given and given.pop("max_completion_tokens", given["max_tokens"]) != given["max_tokens"]:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return given

    @property
    def texts(self) -> int:
        """The number of texts to generate for each prompt."""
        return self.best_of or self.n

    @property
    def reports_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are asked for."""
        return self.echo and self.logprobs is not None

    @field_validator("best_of", "stream_options")
    @classmethod
    def check_combination(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise ValueError if another field does not allow this one."""
        n = info.data.get("n", 1)
        if info.field_name == "best_of" and value is not None:
            if value < n:
                raise ValueError(f"should be at least n, which is {n}, not {value}")
            if value > n and info.data.get("stream"):
                raise ValueError("must not exceed n with stream: the best text is known only at the end")
        if info.field_name == "stream_options" and not info.data.get("stream"):
            raise ValueError("is allowed only with stream")
        return value

    @field_validator("prompt", mode="wrap")
    @classmethod
    def check_prompt(cls, prompt: Any, validate: Callable, info: ValidationInfo) -> list[str | list[int]]:
        """The prompts as a list. Raises ValueError if there are too many texts, or one is too long."""
        one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(p) is int for p in prompt))
        try:
            prompts = validate([prompt] if one else prompt)
        except ValidationError:
            raise ValueError(f"should be text, a list of token ids, or a list of such, not {shorten(prompt)}") from None
        cfg, n = cast(ServeConfig, info.context), info.data.get("n", 1)
        name, n = max(("n", n), ("best_of", info.data.get("best_of") or 0), key=lambda pair: pair[1])
        most = max(MAX_TEXTS, cfg.max_n)
        if not 0 < len(prompts) * n <= most:
            raise ValueError(f"expected 1 to {most} texts in a request, not {len(prompts)} prompts x {name} {n}")
        for p in prompts:
            if len(p) > cfg.max_prompt:
                unit = "characters" if isinstance(p, str) else "tokens"
                raise ValueError(f"has {len(p)} {unit}; the limit is {cfg.max_prompt}")
        return prompts

    @field_validator("stop", mode="before")
    @classmethod
    def list_stops(cls, stop: Any) -> Any:
        """A list also of a single text."""
        return [stop] if isinstance(stop, str) else stop


def read_request(body: bytes, cfg: ServeConfig) -> CompletionRequest:
    """The request in these bytes, within the limits of `cfg`. Raises an ApiError that names every problem."""
    try:
        # Some editors write a byte order mark.
        return CompletionRequest.model_validate_json(body.removeprefix(b"\xef\xbb\xbf"), context=cfg)
    except ValidationError as e:
        problems: dict[str, str] = {}  # the first of each field
        for error in e.errors(include_url=False):
            name = str(error["loc"][0])[:60] if error["loc"] else ""
            problems.setdefault(name, describe(name, error))
        raise ApiError(400, "; ".join(problems.values()), param=next(iter(problems)) or None) from None


def describe(name: str, error: ErrorDetails) -> str:
    """One of pydantic's errors as one line."""
    kind, message = error["type"], error["msg"]
    if kind == "json_invalid":
        return f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}"
    if kind == "value_error":
        return f"{name}: {error['ctx']['error']}".removeprefix(": ")
    if not name:
        return f"the body should be a JSON object, not {shorten(error['input'])}"
    if kind == "extra_forbidden":
        return f"{shorten(name)}: there is no such field{nearest(name, CompletionRequest.model_fields)}"
    if message.startswith("Input "):
        return f"{name}: {message.removeprefix('Input ')}, not {shorten(error['input'])}"
    return f"{name}: {message[0].lower()}{message[1:]}"


def shorten(value: Any) -> str:
    """A value from the client, shortened for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


# -- the response


@dataclass
class Completion:
    """What all events of a response have in common."""

    request: CompletionRequest
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: "cmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict], completion_tokens: int | None = None) -> dict:
        """A completion or an event of one, with the usage if the number of tokens is given."""
        body = dict(id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices)
        if completion_tokens is not None:
            usage = dict(prompt_tokens=self.prompt_tokens, completion_tokens=completion_tokens)
            body["usage"] = usage | dict(total_tokens=sum(usage.values()))
        elif self.request.stream_options.include_usage:
            body["usage"] = None
        return body


class Choice:
    """One text of a response, as it grows from the Parts that the batcher makes. prompt_only: whether to drop it all."""

    def __init__(self, index: int, prompt: str, logprobs: bool, tok: Tokenizer, prompt_only: bool = False) -> None:
        self.index, self.logprobs, self.tok, self.prompt_only = index, logprobs, tok, prompt_only
        self.unsent = [prompt]  # the text to echo, if any
        self.echoed = self.shown = len(prompt)  # characters
        self.tokens = 0
        self.unreported: list[tuple[int, Token]] = []  # with offsets: tokens whose text is not shown yet
        self.finish_reason: str | None = None
        self.whole = False  # whether all of it is shown: it has ended, and not by a stop string
        self.with_prompt = False  # whether the tokens of the prompt are reported
        self.mean_logprob = 0.0

    def add(self, part: Part) -> None:
        """Add what a step of the model has made."""
        if part.prompt:
            self._add_prompt(part.prompt)
        if self.prompt_only:
            self.finish_reason, self.whole = "length", True
            return
        self.unsent.append(part.text)
        self.shown += len(part.text)
        self.finish_reason, self.mean_logprob = part.finish, part.mean_logprob
        self.whole = part.finish == "length" or part.end is not None
        self.tokens += part.token is not None
        # Programs that score a prompt leave out the last token reported, whether or not it ends the text.
        token = part.token or (part.end if self.with_prompt else None)
        if token and self.logprobs:
            self.unreported.append((self.echoed + part.start, token))

    def _add_prompt(self, tokens: Sequence[Token]) -> None:
        """Report the tokens of the prompt, with the offsets of their text."""
        self.with_prompt, stream, offset = True, Stream(self.tok), 0
        for token in tokens:
            self.unreported.append((offset, token))
            offset += len(stream.push(token.id))

    def body(self) -> dict:
        """What was added since the last call, in OpenAI's format."""
        text, self.unsent = "".join(self.unsent), []
        logprobs = self._logprobs() if self.logprobs else None
        return dict(text=text, index=self.index, logprobs=logprobs, finish_reason=self.finish_reason)

    def _logprobs(self) -> dict:
        """The log-probabilities of the tokens whose text has been shown; those of a stop string never are."""
        ready = [(offset, token) for offset, token in self.unreported if self.whole or offset < self.shown]
        del self.unreported[: len(ready)]
        names = [self._name(token.id) for _, token in ready]
        logprobs = [round_logprob(token.logprob) for _, token in ready]
        likeliest = [{self._name(id): round_logprob(other) for id, other in token.likeliest} for _, token in ready]
        return dict(
            tokens=names,
            token_logprobs=logprobs,
            top_logprobs=[
                None if lp is None else d | {name: lp} for d, name, lp in zip(likeliest, names, logprobs, strict=True)
            ],
            text_offset=[offset for offset, _ in ready],
        )

    def _name(self, id: int) -> str:
        """A token as text; if it is not a whole number of characters, in OpenAI's notation, bytes:\\xe2\\x82."""
        raw = self.tok.token_bytes(id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def round_logprob(logprob: float | None) -> float | None:
    """A finite log-probability with few digits; None for the first token of a prompt, which nothing predicts."""
    return None if logprob is None else round(max(MIN_LOGPROB, logprob), 5)
