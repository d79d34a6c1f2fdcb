"""The settings: their names, defaults and bounds; config files; the command line; `--help`.

Everything else receives a finished, checked config. This module knows no other and never imports torch.
"""

import ast
import codecs
import difflib
import encodings.aliases
import math
import operator
import re
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

DTYPES = ("float32", "bfloat16", "float16")
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MANY = 10**11  # iterations; with LARGEST_BATCH, every window of a run has a number of 64 bits
LARGEST_BATCH = 10**7  # sequences in an iteration


class UserError(ValueError):
    """What a user can mend: one line a problem, exit code 2, no traceback."""

    exit_code = 2
    second_hand = False  # whether another process knows the reason, and reports it

    def __init__(self, *problems):
        super().__init__("\n".join(problems))
        self.problems = problems


def installs(extra):
    """The command that installs an extra of pyproject.toml, as README.md has it: pinned, so that torch stays."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


class RunFailed(UserError):
    """A run that cannot go on through no fault of its settings: a full disk, a sick model."""

    exit_code = 1


def setting(
    default, help, kind=None, *, low=None, above=None, high=None, choices=None, auto=False, path=False, group=None
):
    """A dataclass field with what the parser and `--help` need.

    The type is that of the default unless `kind` says otherwise; `low <= value <= high`, `value > above`;
    `auto`: the word `auto` is allowed too; `path`: it names a file or folder, and may be empty only if that is the
    default; `group`: the heading that begins here in `--help`.
    """
    meta = dict(help=help, kind=kind or type(default), low=low, above=above, high=high)
    path = path and ("may be empty" if default == "" else "not empty")
    return field(default=default, metadata=meta | dict(choices=choices, auto=auto, path=path, group=group))


@dataclass
class TrainConfig:
    """Settings of `train.py`."""

    auto_batch = False  # whether batch_size was `auto`; its number then says how many sequences an iteration has

    out_dir: str = setting(
        "out", "folder for checkpoints, metrics.jsonl and the picture of the losses", path=True, group="Run"
    )
    eval_interval: int = setting(2000, "evaluate (and save) every so many iterations", low=1, high=MANY)
    log_interval: int = setting(1, "print a line every so many iterations", low=1, high=MANY)
    eval_iters: int = setting(200, "batches of each split in an evaluation; always the same ones", low=1, high=10**6)
    eval_only: bool = setting(False, "evaluate once, print the exact validation loss, and end")
    always_save_checkpoint: bool = setting(
        True, "False: a checkpoint whose val loss is no improvement gives way to the next one"
    )
    keep_checkpoints: int = setting(2, "the so many newest checkpoints are kept, and the best", low=1, high=10**6)
    patience: int = setting(
        0, "end the run when so many evaluations in a row were no improvement; 0: never", low=0, high=10**6
    )
    init_from: str = setting(
        "scratch",
        "scratch, resume, auto (resume if there is something to resume), a GPT-2 name, or a folder",
        path=True,
    )
    wandb_log: bool = setting(False, "log to Weights & Biases", group="Weights & Biases")
    wandb_project: str = setting("owt", "its project")
    wandb_run_name: str = setting("gpt2", "its run name")
    dataset: str = setting("openwebtext", "a folder in data/ with train.bin, val.bin and meta.json", group="Data")
    root: str = setting("data", "the folder that holds the datasets", path=True)
    gradient_accumulation_steps: int = setting(
        40, "micro-batches in an iteration, over all processes", low=1, high=10**6
    )
    batch_size: int | str = setting(
        12,
        "sequences in a micro-batch; auto: as many as fit the memory, and in an iteration as many as without",
        auto=True,
        low=1,
        high=10**6,
    )
    block_size: int = setting(1024, "context length, in tokens", low=1, high=10**7)
    sampling: str = setting(
        "epochs",
        "epochs: every window once before one comes again; random: from anywhere",
        choices=("epochs", "random"),
    )
    documents: bool = setting(False, "windows begin where documents begin, and hold tokens of one document each")
    architecture: str = setting(
        "gpt2",
        "gpt2 (the classic one) or qwen3 (the modern one, which learns faster)",
        choices=("gpt2", "qwen3"),
        group="Model",
    )
    n_layer: int = setting(12, "transformer blocks", low=1, high=10**4)
    n_head: int = setting(12, "attention heads in a block", low=1, high=10**4)
    n_embd: int = setting(768, "channels; a multiple of n_head", low=1, high=10**6)
    dropout: float = setting(0.0, "0 for pretraining; 0.1 and more for finetuning and small data", low=0.0, high=1.0)
    bias: bool = setting(
        False, "biases in linear layers and layer norms, as GPT-2 has them; without is a bit better and faster"
    )
    optimizer: str = setting(
        "adamw",
        "adamw, or muon: Muon for the matrices of the blocks, AdamW for the rest",
        choices=("adamw", "muon"),
        group="Optimizer",
    )
    learning_rate: float = setting(6e-4, "the highest learning rate, AdamW's", above=0.0)
    muon_lr: float = setting(0.02, "Muon's highest learning rate; it rises and falls with AdamW's", above=0.0)
    muon_momentum: float = setting(
        0.95, "Muon's momentum; less for runs of a few hundred iterations", low=0.0, high=1.0
    )
    max_iters: int = setting(600000, "optimizer updates in the whole run", low=0, high=MANY)
    weight_decay: float = setting(1e-1, "on matrices and embeddings only", low=0.0)
    beta1: float = setting(0.9, "AdamW's decay of the mean", low=0.0, high=1.0)
    beta2: float = setting(0.95, "AdamW's decay of the mean square", low=0.0, high=1.0)
    grad_clip: float = setting(1.0, "clip the gradient's norm to this; 0.0 turns it off", low=0.0)
    skip_spikes: bool = setting(False, "leave out an update whose loss is far above the recent ones")
    decay_lr: bool = setting(True, "warm up and decay; otherwise the rate is constant", group="Learning rate schedule")
    lr_schedule: str = setting(
        "cosine", "cosine, or linear: constant, then straight down to min_lr", choices=("cosine", "linear")
    )
    cooldown_frac: float = setting(0.6, "linear: the share of the iterations in which it falls", above=0.0, high=1.0)
    warmup_iters: int = setting(2000, "iterations of linear warm-up", low=0, high=MANY)
    lr_decay_iters: int = setting(600000, "iteration at which min_lr is reached; about max_iters", low=0, high=MANY)
    min_lr: float = setting(6e-5, "the lowest learning rate; about learning_rate / 10", low=0.0)
    backend: str = setting(
        "auto", "of torch.distributed: nccl or gloo", choices=("nccl", "gloo"), auto=True, group="System"
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True)
    dtype: str = setting("auto", "of the matrix products; the weights stay float32", choices=DTYPES, auto=True)
    compile: bool | str = setting("auto", "torch.compile: slower to start, faster to run", bool, auto=True)
    deterministic: bool = setting(
        False, "the same bits every time on a GPU too, at some cost in speed; CPUs need it not"
    )
    seed: int | str = setting(
        1337, "of the initialisation, the batches and dropout", int, low=0, high=2**63 - 1, auto=True
    )

    def problems(self):
        """What no setting shows alone: (the settings it takes, the first of them to blame; what is wrong)."""
        if self.n_embd % self.n_head:
            yield ("n_embd", "n_head"), f"must be a multiple of n_head, which is {self.n_head}"
        elif self.architecture == "qwen3" and self.n_embd % (2 * self.n_head):
            yield ("n_embd", "n_head"), f"must be a multiple of 2 x n_head for qwen3, and n_head is {self.n_head}"
        if self.gradient_accumulation_steps * self.batch_size > LARGEST_BATCH:
            names, size = ("gradient_accumulation_steps", "batch_size"), self.batch_size
            yield names, f"times batch_size, which is {size}, must not exceed {LARGEST_BATCH} sequences"
        if self.architecture == "qwen3" and self.bias:
            yield ("bias", "architecture"), "the architecture qwen3 has no biases"
        if self.decay_lr and self.min_lr > self.learning_rate:
            yield (
                ("min_lr", "learning_rate", "decay_lr"),
                f"must not exceed learning_rate, which is {self.learning_rate}",
            )
        for name in ("dropout", "beta1", "beta2", "muon_momentum"):
            if getattr(self, name) == 1.0:
                yield (name,), "must be below 1"
        if not is_name(self.dataset):
            yield ("dataset",), NOT_A_NAME


@dataclass
class BenchConfig(TrainConfig):
    """Settings of `bench.py`: those of a training run, of which it measures some iterations."""

    iters: int = setting(20, "iterations to measure", low=1, high=10**6, group="Benchmark")
    warmup: int = setting(5, "iterations before them", low=0, high=10**6)
    vocab_size: int = setting(65, "of the model and the random tokens; 50304 for GPT-2's", low=1, high=2**31 - 1)


@dataclass
class TextConfig:
    """Settings of all programs that write text."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    max_new_tokens: int = setting(500, "length of a text, in tokens", low=1, high=10**9, group="Text")
    temperature: float = setting(0.8, "below 1 is tamer, above 1 wilder, 0 always takes the likeliest token", low=0.0)
    top_k: int = setting(200, "choose among the so many likeliest tokens only; 0 among all", low=0, high=2**31 - 1)
    top_p: float = setting(1.0, "among the likeliest that together have this probability", above=0.0, high=1.0)
    min_p: float = setting(0.0, "among those at least so likely, relative to the likeliest", low=0.0, high=1.0)
    stop: str = setting("", "end a text where this appears (\\n is a new line); several are separated by |")
    seed: int | str = setting(1337, "of the choice of tokens", int, low=0, high=2**63 - 1, auto=True, group="System")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True)
    dtype: str = setting("auto", "of the weights and products", choices=DTYPES, auto=True)
    int8: bool | str = setting(
        "auto", "weights of a byte each, on CPUs; auto: where a large model writes faster so", bool, auto=True
    )

    def problems(self):
        """What no setting shows alone: (the settings it takes, the first of them to blame; what is wrong)."""
        if self.int8 is True and self.dtype not in ("auto", "float32"):
            yield ("int8", "dtype"), f"works in float32 beside it, and dtype is {self.dtype}"

    def stop_strings(self):
        """The strings that end a text."""
        return [unescaped(s) for s in self.stop.split("|") if s]


