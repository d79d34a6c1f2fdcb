"""`nanogpt export`: what it writes, compares and reports."""

import sys
from pathlib import Path

import pytest
import torch
from support import SMALL

from nanogpt import train
from nanogpt.commands import export, sample
from nanogpt.config import RunFailed, UserError
from nanogpt.formats import hugging_face
from nanogpt.formats.compare import Difference


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
    monkeypatch.setattr(export, "compare", lambda *args: ("transformers", Difference(0.1, 10.0)))
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

    def with_a_slip(model, *others):
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(2)
            done = real(model, *others)
            model.transformer.h[0].mlp.c_fc.weight.div_(2)
        return done

    monkeypatch.setattr(hugging_face, "to_hugging_face", with_a_slip)
    with pytest.raises(RunFailed, match="our own reader .* computes something else from it; do not use it"):
        export.main(["--to=hf"])


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "--to: names the folder or the .gguf file to write"),
        (["--to=out"], "--to=out: exists already"),
        (["--to=out/config.gguf"], "--to=out/config.gguf: out/config.gguf exists already"),
        (["--to=hf", "--dtype=int8"], "--dtype=int8: expected one of float32, bfloat16, float16"),
        (["--to=hf", "--out_dir=elsewhere"], "elsewhere: holds no checkpoint"),
    ],
)
def test_an_error_is_one_line(trained, args, expected):
    Path("out/config.gguf").touch()
    with pytest.raises(UserError, match=expected) as caught:
        export.main(args)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("activation", [[], ["--architecture=qwen3"]], ids=["gelu", "swiglu"])
def test_a_gguf_file_is_written_and_the_way_into_ollama_is_said(tiny, monkeypatch, capsys, activation):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tiny.parent.parent)
    train.main([*SMALL, *activation])
    capsys.readouterr()
    export.main(["--to=made/tiny.gguf"])
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "wrote made/tiny.gguf: the model and its tokenizer"
    assert said[2].startswith("largest logit difference to the file, read again: 0.0e+00; the largest logit is ")
    assert any("approximates GELU by tanh" in line for line in said) == (not activation)
    assert said[-1] == "to use it in Ollama: ollama create tiny -f made/tiny.Modelfile"
    assert sorted(path.name for path in Path("made").iterdir()) == ["tiny.Modelfile", "tiny.gguf"]


@pytest.mark.parametrize("to", ["half", "half.gguf"])
def test_half_precision_is_announced_by_the_difference_that_it_makes(trained, capsys, to):
    export.main([f"--to={to}", "--dtype=float16"])
    line = capsys.readouterr().out.splitlines()[2]
    assert 1e-6 < float(line.split(": ")[1].split(";")[0]) < 1e-1


def test_the_card_says_what_the_model_is(trained):
    export.main(["--to=hf/tiny", "--dtype=bfloat16"])
    card = Path("hf/tiny/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# tiny" in card
    for fact in ("dataset `tiny`", "Step 20: train loss ", "val loss ", "- `n_embd = 16`", "Context: 16", "bfloat16"):
        assert fact in card
    assert "out_dir" not in card


def test_a_model_that_was_not_trained_here_keeps_its_origin(trained):
    export.main(["--to=hf"])
    export.main(["--init_from=hf", "--to=again"])
    assert "its weights are those of `hf`" in Path("again/README.md").read_text()
