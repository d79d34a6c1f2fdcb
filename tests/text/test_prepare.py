"""`nanogpt prepare`: datasets of any text and size, stopped at any moment, and invalid input."""

import errno
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import no_picture

import nanogpt.run.log
from nanogpt.commands import cli
from nanogpt.config import PrepareConfig, UserError
from nanogpt.run.settings import load
from nanogpt.text import prepare, sources, workers
from nanogpt.text.tokenizer import from_json

ROOT = Path(__file__).parents[2]
END = "<|endoftext|>"
DRAW = random.Random(1)
TEXT = "".join(f"Line {i}: Größe, 世界, жизнь, {'lamp ' * (i % 7)}\n" for i in range(400))
DOCUMENTS = [f"Document {i}: " + " ".join(DRAW.choices(TEXT.split(), k=i % 40 + 3)) for i in range(300)]


ADVISE = prepare.advise


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, and no advice at the end: it imports PyTorch in another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "advise", lambda **about: None)
    return tmp_path


@pytest.fixture
def run(capsys):
    """run("a.txt") prepares the dataset `own` in this process and returns what was printed."""

    def run(*args):
        capsys.readouterr()
        prepare.main([*map(str, args), "--dataset=own"])
        return capsys.readouterr().out

    return run


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def jsonl(name, texts):
    return write(name, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def meta(folder="data/own"):
    return json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))


def ids(split, folder="data/own"):
    about = meta(folder)
    names = about.get("files", {}).get(split, [f"{split}.bin"])
    return np.concatenate([np.fromfile(Path(folder) / name, about["dtype"]) for name in names])


def text(split):
    return from_json(meta()["tokenizer"]).decode(ids(split))


def documents(split):
    """The documents of a split; each begins with the separator."""
    begin, *found = text(split).split(END)
    assert begin == ""
    return found


def contents(folder="data/own"):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def problems(*args, dataset="own"):
    with pytest.raises(UserError) as caught:
        prepare.main([*args, f"--dataset={dataset}"])
    assert all("\n" not in line for line in caught.value.problems) and caught.value.exit_code == 2
    return list(caught.value.problems)


def problem(*args, **kwargs):
    (only,) = problems(*args, **kwargs)
    return only


# -- one text


@pytest.mark.parametrize("name", ["char", "byte", "gpt2", "bpe:300"])
def test_one_text_is_complete_and_its_end_is_validated_on(run, name):
    if name == "gpt2":
        pytest.importorskip("tiktoken")
    write("a.txt", TEXT)
    printed = run("a.txt", f"--tokenizer={name}")
    t = from_json(meta()["tokenizer"])
    train, val = ids("train").tolist(), ids("val").tolist()
    assert t.decode(train + val) == TEXT and train + val == t.encode(TEXT)
    assert len(train) == int(0.9 * len(train + val))
    assert meta() == {"tokenizer": t.to_json(), "vocab_size": t.vocab_size, "dtype": "uint16"}
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]
    assert f"{len(train):,} tokens to train on, {len(val):,} to validate on: the last 10.0% of the text" in printed


def test_char_vocabulary_is_the_text_and_an_unknown_token(run):
    run(write("a.txt", TEXT))
    t = from_json(meta()["tokenizer"])
    assert t.chars == sorted({*TEXT, "\ufffd"}) and t.unknown == "\ufffd"


def test_val_fraction(run):
    write("a.txt", "x" * 10_000)
    run("a.txt", "--val_fraction=0.25")
    assert (len(ids("train")), len(ids("val"))) == (7500, 2500)


def test_validation_tokens_are_limited(run, monkeypatch):
    monkeypatch.setattr(prepare, "VAL_TOKENS", 300)
    run(write("a.txt", TEXT))
    assert len(ids("val")) == 300


def test_standard_input(run, monkeypatch):
    write("a.txt", TEXT)
    run("a.txt")
    expected = contents()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    run("-")
    assert contents() == expected


def test_invalid_utf8_is_replaced_on_request(run):
    raw = TEXT.encode() + b"\xff\xfe" + TEXT.encode()
    write("a.txt", raw)
    assert "a.txt: is not UTF-8 in 2 places, the first at byte" in problem("a.txt")
    printed = run("a.txt", "--errors=replace")
    assert text("train") + text("val") == raw.decode("utf-8", "replace")
    assert "replaced: 2 places" in printed


def test_encoding_does_not_change_the_dataset(run, monkeypatch):
    latin = "".join(f"Straße {i}: größer, ältlich, «déjà vu»\n" for i in range(400))
    run(write("a.txt", latin))
    expected = contents()
    write("a.txt", latin.encode("cp1252"))
    assert "--encoding=latin-1 or another name reads other encodings" in problem("a.txt")
    run("a.txt", "--encoding=cp1252")
    assert contents() == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(latin.encode("utf-16"))))
    run("-", "--encoding=utf-16")
    assert contents() == expected
    write("a.txt", latin.encode("cp1252") + b"\x81")
    assert "a.txt: is not cp1252 in 1 place, at byte" in problem("a.txt", "--encoding=cp1252")
    assert "replaced: 1 places that were not CP1252" in run("a.txt", "--encoding=cp1252", "--errors=replace")


