"""Model folders: what transformers, the Hugging Face Hub and OpenAI keep models in, read and written.

Written are config.json and model.safetensors, never a pickle. Read are these, model.safetensors.index.json with its
shards, pytorch_model.bin (tensors only: torch.load refuses all else) and OpenAI's TensorFlow checkpoints of GPT-2.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gptcore.config import GPTConfig
from gptcore.files import PathLike, atomic_file, read_json, write_json
from gptcore.hf.hub import find_folder
from gptcore.tensor_file import TensorFile, save_tensors

if TYPE_CHECKING:
    from gptcore.model import GPT

PREFIX = "transformer."  # before every name but lm_head.weight
TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")  # (in, out) on disk
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|position_ids")  # what old versions of transformers saved too
GPT1_NAMES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}  # and all others are GPT-2's
CHUNK = 2 << 20  # bytes of a file that are in memory beside the model while it is read

# In this order of preference. The Hub is asked for the first kind, and for the second only where there is none.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def save_pretrained(model: GPT, directory: PathLike) -> None:
    """Write config.json and model.safetensors, in the layout of transformers.

    A GPT-2 is then what GPT2LMHeadModel.from_pretrained opens as it is, a GPT-1 what OpenAIGPTLMHeadModel opens. For
    any other model, such as a GPT-3 with its banded attention, config.json says model_type "gptcore", which
    transformers refuses, and a warning says so. Each file is whole at any moment, and old files in the folder are
    replaced only when the new ones are on the disk. Raises ValueError, having written nothing, if a weight is not
    finite.
    """
    directory, config = Path(directory), model.config
    state = model.state_dict()
    _refuse("weights that are not finite", (name for name, tensor in state.items() if not tensor.isfinite().all()))
    if not (config.is_gpt1 or config.is_gpt2):
        warnings.warn(
            f"{directory} is saved as a model of gptcore's own: transformers has none that computes the same from "
            "these weights (banded attention, sinusoidal positions and some settings of a GPT-1 are not in it)",
            stacklevel=2,
        )
    on_disk = {}
    for name, (stored, transposed) in stored_as(model).items():
        on_disk[stored] = state[name].t() if transposed else state[name]
    with atomic_file(directory / "config.json") as aside:  # the weights are replaced inside, so just before it
        write_json(aside, config.to_dict())
        save_tensors(directory / "model.safetensors", on_disk)


def stored_as(model: GPT) -> dict[str, tuple[str, bool]]:
    """Return for each name in model.state_dict() the name in model.safetensors, and whether it is transposed there."""
    names = GPT1_NAMES if model.config.is_gpt1 else {}
    stored = {}
    for full_name in model.state_dict():
        name = full_name.replace("_orig_mod.", "")  # of a part that torch.compile wrapped
        prefix = "" if name.startswith("lm_head.") else PREFIX
        stored[full_name] = prefix + names.get(name, name), TRANSPOSED.fullmatch(name) is not None
    return stored


def from_pretrained(
    cls: type[GPT], /, name_or_path: PathLike, *, dtype: torch.dtype | None = None, **overrides: Any
) -> GPT:
    """A model that was saved by gptcore, by transformers (GPT-2 or GPT-1) or by OpenAI (GPT-2), in eval mode.

    name_or_path: a folder with config.json and weights in safetensors, one file or shards, or in pytorch_model.bin; a
        folder with OpenAI's TensorFlow checkpoint (needs tensorflow); or a name on the Hugging Face Hub, as "gpt2".
    dtype: of the weights; None keeps those of the file.
    overrides: settings to replace, as in GPT.from_pretrained("gpt2", attn_pdrop=0.0).

    Hardly more than the model is ever in memory: files are memory-mapped and read in small parts, or tensor by tensor.
    Raises FileNotFoundError, or ValueError naming the tensors that are missing, unexpected, of another shape or not
    finite, or the setting that this model does not have.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype should be a floating-point one, not {dtype}")
    folder = find_folder(name_or_path, ["config.json", *SAFETENSORS, "model-*.safetensors"])
    config = _config(folder, overrides)
    if folder != Path(name_or_path) and not _weight_files(folder):  # on the Hub, from before safetensors
        folder = find_folder(name_or_path, ["config.json", *PICKLES, "pytorch_model-*.bin"])
    with torch.device("meta"):  # no memory, and no draws from the random generator
        model = cls(config)
    model.load_state_dict(read_state_dict(model, folder, dtype), assign=True)
    return model.eval()


def load_config(name_or_path: PathLike, **overrides: Any) -> GPTConfig:
    """The config of a model folder, or of a name on the Hub, with some settings replaced."""
    return _config(find_folder(name_or_path, ["config.json"]), overrides)


