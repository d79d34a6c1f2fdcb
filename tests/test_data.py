"""Token files and batches: written whole, checked when read, drawn as a pure function of the seed."""

import gc
import json
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanogpt import data
from nanogpt.config import RunFailed, UserError
from nanogpt.data import (
    Batches,
    Dataset,
    Documents,
    find_documents,
    hash64,
    permutation,
    step_seed,
)
from nanogpt.text import dataset as folders
from nanogpt.text.dataset import read_meta, write_dataset

# Datasets on disk


def numbers(vocab_size):
    """A stand-in for a tokenizer; a dataset needs no more of it."""
    return SimpleNamespace(vocab_size=vocab_size, to_json=lambda: {"type": "numbers"})


@pytest.fixture
def make(tmp_path):
    """Write the dataset `d` of these ids, and return its folder."""

    def make(ids, vocab_size=100, val=(0,) * 10):
        write_dataset(tmp_path / "data" / "d", numbers(vocab_size), ids, val)
        return tmp_path / "data" / "d"

    return make


def open_dataset(folder, block_size=4, split="train", documents=False):
    return folders.open_dataset(folder.name, split, block_size, root=folder.parent, documents=documents)


def describe(folder, **changes):
    """Change what the dataset's meta.json says."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def shard(folder, *cuts, split="train"):
    """Cut a split's one file at these ids into several."""
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    parts = np.split(np.fromfile(folder / f"{split}.bin", dtype), cuts)
    names = [f"{split}.bin", *(f"{split}-{i:05d}.bin" for i in range(1, len(parts)))]
    for name, part in zip(names, parts, strict=True):
        part.tofile(folder / name)
    describe(folder, files={split: names})
    return folder


