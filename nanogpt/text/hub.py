"""Models on Hugging Face's hub: `download` brings one, or finds it in the cache of huggingface_hub."""

from pathlib import Path

from nanogpt.config import GPT2_NAMES, HUB, UserError, installs

WEIGHTS = ["model*.safetensors"]
TOKENIZER = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"]


def download(name: str, weights: bool = True) -> Path:
    """The local folder of one of GPT-2's models, or of hf:OWNER/NAME, without or with its weights.

    Raises UserError if it cannot be downloaded.
    """
    ours = name in GPT2_NAMES  # whose tokenizer is known here
    repository = f"openai-community/{name}" if ours else name.removeprefix(HUB)
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        extras = "gpt2,hf" if ours else "hf"
        raise UserError(f"{name}: downloading it takes huggingface_hub; {installs(extras)} brings it") from None
    patterns = ["config.json", "model.safetensors"] if ours else TOKENIZER + (WEIGHTS if weights else [])
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as e:  # of many kinds: network, hub, disk
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{name}: cannot be downloaded ({reason}); a local folder in Hugging Face's format works too"
        ) from None