def read_state_dict(model: GPT, folder: PathLike, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights in a folder under the model's own names and in its own orientation, checked against it."""
    folder = Path(folder)
    files = [_WeightFile(path) for path in _weight_files(folder)]
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS[0]} or {PICKLES[0]}, but {found}")
    where = files[0].path if len(files) == 1 else folder

    expected, sources, twice = model.state_dict(), {}, []
    our_names = {theirs: ours for ours, theirs in GPT1_NAMES.items()}
    for file in files:
        for on_disk in file.shapes:
            name = on_disk.removeprefix(PREFIX)
            name = our_names.get(name, name)
            if name in sources:
                twice.append(name)
            if not BUFFERS.fullmatch(name):
                sources[name] = file, on_disk
    head = sources.pop("lm_head.weight", None) if model.lm_head is None else None  # a copy of wte, in old files
    _refuse(f"{where}: weights that are there twice", twice)
    _refuse(f"{where}: missing weights", expected.keys() - sources.keys())
    _refuse(f"{where}: unexpected weights", sources.keys() - expected.keys())
    shapes = {name: file.shapes[on_disk] for name, (file, on_disk) in sources.items()}
    for name, shape in shapes.items():
        shapes[name] = shape[::-1] if TRANSPOSED.fullmatch(name) and len(shape) == 2 else shape
    _refuse(
        f"{where}: weights of another shape",
        (
            f"{name} {shape} instead of {tuple(expected[name].shape)}"
            for name, shape in shapes.items()
            if shape != tuple(expected[name].shape)
        ),
    )
    kinds = {name: file.rows(on_disk, 0, 0).dtype for name, (file, on_disk) in sources.items()}
    _refuse(
        f"{where}: weights that are not floating-point numbers",
        (f"{name} {kind}" for name, kind in kinds.items() if not kind.is_floating_point),
    )
    state, damaged = {}, []
    storages: set[int] = set()
    for name, (file, on_disk) in sources.items():
        kind, finite = dtype or kinds[name], True
        whole = None if file.mapped else file.take(on_disk)
        if whole is not None and whole.dtype == kind and not TRANSPOSED.fullmatch(name) and _is_alone(whole, storages):
            tensor = as_on_disk = whole
        else:
            tensor = torch.empty(shapes[name], dtype=kind)
            as_on_disk = tensor.t() if TRANSPOSED.fullmatch(name) else tensor
        for start, stop in file.parts(on_disk):
            part = as_on_disk[start:stop]
            if tensor is not whole:
                part.copy_(file.rows(on_disk, start, stop) if whole is None else whole[start:stop])
            finite = finite and bool(part.isfinite().all())
        state[name] = tensor
        if not finite:
            damaged.append(name)
        for other in files:
            if other is not file:
                other.close()
    _refuse(f"{where}: weights that are not finite" + (f" in {dtype}" if dtype else ""), damaged)
    if head is not None:
        file, on_disk = head
        wte = state["wte.weight"]
        same = file.shapes[on_disk] == tuple(wte.shape) and all(
            torch.equal(file.rows(on_disk, start, stop).to(wte.dtype), wte[start:stop])
            for start, stop in file.parts(on_disk)
        )
        if not same:
            raise ValueError(f"{where}: lm_head.weight differs from wte.weight, but tie_word_embeddings is true")
    return {name: state[name] for name in expected}


def _is_alone(tensor: Tensor, storages: set[int]) -> bool:
    """Whether a tensor is the whole of its memory, in order, and the first that has it; it is noted in `storages`."""
    storage = tensor.untyped_storage()
    if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
        return False
    storages.add(storage.data_ptr())
    return True


def _config(folder: Path, overrides: Mapping[str, Any]) -> GPTConfig:
    path, rename = folder / "config.json", {}
    if not path.is_file() and (folder / "hparams.json").is_file():  # OpenAI's own
        path, rename = folder / "hparams.json", {"n_vocab": "vocab_size"}
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no config.json, but {found}")
    try:
        values = {rename.get(key, key): value for key, value in read_json(path).items()}
        if "n_positions" in overrides:
            values.pop("n_ctx", None)
        return GPTConfig.from_dict({**values, **overrides})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


# ---- files of weights


