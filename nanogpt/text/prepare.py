"""`nanogpt prepare SOURCE... --dataset=NAME` writes text as data/NAME/{train.bin,val.bin,meta.json}.

The text is read once to make the tokenizer, if that depends on it, and once to encode it; then its documents are
shuffled and split. Progress is saved in data/NAME/.prepare/, so that the same command continues where an earlier one
was stopped, and writes the same bytes.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from nanogpt import files
from nanogpt.config import PrepareConfig, RunFailed, UserError
from nanogpt.run import settings
from nanogpt.run.signals import Stopped
from nanogpt.run.threads import available_cores
from nanogpt.text import dataset, shuffle, sources, tokenizer
from nanogpt.text.cutting import last_character
from nanogpt.text.sources import BLOCK, STANDARD_INPUT, CannotWrite, Problems, Source, writing_to
from nanogpt.text.tokenizer import Tokenizer
from nanogpt.text.workers import Pool, peak_memory

VAL_SHARE, VAL_TOKENS = 0.1, 2_000_000  # the share of the tokens to validate on, and their largest number
WINDOW = 64  # tokens of a window; each split must hold one, and the token after it
LARGE = 50 * 10**6  # bytes of text for which characters are short tokens
COMMIT = 5.0  # seconds between two saves of the state
FEW = 4 * BLOCK  # bytes of text that this process encodes itself before others would have started
MEGABYTE = 10**6
FIRST, EACH = 110, 120  # megabytes that the first process and each worker need, at most
LIBRARIES = 250  # and the libraries for Parquet and the hub
WINDOW_PACKED = 64  # and the windows of .xz and .zst
TOKENS = {"char": 1.0, "byte": 1.0, "gpt2": 0.3, "bpe": 0.35, "folder": 0.35}  # per byte of text, roughly
LEAST_TOKENS = {"char": 0.25, "byte": 1.0, "gpt2": 0.2, "bpe": 0.2, "folder": 0.2}  # per byte of text, at least
CONTINUABLE = (Stopped, CannotWrite, RunFailed)  # errors after which the same command continues


def main(argv: list[str]) -> None:
    """`nanogpt prepare`, given its arguments."""
    cfg = settings.load(PrepareConfig, argv, "nanogpt prepare")
    missing = []
    if not cfg.arguments:
        missing.append("nothing to prepare: name a file, a folder, 'a glob*', hf:NAME, or - for standard input")
    if not cfg.dataset:
        missing.append("the dataset needs a name: --dataset=NAME writes it to data/NAME/")
    try:
        tokenizer.named(cfg.tokenizer)
    except ValueError as e:
        missing.append(f"--tokenizer={cfg.tokenizer}: {e}")
    if missing:
        raise UserError(*missing)
    prepare(cfg, Path(cfg.root) / cfg.dataset)


@dataclass
class State:
    """What has been done. It is saved as JSON."""

    plan: dict[str, Any]  # the settings and sources; with another plan, everything starts again
    stage: str = "tokenizer"  # then "encode", then "publish": the files are complete and only have to be moved
    tokenizer: dict[str, Any] = field(default_factory=dict)
    position: list[int] = field(default_factory=lambda: [0, 0, 0])  # where the next block begins
    bits: int = 0  # there are 2**bits buckets
    sizes: list[int] = field(default_factory=list)  # of the buckets' files
    key: int = 0  # of the document that continues in the next block
    bytes: int = 0  # of text
    tokens: int = 0
    replaced: int = 0  # bytes that were not in the encoding
    empty: int = 0  # rows and lines without text
    counts: list[int] = field(default_factory=list)  # how often each id occurs
    split: dict[str, Any] = field(default_factory=dict)  # how it was made
    files: dict[str, list[str]] = field(default_factory=dict)  # {"train": [names], "val": [names]}


class Work:
    """A preparation in progress: settings, sources, state, and the folder .prepare with temporary files."""

    def __init__(self, cfg: PrepareConfig, found: list[Source], target: Path) -> None:
        self.cfg, self.found, self.target, self.folder = cfg, found, target, target / ".prepare"
        self.one_text = is_one_text(found)
        self.state = State({})
        self.saved = self.folder / "state.json"
        self.last, self.processes = time.monotonic(), 0
        self.peak = 0  # bytes of memory of the workers
        self.made = [p for p in (target, *target.parents) if not p.exists()]
        self.lock = files.Lock(self.folder / "lock")
        with writing_to(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.take()
            except BlockingIOError as e:
                raise UserError(f"{target}: another `nanogpt prepare` is at work there ({e.strerror})") from None
            self.lock.sign()

    def load(self, plan: dict[str, Any]) -> list[str]:
        """Load the saved state, or begin a new one if there is none or its plan was another. Returns notes about it."""
        self.state = State(plan)
        try:
            state = State(**json.loads(files.read(self.saved)))
        except (OSError, ValueError, TypeError):
            return []
        if state.plan != plan:
            return [f"starting again, not continuing the last run: {difference(state.plan, plan)}"]
        self.state = state
        return ["continuing where the last run stopped"]

    def save(self) -> None:
        """Save the state durably."""
        with writing_to(self.target):
            files.write(self.saved, json.dumps(asdict(self.state)).encode())
        self.last = time.monotonic()

    def remove(self) -> None:
        """Leave nothing but the dataset, new or old."""
        self.lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in self.made or [self.target]:  # an earlier run may have made it
                folder.rmdir()  # if it is empty


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What has changed between two plans, in words."""
    changed = [f"--{k}" for k in now["settings"] if before.get("settings", {}).get(k) != now["settings"][k]]
    if changed:
        return f"another {' and '.join(changed)}"
    old = {name: rest for name, *rest in before.get("sources", [])}
    new = {name: rest for name, *rest in now["sources"]}
    if names := [name for name in new if name in old and old[name] != new[name]]:
        return f"{', '.join(names[:3])} {'have' if len(names) > 1 else 'has'} changed"
    return "other sources"


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Within, SIGINT and SIGTERM end the preparation with a line on how to continue."""

    def stop(signum: int, frame: object) -> NoReturn:
        signal.signal(signum, signal.SIG_IGN)
        raise Stopped(f"\nstopped; {folder} is unchanged; run the same command again to continue", signum)

    before = {}
    with contextlib.suppress(ValueError):  # in a thread other than the main one
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def prepare(cfg: PrepareConfig, folder: Path) -> None:
    """Prepare a dataset. Sources that cannot be prepared leave nothing behind; a stopped preparation can continue."""
    began = time.monotonic()
    with stoppable(folder):
        tok = given_tokenizer(cfg)
        arguments = cfg.arguments  # type: ignore[attr-defined]  # set by settings.load
        found, notes = sources.find(arguments, folder, folder / ".prepare" / "input.txt", cfg.field, cfg.encoding)
        if tok and tok.eot is None and not is_one_text(found):
            raise UserError(
                f"--tokenizer={cfg.tokenizer}: has no end-of-text token to separate documents; "
                "it can prepare a single file of text, or -"
            )
        work = Work(cfg, found, folder)
        keep = work.saved.exists()
        try:
            for note in notes + work.load(make_plan(cfg, found)):
                print(note, flush=True)
            check_disk(work)
            work.processes = choose_workers(cfg, found)
            keep = False
            if work.state.stage == "tokenizer":
                tok = tok or make_tokenizer(work)
                begin(work, tok)
            tok = tok or tokenizer.from_json(work.state.tokenizer)
            if work.state.stage == "encode":
                encode(work, tok)
                arrange(work)
            publish(work)
        except CONTINUABLE:
            raise
        except UserError:
            if not keep:
                work.remove()
            raise
        finally:
            work.lock.release()
        work.remove()
    report(work, tok, time.monotonic() - began)  # from here on, the dataset exists


# -- before anything is read


def given_tokenizer(cfg: PrepareConfig) -> Tokenizer | None:
    """The tokenizer, or None if it depends on the text. Raises UserError if a package for it is missing."""
    kind, _ = tokenizer.named(cfg.tokenizer)
    try:
        if kind == "bpe":
            tokenizer.require("tiktoken", "bpe")
            tokenizer.require("tokenizers", "bpe")
        if kind == "folder":
            return tokenizer.from_json(dataset.tokenizer_of(cfg.tokenizer))
        return tokenizer.from_json({"type": kind}) if kind in ("byte", "gpt2") else None
    except (ImportError, OSError, UserError) as e:
        raise UserError(f"--tokenizer={cfg.tokenizer}: {e}") from None


def make_plan(cfg: PrepareConfig, found: list[Source]) -> dict[str, Any]:
    """All that determines the bytes of the dataset. Standard input is copied to a file first."""
    names = ["tokenizer", "val_fraction", "seed", "shard_tokens", "field", "encoding", "errors", "drop_duplicates"]
    listed = []
    for source in found:
        version: int | str = source.mtime
        if source.name == STANDARD_INPUT:
            version = copy_standard_input(Path(source.path))
            about = os.stat(source.path)
            source.size, source.mtime = about.st_size, about.st_mtime_ns
        listed.append([source.name, source.kind, source.packing, source.size, version])
    return {"settings": {name: getattr(cfg, name) for name in names}, "sources": listed}


def copy_standard_input(path: Path) -> str:
    """Copy standard input to a file, since it is read more than once; return its hash."""
    if sys.stdin is None or sys.stdin.closed:
        raise UserError(f"{STANDARD_INPUT}: is closed")
    if sys.stdin.isatty():
        print("reading standard input; Ctrl-D ends it", file=sys.stderr)
    digest, temporary = hashlib.sha256(), path.with_name("input.tmp")
    with writing_to(path.parent), files.create(temporary) as f:
        while data := sys.stdin.buffer.read(BLOCK):
            f.write(data)
            digest.update(data)
    if not temporary.stat().st_size:
        raise UserError(f"{STANDARD_INPUT}: is empty")
    os.replace(temporary, path)
    return digest.hexdigest()


def is_one_text(found: list[Source]) -> bool:
    """Whether there is only one document: then nothing is shuffled or separated."""
    return len(found) == 1 and found[0].kind == "text"


def check_disk(work: Work, tokens: float | None = None) -> None:
    """Raise UserError if the disk clearly has too little space for what is still to be written."""
    kind, size = tokenizer.named(work.cfg.tokenizer)
    tokens = tokens or sum(s.text_size() for s in work.found) * LEAST_TOKENS[kind]
    width = 4 if size and size > 2**16 else 2
    copies = 1 if work.one_text else 2  # the buckets, and the files that are written from them
    needed = int(tokens * width * copies) - sum(work.state.sizes)
    free = shutil.disk_usage(work.target).free
    if needed > free and work.state.stage != "publish":
        hint = "; --tokenizer=gpt2 or bpe:8192 makes fewer tokens" if kind in ("char", "byte") else ""
        raise UserError(f"{work.target}: needs about {megabytes(needed)} of disk, but {megabytes(free)} are free{hint}")


def megabytes(n: float) -> str:
    return f"{n / MEGABYTE:,.0f} MB" if n >= 10 * MEGABYTE else f"{n / MEGABYTE:.1f} MB"


def choose_workers(cfg: PrepareConfig, found: list[Source]) -> int:
    """The number of processes to start: one per core, as many as fit the memory, none for a small text."""
    taken = FIRST + (LIBRARIES if any(s.kind in ("rows", "hf") for s in found) else 0)
    taken += WINDOW_PACKED if any(s.packing in (".xz", ".zst") for s in found) else 0
    fit = max(0, (cfg.memory - taken) // EACH)
    if isinstance(cfg.workers, int):
        if cfg.workers > fit:
            needed = f"up to {taken + EACH * cfg.workers} MB"
            raise UserError(f"--workers={cfg.workers}: need {needed}, and --memory is {cfg.memory} MB")
        return cfg.workers
    if sum(s.text_size() for s in found) < FEW and not any(s.kind == "hf" for s in found):
        return 0
    cores = available_cores()
    if fit < cores:
        enough = f"--memory={taken + EACH * cores} would use all"
        print(f"workers: {fit} of {cores} cores, as --memory={cfg.memory} allows; {enough}")
    return min(cores, fit)


# -- the tokenizer


def make_tokenizer(work: Work) -> Tokenizer:
    """The tokenizer made from the text: all characters that occur, or trained BPE."""
    cfg = work.cfg
    _, size = tokenizer.named(cfg.tokenizer)
    if size is not None:
        return train_bpe(work, size)
    present, characters = np.zeros(0x110000, dtype=bool), 0
    present[ord(tokenizer.UNKNOWN)] = True
    with contextlib.closing(Pool(work.processes, **worker_settings(cfg))) as pool:
        for _, about, (codes,) in read(work, pool, "survey", last_character):
            present[codes] = True
            characters += about["characters"]
    check_disk(work, characters)
    chars = [chr(c) for c in np.flatnonzero(present)]
    return tokenizer.CharTokenizer(chars, unknown=tokenizer.UNKNOWN, separated=not work.one_text)


def train_bpe(work: Work, size: int) -> Tokenizer:
    """BPE trained on the text, or on an evenly spread sample of it that fits the memory."""
    cfg = work.cfg
    # in a separate process, unless the text is small: its end frees the memory that training needs
    settings = worker_settings(cfg) | dict(budget=cfg.memory * MEGABYTE // 2, vocab_size=size)
    with contextlib.closing(Pool(min(1, work.processes), **settings)) as pool:
        for _ in read(work, pool, "sample", last_character):
            pass
        print(f"tokenizer: training bpe:{size}", flush=True)
        end = sources.Block("text", [], b"", [], 0)
        ((_, about, _),) = pool.map([end], lambda: "train")
        work.peak = pool.peak
    tok = tokenizer.from_json(about["tokenizer"])
    if about["stride"] > 1:
        print(f"tokenizer: trained on one of {about['stride']} parts of the text, as --memory={cfg.memory} allows")
    if tok.vocab_size < size:
        print(f"tokenizer: {tok.vocab_size} tokens, not {size}: no other pair occurs twice in the text")
    return tok


def begin(work: Work, tok: Tokenizer) -> None:
    """Save the tokenizer, and that encoding begins."""
    state = work.state
    state.tokenizer, state.counts, state.stage = tok.to_json(), [0] * tok.vocab_size, "encode"
    state.bits = choose_bits(work.cfg, work.found, tok.vocab_size)
    work.save()


def choose_bits(cfg: PrepareConfig, found: list[Source], vocab_size: int) -> int:
    """The number of bits that select a bucket. Each bucket must be small compared with the memory."""
    if is_one_text(found):
        return 0
    if any(s.kind == "hf" for s in found):
        return 4  # the size is unknown
    width = np.dtype(tokenizer.id_dtype(vocab_size)).itemsize
    expected = sum(s.text_size() for s in found) * TOKENS[tokenizer.named(cfg.tokenizer)[0]] * width
    return min(shuffle.MAX_BITS, max(0, math.ceil(math.log2(expected / (cfg.memory * MEGABYTE / 8)))))


def worker_settings(
    cfg: PrepareConfig, tokenizer_json: dict[str, Any] | None = None, separate: bool = False
) -> dict[str, Any]:
    """The settings of `workers.Worker`."""
    replace = cfg.errors == "replace"
    return dict(tokenizer=tokenizer_json, separate=separate, field=cfg.field, replace=replace, seed=cfg.seed)


# -- reading and encoding


def read(work: Work, pool: Pool, task: str, cut: sources.Cut) -> Iterator[tuple[sources.Block, dict, list[np.ndarray]]]:
    """Yield (block, dict, arrays) for each block from the saved position on, and show the progress.

    Once a source has turned out to be invalid, the rest is only checked, and UserError reports all problems.
    """
    cfg, found, state = work.cfg, work.found, work.state
    problems, replace = Problems(), cfg.errors == "replace"

    def fatal() -> bool:
        return any(kind != "empty" and not (kind == "utf8" and replace) for _, kind in problems)

    def explain() -> list[str]:
        return sources.explain(problems, found, replace, "--errors=replace makes each U+FFFD")

    first, offset, _ = state.position
    total = 0 if any(s.kind == "hf" for s in found) else sum(s.size for s in found)
    done = sum(s.size for s in found[:first]) + (offset if offset < total else 0)
    began, tokens = time.monotonic(), state.tokens
    longest = max(cfg.memory * MEGABYTE // 64, 2 * BLOCK)  # parsing and encoding a line needs many times its size
    options = sources.ReadOptions(cut, cfg.field, longest, work.folder)
    # `disable=None`: on a terminal only
    with tqdm(total=total or None, initial=done, desc=task, unit="B", unit_scale=True, disable=None) as bar:
        try:
            blocks = sources.blocks(found, state.position, options)
            for block, about, arrays in pool.map(blocks, lambda: "check" if fatal() else task):
                problems.add(about["problems"])
                if not fatal():
                    yield block, about, arrays
                    if task == "encode":
                        rate = (state.tokens - tokens) / (time.monotonic() - began)
                        bar.set_postfix_str(f"{state.tokens / 1e6:,.1f}M tokens, {rate / 1e6:,.2f}M a second", False)
                bar.update(max(block.done - bar.n, 0))
        except CONTINUABLE:
            raise
        except UserError as e:
            raise UserError(*explain(), *e.problems) from None
    work.peak = max(work.peak, pool.peak)
    if lines := explain():
        raise UserError(*lines)


def encode(work: Work, tok: Tokenizer) -> None:
    """Encode all text into the buckets, and save the state now and then."""
    warned = False

    def cut(data: bytes) -> int:
        nonlocal warned
        if not (place := tok.cut(data)) and not warned:
            warned = True
            what = "1 MB of text without a space or a change of script"
            print(f"{what} is cut in two, which may change its tokens", flush=True)
        return place

    with writing_to(work.target):
        buckets = open_buckets(work)
    state = work.state
    settings = worker_settings(work.cfg, state.tokenizer, separate=not work.one_text)
    counts = np.array(state.counts, dtype=np.int64)
    with contextlib.closing(buckets), contextlib.closing(Pool(work.processes, **settings)) as pool:
        for block, about, (ids, fragments, found, times) in read(work, pool, "encode", cut):
            begins = np.maximum.accumulate(np.where(fragments["first"] != 0, np.arange(len(fragments)), -1))
            fragments["key"] = np.where(begins >= 0, fragments["digest"][begins], np.uint64(state.key))
            with writing_to(work.target):
                buckets.add(ids, fragments)
            counts[found] += times
            state.tokens += len(ids)
            state.bytes += about["bytes"]
            state.replaced += about["problems"].count("utf8")
            state.empty += about["problems"].count("empty")
            state.key = int(fragments["key"][-1]) if len(fragments) else state.key
            state.position = block.next
            if time.monotonic() - work.last > COMMIT:
                commit(work, buckets, counts)
        commit(work, buckets, counts)


def open_buckets(work: Work) -> shuffle.Buckets:
    """The buckets of the state. If their files are not complete, everything is encoded again."""
    state = work.state
    dtype = tokenizer.id_dtype(len(state.counts))
    try:
        return shuffle.Buckets(work.folder, state.bits, dtype, state.sizes)
    except (ValueError, FileNotFoundError):
        counts = [0] * len(state.counts)
        work.state = State(state.plan, state.stage, state.tokenizer, bits=state.bits, counts=counts)
        return shuffle.Buckets(work.folder, state.bits, dtype)


def commit(work: Work, buckets: shuffle.Buckets, counts: np.ndarray) -> None:
    """Save what has been done, once all of it is on disk."""
    with writing_to(work.target):
        work.state.sizes = buckets.sizes()
    work.state.counts = counts.tolist()
    work.save()


# -- order and split


def arrange(work: Work) -> None:
    """Write the files of both splits in the work folder."""
    state = work.state
    with writing_to(work.target), contextlib.closing(open_buckets(work)) as buckets:
        if work.one_text and state.tokens <= work.cfg.shard_tokens:
            cut_in_two(work, buckets)
        else:
            draw(work, buckets)
    for split, tokens in state.split["tokens"].items():
        if tokens <= WINDOW:
            raise too_little(work, split)
    state.stage = "publish"
    work.save()


def val_tokens(cfg: PrepareConfig, total: int) -> int:
    """The number of ids, out of all, to validate on."""
    if isinstance(cfg.val_fraction, float):
        return total - int(total * (1 - cfg.val_fraction))
    return min(total - int(total * (1 - VAL_SHARE)), VAL_TOKENS)


def cut_in_two(work: Work, buckets: shuffle.Buckets) -> None:
    """Split one text: its end is validated on. The file of the bucket becomes train.bin, without that end."""
    state, ids = work.state, buckets.path(0, "ids")
    val = val_tokens(work.cfg, state.tokens)
    train = state.tokens - val
    with open(ids, "r+b") as f, files.create(work.folder / "val.bin") as end:
        f.seek(train * buckets.dtype.itemsize)
        shutil.copyfileobj(f, end, BLOCK)
        files.sync(end)
        f.truncate(train * buckets.dtype.itemsize)
        files.sync(f)
    os.replace(ids, work.folder / "train.bin")
    state.files = {"train": ["train.bin"], "val": ["val.bin"]}
    state.split = {"how": "end", "tokens": {"train": train, "val": val}}


def draw(work: Work, buckets: shuffle.Buckets) -> None:
    """Shuffle and split documents. Some are validated on; if they are too large or unequal, the end of each."""
    cfg, state = work.cfg, work.state
    buckets.unique = cfg.drop_duplicates
    masks, total, dropped = shuffle.choose(buckets, lambda n: val_tokens(cfg, n))
    train, val = (shuffle.Sink(work.folder, split, buckets.dtype, cfg.shard_tokens) for split in ("train", "val"))
    if masks is None:
        separator = None if work.one_text else end_of_text(state)
        writes = shuffle.write_ends(buckets, val_tokens(cfg, total) / max(total, 1), separator, train, val)
    else:
        writes = shuffle.write_documents(buckets, masks, train, val, cfg.memory * MEGABYTE // 4)
    with tqdm(total=total, desc="shuffle", unit=" tokens", unit_scale=True, disable=None) as bar:
        for n in writes:
            bar.update(n)
    train.close()
    val.close()
    state.files = {"train": train.names, "val": val.names}
    state.split = {
        "how": "ends" if masks is None else "documents",
        "tokens": {"train": train.tokens, "val": val.tokens},
        "documents": {"train": train.documents, "val": val.documents},
        "dropped": dropped,
    }


def too_little(work: Work, split: str) -> UserError:
    """The UserError about a split that is too small."""
    cfg, state, found = work.cfg, work.state, work.found
    what = {"train": "train on", "val": "validate on"}[split]
    val_share = cfg.val_fraction if isinstance(cfg.val_fraction, float) else VAL_SHARE
    enough = math.ceil((WINDOW + 1) / (val_share if split == "val" else 1 - val_share))
    name = found[0].name if len(found) == 1 else f"the {len(found)} sources"
    left_out = f"; {sources.left_out(state.empty, cfg.field)}" if state.empty else ""
    tokens = state.split["tokens"]
    return UserError(
        f"{name}: too little text: {tokens[split]} tokens to {what}, of {sum(tokens.values()):,}, are less "
        f"than one window of {WINDOW} and the token after it; a text of {enough:,} tokens would do{left_out}"
    )


def publish(work: Work) -> None:
    """Move the new files to their places: a dataset is whole or absent at every moment."""
    target, state = work.target, work.state
    names = [name for group in state.files.values() for name in group]
    with writing_to(target):
        (target / "meta.json").unlink(missing_ok=True)
        for name in names:
            if (work.folder / name).exists():  # otherwise an earlier run has moved it
                os.replace(work.folder / name, target / name)
        for path in target.glob("*.bin"):
            if path.name not in names and re.fullmatch(r"(train|val)(-\d{5})?\.bin", path.name):
                path.unlink()  # of an earlier dataset
        files.flush(target)
        optional: dict[str, Any] = {} if work.one_text else {"separator": end_of_text(state)}
        if len(names) > 2:
            optional["files"] = state.files
        files.write(target / "meta.json", dataset.meta_json(state.tokenizer, len(state.counts), **optional))
        files.flush(target)


def end_of_text(state: State) -> int:
    """The id of the end-of-text token: the last one, unless the tokenizer names another."""
    return state.tokenizer.get("eot", len(state.counts) - 1)


# -- what is printed


def report(work: Work, tok: Tokenizer, seconds: float) -> None:
    """Print what the dataset is, and how to train on it."""
    cfg, state, folder = work.cfg, work.state, work.target
    tokens, peak = state.split["tokens"], peak_memory() + work.peak
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} to validate on: {how_split(state)}")
    per_token = state.bytes / max(state.tokens, 1)
    print(f"tokenizer: {cfg.tokenizer}, {tok.vocab_size:,} tokens in its vocabulary; {per_token:.2f} bytes a token")
    if state.replaced:
        print(f"replaced: {state.replaced:,} places that were not {cfg.encoding.upper()}, each by U+FFFD")
    if state.empty:
        print(sources.left_out(state.empty, cfg.field))
    if state.split.get("dropped"):
        print(f"duplicates: {state.split['dropped']:,} documents dropped, equal to others")
    print(f"commonest tokens: {commonest(tok, state.counts)}")
    memory = f"; at most {megabytes(peak)} of memory, of {cfg.memory} MB" if peak else ""
    print(f"took {seconds:.1f} s for {megabytes(state.bytes)} of text{memory}")
    if cfg.tokenizer == "char" and state.bytes > LARGE:
        hint = "--tokenizer=gpt2 (English) or bpe:8192 (any language)"
        print(f"longer contexts: {hint} make a third or a quarter as many tokens")
    about = dict(name=folder.name, vocab_size=tok.vocab_size, train_tokens=tokens["train"], val_tokens=tokens["val"])
    advise(**about, root=cfg.root, memory=cfg.memory * MEGABYTE - peak_memory(), trial=cfg.trial)


def advise(**about: Any) -> None:
    """Run advice.py, which prints how to train on the dataset. If it fails, a line says so: the dataset exists."""
    if about["trial"]:
        print(
            "trial: once PyTorch is loaded, up to 3 seconds of training show how fast this machine is (--trial=False)"
        )
    sys.stdout.flush()
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    code = "from nanogpt.commands import advice, cli; cli.as_process(advice.main)"
    settings: dict[str, Any] = dict(env=os.environ | {"PYTHONPATH": path}, start_new_session=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(about).encode(), stderr=subprocess.PIPE, **settings
        )
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        why = None if done.returncode in (0, 130, 141) else last or f"its process ended with {done.returncode}"
    except OSError as e:
        why = str(e)
    if why:
        print(f"no advice on how to train: {why}")


def how_split(state: State) -> str:
    """How the validation text was chosen, in words."""
    tokens = state.split["tokens"]
    share = f"the last {tokens['val'] / sum(tokens.values()):.1%} of"
    if state.split["how"] == "end":
        return f"{share} the text"
    train, val = state.split["documents"].values()
    if state.split["how"] == "ends":
        return f"{share} each of the {train:,} documents, which cannot be divided well as wholes"
    return f"{val:,} of {train + val:,} documents, drawn at random"


def commonest(tok: Tokenizer, counts: list[int], n: int = 10) -> str:
    """The `n` commonest tokens and their shares."""
    order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i])[:n]
    return ", ".join(f"{quoted(tok.token_bytes(i))} {counts[i] / sum(counts):.1%}" for i in order)


def quoted(token: bytes) -> str:
    """A token in quotes. Bytes that are not UTF-8, and a combining mark at the beginning, are escaped."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return repr(token)[1:]
    return ascii(text) if unicodedata.category(text[0])[0] == "M" else repr(text)
