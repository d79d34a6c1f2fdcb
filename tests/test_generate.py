"""Writing: the limits of sampling against plain references, the cache against none, rows against the same row alone."""

import dataclasses
import random

import pytest
import torch

from nanogpt.config import ARCHITECTURES
from nanogpt.generate import Engine, Options, adjust, generate, sample
from nanogpt.model import GPT, GPTConfig

S, V = 8, 20  # context and vocabulary of the models here


def make_model(architecture="gpt2"):
    torch.manual_seed(3)
    shape = dict(block_size=S, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**shape, dropout=0.3, architecture=architecture))
    for p in model.parameters():
        p.data.normal_(std=0.3)  # far enough from uniform that choices differ
    return model.eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(params=ARCHITECTURES)
def either(request):
    return make_model(request.param)


def new_tokens(model, idx, n, *args, seed=0, **kwargs):
    return torch.cat(list(generate(model, idx, n, *args, seed=seed, **kwargs)), dim=1)


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


# One token from logits


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    """`sample`, as the engine calls it: (B)."""
    k = Options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).candidates(logits.shape[-1])
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=seeded(seed))
    own = [torch.full((len(logits), 1), x) for x in (temperature, top_p, min_p)]
    return sample(logits, k, *own, uniform)


def reference(logits, temperature, top_k, top_p, min_p):
    """The probabilities (V) that the definitions give, one token at a time."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept = order[: top_k or None]
    before, nucleus = 0.0, []
    for i in kept:
        if before < top_p * p[kept].sum():
            nucleus.append(i)
        before += p[i]
    kept = [i for i in nucleus if p[i] >= min_p * p[order[0]]]
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("top_p", [1.0, 0.75])
@pytest.mark.parametrize("min_p", [0.0, 0.15])
def test_tokens_come_as_often_as_the_definitions_say(temperature, top_k, top_p, min_p):
    n, logits = 20_000, torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -0.5])
    drawn = draw(logits.expand(n, 6), temperature, top_k, top_p, min_p).bincount(minlength=6)
    expected = n * reference(logits, temperature, top_k, top_p, min_p)
    allowed = expected > 0
    assert (drawn[~allowed] == 0).all() and (drawn[allowed] > 0).all()
    chi_square = ((drawn - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 25  # of at most 5 degrees of freedom: one draw in ten thousand is above


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_allows_exactly_k_even_where_all_tie(k):
    assert len(draw(torch.zeros(1, 10).expand(2000, 10), top_k=k).unique()) == k


@pytest.mark.parametrize("k", [0, 5, 6, 1000])
def test_top_k_of_nothing_or_everything_allows_all(k):
    assert len(draw(torch.zeros(2000, 5), top_k=k).unique()) == 5


def test_limits_that_leave_nothing_leave_the_likeliest():
    logits = torch.randn(50, 10, generator=seeded())
    for limits in (dict(top_p=1e-9), dict(min_p=1.0), dict(top_p=0.0, top_k=3)):
        assert torch.equal(draw(logits, **limits), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0, 1e-6, 1e-30, 1e-40])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_temperature_of_zero_or_nearly_so_takes_the_likeliest(temperature, k):
    logits = torch.randn(50, 10, generator=seeded())
    assert torch.equal(draw(logits, temperature, k), logits.argmax(-1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("k", [0, 3])
def test_the_ends_of_the_line_belong_to_it(uniform, k):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, 0.5, -1.0, -torch.inf]])
    one = torch.ones(1, 1)
    got = sample(logits, k, one, one, 0 * one, torch.full((1, 1), uniform, dtype=torch.float64)).item()
    assert got == {(0.0, 0): 1, (0.0, 3): 2, (1 - 2**-53, 0): 4, (1 - 2**-53, 3): 3}[uniform, k]


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.randn(2000, 100, generator=seeded()).bfloat16()
    for k in (0, 50):
        drawn, expected = (draw(x, 0.8, k, seed=1) for x in (logits, logits.float()))
        assert torch.equal(drawn, expected)


# Penalties and biases

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.0])


def test_the_repetition_penalty_is_that_of_ctrl():
    """Keskar et al. 2019, for tokens of the prompt and of the text; negative logits are multiplied, as in Transformers."""
    expected = LOGITS.tolist()
    for id in (0, 1, 4):
        expected[id] = expected[id] / 1.5 if expected[id] > 0 else expected[id] * 1.5
    found = adjust(LOGITS, Options(repetition_penalty=1.5), [1, 1, 4], [0, 1])
    assert found.tolist() == pytest.approx(expected)
    transformers = pytest.importorskip("transformers")
    reference = transformers.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1, 1, 4, 0, 1]]), LOGITS[None])
    torch.testing.assert_close(found, reference[0])


@pytest.mark.parametrize("frequency, presence", [(0.7, 0.0), (0.0, -1.2), (0.5, 0.25)])
def test_the_other_penalties_are_those_of_openai(frequency, presence):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, where c counts the tokens generated so far."""
    new = [2, 5, 2, 2]
    c = [new.count(j) for j in range(6)]
    expected = [mu - c[j] * frequency - float(c[j] > 0) * presence for j, mu in enumerate(LOGITS.tolist())]
    options = Options(frequency_penalty=frequency, presence_penalty=presence)
    assert adjust(LOGITS, options, [0, 0, 1, 2], new).tolist() == pytest.approx(expected)
    assert torch.equal(adjust(LOGITS, options, [0, 0, 1, 2], []), LOGITS)


