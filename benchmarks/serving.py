"""The server under load: 16 clients against one alone, a short request beside many long ones, minutes of good and bad
clients together, and the first token.

    python benchmarks/serving.py [--clients=16] [--tokens=500] [--rounds=3] [--minutes=10] [--only=streams,fair,load,page]

Real processes and real connections: `nanogpt serve` with models of random weights, whose speed is that of trained ones,
and clients in this process, which do little but read. The last row needs Chromium and Playwright. Everything else on
the machine should be quiet. Prints a table in Markdown; results/ holds dated ones.
"""

import argparse
import asyncio
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import nanogpt  # noqa: E402, F401  (before PyTorch: it says how the threads wait)

# isort: split
import torch  # noqa: E402
from browser import CHROMIUM, open_window  # noqa: E402
from serving import write_run  # noqa: E402

from nanogpt.text.tokenizer import CharTokenizer  # noqa: E402

TOKENIZER = CharTokenizer([chr(c) for c in (10, *range(32, 96))])  # 65 characters, as Shakespeare has
MODELS = {
    "0.8 M, context 64": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
    "10 M, context 256": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
}
PROMPT = "THE KING SAID TO THE QUEEN:\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default="streams,fair,load,page")
    args = parser.parse_args()
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}, {cpu()}"
    print(f"commit {commit}, PyTorch {torch.__version__}, {threads}\n")
    print("| server | measured | goal |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in MODELS.items():
            write_run(Path(folder) / name.split()[0], TOKENIZER, losses=False, **shape)
        if "streams" in args.only:
            for name in MODELS:
                streams(name, Path(folder) / name.split()[0], args)
        if "fair" in args.only:
            for name in MODELS:
                with serving(Path(folder) / name.split()[0]) as (_, port):
                    asyncio.run(fair(name, port, args.rounds))
        if "load" in args.only:
            asyncio.run(load(Path(folder) / "0.8", args.minutes))
        if "page" in args.only:
            page(Path(folder) / "10", args.rounds)


def row(what, measured, goal=""):
    print(f"| {what} | {measured} | {goal} |", flush=True)


def cpu():
    """The processor's name, as far as the system tells it."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or "unknown processor"


@contextmanager
def serving(out_dir, *args):
    """`nanogpt serve`, ready: its process and port."""
    command = [sys.executable, "-c", "from nanogpt.commands.cli import enter; enter()", "serve", "--port=0"]
    command += [f"--out_dir={out_dir}", "--device=cpu", *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("serving "))
            yield process, int(re.search(r":(\d+) ", line)[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


# -- one alone, and 16 together


async def ask(port, **body):
    """(status, body, seconds to the first token, seconds) of a completion; a stream's events as they were sent."""
    began, first, answer = time.perf_counter(), None, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        raw = json.dumps({"prompt": PROMPT} | body).encode()
        writer.write(request(raw))
        await writer.drain()
        while chunk := await reader.read(2**16):
            if first is None and (b"data:" in chunk or b'"text"' in chunk):
                first = time.perf_counter() - began
            answer += chunk
    finally:
        writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest, first, time.perf_counter() - began


def request(raw, kind="application/json"):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def count(answer):
    return int(re.search(rb'"completion_tokens": ?(\d+)', answer)[1])


async def rate(port, clients, tokens):
    """Tokens a second of so many streams that begin together, and the median of their seconds to the first token."""
    body = dict(max_tokens=tokens, stream=True, stream_options={"include_usage": True}, temperature=0.8)
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(port, **body, seed=i) for i in range(clients)))
    seconds = time.perf_counter() - began
    assert all(status == 200 for status, *_ in answers)
    return sum(count(answer) for _, answer, _, _ in answers) / seconds, statistics.median(a[2] for a in answers)


def streams(name, out_dir, args):
    with serving(out_dir, f"--max_batch={args.clients}", f"--max_requests={4 * args.clients}") as (_, port):
        asyncio.run(rate(port, args.clients, 50))  # the first steps are slower
        found = {1: [], args.clients: []}
        for _ in range(args.rounds):  # in turn, so that whatever else happens happens to both
            for clients, results in found.items():
                results.append(asyncio.run(rate(port, clients, args.tokens)))
        alone, together = (statistics.median(speed for speed, _ in found[n]) for n in found)
        waits = [statistics.median(wait for _, wait in found[n]) * 1000 for n in found]
        row(f"one client streaming, {name}", f"{alone:,.0f} tokens/s, the first after {waits[0]:.0f} ms")
        row(f"{args.clients} clients streaming", f"{together:,.0f} tokens/s, the first after {waits[1]:.0f} ms")
        row("ratio", f"{together / alone:.1f} x", "6 x")


# -- a short request beside many long ones


async def fair(name, port, rounds, clients=30):
    """Seconds until somebody has 10 tokens while each of so many others asks for 4,096 of them."""
    long = [asyncio.create_task(ask(port, max_tokens=4096, stream=True, seed=i)) for i in range(clients)]
    await asyncio.sleep(2)
    waits = []
    for _ in range(rounds):
        status, _, _, seconds = await ask(port, max_tokens=10)
        assert status == 200
        waits.append(seconds)
    ended = sum(task.done() for task in long)
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)
    measured = f"{max(waits):.2f} s at most; {ended} of the {clients} long ones had ended by then"
    row(f"10 tokens beside {clients} clients that ask for 4,096 each, {name}", measured, "5 s")


