"""Hugging Face's format, read and written: the same logits as theirs, and a clear line for all else."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from exporting import TOKENIZERS, make, sample_text
from safetensors.torch import load_file, save_file

from nanogpt.config import RunFailed, UserError
from nanogpt.formats import hugging_face
from nanogpt.formats.hugging_face import is_hugging_face, to_hugging_face
from nanogpt.formats.pretrained import from_pretrained, read_tokenizer
from nanogpt.model import GPT, GPTConfig
from nanogpt.text.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, from_json

transformers = pytest.importorskip("transformers")

SHAPE = dict(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=97, bos_token_id=0, eos_token_id=0)


def reference_model(seed=1, scale=1.0, **changes):
    """Hugging Face's model with random weights, biases and norms included."""
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE | changes)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
        p.data.mul_(scale if p.dim() == 2 else 1.0)
    return model


def save(model, folder, how="one file"):
    if how == "one file":
        model.save_pretrained(folder)
    if how == "shards":
        model.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    if how == "pickle":
        folder.mkdir()
        (folder / "config.json").write_text(model.config.to_json_string())
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def saved(tmp_path):
    """A folder that save_pretrained wrote."""
    return save(reference_model(), tmp_path / "hf")


def problem(folder):
    with pytest.raises(UserError) as caught:
        from_pretrained(folder)
    (only,) = caught.value.problems
    assert str(folder) in only and "\n" not in only
    return only


@torch.no_grad()
def assert_same_logits(reference, folder):
    model = from_pretrained(folder).eval()
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = reference(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids, ids)[0], expected, rtol=1e-4, atol=1e-4)
    return expected


# Parity


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("how", ["one file", "shards", "pickle"])
def test_the_logits_equal_those_of_transformers(tmp_path, how, activation):
    reference = reference_model(activation_function=activation)
    assert_same_logits(reference, save(reference, tmp_path / "hf", how))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_the_logits_are_equal_at_a_realistic_scale(tmp_path, activation):
    reference = reference_model(activation_function=activation, scale=10.0)
    logits = assert_same_logits(reference, save(reference, tmp_path / "hf"))
    assert logits.abs().max() > 10


def test_the_two_activations_are_told_apart(tmp_path):
    reference = reference_model(scale=10.0)
    folder = save(reference, tmp_path / "hf")
    change_config(folder, activation_function="gelu")
    with pytest.raises(AssertionError):
        assert_same_logits(reference, folder)


def test_names_with_and_without_a_prefix_are_known(saved):
    """OpenAI's own files on the hub name a tensor `h.0...`, and carry the causal mask."""
    weights = load_file(saved / "model.safetensors")
    short = {name.removeprefix("transformer."): w for name, w in weights.items()}
    assert short.keys() != weights.keys()
    for layer in range(3):
        short[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24)
        short[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(short, saved / "model.safetensors")
    assert_same_logits(reference_model(), saved)


def test_half_precision_weights_become_float32(saved):
    weights = load_file(saved / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, saved / "model.safetensors")
    model = from_pretrained(saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.wpe.weight, weights["transformer.wpe.weight"].half().float())


def test_the_shape_comes_from_the_folder_and_dropout_from_the_caller(saved):
    config = from_pretrained(saved, dropout=0.3).config
    assert (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd) == (24, 97, 3, 4, 32)
    assert (config.dropout, config.bias, config.activation) == (0.3, True, "gelu_new")


# What is refused


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_inner", "wide"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("layer_norm_epsilon", 1e-6),
        ("activation_function", "relu"),
        ("tie_word_embeddings", "perhaps"),
    ],
)
def test_a_gpt2_that_this_model_cannot_follow_is_refused_by_name(saved, key, value):
    change_config(saved, **{key: value})
    said = problem(saved)
    assert said.startswith(f"{saved / 'config.json'}: ") and str(value) in said
    assert key.removesuffix("_function") in said


def test_the_usual_inner_width_may_be_written_out(saved):
    change_config(saved, n_inner=4 * 32)
    from_pretrained(saved)


