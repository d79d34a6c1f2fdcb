"""Models as published: the same logits, gradients and texts as transformers, and the same folder when exported again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nanogpt.formats.hugging_face import to_hugging_face
from nanogpt.formats.pretrained import from_pretrained
from nanogpt.text.tokenizer import ByteTokenizer

transformers = pytest.importorskip("transformers")

BYTES = ByteTokenizer()  # 257 tokens
MODERN = dict(vocab_size=400, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32)
QWEN3 = MODERN | dict(
    intermediate_size=100, num_key_value_heads=2, head_dim=20, rope_parameters=dict(rope_type="default", rope_theta=1e6)
)
SMALL = dict(rope_type="default", rope_theta=1e5)
KINDS = {
    "Qwen3, tied": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3, tie_word_embeddings=True)),
    "Qwen3, untied": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3, tie_word_embeddings=False)),
    "SmolLM2": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**MODERN, intermediate_size=128, num_key_value_heads=1, rms_norm_eps=1e-5, rope_parameters=SMALL, tie_word_embeddings=True)
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODERN, intermediate_size=132, tie_word_embeddings=False)),
    "GPT-2 with a wide MLP": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_inner=100, n_positions=32, vocab_size=400, tie_word_embeddings=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS, ids=KINDS)
def published(request, tmp_path):
    """(a model of transformers whose every parameter is random, its folder)."""
    torch.manual_seed(3)
    theirs = KINDS[request.param]().eval()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "published")
    return theirs, tmp_path / "published"


def test_logits_and_gradients_are_those_of_transformers(published):
    theirs, folder = published
    model = from_pretrained(folder)
    idx, targets = torch.randint(400, (2, 2, 32), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx).logits
    logits, loss = model(idx, targets)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    head = "lm_head.weight"
    if theirs.config.model_type == "gpt2":
        pairs = [(model.transformer.h[0].mlp.c_fc.weight.grad.t(), "transformer.h.0.mlp.c_fc.weight")]
    else:
        first = model.transformer.h[0]
        pairs = [
            (first.attn.k_proj.weight.grad, "model.layers.0.self_attn.k_proj.weight"),
            (first.mlp.gate_proj.weight.grad, "model.layers.0.mlp.gate_proj.weight"),
            (first.ln_1.weight.grad, "model.layers.0.input_layernorm.weight"),
            (model.transformer.ln_f.weight.grad, "model.norm.weight"),
        ]
        if theirs.config.model_type == "qwen3":
            pairs.append((first.attn.q_norm.weight.grad, "model.layers.0.self_attn.q_norm.weight"))
    for ours, name in [*pairs, (model.lm_head.weight.grad, head)]:
        torch.testing.assert_close(ours, theirs.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_cache_writes_the_text_of_transformers(published):
    theirs, folder = published
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    found = from_pretrained(folder).generate(idx, 29, temperature=0)
    assert torch.equal(found, theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=29, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_that_comes_out_equals_the_one_that_went_in(published, tmp_path, dtype):
    theirs, folder = published
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    to_hugging_face(from_pretrained(folder), BYTES, tmp_path / "again", dtype)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "again"))
    before = {
        name.removeprefix("transformer."): tensor for name, tensor in before.items()
    }  # GPT-2 is written as by OpenAI
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name
    before, after = (
        transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("published", "again")
    )
    chosen_here = {"n_ctx", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path"}
    assert {k: v for k, v in before.items() if k not in chosen_here} == {
        k: v for k, v in after.items() if k not in chosen_here
    }


def test_a_model_with_gains_of_1_has_none(tmp_path):
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3)).save_pretrained(tmp_path / "new")
    assert not from_pretrained(tmp_path / "new").config.norm_gain


def test_what_an_old_config_json_lacks_has_the_default_of_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODERN, intermediate_size=64))
    theirs.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    content = json.loads(path.read_text())
    for name in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "mlp_bias",
        "attention_bias",
    ):
        content.pop(name)
    path.write_text(json.dumps(content))
    idx = torch.randint(400, (1, 32))
    torch.testing.assert_close(from_pretrained(tmp_path / "old")(idx, idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)
