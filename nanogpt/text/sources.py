"""Reads text as documents from files, folders, globs, standard input, and Hugging Face datasets.

One process lists the sources (`find`) and reads them as blocks of raw bytes (`blocks`); any process can decode a block
(`read_block`). A block records where the next one begins, so that reading can be resumed there.
"""

import codecs
import contextlib
import difflib
import glob
import gzip
import importlib
import json
import lzma
import math
import os
import re
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from nanogpt.config import HUB, UserError, installs, nearest
from nanogpt.text.cutting import last_character

BLOCK = 2**20  # bytes that are read, encoded and kept in memory at a time
MOST_PARTS = 2**16  # of a block: empty rows take memory as well
HEAD = 2**13  # bytes of a file in a folder that decide whether it is text
BOM = b"\xef\xbb\xbf"  # byte order mark in UTF-8
SURROGATES = re.compile("[\ud800-\udfff]")
PACKED = {".gz": 3.5, ".zst": 4.0, ".xz": 5.0}  # and the typical compression ratio of text
ROWS_PACKED = 3.0  # the same for Parquet
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "rows"}  # all others: text, one document per file
SURELY_TEXT = {".txt", ".md", *KINDS}  # in a folder, other files are read only if they look like text
FIRST_LINE = 4 * BLOCK  # bytes of a .json, at most, that are examined to detect JSON lines
STANDARD_INPUT = "standard input"

Cut = Callable[[bytes], int]  # returns the last place where the bytes of a text can be cut, or 0
Piece = tuple["Part", bytes, int]  # the bytes of a Part, and the bytes of the source on disk that have been read