# -- good and bad clients together


async def load(out_dir, minutes):
    """Good clients beside such as vanish, stall, ask for too much or send nonsense; the server's memory meanwhile."""
    with serving(out_dir) as (process, port):
        prompts = [PROMPT[: 5 + 3 * i] for i in range(8)]
        expected = [text_of((await ask(port, prompt=p, max_tokens=200, temperature=0))[1]) for p in prompts]
        end, counts, waits = time.monotonic() + 60 * minutes, Counter(), []

        async def good(i):
            status, answer, wait, _ = await ask(
                port, prompt=prompts[i], max_tokens=200, temperature=0, stream=i % 2 > 0
            )
            waits.append(wait)
            counts["good"] += 1
            counts["failed"] += status != 200
            counts["different"] += status == 200 and text_of(answer) != expected[i]

        async def vanishing(i):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            raw = request(json.dumps(dict(prompt=PROMPT, max_tokens=2000, stream=i % 2 > 0, n=1 + i)).encode())
            writer.write(raw[: len(raw) - 5 * (i == 2)])  # one vanishes in the middle of what it says
            await writer.drain()
            if i == 1:
                await reader.read(500)
            await asyncio.sleep(0.05 * i)
            writer.transport.abort()
            counts["vanished"] += 1

        async def stalling(i):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(request(json.dumps(dict(prompt=PROMPT, max_tokens=2000, stream=True, logprobs=5)).encode()))
            await asyncio.sleep(5)
            writer.transport.abort()
            counts["stalled"] += 1

        async def refused(i):
            bodies = {413: b'{"prompt": "' + b"a" * 300_000 + b'"}', 400: b'{"prompt": ', 415: b"prompt=a"}
            status = list(bodies)[i]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request(bodies[status], "text/plain" if status == 415 else "application/json"))
                answer = await reader.read(2000)
                counts["refused"] += 1
                counts["refused otherwise"] += not answer.startswith(f"HTTP/1.1 {status}".encode())
            finally:
                writer.close()

        async def again(kind, i, pause):
            while time.monotonic() < end:
                try:
                    await kind(i)
                except OSError:
                    counts["failed"] += kind is good
                await asyncio.sleep(pause)

        clients = [again(good, i, 0.05) for i in range(8)] + [again(vanishing, i, 0.2) for i in range(4)]
        clients += [again(stalling, i, 0.1) for i in range(2)] + [again(refused, i, 0.1) for i in range(3)]
        _, sizes = await asyncio.gather(asyncio.gather(*clients), memory(process, end))
        bad = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("vanished", "stalled", "refused"))
        wrong = f"{counts['failed']} failed, {counts['different']} different from alone"
        slowest = f"the first token after {1000 * statistics.median(waits):.0f} ms, {1000 * max(waits):.0f} ms at most"
        row(f"{minutes:g} minutes of mixed load", f"{counts['good']:,} good requests: {wrong}; {slowest}", "0 failed")
        row("beside them", f"{bad}; {counts['refused otherwise']} refused otherwise than they should be", "0")
        settled = sizes[len(sizes) // 5 :]
        steps = ", ".join(f"{size / 2**20:.0f}" for size in settled[:: max(1, len(settled) // 5)])
        row("the server's memory, MiB", f"{steps}; most {max(sizes) / 2**20:.0f}", "flat")
        status, answer, _, _ = await ask(port, prompt=prompts[0], max_tokens=200, temperature=0)
        assert status == 200 and text_of(answer) == expected[0]


async def memory(process, end):
    sizes = []
    while time.monotonic() < end:
        await asyncio.sleep(1)
        sizes.append(psutil.Process(process.pid).memory_info().rss)
    return sizes


def text_of(answer):
    """The text in an answer, whole or streamed."""
    return "".join(json.loads(f'"{text}"') for text in re.findall(r'"text": ?"((?:[^"\\]|\\.)*)"', answer.decode()))


# -- from the command to the first token on the page


def page(out_dir, rounds):
    if not CHROMIUM:
        row("from `nanogpt serve` to the first token in the browser", "no Chromium here", "5 s")
        return
    seconds = []
    for _ in range(rounds):
        with open_window() as window:
            began = time.perf_counter()
            with serving(out_dir) as (_, port):
                ready = time.perf_counter() - began
                window.goto(f"http://127.0.0.1:{port}/")
                window.fill("#prompt", PROMPT)
                window.click("#go")
                window.wait_for_selector("#text .token", state="attached")
                seconds.append((time.perf_counter() - began, ready))
    found = f"{statistics.median(s for s, _ in seconds):.1f} s, of which {statistics.median(s for _, s in seconds):.1f} until it serves"
    row("from `nanogpt serve` to the first token in the browser", found, "5 s")


if __name__ == "__main__":
    main()
