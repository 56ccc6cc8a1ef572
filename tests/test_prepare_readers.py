"""The readers of gptcore prepare: every format, every limit, and damage that is reported with its place."""

import bz2
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from gptcore.prepare.document import Document
from gptcore.prepare.readers import BadRecord, Input, Limits, Reading, find_inputs, make_document, read_raw

TEXTS = ["First text, with a comma.", 'Second: "quoted"\nand ünïcode ✓', "Third"]


def read(path, **options):
    """The documents of a file, or the messages of what cannot be read."""
    limits = options.pop("limits", Limits())
    reading = Reading(limits=limits, **options)
    found = []
    for raw in read_raw(Input("source", path, path.name), reading):
        try:
            made = make_document(raw, reading)
        except BadRecord as error:
            found.append(str(error))
        else:
            found.append(made.text if isinstance(made, Document) else made[1].reason)
    return found


def jsonl(texts=TEXTS):
    return "".join(json.dumps({"text": text, "id": i, "n": i}) + "\n" for i, text in enumerate(texts)).encode()


def test_all_formats_give_the_same(tmp_path):
    names = ("a.txt", "a.md", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.jsonl.zst", "a.CSV.bz2")
    files = {name: tmp_path / name for name in names}
    text = "\n<|endoftext|>\n".join(TEXTS).encode()
    rows = "text,n\r\n" + "".join('"{}",{}\r\n'.format(t.replace('"', '""'), i) for i, t in enumerate(TEXTS))
    files["a.txt"].write_bytes(text)
    files["a.md"].write_bytes(text)
    files["a.txt.gz"].write_bytes(gzip.compress(text[:30]) + gzip.compress(text[30:]))  # two members
    files["a.jsonl"].write_bytes(jsonl())
    compressor = zstandard.ZstdCompressor()
    files["a.jsonl.zst"].write_bytes(compressor.compress(jsonl()[:50]) + compressor.compress(jsonl()[50:]))
    files["a.csv"].write_bytes(rows.encode())
    files["a.CSV.bz2"].write_bytes(bz2.compress(rows.encode()))
    parquet.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), files["a.parquet"])
    for name, path in files.items():
        expected = [text.rstrip("\n") for text in TEXTS]
        assert [text.rstrip("\n") for text in read(path)] == expected, name
    assert [found.path.name for found in find_inputs([str(tmp_path)])] == sorted(files)


def test_fields_become_metadata(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "id": 7, "license": "mit", "deep": {"a": [1]}}\n', encoding="utf-8")
    (raw,) = read_raw(Input("s", path, "a.jsonl"), Reading())
    document = make_document(raw, Reading())
    assert (document.id, document.source, document.place) == ("7", "s", "a.jsonl:1")
    assert document.metadata == {"license": "mit", "deep": {"a": [1]}}
    assert Document.from_json(document.to_json()).to_json() == document.to_json()


def test_html_keeps_the_main_text(tmp_path):
    body = "".join(f"<p>Paragraph {i} of the article says something of enough length to be kept.</p>" for i in range(6))
    page = f"<html><body><nav><a href=/>Home</a></nav><article><h1>Title</h1>{body}</article></body></html>"
    (tmp_path / "a.html").write_text(page)
    (text,) = read(tmp_path / "a.html")
    assert "Paragraph 3" in text
    assert "<p>" not in text
    assert "Home" not in text
    (tmp_path / "a.html").write_text("<html></html>")
    assert read(tmp_path / "a.html") == ["no_main_text"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_are_detected(tmp_path, encoding):
    text = "Die Größe der Wörter ändert sich über die Jahre, wie man überall hört und sieht.\n" * 20
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "a.txt") == [text]


def test_encoding_that_is_stated_or_cannot_be_told(tmp_path):
    (tmp_path / "a.txt").write_bytes("größe".encode("cp1252"))
    assert read(tmp_path / "a.txt", encoding="cp1252") == ["größe"]
    assert read(tmp_path / "a.txt")[0].startswith("a.txt: neither UTF-8 nor marked as UTF-16")
    assert "a.txt:1: not utf-8 at byte 2" in read(tmp_path / "a.txt", encoding="utf-8")[0]
    (tmp_path / "a.txt").write_bytes(os.urandom(4096) + bytes(10))
    assert "state the encoding if it is text" in read(tmp_path / "a.txt")[0]
    with pytest.raises(ValueError, match="encoding 'utf-9' is unknown"):
        Reading(encoding="utf-9")


