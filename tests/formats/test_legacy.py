"""Files of the original nanoGPT: they sample and resume exactly, and one that holds code is refused unrun."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from support import SMALL, losses, write_tokenizer

from nanogpt import config, data, train
from nanogpt.commands import cli
from nanogpt.formats import legacy
from nanogpt.formats.nanogpt import from_nanogpt
from nanogpt.model import GPT, GPTConfig
from nanogpt.run import checkpoint, settings, start
from nanogpt.text.dataset import open_dataset, read_meta

pytestmark = pytest.mark.usefixtures("undrawn")

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=22, dropout=0.0)
RATE = 2e-3
RESUME = ["--init_from=resume", "--decay_lr=False", f"--learning_rate={RATE}", "--weight_decay=0.1", "--grad_clip=1.0"]


def nanogpt_optimizer(model):
    """AdamW as nanoGPT's configure_optimizers makes it."""
    params = [p for _, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))


def random_update(model, optimizer, generator):
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 0.1
    optimizer.step()


def nanogpt_state_dict(model, prefix="_orig_mod."):
    """A state_dict as nanoGPT's compiled model gives it, with the tied layer and the mask that old versions kept."""
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    T = model.config.block_size
    masks = {f"{prefix}transformer.h.{i}.attn.bias": torch.tril(torch.ones(T, T)).view(1, 1, T, T) for i in range(2)}
    assert prefix + "lm_head.weight" in state
    return state | masks


def nanogpt_checkpoint(model, optimizer, step=7):
    """The dictionary that nanoGPT's train.py gives to torch.save."""
    return {
        "model": nanogpt_state_dict(model),
        "optimizer": optimizer.state_dict(),
        "model_args": dict(SHAPE, vocab_size=model.config.vocab_size),
        "iter_num": step,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "tiny", "out_dir": "out", "learning_rate": RATE, "wandb_log": False, "device": "cuda"},
    }


@pytest.fixture
def old(tiny, monkeypatch):
    """(model, optimizer) of a nanoGPT run whose files lie in tmp_path: out/ckpt.pt and data/tiny with meta.pkl."""
    root = tiny.parent.parent
    monkeypatch.chdir(root)
    tokenizer = read_meta(tiny)["tokenizer"]
    chars = tokenizer["chars"]
    (tiny / "meta.json").unlink()
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (tiny / "meta.pkl").write_bytes(pickle.dumps(meta))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | {"vocab_size": len(chars)}))
    optimizer, generator = nanogpt_optimizer(model), torch.Generator().manual_seed(1)
    for _ in range(7):
        random_update(model, optimizer, generator)
    (root / "out").mkdir()
    torch.save(nanogpt_checkpoint(model, optimizer), root / "out/ckpt.pt")
    return model, optimizer


def test_it_samples(old, capsys):
    assert cli.main(["sample", "--device=cpu", "--num_samples=1", "--max_new_tokens=20", "--start=The "]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("The ") and len(shown.out) == len("The ") + 20 + len("\n---------------\n")
    assert "model: out/ckpt.pt, step 7" in shown.err


def test_its_weights_are_the_very_same(old):
    model = checkpoint.load_model(from_nanogpt("out"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), old[0].parameters(), strict=True))