class CannotWrite(UserError):
    """A full disk, for example. What has been written is kept, so that the preparation can be resumed."""


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Within, an OSError becomes a CannotWrite about `folder`."""
    try:
        yield
    except OSError as e:
        why = f"{folder}: cannot be written to ({e.strerror or e})"
        raise CannotWrite(f"{why}; once that is fixed, run the same command again to continue") from None


@dataclass
class Source:
    """A file to read, or a dataset of the hub: `kind` is text, jsonl, rows (Parquet) or hf."""

    name: str  # in messages
    path: str
    kind: str
    packing: str = ""
    size: int = 0  # on disk
    mtime: int = 0  # in nanoseconds
    encoding: str = ""  # of a text, if it is not UTF-8
    undecodable: tuple[int, str] | None = None  # (offset, byte) of the first byte invalid in `encoding`, once met

    def text_size(self) -> int:
        """A rough estimate of its bytes of text; 0 if unknown."""
        return int(self.size * PACKED.get(self.packing, 1.0) * (ROWS_PACKED if self.kind == "rows" else 1.0))


class Part(NamedTuple):
    """A document or a part of one, or many lines of a .jsonl, in a Block."""

    source: int
    offset: int  # in the source; a row's index, for Parquet and hf
    line: int
    size: int  # in bytes
    first: bool  # whether a document begins


@dataclass
class Block:
    """Raw bytes, and the parts of sources that they are. `kind` is text, jsonl or rows."""

    kind: str
    parts: list[Part]
    data: bytes
    next: list[int]  # where the following block begins: [source, offset, line]
    done: int  # bytes of the sources on disk that have been read


@dataclass
class ReadOptions:
    cut: Cut
    field: str  # of JSON lines and rows that holds the text
    longest: float  # bytes that a line or row may have
    folder: Path  # for temporary files


class Document(NamedTuple):
    text: str
    raw: bytes  # the text in UTF-8, as it was read
    first: bool  # whether a document begins; otherwise the last one continues
    source: int = 0


# -- which files


def find(
    arguments: Iterable[str],
    target: Path | None,
    standard_input: Path | None,
    field: str = "text",
    encoding: str = "utf-8",
) -> tuple[list[Source], list[str]]:
    """The sources that the arguments of the command line name, and notes for the user.

    Files in the folder `target` are not read. `standard_input` is the file that it is copied to; `field`, the field
    that a .json with JSON lines has; `encoding`, that of plain text. Raises UserError with all problems.
    """
    finder = Finder(target, "" if codecs.lookup(encoding).name == "utf-8" else encoding)
    sources: dict[str, Source] = {}
    problems: list[str] = []
    for argument in arguments:
        try:
            if argument == "-":
                found = [Source(STANDARD_INPUT, str(standard_input), "text")]
            elif argument == HUB:
                raise UserError("hf: needs a name, such as hf:roneneldan/TinyStories")
            elif argument.startswith(HUB):
                found = [Source(argument, argument[3:], "hf")]
            else:
                found = list(finder.files(argument))
        except UserError as e:
            problems += e.problems
            continue
        for source in found:
            key = source.name if source.kind == "hf" else os.path.realpath(source.path)
            if sources.setdefault(key, source) is not source:
                finder.notes.append(f"{source.name}: was named twice, and is read once")
    if problems:
        raise UserError(*problems)
    finder.notes += recognise_json(sources.values(), field)
    for source in sources.values():
        source.encoding = finder.encoding if source.kind == "text" else ""
    return list(sources.values()), finder.notes


def recognise_json(sources: Iterable[Source], field: str) -> list[str]:
    """Make each .json with JSON lines a source of that kind. Returns notes about how .json files are read."""
    found: dict[str, list[str]] = {"jsonl": [], "text": []}
    for source in sources:
        if source.kind == "text" and source.path.removesuffix(source.packing).lower().endswith(".json"):
            source.kind = "jsonl" if is_json_lines(source, field) else "text"
            found[source.kind].append(source.name)
    how = {"jsonl": f"as JSON lines, with the text in the field {field!r}", "text": "as plain text, not as JSON"}
    return [
        f"{names[0]}: {f'and {len(names) - 1:,} more .json files are' if len(names) > 1 else 'is'} read {how[kind]}"
        for kind, names in found.items()
        if names
    ]


def is_json_lines(source: Source, field: str) -> bool:
    """Whether the first line that is not blank is a JSON object with that field."""
    try:
        with opened(source) as (stream, _):
            head = stream.read(FIRST_LINE).removeprefix(BOM).lstrip()
        found = json.loads(head.partition(b"\n")[0])
    except (UserError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and field in found


class Finder:
    """Finds the files that arguments name, except those in the folder `target`, and collects notes about them."""

    def __init__(self, target: Path | None, encoding: str) -> None:
        self.target, self.encoding = target, encoding
        self.notes: list[str] = []

    def files(self, argument: str) -> Iterator[Source]:
        """Yield the Sources that a path or a glob names."""
        paths = [Path(argument)]
        if not os.path.lexists(argument):
            if not glob.has_magic(argument):
                raise UserError(f"{argument}: there is no such file or folder{nearest_path(paths[0])}")
            paths = [Path(p) for p in sorted(glob.glob(argument, recursive=True))]
            if not paths:
                raise UserError(f"{argument}: matches no file")
        several = len(paths) > 1
        empty = [path for path in paths if several and path.is_file() and path.stat().st_size == 0]
        if empty:  # as those in a folder, which often has some, such as Python's __init__.py
            self.notes.append(f"{argument}: left out {len(empty):,} empty file{'s' if len(empty) > 1 else ''}")
            paths = [path for path in paths if path not in set(empty)]
            if not paths:
                raise UserError(f"{argument}: matches only empty files")
        for path in paths:
            if path.is_dir():
                yield from self.in_folder(path, required=not several)
            elif not several or not self.is_own(path):
                yield describe(path)

    def in_folder(self, folder: Path, required: bool) -> Iterator[Source]:
        """Yield the Sources in a folder and its subfolders, in the order of their names, except hidden ones.

        If there are none, that is an error if one is `required`, and a note otherwise.
        """
        found, left_out = 0, []
        for path in walk(folder):
            if not path.is_file() or self.is_own(path) or path.stat().st_size == 0:
                continue
            source = describe(path)
            if looks_like_text(replace(source, encoding=self.encoding if source.kind == "text" else "")):
                found += 1
                yield source
            else:
                left_out.append(path.suffix or path.name)
        if left_out:
            kinds = ", ".join(sorted(set(left_out))[:5])
            files = "file that is" if len(left_out) == 1 else "files that are"
            self.notes.append(f"{folder}: left out {len(left_out):,} {files} not text ({kinds})")
        if not found and required:
            raise UserError(f"{folder}: holds no text")
        if not found and not left_out:
            self.notes.append(f"{folder}: holds no text")

    def is_own(self, path: Path) -> bool:
        """Whether the path is in the folder that is written to."""
        return self.target is not None and Path(os.path.realpath(self.target)) in Path(os.path.realpath(path)).parents


def walk(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder and its subfolders, without hidden ones; then those in folders that links name.

    Each folder is visited once, however many links lead to it.
    """
    waiting: list[str | Path] = [folder]
    seen = set()
    for top in waiting:  # which grows in the loop
        for here, folders, names in os.walk(top, onerror=refuse):
            real = os.path.realpath(here)
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
            waiting += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            yield from (Path(here, name) for name in sorted(names) if not name.startswith(".") and real not in seen)
            seen.add(real)


