"""Whole training runs, small ones: what they print, write, resume and refuse."""

import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, SMALL, losses, metrics, torchrun, write_tokenizer

from nanogpt import data, evaluate, train
from nanogpt.commands import cli
from nanogpt.config import TrainConfig, UserError
from nanogpt.model import GPT
from nanogpt.run import checkpoint, plan, settings, start
from nanogpt.text.dataset import open_dataset, write_dataset
from nanogpt.text.tokenizer import CharTokenizer


def final_weights(out_dir="out"):
    return load_file(checkpoint.newest(out_dir).folder / "model.safetensors")


def test_a_run_prints_the_lines_that_people_and_scripts_read(run):
    out = run()
    assert re.search(r"^step 4: train loss \d\.\d{4}, val loss \d\.\d{4}$", out, re.M)
    assert re.search(r"^iter 3: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%", out, re.M)
    assert re.search(
        r"^exact val loss \d\.\d{6} over all [\d,]+ validation tokens, perplexity .* bits per byte$", out, re.M
    )


def test_a_run_learns(run):
    run("--max_iters=60", "--lr_decay_iters=60")
    assert losses()[60] < 1.5 < 3 < losses()[1]


def test_exactly_max_iters_updates_and_an_evaluation_at_the_end(run):
    out = run("--max_iters=7")
    assert re.findall(r"^step (\d+):", out, re.M) == ["0", "4", "7"]
    assert list(losses()) == list(range(1, 8))
    state = checkpoint.newest("out").optimizer_tensors()
    assert {int(t) for name, t in state.items() if name.startswith("step.")} == {7}


def test_log_interval_thins_the_lines_and_the_file(run):
    run("--log_interval=3")
    assert list(losses()) == [3, 6]


