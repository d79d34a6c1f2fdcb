"""The recipes of docs/changing.md: each patch applies to a copy of the repository, trains there, and has its effect."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import SMALL, metrics, tiny_text

from nanogpt.run import checkpoint
from nanogpt.text.dataset import write_dataset
from nanogpt.text.tokenizer import CharTokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "changing.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.M | re.S))
MODERN = ["--architecture=qwen3", "--eval_interval=100", "--max_iters=3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the dataset `tiny` in data/, beside copies of the repository."""
    place = tmp_path_factory.mktemp("changing")
    text = tiny_text()
    tokenizer = CharTokenizer.train(text)
    write_dataset(place / "data" / "tiny", tokenizer, tokenizer.encode(text[:-800]), tokenizer.encode(text[-800:]))
    return place


def train(tree, out, *args):
    """Train in a copy of the repository; what was printed, and the records of metrics.jsonl."""
    root = [] if any(a.startswith("--root=") for a in args) else [f"--root={tree.parent}/data"]
    command = [sys.executable, "train.py", *SMALL, *root, f"--out_dir={out}", *args]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600, env=environment(tree))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, metrics(out)


def environment(tree):
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return os.environ | ours


@pytest.fixture(scope="module")
def plain(place):
    """A run of the unchanged program: its folder and its records."""
    _, records = train(patched(place, None), place / "out-plain", *MODERN)
    return place / "out-plain", records


def patched(place, heading):
    """A copy of the repository, with the recipe's patch applied if there is one."""
    tree = place / (heading or "unchanged").lower().replace(" ", "-")
    for name in ("nanogpt", "data"):
        left_out = shutil.ignore_patterns("__pycache__", "*.bin", "meta.json", "input.txt")
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for door in ("train.py", "sample.py"):
        shutil.copy(ROOT / door, tree)
    if heading:
        command = ["git", "apply", "--whitespace=error-all", "-"]
        result = subprocess.run(
            command, cwd=tree, input=RECIPES[heading], capture_output=True, text=True, env=environment(tree)
        )
        assert result.returncode == 0, result.stderr
    return tree


def weights(out):
    return (checkpoint.newest(out).folder / "model.safetensors").read_bytes()


def test_the_table_counts_the_patches():
    rows = re.findall(r"^\| \[(.+?)\]\(#.+?\) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
    assert [heading for heading, *_ in rows] == list(RECIPES) and len(rows) == 8
    for heading, *numbers in rows:
        lines = RECIPES[heading].splitlines()
        added = [line for line in lines if line.startswith("+") and not line.startswith("+++ ")]
        removed = [line for line in lines if line.startswith("-") and not line.startswith("--- ")]
        files = [line for line in lines if line.startswith("+++ ")]
        assert [int(n) for n in numbers] == [len(files), len(added), len(removed)], heading
        assert len(files) <= (3 if heading == "An architecture" else 2)


def test_another_attention(place, plain):
    out = place / "out-attention"
    _, records = train(patched(place, "Another attention"), out, *MODERN)
    assert len(weights(out)) - len(weights(plain[0])) > 2 * 16 * 16 * 4  # a matrix more in each of two blocks
    assert records[-1]["exact_loss"] != plain[1][-1]["exact_loss"]


def test_an_optimizer(place):
    """A run that is stopped and resumed ends with the same weights."""
    tree, args = patched(place, "An optimizer"), ["--optimizer=nadam", "--eval_interval=2"]
    whole, parts = place / "out-nadam", place / "out-nadam-parts"
    _, records = train(tree, whole, *args, "--max_iters=4")
    assert records[-1]["exact_loss"] < records[0]["val_loss"]
    train(tree, parts, *args, "--max_iters=2")
    said, _ = train(tree, parts, "--init_from=resume", "--max_iters=4")
    assert "resuming" in said
    assert weights(whole) == weights(parts)


def test_a_schedule(place):
    tree, out = patched(place, "A learning rate schedule"), place / "out-schedule"
    _, records = train(tree, out, *MODERN, "--lr_schedule=inverse_sqrt", "--warmup_iters=1", "--min_lr=0.0")
    rates = [r["lr"] for r in records if "grad_norm" in r]
    assert rates == pytest.approx([0.005, 0.01, 0.01 * (2 / 3) ** 0.5])


def test_a_loss_term(place, plain):
    """The weights change; what is reported before the first update does not."""
    out = place / "out-z-loss"
    _, records = train(patched(place, "A loss term"), out, *MODERN)
    assert [r["loss"] for r in records if "loss" in r][0] == [r["loss"] for r in plain[1] if "loss" in r][0]
    assert {k: records[0][k] for k in ("step", "train_loss", "val_loss")} == {
        k: plain[1][0][k] for k in ("step", "train_loss", "val_loss")
    }
    assert weights(out) != weights(plain[0])


def test_a_dataset(place):
    tree = patched(place, "A dataset")
    (tree / "program.py").write_text("print('hello')\n" * 300)
    command = [sys.executable, "data/python/prepare.py", "program.py", "--trial=False"]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600, env=environment(tree))
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tree / "data/python/meta.json").read_text())["vocab_size"] == 257
    _, records = train(tree, place / "out-python", *MODERN, "--root=data", "--dataset=python")
    assert records[-1]["exact_loss"] < 5.6  # nats; guessing among 257 bytes is 5.55


def test_an_architecture(place, plain):
    """It trains and writes, and checkpoints from before its fields existed load."""
    tree, out = patched(place, "An architecture"), place / "out-parallel"
    train(tree, out, "--architecture=parallel", "--logit_cap=30", "--max_iters=3")
    shape = checkpoint.newest(out).model_config
    assert (shape["architecture"], shape["logit_cap"]) == ("parallel", 30.0)
    command = [
        sys.executable,
        "sample.py",
        f"--out_dir={out}",
        "--device=cpu",
        "--num_samples=2",
        "--max_new_tokens=24",
    ]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600, env=environment(tree))
    assert result.returncode == 0 and result.stdout.count("---------------") >= 2, result.stdout + result.stderr
    before = place / "out-before"
    shutil.copytree(plain[0], before)
    said, _ = train(tree, before, "--init_from=resume", "--max_iters=4")
    assert "resuming" in said and checkpoint.newest(before).step == 4


def test_a_metric(place, plain):
    out = place / "out-metric"
    _, records = train(patched(place, "A metric"), out, *MODERN)
    steps = [r for r in records if "grad_norm" in r]
    assert all(0 < r["grad_norm_0"] < r["grad_norm"] and r["grad_norm_1"] > 0 for r in steps) and steps
    assert weights(out) == weights(plain[0])


def test_a_setting(place, plain):
    tree, out = patched(place, "A setting"), place / "out-setting"
    train(tree, out, *MODERN, "--adam_eps=1.0")
    assert weights(out) != weights(plain[0])
    assert json.loads((out / "config.json").read_text())["settings"]["adam_eps"] == 1.0
