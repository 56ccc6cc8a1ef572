"""Damaged and hostile files: a reader returns, or raises a documented error that names the file, in bounded memory.

A file that is whole is changed at random, as bytes, as JSON, and inside its checksums. The suite tries a few changes of
each file, always the same; `make fuzz` tries others for GPTCORE_FUZZ_SECONDS (60).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_tensor_file import peak_growth

from gptcore import GPT, GPTConfig, Tokenizer, TrainingArguments
from gptcore.data.shards import read_shard, write_shard
from gptcore.hf.gguf import export_gguf
from gptcore.lora import add_adapter, load_adapter, save_adapter
from gptcore.training import checkpoint, resume
from gptcore.training.checkpoint import CheckpointError
from gptcore.training.optim import AdamW
from gptcore.training.state import TrainerState

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("GPTCORE_FUZZ_SECONDS", 0))
MEMORY = 256 << 20  # bytes that reading one of these files, of some kilobytes, may add to what is taken
CONFIG = GPTConfig(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
TEXT = "one two three, three two one; one and two are three. " * 20

# ---- files that are whole


def model(folder: Path) -> None:
    torch.manual_seed(0)
    GPT(CONFIG).save_pretrained(folder)


def pickled(folder: Path, zipped: bool = True) -> None:
    model(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def sharded(folder: Path) -> None:
    model(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    save_file(weights, folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer(folder: Path) -> None:
    (folder / "text").write_text(TEXT)
    Tokenizer.train(folder / "text", vocab_size=270).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))


def slow_tokenizer(folder: Path) -> None:
    tokenizer(folder)
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in state["merges"]))
    (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": 270}))
    decoder = {"270": {"content": "<|user|>", "special": True}}
    config = {"added_tokens_decoder": decoder, "additional_special_tokens": ["<|user|>"], "pad_token": "<|user|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def gpt1_tokenizer(folder: Path) -> None:
    vocab = ["<unk>", "a", "b", "a</w>", "b</w>", "ab</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")


def gguf_file(folder: Path) -> None:
    (folder / "text").write_text(TEXT)
    config = dataclasses.replace(CONFIG, vocab_size=270, n_embd=32, n_head=2)
    export_gguf(GPT(config), Tokenizer.train(folder / "text", vocab_size=270), folder / "m.gguf", "q8_0")


def tokens(folder: Path) -> None:
    write_shard(folder / "ours", [[1, 2, 3], None, [4, 5]], vocab_size=11, fingerprint="ab" * 32)
    np.array([20240520, 1, 5, *[0] * 253], "<i4").tofile(folder / "llmc")
    with open(folder / "llmc", "ab") as file:
        np.arange(5, dtype="<u2").tofile(file)
    np.arange(5, dtype="<u2").tofile(folder / "nanogpt")


def saved_run(folder: Path) -> None:
    trained = GPT(CONFIG)
    optimizer = AdamW(trained.parameters())
    trained(torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    optimizer.step()
    arguments = TrainingArguments("out")
    state = {"state": dataclasses.asdict(TrainerState(global_step=1))}
    state |= resume.describe_run(arguments, trained, {"examples": 3}, 1, torch.device("cpu"))
    checkpoint.save_checkpoint(folder / "checkpoint-1", trained, optimizer, state)
    for file in (folder / "checkpoint-1").iterdir():
        file.rename(folder / file.name)
    (folder / "checkpoint-1").rmdir()


# ---- readers


def read_tokens(folder: Path, name: str, format: str | None) -> None:
    shard = read_shard(folder / name, vocab_size=11, format=format)
    _ = shard.read(0, len(shard)), shard.document_starts


def read_run(folder: Path, seal: str | None = None) -> None:
    if seal is not None:  # the SHA-256 of a changed file is right
        content = (folder / seal).read_bytes()
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[seal] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify_checkpoint(folder)
    resume.read_state(folder)
    into = GPT(CONFIG)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        checkpoint.load_into(folder, into, AdamW(into.parameters()))
    finally:
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        np.random.set_state(generators[2])  # noqa: NPY002


def adapter(folder: Path) -> None:
    adapted = GPT(CONFIG)
    add_adapter(adapted, r=2, target_modules=["c_attn.q", "c_fc"], modules_to_save=["wte"])
    save_adapter(adapted, folder)


def read_adapter(folder: Path) -> None:
    load_adapter(GPT(CONFIG), folder)


def train_on(folder: Path) -> None:
    for kind, size in (("bpe", 262), ("char", None)):
        Tokenizer.train(folder / "text", kind=kind, vocab_size=size)


def read_gguf(folder: Path) -> None:
    """Read the model, and the tokenizer whether or not the model is right."""
    try:
        GPT.from_pretrained(folder / "m.gguf")
    finally:
        Tokenizer.from_pretrained(folder / "m.gguf")


Reader = tuple[Callable[[Path], Any], str, Callable[[Path], Any]]
READERS: list[Reader] = [
    *((model, name, GPT.from_pretrained) for name in ("config.json", "model.safetensors")),
    (sharded, "model.safetensors.index.json", GPT.from_pretrained),
    (pickled, "pytorch_model.bin", GPT.from_pretrained),
    (lambda folder: pickled(folder, zipped=False), "pytorch_model.bin", GPT.from_pretrained),
    *(
        (tokenizer, name, Tokenizer.from_pretrained)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    ),
    *(
        (slow_tokenizer, name, Tokenizer.from_pretrained)
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
    ),
    *((gpt1_tokenizer, name, Tokenizer.from_pretrained) for name in ("vocab.json", "merges.txt")),
    (gguf_file, "m.gguf", read_gguf),
    (tokenizer, "text", train_on),
    *(
        (tokens, name, lambda folder, name=name, format=format: read_tokens(folder, name, format))
        for name, format in (("ours", None), ("llmc", None), ("nanogpt", "nanogpt"))
    ),
    *((adapter, name, read_adapter) for name in ("adapter_config.json", "adapter_model.safetensors")),
    (saved_run, "manifest.json", read_run),
    *(
        (saved_run, name, lambda folder, name=name: read_run(folder, name))
        for name in ("model.safetensors", "optimizer.safetensors", "random_state.json", "trainer_state.json")
    ),
]

# ---- changes

SPECIAL: list[Any] = [
    None, True, -1, 0, 1, 2**31 - 1, 2**32, 2**62, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "\0", "\x1b[31m", "\ud800", "../x", "x" * 300, "<|endoftext|>", [], [[]], [1], ["a", "b"], {}, {"a": 1},
    {"content": 3},
]  # fmt: skip
NUMBERS = [b"\0" * 8, b"\xff" * 8, struct.pack("<q", 2**62), struct.pack("<q", -1), struct.pack("<i", 2**31 - 1)]


def change_bytes(draw: Any, content: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "flip", "set", "drop", "repeat", "insert"]))
        size = draw(st.integers(1, 64))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << size % 8]) + content[at + 1 :]
        elif kind == "set":
            number = draw(st.sampled_from(NUMBERS))
            content = content[:at] + number + content[at + len(number) :]
        elif kind == "drop":
            content = content[:at] + content[at + size :]
        elif kind == "repeat":
            content = content[:at] + content[at : at + size] * draw(st.integers(2, 9)) + content[at:]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(max_size=16) | st.just(b"[" * 20_000)) + content[at:]
    return content


def change_json(draw: Any, value: Any) -> Any:
    """Replace, delete or add an entry somewhere inside."""
    value = copy.deepcopy(value)
    inside = value
    while isinstance(inside, dict | list) and inside:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = draw(st.sampled_from(keys))
        deeper = isinstance(inside[key], dict | list) and inside[key] and draw(st.integers(0, 3))
        if deeper:
            inside = inside[key]
            continue
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "swap"]))
        if kind == "delete":
            del inside[key]
        elif kind == "replace":
            inside[key] = draw(st.sampled_from(SPECIAL))
        elif kind == "swap":
            inside[key] = copy.deepcopy(draw(st.sampled_from([inside[other] for other in keys])))
        elif isinstance(inside, dict):
            added = draw(st.sampled_from(["x", "\0", "\x1b[31m", "a" * 300, "../x", *map(str, inside)]))
            inside[added] = draw(st.sampled_from(SPECIAL))
        else:
            inside.append(draw(st.sampled_from(SPECIAL)))
        break
    return value


def change(draw: Any, name: str, content: bytes) -> bytes:
    """Change a file inside of what would otherwise tell at once that it was changed."""
    if draw(st.integers(0, 3)) == 0:
        return change_bytes(draw, content)
    if name.endswith(".json"):
        return json.dumps(change_json(draw, json.loads(content))).encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.dumps(change_json(draw, json.loads(content[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if name.endswith(".gguf"):  # mostly the metadata, which are a small part
        metadata = content.index(b"token_embd.weight") + 2000
        return change_bytes(draw, content[:metadata]) + content[metadata:]
    if name == "ours":
        content = change_bytes(draw, content[:104] + content[136:])
        return content[:104] + hashlib.sha256(content).digest() + content[104:]
    if content[:4] == b"PK\3\4":
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(packed, "w") as made:
            changed = draw(st.sampled_from(whole.namelist()))
            for part in whole.namelist():
                made.writestr(part, change_bytes(draw, whole.read(part)) if part == changed else whole.read(part))
        return packed.getvalue()
    return change_bytes(draw, content)


def check(folder: Path, name: str, content: bytes, read: Callable[[Path], Any]) -> None:
    (folder / name).write_bytes(content)
    started, message = time.process_time(), str(folder)

    def read_or_refuse() -> None:
        nonlocal message
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder)
        except (ValueError, OSError, CheckpointError) as error:
            message = str(error)

    grown = peak_growth(read_or_refuse)
    assert str(folder) in message, f"the error does not name the file: {message}"
    assert message.isprintable(), f"control characters reach the terminal: {message!r}"
    assert grown < MEMORY
    assert time.process_time() - started < 10


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{getattr(reader[0], '__name__', '')}-{reader[1]}")
def test_a_changed_file_is_read_or_refused_by_name(tmp_path: Path, reader: Reader) -> None:
    make, name, read = reader
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole")
    content = (tmp_path / "whole" / name).read_bytes()
    read(tmp_path / "whole")  # the file is right, and what reading takes once is taken
    deadline = time.monotonic() + SECONDS / len(READERS)
    everything = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=everything,
              phases=[Phase.generate, Phase.shrink] if SECONDS else [Phase.generate])  # fmt: skip
    @given(data=st.data())
    def once(data: Any) -> None:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        check(folder, name, change(data.draw, name, content), read)

    round = time.time_ns() if SECONDS else 0
    while True:
        seed(round)(once)()
        round += 1
        if time.monotonic() >= deadline:
            break
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "whole"]  # nothing is written outside
