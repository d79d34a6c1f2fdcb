"""The loss: the exact one against one token at a time, and an estimate that always asks the same."""

import collections
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanogpt.data import Batches, Documents, find_documents
from nanogpt.evaluate import evaluating, exact, losses
from nanogpt.model import GPT, GPTConfig
from nanogpt.text.dataset import open_dataset, write_dataset
from nanogpt.text.tokenizer import CharTokenizer

T = 8
TEXT = "a–b é日 ab–a 日é " * 7  # characters of 1, 2 and 3 bytes


@pytest.fixture
def tokenizer():
    return CharTokenizer.train(TEXT)


@pytest.fixture
def open_text(tmp_path, tokenizer):
    """The dataset of these characters."""

    def open_text(text):
        write_dataset(tmp_path / "d", tokenizer, tokenizer.encode(text), tokenizer.encode(text))
        return open_dataset("d", "val", T, root=tmp_path)

    return open_text


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(5)
    shape = dict(block_size=T, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**shape, dropout=0.5))
    for p in model.parameters():
        p.data.mul_(8 if p.dim() == 2 else 1)  # far enough from uniform that every token counts
    return model


def config(batch_size=4, eval_iters=5):
    return SimpleNamespace(batch_size=batch_size, block_size=T, eval_iters=eval_iters)


def token_by_token(model, dataset):
    """The sum of -log p over all tokens but the first, each from the part of its window before it."""
    nats, ids = 0.0, dataset.tokens[:].astype(np.int64)
    model.eval()
    for i in range(1, len(ids)):
        start = (i - 1) // T * T
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[start:i])[None])[0]
        nats -= logits[0, -1].double().log_softmax(-1)[ids[i]].item()
    model.train()
    return nats, len(ids) - 1


@pytest.mark.parametrize("n", [T + 1, T + 2, 2 * T, 2 * T + 1, 75, 81, 82])
def test_the_exact_loss_is_that_of_every_token_once(model, open_text, dist, n):
    dataset = open_text(TEXT[:n])
    nats, count = token_by_token(model, dataset)
    found = exact(model, dataset, config(), dist, None)
    assert found["tokens"] == count == n - 1
    assert found["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert "bits_per_byte" not in found


def test_bits_per_byte_counts_the_bytes_of_the_predicted_tokens(model, open_text, dist, tokenizer):
    text = TEXT[:73]  # its first and last characters differ in bytes
    dataset = open_text(text)
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    assert set(lengths) == {1, 2, 3}
    nats, _ = token_by_token(model, dataset)
    found = exact(model, dataset, config(), dist, lengths)["bits_per_byte"]
    assert found == pytest.approx(nats / math.log(2) / len(text[1:].encode()), rel=1e-6)


def test_the_exact_loss_repeats_to_the_last_digit(model, open_text, dist):
    dataset = open_text(TEXT[:75])
    assert exact(model, dataset, config(), dist, None) == exact(model, dataset, config(), dist, None)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10, 100])
def test_the_exact_loss_does_not_depend_on_the_batch_size(model, open_text, dist, batch_size):
    dataset = open_text(TEXT[:82])
    expected = exact(model, dataset, config(), dist, None)
    found = exact(model, dataset, config(batch_size), dist, None)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("most", [1, 2, 3, 100])
@pytest.mark.parametrize("eval_iters", [3, 100], ids=["estimate", "exact"])
def test_the_loss_does_not_depend_on_how_many_sequences_are_worked_on_at_a_time(
    model, open_text, dist, most, eval_iters
):
    dataset, cfg, sizes = open_text(TEXT * 2), config(eval_iters=eval_iters), []
    streams = {"val": Batches(dataset, "eval val", 1, T, dist)}
    expected = estimate(model, streams, cfg, dist)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert estimate(model, streams, cfg, dist, micro_batch=most) == pytest.approx(expected, rel=1e-6)
    assert max(sizes) <= most


def test_the_shares_of_several_processes_make_the_whole(model, open_text, dist):
    dataset = open_text(TEXT[:82])
    whole = exact(model, dataset, config(batch_size=2), dist, None)
    shares = []
    for rank in range(3):
        dist.rank, dist.world_size = rank, 3
        dist.sum = lambda numbers: shares.append(numbers) or numbers
        exact(model, dataset, config(batch_size=2), dist, None)
    nats, count, _ = (sum(column) for column in zip(*shares, strict=True))
    assert (nats / count, count) == (pytest.approx(whole["loss"], rel=1e-6), whole["tokens"])


def test_all_processes_call_the_model_equally_often(model, open_text, dist):
    """It may be a collective operation. Three processes divide neither the batches of the estimate nor the exact loss's."""
    cfg, calls = config(batch_size=2, eval_iters=4), collections.Counter()
    model.register_forward_pre_hook(lambda *_: calls.update([dist.rank]))
    dist.sum, dist.world_size = lambda numbers: numbers, 3
    for dist.rank in range(3):
        exact(model, open_text(TEXT[:82]), cfg, dist, None)
        estimate(model, streams(open_text(TEXT * 3), dist), cfg, dist)
    assert len(set(calls.values())) == 1 and len(calls) == 3


def test_a_hopeless_model_has_a_finite_perplexity(model, open_text, dist):
    for p in model.parameters():
        p.data.mul_(1e4)
    found = exact(model, open_text(TEXT[:75]), config(), dist, None)
    assert found["loss"] > 1000 and math.isfinite(found["perplexity"])


