"""GGUF: every architecture with every tokenizer, read by gguf's own reader, by transformers' classes, and by llama.cpp."""

import os
import sys

import pytest
import torch
from exporting import TOKENIZERS, every_architecture, every_tokenizer, make, sample_text

from nanogpt.config import RunFailed, UserError
from nanogpt.formats.gguf import create_command, is_gguf, to_gguf
from nanogpt.text.tokenizer import BYTE_OF, GPT2_PATTERN, ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, spelled

gguf = pytest.importorskip("gguf")


def contents(path):
    """({key: value}, {name: tensor in float32}) of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def encode(text, said):
    """The ids of `text` by a plain form of llama.cpp's byte-level BPE, which leaves out what it has no token for."""
    import regex

    ids = {token: i for i, token in enumerate(said["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(said["tokenizer.ggml.merges"])}
    found = []
    for word in regex.findall(GPT2_PATTERN, text):
        parts = list(spelled(word.encode()))
        while pairs := [
            (ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks
        ]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts if part in ids]
    return found


# The tokenizer


@every_tokenizer
def test_the_file_gives_every_text_the_same_tokens(tmp_path, kind):
    tok = TOKENIZERS[kind]()
    to_gguf(make("gpt2", tok), tok, tmp_path / "model.gguf")
    said, _ = contents(tmp_path / "model.gguf")
    assert encode(sample_text(kind), said) == tok.encode(sample_text(kind))
    tokens, end = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.eos_token_id"]
    assert len(tokens) == len(set(tokens)) == tok.vocab_size + (tok.eot is None)
    assert tokens[end] == "<|endoftext|>" and end == (tok.vocab_size if tok.eot is None else tok.eot)
    for id in {*range(tok.vocab_size)} - {end}:
        assert bytes(BYTE_OF[c] for c in tokens[id]) == tok.token_bytes(id)


@every_tokenizer
def test_llama_cpp_is_told_all_that_it_would_guess(tmp_path, kind):
    tok = TOKENIZERS[kind]()
    to_gguf(make("gpt2", tok), tok, tmp_path / "model.gguf")
    said, _ = contents(tmp_path / "model.gguf")
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in said.items()}
    assert (said["model"], said["pre"]) == ("gpt2", "gpt-2")
    assert said["bos_token_id"] == said["eos_token_id"]
    assert (said["add_bos_token"], said["add_space_prefix"]) == (False, False)
    assert (said["merges"] == []) == (kind in ("ascii", "byte"))  # there, even if it is empty
    assert [i for i, kind in enumerate(said["token_type"]) if kind == gguf.TokenType.CONTROL] == [said["eos_token_id"]]
    assert said.get("suppress_tokens") == ([said["eos_token_id"]] if tok.eot is None else None)


def test_characters_that_the_vocabulary_lacks_are_left_out(tmp_path):
    tok = CharTokenizer(["a", "é", "京", "\ufffd"], unknown="\ufffd")
    to_gguf(make("gpt2", tok), tok, tmp_path / "model.gguf")
    said, _ = contents(tmp_path / "model.gguf")
    assert encode("aè亭xé京", said) == [0, 1, 2]  # è and 亭 begin with bytes of é and 京


# The model


@torch.no_grad()
def logits_of_transformers(said, tensors, ids):
    """The logits that transformers' class computes with a file's tensors, found by gguf's own table of names."""
    transformers = pytest.importorskip("transformers")
    arch = said["general.architecture"]
    sizes = {key.removeprefix(f"{arch}."): value for key, value in said.items()}
    V, n_layer, width = len(said["tokenizer.ggml.tokens"]), sizes["block_count"], sizes["embedding_length"]
    if arch == "gpt2":
        shape = dict(
            n_positions=sizes["context_length"], n_embd=width, n_layer=n_layer, n_head=sizes["attention.head_count"]
        )
        shape |= dict(n_inner=sizes["feed_forward_length"], layer_norm_epsilon=sizes["attention.layer_norm_epsilon"])
        tied = "output.weight" not in tensors
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **shape, tie_word_embeddings=tied))
    else:
        shape = dict(
            vocab_size=V,
            hidden_size=width,
            intermediate_size=sizes["feed_forward_length"],
            num_hidden_layers=n_layer,
            num_attention_heads=sizes["attention.head_count"],
            num_key_value_heads=sizes["attention.head_count_kv"],
            head_dim=sizes["attention.key_length"],
            rms_norm_eps=sizes["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": sizes["rope.freq_base"]},
            tie_word_embeddings="output.weight" not in tensors,
        )
        if arch == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        else:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], n_layer)
    state, used = {}, set()
    for name, p in model.named_parameters():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        used.add(theirs)
        transposed = arch == "gpt2" and p.dim() == 2 and ".h." in name
        state[name] = tensors[theirs].t() if transposed else tensors[theirs]
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours
            D = sizes["attention.key_length"]
            order = torch.cat([torch.arange(0, D, 2), torch.arange(1, D, 2)])
            state[name] = state[name].unflatten(0, (-1, D))[:, order].flatten(0, 1)
    assert used == tensors.keys()
    model.load_state_dict(state, strict=False)  # all but the tied output layer, as the line above says
    return model.eval()(ids).logits