def test_a_logit_bias_is_added():
    found = adjust(LOGITS, Options(logit_bias=((4, 7.5), (0, -100.0))), [4], [4])
    assert found.tolist() == pytest.approx([-98.0, -1.0, 0.5, 0.0, 4.5, 1.0])


def test_together_the_repetition_penalty_comes_first():
    options = Options(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((0, 3.0),))
    assert adjust(LOGITS, options, [1], [0, 0])[:2].tolist() == pytest.approx([2 / 2 - 1.0 - 0.25 + 3, -2.0])


def test_the_defaults_adjust_nothing():
    assert not Options().adjusts
    changes = (dict(repetition_penalty=1.1), dict(frequency_penalty=0.1), dict(presence_penalty=-0.1))
    assert all(Options(**change).adjusts for change in (*changes, dict(logit_bias=((0, 1.0),))))


def test_the_engine_adjusts_by_what_it_has_written(either):
    """Greedy tokens are those of the definitions, whatever row is beside it; log-probabilities stay the model's own."""
    options = Options(max_new_tokens=12, temperature=0, logprobs=0, repetition_penalty=1.3, frequency_penalty=0.8)
    engine = Engine(either, 2)
    (row,) = engine.add([1, 2], options)
    (plainly,) = engine.add([1, 2], Options(max_new_tokens=12, temperature=0))
    reported = [token for token in write_all(engine) if token.row is row]
    ids = [1, 2]
    for token in reported:
        logits = plain_logits(either, torch.tensor([ids]))[0]
        ids.append(int(adjust(logits, options, ids[:2], ids[2:]).argmax()))
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[ids[-1]].item(), abs=1e-4)
    assert row.ids == ids != plainly.ids
    assert plainly.ids[2:] == plain(either, torch.tensor([[1, 2]]), 12)[0].tolist()
    assert row.mean_logprob == pytest.approx(sum(token.logprob for token in reported) / 12)


def test_a_bias_of_minus_and_plus_100_bans_and_forces_a_token(model):
    engine = Engine(model, 2)
    (forced,) = engine.add([1], Options(max_new_tokens=5, logit_bias=((7, 100.0),)))
    (banned,) = engine.add([1], Options(max_new_tokens=200, temperature=2.0, logit_bias=((7, -100.0),)))
    write_all(engine)
    assert forced.ids[1:] == [7] * 5 and 7 not in banned.ids


# The log-probabilities of the prompt


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("T", [1, 2, S])
def test_the_log_probabilities_of_the_prompt(either, chunk, T):
    """Those of the model without a cache, for every row that shares the prompt, and beside a row without them."""
    ids = torch.randint(0, V, (T,), generator=seeded()).tolist()
    engine = Engine(either, 4, chunk=chunk)
    engine.add(ids[::-1], Options(max_new_tokens=3))
    rows = engine.add(ids, Options(max_new_tokens=2 * S, logprobs=2, prompt_logprobs=True), n=2)
    engine.step()
    write_all(engine)
    with torch.no_grad():
        logprobs = either(torch.tensor([ids]), torch.tensor([ids]))[0][0].log_softmax(-1)
    for row in rows:
        assert [token.id for token in row.prompt] == ids
        assert (row.prompt[0].logprob, row.prompt[0].likeliest) == (None, ())
        for i, token in enumerate(row.prompt[1:]):
            values, likeliest = logprobs[i].topk(2)
            assert token.logprob == pytest.approx(logprobs[i, ids[i + 1]].item(), abs=1e-4)
            assert [id for id, _ in token.likeliest] == likeliest.tolist()
            assert [p for _, p in token.likeliest] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_prompt_to_report_must_fit_the_context(model):
    with pytest.raises(ValueError, match=f"need a context of as many, not {S}"):
        Engine(model, 1).add([1] * (S + 1), Options(logprobs=0, prompt_logprobs=True))


