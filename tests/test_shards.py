"""Files of tokens: what was written is read back, and what is not as it should be is an error with its numbers."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from gptcore import GPT, GPTConfig, Trainer, TrainingArguments
from gptcore.data import datasets
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.data.datasets import TextDataset, TokenDataset, fingerprint_of, split
from gptcore.data.shards import read_shard, write_shard
from gptcore.text.tokenizer import Tokenizer

PRINT = "ab" * 32  # a fingerprint


def nanogpt(path: Path, ids: Any) -> Path:
    """As nanoGPT's prepare.py writes it."""
    np.array(ids, dtype=np.uint16).tofile(path)
    return path


def llmc(path: Path, ids: Any, magic: int = 20240520, version: int = 1, dtype: Any = np.uint16) -> Path:
    """As llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())
    return path


@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=6),
    large=st.booleans(),
    size=st.integers(1, 4),
    closed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_our_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], large: bool, size: int, closed: bool
) -> None:
    path = tmp_path_factory.mktemp("shard") / "shard"
    vocab_size = 70_000 if large else 100
    chunks: list[list[int] | None] = []
    for document in documents:
        chunks += [document[at : at + size] for at in range(0, len(document), size)] + [None]  # type: ignore[operator]
    if not closed and chunks and documents[-1]:
        chunks.pop()
    write_shard(path, chunks, vocab_size=vocab_size, fingerprint=PRINT)
    shard = read_shard(path, vocab_size=vocab_size, fingerprint=PRINT)
    assert shard.tokens.tolist() == [i for document in documents for i in document]
    assert shard.tokens.dtype == (np.uint32 if large else np.uint16)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    assert shard.document_starts is not None
    assert shard.document_starts.tolist() == starts.tolist()
    assert shard.fingerprint == PRINT


def test_files_of_nanogpt_and_llmc_are_read_without_a_copy(tmp_path: Path) -> None:
    ids = [*range(90), 50256]
    for path, format, dtype in [
        (nanogpt(tmp_path / "train.bin", ids), "nanogpt", np.uint16),
        (llmc(tmp_path / "a.bin", ids), None, np.uint16),
        (llmc(tmp_path / "b.bin", ids), "llm.c", np.uint16),
        (llmc(tmp_path / "c.bin", ids, 20240801, 7, np.uint32), None, np.uint32),
    ]:
        shard = read_shard(path, vocab_size=50257, format=format)
        assert isinstance(shard.tokens, np.memmap)
        assert shard.tokens.dtype == dtype
        assert shard.tokens.tolist() == ids
        assert shard.document_starts is shard.fingerprint is None
        with pytest.raises(ValueError, match=r"token 90 is 50256, outside the vocabulary of 50256"):
            read_shard(path, vocab_size=50256, format=format)


def test_an_id_outside_the_vocabulary_is_an_error_when_read_and_when_written(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    write_shard(path, [[1, 2], [9]], vocab_size=10, fingerprint=PRINT)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="token 2 is 9, outside the vocabulary of 9"):
        read_shard(path, vocab_size=9)
    for bad in (10, -1, 65536):
        with pytest.raises(ValueError, match=f"from number 2 on: token 1 is {bad}, outside the vocabulary of 10"):
            write_shard(path, [[1, 2], [3, bad]], vocab_size=10, fingerprint=PRINT)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:60], "60 bytes, but a header has 72"),
        (lambda b: b[:100], "100 bytes, but a header has 136"),
        (lambda b: b[:-1], r"\d+ bytes instead of \d+, as its header says 7 tokens"),
        (lambda b: b + b"\0", "bytes instead of"),
        (lambda b: b[:8] + b"\4" + b[9:], "version 4, expected b'GPTCTOK.*version 2 or 3"),
        (lambda b: b[:8] + b"\2" + b[9:], "bytes instead of"),
        (lambda b: b[:12] + b"\4" + b[13:], "4 bytes a token for a vocabulary of 10"),
        (lambda b: b[:24] + b"\6" + b[25:], "says 6 tokens|SHA-256"),
        (lambda b: b[:50] + b"\0" + b[51:], "SHA-256"),
        (lambda b: b[:80] + bytes([b[80] ^ 1]) + b[81:], "SHA-256"),
        (lambda b: b[:110] + bytes([b[110] ^ 1]) + b[111:], "SHA-256"),
        (lambda b: b[:136] + b"\5" + b[137:], "SHA-256"),
        (lambda b: b"X" + b[1:], "begins with 58 50 54 .* not a header .* format='nanogpt'"),
        (lambda b: b"", "begins with nothing"),
    ],
)
def test_damage_to_our_files_is_found(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "shard"
    write_shard(path, [[1, 2, 3], None, [4, 5, 6, 7]], vocab_size=10, fingerprint=PRINT)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        read_shard(path, vocab_size=10)
    assert str(path) in str(caught.value)


@given(at=st.integers(0, 175), bit=st.integers(0, 7))
@settings(max_examples=80, deadline=None)
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("shard") / "shard"
    write_shard(path, [[1, 2, 3], None, [4, 5, 6, 7]], vocab_size=10, fingerprint=PRINT)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard"):
        read_shard(path, vocab_size=10)


def test_damage_to_other_files_is_found(tmp_path: Path) -> None:
    good = llmc(tmp_path / "good", range(9)).read_bytes()
    for content, message in [
        (good[:-1], "1041 bytes instead of 1042, as its header says 9 tokens"),
        (good + b"\0\0", "1044 bytes instead of 1042"),
        (good[:900], "900 bytes, but a header has 1024"),
        (good[:4] + b"\2" + good[5:], "magic 20240520, version 2 and 9 tokens, expected magic 20240520 version 1"),
        (good[:8] + b"\xff" * 4 + good[12:], "-1 tokens"),
    ]:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_shard(tmp_path / "bad", vocab_size=50257)
    (tmp_path / "bad").write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes are not a whole number of uint16"):
        read_shard(tmp_path / "bad", vocab_size=50257, format="nanogpt")
    with pytest.raises(ValueError, match=r"no format 'raw', only gptcore, llm\.c, nanogpt"):
        read_shard(tmp_path / "good", vocab_size=50257, format="raw")
    with pytest.raises(FileNotFoundError, match=r"No such file .*none"):
        read_shard(tmp_path / "none", vocab_size=50257)


def test_a_dataset_over_several_files_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").write_text("one two three <|endoftext|>four five six seven " * 30)
    tokenizer = Tokenizer.train(tmp_path / "text", vocab_size=280)
    text = TextDataset(tokenizer, tmp_path / "text", 8)
    n = tokenizer.vocab_size
    ids = text.tokens.tolist()
    paths = [nanogpt(tmp_path / f"{i}.bin", ids[i : i + 30]) for i in range(0, 90, 30)]
    dataset = TokenDataset(paths, 8, vocab_size=n, format="nanogpt")
    expected = [ids[i + at : i + at + 8] for i in range(0, 90, 30) for at in (0, 8, 16)]
    assert len(dataset) == 9
    assert [dataset[i].tolist() for i in range(9)] == expected  # type: ignore[union-attr]
    assert torch.equal(dataset[-1], dataset[8])  # type: ignore[arg-type]
    for bad in (9, -10):
        with pytest.raises(IndexError, match=f"no window {bad}: this dataset has 9"):
            dataset[bad]
    # A cache of TextDataset is a file of tokens as well, and knows its documents and its tokenizer
    cached = TokenDataset(text.cache_file, 8, vocab_size=n, tokenizer=tokenizer, mask_documents=True)
    again = TextDataset(tokenizer, tmp_path / "text", 8, mask_documents=True)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(cached, again, strict=True) for key in a)
    other = Tokenizer.train(tmp_path / "text", vocab_size=270)
    with pytest.raises(ValueError, match=f"fingerprint {tokenizer.fingerprint}, but this one has {other.fingerprint}"):
        TokenDataset(text.cache_file, 8, vocab_size=n, tokenizer=other)
    with pytest.raises(ValueError, match="does not say where documents start"):
        TokenDataset(paths, 8, vocab_size=n, format="nanogpt", mask_documents=True)
    with pytest.raises(ValueError, match=r"0\.bin: 30 tokens are fewer than one window of block_size=31"):
        TokenDataset(paths, 31, vocab_size=n, format="nanogpt")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        TokenDataset(paths, 1, vocab_size=n, format="nanogpt")
    with pytest.raises(ValueError, match="empty list"):
        TokenDataset([], 8, vocab_size=n)

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=n, n_positions=8, n_embd=16, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0))
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, save_steps=0, disable_tqdm=True)
    output = Trainer(model, arguments, dataset, data_collator=DataCollatorForLanguageModeling(tokenizer)).train()
    assert output.global_step == 2


def test_the_header_is_what_the_documentation_says(tmp_path: Path) -> None:
    """That of version 2, which had no source, is read as well."""
    path, source = tmp_path / "shard", "cd" * 32
    write_shard(path, [[1, 2, 3], None, [4]], vocab_size=10, fingerprint=PRINT, source=source)
    body = b"\1\0\2\0\3\0\4\0" + b"".join(n.to_bytes(8, "little") for n in (0, 3))
    for version, of_source in ((3, bytes.fromhex(source)), (2, b"")):
        fields = b"GPTCTOK\0" + b"".join(n.to_bytes(4, "little") for n in (version, 2))
        fields += b"".join(n.to_bytes(8, "little") for n in (10, 4, 2)) + bytes.fromhex(PRINT) + of_source
        data = fields + hashlib.sha256(fields + body).digest() + body
        if version == 3:
            assert path.read_bytes() == data
        path.write_bytes(data)
        shard = read_shard(path, vocab_size=10, fingerprint=PRINT)
        assert (shard.tokens.tolist(), shard.source) == ([1, 2, 3, 4], of_source.hex() or None)
        assert shard.document_starts is not None
        assert shard.document_starts.tolist() == [0, 3]


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    paths = [nanogpt(tmp_path / f"{i}.bin", range(i, i + 4)) for i in range(120)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        dataset = TokenDataset(paths, 4, vocab_size=200, format="nanogpt")
        assert [dataset[i].tolist() for i in range(120)] == [list(range(i, i + 4)) for i in range(120)]  # type: ignore[union-attr]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kept_open", [64, 0])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 3000),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\0\0"),  # an id that is in the vocabulary
    ],
)
def test_a_file_that_changes_in_place_is_an_error(
    tmp_path: Path, change: Callable[[Path], object], kept_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_KEPT_OPEN", kept_open)
    path = nanogpt(tmp_path / "train.bin", range(5000))
    before = path.stat()
    dataset = TokenDataset(path, 1000, vocab_size=50257, format="nanogpt")
    assert dataset[-1].tolist() == [*range(4000, 5000)]  # type: ignore[union-attr]
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"train\.bin was changed since it was opened: open the dataset again"):
        dataset[-1]


def test_a_deleted_file_is_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nanogpt(tmp_path / "train.bin", range(8))
    dataset = TokenDataset(path, 8, vocab_size=8, format="nanogpt")
    monkeypatch.setattr(datasets, "_KEPT_OPEN", 0)
    reopened = TokenDataset(path, 8, vocab_size=8, format="nanogpt")
    path.unlink()
    assert dataset[0].tolist() == [*range(8)]  # type: ignore[union-attr]
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        reopened[0]


def test_a_pickled_dataset_is_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "shard", [[1] * 100_000, None] * 20, vocab_size=10, fingerprint=PRINT)
    monkeypatch.chdir(tmp_path)
    dataset = TokenDataset("shard", 64, vocab_size=10, mask_documents=True)
    assert dataset.shards[0].tokens[5] == 1  # a map that was asked for is not sent either
    data = pickle.dumps(dataset)
    assert len(data) < (tmp_path / "shard").stat().st_size / 500
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert torch.equal(again[1562]["input_ids"], dataset[1562]["input_ids"])
    assert again[1562]["document_starts"].tolist() == dataset[1562]["document_starts"].tolist() == [32]
    assert again.fingerprint == dataset.fingerprint


def test_a_fingerprint_is_that_of_all_items(tmp_path: Path) -> None:
    ids = np.arange(64)
    paths = [
        nanogpt(tmp_path / "a.bin", ids),
        nanogpt(tmp_path / "same.bin", ids),
        nanogpt(tmp_path / "b.bin", ids + 1),
    ]
    write_shard(tmp_path / "ours", [ids], vocab_size=100, fingerprint=PRINT)
    a, same, b = (TokenDataset(path, 8, vocab_size=100, format="nanogpt") for path in paths)
    assert a.fingerprint == same.fingerprint == fingerprint_of(a)
    train, validation = split(a, 0.25)
    different = [
        a, b, TokenDataset(paths[0], 4, vocab_size=100, format="nanogpt"),
        TokenDataset(tmp_path / "ours", 8, vocab_size=100),
        TokenDataset(tmp_path / "ours", 8, vocab_size=100, mask_documents=True), train, validation,
        Subset(a, [0, 2]), Subset(b, [0, 2]), ConcatDataset([a, b]), ConcatDataset([b, a]),
    ]  # fmt: skip
    prints = [fingerprint_of(dataset) for dataset in different]
    assert len(set(prints)) == len(prints)
    assert all(isinstance(one, str) and len(one) == 64 for one in prints)
    assert fingerprint_of(Subset(a, [0, 2])) == fingerprint_of(Subset(same, np.array([0, 2])))  # type: ignore[arg-type]
    for silent in ([1, 2], Subset([1, 2], [0]), ConcatDataset([a, [1]])):  # type: ignore[arg-type, list-item]
        assert fingerprint_of(silent) is None


@pytest.mark.parametrize("starts", [[3, 1], [0, 2**63], [8], [-1]])
def test_documents_that_start_outside_are_an_error(tmp_path: Path, starts: list[int]) -> None:
    """The file's SHA-256 is right, as an attacker would make it."""
    path = tmp_path / "shard"
    write_shard(path, [[1] * 7] if len(starts) == 1 else [[1] * 3, None, [2] * 4], vocab_size=10, fingerprint=PRINT)
    data = path.read_bytes()[: -8 * len(starts)] + b"".join((start % 2**64).to_bytes(8, "little") for start in starts)
    path.write_bytes(data[:104] + hashlib.sha256(data[:104] + data[136:]).digest() + data[136:])
    with pytest.raises(ValueError, match=r"shard is damaged: its documents do not start in order among its 7 tokens"):
        read_shard(path, vocab_size=10)


def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, error, message in [
        ("fifo", ValueError, "fifo is a FIFO, expected a regular file"),
        ("link", FileNotFoundError, "symbolic link to .*gone, which does not exist.*link"),
        (".", ValueError, "is a folder, expected a regular file"),
    ]:
        with pytest.raises(error, match=message):
            read_shard(tmp_path / name, vocab_size=9)
        with pytest.raises(error, match=message):
            Tokenizer.train(tmp_path / name, kind="char")
