"""Settings: where they come from, what they may be, and that nothing we read as a config ever runs."""

import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanogpt.config import (
    MANY,
    NOT_A_NAME,
    BenchConfig,
    EvalConfig,
    ExportConfig,
    PrepareConfig,
    SampleConfig,
    ServeConfig,
    TalkConfig,
    TrainConfig,
    UserError,
    unescaped,
)
from nanogpt.run.settings import load

ROOT = Path(__file__).parent.parent.parent
PATH = "the path of a file or folder, in UTF-8, without NUL, of names of at most 255 bytes"


def train(*argv):
    return load(TrainConfig, [str(a) for a in argv], "train.py")


def problems(*argv, cls=TrainConfig):
    with pytest.raises(UserError) as caught:
        load(cls, [str(a) for a in argv], "train.py")
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


def problem(*argv, cls=TrainConfig):
    (only,) = problems(*argv, cls=cls)
    return only


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Write a config file and return its name, which the current directory holds."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="c.py"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


# Defaults and precedence


def test_a_later_file_overrides_and_a_flag_overrides_wherever_it_stands(config_file):
    first = config_file("batch_size = 1\nmax_iters = 1\nn_head = 1\nn_embd = 64\n", "first.py")
    second = config_file("\nmax_iters = 2\nn_head = 2\n", "second.py")
    cfg = train("--n_head=4", first, "--seed=5", second)
    assert (cfg.batch_size, cfg.max_iters, cfg.n_head, cfg.seed) == (1, 2, 4, 5)
    assert cfg.sources == {
        "batch_size": "first.py:1",
        "max_iters": "second.py:2",
        "n_head": "--n_head=4",
        "n_embd": "first.py:4",
        "seed": "--seed=5",
    }


def test_a_program_with_arguments_takes_what_is_no_flag_as_it_stands(config_file):
    path = config_file("this is no config file")
    cfg = load(PrepareConfig, [path, "--seed=5", "a b.txt", "-", "hf:x"], "nanogpt prepare")
    assert cfg.arguments == [path, "a b.txt", "-", "hf:x"] and cfg.seed == 5
    assert problem("-", cls=TrainConfig) == "-: there is no setting ''"


def test_the_last_of_equal_flags_wins():
    assert train("--seed=1", "--seed=2").seed == 2


def test_a_file_may_compute_with_names_assigned_above_and_in_earlier_files(config_file):
    first = config_file('"""A docstring."""\n_unit = 10\nmax_iters = 5 * _unit  # fifty\n', "first.py")
    second = config_file(
        "lr_decay_iters = max_iters\nwarmup_iters = max_iters // 7 % 4\nlearning_rate = 2**-10\n"
        "min_lr = learning_rate / 10\n_name = 'x'\nout_dir = 'out-' + _name\n",
        "second.py",
    )
    cfg = train(first, second)
    assert (cfg.max_iters, cfg.lr_decay_iters, cfg.warmup_iters, cfg.out_dir) == (50, 50, 3, "out-x")
    assert (cfg.learning_rate, cfg.min_lr) == (2**-10, 2**-10 / 10)


@pytest.mark.parametrize(
    "flags, number",
    [
        (["c.py", "--batch_size=auto"], 7),
        (["--batch_size=auto"], 12),
        (["c.py", "--batch_size=5", "--batch_size=auto"], 5),
        (["c.py", "auto.py"], 7),
        (["auto.py"], 12),
    ],
)
def test_an_automatic_batch_size_keeps_the_number_below_it(flags, number, config_file):
    """For that number says how many sequences an iteration has."""
    config_file("batch_size = 7\n")
    config_file("batch_size = 'auto'\n", "auto.py")
    cfg = train(*flags)
    assert (cfg.batch_size, cfg.auto_batch) == (number, True)
    assert cfg.sources["batch_size"] == ("auto.py:1" if "auto.py" in flags else "--batch_size=auto")


def test_a_number_after_an_automatic_batch_size_counts(config_file):
    cfg = train(config_file("batch_size = 'auto'\n"), "--batch_size=5")
    assert (cfg.batch_size, cfg.auto_batch) == (5, False)
    assert not train().auto_batch


