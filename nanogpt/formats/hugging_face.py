"""Folders in Hugging Face's format: `load` reads a model, `to_hugging_face` writes one and its tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanogpt import files
from nanogpt.config import RunFailed, SampleConfig, UserError
from nanogpt.model import EPS, GPT, ROPE_THETA, GPTConfig, gated_width
from nanogpt.run import memory
from nanogpt.text import hugging_face_tokenizer

# Values that a GPT-2 configuration must have, as this model computes nothing else.
FIXED = {
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
SHAPE = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
QWEN3_SHAPE = dict(
    block_size="max_position_embeddings",
    vocab_size="vocab_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_embd="hidden_size",
)
SHARD = 5 * 10**9  # bytes in a file of weights, at most: as much as the hub and its readers expect
# OpenAI's code multiplies x @ W with W (in, out); nn.Linear keeps W (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load(folder: Path, dropout: float = 0.0) -> GPT:
    """The GPT in a folder with `config.json` and safetensors or `pytorch_model.bin` files, on the CPU.

    `to_hugging_face` writes such a folder, and so does `save_pretrained` of a GPT2LMHeadModel. Raises UserError if it
    is something else.
    """
    config = read_config(folder, dropout)
    memory.check_size(config, folder)
    tensors = read_weights(folder)
    model = GPT(config)
    try:
        model.load_weights(from_qwen3(tensors) if config.architecture == "qwen3" else from_gpt2(tensors))
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
    return model


def from_gpt2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names and shapes for the tensors of a GPT2LMHeadModel."""
    ours = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # the causal mask, and the tied output layer
        ours["transformer." + name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    return ours


def from_qwen3(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names for the tensors of a Qwen3ForCausalLM. Raises ValueError if its norms have gains."""
    ours = {}
    for name, tensor in tensors.items():
        if "norm" in name:
            if not torch.equal(tensor, torch.ones_like(tensor)):
                raise ValueError(f"{name} has gains other than 1, which this model does not have")
        elif name != "lm_head.weight":
            name = name.replace("model.embed_tokens", "transformer.wte").replace("model.layers", "transformer.h")
            ours[name.replace("self_attn", "attn")] = tensor
    return ours


def is_hugging_face(folder: str | Path) -> bool:
    """Whether `folder` looks like a model that Hugging Face's transformers saved."""
    return (
        (Path(folder) / "config.json").is_file()
        and any(Path(folder).glob("*.safetensors"))
        or any(Path(folder).glob("pytorch_model*.bin"))
    )


def read_config(folder: Path, dropout: float = 0.0) -> GPTConfig:
    """The GPTConfig that a Hugging Face `config.json` describes."""
    path = folder / "config.json"
    try:
        found = json.loads(files.read(path))
        kind = found.get("model_type")
        if kind not in ("gpt2", "qwen3"):
            raise UserError(f"{path}: describes a {kind!r} model; only gpt2 and qwen3 are known here")
        names = SHAPE if kind == "gpt2" else QWEN3_SHAPE
        shape = {ours: found[theirs] for ours, theirs in names.items()}
        for name, value in shape.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{path}: {names[name]} = {value!r} is no size")
        rope = found.get("rope_parameters") or {}  # where transformers 5 keeps them
        if rope:
            found |= {"rope_theta": rope["rope_theta"]} | (
                {} if rope.get("rope_type") == "default" else {"rope_scaling": rope}
            )
        for key, value in (FIXED if kind == "gpt2" else qwen3_fixed(shape)).items():
            if found.get(key, value) != value and (key, found[key]) != ("n_inner", 4 * shape["n_embd"]):
                raise UserError(f"{path}: {key} = {found[key]!r} is not supported")
        if kind == "qwen3":
            check_window(found, shape["block_size"], path)
            return GPTConfig(**shape, dropout=dropout, architecture="qwen3")
        activation = found.get("activation_function", "gelu_new")
        activation = {"gelu_pytorch_tanh": "gelu_new"}.get(activation, activation)
        return GPTConfig(**shape, dropout=dropout, bias=True, activation=activation)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json; expected a folder that save_pretrained wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: describes no such model ({type(e).__name__}: {e})") from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, of one file or several. Pickled files may hold nothing but tensors."""
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            safe = path.suffix == ".safetensors"
            found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, dict) or not all(
                isinstance(k, str) and torch.is_tensor(t) for k, t in found.items()
            ):
                raise ValueError("it is no dictionary of tensors")
            tensors |= found
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, TypeError) as e:
            reason = str(e).strip().splitlines() or [type(e).__name__]
            raise UserError(f"{path}: cannot be read ({reason[0]})") from None
        except Exception as e:  # pickle.UnpicklingError, without importing pickle to name it
            raise UserError(f"{path}: refused, because it holds more than tensors ({type(e).__name__})") from None
    return tensors


