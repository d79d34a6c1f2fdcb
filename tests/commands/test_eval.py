"""`nanogpt eval` on texts, on datasets, by document, and with invalid arguments."""

import gzip
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import ROOT, SMALL, Door, free_port, metrics, tiny_text, write_tokenizer

from nanogpt import train
from nanogpt.commands import cli
from nanogpt.commands import eval as program
from nanogpt.config import EvalConfig, UserError
from nanogpt.run import checkpoint, settings, trained
from nanogpt.text import sources
from nanogpt.text.dataset import write_dataset
from nanogpt.text.tokenizer import CharTokenizer

LINE = re.compile(r"(.*): loss ([\d.]+) over ([\d,]+) tokens, perplexity ([\d.]+)(?:, ([\d.]+) bits per byte)?")


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder with a trained run in out/ and its dataset, each of whose lines is a document."""
    root, text = tmp_path_factory.mktemp("trained"), tiny_text()
    tokenizer, cut = CharTokenizer.train(text), len(text) * 9 // 10
    write_dataset(root / "data" / "tiny", tokenizer, tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:]))
    meta = root / "data" / "tiny" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"separator": tokenizer.ids["\n"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main([*SMALL, "--max_iters=40", "--lr_decay_iters=40", "--eval_interval=40"])
    return root


@pytest.fixture
def trained_run(trained_once, tmp_path, monkeypatch, capsys):
    """A copy of it, in which the test runs."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()


@pytest.fixture
def evaluate(trained_run, capsys):
    """evaluate("--text=a.txt") returns {name: (loss, tokens, perplexity, bits per byte)}, of each line printed."""

    def evaluate(*args):
        assert cli.main(["eval", "--device=cpu", *args]) == 0
        shown = capsys.readouterr().out.splitlines()
        found = [LINE.fullmatch(line).groups() for line in shown if "no token" not in line]
        return {n: (float(a), int(t.replace(",", "")), float(p), b and float(b)) for n, a, t, p, b in found}

    return evaluate


def ids_of(text):
    """The ids of a text with the model's tokenizer."""
    return checkpoint_tokenizer().encode(text)


def checkpoint_tokenizer():
    return trained.open_tokenizer(checkpoint.best("out").tokenizer)


def nats_of(ids, stride=16):
    """The sum of -log p over all ids but the first, one at a time: the reference."""
    model, total = checkpoint.load_model(checkpoint.best("out")).eval(), 0.0
    for i in range(1, len(ids)):
        start = 0 if i <= 16 else -(-(i - 16) // stride) * stride  # of the window that predicts it
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:i]]))[0]
        total -= logits[0, -1].double().log_softmax(-1)[ids[i]].item()
    return total


def test_the_dataset_of_the_run_gives_its_exact_loss(evaluate):
    exact = metrics()[-1]
    ((name, found),) = evaluate().items()
    assert name == "tiny, val split"
    expected = (exact["exact_loss"], exact["exact_tokens"], exact["exact_perplexity"], exact["exact_bits_per_byte"])
    assert found == pytest.approx(expected, abs=1e-4)
    assert evaluate("--split=train")["tiny, train split"][1] > found[1]


def test_a_run_resumed_with_another_dataset_is_evaluated_on_that(evaluate, capsys):
    shutil.copytree("data/tiny", "data/other")
    ids = np.fromfile("data/tiny/val.bin", np.uint16)
    ids[:-50].tofile("data/other/val.bin")
    worse = ["--learning_rate=3", "--min_lr=3", "--decay_lr=False"]
    train.main(["--init_from=resume", "--dataset=other", "--max_iters=42", "--eval_interval=42", *worse])
    capsys.readouterr()
    ((name, found),) = evaluate().items()
    assert name == "other, val split"
    assert found[:2] == (pytest.approx(metrics()[-1]["exact_loss"], rel=1e-5), len(ids) - 50 - 1)