def refuse(error: OSError) -> NoReturn:
    """Called by os.walk for a folder that cannot be read."""
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def describe(path: Path) -> Source:
    """The Source for a file. Raises UserError if it cannot be read, is empty, or is an archive of several files."""
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    inner = path.with_suffix("").suffix.lower() if packing else path.suffix.lower()
    if inner in (".tar", ".tgz", ".zip"):
        raise UserError(f"{path}: is an archive of files; unpack it and give the folder")
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: is not a regular file; use - to read standard input")
        open(path, "rb").close()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if about.st_size == 0:
        raise UserError(f"{path}: is empty")
    return Source(str(path), str(path), KINDS.get(inner, "text"), packing, about.st_size, about.st_mtime_ns)


def looks_like_text(source: Source) -> bool:
    """Whether to read a file in a folder: decided by its name, otherwise by its first bytes."""
    if Path(source.path.removesuffix(source.packing)).suffix.lower() in SURELY_TEXT:
        return True
    try:
        with opened(source) as (stream, _):
            head = stream.read(HEAD)
        head[: last_character(head) or len(head)].decode("utf-8")
    except (UserError, UnicodeDecodeError):
        return False
    return b"\0" not in head


def nearest_path(path: Path) -> str:
    """'; did you mean FILE?' for a mistyped path, or nothing."""
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.5)
    except OSError:
        return ""
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def check_unchanged(source: Source) -> None:
    """Raise UserError if a file has changed since it was found."""
    if source.kind != "hf":
        about = describe(Path(source.path))
        if (about.size, about.mtime) != (source.size, source.mtime):
            raise UserError(f"{source.name}: was changed while it was read; start again")


# -- raw bytes


class Recoded:
    """A stream of text in another encoding, read as UTF-8. What cannot be decoded becomes the byte 0xFF, invalid there."""

    def __init__(self, stream: Any, source: Source) -> None:
        self.stream, self.source = stream, source
        self.taken, self.ready, self.ended = 0, b"", False
        codecs.register_error("nanogpt.text.sources", self.undecodable)  # one text is read at a time
        self.decoder = codecs.getincrementaldecoder(source.encoding)("nanogpt.text.sources")

    def read(self, size: int) -> bytes:
        """`size` bytes of UTF-8, or fewer at the end."""
        while len(self.ready) < size and not self.ended:
            data = self.stream.read(BLOCK)
            self.taken, self.ended = self.taken + len(data), not data
            try:
                text = self.decoder.decode(data, self.ended)
            except UnicodeError as e:  # without a call of the error handler: UTF-16 or UTF-32 has no byte order mark
                name = self.source.encoding
                hint = f"; {name}-le and {name}-be need none" if "BOM" in str(e) else ""
                raise UserError(f"{self.source.name}: is not {name} ({e}){hint}") from None
            self.ready += SURROGATES.sub("\udcff", text).encode("utf-8", "surrogateescape")  # such as UTF-7 may hold
        data, self.ready = self.ready[:size], self.ready[size:]
        return data

    def seek(self, offset: int) -> None:
        """Skip `offset` bytes of UTF-8 from the beginning."""
        while offset and (data := self.read(min(offset, BLOCK))):
            offset -= len(data)

    def undecodable(self, error: Any) -> tuple[str, int]:
        """The error handler of the codec."""
        place = self.taken - len(error.object) + error.start
        self.source.undecodable = self.source.undecodable or (place, f"0x{error.object[error.start]:02x}")
        return "\udcff", error.end


