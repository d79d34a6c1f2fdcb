"""The `nanogpt` command and the front doors at the root."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import nanogpt
from nanogpt.commands import cli

ROOT = Path(__file__).parents[2]
ROOMS = {"train": "nanogpt/train.py", "sample": "nanogpt/commands/sample.py"}
PROGRAM_DOORS = list(ROOMS)
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


@pytest.mark.parametrize("word, hint", [("trian", "did you mean train?"), ("xyz", "expected one of train, ")])
def test_unknown_command(word, hint, capsys):
    assert cli.main([word, "--lr=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and repr(word) in err and hint in err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_program(name):
    module, _ = cli.COMMANDS[name]
    assert module.startswith("nanogpt.") and (ROOT / f"{module.replace('.', '/')}.py").exists()


@pytest.mark.parametrize("returned, code", [("None", 0), ("0", 0), ("3", 3)])
def test_arguments_and_exit_code_pass_through(returned, code, tmp_path, monkeypatch, capsys):
    name = f"program_returning_{returned}"
    write(tmp_path / f"{name}.py", f"def main(argv):\n    print(argv)\n    return {returned}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "other", (name, "for this test"))
    assert cli.main(["other", "a.py", "--b=c d"]) == code
    assert capsys.readouterr().out == "['a.py', '--b=c d']\n"


def run_program(tmp_path, source, shell=None, lasting=False, **env):
    """Run `source` as the program of a command, in a process of its own. `lasting`: it is in cli.LASTING."""
    write(tmp_path / "program.py", source)
    lasting = "cli.LASTING += ('p',); " * lasting
    start = write(
        tmp_path / "start.py",
        f"from nanogpt.commands import cli; cli.COMMANDS['p'] = ('program', ''); {lasting}cli.enter('p')",
    )
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    if shell:
        return run("sh", "-c", shell.format(f"'{sys.executable}' '{start}'"), cwd=tmp_path, **env)
    return run(sys.executable, start, **env)


@pytest.mark.parametrize("rank", ["", "0", "1", "nonsense"])
def test_user_errors_are_lines(rank, tmp_path, monkeypatch):
    """Without torchrun, every process prints its errors, whatever its rank."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    source = "from nanogpt.config import UserError\ndef main(argv): raise UserError('one thing', 'another thing')"
    result = run_program(tmp_path, source)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["error: one thing", "error: another thing"]


def test_under_torchrun_others_wait_for_the_first_and_report_if_it_does_not(tmp_path):
    source = (
        "import time\nfrom nanogpt.config import UserError\n"
        "time.sleep = lambda seconds: print('waits', flush=True)\n"
        "def main(argv): raise UserError('of this device alone')"
    )
    result = run_program(tmp_path, source, LOCAL_RANK="1", RANK="5", TORCHELASTIC_RUN_ID="x")
    line = f"error: process 5 on {os.uname().nodename}: of this device alone\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "waits\n", line)
    first = run_program(tmp_path, source, LOCAL_RANK="0", TORCHELASTIC_RUN_ID="x")
    assert (first.returncode, first.stdout, first.stderr) == (2, "", "error: of this device alone\n")


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
    wait = "import select; output = select.poll(); output.register(1, 0); output.poll()"  # until nobody reads any more
    program = f"def main(argv):\n    {wait}\n    for i in range({lines}): print(i)"
    result = run_program(tmp_path, program, shell="{{ {}; echo $? >&2; }} | true")
    assert result.stderr.split() == ["141"]


STRANGE = "def main(argv):\n    import sys\n    for f in (sys.stdout, sys.stderr): print('Grüße, 世界 \\ud800', file=f)"


