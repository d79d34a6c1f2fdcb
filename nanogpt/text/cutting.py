"""Where the UTF-8 bytes of a large text can be cut so that its parts encode to the same ids as the whole."""

import re
import unicodedata

import numpy as np

LONGEST_RUN = 500_000  # white space characters; tiktoken's regular expression fails on about 700,000


def code_points(text: str) -> np.ndarray:
    """The code points of `text`, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def last_character(data: bytes) -> int:
    """Where the last character of the UTF-8 bytes `data` begins, or the index of a last byte that is invalid."""
    for place in range(len(data) - 1, max(len(data) - 5, 0), -1):
        if data[place] & 0xC0 != 0x80:
            return place
    return len(data) - 1 if len(data) > 4 else 0  # four continuation bytes: not UTF-8


# A word of GPT-2's pattern ends between a visible character and white space: no alternative matches across that
# place, and none looks back. The white space that the pattern looks ahead at is after the cut.
ASCII_WORD_END = re.compile(rb"[!-~](?=[ \n\t\r])")


def last_word(data: bytes) -> int:
    """The last place in the UTF-8 bytes `data` where GPT-2's pattern certainly ends a word; 0 if there is none."""
    for size in (256, 2**13, len(data)):
        begin = max(len(data) - size, 0)
        ends = [match.end() for match in ASCII_WORD_END.finditer(data, begin)]
        if ends:
            return ends[-1]
        if size == 2**13 and (place := last_change(data, begin)):
            return place
    return last_change(data, 0)


def last_change(data: bytes, begin: int) -> int:
    """The same for any script, from `begin` on: where letters, numbers, other visible characters and space meet."""
    while begin < len(data) and data[begin] & 0xC0 == 0x80:
        begin += 1
    text = data[begin:].decode("utf-8", "surrogateescape")  # invalid bytes are of no class
    after, end = None, len(data)
    for c in reversed(text):
        before = word_class(c)
        # an apostrophe may begin 's, a space may begin a word, and the pattern looks ahead at white space
        if before and after and before != after and before != "Z" and not (c == "'" and after == "L"):
            return end
        after = before
        end -= 1 if "\udc80" <= c <= "\udcff" else len(c.encode("utf-8"))
    return 0


def word_class(c: str) -> str | None:
    """L, N, Z (white space) or O (others) as GPT-2's pattern classifies `c`; None if versions of Unicode may disagree."""
    kind = unicodedata.category(c)[0]
    if c in " \n\t\r":
        return "Z"
    if kind != unicodedata.ucd_3_2_0.category(c)[0] or kind in "CZ":
        return None
    return kind if kind in "LN" else "O"


def without_long_runs(text: str) -> list[str]:
    """`text` in parts without a run of white space too long for tiktoken: nearly always the text itself."""
    if not any(text[i].isspace() for i in range(LONGEST_RUN, len(text), LONGEST_RUN)):
        return [text]
    places = [0]
    for run in re.finditer(r"\s+", text):
        places += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    return [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]
