"""sample.py with a trained run, without its data."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, SMALL

from nanogpt import train
from nanogpt.commands import sample
from nanogpt.config import SampleConfig, UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.text import prepare
from nanogpt.text.tokenizer import ByteTokenizer


@pytest.fixture
def trained(tiny, monkeypatch, capsys):
    """A folder with a trained run in out/ and no data."""
    root = tiny.parent.parent
    monkeypatch.chdir(root)
    train.main([*SMALL, "--max_iters=40", "--lr_decay_iters=40", "--eval_interval=40"])
    shutil.rmtree(root / "data")
    capsys.readouterr()
    return root


@pytest.fixture
def write(trained, capsys):
    """write("--start=The") returns (text, announcements)."""

    def write(*args):
        sample.main(["--device=cpu", "--num_samples=1", "--max_new_tokens=30", *args])
        return capsys.readouterr()

    return write


def test_a_text_begins_with_start_and_a_seed_repeats_it(write):
    one, again, other = (write("--start=The ", f"--seed={s}").out for s in (1, 1, 2))
    assert one.startswith("The ") and one.endswith("\n---------------\n")
    assert len(one) == len("The ") + 30 + len("\n---------------\n")
    assert one == again != other


def test_standard_output_has_only_the_text(write):
    text, announcements = write("--dtype=auto")
    assert "dtype: float32" in announcements and "dtype" not in text


def test_several_samples_differ(write):
    samples = write("--num_samples=3").out.split("\n---------------\n")[:3]
    assert len(set(samples)) == 3


def test_greedy_and_top_k_of_one_are_the_same(write):
    assert write("--temperature=0").out == write("--top_k=1").out == write("--top_k=1", "--seed=9").out


def test_a_prompt_from_a_file(write, trained):
    (trained / "prompt.txt").write_text("The cat")
    assert write("--start=FILE:prompt.txt").out.startswith("The cat")


def test_a_new_line_typed_in_a_shell(write):
    assert write("--start=The\\nThe").out.startswith("The\nThe")


def test_a_prompt_longer_than_the_context_keeps_its_end_and_says_so(write):
    text, announcements = write("--start=" + "The cat sat by the mat.\\n" * 2)
    assert "--start has 48 tokens, the context 16: the model sees the last 16 of them" in announcements
    assert text.startswith("The cat sat by the mat.\nThe cat")


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--start=Größe"], "--start: .*ö"),
        (["--start=FILE:nowhere.txt"], "FILE:nowhere.txt: No such file"),
        (["--start="], "--start is empty"),
        (["--out_dir=elsewhere"], "elsewhere: holds no checkpoint; there are some in out"),
        (["--init_from=elsewhere"], "--init_from=elsewhere: holds no checkpoint"),
    ],
)
def test_an_error_is_one_line(trained, args, expected):
    with pytest.raises(UserError, match=expected) as caught:
        sample.main(["--device=cpu", *args])
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def test_text_appears_while_it_is_generated(trained):
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        "--device=cpu",
        "--num_samples=1",
        "--max_new_tokens=100000",
        "--start=The",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.read(20).startswith(b"The")  # 100,000 tokens would take minutes
        process.kill()


def test_the_best_checkpoint_is_used(trained, capsys):
    best = sorted(Path("out/checkpoints").iterdir())[0]
    worse = best.with_name("step-00000099")  # newer, and worse: its weights are noise
    shutil.copytree(best, worse)
    rewrite(worse, step=99, val_loss=9.0)
    sample.main(["--device=cpu", "--num_samples=1", "--temperature=0"])
    text = capsys.readouterr().out
    shutil.rmtree(worse)
    sample.main(["--device=cpu", "--num_samples=1", "--temperature=0"])
    assert text == capsys.readouterr().out


def rewrite(folder, **changes):
    """Another checkpoint in `folder`: all-zero weights, and these changes to what checkpoint.json says."""
    weights = {name: torch.zeros_like(t) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    info = json.loads((folder / "checkpoint.json").read_text()) | changes
    (folder / "checkpoint.json").write_text(json.dumps(info))
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# A vocabulary of characters that has a token for those outside it


@pytest.fixture
def open_minded(tmp_path, monkeypatch, capsys):
    """A run on a text prepared by `nanogpt prepare`, in which é is two characters and ü is one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "advise", lambda **about: None)
    (tmp_path / "a.txt").write_text("Gr\u00fcne Caf\u0065\u0301s, " * 300, encoding="utf-8")
    prepare.main(["a.txt", "--dataset=own"])
    train.main([*SMALL, "--dataset=own", "--max_iters=1", "--eval_interval=1"])
    capsys.readouterr()

    def write(*args):
        sample.main(["--device=cpu", "--num_samples=1", "--max_new_tokens=3", *args])
        return capsys.readouterr()

    return write


