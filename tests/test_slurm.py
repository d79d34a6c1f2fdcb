"""recipes/slurm.sh: a shell reads it, and Slurm takes it, where it is installed and runs.

What needs time and a cluster was tried by hand; docs/checkpoints.md says with what result.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanogpt.config import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "slurm.sh"


def slurm_runs():
    """Whether there is a cluster to ask."""
    return bool(shutil.which("sbatch")) and not subprocess.run(["scontrol", "ping"], capture_output=True).returncode


def test_a_shell_can_read_it():
    assert subprocess.run(["sh", "-n", str(RECIPE)], capture_output=True, text=True).stderr == ""


def test_what_it_names_exists():
    text = RECIPE.read_text()
    assert "train.py" in text and (ROOT / "train.py").is_file()
    for config in re.findall(r"config/\w+\.py", text):
        assert (ROOT / config).is_file()
    for flag in re.findall(r"--(\w+)=(?:out\b|auto\b)", text):
        assert hasattr(TrainConfig, flag)


@pytest.mark.skipif(not slurm_runs(), reason="no Slurm cluster runs here; Debian's slurm-wlm makes one of this machine")
def test_slurm_takes_it():
    done = subprocess.run(["sbatch", "--test-only", str(RECIPE)], capture_output=True, text=True)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
