"""Files of the original nanoGPT, `ckpt.pt` and `meta.pkl`, read without running what may be in them."""

import pickle
from pathlib import Path

import torch

from nanogpt.config import UserError


class NoNames(pickle.Unpickler):
    """Unpickles numbers, text, lists and dictionaries; anything that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise UserError(f"it asks for {module}.{name}, and a file that runs code is not read")


def read_meta(path: str | Path) -> list[str]:
    """The characters of nanoGPT's `meta.pkl`, in the order of their ids. Raises UserError if it is anything else."""
    try:
        with open(path, "rb") as f:
            meta = NoNames(f).load()
        itos = meta["itos"]
        chars = [itos[i] for i in range(len(itos))]
        if not all(isinstance(c, str) and len(c) == 1 for c in chars):
            raise ValueError("its tokens are not characters")
        return chars
    except Exception as e:  # a broken pickle can fail in any way
        raise UserError(f"{path}: refused: {e or type(e).__name__}") from None


def read_checkpoint(path: str | Path) -> dict:
    """nanoGPT's `ckpt.pt` as a dictionary, its weights under plain names. Raises UserError if it is anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle's, torch's and zipfile's errors have no common ancestor
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{path}: refused: it is cut short, or holds more than tensors and numbers ({reason[:200]})"
        ) from None
    try:
        model = {name.removeprefix("_orig_mod."): t for name, t in found["model"].items()}
        model.pop("lm_head.weight", None)  # tied to the token embedding
        model = {name: t for name, t in model.items() if not name.endswith(".attn.bias")}  # the causal mask
        if not all(isinstance(t, torch.Tensor) for t in model.values()):
            raise ValueError("its weights are no tensors")
        return found | {"model": model}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(f"{path}: is no checkpoint of nanoGPT ({type(e).__name__}: {e})") from None
