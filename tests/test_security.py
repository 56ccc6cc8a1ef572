"""The promises of SECURITY.md, each tested by files that would break it."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fuzz import READERS, gpt1_tokenizer, model, saved_run, sharded, tokenizer
from test_tensor_file import peak_growth

from gptcore import GPT, Tokenizer
from gptcore.data.shards import read_shard
from gptcore.training.checkpoint import CheckpointError


class Program:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("a-file-ran-this",)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[1])
def test_no_file_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    """A pickled program in place of every file that is read is refused, or read as text."""
    make, name, read = reader
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Program()))
    for code in ("modeling_gpt2", "tokenization_gpt2", "__init__"):  # which transformers would import if it may
        (tmp_path / "model" / f"{code}.py").write_text("import os; os.mkdir('a-file-ran-this')")
    before = contents(tmp_path)
    try:
        read(tmp_path / "model")
    except (ValueError, OSError, CheckpointError) as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (a text file of it may be read)
    assert contents(tmp_path).keys() == before.keys()


def test_no_setting_of_a_file_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path)
    tokenizer(tmp_path)
    (tmp_path / "evil_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    ran: list[Any] = []
    for name in ("exec", "eval"):
        monkeypatch.setattr(builtins, name, lambda *arguments: ran.append(arguments))
    for name, key in (("config.json", "auto_map"), ("tokenizer_config.json", "auto_map")):
        values = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | {key: {"AutoModel": "evil_module.Model"}}))
    with pytest.raises(ValueError, match="unknown key 'auto_map'"):
        GPT.from_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).vocab_size > 256
    assert "evil_module" not in sys.modules
    assert ran == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".", "", "\0", "\x1b[31m"])
def test_no_file_is_read_outside_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    sharded(tmp_path / "model")
    (tmp_path / "model" / "model-1.safetensors").rename(tmp_path / "outside")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    with pytest.raises((ValueError, OSError), match=r"model"):
        GPT.from_pretrained(tmp_path / "model")


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    """A folder that holds links to other places does not make saving follow them."""
    (tmp_path / "outside").write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    model(folder)
    loaded = GPT.from_pretrained(folder)
    tokenizer(folder)
    read = Tokenizer.from_pretrained(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "outside")
        save = read.save_pretrained if name.startswith("tokenizer") else loaded.save_pretrained
        with pytest.raises(FileExistsError, match=f"{name} is a symbolic link and is not replaced"):
            save(folder)
        assert (tmp_path / "outside").read_text() == "mine"
        (folder / name).unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "model"}


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def huge_tensor(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"transformer.wte.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def huge_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2**31, "n_positions": 2**40}))


def huge_token(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["ab"] = 2**31 - 1
    (folder / "tokenizer.json").write_text(json.dumps(state))


def huge_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 2**31 - 1}))


def huge_count(folder: Path) -> None:
    np.array([20240520, 1, 2**31 - 1, *[0] * 253], "<i4").tofile(folder / "tokens")


def huge_storage(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    one = torch.zeros(1).expand(2**20, 2**20)  # four bytes in the file
    torch.save({"transformer.wte.weight": one}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "damage", "read"),
    [
        (model, huge_header, GPT.from_pretrained),
        (model, huge_tensor, GPT.from_pretrained),
        (model, huge_config, GPT.from_pretrained),
        (model, huge_storage, GPT.from_pretrained),
        (tokenizer, huge_token, Tokenizer.from_pretrained),
        (gpt1_tokenizer, huge_vocabulary, Tokenizer.from_pretrained),
        (saved_run, huge_count, lambda folder: read_shard(folder / "tokens", vocab_size=9)),
    ],
)
def test_memory_is_bounded_by_the_size_of_the_files(
    tmp_path: Path, make: Callable[[Path], None], damage: Callable[[Path], None], read: Callable[[Path], Any]
) -> None:
    make(tmp_path)
    damage(tmp_path)

    def refuse() -> None:
        with pytest.raises(ValueError, match=str(tmp_path)):
            read(tmp_path)

    assert peak_growth(refuse) < 100 << 20