def test_rows_without_text_and_characters_of_any_kind(run):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [d + "\0" for d in DOCUMENTS]
    parquet.write_table(pyarrow.table({"text": [None, *texts, ""]}), "a.parquet")
    printed = run("a.parquet")
    assert "left out: 2 rows or lines without text (empty, null, or without the field 'text')" in printed
    assert sorted(documents("train") + documents("val")) == sorted(texts)
    expected = contents()
    write("b.json", "".join(json.dumps({"text": text}) + "\n" for text in [*texts, None]))
    printed = run("b.json", "--workers=1")
    assert "b.json: is read as JSON lines, with the text in the field 'text'" in printed
    assert "left out: 1 row or line without text" in printed and contents() == expected
    parquet.write_table(pyarrow.table({"text": pyarrow.array([None] * 5, "string")}), "c.parquet")
    assert problem("c.parquet").endswith(
        "would do; left out: 5 rows or lines without text (empty, null, or without the field 'text')"
    )


def test_printed_report(run):
    write("a.txt", "a" * 600 + "b" * 300 + "\n" * 100)
    printed = run("a.txt")
    assert "tokenizer: char, 4 tokens in its vocabulary; 1.00 bytes a token" in printed
    assert r"commonest tokens: 'a' 60.0%, 'b' 30.0%, '\n' 10.0%" in printed
    assert "took " in printed and "of memory, of 1024 MB" in printed


# -- many documents


@pytest.mark.parametrize("name", ["char", "byte", "bpe:300"])
def test_each_document_occurs_once_after_a_separator(run, name):
    jsonl("d.jsonl", DOCUMENTS)
    printed = run("d.jsonl", f"--tokenizer={name}")
    train, val = documents("train"), documents("val")
    assert sorted(train + val) == sorted(DOCUMENTS)
    assert meta()["separator"] == from_json(meta()["tokenizer"]).eot == ids("train")[0]
    assert not set(train) & set(val)
    assert 0.07 < len(ids("val")) / len(ids("train")) < 0.15
    assert f"{len(val)} of {len(DOCUMENTS)} documents, drawn at random" in printed
    assert train != [d for d in DOCUMENTS if d in train]  # shuffled


def test_seed_determines_order_and_split(run):
    jsonl("d.jsonl", DOCUMENTS)
    drawn = []
    for seed in (1, 1, 2):
        run("d.jsonl", f"--seed={seed}")
        drawn.append((documents("train"), documents("val")))
    assert drawn[0] == drawn[1] and drawn[0][1] != drawn[2][1]


def test_order_and_format_of_files_do_not_change_the_dataset(run):
    jsonl("a.jsonl", DOCUMENTS[:100])
    jsonl("b.jsonl", DOCUMENTS[100:])
    run("a.jsonl", "b.jsonl")
    expected = contents()
    for i, d in enumerate(DOCUMENTS):
        write(f"folder/{i}.txt", d)
    for names in (["b.jsonl", "a.jsonl"], ["folder"]):
        run(*names)
        assert contents() == expected


@pytest.mark.parametrize("bits, block", [(0, 700), (3, 2**20), (6, 700)])
def test_block_size_and_number_of_buckets_do_not_change_the_dataset(run, bits, block, monkeypatch):
    long = [DOCUMENTS[0] * 100, TEXT, *DOCUMENTS]
    jsonl("d.jsonl", long)
    run("d.jsonl")
    expected = contents()
    for module in (sources, workers):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(prepare, "choose_bits", lambda *args: bits)
    run("d.jsonl")
    assert sorted(documents("train") + documents("val")) == sorted(long)
    if block == 2**20:
        assert contents() == expected


def test_number_of_processes_does_not_change_the_dataset(run):
    jsonl("d.jsonl", [TEXT * 30, *DOCUMENTS * 4])
    write("a.txt", TEXT * 150)
    for args in (["d.jsonl"], ["a.txt"], ["a.txt", "d.jsonl", "--tokenizer=bpe:300", "--drop_duplicates=True"]):
        run(*args, "--workers=0")
        expected = contents()
        run(*args, "--workers=3")
        assert contents() == expected


def test_duplicates_are_in_one_split_and_are_dropped_on_request(run):
    repeated = [d for d in DOCUMENTS for _ in range(2)]
    jsonl("d.jsonl", [*repeated, TEXT * 2, TEXT * 2, TEXT])
    run("d.jsonl", "--val_fraction=0.3")
    assert not set(documents("train")) & set(documents("val"))
    assert len(documents("train") + documents("val")) == 603
    printed = run("d.jsonl", "--val_fraction=0.3", "--drop_duplicates=True")
    assert sorted(documents("train") + documents("val")) == sorted({*DOCUMENTS, TEXT * 2, TEXT})
    assert "duplicates: 301 documents dropped" in printed
    train, val = len(ids("train")), len(ids("val"))
    assert 0.27 < val / (train + val) < 0.38  # of what is left


