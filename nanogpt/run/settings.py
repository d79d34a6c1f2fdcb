"""The parser of the settings: config files, the command line, `--help`.

What settings there are is declared in nanogpt/config.py. This module never imports torch.
"""

import ast
import difflib
import math
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanogpt.config import UserError, is_path, is_utf8, nearest


def load(cls, argv: list[str], prog: str, inherit: Callable | None = None) -> Any:
    """Read config files and `--key=value` arguments into a checked `cls`.

    Files are read in order; flags override them regardless of their position. A class that has ARGUMENTS takes no
    config files; its arguments that are not flags are in the result's `arguments`. inherit: called with the config so
    far, returns ({name: value}, source) for settings that neither files nor flags name, as a resumed run has them.
    The result's `sources` maps each setting that was given to its source. `--help` prints the help and exits with 0.
    Raises UserError with all problems at once.
    """
    given = Given(cls)
    arguments = [a for a in argv if not a.startswith("-") or (a == "-" and hasattr(cls, "ARGUMENTS"))]
    if not hasattr(cls, "ARGUMENTS"):
        given.read_files(arguments)
    given.read_flags([a for a in argv if a not in arguments and a not in ("-h", "--help")])
    asked = dict(given.autos)  # not inherited
    if inherit and not given.problems:
        given.inherit(*inherit(cls(**given.values)))
    cfg = cls(**given.values)
    cfg.sources, cfg.auto_batch, cfg.arguments = given.sources | asked, bool(asked), arguments
    problems = [*given.problems, *misfits(cfg, given.failed)]
    if problems:
        raise UserError(*problems)
    if "-h" in argv or "--help" in argv:
        print(help_text(cfg, prog))
        raise SystemExit(0)
    return cfg


class Given:
    """The settings of a `cls` that files, flags, and an earlier run give, and what is wrong with them."""

    def __init__(self, cls: Any) -> None:
        self.known = {f.name: f.metadata for f in fields(cls)}
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.autos: dict[str, str] = {}  # the source of `batch_size=auto`; `values` keeps the number
        self.problems: list[str] = []
        self.failed: set[str] = set()  # settings with a problem

    def read_files(self, paths: list[str]) -> None:
        """Read config files."""
        names: dict[str, Any] = {}
        for path in paths:
            if "text" in self.known and not path.endswith(".py"):
                self.problems.append(f"{path}: a config file's name ends in .py; --text={path} evaluates on a text")
                continue
            for line, name, value in read_config_file(path, names, self.problems):
                self.assign(f"{path}:{line}", f"{path}:{line}: {name} = {value!r}", name, value)

    def read_flags(self, flags: list[str]) -> None:
        """Read `--key=value` arguments."""
        for flag in flags:
            name, equals, text = flag.lstrip("-").partition("=")
            if equals or name not in self.known:
                self.assign(flag, flag, name, _Text(text))
            else:
                example = "True" if self.known[name]["kind"] is bool else "VALUE"
                written = f"a setting is written --{name}={example}, with an equals sign and no spaces"
                self.problems.append(f"{flag}: {written}")

    def inherit(self, values: dict[str, Any], source: Any) -> None:
        """Take the settings of an earlier run that are not given; `seed=auto` does not count as given."""
        for name, value in values.items():
            if name in self.known and (name not in self.sources or (name, self.values[name]) == ("seed", "auto")):
                self.assign(source, f"{source}: {name} = {value!r}", name, value)

    def assign(self, source: Any, shown: str, name: str, value: Any) -> None:
        """Set a value or record the problem, in which `shown` names it."""
        if name not in self.known:
            self.problems.append(f"{shown}: there is no setting {name!r}{nearest(name, self.known)}")
            return
        try:
            value = convert(value, self.known[name])
        except ValueError as e:
            self.problems.append(f"{shown}: expected {e}")
            self.failed.add(name)
            return
        self.autos.pop(name, None)
        if (name, value) == ("batch_size", "auto"):
            self.autos[name] = source
        else:
            self.values[name], self.sources[name] = value, source