@pytest.mark.parametrize("flags, number", [(["--batch_size=auto"], 9), (["c.py", "--batch_size=auto"], 7)])
def test_below_an_automatic_batch_size_stands_that_of_the_run_that_goes_on(flags, number, config_file):
    config_file("batch_size = 7\n")
    cfg = load(TrainConfig, flags, "train.py", inherit=lambda cfg: ({"batch_size": 9}, "out/step-1"))
    assert (cfg.batch_size, cfg.auto_batch) == (number, True)


@pytest.mark.parametrize("flags, seed", [([], 7), (["--seed=auto"], 7), (["--seed=5"], 5)])
def test_a_run_that_goes_on_keeps_its_seed_unless_a_number_is_given(flags, seed):
    cfg = load(TrainConfig, flags, "train.py", inherit=lambda cfg: ({"seed": 7}, "out/step-1"))
    assert cfg.seed == seed


# Types and their spellings


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--max_iters=1e4", 10000),
        ("--max_iters=10000.0", 10000),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=6e-4", 6e-4),
        ("--compile=True", True),
        ("--compile=true", True),
        ("--compile=1", True),
        ("--compile=False", False),
        ("--compile=FALSE", False),
        ("--compile=0", False),
        ("--compile=auto", "auto"),
        ("--seed=auto", "auto"),
        ("--seed=0", 0),
        ("--dtype=bfloat16", "bfloat16"),
        ("--backend=gloo", "gloo"),
        ("--wandb_run_name=1e4", "1e4"),
        ("--wandb_run_name=a=b", "a=b"),
        ("--wandb_run_name=", ""),
    ],
)
def test_a_flag_becomes_its_settings_type(flag, value):
    name = flag[2:].split("=")[0]
    found = getattr(train(flag), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "line, value",
    [
        ("max_iters = 1e4", 10000),
        ("learning_rate = 1", 1.0),
        ("compile = True", True),
        ("compile = 'auto'", "auto"),
        ("seed = 'auto'", "auto"),
        ("wandb_run_name = 'a' + 'b'", "ab"),
    ],
)
def test_a_files_value_becomes_its_settings_type(line, value, config_file):
    found = getattr(train(config_file(line)), line.split(" ")[0])
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "line, expected",
    [
        ("max_iters = 1.5", f"an integer from 0 to {MANY}"),
        ("max_iters = -1", f"an integer from 0 to {MANY}"),
        ("max_iters = '10'", f"an integer from 0 to {MANY}"),
        ("max_iters = True", f"an integer from 0 to {MANY}"),
        ("max_iters = 'auto'", f"an integer from 0 to {MANY}"),
        ("learning_rate = 0", "a number > 0.0"),
        ("learning_rate = '1e-3'", "a number > 0.0"),
        ("dropout = 1.5", "a number from 0.0 to 1.0"),
        ("compile = 1", "True or False or auto"),
        ("wandb_log = 'yes'", "True or False"),
        ("wandb_project = 5", "UTF-8 text"),
        ("out_dir = 5", PATH),
        ("dtype = 'bfloat32'", "one of float32, bfloat16, float16 or auto; did you mean float32?"),
        ("seed = 2**63", f"an integer from 0 to {2**63 - 1} or auto"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(line, expected, config_file):
    name, _, text = line.partition(" = ")
    path = config_file(f"\n{line}\n")
    assert problem(path).startswith(f"c.py:2: {name} = ")
    assert problem(path).endswith(f": expected {expected}")


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--max_iters=many", f"an integer from 0 to {MANY}"),
        ("--max_iters=", f"an integer from 0 to {MANY}"),
        ("--max_iters=1.5", f"an integer from 0 to {MANY}"),
        ("--learning_rate=nan", "a number > 0.0"),
        ("--learning_rate=inf", "a number > 0.0"),
        ("--compile=yes", "True or False or auto"),
        ("--device", None),
    ],
)
def test_a_flag_that_does_not_fit_is_refused(flag, expected):
    assert problem(flag).startswith(f"{flag}: ")
    assert expected is None or problem(flag) == f"{flag}: expected {expected}"


def test_a_file_that_begins_with_a_byte_order_mark_is_read(config_file):
    """As editors on Windows write it."""
    assert train(config_file("max_iters = 5\n".encode("utf-8-sig"))).max_iters == 5


