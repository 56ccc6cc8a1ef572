"""Read and write model folders in the layouts of transformers, the Hugging Face Hub and OpenAI.

Written are config.json and model.safetensors, never a pickle. Read are these, model.safetensors.index.json with its
shards, pytorch_model.bin (tensors only: torch.load refuses all else), OpenAI's TensorFlow checkpoints of GPT-2, and
GGUF files (docs/gguf.md).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptcore import precision
from gptcore.config import GPTConfig
from gptcore.files import PathLike, atomic_file, naming, read_json, write_json
from gptcore.hf.gguf_file import is_gguf
from gptcore.hf.gguf_weights import GGUFWeights
from gptcore.hf.hub import find_folder
from gptcore.hf.weight_files import (
    PICKLES,
    SAFETENSORS,
    PickleFile,
    TensorFlowFile,
    open_weights,
    weight_files,
)
from gptcore.inputs import check_one_dtype
from gptcore.lora.adapters import base_state, without_adapters
from gptcore.quantized import kinds_of, quantize_modules
from gptcore.tensor_file import TensorFile, parts, save_tensors

if TYPE_CHECKING:
    from gptcore.heads import TaskModel
    from gptcore.model import GPT

    Model = TypeVar("Model", bound=GPT | TaskModel)
WeightFile = TensorFile | PickleFile | TensorFlowFile
PREFIX = "transformer."  # before every name but lm_head.weight
TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")  # (in, out) on disk
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|position_ids")  # saved by old versions of transformers
GPT1_NAMES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}  # and all others are GPT-2's
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights


def save_pretrained(model: GPT | TaskModel, directory: PathLike) -> None:
    """Write config.json and model.safetensors, in the layout of transformers.

    A GPT-2 is then what GPT2LMHeadModel.from_pretrained opens as it is, a GPT-1 what OpenAIGPTLMHeadModel opens. For
    any other model, such as a GPT-3 with its local attention, config.json says model_type "gptcore", which
    transformers refuses, and a warning says so. Each file is whole at any moment, and old files in the folder are
    replaced only when the new ones are on the disk. Raises ValueError, having written nothing, if a weight is not
    finite, has another dtype than most, or is quantized, or if an adapter is in use and not merged.
    """
    directory, config = Path(directory), model.config
    if kinds := kinds_of(model):
        raise ValueError(
            f"the weights are in {', '.join(sorted(set(kinds.values())))}, which only a GGUF file holds: use "
            "export_gguf, or load the model with a dtype such as torch.float32"
        )
    state, layout = base_state(model), stored_as(model)
    _refuse("weights that are not finite", (name for name, tensor in state.items() if not tensor.isfinite().all()))
    check_one_dtype(state)
    if not (config.is_gpt1 or config.is_gpt2):
        warnings.warn(
            f"{directory} is saved as a model of gptcore's own: transformers has no model that computes the same from "
            "these weights (local attention, sinusoidal positions and some settings of a GPT-1 are not in it)",
            stacklevel=2,
        )
    on_disk = {layout[name][0]: tensor.t() if layout[name][1] else tensor for name, tensor in state.items()}
    with atomic_file(directory / "config.json") as aside:  # the weights are replaced inside, so just before it
        write_json(aside, {**config.to_dict(), **_task_config(model)})
        save_tensors(directory / "model.safetensors", on_disk)


def stored_as(model: GPT | TaskModel) -> dict[str, tuple[str, bool]]:
    """Return for each name in model.state_dict() the name in model.safetensors, and whether it is transposed there."""
    names, heads = GPT1_NAMES if model.config.is_gpt1 else {}, _head(model)
    stored = {}
    for full_name in model.state_dict():
        name = full_name.replace("_orig_mod.", "").removeprefix(PREFIX)  # of a part that torch.compile wrapped
        prefix = "" if name.startswith("lm_head.") or name in heads else PREFIX
        stored[full_name] = prefix + names.get(name, name), TRANSPOSED.fullmatch(name) is not None
    return stored


def _task_config(model: GPT | TaskModel) -> dict[str, Any]:
    """Return what a model with a head for a task adds to config.json."""
    return model.task_config() if hasattr(model, "task_config") else {}  # type: ignore[operator]


def _head(model: GPT | TaskModel) -> set[str]:
    """Return the names of the weights of a head for a task."""
    if not hasattr(model, "task_config"):
        return set()
    return {name.replace("_orig_mod.", "") for name in model.state_dict() if not name.startswith(PREFIX)}


def from_pretrained(
    cls: type[GPT], /, name_or_path: PathLike, *, dtype: torch.dtype | None = None, **overrides: Any
) -> GPT:
    """Return a model that was saved by gptcore, by transformers (GPT-2 or GPT-1) or by OpenAI (GPT-2), in eval mode.

    name_or_path: a folder with config.json and weights in safetensors, one file or shards, or in pytorch_model.bin; a
        folder with OpenAI's TensorFlow checkpoint (needs tensorflow); a file NAME.gguf of a GPT-2, by gptcore or
        llama.cpp, in f32, f16, bf16, q8_0 or q4_0; or a name on the Hugging Face Hub, as "gpt2".
    dtype: of the weights; None keeps that of the file. Weights in q8_0 and q4_0 then stay quantized, and all parameters
        are frozen; with a dtype they are decoded to ordinary weights.
    overrides: settings to replace, as in GPT.from_pretrained("gpt2", attn_pdrop=0.0).

    Hardly more than the model is ever in memory: files are read tensor by tensor.
    Raises FileNotFoundError, or ValueError naming the tensors that are missing, unexpected, of another shape or not
    finite, or the setting that this model does not have.
    """
    return load(cls, name_or_path, dtype, overrides)


def load(
    make: Callable[[GPTConfig], Model], name_or_path: PathLike, dtype: torch.dtype | None, overrides: Mapping[str, Any]
) -> Model:
    """Return what `make` builds, with the weights of a folder, as from_pretrained does.

    The weights of a head for a task that are not there, as in the folder of a language model, stay on the meta device.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype should be a floating-point one, not {dtype}")
    if is_gguf(name_or_path):
        file = GGUFWeights(name_or_path, in_blocks=dtype is None)
        try:
            return _build(make, file.config(overrides), file.path, [file], dtype or file.dtype)
        finally:
            file.close()
    folder = _find(name_or_path)
    return _build(make, _config(folder, overrides), folder, _open_weights(folder), dtype)


