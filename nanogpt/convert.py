"""Write a trained model in Hugging Face's format, for every program that reads it, and compare the two."""

import sys

import torch

from nanogpt import config, export, trained
from nanogpt.config import ExportConfig, RunFailed, UserError
from nanogpt.distributed import Dist

CLOSE = 1e-3  # that much of the largest logit may differ, by rounding; it is about 1e-6


def main(argv):
    """`nanogpt export`, given its arguments."""
    cfg = config.load(ExportConfig, argv, "nanogpt export")
    if not cfg.to:
        raise UserError("--to: names the folder to write, and is needed")
    found = trained.load(cfg, Dist(torch.device("cpu"), torch.float32, out=sys.stdout))
    model, tok = found.model.eval(), found.tokenizer
    export.to_hugging_face(model, tok, cfg.to)
    print(f"wrote {cfg.to}: the model and its tokenizer")
    try:
        difference, largest = compare(model, tok.vocab_size, cfg.to)
    except ModuleNotFoundError:
        print('compared with nothing: that takes transformers (pip install -e ".[test]" brings it)')
        return
    print(f"largest logit difference to transformers: {difference:.1e}; the largest logit is {largest:.1f}")
    if not difference <= CLOSE * largest:
        raise RunFailed(f"{cfg.to}: transformers computes something else from it; do not use it")


@torch.inference_mode()
def compare(model, V, folder):
    """(the largest difference, the largest of all) of the logits here and of transformers' own, over a full context."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.randint(V, (1, model.config.block_size), generator=torch.Generator().manual_seed(0))
    expected = model(idx, idx)[0][..., :V]
    return (theirs(idx).logits - expected).abs().max().item(), expected.abs().max().item()