def problem(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        open_dataset(*args, **kwargs)
    (only,) = caught.value.problems
    return only


def test_what_is_written_is_read(make):
    folder = make(list(range(100)), val=[7] * 20)
    train, val = open_dataset(folder), open_dataset(folder, split="val")
    assert train.tokens[:].tolist() == list(range(100)) and val.tokens[:].tolist() == [7] * 20
    assert (train.vocab_size, train.tokenizer_json) == (100, {"type": "numbers"})
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_text_survives(tiny):
    dataset = folders.open_dataset("tiny", "train", 16, root=tiny.parent)
    text = "".join(dataset.tokenizer_json["chars"][i] for i in dataset.tokens[:])
    assert text.startswith("The ") and len(text) == len(dataset.tokens) > 5000


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32"), (2**20, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(make, vocab_size, dtype):
    ids = [0, vocab_size - 1, 1, 2, 3, 4]
    folder = make(ids, vocab_size)
    assert json.loads((folder / "meta.json").read_text())["dtype"] == dtype
    assert np.fromfile(folder / "train.bin", dtype).tolist() == ids
    assert open_dataset(folder).tokens[:].tolist() == ids


def test_the_tokens_cannot_be_written_to(make):
    with pytest.raises(ValueError, match="read-only"):
        open_dataset(make(range(100))).tokens[:5][0] = 1


@pytest.mark.parametrize("ids", [[0, 100], [-1, 5]])
def test_an_id_outside_the_vocabulary_is_not_written(make, ids, tmp_path):
    with pytest.raises(ValueError, match="train: a token id is outside the vocabulary of 100"):
        make(ids)
    assert list((tmp_path / "data" / "d").iterdir()) == []


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "existing, fails",
    [
        *[(False, fails) for fails in ("write", 1, 2, 3)],
        *[(True, fails) for fails in ("write", 1)],
        *[(True, fails) for fails in (2, 3)],
    ],
)
def test_an_interrupted_write_leaves_a_whole_dataset_or_none(make, existing, fails, monkeypatch, tmp_path):
    folder = make([1] * 50, vocab_size=100) if existing else tmp_path / "data" / "d"
    before = contents(folder) if existing else {}
    rename, calls = os.replace, []

    def full_disk(*args):
        calls.append(args)
        if fails == "write" or len(calls) == fails:
            raise OSError("no space left on device")
        return rename(*args)

    monkeypatch.setattr(os, "fsync" if fails == "write" else "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make([2] * 50, vocab_size=200)
    after = contents(folder)
    assert after == before or (fails != "write" and "meta.json" not in after)
    assert not [name for name in after if name.startswith(".") or name.endswith(".tmp")]


# What is wrong with a dataset, in one line


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "data" / "novel"
    folder.mkdir(parents=True)
    (folder / "prepare.py").touch()
    expected = f"--dataset=novel: {folder}/ has no meta.json; python {folder}/prepare.py prepares it"
    assert problem(folder) == expected


def test_a_mistyped_dataset_names_the_nearest(make):
    folder = make(range(100))
    (folder.parent / "shakespeare").mkdir()
    (folder.parent / "shakespeare" / "prepare.py").touch()
    mistyped = folder.parent / "shakespear"
    expected = f"--dataset=shakespear: {mistyped}/ does not exist; did you mean shakespeare?"
    assert problem(mistyped) == expected
    assert problem(folder.parent / "zzzzzz").endswith("does not exist; prepared datasets: d")


def test_a_dataset_that_is_not_sound_is_no_suggestion_for_itself(make):
    folder = make(range(100))
    describe(folder, dtype="int64")
    said = problem(folder)
    assert said.startswith(f"{folder / 'meta.json'}: does not describe a dataset; for GPT-2 tokens, write {{")
    assert "did you mean" not in said and "prepared datasets" not in said
    describe(folder, dtype="uint16")
    (folder / "train.bin").unlink()
    assert problem(folder) == f"--dataset=d: {folder / 'train.bin'} is missing"


def test_old_bins_without_meta_json_can_be_read_once_it_says_what_the_message_shows(make):
    folder = make(range(100))
    (folder / "meta.json").unlink()
    said = problem(folder)
    assert said.startswith(
        f"--dataset=d: {folder}/ has no meta.json; for GPT-2 tokens prepared by the original nanoGPT, write"
    )
    (folder / "meta.json").write_text(said[said.index("{") :])
    dataset = open_dataset(folder)
    assert (dataset.vocab_size, dataset.tokens[:].tolist()) == (50257, list(range(100)))
    assert dataset.tokenizer_json == {"type": "gpt2"}


@pytest.mark.parametrize("name", ["meta.json", "meta.pkl", "train.bin"])
@pytest.mark.parametrize(
    "put, why",
    [
        (os.mkdir, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "is not a regular file"),
        (lambda path: os.symlink(path, path), "cannot be read (Too many levels of symbolic links)"),
    ],
    ids=["folder", "FIFO", "device", "circle"],
)
def test_what_is_no_file_is_told_in_one_line(make, name, put, why):
    folder = make(range(100))
    (folder / ("meta.json" if "meta" in name else name)).unlink()
    put(folder / name)
    assert problem(folder) == f"{folder / name}: {why}"


@pytest.mark.parametrize(
    "put, said",
    [
        (lambda path: path.write_text("x"), "--dataset=e: {}/ is not a folder"),
        (lambda path: path.symlink_to("nowhere"), "--dataset=e: {}/ does not exist"),
        (lambda path: path.symlink_to("e"), "{}/meta.json: cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_a_dataset_that_is_no_folder(make, put, said):
    put(folder := make(range(100)).parent / "e")
    assert problem(folder).startswith(said.format(folder))


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"null", b'{"vocab_size": 5}', b"[" * 10**5, b"1" * 5000])
def test_a_meta_json_that_is_something_else(make, text):
    folder = make(range(100))
    (folder / "meta.json").write_bytes(text)
    assert problem(folder).startswith(f"{folder / 'meta.json'}: does not describe a dataset; ")


def test_a_command_that_makes_a_dataset_is_quoted_for_a_shell(tmp_path):
    folder = tmp_path / "my data" / "d"
    folder.mkdir(parents=True)
    (folder / "prepare.py").touch()
    assert problem(folder).endswith(f"; python '{folder}/prepare.py' prepares it")


def test_a_missing_split_is_named(make):
    folder = make(range(100))
    (folder / "val.bin").unlink()
    assert problem(folder, split="val").startswith(f"--dataset=d: {folder / 'val.bin'} is missing")


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_tokens_for_the_context(make, n):
    folder = make([5] * n)
    expected = f"{n} tokens are too few for a block_size of 4; the largest that fits is {max(n - 1, 0)}"
    assert problem(folder).endswith(expected)


def test_just_enough_tokens_for_the_context(make):
    assert len(open_dataset(make([5] * 5)).tokens) == 5


def test_half_an_id_is_refused(make):
    folder = make(range(100))
    with open(folder / "train.bin", "ab") as f:
        f.write(b"\0")
    assert "201 bytes are no whole number of uint16 ids" in problem(folder)


def test_an_id_outside_the_vocabulary_is_found_when_the_dataset_is_opened(make):
    folder = make(range(100))
    describe(folder, vocab_size=99)
    assert f"{folder / 'train.bin'}: token id 99 lies outside the vocabulary of 99" in problem(folder)


def test_beyond_the_scan_an_id_outside_the_vocabulary_is_found_in_its_batch(make, monkeypatch):
    monkeypatch.setattr(data, "SCAN_LIMIT", 0)
    folder = make(range(100))
    describe(folder, vocab_size=99)
    dataset = open_dataset(folder)
    dataset.windows(np.array([0, 90, 94]), np.array([5, 95, 99]), 4)
    with pytest.raises(UserError, match="token id 99 lies outside the vocabulary of 99"):
        dataset.windows(np.array([0, 95]), np.array([5, 100]), 4)


@pytest.mark.parametrize("at", [0, 45, 99])
def test_a_large_split_is_checked_in_places_all_over_it(make, monkeypatch, at):
    monkeypatch.setattr(data, "PIECE", 10)
    monkeypatch.setattr(data, "SCAN_LIMIT", 30)  # three pieces: the first, one from the middle, the last
    folder = make([0] * at + [99] + [0] * (99 - at))
    describe(folder, vocab_size=99)
    assert "token id 99 lies outside" in problem(folder)


@pytest.mark.parametrize("at", [0, 45, 99])
def test_another_id_anywhere_is_another_fingerprint(make, monkeypatch, at):
    monkeypatch.setattr(data, "PIECE", 10)
    ids = list(range(100))
    before = open_dataset(make(ids)).fingerprint
    ids[at] = 50
    assert open_dataset(make(ids)).fingerprint != before
    assert open_dataset(make(list(range(100)))).fingerprint == before


def test_a_longer_split_has_another_fingerprint_though_its_samples_are_the_same(make, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 10)
    monkeypatch.setattr(data, "SAMPLE", 2)
    assert open_dataset(make([1] * 95)).fingerprint != open_dataset(make([1] * 96)).fingerprint


def test_no_more_is_read_at_once_than_a_system_gives(make, monkeypatch):
    """Linux gives at most 2 GiB, and a long split has more."""
    monkeypatch.setattr(data, "PIECE", 10)
    dataset, pread = open_dataset(shard(make(range(100)), 35)), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 20), at))
    assert dataset.tokens[:].tolist() == list(range(100))


