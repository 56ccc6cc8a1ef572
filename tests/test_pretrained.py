"""Model folders: bit for bit there and back, in the layout of transformers, whole at any moment, and checked."""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.config import GPTConfig
from gptcore.hf.pretrained import load_config
from gptcore.model import GPT
from gptcore.tensor_file import TensorFile

SMALL = GPTConfig(vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=4)
IDS = torch.arange(20).view(2, 10)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    GPT(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": False},
        {"norm_position": "post"},
        {"norm_position": "post", "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": False},
        {"norm_position": "post", "position_embedding": "sinusoidal"},
        {"attention_window": 5, "n_inner": 30, "pad_token_id": 3},
    ],
)
@pytest.mark.filterwarnings("ignore:.*is saved as a model of gptcore's own")
def test_there_and_back_bit_for_bit(tmp_path: Path, settings: dict, dtype: torch.dtype) -> None:
    model = GPT(dataclasses.replace(SMALL, **settings)).to(dtype)
    model.save_pretrained(tmp_path / "deep" / "model")
    random_state = torch.get_rng_state()
    back = GPT.from_pretrained(tmp_path / "deep" / "model")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert back.config == model.config
    assert list(back.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], tensor), name
    assert not back.training
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in back.parameters())
    if dtype == torch.float32:
        assert torch.equal(back(IDS).logits, model.eval()(IDS).logits)
        back(IDS, labels=IDS).loss.backward()


def test_the_files_are_those_of_transformers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert all(name.startswith("transformer.") for name in tensors)  # the tied lm_head.weight is not there
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (48, 144)  # Conv1D: (in, out)
    assert tensors["transformer.h.1.mlp.c_fc.weight"].shape == (48, 192)
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (192, 48)
    assert tensors["transformer.wte.weight"].shape == (97, 48)
    model = GPT.from_pretrained(folder)
    assert torch.equal(tensors["transformer.h.0.attn.c_proj.weight"], model.h[0].attn.c_proj.weight.T)
    header = (folder / "model.safetensors").read_bytes()[8:200]
    assert b'"format":"pt"' in header
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]


