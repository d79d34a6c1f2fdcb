"""Write text with a trained model, as it is made."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanogpt import config, quantize
from nanogpt.config import SampleConfig, UserError
from nanogpt.generate import Engine, Options
from nanogpt.run import compile, distributed, settings, trained
from nanogpt.text.tokenizer import Stream

CACHE = 2**31  # bytes at most for the keys and values of the texts that are written together
TOGETHER = 64  # texts at most; more gain little


def main(argv: list[str]) -> None:
    """Run `sample.py` with these arguments."""
    cfg = settings.load(SampleConfig, argv, "sample.py")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # the text alone goes to standard output
        sample(cfg, dist)


def read_start(start: str) -> str:
    """The prompt that `start` means: FILE:NAME is a file's text; a \\n typed in a shell is a new line."""
    if not start.startswith("FILE:"):
        return config.unescaped(start)
    path = Path(start[5:])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"--start={start}: is not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"--start={start}: {e.strerror}") from None


def encode(text, tok, context, dist):
    """The prompt's ids, or the last ones if it exceeds the context. Raises UserError if it cannot be encoded."""
    try:
        ids = tok.encode(text)
    except ValueError as e:
        raise UserError(f"--start: {e}") from None
    if not ids:
        raise UserError("--start is empty; a text has to begin with something, if only \\n")
    if len(ids) > context:
        dist.say(f"--start has {len(ids)} tokens, the context {context}: the model sees the last {context} of them")
    return ids[-context:]


@dataclass
class Text:
    """A sample, and what of it is to be shown."""

    stream: Stream
    waiting: str
    over: bool = False

    def take(self, token):
        """The next token of this text."""
        self.waiting += self.stream.push(token.id)
        self.over = self.stream.stopped or token.finish is not None
        if self.over:
            self.waiting += self.stream.flush() + "\n---------------\n"


def sample(cfg, dist):
    """Write `num_samples` texts to standard output. All are written together; the first is shown as it is made."""
    distributed.choose_seed(cfg, dist)
    start, stop = read_start(cfg.start), cfg.stop_strings()
    found = trained.load(cfg, dist)
    model, tok = quantize.made_ready(found.model, cfg, dist), found.tokenizer
    start, unknown = trained.known(start, tok)
    if unknown:
        dist.say(f"--start: {unknown}")
    ids = encode(start, tok, model.config.block_size, dist)
    if cfg.compile == "auto":
        cfg.compile = False
        dist.say("compile: False, because a few texts are written sooner than a model is compiled (--compile)")
    engine = make_engine(cfg, model, compile.compiled(model, cfg, dist), tok, ids)
    began, count, texts, shown = time.perf_counter(), 0, {}, []  # texts by their rows; those to be shown, in order
    while len(texts) < cfg.num_samples or shown:
        n = min(engine.free, cfg.num_samples - len(texts))
        if n:
            options = Options.of(cfg, seed=cfg.seed + len(texts))
            new = {row: Text(Stream(tok, stop), start) for row in engine.add(ids, options, n)}
            texts |= new
            shown += new.values()
        for token in engine.step():
            count += 1
            texts[token.row].take(token)
            if texts[token.row].over:
                engine.remove(token.row)
        while shown:
            write(shown[0].waiting)
            shown[0].waiting = ""
            if not shown[0].over:
                break
            del shown[0]
    seconds = time.perf_counter() - began
    dist.say(f"{count:,} tokens in {seconds:.2f} s, {count / seconds:,.0f} a second")


def make_engine(cfg, model, fast, tok, ids):
    """An Engine with room for all texts, or for as many as memory allows."""
    length = min(model.config.block_size, len(ids) + cfg.max_new_tokens)
    a_row = 2 * model.config.n_layer * length * model.config.n_embd * model.transformer.wte.weight.element_size()
    rows = max(1, min(cfg.num_samples, TOGETHER, CACHE // a_row))
    return Engine(model, rows, tok.vocab_size, len(ids) + cfg.max_new_tokens, fast=fast)


def write(text: str) -> None:
    """Write to standard output and flush."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
