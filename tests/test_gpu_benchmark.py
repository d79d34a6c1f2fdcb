"""benchmarks/gpu.sh: without a GPU it says so, and DEVICE=cpu tries all its parts."""

import os
import re
import subprocess

import pytest
import torch
from support import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(**env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(["sh", SCRIPT], env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = run(RESULTS=str(tmp_path))
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr.startswith("gpu.sh: PyTorch sees no GPU") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_page_is_complete(tiny, tmp_path):
    more = f"--root={tiny.parent} --dataset=tiny"
    done = run(DEVICE="cpu", RESULTS=str(tmp_path / "results"), MORE=more)
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-gpu-dry-run\.md", page.name) and done.stdout.strip() == str(page)
    head, *parts = page.read_text().split("\n## ")
    assert "PyTorch " + torch.__version__ in head and "commit " in head
    assert "Not measured" not in page.read_text(), page.read_text()
    assert len(parts) == 7 and sum("MFU" in p and "tokens a second" in p and "MiB" in p for p in parts) == 5
    assert sum("median" in part for part in parts) == 1 and sum("| 64 |" in part for part in parts) == 1
