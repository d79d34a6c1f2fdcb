"""`nanogpt talk` in a terminal and in a pipe."""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from support import ROOT, SMALL

from nanogpt import train
from nanogpt.commands import talk as room
from nanogpt.config import TalkConfig
from nanogpt.generate import Engine
from nanogpt.model import GPT, GPTConfig
from nanogpt.run.settings import load
from nanogpt.text.tokenizer import ByteTokenizer

START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from nanogpt.commands.cli import enter; enter()"
COMMAND = [sys.executable, "-c", START, "talk", "--device=cpu", "--max_new_tokens=30"]


@pytest.fixture
def trained(tiny, monkeypatch, capsys):
    """A folder with a trained run in out/."""
    root = tiny.parent.parent
    monkeypatch.chdir(root)
    train.main([*SMALL, "--max_iters=40", "--lr_decay_iters=40", "--eval_interval=40"])
    shutil.rmtree(root / "data")
    return root


class Terminal:
    """A program in its own terminal, and what it has printed."""

    def __init__(self, command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"  # no colours, no bracketed paste
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, such as these tests, ignore it
            os.execv(command[0], command)
        self.shown = ""

    def read(self, again=""):
        """The next output, or nothing if the program has ended. `again` is typed if there is no output for some time."""
        for _ in range(60):
            ready, _, _ = select.select([self.fd], [], [], 2)
            if ready:
                break
            self.type(again)
        assert ready, f"nothing more comes after {self.shown!r}"
        try:
            return os.read(self.fd, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""

    def until(self, pattern, again=""):
        """Wait for `pattern` in the output; return the output up to its end, and drop it. `again`: see `read`."""
        while not (found := re.search(pattern, self.shown, re.S)):
            more = self.read(again)
            assert more, f"{pattern!r} was not shown: {self.shown!r}"
            self.shown += more.replace("\r\n", "\n")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self):
        """Its exit code, once it has ended."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(trained):
    """terminal("--temperature=0") starts it; its prompt has been shown."""
    started = []

    def start(*args):
        started.append(Terminal([*COMMAND, *args]))
        started[-1].until("Ctrl-D leaves\\.\n> $")
        return started[-1]

    yield start
    for t in started:
        os.close(t.fd)


def test_an_empty_line_continues_the_text(terminal):
    t = terminal()
    t.type("The cat\r")
    first = t.until("\n> $")
    assert first.startswith("The cat\n") and len(first) == len("The cat\n") + 30 + len("\n> ")
    t.type("\r")
    second = t.until("\n> $")
    assert len(second) == 1 + 30 + len("\n> ") and second[1:] != first[8:]
    t.type("\x04")
    assert t.end() == 0


def test_ctrl_c_stops_the_text_and_not_the_program(terminal):
    t = terminal("--max_new_tokens=10000000")
    t.type("The\r")
    t.until("The\n.{40}")
    t.type("\x03")
    t.until("\n> $")
    t.type("/max_new_tokens 5\r")
    t.until("max_new_tokens = 5\n> $")
    t.type("The\r")
    assert len(t.until("\n> $")) == len("The\n") + 5 + len("\n> ")
    t.type("\x04")
    assert t.end() == 0


def test_ctrl_c_at_the_prompt_forgets_the_line(terminal):
    t = terminal()
    t.type("nonsense")
    t.until("nonsense$")
    t.type("\x03")
    t.until("Ctrl-D leaves.*> $", again="\x03")  # Python overlooks one that comes just before it waits for a key
    t.type("/top_k\r")
    t.until("top_k = 200\n> $")
    t.type("\x04")
    assert t.end() == 0


def test_the_arrow_keys_recall_earlier_lines(terminal):
    pytest.importorskip("readline")
    t = terminal()
    t.type("/temperature 0.25\r")
    t.until("temperature = 0.25\n> $")
    t.type("/top_k 7\r")
    t.until("top_k = 7\n> $")
    t.type("\x1b[A\x1b[A\r")
    t.until("temperature = 0.25\n> $")


def test_tab_completes_a_command(terminal):
    pytest.importorskip("readline")
    t = terminal()
    t.type("/tem\t0.5\r")
    t.until("temperature = 0.5\n> $")


@pytest.mark.parametrize("word", ["/quit", "/exit "])
def test_quit_and_exit_leave(terminal, word):
    t = terminal()
    t.type("/help\r")
    assert "/quit" in t.until("/seed.*\n> $")
    t.type(f"{word}\r")
    assert t.end() == 0


# In a pipe


def talk(lines, *args):
    """(standard output, standard error, exit code) for these lines."""
    done = subprocess.run([*COMMAND, *args], input=lines, capture_output=True, timeout=120)
    return done.stdout.decode(), done.stderr.decode().split("(--int8)\n")[-1], done.returncode


def test_lines_from_a_pipe_are_answered(trained):
    text, said, code = talk(b"The cat\nThe dog\n")
    assert (len(text), said, code) == (2 * 31, "", 0)
    assert text[30] == text[61] == "\n"


def test_lines_after_quit_are_not_answered(trained):
    text, said, code = talk(b"The cat\n/quit\nThe dog\n")
    assert (len(text), said, code) == (31, "", 0)
    assert talk(b"/quti\n")[1] == "error: /quti: there is no such command; did you mean /quit?\n"


def test_each_text_has_the_next_seed_and_settings_apply(trained):
    same = talk(b"The\n/again\n/seed 1337\n/again\n")[0]
    assert same[:31] == same[62:] != same[31:62]
    greedy = talk(b"/temperature 0\nThe\n/again\n/top_k 1\n/temp 1\n/again\n")[0]
    assert greedy[:31] == greedy[31:62] == greedy[62:]
    assert talk(b"The\n/again\n", "--seed=3")[0][31:] == talk(b"The\n", "--seed=4")[0]


def test_a_stop_string_ends_a_text(trained):
    text, said, _ = talk(b"/stop e|\\n\nThe\n/stop\nThe\n", "--max_new_tokens=100", "--temperature=0.3")
    assert said == "stop = 'e|\\\\n'\nstop = ''\n"
    first, rest = text.split("\n", 1)
    assert "e" not in first and len(first) < 100 and "e" in rest


def test_mistakes_are_reported_and_the_program_continues(trained):
    text, said, code = talk(
        "\n/tempo 1\n/temperature warm\n/top_k -1\n/t 1\n//\nÖ\n/helb\nThe\n".encode() + b"\xff\n/help"
    )
    lines = said.splitlines()
    assert lines[0] == "error: there is no text yet; type its beginning"
    assert lines[1].startswith("error: /tempo: there is no such command")
    assert lines[2] == "error: temperature warm: expected a number >= 0.0"
    assert lines[3] == "error: top_k -1: expected an integer from 0 to 2147483647"
    assert lines[4].startswith("error: /t: there is no such command")
    assert lines[5].startswith("error: not in the tokenizer's vocabulary: '/'")
    assert lines[6].startswith("error: not in the tokenizer's vocabulary: 'Ö'")
    assert lines[7] == "error: /helb: there is no such command; did you mean /help?"
    assert lines[8].startswith("error: not in the tokenizer's vocabulary: '\ufffd'")
    assert any(line.startswith("  /temperature 0.8 ") for line in lines[9:])
    assert (len(text), code) == (31, 0)


def test_nanogpt_talk_starts_the_program():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage: nanogpt talk" in done.stdout and "--temperature=0.8" in done.stdout


# In this process


def stubborn(token, tok):
    """An Engine whose model always generates the same token."""
    model = GPT(GPTConfig(block_size=16, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=8, bias=True))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[token] = 1.0
    return Engine(model, 1, tok.vocab_size)


def went_on(token, *args):
    """The tokens after "ab" of a model that always generates this one."""
    tok, cfg = ByteTokenizer(), load(TalkConfig, ["--temperature=0", "--max_new_tokens=5", *args], "nanogpt talk")
    ids = room.go_on(cfg, stubborn(token, tok), tok, tok.encode("ab"))
    return ids[2:]


def test_a_text_ends_where_the_model_ends_it(capsys):
    eot = ByteTokenizer().eot
    assert went_on(eot) == [eot]
    assert capsys.readouterr().out == "\n"


def test_a_text_that_ends_with_the_beginning_of_a_stop_string_is_shown_whole(capsys):
    assert went_on(ord("a"), "--stop=ab") == [ord("a")] * 5
    assert capsys.readouterr().out == "aaaaa\n"


def test_nothing_is_printed_after_a_stop_string(capsys):
    assert went_on(ord("a"), "--stop=aaa") == [ord("a")] * 3
    assert capsys.readouterr().out == "\n"


def test_spaces_around_a_line_are_part_of_the_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"  The \n\n /x"), encoding="utf-8"))
    assert list(room.lines()) == ["  The ", "", " /x"]


def test_an_automatic_seed_becomes_a_number(capsys):
    cfg = load(TalkConfig, [], "nanogpt talk")
    room.change(cfg, "/seed auto")
    assert type(cfg.seed) is int
    assert capsys.readouterr().err == f"seed = {cfg.seed}\n"
