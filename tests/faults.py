"""Faults that several test files put into a run: signals, sick steps, damaged files, a full disk; and what they record."""

import math
import os
import resource
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import nanogpt.run.start
from nanogpt import data, evaluate, optim, train
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint, compile, signals
from nanogpt.run.records import read_metrics

FILES = (*checkpoint.FILES, "manifest.json")


FAST = ["--optimizer=muon", "--architecture=qwen3", "--lr_schedule=linear"]


CASES = {
    "float32": [],
    "dropout": ["--dropout=0.3"],
    "accumulation": ["--gradient_accumulation_steps=4", "--batch_size=2", "--dropout=0.1"],
    "bfloat16": ["--dtype=bfloat16", "--dropout=0.1"],
    "float16": ["--dtype=float16"],
    "bias": ["--bias=True", "--grad_clip=0.0"],
    "muon": [*FAST, "--dropout=0.1"],
    "muon, float16": [*FAST, "--dtype=float16"],
}


def stop_at(monkeypatch, *steps):
    """Let the run in this process be asked to stop in the midst of these steps, of each once."""
    left, real = list(steps), train.train_step

    def train_step(run):
        if run.state.step in left:
            left.remove(run.state.step)
            signal.raise_signal(signal.SIGTERM)
        return real(run)

    monkeypatch.setattr(train, "train_step", train_step)


def raise_at(steps, rank):
    """In another process: the signal comes to this rank alone."""
    if os.environ["RANK"] == rank:
        stop_at(pytest.MonkeyPatch(), *steps)


def record_windows(path):
    """In any process: note every window that it trains on, by number, with its tokens."""
    real = data.Batches.get

    def get(self, first, size, padded_to=0):
        x, y = real(self, first, size, padded_to)
        if self.stream == data.STREAMS["train"]:
            with open(f"{path}-{os.getpid()}", "a") as f:
                f.writelines(f"{first + i} {row.tolist()}\n" for i, row in enumerate(x[:size]))
        return x, y

    data.Batches.get = get


def windows(tmp_path, name):
    lines = [line for p in sorted(tmp_path.glob(f"{name}-*")) for line in p.read_text().splitlines()]
    return sorted((int(number), tokens) for number, _, tokens in (line.partition(" ") for line in lines))


def lost(out_dir):
    """(updates that were reported and are in no checkpoint, whether one was being written), after a kill."""
    found = checkpoint.newest(out_dir)
    path = Path(out_dir, "metrics.jsonl")
    records = read_metrics(path) if path.exists() else []
    reported = max((record["step"] for record in records if "loss" in record), default=0)
    assert reported > 0 or not found or not found.step, "a run that has saved has reported"
    half_written = any(Path(out_dir, "checkpoints").glob(".step-*.tmp"))
    return reported - (found.step if found else 0), half_written


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)  # one would be the manifest's last line break, which says nothing


def flip(path, bit=None):
    raw = bytearray(path.read_bytes())
    bit = len(raw) * 4 if bit is None else bit
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def limit_files(size):
    """In another process: no file may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


REST = dict(model_config=asdict(GPTConfig()), tokenizer={}, settings={}, scaler={})  # of a checkpoint.json


# -- sick steps


BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def in_loss(monkeypatch, value, sick):
    real = GPT.forward

    def forward(self, idx, targets=None):
        logits, loss = real(self, idx, targets)
        return logits, loss * value if self.training and sick() else loss

    monkeypatch.setattr(GPT, "forward", forward)


def in_gradient(monkeypatch, value, sick):
    real = optim.clip_gradients

    def clip_gradients(model, max_norm, dist=None):
        if sick():
            model.transformer.ln_f.weight.grad[3] = value
        return real(model, max_norm)

    monkeypatch.setattr(optim, "clip_gradients", clip_gradients)


def in_input(monkeypatch, value, sick):
    real = nanogpt.run.start.make_model

    def make_model(*args):
        model, base = real(*args)
        wte = model.transformer.wte
        wte.register_forward_hook(lambda m, _, x: x * value if model.training and sick() else None)
        return model, base

    monkeypatch.setattr(nanogpt.run.start, "make_model", make_model)


PLACES = {"loss": in_loss, "gradient": in_gradient, "input": in_input}


class Watched:
    """The weights and the optimizer's state before each step, as a run in this process had them."""

    def __init__(self, monkeypatch):
        self.before, self.sick_at, self.step = {}, set(), 0
        real = train.train_step

        def train_step(run):
            self.run, self.step = run, run.state.step + 1  # the number of this update
            self.before[self.step] = self.copy()
            return real(run)

        monkeypatch.setattr(train, "train_step", train_step)

    def sick(self):
        return self.step in self.sick_at

    def copy(self):
        tensors = dict(self.run.gpt.named_parameters()) | optim.state_tensors(self.run.gpt, self.run.optimizer)
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def unchanged_since(self, step):
        now = self.copy()
        return all(torch.equal(tensor, now[name]) for name, tensor in self.before[step].items())


# -- signals, in every phase of a run


ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


CAME = []  # the signals that have reached this process


def announce(seconds=60, only=0, awaited=1):
    """Say that the run has come to where signals are to reach it, and dwell there until they have, or so long."""
    if os.environ.get("RANK", "0") == str(only):
        print("NOW", flush=True)
        end = time.monotonic() + seconds
        while len(CAME) < awaited and time.monotonic() < end:
            time.sleep(0.005)


def note_signals():
    real = signals.Stop._handle

    def _handle(self, signum, frame):
        CAME.append(signum)
        real(self, signum, frame)

    signals.Stop._handle = _handle


def dwell_in_training(awaited=1):
    note_signals()
    real = train.train_step

    def train_step(run):
        if run.state.step == 5:
            announce(awaited=awaited)
        return real(run)

    train.train_step = train_step


def dwell_in_evaluation():
    note_signals()
    real = evaluate.losses

    def losses(run, micro_batch):
        announce()
        return real(run, micro_batch)

    evaluate.losses = losses


def dwell_in_saving():
    note_signals()
    real = checkpoint.write_json

    def write_json(path, value):
        if path.name == "manifest.json":
            announce()
        real(path, value)

    checkpoint.write_json = write_json


def dwell_in_compiling():
    def compiled(model, *rest, **more):
        announce(600)
        return model

    compile.compiled = compiled


def dwell_in_the_exact_loss():
    note_signals()
    real = evaluate.padded_windows

    def padded_windows(*args):
        announce()
        return real(*args)

    evaluate.padded_windows = padded_windows


PHASES = {
    "training": dwell_in_training,
    "evaluation": dwell_in_evaluation,
    "saving": dwell_in_saving,
    "compiling": dwell_in_compiling,
    "exact evaluation": dwell_in_the_exact_loss,
}
