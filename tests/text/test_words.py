"""Words found all at once, and ids out of memory: always those that tiktoken finds."""

import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt.text import words
from nanogpt.text.tokenizer import GPT2Tokenizer, gpt2_file
from nanogpt.text.words import Words

pytest.importorskip("tiktoken")
pytestmark = pytest.mark.skipif(not gpt2_file(), reason="GPT-2's vocabulary is not installed")

PIECES = [
    *"a s t ré ' , 1 世 ’ (".split(),
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " the",
    "'ll",
    "'s",
    "'re",
    "'v",
    "don't",
    "''",
]
PIECES += [
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u3000",
    "\u0301",
    "\ud7ff",
    "antidisestablishmentarianism",
    "\x00",
    "é s",
]
pieces = st.one_of(st.lists(st.sampled_from(PIECES)).map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module")
def slow():
    return GPT2Tokenizer().encode


@pytest.fixture
def always(monkeypatch):
    """The fast way is taken whatever the text."""
    monkeypatch.setattr(words, "SHORT", 1)
    monkeypatch.setattr(words, "MUCH_NEW", 1.0)
    monkeypatch.setattr(words, "MUCH_FOREIGN", 1.0)


@settings(max_examples=1000)
@given(pieces)
@example("antidisestablish\nantidisestablishmentarianism\n")
def test_any_text_becomes_what_it_slowly_becomes(slow, always, remembered, text):
    expected = slow(text)
    assert remembered.encode(text).tolist() == expected
    assert remembered.encode(text).tolist() == expected  # now from memory


@pytest.fixture(scope="module", params=["large", "full", "crowded"])
def remembered(slow, request):
    """Words with room, with no room for new ones, and with a table in which words meet in every slot."""
    return Words(slow, **{"large": {}, "full": {"entries": 20}, "crowded": {"bits": 3}}[request.param])


def test_real_texts_as_they_are(slow):
    fast = Words(slow)
    for path in [*Path(words.__file__).parent.glob("*.py"), Path(__file__)]:
        text = path.read_text(encoding="utf-8")
        for _ in range(3):
            assert fast.encode(text).tolist() == slow(text)
    assert len(fast.known) > 1000


def test_most_words_come_from_memory(slow):
    """It is not asked for a word twice."""
    asked = []
    fast = Words(lambda text: asked.append(text) or slow(text))
    text = Path(words.__file__).read_text(encoding="utf-8")
    for _ in range(3):
        fast.encode(text)
    count = len(asked)
    fast.encode(text)
    assert all(len(text) > 4 * words.LONGEST for text in asked[count:])


def test_no_more_is_remembered_than_there_is_room_for(slow):
    fast, text = Words(slow, entries=20), Path(words.__file__).read_text(encoding="utf-8")
    for _ in range(2):
        assert fast.encode(text + "x" * 5 * words.LONGEST).tolist() == slow(text + "x" * 5 * words.LONGEST)
    assert len(fast.known) == 20 and max(map(len, fast.known)) <= 4 * words.LONGEST


@pytest.mark.parametrize("kind", ["new words", "another script"])
def test_what_memory_does_not_help_with_is_left_to_the_tokenizer(slow, kind):
    draw, asked = random.Random(1), []
    fast = Words(lambda text: asked.append(text) or slow(text))
    text = (
        " ".join(f"{draw.getrandbits(32):08x}" for _ in range(1000)) if kind == "new words" else "жизнь и судьба " * 500
    )
    assert fast.encode(text).tolist() == slow(text)
    assert asked[0] == text
