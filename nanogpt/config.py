"""The settings: their names, defaults and bounds; config files; the command line; `--help`.

Everything else receives a finished, checked config. This module knows no other and never imports torch.
"""

import codecs
import difflib
import encodings.aliases
import re
from dataclasses import dataclass, field
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
    to: str = setting(
        "",
        "what to write, and must not exist yet: NAME.gguf, or a folder in Hugging Face's format",
        path=True,
        group="Result",
    )
    dtype: str = setting("float32", "number format of the weights in it", choices=DTYPES)

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
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 means all addresses of this machine", group="Server"
    )
    port: int = setting(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    api_key_file: str = setting(
        "", "file with the API key that clients must send; or set NANOGPT_API_KEY in the environment", path=True
    )
    allow_origin: str = setting("", "origin whose web pages may use the server, such as https://example.org, or *")
    max_batch: int = setting(16, "texts generated at the same time", low=1, high=10**4, group="Limits")
    max_requests: int = setting(
        64, "requests at a time, including waiting ones; further ones get status 429", low=1, high=10**6
    )
    max_n: int = setting(
        8, "texts per prompt; a request gets at most 20 in all, or this number if larger", low=1, high=10**6
    )
    max_tokens: int = setting(4096, "maximum length of a text, in tokens", low=1, high=10**9)
    max_prompt: int = setting(16384, "maximum length of a prompt, in characters and in tokens", low=1, high=10**9)
    max_body: int = setting(2**18, "maximum size of a request, in bytes", low=1024, high=2**30)
    max_seconds: float = setting(
        300.0, "time limit for a request, including waiting, in seconds", above=0.0, high=10.0**7
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True, group="System")
    dtype: str = setting("auto", "number format of weights and matrix products", choices=DTYPES, auto=True)
    int8: bool | str = setting(
        "auto", "8-bit weights, on CPUs; auto: if a large model is faster with them", bool, auto=True
    )

    def problems(self):
        """What no setting shows alone: (the settings it takes, the first of them to blame; what is wrong)."""
        if self.allow_origin not in ("", "*") and not re.fullmatch(r"https?://[^/\s?#]+", self.allow_origin):
            yield ("allow_origin",), "must be an origin such as https://example.org, without a path, or *"
        if self.int8 is True and self.dtype not in ("auto", "float32"):
            yield ("int8", "dtype"), f"works in float32 beside it, and dtype is {self.dtype}"


def nearest(name, known):
    """'; did you mean X?' for a mistyped name, or nothing."""
    known = [k for k in known if k != name]  # what was given, and failed, is no suggestion
    close = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def is_utf8(text):
    """Whether no part of it stands for bytes that are not UTF-8, as surrogates do in an argument; JSON holds none."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_path(text):
    """Whether a file or folder can have this path."""
    if not is_utf8(text) or "\0" in text:
        return False
    return 0 < len(text.encode()) < 4096 and all(len(name.encode()) < 256 for name in re.split(r"[/\\]", text))