def test_long_documents_with_the_same_beginning_are_not_duplicates(run, monkeypatch):
    for module in (sources, workers):
        monkeypatch.setattr(module, "BLOCK", 1000)
    alike = [TEXT + "a", TEXT + "b", TEXT + "a"]
    jsonl("d.jsonl", alike + DOCUMENTS)
    run("d.jsonl", "--drop_duplicates=True")
    found = documents("train") + documents("val")
    assert sorted(found) == sorted({*alike, *DOCUMENTS})


@pytest.mark.parametrize("block", [1000, 2**20])
def test_few_large_documents_are_split_at_their_ends(run, block, monkeypatch):
    for module in (sources, workers):
        monkeypatch.setattr(module, "BLOCK", block)
    for i in range(3):
        write(f"book{i}.txt", f"Book {i} " + TEXT)
    printed = run("book0.txt", "book1.txt", "book2.txt")
    train, val = documents("train"), documents("val")
    assert len(train) == len(val) == 3
    for a, b in zip(train, val, strict=True):
        assert a + b in [f"Book {i} " + TEXT for i in range(3)] and 0.08 < len(b) / len(a + b) < 0.12
    assert "the last 10.0% of each of the 3 documents" in printed


def test_few_large_documents_without_duplicates(run):
    books = [f"Book {i} " + TEXT for i in range(3)]
    jsonl("d.jsonl", [*books, books[0]])
    assert "of each of the 3 documents" in run("d.jsonl", "--drop_duplicates=True")
    assert sorted(a + b for a, b in zip(documents("train"), documents("val"), strict=True)) == books


def test_printed_share_does_not_count_duplicates(run):
    books = [f"Book {i} " + TEXT for i in range(3)]
    jsonl("d.jsonl", books + [books[0]] * 17)
    printed = run("d.jsonl", "--drop_duplicates=True")
    assert "the last 10.0% of each of the 3 documents" in printed and "duplicates: 17 documents dropped" in printed
    jsonl("e.jsonl", ["x" * 50] * 20)
    assert "less than one window" in (said := problem("e.jsonl", "--drop_duplicates=True")) and ", of 52, are" in said


def test_few_large_documents_with_a_large_vocabulary(run):
    chars = "".join(chr(c) for c in range(0x20, 0x12000) if not 0xD800 <= c < 0xE000)
    books = [f"Book {i} " + chars for i in range(3)]
    jsonl("d.jsonl", books)
    run("d.jsonl")
    assert meta()["dtype"] == "uint32"
    assert sorted(a + b for a, b in zip(documents("train"), documents("val"), strict=True)) == books


def test_one_large_document_is_not_all_of_the_training_split(run):
    small = [f"Note {i}. " + "word " * 20 for i in range(20)]
    jsonl("d.jsonl", [TEXT * 10, *small])
    printed = run("d.jsonl", f"--val_fraction={len(''.join(small)) / len(''.join([TEXT * 10, *small]))}")
    assert (
        len(documents("train")) == 21
        and "of each of the 21 documents, which cannot be divided well as wholes" in printed
    )


def test_one_small_document_is_not_all_of_the_validation_split(run):
    jsonl("d.jsonl", ["x" * 100, *(f"Book {i} " + TEXT for i in range(3))])
    assert "of each of the 4 documents, which cannot be divided well as wholes" in run("d.jsonl")
    assert len(documents("train")) == len(documents("val")) == 4


@pytest.mark.parametrize("large, wholes", [(10, True), (9, False)])
def test_ten_documents_are_enough_for_the_training_split(run, large, wholes):
    small, large = [f"{i:020}" for i in range(30)], [f"{i} " + "word " * 400 for i in range(large)]
    jsonl("d.jsonl", small + large)
    share = 30 * 21 / sum(len(d) + 1 for d in small + large)
    assert ("drawn at random" in run("d.jsonl", f"--val_fraction={share}")) is wholes
    assert set(documents("val")) <= set(small) if wholes else len(documents("val")) == len(small + large)


def test_two_equally_large_documents_are_divided(run):
    jsonl("d.jsonl", ["a" * 100, "b" * 100])
    assert "1 of 2 documents, drawn at random" in run("d.jsonl", "--val_fraction=0.5")
    assert {*documents("train"), *documents("val")} == {"a" * 100, "b" * 100}


@settings(max_examples=15)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=30, max_size=60),
    share=st.floats(0.05, 0.5),
    drop=st.booleans(),
)
def test_no_document_is_lost(here, texts, share, drop):
    texts = [f"{i % 25} {t.replace(END, '')} {'x' * 20}" for i, t in enumerate(texts)]
    jsonl("d.jsonl", texts)
    try:
        prepare.main(["d.jsonl", "--dataset=own", f"--val_fraction={share}", f"--drop_duplicates={drop}"])
    except UserError as e:
        assert "too little text" in str(e)
        return
    train, val = documents("train"), documents("val")
    whole = sorted(set(texts)) if drop else sorted(texts)
    if len(train) == len(val) == len(whole):
        train, val = [a + b for a, b in zip(train, val, strict=True)], []
    assert sorted(train + val) == whole
    assert not set(train) & set(val)


# -- any vocabulary, any size


