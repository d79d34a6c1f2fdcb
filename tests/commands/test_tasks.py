"""`nanogpt eval --tasks`: requests, metrics, errors, and, in a slow test, the numbers of lm-evaluation-harness itself."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from serving import Served, write_run

from nanogpt.commands import cli, tasks
from nanogpt.commands import eval as program
from nanogpt.commands.tasks import MultipleChoice, Question, encode_pair, rolling_windows
from nanogpt.config import UserError
from nanogpt.text.tokenizer import ByteTokenizer, CharTokenizer

CONTEXT = 32
QUESTIONS = [
    {"query": "The cat sat by", "choices": ["the mat.", "a hill of ours", "né"], "gold": 0},
    {"query": "The dog ran ", "choices": ["to", "home, and then it slept", "up"], "gold": 1},
    {"query": "", "choices": ["one", "two words", "three"], "gold": "three"},
    {"query": "A query that is longer than the context of the model.", "choices": ["yes", "no"], "gold": [0]},
    {"query": "Q: 1 + 1 =\nA:", "choices": ["2", "3", "11", "twenty"], "gold": 3},
]
TEXTS = ["The cat sat.", "Two lines,\nand ünïcode  text."]


def write_lines(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The model of a run in out/, with a token per byte and an end-of-text token; the test runs beside it."""
    monkeypatch.chdir(tmp_path)
    write_lines("questions.jsonl", QUESTIONS)
    write_lines("texts.jsonl", [{"text": text} for text in TEXTS])
    return write_run("out", ByteTokenizer(), block_size=CONTEXT).eval()


