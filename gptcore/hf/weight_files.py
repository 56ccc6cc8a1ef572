"""Open the files that hold a model's weights: safetensors, one file or shards, torch.save's, and TensorFlow's.

Each is a file with `path`; `entries`, the dtype and shape of each tensor by name; `read`, `rows` and `copy_to` as those
of `TensorFile`; and `close`. None is memory-mapped: a file that shrinks under a map ends the process.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gptcore.files import open_file, read_json
from gptcore.tensor_file import Entry, TensorFile

# In this order of preference. The Hub is asked for the first kind, and for the second only where there is none.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> list[Path]:
    """Return the file or files that hold the weights of a folder; empty if it has no weights.

    A link that leads nowhere counts as a file: opening it says what is wrong.
    """
    for whole, index in (SAFETENSORS, PICKLES):
        if os.path.lexists(folder / whole):
            return [folder / whole]
        if os.path.lexists(folder / index):
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
                raise ValueError(f"{folder / index} should hold a weight_map from names of tensors to names of files")
            names = sorted(set(shards.values()))
            if outside := [name for name in names if Path(name).name != name or not name.isprintable()]:
                raise ValueError(f"{folder / index} names {outside[0]!r}, which is not a file beside it")
            if absent := [name for name in names if not os.path.lexists(folder / name)]:
                raise FileNotFoundError(
                    f"{folder} has no {absent[0]}, which {index} names; {len(absent)} files are missing"
                )
            return [folder / name for name in names]
    indices = [
        path
        for path in sorted(folder.glob("*.index"), key=lambda path: path.stem)
        if (folder / "hparams.json").is_file()
    ]
    if len(indices) > 1:
        raise ValueError(
            f"{folder} holds {len(indices)} checkpoints: {', '.join(path.stem for path in indices)}; keep one"
        )
    return indices


def open_weights(path: Path) -> TensorFile | PickleFile | TensorFlowFile:
    """Open one of `weight_files`. Raises OSError, or ValueError, naming the file, if it is damaged."""
    if path.suffix == ".index":
        return TensorFlowFile(path)
    return PickleFile(path) if path.suffix == ".bin" else TensorFile(path)


_NOT_READ = "it is not read further, as a pickle can run programs. Use a copy in safetensors"
_TENSORS_NEED = r"(torch|collections)[\w.]{,60} \w{1,60}"  # module and name
_LEGACY_PICKLES = 5  # in a file of torch.save before PyTorch 1.6: magic number, version, machine, tensors, storages


class PickleFile:
    """A file of torch.save, read by torch.load with weights_only: anything but tensors by name is refused.

    All of it is in memory once opened. `read` hands a tensor out without a copy where it can, and can do so once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as file:
            _refuse_programs(path, file)
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                # Damage raises errors of any type. PyTorch's texts advise weights_only=False, and are not repeated.
                asked = re.search(r"GLOBAL ([\w.]+)", str(error))
                reason = f"holds more than tensors: it asks for {asked[1]}" if asked else "is cut off or damaged"
                raise ValueError(f"{path} {reason}; {_NOT_READ}") from error
        if not isinstance(state, dict) or not all(isinstance(key, str) and key.isprintable() for key in state):
            raise ValueError(f"{path} should hold a dict of tensors by name")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{path} should hold tensors by name, but {name} is a {type(tensor).__name__}")
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                kind = "on the meta device" if tensor.is_meta else f"quantized or of layout {tensor.layout}"
                raise ValueError(f"{path}: {name} is {kind}; gptcore reads plain dense tensors")
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in state.items()}
        self._storages: set[int] = set()  # of tensors that were handed out
        self.entries = {name: Entry(t.dtype, tuple(t.shape), 0) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        tensor = self._tensors.pop(name)
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and not tensor.is_neg()
        if not whole or storage.data_ptr() in self._storages:  # it shares memory with another tensor, or may do so
            return tensor.resolve_neg().clone(memory_format=torch.contiguous_format)
        self._storages.add(storage.data_ptr())
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name][start:stop]

    def copy_to(self, name: str, target: Tensor) -> None:
        target.copy_(self._tensors.pop(name))

    def close(self) -> None:
        self._tensors.clear()


def _refuse_programs(path: Path, file: BinaryIO) -> None:
    """Raise ValueError for pickles that name anything outside of torch, and for zip files that unpack to more.

    torch.load would refuse most of these, but takes quadratic time to say so, and unpacks before it looks.
    """
    try:
        if file.read(4) == b"PK\3\4":
            archive, size = zipfile.ZipFile(file), os.fstat(file.fileno()).st_size
            parts = archive.infolist()
            if (
                any(part.compress_type != zipfile.ZIP_STORED for part in parts)
                or sum(p.file_size for p in parts) > size
            ):
                raise ValueError(f"{path} is a compressed zip file, which torch.save never writes; it is not read")
            names = [part.filename for part in parts if part.filename.endswith(".pkl")]
            pickles: list[BinaryIO] = [io.BytesIO(archive.read(name)) for name in names]
        else:
            file.seek(0)
            pickles = [file] * _LEGACY_PICKLES
        for opened in pickles:
            for opcode, argument, _ in pickletools.genops(opened):
                if opcode.name in ("GLOBAL", "INST") and not re.fullmatch(_TENSORS_NEED, str(argument)):
                    wanted = str(argument).replace(" ", ".")
                    raise ValueError(f"{path} holds more than tensors: it asks for {wanted!r:.60}; {_NOT_READ}")
    except Exception as error:  # zipfile and pickletools raise errors of many types for damaged files
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is cut off or damaged; {_NOT_READ}") from error
    file.seek(0)


class TensorFlowFile:
    """The variables of OpenAI's GPT-2 under transformers' names: model/h0/attn/c_attn/w is h.0.attn.c_attn.weight."""

    def __init__(self, path: Path) -> None:
        self.path, prefix = path, path.with_suffix("")
        try:
            import tensorflow  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ImportError as error:
            raise ImportError(
                f'{prefix} is a TensorFlow checkpoint; reading it needs: pip install "gptcore[tf]"'
            ) from error
        try:
            self._reader = tensorflow.train.load_checkpoint(str(prefix))
            dtypes, shapes = self._reader.get_variable_to_dtype_map(), self._reader.get_variable_to_shape_map()
            self._names = {_transformers_name(name): name for name in shapes}
            self.entries = {
                ours: _tensorflow_entry(shapes[name], dtypes[name].as_numpy_dtype) for ours, name in self._names.items()
            }
        except Exception as error:  # TensorFlow raises errors of many types for damaged files
            raise ValueError(f"{prefix} is not a whole TensorFlow checkpoint: {error}") from error

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self._reader.get_tensor(self._names[name])).view(self.entries[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def copy_to(self, name: str, target: Tensor) -> None:
        target.copy_(self.read(name))

    def close(self) -> None:
        pass


def _transformers_name(variable: str) -> str:
    kinds = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    *path, kind = re.sub(r"^h(\d+)/", r"h/\1/", variable.removeprefix("model/")).split("/")
    return ".".join([*path, kinds.get(kind, kind)])


def _tensorflow_entry(shape: Iterable[int], dtype: Any) -> Entry:
    shape = tuple(shape)
    plain = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape  # a convolution of width 1
    return Entry(torch.from_numpy(np.empty(0, dtype)).dtype, plain, 0)
