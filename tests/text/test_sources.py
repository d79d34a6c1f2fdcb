"""Sources of text: files of all kinds and compressions, read in blocks, from any block on."""

import gzip
import json
import lzma
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.config import UserError
from nanogpt.text import sources
from nanogpt.text.cutting import last_character
from nanogpt.text.sources import Problems, ReadOptions, blocks, explain, find, read_block

TEXT = "".join(f"Line {i} of a text with Größe and 世界.\n" for i in range(200))


def zstd(data):
    try:
        from compression import zstd
    except ImportError:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data)


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "BLOCK", 1000)
    monkeypatch.chdir(tmp_path)


def write(name, data):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return name


def listed(*arguments):
    return find(arguments, "data/own", "stdin.txt")[0]


def documents(found, start=(0, 0, 0), field="text", replace=False, longest=10**6):
    """[text of each document], the Problems, and where each block ended."""
    texts, problems, ends = [], Problems(), []
    for block in blocks(found, list(start), ReadOptions(last_character, field, longest, ".")):
        got, noted = read_block(block, field, replace)
        for text, raw, first, _ in got:
            assert replace or raw.decode() == text
            if first:
                texts.append("")
            elif not texts:
                texts.append("...")
            texts[-1] += text
        problems.add(noted)
        ends.append(block.next)
    return texts, problems, ends


OPTIONS = ReadOptions(last_character, "text", 10**6, ".")


def refused(*arguments, **settings):
    with pytest.raises(UserError) as caught:
        found = listed(*arguments)
        _, problems, _ = documents(found, **settings)
        raise UserError(*explain(problems, found, False, "--errors=replace"))
    return list(caught.value.problems)


def parquet(name, columns, rows_in_group=1000):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), name, row_group_size=rows_in_group)
    return name


# -- what is read


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "A.TXT"])
def test_a_file_is_one_document(name, packing):
    assert documents(listed(write(name + packing, PACK[packing](TEXT.encode()))))[0] == [TEXT]


@pytest.mark.parametrize("packing", PACK)
def test_each_line_of_a_jsonl_is_a_document(packing):
    texts = [f"document {i} " + "世" * i for i in range(100)]
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts))
    assert documents(listed(write(f"a.jsonl{packing}", PACK[packing](lines.encode()))))[0] == texts
    without_end = lines.rstrip("\n").replace("\n", "\r\n\n")
    assert documents(listed(write(f"b.jsonl{packing}", PACK[packing](without_end.encode()))))[0] == texts


@pytest.mark.parametrize("packing", PACK)
def test_each_row_of_a_parquet_is_a_document(packing):
    texts = [f"document {i} " + "世" * i for i in range(100)]
    parquet("a.parquet", {"id": list(range(100)), "text": texts}, rows_in_group=30)
    with open("a.parquet", "rb") as f:
        write(f"b.parquet{packing}", PACK[packing](f.read()))
    assert documents(listed(f"b.parquet{packing}"))[0] == texts


def test_another_field():
    write("a.jsonl", json.dumps({"text": "no", "body": "yes"}))
    assert documents(listed("a.jsonl"), field="body")[0] == ["yes"]
    parquet("a.parquet", {"text": ["no"], "body": ["yes"]})
    assert documents(listed("a.parquet"), field="body")[0] == ["yes"]


