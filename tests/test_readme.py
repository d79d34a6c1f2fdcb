"""The README: every command in it runs, every path and setting that it names exists.

A command is run as it stands, made short by the first of RULES that matches it. A section is a test.
"""

import dataclasses
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import free_port, write_tokenizer

from nanogpt.config import (
    BenchConfig,
    EstimateConfig,
    EvalConfig,
    ExportConfig,
    PrepareConfig,
    SampleConfig,
    ServeConfig,
    TalkConfig,
    TrainConfig,
)
from nanogpt.run import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent

SHORT = " --max_iters=2 --eval_iters=1 --log_interval=1 --warmup_iters=0 --device=cpu --compile=False"
TINY = SHORT + " --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2"
FINETUNE = SHORT + " --init_from=tiny-gpt2 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2"
WRITE = " --num_samples=2 --max_new_tokens=8 --device=cpu"
NODE = " --nproc_per_node=1 --master_addr=127.0.0.1 --master_port=$FREE_PORT train.py"

UNTRIED = " --trial=False"
NEXT = r"next: sh train\.py config/(fast_shakespeare_c(har|pu)\.py|finetune_shakespeare\.py --init_from=gpt2)$"
MADE = r"tokens to train on, .* to validate on(.*\n)*next: sh train\.py config/fast_shakespeare_c"
APART = " --out_dir=out-apart"  # so that it may run while another section continues the run in its own folder
ACTIVATE = "python -m venv --without-pip .venv && {} && python -V; rm -r .venv"
DONE = r"step \d+: train loss \d+\.\d{4}, val loss \d+\.\d{4}\n(.*\n)*exact val loss \d"
PAIR = r"2 processes x(.*\n)*" + DONE
RESUMED = r"resuming .*step(.*\n)*exact val loss \d"
WROTE = r"(?s)---------------\n.*---------------\n"


@dataclasses.dataclass
class Rule:
    """How a command that matches `pattern` is made short: `change` gets it and returns what a shell runs."""

    pattern: str
    change: object
    expect: str = ""  # found in what it prints
    code: int = 0


def while_served(then, serve="nanogpt serve --out_dir=out-shakespeare-char"):
    """Run a server on a free port for as long as `then` takes, which finds its address in $address."""
    start = f": >serve.log; {serve} --device=cpu --port=0 >serve.log 2>&1 & server=$!; trap 'kill $server' EXIT; "
    find = "address=$(sed -n 's/^serving .* at \\(http[^ ]*\\).*/\\1/p' serve.log) && [ -n \"$address\" ]"
    return f"{start} until {find}; do kill -0 $server || exit 1; sleep 0.1; done; {then}"


def add(flags):
    return lambda command: command + flags


def instead(pattern, replacement, flags=""):
    return lambda command: re.sub(pattern, replacement, command) + flags


