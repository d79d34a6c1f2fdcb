import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanogpt.commands import cli
from nanogpt.text import shakespeare
from nanogpt.text.tokenizer import GPT2Tokenizer, from_json, gpt2_file

ROOT = Path(__file__).parent.parent
CHAR, BPE = (f"data/{name}/prepare.py" for name in ("shakespeare_char", "shakespeare"))
TINY = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"

has_gpt2 = bool(importlib.util.find_spec("tiktoken") and gpt2_file())
needs_gpt2 = pytest.mark.skipif(not has_gpt2, reason="GPT-2's tokenizer is not installed")


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs a prepare script in this process, which spares it the import of torch; offline."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "leave", sys.exit)

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, end.value.code, out, err)

    return run


def program(*command, cwd=ROOT, **env):
    """Runs a command as a user does."""
    env = os.environ | env
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


def read(folder, split):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"]), meta


@pytest.fixture
def text(tmp_path):
    """A file of 1000 characters of 27 kinds."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 26) if i % 7 else " " for i in range(999)) + "!", encoding="utf-8")
    return path


def fails(result, *parts):
    """It ended as bad input must: one line to stderr that has these parts, and exit code 2."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("prepare.py: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    return True


# -- the Shakespeares


@pytest.mark.parametrize("shell", ["sh", "bash", sys.executable])
def test_shells_and_python_run_it(tmp_path, text, shell):
    folder = tmp_path / "a b" / "new"
    result = program(shell, CHAR, f"--input={text}", f"--out={folder}")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


@needs_gpt2
def test_from_another_folder(tmp_path, text):
    result = program("sh", ROOT / BPE, "--input", "text.txt", "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(" in out\n") and (tmp_path / "out" / "meta.json").exists()


def test_errors_reach_the_shell(tmp_path):
    result = program("sh", CHAR, "--input", tmp_path / "none", "--out", tmp_path / "out")
    assert fails(result, f"{tmp_path / 'none'}: cannot be read: No such file")


def test_characters(prepare, tmp_path, text):
    result = prepare(CHAR, f"--input={text}", f"--out={tmp_path / 'out'}")
    (train, meta), (val, _) = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    tokenizer = from_json(meta["tokenizer"])
    assert tokenizer.chars == sorted(set(text.read_text()))
    assert (len(train), len(val)) == (900, 100)
    assert tokenizer.decode(train) + tokenizer.decode(val) == text.read_text()
    assert result.stdout.startswith(f"1,000 characters, {tokenizer.vocab_size} different ones: ' !a")


@needs_gpt2
def test_gpt2_tokens(prepare, tmp_path, text):
    prepare(BPE, f"--input={text}", f"--out={tmp_path / 'out'}")
    (train, meta), (val, _) = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ({"type": "gpt2"}, 50257, "uint16")
    tokenizer, whole = GPT2Tokenizer(), text.read_text()
    assert train.tolist() == tokenizer.encode(whole[:900])
    assert val.tolist() == tokenizer.encode(whole[900:])


@pytest.mark.skipif(not TINY.exists(), reason="needs tiny Shakespeare")
def test_tiny_shakespeare(prepare, tmp_path):
    result = prepare(CHAR, f"--input={TINY}", f"--out={tmp_path / 'char'}")
    assert "1,115,394 characters, 65 different ones: " in result.stdout
    assert "1,003,854 tokens in train.bin, 111,540 in val.bin" in result.stdout
    assert [len(read(tmp_path / "char", split)[0]) for split in ("train", "val")] == [1_003_854, 111_540]
    if has_gpt2:
        result = prepare(BPE, f"--input={TINY}", f"--out={tmp_path / 'bpe'}")
        assert "301,966 tokens in train.bin, 36,059 in val.bin" in result.stdout


def test_the_text_in_the_folder_is_taken(prepare, tmp_path, text):
    (tmp_path / "input.txt").write_bytes(text.read_bytes())
    result = prepare(CHAR, f"--out={tmp_path}")
    assert "1,000 characters" in result.stdout, result.stderr


@needs_gpt2
def test_the_text_next_door_is_taken(prepare, tmp_path, text):
    (tmp_path / "shakespeare_char").mkdir()
    (tmp_path / "shakespeare_char" / "input.txt").write_bytes(text.read_bytes())
    result = prepare(BPE, f"--out={tmp_path / 'shakespeare'}")
    assert "1,000 characters" in result.stdout, result.stderr


@pytest.mark.parametrize("script", [CHAR, pytest.param(BPE, marks=needs_gpt2)])
@pytest.mark.parametrize(
    "data, complaint",
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"a lamp \xe4 and more of it", "is not UTF-8 text: byte 7 is 0xe4"),
        (b"too short", "9 characters are too few to split"),
    ],
)
def test_bad_input_changes_nothing(prepare, tmp_path, script, data, complaint):
    own = tmp_path / "own.txt"
    if data is not None:
        own.write_bytes(data)
    result = prepare(script, "--input", own, "--out", tmp_path / "out")
    assert fails(result, f"{own}: ", complaint)
    assert not (tmp_path / "out").exists()