@dataclass
class SampleConfig(TextConfig):
    """Settings of `sample.py`."""

    start: str = setting(
        "\n", "what the text begins with (\\n is a new line), or FILE:prompt.txt", group="Several texts"
    )
    num_samples: int = setting(
        10, "texts to write; the first has the seed, the second the next one, ...", low=1, high=10**6
    )
    compile: bool | str = setting("auto", "torch.compile: slower to start, faster to run", bool, auto=True)


@dataclass
class TalkConfig(TextConfig):
    """Settings of `nanogpt talk`."""


@dataclass
class ExportConfig:
    """Settings of `nanogpt export`."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    to: str = setting("", "folder to write, which must not exist yet or be empty", path=True, group="Result")

    def problems(self):
        """What no setting shows alone: nothing here."""
        return ()


def unescaped(text):
    """Text as typed in a shell, where \\n stands for a new line and \\t for a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass
class EvalConfig:
    """Settings of `nanogpt eval`."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    text: str = setting(
        "",
        "what nanogpt prepare reads: a file, a folder, 'a glob*', hf:NAME, or - for standard input",
        path=True,
        group="Text",
    )
    field: str = setting("text", "the field or column with the text, of .jsonl, .parquet and hf:NAME")
    encoding: str = setting("utf-8", "of plain text, by its name in Python: latin-1, cp1252, utf-16, ...")
    dataset: str = setting("", "instead of a text a folder in data/; with neither, the one it was trained on")
    root: str = setting("data", "the folder that holds the datasets", path=True)
    split: str = setting("val", "of the dataset", choices=("train", "val"))
    per_document: bool = setting(
        False, "a line for each document (a file, a line of .jsonl, ...), and no context from others"
    )
    block_size: int | str = setting(
        "auto", "context in tokens; auto is the model's own", int, low=1, high=10**7, auto=True, group="Windows"
    )
    stride: int | str = setting(
        "auto",
        "tokens from one window to the next; auto is block_size, fewer give each token more context",
        int,
        low=1,
        high=10**7,
        auto=True,
    )
    batch_size: int = setting(12, "windows at a time", low=1, high=10**6, group="System")
    backend: str = setting("auto", "of torch.distributed: nccl or gloo", choices=("nccl", "gloo"), auto=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True)
    dtype: str = setting("auto", "of the matrix products; the weights stay float32", choices=DTYPES, auto=True)

    def problems(self):
        """What no setting shows alone: (the settings it takes, the first of them to blame; what is wrong)."""
        if self.text and self.dataset:
            yield ("dataset", "text"), "either a text or a dataset can be evaluated on, and --text is given too"
        if self.dataset and not is_name(self.dataset):
            yield ("dataset",), NOT_A_NAME
        if why := not_an_encoding(self.encoding):
            yield ("encoding",), why
        if self.init_from in GPT2_NAMES and not self.text and not self.dataset:
            yield ("init_from", "text", "dataset"), "--text=FILE or --dataset=NAME says what to evaluate it on"
        if "auto" not in (self.stride, self.block_size) and self.stride > self.block_size:
            yield ("stride", "block_size"), f"must not exceed block_size, which is {self.block_size}"


@dataclass
class PrepareConfig:
    """Settings of `nanogpt prepare`; `arguments` holds its SOURCEs."""

    ARGUMENTS: ClassVar = "SOURCE"

    dataset: str = setting("", "name of the dataset, which is written to data/NAME/", group="Dataset")
    root: str = setting("data", "folder of the datasets", path=True)
    tokenizer: str = setting(
        "char",
        "char, byte, gpt2, or bpe:N (N tokens, trained on the text, such as bpe:4096), or the folder of a model or "
        "dataset whose tokenizer to use",
    )
    val_fraction: float | str = setting(
        "auto", "fraction of tokens for validation; auto: a tenth, but at most 2 million tokens",
        float, above=0.0, high=0.5, auto=True,
    )  # fmt: skip
    seed: int = setting(1337, "seed of the document order and the split", low=0, high=2**63 - 1)
    shard_tokens: int = setting(
        10**9, "tokens per file; a larger split is written to several files", low=10**4, high=10**13
    )
    field: str = setting("text", "field or column of .jsonl, .parquet and hf:NAME that holds the text", group="Text")
    encoding: str = setting("utf-8", "encoding of plain text, as Python names it: latin-1, cp1252, utf-16, ...")
    errors: str = setting(
        "strict",
        "invalid bytes: strict refuses them, replace turns each into U+FFFD",
        choices=("strict", "replace"),
    )
    drop_duplicates: bool = setting(False, "keep one of each set of identical documents")
    memory: int = setting(
        1024, "memory limit of all processes together, in megabytes", low=256, high=10**8, group="Machine"
    )
    workers: int | str = setting(
        "auto",
        "worker processes; auto: one per core, as memory allows; 0: none",
        int,
        low=0,
        high=10**4,
        auto=True,
    )
    trial: bool = setting(True, "train for up to 3 seconds to estimate how long a run will take")

    def problems(self):
        """What no setting shows alone: (the settings it takes, the first of them to blame; what is wrong)."""
        if self.dataset and not is_name(self.dataset):
            yield ("dataset",), NOT_A_NAME
        if why := not_an_encoding(self.encoding):
            yield ("encoding",), why


NOT_A_NAME = (
    "must be the name of a folder in data/, not a path, and begin with neither . nor -; "
    "--root=FOLDER is for datasets that lie elsewhere"
)


def is_name(dataset):
    """Whether this can be the name of a folder in data/, and of nothing outside it."""
    return is_path(dataset) and dataset[0] not in ".-" and dataset == Path(dataset).name


def not_an_encoding(name):
    """What is wrong with the name of an encoding, or None: it must decode any text, piece by piece."""
    try:
        b"a".decode(name, "replace")
        codecs.getincrementaldecoder(name)("surrogateescape").decode(b"a")
        return None
    except (LookupError, ValueError):  # there is no such codec, or it is not one of bytes and text, or not of all text
        pass
    pairs = encodings.aliases.aliases.items()
    known = sorted({k for pair in pairs for k in pair if not pair[1].endswith(("_codec", "rot_13"))})
    return f"is no encoding of text that Python knows, such as latin-1, cp1252 or utf-16{nearest(name, known)}"


@dataclass
class ServeConfig:
    """Settings of `nanogpt serve`."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is all that this machine has", group="Server")
    port: int = setting(8000, "0 takes a free one", low=0, high=65535)
    api_key_file: str = setting(
        "", "file with the key that clients must send; NANOGPT_API_KEY in the environment does the same", path=True
    )
    allow_origin: str = setting(
        "", "web pages of this origin may use the server too, such as https://example.org, or *"
    )
    max_batch: int = setting(16, "texts that are written at the same time", low=1, high=10**4, group="Limits")
    max_requests: int = setting(
        64, "requests at a time, waiting ones included; more are turned away", low=1, high=10**6
    )
    max_n: int = setting(
        8, "texts for a prompt; all prompts of a request together have up to 20, or this if more", low=1, high=10**6
    )
    max_tokens: int = setting(4096, "tokens of one text", low=1, high=10**9)
    max_prompt: int = setting(16384, "characters of a prompt, and tokens", low=1, high=10**9)
    max_body: int = setting(2**18, "bytes of a request", low=1024, high=2**30)
    max_seconds: float = setting(300.0, "time for one request, waiting included", above=0.0, high=10.0**7)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True, group="System")
    dtype: str = setting("auto", "of the weights and products", choices=DTYPES, auto=True)
    int8: bool | str = setting(
        "auto", "weights of a byte each, on CPUs; auto: where a large model writes faster so", bool, auto=True
    )

    def problems(self):
        """What no setting shows alone: (the settings it takes, the first of them to blame; what is wrong)."""
        if self.allow_origin not in ("", "*") and not re.fullmatch(r"https?://[^/\s?#]+", self.allow_origin):
            yield ("allow_origin",), "must be an origin such as https://example.org, without a path, or *"
        if self.int8 is True and self.dtype not in ("auto", "float32"):
            yield ("int8", "dtype"), f"works in float32 beside it, and dtype is {self.dtype}"


