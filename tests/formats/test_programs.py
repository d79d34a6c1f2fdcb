"""Exports in the programs that they are for: llama.cpp, CTranslate2, and MLX. Each is tried if it is installed."""

import warnings

import numpy
import pytest
import torch
from exporting import TOKENIZERS, every_architecture, every_tokenizer, make, sample_text
from support import SMALL

from nanogpt import train
from nanogpt.commands import export
from nanogpt.formats.gguf import to_gguf
from nanogpt.formats.hugging_face import to_hugging_face

pytestmark = pytest.mark.slow

BUILD = "`make llama` builds it: minutes"
DTYPES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}  # the largest difference, relative to the largest logit


@pytest.fixture
def llama():
    """llama(path) opens a file with llama.cpp itself, keys and values in float32."""
    package = pytest.importorskip("llama_cpp", reason=f"llama-cpp-python is not installed; {BUILD}")

    def open_file(path, n_ctx=48):
        how = dict(n_ctx=n_ctx, n_threads=1, n_gpu_layers=0, logits_all=True, verbose=False, flash_attn=False)
        opened.append(package.Llama(str(path), type_k=package.GGML_TYPE_F32, type_v=package.GGML_TYPE_F32, **how))
        return opened[-1]

    opened = []
    yield open_file
    for model in opened:
        model.close()


def greedy(model, tok, text):
    """(the ids of the first 12 tokens of `text` and the 36 that our model writes after them, its logits)."""
    ids = model.generate(torch.tensor([tok.encode(text)[:12]]), 36, temperature=0, vocab_size=tok.vocab_size)
    with torch.no_grad():
        return ids[0].tolist(), model(ids, ids)[0][0, :, : tok.vocab_size]


def largest(found, expected):
    """The largest difference of their logits, which is measured against the largest logit."""
    return (torch.as_tensor(numpy.array(found)) - expected).abs().max().item()


def continued(theirs, ids):
    """What llama.cpp writes after `ids`, if it takes the likeliest token 36 times."""
    theirs.eval(ids)
    while theirs.n_tokens < len(ids) + 36:
        theirs.eval([int(theirs.scores[theirs.n_tokens - 1].argmax())])
    return theirs.input_ids[: theirs.n_tokens].tolist()


@every_architecture
@every_tokenizer
def test_llama_cpp_writes_the_same_text(tmp_path, llama, architecture, kind, figure):
    tok, text = TOKENIZERS[kind](), sample_text(kind)
    model = make(architecture, tok)
    to_gguf(model, tok, tmp_path / "model.gguf")
    theirs = llama(tmp_path / "model.gguf")
    assert theirs.tokenize(text.encode(), add_bos=True, special=False) == tok.encode(text)  # nothing is added before
    assert theirs.detokenize(tok.encode(text)) == text.encode()

    ours, expected = greedy(model, tok, text)
    found = continued(theirs, ours[:12])
    assert found == ours
    ends = found.index(tok.eot) if tok.eot in found else len(found)
    assert theirs.detokenize(found[:ends]) == b"".join(map(tok.token_bytes, ours[:ends]))
    difference = largest(theirs.scores[:48, : tok.vocab_size], expected)
    figure(
        f"llama.cpp, {architecture}, {kind}",
        f"48 tokens equal, logits within {difference:.1e} of {expected.abs().max():.1f}",
    )
    assert difference < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@every_architecture
def test_llama_cpp_reads_every_number_format(tmp_path, llama, architecture, dtype, figure):
    tok = TOKENIZERS["byte"]()
    model = make(architecture, tok)
    to_gguf(model, tok, tmp_path / "model.gguf", dtype)
    theirs = llama(tmp_path / "model.gguf")
    ours, expected = greedy(model, tok, sample_text("byte"))
    theirs.eval(ours)
    difference = largest(theirs.scores[:48, : tok.vocab_size], expected)
    figure(f"llama.cpp, {architecture}, {dtype}", f"logits within {difference:.1e} of {expected.abs().max():.1f}")
    assert difference < DTYPES[dtype] * expected.abs().max()


