"""Reads and writes tokenizers in Hugging Face's format: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import hashlib
import json
from pathlib import Path

from nanogpt.config import UserError
from nanogpt.text.tokenizer import (
    BPE_SHA256,
    BYTE_OF,
    CHAR_OF,
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    problem_of_chars,
    problem_of_tokens,
    spelled,
    tokens_from,
)

# In tokenizer.json: split a text into characters.
CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def read(folder: str | Path) -> dict:
    """The tokenizer, as JSON, of a model in Hugging Face's format: one of our own kinds if it is exactly equal to it.

    Read from `tokenizer.json`, or GPT-2's older form, `vocab.json` and `merges.txt`. Raises UserError if neither
    exists or can be read: a model's tokenizer is never guessed.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        settings = read_object(Path(folder) / "tokenizer_config.json")
        file: dict | None
        if path.is_file():
            file = read_object(path)
        else:
            file, path = read_vocabulary(Path(folder), settings), path.with_name("vocab.json")
        if file is None:
            raise UserError(
                f"{folder}: has no tokenizer; expected the model's own tokenizer.json there, or GPT-2's vocab.json and "
                f"merges.txt; AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}) of transformers writes it"
            )
        ids = file["model"]["vocab"]
        ids = dict(ids) if isinstance(ids, dict) else {token: i for i, (token, _) in enumerate(ids)}  # Unigram: a list
        ids |= {token["content"]: token["id"] for token in file.setdefault("added_tokens", [])}
        found = of_our_kind(file, ids)
        if found:
            return found
        end = settings.get("eos_token")
        end = END_OF_TEXT if END_OF_TEXT in ids else end.get("content") if isinstance(end, dict) else end
        file |= {"truncation": None, "padding": None}
        return HuggingFaceTokenizer(file, ids.get(end)).to_json()
    except UserError as e:
        raise UserError(*(p if str(folder) in p else f"{path}: {p}" for p in e.problems)) from None
    except ImportError as e:
        raise UserError(f"{path}: {e}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: does not describe a tokenizer ({type(e).__name__}: {str(e)[:200]})") from None


def read_object(path: Path) -> dict:
    """The JSON object in a file; an empty one if there is no such file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not an object")
    return found


def read_vocabulary(folder: Path, settings: dict) -> dict | None:
    """The content of tokenizer.json, from GPT-2's `vocab.json` and `merges.txt`; None if they do not determine it."""
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind != "GPT2Tokenizer" or settings.get("add_prefix_space") or (folder / "added_tokens.json").exists():
        return None
    if read_object(folder / "config.json").get("model_type", "gpt2") != "gpt2":
        return None  # other models split words differently
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        return None
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return bpe_file(read_object(folder / "vocab.json"), merges)


def of_our_kind(file: dict, ids: dict[str, int]) -> dict | None:
    """The tokenizer of one of our own kinds, as JSON, that a tokenizer.json with these {token: id} equals, or None."""
    tokens = sorted(ids, key=ids.__getitem__)
    added = {token["content"]: token for token in file["added_tokens"]}
    flags = [token.get(flag) for token in added.values() for flag in ("single_word", "lstrip", "rstrip")]
    if [ids[t] for t in tokens] != list(range(len(tokens))) or file.get("normalizer") or any(flags):
        return None
    separated = tokens[-1] == END_OF_TEXT
    own = tokens[: len(tokens) - separated]
    model, before = file["model"], file.get("pre_tokenizer") or {}
    if model["type"] == "WordLevel" and before == CHARACTERS and not problem_of_chars(own):
        unknown = model["unk_token"] if model["unk_token"] in own else None
        return CharTokenizer(own, unknown, separated).to_json()
    others = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    level = before.get("type") == "ByteLevel" and not before.get("add_prefix_space", True)
    if (
        model["type"] != "BPE"
        or any(map(model.get, others))
        or not level
        or not separated
        or added.keys() - {END_OF_TEXT}
    ):
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if own == [CHAR_OF[b] for b in range(256)] and not merges:
        return {"type": "byte"}
    if not before.get("use_regex", True) or problem_of_tokens(tokens_from(own)):
        return None
    merged = [merge.replace(" ", "") for merge in merges]
    merges_file = "\n".join(["#version: 0.2", *merges, ""]).encode()
    if own == [*BYTE_OF, *merged] and hashlib.sha256(merges_file).hexdigest() == BPE_SHA256:
        return {"type": "gpt2"}
    if [token for token in own if len(token) > 1] != merged:
        return None
    found = BPETokenizer(tokens_from(own))
    return found.to_json() if found.merges() == merges else None


def bpe_file(ids: dict[str, int], merges: list[str], words: bool = True) -> dict:
    """The tokenizer.json of byte-level BPE with these {token: id}; with `words`, text is first split as in GPT-2."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
    content = {"pre_tokenizer": level, "decoder": level, "model": {"type": "BPE", "vocab": ids, "merges": merges}}
    return whole_file(content, ids.get(END_OF_TEXT))


def whole_file(content: dict, eot: int | None) -> dict:
    """A tokenizer.json with this `content` and the other fields that the format requires."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [] if eot is None else [{"id": eot, "content": END_OF_TEXT, "special": True} | flags]
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", "added_tokens": added, **absent, **content}


def to_files(tok: Tokenizer, block_size: int) -> dict[str, dict]:
    """{name: content} of the JSON files that transformers' AutoTokenizer reads."""
    if isinstance(tok, HuggingFaceTokenizer):
        content, unknown = tok.file, tok.file["model"].get("unk_token")
        end = None if tok.eot is None else tok.tokens[tok.eot]
    elif isinstance(tok, CharTokenizer):
        model = {"type": "WordLevel", "vocab": tok.ids, "unk_token": tok.unknown or ""}
        content = whole_file({"pre_tokenizer": CHARACTERS, "decoder": {"type": "Fuse"}, "model": model}, tok.eot)
        unknown, end = tok.unknown, tok.unknown if tok.eot is None else END_OF_TEXT
    else:
        merges = tok.merges() if isinstance(tok, BPETokenizer) else None
        last = tok.vocab_size - 1
        ids = {spelled(tok.token_bytes(i)): i for i in range(last)} | {END_OF_TEXT: last}
        content = bpe_file(ids, merges or [], merges is not None)
        unknown = end = END_OF_TEXT  # as in OpenAI's own files
    named = dict(bos_token=end, eos_token=end, pad_token=end, unk_token=unknown or end)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    settings |= {role: token for role, token in named.items() if token}
    return {"tokenizer.json": content, "tokenizer_config.json": settings}
