"""The model: its size, its arithmetic against naive references, causality, and a golden training step."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanogpt.model import GPT, CausalSelfAttention, GPTConfig, gated_width

TINY = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)


def tiny_model(seed=1, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**TINY | changes))


def tokens(*shape, seed=2):
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# Size and initialisation


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, expected",
    [(12, 12, 768, 124439808), (24, 16, 1024, 354823168), (36, 20, 1280, 774030080), (48, 25, 1600, 1557611200)],
)
def test_openais_sizes_have_openais_number_of_parameters(n_layer, n_head, n_embd, expected):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257))
    assert model.num_params(non_embedding=False) == expected
    assert model.num_params() == expected - 1024 * n_embd


def test_gpt2_as_in_the_fixed_interface_has_124m_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))
    assert model.config == GPTConfig(block_size=1024, vocab_size=50304, dropout=0.0, bias=True)
    assert model.num_params() == 123689472


def test_without_bias_there_is_none():
    model = tiny_model(bias=False)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert [name for name, _ in tiny_model().named_parameters() if name.endswith("bias")]


def test_the_output_layer_is_the_token_embedding():
    model = tiny_model()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.shape == (50, 32) for p in model.parameters()) == 1


def test_initialisation_is_gpt2s():
    model = tiny_model(n_layer=8, n_embd=128, vocab_size=1000, block_size=256)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel()), name


def test_an_untrained_model_knows_nothing():
    model = tiny_model()
    loss = model(tokens(8, 16), tokens(8, 16, seed=3))[1].item()
    assert loss == pytest.approx(math.log(50), abs=0.05)


@pytest.mark.parametrize("shape", [dict(n_embd=30, n_head=4), dict(activation="relu")])
def test_an_impossible_shape_is_refused(shape):
    with pytest.raises(ValueError, match=next(iter(shape))):
        GPTConfig(**shape)


# Forward


def test_without_targets_only_the_last_positions_logits_come():
    model, x = tiny_model(), tokens(3, 10)
    full, loss = model(x, x)
    last, none = model(x)
    assert full.shape == (3, 10, 50) and loss.shape == () and none is None
    torch.testing.assert_close(last, full[:, -1:])


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    model, x, y = tiny_model(), tokens(3, 10), tokens(3, 10, seed=3)
    logits, loss = model(x, y)
    expected = -logits.log_softmax(-1).gather(-1, y[..., None]).mean()
    torch.testing.assert_close(loss, expected)


def test_targets_of_minus_one_are_not_counted():
    model, x, y = tiny_model(), tokens(2, 8), tokens(2, 8, seed=3)
    y[0, 3:], y[1, 0] = -1, -1
    logits, loss = model(x, y)
    expected = F.cross_entropy(logits[y >= 0], y[y >= 0])
    torch.testing.assert_close(loss, expected)


def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny_model()
    model(tokens(1, 16))
    with pytest.raises(ValueError, match="17 tokens does not fit the context of 16"):
        model(tokens(1, 17))


def test_a_position_depends_on_all_before_it_and_on_none_after():
    model, T = tiny_model(), 8
    embedded = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: embedded.append(out))
    x = tokens(1, T)
    logits = model(x, x)[0]  # (1, T, V)
    for t in range(T):
        (grad,) = torch.autograd.grad(logits[0, t] @ torch.linspace(-1, 1, 50), embedded, retain_graph=True)
        depends = grad[0].abs().sum(-1) > 0
        assert depends.tolist() == [True] * (t + 1) + [False] * (T - t - 1)


def test_sequences_of_a_batch_do_not_see_each_other():
    model, x = tiny_model(), tokens(3, 8)
    for row in range(3):
        torch.testing.assert_close(model(x)[0][row], model(x[[row]])[0][0])


def test_the_order_of_tokens_matters():
    model, x = tiny_model(n_layer=1), tokens(1, 8)  # more layers tell some order even without positions
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert (model(x)[0] - model(swapped)[0]).abs().max() > 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_a_masked_softmax(bias):
    torch.manual_seed(0)
    B, T, H, D = 2, 7, 3, 4
    attention = CausalSelfAttention(GPTConfig(n_embd=H * D, n_head=H, bias=bias), layer=0).double()
    x = torch.randn(B, T, H * D, dtype=torch.float64)
    qkv = F.linear(x, attention.c_attn.weight, attention.c_attn.bias)
    heads = []
    for h in range(H):
        q, k, v = (qkv[..., i * H * D + h * D : i * H * D + (h + 1) * D] for i in range(3))
        scores = q @ k.mT / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = F.linear(torch.cat(heads, -1), attention.c_proj.weight, attention.c_proj.bias)
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation, approximate", [("gelu", "none"), ("gelu_new", "tanh")])
def test_the_activation_is_the_one_asked_for(activation, approximate):
    mlp = tiny_model(activation=activation).transformer.h[0].mlp
    x = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    mlp.c_fc.weight.data.mul_(20)
    expected = mlp.c_proj(F.gelu(mlp.c_fc(x), approximate=approximate))
    assert torch.equal(mlp(x), expected)


def test_dropout_acts_in_training_only():
    model, x = tiny_model(dropout=0.5), tokens(2, 8)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("place", ["embedding", "probabilities", "attention", "mlp"])
def test_dropout_acts_in_each_of_its_places(place):
    model, x = tiny_model(n_layer=1), tokens(2, 8)
    block = model.transformer.h[0]
    if place == "probabilities":
        block.attn.dropout = 0.5
    else:
        dropouts = {
            "embedding": model.transformer.drop,
            "attention": block.attn.resid_dropout,
            "mlp": block.mlp.dropout,
        }
        dropouts[place].p = 0.5
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_the_config_sets_all_dropouts(architecture):
    model = tiny_model(dropout=0.25, architecture=architecture)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    if architecture == "gpt2":
        assert {block.attn.dropout for block in model.transformer.h} == {0.25}


# Cropping and loading


def test_a_cropped_model_gives_the_same_logits_on_what_still_fits():
    model, x = tiny_model(), tokens(2, 6)
    before = model(x, x)[0]
    model.crop_block_size(6)
    assert torch.equal(model(x, x)[0], before)
    assert model.transformer.wpe.weight.shape == (6, 32) and model.transformer.wpe.weight.requires_grad
    assert model.config.block_size == 6
    with pytest.raises(ValueError, match="does not fit the context of 6"):
        model(tokens(1, 7))


def test_a_context_cannot_grow_by_cropping():
    model = tiny_model()
    with pytest.raises(ValueError, match="context of 16 cannot be cropped to 17"):
        model.crop_block_size(17)
    model.crop_block_size(16)
    assert model.config.block_size == 16


def test_load_weights_makes_models_equal():
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    other.load_weights({n: p.detach().clone() for n, p in model.named_parameters()})
    assert torch.equal(model(tokens(1, 8))[0], other(tokens(1, 8))[0])


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_load_weights_refuses_what_does_not_fit_and_changes_nothing(damage):
    model, name = tiny_model(), "transformer.ln_f.weight"
    weights = {n: p + 1 for n, p in model.named_parameters()}
    if damage == "missing":
        del weights[name]
    if damage == "unknown":
        name = "nobody.weight"
        weights[name] = torch.zeros(2)
    if damage == "shape":
        weights[name] = torch.zeros(2)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=name):
        model.load_weights(weights)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# Cost


@pytest.mark.parametrize("T", [16, 5])
def test_flops_are_those_of_the_matrix_products_with_causal_attention_once(T):
    model, B = tiny_model(n_head=4), 3
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(B, T), tokens(B, T))[1].backward()
    # The counter multiplies every query with every key. A causal position t has t + 1 of the T keys, so of the
    # T * T pairs T * (T - 1) / 2 are not needed: each 2 products of n_embd channels, forward once, backward twice.
    masked_pairs = T * (T - 1) // 2
    not_needed = 3 * 2 * 2 * masked_pairs * model.config.n_embd * model.config.n_layer
    assert B * T * model.flops_per_token(T) == counter.get_total_flops() - B * not_needed


def test_flops_are_for_the_full_context_unless_said_otherwise():
    model = tiny_model()
    assert model.flops_per_token() == model.flops_per_token(16) > model.flops_per_token(8)


# Golden values


def test_one_training_step_gives_the_recorded_losses():
    model, x = tiny_model(seed=1337), tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    before = model(x[:, :-1], x[:, 1:])[1]
    before.backward()
    optimizer.step()
    after = model(x[:, :-1], x[:, 1:])[1]
    assert [before.item(), after.item()] == pytest.approx([3.9270520, 3.6369469], abs=1e-5)


# -- the modern architecture


def modern(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, bias=False) | changes
    model = GPT(GPTConfig(**shape, architecture="qwen3"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)  # its blocks begin at zero, and nothing could be told apart
    return model


def test_the_modern_model_is_qwen3():
    """Qwen3 of Hugging Face, with the same weights and all its gains at 1, computes the same logits and gradients."""
    transformers = pytest.importorskip("transformers")
    model = modern()
    shape = dict(vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    hidden = model.transformer.h[0].mlp.up_proj.out_features
    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **shape, head_dim=16, intermediate_size=hidden, max_position_embeddings=16, tie_word_embeddings=True
        )
    )
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        name = name.replace("transformer.wte", "model.embed_tokens").replace("transformer.h.", "model.layers.")
        theirs.pop(name.replace(".attn.", ".self_attn.")).data.copy_(p)
    assert all(name.endswith("norm.weight") and (p == 1).all() for name, p in theirs.items())
    idx, targets = torch.randint(31, (2, 3, 16))
    logits, loss = model(idx, targets)
    expected = reference(idx).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(
        model.transformer.h[0].attn.k_proj.weight.grad,
        reference.model.layers[0].self_attn.k_proj.weight.grad,
        atol=1e-6,
        rtol=1e-4,
    )


def test_the_modern_model_sees_no_token_after_the_one_that_it_predicts_from():
    model = modern()
    x = model.transformer.wte(torch.randint(31, (1, 16))).detach().requires_grad_()
    cos_sin = model.rotary(16)
    model.transformer.h[1](model.transformer.h[0](x, cos_sin), cos_sin)[0, 7].sum().backward()
    assert (x.grad[0, 8:] == 0).all() and (x.grad[0, :8] != 0).any(dim=-1).all()


def test_the_modern_model_begins_with_its_blocks_switched_off():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, architecture="qwen3"))
    x = torch.randn(1, 16, 32)
    assert torch.equal(model.transformer.h[0](x, model.rotary(16)), x)
    for name, p in model.transformer.h.named_parameters():
        written = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert p.std().item() == pytest.approx(0.0 if written else 0.5 * 32**-0.5, rel=0.1), name


@pytest.mark.parametrize("n_embd, expected", [(2, 32), (32, 96), (64, 160), (100, 256), (384, 1024), (768, 2048)])
def test_the_width_of_the_gated_layer_never_changes(n_embd, expected):
    """A model that was trained with an older version must still be read."""
    assert gated_width(n_embd) == expected


def test_a_cropped_modern_model_answers_as_before():
    model = modern()
    idx = torch.randint(31, (2, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match="does not fit the context of 8"):
        model(torch.zeros((1, 9), dtype=torch.int64))


def test_the_modern_model_counts_its_parameters_and_operations():
    model = modern()
    per_layer = 4 * 32 * 32 + 3 * 32 * 96
    assert model.num_params() == model.num_params(non_embedding=False) == 2 * per_layer + 31 * 32
    assert model.flops_per_token() == 6 * (2 * per_layer + 31 * 32 + 2 * 2 * 32 * 17 / 2)


@pytest.mark.parametrize(
    "wrong, match",
    [
        (dict(architecture="gpt3"), "one of gpt2, qwen3"),
        (dict(n_embd=30, n_head=2), "must be a multiple of 2 x n_head"),
    ],
)
def test_a_modern_shape_that_cannot_be_is_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        GPTConfig(**dict(architecture="qwen3") | wrong)


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
def test_dropout_acts_in_each_of_the_modern_models_places(place):
    model, x = modern(n_layer=1), torch.randint(31, (2, 8))
    assert torch.equal(model(x)[0], model(x)[0])
    block = model.transformer.h[0]
    places = {"embedding": model.transformer.drop, "attention": block.attn.resid_dropout, "mlp": block.mlp.dropout}
    places[place].p = 0.5
    assert not torch.equal(model(x)[0], model(x)[0])


def test_the_modern_model_drops_nothing_from_attention_itself():
    model = modern(dropout=0.9)
    attention = model.transformer.h[0].attn.train()
    attention.resid_dropout.p = 0.0
    x, cos_sin = torch.randn(2, 16, 32), model.rotary(16)
    assert torch.equal(attention(x, cos_sin), attention(x, cos_sin))


# Checkpointed activations


def gradients_and_kept(model, checkpointed, idx):
    """(the gradients of a step with dropout, the bytes that its forward pass keeps for the backward pass)."""
    model.checkpoint_activations = checkpointed
    torch.manual_seed(5)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(idx, idx)[1]
    held = sum(kept.values())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found, held


@pytest.mark.parametrize("products", ["highest", "medium"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_checkpointed_activations_change_no_bit_of_a_gradient(architecture, products):
    model = tiny_model(n_layer=6, dropout=0.3, architecture=architecture)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        (expected, much), (found, less) = (gradients_and_kept(model, on, tokens(4, 16)) for on in (False, True))
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert less < much / 3
