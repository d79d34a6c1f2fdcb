"""The optimizers against plain numpy: AdamW, Muon, clipping, and a state that continues bit for bit."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import losses, torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt import optim
from nanogpt.commands import cli
from nanogpt.config import TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import distributed

CFG = TrainConfig(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)
MUON = replace(CFG, optimizer="muon", muon_lr=0.05, muon_momentum=0.7)
both = pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])


def make_model(seed=1, architecture="gpt2"):
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16)
    return GPT(GPTConfig(**shape, architecture=architecture))


def backward(model, step):
    """Gradients of the same batch in the same step."""
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(step))
    model(ids[:, :-1], ids[:, 1:])[1].backward()


def update(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    model.zero_grad()


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
        lr = 1e-2 / t
        optim.set_lr(optimizer, lr, CFG)
        backward(model, t)
        for name, p in model.named_parameters():
            g = p.grad.double().numpy()
            if p.dim() == 2:
                expected[name] *= 1 - lr * 0.3
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            expected[name] -= lr * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-8)
        optimizer.step()
        model.zero_grad()
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


@both
def test_set_lr_reaches_every_parameter(cfg):
    model = make_model()
    optimizer = optim.make_optimizer(model, cfg)
    optim.set_lr(optimizer, 0.0, cfg)
    before = weights(model)
    update(model, optimizer, 1)
    assert_equal(weights(model), before)


@both
@pytest.mark.parametrize("without", ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"])
def test_a_parameter_without_a_gradient_stays(cfg, without):
    model = make_model()
    optimizer = optim.make_optimizer(model, cfg)
    backward(model, 1)
    model.get_parameter(without).grad = None
    before = weights(model)
    optimizer.step()
    same = [name for name, p in weights(model).items() if torch.equal(p, before[name])]
    assert same == [without]


@both
def test_an_update_to_be_skipped_changes_nothing(cfg):
    model = make_model()
    optimizer = optim.make_optimizer(model, cfg)
    update(model, optimizer, 1)
    before, state = weights(model), copied_state(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(torch.ones(()))
    assert_equal(weights(model), before)
    assert_equal(copied_state(model, optimizer), state)


@both
def test_an_update_not_to_be_skipped_is_the_same_as_one_that_cannot_be(cfg):
    asked, never = make_model(), make_model()
    for model, skip in ((asked, torch.zeros(())), (never, None)):
        optimizer = optim.make_optimizer(model, cfg)
        backward(model, 1)
        optimizer.step(skip)
    assert_equal(weights(asked), weights(never))


@both
@pytest.mark.parametrize("skip", [None, torch.zeros(())], ids=["unasked", "not asked to"])
def test_a_scaler_of_float16_skips_an_update_that_overflowed(cfg, skip):
    model = make_model()
    optimizer = optim.make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before, state = weights(model), copied_state(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer, skip)
    scaler.update()
    assert_equal(weights(model), before)
    assert_equal(copied_state(model, optimizer), state)
    assert scaler.get_scale() == 512.0


@both
def test_a_scaler_of_float16_takes_its_scale_out_of_a_sound_update(cfg):
    scaled, plain = make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two, so that no bit is lost
    optimizer = optim.make_optimizer(scaled, cfg)
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(1))
    scaler.scale(scaled(ids[:, :-1], ids[:, 1:])[1]).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    update(plain, optim.make_optimizer(plain, cfg), 1)
    assert_equal(weights(scaled), weights(plain))


# Muon


def newton_schulz(g):
    """What `orthogonalize` does to one matrix, by hand."""
    x = g / (np.linalg.norm(g) + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_five_steps_of_muon_equal_plain_numpy(architecture):
    model = make_model(architecture=architecture)
    optimizer = optim.make_optimizer(model, MUON)
    expected = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters() if is_matrix(n, p)}
    assert len(expected) == {"gpt2": 4, "qwen3": 7}[architecture]
    buffer = {name: 0.0 for name in expected}
    for t in range(1, 6):
        optim.set_lr(optimizer, 1e-2 / t, MUON)
        backward(model, t)
        for name, w in expected.items():
            g = model.get_parameter(name).grad.double().numpy()
            buffer[name] = 0.7 * buffer[name] + 0.3 * g
            ahead = 0.7 * buffer[name] + 0.3 * g
            parts = 3 if "c_attn" in name else 1  # queries, keys and values are matrices of their own
            step = np.concatenate([newton_schulz(part) for part in np.split(ahead, parts)])
            rows, columns = w.shape
            w *= 1 - 0.05 / t * 0.3
            w -= 0.05 / t * max(1, rows / parts / columns) ** 0.5 * step
        optimizer.step()
        model.zero_grad()
        for name, w in expected.items():
            found = model.get_parameter(name).detach().numpy()
            np.testing.assert_allclose(found, w, rtol=1e-3, atol=1e-4, err_msg=name)


def is_matrix(name, p):
    return p.dim() == 2 and name.startswith("transformer.h.")


def test_what_is_no_matrix_of_a_block_is_adamws():
    muon, adamw = make_model(), make_model()
    update(muon, optim.make_optimizer(muon, MUON), 1)
    update(adamw, optim.make_optimizer(adamw, CFG), 1)
    other = weights(adamw)
    same = {name for name, p in weights(muon).items() if torch.equal(p, other[name])}
    assert same == {name for name, p in muon.named_parameters() if not is_matrix(name, p)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 16, 16), (2, 64, 16), (4, 16, 64), (1, 100, 99)], ids=str)
def test_singular_values_end_in_the_promised_band(shape):
    draw = torch.Generator().manual_seed(1)
    matrices = torch.randn(*shape, generator=draw).reshape(-1, *shape[-2:])
    before = torch.linalg.svdvals(matrices)
    after = torch.linalg.svdvals(optim.orthogonalize(matrices))
    large = before.flip(-1) >= torch.linalg.matrix_norm(matrices)[:, None] / 600  # the smallest first
    assert large.float().mean() > 0.9
    assert 0.68 < after.flip(-1)[large].min() and after.max() < 1.21


def test_a_matrix_made_orthogonal_keeps_its_directions():
    draw = torch.Generator().manual_seed(2)
    matrix = torch.randn(1, 32, 8, generator=draw)
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    inner = u.T @ optim.orthogonalize(matrix)[0] @ vt.T
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-4)


def test_the_length_of_a_gradient_does_not_count_and_nothing_comes_of_nothing():
    matrix = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(optim.orthogonalize(matrix * 1e-3), optim.orthogonalize(matrix), rtol=0, atol=5e-3)
    assert torch.equal(optim.orthogonalize(torch.zeros(2, 8, 4)), torch.zeros(2, 8, 4))


def test_where_the_device_decides_a_skipped_update_changes_nothing():
    """On a GPU nobody asks whether to skip: the update is computed in any case."""
    model = make_model()
    optimizer = optim.make_optimizer(model, MUON)
    update(model, optimizer, 1)
    before, state = weights(model), copied_state(model, optimizer)
    for skip, bad in ((1.0, torch.nan), (1.0, torch.inf), (0.0, 1.0)):
        for p in model.parameters():
            p.grad = torch.full_like(p, bad)
        with torch.no_grad():
            for shape, matrices in optimizer.by_shape.items():
                optimizer.step_shape(shape, matrices, torch.tensor(skip))
        if skip:
            assert_equal(weights(model), before)
            assert_equal(copied_state(model, optimizer), state)
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if is_matrix(name, p)}


class Allocated(TorchDispatchMode):
    """Context that counts the bytes of new tensors; `most` is the largest number at a time."""

    def __init__(self, known):
        super().__init__()
        self.held = {t.untyped_storage()._cdata for t in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage and storage._cdata not in self.held:
                self.held.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def free(self, storage, size):
        self.held.discard(storage)
        self.now -= size


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
@pytest.mark.parametrize("casts", [False, True], ids=["float32", "bfloat16"])
def test_what_an_update_of_muon_allocates_is_known(architecture, casts, monkeypatch):
    monkeypatch.setattr(optim, "casts_to_bfloat16", lambda: casts)
    model = make_model(architecture=architecture)
    optimizer = optim.make_optimizer(model, MUON)
    backward(model, 1)
    known = [t for p in model.parameters() for t in (p, p.grad)]
    with Allocated([*known, *optim.state_tensors(model, optimizer).values()]) as allocated:
        optimizer.step()
    assert allocated.most == pytest.approx(optimizer.peak_bytes(), rel=0.01)
    largest = max(4 * len(matrices) * shape[0] * shape[1] for shape, matrices in optimizer.by_shape.items())
    assert optimizer.peak_bytes() <= 4 * largest


def share_work():
    """In each of three processes: they share the matrices, and each gets all results."""
    cfg = replace(MUON, device="cpu", dtype="float32", backend="auto")
    with distributed.setup(cfg) as dist:
        optimizer = optim.make_optimizer(make_model(), MUON, dist)
        for n in (1, 3, 4, 7):
            matrices = torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(1))
            expected = optim.orthogonalize(matrices)
            optimizer.orthogonalize_share(matrices)
            torch.testing.assert_close(matrices, expected)
    cli.leave(0)


def test_several_processes_share_the_matrices(start_ranks):
    doors = start_ranks(3, before=share_work)
    assert [door.end() for door in doors] == [0] * 3, doors[0].printed


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_two_processes_share_muons_work(run, tmp_path, architecture):
    """One block: of some shapes there is a single matrix, and the second process has none to work on."""
    args = ["--optimizer=muon", f"--architecture={architecture}", "--n_layer=1", "--eval_interval=100"]
    run(*args, "--out_dir=one")
    done = torchrun(2, *args, "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses("one") == pytest.approx(losses("two"), abs=1e-3)


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


def copied_state(model, optimizer):
    return {name: t.clone() for name, t in optim.state_tensors(model, optimizer).items()}


@both
def test_a_restored_state_continues_bit_for_bit(cfg):
    model = make_model()
    optimizer = optim.make_optimizer(model, cfg)
    for step in range(3):
        update(model, optimizer, step)
    saved_weights, saved_state = weights(model), copied_state(model, optimizer)
    for step in range(3, 6):
        update(model, optimizer, step)

    resumed = make_model(seed=2)
    resumed.load_weights(saved_weights)
    resumed_optimizer = optim.make_optimizer(resumed, cfg)
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


def test_muons_state_is_one_buffer_for_each_matrix():
    model = make_model()
    state = optim.state_tensors(model, optim.make_optimizer(model, MUON))
    matrices = {name for name, p in model.named_parameters() if is_matrix(name, p)}
    assert {name.partition(".")[2] for name in state if name.startswith("momentum_buffer.")} == matrices
    assert not matrices & {name.partition(".")[2] for name in state if name.startswith("exp_avg.")}


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
