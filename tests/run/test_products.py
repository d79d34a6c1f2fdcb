"""The way to multiply on a CPU: measured, exact in float32, remembered, and kept by a resumed run."""

import io
import json
import re
from functools import partial

import pytest
import torch

from nanogpt import kernels
from nanogpt.config import MATMULS, TrainConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint, products

FAST = {"default": 1e11, "onednn": 2e11, "cast": 4e11}


@pytest.fixture
def model():
    return GPT(GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=32, bias=False))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache; returns a function with what it holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: json.loads(products.cache_file().read_text())


def choose(model, dist, **settings):
    """(`--matmul` as it was chosen, the dtype, what was announced)."""
    cfg, dist.out = TrainConfig(**settings), io.StringIO()
    products.choose_products(model, cfg, dist, 32)
    return cfg.matmul, dist.dtype, dist.out.getvalue()


@pytest.mark.parametrize(
    "rates, error, dtype, chosen, is_bfloat16",
    [
        (FAST, 1e-6, "auto", "onednn", False),  # such as AVX-512 without matrix units
        (FAST, 1e-3, "auto", "default", False),  # such as AMX: oneDNN rounds the operands
        (FAST, 1e-6, "bfloat16", "cast", True),
        (FAST | {"cast": 1e11}, 1e-3, "bfloat16", "onednn", True),
        (FAST | {"cast": 1e11}, 1e-6, "bfloat16", "onednn", False),
        (FAST | {"cast": 1e9, "onednn": 1.1e11}, 1e-6, "bfloat16", "default", False),  # such as AVX2
        (FAST | {"onednn": 1.1e11}, 1e-6, "float32", "default", False),  # for so little, no other rounding
    ],
)
def test_the_fastest_way_of_the_right_number_format(monkeypatch, model, dist, rates, error, dtype, chosen, is_bfloat16):
    monkeypatch.setattr(products, "measured", lambda model, tokens: (error, rates))
    found, dtype, printed = choose(model, dist, dtype=dtype)
    assert found == chosen and (dtype == torch.bfloat16) == is_bfloat16
    assert re.match(rf"dtype: {str(dtype)[6:]}, products by .* at [\d,]+ GFLOP/s; .*\(--dtype, --matmul\)\n", printed)
    assert kernels.multiplies_with_onednn() == (chosen != "default")
    assert kernels.casts_to_bfloat16() == (chosen == "cast")


def test_a_way_that_is_named_is_taken(monkeypatch, model, dist):
    monkeypatch.setattr(products, "measured", lambda model, tokens: (1e-6, FAST))
    assert choose(model, dist, matmul="default")[0] == "default"


def test_a_way_that_is_not_exact_here_is_not_kept_in_float32(monkeypatch, model, dist):
    monkeypatch.setattr(products, "measured", lambda model, tokens: (1e-3, FAST))
    chosen, _, printed = choose(model, dist, matmul="onednn")
    assert chosen == "default" and printed.startswith("matmul: not oneDNN's, as in the run so far, because on this CPU")


def test_what_was_measured_is_remembered(monkeypatch, model, cache):
    error, rates = products.measured(model, 32)
    assert list(rates) == list(MATMULS) and all(rate > 1e6 for rate in rates.values())
    assert list(cache().values()) == [[error, *rates.values()]]
    monkeypatch.setattr(products, "measure", lambda *args: pytest.fail("it was measured again"))
    assert products.measured(model, 32) == (error, rates)


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": [1.0]}', '{"a": ["x", 1.0, 1.0, 1.0]}', "\0"])
def test_a_damaged_memory_is_measured_again(model, cache, damage):
    products.cache_file().parent.mkdir(parents=True)
    products.cache_file().write_text(damage)
    products.measured(model, 32)
    assert len(cache()) == 1


def test_float32_products_of_the_default_library_would_pass_as_exact(monkeypatch):
    monkeypatch.setattr(kernels, "use_matmul", lambda name: None)
    assert products.inexactness(1024) < products.EXACT
    monkeypatch.setattr(kernels, "linear", lambda x, w: (x.bfloat16() @ w.bfloat16().mT).float())
    assert products.inexactness(16) > 10 * products.EXACT


def test_a_resumed_run_multiplies_as_before(monkeypatch, run, tmp_path):
    monkeypatch.setattr(products, "measured", lambda model, tokens: (1e-6, FAST))
    run("--max_iters=4", "--out_dir=half")
    monkeypatch.setattr(products, "measured", lambda model, tokens: (1e-6, FAST | {"onednn": 1e9}))
    printed = run("--init_from=resume", "--out_dir=half", "--max_iters=8")
    assert "dtype: float32, products by oneDNN at 1 GFLOP/s (--matmul)\n" in printed
    assert checkpoint.peek("half").settings["matmul"] == "onednn"


def test_cast_needs_bfloat16(run_door):
    done = run_door("train.py", "--matmul=cast", "--dtype=float32")
    assert done.returncode == 2
    assert done.stderr == "error: --matmul=cast: multiplies in bfloat16, and dtype is float32\n"


def test_under_a_memory_limit_running_out_of_it_is_an_error_not_a_crash(start):
    code = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**36, 2**36))"
    door = start("--max_iters=1", before=partial(exec, code))
    assert door.end() == 0 and "\nmatmul: default, because ulimit" in "\n" + door.printed
