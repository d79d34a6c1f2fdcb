"""OpenAI's completions interface: what a request may say, and the shape of what is answered.

Knows no server and no model; names and shapes are those of OpenAI's API reference (Completions) and of its Python
client's types. `top_k` and `min_p` are ours.
"""

import json
import secrets
import time
from dataclasses import dataclass, field, fields

from nanogpt.config import nearest, setting
from nanogpt.run.settings import convert

MAX_LOGPROBS = 20  # alternatives reported for each token
LEAST_LOGPROB = -9999.0  # reported for minus infinity, which JSON does not have
MAX_STOPS, MAX_STOP_LENGTH = 4, 256
MAX_TEXTS = 20  # of a request's prompts together, unless max_n is more
TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client gets instead of an answer: an HTTP status and one line."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self):
        """In OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# -- what is asked


@dataclass
class Ask:
    """A request to /v1/completions, checked. A field that is absent or null has its default."""

    model: str = setting("", "the one that is loaded")
    max_tokens: int = setting(16, "length of each text", low=1)
    temperature: float = setting(1.0, "0 takes the likeliest token", low=0.0, high=2.0)
    top_p: float = setting(1.0, "choose among the likeliest that together have this probability", low=0.0, high=1.0)
    top_k: int = setting(0, "choose among the so many likeliest; 0 among all", low=0, high=2**31 - 1)
    min_p: float = setting(0.0, "choose among those at least so likely, relative to the likeliest", low=0.0, high=1.0)
    n: int = setting(1, "texts for each prompt", low=1)
    seed: int = setting(None, "choice number i draws from seed + i", int, low=-(2**63), high=2**63 - 1)
    logprobs: int = setting(None, "so many alternatives to each token", int, low=0, high=MAX_LOGPROBS)
    echo: bool = setting(False, "the prompt before the text")
    stream: bool = setting(False, "the text as it is made")
    best_of: int = setting(None, "only for the sake of clients that send it", int, low=1)
    # of shapes of their own
    prompts: list = field(default_factory=list)  # each a str, or a list of token ids
    stop: list = field(default_factory=list)
    include_usage: bool = False  # in a stream


SCALARS = {f.name: f.metadata for f in fields(Ask) if f.metadata}
OTHERS = ("prompt", "stop", "stream_options", "max_completion_tokens")
NEUTRAL = {  # what clients of OpenAI and of other servers send, and with which values it changes nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True, False),  # no prompt gets any
    "cache_prompt": (True, False),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "metadata": dict,  # any
    "user": str,
}


def read_ask(body, cfg):
    """The Ask in a request's body (bytes), within the limits of `cfg`. Raises ApiError that names every problem."""
    given = {name: value for name, value in read_json(body).items() if value is not None}
    problems, values = [], {}
    limits = {"max_tokens": cfg.max_tokens, "n": cfg.max_n}
    for name, value in given.items():
        ours = "max_tokens" if name == "max_completion_tokens" else name
        if ours in SCALARS:
            meta = SCALARS[ours] | ({"high": limits[ours]} if ours in limits else {})
            try:
                converted = convert(value, meta)
                if values.setdefault(ours, converted) != converted:
                    problems.append((name, "max_tokens and max_completion_tokens differ"))
            except ValueError as e:
                problems.append((name, f"expected {e}, not {shown(value)}"))
        elif name in NEUTRAL:
            problems += [(name, why) for why in neutral_problem(value, NEUTRAL[name])]
        elif name not in OTHERS:
            known = [*SCALARS, *OTHERS, *NEUTRAL]
            problems.append((shown(name), f"there is no such field{nearest(name[:80], known)}"))
    ask = Ask(**values)
    problems += other_problems(ask)
    for name, read in (("prompt", read_prompts), ("stop", read_stops), ("stream_options", read_stream_options)):
        try:
            read(ask, given.get(name), cfg)
        except ValueError as e:
            problems.append((name, str(e)))
    if problems:
        raise ApiError(400, "; ".join(f"{name}: {why}" for name, why in problems), param=problems[0][0])
    return ask


