"""GGUF, the format of llama.cpp and Ollama: `to_gguf` writes a model with its tokenizer, and checks the file that it wrote.

The library `gguf` writes and reads the bytes. Here is what they have to be for our models: names of tensors, settings, and
each of our tokenizers as byte-level BPE, the only kind of llama.cpp's that gives every text the ids that we give it.
"""

import os
import re
import shlex
import struct
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt import files
from nanogpt.config import RunFailed, SampleConfig, UserError, installs
from nanogpt.formats import compare
from nanogpt.formats.compare import Difference
from nanogpt.model import GPT, GPTConfig
from nanogpt.text.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, spelled

# llama.cpp's names for the parts of our architectures.
PARTS = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # gguf's names for the number formats


@dataclass
class Vocabulary:
    """A tokenizer as llama.cpp knows it: byte-level BPE."""

    tokens: list[str]  # by id, each byte spelled as GPT-2's files do
    merges: list[str]  # "a b", the first to be applied first
    end: int  # the token that ends a text
    added: bool = False  # whether `end` is not the tokenizer's own, but the one after its last id


def is_gguf(to: str | Path) -> bool:
    """Whether `--to` asks for this format."""
    return Path(to).suffix.lower() == ".gguf"


def to_gguf(model: GPT, tok: Tokenizer, path: str | Path, dtype: str = "float32") -> Difference:
    """Write a model, its tokenizer, and a Modelfile beside them; return how far the file's logits are from the model's.

    dtype: number format of the matrices; norms, biases, and positions stay float32. The file appears once it has been read
    back and computes the same. Raises UserError if there is something at `path`, the library is missing, or the tokenizer
    cannot be expressed; RunFailed if the file cannot be written or is wrong. Nothing is left behind then.
    """
    path = Path(path)
    for there in (path, modelfile(path)):
        if os.path.lexists(there):
            raise UserError(f"--to={path}: {there} exists already; name a new file")
    package, vocabulary = import_gguf(path), as_bpe(tok, path)
    try:
        with files.whole(path) as new:
            write(new, model, vocabulary, dtype, package)
            found = check(read(new, model.config, package), model, tok.vocab_size, dtype)
            files.write(modelfile(path), modelfile_text(path, model.config.block_size).encode())
    except OSError as e:
        raise RunFailed(f"--to={path}: cannot be written ({e.strerror or e})") from None
    except ValueError as e:
        raise RunFailed(f"--to={path}: was not written: {e}") from None
    return found


