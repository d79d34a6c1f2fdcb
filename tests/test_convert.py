"""`nanogpt export` as a person uses it."""

import pytest
from conftest import SMALL

from nanogpt import convert, sample, train
from nanogpt.config import RunFailed, UserError


@pytest.fixture
def trained(tiny, monkeypatch, capsys):
    """A trained run in out/."""
    monkeypatch.chdir(tiny.parent.parent)
    train.main([*SMALL, "--max_iters=20", "--lr_decay_iters=20", "--eval_interval=20"])
    capsys.readouterr()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_it_writes_compares_and_says_so(tiny, monkeypatch, capsys, architecture):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tiny.parent.parent)
    train.main([*SMALL, f"--architecture={architecture}"])
    capsys.readouterr()
    convert.main(["--to=hf/mine"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("model: out/checkpoints/step-")
    assert said[1] == "wrote hf/mine: the model and its tokenizer"
    assert said[2].startswith("largest logit difference to transformers: ") and len(said) == 3
    assert float(said[2].split(": ")[1].split(";")[0]) < 1e-4


def test_what_was_exported_writes_the_same_text(trained, capsys):
    convert.main(["--to=hf"])
    capsys.readouterr()
    options = ["--device=cpu", "--num_samples=2", "--max_new_tokens=40", "--start=The"]
    texts = []
    for origin in ("--out_dir=out", "--init_from=hf"):
        sample.main([*options, origin])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 80


def test_a_difference_is_an_error(trained, monkeypatch):
    monkeypatch.setattr(convert, "compare", lambda *args: (0.1, 10.0))
    with pytest.raises(RunFailed, match="do not use it"):
        convert.main(["--to=hf"])


def test_without_transformers_it_says_that_nothing_was_compared(trained, monkeypatch, capsys):
    def missing(*args):
        raise ModuleNotFoundError("transformers")

    monkeypatch.setattr(convert, "compare", missing)
    convert.main(["--to=hf"])
    assert "compared with nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "--to: names the folder to write"),
        (["--to=out"], "--to=out: exists already"),
        (["--to=hf", "--out_dir=elsewhere"], "elsewhere: holds no checkpoint"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(trained, args, expected):
    with pytest.raises(UserError, match=expected) as caught:
        convert.main(args)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