def _weight_files(folder: Path) -> list[Path]:
    """The file or files that hold the weights of a folder; none where it has none."""
    for whole, index in (SAFETENSORS, PICKLES):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
                raise ValueError(f"{folder / index} should hold a weight_map from names of tensors to names of files")
            names = sorted(set(shards.values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{folder / index} names {outside[0]!r}, which is not a file beside it")
            if absent := [name for name in names if not (folder / name).is_file()]:
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


class _WeightFile:
    """A file of tensors, read a few rows at a time through a memory map.

    A page that has been looked at counts as memory of this process for as long as it is mapped. So after every CHUNK
    bytes the file is mapped anew. What cannot be mapped, TensorFlow's files and those of torch.save before PyTorch 1.6,
    comes as whole tensors, which become the model's own one by one where they can.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.mapped, self.seen = path, path.suffix == ".safetensors", 0
        if path.suffix == ".bin":
            self.mapped = zipfile.is_zipfile(path)  # torch.save has written such files since PyTorch 1.6
        self.version = self._version()
        self.reader: TensorFile | None = None
        self.entries = self._open()
        self.shapes = {
            name: tuple(entry.shape if isinstance(entry, Tensor) else entry.get_shape())
            for name, entry in self.entries.items()
        }

    def parts(self, name: str) -> Iterable[tuple[int, int]]:
        """Row numbers (start, stop) that cut a tensor into parts of at most CHUNK bytes, or one row."""
        rows, *rest = self.shapes[name]
        row_size = 8 * math.prod(rest)  # a number takes 8 bytes at most
        step = max(1, CHUNK // max(1, row_size))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.reader is None and self.mapped and self.seen > CHUNK:
            self.close()
        part: Tensor = self._opened()[name][start:stop]
        self.seen += part.nbytes
        return part

    def _opened(self) -> dict[str, Any]:
        if not self.entries:
            if self._version() != self.version:
                raise ValueError(f"{self.path} was changed while it was read; try again")
            self.entries = self._open()
        return self.entries

    def take(self, name: str) -> Tensor:
        """A whole tensor of a file that is not mapped, for which the file has no further use."""
        tensor: Tensor = self._opened().pop(name)[:]
        return tensor

    def close(self) -> None:
        """Let go of the file; it is opened again when more rows are asked for."""
        self.entries, self.seen = {}, 0
        if self.reader is not None:
            self.reader.close()

    def _version(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _open(self) -> dict[str, Any]:
        """What each name stands for: something with a shape, of which [start:stop] is a tensor."""
        if self.path.suffix == ".index":
            return _open_tensorflow(self.path.with_suffix(""))
        if self.path.suffix == ".bin":
            return self._open_pickle()
        self.reader = TensorFile(self.path)
        return {name: _Rows(self.reader, name) for name in self.reader.entries}

    def _open_pickle(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.path} holds more than tensors, or is damaged, and is not read: a pickle could run any "
                f"program ({str(error).strip().splitlines()[0]})"
            ) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{self.path} is not a whole file of torch.save: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError(f"{self.path} should hold a dict of tensors by name")
        return state


class _Rows:
    """A tensor of a safetensors file; [start:stop] reads these rows."""

    def __init__(self, file: TensorFile, name: str) -> None:
        self.file, self.name = file, name

    def get_shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def __getitem__(self, rows: slice) -> Tensor:
        return self.file.rows(self.name, rows.start, rows.stop)


class _TensorFlowVariable:
    """A variable of a TensorFlow checkpoint as a tensor on the disk: read, whole, when rows of it are asked for."""

    def __init__(self, reader: Any, name: str, shape: Iterable[int], kind: Any) -> None:
        self.reader, self.name, self.shape, self.kind = reader, name, tuple(shape), kind

    def get_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if len(self.shape) == 3 and self.shape[0] == 1 else self.shape  # a convolution of width 1

    def __getitem__(self, rows: slice) -> Tensor:
        if rows.stop == 0:
            return torch.from_numpy(np.empty(0, self.kind.as_numpy_dtype))
        return torch.from_numpy(self.reader.get_tensor(self.name)).view(self.get_shape())[rows]


def _open_tensorflow(prefix: Path) -> dict[str, Any]:
    """The variables of OpenAI's GPT-2 under transformers' names: model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight."""
    try:
        import tensorflow  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f'{prefix} is a TensorFlow checkpoint; reading it needs: pip install "gptcore[tf]"'
        ) from error
    reader = tensorflow.train.load_checkpoint(str(prefix))
    kinds = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    kinds_on_disk = reader.get_variable_to_dtype_map()
    entries = {}
    for name, shape in reader.get_variable_to_shape_map().items():
        *path, kind = re.sub(r"^h(\d+)/", r"h/\1/", name.removeprefix("model/")).split("/")
        entries[".".join([*path, kinds.get(kind, kind)])] = _TensorFlowVariable(
            reader, name, shape, kinds_on_disk[name]
        )
    return entries


def _refuse(what: str, names: Iterable[str]) -> None:
    """Raise ValueError with what is wrong and the first of the names, if there is any."""
    wrong = sorted(names)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{what}: {', '.join(wrong[:5])}{more}")
