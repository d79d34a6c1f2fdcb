"""The `nanogpt` command and the front doors at the root."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import nanogpt
from nanogpt import cli

ROOT = Path(__file__).parent.parent
PROGRAM_DOORS = ["train", "sample"]
SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh") if shutil.which(shell)]
PYTHON = pytest.param(sys.executable, id="python")

ECHO = """
def main(argv):
    print(*argv, sep="\\n")
    return 7
"""


def run(*command, cwd=ROOT, **env):
    env = {**os.environ, **env}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def write(path, text, executable=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# The command


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_the_table(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name} " in out and text in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanogpt {nanogpt.__version__}\n"


@pytest.mark.parametrize(
    "word, hint", [("trian", "did you mean train?"), ("xyz", "expected one of train, prepare, sample")]
)
def test_unknown_command(word, hint, capsys):
    assert cli.main([word, "--lr=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and repr(word) in err and hint in err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_program(name):
    module, _ = cli.COMMANDS[name]
    package, _, stem = module.partition(".")
    assert package == "nanogpt"
    assert (ROOT / "nanogpt" / f"{stem}.py").exists()


@pytest.mark.parametrize("returned, code", [("None", 0), ("0", 0), ("3", 3)])
def test_arguments_and_exit_code_pass_through(returned, code, tmp_path, monkeypatch, capsys):
    name = f"program_returning_{returned}"
    write(tmp_path / f"{name}.py", f"def main(argv):\n    print(argv)\n    return {returned}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "other", (name, "for this test"))
    assert cli.main(["other", "a.py", "--b=c d"]) == code
    assert capsys.readouterr().out == "['a.py', '--b=c d']\n"


def run_program(tmp_path, source, shell=None):
    """Run `source` as the program of a command, in a process of its own."""
    write(tmp_path / "program.py", source)
    code = "from nanogpt import cli; cli.COMMANDS['p'] = ('program', ''); raise SystemExit(cli.main(['p']))"
    start = write(tmp_path / "start.py", code)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    if shell:
        return run("sh", "-c", shell.format(f"'{sys.executable}' '{start}'"), PYTHONPATH=path)
    return run(sys.executable, start, PYTHONPATH=path)


@pytest.mark.parametrize("rank, lines", [("", 2), ("0", 2), ("1", 0)])
def test_user_errors_are_lines(rank, lines, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    source = "from nanogpt.config import UserError\ndef main(argv): raise UserError('one thing', 'another thing')"
    result = run_program(tmp_path, source)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["error: one thing", "error: another thing"][:lines]


def test_interrupted(tmp_path):
    result = run_program(tmp_path, "def main(argv): raise KeyboardInterrupt")
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "interrupted")


@pytest.mark.parametrize("package", ["torch", "numpy", "safetensors", "tqdm"])
@pytest.mark.parametrize("source", ["import {}", "import {}.part", "def main(argv): from {} import thing"])
def test_missing_core_package(package, source, tmp_path):
    write(
        tmp_path / f"{package}.py",
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')",
    )
    result = run_program(tmp_path, source.format(package))
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert f"package {package} is missing" in result.stderr and "make install" in result.stderr


@pytest.mark.parametrize("source", ["import no_such_package", "import tqdm.no_such_part"])
def test_other_missing_modules_are_not_hidden(source, tmp_path):
    result = run_program(tmp_path, source)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr and "make install" not in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_into_a_closed_pipe(lines, unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    program = f"def main(argv):\n    import time; time.sleep(0.5)\n    for i in range({lines}): print(i)"
    result = run_program(tmp_path, program, shell="{{ {}; echo $? >&2; }} | true")
    assert result.stderr.split() == ["141"]


def test_another_broken_pipe_is_an_error(tmp_path):
    result = run_program(tmp_path, "def main(argv): raise BrokenPipeError('of a logger')")
    assert result.returncode == 1
    assert "of a logger" in result.stderr


# The front doors


@pytest.fixture
def clone(tmp_path):
    """A clone without an environment, with a space in its name; its programs echo what they get."""
    clone = tmp_path / "my clone"
    (clone / "nanogpt").mkdir(parents=True)
    for name in ("train.py", "sample.py", "nanogpt/__init__.py", "nanogpt/cli.py", "nanogpt/config.py"):
        shutil.copy(ROOT / name, clone / name)
    for name in PROGRAM_DOORS:
        write(clone / "nanogpt" / f"{name}.py", ECHO)
    return clone


def make_python(path):
    """A python that is told apart from all others by the name it goes by."""
    name = path.parent.parent.name
    return write(path, f'#!/bin/sh\nexec "{sys.executable}" "$@" "by {name}"\n', executable=True)


@pytest.mark.parametrize("door", PROGRAM_DOORS)
@pytest.mark.parametrize("start", [*SHELLS, PYTHON, pytest.param(None, id="itself")])
def test_door_passes_everything_on(start, door, clone, tmp_path):
    make_python(tmp_path / "path" / "bin" / "python3")
    path = os.pathsep.join([str(tmp_path / "path" / "bin"), os.environ["PATH"]])
    command = [start] if start else []  # None: the file itself is executable
    given = ["config/a b.py", "--start=$HOME `x` \"'", ""]
    result = run(*command, clone / f"{door}.py", *given, cwd=tmp_path, PATH=path)
    by_shell = [] if start == sys.executable else ["by path"]
    assert result.stdout.split("\n")[:-1] == given + by_shell, result.stderr
    assert (result.returncode, result.stderr) == (7, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_door_prefers_the_environment_beside_it(shell, clone):
    make_python(clone / ".venv" / "bin" / "python")
    result = run(shell, "train.py", "x", cwd=clone)
    assert result.stdout.split("\n")[:-1] == ["x", "by .venv"], result.stderr


def test_model_door():
    code = "import model as door, nanogpt.model as room; print(door.GPT is room.GPT, *door.__all__)"
    result = run(sys.executable, "-c", code)
    assert result.stdout == "True GPT GPTConfig\n", result.stderr


@pytest.mark.parametrize("door", ["train", "sample", "model"])
def test_door_names_its_room(door):
    path = ROOT / f"{door}.py"
    assert os.access(path, os.X_OK)
    assert f"nanogpt/{door}.py" in path.read_text()
    assert len(path.read_text().splitlines()) < 20


@pytest.mark.parametrize("door", PROGRAM_DOORS)
@pytest.mark.parametrize("start", ["sh", PYTHON])
def test_help_end_to_end(start, door):
    result = run(start, f"{door}.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--out_dir" in result.stdout


def test_train_without_torch(tmp_path):
    write(tmp_path / "torch.py", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = run(sys.executable, "train.py", "--max_iters=1", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "torch is missing" in result.stderr
