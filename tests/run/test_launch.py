"""The processes of a launch: how they meet, and what is printed, once, when one of them fails."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import flip
from support import ROOT, SMALL, ending, losses, torchrun

from nanogpt import train
from nanogpt.commands import cli
from nanogpt.config import RunFailed, UserError
from nanogpt.run import checkpoint, distributed, launch

HOST = re.escape(socket.gethostname())


def wait_for_all(dist):
    dist.max(1)


def wait_for_nobody(dist):
    threading.Event().wait(600)  # as a GPU that computes


def work(failing, error, timeout=600, others=wait_for_all):
    """In each of several processes: one fails, while the others wait for it, or work."""

    def run(argv):
        cfg = SimpleNamespace(device="cpu", dtype="float32", backend="auto", timeout=timeout)
        with distributed.setup(cfg) as dist:
            dist.max(1)
            if dist.rank == failing:
                error()
            others(dist)

    cli.run = run


def raises(error):
    raise error


def fails_with_work_under_way():
    """As in a backward pass, whose reductions the others never join."""
    torch.distributed.all_reduce(torch.zeros(1), async_op=True)
    raise RunFailed("out of luck")


def killed(signum):
    os.kill(os.getpid(), signum)


def reported(doors):
    """The lines that report errors, of all processes."""
    return [line for door in doors for line in door.printed.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error, code", [(RunFailed, 1), (UserError, 2), (ZeroDivisionError, 1)])
def test_what_one_process_fails_at_is_printed_once_and_ends_all(start_ranks, failing, error, code):
    doors = start_ranks(3, before=partial(work, failing, partial(raises, error("out of luck"))))
    assert [d.end() for d in doors] == [code] * 3
    (line,) = reported(doors)
    reason = "ZeroDivisionError: out of luck" if error is ZeroDivisionError else "out of luck"
    whose = "" if (failing, code) == (0, 2) else f"process {failing} on {HOST}: "
    assert re.fullmatch(f"error: {whose}{reason}", line)
    traces = sum(d.printed.count("Traceback") for d in doors)
    assert traces == (1 if error is ZeroDivisionError else 0)  # of the bug, and none of the others' sockets


def test_a_process_that_fails_does_not_wait_for_the_others(start_ranks):
    doors = start_ranks(3, before=partial(work, 1, fails_with_work_under_way, others=wait_for_nobody))
    assert [d.end() for d in doors] == [1] * 3
    assert re.fullmatch(f"error: process 1 on {HOST}: out of luck", "\n".join(reported(doors)))


@pytest.mark.parametrize("failing", [0, 2])
def test_a_killed_process_is_named(start_ranks, failing):
    doors = start_ranks(3, before=partial(work, failing, partial(killed, signal.SIGKILL)))
    assert [d.end() for d in doors] == [-signal.SIGKILL if r == failing else 1 for r in range(3)]
    assert "Traceback" not in "".join(d.printed for d in doors)
    if failing == 0:  # the store has ended with it
        assert all(re.search(r"process 0 has ended, or cannot be reached", line) for line in reported(doors))
    else:
        (line,) = reported(doors)
        assert re.match(f"error: process 2 on {HOST}: ended without a word", line)


def test_a_process_that_stands_still_is_named_after_the_timeout(start_ranks):
    doors = start_ranks(3, before=partial(work, 1, partial(killed, signal.SIGSTOP), timeout=30))
    assert [doors[r].end() for r in (0, 2)] == [1, 1]
    (line,) = reported(doors)
    assert re.match(f"error: process 1 on {HOST}: ended without a word, or does not answer", line)


# -- restarts


DIES = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from nanogpt import train
from nanogpt import train
from nanogpt.commands import cli

attempt, real = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), train.train_step

def train_step(run):
    if os.environ["RANK"] == "1" and run.step == (5, 6, 99)[attempt]:
        run.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run)

train.train_step = train_step
cli.enter("train")
"""


@pytest.mark.slow
def test_a_restart_goes_on(tmp_path, tiny):
    """Without --init_from=auto, too: torchrun repeats the command, and the launch has saved already."""
    (tmp_path / "dies.py").write_text(DIES)
    launched = partial(torchrun, 4, "--eval_interval=2", cwd=tmp_path)
    assert launched("--out_dir=whole").returncode == 0
    launched("--out_dir=out", "--max_iters=4")  # an earlier run, which is not what the restarts go on with
    done = launched("--out_dir=out", program=tmp_path / "dies.py", options=["--max-restarts=2"])
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^resuming out/checkpoints/step-0+(\d+)", done.stdout, re.M)[-2:] == ["4", "6"]
    assert done.stdout.count("error:") + done.stderr.count("error: process 1 on") == 2
    assert ending(tmp_path / "whole") == ending(tmp_path / "out")


