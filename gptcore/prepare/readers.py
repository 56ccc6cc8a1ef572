"""Read records from files: text, Markdown, HTML, JSON lines, CSV and Parquet, plain or compressed, as a stream.

The main process cuts files into raw records and never parses more than that needs; workers make documents of them.
Every limit is a number in Limits. A record that cannot be read is a BadRecord: an error that names its place, or with
`skip_bad` an entry of the report.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptcore.files import open_file
from gptcore.prepare.document import Document, Drop
from gptcore.text.pretokenize import split_documents

_BLOCK = 1 << 20
_TEXT = {".txt": "text", ".md": "text", ".html": "html", ".htm": "html"}
_RECORDS = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
FORMATS = _TEXT | _RECORDS
COMPRESSIONS = (".gz", ".zst", ".bz2")


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which a record or a file is refused."""

    document_bytes: int = 1 << 24  # of one record; the filters need about 60 times as much memory
    expansion: int = 200  # times its size on the disk that a compressed file may grow, beyond expansion_from bytes
    expansion_from: int = 1 << 26
    file_bytes: int = 1 << 40  # of one file, after decompression


@dataclass(frozen=True)
class Reading:
    """How records become documents."""

    text_field: str = "text"  # of JSON, CSV and Parquet
    id_field: str = "id"
    encoding: str = ""  # of text files; "" tells UTF-8, UTF-16 and UTF-32 by their bytes
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise ValueError(f"[reading] encoding {self.encoding!r} is unknown; see Python's list of codecs") from None


class BadRecord(ValueError):
    """A record or the rest of a file that cannot be read, with its place."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason = place, reason

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        return BadRecord, (self.place, self.reason)  # it comes from a worker


class Input(NamedTuple):
    """One file, and the name of the source that it belongs to."""

    source: str
    path: Path
    name: str  # in places: as it was given


class Raw(NamedTuple):
    """What a record is made of: bytes, fields already parsed, or the reason why it cannot be read."""

    kind: str  # of FORMATS, or "bad"
    source: str
    place: str
    data: Any


# ---- files -----------------------------------------------------------------------------------------------------------


def find_inputs(arguments: Sequence[str]) -> list[Input]:
    """Return the files of paths, folders and globs, in order of their names; NAME=PATH names the source.

    Links to folders are not followed, so a loop of them is harmless. Raises FileNotFoundError or ValueError for an
    argument that gives no file.
    """
    found: dict[Path, Input] = {}
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not (equals and name.isidentifier()) or os.path.lexists(argument):
            name, pattern = "", argument
        matched = (
            sorted(glob(pattern, recursive=True)) if has_magic(pattern) and not Path(pattern).exists() else [pattern]
        )
        if not matched:
            raise FileNotFoundError(f"no file matches {pattern}")
        for path in map(Path, matched):
            source = name or _stem(path)
            if path.is_dir():
                files = [file for file in _walk(path) if format_of(file)]
                if not files and len(matched) == 1:
                    raise ValueError(f"{path} holds no file of a known kind ({_known()})")
            elif format_of(path) is None:
                raise ValueError(f"{path} is not of a known kind, expected {_known()}")
            else:
                open_file(path).close()
                files = [path]
            for file in files:
                key = file.absolute()
                if key in found and found[key].source != source:
                    raise ValueError(f"{file} belongs to two sources, {found[key].source} and {source}")
                found.setdefault(key, Input(source, file, str(file)))
    return [found[key] for key in sorted(found)]


def format_of(path: Path) -> str | None:
    """Return the format that the name of a file tells, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _known() -> str:
    return f"{' '.join(FORMATS)}, or those with {' '.join(COMPRESSIONS)}"


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.resolve().name