def _find(name_or_path: PathLike) -> Path:
    """Return the folder of a model, with its config and weights."""
    folder = find_folder(name_or_path, ["config.json", *SAFETENSORS, "model-*.safetensors"])
    if folder != Path(name_or_path) and not weight_files(folder):  # on the Hub, from before safetensors
        folder = find_folder(name_or_path, ["config.json", *PICKLES, "pytorch_model-*.bin"])
    return folder


def _build(
    make: Callable[[GPTConfig], Model],
    config: GPTConfig,
    where: Path,
    files: list[WeightFile],
    dtype: torch.dtype | None,
) -> Model:
    """Return the model with the weights in the files, in eval mode."""
    _check_layers(config, where, files)
    try:
        with torch.device("meta"), NoInitialization():  # no memory, and no draws from the random generator
            model = make(config)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: no tensor can have these sizes: {config}") from error
    known = {name.removeprefix(PREFIX): name for name in model.state_dict()}
    kinds = {known[name]: kind for file in files for name, kind in getattr(file, "kinds", {}).items() if name in known}
    quantize_modules(model, kinds)
    state = dict(_tensors(model, where, files, dtype, may_lack=_head(model)))
    model.load_state_dict(state, strict=False, assign=True)  # names were checked
    if not torch.cuda.is_available():  # where the model will compute is not known yet
        kind = next(iter(state.values())).dtype
        precision.warn_if_slow(kind, "cpu", "load the model with dtype=torch.float32")
    model.eval()
    return model