def test_a_restart_before_anything_was_saved_starts_as_it_was_told(tmp_path, tiny):
    (tmp_path / "dies.py").write_text(DIES)
    assert torchrun(2, "--max_iters=4", cwd=tmp_path).returncode == 0
    done = torchrun(2, "--eval_interval=100", cwd=tmp_path, program=tmp_path / "dies.py", options=["--max-restarts=2"])
    assert done.returncode == 0, done.stderr
    assert "resuming" not in done.stdout
    assert list(losses(tmp_path / "out")) == list(range(1, 9))


KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from nanogpt import train
from nanogpt.commands import cli

real = train.train_step

def train_step(run):
    if os.environ["RANK"] == "0" and run.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run)

train.train_step = train_step
cli.enter("train")
"""


def test_the_others_report_process_0_before_torchrun_ends_them(tmp_path, tiny):
    """torchrun sends them SIGTERM a tenth of a second after it has ended."""
    (tmp_path / "killed.py").write_text(KILLED)
    done = torchrun(3, cwd=tmp_path, program=tmp_path / "killed.py")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    why = "ended without a word, or does not answer: killed, stopped, or cut off; the run stops"
    assert re.fullmatch(f"error: process 0 on {HOST}: {re.escape(why)}", line)


def test_a_failure_is_told_without_a_thread_if_there_is_no_memory_for_one(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    told = []
    monkeypatch.setattr(threading.Thread, "start", start)
    launch.within(30, partial(told.append, "the failure"), "the others do not answer")
    assert told == ["the failure"]


# -- processes that differ


def differs(rank, name, value):
    """In each of several processes: one has another setting, or another version of PyTorch."""
    if os.environ["RANK"] == rank:
        if name == "torch":
            torch.__version__ = value
        else:
            cli.main = lambda argv, real=cli.main: real([*argv, f"--{name}={value}"])


@pytest.mark.parametrize(
    "name, value, line",
    [
        ("learning_rate", "0.5", "--learning_rate is 0.5, and on process 0 it is 0.01"),
        ("seed", "auto", "--seed is auto, and on process 0 it is 1337"),
        ("torch", "9.9", f"PyTorch's version is 9.9, and on process 0 it is {re.escape(torch.__version__)}"),
        ("root", "other", "the fingerprint of train.bin is .*, and on process 0 it is .*"),
    ],
)
def test_processes_that_differ_do_not_start(start_ranks, tiny, name, value, line):
    if name == "root":
        shutil.copytree(tiny.parent, tiny.parent.parent / "other")
        bins = tiny.parent.parent / "other/tiny/train.bin"
        bins.write_bytes(bins.read_bytes()[2:] + bins.read_bytes()[:2])
    doors = start_ranks(3, "--batch_size=3", before=partial(differs, "2", name, value))
    assert [d.end() for d in doors] == [2] * 3, doors[0].printed
    assert all(re.fullmatch(f"error: (process . on {HOST}: )?process 2 on {HOST}: {line}", r) for r in reported(doors))
    assert len(reported(doors)) == 1


def strays(step, change):
    """In each of several processes: on one, the weights change after this step."""
    real = train.train_step

    def train_step(run):
        metrics = real(run)
        if (run.dist.rank, run.step) == (1, step):
            change(next(run.gpt.parameters()).data.view(torch.int32).view(-1))
        return metrics

    train.train_step = train_step


def flip_a_high_bit(weights):
    weights[7] ^= 2**20


def flip_the_lowest_bit(weights):
    weights[7] ^= 1


def swap_two(weights):
    weights[[3, 7]] = weights[[7, 3]]


@pytest.mark.parametrize("step, change", [(2, flip_a_high_bit), (4, flip_the_lowest_bit), (4, swap_two)])
def test_weights_that_differ_end_the_run_at_the_next_evaluation(start_ranks, tmp_path, step, change):
    """Two more steps may round the lowest bit away, and then the weights are the same again."""
    doors = start_ranks(3, "--batch_size=3", before=partial(strays, step, change))
    assert [d.end() for d in doors] == [1] * 3
    (line,) = reported(doors)
    assert line.endswith("step 4: the weights on process 1 are not those on process 0: the run stops")
    assert "step 0: train loss" in doors[0].printed and "step 4: train loss" not in doors[0].printed


# -- a checkpoint that is resumed


def report_verified():
    """In each of three processes: it says which checkpoints it reads every byte of; the third is on another machine."""
    real = checkpoint.damage
    checkpoint.damage = lambda folder: print("verified", Path(folder).name, flush=True) or real(folder)
    if os.environ["RANK"] == "2":
        os.environ["LOCAL_RANK"] = "0"


def test_one_process_of_each_machine_verifies_the_checkpoint(start_ranks, run, tmp_path):
    run("--batch_size=3", "--keep_checkpoints=9")
    flip(tmp_path / "out/checkpoints/step-00000008/optimizer.safetensors")
    doors = start_ranks(3, "--init_from=resume", before=report_verified)
    assert [d.end() for d in doors] == [0] * 3, "".join(d.printed for d in doors)
    verified = [re.findall(r"^verified step-0+(\d)$", d.printed, re.M) for d in doors]
    assert [found[:2] for found in verified] == [["8", "4"], [], ["4"]]
    assert [d.printed.count("damaged") for d in doors] == [1, 0, 0]


def hides(name):
    """In each of two processes, on two machines: the second does not see a file of the checkpoint."""
    if os.environ["RANK"] == "1":
        os.environ["LOCAL_RANK"] = "0"
        real = checkpoint.damage
        checkpoint.damage = lambda folder: (Path(folder) / name).unlink() or real(folder)


def test_a_checkpoint_that_another_machine_sees_damaged_is_refused(start_two, run):
    run()
    doors = start_two("--init_from=resume", before=partial(hides, "optimizer.safetensors"))
    assert [d.end() for d in doors] == [2, 2]
    (line,) = reported(doors)
    assert "step-00000008: process 0 took it, and here it is damaged (optimizer.safetensors is missing)" in line


# -- two machines: network namespaces, joined by a cable


@pytest.fixture
def two_hosts():
    """The names of two network namespaces, 10.111.0.1 and 10.111.0.2, where the host's name is 127.0.1.1."""
    names = [f"nanogpt-{os.getpid()}-{i}" for i in "12"]
    links = [f"ng{os.getpid()}{i}" for i in "12"]
    try:
        for name in names:
            ip(f"netns add {name}")
            folder = Path("/etc/netns", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody answers, at once
        ip(f"link add {links[0]} type veth peer name {links[1]}")
        for i, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip(f"link set {link} netns {name}")
            for command in (f"addr add 10.111.0.{i}/24 dev {link}", f"link set {link} up", "link set lo up"):
                ip(f"-n {name} {command}")
        yield list(zip(names, links, strict=True))
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no network namespaces can be made here: {e}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def ip(command):
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def on_hosts(hosts, folder, *args, address="10.111.0.1"):
    """A process on each host, as torchrun with --nnodes=2 starts them; their output is in FOLDER/host-RANK.txt."""
    place = dict(LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR=address, MASTER_PORT="29500")
    processes = []
    for rank, (name, _) in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, str(ROOT / "train.py"), *SMALL, *args]
        env = os.environ | place | dict(RANK=str(rank), GROUP_RANK=str(rank))
        with open(folder / f"host-{rank}.txt", "w") as log:
            processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
    return processes


