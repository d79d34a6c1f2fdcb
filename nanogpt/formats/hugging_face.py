"""Folders in Hugging Face's format: `load` reads a model, `to_hugging_face` writes one and its tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanogpt import files
from nanogpt.config import PADDING, RunFailed, SampleConfig, UserError
from nanogpt.model import GPT, GPTConfig, gated_width
from nanogpt.run import memory
from nanogpt.text import hugging_face_tokenizer

# {our name: theirs} of what determines a model's shape, and the values that a config.json must have beside it, as the
# models here compute nothing else.
GPT2 = dict(
    block_size="n_positions",
    vocab_size="vocab_size",
    n_layer="n_layer",
    n_head="n_head",
    n_embd="n_embd",
    n_hidden="n_inner",
    tied="tie_word_embeddings",
)
GPT2_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "layer_norm_epsilon": 1e-5}
MODERN = dict(
    block_size="max_position_embeddings",
    vocab_size="vocab_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_embd="hidden_size",
    n_kv_head="num_key_value_heads",
    head_dim="head_dim",
    n_hidden="intermediate_size",
    rope_theta="rope_theta",
    norm_eps="rms_norm_eps",
    tied="tie_word_embeddings",
)
MODERN_FIXED = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,  # Llama alone names it
}
CLASSES = dict(gpt2="GPT2LMHeadModel", qwen3="Qwen3ForCausalLM", llama="LlamaForCausalLM")
# {our name: theirs} of the parts of a modern model.
PARTS = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "transformer.ln_f": "model.norm",
    ".attn.": ".self_attn.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
}
SHARD = 5 * 10**9  # bytes in a file of weights, at most: as much as the hub and its readers expect
# OpenAI's code multiplies x @ W with W (in, out); nn.Linear keeps W (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load(folder: Path, dropout: float = 0.0) -> GPT:
    """The GPT in a folder with `config.json` and safetensors or `pytorch_model.bin` files, on the CPU.

    `to_hugging_face` writes such a folder, and so does `save_pretrained` of the classes in CLASSES. Raises UserError if it
    is something else.
    """
    config = read_config(folder, dropout)
    memory.check_size(config, folder)
    tensors = (from_modern if config.modern else from_gpt2)(read_weights(folder), config)
    gains = {name: t for name, t in tensors.items() if "ln_" in name or "_norm." in name} if config.modern else {}
    config.norm_gain = any(not torch.equal(t, torch.ones_like(t)) for t in gains.values())
    if not config.norm_gain:  # gains of 1 stand for none
        tensors = {name: t for name, t in tensors.items() if name not in gains}
    model = GPT(config)
    try:
        model.load_weights(tensors)
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
    return model


def from_gpt2(tensors: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Our names and shapes for the tensors of a GPT2LMHeadModel."""
    ours = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")) or (config.tied and name == "lm_head.weight"):
            continue  # the causal mask, and a copy of the embedding
        named = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
        ours[named] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    return ours


