"""Any text as a dataset: `nanogpt prepare SOURCE... --dataset=NAME` writes data/NAME/{train.bin,val.bin,meta.json}.

The text is read once to make the tokenizer, where that depends on it, and once to encode it; then its documents are
put in random order and split. What has been done is noted in data/NAME/.prepare/, so that the same command goes on
where an earlier one was stopped, and makes the same bytes.
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
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt import files
from nanogpt.config import PrepareConfig, RunFailed, UserError
from nanogpt.run import settings
from nanogpt.run.signals import Stopped
from nanogpt.text import dataset, shuffle, sources, tokenizer
from nanogpt.text.cutting import last_character
from nanogpt.text.sources import BLOCK, STANDARD_INPUT, CannotWrite, Problems, Source, writing_to
from nanogpt.text.tokenizer import Tokenizer
from nanogpt.text.workers import Pool, cores, peak_memory

VAL_SHARE, VAL_TOKENS = 0.1, 2_000_000  # what is validated on: this part of the text, but no more tokens than enough
WINDOW = 64  # each split must hold one window of so many tokens, and the token after it
LARGE = 50 * 10**6  # bytes of text, for which single characters are short tokens
COMMIT = 5.0  # seconds between notes of what has been done
FEW = 4 * BLOCK  # bytes of text that this process encodes itself, sooner than others start
MEGABYTE = 10**6
FIRST, EACH = 110, 120  # megabytes that the first process and each worker take, at most
LIBRARIES = 250  # and what the libraries for Parquet and the hub take
WINDOW_PACKED = 64  # and what .xz and .zst look back at
TOKENS = {"char": 1.0, "byte": 1.0, "gpt2": 0.3, "bpe": 0.35, "folder": 0.35}  # for each byte of text, roughly
LEAST_TOKENS = {"char": 0.25, "byte": 1.0, "gpt2": 0.2, "bpe": 0.2, "folder": 0.2}  # and at least, for room on the disk


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
    """What has been done, as JSON."""

    plan: dict  # the settings and sources; another plan starts again
    stage: str = "tokenizer"  # then "encode", then "publish": the files are complete and take their places
    tokenizer: dict = field(default_factory=dict)
    position: list = field(default_factory=lambda: [0, 0, 0])  # where the next block begins
    bits: int = 0  # of the number of buckets
    sizes: list = field(default_factory=list)  # of the buckets' files
    key: int = 0  # of the document that goes on in the next block
    bytes: int = 0  # of text
    tokens: int = 0
    documents: int = 0
    replaced: int = 0  # bytes that were no UTF-8, or not in the encoding that was named
    empty: int = 0  # rows and lines without text
    counts: list = field(default_factory=list)  # how often each id occurs
    split: dict = field(default_factory=dict)  # how it was made
    files: dict = field(default_factory=dict)  # {"train": [names], "val": [names]}
    cut: int = -1  # bytes that train.bin keeps, where it is the one bucket itself


class Work:
    """The folder .prepare of a dataset: the state of the preparation, and its temporary files."""

    def __init__(self, folder: Path) -> None:
        self.target, self.folder = folder, folder / ".prepare"
        self.made = []
        with writing_to(folder):
            for new in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                new.mkdir()
                self.made.append(new)
            self.folder.mkdir(exist_ok=True)
        self.lock = self.take_lock()
        self.last, self.processes = time.monotonic(), 0
        self.peak = 0  # bytes of memory of the workers

    @contextlib.contextmanager
    def workers(self, processes: int, **settings) -> Iterator[Pool]:
        """A Pool that is closed at the end."""
        pool = Pool(processes, **settings)
        try:
            yield pool
        finally:
            pool.close()
            self.peak = max(self.peak, pool.peak)

    def take_lock(self) -> files.Lock:
        """Keep other processes out; the lock ends with this process, however it ends."""
        lock = files.Lock(self.folder / "lock")
        with writing_to(self.target):
            try:
                lock.take()
            except BlockingIOError as e:
                raise UserError(f"{self.target}: another `nanogpt prepare` is at work there ({e.strerror})") from None
            lock.sign()
        return lock

    def load(self, plan: dict) -> tuple[State, str | None]:
        """The State to go on from, and a line about it; a new one where there is none, or that of another plan."""
        try:
            found = json.loads(files.read(self.folder / "state.json"))
            state = State(**found)
        except (OSError, ValueError, TypeError):
            return State(plan), None
        if state.plan == plan:
            return state, "going on where the last run stopped"
        return State(plan), f"starting again, not where the last run stopped: {difference(state.plan, plan)}"

    def save(self, state: State) -> None:
        """Note the state, durably."""
        with writing_to(self.target):
            files.write(self.folder / "state.json", json.dumps(asdict(state)).encode())
        self.last = time.monotonic()

    def has_state(self) -> bool:
        """Whether an earlier run left something to go on from."""
        return (self.folder / "state.json").exists()

    def release(self) -> None:
        """Let another process in."""
        self.lock.release()

    def remove(self) -> None:
        """Leave no trace, but of the dataset, new or old."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in reversed(self.made or [self.target]):  # a run before this one may have made it
                folder.rmdir()  # if it is empty