def misfits(cfg: Any, failed: set[str]) -> Iterator[str]:
    """Yield a message for each of `cfg.problems()`, except those of settings that have failed already."""
    for names, why in cfg.problems():
        if not failed & set(names):
            name, where = names[0], cfg.sources.get(names[0], "default")
            shown = where if where.startswith("-") else f"{where}: {name} = {getattr(cfg, name)!r}"
            yield f"{shown}: {why}"


class _Text(str):
    """A value as typed on the command line, not converted yet."""


def change(cfg: Any, name: str, text: str) -> None:
    """Set a setting of `cfg` to the text that was typed. Raises UserError that says what was expected."""
    meta = {f.name: f.metadata for f in fields(cfg)}[name]
    try:
        setattr(cfg, name, convert(_Text(text), meta))
    except ValueError as e:
        raise UserError(f"{name} {text}: expected {e}") from None


def check_bounds(cls, values: dict, source: Any) -> None:
    """Raise UserError for the values {name: value} that the settings of these names in `cls` do not allow."""
    problems = []
    for name, meta in ((f.name, f.metadata) for f in fields(cls) if f.name in values):
        try:
            convert(values[name], meta)
        except ValueError as e:
            problems.append(f"{source}: {name} = {values[name]!r:.60}: expected {e}")
    if problems:
        raise UserError(*problems)


def convert(value: Any, meta: Mapping) -> Any:
    """A value, from Python or the command line, as its setting's type. Raises ValueError that says what was expected."""
    kind, auto = meta["kind"], meta["auto"]
    if auto and isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, _Text):
        value = _from_text(value, kind)
    if kind is float and type(value) is int:
        value = float(value) if -1e300 < value < 1e300 else math.inf
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # so that 1e4 is accepted for 10000
    fits = type(value) is kind
    if fits and kind is not str and kind is not bool:
        low, above, high = meta["low"], meta["above"], meta["high"]
        fits = -1e300 < value < 1e300 and not (
            (low is not None and value < low)
            or (above is not None and value <= above)
            or (high is not None and value > high)
        )
    if fits and meta["choices"]:
        fits = value in meta["choices"]
    if fits and kind is str:
        fits = is_utf8(value)
    if fits and meta["path"]:
        fits = is_path(value) or (value == "" and meta["path"] == "may be empty")
    if not fits:
        raise ValueError(
            describe(meta) + (nearest(value, meta["choices"]) if meta["choices"] and isinstance(value, str) else "")
        )
    return value


def _from_text(text: str, kind: type) -> Any:
    text = str(text)
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def describe(meta: Mapping, brief: bool = False) -> str:
    """What a setting accepts, in words: 'an integer >= 1 or auto'. brief: without bounds that nobody reaches."""
    text, path = "UTF-8 text", "the path of a file or folder, in UTF-8, without NUL, of names of at most 255 bytes"
    if brief:
        text, path = "text", "a path"
    words = {int: "an integer", float: "a number", bool: "True or False", str: text}[meta["kind"]]
    if meta["choices"]:
        words = "one of " + ", ".join(meta["choices"])
    if meta["path"]:
        words = path
    low, above, high = meta["low"], meta["above"], meta["high"]
    if brief and high is not None and high > 1000:
        high = None
    if low is not None and high is not None:
        words += f" from {low} to {high}"
    elif low is not None:
        words += f" >= {low}"
    elif above is not None:
        words += f" > {above}" + ("" if high is None else f" and <= {high}")
    return words + (" or auto" if meta["auto"] else "")


# -- config files: assignments of literals and arithmetic, parsed and never executed

