"""The rules of the house that the source shows: who knows whom, and that no file we read runs code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "nanogpt").glob("*.py"))}
FRONT_DOORS = {path.stem for path in ROOT.glob("*.py")}

# Lowest first. A module may import what lies in the layers below its own. One that stands in no layer is a
# program: it may import all of them, and no other program.
LAYERS = [
    {"__init__", "config", "files"},
    {"legacy", "words", "kernels"},
    {"model", "schedule", "data", "tokenizer", "distributed", "shakespeare", "sources"},
    {"signals", "health", "pool", "memory", "generate"},
    {"shuffle"},
    {"optim", "quantize", "evaluate", "metrics", "checkpoint"},
    {"export", "batching"},
    {"completions"},
    {"start", "trained", "advice"},
]
# Allowed all the same inside a function: GPT.generate and GPT.from_pretrained.
UPWARDS = {("model", "generate"), ("model", "export")}

CORE = {"torch", "numpy", "safetensors", "tqdm"}
NO_PLACE = {"utils", "util", "helpers", "common", "misc"}  # such a name says nothing and collects everything
RUN_CODE = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy"}
UNPICKLER = ("legacy", "pickle")  # for a subclass of pickle.Unpickler that resolves no names, and nothing else
IMPORTERS = {"importlib.import_module", "import_module", "__import__"}


def layer(module):
    return next((height for height, members in enumerate(LAYERS) if module in members), len(LAYERS))


def may_import(module, other, lazy):
    if module == "cli":
        return lazy
    return layer(other) < layer(module) or (lazy and (module, other) in UPWARDS)


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
    """The dotted names that a node imports, as far as the name of a member: `nanogpt.model.GPT`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        origin = ["nanogpt"] * bool(node.level) + [node.module] * bool(node.module)
        return [".".join([*origin, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and dotted(node.func) in IMPORTERS and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) else []
    return []


def import_problem(module, name, lazy):
    top, _, rest = name.partition(".")
    if top == "nanogpt":
        other = rest.partition(".")[0]
        if other in MODULES and not may_import(module, other, lazy):
            return f"{module} may not know {other}"
    elif top in RUN_CODE and (module, top) != UNPICKLER:
        return f"{top} runs code that it reads"
    elif top in FRONT_DOORS:
        return f"{top} is a front door: import nanogpt.{top}"
    elif top not in CORE | sys.stdlib_module_names and not lazy:
        return f"{top} is optional: import it where it is used"
    elif top not in sys.stdlib_module_names and module == "config":
        return "config needs nothing but Python"


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


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def problems(module, source):
    """What the house has against a module of this name and source: a line each."""
    found = []
    for node, lazy in nodes(ast.parse(source)):
        reasons = [import_problem(module, name, lazy) for name in imports(node)]
        if isinstance(node, ast.Call):
            reasons.append(call_problem(node))
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            reasons += ["write torch.load out" for alias in node.names if alias.name in ("load", "save")]
        found += [f"nanogpt/{module}.py:{node.lineno}: {reason}" for reason in reasons if reason]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_rules(module):
    found = problems(module, MODULES[module].read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_no_module_without_a_subject():
    assert not NO_PLACE & set(MODULES)


def test_the_light_modules_stay_light():
    code = "import sys, nanogpt.commands.cli, nanogpt.config; print(*{'torch', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


@pytest.mark.parametrize(
    "module, source",
    [
        ("config", "import nanogpt.model"),
        ("config", "def f(): import torch"),
        ("schedule", "from nanogpt.model import GPT"),
        ("data", "from . import distributed"),
        ("data", "from .distributed import Dist"),
        ("model", "from nanogpt.generate import generate"),
        ("model", "def f(): from nanogpt.run.checkpoint import load"),
        ("generate", "def f(): import importlib; importlib.import_module('nanogpt.run.checkpoint')"),
        ("evaluate", "from nanogpt import config, cli"),
        ("some_program", "import nanogpt.commands.cli"),
        ("shakespeare", "from nanogpt.model import GPT"),
        ("cli", "from nanogpt.config import UserError"),
        ("some_program", "from model import GPT"),
        ("some_program", "import wandb"),
        ("some_program", "import pickle"),
        ("legacy", "import pickle; pickle.load(f)"),
        ("legacy", "import pickle; pickle.Unpickler(f).load()"),
        ("some_program", "def f(): from dill import loads"),
        ("some_program", "eval('1')"),
        ("some_program", "sys.exit(1)"),
        ("some_program", "exec(open('config.py').read())"),
        ("some_program", "torch.load(path)"),
        ("some_program", "torch.load(path, weights_only=False)"),
        ("some_program", "torch.load(path, weights_only=flag)"),
        ("some_program", "torch.save(model, path)"),
        ("some_program", "from torch import load"),
        ("some_program", "np.load(path, allow_pickle=True)"),
    ],
)
def test_the_rules_bite(module, source):
    assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("config", "import ast"),
        ("model", "import torch.nn as nn\nfrom nanogpt.config import UserError"),
        ("model", "def f(): from nanogpt.generate import generate"),
        ("model", "def f(): from nanogpt.formats.export import from_pretrained"),
        ("checkpoint", "from .model import GPT\nfrom nanogpt import __version__, data"),
        ("some_program", "from nanogpt import checkpoint, config, data, export, model\nmodel.eval()"),
        ("some_program", "def f(): import wandb"),
        ("some_program", "torch.load(path, weights_only=True)\ntorch.compile(model)"),
        ("cli", "def f(): from nanogpt.config import UserError"),
    ],
)
def test_the_rules_let_good_work_pass(module, source):
    assert not problems(module, source)
