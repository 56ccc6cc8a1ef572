"""Model folders: saved and loaded bit-exactly, in the layout of transformers, atomically, with checks."""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from processes import run_program, start_printing
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore.config import GPTConfig
from gptcore.hf.pretrained import load_config
from gptcore.model import GPT

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
        (damage_dtype, "not floating-point numbers of 16, 32 or 64 bits: ln_f.bias torch.int64"),
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
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("gone")
        with pytest.raises(FileNotFoundError, match=rf"symbolic link to gone, which does not exist.*{name}"):
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


@pytest.mark.slow
def test_offline_by_the_environment(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "home" / "hub", "gpt2", folder)
    program = "from gptcore import GPT; GPT.from_pretrained('gpt2'); GPT.from_pretrained('somebody/else')"
    program = (
        "import os, sys; os.environ.pop('HF_HUB_CACHE', None); assert 'huggingface_hub' not in sys.modules\n" + program
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    process = start_printing(tmp_path / "printed", run_program, program, tmp_path, environment)
    process.join(100)
    last = (tmp_path / "printed").read_text().strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: there is no folder somebody/else")
    assert "HF_HUB_OFFLINE" in last


# ---- what cannot be a model of transformers


@pytest.mark.parametrize(
    "settings", [{"attention_window": 5}, {"position_embedding": "sinusoidal"}, {"norm_position": "post", "n_inner": 7}]
)
def test_saving_what_transformers_does_not_have_says_so(tmp_path: Path, settings: dict) -> None:
    model = GPT(dataclasses.replace(SMALL, **settings))
    with pytest.warns(UserWarning, match="transformers has no model that computes the same from these weights"):
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
        ('{"n_layer": 0}', "config.json cannot be used: n_layer should be at least 1, not 0"),
        ('{"n_layers": 2}', "config.json cannot be used: unknown key 'n_layers'; the nearest known one is 'n_layer'"),
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
        patch.setattr("gptcore.hf.pretrained.save_tensors", full)
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