def difference(before: dict, now: dict) -> str:
    """What is another in this plan, in words."""
    changed = [f"--{k}" for k in now["settings"] if before.get("settings", {}).get(k) != now["settings"][k]]
    if changed:
        return f"another {' and '.join(changed)}"
    old = {name: rest for name, *rest in before.get("sources", [])}
    new = {name: rest for name, *rest in now["sources"]}
    if names := [name for name in new if name in old and old[name] != new[name]]:
        return f"{', '.join(names[:3])} {'have' if len(names) > 1 else 'has'} changed"
    return "the sources are others"


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Within, SIGINT and SIGTERM end the preparation with a line on how to go on."""

    def stop(signum, frame):
        signal.signal(signum, signal.SIG_IGN)
        raise Stopped(f"\nstopped; {folder} is as it was, and the same command goes on from here", signum)

    numbers = [signal.SIGINT, signal.SIGTERM]
    before = {}
    with contextlib.suppress(ValueError):  # signals are the main thread's
        before = {s: signal.signal(s, stop) for s in numbers}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def prepare(cfg: PrepareConfig, folder: Path) -> None:
    """The whole preparation. What cannot be prepared leaves no trace; what was only stopped can go on."""
    began = time.monotonic()
    with stoppable(folder):
        tok = given_tokenizer(cfg)
        copied = folder / ".prepare" / "input.txt"
        found, notes = sources.find(
            cfg.arguments,  # type: ignore[attr-defined]  # set by config.load
            folder,
            copied,
            cfg.field,
            cfg.encoding,
        )
        if tok and tok.eot is None and not is_one_text(found):
            raise UserError(
                f"--tokenizer={cfg.tokenizer}: has no end-of-text token to stand between documents; "
                "it can prepare a single file of text, or -"
            )
        work = Work(folder)
        keep = work.has_state()
        try:
            plan = make_plan(cfg, found, work)
            state, line = work.load(plan)
            for note in [*notes, line] if line else notes:
                print(note, flush=True)
            check_disk(cfg, found, state, folder)
            work.processes = choose_workers(cfg, found)
            keep = False
            if state.stage == "tokenizer":
                tok = tok or make_tokenizer(cfg, found, work)
                begin(cfg, found, state, work, tok)
            tok = tok or tokenizer.from_json(state.tokenizer)
            if state.stage == "encode":
                encode(cfg, found, state, work, tok)
                arrange(cfg, found, state, work)
            publish(state, work)
        except (Stopped, CannotWrite, RunFailed):
            raise  # the same command goes on
        except UserError:
            if not keep:
                work.remove()
            raise
        finally:
            work.release()
        peak = peak_memory() + work.peak
        work.remove()
    report(cfg, state, tok, folder, peak, time.monotonic() - began)  # from here on, the dataset is there


# -- before anything is read


def given_tokenizer(cfg: PrepareConfig) -> Tokenizer | None:
    """The tokenizer, where it does not depend on the text, else None. UserError where a package for it is missing."""
    kind, _ = tokenizer.named(cfg.tokenizer)
    try:
        if kind == "bpe":
            tokenizer.import_tiktoken("bpe")
            tokenizer.import_tokenizers()
        if kind == "folder":
            return tokenizer.from_json(dataset.tokenizer_of(cfg.tokenizer))
        return tokenizer.from_json({"type": kind}) if kind in ("byte", "gpt2") else None
    except (ImportError, OSError, UserError) as e:
        raise UserError(f"--tokenizer={cfg.tokenizer}: {e}") from None


def make_plan(cfg: PrepareConfig, found: list[Source], work: Work) -> dict:
    """What decides about every byte of the dataset. Standard input is copied to a file first."""
    for source in found:
        if source.name == STANDARD_INPUT:
            digest = copy_standard_input(Path(source.path))
            about = os.stat(source.path)
            source.size, source.mtime = about.st_size, about.st_mtime_ns
    names = ["tokenizer", "val_fraction", "seed", "shard_tokens", "field", "encoding", "errors", "drop_duplicates"]
    mark = [digest if s.name == STANDARD_INPUT else s.mtime for s in found]
    listed = [[s.name, s.kind, s.packing, s.size, m] for s, m in zip(found, mark, strict=True)]
    return {"settings": {name: getattr(cfg, name) for name in names}, "sources": listed}


def copy_standard_input(path: Path) -> str:
    """Copy standard input to a file, since it has to be read more than once; return its hash."""
    if sys.stdin is None or sys.stdin.closed:
        raise UserError(f"{STANDARD_INPUT}: is closed")
    if sys.stdin.isatty():
        print("reading standard input; Ctrl-D ends it", file=sys.stderr)
    digest, size = hashlib.sha256(), 0
    temporary = path.with_name("input.tmp")
    with writing_to(path.parent), files.create(temporary) as f:
        while data := sys.stdin.buffer.read(BLOCK):
            f.write(data)
            digest.update(data)
            size += len(data)
    if not size:
        raise UserError(f"{STANDARD_INPUT}: is empty")
    os.replace(temporary, path)
    return digest.hexdigest()


def is_one_text(found: list[Source]) -> bool:
    """Whether all there is is one document: then nothing is shuffled, and nothing separated."""
    return len(found) == 1 and found[0].kind == "text"


def check_disk(
    cfg: PrepareConfig, found: list[Source], state: State, folder: Path, tokens: float | None = None
) -> None:
    """Raise UserError where the disk has clearly too little room for what is still to be written."""
    kind, size = tokenizer.named(cfg.tokenizer)
    tokens = tokens or sum(s.text_size() for s in found) * LEAST_TOKENS[kind]
    width = 4 if size and size > 2**16 else 2
    copies = 1 if is_one_text(found) else 2  # one more, out of which documents are drawn
    needed = int(tokens * width * copies) - sum(state.sizes)
    free = shutil.disk_usage(folder).free
    if needed > free and state.stage != "publish":
        hint = "; --tokenizer=gpt2 or bpe:8192 makes fewer tokens" if kind in ("char", "byte") else ""
        raise UserError(f"{folder}: takes about {megabytes(needed)} of disk, and {megabytes(free)} are free{hint}")


def megabytes(n: float) -> str:
    return f"{n / MEGABYTE:,.0f} MB" if n >= 10 * MEGABYTE else f"{n / MEGABYTE:.1f} MB"


def choose_workers(cfg: Any, found: list[Source]) -> int:
    """How many processes to start: one a core, as many as fit the memory, and none for a small text."""
    taken = FIRST + (LIBRARIES if any(s.kind in ("rows", "hf") for s in found) else 0)
    taken += WINDOW_PACKED if any(s.packing in (".xz", ".zst") for s in found) else 0
    fit = max(0, (cfg.memory - taken) // EACH)
    if cfg.workers != "auto":
        if cfg.workers > fit:
            raise UserError(
                f"--workers={cfg.workers}: take up to {taken + EACH * cfg.workers} MB, and --memory is {cfg.memory} MB"
            )
        return cfg.workers
    if sum(s.text_size() for s in found) < FEW and not any(s.kind == "hf" for s in found):
        return 0
    if fit < cores():
        print(
            f"workers: {fit} of {cores()} cores, as --memory={cfg.memory} allows; "
            f"--memory={taken + EACH * cores()} would use all"
        )
    return min(cores(), fit)


def longest_line(cfg: PrepareConfig) -> int:
    """Bytes that a line of .jsonl may have: parsing and encoding it takes many times as much."""
    return max(cfg.memory * MEGABYTE // 64, 2 * BLOCK)


# -- the tokenizer


def make_tokenizer(cfg: PrepareConfig, found: list[Source], work: Work) -> Tokenizer:
    """The tokenizer made from the text."""
    kind, size = tokenizer.named(cfg.tokenizer)
    if size is not None:
        return train_bpe(cfg, found, work, size)
    tok, characters = survey(cfg, found, work, separate=not is_one_text(found))
    check_disk(cfg, found, State({}), work.target, characters)
    return tok


def begin(cfg: PrepareConfig, found: list[Source], state: State, work: Work, tok: Tokenizer) -> None:
    """Note that there is a tokenizer now, and that encoding begins."""
    state.tokenizer = tok.to_json()
    state.counts = [0] * tok.vocab_size
    state.bits = choose_bits(cfg, found, tok.vocab_size)
    state.stage = "encode"
    work.save(state)


def choose_bits(cfg: PrepareConfig, found: list[Source], vocab_size: int) -> int:
    """Of the number of buckets: each is to be small beside the memory."""
    if is_one_text(found):
        return 0
    if any(s.kind == "hf" for s in found):
        return 4  # nobody knows how much it is
    width = np.dtype(tokenizer.id_dtype(vocab_size)).itemsize
    expected = sum(s.text_size() for s in found) * TOKENS[tokenizer.named(cfg.tokenizer)[0]] * width
    return min(shuffle.MAX_BITS, max(0, math.ceil(math.log2(expected / (cfg.memory * MEGABYTE / 8)))))


def survey(cfg: PrepareConfig, found: list[Source], work: Work, separate: bool) -> tuple[tokenizer.CharTokenizer, int]:
    """The tokenizer of all characters that occur, and how many characters there are."""
    present, characters = np.zeros(0x110000, dtype=bool), 0
    present[ord(tokenizer.UNKNOWN)] = True
    with work.workers(work.processes, **worker_settings(cfg)) as pool:
        for _, about, (codes,) in read(cfg, found, State({}), work, pool, "survey", last_character):
            present[codes] = True
            characters += about["characters"]
    chars = [chr(c) for c in np.flatnonzero(present)]
    return tokenizer.CharTokenizer(chars, unknown=tokenizer.UNKNOWN, separated=separate), characters


def train_bpe(cfg: PrepareConfig, found: list[Source], work: Work, size: int) -> Tokenizer:
    """BPE trained on the text, or on as evenly spread a sample of it as fits the memory."""
    # a separate process, unless the text is small: its end gives back the memory that training takes
    settings = worker_settings(cfg) | dict(budget=cfg.memory * MEGABYTE // 2, vocab_size=size)
    with work.workers(min(1, work.processes), **settings) as pool:
        for _ in read(cfg, found, State({}), work, pool, "sample", last_character):
            pass
        print(f"tokenizer: training bpe:{size}", flush=True)
        end = sources.Block("text", [], b"", [], 0)
        ((_, about, _),) = pool.map([end], lambda: "train")
    tok = tokenizer.from_json(about["tokenizer"])
    if about["stride"] > 1:
        print(f"tokenizer: trained on one of {about['stride']} parts of the text, as --memory={cfg.memory} allows")
    if tok.vocab_size < size:
        print(f"tokenizer: {tok.vocab_size} tokens, not {size}: no other pair occurs twice in the text")
    return tok


def worker_settings(cfg: PrepareConfig, tokenizer_json: dict | None = None, separate: bool = False) -> dict:
    """What the workers need to know."""
    return dict(
        tokenizer=tokenizer_json, separate=separate, field=cfg.field, replace=cfg.errors == "replace", seed=cfg.seed
    )


# -- reading and encoding


def read(
    cfg: PrepareConfig, found: list[Source], state: State, work: Work, pool: Pool, task: str, cut: sources.Cut
) -> Iterator[tuple[sources.Block, dict, list[np.ndarray]]]:
    """Yield (block, dict, arrays) for each block from `state.position` on, and show how far it is.

    Where a source is not what it should be, the rest is only checked, and UserError tells everything.
    """
    problems, replace = Problems(), cfg.errors == "replace"
    remedy = "--errors=replace makes each U+FFFD"

    def fatal():
        return any(kind != "empty" and not (kind == "utf8" and replace) for _, kind in problems)

    total = 0 if any(s.kind == "hf" for s in found) else sum(s.size for s in found)
    done = sum(s.size for s in found[: state.position[0]]) + (state.position[1] if state.position[1] < total else 0)
    began, tokens = time.monotonic(), state.tokens
    shown = dict(total=total or None, initial=done, desc=task, unit="B", unit_scale=True, disable=None)
    blocks = sources.blocks(found, state.position, cut, cfg.field, longest_line(cfg), work.folder)
    with tqdm(**shown) as bar:  # on a terminal only
        try:
            for block, about, arrays in pool.map(blocks, lambda: "check" if fatal() else task):
                for source, kind, *what in about["problems"]:
                    problems.note(source, kind, *what)
                if not fatal():
                    yield block, about, arrays
                    if task == "encode":
                        rate = (state.tokens - tokens) / (time.monotonic() - began)
                        bar.set_postfix_str(f"{state.tokens / 1e6:,.1f}M tokens, {rate / 1e6:,.2f}M a second", False)
                bar.update(max(block.done - bar.n, 0))
        except UserError as e:
            if isinstance(e, (CannotWrite, RunFailed, Stopped)):
                raise
            raise UserError(*sources.explain(problems, found, replace, remedy), *e.problems) from None
    if lines := sources.explain(problems, found, replace, remedy):
        raise UserError(*lines)


def encode(cfg: PrepareConfig, found: list[Source], state: State, work: Work, tok: Tokenizer) -> None:
    """Turn all text into ids, in buckets, and note now and then what has been done."""
    separate = not is_one_text(found)
    told: list[str] = []

    def cut(data):
        if not (place := tok.cut(data)) and not told:
            told.append(
                "a stretch of 1 MB without a space or a change of script is cut in two, which may change its tokens"
            )
            print(told[0], flush=True)
        return place

    settings = worker_settings(cfg, state.tokenizer, separate)
    with writing_to(work.target):
        buckets = open_buckets(state, work)
    counts = np.array(state.counts, dtype=np.int64)
    with contextlib.closing(buckets), work.workers(work.processes, **settings) as pool:
        for block, about, (ids, fragments, sparse) in read(cfg, found, state, work, pool, "encode", cut):
            fragments = name_documents(fragments, state.key)
            with writing_to(work.target):
                buckets.add(ids, fragments)
            counts[sparse["id"]] += sparse["n"]
            state.tokens += len(ids)
            state.bytes += about["bytes"]
            for _, kind, _, _, count in about["problems"]:
                state.replaced += count if kind == "utf8" else 0
                state.empty += count if kind == "empty" else 0
            state.documents += int(fragments["first"].sum())
            state.key = int(fragments["key"][-1]) if len(fragments) else state.key
            state.position = block.next
            if time.monotonic() - work.last > COMMIT:
                commit(state, work, buckets, counts)
        commit(state, work, buckets, counts)


def open_buckets(state: State, work: Work) -> shuffle.Buckets:
    """The buckets as the state says; where they have lost something, everything is encoded again."""
    dtype = tokenizer.id_dtype(len(state.counts))
    try:
        return shuffle.Buckets(work.folder, state.bits, dtype, state.sizes)
    except (ValueError, FileNotFoundError):
        fresh = State(state.plan, state.stage, state.tokenizer, bits=state.bits, counts=[0] * len(state.counts))
        vars(state).update(vars(fresh))
        return shuffle.Buckets(work.folder, state.bits, dtype)


def name_documents(fragments: np.ndarray, key: int) -> np.ndarray:
    """A copy with all keys: the digest of each document's first fragment; `key` is that of the one that goes on."""
    place = np.maximum.accumulate(np.where(fragments["first"] != 0, np.arange(len(fragments)), -1))
    fragments = fragments.copy()
    fragments["key"] = np.where(place >= 0, fragments["digest"][place], np.uint64(key))
    return fragments