def test_untied_output_weights_are_kept_under_their_name(tmp_path: Path) -> None:
    GPT(dataclasses.replace(SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


def test_older_layouts_are_read(folder: Path) -> None:
    expected = GPT.from_pretrained(folder)(IDS).logits

    def as_openai_published_them(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(folder, as_openai_published_them)
    assert torch.equal(GPT.from_pretrained(folder)(IDS).logits, expected)


def test_settings_can_be_replaced(folder: Path) -> None:
    model = GPT.from_pretrained(folder, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    assert model.config == dataclasses.replace(SMALL, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    with pytest.raises(ValueError, match="unknown key 'dropout'"):
        GPT.from_pretrained(folder, dropout=0.0)
    with pytest.raises(ValueError, match=r"missing weights: h\.2"):
        GPT.from_pretrained(folder, n_layer=3)


def damage_names(tensors: dict[str, Tensor]) -> None:
    tensors["h.0.attn.q_proj.weight"] = torch.zeros(3)


def damage_nan(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = torch.nan


def damage_shape(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.wpe.weight"] = torch.zeros(64, 48)


def damage_rank(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3)


def damage_orientation(tensors: dict[str, Tensor]) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].T.contiguous()


def damage_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.ln_f.bias"] = torch.zeros(48, dtype=torch.int64)


def damage_tie(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(97, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.ln_f.bias"), "missing weights: ln_f.bias$"),
        (lambda tensors: tensors.clear(), "missing weights: h.0.attn.c_attn.bias.* and 23 more"),
        (damage_names, "unexpected weights: h.0.attn.q_proj.weight"),
        (damage_nan, "weights that are not finite: h.1.mlp.c_fc.weight"),
        (damage_shape, r"weights of another shape: wpe.weight \(64, 48\) instead of \(32, 48\)"),
        (damage_rank, r"weights of another shape: h.1.mlp.c_fc.weight \(3,\) instead of \(192, 48\)"),
        (damage_orientation, r"weights of another shape: h.0.mlp.c_fc.weight \(48, 192\) instead of \(192, 48\)"),
        (damage_dtype, "not floating-point numbers: ln_f.bias torch.int64"),
        (damage_tie, "lm_head.weight differs from wte.weight, but tie_word_embeddings is true"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(folder)
    assert str(folder / "model.safetensors") in str(error.value)


def test_a_folder_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        GPT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no config.json, but nothing"):
        GPT.from_pretrained(tmp_path / "empty")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
            GPT.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors or pytorch_model.bin, but config.json"):
        GPT.from_pretrained(folder)


def test_dtype(folder: Path) -> None:
    expected = GPT.from_pretrained(folder)
    half = GPT.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16()), name
    rewrite(folder, lambda tensors: tensors["transformer.wpe.weight"].fill_(1e6))
    with pytest.raises(ValueError, match=r"weights that are not finite in torch.float16: wpe.weight"):
        GPT.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"dtype should be a floating-point one, not torch.int8"):
        GPT.from_pretrained(folder, dtype=torch.int8)


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
    with pytest.raises(ValueError, match=r"pytorch_model.bin (holds more than tensors, or is damaged|is not a whole)"):
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
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds more than tensors, or is damaged, and is not read"):
        GPT.from_pretrained(folder)
    assert not (folder / "a-pickle-ran-this").exists()


# ---- memory


MEMORY = """
import sys, torch
from gptcore import GPT
torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
GPT.from_pretrained(sys.argv[1])  # a small one: what every load costs once
before = peak()
model = GPT.from_pretrained(sys.argv[2])
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("kind", ["one file", "shards", "pickle", "old pickle"])
def test_loading_takes_little_more_memory_than_the_model(folder: Path, tmp_path: Path, kind: str) -> None:
    big = tmp_path / "big"
    GPT(GPTConfig(vocab_size=20000, n_positions=64, n_embd=768, n_layer=4, n_head=12)).save_pretrained(big)  # 175 MB
    for one in (folder, big):
        if kind == "shards":
            shard(one)
        if "pickle" in kind:
            tensors, zipped = load_file(one / "model.safetensors"), kind == "pickle"
            torch.save(tensors, one / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            (one / "model.safetensors").unlink()
    command = [sys.executable, "-c", MEMORY, str(folder), str(big)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 0.9 < float(done.stdout) < 1.2


@pytest.mark.parametrize("cut", [-8, 8, 100_000])
def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr("gptcore.hf.pretrained.CHUNK", 1000)
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


# ---- the Hub, without a network: what huggingface_hub's cache looks like


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty, and a Hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache: Path, name: str, folder: Path) -> Path:
    """Lay a folder into the cache as if it had been downloaded under a name."""
    at = cache / f"models--{name.replace('/', '--')}"
    snapshot = at / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, snapshot)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_a_name_on_the_hub_is_found_in_the_cache(cache: Path, folder: Path) -> None:
    put(cache, "somebody/gpt-small", folder)
    put(cache, "gpt2", folder)
    expected = GPT.from_pretrained(folder)
    for name in ("somebody/gpt-small", "gpt2"):
        model = GPT.from_pretrained(name, attn_pdrop=0.0)
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert model.config.attn_pdrop == 0.0
        assert load_config(name) == expected.config


def test_a_name_whose_weights_are_older_than_safetensors(cache: Path, folder: Path) -> None:
    expected = GPT.from_pretrained(folder)(IDS).logits
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    put(cache, "gpt2", folder)
    assert torch.equal(GPT.from_pretrained("gpt2")(IDS).logits, expected)


def test_only_what_is_needed_is_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    GPT.from_pretrained("gpt2")
    assert len(asked) == 1
    for file, wanted in [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("pytorch_model.bin", False),
        ("tf_model.h5", False),
        ("onnx/decoder_model.onnx", False),
        ("64-8bits.tflite", False),
    ]:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in asked[0]) == wanted, file


def test_a_name_that_cannot_be_found_says_what_was_tried(cache: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder gpt2 .*Hugging Face Hub.*"):
        GPT.from_pretrained("gpt2")
    for name in ("./gpt2", "a/b/c", "../model2", "/nowhere/gpt2"):
        with pytest.raises(FileNotFoundError, match="there is no folder") as error:
            GPT.from_pretrained(name)
        assert "Hub" not in str(error.value)


def test_offline_by_the_environment(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "home" / "hub", "gpt2", folder)
    program = "from gptcore import GPT; GPT.from_pretrained('gpt2'); GPT.from_pretrained('somebody/else')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: there is no folder somebody/else")
    assert "HF_HUB_OFFLINE" in last


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


# ---- what cannot be a model of transformers


@pytest.mark.parametrize(
    "settings", [{"attention_window": 5}, {"position_embedding": "sinusoidal"}, {"norm_position": "post", "n_inner": 7}]
)
def test_saving_what_transformers_does_not_have_says_so(tmp_path: Path, settings: dict) -> None:
    model = GPT(dataclasses.replace(SMALL, **settings))
    with pytest.warns(UserWarning, match="transformers has none that computes the same from these weights"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gptcore"


def test_saving_a_gpt1_or_gpt2_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPT(SMALL).save_pretrained(tmp_path)
        GPT(dataclasses.replace(SMALL, norm_position="post")).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"transformer.tokens_embed.weight", "transformer.positions_embed.weight"} <= names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "should hold a JSON object"),
        ('{"n_layer": 0}', "config.json: n_layer should be at least 1, not 0"),
        ('{"n_layers": 2}', "config.json: unknown key 'n_layers'; the nearest known one is 'n_layer'"),
    ],
)
def test_a_damaged_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder)


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = GPT(SMALL)
    with torch.no_grad():
        model.h[0].ln_1.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"weights that are not finite: h\.0\.ln_1\.weight"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = GPT.from_pretrained(folder)(IDS).logits
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            GPT(dataclasses.replace(SMALL, n_layer=3)).save_pretrained(folder)
    assert torch.equal(GPT.from_pretrained(folder)(IDS).logits, expected)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_save_that_is_cut_short_leaves_whole_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """A save renames two or three files; whichever is the last that happens, the folder is the old model or the new."""
    old, new = GPT.from_pretrained(folder), GPT(SMALL).eval()
    real, done = os.replace, []

    def replace(source: str, target: str) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(folder)
    logits = GPT.from_pretrained(folder)(IDS).logits
    assert any(torch.equal(logits, model(IDS).logits) for model in (old, new))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
