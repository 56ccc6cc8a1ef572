"""Records of a file of examples: CSV and TSV, JSON and JSON lines. Each knows its place, for error messages."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptcore.files import PathLike, open_file

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}  # of columns; of several, the one that is most often in the header
LINES, OBJECTS = (".jsonl", ".ndjson"), (".json",)
SUFFIXES = (*DELIMITERS, *LINES, *OBJECTS)
_MARKS = [(codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
          (codecs.BOM_UTF16_BE, "UTF-16")]  # fmt: skip


class Record(NamedTuple):
    """The columns of a row or the keys of a JSON object, and where they are."""

    place: str
    values: dict[str, Any]


def read_text(path: PathLike) -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raises ValueError, naming the line, for other."""
    with open_file(path) as file:
        data = file.read()
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise ValueError(f"{path} is {name}, expected UTF-8; `iconv -f {name} -t UTF-8` converts it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - before.rfind(b"\n")
        raise ValueError(
            f"{path}, line {before.count(10) + 1}, byte {column} of the line: 0x{data[error.start]:02x} is not UTF-8; "
            "`iconv -f ISO-8859-1 -t UTF-8` converts a file in Latin-1"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a NUL, expected text")
    if not text.strip():
        raise ValueError(f"{path} is empty, expected examples")
    return text


def read_records(path: PathLike) -> list[Record]:
    """Return the records of a file, whose format follows from its name.

    Raises OSError, or ValueError with the file, the line and what was expected.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} has the ending {suffix!r}, expected one of {', '.join(SUFFIXES)}")
    text = read_text(path)
    if suffix in DELIMITERS:
        return list(_rows(path, text, suffix))
    if suffix in LINES:
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
        return [Record(place, _object(place, parse(place, line))) for place, line in lines]
    return list(_objects(path, parse(str(path), text)))


def parse(place: str, text: str) -> Any:
    """Return a JSON value. Raises ValueError, naming the place, for what is not JSON and for a key that is twice."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _repeated([key for key, _ in found]):
            raise ValueError(f"the key {twice!r} is there twice in one object, expected once")
        return dict(found)

    try:
        value = json.loads(text, object_pairs_hook=pairs)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: an unpaired surrogate (\\ud800 to \\udfff), expected characters") from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise ValueError(f"{place}{line}, column {error.colno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {error or 'too many levels'}") from None
    return value


def _objects(path: PathLike, value: Any) -> Iterator[Record]:
    """Yield the objects of a list, or the questions of SQuAD's nested format."""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds {kind(value)}, expected a list of objects, or SQuAD's format")
    for i, item in enumerate(value):
        place = f"{path}, number {i + 1}"
        if "paragraphs" not in _object(place, item):
            yield Record(place, item)
            continue
        for j, paragraph in enumerate(_list(place, item, "paragraphs")):
            inside = f"{place}, paragraph {j + 1}"
            context = _object(inside, paragraph).get("context")
            for k, question in enumerate(_list(inside, paragraph, "qas")):
                at = f"{inside}, question {k + 1}"
                yield Record(at, {"context": context, **_object(at, question)})


def _rows(path: PathLike, text: str, suffix: str) -> Iterator[Record]:
    first = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS[suffix], key=first.count)
    # Without a quote character a field of a TSV may hold one, as in most TSV files; in a CSV a field may be quoted
    quoting: Any = {"quoting": csv.QUOTE_NONE} if suffix == ".tsv" and '"' not in first else {"strict": True}
    limit = csv.field_size_limit(max(len(text), 1))
    line, header = 1, None
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **quoting)
        for row in reader:
            if header is None:
                header = row
                if twice := _repeated(header):
                    raise ValueError(f"{path}, line 1 has the column {twice!r} twice, expected different names")
            elif row:
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {line} has {len(row)} columns, expected {len(header)} "
                        f"({', '.join(header)}); put a text that holds {delimiter!r} or a line break in double quotes"
                    )
                yield Record(f"{path}, line {line}", dict(zip(header, row, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line} is not valid CSV: {error}; a double quote inside a quoted text is written twice"
        ) from None
    finally:
        csv.field_size_limit(limit)


def string(record: Record, key: str) -> str:
    """Return a text that is not empty. Raises ValueError, naming place and key."""
    value = record.values.get(key)
    if not isinstance(value, str):
        found = "missing" if key not in record.values else kind(value)
        raise ValueError(f"{record.place}, {key!r} is {found}, expected a text")
    if not value.strip():
        raise ValueError(f"{record.place}, {key!r} is empty, expected a text; delete the example or fill it in")
    return value


def choose(records: Sequence[Record], wanted: str | None, option: str, names: Iterable[str]) -> str | None:
    """Return the name of a column: `wanted` if it is given, else the first of `names` that the first record has."""
    columns = records[0].values
    if wanted is None:
        lower = {column.lower(): column for column in reversed(columns)}
        return next((lower[name] for name in names if name in lower), None)
    if wanted not in columns:
        raise ValueError(f"{records[0].place} has no {wanted!r} ({option}); there are {', '.join(map(repr, columns))}")
    return wanted


def kind(value: Any) -> str:
    """Return what a JSON value is, for an error message."""
    names = {str: "a text", bool: "true or false", type(None): "null", dict: "an object", list: "a list"}
    return names.get(type(value), f"the number {value}")


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds {kind(value)}, expected an object, as {{...}}")
    return value


def _list(place: str, values: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(values.get(key), list):
        raise ValueError(f"{place}, {key!r} is {kind(values.get(key))}, expected a list")
    found: list[Any] = values[key]
    return found


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
