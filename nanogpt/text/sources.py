"""Where text comes from: files, folders, globs, standard input and Hugging Face datasets, as documents.

One process lists the sources (`find`) and reads them as blocks of raw bytes (`blocks`); any process can turn a block
into text (`read_block`). A block says where the next one begins, so that reading can go on there another time.
"""

import codecs
import contextlib
import difflib
import glob
import gzip
import json
import lzma
import math
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from nanogpt.config import UserError, installs, nearest
from nanogpt.text.cutting import last_character

BLOCK = 2**20  # bytes that are read, encoded and kept in memory at a time
MOST_PARTS = 2**16  # of a block: rows that hold nothing take memory as well
HEAD = 2**13  # bytes of a file in a folder that tell whether it is text
BOM = b"\xef\xbb\xbf"  # the mark that some editors put before UTF-8; it is not text
PACKED = {".gz": 3.5, ".zst": 4.0, ".xz": 5.0}  # and how much larger text is unpacked, roughly
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "rows"}  # all others: text, one document a file
FIRST_LINE = 4 * BLOCK  # bytes of a .json, at most, that tell whether it is lines of JSON all the same
ROWS_PACKED = 3.0  # the same for Parquet
SURELY_TEXT = {".txt", ".md", *KINDS}  # in a folder, others are left out where they do not look like text
STANDARD_INPUT = "standard input"

Cut = Callable[[bytes], int]  # the last place where the bytes of a text can be cut, or 0
Document = tuple[str, bytes, bool]  # its text, its raw bytes, and whether a document starts with it
Piece = tuple[list, bytes, list[int], int]  # ([offset, line, bytes, first], bytes, [offset, line] after it, bytes read)


class Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


class CannotWrite(UserError):
    """A full disk, and the like: what has been written is kept, to go on from."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"{folder}: cannot be written to ({error.strerror or error}); when that is mended, the same command goes on"
        )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Within, an OSError is a CannotWrite about `folder`."""
    try:
        yield
    except OSError as e:
        raise CannotWrite(folder, e) from None


@dataclass
class Source:
    """A file to read, or a dataset of the hub: `kind` is text, jsonl, rows (Parquet) or hf."""

    name: str  # as messages call it
    path: str
    kind: str
    packing: str = ""
    size: int = 0  # on disk
    mtime: int = 0  # in nanoseconds
    encoding: str = ""  # of a text, where that is not UTF-8
    undecodable: tuple | None = (
        None  # (place, byte) of the first byte that is not in that encoding, when it has been met
    )

    def text_size(self) -> int:
        """How many bytes of text it holds, roughly; 0 where nobody knows."""
        return int(self.size * PACKED.get(self.packing, 1.0) * (ROWS_PACKED if self.kind == "rows" else 1.0))


@dataclass
class Block:
    """Raw bytes, and what they are.

    `kind` is text, jsonl or rows. `parts` are [source, offset, line, bytes, first]: a document or a part of one, with
    its place in the source (a row's number, for Parquet and hf), or many lines of a .jsonl. `first`: a document begins.
    """

    kind: str
    parts: list
    data: bytes
    next: list  # where the following block begins: [source, offset, line]
    done: int  # bytes of the sources on disk that have been read


# -- which files


def find(
    arguments: list[str], target: Path | None, standard_input: Path | None, field: str = "text", encoding: str = "utf-8"
) -> tuple[list[Source], list[str]]:
    """(sources, notes) for the arguments of the command line; UserError with all that is wrong with them.

    `target`: the folder that is written to, where nothing is read, or None. `standard_input`: the file that it is copied
    to. `field`: that a .json of JSON lines has. `encoding`: of plain text.
    """
    sources: list[Source] = []
    notes: list[str] = []
    problems, seen = [], set()
    encoding = "" if codecs.lookup(encoding).name == "utf-8" else encoding
    for argument in arguments:
        try:
            if argument == "-":
                found = [Source(STANDARD_INPUT, str(standard_input), "text")]
            elif argument == "hf:":
                raise UserError("hf: needs a name, as in hf:roneneldan/TinyStories")
            elif argument.startswith("hf:"):
                found = [Source(argument, argument[3:], "hf")]
            else:
                found = list(find_files(argument, target, notes, encoding))
        except UserError as e:
            problems += e.problems
            continue
        for source in found:
            key = os.path.realpath(source.path) if source.kind != "hf" else source.name
            if key in seen:
                notes.append(f"{source.name}: was named twice, and is read once")
            else:
                sources.append(source)
            seen.add(key)
    if problems:
        raise UserError(*problems)
    notes += recognise_json(sources, field)
    for source in sources:
        source.encoding = encoding if source.kind == "text" else ""
    return sources, notes


