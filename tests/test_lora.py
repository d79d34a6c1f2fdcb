"""LoRA: what is trained and what is kept, merged and unmerged models, and a base that is gone or another one."""

import copy
import shutil

import pytest
import torch
from exporting import ARCHITECTURES
from safetensors.torch import load_file
from support import ending, losses, torchrun
from torch.nn import functional as F

from nanogpt import lora
from nanogpt.commands import cli
from nanogpt.config import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import trained_parameters
from nanogpt.run import checkpoint, trained

every_kind = pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES)
HOW = dict(rank=3, alpha=6.0, layers="all", dtype=torch.float32)


def adapted(kind, **how):
    """(a model with random weights and matrices, the same one before it was adapted)."""
    torch.manual_seed(1)
    plain = GPT(GPTConfig(16, 50, n_layer=2, n_head=2, n_embd=16, **kind))
    for p in plain.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = copy.deepcopy(plain)
    lora.adapt(model, **HOW | how)
    return model, plain


def tokens():
    return torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(2))


@every_kind
def test_an_adapted_model_begins_as_the_model_and_trains_its_matrices_alone(kind):
    model, plain = adapted(kind)
    idx = tokens()
    expected, _ = plain(idx, idx)
    logits, loss = model(idx, idx)
    torch.testing.assert_close(logits, expected)
    loss.backward()
    names = trained_parameters(model)
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names.keys()
    assert sum(isinstance(m, lora.LoRALinear) for m in model.modules()) == sum(
        isinstance(m, torch.nn.Linear) for m in plain.modules()
    )