def test_new_lines_and_tabs_can_be_typed_in_a_shell():
    assert unescaped("a\\tb\\nc") == "a\tb\nc"


def test_several_stop_strings_are_separated_and_none_is_empty():
    assert load(SampleConfig, ["--stop=|a b||\\n\\n|"], "sample.py").stop_strings() == ["a b", "\n\n"]


# Bad input: one clear line each, all at once


@pytest.mark.parametrize(
    "flag, near",
    [
        ("--btach_size=3", "batch_size"),
        ("--batch-size=3", "batch_size"),
        ("--LEARNING_RATE=1", "learning_rate"),
        ("--lr_decay_iter", "lr_decay_iters"),
    ],
)
def test_a_mistyped_flag_names_the_nearest(flag, near):
    name = flag[2:].split("=")[0]
    assert problem(flag) == f"{flag}: there is no setting {name!r}; did you mean {near}?"


def test_an_unknown_name_that_resembles_none():
    assert problem("--qqqq=1") == "--qqqq=1: there is no setting 'qqqq'"


def test_a_mistyped_name_in_a_file_has_file_line_and_value(config_file):
    path = config_file("seed = 1\n\nbtach_size = 3\n")
    expected = "c.py:3: btach_size = 3: there is no setting 'btach_size'; did you mean batch_size?"
    assert problem(path) == expected


@pytest.mark.parametrize("flag", ["--max_iters", "--compile"])
def test_a_flag_without_a_value_says_how_one_is_written(flag):
    example = {"--max_iters": "--max_iters=VALUE", "--compile": "--compile=True"}[flag]
    assert example in problem(flag)


def test_a_value_after_a_space_is_explained(config_file):
    said = problems("--max_iters", "10")
    assert any("equals sign" in line for line in said)
    assert any(line.startswith("10: ") and "--key=value" in line for line in said)


def test_a_missing_file_names_the_nearest(config_file):
    config_file("", "train_tiny.py")
    assert problem("train_tny.py") == "train_tny.py: there is no such config file; did you mean train_tiny.py?"
    assert "no such config file" in problem("no/such/folder/c.py")


def test_a_directory_is_no_config_file(tmp_path):
    assert problem(tmp_path).startswith(f"{tmp_path}: cannot be read")


def test_all_problems_come_at_once_in_order(config_file):
    path = config_file("max_iters = -1\nnope\nimport os\nbias = 3\nseed = 7\n")
    said = problems(path, "missing.py", "--n_layer=x", "--zzzz=1", "--dropout")
    starts = ["c.py:1:", "c.py:2:", "c.py:3:", "c.py:4:", "missing.py:", "--n_layer=x:", "--zzzz=1:", "--dropout:"]
    assert [line.split(" ")[0] for line in said] == starts


@pytest.mark.parametrize(
    "flag, why",
    [
        ("--n_embd=65", "must be a multiple of n_head, which is 12"),
        ("--min_lr=1.0", "must not exceed learning_rate, which is 0.0006"),
        ("--dropout=1.0", "must be below 1"),
        ("--beta1=1", "must be below 1"),
        ("--beta2=1", "must be below 1"),
        *((f"--dataset={name}", NOT_A_NAME) for name in (".hidden", "-x", "data/tiny", "..", "", "a\0b")),
    ],
)
def test_settings_that_do_not_fit_each_other(flag, why):
    assert problem(flag) == f"{flag}: {why}"


@pytest.mark.parametrize("cls", [PrepareConfig, EvalConfig])
def test_an_encoding_is_one_that_decodes_text(cls):
    for name in ("utf8", "latin-1", "cp1252", "UTF-16", "shift_jis"):
        assert load(cls, [f"--encoding={name}"], "x").encoding == name
    for name, hint in [
        ("latn-1", "; did you mean latin_1?"),
        *((n, "") for n in ("hex", "rot13", "idna", "undefined")),
    ]:
        assert problem(f"--encoding={name}", cls=cls).endswith(f"such as latin-1, cp1252 or utf-16{hint}")
    assert "is no encoding" in problem("--encoding=", cls=cls) and "is no encoding" in problem(
        "--encoding=a\0", cls=cls
    )