# A stream in several files


@pytest.mark.parametrize("vocab_size", [100, 2**20])
@pytest.mark.parametrize("cuts", [(50,), (0, 1, 2, 50), (3, 3, 97), tuple(range(1, 100))])
def test_how_a_stream_is_cut_into_files_changes_nothing(make, dist, vocab_size, cuts):
    ids = np.random.default_rng(0).permutation(100)
    whole = batch_bytes(open_dataset(make(ids, vocab_size)), dist)
    dataset = open_dataset(shard(make(ids, vocab_size), *cuts))
    assert dataset.tokens[:].tolist() == ids.tolist()
    assert [dataset.tokens[i : i + 7].tolist() for i in range(100)] == [ids[i : i + 7].tolist() for i in range(100)]
    assert batch_bytes(dataset, dist) == whole


def test_where_nothing_can_be_read_at_an_offset_the_file_is_moved_to_it(make, monkeypatch):
    dataset = open_dataset(shard(make(range(100)), 50))
    monkeypatch.delattr(os, "pread")  # as on Windows
    assert dataset.tokens[40:80].tolist() == list(range(40, 80))
    assert dataset.tokens[3:5].tolist() == [3, 4]


def batch_bytes(dataset, dist):
    """What two epochs of batches hold."""
    return [t.numpy().tobytes() for t in Batches(dataset, "train", 1, 4, dist, per_step=6).get(0, 48)]


