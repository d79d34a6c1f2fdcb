"""The settings of every command: names, defaults, bounds and help texts.

run/settings.py parses the command line and config files. This module imports no other one, and never torch.
"""

import codecs
import difflib
import encodings.aliases
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = ("gpt2", "qwen3", "llama")
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MATMULS = ("default", "onednn", "cast")  # what kernels.use_matmul takes
HUB = "hf:"  # before the name of a model or dataset on Hugging Face's hub
MANY = 10**11  # iterations; with LARGEST_BATCH, every window of a run has a number of 64 bits
PADDING = 64  # a large vocabulary is rounded up to a multiple of this
LARGEST_BATCH = 10**7  # sequences in an iteration

Problem = tuple[tuple[str, ...], str]  # (the settings involved, the first one to blame; what is wrong)


class UserError(ValueError):
    """An error that the user can fix: one line per problem, exit code 2, no traceback."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def installs(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, as in README.md: with pinned versions, so torch stays."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


class RunFailed(UserError):
    """A run that cannot go on for a reason other than its settings, such as a full disk or a diverged model."""

    exit_code = 1


def setting(
    default, help, kind=None, *, low=None, above=None, high=None, choices=None, auto=False, path=False, group=None
):
    """A dataclass field with the metadata that the parser and `--help` need.

    kind: its type, by default that of `default`. low, above, high: bounds, low <= value <= high and value > above.
    auto: whether the word `auto` is allowed too. path: whether it names a file or folder; it may be empty only if
    the default is. group: a heading that begins here in `--help`.
    """
    meta = dict(help=help, kind=kind or type(default), low=low, above=above, high=high)
    path = path and ("may be empty" if default == "" else "not empty")
    return field(default=default, metadata=meta | dict(choices=choices, auto=auto, path=path, group=group))


class Config:
    """What `run.settings.load` adds to the settings of a command."""

    sources: dict[str, str] = {}  # {setting: the flag, file or run that set it}
    arguments: list[str] = []  # arguments that are not flags
    auto_batch = False  # whether batch_size was `auto`; the number then only fixes the sequences per iteration


@dataclass
class TrainConfig(Config):
    """Settings of `train.py`."""

    out_dir: str = setting("out", "folder for checkpoints, metrics.jsonl and the loss curve", path=True, group="Run")
    eval_interval: int = setting(2000, "iterations from one evaluation, and checkpoint, to the next", low=1, high=MANY)
    log_interval: int = setting(1, "iterations from one printed line to the next", low=1, high=MANY)
    eval_iters: int = setting(200, "batches of each split in an evaluation, the same ones each time", low=1, high=10**6)
    eval_only: bool = setting(False, "evaluate once, print the exact validation loss, and exit")
    always_save_checkpoint: bool = setting(
        True, "False: only checkpoints that improve the validation loss count as recent ones to keep"
    )
    keep_checkpoints: int = setting(2, "number of recent checkpoints to keep, besides the best one", low=1, high=10**6)
    patience: int = setting(
        0, "stop after this many evaluations in a row without improvement; 0: never", low=0, high=10**6
    )
    init_from: str = setting(
        "scratch",
        "scratch, resume, auto (resume if there is a checkpoint, else scratch), a GPT-2 name, hf:NAME, or a folder",
        path=True,
    )
    wandb_log: bool = setting(False, "log to Weights & Biases, or what is installed in its place", group="Trackers")
    wandb_project: str = setting("owt", "project name")
    wandb_run_name: str = setting("gpt2", "run name")
    tensorboard: bool = setting(False, "log to TensorBoard, in out_dir/tensorboard")
    dataset: str = setting("openwebtext", "folder in data/ with train.bin, val.bin and meta.json", group="Data")
    root: str = setting("data", "the folder that holds the datasets", path=True)
    gradient_accumulation_steps: int = setting(40, "micro-batches per iteration, over all processes", low=1, high=10**6)
    batch_size: int = setting(
        12,
        "sequences per micro-batch; auto: as many as fit in memory, with the same number per iteration",
        auto=True,
        low=1,
        high=10**6,
    )
    block_size: int = setting(1024, "context length, in tokens", low=1, high=10**7)
    sampling: str = setting(
        "epochs",
        "epochs: each window once per epoch; random: windows from anywhere",
        choices=("epochs", "random"),
    )
    documents: bool = setting(False, "start windows at the beginning of documents, with one document in each")
    architecture: str = setting(
        "gpt2",
        "gpt2 (classic), qwen3 (modern, learns faster), or llama",
        choices=ARCHITECTURES,
        group="Model",
    )
    n_layer: int = setting(12, "transformer blocks", low=1, high=10**4)
    n_head: int = setting(12, "attention heads per block", low=1, high=10**4)
    n_embd: int = setting(768, "channels; a multiple of n_head", low=1, high=10**6)
    n_kv_head: int = setting(0, "heads of keys and values, each for several of queries; 0: n_head", low=0, high=10**4)
    head_dim: int = setting(0, "channels of a head; 0: n_embd / n_head", low=0, high=10**6)
    n_hidden: int = setting(
        0, "channels of the MLPs' hidden layer; 0: 4 n_embd, or 8/3 n_embd if it is gated", low=0, high=10**7
    )
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", low=1.0, high=1e12)
    norm_eps: float = setting(1e-6, "added to the mean square in RMS norms", above=0.0, high=1.0)
    norm_gain: bool = setting(False, "gains in RMS norms, as published models have them")
    tied: bool = setting(True, "use the token embedding as the output layer")
    dropout: float = setting(0.0, "0 for pretraining; 0.1 and more for finetuning and small data", low=0.0, high=1.0)
    bias: bool = setting(
        False, "use biases in linear layers and layer norms, as GPT-2 does; False is a bit better and faster"
    )
    lora_rank: int = setting(
        0,
        "rank of the matrices that are trained beside the frozen model; 0: train the model",
        low=0,
        high=10**4,
        group="Finetuning",
    )
    lora_alpha: float = setting(16.0, "their product is multiplied by lora_alpha / lora_rank", above=0.0)
    lora_layers: str = setting("all", "linear layers of blocks that have them", choices=("all", "attention"))
    lora_base: str = setting(
        "float32", "number format in which the frozen model is kept in memory", choices=("float32", "bfloat16")
    )
    optimizer: str = setting(
        "adamw",
        "adamw, or muon: Muon for the blocks' matrices, AdamW for the rest",
        choices=("adamw", "muon"),
        group="Optimizer",
    )
    learning_rate: float = setting(6e-4, "peak learning rate of AdamW", above=0.0)
    muon_lr: float = setting(0.02, "peak learning rate of Muon; follows the same schedule", above=0.0)
    muon_momentum: float = setting(
        0.95, "momentum of Muon; less for runs of a few hundred iterations", low=0.0, high=1.0
    )
    max_iters: int = setting(600000, "optimizer updates in total", low=0, high=MANY)
    minutes: float = setting(
        0.0,
        "minutes that the run may take, which choose model and iterations, except for what is set; 0: as set",
        low=0.0,
        high=1e6,
    )
    weight_decay: float = setting(1e-1, "weight decay of matrices and embeddings", low=0.0)
    beta1: float = setting(0.9, "decay rate of AdamW's first moment", low=0.0, high=1.0)
    beta2: float = setting(0.95, "decay rate of AdamW's second moment", low=0.0, high=1.0)
    grad_clip: float = setting(1.0, "maximum norm of the gradient; 0.0: no clipping", low=0.0)
    skip_spikes: bool = setting(False, "skip updates whose loss is far above the recent ones")
    decay_lr: bool = setting(True, "warm up and decay; False: constant", group="Learning rate schedule")
    lr_schedule: str = setting(
        "cosine", "cosine, or linear: constant, then a linear decay to min_lr", choices=("cosine", "linear")
    )
    cooldown_frac: float = setting(0.6, "linear: fraction of the iterations in which it decays", above=0.0, high=1.0)
    warmup_iters: int = setting(2000, "iterations of linear warm-up", low=0, high=MANY)
    lr_decay_iters: int = setting(600000, "iteration at which min_lr is reached; usually max_iters", low=0, high=MANY)
    min_lr: float = setting(6e-5, "final learning rate; usually learning_rate / 10", low=0.0)
    backend: str = setting(
        "auto", "torch.distributed backend: nccl or gloo", choices=("nccl", "gloo"), auto=True, group="System"
    )
    shard: str = setting(
        "auto",
        "divide weights, gradients and moments among the processes: none, full, or hybrid, within each machine only; "
        "auto: full if they do not fit otherwise",
        choices=("none", "full", "hybrid"),
        auto=True,
    )
    timeout: int = setting(600, "seconds that a process waits for the others before it stops", low=1, high=10**6)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True)
    threads: int | str = setting(
        "auto", "CPU threads of each process; auto: its share of the cores", int, low=1, high=10**4, auto=True
    )
    dtype: str = setting("auto", "number format of matrix products; weights stay float32", choices=DTYPES, auto=True)
    matmul: str = setting(
        "auto",
        "how CPUs multiply: default (PyTorch's library), onednn, or cast (bfloat16 tensors); auto: the fastest, measured",
        choices=MATMULS,
        auto=True,
    )
    compile: bool | str = setting("auto", "torch.compile: slower to start, faster to run", bool, auto=True)
    checkpoint_activations: bool = setting(
        False, "keep less for the backward pass and compute it again there: slower, with far less memory"
    )
    deterministic: bool = setting(False, "bit-identical results on GPUs too, at some cost in speed; CPUs always are")
    seed: int = setting(  # an integer once `choose_seed` has replaced `auto`
        1337, "seed of the initialization, the batches and dropout", int, low=0, high=2**63 - 1, auto=True
    )

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings: (the settings, the first one to blame; the problem)."""
        yield from shape_problems(self)
        if self.gradient_accumulation_steps * self.batch_size > LARGEST_BATCH:
            names, size = ("gradient_accumulation_steps", "batch_size"), self.batch_size
            yield names, f"times batch_size, which is {size}, must not exceed {LARGEST_BATCH} sequences"
        if self.architecture != "gpt2" and self.bias:
            yield ("bias", "architecture"), f"the architecture {self.architecture} has no biases"
        if self.lora_rank and self.init_from == "scratch":
            yield ("lora_rank", "init_from"), "needs a model to adapt: --init_from names one"
        if self.lora_base != "float32" and not self.lora_rank:
            yield ("lora_base", "lora_rank"), "needs --lora_rank: weights that are trained stay in float32"
        if self.matmul == "cast" and self.dtype != "bfloat16":
            yield ("matmul", "dtype"), f"multiplies in bfloat16, and dtype is {self.dtype}"
        if self.lora_rank and self.optimizer == "muon":
            yield ("lora_rank", "optimizer"), "takes --optimizer=adamw: Muon is for whole matrices"
        if self.lora_rank and self.shard in ("full", "hybrid"):
            yield ("shard", "lora_rank"), "takes no --lora_rank: a model that LoRA adapts is not sharded"
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