def test_large_vocabulary_takes_four_bytes_per_id(run):
    chars = "".join(chr(c) for c in range(0x20, 0x12000) if not 0xD800 <= c < 0xE000)
    write("a.txt", chars * 2)
    run("a.txt")
    assert meta()["dtype"] == "uint32" and meta()["vocab_size"] > 2**16
    assert text("train") + text("val") == chars * 2


def test_sink_fills_each_file(here):
    sink = prepare.shuffle.Sink(here, "train", "uint16", 10)
    parts = np.split(np.arange(33), [3, 3, 10, 14, 16, 29])
    for part in parts:
        sink.write(part)
    sink.close()
    assert sink.names == ["train.bin", "train-00001.bin", "train-00002.bin", "train-00003.bin"]
    files = [np.fromfile(here / name, np.uint16).tolist() for name in sink.names]
    assert files == [list(range(i, min(i + 10, 33))) for i in range(0, 33, 10)]


@pytest.mark.parametrize("name", ["a.txt", "d.jsonl"])
def test_large_split_is_written_to_several_files(run, name):
    write("a.txt", TEXT * 4)
    jsonl("d.jsonl", DOCUMENTS * 4)
    run(name)
    expected = ids("train").tolist(), ids("val").tolist()
    run(name, "--shard_tokens=10000")
    files = meta()["files"]
    assert files["train"][:2] == ["train.bin", "train-00001.bin"] and len(files["train"]) > 3
    assert ("separator" in meta()) == (name == "d.jsonl")  # one text has none, however large it is
    assert {os.path.getsize(f"data/own/{n}") for n in files["train"][:-1]} == {20_000}
    assert (ids("train").tolist(), ids("val").tolist()) == expected
    run(name)
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]  # the old shards are gone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one long line", "documents", "one file of lines"])
def test_memory_stays_within_the_limit(kind, here, figure):
    """The corpus is several times the limit, which holds for all processes together."""
    psutil = pytest.importorskip("psutil")
    block = (TEXT * 60).encode()
    with open("a.txt" if kind != "documents" else "a.jsonl", "wb") as f:
        for i in range(1000 * 2**20 // len(block)):
            piece = block.replace(b"\n", b" ") if kind == "one long line" else block
            if kind == "documents":
                piece = "".join(json.dumps({"text": f"{i} {d}"}) + "\n" for d in DOCUMENTS * 40).encode()
            f.write(piece)
    code = "import sys; from nanogpt.text import prepare; prepare.advise = lambda **about: None; prepare.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, f.name, "--dataset=own", "--memory=300"]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        top, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, sum(p.memory_info().rss for p in [top, *top.children(recursive=True)]))
            except psutil.Error:
                pass
            time.sleep(0.05)
    assert process.returncode == 0
    figure(f"memory of 300 MB, a corpus of 1 GB, {kind}", f"{peak / 1e6:.0f} MB")
    assert peak < 300e6


# -- worker processes


def test_bpe_sample_fits_the_memory_and_is_evenly_spread():
    worker = workers.Worker(prepare.worker_settings(PrepareConfig()) | {"budget": 10_000, "vocab_size": 300})
    texts = [f"word{i} " * 20 for i in range(100)]
    for text in texts:
        worker.sample([sources.Document(text, b"", True)])
    assert worker.cost <= 10_000 and len(worker.kept) > 5
    assert worker.kept == [[text] for text in texts[:: worker.stride]]


def test_bpe_is_trained_on_all_of_a_long_text(run):
    run(write("a.txt", "12 34 56 78\n" * 5000 + " lamp" * 5000), "--tokenizer=bpe:300")
    assert len(from_json(meta()["tokenizer"]).encode(" lamp")) == 1


def test_number_of_workers_follows_cores_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "available_cores", lambda: 8)

    def workers(memory, size=10**9, kind="text", packing=""):
        found = [sources.Source("a", "a", kind, packing, size)]
        return prepare.choose_workers(PrepareConfig(memory=memory), found)

    assert (workers(4000), capsys.readouterr().out) == (8, "")
    assert workers(600) == 4 and "workers: 4 of 8 cores, as --memory=600 allows" in capsys.readouterr().out
    assert (workers(600, packing=".xz"), workers(600, kind="rows"), workers(4000, size=10**6)) == (3, 2, 0)


def test_buckets_are_small_compared_with_the_memory():
    cfg, found = PrepareConfig(memory=200), [sources.Source("a", "a", "jsonl", size=2 * 10**8)]
    bits = prepare.choose_bits(cfg, found, 100)
    assert 4 * 10**8 >> bits <= 200 * 10**6 // 8 < 4 * 10**8 >> (bits - 1)


def test_workers_read_few_blocks_ahead():
    taken, pool = [], workers.Pool(1, **prepare.worker_settings(PrepareConfig()))

    def blocks():
        for i in range(20):
            taken.append(i)
            yield sources.Block("text", [[0, i, 0, 1, True]], b"x", [0, i + 1, 0], 0)

    try:
        for done, _ in enumerate(pool.map(blocks(), lambda: "check"), 1):
            assert len(taken) <= done + workers.AHEAD
        assert done == 20
    finally:
        pool.close()


