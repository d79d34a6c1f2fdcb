"""From text to token files: tokenizers, sources, and `nanogpt prepare`."""