# The first that matches counts. A flag that is added overrides the one that stands in the command.
RULES = [
    Rule(r" --minutes=10$", instead("=10", "=0.1", " --device=cpu --compile=False"), r"minutes: 0.1, (.*\n)*exact val loss"),
    Rule(r"^make \w+$", instead("^make", "make -n"), r"pip install"),
    Rule(r"^\. \.venv/bin/activate$", ACTIVATE.format, r"Python 3"),
    Rule(r"^pip install -c constraints.txt -e '\.\[[\w,]+\]'$", "echo {}".format, r"-e \.\["),  # see test_extras
    # mistakes and help; their outcome is the README's own
    Rule(r"--n_layers=", add(" 2>&1"), re.escape("".join(re.findall(r"```text\n(.*?)```", README, re.S))), code=2),
    Rule(r"^sh train\.py .*--help$", add(""), r"--dropout=0\.1 .*\n? .*default 0\.0"),
    # data
    Rule(r"^sh data/openwebtext/prepare\.py$", add(" documents.jsonl --val_fraction=0.2" + UNTRIED), MADE),
    Rule(r"^nanogpt prepare hf:", instead(r"hf:\S+", "hf:hub", UNTRIED), MADE),
    Rule(r"--tokenizer=hf:", instead(r"hf:\S+", "tiny-gpt2", UNTRIED), r"tokens to train on(.*\n)*next: "),
    Rule(r"\bnanogpt prepare ", add(UNTRIED), MADE),
    Rule(r"^sh data/\w+/prepare\.py\b", add(""), r"tokens in train\.bin(.*\n)*" + NEXT),
    # training; the finetuned models are tiny ones in GPT-2's vocabulary, and torchrun starts two processes
    Rule(r"--node_rank=0 .*train\.py", instead(r" train\.py", NODE, TINY), PAIR),
    Rule(r"--node_rank=1 .*train\.py", instead(r" train\.py", NODE, TINY)),
    Rule(r"^torchrun --standalone .*train\.py", instead(r"per_node=\d+", "per_node=2", TINY + APART), PAIR),
    Rule(r"^sh train\.py config/(finetune_|eval_gpt2)", add(FINETUNE), DONE),
    Rule(r"^sh train\.py .*--init_from=(resume|auto)\b", add(TINY + " --max_iters=4"), RESUMED),
    Rule(r"^sh train\.py config/", add(TINY), DONE),
    Rule(r"^nanogpt estimate ", add(""), r"GiB per GPU(.*\n)*cost .*(.*\n)*this batch"),
    # serving, each on a free port until the line has been run
    Rule(r"^nanogpt serve ", lambda command: while_served("curl -s $address/health", command), r'"ok"'),
    Rule(r"^curl ", lambda command: while_served(command.replace("http://127.0.0.1:8000", "$address")), r'"text": ?"'),
    # evaluating
    Rule(r"^nanogpt eval .*--init_from=gpt2", add(" --init_from=tiny-gpt2 --device=cpu"), r"^my\.txt: loss \d+\.\d{6} over"),
    Rule(r"^nanogpt eval .*--per_document", add(" --device=cpu"), r"^books/one\.txt: loss(.*\n)*all 2 documents: loss"),
    Rule(r"^nanogpt eval ", add(" --device=cpu"), r"^.*: loss \d+\.\d{6} over .*bits per byte$"),
    # writing
    Rule(r"^sh sample\.py .*--init_from=gpt2", add(" --init_from=tiny-gpt2" + WRITE), WROTE),
    Rule(r"^nanogpt talk ", instead("^", "echo ROMEO: | ", " --max_new_tokens=8 --device=cpu"), r"\S"),
    Rule(r"^nanogpt export ", add(""), r"logit"),
    Rule(r"^ollama ", "echo {}".format, r"^ollama (create tale -f tale\.Modelfile|run tale )"),  # not to be had here
    Rule(r"^sh bench\.py ", add(" --iters=2 --warmup=1 --device=cpu"), r"^yardstick +[\d.]+ GFLOP/s(.*\n)*memory +\d+ MiB"),
    Rule(r"^sh sample\.py ", add(WRITE), WROTE),
]  # fmt: skip

NEEDS = {  # sections that continue what another has left
    "Sample": ["Shakespeare"],
    "Serve": ["Shakespeare"],
    "Evaluate": ["Shakespeare"],
    "Stop, resume, evaluate": ["Shakespeare", "Sample", "Serve", "Evaluate"],  # it changes what they read
    "Several processes": ["Shakespeare", "GPT-2 (124M)"],  # in the same folder
    "Settings": ["Shakespeare"],
    "When something is wrong": ["Shakespeare", "GPT-2 (124M)"],
}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """The commands of the sh blocks in `text`; a line that ends in a backslash goes on."""
    lines = "\n".join(blocks("sh", text)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def sections(text=README):
    """{heading: commands} of the sections that have some; what stands before the first heading is 'Start'."""
    parts = re.split(r"^## (.*)$", "Start\n" + text, flags=re.M)
    headings, texts = ["Start", *parts[1::2]], parts[::2]
    return {heading: found for heading, text in zip(headings, texts, strict=True) if (found := commands(text))}


def rule_for(command):
    for rule in RULES:
        if re.search(rule.pattern, command):
            return rule
    pytest.fail(f"no rule says how to test this command of README.md:\n{command}\nadd a rule to RULES in this file")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of the repository with tiny stand-ins for what the commands would download: its folder, and an env."""
    place = tmp_path_factory.mktemp("readme") / "a copy"
    left_out = (".*", "out*", "wandb", "*.egg-info", "__pycache__", "*.bin", "meta.json", "input.txt")
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*left_out))
    text = "".join(f"ROMEO:\nO Romeo, line {i} of {chr(97 + i % 26)}{chr(65 + i % 26)}.\n" for i in range(80))
    for name in ("data/shakespeare_char/input.txt", "my.txt", "books/one.txt", "books/two.txt", "notes/three.md"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    (place / "prompt.txt").write_text("ROMEO:\n")
    with open(place / "documents.jsonl", "w") as f:
        for i in range(20):
            print(json.dumps({"text": f"Document {i} has lamps." + " lamp" * 40}), file=f)
    (place / "hub").mkdir()
    shutil.copy(place / "documents.jsonl", place / "hub" / "train.jsonl")  # in Hugging Face's format
    (place / "documents.jsonl.gz").write_bytes(gzip.compress((place / "documents.jsonl").read_bytes() * 2))
    write_tiny_gpt2(place / "tiny-gpt2")
    for block in blocks("python"):
        (place / block.split()[1]).write_text(block)  # it begins with '# config/NAME.py'
    inherited = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in inherited}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    env |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["FREE_PORT"] = str(free_port())
    return SimpleNamespace(place=place, env=env)


@pytest.fixture(scope="module")
def finish(request, workplace):
    """finish(heading) returns once the section's commands have run, and raises what one of them raised.

    Two sections at a time run ahead of the tests, since most of a command is the start of Python.
    """
    futures = {}
    with ThreadPoolExecutor(2) as pool:

        def submit(heading):
            for name in [*NEEDS.get(heading, ()), heading]:  # a needed one first, or two could wait for it forever
                if name not in futures:
                    needed = [futures[n] for n in NEEDS.get(name, ())]
                    futures[name] = pool.submit(run_section, name, needed, workplace)
            return futures[heading]

        if "PYTEST_XDIST_WORKER" not in os.environ:  # there another process may have been given the other sections
            for item in request.session.items:
                if getattr(item, "function", None) is test_the_commands_of:
                    submit(item.callspec.params["heading"])
        yield lambda heading: submit(heading).result()
        pool.shutdown(cancel_futures=True)


def write_tiny_gpt2(folder):
    """A model in Hugging Face's format with GPT-2's vocabulary and random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)).save_pretrained(folder)
    write_tokenizer(folder, {"type": "gpt2"})


