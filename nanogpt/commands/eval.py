"""How well a trained model predicts a text: loss, perplexity and bits per byte, of the whole text and of each document.

tasks.py has the tasks of `--tasks`.
"""

import collections
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import data, evaluate
from nanogpt.commands import tasks
from nanogpt.config import EvalConfig, UserError, is_name, is_path
from nanogpt.model import GPTConfig
from nanogpt.run import distributed, memory, products, settings, trained
from nanogpt.run.distributed import Dist
from nanogpt.text import sources
from nanogpt.text.dataset import open_dataset, require_same_tokenizer
from nanogpt.text.tokenizer import CharTokenizer

LOGITS = 2**28  # logits of a window, at most, if the context is `auto`; a batch has up to four times as many
BYTES_EACH = 10  # memory that a logit takes: 4 bytes, as many for its logarithm, and some to spare
Measured = tuple[data.Dataset, data.Documents, list[str]]  # what is evaluated, and the names of its documents


def main(argv: list[str]) -> None:
    """Run `nanogpt eval` with these arguments."""
    cfg = settings.load(EvalConfig, argv, "nanogpt eval")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # standard output has the results only
        printed = evaluate_on_task(cfg, dist) if cfg.tasks else evaluate_on_text(cfg, dist)
        if dist.is_main:
            print("\n".join(printed))


def evaluate_on_task(cfg: EvalConfig, dist: Dist) -> list[str]:
    """Evaluate the model on the file that `--tasks` names. Returns the lines to print."""
    with dist.agree():
        task = tasks.read_task(cfg)  # before the model is loaded
        found = trained.load(cfg, dist)
        choose_context(cfg, found.model.config, dist)
        requests = tasks.all_requests(cfg, task, found.tokenizer)
    products.choose_products(found.model, cfg, dist, products.LARGEST)
    return [tasks.evaluate_task(found.model, requests, task, cfg, dist)]


def evaluate_on_text(cfg: EvalConfig, dist: Dist) -> list[str]:
    """Evaluate the model on a text or a dataset. Returns the lines to print."""
    with dist.agree():
        texts = read_texts(cfg, dist) if cfg.text else None
        found = trained.load(cfg, dist)
        choose_context(cfg, found.model.config, dist)
        dataset, documents, names = from_texts(cfg, texts, found, dist) if texts else from_split(cfg, found)
    products.choose_products(found.model, cfg, dist, products.LARGEST)
    result = measure(cfg, found, dataset, documents, dist)
    return list(lines(result, names)) if dist.is_main else []


