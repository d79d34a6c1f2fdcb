"""Generate text with a trained model, and print it while it is generated."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt import config, quantize
from nanogpt.config import SampleConfig, UserError
from nanogpt.generate import Engine, Options, Row, Token, bytes_per_token
from nanogpt.model import GPT
from nanogpt.run import compile, distributed, settings, trained
from nanogpt.run.distributed import Dist
from nanogpt.text.tokenizer import Stream, Tokenizer

CACHE = 2**31  # bytes for the keys and values of the texts that are generated together, at most
TOGETHER = 64  # texts that are generated together, at most; more would gain little


def main(argv: list[str]) -> None:
    """Run `sample.py` with these arguments."""
    cfg = settings.load(SampleConfig, argv, "sample.py")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # standard output has the text only
        sample(cfg, dist)


def read_start(start: str) -> str:
    r"""The prompt that `start` means: FILE:NAME is the text of a file, and \n as typed in a shell is a newline."""
    if not start.startswith("FILE:"):
        return config.unescaped(start)
    path = Path(start[5:])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"--start={start}: is not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"--start={start}: {e.strerror}") from None


def encode(text: str, tok: Tokenizer, context: int, dist: Dist) -> list[int]:
    """The ids of the prompt, or the last ones if it exceeds the context. Raises UserError if it cannot be encoded."""
    try:
        ids = tok.encode(text)
    except ValueError as e:
        raise UserError(f"--start: {e}") from None
    if not ids:
        raise UserError("--start is empty; a text has to begin with at least one token, such as \\n")
    if len(ids) > context:
        dist.say(f"--start has {len(ids)} tokens, the context {context}: the model sees the last {context} of them")
    return ids[-context:]


@dataclass
class Text:
    """A text, and what of it is not printed yet."""

    stream: Stream
    unprinted: str
    ended: bool = False

    def add(self, token: Token) -> None:
        """Add the next token."""
        self.unprinted += self.stream.push(token.id)
        self.ended = self.stream.stopped or token.finish is not None
        if self.ended:
            self.unprinted += self.stream.flush() + "\n---------------\n"


def sample(cfg: SampleConfig, dist: Dist) -> None:
    """Print `num_samples` texts. They are generated together; the first that has not ended is printed meanwhile."""
    distributed.choose_seed(cfg, dist)
    start, stop = read_start(cfg.start), cfg.stop_strings()
    found = trained.load(cfg, dist)
    model, tok = quantize.made_ready(found.model, cfg, dist, [min(cfg.num_samples, TOGETHER)]), found.tokenizer
    start, unknown = trained.known(start, tok)
    if unknown:
        dist.say(f"--start: {unknown}")
    ids = encode(start, tok, model.config.block_size, dist)
    if cfg.compile == "auto":
        cfg.compile = False
        dist.say("compile: False, because a few texts take less time than compiling the model (--compile)")
    engine = make_engine(cfg, model, compile.compiled(model, cfg, dist), tok, ids)
    began, count = time.perf_counter(), 0
    texts: dict[Row, Text] = {}
    unfinished: list[Text] = []  # in the order in which they are printed
    while len(texts) < cfg.num_samples or unfinished:
        n = min(engine.free, cfg.num_samples - len(texts))
        if n:
            options = Options.of(cfg, seed=int(cfg.seed) + len(texts))
            new = {row: Text(Stream(tok, stop), start) for row in engine.add(ids, options, n)}
            texts |= new
            unfinished += new.values()
        for token in engine.step():
            count += 1
            texts[token.row].add(token)
            if texts[token.row].ended:
                engine.remove(token.row)
        while unfinished:
            write(unfinished[0].unprinted)
            unfinished[0].unprinted = ""
            if not unfinished[0].ended:
                break
            del unfinished[0]
    seconds = time.perf_counter() - began
    dist.say(f"{count:,} tokens in {seconds:.2f} s, {count / seconds:,.0f} a second")


def make_engine(cfg: SampleConfig, model: GPT, fast: Any, tok: Tokenizer, ids: list[int]) -> Engine:
    """An Engine with room for all texts, or for as many as memory allows. fast: the compiled model."""
    length = min(model.config.block_size, len(ids) + cfg.max_new_tokens)
    bytes_per_row = length * bytes_per_token(model.config, next(model.parameters()))
    rows = max(1, min(cfg.num_samples, TOGETHER, CACHE // bytes_per_row))
    return Engine(model, rows, tok.vocab_size, len(ids) + cfg.max_new_tokens, fast=fast)


def write(text: str) -> None:
    """Write to standard output and flush."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