def _walk(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(root, name)
            if path.is_file():  # not a FIFO, nor a link that leads nowhere or round in a loop
                yield path


def _raise(error: OSError) -> None:
    raise error


@dataclass
class _Bounded(io.RawIOBase):
    """A stream that is decompressed, within the limits."""

    file: BinaryIO
    inner: Any  # decompresses it
    size: int  # on the disk
    place: str
    limits: Limits
    count: int = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read(len(buffer))
        self.count += len(data)
        if self.count > self.limits.file_bytes:
            raise BadRecord(self.place, f"over {self.limits.file_bytes:,} bytes, the limit file_bytes")
        if self.count > max(self.limits.expansion_from, self.size * self.limits.expansion):
            raise BadRecord(
                self.place,
                f"{self.size:,} bytes on the disk have become {self.count:,}, over {self.limits.expansion} times as "
                "many, as a decompression bomb would; raise the limit expansion if this is right",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.inner.close()
        self.file.close()
        super().close()


def _open(file: Input, limits: Limits) -> io.BufferedReader:
    """Open a file and decompress it if its name says so."""
    raw: BinaryIO = open_file(file.path)
    size, suffix = os.fstat(raw.fileno()).st_size, file.path.suffix.lower()
    inner: Any = raw
    if suffix == ".gz":
        inner = gzip.GzipFile(fileobj=raw)
    elif suffix == ".bz2":
        inner = bz2.BZ2File(raw)
    elif suffix == ".zst":
        import zstandard

        inner = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw, read_across_frames=True)
    bounded = _Bounded(raw, inner, size if inner is not raw else limits.file_bytes, file.name, limits)
    return io.BufferedReader(bounded, _BLOCK)


# ---- records ---------------------------------------------------------------------------------------------------------


def read_raw(file: Input, reading: Reading) -> Iterator[Raw]:
    """Yield the records of a file. What cannot be read is a Raw of kind "bad", and ends the file if it must."""
    kind = format_of(file.path)
    assert kind is not None
    try:
        if kind == "parquet":
            yield from _read_parquet(file, reading)
            return
        with _open(file, reading.limits) as stream:
            reader = {"text": _read_text, "html": _read_html, "jsonl": _read_lines, "csv": _read_csv}[kind]
            yield from reader(file, stream, reading)
    except BadRecord as error:
        yield Raw("bad", file.source, error.place, error.reason)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        yield Raw("bad", file.source, file.name, f"cannot be read further: {error}")
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("zstd", "zstandard", "zlib", "pyarrow"):
            raise
        yield Raw("bad", file.source, file.name, f"cannot be read further: {error}")


def _read_text(file: Input, stream: BinaryIO, reading: Reading) -> Iterator[Raw]:
    """Yield the documents that "<|endoftext|>" separates, each as bytes with the encoding of the file."""
    beginning = stream.read(1 << 16)
    encoding = reading.encoding or _detect(beginning, file.name)
    if encoding.replace("-", "").startswith(("utf16", "utf32")):  # a separator may be no ASCII there: one document
        blocks: Iterable[bytes | None] = itertools.chain(_blocks(beginning, stream), [None])
    else:
        blocks = split_documents(_blocks(beginning, stream))
    parts: list[bytes] = []
    size = number = 0
    for block in blocks:
        if block is not None:
            size += len(block)
            if size <= reading.limits.document_bytes:
                parts.append(block)
            continue
        number += 1
        place = f"{file.name}:{number}"
        if size > reading.limits.document_bytes:
            yield Raw("bad", file.source, place, _too_large(size, reading))
        else:
            yield Raw("text", file.source, place, (b"".join(parts), encoding))
        parts, size = [], 0
    if not number:
        yield Raw("text", file.source, f"{file.name}:1", (b"", encoding))


def _read_html(file: Input, stream: BinaryIO, reading: Reading) -> Iterator[Raw]:
    data = stream.read(reading.limits.document_bytes + 1)
    if len(data) > reading.limits.document_bytes:
        yield Raw("bad", file.source, file.name, _too_large(len(data), reading))
    else:
        yield Raw("html", file.source, file.name, data)


def _read_lines(file: Input, stream: BinaryIO, reading: Reading) -> Iterator[Raw]:
    limit, number = reading.limits.document_bytes, 0
    while line := stream.readline(limit + 1):
        number += 1
        place = f"{file.name}:{number}"
        if len(line) <= limit:
            if line.strip():
                yield Raw("jsonl", file.source, place, line)
            continue
        size = len(line)
        while line and not line.endswith(b"\n"):
            line = stream.readline(_BLOCK)
            size += len(line)
        yield Raw("bad", file.source, place, _too_large(size, reading))


def _read_csv(file: Input, stream: io.BufferedReader, reading: Reading) -> Iterator[Raw]:
    encoding = reading.encoding or _detect(stream.peek(1 << 16)[: 1 << 16], file.name)
    text = io.TextIOWrapper(stream, encoding, newline="")
    before = csv.field_size_limit(reading.limits.document_bytes)
    try:
        rows = csv.DictReader(text, strict=True)
        for number, row in enumerate(rows, start=1):
            place = f"{file.name}:{number}"
            if None in row or None in row.values():
                yield Raw("bad", file.source, place, f"another number of columns than {len(rows.fieldnames or [])}")
            else:
                yield Raw("fields", file.source, place, row)
    finally:
        csv.field_size_limit(before)
        text.detach()


def _read_parquet(file: Input, reading: Reading) -> Iterator[Raw]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file.path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Raw("fields", file.source, f"{file.name}:{number}", row)


def _blocks(beginning: bytes, stream: BinaryIO) -> Iterator[bytes]:
    yield beginning
    while block := stream.read(_BLOCK):
        yield block


def _too_large(size: int, reading: Reading) -> str:
    return f"a record of {size:,} bytes, over the limit document_bytes of {reading.limits.document_bytes:,}"


def _detect(beginning: bytes, name: str) -> str:
    """Return the encoding of a text file that begins so. Raises BadRecord if no encoding fits."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    ):  # fmt: skip
        if beginning.startswith(mark):
            return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)  # the last character may be cut off
    except UnicodeDecodeError:
        pass
    else:
        return "utf-8"
    from charset_normalizer import from_bytes

    best = from_bytes(beginning).best() if b"\0" not in beginning else None
    guess = f", perhaps {best.encoding}" if best is not None else ""  # such guesses are often wrong
    raise BadRecord(name, f"neither UTF-8 nor marked as UTF-16 or UTF-32{guess}; state the encoding if it is text")


# ---- documents -------------------------------------------------------------------------------------------------------


def make_document(raw: Raw, reading: Reading) -> Document | tuple[Document, Drop]:
    """Return the document of a record, with a Drop if it has no text. Raises BadRecord."""
    if raw.kind == "bad":
        raise BadRecord(raw.place, raw.data)
    if raw.kind == "text":
        data, encoding = raw.data
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            raise BadRecord(raw.place, f"not {encoding} at byte {error.start}: {error.reason}") from None
        document = Document(text, source=raw.source, place=raw.place)
        if encoding not in ("utf-8", "utf-8-sig", "ascii"):
            document.counts[f"encoding_{encoding}"] += 1
        return document
    if raw.kind == "html":
        return _from_html(raw)
    fields = raw.data if raw.kind == "fields" else _parse(raw)
    text = fields.get(reading.text_field)
    if not isinstance(text, str):
        found = f"of type {type(text).__name__}" if reading.text_field in fields else "absent"
        raise BadRecord(raw.place, f"the field {reading.text_field!r} is {found}, expected a string")
    metadata = {key: value for key, value in fields.items() if key not in (reading.text_field, reading.id_field)}
    metadata = json.loads(json.dumps(metadata, default=str))  # dates and bytes of Parquet become strings
    name = fields.get(reading.id_field)
    document = Document(
        text, source=raw.source, place=raw.place, id="" if name is None else str(name), metadata=metadata
    )
    try:
        document.to_json().encode()
    except UnicodeEncodeError as error:  # JSON can spell an unpaired surrogate, UTF-8 cannot
        raise BadRecord(raw.place, f"not Unicode: {error.reason}") from None
    return document


def _parse(raw: Raw) -> dict[str, Any]:
    try:
        fields = json.loads(raw.data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(raw.place, f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRecord(raw.place, f"holds a {type(fields).__name__}, expected a JSON object")
    return fields


def _from_html(raw: Raw) -> Document | tuple[Document, Drop]:
    """Return the main text of a page, as trafilatura finds it (Barbaresi 2021)."""
    import trafilatura

    text = trafilatura.extract(raw.data, favor_precision=True, include_comments=False, deduplicate=False)
    document = Document(text or "", source=raw.source, place=raw.place)
    return document if text else (document, Drop("no_main_text"))