def load(cls, argv, prog, inherit=None):
    """Read config files and `--key=value` arguments into a checked `cls`.

    Files come first, in order; flags override them wherever they stand. A class that has ARGUMENTS takes no files:
    what is no flag is kept in the result's `arguments`. `inherit`, given the config so far,
    returns settings for what neither names, and where they are from: a run that goes on keeps its own. The
    result's `sources` maps each setting that is not at its default to where its value came from. `--help`
    prints and exits with 0. Raises UserError with every problem found, not the first alone.
    """
    values, sources, problems, failed, names, autos = {}, {}, [], set(), {}, {}
    known = {f.name: f for f in fields(cls)}

    def assign(source, shown, name, value):
        """Take a value, or note why not; `shown` is how a message names it."""
        if name not in known:
            problems.append(f"{shown}: there is no setting {name!r}{nearest(name, known)}")
            return
        try:
            value = convert(value, known[name].metadata)
        except ValueError as e:
            problems.append(f"{shown}: expected {e}")
            failed.add(name)
            return
        autos.pop(name, None)
        if (name, value) == ("batch_size", "auto"):
            autos[name] = source  # the number below it stays
        else:
            values[name], sources[name] = value, source

    arguments = [a for a in argv if not a.startswith("-") or (a == "-" and hasattr(cls, "ARGUMENTS"))]
    flags = [a for a in argv if a not in arguments and a not in ("-h", "--help")]
    for path in arguments if not hasattr(cls, "ARGUMENTS") else ():
        if "text" in known and not path.endswith(".py"):
            problems.append(f"{path}: a config file's name ends in .py; --text={path} evaluates on a text")
            continue
        for line, name, value in read_config_file(path, names, problems):
            assign(f"{path}:{line}", f"{path}:{line}: {name} = {value!r}", name, value)
    for flag in flags:
        name, equals, text = flag.lstrip("-").partition("=")
        if equals or name not in known:
            assign(flag, flag, name, _Text(text))
        else:
            example = "True" if known[name].metadata["kind"] is bool else "VALUE"
            problems.append(f"{flag}: a setting is written --{name}={example}, with an equals sign and no spaces")
    cfg = cls(**values)
    asked = dict(autos)  # a run that goes on has no say in that
    if inherit and not problems:
        inherited, source = inherit(cfg)
        for name, value in inherited.items():
            if name in known and (name not in sources or (name, values[name]) == ("seed", "auto")):
                assign(source, f"{source}: {name} = {value!r}", name, value)
        cfg = cls(**values)
    cfg.sources, cfg.auto_batch, cfg.arguments = sources | asked, bool(asked), arguments
    problems += misfits(cfg, failed)
    if problems:
        raise UserError(*problems)
    if "-h" in argv or "--help" in argv:
        print(help_text(cfg, prog))
        raise SystemExit(0)
    return cfg