def test_folder_is_read_in_order_of_names_without_binary_files():
    for name in ("f/b.txt", "f/a/z.py", "f/a/y.md", "f/c.jsonl"):
        write(name, json.dumps({"text": name}) if "json" in name else name)
    write("f/.hidden.txt", "x")
    write("f/.git/config", "x")
    write("f/picture.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    write("f/latin.log", "größe".encode("latin-1"))
    write("f/empty.txt", "")
    found, notes = find(["f"], "data/own", None)
    assert documents(found)[0] == ["f/b.txt", "f/c.jsonl", "f/a/y.md", "f/a/z.py"]
    assert notes == ["f: left out 2 files that are not text (.log, .png)"]


def test_dataset_folder_is_not_read():
    write("data/own/meta.json", "{}")
    write("data/text.txt", "text")
    write("data/own/train.txt", "x")
    for argument in ("data", "data/*", "data/**/*.txt"):
        assert [s.name for s in listed(argument)] == ["data/text.txt"]


def test_globs_and_several_sources():
    for name in ("b.txt", "a.txt", "f/c.txt", "f/g/d.txt"):
        write(name, name)
    assert documents(listed("*.txt"))[0] == ["a.txt", "b.txt"]
    assert documents(listed("b.txt", "f"))[0] == ["b.txt", "f/c.txt", "f/g/d.txt"]
    assert documents(listed("**/*.txt"))[0] == ["a.txt", "b.txt", "f/c.txt", "f/g/d.txt"]
    found, notes = find(["a.txt", "./a.txt", "*.txt"], "data/own", None)
    assert [s.name for s in found] == ["a.txt", "b.txt"]
    assert notes == ["a.txt: was named twice, and is read once"] * 2
    os.symlink("a.txt", "link.txt")
    assert [s.name for s in listed("a.txt", "link.txt")] == ["a.txt"]


def test_empty_files_among_several_are_left_out():
    for name, text in {"a.py": "a", "f/__init__.py": "", "f/b.py": "b", "f/g/__init__.py": ""}.items():
        write(name, text)
    found, notes = find(["**/*.py"], "data/own", None)
    assert [s.name for s in found] == ["a.py", "f/b.py"]
    assert notes == ["**/*.py: left out 2 empty files"]
    assert refused("f/**/__init__.py") == ["f/**/__init__.py: matches only empty files"]


def test_name_with_brackets_is_not_a_glob():
    assert documents(listed(write("a[1].txt", "text")))[0] == ["text"]


def test_byte_order_mark_is_removed():
    write("a.txt", b"\xef\xbb\xbftext")
    write("b.jsonl", b'\xef\xbb\xbf{"text": "more"}')
    assert documents(listed("a.txt", "b.jsonl"))[0] == ["text", "more"]


def test_folder_without_text_is_an_error_if_named_and_a_note_if_matched():
    write("f/a.txt", "text")
    os.mkdir("f/empty")
    found, notes = find(["f/*"], None, None)
    assert [s.name for s in found] == ["f/a.txt"] and notes == ["f/empty: holds no text"]
    with pytest.raises(UserError, match="^f/empty: holds no text$"):
        find(["f/empty"], None, None)


def test_byte_order_mark_at_the_beginning_of_a_later_block_is_kept():
    text = "x" * 999 + "\ufeff" + "y" * 500
    assert documents(listed(write("a.txt", text)))[0] == [text]


def test_file_whose_head_ends_within_a_character_is_text():
    write("f/a.log", "世" * sources.HEAD)
    assert documents(listed("f"))[0] == ["世" * sources.HEAD]


def test_parquet_is_read_from_any_row():
    texts = [f"document {i}" for i in range(100)]
    found = listed(parquet("a.parquet", {"text": texts}, rows_in_group=30))
    for row in (0, 1, 29, 30, 45, 99, 100):
        assert documents(found, (0, row, 0))[0] == texts[row:]


def test_dataset_in_hugging_face_format(tmp_path, monkeypatch):
    """hf:NAME, from a local folder; for the hub, only the origin of the files is different."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"document {i}" for i in range(300)]
    os.makedirs("hub")
    parquet("hub/train-0.parquet", {"id": list(range(200)), "text": texts[:200]})
    parquet("hub/train-1.parquet", {"id": list(range(100)), "text": texts[200:]})
    found = listed("hf:hub")
    got, _, ends = documents(found)
    assert got == texts
    assert documents(found, ends[1])[0] == texts[ends[1][1] :]
    assert "hf:hub has no such column; it has id, text; did you mean text?" in refused("hf:hub", field="txt")[0]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refused("hf:nobody/nothing")[0].startswith("hf:nobody/nothing: cannot be loaded: ")


# -- blocks


kinds = st.lists(
    st.tuples(
        st.sampled_from(["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.xz"]), st.lists(st.integers(0, 3000), max_size=6)
    ),
    min_size=1,
    max_size=4,
)


@given(kinds, st.integers(0, 100))
def test_reading_resumes_at_the_end_of_any_block(plan, seed):
    draw, expected, names = random.Random(seed), [], []
    for i, (name, sizes) in enumerate(plan):
        texts = ["".join(draw.choices("abc \nß世🚀", k=n)) for n in sizes]
        jsonl = "jsonl" in name
        content = "".join(json.dumps({"text": t}) + "\n" for t in texts) if jsonl else "".join(texts)
        names.append(
            write(
                f"{i}{name}",
                PACK[os.path.splitext(name)[1] if name[-3:] in (".gz", ".xz") else ""](content.encode() or b"\n"),
            )
        )
        expected += [t for t in texts if t] if jsonl else [content or "\n"]
    found = listed(*names)
    whole, _, ends = documents(found)
    assert whole == expected
    for end in ends:
        rest = documents(found, end)[0]
        joined = "".join(rest).removeprefix("...")
        assert "".join(whole).endswith(joined)
        assert rest[1:] == whole[len(whole) - len(rest) + 1 :] if rest else True


def test_block_holds_many_small_documents():
    for i in range(100):
        write(f"f/{i:03}.txt", "x" * 90)
    write("g.txt", TEXT)
    found = listed("f", "g.txt")
    sizes = [len(b.data) for b in blocks(found, [0, 0, 0], OPTIONS)]
    assert max(sizes) <= 1000 and len(sizes) < 35


def test_block_reports_how_much_has_been_read():
    found = listed(write("a.txt", TEXT), write("b.txt.gz", gzip.compress(TEXT.encode())))
    done = [b.done for b in blocks(found, [0, 0, 0], OPTIONS)]
    assert done == sorted(done) and done[-1] == sum(s.size for s in found)


@pytest.mark.parametrize("more", ["more", ""])
def test_file_changed_while_read_is_an_error(more):
    found = listed(write("a.txt", TEXT))
    reading = blocks(found, [0, 0, 0], OPTIONS)
    next(reading)
    write("a.txt", TEXT[::-1] + more)
    os.utime("a.txt", ns=(0, found[0].mtime + 1))  # however coarse the clock of the disk is
    with pytest.raises(UserError, match="a.txt: was changed while it was read"):
        list(reading)


# -- invalid sources, reported in one line


def test_missing_and_empty_sources_are_reported_at_once():
    write("story.txt", "text")
    write("empty.txt", "")
    os.makedirs("folder")
    assert refused("stoy.txt", "empty.txt", "folder", "*.csv", "no/such/file") == [
        "stoy.txt: there is no such file or folder; did you mean story.txt?",
        "empty.txt: is empty",
        "folder: holds no text",
        "*.csv: matches no file",
        "no/such/file: there is no such file or folder",
    ]


def test_text_size_of_packed_files():
    for name in ("a.txt.gz", "a.txt.xz", "a.txt.zst", "a.parquet", "a.parquet.gz"):
        (source,) = listed(write(name, "x" * 100))
        assert source.text_size() >= 2 * 100
    assert listed(write("a.txt", "x" * 100))[0].text_size() == 100


def test_archives_and_pipes_are_refused():
    write("a.tar.gz", gzip.compress(b"x"))
    os.mkfifo("pipe")
    assert refused("a.tar.gz", "pipe") == [
        "a.tar.gz: is an archive of files; unpack it and give the folder",
        "pipe: is not a regular file; use - to read standard input",
    ]


def test_binary_file_is_refused_with_the_offset():
    write("a.bin", b"text" * 600 + b"\0" + b"\0\xff" * 100)
    assert refused("a.bin") == ["a.bin: is not text: byte 2400 is 0x00"]


def test_utf16_gets_a_hint():
    write("a.txt", TEXT.encode("utf-16"))
    assert refused("a.txt") == [
        "a.txt: is not text: byte 3 is 0x00; it looks like UTF-16, which --encoding=utf-16 reads"
    ]


REMEDY = "--encoding=latin-1 or another name reads other encodings, --errors=replace"


def test_invalid_utf8_is_counted_in_each_file():
    write("a.txt", b"x" * 1500 + b"\xff more \xe4\n" + b"y" * 3000 + b"\xc3")
    write("b.txt", "größe".encode("latin-1"))
    assert refused("a.txt", "b.txt") == [
        f"a.txt: is not UTF-8 in 3 places, the first at byte 1500 (0xff); {REMEDY}",
        f"b.txt: is not UTF-8 in 2 places, the first at byte 2 (0xf6); {REMEDY}",
    ]


def test_replacement_characters_are_not_invalid_utf8():
    write("a.txt", "Gr\ufffd\ufffde ".encode() + b"gr\xf6ber")
    assert refused("a.txt") == [f"a.txt: is not UTF-8 in 1 place, at byte 12 (0xf6); {REMEDY}"]


def test_invalid_utf8_can_be_replaced():
    raw = b"x" * 1500 + b"\xff more \xe4\n" + b"y" * 3000 + b"\xc3"
    texts, problems, _ = documents(listed(write("a.txt", raw)), replace=True)
    assert texts == [raw.decode("utf-8", "replace")]
    assert [count for _, _, count in problems.values()] == [3]


@given(st.binary(min_size=1, max_size=5000))
def test_any_bytes_are_text_or_reported(raw):
    found = listed(write("any.txt", raw))
    texts, problems, _ = documents(found, replace=True)
    lines = explain(problems, found, True)
    assert lines or "".join(texts) == raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    assert len(lines) == (b"\0" in raw)
    try:
        raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        assert len(explain(documents(found)[1], found, False)) == 1


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"text": 5}', "the field 'text' holds int, not text"),
        ('["text"]', "expected an object with a field for the text"),
        ('{"text": "x"', "is not JSON (Expecting ',' delimiter: column 13)"),
        ("[" * 100_000, "is not JSON (RecursionError)"),
    ],
)
def test_bad_line_is_reported_with_its_number(line, complaint):
    good = json.dumps({"text": "x" * 50}) + "\n"
    write("a.jsonl", good * 40 + line + "\n" + good * 40)
    assert refused("a.jsonl") == [f"a.jsonl:41: {complaint}"]
    write("b.jsonl", (good * 40 + line + "\n") * 3)
    assert refused("b.jsonl") == [f"b.jsonl:41: {complaint} (and 2 more lines like that)"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"body": "x", "id": 1}', "has no field 'text', but body, id"),
        ('{"texts": "x"}', "has no field 'text', but texts; did you mean texts?"),
    ],
)
def test_first_line_without_the_field_is_refused(line, complaint):
    write("a.jsonl", "\n" + line + "\n" + json.dumps({"text": "x"}))
    assert refused("a.jsonl") == [f"a.jsonl:2: {complaint}"]


def left_out(problems):
    """How many rows and lines were without text, and the first of them."""
    ((_, kind), (where, _, count)), *others = problems.items()
    assert (kind, others) == ("empty", [])
    return where, count


def test_rows_and_lines_without_text_are_left_out_and_counted():
    lines = ['{"text": "a"}', '{"text": null}', '{"body": "x"}', '{"text": ""}', '{"text": "b"}']
    texts, problems, _ = documents(listed(write("a.jsonl", "\n".join(lines))))
    assert texts == ["a", "b"] and left_out(problems) == (2, 3)
    assert explain(problems, listed("a.jsonl"), False) == []
    assert sources.read_whole(listed("a.jsonl"), "text") == ([(0, "a"), (0, "b")], 3)
    texts, problems, _ = documents(listed(parquet("a.parquet", {"text": ["a", None, "", "b", None]})))
    assert texts == ["a", "b"] and left_out(problems) == (2, 3)


def test_blocks_of_empty_rows_are_limited(monkeypatch):
    monkeypatch.setattr(sources, "MOST_PARTS", 10)
    found = listed(parquet("a.parquet", {"text": [None] * 95 + ["x"]}))
    texts, problems, ends = documents(found)
    assert texts == ["x"] and left_out(problems) == (1, 95) and len(ends) == 10
    assert documents(found, ends[-2])[0] == ["x"]


def test_rows_may_hold_nul_characters():
    """Like lines of .jsonl: there, a NUL is not a sign of a binary file."""
    texts = ["a\0b", "\0", "c"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    assert documents(listed(parquet("a.parquet", {"text": texts}), write("a.jsonl", lines)))[:2] == (texts * 2, {})


def test_invalid_utf8_in_a_row_is_reported_and_can_be_replaced():
    pyarrow = pytest.importorskip("pyarrow")
    raw = pyarrow.array([b"good", b"gr\xf6\xdfe"]).view(pyarrow.string())
    for name, column in (("a.parquet", raw), ("b.parquet", raw.dictionary_encode())):
        found = listed(parquet(name, {"text": column}))
        expected = f"{name}: is not UTF-8 in 2 places, the first at row 2 (0xf6); --errors=replace"
        assert refused(name) == [expected]
        assert documents(found, replace=True)[0] == ["good", "gr\ufffd\ufffde"]


@pytest.mark.parametrize("rows_in_group, place", [(1000, "row 3"), (2, "a row from row 3 on"), (1, "row 3")])
def test_row_too_long_for_the_memory(rows_in_group, place):
    texts = ["x", "y", "z" * 50_000, "w"]
    parquet("a.parquet", {"text": texts}, rows_in_group)
    assert documents(listed("a.parquet"))[0] == texts
    (line,) = refused("a.parquet", longest=20_000)
    assert line.startswith(f"a.parquet: {place} is longer than 0 MB, the limit that --memory sets")


def test_hub_row_too_long_for_the_memory(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    os.makedirs("hub")
    parquet("hub/train-0.parquet", {"text": ["x", "y" * 50_000]})
    assert refused("hf:hub", longest=20_000)[0].startswith("hf:hub: row 2 is longer than 0 MB")


# -- .json files, links to folders, other encodings


@pytest.mark.parametrize("packing", PACK)
def test_json_file_of_json_lines_is_recognised(packing):
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(["a" * 20_000, "b", "c"]))
    for name in ("a", "b"):
        write(f"f/{name}.json{packing}", PACK[packing](f"\ufeff\n{lines}".encode()))
    found, notes = find(["f"], None, None)
    assert documents(found)[0] == ["a" * 20_000, "b", "c"] * 2
    assert notes == [
        f"f/a.json{packing}: and 1 more .json files are read as JSON lines, with the text in the field 'text'"
    ]
    assert [s.kind for s in find(["f"], None, None, "id")[0]] == ["jsonl", "jsonl"]
    assert [s.kind for s in find(["f"], None, None, "body")[0]] == ["text", "text"]


@pytest.mark.parametrize(
    "content", ['{\n "text": "x"\n}', '[{"text": "x"}]', '{"texts": "x"}\n', '"text"\n', "5", '{"text": \n', "\n \n"]
)
def test_other_json_file_is_read_as_plain_text(content):
    found, notes = find([write("a.json", content)], None, None)
    assert documents(found)[0] == [content]
    assert notes == ["a.json: is read as plain text, not as JSON"]


def test_linked_folders_are_read_once():
    for name in ("f/a.txt", "f/g/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "f/.hidden/e.txt"):
        write(name, name)
    os.symlink("../elsewhere", "f/link")
    os.symlink("../../elsewhere", "f/g/again")
    os.symlink("..", "f/g/up")
    os.symlink("../f", "elsewhere/back")
    os.symlink("itself", "f/itself")
    os.symlink("itself", "f/itself.txt")
    found, notes = find(["f"], None, None)
    assert [s.name for s in found] == ["f/a.txt", "f/g/b.txt", "f/link/c.txt", "f/link/deep/d.txt"] and notes == []
    assert refused("f/itself*")[0].startswith("f/itself: cannot be read: ")


ENCODED = [("latin-1", "größe\n"), ("cp1251", "жизнь\n"), ("utf-16", "世界 größe\n"), ("shift_jis", "世界\n")]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("encoding, text", ENCODED)
def test_other_encodings(encoding, text, packing):
    text = text * 700
    write(f"f/a.log{packing}", PACK[packing](text.encode(encoding)))
    jsonl = write("b.jsonl", json.dumps({"text": "größe"}, ensure_ascii=False))
    found, _ = find(["f", jsonl], None, None, "text", encoding)
    whole, problems, ends = documents(found)
    assert whole == [text, "größe"] and not problems
    joined = "".join(documents(found, ends[2])[0]).removeprefix("...")
    assert 0 < len(joined) < len(text) and "".join(whole).endswith(joined)


def test_undecodable_bytes_are_reported_and_can_be_replaced():
    raw = "größe ".encode("cp1252") * 500 + b"\x81 and \x8d"
    found, _ = find([write("a.txt", raw)], None, None, "text", "cp1252")
    texts, problems, _ = documents(found, replace=True)
    assert texts == ["größe " * 500 + "\ufffd and \ufffd"]
    expected = "a.txt: is not cp1252 in 2 places, the first at byte 3000 (0x81); --errors=replace"
    assert explain(problems, found, False, "--errors=replace") == [expected]


@given(
    st.binary(max_size=300), st.sampled_from(["utf-16", "utf-7", "utf-8-sig", "shift_jis", "gb18030", "cp1252", "hz"])
)
def test_any_bytes_in_other_encodings_are_text_or_reported(raw, encoding):
    raw += b"\n" * 4
    found, _ = find([write("any.txt", raw)], None, None, "text", encoding)
    try:
        texts, problems, _ = documents(found)
        lines = explain(problems, found, False)
    except UserError as e:
        texts, lines = None, e.problems
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        assert len(lines) == 1
    else:
        assert lines or texts in ([text], [text.removeprefix("\ufeff")])


@pytest.mark.parametrize("size", ["16", "32"])
def test_utf16_without_byte_order_mark_gets_a_hint(size):
    found, _ = find([write("a.txt", TEXT.encode(f"utf-{size}-le"))], None, None, "text", f"utf-{size}")
    with pytest.raises(UserError, match=f"a.txt: is not utf-{size} .*; utf-{size}-le and utf-{size}-be need none$"):
        documents(found)


def test_invalid_utf8_and_lone_surrogates_in_a_line():
    write("a.jsonl", b'{"text": "good"}\n{"text": "gr\xf6\xdfe"}\n{"text": "\\ud83d"}\n')
    assert refused("a.jsonl") == ["a.jsonl: is not UTF-8 in 3 places, the first at line 2 (0xf6); --errors=replace"]
    texts, _, _ = documents(listed("a.jsonl"), replace=True)
    assert texts == ["good", "gr\ufffd\ufffde", "\ufffd"]


def test_line_too_long_for_the_memory():
    write("a.jsonl", json.dumps({"text": "x"}) + "\n" + json.dumps({"text": "x" * 50_000}))
    assert documents(listed("a.jsonl"))[0] == ["x", "x" * 50_000]
    (line,) = refused("a.jsonl", longest=20_000)
    assert line.startswith("a.jsonl:2: the line is longer than 0 MB, the limit that --memory sets")


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_truncated_archive(packing):
    whole = PACK[packing](os.urandom(3000).hex().encode())
    write(f"a.txt{packing}", whole[: len(whole) // 2])
    assert refused(f"a.txt{packing}") == [f"a.txt{packing}: is cut short: the archive ends before its text does"]


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_invalid_archive(packing):
    write(f"a.txt{packing}", "not packed at all")
    (line,) = refused(f"a.txt{packing}")
    assert line.startswith(f"a.txt{packing}: is not a valid {packing} archive (")


def test_bad_parquet():
    parquet("a.parquet", {"body": ["x"]})
    assert refused("a.parquet") == ["--field=text: a.parquet has no such column; it has body"]
    parquet("a.parquet", {"text": [1]})
    assert refused("a.parquet") == ["a.parquet: row 1: the field 'text' holds int, not text"]
    write("a.parquet", "no parquet at all")
    assert refused("a.parquet")[0].startswith("a.parquet: is not a valid Parquet file (")


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("hf:x", "datasets")])
def test_missing_package_names_the_extra(name, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    if not name.startswith("hf:"):
        write(name, "x")
    what = "it" if "hf" in name else ".parquet"
    assert refused(name) == [f"{name}: reading {what} takes pip install -c constraints.txt -e '.[data]'"]
