"""Published models: GPT-2 and hf:OWNER/NAME, downloaded from Hugging Face's hub, or any in a local folder of theirs."""

from pathlib import Path

from nanogpt.config import GPT2_NAMES, is_published
from nanogpt.formats import hugging_face
from nanogpt.model import GPT, GPTConfig
from nanogpt.text import hub, hugging_face_tokenizer


def from_pretrained(name_or_folder: str | Path, dropout: float = 0.0) -> GPT:
    """A GPT with pretrained weights, on the CPU.

    name_or_folder: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` or hf:OWNER/NAME, which huggingface_hub downloads and
    caches, or a folder that `hugging_face.load` reads. Raises UserError if it is none of them.
    """
    return hugging_face.load(folder_of(name_or_folder), dropout)


def read_config(name_or_folder: str | Path) -> GPTConfig:
    """The GPTConfig of a model that `from_pretrained` reads."""
    return hugging_face.read_config(folder_of(name_or_folder))


def read_tokenizer(name_or_folder: str | Path) -> dict:
    """The tokenizer, as JSON, of a model that `from_pretrained` reads. Raises UserError if its folder has none."""
    if str(name_or_folder) in GPT2_NAMES:
        return {"type": "gpt2"}
    return hugging_face_tokenizer.read(folder_of(name_or_folder))


def folder_of(name_or_folder: str | Path) -> Path:
    """The folder of a model, which is downloaded if it is not a local one."""
    name = str(name_or_folder)
    return hub.download(name) if is_published(name) else Path(name_or_folder)