@pytest.mark.parametrize(
    "cls, flags, said",
    [
        (TrainConfig, ["--muon_momentum=1"], "--muon_momentum=1: must be below 1"),
        (TrainConfig, ["--bias=True", "--architecture=qwen3"], "--bias=True: the architecture qwen3 has no biases"),
        (
            TrainConfig,
            ["--n_embd=36", "--architecture=qwen3"],
            "--n_embd=36: must be a multiple of 2 x n_head for qwen3, and n_head is 12",
        ),
        *(
            (cls, ["--dtype=bfloat16", "--int8=True"], "--int8=True: works in float32 beside it, and dtype is bfloat16")
            for cls in (SampleConfig, ServeConfig)
        ),
        *(
            (ServeConfig, [f"--allow_origin={origin}"], f"--allow_origin={origin}: must be an origin such as ")
            for origin in ("https://example.org/page", "https://", "example.org", "http://a b")
        ),
        (EvalConfig, ["--stride=9", "--block_size=8"], "--stride=9: must not exceed block_size, which is 8"),
        (EvalConfig, ["--text=a.txt", "--dataset=b"], "--dataset=b: either a text or a dataset can be evaluated on"),
        (EvalConfig, ["--init_from=gpt2"], "--init_from=gpt2: --text=FILE or --dataset=NAME says what to evaluate"),
    ],
)
def test_several_settings_that_do_not_fit_each_other(cls, flags, said):
    assert problem(*flags, cls=cls).startswith(said)


@pytest.mark.parametrize(
    "cls, flags",
    [
        (TrainConfig, ["--decay_lr=False", "--min_lr=1.0"]),
        (SampleConfig, ["--int8=True", "--dtype=float32"]),
        (SampleConfig, ["--dtype=bfloat16"]),
        (ServeConfig, ["--dtype=bfloat16"]),
        (ServeConfig, ["--allow_origin=*"]),
        (ServeConfig, ["--allow_origin=http://localhost:3000"]),
        (EvalConfig, ["--stride=8", "--block_size=8"]),
        (EvalConfig, ["--init_from=gpt2", "--dataset=b"]),
    ],
)
def test_what_fits_each_other_is_taken(cls, flags):
    assert load(cls, flags, "x")


def test_what_fits_nothing_because_of_a_mistake_elsewhere_is_not_told():
    assert problem("--n_embd=770", "--n_head=x") == "--n_head=x: expected an integer from 1 to 10000"


def test_what_does_not_fit_has_its_source(config_file):
    assert problem(config_file("\nn_embd = 65\n")) == "c.py:2: n_embd = 65: must be a multiple of n_head, which is 12"
    assert problem("--n_head=7").startswith("default: n_embd = 768: must be a multiple of n_head")


def test_what_does_not_fit_comes_with_the_other_problems():
    assert len(problems("--n_embd=65", "--zzzz=1", "--beta1=1.0")) == 3


@pytest.mark.parametrize("number", ["9" * 5000, "1e400", "-1e400"])
@pytest.mark.parametrize("name", ["max_iters", "learning_rate", "seed"])
def test_a_number_beyond_all_bounds_is_refused(number, name, config_file):
    assert problem(f"--{name}={number}").startswith(f"--{name}=")
    assert problem(config_file(f"{name} = {number}\n")).startswith("c.py:1: ")


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400])
def test_an_integer_beyond_all_floats_is_refused(number, config_file):
    assert problem(f"--seed={number}").startswith("--seed=")
    assert problem(config_file(f"seed = {number}\n")).startswith("c.py:1: ")


def test_an_integer_too_long_to_print_is_refused(config_file):
    assert problem(config_file(f"seed = 0x{'f' * 5000}\n")).startswith("c.py:1: ")


CLASSES = [TrainConfig, BenchConfig, SampleConfig, TalkConfig, ExportConfig, EvalConfig, PrepareConfig, ServeConfig]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_size_has_an_upper_bound(cls):
    for f in fields(cls):
        if f.metadata["kind"] is int:
            assert f.metadata["high"] is not None, f.name
            beyond = f"--{f.name}={f.metadata['high'] + 1}"
            assert problem(beyond, cls=cls).startswith(f"{beyond}: expected an integer from ")


def test_a_global_batch_has_an_upper_bound():
    said = problem("--gradient_accumulation_steps=100000", "--batch_size=101")
    assert said.endswith("times batch_size, which is 101, must not exceed 10000000 sequences")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("value", ["", "a\0b", "caf\udce9", "x" * 256, "x/" * 2048 + "x"])
