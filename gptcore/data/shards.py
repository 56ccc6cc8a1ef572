"""Files of token ids: our own, which are checked to the last bit, nanoGPT's and llm.c's.

    gptcore  header and body as below; what TextDataset caches is such a file too
    llm.c    256 int32: magic 20240520, version 1, number of tokens; then uint16 ids, GPT-2's. With magic 20240801 and
             version 7 the ids are uint32
    nanogpt  uint16 ids and nothing else (train.bin). Any file could be one, so this format is never guessed

Our own, in little endian:

    magic "GPTCTOK\\0", u32 version, u32 bytes a token, u64 vocab_size, u64 tokens, u64 documents,
        32 bytes the tokenizer's fingerprint, 32 bytes SHA-256 of all that is before and after it
    tokens: u16 or u32 each, zeros up to a multiple of 8 bytes
    document starts: u64 each, as positions among the tokens
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gptcore.files import PathLike, atomic_file

_MAGIC, _VERSION = b"GPTCTOK\0", 2
_FIELDS = struct.Struct("<8sIIQQQ32s")  # magic, version, bytes a token, vocab_size, tokens, documents, fingerprint
_HEADER = _FIELDS.size + 32
_LLMC: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic: version and type of a token
_LLMC_HEADER = 256 * 4


class Shard(NamedTuple):
    """One file of tokens, memory-mapped."""

    tokens: np.ndarray[Any, Any]  # (tokens,) uint16 or uint32
    document_starts: np.ndarray[Any, np.dtype[np.int64]] | None  # positions in tokens; None if the file has none
    fingerprint: str | None  # of the tokenizer; None if the file has none


def write_shard(
    path: PathLike, chunks: Iterable[Sequence[int] | np.ndarray[Any, Any] | None], *, vocab_size: int, fingerprint: str
) -> None:
    """Write the ids of documents, in a file that is whole or absent.

    chunks: ids, as many at a time as you like, and None at the end of each document, as Tokenizer.encode_stream gives
        them; what ends a text for the model, such as an end-of-text id, is the caller's to add.
    vocab_size, fingerprint: the tokenizer's.

    Raises ValueError, leaving what was at `path`, for an id outside the vocabulary.
    """
    dtype = _token_type(vocab_size)
    count, starts, start = 0, array("Q"), 0
    with atomic_file(path) as aside, open(aside, "r+b") as out:
        out.seek(_HEADER)
        for chunk in chunks:
            if chunk is None:
                starts.append(start)
                start = count
                continue
            ids = np.asarray(chunk, np.int64)
            _check_ids(ids, vocab_size, f"the tokens for {path}, from number {count} on")
            out.write(ids.astype(dtype).tobytes())
            count += len(ids)
        if start < count:
            starts.append(start)  # the last document may lack its None
        out.write(bytes(-count * dtype.itemsize % 8))
        out.write(np.asarray(starts, "<u8").tobytes())
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, dtype.itemsize, vocab_size, count, len(starts), bytes.fromhex(fingerprint)
        )
        out.flush()
        digest = _digest(out, fields)
        out.seek(0)
        out.write(fields + digest)


def read_shard(path: PathLike, *, vocab_size: int, format: str | None = None, fingerprint: str | None = None) -> Shard:
    """Map a file of tokens, after a look at every one of them.

    Args:
        vocab_size: ids are below it.
        format: "gptcore", "llm.c" or "nanogpt"; None tells ours and llm.c's by their first bytes.
        fingerprint: the tokenizer's that the file must have been made with; of our own format only.

    Raises FileNotFoundError, or ValueError, with the numbers, for a file that is damaged, cut off, of another format or
    another tokenizer, or that has an id outside the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} (looked from {Path.cwd()})")
    with open(path, "rb") as file:  # one handle: the file may be replaced under its name meanwhile
        beginning = file.read(8)
        if format is None:
            format = "gptcore" if beginning == _MAGIC else "llm.c" if _int32(beginning) in _LLMC else None
        if format is None:
            raise ValueError(
                f"{path} begins with {beginning.hex(' ') or 'nothing'}, which is no header of gptcore or llm.c; "
                "format='nanogpt' reads a file of uint16 ids alone"
            )
        if format not in _READERS:
            raise ValueError(f"there is no format {format!r}, only {', '.join(_READERS)}")
        shard = _READERS[format](path, file)
    if fingerprint is not None and shard.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"{path} was made with a tokenizer of fingerprint {shard.fingerprint}, but this one has {fingerprint}"
        )
    _check_ids(shard.tokens, vocab_size, str(path))
    return shard


