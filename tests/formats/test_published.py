"""Models as published: the same logits, gradients and texts as transformers, and the same folder when exported again."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from nanogpt.commands import cli, eval
from nanogpt.config import EvalConfig
from nanogpt.formats.hugging_face import to_hugging_face
from nanogpt.formats.pretrained import from_pretrained
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint, memory
from nanogpt.run.distributed import Dist
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


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A folder with a published model, a dataset with its tokenizer, and a run that began with the model."""
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path_factory.mktemp("published")
    text = "".join(f"ROMEO: O Romeo, line {i}, wherefore art thou {chr(65 + i % 26)}?\n" for i in range(400))
    (place / "text.txt").write_text(text)
    pre = tokenizers.pre_tokenizers
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(r"\p{N}| ?\p{L}+|\s+"), "isolated"), pre.ByteLevel(False, use_regex=False)]
    )
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"])
    tok.train_from_iterator([text], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>")
    fast.save_pretrained(place / "base")
    torch.manual_seed(0)
    theirs = KINDS["Qwen3, untied"]()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    theirs.to(torch.bfloat16).save_pretrained(place / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["prepare", "text.txt", "--dataset=said", "--tokenizer=base", "--trial=False"]) == 0
        assert cli.main(["train", "--init_from=base", "--dataset=said", "--out_dir=run", *RUN]) == 0
    return place


RUN = "--max_iters=3 --eval_interval=2 --eval_iters=1 --batch_size=2 --block_size=24 --warmup_iters=1".split()
RUN += "--gradient_accumulation_steps=1 --device=cpu --compile=False --learning_rate=1e-3".split()


def test_a_published_model_is_finetuned_resumed_sampled_evaluated_and_exported(finetuned, monkeypatch, capsys):
    monkeypatch.chdir(finetuned)
    assert cli.main(["train", "--init_from=resume", "--out_dir=run", "--max_iters=5"]) == 0
    config = checkpoint.newest("run").model_config
    assert (config["n_kv_head"], config["head_dim"], config["n_hidden"]) == (2, 20, 100)
    assert (config["rope_theta"], config["norm_gain"], config["tied"]) == (1e6, True, False)
    capsys.readouterr()
    assert cli.main(["sample", "--out_dir=run", "--device=cpu", "--num_samples=2", "--max_new_tokens=40"]) == 0
    assert cli.main(["eval", "--out_dir=run", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("---------------") == 2 and "said, val split: loss" in said
    assert cli.main(["export", "--out_dir=run", "--to=again"]) == 0
    assert "largest logit difference to transformers" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained("again")
    assert theirs.config.vocab_size == 400  # with the rows that no token has, as in the model that was published
    again, base = (transformers.AutoTokenizer.from_pretrained(name) for name in ("again", "base"))
    assert again("wherefore art 42?").input_ids == base("wherefore art 42?").input_ids


def test_its_tokenizer_is_no_gguf_and_the_line_says_what_reads_it(finetuned, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.chdir(finetuned)
    assert cli.main(["export", "--init_from=base", "--to=model.gguf"]) == 2
    assert "convert_hf_to_gguf.py" in capsys.readouterr().err and not (finetuned / "model.gguf").exists()


def test_the_name_of_a_model_of_the_hub_is_recognised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in ("sample", "train"):
        assert cli.main([command, "--init_from=Qwen/Qwen3-0.6B", "--device=cpu"]) == 2
        assert "hf:Qwen/Qwen3-0.6B is the model of this name" in capsys.readouterr().err


def test_a_model_of_the_hub_is_taken_from_its_cache(finetuned, tmp_path, monkeypatch, capsys):
    """In the layout that huggingface_hub documents; with the tokenizer alone, `prepare` takes it, too."""
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--someone--small" / "snapshots" / ("a" * 40)
    shutil.copytree(finetuned / "base", snapshot)
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(finetuned)
    assert (
        cli.main(["sample", "--init_from=hf:someone/small", "--num_samples=1", "--max_new_tokens=4", "--device=cpu"])
        == 0
    )
    assert cli.main(["prepare", "text.txt", "--dataset=hub", "--tokenizer=hf:someone/small", "--trial=False"]) == 0
    assert cli.main(["sample", "--init_from=hf:someone/other", "--device=cpu"]) == 2
    assert "hf:someone/other: cannot be downloaded" in capsys.readouterr().err


def test_a_context_whose_cache_does_not_fit_is_shortened(monkeypatch, capsys):
    dist = Dist(torch.device("cpu"), torch.float32, out=sys.stdout)
    model = GPT(GPTConfig(4096, 31, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, architecture="qwen3"))
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * 10 * 1024 * (2 * 2 * 2 * 8 * 4))
    memory.crop_to_fit(model, 10, "--max_batch", dist)
    assert model.config.block_size == 1024
    assert "context: 1024 of the model's 4096 tokens, for 10 texts in memory (--max_batch)" in capsys.readouterr().out


def test_a_context_whose_logits_do_not_fit_is_shortened(capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 2**40)
    dist = Dist(torch.device("cpu"), torch.float32, out=sys.stdout)
    cfg = EvalConfig()
    eval.choose_context(cfg, GPTConfig(40960, 151936, architecture="qwen3"), dist)
    assert (cfg.block_size, cfg.stride, cfg.batch_size) == (1280, 1280, 5)
    said = capsys.readouterr().out
    assert "context: 1280 of the model's 40960 tokens" in said and "windows: 5 at a time, not 12" in said
    cfg = EvalConfig(block_size=4096)
    eval.choose_context(cfg, GPTConfig(40960, 151936, architecture="qwen3"), dist)
    assert (cfg.block_size, cfg.batch_size) == (4096, 1)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**30)
    cfg = EvalConfig()
    eval.choose_context(cfg, GPTConfig(1024, 50304), dist)
    assert (cfg.block_size, cfg.batch_size) == (1024, 2)