def shape_problems(shape: Any) -> Iterable[Problem]:
    """Yield what is wrong with a model's shape, given as a TrainConfig or a GPTConfig."""
    if shape.architecture not in ARCHITECTURES:
        yield ("architecture",), f"is none of {', '.join(ARCHITECTURES)}"
    elif shape.n_head < 1:
        yield ("n_head",), "must be at least 1"
    elif not shape.head_dim and shape.n_embd % shape.n_head:
        yield ("n_embd", "n_head"), f"must be a multiple of n_head, which is {shape.n_head}"
    elif shape.architecture == "gpt2":
        for name in ("n_kv_head", "head_dim", "rope_theta", "norm_eps", "norm_gain"):
            if getattr(shape, name) != getattr(TrainConfig, name):
                yield (name, "architecture"), "has no effect on the architecture gpt2"
    elif not shape.head_dim and shape.n_embd // shape.n_head % 2:
        yield (
            ("n_embd", "n_head"),
            f"must be a multiple of 2 x n_head for {shape.architecture}, and n_head is {shape.n_head}",
        )
    elif shape.head_dim % 2:
        yield ("head_dim",), "must be even, to be rotated in pairs"
    if shape.n_head > 0 and shape.n_head % (shape.n_kv_head or shape.n_head):
        yield ("n_kv_head", "n_head"), f"must divide n_head, which is {shape.n_head}"


