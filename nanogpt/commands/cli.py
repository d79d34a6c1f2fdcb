"""The `nanogpt` command: which word starts which program.

The module of each program has `main(argv)`, which parses its own arguments. It is imported only when it is needed.
"""

import difflib
import importlib
import io
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from nanogpt import __version__

COMMANDS = {  # name: (module, what it does)
    "train": ("nanogpt.train", "train a GPT from scratch, from a checkpoint or from GPT-2's weights"),
    "prepare": ("nanogpt.text.prepare", "make a dataset of any text"),
    "bench": ("nanogpt.commands.bench", "measure how long each phase of an iteration takes, for any config"),
    "estimate": ("nanogpt.commands.estimate", "estimate memory, speed, time and cost of a run on GPUs, without them"),
    "sample": ("nanogpt.commands.sample", "generate text with a trained GPT"),
    "talk": ("nanogpt.commands.talk", "try out a trained GPT in the terminal"),
    "serve": ("nanogpt.serve.start", "serve a trained GPT to programs and browsers"),
    "export": ("nanogpt.commands.export", "write a trained GPT for other programs: llama.cpp, Ollama, transformers"),
    "eval": ("nanogpt.commands.eval", "measure how well a trained GPT predicts a text"),
}

LASTING = ("train", "prepare", "export", "serve")  # they go on if nobody reads what they print
CORE = ("torch", "numpy", "safetensors", "tqdm")  # a missing optional package is reported where it is used


def enter(*words: str) -> None:
    """Run `main` with these words before the arguments of the process, and end the process: for the front doors."""
    argv = [*words, *sys.argv[1:]]
    as_process(lambda: main(argv), lasting=bool(argv) and argv[0] in LASTING)


def as_process(program: Callable[[], int | None], lasting: bool = True) -> None:
    """Run `program`, and end this process with the exit code that it returns.

    lasting: whether it goes on if standard output is closed or full; lines that cannot be written are then dropped.
    """
    open_streams(lasting)
    try:
        code = program() or 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process at once: the only way that our processes end.

    Ordinary interpreter shutdown would visit all of PyTorch's objects for a quarter of a second, and abort (SIGABRT) if a
    thread of PyTorch still runs, such as those that connect processes.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Dropping(io.FileIO):
    """Drops what cannot be written because nobody reads it any more or the disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def open_streams(lasting: bool) -> None:
    """Set up the standard streams so that printing any text raises no error, for `lasting` not even if they are closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get this number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        errors = "replace" if stream.errors in ("strict", "surrogateescape") else stream.errors
        try:
            number = stream.fileno()
        except (OSError, ValueError):
            continue  # not a file: something captures the output
        if name == "stdout" and not lasting:
            stream.reconfigure(errors=errors)
            continue
        raw = Dropping(number, "w", closefd=False)
        buffer = raw if stream.write_through else io.BufferedWriter(raw)
        how = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, **how))


def main(argv: list[str]) -> int:
    """Run the command that `argv` names, and return the exit code of the process."""
    from nanogpt.config import UserError

    try:
        code = run(argv)
        sys.stdout.flush()  # so that a closed pipe raises here
        return code
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except OSError:
        failure = output_failure()
        if failure is None:
            raise  # the error is about another file
        if isinstance(failure, BrokenPipeError):
            return 141  # as a shell reports a program that SIGPIPE ended
        print(f"error: standard output: cannot be written to ({failure.strerror})", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in CORE:
            raise
        print(
            f"nanogpt: the Python package {error.name} is missing from {sys.executable}: "
            "`make install` or `pip install -c constraints.txt -e .` brings it",
            file=sys.stderr,
        )
        return 2


def report(error: Any) -> int:
    """Print the lines of a UserError, once however many processes `torchrun` started. Returns the exit code.

    If processes fail after they have met, run/launch.py prints the first failure, and there are no lines here.
    """
    first, torchrun = os.environ.get("LOCAL_RANK", "0") == "0", "TORCHELASTIC_RUN_ID" in os.environ
    stopped = error.exit_code > 128  # by a request, which all processes got
    if stopped and not first:
        return error.exit_code
    if torchrun and not first and error.problems:
        # The first process probably has the same problem, but may report it later. When it has ended, torchrun ends
        # this process; otherwise this process reports.
        time.sleep(10)
    whose = f"process {os.environ.get('RANK')} on {platform.node()}: " if torchrun and not first else ""
    for problem in error.problems:
        print(problem if stopped else f"error: {whose}{problem}", file=sys.stderr, flush=True)
    return error.exit_code


def run(argv: list[str]) -> int:
    """Run the program that the first word names; without one, print the table of commands."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        table = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
        print(f"usage: nanogpt COMMAND [arguments]\n\n{table}\n\nnanogpt COMMAND --help describes a command")
        return 0
    name, *rest = argv
    if name == "--version":
        print(f"nanogpt {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "expected one of " + ", ".join(COMMANDS)
        print(f"nanogpt: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest) or 0


def output_failure() -> OSError | None:
    """The error that writing to standard output raises now, such as a closed pipe, or None."""
    try:
        print(flush=True)
        return None
    except OSError as e:
        return e
