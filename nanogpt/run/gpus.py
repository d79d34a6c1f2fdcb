"""GPUs: what their data sheets promise, and how much of it training reaches. MFU and `nanogpt estimate` read this table.

Never imports torch. docs/estimate.md names the sources of what is not from a data sheet.
"""

import difflib
import re
from dataclasses import dataclass

from nanogpt.config import UserError


@dataclass(frozen=True)
class GPU:
    """A GPU as its data sheet has it. One whose memory is 0 is known by its peak only."""

    tflops: float  # dense TFLOP/s in bfloat16, or in float16 if it has no bfloat16
    memory: float = 0.0  # GB
    bandwidth: float = 0.0  # GB/s of its memory
    link: float = 0.0  # GB/s to the GPUs of its node, in one direction: NVLink, or else PCI Express
    network: float = 0.0  # GB/s to other nodes, in one direction: its share of what such nodes usually have


# NVIDIA's data sheets. `network` is 400 or 200 Gbit/s for GPUs of nodes that are built with that, and else an assumption.
# A device is the first whose name occurs in its own.
GPUS = {
    "H200": GPU(989, 141, 4800, 450, 50),
    "H100 PCIe": GPU(756, 80, 2000, 64, 50),
    "H100 NVL": GPU(835, 94, 3900, 64, 50),
    "H100": GPU(989, 80, 3350, 450, 50),
    "H20": GPU(148, 96, 4000, 450, 50),
    "B200": GPU(2250, 192, 8000, 900, 50),
    "GH200": GPU(989, 96, 4000, 450, 50),
    "A100 40GB": GPU(312, 40, 1555, 300, 25),
    "A100": GPU(312, 80, 2000, 300, 25),
    "A800": GPU(312),
    "A40": GPU(150, 48, 696, 32, 3),
    "A30": GPU(165),
    "A10G": GPU(70, 24, 600, 32, 3),
    "A10": GPU(125, 24, 600, 32, 3),
    "A6000": GPU(155, 48, 768, 32, 3),
    "L40S": GPU(362, 48, 864, 32, 3),
    "L40": GPU(181, 48, 864, 32, 3),
    "L4": GPU(121, 24, 300, 32, 3),
    "V100": GPU(125, 16, 900, 150, 3),
    "T4": GPU(65, 16, 320, 16, 3),
    "RTX 4090": GPU(165, 24, 1008, 32, 3),
    "RTX 4080": GPU(98, 16, 717, 32, 3),
    "RTX 3090": GPU(71, 24, 936, 32, 3),
    "RTX 3080": GPU(60, 10, 760, 32, 3),
}


@dataclass(frozen=True)
class Reached:
    """How much of a data sheet a program reaches, and what a node's host takes: one end of a range."""

    products: float  # of the peak, in large matrix products
    attention: float  # of the peak, in fused attention
    memory: float  # of the bandwidth
    network: float  # of links and networks, in collective operations
    exposed: float  # the part of communication that computing never hides
    launch: float  # seconds for the host to start one operation
    copy: float  # GB/s from a GPU to main memory
    disk: float  # GB/s of writing and hashing a checkpoint
    restart: float  # seconds from a failure to the next iteration


SLOW = Reached(
    products=0.55, attention=0.25, memory=0.7, network=0.6, exposed=0.3, launch=10e-6, copy=3, disk=0.5, restart=900
)
FAST = Reached(
    products=0.8, attention=0.5, memory=0.9, network=0.8, exposed=0.05, launch=5e-6, copy=12, disk=2, restart=180
)

HOURS_BETWEEN_FAILURES = 50_700  # of one GPU: 16,384 GPUs for 54 days, 419 unexpected interruptions (Llama 3's run)
RESERVED = 1.5  # GiB of a GPU that CUDA, NCCL and the allocator take


def peak_tflops(device: str) -> float | None:
    """The peak of the device of this name, as PyTorch reports it; None if it is not in the table."""
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop))", device) and "MIG" not in device:
            return gpu.tflops
    return None


def find_gpu(asked: str) -> tuple[str, GPU]:
    """(name, GPU) for a name as one types it: 'h100', 'rtx-4090'. UserError with the nearest name if there is none."""
    names = {plain(name): name for name, gpu in GPUS.items() if gpu.memory}
    if plain(asked) in names:
        name = names[plain(asked)]
        return name, GPUS[name]
    near = difflib.get_close_matches(plain(asked), names, n=1, cutoff=0.5)
    hint = f"; did you mean {flag(names[near[0]])}?" if near else ""
    raise UserError(f"--gpu={asked}: expected one of {', '.join(map(flag, names.values()))}{hint}")


def plain(name: str) -> str:
    """A name without what people write differently."""
    return re.sub(r"[^a-z0-9]|^nvidia", "", name.lower())


def flag(name: str) -> str:
    """A name as it is typed on the command line."""
    return name.lower().replace(" ", "-")
