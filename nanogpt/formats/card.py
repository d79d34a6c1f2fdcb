"""The model card, README.md, of an exported model: what it is, what it learnt from, its losses, and how to load it."""

import dataclasses

from nanogpt.config import TrainConfig
from nanogpt.run.trained import Trained

METADATA = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanogpt
---
"""
LOAD = """```python
from transformers import pipeline

generate = pipeline("text-generation", "PATH/TO/THIS/FOLDER")
print(generate("Once", max_new_tokens=100)[0]["generated_text"])
```"""


def card(found: Trained, name: str, dtype: str) -> str:
    """The text of the card of a model that is exported under `name`, in Markdown."""
    config, kind = found.model.config, found.tokenizer_json["type"]
    look = dict(gpt2="GPT-2's", qwen3="Qwen3's", llama="Llama's")[config.architecture]
    facts = [
        f"# {name}",
        f"A language model of {found.model.num_params(non_embedding=False) / 1e6:.2f}M parameters, made with NanoGPT. It "
        f"continues a text; it was not taught to follow instructions.",
        f"- Architecture: {look}, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels",
        f"- Context: {config.block_size} tokens",
        f"- Tokenizer: {kind}, {found.tokenizer.vocab_size} tokens",
        f"- Weights: {dtype}",
    ]
    parts = ["\n".join([*facts[:1], "", facts[1], "", *facts[2:]]), *training(found), f"## Use\n\n{LOAD}"]
    return METADATA + "\n" + "\n\n".join(parts) + "\n"


def training(found: Trained) -> list[str]:
    """The sections about data, losses, and settings; of a model that was not trained here only where it is from."""
    if found.checkpoint is None:
        return [f"## Training\n\nNot trained here: its weights are those of `{found.folder}`."]
    settings, losses = found.settings, found.checkpoint.state.get("losses") or {}
    said = [f"{split} loss {loss:.4f}" for split, loss in losses.items()]
    lines = [f"Step {found.checkpoint.step}" + (f": {', '.join(said)}, in nats per token." if said else ".")]
    if start := settings.get("init_from"):
        lines.append(f"Started from `{start}`." if start not in ("scratch", "auto", "resume") else "")
    return [
        f"## Data\n\nThe dataset `{settings.get('dataset', 'unknown')}`.",
        f"## Losses\n\n{' '.join(filter(None, lines))}",
        "## Settings\n\nThose that differ from NanoGPT's defaults:\n\n" + "\n".join(changed(settings)),
    ]


def changed(settings: dict) -> list[str]:
    """A line for each setting of the run that has not its default, except folders and where it was logged to."""
    ours = [f for f in dataclasses.fields(TrainConfig) if not f.metadata["path"] and not f.name.startswith("wandb_")]
    return [f"- `{f.name} = {settings[f.name]!r}`" for f in ours if settings.get(f.name, f.default) != f.default]