def from_modern(tensors: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Our names for the tensors of a Qwen3ForCausalLM or LlamaForCausalLM."""
    ours = {}
    for name, tensor in tensors.items():
        if not (config.tied and name == "lm_head.weight"):  # a copy of the embedding
            ours[renamed(name, {theirs: part for part, theirs in PARTS.items()})] = tensor
    return ours


def renamed(name: str, parts: dict[str, str]) -> str:
    """A parameter's name with each of `parts`, {old: new}, replaced."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def is_hugging_face(folder: str | Path) -> bool:
    """Whether `folder` looks like a model that Hugging Face's transformers saved."""
    return (
        (Path(folder) / "config.json").is_file()
        and any(Path(folder).glob("*.safetensors"))
        or any(Path(folder).glob("pytorch_model*.bin"))
    )


def read_config(folder: Path, dropout: float = 0.0) -> GPTConfig:
    """The GPTConfig that a Hugging Face `config.json` describes; only the weights tell whether norms have gains."""
    path = folder / "config.json"
    try:
        found = json.loads(files.read(path))
        kind = found.get("model_type")
        if kind not in CLASSES:
            raise UserError(f"{path}: describes a {kind!r} model; only {', '.join(CLASSES)} are known here")
        rope = found.get("rope_parameters") or {}  # where transformers 5 keeps them
        if rope:
            found |= {"rope_theta": rope["rope_theta"]} | (
                {} if rope.get("rope_type") == "default" else {"rope_scaling": rope}
            )
        names, fixed = (GPT2, GPT2_FIXED) if kind == "gpt2" else (MODERN, MODERN_FIXED)
        for key, value in fixed.items():
            if found.get(key, value) != value:
                raise UserError(f"{path}: {key} = {found[key]!r} is not supported")
        shape = read_shape(found, kind, names, path)
        if kind != "gpt2":
            check_window(found, shape["block_size"], path)
            return GPTConfig(**shape, dropout=dropout, bias=False, architecture=kind)
        activation = found.get("activation_function", "gelu_new")
        activation = {"gelu_pytorch_tanh": "gelu_new"}.get(activation, activation)
        return GPTConfig(**shape, dropout=dropout, bias=True, activation=activation)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json; expected a folder that save_pretrained wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as e:
        raise UserError(f"{path}: describes no such model ({type(e).__name__}: {e})") from None


def read_shape(found: dict, kind: str, names: dict[str, str], path: Path) -> dict[str, Any]:
    """{our name: value} for the `names` of a config.json. UserError if a value is of another type, or too small.

    What a config.json may lack has the default of transformers, and what is as in GPTConfig's default is 0 here as there.
    """
    modern = kind != "gpt2"
    optional: dict[str, Any] = dict(rope_theta=10000.0, norm_eps=1e-6, tied=not modern)
    optional |= dict(n_kv_head=32, head_dim=128) if kind == "qwen3" else dict(n_kv_head=None, head_dim=None)
    optional |= {} if modern else {"n_hidden": None}
    shape: dict[str, Any] = {}
    for name, theirs in names.items():
        value = found.get(theirs, optional[name]) if name in optional else found[theirs]
        if name in ("rope_theta", "norm_eps") and type(value) is int:
            value = float(value)
        expected = type(getattr(GPTConfig, name))
        if value is None and name in ("n_kv_head", "head_dim", "n_hidden") and name in optional:
            value = 0
        elif type(value) is not expected or (type(value) is int and value < 1):
            raise UserError(f"{path}: {theirs} = {value!r} is no {'size' if expected is int else expected.__name__}")
        shape[name] = value
    C, H = shape["n_embd"], shape["n_head"]
    usual = dict(n_kv_head=H, head_dim=C / H, n_hidden=gated_width(C) if modern else 4 * C)
    return {name: 0 if value == usual.get(name) else value for name, value in shape.items()}


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
    """Write a model and its tokenizer as transformers' `from_pretrained` reads them: as one of CLASSES.

    folder: must be empty or not exist; it appears once it is complete. dtype: number format of all weights. card: the text
    of its README.md. The rows that pad the vocabulary are left out. Raises UserError if the folder holds something,
    RunFailed if it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--to={folder}: exists already; name a new folder")
    V = rows(model, tok.vocab_size)
    config, tensors = (as_modern if model.config.modern else as_gpt2)(model, V)
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


def rows(model: GPT, vocab_size: int) -> int:
    """The size of the vocabulary to write: without the rows that pad it to a multiple of PADDING, but with more of them."""
    V = model.config.vocab_size
    return vocab_size if V - vocab_size < PADDING else V


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


def shape_of(ours: GPTConfig, V: int) -> dict[str, Any]:
    """The part of a config.json that describes the shape of a model with a vocabulary of V."""
    actual = dict(vocab_size=V, n_kv_head=ours.kv_heads, head_dim=ours.head_size, n_hidden=ours.hidden)
    names, fixed = (MODERN, MODERN_FIXED) if ours.modern else (GPT2, GPT2_FIXED)
    shape = {theirs: actual.get(name, getattr(ours, name)) for name, theirs in names.items()}
    named = {key: value for key, value in fixed.items() if key != "mlp_bias" or ours.architecture == "llama"}
    return {"architectures": [CLASSES[ours.architecture]], "model_type": ours.architecture} | named | shape


def as_gpt2(model: GPT, V: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config.json and the tensors of a GPT2LMHeadModel with a vocabulary of V."""
    ours = model.config
    config = shape_of(ours, V) | {"n_inner": ours.n_hidden or None, "activation_function": ours.activation}
    config["n_ctx"] = ours.block_size  # some programs read it
    config |= {f"{part}_pdrop": ours.dropout for part in ("attn", "embd", "resid")}
    tensors: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():  # OpenAI's names
        name = name.removeprefix("transformer.")
        tensors[name] = p.t() if name.endswith(TRANSPOSED) else p[:V] if name in ("wte.weight", "lm_head.weight") else p
    if not ours.bias:  # theirs always has biases
        layers = [name.removesuffix(".weight") for name in tensors if name.startswith(("h.", "ln_f."))]
        widths = {f"{name}.bias": tensors[f"{name}.weight"].shape[-1] for name in layers}  # (in, out), or (out)
        tensors |= {name: torch.zeros(width) for name, width in widths.items()}
    return config, tensors


def as_modern(model: GPT, V: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config.json and the tensors of a Qwen3ForCausalLM or LlamaForCausalLM with a vocabulary of V.

    Norms without gains get gains of 1.
    """
    ours = model.config
    config = shape_of(ours, V)
    if ours.architecture == "qwen3" and not ours.norm_gain:
        # A model from here: a token past the end of the context attends to the last block_size ones.
        config |= {"use_sliding_window": True, "sliding_window": ours.block_size, "max_window_layers": 0}
        config["layer_types"] = ["sliding_attention"] * ours.n_layer
    tensors: dict[str, torch.Tensor] = {renamed(name, PARTS): p for name, p in model.named_parameters()}
    tensors |= {name: tensors[name][:V] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors}
    if ours.norm_gain:
        return config, tensors
    gains = {"model.norm": ours.n_embd}
    for layer in (f"model.layers.{i}" for i in range(ours.n_layer)):
        gains |= {f"{layer}.{name}": ours.n_embd for name in ("input_layernorm", "post_attention_layernorm")}
        if ours.architecture == "qwen3":
            gains |= {f"{layer}.self_attn.{name}": ours.head_size for name in ("q_norm", "k_norm")}
    return config, tensors | {f"{name}.weight": torch.ones(width) for name, width in gains.items()}


def check_window(found: dict, block_size: int, path: Path) -> None:
    """Raise UserError if a Qwen3 configuration has a sliding window that is shorter than its context."""
    window = found.get("sliding_window") if found.get("use_sliding_window") else None
    if window is not None and window < block_size:
        raise UserError(f"{path}: sliding_window = {window!r} is not supported; it must be the context, {block_size}")
