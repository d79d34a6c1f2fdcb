"""Compare the arithmetic of `nanogpt estimate` with published runs: prints the table of docs/estimate.md."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nanogpt.run.forecast import Job, iteration  # noqa: E402
from nanogpt.run.gpus import FAST, GPUS, SLOW  # noqa: E402
from nanogpt.shape import GPTConfig  # noqa: E402

LLAMA = GPTConfig(
    8192, 128256, n_layer=32, n_head=32, n_embd=4096, n_kv_head=8, n_hidden=14336, rope_theta=5e5, norm_gain=True,
    tied=False, bias=False, architecture="llama", norm_eps=1e-5,
)  # fmt: skip
H100, A100 = GPUS["H100"], GPUS["A100"]
# torchtitan's H100 have slower memory and 500 W; their peak is "between SXM and NVL", so the lower of the two
THEIRS = replace(H100, tflops=GPUS["H100 NVL"].tflops, memory=96, bandwidth=2400)


def gpt2(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    """A GPT-2 of this size."""
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def nanochat(depth: int, vocab_size: int) -> GPTConfig:
    """The nearest to nanochat's model of this depth: 64 channels a layer, heads of 128, SwiGLU for its squared ReLU."""
    heads, width = depth // 2, 64 * depth
    return GPTConfig(
        2048, vocab_size, n_layer=depth, n_head=heads, n_embd=width, tied=False, bias=False, architecture="qwen3"
    )


def titan(gpus: int, measured: float, compiled: bool) -> tuple[Job, float]:
    """A run of torchtitan's: two sequences per GPU, tokens per second and GPU."""
    return Job(LLAMA, 2 * gpus, 2, gpus, THEIRS, shard="full", compiled=compiled), measured * gpus


RUNS = {  # {name: (Job, tokens per second)}
    "torchtitan, Llama 3.1 8B, 8 H100, eager": titan(8, 5762, False),
    "torchtitan, Llama 3.1 8B, 8 H100, compiled": titan(8, 6667, True),
    "torchtitan, Llama 3.1 8B, 128 H100, eager": titan(128, 5605, False),
    "torchtitan, Llama 3.1 8B, 128 H100, compiled": titan(128, 6514, True),
    "torchtitan, Llama 3 8B, 64 A100": (Job(LLAMA, 64, 1, 64, A100, shard="full", compiled=False), 2973 * 64),
    "llm.c, GPT-2 124M, 8 A100": (Job(gpt2(12, 12, 768), 512, 64, 8, A100), 524288 / 0.300),
    "llm.c, GPT-2 350M, 8 A100": (Job(gpt2(24, 16, 1024), 512, 64, 8, A100), 524288 / 0.820),
    "llm.c, GPT-2 1558M, 8 H100": (Job(gpt2(48, 25, 1600), 1024, 16, 8, H100), 1048576 / 2.80),
    "nanochat, d20, 8 H100": (Job(nanochat(20, 65536), 256, 32, 8, H100, muon=True), 524288 / 0.487),
    "nanochat, d24, 8 H100": (
        Job(nanochat(24, 32768), 256, 16, 8, H100, muon=True),
        16704 * 524288 / 10949.46713,
    ),
}


def table() -> str:
    """The table in Markdown: measured and estimated speed, and how far the middle of the range is from the measured."""
    lines = ["| Run | Measured, tokens/s | Estimate, tokens/s | Its middle |", "|---|---|---|---|"]
    for name, (job, measured) in RUNS.items():
        low, high = (job.tokens / iteration(job, end).total for end in (SLOW, FAST))
        middle = (low * high) ** 0.5
        lines.append(f"| {name} | {measured:,.0f} | {low:,.0f} to {high:,.0f} | {middle / measured - 1:+.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
