"""Chunks of documents on the disk: numbered folders, each complete or absent, that later passes read in any order.

    documents.jsonl   the documents kept, one a line
    index.npy         for each of them ROW: digest, place in documents.jsonl, length
    rejected.jsonl    the documents dropped: the record, and the step, reason, spans and detail
    summary.json      counts and histograms of the chunk
    NAME.npy          what a pass found of its documents: MinHash bands (documents, bands), the sorted n-grams of all
                      documents ("shingles"; ROW says which are whose), measures, hashes of lines

A run that was killed finds the finished folders and makes the others. All that follows from a chunk follows from its
number, so neither the order in which processes finish nor their number can show in the results.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.files import atomic_directory, atomic_file, read_json
from gptcore.prepare.document import Document, Drop

Rows = np.ndarray[Any, Any]  # of ROW
ROW = np.dtype(
    [
        ("high", "<u8"), ("low", "<u8"),  # the digest of the text, 16 bytes
        ("tie", "<u8"),  # orders documents of equal text
        ("source", "<u2"),  # among the sorted names of sources
        ("offset", "<u8"), ("size", "<u4"),  # of the line in documents.jsonl, in bytes
        ("bytes", "<u4"), ("chars", "<u4"),  # of the text
        ("first", "<u8"), ("shingles", "<u4"),  # in shingles.npy
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Rejected:
    """A dropped document with the step that dropped it."""

    document: Document
    step: str
    drop: Drop

    def to_json(self) -> str:
        record = json.loads(self.document.to_json())
        spans = [list(span) for span in self.drop.spans]
        record |= {"step": self.step, "reason": self.drop.reason, "spans": spans, "detail": self.drop.detail}
        return json.dumps(record, ensure_ascii=False, sort_keys=True)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name the folder in an OSError without a file name; those of NumPy have no number either."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from error


class Chunks:
    """The chunks of one pass, in a folder, numbered from 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def has(self, number: int) -> bool:
        return self.path(number).is_dir()

    def write(
        self,
        number: int,
        documents: Sequence[Document],
        rejected: Iterable[Rejected],
        summary: dict[str, Any],
        sources: Sequence[str],
        arrays: Mapping[str, np.ndarray[Any, Any]],
        shingles: Sequence[int] = (),
    ) -> None:
        """Write a chunk, which appears at once and complete. `shingles`: how many each document has in that array."""
        rows = np.zeros(len(documents), ROW)
        with _naming(self.path(number)), atomic_directory(self.path(number)) as folder:
            offset = first = 0
            with open(folder / "documents.jsonl", "wb") as out:
                for i, document in enumerate(documents):
                    line = document.to_json().encode() + b"\n"
                    digest, count = document.digest(), shingles[i] if shingles else 0
                    rows[i] = (
                        int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big"),
                        int.from_bytes(document.tie(), "big"), sources.index(document.source),
                        offset, len(line), len(document.text.encode()), len(document.text), first, count,
                    )  # fmt: skip
                    out.write(line)
                    offset, first = offset + len(line), first + count
            np.save(folder / "index.npy", rows)
            for name, values in arrays.items():
                np.save(folder / f"{name}.npy", values)
            with open(folder / "rejected.jsonl", "w", encoding="utf-8") as text:
                text.writelines(item.to_json() + "\n" for item in rejected)
            (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")

    def documents(self, number: int) -> Iterator[Document]:
        with open(self.path(number) / "documents.jsonl", "rb") as file:
            yield from map(Document.from_json, file)

    def rejected(self, number: int) -> Iterator[bytes]:
        with open(self.path(number) / "rejected.jsonl", "rb") as file:
            yield from file

    def summary(self, number: int) -> dict[str, Any]:
        return read_json(self.path(number) / "summary.json")

    def index(self, number: int) -> Rows:
        rows: Rows = np.load(self.path(number) / "index.npy")
        return rows

    def array(self, number: int, name: str) -> np.ndarray[Any, Any]:
        """Return an array of a chunk as a memory map."""
        found: np.ndarray[Any, Any] = np.load(self.path(number) / f"{name}.npy", mmap_mode="r")
        return found


def source_hash(rows: Rows) -> str:
    """Return the SHA-256 of the digests of documents (Document.digest), in their order."""
    return hashlib.sha256(np.stack([rows["high"], rows["low"]], axis=1).astype(">u8").tobytes()).hexdigest()


class Corpus:
    """All documents of a pass, numbered through: which chunk each is in, and its ROW."""

    def __init__(self, chunks: Chunks, count: int) -> None:
        self.chunks, self.count = chunks, count
        indexes = [chunks.index(number) for number in range(count)]
        self.rows: Rows = np.concatenate([*indexes, np.empty(0, ROW)])
        self.starts = np.cumsum([0, *map(len, indexes)])  # number of the first document of each chunk
        self._opened: dict[tuple[int, str], Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def chunk_of(self, document: int) -> int:
        return int(np.searchsorted(self.starts, document, side="right")) - 1

    def read(self, document: int) -> Document:
        row, chunk = self.rows[document], self.chunk_of(document)
        with open(self.chunks.path(chunk) / "documents.jsonl", "rb") as file:
            return Document.from_json(os.pread(file.fileno(), int(row["size"]), int(row["offset"])))

    def shingles(self, document: int) -> np.ndarray[Any, Any]:
        chunk, row = self.chunk_of(document), self.rows[document]
        if (chunk, "shingles") not in self._opened:
            if len(self._opened) >= 64:
                self._opened.clear()
            self._opened[chunk, "shingles"] = self.chunks.array(chunk, "shingles")
        first = int(row["first"])
        found: np.ndarray[Any, Any] = self._opened[chunk, "shingles"][first : first + int(row["shingles"])]
        return np.asarray(found)

    def band(self, number: int) -> np.ndarray[Any, Any]:
        """Return one MinHash band of all documents, (documents,)."""
        parts = [np.asarray(self.chunks.array(chunk, "bands")[:, number]) for chunk in range(self.count)]
        found: np.ndarray[Any, Any] = np.concatenate([*parts, np.empty(0, np.uint64)])
        return found


def write_zst(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines as a zst file, complete or not at all."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3)
    with atomic_file(path) as aside, open(aside, "wb") as file, compressor.stream_writer(file, closefd=False) as out:
        for line in lines:
            out.write(line)
