"""The state that one process of several holds of a sharded model, with real tensors: no training, no other processes.

    python benchmarks/shards.py [PROCESSES] [RANK] --n_layer=48 --n_head=25 --n_embd=1600 --bias=True --vocab_size=50257

Builds the shards and the optimizer as a run does. PyTorch's `fake` backend stands for the other processes: what it gathers
is not data, but shapes and memory are those of a real one. Prints MiB, and the resident memory of the whole process.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nanogpt  # noqa: F401  (before PyTorch: it says how the threads wait)

# isort: split
import torch
import torch.distributed as td
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanogpt import optim
from nanogpt.config import BenchConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import memory, settings, start
from nanogpt.run.distributed import Dist
from nanogpt.run.shards import Shards


def main(argv: list[str]) -> None:
    """Print what the process of this rank holds: its weights, gradients, and moments."""
    processes, rank = (int(a) for a in argv[:2])
    cfg = settings.load(BenchConfig, argv[2:], "benchmarks/shards.py")
    td.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    dist = Dist(torch.device("cpu"), torch.float32, rank, rank, processes, shards=Shards(processes, 1, rank))
    with torch.device("meta"):  # as on all ranks but 0, which draws or reads the weights
        model = GPT(GPTConfig(**start.shape(cfg), vocab_size=cfg.vocab_size))
    dist.place(model)
    optimizer = optim.make_optimizer(model, cfg, dist)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.zeros_like(p)  # the form in which FSDP2 leaves them
    held = {
        "weights": [optim.local(p) for p in params],
        "gradients": [optim.local(p.grad) for p in params],
        "moments": [optim.local(t) for t in optim.state_tensors(model, optimizer).values()],
    }
    print(f"{sum(p.numel() for p in params):,} parameters, {cfg.optimizer}, process {rank} of {processes}: MiB")
    sizes = {name: sum(t.nbytes for t in tensors) / 2**20 for name, tensors in held.items()}
    for name, size in (sizes | {"together": sum(sizes.values())}).items():
        print(f"{name:<10} {size:10,.1f}")
    print(f"{'resident':<10} {memory.peak_memory(dist.device) / 2**20:10,.1f}  at the most, PyTorch included")
    td.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