def evaluate(capsys, *args):
    """{metric: number} of the line printed, by its first number."""
    assert cli.main(["eval", "--device=cpu", *args]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return {name: float(value) for name, value in re.findall(r"([a-z_]+) ([\d.]+)", line.partition(", ")[2])}


def log_likelihood(model, context, ids):
    """The reference: one token at a time."""
    total = 0.0
    for i, id in enumerate(ids):
        before = torch.tensor([(context + ids[:i])[-CONTEXT:]])
        with torch.no_grad():
            total += model(before)[0][0, -1].double().log_softmax(-1)[id].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_questions_are_answered_by_the_likeliest_choice(model, capsys, batch_size):
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for row in QUESTIONS:
        query = row["query"].rstrip()
        choices = [row["query"][len(query) :] + " " + choice for choice in row["choices"]]
        context = list(query.encode()) or [256]
        # the window of a long question begins where the last of its tokens still fits
        windows = [(context + list(c.encode()))[-(CONTEXT + 1) :] for c in choices]
        scores = [
            log_likelihood(model, w[: len(w) - len(c.encode())], list(c.encode()))
            for w, c in zip(windows, choices, strict=True)
        ]
        gold = row["choices"].index(row["gold"]) if isinstance(row["gold"], str) else row["gold"]
        for name, length in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
            each = [s / length(c) for s, c in zip(scores, row["choices"], strict=True)]
            right[name] += each.index(max(each)) in (gold if isinstance(gold, list) else [gold])
    expected = {name: count / len(QUESTIONS) for name, count in right.items()}
    assert evaluate(capsys, "--tasks=questions.jsonl", f"--batch_size={batch_size}") == expected


def test_the_log_likelihood_of_each_choice(model, dist):
    cfg = program.EvalConfig(tasks="questions.jsonl", block_size=CONTEXT, batch_size=4)
    requests = [encode_pair("The cat", f" {c}", ByteTokenizer()) for c in ("sat", "ran away", "x" * 20)]
    expected = [log_likelihood(model, r.ids[: -r.n], r.ids[-r.n :]) for r in requests]
    assert tasks.score(model, requests, cfg, dist) == pytest.approx(expected, abs=1e-4)


def test_texts_are_scored_from_the_end_of_text_token(model, capsys):
    nats = -sum(log_likelihood(model, [256], list(text.encode())) for text in TEXTS)
    size, words = sum(len(text.encode()) for text in TEXTS), 3 + 5
    expected = dict(
        word_perplexity=math.exp(nats / words),
        byte_perplexity=math.exp(nats / size),
        bits_per_byte=nats / size / math.log(2),
    )
    assert evaluate(capsys, "--tasks=texts.jsonl") == pytest.approx(expected, rel=1e-4)
    write_lines("pages.jsonl", [{"page": text} for text in TEXTS])
    assert evaluate(capsys, "--tasks=pages.jsonl", "--field=page") == pytest.approx(expected, rel=1e-4)


def test_the_metrics_by_hand():
    """By itself, "no" is likeliest; per character, "absolutely" is."""
    task = MultipleChoice([Question("", ["no", "absolutely", "éé"], [gold]) for gold in (0, 1, 1)], [1, 2, 3])
    found = task.metrics([[-2.0, -4.0, -3.0]] * 2 + [[-2.0, -9.0, -3.0]])
    assert found["acc"] == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found["acc_norm"][0] == pytest.approx(2 / 3)
    assert MultipleChoice([Question("", ["ab", "éé"], [1])], [1]).metrics([[-2.0, -3.0]]) == dict(
        acc=(0.0, 0.0), acc_norm=(0.0, 0.0), acc_bytes=(1.0, 0.0)
    )


def test_spaces_at_the_end_of_a_query_belong_to_the_continuation():
    tok = ByteTokenizer()
    assert encode_pair("ab  ", " c", tok) == ([97, 98, 32, 32, 32, 99], 4)
    assert encode_pair("", " c", tok) == ([256, 32, 99], 2)


@pytest.mark.parametrize("n", [2, 5, 6, 7, 11, 12])
def test_windows_score_each_token_once_from_as_much_context_as_there_is(n):
    ids, scored = list(range(n)), []
    for window, count in rolling_windows(ids, 5):
        assert len(window) <= 6 and window == list(range(window[0], window[-1] + 1))
        assert len(window) == 6 or window[0] == 0
        scored += window[-count:]
    assert scored == ids[1:]


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "is not JSON"),
        ("[1]", r"expected an object with query, choices and gold, or with text, not \[1\]"),
        ('{"query": "a", "choices": ["b"]}', "expected an object with query, choices and gold, or with text, not query, "),
        ('{"query": 5, "choices": ["b"], "gold": 0}', "query: expected text, not 5"),
        ('{"query": "a", "choices": "b", "gold": 0}', 'choices: expected a list of texts, none of them empty, not "b"'),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "choices: expected a list of texts"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold: expected a number from 0 to 1, one of the choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "d"}', "gold: expected a number from 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold: expected a number"),
        ('{"query": "a", "choices": ["b", "c"], "gold": []}', "gold: expected a number"),
        ('{"text": "a"}', "questions and texts cannot be mixed in a file"),
        (json.dumps(dict(query="a", choices=["b" * 40], gold=0)), "a choice of 41 tokens does not fit the context of 32"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_by_its_number(model, line, why):
    Path("broken.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=f"^--tasks=broken.jsonl:3: {why}") as caught:
        program.main(["--device=cpu", "--tasks=broken.jsonl"])
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "args, why",
    [
        (["--tasks=none.jsonl"], "--tasks=none.jsonl: cannot be read \\(No such file or directory\\)"),
        (["--tasks=empty.jsonl"], "--tasks=empty.jsonl: is empty"),
        (["--tasks=questions.jsonl", "--text=a.txt"], "--text=a.txt: has no effect on a task"),
        (["--tasks=questions.jsonl", "--stride=4"], "--stride=4: has no effect on a task"),
        (["--tasks=questions.jsonl", "--block_size=33"], "--block_size=33: longer than the 32 tokens"),
    ],
)
def test_an_error_is_one_line(model, args, why):
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=why) as caught:
        program.main(["--device=cpu", *args])
    assert len(caught.value.problems) == 1