@dataclass
class BenchConfig(TrainConfig):
    """Settings of `bench.py`: those of the training run whose iterations it measures."""

    iters: int = setting(20, "iterations to measure", low=1, high=10**6, group="Benchmark")
    warmup: int = setting(5, "iterations before those", low=0, high=10**6)
    vocab_size: int = setting(65, "vocabulary of the model and the random tokens; GPT-2: 50304", low=1, high=2**31 - 1)

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings, as `TrainConfig.problems` does."""
        if self.lora_rank:
            yield ("lora_rank",), "has no effect: all weights of a new model are trained here"
        else:
            yield from super().problems()


@dataclass
class EstimateConfig(TrainConfig):
    """Settings of `nanogpt estimate`: those of the training run that it is about, and what the run would use."""

    gpus: int = setting(1, "number of GPUs", low=1, high=10**6, group="Estimate")
    gpu: str = setting("h100", "their kind, such as h100, a100, a100-40gb, l4, rtx-4090")
    gpus_per_node: int = setting(8, "GPUs of a machine", low=1, high=10**4)
    network: float | str = setting(
        "auto",
        "Gbit/s between machines per GPU; auto: what is usual for the GPU",
        float,
        above=0.0,
        high=1e6,
        auto=True,
    )
    price: float = setting(0.0, "price of a GPU for an hour, in any currency; 0: no costs are printed", low=0.0)
    hours_between_failures: float | str = setting(
        "auto", "mean time between failures of one GPU with its share of a machine", float, above=0.0, auto=True
    )
    vocab_size: int | str = setting(
        "auto", "vocabulary; auto: the dataset's, or GPT-2's 50257", int, low=1, high=2**31 - 1, auto=True
    )

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings, as `TrainConfig.problems` does."""
        if self.lora_rank:
            yield ("lora_rank",), "has no effect: the estimate is for training all weights"
        else:
            yield from super().problems()
        if self.dtype == "float32":
            yield ("dtype",), "the table of GPUs has their speed in bfloat16 and float16 only"
        sequences = self.gradient_accumulation_steps * self.batch_size
        if self.gpus > sequences:
            yield (
                ("gpus", "gradient_accumulation_steps", "batch_size"),
                f"a batch of {self.gradient_accumulation_steps} x {self.batch_size} = {sequences:,} sequences is work "
                f"for at most {sequences:,} GPUs",
            )


