"""How well a trained model predicts a text: loss, perplexity and bits per byte, of all of it and of each document."""

import collections
import sys

import numpy as np

from nanogpt import data, evaluate
from nanogpt.config import EvalConfig, UserError, is_name, is_path
from nanogpt.run import distributed, settings, trained
from nanogpt.text import sources, tokenizer
from nanogpt.text.dataset import open_dataset, require_same_tokenizer


def main(argv: list[str]) -> None:
    """Run `nanogpt eval` with these arguments."""
    cfg = settings.load(EvalConfig, argv, "nanogpt eval")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # the results alone go to standard output
        with dist.agree():
            texts = read_texts(cfg, dist) if cfg.text else None
            found = trained.load(cfg, dist)
            choose_context(cfg, found.model.config.block_size)
            dataset, documents, names = from_texts(cfg, texts, found, dist) if texts else from_split(cfg, found)
        result = measure(cfg, found, dataset, documents, dist)
        if dist.is_main:
            print("\n".join(lines(result, names)))


def read_texts(cfg, dist):
    """{name: text} of the documents that `--text` means. UserError where there are none, or some are no text."""
    if cfg.text == "-" and dist.world_size > 1:
        raise UserError("--text=-: several processes cannot share standard input; a file they can all read")
    try:
        found, documents = read_standard_input(cfg) if cfg.text == "-" else find_documents(cfg, dist)
    except UserError as e:
        raise UserError(*(flag(cfg.text, line) for line in e.problems)) from None
    if not documents:
        raise UserError(f"--text={cfg.text}: there is no text in it")
    texts, count = {}, collections.Counter()
    for number, text in documents:
        count[number] += 1
        source = found[number]
        texts[source.name + (f", document {count[number]}" if source.kind != "text" else "")] = text
    return texts


def flag(pattern, line):
    """A line about one of the files that `--text` means, as an error about that setting."""
    if line.startswith("--"):
        return line
    return f"--text={line}" if line.startswith(pattern) else f"--text={pattern}: {line}"


def read_standard_input(cfg):
    """(its Source alone, [(0, its text)])."""
    found, _ = sources.find(["-"], None, None, cfg.field, cfg.encoding)
    stream = sources.Recoded(sys.stdin.buffer, found[0]) if found[0].encoding else sys.stdin.buffer
    raw = b"".join(iter(lambda: stream.read(sources.BLOCK), b""))
    documents, problems = sources.read_block(sources.Block("text", [[0, 0, 0, len(raw), True]], raw, [], 0), "", False)
    if problems:
        raise UserError(*sources.explain(problems, found, False))
    return found, [(0, document.text) for document in documents]


def find_documents(cfg, dist):
    """(Sources, [(a Source's number, the text of a document), ...])."""
    found, notes = sources.find([cfg.text], None, None, cfg.field, cfg.encoding)
    documents, empty = sources.read_whole(found, cfg.field)
    for note in [*notes, sources.left_out(empty, cfg.field)] if empty else notes:
        dist.say(note)
    return found, documents


def choose_context(cfg, longest):
    """Settle block_size and stride in the config itself. UserError where they exceed the model's context."""
    cfg.block_size = longest if cfg.block_size == "auto" else cfg.block_size
    cfg.stride = cfg.block_size if cfg.stride == "auto" else cfg.stride
    for name in ("block_size", "stride"):
        if getattr(cfg, name) > longest:
            raise UserError(f"--{name}={getattr(cfg, name)}: longer than the {longest} tokens of the model's context")


def from_texts(cfg, texts, found, dist):
    """The texts as a data.Dataset, its Documents, which are the texts, and what they are called.

    If the tokenizer has a token that stands before every document, it stands before them here, and so their first
    tokens are predicted too. Characters that the vocabulary lacks become its token for unknown ones, or without one
    are left out; a line counts them.
    """
    tok, ids = found.tokenizer, []
    separator = tok.eot
    unknown = unknown_characters(texts, tok)
    if unknown:
        dist.say(about_unknown(unknown, sum(map(len, texts.values())), tok))
        if tok.unknown is None:
            texts = {name: text.translate(dict.fromkeys(map(ord, unknown))) for name, text in texts.items()}
    for text in texts.values():
        encoded = tok.encode(text)
        ids.append(np.array(encoded if separator is None else [separator, *encoded], dtype=np.uint32))
    dataset = data.Dataset(np.concatenate(ids), tok.vocab_size, separator, "the text")
    documents = data.Documents(np.cumsum([0, *map(len, ids)]), cfg.block_size, cfg.stride)
    if not len(documents):
        known = "is not two characters of the model's vocabulary long" if unknown else "has but one token"
        raise UserError(f"--text={cfg.text}: {known}, so there is none to predict from another")
    return dataset, documents, list(texts)


def unknown_characters(texts, tok):
    """A Counter of the characters of all texts that are not in the vocabulary; only characters can be unknown."""
    if not isinstance(tok, tokenizer.CharTokenizer):
        return {}
    counts = collections.Counter()
    for text in texts.values():
        counts.update(text)
    return collections.Counter({c: n for c, n in counts.items() if c not in tok.ids})


def about_unknown(unknown, characters, tok):
    """One line about the unknown characters among so many: how many, the commonest of them, and what becomes of them."""
    named = ", ".join(f"{c!r} (U+{ord(c):04X}): {n:,}" for c, n in unknown.most_common(3))
    named += f", and {len(unknown) - 3:,} more" if len(unknown) > 3 else ""
    outcome = (
        "they are left out, and the loss and the bits per byte are those of the text without them"
        if tok.unknown is None
        else "each counts as the token for unknown characters, and bits per byte are not reported"
    )
    total = unknown.total()
    return f"not in the model's vocabulary: {total:,} of {characters:,} characters ({total / characters:.2%}), {named}; {outcome}"


def from_split(cfg, found):
    """The split of a dataset, its Documents, and what they are called.

    As in training, the whole split is one document, unless the model was trained with `documents`.
    """
    name, root = cfg.dataset or found.settings.get("dataset"), cfg.root
    if not cfg.dataset and "root" not in cfg.sources:
        root = found.settings.get("root", root)
    if not (isinstance(name, str) and is_name(name) and isinstance(root, str) and is_path(root)):
        raise UserError(f"--init_from={cfg.init_from}: --text=FILE or --dataset=NAME says what to evaluate it on")
    dataset = open_dataset(name, cfg.split, block_size=1, root=root)
    require_same_tokenizer(name, dataset.tokenizer_json, found.tokenizer_json, found.folder)
    if not (cfg.per_document or found.settings.get("documents")):
        documents = data.Documents([0, len(dataset.tokens)], cfg.block_size, cfg.stride)
        return dataset, documents, [f"{name}, {cfg.split} split"]
    if dataset.separator is None:
        raise UserError(
            f"--per_document={cfg.per_document}: {root}/{name}/meta.json names no separator, so where a document "
            "begins is unknown"
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