def import_gguf(path: Path) -> Any:
    """The library. Raises UserError that names the extra if it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"--to={path}: GGUF needs the package gguf: {installs('gguf')} brings it") from None
    return gguf


# -- the tokenizer


def as_bpe(tok: Tokenizer, path: Path) -> Vocabulary:
    """The Vocabulary that gives every text the same ids as `tok`. Raises UserError if there is none."""
    if not isinstance(tok, CharTokenizer | ByteTokenizer | BPETokenizer):
        raise UserError(
            f"--to={path}: the model's tokenizer is one of Hugging Face's, and only characters, bytes, GPT-2's BPE and BPE "
            "trained here can be written as GGUF; a folder (--to=FOLDER) holds it, and llama.cpp's convert_hf_to_gguf.py "
            "reads that, if it knows the tokenizer"
        )
    merges = tok.merges() if isinstance(tok, BPETokenizer) else []
    if isinstance(tok, CharTokenizer):
        merges = character_merges(tok.chars)
    end = tok.vocab_size if tok.eot is None else tok.eot
    tokens = [END_OF_TEXT if id == tok.eot else spelled(tok.token_bytes(id)) for id in range(tok.vocab_size)]
    return Vocabulary([*tokens, END_OF_TEXT] if tok.eot is None else tokens, merges, end, added=tok.eot is None)


def character_merges(chars: list[str]) -> list[str]:
    """The merges that make each character of its UTF-8 bytes, from left to right; none goes beyond a character."""
    found: dict[str, None] = {}  # in order, each once
    for c in chars:
        data = c.encode("utf-8")
        found |= {f"{spelled(data[:n])} {spelled(data[n : n + 1])}": None for n in range(1, len(data))}
    return list(found)


# -- the file


def write(path: Path, model: GPT, vocabulary: Vocabulary, dtype: str, package: Any) -> None:
    """Write the file with gguf's own writer."""

    class Writer(package.GGUFWriter):
        """gguf's writer refuses an empty array, and llama.cpp wants the key `merges` even if there are none."""

        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if vtype == package.GGUFValueType.ARRAY and not len(val):
                return struct.pack("<IIQ", vtype, sub_type, 0)
            return super()._pack_val(val, vtype, add_vtype, sub_type)

    kind = package.GGMLQuantizationType[KINDS[dtype]]
    with closing(Writer(path, model.config.architecture)) as writer:
        writer.add_file_type(package.LlamaFileType["ALL_F32" if dtype == "float32" else f"MOSTLY_{KINDS[dtype]}"])
        for key, value in shape_of(model.config).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        add_vocabulary(writer, vocabulary, package)
        for name, tensor in named_tensors(model, vocabulary).items():
            array = tensor.detach().contiguous().numpy()
            plain = tensor.dim() == 1 or name.startswith("position_embd")  # as llama.cpp expects them
            stored = package.GGMLQuantizationType.F32 if plain else kind
            with np.errstate(over="ignore"):  # `check` finds a weight that is too large
                writer.add_tensor(name, package.quants.quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def shape_of(config: GPTConfig) -> dict[str, int | float]:
    """{key: value} of what llama.cpp has to know of the architecture."""
    shape: dict[str, int | float] = {
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.n_head,
    }
    if config.modern:
        shape |= {
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_size,
            "attention.value_length": config.head_size,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.freq_base": config.rope_theta,
            "rope.dimension_count": config.head_size,
        }
    else:
        shape["attention.layer_norm_epsilon"] = 1e-5  # PyTorch's own, of nn.LayerNorm
    return {f"{config.architecture}.{key}": value for key, value in shape.items()}


def add_vocabulary(writer: Any, vocabulary: Vocabulary, package: Any) -> None:
    """The tokenizer, and that nothing is added to a text."""
    types = [package.TokenType.NORMAL] * len(vocabulary.tokens)
    types[vocabulary.end] = package.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_vocab_size(len(vocabulary.tokens))  # llama.cpp counts, others read it
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(types)
    strings = package.GGUFValueType.STRING
    writer.add_key_value(package.Keys.Tokenizer.MERGES, vocabulary.merges, package.GGUFValueType.ARRAY, strings)
    writer.add_bos_token_id(vocabulary.end)  # llama.cpp takes token 11 for both if they are not named
    writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.added:
        writer.add_array("tokenizer.ggml.suppress_tokens", [vocabulary.end])  # never sampled, if a program knows it


def named_tensors(model: GPT, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The model's tensors under llama.cpp's names, with the biases and gains that it expects: of 0 and 1 if ours has none."""
    config = model.config
    found: dict[str, Tensor] = {theirs_of(name): paired(name, p, config) for name, p in model.named_parameters()}
    V = len(vocabulary.tokens) - vocabulary.added
    least = least_expected(model, V) if vocabulary.added else None
    for name in ("token_embd.weight", "output.weight"):
        if name in found:
            found[name] = found[name][:V] if least is None else with_end(found[name], V, least)
    if config.modern:
        C, D = config.n_embd, config.head_size
        widths = {"output_norm": C}
        for i in range(config.n_layer):
            widths |= {f"blk.{i}.attn_norm": C, f"blk.{i}.ffn_norm": C}
            if config.architecture == "qwen3":
                widths |= {f"blk.{i}.attn_q_norm": D, f"blk.{i}.attn_k_norm": D}
        return {f"{name}.weight": torch.ones(width) for name, width in widths.items()} | found
    layers = [
        n.removesuffix(".weight") for n in found if n.endswith(".weight") and "_embd" not in n and n[:7] != "output."
    ]
    return {f"{name}.bias": torch.zeros(len(found[f"{name}.weight"])) for name in layers} | found


def paired(name: str, p: Tensor, config: GPTConfig, back: bool = False) -> Tensor:
    """A parameter in llama.cpp's order of rows, or `back` in ours.

    It rotates neighbouring channels of Llama's queries and keys, where we rotate channels i and i + D/2, as Qwen3 does.
    """
    if config.architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return p
    halves = (config.head_size // 2, 2) if back else (2, config.head_size // 2)
    return p.unflatten(0, (-1, *halves)).transpose(1, 2).flatten(0, 2)


def least_expected(model: GPT, V: int) -> Tensor:
    """The ids of the eight tokens of V that the model expects least, over a context of random tokens."""
    probability = compare.logits(model, compare.context(model, V), V).softmax(dim=-1).mean(dim=(0, 1))  # (V)
    return probability.argsort()[:8]


def with_end(rows: Tensor, V: int, least: Tensor) -> Tensor:
    """The first V rows of an embedding, and one for an end of text, which a model without one should never write.

    It is the mean of the rows of the tokens that the model expects least. So the end's logit is the mean of theirs: never
    above the largest of all, and far below it if they are improbable.
    """
    return torch.cat([rows[:V], rows[least].mean(dim=0, keepdim=True)])


def theirs_of(name: str) -> str:
    """llama.cpp's name for one of our parameters: `blk.0.attn_q.weight` for `transformer.h.0.attn.q_proj.weight`."""
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    _, layer, part = module.split(".", 2) if module.startswith("h.") else ("", "", module)
    return (f"blk.{layer}." if layer else "") + f"{PARTS[part]}.{kind}"


# -- the check


def read(path: Path, expected: GPTConfig, package: Any) -> GPT:
    """The GPT in a file that `write` wrote, built from what the file says.

    expected: the shape that it must have, and what GGUF does not say, such as the form of GELU. Raises ValueError if the file has
    another shape, or does not hold the tensors of a model.
    """
    reader = package.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    for key, value in shape_of(expected).items():
        if said[key] != (np.float32(value) if isinstance(value, float) else value):
            raise ValueError(f"its {key} is {said[key]}")
    V = len(said["tokenizer.ggml.tokens"])
    model = GPT(replace(expected, vocab_size=V, bias=True, dropout=0.0))
    tensors = {t.name: torch.tensor(package.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    ours = {
        name: paired(name, tensors.pop(theirs_of(name)), expected, back=True)
        for name, _ in model.named_parameters()
        if theirs_of(name) in tensors
    }
    model.load_weights(ours)
    if odd := [name for name, gains in tensors.items() if not torch.equal(gains, torch.ones_like(gains))]:
        raise ValueError(f"{odd[0]} is no tensor of this model")
    return model


def check(found: GPT, model: GPT, V: int, dtype: str) -> Difference:
    """How far two models' logits are apart. Raises ValueError if a weight is not the rounded one, or if that is too far."""
    again = dict(found.named_parameters())
    for name, p in model.named_parameters():
        rounded = p if p.dim() == 1 or name.endswith("wpe.weight") else p.to(getattr(torch, dtype)).float()
        rows = V if name.endswith(("wte.weight", "lm_head.weight")) else len(p)
        if not torch.equal(again.pop(name)[:rows], rounded[:rows]):
            raise ValueError(f"{name} reads differently")
        if not rounded.isfinite().all():
            raise ValueError(f"{name} is not finite, or too large for {dtype}")
    if any(p.any() for p in again.values()):
        raise ValueError("it has biases that the model does not have")
    idx = compare.context(model, V)
    result = compare.difference(compare.logits(found, idx, V), compare.logits(model, idx, V))
    if not result.allowed(dtype):
        raise ValueError(f"its logits differ by {result}")
    return result


# -- for Ollama


def modelfile(path: Path) -> Path:
    """The file that `ollama create -f` reads, beside the model."""
    return path.with_suffix(".Modelfile")


def modelfile_text(path: Path, block_size: int) -> str:
    """A Modelfile that samples as sample.py does: no chat template, and no penalty for the letters that came before."""
    usual = SampleConfig()
    settings = dict(num_ctx=block_size, num_predict=usual.max_new_tokens, temperature=usual.temperature)
    settings |= dict(top_k=usual.top_k, top_p=usual.top_p, min_p=usual.min_p, repeat_penalty=1.0)
    lines = [f"FROM ./{path.name}", "TEMPLATE {{ .Prompt }}"]
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in settings.items())]) + "\n"


def create_command(path: str | Path) -> str:
    """The command that puts the model into Ollama, under a name that Ollama allows."""
    name = re.sub(r"[^a-z0-9_.-]+", "-", Path(path).stem.lower()).strip("-.") or "nanogpt"
    return f"ollama create {name} -f {shlex.quote(str(modelfile(Path(path))))}"
