"""What several test files share: a tiny dataset, one process on the CPU, small runs in this process and in others."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import nanogpt  # noqa: F401  (before PyTorch: it says how the threads wait)

# isort: split
import hypothesis
import pytest
import torch

import nanogpt.run.log
from nanogpt import kernels, train
from nanogpt.commands import cli
from nanogpt.run import checkpoint
from nanogpt.run.distributed import Dist
from nanogpt.text import hugging_face_tokenizer
from nanogpt.text.dataset import write_dataset
from nanogpt.text.tokenizer import CharTokenizer, from_json

ROOT = Path(__file__).parent.parent

SMALL = (
    "--dataset=tiny --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 "
    "--eval_interval=4 --eval_iters=2 --max_iters=8 --warmup_iters=2 --lr_decay_iters=8 --learning_rate=1e-2 "
    "--min_lr=1e-3 --device=cpu --compile=False"
).split()

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,  # the same examples every time
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and tests may run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What tests measure about this machine is not remembered for its user, and compiled code fits a simulated CPU."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # PyTorch finds compiled code whatever CPU it is for
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"torchinductor_{capability}")


@pytest.fixture(autouse=True)
def default_products():
    """A run in this process leaves the next test PyTorch's own products."""
    yield
    kernels.use_matmul("default")


@pytest.fixture(autouse=True, scope="session")
def answered_hangup():
    """Processes of the tests answer SIGHUP also if pytest itself ignores it, as under nohup."""
    if hangup := getattr(signal, "SIGHUP", None):
        signal.signal(hangup, signal.SIG_DFL)


@pytest.fixture
def dist():
    """One process, on the CPU, in float32."""
    return Dist(torch.device("cpu"), torch.float32)


def tiny_text(sentences=250, seed=1):
    """Sentences of one pattern: enough structure that a tiny model learns some of it at once."""
    draw = random.Random(seed)
    who, does, where = ("cat", "dog", "fox", "hen"), ("sat", "ran", "hid"), ("mat", "hill", "barn")
    parts = (f"The {draw.choice(who)} {draw.choice(does)} by the {draw.choice(where)}.\n" for _ in range(sentences))
    return "".join(parts)


@pytest.fixture
def tiny(tmp_path):
    """The folder of the dataset `tiny`, one token a character, in tmp_path/data."""
    text = tiny_text()
    tokenizer, cut = CharTokenizer.train(text), len(text) * 9 // 10
    folder = tmp_path / "data" / "tiny"
    write_dataset(folder, tokenizer, tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:]))
    return folder


def write_tokenizer(folder, described):
    """Put the tokenizer that a dataset's or checkpoint's JSON describes into a Hugging Face folder."""
    for name, content in hugging_face_tokenizer.to_files(from_json(described), 16).items():
        (Path(folder) / name).write_text(json.dumps(content))


@pytest.fixture
def run_door(tmp_path):
    """Run a front door in tmp_path as a person would: run_door("train.py", "--device=cpu", RANK="0")."""

    def run(script, *args, timeout=600, **env):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def run(tiny, monkeypatch, capsys):
    """run("--max_iters=2") trains in this process, in tmp_path, and returns what was printed."""
    monkeypatch.chdir(tiny.parent.parent)

    def run(*args):
        train.main([*SMALL, *args])
        return capsys.readouterr().out

    return run


def no_picture(out_dir):
    """In the place of `picture.draw_losses`, which takes longer than a small run."""
    return "no picture"


@pytest.fixture
def undrawn(monkeypatch):
    """Runs in this process draw no picture of their losses."""
    monkeypatch.setattr(nanogpt.run.log, "draw_losses", no_picture)


def metrics(out_dir="out"):
    path = Path(out_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(out_dir="out"):
    return {r["step"]: r["loss"] for r in metrics(out_dir) if "loss" in r}


def torchrun(processes, *args, cwd, program=ROOT / "train.py", options=()):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    command += [str(program), *SMALL, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def ending(out_dir="out"):
    """All that a run leaves and must not depend on whether it was stopped: bytes, state, and what it reported."""
    found = checkpoint.newest(out_dir)
    tensors = [(found.folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    reports = [
        (r["step"], *(r[k] for k in ("loss", "train_loss", "val_loss", "exact_loss") if k in r))
        for r in metrics(out_dir)
    ]
    return tensors, found.state, found.scaler, reports


# -- runs in processes of their own. A server that has imported everything forks them, so that each starts in an instant.

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nanogpt.train", "torch.nn.parallel", "torch._dynamo"])


def start_server():
    """Have the server import what is tested here, and not what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()


def enter(cwd, argv, log, env, before):
    """What such a process does: `before`, then the command of the front door."""
    assert Path(cli.__file__).parents[2] == ROOT
    os.chdir(cwd)
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    nanogpt.run.log.draw_losses = no_picture
    if before:
        before()
    cli.as_process(lambda: cli.main(argv), lasting=argv[0] in cli.LASTING)


class Door:
    """A front door in a process of its own, and what it has printed."""

    def __init__(self, cwd, argv, name="log", env=None, before=None):
        self.log = Path(cwd) / f"{name}.txt"
        self.log.write_bytes(b"")
        start_server()
        self.process = SERVER.Process(target=enter, args=(cwd, argv, self.log, env or {}, before))
        self.process.start()

    @property
    def printed(self):
        return self.log.read_text()

    def wait_for(self, pattern, timeout=600):
        """Return when a line that matches has been printed."""
        end = time.monotonic() + timeout
        while not re.search(pattern, self.printed, re.M):
            assert self.process.is_alive() and time.monotonic() < end, self.printed
            time.sleep(0.002)

    def send(self, signum):
        os.kill(self.process.pid, signum)

    def end(self, timeout=600):
        """Its exit code: negative where a signal killed it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.printed}")
        return self.process.exitcode


PORTS = random.Random(os.getpid())


def free_port():
    """A port that nobody listens on, below those that the system hands out: it could hand it out again at once."""
    while True:
        port = PORTS.randrange(20_000, 32_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return port
        except OSError:
            continue


@pytest.fixture
def start(tiny, tmp_path):
    """start("--max_iters=2", before=function) starts a run in tmp_path and returns its Door."""
    doors = []

    def start(*args, before=None, name="log", env=None):
        doors.append(Door(tmp_path, ["train", *SMALL, *args], name, env, before))
        return doors[-1]

    yield start
    for door in doors:
        door.process.kill()
        door.process.join()


@pytest.fixture
def start_ranks(start):
    """start_ranks(3, "--max_iters=2") starts a run of three processes, as `torchrun` would: returns their Doors."""

    def start_ranks(processes, *args, before=None, env=None):
        place = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())) | (env or {})
        ranks = [place | dict(RANK=str(r), LOCAL_RANK=str(r)) for r in range(processes)]
        return [start(*args, before=before, name=f"log-{e['RANK']}", env=e) for e in ranks]

    return start_ranks


@pytest.fixture
def start_two(start_ranks):
    """The same for a run of two processes."""
    return partial(start_ranks, 2)


# -- figures of the long tests, printed as a table at the end


FIGURES = []


@pytest.fixture
def figure():
    """figure("promise", "what was measured") adds a line to the table."""
    return lambda promise, value: FIGURES.append((promise, value))


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("promises and figures")
        width = max(len(promise) for promise, _ in FIGURES)
        for promise, value in FIGURES:
            terminalreporter.write_line(f"{promise:{width}}  {value}")
