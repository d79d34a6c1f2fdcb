"""Other projects' formats: GPT-2 as Hugging Face keeps it, checkpoints of the original nanoGPT."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanogpt import legacy
from nanogpt.checkpoint import Checkpoint
from nanogpt.config import GPT2_NAMES, UserError
from nanogpt.model import GPT, GPTConfig

# What a GPT-2 configuration may say, and the only value this model can follow.
FIXED = {
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
SHAPE = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
# OpenAI's code multiplies x @ W with W (in, out); nn.Linear keeps W (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def from_pretrained(name_or_folder, dropout=0.0):
    """A GPT with GPT-2's weights, on the CPU.

    name_or_folder: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`, downloaded by huggingface_hub (and kept in
    its cache), or a folder with `config.json` and safetensors or `pytorch_model.bin` files as
    `GPT2LMHeadModel.save_pretrained` writes them. Raises UserError where it is none of them.
    """
    folder = download(name_or_folder) if str(name_or_folder) in GPT2_NAMES else Path(name_or_folder)
    model = GPT(read_config(folder, dropout))
    tensors = {}
    for name, tensor in read_weights(folder).items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # the causal mask, and the tied output layer
        tensors["transformer." + name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    try:
        model.load_weights(tensors)
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
    return model


def is_hugging_face(folder):
    """Whether `folder` looks like a model that Hugging Face's transformers saved."""
    return (
        (Path(folder) / "config.json").is_file()
        and any(Path(folder).glob("*.safetensors"))
        or any(Path(folder).glob("pytorch_model*.bin"))
    )


def download(name):
    """The local folder of one of OpenAI's models. UserError where it cannot be had."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise UserError(f'{name}: downloading it takes huggingface_hub; pip install -e ".[hf]" brings it') from None
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]))
    except Exception as e:  # of many kinds: network, hub, disk
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{name}: cannot be downloaded ({reason}); a local folder in Hugging Face's format works too"
        ) from None


def read_config(folder, dropout):
    """The GPTConfig that a Hugging Face `config.json` describes."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("model_type") != "gpt2":
            raise UserError(f"{path}: describes a {found.get('model_type')!r} model; only gpt2 is known here")
        shape = {ours: found[theirs] for ours, theirs in SHAPE.items()}
        for name, value in shape.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{path}: {SHAPE[name]} = {value!r} is no size")
        for key, value in FIXED.items():
            if found.get(key, value) != value and (key, found[key]) != ("n_inner", 4 * found["n_embd"]):
                raise UserError(f"{path}: {key} = {found[key]!r} is not supported")
        activation = found.get("activation_function", "gelu_new")
        activation = {"gelu_pytorch_tanh": "gelu_new"}.get(activation, activation)
        return GPTConfig(**shape, dropout=dropout, bias=True, activation=activation)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json; expected a folder that save_pretrained wrote") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: describes no GPT-2 ({type(e).__name__}: {e})") from None


def read_weights(folder):
    """All tensors of a Hugging Face folder, one file or many. Pickled files can hold nothing but tensors."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")
    tensors = {}
    for path in files:
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


def from_nanogpt(out_dir):
    """The Checkpoint in the original nanoGPT's `ckpt.pt`, None where there is no such file in `out_dir`.

    Raises UserError where it is damaged, or more than data.
    """
    path = Path(out_dir) / "ckpt.pt"
    if not path.is_file():
        return None
    found = legacy.read_checkpoint(path)
    try:
        settings, step = found["config"], int(found["iter_num"])
        tokenizer = legacy_tokenizer(settings["dataset"], found["model_args"]["vocab_size"], path)
        config = GPTConfig(**found["model_args"])
        moments = legacy_moments(GPT(config), found["optimizer"]["state"])
        losses = {"val": float(found["best_val_loss"])}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{path}: is no checkpoint of nanoGPT that this version knows ({type(e).__name__}: {e})"
        ) from None
    state = {"step": step, "losses": losses, "best_val_loss": losses["val"]}
    return Checkpoint(path, step, state, asdict(config), tokenizer, settings, {}, (found["model"], moments))


def legacy_moments(model, state):
    """nanoGPT's AdamW state, numbered in its order (matrices first, then vectors), under our names."""
    params = list(model.named_parameters())
    ordered = [n for n, p in params if p.dim() >= 2] + [n for n, p in params if p.dim() < 2]
    return {
        f"{key}.{name}": torch.as_tensor(state[i][key], dtype=torch.float32)
        for i, name in enumerate(ordered)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def legacy_tokenizer(dataset, vocab_size, path):
    """The tokenizer of a nanoGPT model, which lies with its data and not with the model."""
    meta = Path("data") / Path(dataset).name / "meta.pkl"
    if meta.is_file():
        return {"type": "char", "chars": legacy.read_meta(meta)}
    meta = meta.with_suffix(".json")
    if meta.is_file():
        return json.loads(meta.read_text(encoding="utf-8"))["tokenizer"]
    if vocab_size < 50257:
        raise UserError(f"{path}: its characters are in {meta.with_suffix('.pkl')}, which is missing")
    return {"type": "gpt2"}
