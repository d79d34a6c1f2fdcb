"""Tokenizers of models in Hugging Face's format: read with their own ids, or refused in one line, never guessed."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, SMALL, write_tokenizer

from nanogpt.commands import cli
from nanogpt.config import UserError
from nanogpt.evaluate import byte_lengths
from nanogpt.formats.hugging_face import to_hugging_face
from nanogpt.model import GPT, GPTConfig
from nanogpt.text import prepare
from nanogpt.text.dataset import tokenizer_of, write_dataset
from nanogpt.text.hugging_face_tokenizer import read as from_hugging_face
from nanogpt.text.tokenizer import CharTokenizer, GPT2Tokenizer, Stream, from_json, same

tokenizers = pytest.importorskip("tokenizers")
models, trainers, before, decoders = (
    getattr(tokenizers, name) for name in ("models", "trainers", "pre_tokenizers", "decoders")
)

pytestmark = pytest.mark.usefixtures("undrawn")

END = "<|endoftext|>"
REAL = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [REAL, "Größe, naïve 東京, don't stop   it!\n\n\t🎭 ", "  two", "two  ", "\n", ""]


def bytewise(specials, size=400, **settings):
    """Byte-level BPE as Hugging Face's library trains it, special tokens first."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = before.ByteLevel(**{"add_prefix_space": False} | settings), decoders.ByteLevel()
    alphabet = before.ByteLevel.alphabet()
    settings = dict(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([REAL], trainers.BpeTrainer(**settings))
    return tok


def wordpiece():
    """WordPiece as in BERT, which lowers case and adds [CLS] and [SEP]; it also truncates and pads."""
    tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), before.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    settings = dict(vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tok.train_from_iterator([REAL], trainers.WordPieceTrainer(**settings))
    tok.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tok.enable_truncation(16)
    tok.enable_padding()
    return tok


def unigram():
    tok = tokenizers.Tokenizer(models.Unigram())
    tok.pre_tokenizer, tok.decoder = before.Metaspace(), decoders.Metaspace()
    settings = dict(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False)
    tok.train_from_iterator([REAL], trainers.UnigramTrainer(**settings))
    return tok


def exactly_gpt2s_size(first):
    """A vocabulary of 50,257 tokens that is not GPT-2's: bytes, and pairs of them in random order."""
    alphabet = sorted(before.ByteLevel.alphabet())
    pairs = random.Random(1).sample(list(itertools.product(alphabet, alphabet)), 50_000)
    tokens = [*alphabet, *map("".join, pairs)]
    tokens = [END, *tokens] if first else [*tokens, END]
    tok = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tok.pre_tokenizer, tok.decoder = before.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([END])
    return tok


def merged_out_of_other_parts():
    """BPE in which `the` can only be merged from t and he, which never happens: t and h are merged first."""
    alphabet = sorted(before.ByteLevel.alphabet())
    merges = [("t", "h"), ("h", "e"), ("t", "he")]
    tokens = [*alphabet, *map("".join, merges), END]
    tok = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tok.pre_tokenizer, tok.decoder = before.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([END])
    return tok


OTHERS = {  # how it is made, the id of its end of text, what it is here
    "end of text first": (lambda: bytewise([END]), 0, "hf"),
    "no end of text": (lambda: bytewise([]), None, "hf"),
    "a space before all": (lambda: bytewise([END], add_prefix_space=True), 0, "hf"),
    "words not kept apart": (lambda: bytewise([END], use_regex=False), 0, "hf"),
    "other merges": (merged_out_of_other_parts, 259, "hf"),
    "WordPiece": (wordpiece, None, "hf"),
    "Unigram": (unigram, None, "hf"),
    "50,257 tokens, end of text last": (lambda: exactly_gpt2s_size(False), 50_256, "bpe"),
    "50,257 tokens, end of text first": (lambda: exactly_gpt2s_size(True), 0, "hf"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_ids_equal_those_of_the_tokenizers_library(tmp_path, kind):
    make, eot, ours = OTHERS[kind]
    make().save(str(tmp_path / "tokenizer.json"))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    described = from_hugging_face(tmp_path)
    tok = from_json(json.loads(json.dumps(described)))
    assert (described["type"], tok.eot, tok.vocab_size) == (ours, eot, theirs.get_vocab_size())
    assert tok.to_json() == described
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == tok.encode_numpy(text).tolist() == ids
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        stream = Stream(tok)
        shown = "".join([*map(stream.push, ids), stream.flush()])
        assert shown.lstrip(" ") == tok.decode(ids).lstrip(" ")  # which of them a text begins with, kinds differ about
    place = tok.cut(REAL.encode())
    parts = REAL.encode()[:place].decode(), REAL.encode()[place:].decode()
    assert place and tok.encode(REAL) == tok.encode(parts[0]) + tok.encode(parts[1])
    changes = kind in ("a space before all", "WordPiece", "Unigram")
    lengths = byte_lengths(tok)
    assert lengths is None if changes else lengths[tok.encode(REAL)].sum() == len(REAL.encode())


def test_end_of_text_spelled_out_is_ordinary_text(tmp_path):
    bytewise([END]).save(str(tmp_path / "tokenizer.json"))
    tok = from_json(from_hugging_face(tmp_path))
    assert tok.eot not in tok.encode(f"a{END}b") and tok.decode(tok.encode(f"a{END}b")) == f"a{END}b"


@pytest.mark.parametrize(
    "settings, eot", [({"eos_token": "</s>"}, 1), ({"eos_token": {"content": "</s>"}}, 1), ({}, None)]
)
def test_end_of_text_is_read_from_tokenizer_config(tmp_path, settings, eot):
    unigram().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert from_json(from_hugging_face(tmp_path)).eot == eot


@pytest.mark.parametrize("first", [False, True])
def test_reads_vocab_json_and_merges_txt(tmp_path, first):
    theirs = exactly_gpt2s_size(first)
    theirs.model.save(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    tok = from_json(from_hugging_face(tmp_path))
    assert tok.encode(REAL) == theirs.encode(REAL).ids and tok.eot == theirs.token_to_id(END)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match="has no tokenizer; expected the model's own tokenizer.json"):
        from_hugging_face(tmp_path)


def test_gpt2_is_recognised_only_by_its_merges(tmp_path):
    write_tokenizer(tmp_path, {"type": "gpt2"})
    assert from_hugging_face(tmp_path) == {"type": "gpt2"}
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"]["merges"][1000:1002] = reversed(file["model"]["merges"][1000:1002])
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tok = from_json(from_hugging_face(tmp_path))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tok.to_json()["type"] == "hf" and tok.encode(REAL) == theirs.encode(REAL).ids


def break_it(file, change):
    """Change a tokenizer.json in one way."""
    if change == "the id of a special token":
        file["added_tokens"][0]["id"] = 7
    elif change == "an id twice":
        file["model"]["vocab"] |= {"a": 5, "b": 5}
    elif change == "an id out of reach":
        file["model"]["vocab"]["a"] = 2**31
    elif change == "a merge of no tokens":
        file["model"]["merges"].append(["nothing", "known"])
    elif change == "no model":
        del file["model"]
    elif change == "a list":
        return [file]
    return file


@pytest.mark.parametrize(
    "change",
    ["the id of a special token", "an id twice", "an id out of reach", "a merge of no tokens", "no model", "a list"],
)
def test_invalid_tokenizer_is_reported_in_one_line(tmp_path, change):
    file = json.loads(bytewise([END, "<pad>"]).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(break_it(file, change)))
    with pytest.raises(UserError) as caught:
        from_hugging_face(tmp_path)
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path}/tokenizer.json: ") and "\n" not in line


@pytest.mark.parametrize("content", ["", "{", "null", "[" * 100_000, "\0"])
def test_broken_file_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="does not describe a tokenizer"):
        from_hugging_face(tmp_path)


def test_same_compares_tokens():
    gpt2 = GPT2Tokenizer()
    assert same({"type": "gpt2"}, super(GPT2Tokenizer, gpt2).to_json())  # the same tokens, otherwise described
    assert same({"type": "char", "chars": ["a", "b"]}, {"type": "char", "chars": ["a", "b"], "unknown": "b"})
    assert not same({"type": "char", "chars": ["a", "b"]}, {"type": "char", "chars": ["b", "a"]})
    assert not same({"type": "char", "chars": ["a", "b"]}, {"type": "byte"})


# -- commands


@pytest.fixture
def here(tiny, monkeypatch):
    """The folder above data/tiny, and no advice."""
    monkeypatch.chdir(tiny.parent.parent)
    monkeypatch.setattr(prepare, "advise", lambda **about: None)
    return tiny.parent.parent


def model_of(tok, folder="hf"):
    """A model in Hugging Face's format with this tokenizer."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=tok.get_vocab_size())
    to_hugging_face(GPT(config), CharTokenizer([chr(0xF0000 + i) for i in range(config.vocab_size)]), folder)
    (Path(folder) / "tokenizer_config.json").unlink()
    tok.save(f"{folder}/tokenizer.json")


def problem(capsys, *command):
    """The one line of a command's error; the command must change nothing."""
    was = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    assert cli.main(list(command)) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in shown.err and {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == was
    return line


WRITE = ["--device=cpu", "--num_samples=1", "--max_new_tokens=5", "--start=the"]


@pytest.mark.parametrize(
    "command",
    [
        ["sample", *WRITE, "--init_from=hf"],
        ["talk", "--device=cpu", "--init_from=hf"],
        ["serve", "--device=cpu", "--port=0", "--init_from=hf"],
        ["eval", "--device=cpu", "--init_from=hf", "--dataset=tiny"],
        ["export", "--init_from=hf", "--to=again"],
        ["train", *SMALL, "--init_from=hf"],
        ["prepare", "a.txt", "--dataset=own", "--tokenizer=hf"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("size", [60, 50_257])
def test_folder_without_tokenizer_is_refused(here, capsys, command, size):
    Path("a.txt").write_text(REAL)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=16, vocab_size=size)
    to_hugging_face(GPT(config), CharTokenizer([chr(0xF0000 + i) for i in range(size)]), "hf")
    for path in Path("hf").glob("tokenizer*"):
        path.unlink()
    line = problem(capsys, *command)
    assert "hf: has no tokenizer; expected the model's own tokenizer.json there" in line


def test_dataset_of_another_tokenizer_is_refused_and_the_suggested_command_works(here, capsys):
    model_of(bytewise([END], 300))
    for command in (["train", *SMALL], ["eval", "--device=cpu", "--dataset=tiny"]):
        line = problem(capsys, *command, "--init_from=hf")
        assert line == (
            "error: --dataset=tiny: its tokenizer is not the one of the model in hf; "
            "nanogpt prepare SOURCE --dataset=NAME --tokenizer=hf prepares a matching dataset"
        )
    documents = [f"Document {i}. {REAL[100 * i : 100 * i + 100]}" for i in range(60)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert cli.main(["prepare", "a.jsonl", "--dataset=own", "--tokenizer=hf"]) == 0
    meta = json.loads(Path("data/own/meta.json").read_text())
    assert meta["separator"] == 0 and from_json(meta["tokenizer"]).vocab_size == meta["vocab_size"] == 300
    ids, tok = np.fromfile("data/own/train.bin", np.uint16), from_json(meta["tokenizer"])
    begins = np.flatnonzero(ids == 0)
    assert begins[0] == 0 and all(
        tok.decode(ids[a + 1 : b]) in documents for a, b in zip(begins, begins[1:], strict=False)
    )
    run = [*SMALL, "--dataset=own", "--init_from=hf", "--documents=True"]
    assert cli.main(["train", *run]) == 0
    capsys.readouterr()
    assert cli.main(["sample", *WRITE]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert cli.main(["eval", "--device=cpu"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert cli.main(["export", "--to=again"]) == 0
    assert from_hugging_face("again") == meta["tokenizer"] == tokenizer_of("out") == tokenizer_of("data/own")


def test_training_continues_on_other_text_with_the_same_tokenizer(here, capsys):
    assert cli.main(["train", *SMALL, "--max_iters=1"]) == 0
    other = Path("data/other")
    write_dataset(other, CharTokenizer("0123456789"), [1] * 200, [2] * 100)
    line = problem(capsys, "train", *SMALL, "--dataset=other", "--init_from=out", "--out_dir=tuned")
    assert line.endswith("nanogpt prepare SOURCE --dataset=NAME --tokenizer=out prepares a matching dataset")
    Path("more.txt").write_text("The cat sat by the hill.\nThe hen ran by the barn.\n" * 40)
    assert cli.main(["prepare", "more.txt", "--dataset=more", "--tokenizer=out"]) == 0
    assert cli.main(["train", *SMALL, "--dataset=more", "--init_from=out", "--out_dir=tuned"]) == 0


def test_several_documents_need_an_end_of_text_token(here, capsys):
    model_of(wordpiece())
    Path("a.txt").write_text(REAL)
    Path("b.txt").write_text(REAL)
    line = problem(capsys, "prepare", "a.txt", "b.txt", "--dataset=own", "--tokenizer=hf")
    assert "--tokenizer=hf: has no end-of-text token to separate documents" in line
    assert cli.main(["prepare", "a.txt", "--dataset=own", "--tokenizer=hf"]) == 0
    assert "separator" not in json.loads(Path("data/own/meta.json").read_text())


def test_tokenizer_larger_than_the_model_is_refused(here, capsys):
    model_of(bytewise([END], 300))
    bytewise([END], 301).save("hf/tokenizer.json")
    line = problem(capsys, "sample", *WRITE, "--init_from=hf")
    assert line == "error: hf: the model's vocabulary of 300 is smaller than the 301 of its tokenizer"