def misfits(cfg, failed):
    """Yield what no setting shows alone, blamed on the first one it takes; nothing about those that `failed` before."""
    for names, why in cfg.problems():
        if not failed & set(names):
            name, where = names[0], cfg.sources.get(names[0], "default")
            shown = where if where.startswith("-") else f"{where}: {name} = {getattr(cfg, name)!r}"
            yield f"{shown}: {why}"


class _Text(str):
    """A value as typed on the command line, not yet of any type."""


def change(cfg, name, text):
    """Give a setting of `cfg` the value that was typed. Raises UserError that says what was expected."""
    meta = {f.name: f.metadata for f in fields(cfg)}[name]
    try:
        setattr(cfg, name, convert(_Text(text), meta))
    except ValueError as e:
        raise UserError(f"{name} {text}: expected {e}") from None


def check_bounds(cls, values, source):
    """Raise UserError for each of the values {name: value} that is not what the setting of that name in `cls` may be."""
    problems = []
    for name, meta in ((f.name, f.metadata) for f in fields(cls) if f.name in values):
        try:
            convert(values[name], meta)
        except ValueError as e:
            problems.append(f"{source}: {name} = {values[name]!r:.60}: expected {e}")
    if problems:
        raise UserError(*problems)


def nearest(name, known):
    """'; did you mean X?' for a mistyped name, or nothing."""
    known = [k for k in known if k != name]  # what was given, and failed, is no suggestion
    close = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def convert(value, meta):
    """`value` (Python's, or text from the command line) as its setting's type, within its bounds.

    Raises ValueError that says what was expected.
    """
    kind, auto = meta["kind"], meta["auto"]
    if auto and isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, _Text):
        value = _from_text(value, kind)
    if kind is float and type(value) is int:
        value = float(value) if -1e300 < value < 1e300 else math.inf
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e4 is a number of iterations as good as 10000
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