def recognise_json(sources: list[Source], field: str) -> list[str]:
    """Have each .json that is JSON lines, as many corpora are, read so. Lines about how .json files are read."""
    found: dict[str, list[str]] = {"jsonl": [], "text": []}
    for source in sources:
        if source.kind == "text" and source.path.removesuffix(source.packing).lower().endswith(".json"):
            source.kind = "jsonl" if is_json_lines(source, field) else "text"
            found[source.kind].append(source.name)
    how = {"jsonl": f"as JSON lines, with the text in the field {field!r}", "text": "as plain text, braces and all"}
    return [
        f"{names[0]}: {f'and {len(names) - 1:,} more .json files are' if len(names) > 1 else 'is'} read {how[kind]}"
        for kind, names in found.items()
        if names
    ]


def is_json_lines(source: Source, field: str) -> bool:
    """Whether the first line that is not blank is a JSON object with that field."""
    try:
        with opened(source) as (stream, _):
            head = b""
            while b"\n" not in head and len(head) < FIRST_LINE and (data := stream.read(HEAD)):
                head = (head + data).removeprefix(BOM).lstrip()
        found = json.loads(head.partition(b"\n")[0])
    except (UserError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and field in found


def find_files(argument: str, target: Path | None, notes: list[str], encoding: str) -> Iterator[Source]:
    """Yield the Sources that a path or a glob names."""
    path = Path(argument)
    if os.path.lexists(argument):
        paths = [path]
    elif glob.has_magic(argument):
        paths = [Path(p) for p in sorted(glob.glob(argument, recursive=True))]
        if not paths:
            raise UserError(f"{argument}: matches no file")
    else:
        raise UserError(f"{argument}: there is no such file or folder{nearest_path(path)}")
    for path in paths:
        if path.is_dir():
            yield from find_in_folder(path, target, notes, encoding, required=len(paths) == 1)
        elif not (len(paths) > 1 and is_inside(path, target)):
            yield describe(path)


def find_in_folder(
    folder: Path, target: Path | None, notes: list[str], encoding: str, required: bool
) -> Iterator[Source]:
    """Yield the Sources in a folder and those below it, in the order of their names, but hidden ones.

    Where there are none, that is an error if it is `required` that there be some, and a note otherwise.
    """
    found, left_out = 0, []
    for path in walk(folder):
        if not path.is_file() or is_inside(path, target) or path.stat().st_size == 0:
            continue
        source = describe(path)
        if looks_like_text(replace(source, encoding=encoding if source.kind == "text" else "")):
            found += 1
            yield source
        else:
            left_out.append(path.suffix or path.name)
    if left_out:
        kinds = ", ".join(sorted(set(left_out))[:5])
        notes.append(
            f"{folder}: left out {len(left_out):,} {'file that is' if len(left_out) == 1 else 'files that are'} not text ({kinds})"
        )
    if not found and required:
        raise UserError(f"{folder}: holds no text")
    if not found and not left_out:
        notes.append(f"{folder}: holds no text")


def walk(folder: Path) -> Iterator[Path]:
    """Yield the paths in a folder and in those below it, without hidden ones; then those in folders that links name.

    Each folder is gone through once, whatever links there are to it.
    """
    waiting: list[str | Path] = [folder]
    seen = set()
    for top in waiting:  # which grows meanwhile
        for here, folders, names in os.walk(top, onerror=refuse):
            real = os.path.realpath(here)
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
            waiting += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            yield from (Path(here, name) for name in sorted(names) if not name.startswith(".") and real not in seen)
            seen.add(real)


def refuse(error: OSError) -> NoReturn:
    """What os.walk does with a folder that cannot be read."""
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def is_inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def describe(path: Path) -> Source:
    """The Source that a file is. UserError where it cannot be read, is empty or an archive of several files."""
    packing = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    inner = path.with_suffix("").suffix.lower() if packing else path.suffix.lower()
    if inner in (".tar", ".tgz", ".zip"):
        raise UserError(f"{path}: is an archive of files; unpack it and give the folder")
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: is no regular file; a - in its place reads standard input")
        open(path, "rb").close()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if about.st_size == 0:
        raise UserError(f"{path}: is empty")
    return Source(str(path), str(path), KINDS.get(inner, "text"), packing, about.st_size, about.st_mtime_ns)


def looks_like_text(source: Source) -> bool:
    """Whether a file in a folder is to be read: by its name, otherwise by how it begins."""
    path = Path(source.path.removesuffix(source.packing))
    if path.suffix.lower() in SURELY_TEXT:
        return True
    try:
        with opened(source) as (stream, _):
            head = read_full(stream, HEAD)
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
    """Raise UserError where a file is not any more what it was when it was found."""
    if source.kind == "hf":
        return
    try:
        about = os.stat(source.path)
    except OSError as e:
        raise UserError(f"{source.name}: cannot be read any more: {e.strerror}") from None
    if (about.st_size, about.st_mtime_ns) != (source.size, source.mtime):
        raise UserError(f"{source.name}: was changed while it was read; start again")


# -- raw bytes


@contextlib.contextmanager
def opened(source: Source) -> Iterator[tuple[Stream, BinaryIO]]:
    """(a stream of the unpacked bytes, the raw file) of a Source; what goes wrong within is a UserError about it."""
    try:
        with open(source.path, "rb") as raw:
            with unpacked(source, raw) as stream:
                yield (Recoded(stream, source) if source.encoding else stream), raw
    except EOFError:
        raise UserError(f"{source.name}: is cut short: the archive ends before its text does") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error) as e:
        raise UserError(f"{source.name}: is no sound {source.packing} archive ({e})") from None
    except OSError as e:
        raise UserError(f"{source.name}: cannot be read: {e.strerror or e}") from None


