"""The rules of the house that the source shows: which folder knows which, and that no file that we read runs code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

SOURCES = {path.relative_to(ROOT / "nanogpt").as_posix(): path for path in sorted((ROOT / "nanogpt").rglob("*.py"))}
FRONT_DOORS = {path.stem for path in ROOT.glob("*.py")}
WINGS = {"run", "text", "formats", "serve", "commands"}  # every folder of the package; the hall is what lies on top

# What a folder may import, beside itself and the hall. The hall imports no wing, but for the loop, which opens a run.
MAY_IMPORT = {
    "hall": set(),
    "text": {"run", "formats"},
    "formats": {"text", "run"},
    "run": {"text", "formats"},
    "serve": {"run", "text", "formats"},
    "commands": {"run", "text", "formats"},
}
OPENS_A_RUN = "train.py"

CORE = {"torch", "numpy", "safetensors", "tqdm"}
NO_PLACE = {"utils", "util", "helpers", "common", "misc"}  # such a name says nothing and collects everything
RUN_CODE = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy"}
UNPICKLERS = {"formats/legacy.py", "formats/nanogpt.py"}  # a subclass of pickle.Unpickler that resolves no names
IMPORTERS = {"importlib.import_module", "import_module", "__import__"}


def dotted(node):
    """`torch.load` for the expression torch.load, and nothing for what is no dotted name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def nodes(node, lazy=False):
    """Yield every node of a tree, and whether it runs inside a function instead of at import."""
    yield node, lazy
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from nodes(child, lazy)