def test_bytes_that_break_later_are_not_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 100_000 + b"\xff")
    assert read(tmp_path / "a.txt") == ["a.txt:1: not utf-8 at byte 100000: invalid start byte"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "a.jsonl:2: not JSON: "),
        (b'["text"]', "a.jsonl:2: holds a list, expected a JSON object"),
        (b'{"txt": "a"}', "a.jsonl:2: the field 'text' is absent, expected a string"),
        (b'{"text": 3}', "a.jsonl:2: the field 'text' is of type int"),
        (b'{"text": "\xff"}', "a.jsonl:2: not JSON: 'utf-8'"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: not Unicode: surrogates not allowed"),
        (b"[" * 100_000, "a.jsonl:2: not JSON: "),
    ],
)
def test_a_damaged_line_does_not_take_the_next_one_with_it(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n\n{"text": "after"}')
    before, found, after = read(tmp_path / "a.jsonl")
    assert (before, after) == ("before", "after")
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("name", "cut", "whole"),
    [("a.jsonl.gz", gzip.compress, 0), ("a.jsonl.bz2", bz2.compress, 0),
     ("a.jsonl.zst", zstandard.ZstdCompressor().compress, 0)],
)  # fmt: skip
def test_damaged_archives(tmp_path, name, cut, whole):
    data = cut(jsonl([os.urandom(3000).hex() for _ in range(100)]))
    (tmp_path / name).write_bytes(b"not an archive at all")
    (found,) = read(tmp_path / name)
    assert found.startswith(f"{name}: cannot be read further: ")
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert name in read(tmp_path / name)[-1]


def test_damaged_tables(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\ngood,1\nmore,2,3\nfew\ngood,4\n"open,5\n')
    good, more, few, again, end = read(tmp_path / "a.csv")
    assert (good, again) == ("good", "good")
    assert "a.csv:2: another number of columns than 2" in more
    assert "a.csv:3: another number of columns than 2" in few
    assert "cannot be read further" in end
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    assert "a.parquet: cannot be read further" in read(tmp_path / "a.parquet")[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.html"])
def test_a_record_beyond_the_limit_is_never_held(tmp_path, name):
    line = json.dumps({"text": "x" * 5_000_000}).encode()
    with open(tmp_path / name, "wb") as file:
        file.write(line + b'\n{"text": "after"}\n')
    found = read(tmp_path / name, limits=Limits(document_bytes=1_000_000))
    assert "over the limit document_bytes of 1,000,000" in found[0]
    assert found[1:] == (["after"] if name == "a.jsonl" else [])


@pytest.mark.parametrize(("name", "compress"), [("a.txt.gz", gzip.compress), ("a.txt.bz2", bz2.compress)])
def test_decompression_bombs(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(bytes(5_000_000)))
    (found,) = read(tmp_path / name, encoding="latin-1", limits=Limits(expansion=100, expansion_from=1_000_000))
    assert "as a decompression bomb would" in found
    assert read(tmp_path / name, encoding="latin-1", limits=Limits(expansion=10**6)) == ["\0" * 5_000_000]
    (found,) = read(tmp_path / name, encoding="latin-1", limits=Limits(expansion=10**6, file_bytes=10**6))
    assert "over 1,000,000 bytes, the limit file_bytes" in found


def test_links_loops_and_special_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b.txt").symlink_to("b.txt")
    (tmp_path / "c.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "d.txt")
    assert [found.path.name for found in find_inputs([str(tmp_path)])] == ["a.txt", "c.txt"]
    with pytest.raises(OSError, match=r"b\.txt"):
        find_inputs([str(tmp_path / "b.txt")])
    with pytest.raises(ValueError, match="FIFO"):
        find_inputs([str(tmp_path / "d.txt")])


def test_names_of_sources(tmp_path):
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(b""))
    found = find_inputs([f"{tmp_path}/*.txt", f"more={tmp_path}/two.jsonl.gz"])
    assert [(item.source, item.path.name) for item in found] == [("one", "one.txt"), ("more", "two.jsonl.gz")]
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\.md"):
        find_inputs([f"{tmp_path}/*.md"])
    with pytest.raises(ValueError, match=r"not of a known kind, expected \.txt"):
        find_inputs([__file__])
    with pytest.raises(ValueError, match="belongs to two sources"):
        find_inputs([f"{tmp_path}/one.txt", f"x={tmp_path}/one.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file of a known kind"):
        find_inputs([str(tmp_path / "empty")])


def test_empty_files_are_documents_without_text(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).write_bytes(b"")
    assert [read(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv")] == [[""], [], []]