def test_half_a_result_of_a_worker_that_was_killed_is_not_waited_for():
    script = """
import os, signal
from nanogpt.config import PrepareConfig, RunFailed
from nanogpt.text import prepare, sources, workers
workers.WAIT = 0.2
pool = workers.Pool(1, **prepare.worker_settings(PrepareConfig()))
blocks = [sources.Block("text", [sources.Part(0, 0, 0, 1, True)], b"x", [0, 1, 0], 0)]
list(pool.map(blocks, lambda: "check"))
pool.executor._result_queue._writer._send(bytes(2))  # of the four bytes that say how long a result is
os.kill(*pool.executor._processes, signal.SIGKILL)
try:
    list(pool.map(blocks, lambda: "check"))
except RunFailed as e:
    print(e)
pool.close()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.startswith("a worker process ended abruptly"), done.stdout + done.stderr
    assert not done.stderr  # such as a warning about semaphores that were not released


def children(process):
    psutil = pytest.importorskip("psutil")
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


def test_workers_end_with_their_parent_and_do_not_load_pytorch(large):
    process = start_and_dwell("d.jsonl.gz", "--workers=2")
    started = children(process)
    assert len(started) == 2
    maps = [Path(f"/proc/{p.pid}/maps") for p in started]
    assert not any("libtorch" in path.read_text() for path in maps if path.exists())
    process.kill()
    process.communicate(timeout=600)
    for p in started:
        p.wait(timeout=600)


# -- stopped and continued

CODE = """
import sys, nanogpt.text.prepare as p, nanogpt.text.sources as s, nanogpt.text.workers as l
p.COMMIT, s.BLOCK, l.BLOCK, p.advise = 0.0, 20000, 20000, lambda **about: None
from nanogpt.commands import cli
{more}
cli.enter("prepare")
"""
DWELL = """
import time
def commit(work, *rest, real=p.commit, noted=[]):
    if len(noted) == 2:
        print("NOW", flush=True)
        time.sleep(600)
    noted.append(work.state.tokens)
    real(work, *rest)