# The estimate


def estimate(model, batches, cfg, dist, micro_batch=None, tick=lambda: None):
    """`losses` of a run that has these parts."""
    run = SimpleNamespace(model=model, eval_batches=batches, cfg=cfg, dist=dist, tick=tick)
    return losses(run, micro_batch or cfg.batch_size)


def streams(dataset, dist):
    return {s: Batches(dataset, f"eval {s}", 1, T, dist) for s in ("train", "val")}


def test_the_estimate_is_the_mean_over_the_first_batches(model, open_text, dist):
    batches = streams(open_text(TEXT * 3), dist)
    found = estimate(model, batches, config(batch_size=4, eval_iters=5), dist)
    model.eval()
    for split in ("train", "val"):
        expected = model(*batches[split].get(0, 20))[1].item()
        assert found[split] == pytest.approx(expected, rel=1e-5)
    assert found["train"] != found["val"]


def test_the_estimate_asks_the_same_each_time_and_draws_nothing(model, open_text, dist):
    batches = streams(open_text(TEXT * 3), dist)
    state = torch.get_rng_state()
    assert estimate(model, batches, config(), dist) == estimate(model, batches, config(), dist)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_shares_of_the_estimate_make_the_whole(model, open_text, dist):
    batches = streams(open_text(TEXT * 3), dist)
    whole = estimate(model, batches, config(), dist)
    shares = []
    for rank in range(2):
        dist.rank, dist.world_size = rank, 2
        dist.sum = lambda numbers: numbers
        shares.append(estimate(model, batches, config(), dist))
    for split in whole:
        assert sum(share[split] for share in shares) == pytest.approx(whole[split], rel=1e-6)


def test_in_the_estimate_of_documents_each_target_counts_the_same(model, open_text, dist, tokenizer):
    dataset = open_text(TEXT)
    separator = tokenizer.ids["日"]
    dataset.documents = Documents(find_documents(dataset.tokens, separator), T, shared=True)
    stream = Batches(dataset, "eval val", 1, T, dist)
    found = estimate(model, {"val": stream}, config(batch_size=3, eval_iters=4), dist)["val"]
    model.eval()
    x, y = stream.get(0, 12)
    assert len(set((y >= 0).sum(1).tolist())) > 1
    assert found == pytest.approx(model(x, y)[1].item(), rel=1e-5)


def test_the_exact_loss_of_documents_gives_no_token_context_from_another(model, open_text, dist, tokenizer):
    dataset, separator = open_text(TEXT), tokenizer.ids["日"]
    dataset.documents = Documents(find_documents(dataset.tokens, separator), T, shared=True)
    ids, nats = dataset.tokens[:].tolist(), 0.0
    model.eval()
    for i in range(1, len(ids)):
        begin = max([0] + [j for j in range(i) if ids[j] == separator])
        start = begin + (i - 1 - begin) // T * T
        with torch.no_grad():
            nats -= model(torch.tensor([ids[start:i]]))[0][0, -1].double().log_softmax(-1)[ids[i]].item()
    found = exact(model, dataset, config(), dist, None, each=True)
    assert (found["loss"], found["tokens"]) == (pytest.approx(nats / (len(ids) - 1), rel=1e-6), len(ids) - 1)
    assert len(found["documents"]) == ids.count(separator) + (ids[0] != separator)
    told = [d for d in found["documents"] if d]
    assert sum(d["loss"] * d["tokens"] for d in told) == pytest.approx(nats, rel=1e-6)
    assert exact(model, dataset, config(), dist, None)["loss"] == pytest.approx(found["loss"], rel=1e-6)


# The mode


def modes_within(model, run):
    seen = []
    hook = model.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    run()
    hook.remove()
    return set(seen)


@pytest.mark.parametrize("which", ["exact", "estimate"])
def test_dropout_and_gradients_are_off_within_and_on_afterwards(model, open_text, dist, which):
    dataset = open_text(TEXT)
    run = {
        "exact": lambda: exact(model, dataset, config(), dist, None),
        "estimate": lambda: estimate(model, streams(open_text(TEXT * 3), dist), config(), dist),
    }[which]
    model.train()
    assert modes_within(model, run) == {(False, False)}
    assert model.training and torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error(model):
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not model.training
        raise KeyboardInterrupt
    assert model.training and torch.is_grad_enabled()


def test_a_model_in_evaluation_mode_stays_in_it(model):
    model.eval()
    with evaluating(model):
        pass
    assert not model.training


def test_a_small_split_is_read_whole_instead_of_sampled(model, open_text, dist):
    dataset = open_text(TEXT)
    stream = Batches(dataset, "eval val", 1, T, dist)
    enough = -(-stream.epoch_windows // 4)
    whole = estimate(model, {"val": stream}, config(eval_iters=enough), dist)["val"]
    assert whole == exact(model, dataset, config(), dist, None)["loss"]
    assert estimate(model, {"val": stream}, config(eval_iters=enough - 1), dist)["val"] != whole


def test_an_evaluation_can_be_broken_off_before_each_batch(model, open_text, dist):
    def tick():
        raise InterruptedError

    for eval_iters in (5, 10**6):  # the estimate, and the whole split
        with pytest.raises(InterruptedError):
            estimate(model, streams(open_text(TEXT * 3), dist), config(eval_iters=eval_iters), dist, tick=tick)