def test_what_can_be_no_path_is_refused_in_every_setting_that_is_one(cls, value):
    paths = [f for f in fields(cls) if f.metadata["path"]]
    for f in paths:
        if value or f.default:
            assert problem(f"--{f.name}={value}", cls=cls) == f"--{f.name}={value}: expected {PATH}"
    assert {f.name for f in paths} >= {f.name for f in fields(cls)} & {"out_dir", "init_from", "root", "to"}


def test_bytes_that_are_not_utf8_are_refused_in_every_text():
    """They could not be written to config.json, nor to a checkpoint."""
    assert problem("--wandb_run_name=caf\udce9") == "--wandb_run_name=caf\udce9: expected UTF-8 text"
    for name in ("caf\udce9", "x" * 256):
        assert problem(f"--dataset={name}").startswith(f"--dataset={name}: ")


# No file runs code

CODE = [
    "import pathlib; pathlib.Path('marker').touch()",
    "max_iters = __import__('pathlib').Path('marker').touch()",
    "open('marker', 'w')",
    "max_iters = open('marker', 'w').close() or 1",
    'out_dir = f\'{open("marker", "w")}\'',
    "max_iters = (n := 5)",
    "max_iters = [open('marker', 'w') for _ in '1'][0]",
    "max_iters = (lambda: open('marker', 'w'))()",
    "max_iters = ''.__class__",
    "max_iters = 'abc'[0]",
    "max_iters = [1, 2]",
    "max_iters = {'a': 1}",
    "max_iters = 1 if True else 2",
    "max_iters = True and open('marker', 'w')",
    "max_iters = 1 < 2",
    "max_iters = ~5",
    "max_iters = 1 << 3",
    "max_iters = seed",
    "max_iters = None",
    "max_iters = 1j",
    "max_iters = b'1'",
    "max_iters = ...",
    "max_iters = True + 1",
    "max_iters = 'a' * 3",
    "max_iters = 1 / 0",
    "max_iters = 0 ** -1",
    "learning_rate = (-1) ** 0.5",
    "max_iters: int = 5",
    "max_iters += 5",
    "max_iters = seed = 5",
    "max_iters, seed = 5, 6",
    "max_iters.x = 5",
    "if True: max_iters = open('marker', 'w')",
    "for max_iters in open('marker', 'w'): pass",
    "with open('marker', 'w'): pass",
    "del max_iters",
    "max_iters = 5; open('marker', 'w')",
    "def f(x=open('marker', 'w')): pass",
    "@open('marker', 'w').write\ndef f(): pass",
    "class C: open('marker', 'w')",
    "max_iters",
    "max_iters 5",
    "max_iters = ",
    "(((((",
]


@pytest.mark.parametrize("code", CODE)
def test_what_is_no_plain_assignment_is_refused_and_not_run(code, config_file, tmp_path):
    path = config_file(f"\n{code}\n")
    assert all(re.match(r"c\.py:[23]: ", line) for line in problems(path))
    assert [p.name for p in tmp_path.iterdir()] == [path]


