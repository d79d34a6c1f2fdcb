"""What several test files share: a tiny dataset, one process on the CPU, the front doors as subprocesses."""

import os
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from nanogpt.data import write_dataset
from nanogpt.distributed import Dist
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,  # the same examples every time
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and tests may run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def dist():
    """One process, on the CPU, in float32."""
    return Dist(torch.device("cpu"), torch.float32)


def tiny_text(sentences=250, seed=1):
    """Sentences of one pattern: enough structure that a tiny model learns some of it at once."""
    draw = random.Random(seed)
    who, does, where = ("cat", "dog", "fox", "hen"), ("sat", "ran", "hid"), ("mat", "hill", "barn")
    parts = (f"The {draw.choice(who)} {draw.choice(does)} by the {draw.choice(where)}.\n" for _ in range(sentences))
    return "".join(parts)


@pytest.fixture
def tiny(tmp_path):
    """The folder of the dataset `tiny`, one token a character, in tmp_path/data."""
    text = tiny_text()
    tokenizer, cut = CharTokenizer.train(text), len(text) * 9 // 10
    folder = tmp_path / "data" / "tiny"
    write_dataset(folder, tokenizer, tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:]))
    return folder


@pytest.fixture
def run_door(tmp_path):
    """Run a front door in tmp_path as a person would: run_door("train.py", "--device=cpu", RANK="0")."""

    def run(script, *args, timeout=300, **env):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=timeout
        )

    return run
