"""GPT-2 by name, downloaded from Hugging Face's hub, or any model in a local folder of theirs."""

from pathlib import Path

from nanogpt.config import GPT2_NAMES, UserError, installs
from nanogpt.formats import hugging_face
from nanogpt.model import GPT
from nanogpt.text import hugging_face_tokenizer


def from_pretrained(name_or_folder: str | Path, dropout: float = 0.0) -> GPT:
    """A GPT with pretrained weights, on the CPU.

    name_or_folder: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`, which huggingface_hub downloads and caches, or a
    folder that `hugging_face.load` reads. Raises UserError if it is none of them.
    """
    named = str(name_or_folder) in GPT2_NAMES
    return hugging_face.load(download(str(name_or_folder)) if named else Path(name_or_folder), dropout)


def read_tokenizer(name_or_folder: str | Path) -> dict:
    """The tokenizer, as JSON, of a model that `from_pretrained` reads. Raises UserError if its folder has none."""
    if str(name_or_folder) in GPT2_NAMES:
        return {"type": "gpt2"}
    return hugging_face_tokenizer.read(name_or_folder)


def download(name: str) -> Path:
    """The local folder of one of OpenAI's models. Raises UserError if it cannot be downloaded."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise UserError(f"{name}: downloading it takes huggingface_hub; {installs('gpt2,hf')} brings it") from None
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]))
    except Exception as e:  # of many kinds: network, hub, disk
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{name}: cannot be downloaded ({reason}); a local folder in Hugging Face's format works too"
        ) from None
