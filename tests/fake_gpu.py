"""The program that tests/test_gpu.py runs: training, evaluation and generation on a GPU that computes nothing.

    python tests/fake_gpu.py LIBRARY

LIBRARY is tests/fake_gpu.cpp, compiled. Tensors are PyTorch's fake ones: they have a shape, a number format and a device,
and an operation on tensors of two devices raises, as on a GPU. What the host reads from them is 1. On a machine with a GPU,
leave LIBRARY out, and the same runs there. Prints {case: what went wrong, or ""} as JSON.
"""

import contextlib
import ctypes
import itertools
import json
import sys
import traceback
from functools import partial

if sys.argv[1:]:
    ctypes.CDLL(sys.argv[1])  # before PyTorch, which looks for its devices only once

# isort: split
import numpy as np
import torch
from torch._subclasses import FakeTensor, FakeTensorMode, fake_impls

from nanogpt import evaluate, generate, lora, optim, quantize
from nanogpt.config import SampleConfig, TrainConfig
from nanogpt.data import Batches, Dataset
from nanogpt.model import GPT, GPTConfig
from nanogpt.run.distributed import Dist
from nanogpt.run.health import Health
from nanogpt.run.run import Run, TrainState
from nanogpt.step import train_step

V, T = 32, 8
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=T)
DEVICE = torch.device("cuda", 0)


def read(mode, func, tensor, *_):
    """What the host reads of a fake tensor, which has no numbers."""
    return {torch.bool: True, torch.int64: 1}.get(tensor.dtype, 1.0)


def bincount(mode, func, ids, weights=None, minlength=0):
    """The shape of `bincount` for ids below minlength, which depends on them."""
    return ids.new_empty(minlength)


@contextlib.contextmanager
def fake_gpu():
    """Context in which new tensors are fake, and `cuda` is a device."""
    with FakeTensorMode() as mode:
        mode.may_turn_const = lambda tensor: False  # `torch.tensor(..., device="cuda")` would compute with real ones
        torch.utils.swap_tensors = partial(swap, mode.fake_tensor_converter.meta_converter.tensor_memo)
        torch.Tensor.pin_memory = lambda tensor: mode.from_tensor(tensor)  # what comes from NumPy is real
        torch.Tensor.numpy = to_numpy
        torch.cuda.amp.common.amp_definitely_not_available = lambda: False
        torch.cuda.is_bf16_supported = lambda *_: True
        fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = read
        fake_impls.op_implementations_dict[torch.ops.aten.bincount.default] = bincount
        yield


def swap(memo, a, b, real=torch.utils.swap_tensors):
    """`swap_tensors`, by which `Module.to` moves fake parameters; it refuses those that the fake mode remembers."""
    memo.clear()
    real(a, b)