def test_the_first_resumed_update_is_the_one_that_torch_would_have_made(old, capsys):
    model, optimizer = old
    cfg = settings.load(config.TrainConfig, [*SMALL, *RESUME], "train.py")
    from nanogpt.run.distributed import Dist

    batches = data.Batches(
        open_dataset("tiny", "train", 16), "train", cfg.seed, 16, Dist(torch.device("cpu"), torch.float32)
    )
    optimizer.zero_grad()
    for i in range(2):
        x, y = batches.get(7 * 8 + 4 * i, 4)
        (model(x, y)[1] / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    train.main([*SMALL, *RESUME, "--max_iters=8"])
    assert "resuming out/ckpt.pt at step 7" in capsys.readouterr().out
    found = checkpoint.newest("out")
    assert found.step == 8
    tensors = found.model_tensors()
    for name, p in model.named_parameters():
        assert (tensors[name] - p).abs().max() < 1e-6, name
    state = found.optimizer_tensors()
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert (state[f"{key}.{name}"] - optimizer.state[p][key]).abs().max() < 1e-6, name
        assert state[f"step.{name}"] == 8


def test_a_resumed_one_goes_on_and_its_file_stays(old):
    before = Path("out/ckpt.pt").read_bytes()
    train.main([*SMALL, *RESUME, "--max_iters=12"])
    assert list(losses()) == list(range(8, 13)) and Path("out/ckpt.pt").read_bytes() == before
    train.main([*SMALL, *RESUME, "--max_iters=14"])  # from the new format now
    assert list(losses()) == list(range(8, 15))


def test_a_resumed_one_has_its_own_settings_and_this_machines_device(old):
    cfg = settings.load(config.TrainConfig, ["--init_from=resume"], "train.py", start.settings_to_resume)
    assert (cfg.dataset, cfg.learning_rate, cfg.n_layer, cfg.block_size) == ("tiny", RATE, 2, 16)
    assert (cfg.device, cfg.out_dir, cfg.init_from) == ("auto", "out", "resume")


def test_the_best_loss_so_far_is_known(old):
    found = from_nanogpt("out")
    assert found.val_loss == found.state["best_val_loss"] == 2.5


def test_the_characters_may_come_from_a_dataset_prepared_anew(old):
    chars = from_nanogpt("out").tokenizer
    Path("data/tiny/meta.pkl").unlink()
    Path("data/tiny/meta.json").write_text(
        json.dumps({"tokenizer": chars, "vocab_size": len(chars["chars"]), "dtype": "uint16"})
    )
    assert from_nanogpt("out").tokenizer == chars == {"type": "char", "chars": chars["chars"]}


def test_finetuning_from_it(old, capsys):
    os.rename("out", "first")
    train.main([*SMALL, "--init_from=first", "--max_iters=1", "--decay_lr=False", "--learning_rate=1e-9"])
    weights = checkpoint.newest("out").model_tensors()
    assert all((weights[n] - p).abs().max() < 1e-6 for n, p in old[0].named_parameters())


def test_names_with_and_without_the_compilers_prefix(old):
    for prefix in ("", "_orig_mod."):
        model, optimizer = old
        changed = nanogpt_checkpoint(model, optimizer) | {"model": nanogpt_state_dict(model, prefix)}
        torch.save(changed, "out/ckpt.pt")
        assert legacy.read_checkpoint("out/ckpt.pt")["model"].keys() == dict(model.named_parameters()).keys()


def test_a_model_with_biases_resumes_too(old, capsys):
    model = GPT(GPTConfig(**SHAPE | {"vocab_size": old[0].config.vocab_size, "bias": True}))
    optimizer = nanogpt_optimizer(model)
    random_update(model, optimizer, torch.Generator().manual_seed(2))
    found = nanogpt_checkpoint(model, optimizer, 1)
    found["model_args"]["bias"] = True
    torch.save(found, "out/ckpt.pt")
    moments = from_nanogpt("out").optimizer_tensors()
    for name, p in model.named_parameters():
        assert torch.equal(moments[f"exp_avg.{name}"], optimizer.state[p]["exp_avg"])
    train.main([*SMALL, *RESUME, "--max_iters=2"])


# -- files that would do harm


class Evil:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class EvilTorch:
    """Unpickling it calls a function of torch that reads files with pickle."""

    def __reduce__(self):
        return torch.load, ("other.pt",)


def evil_files():
    """{name: a function that writes a file which would run a command}."""

    def saved(value, **options):
        return lambda path: torch.save(value, path, **options)

    def pickled(value, protocol):
        return lambda path: Path(path).write_bytes(pickle.dumps(value, protocol))

    return {
        "in the place of everything": saved(Evil()),
        "in the place of the weights": saved({"model": Evil()}),
        "in the config": saved({"model": {}, "config": {"x": [Evil()]}}),
        "by way of torch": saved({"model": EvilTorch()}),
        "old torch format": saved({"model": Evil()}, _use_new_zipfile_serialization=False),
        **{f"plain pickle {p}": pickled({"model": Evil()}, p) for p in (0, 2, 5)},
        "opcodes": lambda path: Path(path).write_bytes(b"cos\nsystem\n(S'touch executed'\ntR."),
        "stack global": lambda path: Path(path).write_bytes(
            b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch executed\x85R."
        ),
    }


def commands():
    return [
        ["train", *SMALL, "--init_from=resume"],
        ["train", *SMALL, "--init_from=auto"],
        ["train", *SMALL, "--init_from=out", "--out_dir=new"],
        ["sample", "--device=cpu"],
        ["sample", "--device=cpu", "--init_from=out"],
    ]


def refused(capsys, command, named):
    """The command ends with 2 and one line that names the file; nothing ran, nothing was written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert cli.main(command) == 2, command
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert lines and all(named in line for line in lines) and "Traceback" not in shown.err + shown.out
    assert sorted(Path().rglob("*")) == before and not Path("executed").exists()
    return lines[0]


def test_the_evil_files_are_evil(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil_files()["opcodes"]("evil.pkl")
    with open("evil.pkl", "rb") as f:
        pickle.load(f)
    assert Path("executed").exists()


@pytest.mark.parametrize("kind", evil_files())
def test_an_evil_ckpt_pt_is_refused_on_every_command(old, capsys, kind):
    evil_files()[kind]("out/ckpt.pt")
    for command in commands():
        assert "refused" in refused(capsys, command, "out/ckpt.pt")


@pytest.mark.parametrize("kind", ["plain pickle 0", "plain pickle 5", "opcodes", "stack global"])
def test_an_evil_meta_pkl_is_refused_on_every_command(old, capsys, kind):
    evil_files()[kind]("data/tiny/meta.pkl")
    for command in [*commands(), ["train", *SMALL]]:
        assert "refused" in refused(capsys, command, "data/tiny/meta.pkl")


@pytest.mark.parametrize("kind", evil_files())
def test_an_evil_hugging_face_file_is_refused(old, capsys, kind, tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    shape = dict(n_positions=16, vocab_size=22, n_layer=1, n_head=2, n_embd=16, model_type="gpt2")
    (hub / "config.json").write_text(str(shape).replace("'", '"'))
    write_tokenizer(hub, read_meta(tmp_path / "data" / "tiny")["tokenizer"])
    evil_files()[kind](hub / "pytorch_model.bin")
    refused(capsys, ["train", *SMALL, "--init_from=hub", "--out_dir=new"], "hub/pytorch_model.bin")


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').system('touch executed')",
        "batch_size = __import__('os').system('touch executed')",
        "import os; os.system('touch executed')",
        "exec(open('other.py').read())",
        "batch_size = [open('executed', 'w') for _ in (1,)][0]",
        "batch_size = (lambda: open('executed', 'w'))()",
        'out_dir = f\'{open("executed", "w")}\'',
        "batch_size = " + "(" * 5000 + "1" + ")" * 5000,
        "batch_size = 9**9**9**9",
    ],
)
def test_an_evil_config_file_is_refused_on_every_command(old, capsys, line):
    Path("evil.py").write_text(line + "\n")
    for command in (["train", "evil.py", *SMALL], ["sample", "evil.py"]):
        refused(capsys, command, "evil.py")


BROKEN = {
    "cut short": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "text": lambda raw: b"hello",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_one_line(old, capsys, kind):
    for path in ("out/ckpt.pt", "data/tiny/meta.pkl"):
        sound = Path(path).read_bytes()
        Path(path).write_bytes(BROKEN[kind](sound))
        for command in commands():
            refused(capsys, command, path)
        Path(path).write_bytes(sound)


WRONG = {
    "a list": [1, 2],
    "a number": 5,
    "no model": {"optimizer": {}},
    "weights that are no tensors": {"model": {"transformer.wte.weight": [1.0]}},
    "names that are no text": {"model": {5: torch.ones(1)}},
}


@pytest.mark.parametrize("kind", WRONG)
def test_something_else_in_a_ckpt_pt_is_refused(old, capsys, kind):
    torch.save(WRONG[kind], "out/ckpt.pt")
    for command in commands():
        refused(capsys, command, "out/ckpt.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": {}},
        {"model_args": {"n_layer": "2"}},
        {"model_args": SHAPE | {"n_head": 0}},
        {"model_args": SHAPE | {"n_embd": 8}},
        {"iter_num": "seven"},
        {"iter_num": None},
        {"best_val_loss": "low"},
        {"config": []},
        {"config": {"dataset": 5}},
        {"optimizer": {}},
        {"optimizer": {"state": {}}},
        {"optimizer": {"state": {i: {"step": 1, "exp_avg": "x", "exp_avg_sq": 1} for i in range(20)}}},
        {"optimizer": {"state": {i: {"step": 1, "exp_avg": [1], "exp_avg_sq": [1]} for i in range(20)}}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_wrong_entries_of_a_ckpt_pt_are_refused(old, capsys, changes):
    torch.save(nanogpt_checkpoint(*old) | changes, "out/ckpt.pt")
    refused(capsys, commands()[0], "out/ckpt.pt")


@pytest.mark.parametrize("meta", [[], {}, {"itos": 5}, {"itos": {0: 5}}, {"itos": {1: "a"}}, {"itos": ["ab"]}], ids=str)
def test_wrong_entries_of_a_meta_pkl_are_refused(old, capsys, meta):
    Path("data/tiny/meta.pkl").write_bytes(pickle.dumps(meta))
    refused(capsys, ["train", *SMALL], "data/tiny/meta.pkl")


def test_the_characters_of_a_model_that_lost_its_data_are_asked_for(old, capsys):
    shutil.rmtree("data")
    line = refused(capsys, ["sample", "--device=cpu"], "out/ckpt.pt")
    assert re.search(r"its characters are in data/tiny/meta.pkl, which is missing", line)


@pytest.mark.parametrize("command", ["sample --device=cpu", "train --init_from=resume"])
def test_a_tokenizer_of_another_size_than_the_models_is_not_its_own(old, capsys, command):
    chars = from_nanogpt("out").tokenizer["chars"]
    Path("data/tiny/meta.pkl").unlink()
    tokenizer = {"type": "char", "chars": chars[:-1]}
    Path("data/tiny/meta.json").write_text(
        json.dumps({"tokenizer": tokenizer, "vocab_size": len(chars) - 1, "dtype": "uint16"})
    )
    line = refused(capsys, command.split(), "out/ckpt.pt")
    assert f"has {len(chars)} tokens, and data/tiny/meta.json, which should be its tokenizer, has" in line


@pytest.mark.parametrize("size, known", [(50257, True), (50304, True), (50258, False), (60000, False)])
def test_a_vocabulary_is_gpt2s_if_the_original_would_have_made_it_so(tmp_path, monkeypatch, size, known):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    model = GPT(GPTConfig(**SHAPE | {"vocab_size": size, "n_embd": 2}))
    found = nanogpt_checkpoint(model, nanogpt_optimizer(model))
    found["model_args"]["n_embd"] = 2
    random_update(model, optimizer := nanogpt_optimizer(model), torch.Generator().manual_seed(1))
    torch.save(found | {"optimizer": optimizer.state_dict()}, "out/ckpt.pt")
    if known:
        assert from_nanogpt("out").tokenizer == {"type": "gpt2"}
    else:
        with pytest.raises(config.UserError, match="meta.pkl, which is missing"):
            from_nanogpt("out")


@pytest.mark.slow
@pytest.mark.torture
def test_malicious_files_run_nothing(old, capsys, figure):
    tried = 0
    for path in ("out/ckpt.pt", "data/tiny/meta.pkl"):
        sound = Path(path).read_bytes()
        for name, write in evil_files().items():
            if path.endswith(".pt") or "pickle" in name or name in ("opcodes", "stack global"):
                write(path)
                for command in commands():
                    refused(capsys, command, path)  # among other things: nothing was executed
                    tried += 1
        Path(path).write_bytes(sound)
    figure("malicious ckpt.pt and meta.pkl, every command", f"0 of {tried} executed")