@every_architecture
@every_tokenizer
@torch.no_grad()
def test_another_program_computes_the_same_logits(tmp_path, architecture, kind):
    tok = TOKENIZERS[kind]()
    model = make(architecture, tok)
    found = to_gguf(model, tok, tmp_path / "model.gguf")
    assert found.largest < 1e-5 < found.logit
    ids = torch.randint(tok.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    theirs = logits_of_transformers(*contents(tmp_path / "model.gguf"), ids)
    expected = model(ids, ids)[0][..., : tok.vocab_size]
    torch.testing.assert_close(theirs[..., : tok.vocab_size], expected, rtol=1e-4, atol=1e-4)
    if tok.eot is None:  # the end that was added is never the likeliest
        assert (theirs.argmax(dim=-1) < tok.vocab_size).all()


@pytest.mark.parametrize("dtype, close", [("float16", 2e-2), ("bfloat16", 2e-1)])
@every_architecture
def test_half_precision_rounds_the_matrices_alone(tmp_path, architecture, dtype, close):
    tok = ByteTokenizer()
    model = make(architecture, tok)
    found = to_gguf(model, tok, tmp_path / "half.gguf", dtype)
    to_gguf(model, tok, tmp_path / "full.gguf")
    assert 0 < found.largest <= close * found.logit
    half, full = contents(tmp_path / "half.gguf")[1], contents(tmp_path / "full.gguf")[1]
    for name, tensor in full.items():
        matrix = tensor.dim() == 2 and name != "position_embd.weight"
        assert torch.equal(half[name], tensor.to(getattr(torch, dtype)).float() if matrix else tensor), name
    assert (tmp_path / "half.gguf").stat().st_size < 0.8 * (tmp_path / "full.gguf").stat().st_size


# Whole or absent


def test_a_modelfile_is_beside_it(tmp_path):
    tok = ByteTokenizer()
    to_gguf(make("gpt2", tok), tok, tmp_path / "new" / "My model.gguf")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["My model.Modelfile", "My model.gguf"]
    lines = (tmp_path / "new" / "My model.Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./My model.gguf" and "TEMPLATE {{ .Prompt }}" in lines
    assert {"PARAMETER num_ctx 48", "PARAMETER temperature 0.8", "PARAMETER repeat_penalty 1.0"} <= set(lines)
    assert create_command("new/My model.gguf") == "ollama create my-model -f 'new/My model.Modelfile'"


@pytest.mark.parametrize("there", ["model.gguf", "model.Modelfile"])
def test_an_export_overwrites_nothing(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there} exists already"):
        to_gguf(make("gpt2", ByteTokenizer()), ByteTokenizer(), tmp_path / "model.gguf")
    assert [p.name for p in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"


def test_a_tokenizer_of_hugging_faces_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tok = HuggingFaceTokenizer({"version": "1.0", "added_tokens": [], "model": model})
    with pytest.raises(UserError, match="one of Hugging Face's") as caught:
        to_gguf(make("gpt2", tok), tok, tmp_path / "model.gguf")
    assert len(caught.value.problems) == 1 and not list(tmp_path.iterdir())


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"\.\[gguf\]"):
        to_gguf(make("gpt2", ByteTokenizer()), ByteTokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_the_number_format_cannot_hold_is_found_before_the_file_is_there(tmp_path):
    model = make("gpt2", ByteTokenizer())
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = 1e5
    with pytest.raises(RunFailed, match=r"h\.1\.mlp\.c_fc\.weight .* too large for float16"):
        to_gguf(model, ByteTokenizer(), tmp_path / "model.gguf", "float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["blk.1.attn_q.weight", "output_norm.weight"])
def test_a_file_that_reads_differently_does_not_appear(tmp_path, monkeypatch, wrong):
    real = gguf.GGUFWriter.add_tensor

    def add_tensor(self, name, tensor, **how):
        return real(self, name, tensor * (1.01 if name == wrong else 1), **how)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
    with pytest.raises(RunFailed, match="was not written"):
        to_gguf(make("qwen3", ByteTokenizer()), ByteTokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_kv_data_to_file", fail)
    with pytest.raises(RunFailed, match="No space left"):
        to_gguf(make("gpt2", ByteTokenizer()), ByteTokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".model.gguf.tmp").write_bytes(b"half")
    to_gguf(make("gpt2", ByteTokenizer()), ByteTokenizer(), tmp_path / "model.gguf")
    assert sorted(os.listdir(tmp_path)) == ["model.Modelfile", "model.gguf"]


@pytest.mark.parametrize("name, expected", [("a.gguf", True), ("b/a.GGUF", True), ("gguf", False), ("a.gguf/b", False)])
def test_the_suffix_chooses_the_format(name, expected):
    assert is_gguf(name) is expected