def test_another_architecture_is_refused_by_name(saved):
    change_config(saved, model_type="qwen2")
    assert "describes a 'qwen2' model; only gpt2, qwen3, llama are known here" in problem(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"n_head": 5},
        {"n_embd": "32"},
        *(
            change
            for change in ({"n_head": 0}, {"n_layer": "3"}, {"n_layer": 3.0}, {"vocab_size": -1}, {"n_positions": None})
        ),
    ],
)
def test_an_impossible_shape_is_refused(saved, change):
    change_config(saved, **change)
    problem(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", '{"model_type": "gpt2"}', "[" * 100_000, "\0"])
def test_a_broken_config_json_is_refused(saved, content):
    (saved / "config.json").write_text(content)
    assert "describes no such model" in problem(saved) or content == '{"model_type": "gpt2"}'


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert f"no {name}" in problem(saved) or f"neither {name}" in problem(saved)


def test_a_missing_folder_is_named(tmp_path):
    assert "has no config.json" in problem(tmp_path / "nowhere")


def test_a_missing_shard_is_found_by_the_weights_it_lacks(tmp_path):
    folder = save(reference_model(), tmp_path / "hf", "shards")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    assert "transformer." in problem(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert problem(saved).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_pickle_is_refused(tmp_path, keep):
    path = save(reference_model(), tmp_path / "hf", "pickle") / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    assert problem(path.parent).startswith(f"{path}: ")


@pytest.mark.parametrize("change", [{"n_embd": 64}, {"vocab_size": 98}, {"n_positions": 25}, {"n_layer": 2}])
def test_weights_of_another_shape_are_refused_by_name(saved, change):
    change_config(saved, **change)
    assert "transformer." in problem(saved)


class Malicious:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, form):
    folder, marker = save(reference_model(), tmp_path / "hf", "pickle"), tmp_path / "marker"
    path, evil = folder / "pytorch_model.bin", {"transformer.wte.weight": Malicious(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FileExistsError):  # it would work
        marker.mkdir()
        pickle.loads(pickle.dumps(evil))
    marker.rmdir()
    assert problem(folder).startswith(f"{path}: ")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(2),
        {1: torch.zeros(2)},
        ([(1, 2)]),
    ],
    ids=["list", "tensor", "numbered", "pairs"],
)
def test_a_file_that_holds_no_named_tensors_is_refused(tmp_path, content):
    folder = save(reference_model(), tmp_path / "hf", "pickle")
    torch.save(content, folder / "pytorch_model.bin")
    problem(folder)


def test_a_name_that_stands_for_no_tensor_is_refused(tmp_path):
    folder = save(reference_model(), tmp_path / "hf", "pickle")
    torch.save(reference_model().state_dict() | {"transformer.ln_f.weight": 5}, folder / "pytorch_model.bin")
    problem(folder)


# Written for transformers


CHARS = CharTokenizer.train("\n !ABCabcé🎭")


def our_model(architecture="gpt2", bias=False, activation="gelu", vocab_size=CHARS.vocab_size + 3):
    """A model whose every parameter is random, with a vocabulary that is padded."""
    torch.manual_seed(4)
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=24)
    config = GPTConfig(**shape, vocab_size=vocab_size, architecture=architecture, bias=bias, activation=activation)
    model = GPT(config).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


OURS = [
    dict(architecture="gpt2"),
    dict(architecture="gpt2", bias=True),
    dict(architecture="gpt2", activation="gelu_new"),
    dict(architecture="qwen3"),
    dict(architecture="llama"),
]


@pytest.fixture(params=OURS, ids=lambda kind: "-".join(map(str, kind.values())))
def exported(request, tmp_path):
    """(a model, the folder that it was written to)."""
    model = our_model(**request.param)
    to_hugging_face(model, CHARS, tmp_path / "to")
    return model, tmp_path / "to"


def load_theirs(folder):
    """The model that transformers makes of a folder, which must lack nothing and have nothing too much."""
    transformers.utils.logging.disable_progress_bar()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


