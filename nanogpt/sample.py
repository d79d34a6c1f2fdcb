"""Write text with a trained model, as it is made."""

import codecs
import sys
from pathlib import Path

import torch

from nanogpt import config, distributed, trained
from nanogpt.config import SampleConfig, UserError
from nanogpt.generate import generate


def main(argv):
    """`sample.py`, given its arguments."""
    cfg = config.load(SampleConfig, argv, "sample.py")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # the text alone goes to standard output
        sample(cfg, dist)


def read_start(start):
    """The prompt that `start` means: FILE:NAME is a file's text; a \\n typed in a shell is a new line."""
    if not start.startswith("FILE:"):
        return start.replace("\\n", "\n").replace("\\t", "\t")
    path = Path(start[5:])
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"--start={start}: is not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"--start={start}: {e.strerror}") from None


def encode(text, tok, model, dist):
    """The prompt's ids (1, T), its end where it is longer than the context. UserError where it cannot be encoded."""
    try:
        ids = tok.encode(text)
    except ValueError as e:
        raise UserError(f"--start: {e}") from None
    if not ids:
        raise UserError("--start is empty; a text has to begin with something, if only \\n")
    T = model.config.block_size
    if len(ids) > T:
        dist.say(f"--start has {len(ids)} tokens, the context {T}: the model sees the last {T} of them")
    return torch.tensor([ids[-T:]], device=dist.device)


def sample(cfg, dist):
    """Write `num_samples` texts to standard output."""
    distributed.choose_seed(cfg, dist)
    text = read_start(cfg.start)
    found = trained.load(cfg, dist)
    model, tok = found.model.to(dist.device, dist.dtype).eval(), found.tokenizer
    idx = encode(text, tok, model, dist)
    for i in range(cfg.num_samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        write(text)
        settings = dict(temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed + i, vocab_size=tok.vocab_size)
        for token in generate(model, idx, cfg.max_new_tokens, **settings):
            write(decoder.decode(tok.token_bytes(token.item())))
        write(decoder.decode(b"", final=True) + "\n---------------\n")


def write(text):
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