@pytest.mark.parametrize(
    "files",
    ["train.bin", ["../train.bin"], ["/etc/passwd"], ["a/b"], ["a\\b"], [""], ["."], [".."], ["a\0"], [], [5], [["a"]]],
)
def test_a_file_elsewhere_is_refused(make, files):
    folder = make(range(100))
    describe(folder, files={"train": files})
    assert problem(folder).startswith(f"{folder / 'meta.json'}: does not describe a dataset")


def test_a_missing_file_of_several_is_named(make):
    folder = shard(make(range(100)), 30, 60)
    (folder / "train-00001.bin").unlink()
    assert problem(folder).startswith(f"--dataset=d: {folder / 'train-00001.bin'} is missing")


def test_half_an_id_in_one_of_several_files_is_refused(make):
    folder = shard(make(range(100)), 30, 60)
    with open(folder / "train-00002.bin", "ab") as f:
        f.write(b"\0")
    assert problem(folder).startswith(f"{folder / 'train-00002.bin'}: 81 bytes are no whole number of uint16 ids")


def test_too_few_tokens_are_counted_over_all_files(make):
    assert len(open_dataset(shard(make(range(5)), 2)).tokens) == 5
    expected = "train.bin and 1 more: 4 tokens are too few for a block_size of 4; the largest that fits is 3"
    assert problem(shard(make(range(4)), 2)).endswith(expected)


def test_a_file_that_is_cut_short_during_the_run_ends_it_with_a_line(make):
    folder = shard(make(range(100)), 50)
    dataset = open_dataset(folder)
    os.truncate(folder / "train-00001.bin", 60)
    assert dataset.tokens[40:80].tolist() == list(range(40, 80))
    with pytest.raises(RunFailed, match="train-00001.bin: has been cut short since the run began"):
        dataset.tokens[70:81]


def test_a_dataset_prepared_anew_changes_nothing_for_a_run_that_reads_the_old_one(make):
    dataset = open_dataset(make(range(100)))
    make([5] * 10)
    assert dataset.tokens[:].tolist() == list(range(100))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told")
def test_what_the_next_step_reads_is_announced(make, dist, monkeypatch):
    dataset = open_dataset(shard(make(range(100)), 50))
    batches, announced, read = Batches(dataset, "train", 1, 4, dist, per_step=6), set(), set()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.add((file, at, size)) or pread(file, size, at))
    monkeypatch.setattr(os, "posix_fadvise", lambda file, at, size, advice: announced.add((file, at, size)))
    batches.get(2, 3)
    monkeypatch.undo()
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.add((file, at, size)) or pread(file, size, at))
    read.clear()
    batches.get(8, 3)
    assert announced == read != set()


def test_files_are_closed_with_their_dataset(make):
    folder = shard(make(range(100)), 10, 20, 30)
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        batches = Batches(open_dataset(folder), "train", 1, 4, None)
    del batches
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


GOOD = {"tokenizer": {}, "vocab_size": 5, "dtype": "uint16"}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*GOOD, "x"]), inner)),
    max_leaves=8,
)
damaged = st.tuples(st.sampled_from([*GOOD, "files", "separator"]), JSON).map(
    lambda pair: json.dumps(GOOD | dict([pair])).encode()
)


@given(st.one_of(st.binary(), st.text().map(str.encode), JSON.map(lambda x: json.dumps(x).encode()), damaged))
@example(b"[" * 100_000)
@example(b'{"vocab_size": ' + b"9" * 10_000 + b"}")
@example(b"\xff\xfe{}")
@example(b"null")
def test_any_meta_json_is_a_dataset_or_a_problem(tmp_path, content):
    folder = tmp_path / "d"
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_bytes(content)
    try:
        meta = read_meta(folder)
    except UserError as e:
        assert str(e).startswith(f"{folder / 'meta.json'}: does not describe a dataset")
        return
    assert meta["dtype"] in ("uint16", "uint32")
    assert type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] < 2**31
    assert isinstance(meta["tokenizer"], dict)


@pytest.mark.parametrize(
    "change",
    [
        *({"dtype": dtype} for dtype in ("float32", "object")),
        *({"vocab_size": size} for size in (0, 5.0)),
        *({"separator": id} for id in (-1, 5, 1.0, True, None, "0")),
        *({"files": files} for files in ([], "train.bin", {"train": {}})),
        {"tokenizer": []},
    ],
)
def test_a_meta_json_that_describes_no_dataset_is_refused(make, change):
    folder = make(range(100))
    (folder / "meta.json").write_text(json.dumps(GOOD | change))
    assert problem(folder).startswith(f"{folder / 'meta.json'}: does not describe a dataset")