def _read_gptcore(path: Path, file: BinaryIO) -> Shard:
    file.seek(0)
    header = file.read(_HEADER)
    if len(header) < _HEADER:
        raise ValueError(f"{path} is damaged: {len(header)} bytes, but a header has {_HEADER}")
    fields, expected = header[: _FIELDS.size], header[_FIELDS.size :]
    magic, version, itemsize, vocab_size, count, documents, fingerprint = _FIELDS.unpack(fields)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"{path} is of format {magic!r} version {version}, expected {_MAGIC!r} version {_VERSION}")
    if itemsize not in (2, 4) or itemsize != _token_type(vocab_size).itemsize:
        raise ValueError(f"{path} is damaged: {itemsize} bytes a token for a vocabulary of {vocab_size}")
    padded = -(-count * itemsize // 8) * 8
    _check_size(path, file, _HEADER + padded + 8 * documents, count)
    if _digest(file, fields) != expected:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    tokens = _map(file, np.dtype(f"<u{itemsize}"), _HEADER, count)
    file.seek(_HEADER + padded)
    return Shard(tokens, np.frombuffer(file.read(), "<u8").astype(np.int64), fingerprint.hex())


def _read_llmc(path: Path, file: BinaryIO) -> Shard:
    file.seek(0)
    header = np.frombuffer(file.read(_LLMC_HEADER), np.uint8)
    if len(header) < _LLMC_HEADER:
        raise ValueError(f"{path} is damaged: {len(header)} bytes, but a header has {_LLMC_HEADER}")
    magic, version, count = (int(number) for number in header.view("<i4")[:3])
    if magic not in _LLMC or version != _LLMC[magic][0] or count < 0:
        known = " or ".join(f"magic {m} version {v}" for m, (v, _) in _LLMC.items())
        raise ValueError(f"{path} has magic {magic}, version {version} and {count} tokens, expected {known}")
    dtype = _LLMC[magic][1]
    _check_size(path, file, _LLMC_HEADER + count * dtype.itemsize, count)
    return Shard(_map(file, dtype, _LLMC_HEADER, count), None, None)


def _read_nanogpt(path: Path, file: BinaryIO) -> Shard:
    size = os.fstat(file.fileno()).st_size
    if size % 2:
        raise ValueError(f"{path} is damaged: {size} bytes are no whole number of uint16 ids")
    return Shard(_map(file, np.dtype("<u2"), 0, size // 2), None, None)


_READERS = {"gptcore": _read_gptcore, "llm.c": _read_llmc, "nanogpt": _read_nanogpt}


def _token_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _int32(data: bytes) -> int:
    return int.from_bytes(data[:4], "little", signed=True)


def _map(file: BinaryIO, dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray[Any, Any]:
    return np.memmap(file, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


def _digest(file: BinaryIO, fields: bytes) -> bytes:
    digest = hashlib.sha256(fields)
    file.seek(_HEADER)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def _check_size(path: Path, file: BinaryIO, expected: int, count: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise ValueError(f"{path} is damaged: {size} bytes instead of {expected}, as its header says {count} tokens")


def _check_ids(ids: np.ndarray[Any, Any], vocab_size: int, where: str) -> None:
    for start in range(0, len(ids), 1 << 24):  # so that a check of a mapped file takes no more memory than this
        part = ids[start : start + (1 << 24)]
        if part.max() >= vocab_size or part.min() < 0:
            at = start + int(((part >= vocab_size) | (part < 0)).argmax())
            raise ValueError(f"{where}: token {at} is {ids[at]}, outside the vocabulary of {vocab_size}")