def to_numpy(tensor, real=torch.Tensor.numpy):
    """`Tensor.numpy`, which fake tensors lack."""
    if not isinstance(tensor, FakeTensor):
        return real(tensor)
    assert tensor.device.type == "cpu", f"a tensor on {tensor.device} cannot be converted to NumPy"
    return np.ones(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch."))


def make_run(dtype, lora_rank=0, **settings):
    """A Run on the GPU, as `start` makes it."""
    cfg = TrainConfig(**SIZES, batch_size=4, gradient_accumulation_steps=2, eval_iters=2, seed=1, **settings)
    dist = Dist(DEVICE, dtype)
    model = make_model(cfg.architecture, cfg.dropout)
    if lora_rank:
        lora.adapt(model, lora_rank, 16.0, "all", torch.bfloat16)
    model.to(DEVICE).checkpoint_activations = cfg.checkpoint_activations
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    tokens = Dataset(np.random.default_rng(1).integers(V, size=1000), V, None, "random tokens")
    few = Dataset(tokens.tokens[:40], V, None, "few tokens")
    splits = {"train": Batches(tokens, "eval train", 1, T, dist), "val": Batches(few, "eval val", 1, T, dist)}
    batches = Batches(tokens, "train", 1, T, dist, per_step=8)
    optimizer = optim.make_optimizer(model, cfg, dist)
    return Run(cfg, dist, model, optimizer, scaler, Health(cfg, DEVICE), TrainState(), batches, splits)


def make_model(architecture, dropout=0.0):
    more = {} if architecture == "gpt2" else dict(n_kv_head=1, norm_gain=True)
    return GPT(GPTConfig(**SIZES, vocab_size=V, architecture=architecture, dropout=dropout, **more))


def trains(dtype=torch.bfloat16, **settings):
    """Two steps, then both kinds of evaluation: the first split is sampled, the second is read as a whole."""
    run = make_run(dtype, **settings)
    for _ in range(2):
        metrics = train_step(run)
        optim.set_lr(run.optimizer, 1e-3, run.cfg)
    assert all(value.device == DEVICE for value in metrics.values()), metrics
    on_gpu(run.gpt.state_dict() | optim.state_tensors(run.gpt, run.optimizer) | run.health.state)
    losses = evaluate.losses(run, micro_batch=2)
    assert losses.keys() == {"train", "val"}
    evaluate.exact(run.model, run.eval_batches["val"].dataset, run.cfg, run.dist, np.ones(V, int), each=True)


def resumes(optimizer):
    """The state of a checkpoint, which is read on the CPU."""
    run = make_run(torch.bfloat16, optimizer=optimizer)
    state = {name: tensor.cpu() for name, tensor in optim.state_tensors(run.gpt, run.optimizer).items()}
    run.gpt.load_weights({name: p.detach().cpu() for name, p in run.gpt.named_parameters()})
    optim.load_state_tensors(run.gpt, run.optimizer, state)
    train_step(run)
    on_gpu(run.gpt.state_dict() | optim.state_tensors(run.gpt, run.optimizer))


def generates(architecture, dtype, options):
    """Two texts that become longer than the context, with all that a request may ask for."""
    cfg = SampleConfig(int8=False)
    model = quantize.made_ready(make_model(architecture), cfg, Dist(DEVICE, dtype))
    engine = generate.Engine(model, 3, V - 1, chunk=3)
    engine.add([1, 2, 3, 4, 5], generate.Options(2 * T, **options), n=2)
    engine.step()
    (first, *_) = engine.add([1], generate.Options(2 * T, temperature=0))
    tokens = engine.step() + engine.step()
    engine.park(first)
    engine.step()
    engine.resume(first)
    while engine.rows:
        tokens += engine.step()
    assert len(tokens) > 4 * T
    idx = torch.zeros((2, 3), dtype=torch.int64, device=DEVICE)
    assert model.generate(idx, 4, seed=1, top_k=5).device == DEVICE


def merges():
    """LoRA's matrices are added to the weights where these are."""
    model = make_model("qwen3")
    lora.adapt(model, 2, 16.0, "attention", torch.bfloat16)
    lora.merge(model.to(DEVICE))
    on_gpu(model.state_dict())


def on_gpu(tensors):
    elsewhere = [name for name, tensor in tensors.items() if tensor.device != DEVICE]
    assert not elsewhere, f"not on the GPU: {elsewhere}"


class Stray(torch.nn.Module):
    """A module with the fault that all this is to find."""

    def forward(self, x):
        return x + torch.ones(x.shape[-1])


def strays():
    """A tensor on the CPU in the middle of the model: must fail."""
    run = make_run(torch.bfloat16)
    run.gpt.transformer["drop"] = Stray()
    train_step(run)


ASKED = dict(logprobs=2, prompt_logprobs=True, repetition_penalty=1.1, frequency_penalty=0.1, logit_bias=((3, 1.0),))
CASES = {
    "lora": lambda: trains(lora_rank=2, optimizer="muon", dropout=0.1),
    "lora, checkpoint_activations": lambda: trains(lora_rank=2, checkpoint_activations=True, architecture="llama"),
    "lora, merged": merges,
    "a stray tensor": strays,
}
for name, optimizer in itertools.product(("gpt2", "qwen3"), ("adamw", "muon")):
    how = dict(architecture=name, optimizer=optimizer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        CASES[f"{name}, {optimizer}, {dtype}"] = lambda how=how, dtype=dtype: trains(dtype, dropout=0.1, **how)
    CASES[f"{name}, {optimizer}, checkpoint_activations"] = lambda how=how: trains(checkpoint_activations=True, **how)
for optimizer in ("adamw", "muon"):
    CASES[f"resumed, {optimizer}"] = lambda optimizer=optimizer: resumes(optimizer)
for name, dtype in itertools.product(("gpt2", "qwen3"), (torch.float32, torch.bfloat16)):
    for asked, options in dict(plain={}, asked=ASKED, limits=dict(top_k=3, top_p=0.9, min_p=0.1)).items():
        CASES[f"generate, {name}, {dtype}, {asked}"] = lambda a=(name, dtype, options): generates(*a)


def main():
    """Run all cases, and print what went wrong in each."""
    wrong = {}
    with fake_gpu() if sys.argv[1:] else contextlib.nullcontext():
        for name, case in CASES.items():
            try:
                case()
                wrong[name] = ""
            except Exception:
                wrong[name] = traceback.format_exc()
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