Stream = BinaryIO | Recoded  # of unpacked bytes: `read` returns fewer than asked for only at the end


@contextlib.contextmanager
def opened(source: Source) -> Iterator[tuple[Stream, BinaryIO]]:
    """(a stream of the unpacked bytes, the raw file) of a Source. Within, read errors become UserErrors about it."""
    unpack, damage = decompressor(source)
    try:
        with open(source.path, "rb") as raw, unpack(raw) as stream:
            yield (Recoded(stream, source) if source.encoding else stream), raw
    except EOFError:
        raise UserError(f"{source.name}: is cut short: the archive ends before its text does") from None
    except damage as e:
        raise UserError(f"{source.name}: is not a valid {source.packing} archive ({e})") from None
    except OSError as e:
        raise UserError(f"{source.name}: cannot be read: {e.strerror or e}") from None


def decompressor(source: Source) -> tuple[Callable[[BinaryIO], Any], tuple[type[Exception], ...]]:
    """The function that opens a stream of unpacked bytes, and the errors that damaged data cause."""
    if source.packing == ".gz":
        return gzip.open, (gzip.BadGzipFile, zlib.error)
    if source.packing == ".xz":
        return lzma.open, (lzma.LZMAError,)
    if source.packing != ".zst":
        return contextlib.nullcontext, ()
    zstd = require(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", f"{source.name}: reading .zst"
    )
    return zstd.open, (zstd.ZstdError,)


def require(package: str, purpose: str) -> Any:
    """An optional package. If it is missing, the UserError names the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{purpose} takes {installs('data')}") from None


def blocks(sources: list[Source], start: list[int], options: ReadOptions) -> Iterator[Block]:
    """Yield the Blocks of all sources, from the place `start` = [source, offset, line] on. Small texts share a block."""
    pending: list[tuple[Part, bytes]] = []
    begin, offset, line = start
    size, kind, done, before = 0, "", 0, sum(s.size for s in sources[:begin])

    def pack(after: list[int]) -> Block:
        return Block(kind, [part for part, _ in pending], b"".join(data for _, data in pending), after, done)

    for number, source in enumerate(sources[begin:], begin):
        read, its_kind = (read_rows, "rows") if source.kind in ("rows", "hf") else (read_stream, source.kind)
        for part, data, at in read(source, [number, offset, line], options):
            full = size >= BLOCK // 2 or size + len(data) > BLOCK or len(pending) == MOST_PARTS
            if pending and (full or kind != its_kind):
                yield pack(list(part[:3]))
                pending, size = [], 0
            pending.append((part, data))
            size, kind, done = size + len(data), its_kind, before + at
        check_unchanged(source)
        before += source.size
        offset = line = 0
    done = before
    if pending:
        yield pack([len(sources), 0, 0])


def read_stream(source: Source, start: list[int], options: ReadOptions) -> Iterator[Piece]:
    """Yield the Pieces of a text or .jsonl."""
    number, offset, line = start
    jsonl = source.kind == "jsonl"
    with opened(source) as (stream, raw):
        stream.seek(offset)
        pieces = line_pieces(stream, source, line, options.longest) if jsonl else text_pieces(stream, options.cut)
        for data in pieces:
            yield Part(number, offset, line, len(data), jsonl or offset == 0), data, raw.tell()
            offset += len(data)
            line += data.count(b"\n")


def text_pieces(stream: Stream, cut: Cut) -> Iterator[bytes]:
    """Yield the bytes of a text, cut where `cut` says; if it finds no place, after a whole character."""
    data = stream.read(BLOCK)
    while len(data) == BLOCK:
        place = cut(data) or last_character(data)
        yield data[:place]
        data = data[place:] + stream.read(place)
    if data:
        yield data


def line_pieces(stream: Stream, source: Source, line: int, longest: float) -> Iterator[bytes]:
    """Yield the bytes of whole lines, about a block at a time. Raises UserError if a line is longer than `longest`."""
    rest: list[bytes] = []
    size = 0
    while data := stream.read(BLOCK):
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, data[:end]])
            line += data.count(b"\n")
            rest, size = [], 0
        rest.append(data[end:])
        size += len(rest[-1])
        if size > longest:
            raise too_long(f"{source.name}:{line + 1}: the line", longest)
    if size:
        yield b"".join(rest)


def too_long(what: str, longest: float) -> UserError:
    """The UserError about a line or row that needs too much memory."""
    return UserError(
        f"{what} is longer than {longest / 1e6:,.0f} MB, the limit that --memory sets; "
        "a larger --memory allows longer ones"
    )


def read_rows(source: Source, start: list[int], options: ReadOptions) -> Iterator[Piece]:
    """Yield a Piece for each row of a Parquet file or a dataset of the hub; its offset is the row's index."""
    number, row, _ = start
    rows = hub_rows(source, row, options.field) if source.kind == "hf" else parquet_rows(source, row, options)
    try:
        for value, done in rows:
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
            elif value is None:
                value = b""  # left out, as all rows without text
            elif not isinstance(value, memoryview):
                what = f"row {row + 1}: the field {options.field!r} holds {type(value).__name__}, not text"
                raise UserError(f"{source.name}: {what}")
            if len(value) > options.longest:
                raise too_long(f"{source.name}: row {row + 1}", options.longest)
            yield Part(number, row, 0, len(value), True), bytes(value), done
            row += 1
    except MemoryError:
        raise UserError(f"{source.name}: row {row + 1}, or one soon after it, does not fit the memory") from None


