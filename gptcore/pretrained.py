"""Model folders, as transformers writes and reads them: config.json and model.safetensors, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcore.config import GPTConfig
from gptcore.files import PathLike, atomic_file, load_tensors, read_json, save_tensors, write_json

if TYPE_CHECKING:
    from gptcore.model import GPT

PREFIX = "transformer."  # before every name but lm_head.weight
TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")  # (in, out) on disk
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old versions of transformers saved


def save_pretrained(model: GPT, directory: PathLike) -> None:
    """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel opens too if the model is a GPT-2.

    Each file is whole at any moment, and old files in the folder are replaced only when the new ones are on the disk.
    Raises ValueError, having written nothing, if a weight is not finite.
    """
    directory = Path(directory)
    state = model.state_dict()
    _refuse("weights that are not finite", (name for name, tensor in state.items() if not tensor.isfinite().all()))
    on_disk = {
        name if name.startswith("lm_head.") else PREFIX + name: tensor.t() if TRANSPOSED.fullmatch(name) else tensor
        for name, tensor in state.items()
    }
    with atomic_file(directory / "config.json") as config:  # the weights are replaced inside, so just before it
        write_json(config, model.config.to_dict())
        save_tensors(directory / "model.safetensors", on_disk)


def from_pretrained(cls: type[GPT], /, directory: PathLike, **overrides: Any) -> GPT:
    """The model in a folder that save_pretrained or transformers wrote, in eval mode, in the dtypes of the file.

    Overrides replace settings of config.json: GPT.from_pretrained(directory, attn_pdrop=0.0). Raises FileNotFoundError,
    or ValueError naming the tensors that are missing, unexpected, of another shape or not finite.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}; from_pretrained reads folders of this machine only")
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            found = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
            raise FileNotFoundError(f"{directory} has no {name}, but {found}; pickled weights are never read")
    try:
        config = GPTConfig.from_dict({**read_json(directory / "config.json"), **overrides})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{directory / 'config.json'}: {error}") from error
    with torch.device("meta"):  # no memory, and no draws from the random generator
        model = cls(config)
    model.load_state_dict(read_state_dict(model, directory), assign=True)
    return model.eval()


def read_state_dict(model: GPT, directory: PathLike) -> dict[str, Tensor]:
    """The weights in a folder under the model's own names and in its own orientation, checked against it."""
    path = Path(directory) / "model.safetensors"
    state = {}
    for name, tensor in load_tensors(path).items():
        name = name.removeprefix(PREFIX)
        if not BUFFERS.fullmatch(name):
            flip = TRANSPOSED.fullmatch(name) is not None and tensor.ndim == 2
            state[name] = tensor.t().contiguous() if flip else tensor
    head = state.pop("lm_head.weight", None) if model.lm_head is None else None
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):  # old files hold it under both names
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, but tie_word_embeddings is true")
    expected = model.state_dict()
    _refuse(f"{path}: missing weights", expected.keys() - state.keys())
    _refuse(f"{path}: unexpected weights", state.keys() - expected.keys())
    _refuse(
        f"{path}: weights of another shape",
        (
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in state.items()
            if tensor.shape != expected[name].shape
        ),
    )
    _refuse(
        f"{path}: weights that are not floating-point numbers",
        (f"{name} {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()),
    )
    _refuse(
        f"{path}: weights that are not finite",
        (name for name, tensor in state.items() if not tensor.isfinite().all()),
    )
    return state


def _refuse(what: str, names: Iterable[str]) -> None:
    """Raise ValueError with what is wrong and the first of the names, if there is any."""
    wrong = sorted(names)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{what}: {', '.join(wrong[:5])}{more}")