def to_hugging_face(model: GPT, tok: Any, folder: str | Path, dtype: str = "float32", card: str = "") -> None:
    """Write a model and its tokenizer as transformers' `from_pretrained` reads them: GPT-2's or Qwen3's classes.

    folder: must be empty or not exist; it appears once it is complete. dtype: number format of all weights. card: the text
    of its README.md. The ids that pad the model's vocabulary are left out. Raises UserError if the folder holds something,
    RunFailed if it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--to={folder}: exists already; name a new folder")
    modern = model.config.architecture == "qwen3"
    config, tensors = (as_qwen3 if modern else as_gpt2)(model, tok.vocab_size)
    end = tok.ids.get(tok.unknown) if tok.eot is None else tok.eot  # as in tokenizer_config.json
    ends = {"bos_token_id": end, "eos_token_id": end}
    content = {"config.json": config | ends | {"dtype": dtype}}
    content["generation_config.json"] = ends | {"pad_token_id": end} | how_we_sample()
    content |= hugging_face_tokenizer.to_files(tok, model.config.block_size)
    try:
        with files.whole(folder) as new:
            new.mkdir()
            for name, value in content.items():
                files.write_json(new / name, value)
            if card:
                files.write(new / "README.md", card.encode())
            save_weights({name: t.detach().to(getattr(torch, dtype)) for name, t in tensors.items()}, new)
    except (OSError, SafetensorError) as e:
        raise RunFailed(f"--to={folder}: cannot be written ({getattr(e, 'strerror', None) or e})") from None


def how_we_sample() -> dict[str, Any]:
    """What a generation_config.json says so that `generate` samples as sample.py does."""
    usual = SampleConfig()
    return {"do_sample": True, "temperature": usual.temperature, "top_k": usual.top_k, "top_p": usual.top_p}


def save_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors, or several files of at most SHARD bytes and the index that says which tensor is in which."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, t in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + t.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = t
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        files.write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(names, shards, strict=True):
        save_file({name: t.contiguous() for name, t in shard.items()}, folder / file, {"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes it readable by its owner only


def as_gpt2(model: GPT, V: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config.json and the tensors of a GPT2LMHeadModel with a vocabulary of V."""
    ours = model.config
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **FIXED}
    config |= {theirs: getattr(ours, name) for name, theirs in SHAPE.items()}
    config |= {"vocab_size": V, "n_ctx": ours.block_size, "activation_function": ours.activation}  # some read n_ctx
    config |= {f"{part}_pdrop": ours.dropout for part in ("attn", "embd", "resid")}
    named: dict[str, torch.Tensor] = {
        n.removeprefix("transformer."): p for n, p in model.named_parameters()
    }  # OpenAI's names
    tensors = {name: t.t() if name.endswith(TRANSPOSED) else t for name, t in named.items()}
    tensors["wte.weight"] = named["wte.weight"][:V]
    if not ours.bias:  # theirs always has biases
        layers = [name.removesuffix(".weight") for name in tensors if name.startswith(("h.", "ln_f."))]
        widths = {f"{name}.bias": tensors[f"{name}.weight"].shape[-1] for name in layers}  # (in, out), or (out)
        tensors |= {name: torch.zeros(width) for name, width in widths.items()}
    return config, tensors


def as_qwen3(model: GPT, V: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config.json and the tensors of a Qwen3ForCausalLM with a vocabulary of V. Its norms get gains of 1."""
    ours = model.config
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **qwen3_fixed(vars(ours))}
    config |= {theirs: getattr(ours, name) for name, theirs in QWEN3_SHAPE.items()} | {"vocab_size": V}
    # as here, where a token past the end of the context attends to the last block_size ones
    config |= {"use_sliding_window": True, "sliding_window": ours.block_size, "max_window_layers": 0}
    config["layer_types"] = ["sliding_attention"] * ours.n_layer
    tensors: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        name = name.replace("transformer.wte", "model.embed_tokens").replace("transformer.h", "model.layers")
        tensors[name.replace(".attn.", ".self_attn.")] = p
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:V]
    gains = {"model.norm": ours.n_embd}
    for layer in (f"model.layers.{i}" for i in range(ours.n_layer)):
        gains |= {f"{layer}.{name}": ours.n_embd for name in ("input_layernorm", "post_attention_layernorm")}
        gains |= {f"{layer}.self_attn.{name}": config["head_dim"] for name in ("q_norm", "k_norm")}
    return config, tensors | {f"{name}.weight": torch.ones(width) for name, width in gains.items()}


def qwen3_fixed(shape: Mapping) -> dict:
    """Values that a Qwen3 configuration of this shape must have, as this model computes nothing else."""
    return {
        "intermediate_size": gated_width(shape["n_embd"]),
        "num_key_value_heads": shape["n_head"],
        "head_dim": shape["n_embd"] // shape["n_head"],
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }


def check_window(found: dict, block_size: int, path: Path) -> None:
    """Raise UserError if a Qwen3 configuration has a sliding window that is shorter than its context."""
    window = found.get("sliding_window") if found.get("use_sliding_window") else None
    if window is not None and window < block_size:
        raise UserError(f"{path}: sliding_window = {window!r} is not supported; it must be the context, {block_size}")