p.commit = commit
"""


def start(*args, dataset="own", more=""):
    """Start the program in another process, which saves its state after every small block."""
    command = [sys.executable, "-c", CODE.format(more=more), *args, f"--dataset={dataset}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


def finish(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate()
    return process.returncode, out, err


def start_and_dwell(*args):
    """The same; it waits when the state of two blocks has been saved, and a third block has been written."""
    process = start(*args, more=DWELL)
    assert any(line == "NOW\n" for line in process.stdout), process.communicate()
    assert json.loads(Path("data/own/.prepare/state.json").read_text())["tokens"] > 0
    return process


RESUMED = [
    ["a.txt"],
    ["d.jsonl.gz", "a.txt", "--tokenizer=byte"],
    ["d.jsonl.gz", "--workers=2", "--drop_duplicates=True"],
]


@pytest.fixture
def large(here):
    """Sources of 2 MB, some of them compressed."""
    import gzip

    write("a.txt", TEXT * 100)
    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS * 20)
    write("d.jsonl.gz", gzip.compress(lines.encode(), 1))


@pytest.mark.parametrize("args", RESUMED, ids=["text", "several", "workers"])
def test_killed_and_restarted_writes_the_same_bytes(large, args):
    assert finish(*args, dataset="whole")[0] == 0
    for _ in range(2):
        process = start_and_dwell(*args)
        process.kill()
        process.communicate()
        assert not Path("data/own/meta.json").exists()
    code, out, err = finish(*args)
    assert (code, err) == (0, "") and "continuing where the last run stopped" in out
    assert contents() == contents("data/whole")


@pytest.mark.slow
@pytest.mark.parametrize("args", RESUMED, ids=["text", "several", "workers"])
def test_killed_at_ten_random_moments_writes_the_same_bytes(large, args, figure):
    began = time.monotonic()
    assert finish(*args, dataset="whole")[0] == 0
    seconds, draw, kills = time.monotonic() - began, random.Random(7), 0
    for _ in range(10):
        process = start(*args)
        try:
            process.wait(draw.uniform(0.0, seconds))
            process.communicate()
            shutil.rmtree("data/own")  # it had ended, so it begins again
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        assert Path("data/own/meta.json").exists() <= (contents() == contents("data/whole"))
    assert finish(*args)[0] == 0
    assert contents() == contents("data/whole")
    figure(f"prepare {' '.join(args)}, killed at random", f"{kills} kills, the same bytes")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_says_how_to_continue(large, signum, code):
    process = start_and_dwell("a.txt", "--workers=2")
    for target in [*children(process), process] if signum == signal.SIGINT else [process]:  # as a terminal does
        target.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == code
    assert err.strip() == "stopped; data/own is unchanged; run the same command again to continue"
    assert not Path("data/own/meta.json").exists()
    assert "continuing where the last run stopped" in finish("a.txt")[1]


@pytest.fixture
def stopped(run, monkeypatch):
    """stopped("a.txt") ends a preparation after some blocks, as if it had been killed."""

    def stopped(*args):
        add, done = prepare.shuffle.Buckets.add, []

        def stop(self, *args):
            done.append(1)
            if len(done) > 5:
                raise MemoryError
            return add(self, *args)

        monkeypatch.setattr(prepare, "COMMIT", 0.0)
        monkeypatch.setattr(prepare.shuffle.Buckets, "add", stop)
        for module in (sources, workers):
            monkeypatch.setattr(module, "BLOCK", 1000)
        with pytest.raises(MemoryError):
            run(*args)
        monkeypatch.setattr(prepare.shuffle.Buckets, "add", add)

    return stopped


def test_changed_source_starts_again(run, stopped):
    stopped(write("a.txt", TEXT))
    write("a.txt", TEXT.replace("lamp", "lump"))
    assert "starting again, not continuing the last run: a.txt has changed" in run("a.txt")
    assert text("train") + text("val") == TEXT.replace("lamp", "lump")


def test_other_settings_or_sources_start_again(run, stopped):
    write("b.txt", TEXT)
    stopped(write("a.txt", TEXT))
    assert "starting again, not continuing the last run: another --seed" in run("a.txt", "--seed=5")
    stopped("a.txt")
    assert "starting again, not continuing the last run: other sources" in run("b.txt")


def test_standard_input_can_continue(run, stopped, monkeypatch):
    for expected in ("", "continuing", ""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        if expected:
            assert expected in run("-")
        else:
            stopped("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() + b"more")))
    assert "standard input has changed" in run("-")


@pytest.mark.parametrize("lose", [lambda path: os.truncate(path, 100), os.unlink], ids=["a part", "a file"])
def test_incomplete_buckets_are_encoded_again(run, stopped, lose):
    stopped(write("a.txt", TEXT))
    lose("data/own/.prepare/bucket-00.ids")
    run("a.txt")
    assert text("train") + text("val") == TEXT


def test_wrong_setting_keeps_the_saved_state(run, stopped):
    stopped(write("a.txt", TEXT))
    assert "--workers=50: need up to" in problem("a.txt", "--workers=50")
    assert "continuing where the last run stopped" in run("a.txt")


def test_invalid_source_removes_the_saved_state(stopped):
    stopped(write("a.txt", TEXT))
    write("a.txt", b"x" * 5000 + b"\0")
    assert "a.txt: is not text" in problem("a.txt")
    assert not Path("data/own").exists()


def test_continuing_needs_less_disk(run, stopped, monkeypatch):
    stopped(write("a.txt", TEXT))
    free = len(TEXT.encode()) // 2 - 1000  # less than all of it is taken for
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - free, free))
    assert "continuing where the last run stopped" in run("a.txt")
    assert text("train") + text("val") == TEXT


@pytest.mark.parametrize("name", ["a.txt", "d.jsonl"])
def test_files_are_flushed_before_they_are_renamed(run, name, monkeypatch):
    """meta.json, which completes a dataset, comes last; and no state is saved before the buckets are on disk."""
    write("a.txt", TEXT)
    jsonl("d.jsonl", DOCUMENTS)
    fsync, replace, flushed, events = os.fsync, os.replace, set(), []
    folder = Path("data/own")

    def known(about):
        return about.st_ino, about.st_size

    def flush(handle):
        fsync(handle)
        flushed.add(known(os.fstat(handle)))
        if os.fstat(handle).st_ino == folder.stat().st_ino:
            events.append("flushed")

    def place(source, target):
        assert known(os.stat(source)) in flushed, source
        if Path(target).name == "state.json":
            assert {known(path.stat()) for path in folder.glob(".prepare/bucket-*")} <= flushed
        elif Path(target).parent == folder:
            events.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", place)
    run(name)
    assert events == ["train.bin", "val.bin", "flushed", "meta.json", "flushed"]


@pytest.mark.parametrize("name", ["a.txt", "d.jsonl"])
@pytest.mark.parametrize("fails", range(1, 9))
def test_killed_while_files_are_renamed(run, name, fails, monkeypatch):
    """A dataset is whole or absent at every moment, and the same command completes it."""
    run(write("old.txt", "old " * 1000))
    old = contents()
    write("a.txt", TEXT)
    jsonl("d.jsonl", DOCUMENTS)
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) == fails:
            raise MemoryError
        return replace(*args)

    monkeypatch.setattr(os, "replace", killed)
    ended = False
    try:
        run(name)
        ended = True
    except MemoryError:
        pass
    monkeypatch.setattr(os, "replace", replace)
    left = {name: data for name, data in contents().items() if name in old}
    assert ended or left == old or "meta.json" not in left
    run(name)
    if name == "a.txt":
        assert text("train") + text("val") == TEXT
    else:
        assert sorted(documents("train") + documents("val")) == sorted(DOCUMENTS)
    assert sorted(contents()) == ["meta.json", "train.bin", "val.bin"]


def test_lock_that_cannot_be_created_is_reported_in_one_line():
    write("a.txt", TEXT)
    os.makedirs("data/own/.prepare/lock")
    assert problem("a.txt").startswith("data/own: cannot be written to (Is a directory)")


def test_second_process_is_refused(run, large):
    process = start_and_dwell("a.txt")
    holder = f"process {process.pid} on {socket.gethostname()}"
    assert problem("a.txt") == f"data/own: another `nanogpt prepare` is at work there ({holder})"
    process.kill()
    process.communicate()


def test_dead_worker_is_reported_and_the_same_command_continues(large, run):
    process = start("d.jsonl.gz", "a.txt", "--workers=2", more=DWELL.replace("sleep(600)", "sleep(3)"))
    assert any(line == "NOW\n" for line in process.stdout)
    children(process)[0].kill()
    _, err = process.communicate()
    assert process.returncode == 1 and err.startswith("error: a worker process ended abruptly") and err.count("\n") == 1
    assert "continuing where the last run stopped" in finish("d.jsonl.gz", "a.txt", "--workers=2")[1]
    assert finish("d.jsonl.gz", "a.txt", dataset="whole")[0] == 0
    assert contents() == contents("data/whole")


# -- invalid input: one line, and nothing is left behind


@pytest.mark.parametrize(
    "name, data, complaint",
    [
        ("none.txt", None, "none.txt: there is no such file or folder"),
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b"\n" * 0 + b"\xef\xbb\xbf", "too little text"),
        ("a.txt", b"x" * 5000 + b"\0", "a.txt: is not text: byte 5000 is 0x00"),
        ("a.txt", TEXT.encode("latin-1", "replace"), "a.txt: is not UTF-8 in "),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: has no field 'text', but body"),
        ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03K", "a.txt.gz: is cut short"),
        ("a.txt", b"too short", "a.txt: too little text: 8 tokens to train on, of 9, are less than"),
        (
            "a.txt",
            b"x" * 600,
            "a.txt: too little text: 60 tokens to validate on, of 600, are less than one window of 64",
        ),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_bad_input_changes_nothing(run, name, data, complaint, earlier):
    if earlier:
        run(write("earlier.txt", TEXT))
    before = contents() if earlier else None
    if data is not None:
        write(name, data)
    assert complaint in problem(name)
    assert contents() == before if earlier else not Path("data").exists()


def test_validation_split_of_one_window_is_enough(run):
    assert "a text of 650 tokens would do" in problem(write("a.txt", "x" * 640))
    run(write("a.txt", "x" * 650))
    assert len(ids("val")) == 65


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", "."])
def test_dataset_name_that_is_a_path_is_refused(name):
    write("a.txt", TEXT)
    expected = f"--dataset={name}: must be the name of a folder in data/, not a path, and begin with neither . nor -; "
    assert problem("a.txt", dataset=name) == expected + "--root=FOLDER is for datasets that lie elsewhere"
    assert sorted(p.name for p in Path().iterdir()) == ["a.txt"]


def test_all_missing_settings_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        prepare.main(["--tokenizer=gtp2"])
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "nothing to prepare",
        "the dataset needs a name",
        "--tokenizer=gtp2",
    ]
    assert "did you mean gpt2?" in caught.value.problems[2]


def test_empty_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert problem("-") == "standard input: is empty"
    assert not Path("data").exists()


def test_too_little_disk_is_reported_first(run, monkeypatch):
    write("a.txt", "x" * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    assert problem("a.txt").startswith("data/own: needs about 0.5 MB of disk, but 0.0 MB are free")
    assert not Path("data").exists()


def test_needed_disk_is_estimated_from_the_number_of_characters(run, monkeypatch):
    """Before that, a character may have four bytes."""
    write("a.txt", "x" * 3 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 8 * 10**6, 2 * 10**6))
    assert problem("a.txt").startswith("data/own: needs about 6.0 MB of disk, but 2.0 MB are free")
    assert not Path("data").exists()


def test_full_disk_is_reported_and_the_same_command_continues(run, monkeypatch):
    write("a.txt", TEXT)
    for module in (sources, workers):
        monkeypatch.setattr(module, "BLOCK", 1000)
    add = prepare.shuffle.Buckets.add

    def full(self, *args):
        if self.files[0].tell() > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, *args)

    monkeypatch.setattr(prepare, "COMMIT", 0.0)
    monkeypatch.setattr(prepare.shuffle.Buckets, "add", full)
    expected = "data/own: cannot be written to (No space left on device); once that is fixed, run the same command"
    assert problem("a.txt").startswith(expected)
    assert not Path("data/own/meta.json").exists()
    monkeypatch.setattr(prepare.shuffle.Buckets, "add", add)
    assert "continuing where the last run stopped" in run("a.txt")
    assert text("train") + text("val") == TEXT


@pytest.mark.parametrize(
    "name, package, extra",
    [("gpt2", "tiktoken", "gpt2"), ("bpe:500", "tiktoken", "bpe"), ("bpe:500", "tokenizers", "bpe")],
)
def test_missing_package(name, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    write("a.txt", TEXT)
    said = problem("a.txt", f"--tokenizer={name}")
    assert said.startswith(f"--tokenizer={name}: ") and f"pip install -c constraints.txt -e '.[{extra}]'" in said


def test_more_workers_than_memory_allows_is_refused(run):
    write("a.txt", TEXT)
    assert "--workers=50: need up to" in problem("a.txt", "--workers=50")


def test_mistyped_setting():
    assert (
        problem("a.txt", "--tokeniser=char")
        == "--tokeniser=char: there is no setting 'tokeniser'; did you mean tokenizer?"
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        load(PrepareConfig, ["--help"], "nanogpt prepare")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: nanogpt prepare SOURCE ... [--key=value ...]\n")


# -- prepare, train, sample


@pytest.mark.parametrize("name", ["char", "byte", "gpt2", "bpe:400"])
def test_prepare_train_and_sample(here, run_door, name):
    """Three commands in a shell, without any paths."""
    write("my.txt", "".join(f"Grüße, 世界! Привет, мир {i}! 👋🏽 {'é' * (i % 3)}\n" for i in range(300)))
    code = "from nanogpt.commands.cli import enter; enter()"
    command = [sys.executable, "-c", code, "prepare", "my.txt", "--dataset=my", f"--tokenizer={name}", "--trial=False"]
    prepared = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert prepared.returncode == 0, prepared.stderr
    assert "next: nanogpt train --" in prepared.stdout and "--dataset=my" in prepared.stdout
    tiny = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1"
    short = "--max_iters=3 --eval_interval=3 --eval_iters=1 --warmup_iters=0 --device=cpu --compile=False"
    trained = run_door("train.py", "--dataset=my", *tiny.split(), *short.split())
    assert "exact val loss" in trained.stdout, trained.stderr
    shutil.rmtree("data")  # the tokenizer is in the checkpoint
    sampled = run_door("sample.py", "--start=Grüße, 世界", "--num_samples=1", "--max_new_tokens=20", "--device=cpu")
    assert sampled.returncode == 0 and sampled.stdout.startswith("Grüße, 世界"), sampled.stderr
    assert "vocabulary" not in sampled.stderr


def test_printed_command_trains_on_a_dataset_in_any_folder(here, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "advise", ADVISE)
    write("my.txt", TEXT)
    assert cli.main(["prepare", "my.txt", "--dataset=my data", "--root=some where/data", "--trial=False"]) == 0
    printed = capfd.readouterr().out
    assert "trial: " not in printed
    (command,) = [line.removeprefix("next: ") for line in printed.splitlines() if line.startswith("next: ")]
    small = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --warmup_iters=0 --eval_iters=1"
    short = [*small.split(), "--max_iters=2", "--eval_interval=2", "--device=cpu", "--compile=False"]
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": places}
    trained = subprocess.run(f"{command} {' '.join(short)}", shell=True, env=env, capture_output=True, text=True)
    assert trained.returncode == 0 and "exact val loss" in trained.stdout, trained.stderr
    monkeypatch.setattr(nanogpt.run.log, "draw_losses", no_picture)
    assert cli.main(["train", "--init_from=resume", "--out_dir=out-my data", "--max_iters=3"]) == 0
    assert "data: my data, " in capfd.readouterr().out
    assert cli.main(["eval", "--out_dir=out-my data", "--device=cpu"]) == 0
    assert capfd.readouterr().out.startswith("my data, val split: loss ")
    os.rename("some where", "elsewhere")
    assert cli.main(["eval", "--out_dir=out-my data", "--device=cpu"]) == 2
    assert "--dataset=my data: some where/data/my data/ does not exist" in capfd.readouterr().err
    for named in ([], ["--dataset=my data"]):
        assert cli.main(["eval", "--out_dir=out-my data", "--device=cpu", "--root=elsewhere/data", *named]) == 0


@pytest.mark.parametrize(
    "torch, said",
    [
        ("import os; os.kill(os.getpid(), 9)", "its process ended with -9"),
        ("raise ImportError('no such\\nlibrary')", "library"),
        ("raise SystemExit(3)", "its process ended with 3"),
    ],
)
def test_failed_advice_is_reported_and_the_dataset_stays(monkeypatch, capfd, torch, said):
    monkeypatch.setattr(prepare, "advise", ADVISE)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    write("torch.py", torch)
    write("a.txt", TEXT)
    assert cli.main(["prepare", "a.txt", "--dataset=own"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.splitlines()[-1] == f"no advice on how to train: {said}"
    assert out.splitlines()[-2].startswith("trial: once PyTorch is loaded, up to 3 seconds of training show")
    assert text("train") + text("val") == TEXT


def test_other_files_in_the_folder_stay(run, here):
    write("a.txt", "some text " * 300)
    folder = here / "data" / "own"
    folder.mkdir(parents=True)
    for name in ("train-notes.bin", "validation.bin", "train-00007.bin"):
        (folder / name).write_bytes(b"1")
    run("a.txt")
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json", "train-notes.bin", "train.bin", "val.bin", "validation.bin",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "token, expected", [("e\u0301".encode(), "'e\u0301'"), ("\u0301".encode(), "'\\u0301'"), (b"\xcc", "'\\xcc'")]
)
def test_tokens_are_quoted_readably(token, expected):
    assert prepare.quoted(token) == expected