def commit(state: State, work: Work, buckets: shuffle.Buckets, counts: np.ndarray) -> None:
    """Note what has been done, when all of it is on disk."""
    with writing_to(work.target):
        state.sizes = buckets.sizes()
    state.counts = counts.tolist()
    work.save(state)


# -- order and split


def arrange(cfg: PrepareConfig, found: list[Source], state: State, work: Work) -> None:
    """Write the files of both splits in the work folder."""
    separator = None if is_one_text(found) else end_of_text(state)
    with writing_to(work.target), contextlib.closing(open_buckets(state, work)) as buckets:
        if is_one_text(found) and state.tokens <= cfg.shard_tokens:
            cut_in_two(cfg, state, work, buckets)
        else:
            draw(cfg, state, work, buckets, separator)
    for split, least in state.split["tokens"].items():
        if least <= WINDOW:
            raise too_little(cfg, state, found, split)
    state.stage = "publish"
    work.save(state)


def val_tokens(cfg: Any, total: int) -> int:
    """How many of all ids are validated on."""
    share = VAL_SHARE if cfg.val_fraction == "auto" else cfg.val_fraction
    val = total - int(total * (1 - share))
    return min(val, VAL_TOKENS) if cfg.val_fraction == "auto" else val


def cut_in_two(cfg: PrepareConfig, state: State, work: Work, buckets: shuffle.Buckets) -> None:
    """One text: its end is validated on. The bucket itself becomes train.bin, without that end."""
    val = val_tokens(cfg, state.tokens)
    size = buckets.dtype.itemsize
    state.cut = (state.tokens - val) * size
    with open(buckets.path(0, "ids"), "rb") as ids, files.create(work.folder / "val.bin") as f:
        ids.seek(state.cut)
        shutil.copyfileobj(ids, f, BLOCK)
        files.sync(f)
    state.files = {"train": ["train.bin"], "val": ["val.bin"]}
    state.split = {"how": "end", "tokens": {"train": state.tokens - val, "val": val}}