def run(command, workplace):
    """Run a command of the README, made short by its rule, and look at what it prints."""
    rule = rule_for(command)
    shell = ["sh", "-c", rule.change(command)]
    where = dict(cwd=workplace.place, env=workplace.env, stdin=subprocess.DEVNULL)
    result = subprocess.run(shell, **where, capture_output=True, text=True, timeout=600)
    told = f"{shell[-1]}\nexit code {result.returncode}, expected {rule.code}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == rule.code, told
    assert re.search(rule.expect, result.stdout, re.M), f"{told}\nexpected to read {rule.expect}"


def run_section(heading, needed, workplace):
    """Run a section's commands in order, once those that it needs have ended; the lines for several nodes together."""
    for section in needed:
        section.result()
    for _, together in itertools.groupby(sections()[heading], lambda c: re.sub(r"--node_rank=\d+", "", c)):
        with ThreadPoolExecutor() as nodes:
            list(nodes.map(lambda command: run(command, workplace), together))


@pytest.mark.parametrize("heading", sections())
def test_the_commands_of(heading, finish):
    for command in sections()[heading]:
        rule_for(command)
    finish(heading)


def test_a_command_without_a_rule_fails():
    with pytest.raises(pytest.fail.Exception, match="add a rule"):
        rule_for("sh dance.py")


def test_each_rule_is_used():
    """And each name in NEEDS is that of a section."""
    used = [rule_for(command).pattern for found in sections().values() for command in found]
    assert {rule.pattern for rule in RULES} == set(used)
    assert NEEDS.keys() | {name for needed in NEEDS.values() for name in needed} <= sections().keys()


def test_commands_in_the_text_are_run_too():
    """A whole command between backquotes stands in a block as well."""
    inline = re.findall(r"`((?:sh|torchrun|make) [^`]*\w)`", prose())
    run = {command for found in sections().values() for command in found} | {"make help"}
    assert set(inline) and not set(inline) - run


def prose():
    return re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)


def test_links_and_paths():
    slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", prose(), re.M)}
    for link in re.findall(r"\]\(([^)]*)\)", prose()):
        path, _, anchor = link.partition("#")
        assert link.startswith("https:") or (ROOT / path).exists(), link
        assert not anchor or path or anchor in slugs, link
    here = {path.name for path in ROOT.iterdir()}
    named = re.findall(r"`([\w.-]+(?:/[\w.*-]*)*)`", prose())
    paths = [name for name in named if "/" in name or name.endswith((".py", ".txt", ".md"))]
    paths = [p for p in paths if p.split("/")[0] in here or p.endswith(".txt")]
    assert len(paths) > 15
    for path in paths:
        assert any(ROOT.glob(path.rstrip("/"))), path


def rows(header):
    """The first cells of the table with this header."""
    table = re.search(rf"^\| {header} \|$\n(?:\|.*\n)+", README, re.M)[0]
    return re.findall(r"^\| `(.*?)`", table, re.M)