_ARITHMETIC: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def read_config_file(path: str, names: dict, problems: list[str]) -> Iterator[tuple[int, str, Any]]:
    """Yield (line, name, value) for each assignment of the config file at `path`.

    names: the values assigned so far, here or in earlier files; updated. A name that begins with an underscore is a
    variable, not a setting. Problems are appended to `problems`.
    """
    try:
        raw = Path(path).read_bytes()
        statements = ast.parse(raw.decode("utf-8-sig"), filename=path).body
    except FileNotFoundError:
        hint = "" if "." in path else "; a setting is written --key=value"
        problems.append(f"{path}: there is no such config file{nearest_file(path)}{hint}")
        return
    except OSError as e:
        problems.append(f"{path}: cannot be read: {e.strerror}")
        return
    except SyntaxError as e:
        problems.append(f"{path}:{e.lineno or 1}: not an assignment that Python can read: {(e.text or '').strip()!r}")
        return
    except (ValueError, RecursionError, MemoryError) as e:
        problems.append(f"{path}: is no text that Python can read ({type(e).__name__})")
        return
    for statement in statements:
        if (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        ):
            continue  # a docstring
        target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        if not isinstance(statement, ast.Assign) or not isinstance(target, ast.Name):
            problems.append(f"{path}:{statement.lineno}: only assignments like name = value can stand in a config file")
            continue
        name = target.id
        try:
            value = names[name] = evaluate(statement.value, names)
        except (ValueError, TypeError, ArithmeticError, RecursionError) as e:
            problems.append(f"{path}:{statement.lineno}: {name} = ...: {e}")
            continue
        if not name.startswith("_"):
            yield statement.lineno, name, value


def nearest_file(path: str) -> str:
    """'; did you mean FILE?' for a mistyped path, or nothing."""
    folder = Path(path).parent
    others = [p.name for p in folder.glob("*.py") if p.name != Path(path).name]  # including broken links
    close = difflib.get_close_matches(Path(path).name, others, n=1, cutoff=0.5)
    return f"; did you mean {folder / close[0]}?" if close else ""


def evaluate(node: ast.AST, names: dict) -> Any:
    """The value of a literal, an earlier name, or arithmetic on them. Raises ValueError on anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
        return _bounded(node.value)
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        raise ValueError(f"{node.id!r} is not assigned above")
    if isinstance(node, ast.UnaryOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_number(evaluate(node.operand, names)))
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = evaluate(node.left, names), evaluate(node.right, names)
        if isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str):
            return _bounded(left + right)
        _number(left), _number(right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
            raise ValueError("that power is too large for a setting")
        return _bounded(_ARITHMETIC[type(node.op)](left, right))
    raise ValueError("only literals and arithmetic on names assigned above can stand in a config file")


def _number(value: Any) -> Any:
    if type(value) not in (int, float):
        raise ValueError(f"no arithmetic on {value!r}")
    return value


def _bounded(value: Any) -> Any:
    too_large = len(value) > 10_000 if isinstance(value, str) else isinstance(value, complex) or abs(value) > 1e300
    if too_large:
        raise ValueError("that value is too large for a setting")
    return value


# -- showing them


def help_text(cfg: Any, prog: str) -> str:
    """Every setting with its value, meaning, type, default, and the source of the value."""
    if hasattr(cfg, "ARGUMENTS"):
        lines = [f"usage: {prog} {cfg.ARGUMENTS} ... [--key=value ...]", "", "Each setting, with its present value:"]
    else:
        lines = [f"usage: {prog} [config/FILE.py ...] [--key=value ...]", ""]
        lines += ["Config files hold plain assignments; a flag overrides them. Each setting, with its present value:"]
    for f in fields(cfg):
        meta, came = f.metadata, cfg.sources.get(f.name)
        if meta["group"]:
            lines += ["", meta["group"]]
        origin = f"{came}; default {f.default!r}" if came else "default"
        left = f"  --{f.name}={getattr(cfg, f.name)!r}"
        right = textwrap.wrap(
            f"{meta['help']} [{describe(meta, brief=True)}; {origin}]",
            70,
            break_on_hyphens=False,
            break_long_words=False,
        )
        lines += [f"{left:<38}  {right[0]}"] + [" " * 40 + r for r in right[1:]]
    return "\n".join(lines)
