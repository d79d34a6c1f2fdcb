"""Sampling: exactly k of the likeliest, greedy at 0, the softmax's frequencies, and nothing beyond the context."""

import pytest
import torch

from nanogpt.generate import generate, sample
from nanogpt.model import GPT, GPTConfig


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16, dropout=0.3))
    for p in model.parameters():
        p.data.mul_(5 if p.dim() == 2 else 1)  # far enough from uniform that choices differ
    return model.eval()


def new_tokens(model, idx, n, *args, **kwargs):
    return torch.cat(list(generate(model, idx, n, *args, **kwargs)), dim=1)


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


# One token from logits


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_allows_exactly_k_even_where_all_tie(k):
    drawn = sample(torch.zeros(1, 10).expand(2000, 10), top_k=k, generator=seeded())
    assert len(drawn.unique()) == k


def test_top_k_allows_the_k_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, 2.5]).expand(2000, 5)
    assert sample(logits, top_k=3, generator=seeded()).unique().tolist() == [1, 3, 4]


@pytest.mark.parametrize("k", [None, 0, 5, 6, 1000])
def test_top_k_of_nothing_or_everything_allows_all(k):
    assert len(sample(torch.zeros(2000, 5), top_k=k, generator=seeded()).unique()) == 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [None, 4])
def test_tokens_come_as_often_as_the_softmax_says(temperature, k):
    n, logits = 20_000, torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -0.5])
    drawn = sample(logits.expand(n, 6), temperature, k, seeded()).flatten().bincount(minlength=6)
    if k:
        logits = logits.masked_fill(logits < logits.sort(descending=True).values[k - 1], -torch.inf)
    expected = n * (logits / temperature).softmax(-1)
    assert (drawn[expected == 0] == 0).all()
    allowed = expected > 0
    chi_square = ((drawn - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 25  # of 3 or 5 degrees of freedom: one draw in ten thousand is above


@pytest.mark.parametrize("k", [None, 1, 3])
def test_temperature_zero_takes_the_likeliest(k):
    logits = torch.randn(50, 10, generator=seeded())
    assert torch.equal(sample(logits, 0, k), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
@pytest.mark.parametrize("k", [None, 3])
def test_a_temperature_near_zero_is_greedy(temperature, k):
    logits = torch.randn(50, 10, generator=seeded())
    assert torch.equal(sample(logits, temperature, k), logits.argmax(-1, keepdim=True))


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.randn(2000, 100, generator=seeded()).bfloat16()
    for k in (None, 50):
        drawn, expected = (sample(x, 0.8, k, seeded(1)) for x in (logits, logits.float()))
        assert torch.equal(drawn, expected)


# Many tokens from a model


def test_the_number_and_shape_of_new_tokens(model):
    tokens = list(generate(model, PROMPT, 5, generator=seeded()))
    assert [t.shape for t in tokens] == [(2, 1)] * 5
    assert all(0 <= t.min() and t.max() < 20 for t in tokens)


def test_the_seed_decides(model):
    first, again, other = (new_tokens(model, PROMPT, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_greedy_tokens_are_the_argmax_of_the_last_block_size_tokens(model):
    idx = PROMPT
    for token in generate(model, PROMPT, 20, temperature=0):
        x = idx[:, -8:]
        logits = model(x, x)[0]
        assert torch.equal(token, logits[:, -1].argmax(-1, keepdim=True))
        idx = torch.cat([idx, token], dim=1)


def test_a_prompt_beyond_the_context_counts_by_its_end(model):
    long = torch.randint(0, 20, (2, 30), generator=seeded())
    assert torch.equal(new_tokens(model, long, 4, 0), new_tokens(model, long[:, -8:], 4, 0))


def test_ids_from_vocab_size_on_are_never_chosen(model):
    free = new_tokens(model, PROMPT, 200, generator=seeded())
    bound = new_tokens(model, PROMPT, 200, generator=seeded(), vocab_size=7)
    assert bound.max() < 7 <= free.max()
    assert new_tokens(model, PROMPT, 50, temperature=0, vocab_size=7).max() < 7
    assert new_tokens(model, PROMPT, 50, top_k=15, generator=seeded(), vocab_size=7).max() < 7


def test_temperature_and_top_k_arrive(model):
    greedy = new_tokens(model, PROMPT, 10, temperature=0)
    assert torch.equal(new_tokens(model, PROMPT, 10, top_k=1), greedy)
    assert torch.equal(new_tokens(model, PROMPT, 10, temperature=1e-6), greedy)
    assert not torch.equal(new_tokens(model, PROMPT, 10, temperature=100.0, generator=seeded()), greedy)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_within_and_the_mode_comes_back(model, training):
    expected = new_tokens(model.eval(), PROMPT, 10, temperature=0)
    model.train(training)
    assert torch.equal(new_tokens(model, PROMPT, 10, temperature=0), expected)
    assert model.training is training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_after_stopping_early_and_after_an_error(model, training):
    model.train(training)
    tokens = generate(model, PROMPT, 10)
    next(tokens)
    tokens.close()
    assert model.training is training
    with pytest.raises(IndexError):
        new_tokens(model, PROMPT + 100, 10)
    assert model.training is training


def test_nothing_is_kept_for_a_backward_pass(model):
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    next(generate(model, PROMPT, 1))
    assert seen == [False]


def test_the_models_own_generate_continues_the_prompt(model):
    out = model.generate(PROMPT, 12, temperature=0.7, top_k=5, generator=seeded())
    assert torch.equal(out[:, :3], PROMPT)
    assert torch.equal(out[:, 3:], new_tokens(model, PROMPT, 12, 0.7, 5, seeded()))
