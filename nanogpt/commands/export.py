"""Write a trained model for other programs, and compare the logits of what was written with the original's.

`--to=NAME.gguf` makes a file for llama.cpp and Ollama, `--to=FOLDER` Hugging Face's format. The file is run by llama.cpp if
llama-cpp-python is installed. The folder is read by transformers if it is installed, otherwise by our own reader.
"""

import importlib.util
import sys
from contextlib import closing
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
    if (run := llama_difference(found.model, found.tokenizer.vocab_size, cfg.to)) is not None:
        print(f"largest logit difference to llama.cpp: {run}")
        if not run.allowed("bfloat16" if cfg.dtype == "bfloat16" else "float16"):  # its tables are in half precision
            raise RunFailed(f"{cfg.to}: llama.cpp computes something else from it; do not use it")
    print(f"to use it in Ollama: {gguf.create_command(cfg.to)}")


def gelu_difference(model: GPT) -> Difference | None:
    """What the tanh approximation of GELU does to the logits; None if the model has it anyway, or no GELU."""
    if model.config.architecture != "gpt2" or model.config.activation != "gelu":
        return None
    other, V = GPT(replace(model.config, activation="gelu_new")), model.config.vocab_size
    other.load_weights(dict(model.named_parameters()))
    idx = comparing.context(model, V)
    return comparing.difference(comparing.logits(other, idx, V), comparing.logits(model, idx, V))


@torch.inference_mode()
def llama_difference(model: GPT, V: int, path: str) -> Difference | None:
    """How far llama.cpp's logits are from the model's, over `compare.context`; None if llama-cpp-python is not installed."""
    if not importlib.util.find_spec("llama_cpp"):
        return None
    import llama_cpp

    idx = comparing.context(model, V)
    T, exact = idx.shape[1], llama_cpp.GGML_TYPE_F32
    options = dict(n_ctx=T, logits_all=True, type_k=exact, type_v=exact, flash_attn=False, verbose=False)
    with closing(llama_cpp.Llama(path, n_gpu_layers=0, **options)) as theirs:
        theirs.eval(idx[0].tolist())
        found = torch.tensor(theirs.scores[:T, :V])
    return comparing.difference(found, comparing.logits(model, idx, V)[0])


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
    """(what read the folder, how far its logits are from the model's), over `compare.context` and in float32."""
    idx = comparing.context(model, V)
    expected = comparing.logits(model, idx, V)
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        reader, theirs = "transformers", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = theirs(idx).logits[..., :V]  # a published model may have more rows than tokens
    else:
        reader = "our own reader (transformers is not installed)"
        found = comparing.logits(hugging_face.load(Path(folder)), idx, V)
    return reader, comparing.difference(found, expected)