def test_a_renamed_dataset_gives_the_same_result(evaluate, capsys):
    before = evaluate()
    os.rename("data/tiny", "data/renamed")
    worse = ["--learning_rate=3", "--min_lr=3", "--decay_lr=False"]
    train.main(["--init_from=resume", "--dataset=renamed", "--max_iters=41", *worse])
    assert "best loss" not in capsys.readouterr().out
    assert evaluate() == {"renamed, val split": before["tiny, val split"]}


def test_a_text_is_measured_token_by_token(evaluate):
    text = tiny_text(3, seed=9)
    Path("a.txt").write_text(text)
    loss, tokens, perplexity, bits = evaluate("--text=a.txt")["a.txt"]
    nats, n = nats_of(ids_of(text)), len(text) - 1
    assert (loss, tokens) == (pytest.approx(nats / n, abs=1e-5), n)
    assert perplexity == pytest.approx(math.exp(nats / n), abs=1e-3)
    assert bits == pytest.approx(nats / math.log(2) / n, abs=1e-3)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_a_stride_gives_each_token_more_context(evaluate, stride):
    text = tiny_text(3, seed=9)
    Path("a.txt").write_text(text)
    found = evaluate("--text=a.txt", f"--stride={stride}")["a.txt"]
    assert found[:2] == (pytest.approx(nats_of(ids_of(text), stride) / (len(text) - 1), abs=1e-5), len(text) - 1)


def test_a_shorter_context_predicts_worse(evaluate):
    long, short = (evaluate("--split=train", f"--block_size={T}")["tiny, train split"][0] for T in (16, 1))
    assert short > long


def test_bits_per_byte_count_only_bytes_of_the_text(evaluate, monkeypatch):
    """With a token before every document, all bytes of the text are predicted, and that token has no bytes."""
    tokenizer = checkpoint_tokenizer()
    tokenizer.eot = tokenizer.ids["\n"]
    monkeypatch.setattr(trained, "open_tokenizer", lambda _: tokenizer)
    Path("a.txt").write_text("The cat sat.")
    loss, tokens, _, bits = evaluate("--text=a.txt")["a.txt"]
    assert tokens == len("The cat sat.")
    assert loss == pytest.approx(nats_of(ids_of("\nThe cat sat.")) / tokens, abs=1e-5)
    assert bits == pytest.approx(loss / math.log(2), abs=1e-3)


def test_each_file_is_evaluated_separately(evaluate):
    texts = {"a.txt": tiny_text(2, seed=3), "b.txt": "T", "c.txt": tiny_text(5, seed=4)}
    for name, text in texts.items():
        Path(name).write_text(text)
    found = evaluate("--text=*.txt", "--per_document=True")
    assert list(found) == ["a.txt", "c.txt", "all 3 documents"]
    for name in ("a.txt", "c.txt"):
        assert found[name][:2] == pytest.approx(evaluate(f"--text={name}")[name][:2], abs=1e-5)
    assert found["all 3 documents"][:2] == pytest.approx(evaluate("--text=*.txt")["all 3 documents"][:2], abs=1e-5)
    tokens = [found[name][1] for name in ("a.txt", "c.txt")]
    mean = np.average([found[name][0] for name in ("a.txt", "c.txt")], weights=tokens)
    assert found["all 3 documents"][:2] == (pytest.approx(mean, abs=1e-5), sum(tokens))


