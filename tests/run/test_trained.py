"""What all programs that write do with a prompt."""

import pytest

from nanogpt.run.trained import known
from nanogpt.text.tokenizer import ByteTokenizer, CharTokenizer

COMPOSED, DECOMPOSED = "Gr\u00fcne", "Gru\u0308ne"
TOK = CharTokenizer(sorted(set(COMPOSED) | {"\ufffd"}), unknown="\ufffd")


@pytest.mark.parametrize("text", [COMPOSED, DECOMPOSED])
def test_accents_are_spelled_as_the_vocabulary_has_them(text):
    assert known(text, TOK) == (COMPOSED, None)
    assert known(text, CharTokenizer(sorted(set(DECOMPOSED)))) == (DECOMPOSED, None)


def test_what_the_vocabulary_lacks_is_told_where_a_token_stands_for_it():
    text, line = known("Gr\u00fc\u00dfe", TOK)
    assert text == "Gr\u00fc\u00dfe" and "'\u00df' (U+00DF)" in line and line.endswith("characters there")
    assert known("x", CharTokenizer("ab")) == ("x", None)  # which `encode` refuses


def test_where_nothing_is_unknown_nothing_is_changed():
    assert known(DECOMPOSED, ByteTokenizer()) == (DECOMPOSED, None)
