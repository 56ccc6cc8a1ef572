"""Read and write files of token ids: our own format, which carries a SHA-256, and those of nanoGPT and llm.c.

    gptcore  header and body as below; the cache of TextDataset is such a file
    llm.c    256 int32: magic 20240520, version 1, number of tokens; then uint16 ids, GPT-2's. With magic 20240801 and
             version 7 the ids are uint32
    nanogpt  uint16 ids and nothing else (train.bin). Any file could be one, so this format is never guessed

Our own, in little endian:

    magic "GPTCTOK\\0", u32 version, u32 bytes a token, u64 vocab_size, u64 tokens, u64 documents,
        32 bytes the tokenizer's fingerprint, 32 bytes the SHA-256 of the source, or zeros (not in version 2),
        32 bytes SHA-256 of all that is before and after it
    tokens: u16 or u32 each, zeros up to a multiple of 8 bytes
    document starts: u64 each, as positions among the tokens

A shard is read with pread and not through a memory map: a map needs a descriptor of its own, and a file that shrinks
under a map kills the process (SIGBUS). Each read compares CRC-32 checksums of 4 KiB blocks taken when the file was
opened, so that a later change of the file raises an error.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcore.files import PathLike, atomic_file, open_file

_MAGIC, _VERSION = b"GPTCTOK\0", 3
_FIELDS = struct.Struct("<8sIIQQQ32s")  # magic, version, bytes a token, vocab_size, tokens, documents, fingerprint
_HEADERS = {2: _FIELDS.size + 32, 3: _FIELDS.size + 64}  # bytes, by version
_HEADER = _HEADERS[_VERSION]
_LLMC: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}  # magic: version and type of a token
_LLMC_HEADER = 256 * 4
_BLOCK = 1 << 12  # bytes under one checksum
_CHUNK = 1 << 20  # bytes read at once


@dataclass(eq=False)
class Shard:
    """One file of tokens, checked when it was opened, read a part at a time.

    A pickled shard is its path and checksums: the receiving process reads the file itself.
    """

    path: Path  # absolute
    offset: int  # of the first token in the file
    dtype: np.dtype[Any]  # of a token in the file: uint16 or uint32
    length: int  # in tokens
    documents: int | None  # number of documents; None if the file does not say where they start
    fingerprint: str | None  # of the tokenizer; None if the file has none
    size: int  # of the file, in bytes
    sha256: str = ""  # of the file; for our own format the one in its header
    source: str | None = None  # SHA-256 of what the tokens were made of; None if the file has none
    checksums: np.ndarray[Any, np.dtype[np.uint32]] | None = None  # CRC-32 of each 4 KiB behind the header

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return the ids of tokens start to stop. Raises ValueError if the file was changed since it was opened."""
        return np.frombuffer(self._bytes(start * self.dtype.itemsize, stop * self.dtype.itemsize), self.dtype)

    @functools.cached_property
    def document_starts(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Return the positions of documents in the tokens, (documents,), or None."""
        if self.documents is None:
            return None
        first, last = self.size - self.offset - 8 * self.documents, self.size - self.offset
        parts = [self._bytes(at, min(at + _CHUNK, last)) for at in range(first, last, _CHUNK)]
        return np.frombuffer(b"".join(parts), "<u8").astype(np.int64)

    @functools.cached_property
    def tokens(self) -> np.ndarray[Any, Any]:
        """Return all ids (length,) as a memory map, which detects no changes and crashes if the file shrinks."""
        if not self.length:
            return np.empty(0, self.dtype)
        with self._opened() as file:
            return np.memmap(file, self.dtype, "r", self.offset, (self.length,))

    def keep_open(self) -> None:
        """Hold a descriptor, which saves opening the file for each read and outlives its deletion."""
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def _opened(self) -> FileIO:
        descriptor = self.__dict__.get("_descriptor")
        return FileIO(self.path) if descriptor is None else FileIO(descriptor, closefd=False)

    def _bytes(self, start: int, stop: int) -> bytes:
        """Return bytes start to stop behind the header, after verifying the checksums of their blocks."""
        assert self.checksums is not None
        block = start // _BLOCK
        first, last = block * _BLOCK, min(-(-stop // _BLOCK) * _BLOCK, self.size - self.offset)
        with self._opened() as file:
            data = os.pread(file.fileno(), last - first, self.offset + first)
        found = list(_checksums(data))
        if len(data) < last - first or found != self.checksums[block : block + len(found)].tolist():
            raise ValueError(f"{self.path} was changed since it was opened: open the dataset again")
        return data[start - first : stop - first]

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in self.__dataclass_fields__}


def write_shard(
    path: PathLike,
    chunks: Iterable[Sequence[int] | np.ndarray[Any, Any] | None],
    *,
    vocab_size: int,
    fingerprint: str,
    source: str | None = None,
) -> None:
    """Write the ids of documents, in a file that is whole or absent.

    chunks: ids, as many at a time as you like, and None at the end of each document, as Tokenizer.encode_stream gives
        them; what ends a text for the model, such as an end-of-text id, is the caller's to add.
    vocab_size, fingerprint: the tokenizer's.
    source: SHA-256 of the texts that the tokens were made of.

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
            if (bad := _outside(ids, vocab_size)) is not None:
                where = f"the tokens for {path}, from number {count} on"
                raise ValueError(f"{where}: token {bad} is {ids[bad]}, outside the vocabulary of {vocab_size}")
            out.write(ids.astype(dtype).tobytes())
            count += len(ids)
        if start < count:
            starts.append(start)  # the last document may lack its None
        out.write(bytes(-count * dtype.itemsize % 8))
        out.write(np.asarray(starts, "<u8").tobytes())
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, dtype.itemsize, vocab_size, count, len(starts), bytes.fromhex(fingerprint)
        ) + bytes.fromhex(source or "00" * 32)
        out.flush()
        digest = hashlib.sha256(fields)
        for block in _chunks(out, _HEADER):
            digest.update(block)
        out.seek(0)
        out.write(fields + digest.digest())