@dataclass
class TextConfig(Config):
    """Settings of all programs that write text."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, hf:NAME, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    max_new_tokens: int = setting(500, "length of a text, in tokens", low=1, high=10**9, group="Text")
    temperature: float = setting(0.8, "below 1: less random; above 1: more; 0: always the likeliest token", low=0.0)
    top_k: int = setting(200, "sample from the k likeliest tokens; 0: from all", low=0, high=2**31 - 1)
    top_p: float = setting(1.0, "sample from the likeliest tokens whose probabilities add up to p", above=0.0, high=1.0)
    min_p: float = setting(0.0, "sample from tokens at least p times as likely as the likeliest", low=0.0, high=1.0)
    stop: str = setting("", "string that ends a text (\\n is a newline); separate several by |")
    seed: int | str = setting(1337, "seed of the sampling", int, low=0, high=2**63 - 1, auto=True, group="System")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True)
    threads: int | str = setting(
        "auto", "CPU threads of each process; auto: its share of the cores", int, low=1, high=10**4, auto=True
    )
    dtype: str = setting("auto", "number format of weights and matrix products", choices=DTYPES, auto=True)
    int8: bool | str = setting(
        "auto", "8-bit weights, on CPUs; auto: if a large model is faster with them", bool, auto=True
    )
    pack: bool | str = setting(
        "auto", "weights in the order that oneDNN reads fastest, on CPUs; auto: if that is faster", bool, auto=True
    )

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings, as `TrainConfig.problems` does."""
        if self.int8 is True and self.dtype not in ("auto", "float32"):
            yield ("int8", "dtype"), f"works in float32 beside it, and dtype is {self.dtype}"

    def stop_strings(self) -> list[str]:
        """The strings that end a text."""
        return [unescaped(s) for s in self.stop.split("|") if s]


