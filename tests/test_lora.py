"""LoRA: what is trained and what is kept, merged and unmerged models, and a base that is gone or another one."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from exporting import ARCHITECTURES
from safetensors.torch import load_file, save_file
from support import ending, losses, torchrun, write_tokenizer
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
    based("--init_from=out", "--out_dir=all", "--max_iters=1")  # all weights of the merged model
    with pytest.raises(UserError, match="is a run with LoRA itself; nanogpt export"):
        based("--init_from=out", "--out_dir=again", "--max_iters=1", *LORA)


def test_two_processes_adapt_as_one(based, tmp_path):
    how = ["--init_from=base", *LORA, "--lora_base=bfloat16", "--checkpoint_activations=True", "--max_iters=3"]
    based(*how, "--out_dir=one")
    done = torchrun(2, *how, "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses("two") == pytest.approx(losses("one"), abs=1e-4)


def test_the_run_that_is_adapted_may_go_on_or_be_moved_aside(based):
    """Its checkpoint is kept in the folder of the run with LoRA, without taking room where the disk has links."""
    based("--init_from=base", *LORA, "--max_iters=2")
    kept, original = Path("out/base/model.safetensors"), checkpoint.newest("base").folder / "model.safetensors"
    assert kept.samefile(original)
    shutil.rmtree("base")
    based("--init_from=resume", "--max_iters=3")
    shutil.move("out", "elsewhere")
    based("--init_from=resume", "--max_iters=4", "--out_dir=elsewhere")


def test_a_run_with_lora_may_take_the_folder_of_the_run_that_it_adapts(based):
    based("--init_from=base", *LORA, "--max_iters=2", "--out_dir=base")
    (aside,) = Path("base").glob("earlier-*")
    assert checkpoint.newest(aside).base == {} and checkpoint.newest("base").base["from"] == trained.KEPT
    based("--init_from=resume", "--max_iters=3", "--out_dir=base")
    based("--max_iters=1", "--out_dir=base")  # moves the run with LoRA aside, and its base with it
    *_, second = sorted(Path("base").glob("earlier-*"))
    assert trained.load_model(checkpoint.newest(second)) and not Path("base/base").exists()


def test_a_published_base_that_is_gone_or_another_one_is_a_line(based):
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    V = checkpoint.newest("base").model_config["vocab_size"]
    config = transformers.Qwen3Config(vocab_size=V, **shape, intermediate_size=32, max_position_embeddings=16)
    transformers.Qwen3ForCausalLM(config).save_pretrained("published")
    write_tokenizer("published", checkpoint.newest("base").tokenizer)
    based("--init_from=published", *LORA, "--max_iters=2")
    found = checkpoint.newest("out")
    assert trained.load_model(found)
    content = json.loads(Path("published/config.json").read_text())
    Path("published/config.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match="trained with, and .*published is another one now"):
        trained.load_model(found)
    Path("published/config.json").write_text(json.dumps(content))
    tensors = load_file("published/model.safetensors")
    save_file({name: t * 1.01 for name, t in tensors.items()}, "published/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="trained with, and .*published is another one now"):
        trained.load_model(found)
    shutil.move("published", "elsewhere")
    with pytest.raises(UserError, match="need the model that they were trained with: .*published is gone"):
        trained.load_model(found)


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


FORGED = [
    {"from": 5},
    {"from": "x" * 5000},
    {"from": "a\0b"},
    {"sha256": "0"},
    {"lora_rank": "2"},
    {"lora_rank": 4.0},
    {"lora_rank": 9},
    {"lora_rank": 4_000_000},
    {"lora_alpha": float("nan")},
    {"lora_layers": "none"},
    {"lora_base": "int8"},
]


@pytest.mark.parametrize("forged", FORGED, ids=str)
def test_a_forged_base_is_refused_in_one_line(based, forged):
    based("--init_from=base", *LORA, "--max_iters=2")
    found = checkpoint.newest("out")
    found.base |= forged
    with pytest.raises(UserError) as caught:
        trained.load_model(found)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


@pytest.mark.parametrize("forged", [{"block_size": 0}, {"vocab_size": 7}, {"n_head": 0}, {"n_layer": 10**9}], ids=str)
def test_a_forged_shape_is_refused_in_one_line(based, forged):
    based("--init_from=base", *LORA, "--max_iters=2")
    found = checkpoint.newest("out")
    found.model_config |= forged
    with pytest.raises(UserError) as caught:
        trained.load_model(found)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]


def test_settings_without_effect_are_refused(based, capsys):
    with pytest.raises(UserError, match="needs --lora_rank"):
        based("--init_from=base", "--lora_base=bfloat16")
    assert cli.main(["bench", "--lora_rank=2", "--init_from=base", "--device=cpu"]) == 2
    assert "--lora_rank=2 has no effect" in capsys.readouterr().err.replace("--lora_rank=2:", "--lora_rank=2")