def read_texts(cfg: EvalConfig, dist: Dist) -> dict[str, str]:
    """{name: text} of the documents that `--text` names. Raises UserError if there are none, or some are not text."""
    if cfg.text == "-" and dist.world_size > 1:
        raise UserError("--text=-: several processes cannot share standard input; use a file that all can read")
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "input.txt")
            found, notes = sources.find([cfg.text], None, copy, cfg.field, cfg.encoding)
            if cfg.text == "-":
                with copy.open("wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file)
                found[0].size, found[0].mtime = copy.stat().st_size, copy.stat().st_mtime_ns
            documents, empty = sources.read_whole(found, cfg.field)
    except UserError as e:
        raise UserError(*(flag(cfg.text, line) for line in e.problems)) from None
    for note in [*notes, sources.left_out(empty, cfg.field)] if empty else notes:
        dist.say(note)
    if not documents:
        raise UserError(f"--text={cfg.text}: there is no text in it")
    texts: dict[str, str] = {}
    count: collections.Counter[int] = collections.Counter()
    for number, text in documents:
        count[number] += 1
        source = found[number]
        texts[source.name + (f", document {count[number]}" if source.kind != "text" else "")] = text
    return texts


def flag(pattern: str, line: str) -> str:
    """A line about one of the files that `--text` names, as an error about that setting."""
    if line.startswith("--"):
        return line
    return f"--text={line}" if line.startswith(pattern) else f"--text={pattern}: {line}"


def choose_context(cfg: EvalConfig, model: GPTConfig, dist: Dist) -> None:
    """Replace `auto` in block_size and stride. Raises UserError if they exceed the model's context."""
    longest = model.block_size
    if cfg.block_size == "auto":
        cfg.block_size = longest
        while cfg.block_size * model.vocab_size > LOGITS:
            cfg.block_size //= 2
        if cfg.block_size < longest:
            dist.say(
                f"context: {cfg.block_size} of the model's {longest} tokens, so that logits fit in memory (--block_size)"
            )
    free = memory.free_memory() // BYTES_EACH if dist.device.type == "cpu" else 4 * LOGITS
    size = max(1, int(min(4 * LOGITS, free) // (int(cfg.block_size) * model.vocab_size)))
    if size < cfg.batch_size:
        dist.say(f"windows: {size} at a time, not {cfg.batch_size}, so that their logits fit in memory (--batch_size)")
        cfg.batch_size = size
    cfg.stride = cfg.block_size if cfg.stride == "auto" else cfg.stride
    for name in ("block_size", "stride"):
        if getattr(cfg, name) > longest:
            raise UserError(f"--{name}={getattr(cfg, name)}: longer than the {longest} tokens of the model's context")


def from_texts(cfg: EvalConfig, texts: dict[str, str], found: trained.Trained, dist: Dist) -> Measured:
    """The texts, each of which is a document.

    If the tokenizer has a token that precedes every document, it does so here, and the first token of each text is
    predicted too. Characters that the vocabulary lacks become its token for unknown characters, or are left out if it
    has none; a line counts them.
    """
    tok, separator, ids = found.tokenizer, found.tokenizer.eot, []
    unknown = unknown_characters(texts, tok)
    if unknown:
        dist.say(about_unknown(unknown, sum(map(len, texts.values())), tok))
    for text in texts.values():
        if unknown and tok.unknown is None:
            text = text.translate(dict.fromkeys(map(ord, unknown)))
        encoded = tok.encode(text)
        ids.append(np.array(encoded if separator is None else [separator, *encoded], dtype=np.uint32))
    dataset = data.Dataset(np.concatenate(ids), tok.vocab_size, separator, "the text")
    documents = data.Documents(np.cumsum([0, *map(len, ids)]), int(cfg.block_size), int(cfg.stride))
    if not len(documents):
        known = "has fewer than two characters of the model's vocabulary" if unknown else "has only one token"
        raise UserError(f"--text={cfg.text}: {known}, so there is nothing to predict")
    return dataset, documents, list(texts)


def unknown_characters(texts: dict[str, str], tok: Any) -> collections.Counter[str]:
    """The characters of all texts that are not in the vocabulary; only characters can be unknown."""
    counts: collections.Counter[str] = collections.Counter()
    if isinstance(tok, CharTokenizer):
        for text in texts.values():
            counts.update(text)
        for known in counts.keys() & tok.ids.keys():
            del counts[known]
    return counts


def about_unknown(unknown: collections.Counter[str], characters: int, tok: CharTokenizer) -> str:
    """One line about the unknown characters: how many of `characters`, the most common, and what becomes of them."""
    named = ", ".join(f"{c!r} (U+{ord(c):04X}): {n:,}" for c, n in unknown.most_common(3))
    named += f", and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
    outcome = (
        "they are left out, and the loss and the bits per byte are those of the text without them"
        if tok.unknown is None
        else "each counts as the token for unknown characters, and bits per byte are not reported"
    )
    total = unknown.total()
    return f"not in the model's vocabulary: {total:,} of {characters:,} characters ({total / characters:.2%}), {named}; {outcome}"


def from_split(cfg: EvalConfig, found: trained.Trained) -> Measured:
    """The split of a dataset.

    As in training, the whole split is one document, unless the model was trained with `documents`.
    """
    name, root = cfg.dataset or found.settings.get("dataset"), cfg.root
    if not cfg.dataset and "root" not in cfg.sources:  # type: ignore[attr-defined]  # set by settings.load
        root = found.settings.get("root", root)
    if not (isinstance(name, str) and is_name(name) and isinstance(root, str) and is_path(root)):
        raise UserError(f"--init_from={cfg.init_from}: --text=FILE or --dataset=NAME says what to evaluate it on")
    dataset = open_dataset(name, cfg.split, block_size=1, root=root)
    assert dataset.tokenizer_json is not None
    require_same_tokenizer(name, dataset.tokenizer_json, found.tokenizer_json, found.folder)
    block_size, stride = int(cfg.block_size), int(cfg.stride)
    if not (cfg.per_document or found.settings.get("documents")):
        documents = data.Documents([0, len(dataset.tokens)], block_size, stride)
        return dataset, documents, [f"{name}, {cfg.split} split"]
    if dataset.separator is None:
        raise UserError(
            f"--per_document={cfg.per_document}: {root}/{name}/meta.json names no separator, so document boundaries "
            "are unknown"
        )
    begins = data.find_documents(dataset.tokens, dataset.separator)
    documents = data.Documents(begins, block_size, stride, shared=True)
    names = [f"document {i}" for i in range(1, len(begins))] if cfg.per_document else []
    return dataset, documents, names or [f"{name}, {cfg.split} split, each document by itself"]


def measure(
    cfg: EvalConfig, found: trained.Trained, dataset: data.Dataset, documents: data.Documents, dist: Dist
) -> dict[str, Any]:
    """The result of `evaluate.exact`, in batches no larger than needed."""
    cfg.block_size = min(int(cfg.block_size), int(np.diff(documents.begins).max()))
    cfg.batch_size = min(cfg.batch_size, -(-len(documents) // dist.world_size))
    tok, lengths = found.tokenizer, evaluate.byte_lengths(found.tokenizer, dataset.separator)
    if cfg.text and getattr(tok, "unknown", None) is not None and tok.ids[tok.unknown] in dataset.tokens[:]:
        lengths = None  # the character that this token stands for is not known
    model, each = found.model.to(dist.device), cfg.per_document
    return evaluate.exact(model, dataset, cfg, dist, lengths, layout=documents, each=each, what="evaluating")


def lines(result: dict[str, Any], names: list[str]) -> Iterator[str]:
    """What to print: a line for each document, if they were evaluated separately, and one for all of them."""
    if len(names) > 1:
        for name, document in zip(names, result.get("documents", []), strict=False):
            yield f"{name}: {in_words(document) if document else 'has no token to predict'}"
    yield f"{names[0] if len(names) == 1 else f'all {len(names):,} documents'}: {in_words(result)}"


def in_words(result: dict[str, Any]) -> str:
    """The result for a document, or for all."""
    per_byte = f", {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
    loss, tokens, perplexity = result["loss"], result["tokens"], result["perplexity"]
    return f"loss {loss:.6f} over {tokens:,} tokens, perplexity {perplexity:.4f}{per_byte}"