@dataclass
class SampleConfig(TextConfig):
    """Settings of `sample.py`."""

    start: str = setting("\n", "beginning of the text (\\n is a newline), or FILE:prompt.txt", group="Several texts")
    num_samples: int = setting(10, "texts to write; text i uses seed + i, counted from 0", low=1, high=10**6)
    compile: bool | str = setting("auto", "torch.compile: slower to start, faster to run", bool, auto=True)


@dataclass
class TalkConfig(TextConfig):
    """Settings of `nanogpt talk`."""


@dataclass
class ExportConfig(Config):
    """Settings of `nanogpt export`."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, hf:NAME, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    to: str = setting(
        "",
        "what to write: NAME.gguf, or a folder in Hugging Face's format; it must not exist yet",
        path=True,
        group="Result",
    )
    dtype: str = setting("float32", "number format of the exported weights", choices=DTYPES)

    def problems(self) -> Iterable[Problem]:
        """No combination of these settings is wrong."""
        return ()


def unescaped(text: str) -> str:
    """Text as typed in a shell: \\n becomes a newline, \\t a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass
class EvalConfig(Config):
    """Settings of `nanogpt eval`."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, hf:NAME, or a folder", path=True, group="Model"
    )
    out_dir: str = setting("out", "folder that a training run wrote", path=True)
    text: str = setting(
        "",
        "any source of nanogpt prepare: a file, a folder, 'a glob*', hf:NAME, or - (standard input)",
        path=True,
        group="Text",
    )
    field: str = setting("text", "field or column of .jsonl, .parquet and hf:NAME that holds the text")
    encoding: str = setting("utf-8", "encoding of plain text, as Python names it: latin-1, cp1252, utf-16, ...")
    dataset: str = setting("", "folder in data/ to evaluate on instead of a text; default: the model's own dataset")
    tasks: str = setting(
        "",
        "task to evaluate on instead: JSON lines with query, choices and gold, or with text, as lm-evaluation-harness",
        path=True,
    )
    root: str = setting("data", "the folder that holds the datasets", path=True)
    split: str = setting("val", "split of the dataset", choices=("train", "val"))
    per_document: bool = setting(
        False, "report each document (a file, a line of .jsonl, ...) on its own, with no context from others"
    )
    block_size: int | str = setting(
        "auto", "context in tokens; auto: the model's own", int, low=1, high=10**7, auto=True, group="Windows"
    )
    stride: int | str = setting(
        "auto",
        "tokens from one window to the next; auto: block_size; fewer give each token more context",
        int,
        low=1,
        high=10**7,
        auto=True,
    )
    batch_size: int = setting(12, "windows at a time", low=1, high=10**6, group="System")
    backend: str = setting("auto", "torch.distributed backend: nccl or gloo", choices=("nccl", "gloo"), auto=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, mps", auto=True)
    threads: int | str = setting(
        "auto", "CPU threads of each process; auto: its share of the cores", int, low=1, high=10**4, auto=True
    )
    dtype: str = setting("auto", "number format of matrix products; weights stay float32", choices=DTYPES, auto=True)
    matmul: str = setting(
        "auto",
        "how CPUs multiply: default (PyTorch's library), onednn, or cast (bfloat16 tensors); auto: the fastest, measured",
        choices=MATMULS,
        auto=True,
    )

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings, as `TrainConfig.problems` does."""
        if self.text and self.dataset:
            yield ("dataset", "text"), "either a text or a dataset can be evaluated on, and --text is given too"
        if self.dataset and not is_name(self.dataset):
            yield ("dataset",), NOT_A_NAME
        if why := not_an_encoding(self.encoding):
            yield ("encoding",), why
        if self.tasks:
            used = dict(text="", dataset="", per_document=False, stride="auto")
            for name in (name for name, default in used.items() if getattr(self, name) != default):
                yield (name, "tasks"), "has no effect on a task, and --tasks is given too"
        if is_published(self.init_from) and not (self.text or self.dataset or self.tasks):
            yield ("init_from", "text", "dataset"), "--text=FILE or --dataset=NAME says what to evaluate it on"
        if isinstance(self.stride, int) and isinstance(self.block_size, int) and self.stride > self.block_size:
            yield ("stride", "block_size"), f"must not exceed block_size, which is {self.block_size}"


