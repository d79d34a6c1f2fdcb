"""The `nanogpt` command: which word starts which program.

Every program's module has `main(argv)`, which parses its own arguments; it is imported when it is asked for.
"""

import difflib
import importlib
import io
import os
import sys
import time
from contextlib import suppress

from nanogpt import __version__

COMMANDS = {  # name: (module, what it does)
    "train": ("nanogpt.train", "train a GPT from scratch, from a checkpoint or from GPT-2's weights"),
    "prepare": ("nanogpt.text.prepare", "make a dataset of any text"),
    "bench": ("nanogpt.commands.bench", "measure where the time of an iteration goes, for any config"),
    "sample": ("nanogpt.commands.sample", "write text with a trained GPT"),
    "talk": ("nanogpt.commands.talk", "play with a trained GPT in the terminal"),
    "serve": ("nanogpt.serve.start", "let programs and browsers write with a trained GPT"),
    "export": ("nanogpt.commands.export", "write a trained GPT for other programs: llama.cpp, Ollama, transformers"),
    "eval": ("nanogpt.commands.eval", "tell how well a trained GPT predicts a text"),
}

LASTING = ("train", "prepare", "export", "serve")  # their lines only report: nobody need read them for these to go on
CORE = ("torch", "numpy", "safetensors", "tqdm")  # a missing extra is reported where it is used


def enter(*words):
    """What the front doors call: `main` with these words before the process's own arguments, and the way out."""
    argv = [*words, *sys.argv[1:]]
    as_process(lambda: main(argv), lasting=bool(argv) and argv[0] in LASTING)


def as_process(program, lasting=True):
    """Run `program` as all that this process does, and end the process with the exit code that it returns.

    lasting: whether it goes on when its standard output is closed or full; the lines that cannot be written are dropped.
    """
    open_streams(lasting)
    try:
        code = program() or 0
    except SystemExit as e:  # of argparse
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code):
    """End this process at once: the one way out of every process of ours.

    The interpreter's own way looks through all of PyTorch's objects once more, for a quarter of a second, and aborts
    (SIGABRT) if a thread of PyTorch's is still about, as those that connect processes may be.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Dropping(io.FileIO):
    """Drops what cannot be written: nobody reads it any more, or the disk is full."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def open_streams(lasting):
    """Make standard output and error such that no text of ours, and for `lasting` no state of theirs, raises an error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would get the number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        errors = "replace" if stream.errors in ("strict", "surrogateescape") else stream.errors
        try:
            number = stream.fileno()
        except (OSError, ValueError):
            continue  # no file, but what captures it
        if name == "stdout" and not lasting:
            stream.reconfigure(errors=errors)
            continue
        raw = Dropping(number, "w", closefd=False)
        buffer = raw if stream.write_through else io.BufferedWriter(raw)
        how = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, **how))


def main(argv=None) -> int:
    """Run the command that `argv` names and return the process's exit code."""
    from nanogpt.config import UserError

    argv = sys.argv[1:] if argv is None else argv
    try:
        code = run(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's exit
        return code
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except OSError:
        failure = output_failure()
        if failure is None:
            raise  # it was another file
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


def report(error) -> int:
    """Print a UserError's lines, once however many processes `torchrun` started; the exit code."""
    first, torchrun = os.environ.get("LOCAL_RANK", "0") == "0", "TORCHELASTIC_RUN_ID" in os.environ
    asked = error.exit_code > 128  # to stop
    if asked and not first:
        return error.exit_code  # they all were
    if torchrun and not (first and not error.second_hand):
        # Most likely another process has the same problem or knows more about it, and may not be so far as to say it.
        # When it has ended, torchrun ends this one; if it does not, it is up to this one.
        time.sleep(15 if error.second_hand else 10)
    for problem in error.problems:
        print(problem if asked else f"error: {problem}", file=sys.stderr, flush=True)
    return error.exit_code


def run(argv) -> int:
    """Start the program that the first word names; without one, print the table."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(table())
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
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(rest) or 0


def table() -> str:
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:{width}}  {text}\n" for name, (_, text) in COMMANDS.items())
    return f"usage: nanogpt COMMAND [arguments]\n\n{commands}\nnanogpt COMMAND --help says more about one"


def output_failure():
    """The OSError of whoever writes to standard output now, as when its reader has stopped; None if there is none."""
    try:
        print(flush=True)
    except OSError as e:
        return e