def read_json(body):
    """The JSON object in these bytes. Raises ApiError where there is none."""
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=refuse)  # some editors write a byte order mark
    except (ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else str(e)[:200]
        raise ApiError(400, f"the body is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(value)}")
    return value


def refuse(constant):
    """NaN and infinities, which JSON does not have and Python reads all the same."""
    raise ValueError(f"{constant} is no number")


def neutral_problem(value, neutral):
    """Why a value is not among those that change nothing (or not of that type): one line, or none."""
    if isinstance(neutral, type):
        if not isinstance(value, neutral):
            yield f"expected {'an object' if neutral is dict else 'text'}, not {shown(value)}"
    elif not any(value == v and (isinstance(value, bool) == isinstance(v, bool)) for v in neutral):
        yield f"is not supported, except with {' or '.join(map(shown, neutral))}"


def other_problems(ask):
    """(field, what is wrong) for what convert cannot see: what this server does not do."""
    if ask.best_of not in (None, 1, ask.n):
        yield "best_of", "is not supported, but for the value of n"
    if ask.echo and ask.logprobs is not None:
        yield "echo", "is not supported together with logprobs"


def read_prompts(ask, prompt, cfg):
    """Put the prompts into `ask`: from a text, a list of token ids, or a list of either. Raises ValueError."""
    if prompt is None:
        raise ValueError("is missing")
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(p) is int for p in prompt))
    ask.prompts = [prompt] if one else prompt
    if not isinstance(ask.prompts, list):
        raise ValueError(f"expected text, a list of token ids, or a list of such, not {shown(prompt)}")
    most = max(MAX_TEXTS, cfg.max_n)
    if not 0 < len(ask.prompts) * ask.n <= most:
        raise ValueError(f"expected 1 to {most} texts in a request, not {len(ask.prompts)} prompts x n {ask.n}")
    for p in ask.prompts:
        if isinstance(p, str):
            check_unicode(p)
        elif not (isinstance(p, list) and all(type(i) is int for i in p)):
            raise ValueError(f"expected text, a list of token ids, or a list of such, not {shown(prompt)}")
        if not p:
            raise ValueError("is empty; a text has to begin with something, if only a new line")
        if len(p) > cfg.max_prompt:
            unit = "characters" if isinstance(p, str) else "tokens"
            raise ValueError(f"has {len(p)} {unit}; at most {cfg.max_prompt} are taken")


def read_stops(ask, stop, cfg):
    """Put the stop strings into `ask`. Raises ValueError."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops) or len(stops) > MAX_STOPS:
        raise ValueError(f"expected a text or up to {MAX_STOPS} of them, not {shown(stop)}")
    for s in stops:
        check_unicode(s)
        if not 0 < len(s) <= MAX_STOP_LENGTH:
            raise ValueError(f"expected 1 to {MAX_STOP_LENGTH} characters, not {len(s)}")
    ask.stop = stops


def read_stream_options(ask, options, cfg):
    """Put what they say into `ask`. Raises ValueError."""
    if options is None:
        return
    if not ask.stream:
        raise ValueError("is allowed only with stream")
    include = options.get("include_usage", False) if isinstance(options, dict) else None
    if not isinstance(include, bool):
        raise ValueError('expected {"include_usage": true} or false')
    ask.include_usage = include


def check_unicode(text):
    """Raise ValueError where JSON's escapes have put half of a character into `text`."""
    for c in text:
        if "\ud800" <= c <= "\udfff":
            raise ValueError(f"U+{ord(c):04X} is half of a character")


def shown(value):
    """A value of the client's in a message, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


# -- what is answered


@dataclass
class Answer:
    """What all parts of an answer have in common."""

    ask: Ask
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: "cmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices, completion_tokens=None):
        """A completion, or a part of one; with the number of tokens, what was used."""
        body = dict(id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices)
        if completion_tokens is not None:
            total = self.prompt_tokens + completion_tokens
            body["usage"] = dict(
                prompt_tokens=self.prompt_tokens, completion_tokens=completion_tokens, total_tokens=total
            )
        elif self.ask.include_usage:
            body["usage"] = None
        return body


class Choice:
    """One text of an answer, as it grows from the `batching.Part`s that come."""

    def __init__(self, index, prompt, logprobs, tok):
        self.index, self.tok = index, tok
        self.unsent = prompt  # the text that is to be repeated, if it is
        self.echoed = len(prompt)
        self.shown = 0  # characters
        self.tokens = 0
        self.unreported = [] if logprobs else None  # tokens whose text is not shown yet, and where it begins
        self.finish_reason = None

    def body(self, parts):
        """The choice with these parts, in OpenAI's shape."""
        text, self.unsent = self.unsent + "".join(part.text for part in parts), ""
        self.shown += len(text)
        self.tokens += sum(part.token is not None for part in parts)
        self.finish_reason = parts[-1].finish
        report = None if self.unreported is None else self._report(parts)
        return dict(text=text, index=self.index, logprobs=report, finish_reason=self.finish_reason)

    def _report(self, parts):
        """The log-probabilities of the tokens whose text is shown by now; those of a stop string never are."""
        report = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self.unreported += [(self.echoed + part.start, part.token) for part in parts if part.token]
        while self.unreported and (self.unreported[0][0] < self.shown or self.finish_reason == "length"):
            offset, token = self.unreported.pop(0)
            chosen, logprob = self._name(token.id), reported(token.logprob)
            report["tokens"].append(chosen)
            report["token_logprobs"].append(logprob)
            alternatives = {self._name(id): reported(other) for id, other in token.likeliest}
            report["top_logprobs"].append(alternatives | {chosen: logprob})
            report["text_offset"].append(offset)
        return report

    def _name(self, id):
        """A token as text; one that is no whole number of characters as OpenAI writes it, bytes:\\xe2\\x82."""
        raw = self.tok.token_bytes(id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def reported(logprob):
    """A log-probability as JSON can have it, and no longer than it need be."""
    return round(max(LEAST_LOGPROB, logprob), 5)