def test_unknown_characters_of_a_prompt_are_accepted_and_named(open_minded):
    text, said = open_minded("--start=Grüße, 世界")
    assert text.startswith("Grüße, 世界")
    assert "--start: not in the tokenizer's vocabulary: 'ß' (U+00DF), '世' (U+4E16), '界' (U+754C)" in said
    assert "the model sees its token for unknown characters there" in said


@pytest.mark.parametrize("start", ["Gr\u00fcne", "Gru\u0308ne", "Caf\u0065\u0301", "Caf\u00e9"])
def test_accents_are_written_as_the_vocabulary_has_them(open_minded, start):
    text, said = open_minded(f"--start={start}")
    assert text.startswith(("Gr\u00fcne", "Caf\u0065\u0301")) and "vocabulary" not in said


# Where texts end, and how many are written together


def parts(text):
    return text.split("\n---------------\n")[:-1]


def test_a_stop_string_ends_each_text_and_is_not_shown(write):
    args = ["--start=The ", "--num_samples=3"]
    whole = parts(write(*args).out)
    stop = whole[0][10:13]  # three tokens
    text, said = write(*args, "--stop=" + stop.replace("\n", "\\n"))
    found = parts(text)
    assert found == [text[: text.find(stop)] if stop in text else text for text in whole]
    assert len(found[0]) <= 10
    assert int(re.search(r"^(\d+) tokens in", said, re.M)[1]) < 3 * 30  # it is not written in silence either


def test_a_text_that_ends_with_the_beginning_of_a_stop_string_is_shown_whole(write):
    whole = write("--start=The ").out
    last = parts(whole)[0][-1].replace("\n", "\\n")
    assert write("--start=The ", f"--stop={last}§").out == whole


def test_texts_do_not_depend_on_how_many_are_generated_together(write, monkeypatch):
    together = write("--num_samples=5").out
    assert len(set(parts(together))) == 5
    monkeypatch.setattr(sample, "TOGETHER", 2)
    assert write("--num_samples=5").out == together


def test_with_little_memory_there_is_room_for_one_text(monkeypatch):
    model = GPT(GPTConfig(block_size=16, vocab_size=ByteTokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8))
    a_row = 2 * 16 * 8 * 4  # bytes of the keys and values of 16 tokens
    for cache, rows in ((a_row - 1, 1), (3 * a_row, 3), (99 * a_row, 10)):
        monkeypatch.setattr(sample, "CACHE", cache)
        assert sample.make_engine(SampleConfig(), model, None, ByteTokenizer(), [1]).free == rows


def test_the_text_of_a_prompt_file_is_not_unescaped(tmp_path):
    (tmp_path / "prompt.txt").write_text("a\\nb\nc", encoding="utf-8")
    assert sample.read_start(f"FILE:{tmp_path / 'prompt.txt'}") == "a\\nb\nc"


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("ab\u00fc".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompt\.txt: is not UTF-8 text \(byte 2\)"):
        sample.read_start(f"FILE:{tmp_path / 'prompt.txt'}")
