"""Write text with a trained model, as it is made."""

import codecs
import sys
import unicodedata
from pathlib import Path

import torch

from nanogpt import checkpoint, config, distributed, export, tokenizer
from nanogpt.config import GPT2_NAMES, SampleConfig, UserError
from nanogpt.generate import generate


def main(argv):
    """`sample.py`, given its arguments."""
    cfg = config.load(SampleConfig, argv, "sample.py")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # the text alone goes to standard output
        sample(cfg, dist)


def load(cfg, dist):
    """The model and tokenizer that `init_from` names. UserError where there is none."""
    if cfg.init_from in GPT2_NAMES or (cfg.init_from != "resume" and export.is_hugging_face(cfg.init_from)):
        return export.from_pretrained(cfg.init_from), open_tokenizer({"type": "gpt2"})
    folder = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    found = checkpoint.best(folder, dist.say) or export.from_nanogpt(folder)
    if found is None:
        there = sorted(str(p.parent) for p in Path().glob("*/checkpoints"))
        hint = f"; there are some in {', '.join(there)}" if there else "; train.py makes one"
        raise UserError(
            f"--{'out_dir' if cfg.init_from == 'resume' else 'init_from'}={folder}: holds no checkpoint{hint}"
        )
    dist.say(f"model: {found.folder}, step {found.step}, val loss {found.val_loss:.4f}")
    return checkpoint.load_model(found), open_tokenizer(found.tokenizer)


def open_tokenizer(tokenizer_json):
    """The tokenizer that a checkpoint describes. UserError where it cannot be had."""
    try:
        return tokenizer.from_json(tokenizer_json)
    except (ImportError, OSError, ValueError) as e:
        raise UserError(str(e)) from None


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


def known(text, tok, dist):
    """The prompt, with accents composed or decomposed as the vocabulary has them; what it lacks is said."""
    if getattr(tok, "unknown", None) is None:
        return text
    text = min((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))), key=tok.count_unknown)
    if tok.count_unknown(text):
        dist.say(f"--start: {tok.about_unknown(text)}; the model sees its token for unknown characters there")
    return text


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
    model, tok = load(cfg, dist)
    model.to(dist.device).eval()
    idx = encode(known(text, tok, dist), tok, model, dist)
    if cfg.compile == "auto":
        cfg.compile = False
        dist.say("compile: False, because a few texts are written sooner than a model is compiled (--compile)")
    model = distributed.compiled(model, cfg, dist, idx.shape)
    generator = torch.Generator(dist.device).manual_seed(cfg.seed)
    for _ in range(cfg.num_samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        write(text)
        with dist.autocast():
            for token in generate(
                model, idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, generator, tok.vocab_size
            ):
                write(decoder.decode(tok.token_bytes(token.item())))
        write(decoder.decode(b"", final=True) + "\n---------------\n")


def write(text):
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
