"""Token files and batches: written whole, checked when read, drawn as a pure function of the seed."""

import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanogpt import data
from nanogpt.config import UserError
from nanogpt.data import Batches, Dataset, hash64, permutation, read_meta, step_seed, write_dataset

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


def open_dataset(folder, block_size=4, split="train"):
    return Dataset(folder.name, split, block_size, root=folder.parent)


def problem(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        open_dataset(*args, **kwargs)
    (only,) = caught.value.problems
    return only


def test_what_is_written_is_read(make):
    folder = make(list(range(100)), val=[7] * 20)
    train, val = open_dataset(folder), open_dataset(folder, split="val")
    assert train.tokens.tolist() == list(range(100)) and val.tokens.tolist() == [7] * 20
    assert (train.vocab_size, train.tokenizer_json) == (100, {"type": "numbers"})
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_text_survives(tiny):
    dataset = Dataset("tiny", "train", 16, root=tiny.parent)
    text = "".join(dataset.tokenizer_json["chars"][i] for i in dataset.tokens)
    assert text.startswith("The ") and len(text) == len(dataset.tokens) > 5000


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32"), (2**20, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(make, vocab_size, dtype):
    ids = [0, vocab_size - 1, 1, 2, 3, 4]
    folder = make(ids, vocab_size)
    assert json.loads((folder / "meta.json").read_text())["dtype"] == dtype
    assert np.fromfile(folder / "train.bin", dtype).tolist() == ids
    assert open_dataset(folder).tokens.tolist() == ids


def test_the_tokens_cannot_be_written_to(make):
    with pytest.raises(ValueError, match="read-only"):
        open_dataset(make(range(100))).tokens[0] = 1


@pytest.mark.parametrize("ids", [[0, 100], [-1, 5]])
def test_an_id_outside_the_vocabulary_is_not_written(make, ids, tmp_path):
    with pytest.raises(ValueError, match="train: a token id lies outside the vocabulary of 100"):
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
    expected = f"--dataset=novel: {folder}/ has no meta.json; python {folder}/prepare.py makes it"
    assert problem(folder) == expected


def test_a_mistyped_dataset_names_the_nearest(make):
    folder = make(range(100))
    (folder.parent / "shakespeare").mkdir()
    (folder.parent / "shakespeare" / "prepare.py").touch()
    mistyped = folder.parent / "shakespear"
    expected = f"--dataset=shakespear: {mistyped}/ is not there; did you mean shakespeare?"
    assert problem(mistyped) == expected
    assert problem(folder.parent / "zzzzzz").endswith("is not there; prepared here: d")


def test_a_missing_split_is_named(make):
    folder = make(range(100))
    (folder / "val.bin").unlink()
    assert problem(folder, split="val").startswith(f"--dataset=d: {folder / 'val.bin'} is missing")


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_tokens_for_the_context(make, n):
    folder = make([5] * n)
    expected = f"{n} tokens are too few for a block_size of 4; at most {max(n - 1, 0)} would do"
    assert problem(folder).endswith(expected)


def test_just_enough_tokens_for_the_context(make):
    assert len(open_dataset(make([5] * 5)).tokens) == 5


def test_half_an_id_is_refused(make):
    folder = make(range(100))
    with open(folder / "train.bin", "ab") as f:
        f.write(b"\0")
    assert "201 bytes are no whole number of uint16 ids" in problem(folder)


def shrink_vocabulary(folder, to):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"vocab_size": to}))


def test_an_id_outside_the_vocabulary_is_found_when_the_dataset_is_opened(make):
    folder = make(range(100))
    shrink_vocabulary(folder, 99)
    assert f"{folder / 'train.bin'}: token id 99 lies outside the vocabulary of 99" in problem(folder)


def test_beyond_the_scan_an_id_outside_the_vocabulary_is_found_in_its_batch(make, monkeypatch):
    monkeypatch.setattr(data, "SCAN_LIMIT", 0)
    folder = make(range(100))
    shrink_vocabulary(folder, 99)
    dataset = open_dataset(folder)
    dataset.windows([0, 90, 94], 4)
    with pytest.raises(UserError, match="token id 99 lies outside the vocabulary of 99"):
        dataset.windows([0, 95], 4)


GOOD = {"tokenizer": {}, "vocab_size": 5, "dtype": "uint16"}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*GOOD, "x"]), inner)),
    max_leaves=8,
)
damaged = st.tuples(st.sampled_from(list(GOOD)), JSON).map(lambda pair: json.dumps(GOOD | dict([pair])).encode())


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
    "change", [{"dtype": "float32"}, {"dtype": "object"}, {"vocab_size": 0}, {"vocab_size": 5.0}, {"tokenizer": []}]
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
    first, second = (np.argsort(batches.starts(np.arange(length) + e * length)) for e in (0, 1))
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
