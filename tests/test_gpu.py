"""Training, evaluation and generation on a GPU: no tensor is on the wrong device. Works without a GPU, see fake_gpu.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

COMPILER = os.environ.get("CXX") or shutil.which("c++")


def compiled(folder):
    """tests/fake_gpu.cpp as a library."""
    built, library = Path(torch.__file__).parent, folder / "fake_gpu.so"
    link = [f"-L{built / 'lib'}", f"-Wl,-rpath,{built / 'lib'}", "-ltorch_cpu", "-lc10"]
    source = ROOT / "tests" / "fake_gpu.cpp"
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", f"-I{built / 'include'}", source, "-o", library, *link]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """What went wrong in each case: {name: traceback, or ""}."""
    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("this PyTorch is built for GPUs, and there is none; the fake one needs a build for CPUs")
    if not torch.cuda.is_available() and not COMPILER:
        pytest.skip("there is neither a GPU nor a C++ compiler")
    library = [] if torch.cuda.is_available() else [compiled(tmp_path_factory.mktemp("fake_gpu"))]
    command = [sys.executable, ROOT / "tests" / "fake_gpu.py", *library]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["gpt2, adamw", "gpt2, muon", "qwen3, adamw", "qwen3, muon", "lora"])
def test_trains_and_evaluates(wrong, kind):
    """In float32, bfloat16 and float16, with dropout, and with activation checkpointing."""
    all_well(wrong, kind)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumes(wrong, optimizer):
    all_well(wrong, f"resumed, {optimizer}")


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_generates(wrong, architecture):
    """With a KV cache, longer than the context, several rows, and all options of a request."""
    all_well(wrong, f"generate, {architecture}")


def all_well(wrong, kind):
    cases = {name: problem for name, problem in wrong.items() if name.startswith(kind)}
    assert cases and not any(cases.values()), "\n".join(
        f"{name}: {problem}" for name, problem in cases.items() if problem
    )


def test_a_tensor_elsewhere_is_found(wrong):
    assert "same device" in wrong["a stray tensor"] and "cuda:0 and cpu" in wrong["a stray tensor"]
