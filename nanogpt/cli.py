"""The `nanogpt` command: which word starts which program.

Every program's module has `main(argv)`, which parses its own arguments; it is imported when it is asked for.
"""

import difflib
import gc
import importlib
import os
import sys
import time

from nanogpt import __version__

COMMANDS = {  # name: (module, what it does)
    "train": ("nanogpt.train", "train a GPT from scratch, from a checkpoint or from GPT-2's weights"),
    "prepare": ("nanogpt.prepare", "make a dataset of any text"),
    "bench": ("nanogpt.bench", "measure where the time of an iteration goes, for any config"),
    "sample": ("nanogpt.sample", "write text with a trained GPT"),
    "talk": ("nanogpt.talk", "play with a trained GPT in the terminal"),
    "serve": ("nanogpt.serve", "let programs and browsers write with a trained GPT"),
    "export": ("nanogpt.convert", "write a trained GPT in Hugging Face's format"),
    "eval": ("nanogpt.eval", "tell how well a trained GPT predicts a text"),
}

CORE = ("torch", "numpy", "safetensors", "tqdm")  # a missing extra is reported where it is used


def enter(*words):
    """What the front doors call: `main` with these words before the process's own arguments, and the way out."""
    code = main([*words, *sys.argv[1:]])
    gc.freeze()  # the interpreter would look through all of PyTorch's objects once more, for a quarter of a second
    sys.exit(code)


def main(argv=None) -> int:
    """Run the command that `argv` names and return the process's exit code."""
    from nanogpt.config import UserError

    argv = sys.argv[1:] if argv is None else argv
    try:
        code = run(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's exit
        return code
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process meets the same problem; one of each node tells it
            for problem in error.problems:
                print(problem if error.exit_code > 128 else f"error: {problem}", file=sys.stderr, flush=True)
        elif "TORCHELASTIC_RUN_ID" in os.environ and error.exit_code < 128:
            time.sleep(10)  # torchrun ends all processes when one has ended, and that which tells may not be so far
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not stdout_is_closed():
            raise  # it was another pipe
        return 141  # as a shell reports a program that SIGPIPE ended
    except ModuleNotFoundError as error:
        if error.name not in CORE:
            raise
        print(
            f"nanogpt: the Python package {error.name} is missing from {sys.executable}: "
            "`make install` or `pip install -c constraints.txt -e .` brings it",
            file=sys.stderr,
        )
        return 2


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


def stdout_is_closed() -> bool:
    """Has whoever read our output stopped, as `head` does? If so, nothing is written there any more."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return True
    return False
