"""What several processes make of a fault, a stop, and a restart; prints a table in Markdown, results/ holds dated ones.

    python benchmarks/faults.py [resume numbers killed stopped 'out of memory' cut restarts overlap] [--times=20] [--jobs=2]

Runs of a tiny model under torchrun, with gloo, on this machine. A fault comes to one process, drawn at random, at a random
moment of the first seconds of training, which include evaluations and saves: it is killed, stopped (SIGSTOP), fails to
allocate memory, or its cable is cut, for which there are two network namespaces (as root). Then the others must end within
LIMIT seconds, with a line that names it. Needs the packages of the tests.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path

from cpu import commit, cpu  # which finds the package

# isort: split
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import SMALL, ending, losses, tiny_text  # noqa: E402

from nanogpt import step  # noqa: E402
from nanogpt.config import TrainConfig  # noqa: E402
from nanogpt.model import GPT, GPTConfig  # noqa: E402
from nanogpt.run import compile, distributed  # noqa: E402
from nanogpt.text.dataset import write_dataset  # noqa: E402
from nanogpt.text.tokenizer import CharTokenizer  # noqa: E402

TIMEOUT = 15  # of collective operations, seconds
LIMIT = 75  # seconds after a fault within which the others end: TIMEOUT, and the three waits of run/launch.py
RANKS = 3
LONG = ["--max_iters=20000", "--eval_interval=20", "--keep_checkpoints=2", f"--timeout={TIMEOUT}"]
MUON = ["--optimizer=muon", "--architecture=qwen3"]
WIDE = ["--n_embd=128", "--n_layer=1", "--n_head=2", "--batch_size=3", "--gradient_accumulation_steps=8"]


# -- runs


class Job:
    """A run of several processes under torchrun, in a session of its own."""

    def __init__(self, folder, processes, *args, program=ROOT / "train.py", options=(), name="log", env=None):
        self.log = folder / f"{name}.txt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [*options, str(program), *args]
        env = os.environ | dict(OMP_NUM_THREADS="1") | (env or {})
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def printed(self):
        return self.log.read_text()

    def wait_for(self, pattern, seconds=300):
        """Whether a line that matches was printed before the end."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.printed, re.M):
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def ranks(self):
        """{rank: process id}."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                if f"\nPPid:\t{self.process.pid}\n" in (path / "status").read_text():
                    env = dict(v.split("=", 1) for v in (path / "environ").read_text().split("\0") if "=" in v)
                    found[int(env["RANK"])] = int(path.name)
        return found

    def end(self, seconds=600):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextmanager
def folder_with_data():
    """A folder in which runs find the dataset `tiny`."""
    with tempfile.TemporaryDirectory() as name:
        text = tiny_text()
        tokenizer, cut = CharTokenizer.train(text), len(text) * 9 // 10
        write_dataset(Path(name, "data", "tiny"), tokenizer, tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:]))
        yield Path(name)


def row(what, found):
    print(f"| {what} | {found} |", flush=True)


# -- stopped and resumed


def resume(times, jobs):
    """Differing bits between a run and one that is stopped at a random moment and resumed."""
    ways = [(processes, "none") for processes in (1, 2, 3, 4, 5, 7, 8)] + [(n, "full") for n in (2, 3, 4, 8)]
    for processes, shard in ways:
        for name, recipe in (("AdamW", []), ("Muon", MUON)):
            recipe = [*recipe, f"--shard={shard}"]
            with folder_with_data() as folder:
                args = [*SMALL, *WIDE, *recipe, "--max_iters=40", "--lr_decay_iters=40", "--log_interval=1"]
                assert Job(folder, processes, *args, "--out_dir=whole").end() == 0
                job = Job(folder, processes, *args, "--out_dir=parts")
                assert job.wait_for(r"^iter 2:"), job.printed
                time.sleep(random.Random(f"{processes}{name}{shard}").uniform(0, 1))
                os.killpg(job.process.pid, signal.SIGTERM)
                job.end()
                at = re.search(r"^stopped at step (\d+)", job.printed, re.M)
                assert at, job.printed
                assert Job(folder, processes, *args, "--out_dir=parts", "--init_from=resume").end() == 0
                (whole, *reports), (parts, *same) = ending(folder / "whole"), ending(folder / "parts")
                pairs = [
                    (np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in zip(whole, parts, strict=True)
                ]
                bits = sum(int(np.unpackbits(a ^ b).sum()) for a, b in pairs)
                more = "" if reports == same else ", and reports differ"
                row(
                    f"stopped at step {at[1]} and resumed, {processes} processes, {name}, --shard={shard}",
                    f"{bits} differing bits{more}",
                )


def numbers(times, jobs):
    """Losses of runs that go on with another number of processes."""
    for order, shard in (((8, 4, 2, 1, 8), "none"), ((8, 7, 3, 1, 8), "none"), ((8, 4, 2, 1, 8), "full")):
        for name, recipe in (("AdamW", []), ("Muon", MUON)):
            recipe = [*recipe, f"--shard={shard}"]
            with folder_with_data() as folder:
                args, steps = [*SMALL, *WIDE, *recipe, "--lr_decay_iters=40"], count(8, 8)
                for processes in order:
                    go = ["--out_dir=parts", "--init_from=auto", f"--max_iters={next(steps)}"]
                    assert Job(folder, processes, *args, *go).end() == 0
                assert Job(folder, 8, *args, "--out_dir=whole", "--max_iters=40").end() == 0
                whole, parts = losses(folder / "whole"), losses(folder / "parts")
                off = max(abs(whole[s] - parts[s]) for s in range(1, 41))
                way = f"{' → '.join(map(str, order))} processes, {name}, --shard={shard}, 40 steps"
                row(way, f"losses within {off:.1e}")


# -- faults


FAULTS = {
    "killed": (lambda pid: os.kill(pid, signal.SIGKILL), "ended without a word"),
    "stopped": (lambda pid: os.kill(pid, signal.SIGSTOP), "ended without a word"),
    "out of memory": (lambda pid: os.kill(pid, signal.SIGUSR2), "out of memory"),
}
ALLOCATES = f"""
import re, resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from nanogpt.commands import cli
from nanogpt.model import GPT