def imports(node):
    """The dotted names that a node imports, including the member: `nanogpt.model.GPT`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports name the whole path"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and dotted(node.func) in IMPORTERS and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) else []
    return []


def file_of(name):
    """The source that `nanogpt.run.start.start` or `nanogpt.run.start` is in, or None."""
    parts = name.split(".")[1:]
    for n in (len(parts), len(parts) - 1):
        path = "/".join(parts[:n])
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if n and candidate in SOURCES:
                return candidate
    return None


def folder(source):
    """The wing that a source belongs to, or `hall`."""
    return source.split("/")[0] if "/" in source else "hall"


def import_problem(source, name, lazy):
    top = name.partition(".")[0]
    if top == "nanogpt":
        other = file_of(name)
        mine, theirs = folder(source), folder(other or "__init__.py")
        if source == "commands/cli.py" and not lazy and other not in (None, "__init__.py"):
            return "cli imports a program when it is asked for"
        if theirs in (mine, "hall") and not (
            mine == "commands" and "/" in (other or "") and other == "commands/cli.py"
        ):
            return None
        if theirs == "run" and source == OPENS_A_RUN or theirs in MAY_IMPORT[mine]:
            return None
        return f"{mine} may not know {theirs}: {name}"
    if top in RUN_CODE and not (top == "pickle" and source in UNPICKLERS):
        return f"{top} runs code that it reads"
    if top in FRONT_DOORS:
        return f"{top} is a front door: import nanogpt.{top}"
    if top not in CORE | sys.stdlib_module_names and not lazy:
        return None if folder(source) == "serve" else f"{top} is optional: import it where it is used"
    if top not in sys.stdlib_module_names and source in ("config.py", "files.py"):
        return f"{source} needs nothing but Python"
    return None


def call_problem(call):
    name = dotted(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("sys.exit", "exit", "quit"):
        return "return the exit code: cli.leave is the one way out"
    if name in ("eval", "exec"):
        return f"{name} runs code"
    if name.startswith("pickle."):
        return f"{name} runs code that it reads"
    if name == "torch.save":
        return "torch.save pickles"
    if name == "torch.load" and not is_constant(given.get("weights_only"), True):
        return "torch.load without weights_only=True runs code"
    if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
        return "allow_pickle runs code"
    return None


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def problems(source, text):
    """What the house has against a source of this name and text: a line each."""
    found = []
    for node, lazy in nodes(ast.parse(text)):
        reasons = [import_problem(source, name, lazy) for name in imports(node)]
        if isinstance(node, ast.Call):
            reasons.append(call_problem(node))
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            reasons += ["write torch.load out" for alias in node.names if alias.name in ("load", "save")]
        found += [f"nanogpt/{source}:{node.lineno}: {reason}" for reason in reasons if reason]
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_keeps_the_rules(source):
    found = problems(source, SOURCES[source].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_each_folder_is_known():
    assert {folder(source) for source in SOURCES} == WINGS | {"hall"} == set(MAY_IMPORT)
    assert not NO_PLACE & {Path(source).stem for source in SOURCES}


def test_no_imports_run_in_a_circle():
    """Also not through functions: who imports late hides a circle."""
    graph = {}
    for source, path in SOURCES.items():
        found = (file_of(name) for node, _ in nodes(ast.parse(path.read_text())) for name in imports(node))
        graph[source] = {other for other in found if other and not other.endswith("__init__.py")} - {source}
    graph["model.py"].discard("generate.py")  # GPT.generate, a convenience
    graph["commands/cli.py"] = set()
    while leaves := {source for source, others in graph.items() if not others & graph.keys()}:
        graph = {source: others for source, others in graph.items() if source not in leaves}
    assert not graph, f"circles: { {source: others & graph.keys() for source, others in graph.items()} }"


def calls(name):
    """The sources that call something of this name, as a method or a function, with the number of times."""
    found = {}
    for source, path in SOURCES.items():
        for node, _ in nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == name:
                found[source] = found.get(source, 0) + 1
    return found


def test_one_room_for_one_idea():
    assert calls("backward") == {"step.py": 1}  # one forward and backward
    assert set(calls("scaled_dot_product_attention")) == {"kernels.py"}  # one attention
    assert set(calls("fsync")) == {"files.py"}  # one atomic write
    assert set(calls("all_reduce")) == {"run/distributed.py"}


def test_the_light_modules_stay_light():
    light = "nanogpt.commands.cli, nanogpt.config, nanogpt.shape"
    code = f"import sys, {light}; print(*{{'torch', 'numpy'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


@pytest.mark.parametrize(
    "source, text",
    [
        ("config.py", "def f(): import torch"),
        ("data.py", "from nanogpt.run import distributed"),
        ("data.py", "from nanogpt.run.distributed import Dist"),
        ("model.py", "def f(): from nanogpt.run.checkpoint import load"),
        ("generate.py", "def f(): import importlib; importlib.import_module('nanogpt.run.checkpoint')"),
        ("evaluate.py", "from nanogpt.text import tokenizer"),
        ("train.py", "from nanogpt.text import tokenizer"),
        ("run/log.py", "from nanogpt.commands import sample"),
        ("run/log.py", "import nanogpt.serve.app"),
        ("commands/cli.py", "from nanogpt.config import UserError"),
        ("commands/sample.py", "from model import GPT"),
        ("commands/sample.py", "import wandb"),
        ("commands/sample.py", "import pickle"),
        ("formats/nanogpt.py", "import pickle; pickle.load(f)"),
        ("formats/nanogpt.py", "import pickle; pickle.Unpickler(f).load()"),
        ("run/start.py", "def f(): from dill import loads"),
        ("run/start.py", "eval('1')"),
        ("run/start.py", "sys.exit(1)"),
        ("run/start.py", "exec(open('config.py').read())"),
        ("run/start.py", "torch.load(path)"),
        ("run/start.py", "torch.load(path, weights_only=False)"),
        ("run/start.py", "torch.load(path, weights_only=flag)"),
        ("run/start.py", "torch.save(model, path)"),
        ("run/start.py", "from torch import load"),
        ("run/start.py", "np.load(path, allow_pickle=True)"),
    ],
)
def test_the_rules_bite(source, text):
    assert len(problems(source, text)) == 1


@pytest.mark.parametrize(
    "source, text",
    [
        ("config.py", "import ast"),
        ("model.py", "import torch.nn as nn\nfrom nanogpt.config import UserError"),
        ("train.py", "from nanogpt.run.start import start"),
        ("run/start.py", "from nanogpt import checkpoint, config, data, model\nmodel.eval()"),
        ("commands/sample.py", "def f(): import wandb"),
        ("run/start.py", "torch.load(path, weights_only=True)\ntorch.compile(model)"),
        ("commands/cli.py", "def f(): from nanogpt.config import UserError"),
    ],
)
def test_the_rules_let_good_work_pass(source, text):
    assert not problems(source, text)