def parquet_rows(source: Source, row: int, options: ReadOptions) -> Iterator[tuple[Any, int]]:
    """Yield (value, bytes of the file read) from a row of a Parquet file on; a text is its bytes, not yet decoded."""
    pyarrow, parquet = (require(name, f"{source.name}: reading .parquet") for name in ("pyarrow", "pyarrow.parquet"))
    with opened(source) as (stream, raw), contextlib.ExitStack() as stack:
        if source.packing:  # Parquet is read from its end, so it is unpacked to a file first
            raw = stack.enter_context(tempfile.TemporaryFile(dir=options.folder))
            while data := stream.read(BLOCK):
                with writing_to(options.folder):
                    raw.write(data)
        try:
            file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK)
            require_field(source, options.field, file.schema_arrow.names)
            end = 0
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                begin, end = end, end + about.num_rows
                if end <= row:
                    continue
                columns = map(about.column, range(about.num_columns))
                column_size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == options.field)
                if column_size > options.longest * about.num_rows + BLOCK:  # so one of its rows must be too long
                    which = f"row {end}" if about.num_rows == 1 else f"a row from row {begin + 1} on"
                    raise too_long(f"{source.name}: {which}", options.longest)
                size = max(1, min(1024, BLOCK * about.num_rows // max(about.total_byte_size, 1)))
                batches = file.iter_batches(size, row_groups=[group], columns=[options.field])
                values = (value for batch in batches for value in raw_values(batch.column(0), pyarrow))
                for n, value in enumerate(values, begin + 1):
                    if n > row:
                        yield value, source.size * n // file.metadata.num_rows
        except MemoryError:
            raise
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{source.name}: is not a valid Parquet file ({first_line(e)})") from None


def raw_values(column: Any, pyarrow: Any) -> Iterator[Any]:
    """Yield the values of a column; texts as views of their bytes, neither decoded nor copied."""
    types, kind = pyarrow.types, column.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":  # new in pyarrow 16
        for value in column.cast(kind).cast(pyarrow.large_binary()):
            yield memoryview(value.as_buffer()) if value.is_valid else None
    else:
        yield from column.to_pylist()


def hub_rows(source: Source, row: int, field: str) -> Iterator[tuple[Any, int]]:
    """Yield (value, 0) from a row of a dataset on: one of the Hugging Face hub, or a folder in its format; streamed."""
    datasets = require("datasets", f"{source.name}: reading it")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below, once
    name, _, config = source.path.partition(":")
    try:
        found = stream_dataset(datasets, name, config or None)
        require_field(source, field, list(next(iter(found), {field: None})))
        for example in found.skip(row):
            yield example[field], 0
    except UserError:
        raise
    except Exception as e:  # each kind of dataset raises its own errors
        cause = e.__cause__ or e
        raise UserError(f"{source.name}: cannot be loaded: {type(cause).__name__}: {first_line(cause)}") from None


def stream_dataset(datasets: Any, name: str, config: str | None) -> Any:
    """The rows of the split `train`. No loading script of a dataset is run: `datasets` has not done so since 4.0."""
    try:
        return datasets.load_dataset(name, config, split="train", streaming=True)
    except (RuntimeError, ValueError) as e:
        if "script" not in str(e) and "trust_remote_code" not in str(e):
            raise
    print(f"Using the hub's conversion of {name} to Parquet, since the original needs a script to load it.")
    return datasets.load_dataset(name, config, revision="refs/convert/parquet", split="train", streaming=True)


def require_field(source: Source, field: str, names: list[str]) -> None:
    if field not in names:
        raise UserError(
            f"--field={field}: {source.name} has no such column; it has {', '.join(names)}{nearest(field, names)}"
        )


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# -- text


class Problems(dict[tuple[int, str], tuple[int, str, int]]):
    """What in the sources is not text: {(source, kind): (place of the first, description, count)}.

    The kind is binary, line, utf8, or empty (rows without text, which are only counted).
    """

    def note(self, source: int, kind: str, where: int, what: str, count: int = 1) -> None:
        where, what, before = self.get((source, kind), (where, what, 0))
        self[source, kind] = where, what, before + count

    def add(self, others: "Problems") -> None:
        for (source, kind), value in others.items():
            self.note(source, kind, *value)

    def count(self, kind: str) -> int:
        return sum(count for (_, k), (_, _, count) in self.items() if k == kind)


def read_block(block: Block, field: str, replace: bool) -> tuple[list[Document], Problems]:
    """The documents of a block, and the problems in it.

    With `replace`, bytes that are not UTF-8 become U+FFFD, and are still counted as problems. Rows and lines without
    text are left out, and counted as well.
    """
    reader = BlockReader(field, replace)
    begin = 0
    for part in map(Part._make, block.parts):
        raw = block.data[begin : begin + part.size]
        begin += part.size
        if part.offset == 0:
            raw = raw.removeprefix(BOM)
        if block.kind == "jsonl":
            reader.read_lines(raw, part)
        else:
            reader.read_text(raw, part, row=block.kind == "rows")
    return reader.documents, reader.problems


class BlockReader:
    """Collects the documents and the problems of a block."""

    def __init__(self, field: str, replace: bool) -> None:
        self.field, self.replace = field, replace
        self.documents: list[Document] = []
        self.problems = Problems()

    def read_text(self, raw: bytes, part: Part, row: bool) -> None:
        """Read a row or a part of a text. In a text, a NUL character is a sign of a binary file."""
        zero = -1 if row else raw.find(b"\0")
        if zero >= 0:
            utf16 = part.offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            what = "; it looks like UTF-16, which --encoding=utf-16 reads" if utf16 else ""
            self.problems.note(part.source, "binary", part.offset + zero, what)
        elif text := self.decode(raw, part.source, lambda e: part.offset + (1 if row else e.start)):
            self.documents.append(Document(text, raw, part.first, part.source))
        elif row and not raw:
            self.problems.note(part.source, "empty", part.offset + 1, "")

    def decode(self, raw: bytes, source: int, place: Callable[[UnicodeDecodeError], int]) -> str:
        """The text of UTF-8. If it is invalid, that is a problem at `place`, and the text is empty unless replaced."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            text = raw.decode("utf-8", "replace")
            count = text.count("\ufffd") - raw.count("\ufffd".encode())
            self.problems.note(source, "utf8", place(e), f"0x{raw[e.start]:02x}", count)
            return text if self.replace else ""

    def read_lines(self, raw: bytes, part: Part) -> None:
        """Read lines of JSON."""
        first = part.line == 0
        for line, row in enumerate(raw.split(b"\n"), part.line + 1):
            if row.strip():
                self.read_line(row, part.source, line, first)
                first = False

    def read_line(self, row: bytes | str, source: int, line: int, first: bool) -> None:
        """Read an object whose field is text or null. The field may be missing, except in the first line of a file."""
        field, note = self.field, self.problems.note
        try:
            found = json.loads(row)
        except UnicodeDecodeError as error:
            if text := self.decode(error.object, source, lambda e: line):
                self.read_line(text, source, line, first)
            return
        except (ValueError, RecursionError) as e:
            why = f"{e.msg}: column {e.colno}" if isinstance(e, json.JSONDecodeError) else type(e).__name__
            return note(source, "line", line, f"is not JSON ({why})")
        if not isinstance(found, dict):
            note(source, "line", line, "expected an object with a field for the text")
        elif field not in found and first:  # probably another name, or another kind of file
            there = ", ".join(list(found)[:8]) or "nothing"
            note(source, "line", line, f"has no field {field!r}, but {there}{nearest(field, list(found))}")
        elif found.get(field) in ("", None):
            note(source, "empty", line, "")
        elif not isinstance(found[field], str):
            note(source, "line", line, f"the field {field!r} holds {type(found[field]).__name__}, not text")
        else:
            text, count = SURROGATES.subn("\ufffd", found[field])
            if count:
                note(source, "utf8", line, "half of a surrogate pair", count)
            self.documents.append(Document(text, text.encode("utf-8"), True, source))


def read_whole(sources: list[Source], field: str) -> tuple[list[tuple[int, str]], int]:
    """[(a source's index, text), ...] of all documents in order, and the number of rows and lines without text.

    Raises UserError with everything in them that is not text.
    """
    found: list[tuple[int, list[str]]] = []
    problems = Problems()
    options = ReadOptions(lambda data: 0, field, math.inf, Path(tempfile.gettempdir()))
    for block in blocks(sources, [0, 0, 0], options):
        documents, more = read_block(block, field, False)
        problems.add(more)
        for document in documents:
            if document.first or not found:
                found.append((document.source, []))
            found[-1][1].append(document.text)
    if lines := explain(problems, sources, False):
        raise UserError(*lines)
    return [(source, "".join(texts)) for source, texts in found], problems.count("empty")


def explain(problems: Problems, sources: list[Source], replace: bool, remedy: str = "") -> list[str]:
    """A line for each source that cannot be read as text: what is wrong, where, and how often.

    `remedy`: what else helps against invalid bytes, besides naming the encoding of a plain text.
    """
    lines = []
    for number in sorted({source for source, _ in problems}):
        source = sources[number]
        name, place = source.name, {"text": "byte", "jsonl": "line"}.get(source.kind, "row")
        if found := problems.get((number, "binary")):
            lines.append(f"{name}: is not text: byte {found[0]} is 0x00{found[1]}")
        elif found := problems.get((number, "line")):
            others = found[2] - 1
            more = f" (and {others:,} more {'line' if others == 1 else 'lines'} like that)" if others else ""
            lines.append(f"{name}:{found[0]}: {found[1]}{more}")
        elif (found := problems.get((number, "utf8"))) and not replace:
            where, what = source.undecodable or found[:2]
            many = f"{found[2]:,} places, the first" if found[2] > 1 else "1 place,"
            name_it = "--encoding=latin-1 or another name reads other encodings" if place == "byte" else ""
            hint = ", ".join(filter(None, [name_it if not source.encoding else "", remedy]))
            line = f"{name}: is not {source.encoding or 'UTF-8'} in {many} at {place} {where} ({what})"
            lines.append(f"{line}; {hint}" if hint else line)
    return lines


def left_out(count: int, field: str) -> str:
    """A line about rows and lines without text."""
    rows = "row or line" if count == 1 else "rows or lines"
    return f"left out: {count:,} {rows} without text (empty, null, or without the field {field!r})"