def test_the_map_of_the_house_is_complete():
    """The modules of the hall, and the folders."""
    package = ROOT / "nanogpt"
    there = {f"nanogpt/{path.name}" for path in package.glob("*.py")} - {"nanogpt/__init__.py"}
    there |= {f"nanogpt/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert there == set(rows(r"Path \| What it does"))


def test_the_files_that_a_run_leaves(workplace, finish):
    finish("Shakespeare")
    out = workplace.place / "out-shakespeare-char"
    described = rows(r"File \| What it holds")
    assert len(described) == 6
    for pattern in described:
        assert any(out.glob(pattern.rstrip("/"))), pattern
    for path in out.iterdir():
        assert any(path.match(p.split("/")[0]) for p in described), path.name


def test_settings_exist():
    known = {
        f.name
        for cls in (
            TrainConfig,
            SampleConfig,
            ServeConfig,
            EvalConfig,
            BenchConfig,
            EstimateConfig,
            PrepareConfig,
            TalkConfig,
            ExportConfig,
        )
        for f in dataclasses.fields(cls)
    }
    others = {"input", "out"} | {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
    named = set(re.findall(r"--(\w+)=", README)) - {"n_layers", "key"}  # the mistake, and --key=value
    assert len(named) > 10
    assert named <= known | others, f"README.md names what is no setting: {named - known - others}"
    for block in blocks("python"):
        assert set(re.findall(r"^(\w+) = ", block, re.M)) <= known


def test_the_config_in_the_readme(workplace):
    (block,) = blocks("python")
    cfg = settings.load(TrainConfig, [str(workplace.place / block.split()[1])], "train.py")
    assert cfg.sources.keys() == set(re.findall(r"^(\w+) = ", block, re.M))


def test_pictures_have_curves():
    """Those of the configs that the demo and this page start with: some evaluations, beside that of the untrained model."""
    demo = re.findall(r"config=(config/\w+\.py)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(demo) == 2
    for path in (*demo, "config/train_shakespeare_cpu.py", "config/train_shakespeare_char.py"):
        cfg = settings.load(TrainConfig, [str(ROOT / path)], "train.py")
        assert cfg.max_iters // cfg.eval_interval >= 5, path


def test_the_config_in_the_readme_is_a_short_run(workplace):
    """A minute on two cores is some 2,000 iterations of the classic model of train_shakespeare_cpu.py."""
    (block,) = blocks("python")
    path = workplace.place / block.split()[1]
    mine, minute = (
        settings.load(TrainConfig, [str(p)], "train.py") for p in (path, ROOT / "config/train_shakespeare_cpu.py")
    )
    assert work(mine) <= work(minute)


def work(cfg):
    """Floating-point operations of a run: 6 a parameter and token, and a third of that where it evaluates."""
    parameters = 12 * cfg.n_layer * cfg.n_embd**2
    evaluated = 2 * cfg.eval_iters * cfg.batch_size * (1 + cfg.max_iters // cfg.eval_interval) / 3
    trained = cfg.max_iters * cfg.gradient_accumulation_steps * cfg.batch_size
    return 6 * parameters * cfg.block_size * (trained + evaluated)


def extras():
    """{extra: what it lists} of pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = re.search(r"^\[project.optional-dependencies\]$(.*?)^\[", project, re.M | re.S)[1]
    _, *parts = re.split(r"^(\w+) = ", table, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def brought_by(extra):
    """An extra and those it includes."""
    included = [name for group in re.findall(r"nanogpt\[([\w,]+)\]", extras()[extra]) for name in group.split(",")]
    return {extra}.union(*map(brought_by, included))


def test_extras():
    """What README.md and the messages install exists, and they name it alike."""
    named = set(re.findall(r"\.\[([\w,]+)\]", README))
    assert named and {extra for group in named for extra in group.split(",")} <= extras().keys()
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "nanogpt").rglob("*.py")}
    told = {group for text in sources.values() for group in re.findall(r"installs\(['\"]([\w,]+)['\"]\)", text)}
    assert told and told <= named, f"README.md does not name {told - named}"
    elsewhere = [name for name, text in sources.items() if re.search(r"pip install(?! -c constraints\.txt)", text)]
    assert not elsewhere, f"these spell out what config.installs knows: {elsewhere}"


def test_the_demo_brings_what_the_readme_needs():
    """All extras but trackers, which nothing needs unless they are asked for, and the tests' own references."""
    assert brought_by("demo") == extras().keys() - {"wandb", "tensorboard", "test"}
