"""Read GGUF files, versions 2 and 3, little-endian: the metadata, and tensors as `TensorFile` does.

Counts, lengths and offsets are compared with the size of the file before memory is allocated. The reader of the package
gguf maps the file into memory, checks no length, and takes seconds for a vocabulary.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch

from gptcore.files import PathLike
from gptcore.ops.quantized_linear import BLOCK, BYTES
from gptcore.tensor_file import HEADER_LIMIT, Entry, TensorFile

_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # by GGML's number of the type
_BLOCKS = {2: "q4_0", 8: "q8_0"}
_OTHERS = {3: "q4_1", 6: "q5_0", 7: "q5_1", 10: "q2_K", 11: "q3_K", 12: "q4_K", 13: "q5_K", 14: "q6_K"}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY, _UINT64 = 4, 8, 9, 10


def is_gguf(path: PathLike) -> bool:
    """Return whether this is the name of a GGUF file, which need not exist."""
    return Path(path).suffix == ".gguf" and not Path(path).is_dir()


class GGUFFile(TensorFile):
    """The tensors of a GGUF file, with shapes in PyTorch's order, and `metadata`.

    A tensor in blocks is uint8, (rows, bytes of a row); `kinds` has the kind of each. Raises as `TensorFile` does.
    """

    format = "GGUF file"

    def _read_header(self) -> dict[str, Entry]:
        self._size, self._at = self._version[1], 0
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        magic, version, tensors, values = struct.unpack("<4sIQQ", self._take(24))
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, expected b'GGUF'")
        if version not in (2, 3):
            raise ValueError(f"its version is {version:,}, expected 2 or 3, little-endian")
        for count, least, what in ((values, 13, "values"), (tensors, 32, "tensors")):  # the bytes of the shortest
            if count * least > self._size:
                raise ValueError(f"it should have {count:,} {what}, which do not fit into its {self._size:,} bytes")
        for _ in range(values):
            name = self._name("a value")
            if name in self.metadata:
                raise ValueError(f"its value {name} is there twice")
            self.metadata[name] = self._value(self._number(_UINT32), name)
        described = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"its general.alignment is {alignment!r:.60}, expected a power of 2 from 8 to 2**20")
        start = -(-self._at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, dtype, shape, offset in described:
            if name in entries:
                raise ValueError(f"its tensor {name} is there twice")
            entries[name] = Entry(dtype, shape, start + offset)
        end = start
        for name, (dtype, shape, offset) in sorted(entries.items(), key=lambda item: item[1].offset):
            if offset % alignment or offset < end:
                raise ValueError(
                    f"its tensor {name} begins at byte {offset:,}, expected a multiple of {alignment} from {end:,} on"
                )
            end = offset + math.prod(shape) * dtype.itemsize
            if end > self._size:
                raise ValueError(f"its tensor {name} ends at byte {end:,} of {self._size:,}; it may be cut off")
        return entries

    def _tensor(self) -> tuple[str, torch.dtype, tuple[int, ...], int]:
        """Return name, dtype, shape and offset of the next tensor."""
        name, dimensions = self._name("a tensor"), self._number(_UINT32)
        if not 1 <= dimensions <= 4:
            raise ValueError(f"its tensor {name} has {dimensions:,} dimensions, expected 1 to 4")
        shape = tuple(self._number(_UINT64) for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ValueError(f"its tensor {name} has shape {shape}, expected lengths from 1 on")
        number, offset = self._number(_UINT32), self._number(_UINT64)
        if number in _DTYPES:
            return name, _DTYPES[number], shape, offset
        if number not in _BLOCKS:
            raise ValueError(
                f"its tensor {name} is of type {_OTHERS.get(number, number)}, expected f32, f16, bf16, q8_0 or q4_0; "
                "`gptcore quantize` makes one of these from the original, as does llama-quantize --pure"
            )
        self.kinds[name] = kind = _BLOCKS[number]
        if len(shape) != 2 or shape[1] % BLOCK:
            raise ValueError(f"its tensor {name} is {kind} of shape {shape}, expected rows of a multiple of {BLOCK}")
        return name, torch.uint8, (shape[0], shape[1] // BLOCK * BYTES[kind]), offset

    def _value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(kind)
        kind, length = self._number(_UINT32), self._number(_UINT64)
        if kind == _STRING:
            if length * 8 > self._size:
                raise ValueError(f"its value {name} should have {length:,} strings, but it has {self._size:,} bytes")
            return [self._string() for _ in range(length)]
        code = self._code(kind)
        content = self._take(length * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{length}{code}", content))

    def _number(self, kind: int) -> Any:
        code = f"<{self._code(kind)}"
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"it has a value of type {kind:,}, expected one of {', '.join(map(str, _NUMBERS))}")
        return _NUMBERS[kind]

    def _name(self, what: str) -> str:
        name = self._string()
        if not name.isprintable() or len(name) > 200:  # an escape code would reach the terminal with the next error
            raise ValueError(f"{what} in it has the name {name!r:.60}, which cannot be printed")
        return name

    def _string(self) -> str:
        return self._take(self._number(_UINT64)).decode("utf-8")

    def _take(self, count: int) -> bytes:
        """Return the next bytes of the header."""
        if count > self._size - self._at:
            raise ValueError(f"it has {self._size:,} bytes, but should have {count:,} from byte {self._at:,}")
        self._at += count
        if self._at > HEADER_LIMIT:
            raise ValueError(f"its metadata take more than {HEADER_LIMIT:,} bytes")
        return self._file.read(count)