HOSTILE = {
    "a tower of powers": "max_iters = 9**9**9",
    "a large power": "max_iters = 10**65",
    "a large base": "max_iters = (10**60)**60",
    "a long text": "out_dir = 'a' * 10**9",
    "doubled texts": "_a = 'aaaaaaaaaa'\n" + "_a = _a + _a\n" * 40 + "out_dir = _a",
    "squared numbers": "_a = 10**9\n" + "_a = _a * _a\n" * 40 + "max_iters = _a",
    "many parentheses": "max_iters = " + "(" * 100_000 + "1" + ")" * 100_000,
    "many signs": "max_iters = " + "-" * 100_000 + "1",
    "many terms": "max_iters = " + "+".join(["1"] * 100_000),
    "terms that can just be parsed": "max_iters = " + "+".join(["1"] * 1500),
    "deep powers": "max_iters = " + "**".join(["1"] * 50_000),
    "deep attributes": "max_iters = a" + ".a" * 100_000,
    "deep lists": "max_iters = " + "[" * 150 + "]" * 150,
    "null bytes": "max_iters = 1\0\nseed = 2\n",
    "only null bytes": b"\0" * 1000,
    "a binary file": bytes(range(256)) * 100,
    "Latin-1": "out_dir = 'é'\n".encode("latin-1"),
    "UTF-16": "max_iters = 5\n".encode("utf-16"),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_quickly(text, config_file):
    code = (
        "import sys, nanogpt.config as c\n"
        "from nanogpt.run import settings\n"
        "try: settings.load(c.TrainConfig, sys.argv[1:], 'train.py')\n"
        "except c.UserError as e: sys.exit(len(e.problems))"
    )
    command = [sys.executable, "-c", code, config_file(text)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env={"PYTHONPATH": str(ROOT)})
    assert 0 < result.returncode < 50 and result.stderr == ""


# Whatever is typed: a config or a UserError

names = st.sampled_from(["max_iters", "seed", "compile", "dtype", "out_dir", "learning_rate", "n_head", "_x", "nope"])
atoms = st.one_of(
    names,
    st.integers(-(10**400), 10**400).map(str),
    st.floats().map(str),
    st.text(max_size=5).map(repr),
    st.sampled_from(["True", "None", "1e999", "0x" + "f" * 5000, "'auto'", "''", "f()", "x.y", "[1]"]),
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+ - * / // % ** < and @ <<".split()), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=6,
)
assignments = st.lists(st.tuples(names, expressions).map(" = ".join), max_size=6).map("\n".join)


def config_or_problems(*argv):
    try:
        return load(TrainConfig, list(argv), "train.py")
    except UserError as e:
        assert e.problems
        return None


@given(st.one_of(st.binary(), st.text().map(lambda t: t.encode("utf-8", "surrogatepass")), assignments.map(str.encode)))
def test_any_file_gives_a_config_or_problems(config_file, content):
    config_or_problems(config_file(content))


@given(assignments)
def test_any_assignments_give_a_config_that_loads_again(config_file, text):
    cfg = config_or_problems(config_file(text))
    if cfg:
        assert config_or_problems(*(f"--{k}={v}" for k, v in asdict(cfg).items())) == cfg


@given(st.one_of(st.text(), st.tuples(names, st.one_of(atoms, st.text())).map("--{0[0]}={0[1]}".format)))
@example("")
@example("-")
@example("--")
@example("--=")
@example("-=5")
@example("a\0b")
@example("\ud800")
@example("a" * 5000)
def test_any_argument_gives_a_config_or_problems(argument):
    if argument not in ("-h", "--help"):
        config_or_problems(argument)


# Showing them


def help_words(capsys, *argv, cls=TrainConfig):
    with pytest.raises(SystemExit) as caught:
        load(cls, list(argv), "train.py")
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig, ServeConfig, EvalConfig, PrepareConfig])
def test_help_lists_every_setting_with_its_value(cls, capsys):
    shown = help_words(capsys, "--help", cls=cls)
    for f in fields(cls):
        value = " ".join(repr(f.default).split())
        assert f"--{f.name}={value} {f.metadata['help']}" in shown


def test_help_shows_present_values_and_their_origin(config_file, capsys):
    path = config_file("\nbatch_size = 99\n")
    shown = help_words(capsys, path, "-h", "--n_layer=77")
    expected = {
        "batch_size": ("99", "c.py:2; default 12"),
        "n_layer": ("77", "--n_layer=77; default 12"),
        "n_head": ("12", "default"),
    }
    for name, value_and_origin in expected.items():
        assert re.search(rf" --{name}=(\d+) [^[]*\[[^;]*; (.*?)\]", shown).groups() == value_and_origin


# The files in config/

CONFIGS = sorted((ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_file_in_config_loads(path):
    assert train(path).sources


def test_the_first_training_command_of_the_readme_is_accepted():
    flags = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
        "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    ).split()
    cfg = train(ROOT / "config" / "train_shakespeare_char.py", *flags)
    assert (cfg.device, cfg.compile, cfg.n_embd, cfg.dropout, cfg.max_iters) == ("cpu", False, 128, 0.0, 2000)


def test_the_parser_imports_no_torch():
    code = (
        "import sys; from nanogpt.config import TrainConfig; from nanogpt.run.settings import load; load(TrainConfig, ['--seed=1'], 'x'); "
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")
