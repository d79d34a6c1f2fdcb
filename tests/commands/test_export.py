"""`nanogpt export`: what it writes, compares and reports."""

import sys

import pytest
import torch
from support import SMALL

from nanogpt import train
from nanogpt.commands import export, sample
from nanogpt.config import RunFailed, UserError
from nanogpt.formats import hugging_face


@pytest.fixture
def trained(tiny, monkeypatch, capsys):
    """A trained run in out/."""
    monkeypatch.chdir(tiny.parent.parent)
    train.main([*SMALL, "--max_iters=20", "--lr_decay_iters=20", "--eval_interval=20"])
    capsys.readouterr()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_export_writes_compares_and_reports(tiny, monkeypatch, capsys, architecture):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tiny.parent.parent)
    train.main([*SMALL, f"--architecture={architecture}"])
    capsys.readouterr()
    export.main(["--to=hf/mine"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("model: out/checkpoints/step-")
    assert said[1] == "wrote hf/mine: the model and its tokenizer"
    assert said[2].startswith("largest logit difference to transformers: ") and len(said) == 3
    assert float(said[2].split(": ")[1].split(";")[0]) < 1e-4


def test_an_exported_model_generates_the_same_text(trained, capsys):
    export.main(["--to=hf"])
    capsys.readouterr()
    options = ["--device=cpu", "--num_samples=2", "--max_new_tokens=40", "--start=The"]
    texts = []
    for origin in ("--out_dir=out", "--init_from=hf"):
        sample.main([*options, origin])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 80


def test_a_difference_is_an_error(trained, monkeypatch):
    monkeypatch.setattr(export, "compare", lambda *args: ("transformers", 0.1, 10.0))
    with pytest.raises(RunFailed, match="do not use it"):
        export.main(["--to=hf"])


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_without_transformers_our_own_reader_is_compared(tiny, monkeypatch, capsys, architecture):
    monkeypatch.chdir(tiny.parent.parent)
    monkeypatch.setitem(sys.modules, "transformers", None)
    train.main([*SMALL, f"--architecture={architecture}"])
    capsys.readouterr()
    export.main(["--to=hf"])
    said = capsys.readouterr().out.splitlines()[2]
    assert said.startswith("largest logit difference to our own reader (transformers is not installed): ")
    assert float(said.split(": ")[1].split(";")[0]) < 1e-4


def test_a_difference_with_our_own_reader_is_an_error(trained, monkeypatch):
    """The files that were written are compared, not the model in memory."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    real = hugging_face.to_hugging_face

    def with_a_slip(model, tok, folder):
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(2)
            done = real(model, tok, folder)
            model.transformer.h[0].mlp.c_fc.weight.div_(2)
        return done

    monkeypatch.setattr(hugging_face, "to_hugging_face", with_a_slip)
    with pytest.raises(RunFailed, match="our own reader .* computes something else from it; do not use it"):
        export.main(["--to=hf"])


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "--to: names the folder to write"),
        (["--to=out"], "--to=out: exists already"),
        (["--to=hf", "--out_dir=elsewhere"], "elsewhere: holds no checkpoint"),
    ],
)
def test_an_error_is_one_line(trained, args, expected):
    with pytest.raises(UserError, match=expected) as caught:
        export.main(args)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
