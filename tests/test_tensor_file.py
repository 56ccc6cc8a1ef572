"""Safetensors files: the library's format byte for byte, read in parts, and damage named."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gptcore import tensor_file
from gptcore.tensor_file import TensorFile, load_tensors, save_tensors


def peak_growth(action: Callable[[], Any]) -> int:
    """Return by how many bytes the resident memory grew at most while `action` ran."""

    def kilobytes(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes("VmRSS")
    action()
    return (kilobytes("VmHWM") - before) << 10


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 4, generator=generator)
    return {
        "matrix": matrix, "transposed": matrix.t(), "slice": matrix[1:4, ::2], "scalar": torch.tensor(3.5),
        "expanded": torch.ones(1).expand(5), "empty": torch.empty(0, 3), "no rows": torch.empty(3, 0),
        "double": matrix.double(), "half": matrix.half(), "bfloat16": matrix.bfloat16(), "bool": matrix > 0,
        "int8": torch.arange(-3, 4, dtype=torch.int8), "uint8": torch.arange(7, dtype=torch.uint8),
        "int16": torch.arange(-3, 4, dtype=torch.int16), "int32": torch.arange(3, dtype=torch.int32),
        "int64": torch.tensor([2**62]), "float8": matrix.to(torch.float8_e4m3fn),
        "other float8": matrix.to(torch.float8_e5m2), "négative \N{SNOWMAN}": torch.view_as_complex(
            torch.randn(3, 2, generator=generator)).conj().imag, "complex": torch.tensor([1 + 2j]),
    }  # fmt: skip


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().clone()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = plain(a), plain(b)
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 16, 2 << 20])
def test_the_file_is_what_the_library_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", chunk)
    tensors = samples()
    save_tensors(tmp_path / "ours", tensors, {"key": "value"})
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    ours = load_tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(ours[name], tensor), name
        assert same(theirs[name], tensor), name
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", "key": "value"}
    one = {"one": tensors["matrix"]}
    save_tensors(tmp_path / "ours", one)
    safetensors.torch.save_file(one, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


def test_rows_and_targets_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", 40)
    tensors = samples()
    save_tensors(tmp_path / "x", tensors)
    with TensorFile(tmp_path / "x") as file:
        for name, tensor in tensors.items():
            if tensor.dim() and len(tensor):
                assert same(file.rows(name, 0, 0), tensor[:0])
                assert same(file.rows(name, 1, len(tensor)), tensor[1:])
            target = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            file.copy_to(name, target)
            assert same(target, tensor), name
        wide = torch.zeros(4, 6, dtype=torch.float64)
        file.copy_to("matrix", wide.t())
        assert torch.equal(wide.t(), tensors["matrix"].double())


def test_neither_writing_nor_reading_makes_a_copy(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((1 << 10, 1 << 12), float(i)) for i in range(4)}  # 64 MB
    target = torch.ones(1 << 12, 1 << 10)

    def read() -> None:
        with TensorFile(tmp_path / "x") as file:
            for name in tensors:
                file.copy_to(name, target.t())

    assert peak_growth(lambda: save_tensors(tmp_path / "x", {**tensors, "t": tensors["1"].t()})) < 24 << 20
    assert peak_growth(read) < 24 << 20
    assert (target == 3).all()


@pytest.mark.parametrize(
    "tensor", [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128)]
)
def test_what_the_format_does_not_have_is_refused_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"odd is torch\.\w+.*/x cannot hold it"):
        save_tensors(tmp_path / "x", {"odd": tensor})
    assert os.listdir(tmp_path) == []


def with_header(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


DAMAGE: dict[str, bytes] = {
    "empty": b"", "short": b"1234567", "a huge length": with_header(tensor(), length=2**63),
    "a length beyond": with_header(tensor(), length=10_000), "no JSON": with_header(b"{"),
    "nested": with_header(b'{"a":' * 50_000), "not UTF-8": with_header(b"\xff"), "a list": with_header([]),
    "a tensor as list": with_header({"a": []}), "a tensor as null": with_header({"a": None}),
    "no dtype": with_header({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "no shape": with_header(tensor(shape=None)),
    "unknown dtype": with_header(tensor(dtype="F4")), "dtype as list": with_header(tensor(dtype=[])),
    "negative shape": with_header(tensor(shape=[-4])), "two negatives": with_header(tensor(shape=[-2, -2])),
    "shape of text": with_header(tensor(shape=["4"])), "shape of booleans": with_header(tensor(shape=[True, 4])),
    "shape too large": with_header(tensor(shape=[2**62, 2**62])), "infinite": with_header(b'{"a": Infinity}'),
    "one offset": with_header(tensor(data_offsets=[0])), "three offsets": with_header(tensor(data_offsets=[0, 16, 16])),
    "negative offset": with_header(tensor(data_offsets=[-16, 0])),
    "reversed": with_header(tensor(data_offsets=[16, 0])),
    "beyond the end": with_header(tensor(data_offsets=[16, 32])), "too little data": with_header(tensor(), b"\0" * 15),
    "too much data": with_header(tensor(), b"\0" * 17),
    "overlap": with_header({**tensor(), "b": tensor()["a"]}),
    "gap": with_header({**tensor(), "b": tensor(data_offsets=[24, 40])["a"]}, b"\0" * 40),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(DAMAGE[kind])
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        TensorFile(tmp_path / "x.safetensors")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load_file(tmp_path / "x.safetensors")


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 39))
    os.truncate(tmp_path / "x", 1 << 40)
    with pytest.raises(ValueError, match="its header should have 549,755,813,888 bytes"):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize("change", ["cut", "overwritten", "appended"])
def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path, change: str) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(1000), "b": torch.ones(1000)})
    with TensorFile(tmp_path / "x") as file:
        assert file.read("a").sum() == 0
        os.utime(tmp_path / "x", ns=(0, 0))  # a clock that is coarse must not hide the change
        file._version = file._stat()
        if change == "cut":
            os.truncate(tmp_path / "x", 1000)
        else:
            with open(tmp_path / "x", "r+b") as other:
                other.seek(-4 if change == "overwritten" else 0, os.SEEK_END)
                other.write(b"1234")
        with pytest.raises(ValueError, match=r"/x was changed while it was read"):
            file.read("b")


def test_a_file_replaced_while_it_is_open_is_read_as_it_was(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(10)})
    with TensorFile(tmp_path / "x") as file:
        save_tensors(tmp_path / "x", {"a": torch.ones(10)})
        assert file.read("a").sum() == 0