def test_a_layer_is_what_the_paper_says():
    linear = torch.nn.Linear(5, 7)
    layer = lora.LoRALinear(linear, rank=2, alpha=6.0)
    layer.lora_b.data.normal_()
    x = torch.randn(3, 5, requires_grad=True)
    expected = x @ (linear.weight + 6 / 2 * layer.lora_b @ layer.lora_a).T + linear.bias
    torch.testing.assert_close(layer(x), expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(F.linear(x, layer.merged(), linear.bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_merged_and_unmerged_models_are_the_same(kind, dtype):
    model, _ = adapted(kind, dtype=dtype)
    for p in trained_parameters(model).values():
        p.data.normal_(std=0.2)
    idx = tokens()
    expected, _ = model(idx, idx)
    lora.merge(model)
    assert all(type(m).__module__ != lora.__name__ for m in model.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tied
    torch.testing.assert_close(model(idx, idx)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_base_in_bfloat16_takes_half_the_memory_forward_and_backward():
    """What the backward pass keeps of a weight is the weight itself, not a copy in float32."""
    model, plain = adapted(dict(architecture="qwen3"), dtype=torch.bfloat16)
    matrices = [p for p in model.parameters() if not p.requires_grad and p.dim() == 2]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    shapes = {tuple(sorted(p.shape)) for p in matrices}
    idx, kept = torch.zeros((3, 13), dtype=torch.long), []  # 39 rows: no activation has the shape of a matrix
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(idx, idx)
    weights = [t for t in kept if tuple(sorted(t.shape)) in shapes and not t.is_leaf or t.dtype == torch.bfloat16]
    assert weights and {t.dtype for t in weights} == {torch.bfloat16}


def test_the_attention_alone_can_be_adapted():
    model, _ = adapted(dict(architecture="qwen3"), layers="attention")
    assert trained_parameters(model) and all(".attn." in name for name in trained_parameters(model))


# -- runs


LORA = ["--lora_rank=2", "--lora_alpha=8", "--learning_rate=0.02", "--eval_interval=2", "--device=cpu"]


@pytest.fixture
def based(run, undrawn):
    """`run`, in a folder in which the run `base` has ended."""
    run("--max_iters=2", "--out_dir=base", "--architecture=qwen3", "--n_kv_head=1")
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits_and_checkpoints_hold_the_matrices_alone(based, dtype):
    how = ["--init_from=base", *LORA, f"--lora_base={dtype}", "--dropout=0.1", "--checkpoint_activations=True"]
    said = based(*how, "--max_iters=6", "--out_dir=whole")
    assert "are trained" in said and f"beside a model in {dtype}" in said
    based(*how, "--max_iters=4", "--out_dir=parts")
    based(*how, "--init_from=resume", "--out_dir=parts", "--max_iters=6")
    assert ending("whole") == ending("parts")
    found = checkpoint.newest("whole")
    held = load_file(found.folder / "model.safetensors")
    assert {name.rpartition(".")[2] for name in held} == {"lora_a", "lora_b"}
    assert all(tensor.any() for tensor in held.values())
    merged, unmerged = trained.load_model(found), trained.load_model(found, merged=False)
    idx = torch.randint(20, (2, 16))
    torch.testing.assert_close(merged(idx, idx)[0], unmerged(idx, idx)[0], rtol=1e-4, atol=1e-4)


def test_a_run_with_lora_is_sampled_evaluated_exported_and_trained_on(based, capsys):
    pytest.importorskip("transformers")
    based("--init_from=base", *LORA, "--max_iters=4")
    assert cli.main(["sample", "--num_samples=1", "--max_new_tokens=8", "--device=cpu"]) == 0
    assert cli.main(["eval", "--device=cpu"]) == 0
    assert cli.main(["export", "--to=folder"]) == 0
    printed = capsys.readouterr().out
    assert "tiny, val split: loss" in printed and "logit difference to transformers" in printed
    assert "lora" not in " ".join(load_file("folder/model.safetensors"))
    based("--init_from=out", "--out_dir=all", "--max_iters=1")  # all of the merged model
    based("--init_from=out", "--out_dir=again", "--max_iters=1", *LORA)  # matrices beside it
    assert checkpoint.newest("again").base["from"].rpartition("-")[0].endswith("out/checkpoints/step")
    assert (
        trained.load_model(checkpoint.newest("again")).num_params()
        == trained.load_model(checkpoint.newest("all")).num_params()
    )


def test_two_processes_adapt_as_one(based, tmp_path):
    how = ["--init_from=base", *LORA, "--lora_base=bfloat16", "--checkpoint_activations=True", "--max_iters=3"]
    based(*how, "--out_dir=one")
    done = torchrun(2, *how, "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses("two") == pytest.approx(losses("one"), abs=1e-4)


def test_a_base_that_is_gone_or_another_one_is_a_line(based):
    based("--init_from=base", *LORA, "--max_iters=2")
    folder = checkpoint.newest("base").folder
    shutil.move(folder, "elsewhere")
    with pytest.raises(
        UserError, match=f"its LoRA matrices need the model that they were trained with: .*{folder.name}"
    ):
        based("--init_from=resume", "--max_iters=3")
    based("--max_iters=2", "--out_dir=base", "--architecture=qwen3", "--n_kv_head=1", "--seed=5")
    with pytest.raises(UserError, match=f"trained with, and .*{folder.name} is another one now"):
        based("--init_from=resume", "--max_iters=3")


def test_what_cannot_be_adapted_is_a_line(based):
    with pytest.raises(UserError, match="needs a model to adapt: --init_from names one"):
        based(*LORA)
    with pytest.raises(UserError, match="needs a model to adapt"):
        based(*LORA, "--init_from=auto", "--out_dir=new")
    with pytest.raises(UserError, match="takes --optimizer=adamw"):
        based(*LORA, "--init_from=base", "--optimizer=muon")
    based("--init_from=base", *LORA, "--max_iters=2")
    with pytest.raises(UserError, match="has lora_rank = 2"):
        based("--init_from=resume", "--lora_rank=4")
    with pytest.raises(UserError, match="has lora_rank = 0"):
        based("--init_from=resume", "--out_dir=base", "--lora_rank=4")


@pytest.mark.parametrize("base", [{}, {"from": 5}, {"rank": "2"}, {"dtype": "int8"}, {"sha256": 5}, {"rank": 9}])
def test_a_forged_base_is_refused_in_one_line(based, base):
    based("--init_from=base", *LORA, "--max_iters=2")
    found = checkpoint.newest("out")
    found.base = found.base | base if base else {"from": found.base["from"]}
    with pytest.raises(UserError) as caught:
        trained.load_model(found)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