# Random numbers

MASK = 2**64 - 1


class SplitMix64:
    """The generator as Steele, Lea and Flood publish it: a counter that grows by gamma, and a mixing function."""

    gamma = 0x9E3779B97F4A7C15

    def __init__(self, state):
        self.state = state

    def next(self):
        self.state = (self.state + self.gamma) & MASK
        return self.mix(self.state)

    @staticmethod
    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def plain_hash64(seed, stream, counter):
    """Each key is hashed as the first number of a generator it seeds, and mixed in."""
    z = counter * SplitMix64.gamma & MASK
    for key in (seed, stream):
        z = SplitMix64.mix(z ^ SplitMix64(key).next())
    return z


def test_the_reference_gives_the_published_numbers():
    generator = SplitMix64(1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [generator.next() for _ in published] == published


def test_hash64_equals_plain_python():
    draw = random.Random(0)
    keys = [0, 1, 1337, 2**32, 2**63 - 1, *(draw.getrandbits(63) for _ in range(20))]
    counters = [0, 1, 2**32 + 1, MASK, *(draw.getrandbits(64) for _ in range(20))]
    for seed in keys:
        for stream in (0, 1, 2, 3):
            found = hash64(seed, stream, np.array(counters, dtype=np.uint64))
            assert found.tolist() == [plain_hash64(seed, stream, c) for c in counters]


def test_step_seeds_differ_by_seed_step_and_rank():
    grid = [(seed, step, rank) for seed in (0, 1337) for step in range(20) for rank in range(8)]
    seeds = [step_seed(*which) for which in grid]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert step_seed(1337, 20, 3) == plain_hash64(1337, 3, 20 * 2**16 + 3) // 2


# Batches


class Ascending:
    """A dataset in which every token is its own offset."""

    def __init__(self, n):
        self.tokens = np.arange(n, dtype=np.uint32)
        self.vocab_size = n
        self.documents = None

    check = Dataset.check
    windows = Dataset.windows


def offsets(dist, n_tokens, n_windows, block_size=4, stream="train", seed=1):
    x, _ = Batches(Ascending(n_tokens), stream, seed, block_size, dist).get(0, n_windows)
    return x[:, 0].numpy()


def test_inputs_are_consecutive_and_targets_one_later(dist):
    x, y = Batches(Ascending(1000), "train", 1, 16, dist).get(0, 8)
    assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == torch.int64
    assert (x == x[:, :1] + torch.arange(16)).all() and torch.equal(y, x + 1)
    assert x.is_contiguous() and y.is_contiguous()


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [3, 4, 5], [6, 6]])
def test_a_windows_number_alone_decides_where_it_begins(dist, sizes):
    batches, whole = Batches(Ascending(1000), "train", 1, 8, dist), []
    first = 30
    for size in sizes:
        whole.append(batches.get(first, size)[0])
        first += size
    fresh = Batches(Ascending(1000), "train", 1, 8, dist)
    assert torch.equal(torch.cat(whole), fresh.get(30, 12)[0])


