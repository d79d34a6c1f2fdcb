"""The optimizer against plain numpy: decay on matrices only, clipping, and a state that continues bit for bit."""

import numpy as np
import pytest
import torch

from nanogpt import optim
from nanogpt.config import TrainConfig
from nanogpt.model import GPT, GPTConfig

CFG = TrainConfig(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)


def make_model(seed=1):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))


def backward(model, step):
    """Gradients of the same batch in the same step."""
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(step))
    model(ids[:, :-1], ids[:, 1:])[1].backward()


def update(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_five_steps_equal_plain_numpy():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    expected = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    m = {name: 0.0 for name in expected}
    v = {name: 0.0 for name in expected}
    for t in range(1, 6):
        lr = optim.set_lr(optimizer, 1e-2 / t, CFG)
        backward(model, t)
        for name, p in model.named_parameters():
            g = p.grad.double().numpy()
            if p.dim() == 2:
                expected[name] *= 1 - lr * 0.3
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            expected[name] -= lr * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=2e-4, atol=2e-6, err_msg=name)


def test_five_steps_equal_pytorchs_bit_for_bit():
    model, other = make_model(), make_model()
    optimizer = optim.make_optimizer(model, CFG)
    groups = [
        {"params": [p for p in other.parameters() if p.dim() == 2], "weight_decay": 0.3},
        {"params": [p for p in other.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), fused=True)
    for step in range(5):
        update(model, optimizer, step)
        update(other, reference, step)
    assert_equal(weights(model), weights(other))


def test_only_matrices_and_embeddings_decay():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = 1 - 1e-2 * 0.3 if p.dim() == 2 else 1.0
        assert torch.equal(p.data, torch.full_like(p, expected)), name


def test_set_lr_reaches_every_parameter_and_gives_the_rate_back():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    assert optim.set_lr(optimizer, 0.0, CFG) == 0.0
    before = weights(model)
    update(model, optimizer, 1)
    assert_equal(weights(model), before)


def test_a_parameter_without_a_gradient_stays():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    backward(model, 1)
    model.lm_head.weight.grad = None
    before = weights(model)
    optimizer.step()
    same = [name for name, p in weights(model).items() if torch.equal(p, before[name])]
    assert same == ["transformer.wte.weight"]


def test_zero_grad_forgets_every_gradient():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    update(model, optimizer, 1)
    assert all(p.grad is None for p in model.parameters())


def test_a_scaler_of_float16_skips_an_update_that_overflowed():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert_equal(weights(model), before)
    assert scaler.get_scale() == 512.0


# Clipping


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def joint_norm(grads):
    return np.sqrt(sum((g.double().numpy() ** 2).sum() for g in grads.values()))


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_clipping_returns_the_norm_before_it(max_norm):
    model = make_model()
    backward(model, 1)
    expected = joint_norm(gradients(model))
    assert 0.1 < expected < 1e6
    assert optim.clip_gradients(model, max_norm).item() == pytest.approx(expected, rel=1e-5)


def test_clipping_scales_all_gradients_to_the_norm():
    model = make_model()
    backward(model, 1)
    before = gradients(model)
    norm = optim.clip_gradients(model, 0.1).item()
    after = gradients(model)
    assert joint_norm(after) == pytest.approx(0.1, rel=1e-4)
    for name in before:
        torch.testing.assert_close(after[name], before[name] * (0.1 / norm), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_that_need_no_clipping_stay_bit_for_bit(max_norm):
    model = make_model()
    backward(model, 1)
    before = gradients(model)
    optim.clip_gradients(model, max_norm)
    assert_equal(gradients(model), before)


# State


def test_a_restored_state_continues_bit_for_bit():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    for step in range(3):
        update(model, optimizer, step)
    saved_weights = weights(model)
    saved_state = {name: t.clone() for name, t in optim.state_tensors(model, optimizer).items()}
    for step in range(3, 6):
        update(model, optimizer, step)

    resumed = make_model(seed=2)
    resumed.load_weights(saved_weights)
    resumed_optimizer = optim.make_optimizer(resumed, CFG)
    optim.load_state_tensors(resumed, resumed_optimizer, saved_state)
    for step in range(3, 6):
        update(resumed, resumed_optimizer, step)

    assert_equal(weights(resumed), weights(model))
    assert_equal(optim.state_tensors(resumed, resumed_optimizer), optim.state_tensors(model, optimizer))


def test_the_state_is_named_after_the_parameters():
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    update(model, optimizer, 1)
    state = optim.state_tensors(model, optimizer)
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(state) == {f"{key}.{name}" for key in keys for name, _ in model.named_parameters()}
    assert state["step.transformer.wpe.weight"] == 1
    assert state["exp_avg.transformer.wpe.weight"].shape == (8, 16)


@pytest.mark.parametrize("damage", ["unknown", "missing", "shape"])
def test_a_state_that_does_not_fit_is_refused_by_name(damage):
    model = make_model()
    optimizer = optim.make_optimizer(model, CFG)
    update(model, optimizer, 1)
    state, name = dict(optim.state_tensors(model, optimizer)), "exp_avg.transformer.ln_f.weight"
    if damage == "unknown":
        name = "exp_avg.nobody"
        state[name] = torch.zeros(2)
    if damage == "missing":
        del state[name]
    if damage == "shape":
        state[name] = torch.zeros(2)
    with pytest.raises(ValueError, match=name):
        optim.load_state_tensors(model, optimizer, state)