def draw(cfg: PrepareConfig, state: State, work: Work, buckets: shuffle.Buckets, separator: int | None) -> None:
    """Documents in random order: some are validated on, or where they are too large or unequal, the end of each."""
    masks, total, documents, dropped = shuffle.choose(buckets, lambda n: val_tokens(cfg, n), cfg.drop_duplicates)
    train, val = (shuffle.Sink(work.folder, split, buckets.dtype, cfg.shard_tokens) for split in ("train", "val"))
    with tqdm(total=total, desc="shuffle", unit=" tokens", unit_scale=True, disable=None) as bar:
        if masks is None:
            share = val_tokens(cfg, total) / max(total, 1)
            shuffle.write_ends(buckets, share, cfg.drop_duplicates, separator, train, val, bar.update)
        else:
            limit = cfg.memory * MEGABYTE // 4
            shuffle.write_documents(buckets, masks, cfg.drop_duplicates, train, val, limit, bar.update)
    train.close()
    val.close()
    state.documents = documents
    state.files = {"train": train.names, "val": val.names}
    how = "ends" if masks is None else "documents"
    counts = {"train": train.documents, "val": val.documents}
    tokens = {"train": train.tokens, "val": val.tokens}
    state.split = {"how": how, "tokens": tokens, "documents": counts, "dropped": dropped}