@pytest.mark.parametrize("n, T", [(1000, 4), (1003, 8), (5, 4), (9, 4), (20, 4), (4097, 64)])
def test_an_epoch_has_every_window_once_and_begins_anywhere(dist, n, T):
    length = max(1, (n - T) // T)
    begins = set()
    for epoch in range(30):
        starts = Batches(Ascending(n), "train", 1, T, dist).get(epoch * length, length)[0][:, 0].numpy()
        begins.add(starts.min())
        assert sorted(starts) == list(range(starts.min(), starts.min() + length * T, T))
        assert starts.max() + T < n
    assert len(begins) > 1 or n == 5


def test_the_order_is_another_in_each_epoch(dist):
    batches, length = Batches(Ascending(1000), "train", 1, 4, dist), 249
    first, second = (np.argsort(batches.places(np.arange(length) + e * length)[0]) for e in (0, 1))
    assert (first == second).mean() < 0.05


def plain_permutation(i, n, key):
    """The reference for `data.permutation`: one index, in plain Python."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & (2**half - 1)
        for round in range(4):
            left, right = right, left ^ (SplitMix64.mix(right ^ plain_hash64(0, 0, round ^ key)) & (2**half - 1))
        i = left << half | right
        if i < n:
            return i


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 15_684])
def test_a_permutation_is_one_and_equals_plain_python(n):
    for seed in (0, 1337):
        key = plain_hash64(seed, 0, 0)
        found = permutation(np.arange(n), n, np.uint64(key))
        assert sorted(found) == list(range(n))
        assert [plain_permutation(i, n, key) for i in range(0, n, max(1, n // 50))] == found[
            :: max(1, n // 50)
        ].tolist()


def test_seeds_and_streams_draw_differently(dist):
    draws = {
        tuple(offsets(dist, 10**6, 20, stream=stream, seed=seed))
        for stream in ("train", "eval train", "eval val")
        for seed in (0, 1, 1337)
    }
    assert len(draws) == 9


def test_every_start_is_drawn_the_last_too(dist):
    assert sorted(set(offsets(dist, 20, 500))) == list(range(20 - 4))


def test_a_dataset_of_one_window_gives_it(dist):
    assert set(offsets(dist, 5, 10)) == {0}


@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_the_order_of_windows_is_independent(dist, seed):
    """Where a window lies says nothing about where the next one does: a chi-square test of the pairs."""
    order = permutation(np.arange(20_000), 20_000, hash64(seed, 0, 0)) * 10 // 20_000
    pairs = np.bincount(order[1:] * 10 + order[:-1], minlength=100)
    expected = (len(order) - 1) / 100
    chi_square = ((pairs - expected) ** 2 / expected).sum()
    assert abs(chi_square - 99) / np.sqrt(2 * 99) < 4


@pytest.mark.parametrize(
    "seed, first", [(1337, [812217, 145145, 269625, 44729]), (0, [358639, 394543, 900783, 566191])]
)
def test_the_order_never_changes(dist, seed, first):
    """A run that was begun with an older version goes on with the windows that it has not read."""
    batches = Batches(Ascending(1_003_854), "train", seed, 64, dist)
    assert batches.get(0, 4)[0][:, 0].tolist() == first


def test_neither_later_epochs_nor_what_is_evaluated_ever_change(dist):
    dataset = Ascending(1_003_854)
    batches = Batches(dataset, "train", 1337, 64, dist)
    assert batches.get(3 * batches.epoch_windows, 4)[0][:, 0].tolist() == [269749, 748789, 294709, 46709]
    first = {s: Batches(dataset, f"eval {s}", 1337, 64, dist).get(0, 4)[0][:, 0].tolist() for s in ("train", "val")}
    assert first["train"] == [386897, 788113, 589841, 109841]
    assert first["val"] == [559862, 364086, 732726, 649014]


@pytest.mark.parametrize("sampling, first", [("epochs", [26, 8, 33, 30, 28, 50]), ("random", [48, 28, 22, 48, 17, 39])])
def test_the_order_of_documents_never_changes(dist, sampling, first):
    ids = [SEPARATOR, 1, 1, 1, 1, 1, SEPARATOR, 2, SEPARATOR, 3, 3] * 5
    assert Batches(in_documents(ids, 4), "train", 1337, 4, dist, sampling).places(np.arange(6))[0].tolist() == first


@given(
    n=st.integers(6, 300),
    T=st.integers(1, 5),
    first=st.integers(0, 5000),
    size=st.integers(1, 3000),
    sampling=st.sampled_from(["epochs", "random"]),
)
@example(n=300, T=1, first=255, size=1, sampling="epochs")
@example(n=300, T=1, first=256, size=512, sampling="epochs")
def test_a_batch_is_the_windows_of_its_numbers(dist, n, T, first, size, sampling):
    batches = Batches(Ascending(n), "train", 1, T, dist, sampling)
    starts, stops = batches.places(np.arange(first, first + size))
    assert batches.get(first, size)[0][:, 0].tolist() == starts.tolist()
    assert (stops - starts == T + 1).all() and starts.min() >= 0 and stops.max() <= n
    assert batches.filled(first, size) == 1.0


def test_with_one_window_inputs_and_targets_share_no_memory(dist):
    x, y = Batches(Ascending(9), "train", 1, 8, dist).get(0, 1)
    y.fill_(-1)
    assert x.tolist() == [list(range(8))]


# Random windows


def test_random_windows_begin_anywhere_equally_often(dist):
    starts, _ = Batches(Ascending(50), "train", 1, 9, dist, "random").places(np.arange(41_000))
    counts = np.bincount(starts)
    assert len(counts) == 41  # 0 to 40: the last window's last target is the last token
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 40) / np.sqrt(2 * 40) < 4


def test_random_windows_are_a_function_of_seed_and_number(dist):
    def places(seed, numbers):
        dataset = SimpleNamespace(tokens=range(10**9), documents=None)
        return Batches(dataset, "train", seed, 8, dist, "random").places(numbers)[0].tolist()

    whole = places(1, np.arange(3000))
    assert places(1, np.arange(2990, 3000)) == whole[2990:]
    assert places(1, np.array([5, 5, 2000])) == [whole[5], whole[5], whole[2000]]
    assert not set(places(2, np.arange(3000))) & set(whole)
    assert whole[7] == plain_hash64(1, 0, 7) % (10**9 - 8)


# Documents

SEPARATOR = 9
streams_of_documents = st.lists(st.one_of(st.just(SEPARATOR), st.integers(0, 8)), min_size=7, max_size=120)


def plain_documents(ids, T):
    """The reference: (inputs, targets) of each window, in order, in plain Python."""
    begins = sorted({0} | {i for i, id in enumerate(ids) if id == SEPARATOR})
    windows = []
    for begin, end in zip(begins, [*begins[1:], len(ids) - 1], strict=True):
        for start in range(begin, end, T):
            stop = min(start + T, end)
            windows.append((ids[start:stop], ids[start + 1 : stop + 1]))
    return windows


def in_documents(ids, T):
    dataset = Dataset(np.array(ids), 10, None, "the text")
    dataset.documents = Documents(find_documents(dataset.tokens, SEPARATOR), T, shared=True)
    return dataset


@given(streams_of_documents, st.integers(1, 6), st.integers(0, 2**63 - 1))
@example([SEPARATOR] * 7, 4, 0)
@example([0] * 7, 4, 0)
@example([0] * 6 + [SEPARATOR], 4, 0)
def test_an_epoch_of_documents_has_each_of_their_windows_once(dist, ids, T, seed):
    batches = Batches(in_documents(ids, T), "train", seed, T, dist)
    n = batches.epoch_windows
    x, y = batches.get(2 * n, n)
    found = []
    for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
        length = next((i for i, t in enumerate(targets) if t < 0), T)
        assert length > 0 and set(targets[length:]) <= {-1}
        found.append((inputs[:length], targets[:length]))
    assert sorted(found) == sorted(plain_documents(ids, T))


@given(streams_of_documents, st.integers(1, 6))
def test_every_token_but_the_first_is_a_target_once_in_an_epoch(dist, ids, T):
    batches = Batches(in_documents(ids, T), "train", 1, T, dist)
    starts, stops = batches.places(np.arange(batches.epoch_windows))
    targets = sorted(i for start, stop in zip(starts, stops, strict=True) for i in range(start + 1, stop))
    assert targets == list(range(1, len(ids)))
    assert batches.filled(0, batches.epoch_windows) == pytest.approx((len(ids) - 1) / (batches.epoch_windows * T))
    assert batches.documents.filled() == batches.filled(0, batches.epoch_windows)


@given(streams_of_documents, st.integers(1, 6))
def test_no_window_holds_tokens_of_two_documents(dist, ids, T):
    batches = Batches(in_documents(ids, T), "train", 1, T, dist, sampling="random")
    x, y = batches.get(0, 50)
    assert not (x[:, 1:] == SEPARATOR)[y[:, 1:] >= 0].any()


def test_documents_are_found_across_the_pieces_of_a_file(make, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 10, 1000)
    folder = shard(make(ids, 10), 300, 301)
    describe(folder, separator=SEPARATOR)
    whole = open_dataset(folder, documents=True).documents
    monkeypatch.setattr(data, "PIECE", 7)
    again = open_dataset(folder, documents=True).documents
    assert whole.begins.tolist() == again.begins.tolist() == sorted({0, 999} | set(np.flatnonzero(ids == SEPARATOR)))


def test_random_windows_of_documents_are_drawn_from_all_of_them(dist):
    ids = [SEPARATOR, 1, 1, 1, 1, 1, SEPARATOR, 2, SEPARATOR, 3, 3]
    batches = Batches(in_documents(ids, 4), "train", 1, 4, dist, sampling="random")
    starts, _ = batches.places(np.arange(200))
    assert set(starts) == {0, 4, 6, 8}


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_any_number_of_processes_shares_a_batch(per_step, processes, batch_size, micro_batch):
    cfg = SimpleNamespace(gradient_accumulation_steps=per_step, batch_size=batch_size)
    parts = [data.part_of_rank(per_step * batch_size, rank, processes) for rank in range(processes)]
    assert [i for part in parts for i in part] == list(range(per_step * batch_size))
    fewest, largest = min(map(len, parts)), max(map(len, parts))
    assert largest - fewest <= 1
    micro_steps, size = data.share_batch(cfg, processes, micro_batch)
    assert size <= micro_batch and micro_steps * size >= largest
    if fewest == largest:
        assert micro_steps * size == largest
    else:
        assert micro_steps == -(-largest // micro_batch) and micro_steps * (size - 1) < largest  # little padding
    sizes = data.micro_batch_sizes(cfg, processes)
    assert (sizes[0], sizes[-1]) == (1, largest) and sizes == sorted(set(sizes))
    assert [data.share_batch(cfg, processes, size)[1] for size in sizes] == sizes


def test_padding_is_no_target_and_a_batch_of_nothing_else_has_a_loss(make, dist):
    batches = Batches(open_dataset(make(np.arange(1000) % 100)), "train", 1, 4, dist, per_step=6)
    x, y = batches.get(300, 2, padded_to=5)
    assert torch.equal(x[:2], batches.get(300, 2)[0]) and torch.equal(y[:2], batches.get(300, 2)[1])
    assert x.shape == y.shape == (5, 4) and (y[2:] == -1).all()
    for first in (0, 256, 300):  # at a block of positions, and between
        x, y = batches.get(first, 0, padded_to=3)
        assert x.shape == y.shape == (3, 4) and (y >= 0).all()
        assert batches.divisor(first, 0, 0) == math.inf


def test_each_target_of_a_step_weighs_the_same_however_its_windows_are_divided(dist):
    ids = np.where(np.random.default_rng(0).random(500) < 0.2, SEPARATOR, 1)
    batches = Batches(in_documents(ids, 8), "train", 1, 8, dist, per_step=12)
    begin = 29  # of a step; a run that had another batch before need not be at a multiple of this one
    starts, stops = batches.places(np.arange(begin, begin + 12))
    targets = stops - starts - 1
    assert len(set(targets)) > 3
    for size in (1, 2, 3, 4, 5, 6, 7, 12):
        for dist.world_size in (1, 5):  # 5: in the mean over processes, each counts a fifth
            parts = [range(12)[i : i + size] for i in range(0, 12, size)]
            weights = [1 / batches.divisor(begin + p.start, len(p), begin) / dist.world_size for p in parts]
            assert weights == pytest.approx([targets[p.start : p.stop].sum() / targets.sum() for p in parts])


def test_documents_without_a_separator_are_refused(make):
    folder = make(range(100))
    message = problem(folder, documents=True)
    assert message.startswith(f"--documents=True: {folder / 'meta.json'} has no separator")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 6), st.integers(1, 6))
def test_texts_end_before_the_next_one_and_strides_count_each_target_once(lengths, T, stride):
    begins = np.concatenate([[0], np.cumsum(lengths)])
    layout = Documents(begins, T, min(stride, T))
    numbers = np.arange(len(layout))
    starts, stops = layout.windows(numbers)
    counted = []
    for number, i, start, stop in zip(numbers, layout.which(numbers), starts, stops, strict=True):
        assert begins[i] <= start < stop <= begins[i + 1] and stop - start <= T + 1
        counted += range(start + 1 + layout.repeated(number), stop)
    assert counted == [i for begin, n in zip(begins, lengths, strict=False) for i in range(begin + 1, begin + n)]