@every_architecture
def test_llama_cpp_quantizes_it(tmp_path, llama, architecture):
    package, tok = pytest.importorskip("llama_cpp"), TOKENIZERS["byte"]()
    to_gguf(make(architecture, tok), tok, tmp_path / "model.gguf")
    how = package.llama_model_quantize_default_params()
    how.ftype, how.nthread = package.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    before, after = tmp_path / "model.gguf", tmp_path / "q8.gguf"
    assert package.llama_model_quantize(str(before).encode(), str(after).encode(), how) == 0
    assert after.stat().st_size < 0.7 * before.stat().st_size
    assert len(continued(llama(after), tok.encode("The end"))) == 7 + 36


def test_llama_cpp_leaves_unknown_characters_out(tmp_path, llama):
    tok = TOKENIZERS["char with unknown"]()
    to_gguf(make("qwen3", tok), tok, tmp_path / "model.gguf")
    assert llama(tmp_path / "model.gguf").tokenize("TQhè亭e".encode(), special=False) == tok.encode("The")


def test_an_export_is_run_by_llama_cpp(tiny, monkeypatch, capfd, llama):
    monkeypatch.chdir(tiny.parent.parent)
    train.main(SMALL)
    export.main(["--to=tiny.gguf"])
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "to llama.cpp" in line]
    assert float(line.split(": ")[1].split(";")[0]) < 1e-2


def exported(tmp_path, architecture, tok):
    """A model, written in Hugging Face's format, and what it writes."""
    model = make(architecture, tok)
    to_hugging_face(model, tok, tmp_path / "to")
    return tmp_path / "to", model


def their_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@every_architecture
@every_tokenizer
def test_ctranslate2_writes_the_same_text(tmp_path, architecture, kind, figure):
    package = pytest.importorskip(
        "ctranslate2", reason="ctranslate2 is not installed; `pip install ctranslate2` does it"
    )
    tok = TOKENIZERS[kind]()
    folder, model = exported(tmp_path, architecture, tok)
    convert = package.converters.TransformersConverter(str(folder)).convert
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("char", "ascii"):  # without a token for the end or the unknown
            with pytest.raises(RuntimeError, match="must be string, but is null"):
                convert(str(tmp_path / "ct2"))
                package.Generator(str(tmp_path / "ct2"), device="cpu")
            return
        convert(str(tmp_path / "ct2"))
    theirs = package.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32", intra_threads=1)
    ours, expected = greedy(model, tok, sample_text(kind))
    words = their_tokenizer(folder).convert_ids_to_tokens(ours)
    how = dict(max_length=36, sampling_topk=1, include_prompt_in_result=False, end_token=[])
    assert theirs.generate_batch([words[:12]], **how)[0].sequences_ids[0] == ours[12:]
    difference = largest(theirs.forward_batch([words]), expected[None])
    figure(f"CTranslate2, {architecture}, {kind}", f"48 tokens equal, logits within {difference:.1e}")
    assert difference < 1e-4 * expected.abs().max()


@every_architecture
@every_tokenizer
def test_mlx_computes_the_same_logits(tmp_path, architecture, kind, figure):
    package = pytest.importorskip(
        "mlx_lm", reason="mlx-lm is not installed; `pip install mlx-lm mlx-cpu` does it on Linux"
    )
    if architecture == "gpt2 with a wide MLP":
        pytest.skip("MLX's GPT-2 knows no n_inner")
    import mlx.core

    tok = TOKENIZERS[kind]()
    folder, model = exported(tmp_path, architecture, tok)
    theirs, tokenizer = package.load(str(folder))
    ours, expected = greedy(model, tok, sample_text(kind))
    found = numpy.array(theirs(mlx.core.array([ours]))[0].astype(mlx.core.float32))
    assert tokenizer.encode(sample_text(kind)) == tok.encode(sample_text(kind))
    difference = largest(found, expected)
    figure(f"MLX, {architecture}, {kind}", f"logits within {difference:.1e}")
    assert found.argmax(axis=-1)[11:-1].tolist() == ours[12:] and difference < 1e-4 * expected.abs().max()
