"""Files of weights: shards, pickles and TensorFlow's, read without a second copy, and refused by name."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained import IDS, SMALL, rewrite
from torch import Tensor
from torch.autograd.profiler import profile

from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.tensor_file import TensorFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GPT(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- shards, and pickles that hold nothing but tensors


def shard(folder: Path, suffix: str = ".safetensors", parts: int = 3) -> Path:
    """Cut the weights of a folder into files as transformers does; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    where = {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05}-of-{parts:05}{suffix}"
        mine = {name: tensors[name] for name in list(tensors)[part::parts]}
        where |= dict.fromkeys(mine, file)
        save_file(mine, folder / file) if suffix == ".safetensors" else torch.save(mine, folder / file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(folder: Path, suffix: str) -> None:
    expected = GPT.from_pretrained(folder).state_dict()
    index = shard(folder, suffix)
    state = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    shards = sorted(folder.glob(f"*{suffix}"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match=r"weights that are there twice: h.0"):
        GPT.from_pretrained(folder)
    shards[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=f"has no {shards[1].name}, which {index.name} names; 1 files are missing"
    ):
        GPT.from_pretrained(folder)
    shards[1].write_bytes(content)
    for broken, message in [
        ({}, "should hold a weight_map"),
        (
            {"weight_map": {"transformer.wte.weight": "../elsewhere"}},
            "names '../elsewhere', which is not a file beside",
        ),
        ({"weight_map": {"transformer.wte.weight": shards[0].name}}, "missing weights"),
    ]:
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors(folder: Path, zipped: bool) -> None:
    expected = GPT.from_pretrained(folder).state_dict()
    file = folder / "pytorch_model.bin"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    state = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is cut off or damaged"):
        GPT.from_pretrained(folder)
    torch.save([1, 2], file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="should hold a dict of tensors by name"):
        GPT.from_pretrained(folder)


def test_weights_that_share_memory_in_an_old_pickle_do_not_in_the_model(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    one, part = "transformer.h.0.ln_1.weight", torch.arange(3 * 48.0)
    tensors["transformer.h.1.ln_1.weight"] = tensors[one]
    tensors["transformer.h.0.ln_2.bias"], tensors["transformer.h.1.ln_2.bias"] = part[:48], part[::3]
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model = GPT.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert tensor.is_contiguous()
        before = {other: value.clone() for other, value in model.state_dict().items() if other != name}
        tensor.add_(1.0)
        assert all(torch.equal(model.state_dict()[other], value) for other, value in before.items()), name
    assert torch.equal(model.h[1].ln_2.bias, part[::3] + 1)


class Program:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("a-pickle-ran-this",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_program_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Program()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError,
        match=r"pytorch_model.bin holds more than tensors: it asks for 'posix.mkdir'; it is not read further",
    ):
        GPT.from_pretrained(folder)
    assert not (folder / "a-pickle-ran-this").exists()


# ---- damage and attack


def as_pickle(folder: Path, zipped: bool = True, **ln_f: Any) -> Path:
    """Replace model.safetensors by pytorch_model.bin, with parts of the last layer norm changed; returns the file."""
    tensors = load_file(folder / "model.safetensors") | {f"transformer.ln_f.{name}": v for name, v in ln_f.items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_cut_off_is_refused_by_name(folder: Path, zipped: bool) -> None:
    file = as_pickle(folder, zipped)
    whole = file.read_bytes()
    for size in (0, 1, 3, 4, 10, 100, 1000, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin (is cut off or damaged|should hold)") as caught:
            GPT.from_pretrained(folder)
        assert "weights_only" not in str(caught.value)


def test_a_refused_pickle_is_not_followed_by_the_advice_to_run_it(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x\x1b[31m": Program()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"it asks for 'posix.mkdir'; it is not read further") as caught:
        GPT.from_pretrained(folder)
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


ONE = torch.ones(48)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ONE.to_sparse(), "transformer.ln_f.bias is quantized or of layout torch.sparse_coo"),
        (ONE.to("meta"), "transformer.ln_f.bias is on the meta device"),
        (lambda: torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8), "transformer.ln_f.bias is quantized"),
        (3, "should hold tensors by name, but transformer.ln_f.bias is a int"),
        (
            ONE.to(torch.float8_e4m3fn),
            r"16, 32 or 64 bits: ln_f.bias torch.float8_e4m3fn",
        ),
        (ONE.to(torch.complex64), r"not floating-point numbers of 16, 32 or 64 bits: ln_f.bias torch.complex64"),
        (ONE.bool(), r"not floating-point numbers of 16, 32 or 64 bits: ln_f.bias torch.bool"),
        (torch.ones(()), r"weights of another shape: ln_f.bias \(\) instead of \(48,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_pickled_weight_that_is_no_plain_tensor_of_floats_is_refused_by_name(
    folder: Path, value: Any, message: str
) -> None:
    as_pickle(folder, bias=value() if callable(value) else value)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(folder)
    assert str(folder / "pytorch_model.bin") in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_in_a_time_that_grows_with_its_size(folder: Path, zipped: bool) -> None:
    file = as_pickle(folder, zipped)
    hostile = file.read_bytes().replace(b"ctorch._utils\n_rebuild", b"c" + b"[" * 100_000 + b"\n_rebuild", 1)
    if zipped:
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("model/data.pkl", b"\x80\x02c" + b"[" * 100_000 + b"\nx\n.")
            packed.writestr("model/version", b"3\n")
    else:
        file.write_bytes(hostile)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"holds more than tensors: it asks for '\[\[\["):
        GPT.from_pretrained(folder)
    assert time.process_time() - start < 5  # PyTorch takes minutes


def test_a_whole_pickled_model_is_refused(folder: Path) -> None:
    as_pickle(folder)
    torch.save(torch.nn.Linear(2, 2), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors: it asks for"):
        GPT.from_pretrained(folder)


def test_a_negated_view_in_a_pickle_keeps_its_sign(folder: Path) -> None:
    as_pickle(folder, bias=torch._neg_view(ONE))
    assert torch.equal(GPT.from_pretrained(folder).ln_f.bias, -ONE)


def test_a_compressed_pickle_is_refused(folder: Path) -> None:
    """A few bytes could unpack to gigabytes."""
    file = as_pickle(folder)
    with zipfile.ZipFile(file) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a compressed zip file, which torch.save never writes"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_one_weight_in_another_dtype_is_refused_or_converted(folder: Path, dtype: torch.dtype) -> None:
    name = "transformer.h.1.ln_2.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"model.safetensors: .*h.1.ln_2.weight {dtype}"):
        GPT.from_pretrained(folder)
    if dtype != torch.float8_e5m2:
        model = GPT.from_pretrained(folder, dtype=torch.float32)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 10**4}, "n_layer 10000, but the weights beside it are 28 tensors"),
        ({"n_layer": 10**6}, "."),
        ({"n_embd": 2**62, "n_head": 2**60}, "."),
        ({"vocab_size": 2**62}, "."),
        ({"n_positions": 10**20}, "."),
        ({"n_inner": 2**61}, "."),
    ],
)
def test_absurd_sizes_in_a_config_are_refused_before_any_work(folder: Path, settings: dict, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_what_is_no_regular_file_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"symbolic link to .*gone, which does not exist") as error:
        GPT.from_pretrained(folder)
    assert name in str(error.value)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is a FIFO, expected a regular file"):
        GPT.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is a folder, expected a regular file"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"n_embd": 1e400}',
        '{"model_type": []}',
        '{"n_head": {}}',
        "\xff",
        '{"afn": "\\ud800"}',
    ],
)
def test_a_config_that_is_json_of_the_wrong_kind_is_refused_by_name(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        GPT.from_pretrained(folder)


# ---- memory


def with_peaks(call: Callable[[], GPT]) -> tuple[GPT, int, int]:
    """Return what `call` returns, and the most bytes that it held: in tensors, and in objects of Python and NumPy."""
    tracemalloc.start()
    try:
        with profile(profile_memory=True) as events:
            result = call()
        objects = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return result, max(itertools.accumulate(event.nbytes() for event in changes)), objects


@pytest.mark.parametrize("kind", ["one file", "shards", "pickle", "old pickle"])
def test_loading_takes_little_more_memory_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("gptcore.tensor_file.CHUNK", 10_000)
    GPT(GPTConfig(vocab_size=2000, n_positions=64, n_embd=64, n_layer=12, n_head=2)).save_pretrained(tmp_path)  # 3 MB
    if kind == "shards":
        shard(tmp_path)
    if "pickle" in kind:
        as_pickle(tmp_path, zipped=kind == "pickle")
    GPT.from_pretrained(tmp_path)  # what the first one imports
    model, tensors, objects = with_peaks(lambda: GPT.from_pretrained(tmp_path))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size <= tensors < 1.1 * size
    assert objects < 0.25 * size  # modules and their names, but no file


@pytest.mark.parametrize("cut", [-8, 8, 100_000])
def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr("gptcore.tensor_file.CHUNK", 1000)
    expected = GPT.from_pretrained(folder).state_dict()  # in very many parts
    assert all(torch.equal(GPT.from_pretrained(folder).state_dict()[name], tensor) for name, tensor in expected.items())
    real, reads, file = TensorFile.rows, [], folder / "model.safetensors"

    def overwrite_and_read(*arguments: Any) -> torch.Tensor:
        reads.append(arguments)
        if len(reads) == 5:
            file.write_bytes(file.read_bytes()[:-cut])
        return real(*arguments)

    monkeypatch.setattr(TensorFile, "rows", overwrite_and_read)
    with pytest.raises(ValueError, match=r"model.safetensors was changed while it was read; try again"):
        GPT.from_pretrained(folder)


# ---- OpenAI's TensorFlow checkpoints; tests/sweep reads a real one


class FakeReader:
    def __init__(self, variables: dict[str, Tensor]) -> None:
        self.variables = variables

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self.variables.items()}

    def get_variable_to_dtype_map(self) -> dict[str, types.SimpleNamespace]:
        return {name: types.SimpleNamespace(as_numpy_dtype=np.float32) for name in self.variables}

    def get_tensor(self, name: str) -> np.ndarray:
        return self.variables[name].numpy()


