"""Try out a trained model in the terminal: type the beginning of a text, and see how the model continues it."""

import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType

from nanogpt import config, quantize
from nanogpt.commands.sample import write
from nanogpt.config import TalkConfig, UserError
from nanogpt.generate import Engine, Options
from nanogpt.model import GPT
from nanogpt.run import distributed, memory, settings, trained
from nanogpt.text.tokenizer import Stream, Tokenizer

CHANGEABLE = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop", "seed")
LEAVE = ("/quit", "/exit")
COMMANDS = [*(f"/{name}" for name in CHANGEABLE), "/again", "/help", *LEAVE]
WELCOME = "Type the beginning of a text. /help lists the commands, Ctrl-C stops a text, /quit or Ctrl-D leaves."
HELP = """\
  TEXT                    the model continues it; \\n is a newline, // at the beginning is a /
  (nothing)               the model continues its last text
  /again                  another text with the same beginning
  /quit                   leave, like /exit and Ctrl-D"""


def main(argv: list[str]) -> None:
    """Run `nanogpt talk` with these arguments."""
    cfg = settings.load(TalkConfig, argv, "nanogpt talk")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # standard output has the text only
        distributed.choose_seed(cfg, dist)
        found = trained.load(cfg, dist)
        memory.crop_to_fit(found.model, 1, "a talk", dist)
        talk(cfg, quantize.made_ready(found.model, cfg, dist), found.tokenizer)


def talk(cfg: TalkConfig, model: GPT, tok: Tokenizer) -> None:
    """Read lines and answer each, until they end or one is a command to leave."""
    engine = Engine(model, 1, tok.vocab_size)
    prompt: list[int] = []
    ids: list[int] = []  # of the prompt and its continuation
    for line in lines():
        try:
            command = line.strip() if line.startswith("/") and not line.startswith("//") else None
            if command in LEAVE:
                return
            if command == "/help":
                print(help_text(cfg), file=sys.stderr)
            elif command and command != "/again":
                change(cfg, command)
            else:
                if command:
                    ids = prompt
                elif line:
                    text, unknown = trained.known(config.unescaped(line[line.startswith("//") :]), tok)
                    if unknown:
                        print(unknown, file=sys.stderr)
                    prompt = ids = tok.encode(text)
                if not ids:
                    raise UserError("there is no text yet; type its beginning")
                ids = go_on(cfg, engine, tok, ids)
                cfg.seed = int(cfg.seed) + 1  # otherwise the next text would be the same
        except UserError as error:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)


def lines() -> Iterator[str]:
    """Yield what is typed, line by line; in a terminal, with a prompt and a history."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    print(WELCOME, file=sys.stderr)
    prepare_readline()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)


def prepare_readline() -> None:
    """Enable a history with the arrow keys and the completion of commands with Tab, if this Python has readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_completer_delims("")
    readline.set_completer(lambda text, i: [*(f"{c} " for c in COMMANDS if text and c.startswith(text)), None][i])
    readline.parse_and_bind("tab: complete")


def help_text(cfg: TalkConfig) -> str:
    """What can be typed, and the present settings."""
    helps = {f.name: f.metadata["help"] for f in fields(cfg)}
    rows = [f"  {f'/{name} {getattr(cfg, name)}':<23} {helps[name]}" for name in CHANGEABLE]
    return "\n".join([HELP, *rows])


def change(cfg: TalkConfig, command: str) -> None:
    """Run `/temperature 0.5`: change that setting, or show it if no value is given. Raises UserError if there is none."""
    typed, _, value = command[1:].partition(" ")
    matching = [name for name in CHANGEABLE if name == typed or (typed and name.startswith(typed))]
    if typed not in matching and len(matching) != 1:
        hint = config.nearest(f"/{typed}", COMMANDS) or "; /help lists them"
        raise UserError(f"/{typed}: there is no such command{hint}")
    name = typed if typed in matching else matching[0]
    if value or name == "stop":
        settings.change(cfg, name, value)
    if cfg.seed == "auto":
        cfg.seed = random.randrange(2**32)
    print(f"{name} = {getattr(cfg, name)!r}", file=sys.stderr)


def go_on(cfg: TalkConfig, engine: Engine, tok: Tokenizer, ids: list[int]) -> list[int]:
    """Print the continuation of a text; Ctrl-C ends it early. Returns the ids of the whole text."""
    stop = frozenset() if tok.eot is None else frozenset([tok.eot])
    stream = Stream(tok, cfg.stop_strings())
    (row,) = engine.add(ids, Options.of(cfg, stop=stop))
    with interruptible() as interrupted:
        while row.index >= 0:
            for token in engine.step():
                write(stream.push(token.id) if token.finish != "stop" else "")
            if stream.stopped or interrupted:
                engine.remove(row)
    write(stream.flush() + "\n")
    return row.ids


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list to which Ctrl-C in a terminal adds its signal; a second one ends the program."""
    pressed: list[int] = []
    if not sys.stdin.isatty():  # Ctrl-C ends the program
        yield pressed
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
