"""Write a trained model for other programs, and compare the logits of what was written with the original's.

`--to=NAME.gguf` makes a file for llama.cpp and Ollama, `--to=FOLDER` Hugging Face's format. The folder is read by
transformers if it is installed, otherwise by our own reader of that format.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

from nanogpt.config import ExportConfig, RunFailed, UserError
from nanogpt.formats import card, gguf, hugging_face
from nanogpt.formats import compare as comparing
from nanogpt.formats.compare import Difference
from nanogpt.model import GPT
from nanogpt.run import settings, trained
from nanogpt.run.distributed import Dist
from nanogpt.run.trained import Trained


def main(argv: list[str]) -> None:
    """Run `nanogpt export` with these arguments."""
    cfg = settings.load(ExportConfig, argv, "nanogpt export")
    if not cfg.to:
        raise UserError("--to: names the folder or the .gguf file to write, and is needed")
    found = trained.load(cfg, Dist(torch.device("cpu"), torch.float32, out=sys.stdout))
    found.model.eval()
    (to_gguf if gguf.is_gguf(cfg.to) else to_folder)(found, cfg)


def to_gguf(found: Trained, cfg: ExportConfig) -> None:
    """Write a GGUF file, which is compared before it is there, and say how to use it."""
    difference = gguf.to_gguf(found.model, found.tokenizer, cfg.to, cfg.dtype)
    print(f"wrote {cfg.to}: the model and its tokenizer")
    print(f"largest logit difference to the file, read again: {difference}")
    if (approximate := gelu_difference(found.model)) is not None:
        print(f"llama.cpp approximates GELU by tanh, which changes the logits by up to {approximate}")
    print(f"to use it in Ollama: {gguf.create_command(cfg.to)}")


def gelu_difference(model: GPT) -> Difference | None:
    """What the tanh approximation of GELU does to the logits; None if the model has it anyway, or no GELU."""
    if model.config.architecture != "gpt2" or model.config.activation != "gelu":
        return None
    other, V = GPT(replace(model.config, activation="gelu_new")), model.config.vocab_size
    other.load_weights(dict(model.named_parameters()))
    idx = comparing.context(model, V)
    return comparing.difference(comparing.logits(other, idx, V), comparing.logits(model, idx, V))


def to_folder(found: Trained, cfg: ExportConfig) -> None:
    """Write a folder in Hugging Face's format, and compare it."""
    text = card.card(found, Path(cfg.to).resolve().name, cfg.dtype)
    hugging_face.to_hugging_face(found.model, found.tokenizer, cfg.to, cfg.dtype, text)
    print(f"wrote {cfg.to}: the model and its tokenizer")
    reader, difference = compare(found.model, found.tokenizer.vocab_size, cfg.to)
    print(f"largest logit difference to {reader}: {difference}")
    if not difference.allowed(cfg.dtype):
        raise RunFailed(f"{cfg.to}: {reader} computes something else from it; do not use it")


@torch.inference_mode()
def compare(model: GPT, V: int, folder: str) -> tuple[str, Difference]:
    """(what read the folder, how far its logits are from the model's), over a full context and in float32."""
    idx = comparing.context(model, V)
    expected = comparing.logits(model, idx, V)
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        reader, theirs = "transformers", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = theirs(idx).logits
    else:
        reader = "our own reader (transformers is not installed)"
        found = comparing.logits(hugging_face.load(Path(folder)), idx, V)
    return reader, comparing.difference(found, expected)
