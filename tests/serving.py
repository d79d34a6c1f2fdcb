"""A small trained-looking run and a server for it in a process of its own: for the tests of the server and the page."""

import http.client
import json
import re
import socket
import time
from dataclasses import asdict
from pathlib import Path

import torch
from support import Door

from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint
from nanogpt.text.tokenizer import CharTokenizer

CHARS = "\n abcdefghij<>&\"'/=()é€😀script"  # what a page must not take for HTML, and characters of 1 to 4 bytes


def write_run(out_dir, tok=None, losses=True, **shape):
    """A run's folder whose model has random weights, far enough from uniform that seeds and prompts matter."""
    tok = tok or CharTokenizer.train(CHARS)
    shape = dict(block_size=16, n_layer=2, n_head=2, n_embd=16, bias=False) | shape
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **shape))
    for p in model.parameters():
        p.data.mul_(4 if p.dim() == 2 else 1)
    state = dict(step=20, evaluated=20, losses={"train": 2.0, "val": 2.1}, improved=True, best_val_loss=2.1, spikes=0)
    info = dict(step=20, state=state, model_config=asdict(model.config), tokenizer=tok.to_json())
    checkpoint.write(
        out_dir, dict(model.named_parameters()), {"x": torch.zeros(1)}, info | dict(settings={}, scaler={})
    )
    if losses:
        records = [{"step": s, "loss": 3 - s / 20} for s in range(21)]
        records += [{"step": s, "train_loss": 3 - s / 20, "val_loss": 3.1 - s / 20} for s in range(0, 21, 5)]
        (Path(out_dir) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return model


class Served:
    """`nanogpt serve` on a free port, in a process of its own."""

    def __init__(self, cwd, *args, name="log", env=None, before=None):
        argv = ["serve", "--port=0", "--device=cpu", *args]
        self.door = Door(cwd, argv, name, env, before)
        self.door.wait_for(r"^serving .* at http://")
        self.address = re.search(r"at (http://\S+)", self.door.printed)[1]
        self.host, port = self.address.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)

    def ask(self, method, path, body=None, timeout=600, **headers):
        """(status, headers, body) of a request of its own connection."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | headers
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def complete(self, timeout=600, **body):
        """The JSON of a completion that must succeed."""
        status, _, answer = self.ask("POST", "/v1/completions", {"prompt": "abc", "temperature": 0} | body, timeout)
        assert status == 200, answer
        return json.loads(answer)

    def text(self, **body):
        return self.complete(**body)["choices"][0]["text"]

    def refused(self, body, path="/v1/completions", method="POST", **headers):
        """(status, error) of a request that must fail, its error in OpenAI's shape."""
        status, _, answer = self.ask(method, path, body, **headers)
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and status >= 400
        return status, error

    def metric(self, name):
        """A figure of /metrics."""
        text = self.ask("GET", "/metrics")[2].decode()
        return float(re.search(rf"^nanogpt_{re.escape(name)} (\S+)$", text, re.M)[1])

    def until(self, name, value, timeout=600):
        """Return when a figure has this value."""
        end = time.monotonic() + timeout
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.02)

    def connect(self, body, receive_buffer=None):
        """A bare socket on which a completion has been asked for."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(120)
        sock.connect((self.host, self.port))
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        return sock

    def exchange(self, raw, timeout=600):
        """All that comes back for these bytes until the connection is closed."""
        with socket.create_connection((self.host, self.port), timeout=timeout) as sock:
            sock.sendall(raw)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def close(self):
        self.door.process.kill()
        self.door.process.join()