def test_a_task_that_the_tokenizer_cannot_encode_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("out", CharTokenizer("abc "))
    for row, why in (
        (dict(query="a", choices=["é"], gold=0), "é"),
        (dict(query="", choices=["a"], gold=0), "query: is empty"),
    ):
        write_lines("task.jsonl", [row])
        with pytest.raises(UserError, match=f"^--tasks=task.jsonl:1: .*{why}"):
            program.main(["--device=cpu", "--tasks=task.jsonl"])


# lm-evaluation-harness

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
NO_LM_EVAL = (
    "lm-evaluation-harness is not installed: pip install -c constraints.txt 'lm-eval[hf,api]', if need be in an "
    "environment of its own, whose program LM_EVAL=.../bin/lm_eval names"
)
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {output_type}
{fields}
metric_list: [{metrics}]
"""


def write_task(name, output_type, fields, metrics):
    listed = ", ".join(f"{{metric: {metric}}}" for metric in metrics)
    path = Path(f"{name}.jsonl").resolve()
    Path(f"{name}.yaml").write_text(
        YAML.format(name=name, path=path, output_type=output_type, fields="\n".join(fields), metrics=listed)
    )


def lm_eval(door, **args):
    """{task: {metric: number}} that lm_eval finds."""
    listed = ",".join(f"{name}={value}" for name, value in args.items())
    command = [LM_EVAL, "--model", door, "--model_args", listed, "--include_path", ".", "--batch_size", "4"]
    command += ["--tasks", "questions,texts", "--output_path", f"results-{door}", "--device", "cpu"]
    offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(Path("cache").resolve()), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = Path(f"results-{door}").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    return {task: {k.removesuffix(",none"): v for k, v in found[task].items()} for task in ("questions", "texts")}


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL, reason=NO_LM_EVAL)
def test_lm_evaluation_harness_finds_the_same_numbers_through_both_doors(model, capsys, tmp_path):
    """On questions and texts shorter than the context, where its two models score the same windows."""
    queries = ("The", "A cat", "x y", "1 + 1 =", "")
    choices = [row["choices"] for row in QUESTIONS if sum(map(len, row["choices"])) < CONTEXT]
    pairs = [(query, each) for query in queries for each in choices]
    many = [dict(query=query, choices=each, gold=i % len(each)) for i, (query, each) in enumerate(pairs)]
    write_lines("questions.jsonl", many)
    write_lines("texts.jsonl", [{"text": text[: CONTEXT - 4]} for text in TEXTS])
    fields = ["doc_to_text: query", "doc_to_choice: choices", "doc_to_target: gold"]
    write_task("questions", "multiple_choice", fields, ["acc", "acc_norm", "acc_bytes"])
    fields = ["doc_to_text: ''", "doc_to_target: text"]
    write_task("texts", "loglikelihood_rolling", fields, ["word_perplexity", "byte_perplexity", "bits_per_byte"])
    ours = {name: evaluate(capsys, f"--tasks={name}.jsonl") for name in ("questions", "texts")}
    assert cli.main(["export", "--out_dir=out", "--to=exported"]) == 0
    by_hf = lm_eval("hf", pretrained="exported", dtype="float32")
    server = Served(tmp_path, "--out_dir=out")
    try:
        url = f"{server.address}/v1/completions"
        served = dict(model="out", base_url=url, tokenizer="exported", tokenizer_backend="huggingface")
        by_server = lm_eval("local-completions", **served, max_length=CONTEXT, num_concurrent=1)
    finally:
        server.close()
    print(f"ours {ours}\nhf {by_hf}\nlocal-completions {by_server}")
    for found in (by_hf, by_server):
        for task, metrics in ours.items():
            assert {name: found[task][name] for name in metrics} == pytest.approx(metrics, rel=1e-3), task