struck, real = [], GPT.forward
signal.signal(signal.SIGUSR2, lambda *_: struck.append(True))

def forward(self, *args):
    if struck:  # 64 MiB in a process that can have 16 MiB more
        size = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1]) + 2**24
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        torch.empty(2**24)
    return real(self, *args)

GPT.forward = forward
cli.enter("train")
"""


def fault(kind, number):
    """(seconds until the others have ended or None, whether one line names the process and the cause, what was printed)."""
    draw = random.Random(f"{kind} {number}")
    strike, cause = FAULTS[kind]
    with folder_with_data() as folder:
        (folder / "program.py").write_text(ALLOCATES)
        job = Job(folder, RANKS, *SMALL, *LONG, program=folder / "program.py")
        try:
            assert job.wait_for("^iter 20:"), job.printed
            pids, victim = job.ranks(), draw.randrange(RANKS)
            time.sleep(draw.uniform(0, 3))
            began = time.monotonic()
            strike(pids[victim])
            others = [pid for rank, pid in pids.items() if rank != victim]
            while any(map(alive, others)) and time.monotonic() < began + LIMIT:
                time.sleep(0.05)
            seconds = None if any(map(alive, others)) else time.monotonic() - began
            time.sleep(1)
        finally:
            job.kill()
            for pid in pids.values():  # torchrun puts each into a session of its own
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        lines = re.findall(r"^error: .*", job.printed, re.M)
        named = len(lines) == 1 and re.match(rf"error: process {victim} on .*({cause})", lines[0]) is not None
        return seconds, named, "" if named and seconds else f"process {victim}\n{job.printed[-3000:]}"


def series(kind, times, jobs):
    with ThreadPoolExecutor(jobs) as pool:
        report(f"one of {RANKS} processes {kind}", list(pool.map(partial(fault, kind), range(times))))


def report(what, found):
    seconds, named = [s for s, *_ in found if s is not None], sum(bool(n) for _, n, _ in found)
    for _, _, printed in found:
        if printed:
            print(printed, file=sys.stderr)
    times = f"after {statistics.median(seconds):.0f} s, at most {max(seconds):.0f} s" if seconds else ""
    row(
        f"{what}, at {len(found)} random moments",
        f"{len(seconds)} of {len(found)} ended, {times}; one line named process and cause in {named}",
    )


def ip(command):
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def cut_once(number):
    """The same of two processes, each with a network of its own; each reports the other, which it cannot reach."""
    net, draw = f"10.{112 + number}.0", random.Random(f"cut {number}")
    names = [f"nanogpt-{os.getpid()}-{number}-{i}" for i in "12"]
    links = [f"n{os.getpid() % 10**6}{number}{i}" for i in "12"]
    processes, logs = [], []
    with folder_with_data() as folder:
        try:
            for name in names:
                ip(f"netns add {name}")
            ip(f"link add {links[0]} type veth peer name {links[1]}")
            for i, (name, link) in enumerate(zip(names, links, strict=True), 1):
                ip(f"link set {link} netns {name}")
                for command in (f"addr add {net}.{i}/24 dev {link}", f"link set {link} up", "link set lo up"):
                    ip(f"-n {name} {command}")
            place = dict(LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR=f"{net}.1")
            place |= dict(MASTER_PORT="29500", OMP_NUM_THREADS="1")
            for rank, name in enumerate(names):
                logs.append(folder / f"host-{rank}.txt")
                command = ["ip", "netns", "exec", name, sys.executable, str(ROOT / "train.py"), *SMALL, *LONG]
                env = os.environ | place | dict(RANK=str(rank), GROUP_RANK=str(rank))
                with open(logs[-1], "w") as log:
                    processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
            end = time.monotonic() + 300
            while "iter 20:" not in logs[0].read_text():
                assert time.monotonic() < end and all(p.poll() is None for p in processes), logs[0].read_text()
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 3))
            began, which = time.monotonic(), draw.randrange(2)
            ip(f"-n {names[which]} link set {links[which]} down")
            while any(p.poll() is None for p in processes) and time.monotonic() < began + LIMIT:
                time.sleep(0.05)
            seconds = None if any(p.poll() is None for p in processes) else time.monotonic() - began
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        printed = [log.read_text() for log in logs]
        lines = [re.findall(r"^error: .*", text, re.M) for text in printed]
        named = [len(line) == 1 and re.search("not answer|cannot be reached", line[0]) for line in lines if line]
        sound = len(named) == 2 and all(named)
        return seconds, sound, "" if sound and seconds else "\n".join(text[-2000:] for text in printed)


def cut(times, jobs):
    with ThreadPoolExecutor(jobs) as pool:
        report("the cable between two processes cut", list(pool.map(cut_once, range(times))))


# -- restarts


def restart(number):
    """(whether the run ended as one that was never killed, whether it had saved before, what was printed)."""
    draw = random.Random(f"restart {number}")
    with folder_with_data() as folder:
        args = [*SMALL, "--max_iters=300", "--lr_decay_iters=300", "--eval_interval=20", f"--timeout={TIMEOUT}"]
        whole = Job(folder, RANKS, *args, "--out_dir=whole", name="whole")
        assert whole.end() == 0, whole.printed
        job = Job(folder, RANKS, *args, options=["--max-restarts=1"])
        assert job.wait_for("^iter 10:"), job.printed
        pids = job.ranks()
        time.sleep(draw.uniform(0, 1))
        os.kill(pids[draw.randrange(RANKS)], signal.SIGKILL)
        code = job.end(300)
        same = code == 0 and ending(folder / "whole")[0] == ending(folder / "out")[0]
        return same, "resuming out/checkpoints" in job.printed, "" if same else job.printed[-3000:]


def restarts(times, jobs):
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(restart, range(times)))
    for _, _, printed in found:
        if printed:
            print(printed, file=sys.stderr)
    same, resumed = (sum(column) for column in list(zip(*found, strict=True))[:2])
    row(
        f"{times} restarts of {RANKS} processes under --max-restarts, one of them killed at a random moment",
        f"{same} went on and ended with the bits of an uninterrupted run, {resumed} of them from a checkpoint",
    )


# -- overlap


def overlap(times, jobs):
    """When reductions begin, as a fraction of the backward pass."""
    for compiled in (False, True):
        with folder_with_data() as folder:
            job = Job(folder, 2, f"--overlap={compiled}", program=Path(__file__))
            assert job.end() == 0, job.printed
            found = re.search(r"reductions: (.*)", job.printed)[1]
            row(f"reductions begin, {'compiled' if compiled else 'eager'}, 2 processes", found)


def measure_overlap(compiled):
    """In each of two processes: backward passes of a model of 14M parameters, with DDP's buckets as they are."""
    begins = []

    def average(world_size, bucket, real=distributed.average):
        begins.append(time.perf_counter())
        return real(world_size, bucket)

    distributed.average = average
    cfg = TrainConfig(device="cpu", dtype="float32", backend="gloo", compile=compiled)
    with distributed.setup(cfg) as dist:
        torch.manual_seed(1)
        model = dist.wrap(GPT(GPTConfig(64, 256, n_layer=8, n_head=6, n_embd=384)))
        fast = compile.compiled(model, cfg, dist, (4, 64), (4, 64))
        first, last, buckets = [], [], 0
        for _ in range(12):
            x = torch.randint(256, (4, 64))
            begins.clear()
            objective, _ = step.loss_terms(fast, x, x.clone())
            begin = time.perf_counter()
            objective.backward()
            seconds = time.perf_counter() - begin
            first.append((begins[0] - begin) / seconds)
            last.append((begins[-1] - begin) / seconds)
            buckets = len(begins)
        first, last = (statistics.median(values[2:]) for values in (first, last))
        dist.say(f"reductions: at {first:.0%} of the backward pass, and the last of {buckets} at {last:.0%}")


SERIES = dict(resume=resume, numbers=numbers)
SERIES |= {kind: partial(series, kind) for kind in FAULTS}
SERIES |= dict(cut=cut, restarts=restarts, overlap=overlap)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="*", metavar="SERIES", choices=[[], *SERIES], help="which; by default all")
    parser.add_argument("--times", type=int, default=20, help="faults of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--overlap", help=argparse.SUPPRESS)  # in the processes of that series
    args = parser.parse_args()
    if args.overlap:
        return measure_overlap(args.overlap == "True")
    print(f"Commit {commit()}, {cpu()}, {os.cpu_count()} cores, PyTorch {torch.__version__}, gloo\n")
    print("| what | found |\n|---|---|", flush=True)
    for name in args.series or SERIES:
        SERIES[name](args.times, args.jobs)


if __name__ == "__main__":
    main()