def too_little(cfg: PrepareConfig, state: State, found: list[Source], split: str) -> UserError:
    """The UserError about a split that is too small."""
    what = {"train": "train on", "val": "validate on"}[split]
    share = val_tokens(cfg, 10**6) / 10**6 if cfg.val_fraction != "auto" else VAL_SHARE
    enough = math.ceil((WINDOW + 1) / (share if split == "val" else 1 - share))
    name = found[0].name if len(found) == 1 else f"the {len(found)} sources"
    left_out = f"; {sources.left_out(state.empty, cfg.field)}" if state.empty else ""
    return UserError(
        f"{name}: too little text: {state.split['tokens'][split]} tokens to {what}, of {all_tokens(state):,}, are less "
        f"than one window of {WINDOW} and the token after it; a text of {enough:,} tokens would do{left_out}"
    )


def all_tokens(state: State) -> int:
    """How many tokens the dataset has; `state.tokens` counts duplicates that were dropped as well."""
    return sum(state.split["tokens"].values())


def publish(state: State, work: Work) -> None:
    """Let the new files take their places: a dataset is whole or absent at every moment."""
    target = work.target
    names = [name for group in state.files.values() for name in group]
    with writing_to(target):
        (target / "meta.json").unlink(missing_ok=True)
        bucket = work.folder / "bucket-00.ids"
        if state.cut >= 0 and bucket.exists():
            with open(bucket, "r+b") as f:
                f.truncate(state.cut)
                files.sync(f)
            os.replace(bucket, target / "train.bin")
        for name in names:
            if (work.folder / name).exists():  # otherwise it is in its place already
                os.replace(work.folder / name, target / name)
        for path in target.glob("*.bin"):
            if path.name not in names and re.fullmatch(r"(train|val)(-\d{5})?\.bin", path.name):
                path.unlink()  # of an earlier dataset
        files.flush(target)
        files.write(target / "meta.json", meta_json(state))
        files.flush(target)


