"""Write a trained model in Hugging Face's format, and compare its logits with the original.

The files are read by transformers if it is installed, otherwise by our own reader of that format.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from nanogpt.config import ExportConfig, RunFailed, UserError
from nanogpt.formats import hugging_face
from nanogpt.model import GPT
from nanogpt.run import settings, trained
from nanogpt.run.distributed import Dist

CLOSE = 1e-3  # largest difference by rounding, relative to the largest logit; it is about 1e-6


def main(argv: list[str]) -> None:
    """Run `nanogpt export` with these arguments."""
    cfg = settings.load(ExportConfig, argv, "nanogpt export")
    if not cfg.to:
        raise UserError("--to: names the folder to write, and is needed")
    found = trained.load(cfg, Dist(torch.device("cpu"), torch.float32, out=sys.stdout))
    model, tok = found.model.eval(), found.tokenizer
    hugging_face.to_hugging_face(model, tok, cfg.to)
    print(f"wrote {cfg.to}: the model and its tokenizer")
    reader, difference, largest = compare(model, tok.vocab_size, cfg.to)
    print(f"largest logit difference to {reader}: {difference:.1e}; the largest logit is {largest:.1f}")
    if not difference <= CLOSE * largest:
        raise RunFailed(f"{cfg.to}: {reader} computes something else from it; do not use it")


@torch.inference_mode()
def compare(model: GPT, V: int, folder: str) -> tuple[str, float, float]:
    """(what read the folder, the largest difference between its logits and the model's, the largest logit), over a full context."""
    idx = torch.randint(V, (1, model.config.block_size), generator=torch.Generator().manual_seed(0))
    expected = model(idx, idx)[0][..., :V]
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        reader, found = "transformers", AutoModelForCausalLM.from_pretrained(folder).eval()(idx).logits
    else:
        reader, model = "our own reader (transformers is not installed)", hugging_face.load(Path(folder)).eval()
        found = model(idx, idx)[0]
    return reader, (found - expected).abs().max().item(), expected.abs().max().item()