@pytest.mark.parametrize("lasting", [False, True], ids=["heard", "lasting"])
@pytest.mark.parametrize(
    "env", [dict(PYTHONIOENCODING="ascii"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")]
)
def test_text_that_the_output_cannot_encode_is_replaced(env, lasting, tmp_path):
    result = run_program(tmp_path, STRANGE, lasting=lasting, **env)
    assert (result.returncode, result.stdout) == (0, "Gr??e, ?? ?\n")
    assert result.stderr == "Gr\\xfc\\xdfe, \\u4e16\\u754c \\ud800\n"  # as Python itself does there


TALKATIVE = """
def main(argv):
    import os, sys
    with open("made", "w") as f:
        for i in range(20_000):
            print(i, "on output")
            print(i, "on error", file=sys.stderr)
            if i == 1:
                sys.stdout.flush()
                os.system("echo of a child; echo of a child >&2")
        f.write("whole")
    return 7
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "shell",
    [
        "{} >&-",
        "{} 2>&-",
        "{} <&- >&- 2>&-",
        "{} >/dev/full",
        "{} >/dev/full 2>&1",
        "( {{ {}; echo $? >code; }} 2>&1 | head -1 ); exit $(cat code)",
    ],
)
def test_a_closed_or_full_output_does_not_end_a_run(shell, unbuffered, tmp_path):
    if "/dev/full" in shell and not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    result = run_program(tmp_path, TALKATIVE, shell, lasting=True, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 7 and (tmp_path / "made").read_text() == "whole"
    assert "Error" not in result.stdout + result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_output_is_an_error_for_commands_that_only_print(tmp_path):
    result = run_program(tmp_path, "def main(argv): print('text')", shell="{} >/dev/full")
    assert result.returncode == 1
    assert result.stderr == "error: standard output: cannot be written to (No space left on device)\n"


@pytest.mark.parametrize(
    "end, code",
    [("return 3", 3), ("raise SystemExit(3)", 3), ("raise SystemExit('no')", 1), ("raise ValueError('no')", 1)],
)
def test_the_process_ends_without_waiting_for_threads(end, code, tmp_path):
    """Running threads of PyTorch would abort the process in an ordinary interpreter shutdown."""
    source = f"import threading, time\ndef main(argv):\n    threading.Thread(target=time.sleep, args=[1e6]).start()\n    {end}"
    result = run_program(tmp_path, "import atexit; atexit.register(print, 'the other way')\n" + source)
    assert (result.returncode, result.stdout) == (code, "")
    assert ("no" in result.stderr) == ("no" in end)


def test_a_broken_pipe_other_than_the_output_is_an_error(tmp_path):
    result = run_program(tmp_path, "def main(argv): raise BrokenPipeError('of a logger')")
    assert result.returncode == 1
    assert "of a logger" in result.stderr


# The front doors


@pytest.fixture
def clone(tmp_path):
    """A clone without an environment, with a space in its name; its programs print their arguments."""
    clone = tmp_path / "my clone"
    (clone / "nanogpt" / "commands").mkdir(parents=True)
    package = ("__init__.py", "config.py", "commands/__init__.py", "commands/cli.py")
    for name in ("train.py", "sample.py", *(f"nanogpt/{name}" for name in package)):
        shutil.copy(ROOT / name, clone / name)
    for name in ROOMS.values():
        write(clone / name, ECHO)
    return clone


def make_python(path):
    """A python that prints its own name, so that it can be recognized."""
    name = path.parent.parent.name
    return write(path, f'#!/bin/sh\nexec "{sys.executable}" "$@" "by {name}"\n', executable=True)


@pytest.mark.parametrize("door", PROGRAM_DOORS)
@pytest.mark.parametrize("start", [*SHELLS, PYTHON, pytest.param(None, id="itself")])
def test_the_front_door_passes_arguments_and_exit_code_on(start, door, clone, tmp_path):
    make_python(tmp_path / "path" / "bin" / "python3")
    path = os.pathsep.join([str(tmp_path / "path" / "bin"), os.environ["PATH"]])
    command = [start] if start else []  # None: the file itself is executable
    given = ["config/a b.py", "--start=$HOME `x` \"'", ""]
    result = run(*command, clone / f"{door}.py", *given, cwd=tmp_path, PATH=path)
    by_shell = [] if start == sys.executable else ["by path"]
    assert result.stdout.split("\n")[:-1] == given + by_shell, result.stderr
    assert (result.returncode, result.stderr) == (7, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_front_door_prefers_the_environment_beside_it(shell, clone):
    make_python(clone / ".venv" / "bin" / "python")
    result = run(shell, "train.py", "x", cwd=clone)
    assert result.stdout.split("\n")[:-1] == ["x", "by .venv"], result.stderr


def test_model_door():
    code = "import model as door, nanogpt.model as room; print(door.GPT is room.GPT, *door.__all__)"
    result = run(sys.executable, "-c", code)
    assert result.stdout == "True GPT GPTConfig\n", result.stderr


@pytest.mark.parametrize("door", ["train", "sample", "model"])
def test_the_front_door_names_its_module(door):
    path = ROOT / f"{door}.py"
    assert os.access(path, os.X_OK)
    assert ROOMS.get(door, f"nanogpt/{door}.py") in path.read_text()
    assert len(path.read_text().splitlines()) < 20


@pytest.mark.parametrize("door", PROGRAM_DOORS)
@pytest.mark.parametrize("start", ["sh", PYTHON])
def test_help_end_to_end(start, door):
    result = run(start, f"{door}.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--out_dir" in result.stdout


DOORS = [
    *(["train.py", "--device=cpu"], ["sample.py", "--device=cpu"], ["bench.py", "--device=cpu"], ["model.py"]),
    *(["-c", f"from nanogpt.{name} import main; main([])"] for name in ("train", "commands.advice", "serve.start")),
    ["-m", "pytest", "tests/commands/test_cli.py"],
    *([f"benchmarks/{name}.py"] for name in ("cpu", "sampling", "serving", "time_to_loss")),
]
SET_BY_USERS = [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "unset")]


@pytest.mark.parametrize(
    "door, user, seen", [(d, *SET_BY_USERS[0]) for d in DOORS] + [(DOORS[0], *u) for u in SET_BY_USERS[1:]]
)
def test_openmp_threads_do_not_spin_for_long(door, user, seen, tmp_path):
    """Unless the user has set how they wait. PyTorch reads the environment only when it is loaded."""
    write(
        tmp_path / "torch" / "__init__.py",
        "import os; open(os.environ['SEEN'], 'w').write(os.environ.get('GOMP_SPINCOUNT', 'unset')); os._exit(0)",
    )
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= user | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "SEEN": str(tmp_path / "seen")}
    done = subprocess.run([sys.executable, *door], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "seen").read_text() == seen, done.stderr


def test_train_without_torch(tmp_path):
    write(tmp_path / "torch.py", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = run(sys.executable, "train.py", "--max_iters=1", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "torch is missing" in result.stderr