def is_utf8(text):
    """Whether no part of it stands for bytes that are not UTF-8, as surrogates do in an argument; JSON holds none."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_path(text):
    """Whether a file or folder can have this path."""
    if not is_utf8(text) or "\0" in text:
        return False
    return 0 < len(text.encode()) < 4096 and all(len(name.encode()) < 256 for name in re.split(r"[/\\]", text))


def _from_text(text, kind):
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


def describe(meta):
    """What a setting accepts, in words: 'an integer >= 1 or auto'."""
    words = {int: "an integer", float: "a number", bool: "True or False", str: "UTF-8 text"}[meta["kind"]]
    if meta["choices"]:
        words = "one of " + ", ".join(meta["choices"])
    if meta["path"]:
        words = "the path of a file or folder, in UTF-8, without NUL, of names of at most 255 bytes"
    low, above, high = meta["low"], meta["above"], meta["high"]
    if low is not None and high is not None:
        words += f" from {low} to {high}"
    elif low is not None:
        words += f" >= {low}"
    elif above is not None:
        words += f" > {above}" + ("" if high is None else f" and <= {high}")
    return words + (" or auto" if meta["auto"] else "")


# -- config files: assignments of literals and arithmetic, parsed and never executed

_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def read_config_file(path, names, problems):
    """Yield (line, name, value) for each assignment of the config file at `path`.

    `names` are the values assigned so far, here or in earlier files, and grow as it is read; a name that
    begins with an underscore is a helper, not a setting. What cannot be read goes to `problems`.
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
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            problems.append(f"{path}:{statement.lineno}: only assignments like name = value can stand in a config file")
            continue
        name = targets[0].id
        try:
            value = names[name] = evaluate(statement.value, names)
        except (ValueError, TypeError, ArithmeticError, RecursionError) as e:
            problems.append(f"{path}:{statement.lineno}: {name} = ...: {e}")
            continue
        if not name.startswith("_"):
            yield statement.lineno, name, value


def nearest_file(path):
    """'; did you mean FILE?' for a mistyped path, or nothing."""
    folder = Path(path).parent
    others = [p.name for p in folder.glob("*.py") if p.name != Path(path).name]  # a link to nothing is there, too
    close = difflib.get_close_matches(Path(path).name, others, n=1, cutoff=0.5)
    return f"; did you mean {folder / close[0]}?" if close else ""


def evaluate(node, names):
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


def _number(value):
    if type(value) not in (int, float):
        raise ValueError(f"no arithmetic on {value!r}")
    return value


def _bounded(value):
    too_large = len(value) > 10_000 if isinstance(value, str) else isinstance(value, complex) or abs(value) > 1e300
    if too_large:
        raise ValueError("that value is too large for a setting")
    return value


# -- showing them


def help_text(cfg, prog):
    """Every setting with its present value, meaning, type, default, and where the value came from."""
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
            f"{meta['help']} [{describe(meta)}; {origin}]", 70, break_on_hyphens=False, break_long_words=False
        )
        lines += [f"{left:<38}  {right[0]}"] + [" " * 40 + r for r in right[1:]]
    return "\n".join(lines)


def settings(cfg):
    """The settings as a plain dictionary, for JSON."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg)}
