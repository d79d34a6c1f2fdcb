"""How well a trained model predicts a text: loss, perplexity and bits per byte, of all of it and of each document."""

import glob
import sys
from pathlib import Path

import numpy as np

from nanogpt import config, data, distributed, evaluate, trained
from nanogpt.config import EvalConfig, UserError


def main(argv):
    """`nanogpt eval`, given its arguments."""
    cfg = config.load(EvalConfig, argv, "nanogpt eval")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # the results alone go to standard output
        with dist.together():
            texts = read_texts(cfg.text, dist) if cfg.text else None
            found = trained.load(cfg, dist)
            choose_context(cfg, found.model.config.block_size)
            dataset, documents, names = from_texts(cfg, texts, found, dist) if texts else from_split(cfg, found)
        result = measure(cfg, found, dataset, documents, dist)
        if dist.is_main:
            print("\n".join(lines(result, names)))


def read_texts(pattern, dist):
    """{name: text} of the files that `--text` means. UserError where there are none, or some are no text."""
    if pattern == "-" and dist.world_size > 1:
        raise UserError("--text=-: several processes cannot share standard input; a file they can all read")
    texts, problems = {}, []
    for name in ["standard input"] if pattern == "-" else find_files(pattern):
        try:
            raw = sys.stdin.buffer.read() if pattern == "-" else Path(name).read_bytes()
            texts[name] = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            problems.append(f"{flag(pattern, name)}: is not UTF-8 text (byte {e.start} is 0x{raw[e.start]:02x})")
        except OSError as e:
            problems.append(f"{flag(pattern, name)}: cannot be read ({e.strerror})")
    if not problems and not any(texts.values()):
        problems.append(f"--text={pattern}: there is no text in it")
    if problems:
        raise UserError(*problems)
    return texts


def flag(pattern, name):
    """How a message names one of the files that `--text` means."""
    return f"--text={pattern}" if name == pattern else f"--text={pattern}: {name}"


def find_files(pattern):
    """The files that a path, or a pattern with *, names. UserError where there are none."""
    if Path(pattern).is_dir():
        raise UserError(f"--text={pattern}: is a folder; --text='{pattern.rstrip('/')}/*.txt' would be the texts in it")
    found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    files = [path for path in found if not Path(path).is_dir()]
    if not files:
        near = config.nearest(Path(pattern).name, [path.name for path in Path(pattern).parent.glob("*")])
        raise UserError(f"--text={pattern}: there is no such file{near}")
    return files


def choose_context(cfg, longest):
    """Settle block_size and stride in the config itself. UserError where they exceed the model's context."""
    cfg.block_size = longest if cfg.block_size == "auto" else cfg.block_size
    cfg.stride = cfg.block_size if cfg.stride == "auto" else cfg.stride
    for name in ("block_size", "stride"):
        if getattr(cfg, name) > longest:
            raise UserError(f"--{name}={getattr(cfg, name)}: longer than the {longest} tokens of the model's context")


def from_texts(cfg, texts, found, dist):
    """The texts as a data.Dataset, its Documents, which are the texts, and what they are called.

    Where the tokenizer has a token that stands before every document, it stands before them here, and so their
    first tokens are predicted too.
    """
    tok, ids = found.tokenizer, []
    if tok.vocab_size > found.model.config.vocab_size:
        raise UserError(
            f"--init_from={cfg.init_from}: the model's vocabulary of {found.model.config.vocab_size} is smaller than the "
            f"{tok.vocab_size} of its tokenizer"
        )
    separator = tok.eot
    for name, text in texts.items():
        try:
            encoded = tok.encode(text)
        except ValueError as e:
            raise UserError(f"{flag(cfg.text, name)}: {e}") from None
        ids.append(np.array(encoded if separator is None else [separator, *encoded], dtype=np.uint32))
        if unknown := getattr(tok, "about_unknown", lambda text: None)(text):
            dist.say(
                f"{name}: {unknown}; each counts as the token for unknown characters, so no bits per byte are told"
            )
    dataset = data.Dataset.of_ids(np.concatenate(ids), tok.vocab_size, separator)
    documents = data.Documents(np.cumsum([0, *map(len, ids)]), cfg.block_size, cfg.stride)
    if not len(documents):
        raise UserError(f"--text={cfg.text}: has but one token, and none before it to predict it from")
    return dataset, documents, list(texts)


def from_split(cfg, found):
    """The split of a dataset, its Documents, and what they are called.

    As in training, the whole split is one document, unless the model was trained with `documents`.
    """
    name = cfg.dataset or found.settings.get("dataset")
    if not name:
        raise UserError(f"--init_from={cfg.init_from}: --text=FILE or --dataset=NAME says what to evaluate it on")
    dataset = data.Dataset(name, cfg.split, block_size=1)
    if dataset.tokenizer_json != found.tokenizer_json:
        raise UserError(f"--dataset={name}: its tokenizer is not the one of the model")
    if not (cfg.per_document or found.settings.get("documents")):
        documents = data.Documents([0, len(dataset.tokens)], cfg.block_size, cfg.stride)
        return dataset, documents, [f"{name}, {cfg.split} split"]
    if dataset.separator is None:
        raise UserError(
            f"--per_document={cfg.per_document}: data/{name}/meta.json names no separator, so where a document begins "
            "is unknown"
        )
    begins = data.find_documents(dataset.tokens, dataset.separator)
    documents = data.Documents(begins, cfg.block_size, cfg.stride, shared=True)
    names = [f"document {i}" for i in range(1, len(begins))] if cfg.per_document else []
    return dataset, documents, names or [f"{name}, {cfg.split} split, each document by itself"]


def measure(cfg, found, dataset, documents, dist):
    """What `evaluate.exact` finds; batches are no larger than there is need for."""
    cfg.block_size = min(cfg.block_size, int(np.diff(documents.begins).max()))
    cfg.batch_size = min(cfg.batch_size, -(-len(documents) // dist.world_size))
    tok, lengths = found.tokenizer, evaluate.byte_lengths(found.tokenizer, dataset.separator)
    if cfg.text and getattr(tok, "unknown", None) is not None and tok.ids[tok.unknown] in dataset.tokens[:]:
        lengths = None  # the token does not tell which character it stands for
    model = found.model.to(dist.device)
    return evaluate.exact(
        model, dataset, cfg, dist, lengths, layout=documents, each=cfg.per_document, what="evaluating"
    )


def lines(result, names):
    """What to print: a line for each document where they were told apart, and one for all of them."""
    whole = names[0] if len(names) == 1 else f"all {len(names):,} documents"
    each = zip(names, result["documents"], strict=True) if len(names) > 1 and "documents" in result else ()
    return [in_words(name, document) for name, document in each] + [in_words(whole, result)]


def in_words(name, result):
    """One line about a document, or about all."""
    if result is None:
        return f"{name}: has no token to predict"
    per_byte = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
    loss, tokens, perplexity = result["loss"], result["tokens"], result["perplexity"]
    return f"{name}: loss {loss:.6f} over {tokens:,} tokens, perplexity {perplexity:.4f}{per_byte}"