@dataclass
class PrepareConfig(Config):
    """Settings of `nanogpt prepare`; `arguments` holds its SOURCEs."""

    ARGUMENTS: ClassVar = "SOURCE"

    dataset: str = setting("", "name of the dataset, which is written to data/NAME/", group="Dataset")
    root: str = setting("data", "folder of the datasets", path=True)
    tokenizer: str = setting(
        "char",
        "char, byte, gpt2, or bpe:N (N tokens, trained on the text, such as bpe:4096), or the folder of a model or "
        "dataset whose tokenizer to use, or hf:NAME",
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

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings, as `TrainConfig.problems` does."""
        if self.dataset and not is_name(self.dataset):
            yield ("dataset",), NOT_A_NAME
        if why := not_an_encoding(self.encoding):
            yield ("encoding",), why


NOT_A_NAME = (
    "must be the name of a folder in data/, not a path, and begin with neither . nor -; "
    "--root=FOLDER is for datasets that lie elsewhere"
)


def is_published(name: str) -> bool:
    """Whether this names a model to download: one of GPT-2's names, or hf:OWNER/NAME."""
    return name in GPT2_NAMES or name.startswith(HUB)


def on_the_hub(name: str) -> str:
    """'; hf:OWNER/NAME is ...' for a name that looks like a model of the hub and is no local folder, or nothing."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        return ""
    return f"; {HUB}{name} is the model of this name on Hugging Face's hub"


def is_name(dataset: str) -> bool:
    """Whether this can be the name of a folder in data/, and nothing outside it."""
    return is_path(dataset) and dataset[0] not in ".-" and dataset == Path(dataset).name


def not_an_encoding(name: str) -> str | None:
    """What is wrong with the name of an encoding, or None. It must be able to decode text piece by piece."""
    try:
        b"a".decode(name, "replace")
        codecs.getincrementaldecoder(name)("surrogateescape").decode(b"a")
        return None
    except (LookupError, ValueError):  # no such codec, or it does not decode bytes to text
        pass
    pairs = encodings.aliases.aliases.items()
    known = sorted({k for pair in pairs for k in pair if not pair[1].endswith(("_codec", "rot_13"))})
    return f"is no encoding of text that Python knows, such as latin-1, cp1252 or utf-16{nearest(name, known)}"


@dataclass
class ServeConfig(Config):
    """Settings of `nanogpt serve`."""

    init_from: str = setting(
        "resume", "resume (the best model in out_dir), a GPT-2 name, hf:NAME, or a folder", path=True, group="Model"
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
    threads: int | str = setting(
        "auto", "CPU threads of each process; auto: its share of the cores", int, low=1, high=10**4, auto=True
    )
    dtype: str = setting("auto", "number format of weights and matrix products", choices=DTYPES, auto=True)
    int8: bool | str = setting(
        "auto", "8-bit weights, on CPUs; auto: if a large model is faster with them", bool, auto=True
    )
    pack: bool | str = setting(
        "auto", "weights in the order that oneDNN reads fastest, on CPUs; auto: if that is faster", bool, auto=True
    )

    def problems(self) -> Iterable[Problem]:
        """Yield what is wrong with combinations of settings, as `TrainConfig.problems` does."""
        if self.allow_origin not in ("", "*") and not re.fullmatch(r"https?://[^/\s?#]+", self.allow_origin):
            yield ("allow_origin",), "must be an origin such as https://example.org, without a path, or *"
        if self.int8 is True and self.dtype not in ("auto", "float32"):
            yield ("int8", "dtype"), f"works in float32 beside it, and dtype is {self.dtype}"


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for a mistyped name, or nothing."""
    known = [k for k in known if k != name]  # never suggest what was given
    close = difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def is_utf8(text: str) -> bool:
    """Whether this can be encoded as UTF-8: it holds no surrogates, which stand for other bytes in an argument."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_path(text: str) -> bool:
    """Whether a file or folder can have this path."""
    if not is_utf8(text) or "\0" in text:
        return False
    return 0 < len(text.encode()) < 4096 and all(len(name.encode()) < 256 for name in re.split(r"[/\\]", text))