@contextlib.contextmanager
def unpacked(source: Source, raw: BinaryIO) -> Iterator[Any]:
    """The stream of bytes that are packed in the file `raw`."""
    if source.packing == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    elif source.packing == ".xz":
        with lzma.LZMAFile(raw) as stream:
            yield stream
    elif source.packing == ".zst":
        zstd = import_zstd(source)
        try:
            with zstd.ZstdFile(raw) as stream:
                yield stream
        except zstd.ZstdError as e:
            raise UserError(f"{source.name}: is no sound .zst archive ({e})") from None
    else:
        yield raw


def import_zstd(source: Source) -> Any:
    """Python's own module where it has one (3.14), otherwise the backport of it."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(f"{source.name}: reading .zst takes {installs('data')}") from None
    return zstd


def read_full(stream: Stream, size: int) -> bytes:
    """`size` bytes, or fewer where the stream ends."""
    data = stream.read(size)
    if len(data) == size or not data:
        return data
    parts = [data]
    size -= len(data)
    while size and (data := stream.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


class Recoded:
    """A stream of text in another encoding, read as UTF-8. What cannot be decoded is the byte 0xFF, which is not UTF-8."""

    def __init__(self, stream: Stream, source: Source) -> None:
        self.stream, self.source = stream, source
        self.taken, self.ready, self.ended = 0, b"", False
        codecs.register_error("nanogpt.text.sources", self.undecodable)  # one text is read at a time
        self.decoder = codecs.getincrementaldecoder(source.encoding)("nanogpt.text.sources")

    def read(self, size: int) -> bytes:
        """At most `size` bytes of UTF-8; none at the end."""
        while len(self.ready) < size and not self.ended:
            data = self.stream.read(BLOCK)
            self.taken, self.ended = self.taken + len(data), not data
            try:
                text = self.decoder.decode(data, self.ended)
            except UnicodeError as e:  # what no error handler is asked about: UTF-16 or UTF-32 without its mark
                name = self.source.encoding
                hint = f"; {name}-le and {name}-be need none" if "BOM" in str(e) else ""
                raise UserError(f"{self.source.name}: is not {name} ({e}){hint}") from None
            self.ready += SURROGATES.sub("\udcff", text).encode("utf-8", "surrogateescape")  # no text has half a pair
        data, self.ready = self.ready[:size], self.ready[size:]
        return data

    def undecodable(self, error: Any) -> tuple[str, int]:
        """What codecs calls for what cannot be decoded."""
        place = self.taken - len(error.object) + error.start
        self.source.undecodable = self.source.undecodable or (place, f"0x{error.object[error.start]:02x}")
        return "\udcff", error.end


def skip(stream: Any, source: Source, offset: int) -> None:
    """Go to `offset` in the unpacked bytes of UTF-8."""
    if source.packing or source.encoding:
        while offset:
            offset -= len(read_full(stream, min(offset, BLOCK))) or offset  # at its end there is nothing left to skip
    else:
        stream.seek(offset)


def blocks(
    sources: list[Source], start: list[int], cut: Cut, field: str, longest_line: float, folder: Path
) -> Iterator[Block]:
    """Yield the Blocks of all sources, from the position `start` = [source, offset, line] on.

    cut: finds the last place where the bytes of a text can be cut. longest_line: bytes that a line of .jsonl may
    have. folder: for temporary files. Small texts share a block.
    """
    pending: list = []
    size, done = 0, sum(s.size for s in sources[: start[0]])
    begin, offset, line = start
    for number, source in enumerate(sources[begin:], begin):
        pieces = read_rows if source.kind in ("rows", "hf") else read_stream
        for part, data, after, at in pieces(source, offset, line, cut, field, longest_line, folder):
            kind = "rows" if source.kind == "hf" else source.kind
            if pending and (size + len(data) > BLOCK or pending[0][0] != kind or len(pending) == MOST_PARTS):
                yield pack(pending, [number, *part[:2]], done)
                pending, size = [], 0
            pending.append((kind, [number, *part], data))
            size += len(data)
            if size >= BLOCK // 2:
                yield pack(pending, [number, *after], done + at)
                pending, size = [], 0
        check_unchanged(source)
        done += source.size
        offset = line = 0
    if pending:
        yield pack(pending, [len(sources), 0, 0], done)


def pack(pending: list, after: list[int], done: int) -> Block:
    return Block(pending[0][0], [part for _, part, _ in pending], b"".join(data for _, _, data in pending), after, done)


def read_stream(
    source: Source, offset: int, line: int, cut: Cut, field: str, longest_line: float, folder: Path
) -> Iterator[Piece]:
    """Yield ([offset, line, bytes, first], bytes, [offset, line] after it, bytes on disk read) of a text or .jsonl."""
    with opened(source) as (stream, raw):
        skip(stream, source, offset)
        jsonl = source.kind == "jsonl"
        for data in line_pieces(stream, source, line, longest_line) if jsonl else text_pieces(stream, cut):
            first, at = offset == 0 or jsonl, offset
            part = [at, line, len(data), first]
            offset += len(data)
            line += data.count(b"\n") if jsonl else 0
            yield part, data, [offset, line], raw.tell() if source.packing or source.encoding else offset


def text_pieces(stream: Stream, cut: Cut) -> Iterator[bytes]:
    """Yield the bytes of a text, cut where `cut` says so, and where it knows no place, after a whole character."""
    rest = b""
    while True:
        data = rest + read_full(stream, BLOCK - len(rest))
        if len(data) < BLOCK:
            break
        place = cut(data) or last_character(data)
        yield data[:place]
        rest = data[place:]
    if data:
        yield data


def line_pieces(stream: Stream, source: Source, line: int, longest: float) -> Iterator[bytes]:
    """Yield the bytes of whole lines, about a block at a time. UserError where a line is longer than `longest`."""
    rest: list[bytes] = []
    size = 0
    while data := stream.read(BLOCK):
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, data[:end]])
            line += sum(part.count(b"\n") for part in rest) + data.count(b"\n", 0, end)
            rest, size = [], 0
        rest.append(data[end:])
        size += len(rest[-1])
        if size > longest:
            raise too_long(f"{source.name}:{line + 1}: the line", longest)
    if size:
        yield b"".join(rest)


def too_long(what: str, longest: float) -> UserError:
    """The UserError about a line or row that takes more memory than it may."""
    return UserError(
        f"{what} is longer than {longest / 1e6:,.0f} MB, which is as much as --memory lets one take; "
        "a larger --memory allows longer ones"
    )


def read_rows(
    source: Source, row: int, line: int, cut: Cut, field: str, longest_line: float, folder: Path
) -> Iterator[Piece]:
    """Yield the same for each row of a Parquet file or a dataset of the hub; its number is the offset.

    UserError where a row is longer than `longest_line`, as for .jsonl.
    """
    rows = (
        hub_rows(source, row, field) if source.kind == "hf" else parquet_rows(source, row, field, longest_line, folder)
    )
    try:
        for value, at in rows:
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
            elif value is None:
                value = b""  # which is left out, as other rows without text are
            elif not isinstance(value, memoryview):
                what = f"row {row + 1}: the field {field!r} holds {type(value).__name__}, not text"
                raise UserError(f"{source.name}: {what}")
            if len(value) > longest_line:
                raise too_long(f"{source.name}: row {row + 1}", longest_line)
            row += 1
            yield [row - 1, 0, len(value), True], bytes(value), [row, 0], at
    except MemoryError:
        raise UserError(
            f"{source.name}: row {row + 1} or one soon after it is too long for the memory there is"
        ) from None


def parquet_rows(source: Source, row: int, field: str, longest: float, folder: Path) -> Iterator[tuple[Any, int]]:
    """Yield (value, bytes of the file read) from a row of a Parquet file on; a text is its bytes, whatever they are."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{source.name}: reading .parquet takes {installs('data')}") from None
    with opened(source) as (stream, raw), contextlib.ExitStack() as stack:
        if source.packing:  # its end is read first, so it cannot be read while it is unpacked
            raw = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            while data := stream.read(BLOCK):
                with writing_to(folder):
                    raw.write(data)
        try:
            file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK)
            require_field(source, field, file.schema_arrow.names)
            total = max(file.metadata.num_rows, 1)
            before = 0
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if before + about.num_rows <= row:
                    before += about.num_rows
                    continue
                columns = map(about.column, range(about.num_columns))
                column_size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
                if column_size > longest * about.num_rows + BLOCK:  # then some row is; it need not be read to know that
                    which = f"row {before + 1}" if about.num_rows == 1 else f"a row from row {before + 1} on"
                    raise too_long(f"{source.name}: {which}", longest)
                size = max(1, min(1024, BLOCK * about.num_rows // max(about.total_byte_size, 1)))
                for batch in file.iter_batches(size, row_groups=[group], columns=[field]):
                    for value in raw_values(batch.column(0), pyarrow):
                        before += 1
                        if before > row:
                            yield value, source.size * before // total
        except MemoryError:
            raise
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{source.name}: is no sound Parquet file ({first_line(e)})") from None


def raw_values(column: Any, pyarrow: Any) -> Iterator[Any]:
    """Yield the values of a column; texts as views of their bytes, which nobody has decoded or copied yet."""
    types, kind = pyarrow.types, column.type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view":  # new in pyarrow 16
        for value in column.cast(kind).cast(pyarrow.large_binary()):
            yield memoryview(value.as_buffer()) if value.is_valid else None
    else:
        yield from column.to_pylist()


def hub_rows(source: Source, row: int, field: str) -> Iterator[tuple[Any, int]]:
    """Yield (value, 0) from a row of a dataset of the Hugging Face hub on, or of a folder in its format; streamed."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source.name}: reading it takes {installs('data')}") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below, once
    name, _, config = source.path.partition(":")
    try:
        found = stream_dataset(datasets, name, config or None)
        first = next(iter(found), None)
        require_field(source, field, list(first or {field: None}))
        for example in found.skip(row):
            yield example[field], 0
    except UserError:
        raise
    except Exception as e:  # every kind of dataset raises its own
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


class Problems(dict):
    """What in the sources is no text: {(source, kind): [place of the first, what it is, how many]}."""

    def note(self, source: int, kind: str, where: int, what: str, count: int = 1) -> None:
        """One more, or several: of a kind that is binary, line, utf8, or empty, which is no reason to refuse anything."""
        first = self.setdefault((source, kind), [where, what, 0])
        first[2] += count


def read_block(block: Block, field: str, replace: bool) -> tuple[list[Document], Problems]:
    """(documents, problems) of a block: see `Document`.

    With `replace`, bytes that are no UTF-8 become U+FFFD; the problems then still count them. Rows and lines without
    text are left out, and counted there.
    """
    documents: list[Document] = []
    problems, begin = Problems(), 0
    for source, offset, line, size, first in block.parts:
        raw = block.data[begin : begin + size]
        begin += size
        if offset == 0:
            raw = raw.removeprefix(BOM)
        if block.kind == "jsonl":
            read_lines(raw, source, line, field, replace, documents, problems)
            continue
        text = read_text(raw, source, offset, replace, problems, offset + 1 if block.kind == "rows" else None)
        if text:
            documents.append((text, raw, first))
        elif block.kind == "rows" and not raw:
            problems.note(source, "empty", offset + 1, "")
    return documents, problems


def read_text(raw: bytes, source: int, offset: int, replace: bool, problems: Problems, line: int | None = None) -> str:
    """The text of raw bytes; what is wrong with them goes to `problems`, with its line or row, or its offset.

    In a file, the character NUL shows that it is no text; in a row it is one like any other.
    """
    zero = raw.find(b"\0") if line is None else -1
    if zero >= 0:
        utf16 = offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "; it looks like UTF-16, which --encoding=utf-16 reads" if utf16 else ""
        problems.note(source, "binary", offset + zero, what)
        return ""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        text = raw.decode("utf-8", "replace")
        count = text.count("\ufffd") - raw.count("\ufffd".encode())
        problems.note(source, "utf8", line or offset + e.start, f"0x{raw[e.start]:02x}", count)
        return text if replace else ""


def read_lines(
    raw: bytes, source: int, line: int, field: str, replace: bool, documents: list[Document], problems: Problems
) -> None:
    """The same for lines of JSON: objects with a field that is text. Null is none; after the first line, so is no field."""
    beginning = line == 0
    for row in raw.split(b"\n"):
        line += 1
        if not row.strip():
            continue
        first, beginning = beginning, False
        try:
            found = json.loads(row)
        except UnicodeDecodeError:
            if (text := read_text(row, source, 1, replace, problems, line)) == "":
                continue
            try:
                found = json.loads(text)
            except (ValueError, RecursionError):
                found = None
        except (ValueError, RecursionError) as e:
            why = f"{e.msg}: column {e.colno}" if isinstance(e, json.JSONDecodeError) else type(e).__name__
            problems.note(source, "line", line, f"is no JSON ({why})")
            continue
        if not isinstance(found, dict):
            problems.note(source, "line", line, "expected an object with a field for the text")
        elif field not in found and first:  # then it has another name, or this is another file
            there = ", ".join(list(found)[:8]) or "nothing"
            hint = nearest(field, list(found))
            problems.note(source, "line", line, f"has no field {field!r}, but {there}{hint}")
        elif found.get(field) in ("", None):
            problems.note(source, "empty", line, "")
        elif not isinstance(found[field], str):
            what = type(found[field]).__name__
            problems.note(source, "line", line, f"the field {field!r} holds {what}, not text")
        else:
            text = SURROGATES.sub("\ufffd", found[field])
            if text != found[field]:
                n = len(SURROGATES.findall(found[field]))
                problems.note(source, "utf8", line, "half of a surrogate pair", n)
            documents.append((text, text.encode("utf-8"), True))


def read_whole(sources: list[Source], field: str) -> tuple[list[tuple[int, str]], int]:
    """[(a source's number, text), ...] of all documents in order, and how many rows and lines were without text.

    UserError with everything in them that is no text.
    """
    found: list[tuple[int, list[str]]] = []
    problems = Problems()
    for block in blocks(sources, [0, 0, 0], lambda data: 0, field, math.inf, Path(tempfile.gettempdir())):
        begin = 0
        for part in block.parts:
            raw = block.data[begin : begin + part[3]]
            begin += part[3]
            documents, wrong = read_block(replace(block, parts=[part], data=raw), field, False)
            for (source, kind), (where, what, count) in wrong.items():
                problems.note(source, kind, where, what, count)
            for text, _, first in documents:
                if first or not found:
                    found.append((part[0], []))
                found[-1][1].append(text)
    if lines := explain(problems, sources, False):
        raise UserError(*lines)
    empty = sum(count for (_, kind), (*_, count) in problems.items() if kind == "empty")
    return [(number, "".join(texts)) for number, texts in found], empty


SURROGATES = re.compile("[\ud800-\udfff]")


def explain(problems: Problems, sources: list[Source], replace: bool, remedy: str = "") -> list[str]:
    """A line for each source with problems that end the reading: what is wrong, where, and how often.

    `remedy`: what else than naming the encoding of a plain text helps against bytes that are not in it.
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