def read_shard(path: PathLike, *, vocab_size: int, format: str | None = None, fingerprint: str | None = None) -> Shard:
    """Open a file of tokens and check all of it.

    Args:
        vocab_size: ids are below it.
        format: "gptcore", "llm.c" or "nanogpt"; None tells ours and llm.c's by their first bytes.
        fingerprint: the tokenizer's that the file must have been made with; of our own format only.

    Raises OSError, or ValueError, with the numbers, for a file that is damaged, cut off, of another format or
    another tokenizer, or that has an id outside the vocabulary.
    """
    path = Path(path)
    with open_file(path) as file:  # one handle: the file may be replaced under its name meanwhile
        beginning = file.read(8)
        if format is None:
            format = "gptcore" if beginning == _MAGIC else "llm.c" if _int32(beginning) in _LLMC else None
        if format is None:
            raise ValueError(
                f"{path} begins with {beginning.hex(' ') or 'nothing'}, which is not a header of gptcore or llm.c; "
                "format='nanogpt' reads a file of uint16 ids alone"
            )
        if format not in _READERS:
            raise ValueError(f"there is no format {format!r}, only {', '.join(_READERS)}")
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        shard, hashed, expected = _READERS[format](path, file, size)
        digest, checksums, at, outside = hashlib.sha256(hashed), array("I"), 0, None
        for block in _chunks(file, shard.offset):
            digest.update(block)
            checksums.extend(_checksums(block))
            inside = min(len(block) // shard.dtype.itemsize, len(shard) - at)
            ids = np.frombuffer(block, shard.dtype, max(0, inside))
            if outside is None and (bad := _outside(ids, vocab_size)) is not None:
                outside = f"token {at + bad} is {ids[bad]}, outside the vocabulary of {vocab_size}"
            at += len(ids)
    if expected not in (None, digest.digest()):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    if fingerprint is not None and shard.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"{path} was made with a tokenizer of fingerprint {shard.fingerprint}, but this one has {fingerprint}"
        )
    if outside is not None:
        raise ValueError(f"{path}: {outside}")
    shard.sha256, shard.checksums = digest.hexdigest(), np.asarray(checksums, np.uint32)
    starts = shard.document_starts
    if starts is not None and ((np.diff(starts, prepend=0) < 0).any() or (starts > len(shard)).any()):
        raise ValueError(f"{path} is damaged: its documents do not start in order among its {len(shard)} tokens")
    return shard