@torch.no_grad()
def test_transformers_computes_the_same_logits(exported):
    model, folder = exported
    theirs = load_theirs(folder)
    ids = torch.randint(0, CHARS.vocab_size, (3, 24), generator=torch.Generator().manual_seed(2))
    expected = model(ids, ids)[0][..., : CHARS.vocab_size]
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert theirs.config.vocab_size == CHARS.vocab_size


@torch.no_grad()
def test_transformers_writes_the_same_greedy_text(exported):
    model, folder = exported
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    theirs = load_theirs(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=21, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ours = model.generate(ids, 21, temperature=0, vocab_size=CHARS.vocab_size)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_transformers_writes_the_same_text_past_the_end_of_a_qwen3s_context(tmp_path):
    model = our_model("qwen3")
    to_hugging_face(model, CHARS, tmp_path / "to")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    theirs = load_theirs(tmp_path / "to").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=171, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ours = model.generate(ids, 24 - 3 + 150, temperature=0, vocab_size=CHARS.vocab_size)
    assert torch.equal(ours, theirs) and len(set(ours[0].tolist())) > 3


def test_a_qwen3_whose_window_is_shorter_than_its_context_is_refused(tmp_path):
    to_hugging_face(our_model("qwen3"), CHARS, tmp_path / "to")
    change_config(tmp_path / "to", sliding_window=23)
    assert "sliding_window = 23 is not supported" in problem(tmp_path / "to")
    change_config(tmp_path / "to", use_sliding_window=False)
    from_pretrained(tmp_path / "to")


def test_a_gpt2_is_written_with_openais_names_and_read_with_and_without_a_prefix(tmp_path):
    model, folder = our_model(bias=True), tmp_path / "to"
    to_hugging_face(model, CHARS, folder)
    found = json.loads((folder / "config.json").read_text())
    assert found["n_ctx"] == found["n_positions"] == 24
    tensors = load_file(folder / "model.safetensors")
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "ln_f.bias"} <= tensors.keys()
    assert not any(name.startswith("transformer.") for name in tensors)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert torch.equal(theirs.transformer.wte.weight, model.transformer.wte.weight[: CHARS.vocab_size])
    save_file({f"transformer.{name}": t for name, t in tensors.items()}, folder / "model.safetensors")  # as before
    again = from_pretrained(folder)
    assert all(torch.equal(a[: len(b)], b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", [dict(bias=True), dict(architecture="qwen3")])
def test_what_was_written_can_be_read_again(tmp_path, kind):
    model = our_model(**kind)
    to_hugging_face(model, CHARS, tmp_path / "to")
    again = from_pretrained(tmp_path / "to")
    assert again.config == dataclasses.replace(model.config, vocab_size=CHARS.vocab_size)
    expected = dict(model.named_parameters())
    for name, p in again.named_parameters():
        assert torch.equal(p, expected[name][: len(p)]), name
    assert read_tokenizer(tmp_path / "to") == CHARS.to_json()


def test_transformers_has_the_characters_too(tmp_path):
    to_hugging_face(our_model(), CHARS, tmp_path / "to")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    text = " Aé\n\n🎭b  c\n"
    assert theirs(text).input_ids == CHARS.encode(text)
    assert theirs.decode(CHARS.encode(text)) == text
    with pytest.raises(Exception, match="vocabulary"):
        theirs("x")


def test_transformers_has_gpt2s_tokens_too(tmp_path):
    tok = from_json({"type": "gpt2"})
    to_hugging_face(our_model(vocab_size=50304), tok, tmp_path / "to")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    for text in ("Hello  world, it's\n\n 1000 é 🎭\t", "  ", "naïve 東京"):
        assert theirs(text).input_ids == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text
    assert theirs("a<|endoftext|>").input_ids[-1] == theirs.eos_token_id == tok.eot
    assert read_tokenizer(tmp_path / "to") == {"type": "gpt2"}


TEXTS = ["Hello  world, it's\n\n 1000 é 🎭\t", "  ", "naïve 東京", "Ünbekanntes, z\u0000"]
LEARNT = "Hello hello world, it's the world's Ünbekanntes é 東京 naïve 東京\n\n" * 3


@pytest.mark.parametrize("kind", ["char", "separated char", "byte", "bpe"])
def test_transformers_has_every_tokenizer(tmp_path, kind):
    if kind == "bpe":
        tok = BPETokenizer.train([LEARNT], 290)
        assert tok.vocab_size == 290
    elif kind == "byte":
        tok = ByteTokenizer()
    else:
        tok = CharTokenizer(sorted(set(LEARNT) | {"\ufffd"}), unknown="\ufffd", separated=kind != "char")
    to_hugging_face(our_model(vocab_size=320), tok, tmp_path / "to")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    for text in [*TEXTS, LEARNT]:
        assert theirs(text).input_ids == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == tok.decode(tok.encode(text))
    end = tok.ids["\ufffd"] if tok.eot is None else tok.eot
    ends = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ends == (end, end, end)
    assert theirs.unk_token_id == (tok.ids["\ufffd"] if "char" in kind else end)
    assert json.loads((tmp_path / "to" / "config.json").read_text())["eos_token_id"] == end
    if tok.eot is not None:
        assert theirs("e<|endoftext|>").input_ids[-1] == tok.eot
    assert read_tokenizer(tmp_path / "to") == tok.to_json()
    theirs.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again") == tok.to_json()


def test_the_order_in_which_a_file_names_the_tokens_does_not_matter(tmp_path):
    to_hugging_face(our_model(), CHARS, tmp_path / "to")
    path = tmp_path / "to" / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["model"]["vocab"] = dict(reversed(found["model"]["vocab"].items()))
    path.write_text(json.dumps(found), encoding="utf-8")
    assert read_tokenizer(tmp_path / "to") == CHARS.to_json()


def test_weights_alone_are_no_model_of_hugging_faces(tmp_path):
    to_hugging_face(our_model(), CHARS, tmp_path / "to")
    assert is_hugging_face(tmp_path / "to")
    (tmp_path / "to" / "config.json").unlink()
    assert not is_hugging_face(tmp_path / "to")


def test_all_files_of_an_export_can_be_read_by_the_same_people(tmp_path):
    to_hugging_face(our_model(), CHARS, tmp_path / "to")
    assert len({path.stat().st_mode for path in (tmp_path / "to").iterdir()}) == 1


def test_an_export_takes_its_place_when_it_is_on_the_disk(tmp_path, monkeypatch):
    events, rename = [], os.rename
    monkeypatch.setattr(hugging_face.files, "flush", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("renamed"), rename(a, b)))
    to_hugging_face(our_model(), CHARS, tmp_path / "to")
    *before, folder, renamed, parent = events
    assert {path.name for path in (tmp_path / "to").iterdir()} <= {*before}
    assert (folder, renamed, parent) == (".to.tmp", "renamed", tmp_path.name)


ROPE = {"rope_type": "yarn", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("rope_parameters", ROPE, "rope_scaling = .* is not supported"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_scaling = .* is not supported"),
        ("attention_bias", True, "attention_bias = True is not supported"),
        ("mlp_bias", True, "mlp_bias = True is not supported"),
        ("hidden_act", "gelu", "hidden_act = 'gelu' is not supported"),
        ("num_key_value_heads", 1, "k_proj.weight"),
        ("num_key_value_heads", 5, "n_kv_head = 5 must divide n_head, which is 2"),
        ("head_dim", 7, "head_dim = 7 must be even"),
        ("head_dim", 0, "head_dim = 0 is no size"),
        ("rope_theta", "1e6", "rope_theta = '1e6' is no float"),
        ("rope_theta", 0.5, "rope_theta"),
        ("rms_norm_eps", 0, "norm_eps"),
        ("rms_norm_eps", 10**400, "describes no such model"),
        ("rope_theta", None, "rope_theta = None is no float"),
        ("tie_word_embeddings", 1, "tie_word_embeddings = 1 is no bool"),
        ("tie_word_embeddings", False, "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_modern_model_that_cannot_be_followed_is_refused_by_name(tmp_path, architecture, key, value, said):
    to_hugging_face(our_model(architecture), CHARS, tmp_path / "to")
    change_config(tmp_path / "to", **{key: value})
    with pytest.raises(UserError, match=said):
        from_pretrained(tmp_path / "to")


def test_what_transformers_saved_again_can_be_read(tmp_path):
    model = our_model(architecture="qwen3")
    to_hugging_face(model, CHARS, tmp_path / "to")
    load_theirs(tmp_path / "to").save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    assert torch.equal(again.transformer.h[1].mlp.up_proj.weight, model.transformer.h[1].mlp.up_proj.weight)


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        to_hugging_face(our_model(), CHARS, tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["to"] and [p.name for p in (tmp_path / "to").iterdir()] == [
        "mine.txt"
    ]
    (tmp_path / "to" / "mine.txt").unlink()
    to_hugging_face(our_model(), CHARS, tmp_path / "to")


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "save_file", fail)
    with pytest.raises(RunFailed, match="No space left"):
        to_hugging_face(our_model(), CHARS, tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".to.tmp").mkdir()
    (tmp_path / ".to.tmp" / "model.safetensors").write_bytes(b"half")
    to_hugging_face(our_model(), CHARS, tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["to"]
    assert torch.equal(from_pretrained(tmp_path / "to").transformer.ln_f.weight, our_model().transformer.ln_f.weight)


# What other readers want


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_half_precision_is_written_and_announced(tmp_path, architecture, dtype):
    model = our_model(architecture)
    to_hugging_face(model, CHARS, tmp_path / "to", dtype)
    kind = getattr(torch, dtype)
    assert {t.dtype for t in load_file(tmp_path / "to" / "model.safetensors").values()} == {kind}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to").dtype == kind
    again = dict(from_pretrained(tmp_path / "to").named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(again[name], p[: len(again[name])].to(kind).float()), name


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
@torch.no_grad()
def test_a_large_model_is_written_as_shards(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(hugging_face, "SHARD", 3000)
    model, ids = our_model(architecture), torch.tensor([[1, 2, 3]])
    to_hugging_face(model, CHARS, tmp_path / "to")
    shards = sorted(path.name for path in (tmp_path / "to").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "to" / "model.safetensors.index.json").read_text())
    held = {name: file for file in shards for name in load_file(tmp_path / "to" / file)}
    assert index["weight_map"] == held
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "to" / file).values()) for file in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    expected = model(ids, ids)[0][..., : CHARS.vocab_size]
    torch.testing.assert_close(load_theirs(tmp_path / "to")(ids).logits, expected, rtol=1e-4, atol=1e-4)
    again = from_pretrained(tmp_path / "to").eval()
    torch.testing.assert_close(again(ids, ids)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_pipeline_samples_as_we_do_and_stops_at_the_end(tmp_path, kind):
    tok = TOKENIZERS[kind]()
    to_hugging_face(make("gpt2", tok), tok, tmp_path / "to")
    pipe = transformers.pipeline("text-generation", str(tmp_path / "to"))
    usual = pipe.model.generation_config
    assert (usual.do_sample, usual.temperature, usual.top_k) == (True, 0.8, 200)
    known = tok.eot is not None or tok.unknown is not None
    assert (usual.eos_token_id == usual.pad_token_id is not None) == known
    text = sample_text(kind)[:10]
    options = {} if known else {"pad_token_id": 0}
    (found,) = pipe(text, max_new_tokens=4, do_sample=False, **options)
    ids = (
        make("gpt2", tok)
        .generate(torch.tensor([tok.encode(text)]), 4, temperature=0, vocab_size=tok.vocab_size)[0]
        .tolist()
    )
    if usual.eos_token_id not in ids:
        assert found["generated_text"] == tok.decode(ids)


def test_the_front_door_has_it_as_the_original_does(saved):
    from model import GPT as theirs

    assert theirs.from_pretrained(saved).config == from_pretrained(saved).config