def test_all_formats_that_can_be_prepared_can_be_evaluated(evaluate):
    first, second = tiny_text(2, seed=3), tiny_text(5, seed=4)
    Path("texts").mkdir()
    Path("texts/a.txt").write_bytes(b"\xef\xbb\xbf" + first.encode())
    with gzip.open("texts/b.txt.gz", "wt") as f:
        f.write(second)
    with gzip.open("both.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"body": text}) + "\n" for text in (first, second))
    folder = evaluate("--text=texts", "--per_document=True")
    assert list(folder) == ["texts/a.txt", "texts/b.txt.gz", "all 2 documents"]
    assert folder["texts/a.txt"][1] == len(first) - 1
    lines = evaluate("--text=both.jsonl.gz", "--field=body", "--per_document=True")
    assert list(lines) == ["both.jsonl.gz, document 1", "both.jsonl.gz, document 2", "all 2 documents"]
    assert list(lines.values()) == list(folder.values())


def test_a_text_larger_than_a_block_is_one_document(evaluate, monkeypatch):
    Path("a.txt").write_text(tiny_text(20, seed=9))
    whole = evaluate("--text=a.txt")
    monkeypatch.setattr(sources, "BLOCK", 100)
    assert evaluate("--text=a.txt") == whole and len(whole) == 1


def test_a_file_with_nothing_to_predict_says_so(evaluate, capsys):
    Path("a.txt").write_text("The cat.")
    Path("b.txt").write_text("T")
    program.main(["--device=cpu", "--text=?.txt", "--per_document=True"])
    assert "b.txt: has no token to predict\n" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_the_documents_of_a_dataset(evaluate, batch_size):
    found = evaluate("--per_document=True", f"--batch_size={batch_size}")
    ids = np.fromfile("data/tiny/val.bin", np.uint16).astype(int).tolist()
    begins = sorted({0} | {i for i, id in enumerate(ids) if id == ids_of("\n")[0]})
    documents = [ids[a : b + 1] for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]
    documents = [d for d in documents if len(d) > 1]
    assert len(found) == len(documents) + 1 and list(found)[-1].startswith("all ")
    for (loss, tokens, *_), document in zip(list(found.values())[:4], documents, strict=False):
        assert (loss, tokens) == (pytest.approx(nats_of(document) / (len(document) - 1), abs=1e-5), len(document) - 1)
    loss, tokens, _, bits = found[list(found)[-1]]
    text_bytes = sum(id != ids_of("\n")[0] for id in ids[1:])  # separators are no text
    assert (tokens, bits) == (len(ids) - 1, pytest.approx(loss * tokens / math.log(2) / text_bytes, abs=1e-3))


def test_a_model_trained_on_documents_is_evaluated_on_documents(evaluate, capsys):
    train.main([*SMALL, "--documents=True", "--out_dir=apart"])
    capsys.readouterr()
    ((name, found),) = evaluate("--out_dir=apart").items()
    assert name == "tiny, val split, each document by itself"
    assert found[0] == pytest.approx(metrics("apart")[-1]["exact_loss"], abs=1e-5)


def test_two_processes_give_the_result_of_one(evaluate, tmp_path):
    expected = evaluate("--per_document=True")
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    doors = [
        Door(
            tmp_path,
            ["eval", "--device=cpu", "--per_document=True"],
            f"log-{rank}",
            place | dict(RANK=rank, LOCAL_RANK=rank),
        )
        for rank in "01"
    ]
    assert [door.end() for door in doors] == [0, 0], doors[0].printed
    found = {m[1]: float(m[2]) for m in map(LINE.fullmatch, doors[0].printed.splitlines()) if m}
    assert found == pytest.approx({name: values[0] for name, values in expected.items()}, abs=1e-5)
    assert not any(map(LINE.fullmatch, doors[1].printed.splitlines()))  # one alone speaks


def test_standard_input_is_read_and_standard_output_has_only_results(trained_run):
    code = "from nanogpt.commands.cli import enter; enter()"
    command = [sys.executable, "-c", code, "eval", "--text=-"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, input="The cat sat.", env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert LINE.fullmatch(line)[1] == "standard input"
    assert "device: cpu" in done.stderr and "model: out/checkpoints" in done.stderr


def test_gpt2_weights_on_a_text(trained_run, evaluate, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt")
    write_tokenizer(tmp_path / "gpt", {"type": "gpt2"})
    Path("a.txt").write_text("Grüße, 世界. " * 20, encoding="utf-8")
    loss, tokens, perplexity, bits = evaluate("--init_from=gpt", "--text=a.txt")["a.txt"]
    assert loss == pytest.approx(math.log(50257), abs=0.3) and tokens > 100  # it has learned nothing
    assert bits == pytest.approx(loss * tokens / math.log(2) / len(("Grüße, 世界. " * 20).encode()), abs=1e-3)
    with pytest.raises(UserError, match="--text=FILE or --dataset=NAME says what to evaluate it on"):
        program.main(["--device=cpu", "--init_from=gpt"])


def test_a_tokenizer_that_is_larger_than_the_models_vocabulary_is_refused(trained_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=100)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt")
    write_tokenizer(tmp_path / "gpt", {"type": "byte"})
    Path("a.txt").write_text("The cat sat.")
    with pytest.raises(UserError, match="the model's vocabulary of 100 is smaller than the 257 of its tokenizer"):
        program.main(["--device=cpu", "--init_from=gpt", "--text=a.txt"])


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--text=zip"], "^--text=zip: there is no such file or folder$"),
        (["good.txt"], "^good.txt: a config file's name ends in .py; --text=good.txt evaluates on a text$"),
        (["--text=god.txt"], "there is no such file or folder; did you mean good.txt?"),
        (["--text=*.rst"], r"^--text=\*.rst: matches no file$"),
        (["--text=empty.txt"], "^--text=empty.txt: is empty$"),
        (["--text=mark.txt"], "^--text=mark.txt: there is no text in it$"),
        (["--text=bad.txt"], r"^--text=bad.txt: is not UTF-8 in 1 place, at byte 3 \(0xff\); --encoding=latin-1 or"),
        (["--text=ba*.txt"], r"^--text=ba\*.txt: bad.txt: is not UTF-8 in 1 place, at byte 3 \(0xff\); --encoding="),
        (["--text=bad.jsonl"], "^--text=bad.jsonl:1: has no field 'text', but txt; did you mean txt\\?$"),
        (["--text=one.txt"], "has only one token"),
        (["--text=other.txt"], r"^--text=other.txt: has fewer than two characters of the model's vocabulary"),
        (["--text=good.txt", "--dataset=tiny"], "either a text or a dataset"),
        (["--text=good.txt", "--stride=17"], "--stride=17: longer than the 16 tokens of the model's context"),
        (["--text=good.txt", "--block_size=17"], "--block_size=17: longer than the 16 tokens"),
        (["--text=good.txt", "--block_size=8", "--stride=9"], "--stride=9: must not exceed block_size, which is 8"),
        (["--dataset=tinny"], "did you mean tiny"),
        (["--dataset=../tiny"], "must be the name of a folder in data/"),
        (["--dataset=other"], "--dataset=other: its tokenizer is not the one of the model"),
        (["--split=test"], "expected one of train, val"),
        (["--out_dir=elsewhere"], "elsewhere: holds no checkpoint; there are some in out"),
        (["--init_from=gpt2"], "--init_from=gpt2: --text=FILE or --dataset=NAME says"),
    ],
)
def test_an_error_is_one_line(trained_run, args, expected):
    texts = dict(good=b"The cat", empty=b"", bad=b"The\xff", one=b"T", other="Mß é".encode(), mark=b"\xef\xbb\xbf")
    for name, content in texts.items():
        Path(f"{name}.txt").write_bytes(content)
    Path("bad.jsonl").write_text('{"txt": "The"}\n')
    write_dataset(Path("data/other"), CharTokenizer("ab"), [0, 1] * 20, [0, 1] * 20)
    with pytest.raises(UserError, match=expected) as caught:
        program.main(["--device=cpu", *args])
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


def test_texts_in_another_encoding_and_rows_without_text(trained_run, evaluate, monkeypatch, capsys):
    Path("a.txt").write_text(tiny_text(3), encoding="utf-16")
    ((_, expected),) = evaluate("--text=a.txt", "--encoding=utf-16").items()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(tiny_text(3).encode("utf-16"))))
    assert evaluate("--text=-", "--encoding=utf-16") == {"standard input": expected}
    Path("b.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in (tiny_text(3), None)))
    assert cli.main(["eval", "--device=cpu", "--text=b.json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"b.json, document 1: loss {expected[0]:.6f}")
    assert "b.json: is read as JSON lines" in err and "left out: 1 row or line without text" in err


def test_documents_of_a_dataset_without_a_separator_are_refused(trained_run):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    del meta["separator"]
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="--per_document=True: data/tiny/meta.json names no separator"):
        program.main(["--device=cpu", "--per_document=True"])


def test_all_files_that_are_not_text_are_named(trained_run):
    for name in ("a", "b"):
        Path(f"{name}.txt").write_bytes(b"\xff")
    with pytest.raises(UserError) as caught:
        program.main(["--device=cpu", "--text=?.txt"])
    assert len(caught.value.problems) == 2


def test_several_processes_cannot_share_standard_input(trained_run, dist):
    dist.world_size = 2
    with pytest.raises(UserError, match="several processes cannot share standard input"):
        program.read_texts(EvalConfig(text="-"), dist)


def test_no_bits_per_byte_if_a_text_has_unknown_characters(trained_run, evaluate, tmp_path, capsys):
    text = tiny_text() + "\ufffd"
    write_dataset(
        tmp_path / "data" / "open",
        tok := CharTokenizer(sorted(set(text)), "\ufffd"),
        tok.encode(text),
        tok.encode(text),
    )
    train.main([*SMALL, "--dataset=open", "--out_dir=out", "--max_iters=1", "--eval_interval=1"])
    capsys.readouterr()
    (tmp_path / "known.txt").write_text("the cat " * 20)
    (tmp_path / "unknown.txt").write_text("the 猫 " * 20)
    ((*_, known),) = evaluate("--text=known.txt").values()
    ((*_, unknown),) = evaluate("--text=unknown.txt").values()
    assert known > 0 and unknown is None
    program.main(["--device=cpu", "--text=unknown.txt"])
    (said,) = re.findall("^not in the model's vocabulary: .*$", capsys.readouterr().err, re.M)
    assert said.startswith("not in the model's vocabulary: 20 of 120 characters (16.67%), '猫' (U+732B): 20; ")
    assert said.endswith("each counts as the token for unknown characters, and bits per byte are not reported")


def test_unknown_characters_are_counted_and_left_out(evaluate, capsys):
    """A vocabulary without a token for unknown characters, like that of data/shakespeare_char, is no error."""
    known = tiny_text(3, seed=9)
    Path("a.txt").write_text(known)
    Path("b.txt").write_text("“" + known.replace(".", "é.") + "猫”")
    Path("c.txt").write_text("猫" * 9)
    expected = evaluate("--text=a.txt")["a.txt"]
    assert evaluate("--text=b.txt")["b.txt"] == pytest.approx(expected, abs=1e-4)
    found = evaluate("--text=*.txt", "--per_document=True")
    assert list(found) == ["a.txt", "b.txt", "all 3 documents"]
    assert found["b.txt"] == pytest.approx(expected, abs=1e-4)
    program.main(["--device=cpu", "--text=*.txt"])
    (said,) = re.findall("^not in the model's vocabulary: .*$", capsys.readouterr().err, re.M)
    total = 2 * len(known) + 15
    assert said.startswith(
        f"not in the model's vocabulary: 15 of {total} characters ({15 / total:.2%}), "
        "'猫' (U+732B): 10, 'é' (U+00E9): 3, '“' (U+201C): 1, and 1 more; they are left out, "
    )


@pytest.mark.parametrize("changes", [{"dataset": "../tiny"}, {"dataset": 5}, {"root": 5}, {"root": "a\0b"}])
def test_without_a_valid_dataset_name_eval_asks_for_one(changes):
    found = SimpleNamespace(settings={"dataset": "tiny"} | changes)
    with pytest.raises(UserError, match="--text=FILE or --dataset=NAME says what to evaluate it on"):
        program.from_split(settings.load(EvalConfig, [], "nanogpt eval"), found)