def meta_json(state: State) -> bytes:
    """The bytes of meta.json."""
    optional: dict[str, Any] = {} if state.split["how"] == "end" else {"separator": end_of_text(state)}
    if any(len(names) > 1 for names in state.files.values()):
        optional["files"] = state.files
    return dataset.meta_json(state.tokenizer, len(state.counts), **optional)


def end_of_text(state: State) -> int:
    """The id of the end-of-text token: the last one, unless the tokenizer says otherwise."""
    return state.tokenizer.get("eot", len(state.counts) - 1)


# -- what you get told


def report(cfg: PrepareConfig, state: State, tok: Tokenizer, folder: Path, peak: int, seconds: float) -> None:
    """What the dataset is, and how to train on it."""
    tokens = state.split["tokens"]
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
        print(
            "longer contexts: --tokenizer=gpt2 (English) or bpe:8192 (any language) make a third or a quarter as many tokens"
        )
    about = dict(name=folder.name, vocab_size=tok.vocab_size, train_tokens=tokens["train"], val_tokens=tokens["val"])
    advise(**about, root=cfg.root, memory=cfg.memory * MEGABYTE - peak_memory(), trial=cfg.trial)


def advise(**about: Any) -> None:
    """Have advice.py say how to train on the dataset. Where it cannot, a line says so: the dataset is there already."""
    if about["trial"]:
        print(
            "trial: once PyTorch is loaded, up to 3 seconds of training show how fast this machine is (--trial=False)"
        )
    sys.stdout.flush()
    try:
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
        code = "from nanogpt.commands import advice, cli; cli.as_process(advice.main)"
        pipes: dict[str, Any] = dict(
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
        )
        with subprocess.Popen([sys.executable, "-c", code], **pipes, start_new_session=True) as process:
            try:
                _, said = process.communicate(json.dumps(about).encode())
            except KeyboardInterrupt:
                process.kill()
                raise
        last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
        why = None if process.returncode in (0, 130, 141) else last or f"its process ended with {process.returncode}"
    except OSError as e:
        why = str(e)
    if why:
        print(f"no advice on how to train: {why}")


def how_split(state: State) -> str:
    """How validation text was chosen, in words."""
    share = state.split["tokens"]["val"] / max(all_tokens(state), 1)
    if state.split["how"] == "end":
        return f"the last {share:.1%} of the text"
    documents = state.split["documents"]
    if state.split["how"] == "ends":
        return f"the last {share:.1%} of each of the {documents['train']:,} documents, which cannot be divided well as wholes"
    return f"{documents['val']:,} of {documents['train'] + documents['val']:,} documents, drawn at random"


def commonest(tok: Tokenizer, counts: list[int], n: int = 10) -> str:
    """The `n` commonest tokens and their shares."""
    n_of = np.array(counts)
    total = max(n_of.sum(), 1)
    order = np.argsort(-n_of, kind="stable")[:n]
    shown = (quoted(tok.token_bytes(int(i))) for i in order if n_of[i])
    return ", ".join(f"{text} {n_of[i] / total:.1%}" for i, text in zip(order, shown, strict=False))


def quoted(token: bytes) -> str:
    """A token in quotes: bytes that are no character, and marks that would sit on the quote, by their numbers."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return repr(token)[1:]
    return ascii(text) if unicodedata.category(text[0])[0] == "M" else repr(text)