def test_a_failure_keeps_the_dataset_that_was_there(prepare, tmp_path, text):
    prepare(CHAR, f"--input={text}", f"--out={tmp_path / 'out'}")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    text.write_bytes(b"\xff")
    assert fails(prepare(CHAR, f"--input={text}", f"--out={tmp_path / 'out'}"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_without_network(prepare, tmp_path):
    result = prepare(CHAR, f"--out={tmp_path / 'out'}")
    assert fails(result, "cannot be reached", "pip cannot fetch", "--input=FILE")
    assert not (tmp_path / "out").exists()


def test_download_of_other_bytes(prepare, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("something else")
    monkeypatch.setattr(shakespeare, "URL", wrong.as_uri())
    result = prepare(CHAR, "--out", tmp_path / "out")
    assert fails(result, wrong.as_uri(), "wrong SHA-256: expected 86c4e6aa", "got ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [CHAR, BPE])
def test_mistyped_flags(prepare, tmp_path, script):
    result = prepare(script, "--inptu=x", "--out", tmp_path / "out")
    assert result.returncode == 2 and "--inptu" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_tiktoken(prepare, tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    result = prepare(BPE, f"--input={text}", f"--out={tmp_path / 'out'}")
    assert fails(result, "pip install -c constraints.txt -e '.[gpt2]'")
    assert not (tmp_path / "out").exists()


# -- OpenWebText, FineWeb, TinyStories


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": f"Document {i}.{' lamp' * (i % 9)}"}) for i in range(2500)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@needs_gpt2
@pytest.mark.parametrize("name, kind", [("openwebtext", "gpt2"), ("fineweb", "gpt2"), ("tinystories", "bpe")])
def test_documents(tmp_path, documents, name, kind):
    """From other documents than those of the download; into another folder than the script's."""
    settings = [f"--root={tmp_path / 'data'}", "--val_fraction=0.01", "--trial=False"]
    result = program("sh", f"data/{name}/prepare.py", documents, *settings)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "data" / name
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    (train, meta), (val, _) = read(out, "train"), read(out, "val")
    tokenizer = from_json(meta["tokenizer"])
    assert meta["tokenizer"]["type"] == kind and meta["separator"] == tokenizer.eot
    train, val = (tokenizer.decode(ids).split("<|endoftext|>") for ids in (train, val))
    assert train.pop(0) == val.pop(0) == ""  # the token stands before each document
    written = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    assert sorted(train + val) == sorted(written) and not set(train) & set(val)


@pytest.mark.parametrize(
    "name, hub",
    [
        ("openwebtext", "hf:Skylion007/openwebtext"),
        ("fineweb", "hf:HuggingFaceFW/fineweb:sample-10BT"),
        ("tinystories", "hf:roneneldan/TinyStories"),
    ],
)
def test_what_the_recipes_download(name, hub, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "leave", sys.exit)
    monkeypatch.setattr(cli, "main", given.append)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--memory=2000"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "data" / name / "prepare.py"), run_name="__main__")
    (arguments,) = given
    assert arguments[:4] == ["prepare", hub, f"--dataset={name}", f"--root={ROOT / 'data'}"]
    assert arguments[-1] == "--memory=2000"
