"""Safetensors files, written and read in parts.

A file is never memory-mapped: one that is truncated or overwritten while it is read raises ValueError, where a mapped
one ends the process with SIGBUS. Only a change that leaves size and modification time as they were passes unnoticed.
Neither writing nor reading keeps a second copy of the tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from gptcore.files import PathLike, atomic_file, entry, naming, open_file, parse_json

Opened = TypeVar("Opened", bound="TensorFile")
CHUNK = 2 << 20  # bytes that are read or written at a time
HEADER_LIMIT = 100_000_000  # bytes, the format's own
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def save_tensors(
    path: PathLike,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    fetch: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors as safetensors, complete or not at all (OSError). Shared storage is written once for each name.

    fetch: returns the values of a tensor when they are written; those in `tensors` tell dtype and shape.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _CODES or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"{name} is {tensor.dtype}, {tensor.layout} on {tensor.device}; {path} cannot hold it")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as aside, open(aside, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            _write(file, tensor.detach() if fetch is None else fetch(name))


def _write(file: BinaryIO, tensor: Tensor) -> None:
    for start, stop in parts(tensor.shape, tensor.element_size()):
        part = tensor if tensor.dim() == 0 else tensor[start:stop]
        file.write(_bytes_of(part.to("cpu").resolve_conj().resolve_neg().contiguous()))


def load_tensors(path: PathLike) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by name. Raises OSError, or ValueError for a damaged file."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.entries}


class Entry(NamedTuple):
    """Where one tensor is in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in bytes, from the start of the file


class TensorFile:
    """The tensors of a safetensors file: `entries` by name, read whole or by rows; `metadata` are strings by name.

    Subclasses read other formats.

    Raises OSError where the file cannot be read, and ValueError, naming the file and the tensor, if it is damaged or
    changes while it is open.
    """

    format = "safetensors file"

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._file = open_file(path)
        try:
            self._version = self._stat()
            with naming(path, f"is not a whole {self.format}"):
                self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        dtype, shape, offset = self.entries[name]
        return self._fill(torch.empty(shape, dtype=dtype, device="cpu"), offset)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return tensor[start:stop] for 0 <= start <= stop <= rows."""
        dtype, shape, offset = self.entries[name]
        row = math.prod(shape[1:])
        part = torch.empty((stop - start, *shape[1:]), dtype=dtype, device="cpu")
        return self._fill(part, offset + start * row * dtype.itemsize)

    @torch.no_grad()
    def copy_to(self, name: str, target: Tensor) -> None:
        """Copy a tensor into one of the same shape, of any dtype, strides and device, a few rows at a time."""
        dtype, shape, _ = self.entries[name]
        if not shape:
            target.copy_(self.read(name))
            return
        for start, stop in parts(shape, dtype.itemsize):
            target[start:stop].copy_(self.rows(name, start, stop))

    def _read_header(self) -> dict[str, Entry]:
        size = self._version[1]
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > min(HEADER_LIMIT, size - 8):
            raise ValueError(f"its header should have {length:,} bytes, but the file has {size:,}")
        header = parse_json(self._file.read(length), self.path)
        metadata = header.pop("__metadata__", None) or {}
        self.metadata = {key: value for key, value in metadata.items() if isinstance(value, str)}
        entries, spans = {}, []
        for name, values in header.items():
            if not name.isprintable():  # an escape code would reach the terminal with the next error
                raise ValueError(f"{self.path} has a tensor with the name {name!r:.60}, which cannot be printed")
            where = f"{self.path}, tensor {name}"
            if not isinstance(values, dict):
                raise ValueError(f"{where} should be described by a JSON object, not {values!r:.60}")
            code, shape = entry(values, "dtype", str, where), entry(values, "shape", list[int], where)
            begin, end = entry(values, "data_offsets", list[int], where)
            if code not in _DTYPES:
                raise ValueError(f"{where} is of dtype {code!r:.60}, which gptcore does not read")
            needed = math.prod(shape) * _DTYPES[code].itemsize
            if min(shape, default=0) < 0 or begin < 0 or end - begin != needed:
                raise ValueError(f"{where} of shape {shape} and dtype {code} cannot be bytes {begin} to {end}")
            entries[name] = Entry(_DTYPES[code], tuple(shape), 8 + length + begin)
            spans.append((begin, end))
        spans.sort()
        ends = [0, *(end for _, end in spans)]
        if any(begin != end for (begin, _), end in zip(spans, ends, strict=False)) or 8 + length + ends[-1] != size:
            raise ValueError(f"the tensors do not fill its {size:,} bytes without gaps; it may be cut off")
        return entries

    def _fill(self, tensor: Tensor, offset: int) -> Tensor:
        buffer, done = memoryview(_bytes_of(tensor)), 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done : done + (1 << 30)]], offset + done)
            if count == 0:
                break
            done += count
        if done < len(buffer) or self._stat() != self._version:
            raise ValueError(f"{self.path} was changed while it was read; try again when nothing writes to it")
        return tensor

    def _stat(self) -> tuple[int, int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_ino, found.st_size, found.st_mtime_ns


def parts(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield row numbers (start, stop) that cut a tensor into parts of at most CHUNK bytes, or of one row."""
    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor on the CPU as an array of bytes."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()  # strides of length 1 may be any