def test_the_run_leaves_settings_metrics_and_a_picture(run):
    run("--out_dir=deep/out")
    saved = json.loads(Path("deep/out/config.json").read_text())
    assert saved["settings"]["n_layer"] == 2 and saved["sources"]["n_layer"] == "--n_layer=2"
    assert Path("deep/out/loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert metrics("deep/out")[-1]["exact_loss"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_run_outlives_its_output(tiny, tmp_path):
    """Its log is on a full disk, and what reads its errors has stopped."""
    done = subprocess.run(
        [
            "sh",
            "-c",
            '{ "$@"; echo $? >code; } 2>&1 >/dev/full | true',
            "sh",
            sys.executable,
            ROOT / "train.py",
            *SMALL,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ((tmp_path / "code").read_text(), done.stdout, done.stderr) == ("0\n", "", "")
    assert list(losses(tmp_path / "out")) == list(range(1, 9)) and metrics(tmp_path / "out")[-1]["exact_loss"] > 0
    assert checkpoint.newest(tmp_path / "out").step == 8


def test_the_global_batch_is_what_counts(run):
    run("--out_dir=a", "--batch_size=4", "--gradient_accumulation_steps=2")
    run("--out_dir=b", "--batch_size=8", "--gradient_accumulation_steps=1")
    run("--out_dir=c", "--batch_size=1", "--gradient_accumulation_steps=8")
    assert losses("a") == pytest.approx(losses("b"), abs=1e-4)
    assert losses("a") == pytest.approx(losses("c"), abs=1e-4)


@pytest.mark.parametrize("dropout", ["0.0", "0.3"])
def test_a_resumed_run_is_the_same_run(run, dropout):
    args = [f"--dropout={dropout}", "--max_iters=12", "--lr_decay_iters=12"]
    run(*args, "--out_dir=whole")
    run(*args, "--out_dir=parts", "--max_iters=4")
    out = run(*args, "--out_dir=parts", "--init_from=resume")
    assert "resuming parts/checkpoints/step-00000004 at step 4" in out
    assert losses("whole") == losses("parts")
    whole, parts = checkpoint.newest("whole"), checkpoint.newest("parts")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (whole.folder / file).read_bytes() == (parts.folder / file).read_bytes()
    assert whole.state == parts.state


def test_dropout_differs_between_steps_and_runs_repeat(run):
    run("--dropout=0.5", "--out_dir=a", "--max_iters=3")
    run("--dropout=0.5", "--out_dir=b", "--max_iters=3")
    run("--dropout=0.5", "--out_dir=c", "--max_iters=3", "--seed=2")
    assert losses("a") == losses("b") != losses("c")
    assert data.step_seed(1, 0, 0) != data.step_seed(1, 1, 0) != data.step_seed(1, 1, 1)


def tell_chance():
    """In another process: print from where each forward pass in training draws."""
    real = GPT.forward

    def forward(self, idx, targets=None):
        if self.training and idx.shape[1] > 1:  # one token: DDP arranges its buckets
            print(f"chance: {zlib.crc32(torch.get_rng_state().numpy().tobytes())}", flush=True)
        return real(self, idx, targets)

    GPT.forward = forward


def test_dropout_differs_between_micro_steps_and_processes(start_two):
    args = ["--dropout=0.5", "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=2"]
    doors = start_two(*args, before=tell_chance)
    assert [d.end() for d in doors] == [0, 0], doors[0].printed + doors[1].printed
    chances = [chance for d in doors for chance in re.findall(r"^chance: \d+$", d.printed, re.M)]
    assert len(set(chances)) == len(chances) == 2 * 2 * 2  # processes, steps, micro-steps of each


def test_auto_resumes_what_is_there_and_starts_otherwise(run):
    assert "resuming" not in run("--init_from=auto", "--max_iters=4")
    assert "resuming" in run("--init_from=auto", "--max_iters=8")
    assert list(losses()) == list(range(1, 9))


def test_a_new_run_sets_an_earlier_one_aside(run, tmp_path):
    run("--max_iters=4")
    before = final_weights()
    out = run("--max_iters=4", "--seed=5")
    aside = next((tmp_path / "out").glob("earlier-*"))
    assert f"out/{aside.name}" in out
    assert all(torch.equal(before[n], t) for n, t in final_weights(aside).items())


def test_a_models_own_config_is_neither_moved_nor_overwritten(run, tmp_path, capsys):
    run("--max_iters=1", "--out_dir=first")
    assert cli.main(["export", "--out_dir=first", "--to=hf"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    for args in (["--init_from=hf"], ["--init_from=auto"], []):
        message = refused(capsys, "--out_dir=hf", *args)
        assert message == (
            "--out_dir=hf: expected a run's folder or a new one, and its config.json is not a run's; "
            "--out_dir=hf/run keeps the two apart"
        )
        assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    run("--init_from=hf", "--out_dir=hf/run", "--max_iters=1")
    assert {path: path.read_bytes() for path in before} == before
    shutil.copy("hf/config.json", "first/config.json")  # into the folder of a run
    assert "its config.json is not a run's" in refused(capsys, "--out_dir=first", "--init_from=resume", "--max_iters=2")


def test_files_by_the_names_of_a_runs_stay_where_they_are_if_no_run_wrote_them(run, tmp_path, capsys):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    for name in ("loss.png", "metrics.jsonl"):
        (tmp_path / "out" / name).write_text("mine")
    message = refused(capsys, "--max_iters=1")
    assert "its metrics.jsonl, loss.png are not a run's; --out_dir=out/run" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoints", "loss.png", "metrics.jsonl"}
    for name in ("loss.png", "metrics.jsonl"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "checkpoints" / "notes.txt").write_text("mine")
    assert "earlier" not in run("--max_iters=1")
    assert (tmp_path / "out" / "checkpoints" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns_the_same(run, dtype):
    run("--out_dir=a", "--max_iters=20")
    run("--out_dir=b", "--max_iters=20", f"--dtype={dtype}")
    assert losses("a") != losses("b") or dtype == "bfloat16"  # which only some CPUs multiply in
    assert losses("a")[20] == pytest.approx(losses("b")[20], abs=0.05)
    scaler = checkpoint.newest("b").scaler
    assert bool(scaler) == (dtype == "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_modern_model_and_muon_learn_the_same_in_mixed_precision(run, dtype):
    modern = ["--architecture=qwen3", "--optimizer=muon", "--lr_schedule=linear", "--max_iters=20"]
    run("--out_dir=a", *modern)
    run("--out_dir=b", *modern, f"--dtype={dtype}")
    assert losses("a") != losses("b") or dtype == "bfloat16"
    assert losses("a")[20] == pytest.approx(losses("b")[20], abs=0.05)


def test_float16_gradients_are_unscaled_before_they_are_clipped(run):
    out = run("--dtype=float16", "--max_iters=2", "--eval_interval=100")
    norms = [float(n) for n in re.findall(r"grad norm ([\d.]+)", out)]
    assert all(0.01 < n < 50 for n in norms)  # scaled ones would be tens of thousands


def test_clipping_is_off_at_zero(run):
    run("--out_dir=a", "--grad_clip=0.0", "--max_iters=3")
    run("--out_dir=b", "--grad_clip=1e9", "--max_iters=3")
    run("--out_dir=c", "--grad_clip=1e-3", "--max_iters=3")
    a, b, c = (final_weights(o) for o in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize("init_from", ["scratch", "resume", "auto", "other"])
def test_eval_only_works_everywhere_and_writes_nothing(run, tmp_path, init_from):
    run("--max_iters=4")
    if init_from == "other":
        (tmp_path / "out").rename(tmp_path / "other")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    out = run("--eval_only=True", f"--init_from={init_from}")
    exact = re.findall(r"exact val loss ([\d.]+)", out)
    assert re.search(rf"^step {4 if init_from in ('resume', 'auto') else 0}: train loss ", out, re.M)
    assert len(exact) == 1 and not re.search(r"^iter \d", out, re.M)
    assert exact == re.findall(r"exact val loss ([\d.]+)", run("--eval_only=True", f"--init_from={init_from}"))
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_what_an_iteration_reads_is_told(run):
    out = run("--max_iters=1", "--gradient_accumulation_steps=3", "--batch_size=4", "--block_size=8")
    assert re.search(r"^iteration: 96 tokens \(3 x 4 sequences\), ", out, re.M)


def test_a_tokenizer_that_is_not_installed_costs_the_bits_per_byte_alone(run, tiny, monkeypatch):
    meta = json.loads((tiny / "meta.json").read_text())
    (tiny / "meta.json").write_text(json.dumps(meta | {"tokenizer": {"type": "gpt2"}, "vocab_size": 50257}))
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # so importing it fails
    out = run("--max_iters=1")
    assert re.search(r"^no bits per byte: .*tiktoken", out, re.M)
    assert re.search(r"^exact val loss [\d.]+ over all \d+ validation tokens, perplexity [\d.]+$", out, re.M)


def test_finetuning_starts_from_another_run(run):
    run("--max_iters=20", "--out_dir=first")
    run("--init_from=first", "--out_dir=second", "--max_iters=1", "--learning_rate=1e-6", "--decay_lr=False")
    assert losses("second")[1] == pytest.approx(losses("first")[20], abs=0.5)
    assert list(losses("second")) == [1]


def test_finetuning_a_hugging_face_folder_with_a_shorter_context(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    meta = json.loads((tmp_path / "data/tiny/meta.json").read_text())
    shape = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=meta["vocab_size"])
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", meta["tokenizer"])
    out = run("--init_from=hf", "--max_iters=2")
    assert "cropped from 32 to 16" in out
    assert checkpoint.newest("out").model_config["activation"] == "gelu_new"
    assert "resuming" in run("--init_from=resume", "--max_iters=3", "--n_layer=1", "--bias=True")


def test_finetuning_on_a_vocabulary_that_the_model_does_not_have_is_refused(run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    meta = json.loads((tmp_path / "data/tiny/meta.json").read_text())
    V = meta["vocab_size"]
    shape = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=V - 1)
    transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", meta["tokenizer"])
    message = refused(capsys, "--init_from=hf", "--max_iters=2")
    assert message == f"--dataset=tiny: its vocabulary of {V} does not fit the {V - 1} of hf"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["run", "hugging face"])
def test_finetuning_takes_the_context_of_the_model_where_none_is_named(run, monkeypatch, kind):
    run("--max_iters=2", "--out_dir=first")
    if kind == "hugging face":
        pytest.importorskip("transformers")
        assert cli.main(["export", "--out_dir=first", "--to=hf"]) == 0
    monkeypatch.setattr("support.SMALL", [a for a in SMALL if not a.startswith("--block_size")])
    out = run(f"--init_from={'first' if kind == 'run' else 'hf'}", "--max_iters=1")
    assert "context: 16 tokens, as the model has (--block_size)" in out
    assert checkpoint.newest("out").settings["block_size"] == 16
    assert "context:" not in run("--init_from=resume", "--max_iters=2")


def test_finetuning_with_a_longer_context_than_the_models_is_refused(run, capsys):
    run("--max_iters=1", "--out_dir=first")
    message = refused(capsys, "--init_from=first", "--block_size=17")
    assert message == "--block_size=17: longer than the 16 tokens of context of first"


def test_a_model_of_longer_context_than_the_default_is_finetuned_with_the_default(tmp_path, dist):
    cfg = settings.load(TrainConfig, [], "train.py")
    default = cfg.block_size
    shape = dict(n_positions=4 * default, vocab_size=9, n_layer=1, n_head=1, n_embd=8)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "gpt2"}))
    start.choose_context(cfg, str(tmp_path), dist)
    assert cfg.block_size == default


def change(path):
    """Give the last token of a split another id."""
    ids = np.fromfile(path, np.uint16)
    ids[-1] = (ids[-1] + 1) % ids.max()
    ids.tofile(path)


def test_a_resumed_run_says_that_its_data_has_changed(run, tiny):
    changed = "data: not what the run has seen so far (data/tiny/train.bin); best loss and patience begin anew"
    run("--max_iters=2")
    assert "data: not" not in run("--init_from=resume", "--max_iters=3")
    change(tiny / "train.bin")
    assert changed in run("--init_from=resume", "--max_iters=4")
    assert "data: not" not in run("--init_from=resume", "--max_iters=5")


def test_an_earlier_checkpoint_that_does_not_know_its_data_is_resumed_without_a_word_about_them(run, monkeypatch):
    write = checkpoint.write
    monkeypatch.setattr(
        checkpoint, "write", lambda *args: write(*args[:3], {k: args[3][k] for k in args[3] if k != "data"})
    )
    run("--max_iters=2")
    assert checkpoint.newest("out").data == {}
    assert "data: not" not in run("--init_from=resume", "--max_iters=3")


def refused(capsys, *args):
    with pytest.raises(UserError) as caught:
        train.main([*SMALL, *args])
    capsys.readouterr()
    assert all("\n" not in p for p in caught.value.problems)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--init_from=resume"], r"out/ holds no checkpoint.*--init_from=scratch"),
        (["--init_from=resum"], "did you mean resume"),
        (["--dataset=tinny"], "did you mean tiny"),
        (["--block_size=1000000"], "tokens are too few for a block_size of 1000000"),
        (["--device=cuda"], "sees no cuda device"),
        (["--device=cuda:7"], "sees no cuda device"),
        (["--device=toaster"], "expected cpu, cuda"),
        (["--device=meta"], "expected cpu, cuda"),
    ],
)
def test_bad_input_gets_one_line_and_changes_nothing(run, tmp_path, capsys, args, expected):
    if torch.cuda.is_available() and "cuda" in args[0]:
        pytest.skip("this machine has a GPU")
    before = sorted(tmp_path.rglob("*"))
    assert re.search(expected, refused(capsys, *args))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_does_not_fit_the_checkpoint_is_refused(run, capsys):
    run("--max_iters=4")
    message = refused(capsys, "--init_from=resume", "--n_layer=3", "--n_embd=32")
    assert "--n_layer=3" in message and "has n_layer = 2" in message and "--n_embd=32" in message


def test_another_optimizer_is_refused_on_resume(run, capsys):
    run("--max_iters=4")
    message = refused(capsys, "--init_from=resume", "--optimizer=muon", "--max_iters=8")
    assert message.startswith("--optimizer=muon: out/") and message.endswith("has optimizer = adamw")


def test_another_tokenizer_is_refused_on_resume(run, tmp_path, capsys):
    run("--max_iters=4")
    meta = tmp_path / "data/tiny/meta.json"
    changed = json.loads(meta.read_text())
    changed["tokenizer"]["chars"] = changed["tokenizer"]["chars"][:-1] + ["ß"]
    meta.write_text(json.dumps(changed))
    assert "its tokenizer is not the one" in refused(capsys, "--init_from=resume")


def test_two_processes_train_the_same_model(run, tmp_path):
    run("--out_dir=one")
    done = torchrun(2, "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4:") == 1  # one process alone speaks
    assert losses("one") == pytest.approx(losses("two"), abs=1e-4)
    one, two = metrics("one"), metrics("two")
    assert one[-1]["exact_loss"] == pytest.approx(two[-1]["exact_loss"], abs=1e-4)
    evals = [[r["val_loss"] for r in m if "val_loss" in r] for m in (one, two)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-4)


@pytest.mark.parametrize(
    "processes, args, shares",
    [
        (3, ["--batch_size=2", "--gradient_accumulation_steps=4"], "2 or 3 sequences each, at most 2 at a time"),
        (5, ["--documents=True", "--batch_size=12"], "4 or 5 sequences each, at most 5 at a time"),
        (5, ["--documents=True", "--gradient_accumulation_steps=1"], "0 or 1 sequences each, at most 1 at a time"),
        (7, ["--optimizer=muon", "--architecture=qwen3"], "1 or 2 sequences each, at most 2 at a time"),
    ],
)
def test_processes_that_do_not_divide_the_batch_train_the_same_model(
    run, documents, undrawn, start_ranks, processes, args, shares
):
    args = [*args, "--eval_iters=3", "--timeout=60"]
    run(*args, "--out_dir=one")
    doors = start_ranks(processes, *args, "--out_dir=more")
    assert [d.end() for d in doors] == [0] * processes, doors[0].printed
    assert f"({processes} processes with {shares})" in doors[0].printed
    assert losses("one") == pytest.approx(losses("more"), abs=1e-5)
    evals = [[r[k] for r in metrics(o) for k in ("val_loss", "exact_loss") if k in r] for o in ("one", "more")]
    assert evals[0] == pytest.approx(evals[1], abs=1e-5)


SLOW_TO_TELL = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from nanogpt.commands import cli
from nanogpt.config import UserError

def train(argv):
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(1)
    raise UserError("what all processes have met")

cli.run = train
cli.enter()
"""


def test_what_is_wrong_is_told_though_another_process_ends_first(tmp_path):
    """Torchrun ends all processes when one has ended."""
    (tmp_path / "slow.py").write_text(SLOW_TO_TELL)
    done = torchrun(2, cwd=tmp_path, program=tmp_path / "slow.py")
    assert done.returncode == 1 and re.findall(r"^error: .*", done.stderr, re.M) == [
        "error: what all processes have met"
    ]


def test_the_process_group_is_closed_after_an_error(run, monkeypatch):
    from nanogpt.run import distributed

    for key, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RuntimeError, match="the loop fell over"):
        with distributed.setup(settings.load(TrainConfig, SMALL, "train.py")):
            assert torch.distributed.is_initialized()
            raise RuntimeError("the loop fell over")
    assert not torch.distributed.is_initialized()


def test_a_compiler_that_fails_costs_one_line_and_not_the_run(tmp_path, tiny, run_door):
    env = dict(CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = run_door("train.py", *SMALL, "--compile=True", "--max_iters=2", **env)
    assert done.returncode == 0, done.stderr
    assert "compile: failed, going on without it (" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    plain = run_door("train.py", *SMALL, "--max_iters=2", "--out_dir=plain")
    assert plain.returncode == 0 and losses(tmp_path / "out") == losses(tmp_path / "plain")  # the trial left no trace


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path, tiny, run_door):
    compiled = run_door("train.py", *SMALL, "--compile=True", "--out_dir=a")
    assert compiled.returncode == 0 and "compile: took" in compiled.stdout
    assert run_door("train.py", *SMALL, "--out_dir=b").returncode == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)


def test_resuming_needs_no_more_than_the_folder(run, monkeypatch, capsys):
    run("--out_dir=a", "--max_iters=4", "--seed=auto", "--dropout=0.1")
    train.main(["--init_from=resume", "--out_dir=a", "--max_iters=6"])
    assert "at step 4" in capsys.readouterr().out
    first, second = (checkpoint.read(f).settings for f in checkpoint._folders("a"))
    assert second == first | {"max_iters": 6, "init_from": "resume"}
    saved = json.loads(Path("a/config.json").read_text())
    assert saved["sources"]["n_layer"] == "a/checkpoints/step-00000004"
    assert saved["sources"]["max_iters"] == "--max_iters=6"


def test_a_run_that_is_over_says_so(run):
    run("--max_iters=4")
    assert "nothing is left to train: --max_iters is 4" in run("--max_iters=4", "--init_from=auto")
    assert list(losses()) == [1, 2, 3, 4]


# Which windows a run reads


@pytest.fixture
def read(undrawn, monkeypatch):
    """Where the windows lie that runs in this process train on, in the order in which they are read."""
    starts, real = [], data.Batches.get

    def get(self, first, size, padded_to=0):
        if self.stream == data.STREAMS["train"]:
            starts.extend(self.places(np.arange(first, first + size))[0].tolist())
        return real(self, first, size, padded_to)

    monkeypatch.setattr(data.Batches, "get", get)
    return starts


LONG = ["--eval_interval=1000", "--lr_decay_iters=1000"]


def windows(first, n, seed=1337, sampling="epochs", documents=False):
    """Where windows number `first` to `first + n - 1` of the dataset `tiny` lie."""
    dataset = open_dataset("tiny", "train", 16, documents=documents)
    batches = data.Batches(dataset, "train", seed, 16, None, sampling)
    return batches.places(np.arange(first, first + n))[0].tolist()


def test_each_window_of_an_epoch_is_read_once_whatever_the_batch_was_before(run, read):
    run(*LONG, "--max_iters=5")
    run(*LONG, "--max_iters=9", "--init_from=resume", "--batch_size=5", "--gradient_accumulation_steps=3")
    said = run(*LONG, "--max_iters=30", "--init_from=resume", "--batch_size=21")
    counts = np.cumsum([8] * 5 + [15] * 4 + [42] * 21)  # windows that have been read after each step
    epoch = checkpoint.newest("out").state["epoch_windows"]
    assert read == windows(0, counts[-1]) and counts[-1] > 2 * epoch
    assert len(set(read[:epoch])) == len(set(read[epoch : 2 * epoch])) == epoch
    epochs = {r["step"]: r["epoch"] for r in metrics() if "loss" in r}
    assert epochs == pytest.approx(dict(enumerate(counts / epoch, start=1)))
    ends = [1 + int(np.argmax(counts >= n * epoch)) for n in (1, 2)]
    assert re.findall(r"^epoch (\d) ends at iter (\d+)", said, re.M) == [
        (str(n), str(s)) for n, s in enumerate(ends, 1)
    ]


def test_another_batch_is_read_alike_by_any_number_of_processes(run, tmp_path, start_two):
    run(*LONG, "--max_iters=3", "--out_dir=one")
    shutil.copytree("one", "two")
    args = [*LONG, "--max_iters=6", "--init_from=resume", "--batch_size=3"]
    doors = start_two(*args, "--out_dir=two")
    run(*args, "--out_dir=one")
    assert [d.end() for d in doors] == [0, 0], doors[0].printed + doors[1].printed
    assert losses("one") == pytest.approx(losses("two"), abs=1e-4)


def test_each_target_counts_the_same_after_a_resume_with_another_batch(run, undrawn, documents, dist):
    run(*LONG, "--max_iters=3", "--documents=True")
    model = checkpoint.load_model(checkpoint.newest("out"))
    batches = data.Batches(open_dataset("tiny", "train", 16, documents=True), "train", 1337, 16, dist)
    run(*LONG, "--max_iters=4", "--init_from=resume", "--batch_size=5")
    assert losses()[4] == pytest.approx(model(*batches.get(24, 10))[1].item(), abs=1e-5)


def test_an_earlier_checkpoint_is_where_its_own_batch_brought_it(run, read, monkeypatch):
    write = checkpoint.write

    def write_as_before(out_dir, model_tensors, other_tensors, info):
        state = {k: v for k, v in info["state"].items() if k not in ("windows", "epoch_windows")}
        return write(out_dir, model_tensors, other_tensors, info | {"state": state})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write_as_before)
        run(*LONG, "--max_iters=5")
    run(*LONG, "--max_iters=9", "--init_from=resume", "--batch_size=3")
    assert read == windows(0, 5 * 8 + 4 * 6)


@pytest.mark.parametrize("changed", [{}, {"seed": 7}, {"sampling": "random"}, {"documents": True}])
def test_other_windows_begin_with_an_epoch_of_their_own(run, read, documents, changed):
    run(*LONG, "--max_iters=5")
    if not changed:
        raw = (documents / "train.bin").read_bytes()
        (documents / "train.bin").write_bytes(raw + raw[:2000])
    read.clear()
    flags = [f"--{name}={value}" for name, value in changed.items()]
    said = run(*LONG, *flags, "--max_iters=7", "--init_from=resume", "--batch_size=100")
    assert "epoch: number 2 begins" in said
    assert ("best loss and patience begin anew" in said) == (not changed or "documents" in changed)
    epoch = checkpoint.newest("out").state["epoch_windows"]
    assert read == windows(epoch, 400, **changed)
    assert metrics()[-2]["epoch"] == pytest.approx(1 + 400 / epoch)
    assert "epoch: number" not in run(*LONG, *flags, "--max_iters=8", "--init_from=resume")


def test_random_windows_are_read_alike_by_any_number_of_processes_and_after_a_stop(run, tmp_path):
    run("--sampling=random", "--out_dir=one")
    run("--sampling=epochs", "--out_dir=other")
    run("--sampling=random", "--out_dir=parts", "--max_iters=3")
    train.main(["--init_from=resume", "--out_dir=parts", "--max_iters=8"])
    done = torchrun(2, "--sampling=random", "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses("one") == losses("parts") != losses("other")
    assert losses("one") == pytest.approx(losses("two"), abs=1e-4)
    first, other = ([r for r in metrics(o) if "val_loss" in r][0]["val_loss"] for o in ("one", "other"))
    assert first == other  # evaluations ask the same, so that the two compare


@pytest.fixture
def documents(tiny):
    """The dataset `tiny`, each of its lines a document."""
    meta = json.loads((tiny / "meta.json").read_text())
    meta["separator"] = meta["tokenizer"]["chars"].index("\n")
    (tiny / "meta.json").write_text(json.dumps(meta))
    return tiny


def test_documents_train_alike_however_their_windows_are_divided(run, documents, tmp_path):
    out = run("--documents=True", "--out_dir=one")
    assert re.search(r"^documents: \d+ in \d+ windows of 16 tokens, \d+% of which stay empty", out, re.M)
    run("--documents=True", "--out_dir=small", "--batch_size=1", "--gradient_accumulation_steps=8")
    run("--out_dir=stream")
    done = torchrun(2, "--documents=True", "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for other in ("small", "two"):
        assert losses("one") == pytest.approx(losses(other), abs=1e-4)
        assert metrics("one")[-1]["exact_loss"] == pytest.approx(metrics(other)[-1]["exact_loss"], abs=1e-4)
    assert losses("one") != losses("stream")


def test_the_exact_loss_of_documents_is_over_as_many_tokens_as_that_of_the_stream(run, documents):
    run("--documents=True", "--max_iters=0")
    apart = metrics()[-1]
    run("--max_iters=0")
    together = metrics()[-1]
    assert apart["exact_tokens"] == together["exact_tokens"]
    assert apart["exact_loss"] != together["exact_loss"]


def test_a_run_in_shards_is_the_run_in_one_file(run, tiny):
    run("--out_dir=one")
    raw = (tiny / "train.bin").read_bytes()
    for name, part in (("a.bin", raw[:3000]), ("b.bin", raw[3000:3002]), ("c.bin", raw[3002:])):
        (tiny / name).write_bytes(part)
    (tiny / "train.bin").unlink()
    meta = json.loads((tiny / "meta.json").read_text())
    (tiny / "meta.json").write_text(json.dumps(meta | {"files": {"train": ["a.bin", "b.bin", "c.bin"]}}))
    run("--out_dir=shards")
    assert losses("one") == losses("shards")


def test_epochs_are_counted_and_their_ends_told(run, tiny):
    """99 windows are an epoch of 12.4 iterations of 8."""
    raw = (tiny / "train.bin").read_bytes()
    (tiny / "train.bin").write_bytes(raw[: 2 * 1600])
    out = run("--max_iters=26", "--eval_interval=13")
    assert "; an epoch is 12.4 iterations" in out
    ends = re.findall(r"^epoch (\d) ends at iter (\d+): all 99 windows of the data have been read$", out, re.M)
    assert ends == [("1", "13"), ("2", "25")]
    assert re.search(r"^iter 13: .*, epoch 1\.05$", out, re.M)
    records = [r for r in metrics() if "epoch" in r]
    assert {"loss", "val_loss"} <= {key for r in records for key in r}
    assert all(r["epoch"] == r["step"] * 8 / 99 for r in records)
    assert "epoch 1 ends" not in run("--max_iters=26", "--eval_interval=13", "--log_interval=13")  # the line says it
    assert "ends at iter" not in run("--max_iters=26", "--eval_interval=13", "--sampling=random")


def test_a_resumed_run_tells_each_end_of_an_epoch_once(run, tiny):
    raw = (tiny / "train.bin").read_bytes()
    (tiny / "train.bin").write_bytes(raw[: 2 * 1600])
    out = run("--max_iters=13") + run("--max_iters=26", "--init_from=resume")
    assert re.findall(r"^epoch (\d) ends", out, re.M) == ["1", "2"]


def test_documents_of_a_dataset_without_a_separator_are_refused(run, tmp_path, capsys):
    assert "has no separator" in refused(capsys, "--documents=True")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_100_000_is_read_from_shards_and_trained(run, tiny):
    chars = [chr(i) for i in range(0x10000, 0x10000 + 100_000)]
    ids = [i * 7919 % 100_000 for i in range(3000)]
    write_dataset(tiny, CharTokenizer(chars), ids, ids[:300])
    raw = (tiny / "train.bin").read_bytes()
    assert len(raw) == 4 * len(ids)
    (tiny / "train.bin").write_bytes(raw[:4000])
    (tiny / "train-00001.bin").write_bytes(raw[4000:])
    meta = json.loads((tiny / "meta.json").read_text())
    (tiny / "meta.json").write_text(json.dumps(meta | {"files": {"train": ["train.bin", "train-00001.bin"]}}))
    assert "exact val loss 11." in run("--max_iters=1", "--eval_iters=1")  # ln 100,000 = 11.5


@pytest.mark.parametrize("size, padded", [(1024, 1024), (1025, 1088), (50257, 50304), (50304, 50304)])
def test_a_large_vocabulary_is_padded_and_never_cut(dist, size, padded):
    assert plan.padded(size, dist) == padded


def test_a_learning_rate_that_ends_before_the_run_is_told(run):
    early = ["--max_iters=4", "--lr_decay_iters=2", "--min_lr=0.0", "--warmup_iters=0"]
    assert "from iteration 2 on the learning rate is 0; --lr_decay_iters=4 stretches its decline" in run(*early)
    assert "the learning rate is 0" not in run(
        "--max_iters=4", "--lr_decay_iters=4", "--min_lr=0.0", "--warmup_iters=0"
    )
    for sound in ("--min_lr=1e-3", "--decay_lr=False"):
        assert "the learning rate is 0" not in run(*early, sound)


def test_a_run_that_ends_in_its_warm_up_says_so_and_what_changes_it(run):
    out = run("--max_iters=4", "--warmup_iters=200")
    assert (
        "learning rate: the run ends in its warm-up, at about 0.0002 of 0.01; --warmup_iters=0 or --max_iters beyond 200 "
        "would do"
    ) in out
    for enough in (["--warmup_iters=4"], ["--warmup_iters=200", "--decay_lr=False"]):
        assert "warm-up" not in run("--max_iters=4", *enough)


def test_a_resumed_run_announces_the_settings_that_are_not_the_runs_own(run):
    run("--max_iters=2", "--learning_rate=0.02")
    out = run("--init_from=resume", "--max_iters=4")  # without the rate of that command line, with SMALL's
    assert "settings: not those of the run so far: learning_rate 0.02 -> 0.01, max_iters 2 -> 4\n" in out
    assert "settings:" not in run("--init_from=resume", "--max_iters=4")


# Patience


def test_only_a_lower_loss_is_an_improvement():
    state = start.TrainState()
    for state.step, val in enumerate((2.0, 2.0, float("nan"), 1.5, float("inf"), 1.75), start=1):
        state.note({"train": 1.0, "val": val})
        assert state.improved == (state.step in (1, 4)) and state.evaluated == state.step
        assert (state.best_step, state.best_val_loss) == ((1, 2.0) if state.step < 4 else (4, 1.5))
    assert state.stale == 2


def stubborn(monkeypatch, losses):
    """Evaluations find these validation losses, one after the other, whatever the model."""
    found = iter(losses)
    monkeypatch.setattr(evaluate, "losses", lambda *args: {"train": 1.0, "val": next(found)})


PATIENT = ["--eval_interval=1", "--max_iters=50", "--lr_decay_iters=50", "--patience=3"]


def test_a_run_that_no_longer_improves_ends_and_keeps_the_best(run, undrawn, monkeypatch):
    stubborn(monkeypatch, [5.0, 3.0, 2.0, 2.1, 1.9, 2.0, 1.95, 2.5, 0.0])
    said = run(*PATIENT)
    assert "no improvement in 3 evaluations: the run ends; the best, 1.9000 at step 4, is kept (--patience)" in said
    assert "exact val loss" in said
    assert [r["step"] for r in metrics() if "val_loss" in r] == list(range(8))
    assert checkpoint.best("out").step == 4


def test_patience_is_remembered_when_a_run_goes_on(run, undrawn, monkeypatch):
    stubborn(monkeypatch, [5.0, 3.0, 4.0, 4.0, 4.0, 0.0])
    run(*PATIENT, "--max_iters=3", "--lr_decay_iters=3")
    said = run("--init_from=resume", "--max_iters=50")
    assert "the best, 3.0000 at step 1, is kept" in said
    assert [r["step"] for r in metrics() if "val_loss" in r] == [0, 1, 2, 3, 4]


def test_the_best_loss_and_patience_begin_anew_with_other_data(run, undrawn, monkeypatch, tiny):
    stubborn(monkeypatch, [5.0, 1.0, 2.0, 2.0, 4.0, 3.0, 3.5, 3.5, 3.5, 0.0])
    run(*PATIENT, "--max_iters=3", "--lr_decay_iters=3")
    assert (checkpoint.best("out").step, checkpoint.newest("out").state["stale"]) == (1, 2)
    change(tiny / "val.bin")
    said = run(*PATIENT, "--init_from=resume")
    assert "the best, 3.0000 at step 4, is kept" in said
    assert checkpoint.best("out").step == 4  # 3: on the data of before
    assert [r["step"] for r in metrics() if "val_loss" in r] == list(range(8))


def test_a_run_whose_losses_are_no_numbers_ends_with_a_line(run, undrawn, monkeypatch):
    stubborn(monkeypatch, [float("nan")] * 4)
    assert "no improvement in 3 evaluations: the run ends; none was a number (--patience)" in run(*PATIENT)


def test_without_patience_a_run_goes_to_its_end(run, undrawn, monkeypatch):
    stubborn(monkeypatch, [1.0] + [2.0] * 20)
    assert "no improvement" not in run("--eval_interval=1", "--max_iters=10", "--lr_decay_iters=10")