def openai_variables(model: GPT) -> dict[str, Tensor]:
    """Weights as OpenAI's TensorFlow program names and shapes them."""
    variables = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("wte.weight", "wte").replace("wpe.weight", "wpe").replace("h.", "h", 1).replace(".", "/")
        if tensor.ndim == 2 and name not in ("wte", "wpe"):
            tensor, name = tensor.T[None].contiguous(), name.replace("/weight", "/w")
        variables["model/" + name.replace("/weight", "/g").replace("/bias", "/b")] = tensor
    return variables


@pytest.fixture
def openai_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "124M"
    folder.mkdir()
    hparams = {"n_vocab": 97, "n_ctx": 32, "n_embd": 48, "n_head": 4, "n_layer": 2}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    for name in ("checkpoint", "model.ckpt.index", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"):
        (folder / name).touch()
    return folder


def test_openais_variables_become_weights(openai_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(SMALL).eval()
    variables = openai_variables(model)
    assert variables["model/h1/mlp/c_fc/w"].shape == (1, 48, 192)
    assert set(variables) >= {"model/wte", "model/wpe", "model/ln_f/g", "model/h0/ln_1/b", "model/h0/attn/c_attn/b"}
    fake = types.SimpleNamespace(train=types.SimpleNamespace(load_checkpoint=lambda prefix: FakeReader(variables)))
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    back = GPT.from_pretrained(openai_folder)
    assert back.config == SMALL
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    variables["model/extra/w"] = variables.pop("model/h0/ln_1/b")
    with pytest.raises(ValueError, match=r"model.ckpt.index: missing weights: h.0.ln_1.bias"):
        GPT.from_pretrained(openai_folder)


def test_openais_checkpoints_need_an_extra(openai_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r'124M/model.ckpt is a TensorFlow .*pip install "gptcore\[tf\]"'):
        GPT.from_pretrained(openai_folder)
    (openai_folder / "model.ckpt-2.index").touch()
    with pytest.raises(ValueError, match=r"holds 2 checkpoints: model.ckpt, model.ckpt-2; keep one"):
        GPT.from_pretrained(openai_folder)