# A reader takes the path, the file and its size. It returns the shard, what of the header the SHA-256 is to cover, and
# the SHA-256 expected, None where the file has none.
_Read = tuple[Shard, bytes, bytes | None]


def _read_gptcore(path: Path, file: BinaryIO, size: int) -> _Read:
    magic, version, itemsize, vocab_size, count, documents, fingerprint = _FIELDS.unpack(
        _header(path, file, _FIELDS.size)
    )
    if magic != _MAGIC or version not in _HEADERS:
        raise ValueError(f"{path} is of format {magic!r} version {version}, expected {_MAGIC!r} version 2 or 3")
    file.seek(0)
    header = _header(path, file, length := _HEADERS[version])
    source = header[_FIELDS.size : -32]
    if itemsize not in (2, 4) or itemsize != _token_type(vocab_size).itemsize:
        raise ValueError(f"{path} is damaged: {itemsize} bytes a token for a vocabulary of {vocab_size}")
    padded = -(-count * itemsize // 8) * 8
    _check_size(path, size, length + padded + 8 * documents, count)
    dtype, found = np.dtype(f"<u{itemsize}"), source.hex() if any(source) else None
    shard = Shard(path.absolute(), length, dtype, count, documents, fingerprint.hex(), size, source=found)
    return shard, header[:-32], header[-32:]


def _read_llmc(path: Path, file: BinaryIO, size: int) -> _Read:
    header = _header(path, file, _LLMC_HEADER)
    magic, version, count = struct.unpack_from("<3i", header)
    if magic not in _LLMC or version != _LLMC[magic][0] or count < 0:
        known = " or ".join(f"magic {m} version {v}" for m, (v, _) in _LLMC.items())
        raise ValueError(f"{path} has magic {magic}, version {version} and {count} tokens, expected {known}")
    dtype = _LLMC[magic][1]
    _check_size(path, size, _LLMC_HEADER + count * dtype.itemsize, count)
    return Shard(path.absolute(), _LLMC_HEADER, dtype, count, None, None, size), header, None


def _read_nanogpt(path: Path, file: BinaryIO, size: int) -> _Read:
    if size % 2:
        raise ValueError(f"{path} is damaged: {size} bytes are not a whole number of uint16 ids")
    return Shard(path.absolute(), 0, np.dtype("<u2"), size // 2, None, None, size), b"", None


_READERS = {"gptcore": _read_gptcore, "llm.c": _read_llmc, "nanogpt": _read_nanogpt}


def _header(path: Path, file: BinaryIO, size: int) -> bytes:
    header = file.read(size)
    if len(header) < size:
        raise ValueError(f"{path} is damaged: {len(header)} bytes, but a header has {size}")
    return header


def _token_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _int32(data: bytes) -> int:
    return int.from_bytes(data[:4], "little", signed=True)


def _chunks(file: BinaryIO, start: int) -> Iterator[bytes]:
    file.seek(start)
    while block := file.read(_CHUNK):
        yield block


def _checksums(data: bytes) -> Iterator[int]:
    return (zlib.crc32(data[at : at + _BLOCK]) for at in range(0, len(data), _BLOCK))


def _check_size(path: Path, size: int, expected: int, count: int) -> None:
    if size != expected:
        raise ValueError(f"{path} is damaged: {size} bytes instead of {expected}, as its header says {count} tokens")


def _outside(ids: np.ndarray[Any, Any], vocab_size: int) -> int | None:
    """Return the index of the first id that is not in the vocabulary, or None."""
    if len(ids) == 0 or (ids.max() < vocab_size and ids.min() >= 0):
        return None
    return int(((ids >= vocab_size) | (ids < 0)).argmax())