def ended(processes):
    try:
        return [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()


def printed(folder):
    return [(folder / f"host-{rank}.txt").read_text() for rank in (0, 1)]


def test_two_machines_meet_whatever_their_own_names_mean(two_hosts, tiny, tmp_path):
    assert ended(on_hosts(two_hosts, tmp_path)) == [0, 0], printed(tmp_path)
    assert f"network: {two_hosts[0][1]}, the interface on the route to MASTER_ADDR=10.111.0.1" in printed(tmp_path)[0]
    assert list(losses(tmp_path / "out")) == list(range(1, 9))


def test_an_address_that_others_cannot_reach_is_refused(two_hosts, tmp_path):
    first, *_ = on_hosts(two_hosts[:1], tmp_path, address=socket.gethostname())
    assert ended([first]) == [2]
    assert (
        f"MASTER_ADDR={socket.gethostname()}: is a loopback address here, which"
        in (tmp_path / "host-0.txt").read_text()
    )


@pytest.mark.slow
def test_a_cut_cable_ends_both_sides_with_a_line(two_hosts, tiny, tmp_path):
    processes = on_hosts(two_hosts, tmp_path, "--timeout=30", "--max_iters=1000000", "--eval_interval=1000000")
    try:
        end = time.monotonic() + 600
        while "iter 20:" not in printed(tmp_path)[0]:
            assert time.monotonic() < end and all(p.poll() is None for p in processes), printed(tmp_path)
            time.sleep(0.05)
        ip(f"-n {two_hosts[0][0]} link set {two_hosts[0][1]} down")
    finally:
        codes = ended(processes)
    assert codes == [1, 1]
    for text in printed(tmp_path):
        assert re.search(r"^error: process . on .*: .*(not answer|cannot be reached)", text, re.M)