class NoInitialization(TorchFunctionMode):
    """Leave out torch.nn.init: on the meta device it does nothing, but imports torch._dynamo, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_config(name_or_path: PathLike, **overrides: Any) -> GPTConfig:
    """Return the config of a model folder, a GGUF file or a name on the Hub, with some settings replaced."""
    if is_gguf(name_or_path):
        with GGUFWeights(name_or_path, in_blocks=False) as file:
            return file.config(overrides)
    return _config(find_folder(name_or_path, ["config.json"]), overrides)


def read_config(name_or_path: PathLike) -> dict[str, Any]:
    """Return the contents of config.json in a model folder, or of a name on the Hub; of other files, nothing."""
    if is_gguf(name_or_path):
        return {}
    path = find_folder(name_or_path, ["config.json"]) / "config.json"
    return read_json(path) if os.path.lexists(path) else {}


def read_state_dict(model: GPT | TaskModel, folder: PathLike, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the weights in a folder under the model's own names and in its own orientation, checked against it."""
    return dict(_tensors(model, Path(folder), _open_weights(Path(folder)), dtype))


def read_tensors(model: GPT | TaskModel, name_or_path: PathLike, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder, or decoded those of a GGUF file, one by one, as read_state_dict returns them.

    The error about weights that are not finite comes last.
    """
    if is_gguf(name_or_path):
        file = GGUFWeights(name_or_path, in_blocks=False)
        yield from _tensors(model, file.path, [file], dtype)
    else:
        folder = _find(name_or_path)
        yield from _tensors(model, folder, _open_weights(folder), dtype)


def read_header(name_or_path: PathLike) -> tuple[GPTConfig, torch.dtype, list[str]]:
    """Return config and dtype of the model that from_pretrained returns, and the kinds of its quantized weights."""
    if is_gguf(name_or_path):
        with GGUFWeights(name_or_path, in_blocks=True) as file:
            return file.config({}), file.dtype, sorted(set(file.kinds.values()))
    folder, dtypes = _find(name_or_path), []
    for weights in _open_weights(folder):
        dtypes += [found.dtype for found in weights.entries.values()]
        weights.close()
    return _config(folder, {}), max(DTYPES, key=dtypes.count), []


def _open_weights(folder: Path) -> list[WeightFile]:
    files = [open_weights(path) for path in weight_files(folder)]
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS[0]} or {PICKLES[0]}, but {found}")
    return files


def _check_layers(config: GPTConfig, where: Path, files: list[WeightFile]) -> None:
    """Raise ValueError before a model is built that is far larger than the weights: each layer takes time."""
    count = sum(len(file.entries) for file in files)
    if config.n_layer > max(100, count):
        source, place = (where / "config.json", "beside") if where.is_dir() else (where, "in")
        raise ValueError(f"{source} has n_layer {config.n_layer}, but the weights {place} it are {count} tensors")


def _tensors(
    model: GPT | TaskModel,
    folder: Path,
    files: list[WeightFile],
    dtype: torch.dtype | None = None,
    may_lack: Set[str] = frozenset(),
) -> Iterator[tuple[str, Tensor]]:
    """Check the tensors of the files against the model, yield them under its names, and close the files.

    may_lack: names of weights that may be absent, all of them, or none.
    """
    where = files[0].path if len(files) == 1 else folder
    state = without_adapters(model)
    own_names = {name.removeprefix(PREFIX): name for name in state}
    expected = {name: state[own] for name, own in own_names.items()}
    sources: dict[str, tuple[WeightFile, str]] = {}
    twice = []
    our_names = {theirs: ours for ours, theirs in GPT1_NAMES.items()}
    for file in files:
        for on_disk in file.entries:
            name = on_disk.removeprefix(PREFIX)
            name = our_names.get(name, name)
            if name in sources:
                twice.append(name)
            if not BUFFERS.fullmatch(name):
                sources[name] = file, on_disk
    # Without a projection of its own in the model it is a copy of wte, in old files, or not used by a head for a task.
    head = None if "lm_head.weight" in expected else sources.pop("lm_head.weight", None)
    if head is not None and "wte.weight" not in sources:  # some models of transformers write the copy alone
        sources["wte.weight"], head = head, None
    if may_lack and not may_lack & sources.keys():
        expected = {name: tensor for name, tensor in expected.items() if name not in may_lack}
    _refuse(f"{where}: weights that are there twice", twice)
    _refuse(f"{where}: missing weights", expected.keys() - sources.keys())
    _refuse(f"{where}: unexpected weights", sources.keys() - expected.keys())
    shapes = {name: file.entries[on_disk].shape for name, (file, on_disk) in sources.items()}
    transposed = [
        name for name, (file, _) in sources.items() if TRANSPOSED.fullmatch(name) and not isinstance(file, GGUFWeights)
    ]
    for name in transposed:
        shapes[name] = shapes[name][::-1] if len(shapes[name]) == 2 else shapes[name]
    _refuse(
        f"{where}: weights of another shape",
        (
            f"{name} {shape} instead of {tuple(expected[name].shape)}"
            for name, shape in shapes.items()
            if shape != tuple(expected[name].shape)
        ),
    )
    quantized = {name.removeprefix(PREFIX) for name in kinds_of(model)}  # stay as they are
    dtypes = {name: file.entries[on_disk].dtype for name, (file, on_disk) in sources.items() if name not in quantized}
    _refuse(
        f"{where}: weights that are not floating-point numbers of 16, 32 or 64 bits",
        (f"{name} {found}" for name, found in dtypes.items() if found not in DTYPES),
    )
    kind = dtype or max(DTYPES, key=list(dtypes.values()).count)
    _refuse(
        f"{where}: weights that are not {kind} as most are (dtype={kind} converts them)",
        (f"{name} {found}" for name, found in dtypes.items() if dtype is None and found != kind),
    )
    damaged, differs = [], False
    for name, (file, on_disk) in sources.items():
        if name in quantized or (dtypes[name] == kind and name not in transposed):
            tensor = file.read(on_disk)
        else:
            tensor = torch.empty(shapes[name], dtype=kind)
            file.copy_to(on_disk, tensor.t() if name in transposed else tensor)
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN is a bound of what it is in
            damaged.append(name)
        if name == "wte.weight" and head is not None and not hasattr(model, "task_config"):
            copy, there = head
            stored, shape, _ = copy.entries[there]
            differs = shape != tuple(tensor.shape) or not all(
                torch.equal(copy.rows(there, start, stop).to(tensor.dtype), tensor[start:stop])
                for start, stop in parts(shape, stored.itemsize)
            )
        yield own_names[name], tensor
    _refuse(f"{where}: weights that are not finite" + (f" in {dtype}" if dtype else ""), damaged)
    if differs:
        raise ValueError(f"{where}: lm_head.weight differs from wte.weight, but tie_word_embeddings is true")
    for file in files:
        file.close()


def _config(folder: Path, overrides: Mapping[str, Any]) -> GPTConfig:
    path, rename = folder / "config.json", {}
    if not os.path.lexists(path) and (folder / "hparams.json").is_file():  # OpenAI's own
        path, rename = folder / "hparams.json", {"n_vocab": "vocab_size"}
    if not os.path.lexists(path):
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no config.json, but {found}")
    with naming(path, "cannot be used"):
        values = {rename.get(key, key): value for key, value in read_json(path).items()}
        if "n_positions" in overrides:
            values.pop("n_ctx", None)
        return GPTConfig.from_dict({**values, **overrides})


def _refuse(what: str, names: Iterable[str]) -> None:
    """Raise ValueError with what is wrong and the first of the names, if there is any."""
    wrong = sorted(names)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{what}: {', '.join(wrong[:5])}{more}")
