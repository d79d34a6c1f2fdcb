"""Play with a trained model in the terminal: type how a text begins, and see how it goes on."""

import random
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields

from nanogpt import config, quantize
from nanogpt.config import TalkConfig, UserError
from nanogpt.generate import Engine, Options
from nanogpt.run import distributed, settings, trained
from nanogpt.text.tokenizer import Stream

CHANGEABLE = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop", "seed")
LEAVE = ("/quit", "/exit")
WELCOME = "Type how a text begins. /help says what else there is, Ctrl-C stops a text, /quit or Ctrl-D leaves."
HELP = """\
  TEXT                    the model goes on from here; \\n is a new line, // at the beginning a /
  (nothing)               it goes on where it stopped
  /again                  another text with the same beginning
  /quit                   leave; /exit and Ctrl-D do too"""


def main(argv: list[str]) -> None:
    """Run `nanogpt talk` with these arguments."""
    cfg = settings.load(TalkConfig, argv, "nanogpt talk")
    with distributed.setup(cfg, out=sys.stderr) as dist:  # the text alone goes to standard output
        distributed.choose_seed(cfg, dist)
        found = trained.load(cfg, dist)
        talk(cfg, quantize.made_ready(found.model, cfg, dist), found.tokenizer)


def talk(cfg, model, tok):
    """Read lines and answer each, until there are no more, or one says to leave."""
    engine = Engine(model, 1, tok.vocab_size)
    begun, ids = [], []  # the tokens of the text as it began, and as it has become
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
                    ids = begun
                elif line:
                    text, unknown = trained.known(config.unescaped(line[line.startswith("//") :]), tok)
                    if unknown:
                        print(unknown, file=sys.stderr)
                    begun = ids = tok.encode(text)
                if not ids:
                    raise UserError("there is no text yet; type how it begins")
                ids = go_on(cfg, engine, tok, ids)
                cfg.seed += 1  # or the next text would be the same
        except UserError as error:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)


def lines():
    """Yield what is typed, line by line, with a prompt and a history where it is typed in a terminal."""
    sys.stdin.reconfigure(errors="replace")
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
    """A history with the arrow keys, and commands completed by Tab, where this Python has readline."""
    try:
        import readline
    except ImportError:
        return
    commands = [f"/{name} " for name in CHANGEABLE] + ["/again", "/help", *LEAVE]
    readline.set_completer_delims("")
    readline.set_completer(lambda text, i: [*(c for c in commands if text and c.startswith(text)), None][i])
    readline.parse_and_bind("tab: complete")


def help_text(cfg):
    """What can be typed, and the present settings."""
    helps = {f.name: f.metadata["help"] for f in fields(cfg)}
    rows = [f"  {f'/{name} {getattr(cfg, name)}':<23} {helps[name]}" for name in CHANGEABLE]
    return "\n".join([HELP, *rows])


def change(cfg, command):
    """Obey `/temperature 0.5`: change that setting, or without a value show it. UserError where there is none."""
    typed, _, value = command[1:].partition(" ")
    matching = [name for name in CHANGEABLE if name == typed or (typed and name.startswith(typed))]
    name = typed if typed in matching else matching[0] if len(matching) == 1 else None
    if name is None:
        near = config.nearest(f"/{typed}", [*(f"/{name}" for name in (*CHANGEABLE, "again", "help")), *LEAVE])
        raise UserError(f"/{typed}: there is no such command{near or '; /help lists them'}")
    if value or name == "stop":
        settings.change(cfg, name, value)
    if cfg.seed == "auto":
        cfg.seed = random.randrange(2**32)
    print(f"{name} = {getattr(cfg, name)!r}", file=sys.stderr)


def go_on(cfg, engine, tok, ids):
    """Write how a text goes on: its tokens. Ctrl-C ends it early."""
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
def interruptible():
    """A list that is filled by Ctrl-C in a terminal; a second one ends the program."""
    pressed = []
    if not sys.stdin.isatty():
        yield pressed  # there, it ends the program
        return

    def note(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def write(text: str) -> None:
    """Write to standard output and flush."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