# With the cache and without


def plain(model, idx, n):
    """Greedy tokens (B, n) without a cache, the whole context again for each."""
    start = idx.shape[1]
    for _ in range(n):
        idx = torch.cat([idx, plain_logits(model, idx).argmax(-1, keepdim=True)], dim=1)
    return idx[:, start:]


@torch.no_grad()
def plain_logits(model, idx):
    """Logits (B, V) of what follows idx (B, T)."""
    T = idx.shape[1]
    if model.rotary is None:  # from a full context on, as many tokens as there are since the latest refresh
        W = max(1, S // 2)
        return model(idx[:, -(T if T <= S else W + (T - S - 1) % (S - W + 1)) :])[0][:, -1]
    x = model.transformer.wte(idx[:, -T:])
    cos_sin = model.rotary.at(torch.arange(T)[None])
    for block in model.transformer.h:
        x = block(x, cos_sin, SlidingWindow())
    return model.lm_head(model.transformer.ln_f(x))[:, -1]


class SlidingWindow:
    """Stands for a KV cache: each token attends to the last S tokens, itself included."""

    def update(self, layer, k, v):
        i = torch.arange(k.shape[1])
        return k, v, (i <= i[:, None]) & (i > i[:, None] - S)


def test_greedy_tokens_are_those_without_a_cache(either):
    """Far through the end of the context."""
    assert torch.equal(new_tokens(either, PROMPT, 50, temperature=0), plain(either, PROMPT, 50))


def spy(engine):
    """A list that will hold the logits of all steps of an engine with one row."""
    seen, choose = [], engine._choose
    engine._choose = lambda rows, logits: (seen.append(logits.clone()), choose(rows, logits))[1]
    return seen


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("T", [1, 2, S - 1, S])
def test_logits_are_those_without_a_cache(either, T, chunk):
    ids = torch.randint(0, V, (T,), generator=seeded()).tolist()
    engine = Engine(either, 2, chunk=chunk)
    seen = spy(engine)
    (row,) = engine.add(ids, Options(max_new_tokens=40))
    write_all(engine)
    for n, logits in enumerate(seen):
        torch.testing.assert_close(logits, plain_logits(either, torch.tensor([row.ids[: T + n]])), atol=2e-5, rtol=1e-4)
    assert len(seen) == 40


def test_the_original_way_is_kept_within_the_context(either):
    """Until the context is full, a token is the argmax after all tokens before it."""
    idx = PROMPT
    for token in generate(either, PROMPT, S - 2, temperature=0):
        assert torch.equal(token, either(idx)[0][:, -1].argmax(-1, keepdim=True))
        idx = torch.cat([idx, token], dim=1)


def test_a_prompt_beyond_the_context_counts_by_its_end(either):
    long = torch.randint(0, V, (2, 30), generator=seeded())
    assert torch.equal(new_tokens(either, long, 4, 0), new_tokens(either, long[:, -S:], 4, 0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_context_of_a_few_tokens(size):
    model = GPT(GPTConfig(block_size=size, vocab_size=V, n_layer=1, n_head=1, n_embd=4))
    assert new_tokens(model, PROMPT, 10).shape == (2, 10)


# Rows


def write_all(engine):
    """Step until every row has left: all tokens, in order."""
    tokens = []
    while engine.rows:
        tokens += engine.step()
    return tokens


def random_request(draw):
    ids = [draw.randrange(V) for _ in range(draw.randint(1, 2 * S))]
    options = Options(
        max_new_tokens=draw.randint(1, 3 * S),
        temperature=draw.choice([0, 0.7, 1.3]),
        top_k=draw.choice([0, 1, 5]),
        top_p=draw.choice([1.0, 0.8]),
        min_p=draw.choice([0.0, 0.1]),
        seed=draw.randrange(1000),
        stop=frozenset(draw.sample(range(V), draw.choice([0, 1]))),
        logprobs=draw.choice([None, 0, 2]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.5]),
        frequency_penalty=draw.choice([0.0, 0.0, 1.0]),
        presence_penalty=draw.choice([0.0, 0.0, 1.0]),
        logit_bias=draw.choice([(), (), ((3, 2.0), (4, -100.0))]),
    )
    return ids, options, draw.randint(1, 3)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_gets_what_it_would_get_alone(either, chunk, seed):
    """Whoever comes, goes or gives up beside it, and wherever in the cache it stands."""
    draw = random.Random(seed)
    engine = Engine(either, 5, chunk=chunk)
    coming, going = [random_request(draw) for _ in range(25)], []
    cancelled = set()
    while coming or engine.rows:
        while coming and coming[0][2] <= engine.free and draw.random() < 0.7:
            ids, options, n = coming.pop(0)
            going += [(row, ids, options, i) for i, row in enumerate(engine.add(ids, options, n))]
        if engine.rows and draw.random() < 0.1:
            cancelled.add(row := draw.choice(engine.rows))
            engine.remove(row)
        engine.step()
    assert len(cancelled) > 3
    for row, ids, options, i in going:
        alone = Engine(either, 1, chunk=chunk)
        (same,) = alone.add(ids, dataclasses.replace(options, seed=options.seed + i))
        write_all(alone)
        assert row.ids == (same.ids[: len(row.ids)] if row in cancelled else same.ids)


def test_a_prompt_is_encoded_once_for_all_its_rows(either):
    encoded = []
    either.transformer.wte.register_forward_hook(lambda module, args, out: encoded.append(args[0].numel()))
    engine = Engine(either, 5)
    engine.add([1, 2, 3, 4], Options(max_new_tokens=3), n=5)
    write_all(engine)
    assert encoded == [4, 5, 5]


def test_rows_whose_prompt_another_was_encoding_go_on_without_it(either):
    engine = Engine(either, 3, chunk=2)
    rows = engine.add([1, 2, 3, 4], Options(max_new_tokens=3, seed=5), n=3)
    engine.step()
    engine.remove(rows[0])
    for _ in range(5):
        engine.step()
    assert not engine.rows
    for i in (1, 2):
        assert rows[i].ids[4:] == new_tokens(either, torch.tensor([[1, 2, 3, 4]]), 3, seed=5 + i)[0].tolist()


def test_a_compiled_model_always_reads_the_whole_cache_and_writes_the_same(either):
    ends = []

    def fast(idx, kv_cache):
        ends.append(kv_cache.seen[1].stop)
        return either(idx, kv_cache=kv_cache)

    engine = Engine(either, 2, fast=fast)
    rows = engine.add([1, 2], Options(max_new_tokens=20, seed=5), n=2)
    write_all(engine)
    assert ends and set(ends) == {S}
    for i in range(2):
        assert rows[i].ids[2:] == new_tokens(either, torch.tensor([[1, 2]]), 20, seed=5 + i)[0].tolist()


def test_a_long_prompt_does_not_hold_up_the_others(either):
    engine = Engine(either, 2, chunk=2)
    (first,) = engine.add([1], Options(max_new_tokens=5))
    engine.step()
    (second,) = engine.add([1, 2, 3, 4, 5, 6], Options(max_new_tokens=2))
    assert [[t.row for t in engine.step()] for _ in range(4)] == [[first], [first], [first, second], [first, second]]


def test_many_prompts_do_not_hold_up_the_others_either(either):
    encoded = []
    engine = Engine(either, 4, chunk=2)
    for first in (1, 2, 3):
        engine.add([first, 4], Options(max_new_tokens=9))
    either.transformer.wte.register_forward_hook(lambda module, args, out: encoded.append(args[0].numel()))
    assert [len(engine.step()) for _ in range(3)] == [1, 2, 3]
    assert encoded == [2, 1, 2, 2, 2]


def test_rows_that_do_not_fit_are_refused(either):
    engine = Engine(either, 3, length=6)
    with pytest.raises(ValueError, match="do not fit"):
        engine.add([1], Options(), n=4)
    for ids in ([], [V], [-1]):
        with pytest.raises(ValueError):
            engine.add(ids, Options(max_new_tokens=1))
    with pytest.raises(ValueError, match="more than the length"):
        engine.add([1, 2], Options(max_new_tokens=5))
    assert engine.free == 3
    engine.add([1, 2], Options(max_new_tokens=4), n=3)
    assert engine.free == 0
    write_all(engine)
    assert engine.free == 3


def test_a_stop_token_ends_a_text(model):
    engine = Engine(model, 1)
    (row,) = engine.add([1, 2], Options(max_new_tokens=30))
    write_all(engine)
    third = row.ids[4]
    engine.add([1, 2], Options(max_new_tokens=30, stop=frozenset([third])))
    tokens = write_all(engine)
    assert [t.id for t in tokens] == row.ids[2 : 2 + len(tokens)] and third not in row.ids[2 : 1 + len(tokens)]
    assert [t.finish for t in tokens] == [None] * (len(tokens) - 1) + ["stop"]


def test_log_probabilities_are_the_models_own(either):
    engine = Engine(either, 3)
    engine.add([1, 2], Options(max_new_tokens=4, temperature=0.3, top_k=2, logprobs=3, seed=5))
    engine.add([3], Options(max_new_tokens=4))
    engine.add([4], Options(max_new_tokens=4, logprobs=0))
    text = [1, 2]
    for token in write_all(engine):
        if token.row.options.logprobs is None:
            assert (token.logprob, token.likeliest) == (None, ())
        elif token.row.options.logprobs == 0:
            assert token.logprob < 0 and token.likeliest == ()
        else:
            expected = plain_logits(either, torch.tensor([text]))[0].log_softmax(-1)
            values, ids = expected.topk(3)
            assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
            assert [id for id, _ in token.likeliest] == ids.tolist()
            assert [p for _, p in token.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
            text.append(token.id)
    assert len(text) == 6


# The function for scripts


def test_the_number_and_shape_of_new_tokens(model):
    tokens = list(generate(model, PROMPT, 5, seed=0))
    assert [t.shape for t in tokens] == [(2, 1)] * 5
    assert all(0 <= t.min() and t.max() < V for t in tokens)
    assert list(generate(model, PROMPT, 0)) == []


def test_the_seed_decides(model):
    first, again, other = (new_tokens(model, PROMPT, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_row_has_the_next_seed(model):
    both = new_tokens(model, PROMPT, 20, seed=7)
    for i in range(2):
        assert torch.equal(both[i : i + 1], new_tokens(model, PROMPT[i : i + 1], 20, seed=7 + i))


def test_without_a_seed_pytorchs_decides(model):
    torch.manual_seed(1)
    first = new_tokens(model, PROMPT, 20, seed=None)
    other = new_tokens(model, PROMPT, 20, seed=None)
    torch.manual_seed(1)
    assert torch.equal(new_tokens(model, PROMPT, 20, seed=None), first)
    assert not torch.equal(other, first)


def test_ids_from_vocab_size_on_are_never_chosen(model):
    free = new_tokens(model, PROMPT, 200)
    bound = new_tokens(model, PROMPT, 200, vocab_size=7)
    assert bound.max() < 7 <= free.max()
    assert new_tokens(model, PROMPT, 50, temperature=0, vocab_size=7).max() < 7
    assert new_tokens(model, PROMPT, 50, top_k=15, vocab_size=7).max() < 7


def test_the_options_arrive(model):
    greedy = new_tokens(model, PROMPT, 10, temperature=0)
    for options in (dict(top_k=1), dict(temperature=1e-6), dict(top_p=1e-9), dict(min_p=1.0)):
        assert torch.equal(new_tokens(model, PROMPT, 10, **options), greedy)
    assert not torch.equal(new_tokens(model, PROMPT, 10, temperature=100.0), greedy)


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
    with pytest.raises(ValueError):
        new_tokens(model, PROMPT + 100, 10)
    assert model.training is training


def test_nothing_is_kept_for_a_backward_pass(model):
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    next(generate(model, PROMPT, 1))
    assert seen == [False]


def test_the_tokens_may_be_trained_on(model):
    out = model.generate(PROMPT, 4)
    model.train()(out, out)[1].backward()


def test_the_models_own_generate_continues_the_prompt(model):
    out = model.generate(PROMPT, 12, temperature=0.7, top_k=5, seed=0)
    assert torch.equal(out[:, :3], PROMPT)
    assert torch.equal(out[:, 3:], new_tokens(model, PROMPT, 12, 0.7, 5))
