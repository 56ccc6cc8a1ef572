"""Tokenizers and texts that are refused: of other kinds, cut off, of absurd sizes, or of the wrong type."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_tokenizer import TEXT

from gptcore.text import training
from gptcore.text.pretokenize import BYTE_OF, GPT2_WORDS
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="module")
def trained(text_file: Path) -> Tokenizer:
    return Tokenizer.train(text_file, vocab_size=400, special_tokens=(END_OF_TEXT, "<|user|>"))


def add_token(state: dict[str, Any], content: str, special: bool) -> None:
    token = {"content": content, "special": special, "id": state["model"]["vocab"][content]}
    state["added_tokens"].append(state["added_tokens"][0] | token)


def tokenizers_state(part: Any) -> Any:
    return json.loads(part.__getstate__())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(dropout=0.1), "dropout is 0.1"),
        (lambda s: s.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "prefix space"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda s: s["model"]["vocab"].update({"日": 400}), "not made of bytes, such as '日'"),
        (lambda s: s["model"]["vocab"].update({"zzz": 402}), "ids 0 to"),
        (lambda s: s["model"]["vocab"].update({"zzz": 7}), "each once"),
        (lambda s: s["added_tokens"][0].update(lstrip=True), "neither strip"),
        (lambda s: s["added_tokens"][0].update(single_word=True), "nor ask for a single word"),
        (lambda s: s["added_tokens"][0].update(special=False), "eos_token '<.endoftext.>' is not one of the special"),
        (
            lambda s: s.update(
                post_processor=tokenizers_state(tokenizers.processors.BertProcessing(("a", 1), ("b", 2)))
            ),
            "its post-processor adds 2 special tokens to every text",
        ),
        (lambda s: add_token(s, "Ġs", special=False), "plain text can become"),
        (lambda s: add_token(s, "is", special=True), "plain text can become"),
    ],
)
def test_other_tokenizers_are_refused(
    tmp_path: Path, trained: Tokenizer, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    state = json.loads(trained.save_pretrained(tmp_path).read_text())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_and_damaged_tokenizers(tmp_path: Path, trained: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    text = trained.save_pretrained(tmp_path).read_text()
    for damaged in ("", text[: len(text) // 2], "[]", "{}"):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match="not a whole tokenizer"):
            Tokenizer.from_pretrained(tmp_path)
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(text) | {"model": words}))
    with pytest.raises(ValueError, match="model is WordLevel"):
        Tokenizer.from_pretrained(tmp_path)


def test_bad_training_input(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "nul").write_bytes(b"text\0text")
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(5000).replace(b"\0", b"\xff"))
    (tmp_path / "utf16").write_bytes("text".encode("utf-16"))
    for path, error, message in [
        (tmp_path / "none", FileNotFoundError, "No such file.*none"),
        (tmp_path, ValueError, "a folder"),
        (tmp_path / "empty", ValueError, r"empty \(0 bytes\)"),
        (tmp_path / "nul", ValueError, "not a text file: of its first 9 bytes 1 are NUL"),
        (tmp_path / "noise", ValueError, "not a text file"),
        (tmp_path / "utf16", ValueError, "iconv"),
        ([], ValueError, "empty list"),
    ]:
        with pytest.raises(error, match=message):
            Tokenizer.train(path, vocab_size=300)
    (tmp_path / "cut").write_bytes("日".encode()[:2])  # a little that is broken is still text
    Tokenizer.train(tmp_path / "cut", kind="char")
    for arguments, message in [
        ({}, "at least 257"),
        ({"vocab_size": 256}, "at least 257 .* not 256"),
        ({"vocab_size": 300, "kind": "char"}, "the text decides"),
        ({"vocab_size": 300, "kind": "word"}, "'bpe' or 'char', not 'word'"),
        ({"vocab_size": 300, "special_tokens": "<s>"}, "special_tokens must be"),
        ({"vocab_size": 300, "special_tokens": ["<s>", "<s>"]}, "special_tokens must be"),
        ({"vocab_size": 300, "special_tokens": ["a"]}, "2 characters or more"),
        ({"kind": "char", "special_tokens": ["Ã©"]}, "plain text can become"),  # how the vocabulary spells é
    ]:
        with pytest.raises(ValueError, match=message):
            Tokenizer.train(text_file, **arguments)


# What is cut off, absurd or of the wrong type


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, trained: Tokenizer) -> Path:
    """Our tokenizer as vocab.json, merges.txt and tokenizer.json."""
    folder = tmp_path_factory.mktemp("saved")
    state = json.loads(trained.save_pretrained(folder).read_text())
    (folder / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def test_a_vocabulary_that_begins_with_special_tokens_is_not_cut_off(tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "[MASK]", *BYTE_OF, "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert Tokenizer.from_pretrained(tmp_path).encode("ab") == [259]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="no merge makes 1 of its tokens, such as 'ab'"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
def test_merges_that_are_cut_off_are_refused(tmp_path: Path, saved: Path, trained: Tokenizer) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    whole = (saved / "merges.txt").read_bytes()
    (slow / "vocab.json").write_bytes((saved / "vocab.json").read_bytes())
    (slow / "merges.txt").write_bytes(whole)
    assert Tokenizer.from_pretrained(slow).encode(TEXT) == trained.encode(TEXT)
    for size in range(len(whole) - 1):
        (slow / "merges.txt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut off|not a list of merges|a merge is two tokens|whole vocabulary"):
            Tokenizer.from_pretrained(slow)
    state = json.loads((saved / "tokenizer.json").read_text())
    count = len(state["model"]["merges"])
    state["model"]["merges"] = state["model"]["merges"][:5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"needs {count} merges, but there are 5; the merges are cut off"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    lambda s: s["model"]["vocab"].update(ab=2147483647), lambda s: s["model"]["vocab"].update(ab=2**62),
    lambda s: s["model"]["vocab"].update(ab=-1), lambda s: s["model"]["vocab"].update(ab=1.5),
    lambda s: s["model"]["vocab"].update(ab="1"), lambda s: s["model"]["vocab"].update(ab=True),
    lambda s: s["added_tokens"][0].update(id=2147483647), lambda s: s["added_tokens"][0].update(id=[]),
    lambda s: s["added_tokens"][0].update(id=7), lambda s: s["added_tokens"][0].pop("id"),
    lambda s: s["added_tokens"][0].pop("content"), lambda s: s["added_tokens"][0].update(content=3),
    lambda s: s.update(added_tokens={}), lambda s: s.update(added_tokens=[3]), lambda s: s.update(model=[]),
    lambda s: s["model"].update(vocab=[]), lambda s: s["model"].update(merges={}),
    lambda s: s["model"].update(merges=[3]),
    lambda s: s["model"].update(merges=[["a"]]), lambda s: s["model"].pop("merges"), lambda s: s["model"].pop("vocab"),
    lambda s: s["model"].update(type=[]), lambda s: s.update(pre_tokenizer=[[[]]]), lambda s: s.update(normalizer=3),
    lambda s: s.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a{1000}){1000}"}}),
    lambda s: s.update(post_processor={"type": "TemplateProcessing"}), lambda s: s.update(version=[]),
])  # fmt: skip
def test_a_tokenizer_json_with_a_wrong_value_is_refused_by_name(
    tmp_path: Path, saved: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    state = json.loads((saved / "tokenizer.json").read_text())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used: ") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model":' * 100_000, "\xff\xfe", "null", "\0", '{"a": NaN}', "{"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
                                  "added_tokens.json"])  # fmt: skip
def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path, saved: Path, name: str, text: str) -> None:
    kept = "vocab.json merges.txt" if name in ("vocab.json", "added_tokens.json") else "tokenizer.json"
    for file in kept.split():
        shutil.copy(saved / file, tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    if text == '{"a": NaN}' and "token" in name and name not in ("tokenizer.json", "added_tokens.json"):
        return  # a setting without a meaning here
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [
    {"eos_token": ["<s>"]}, {"eos_token": 3}, {"eos_token": {"content": []}}, {"pad_token": {}}, {"pad_token": True},
    {"padding_side": 3}, {"padding_side": "up"},
])  # fmt: skip
def test_a_setting_of_the_wrong_type_is_refused_by_name(tmp_path: Path, saved: Path, settings: dict[str, Any]) -> None:
    shutil.copy(saved / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"token.*\.json.*{next(iter(settings))}"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [
    {"added_tokens_decoder": [{"content": "a", "special": True}]}, {"added_tokens_decoder": {"3": []}},
    {"added_tokens_decoder": {"3": {"special": True}}}, {"additional_special_tokens": 3},
    {"additional_special_tokens": [3]}, {"additional_special_tokens": [{}]}, {"sep_token": {"content": 3}},
])  # fmt: skip
def test_a_setting_of_a_slow_tokenizer_of_the_wrong_type_is_refused(
    tmp_path: Path, saved: Path, settings: dict[str, Any]
) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(saved / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=str(tmp_path)):
        Tokenizer.from_pretrained(tmp_path)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(FileNotFoundError, match=r"symbolic link to .*gone, which does not exist.*tokenizer\.json"):
            Tokenizer.from_pretrained(path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a FIFO, expected a regular file"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_is_bounded_by_the_text_and_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("one two one two " * 10)
    for size in (2_000_000_000, 2**62, 10**30):
        with pytest.warns(UserWarning, match=f"of the {size} tokens asked for"):
            assert Tokenizer.train(tmp_path / "text", vocab_size=size).vocab_size < 300
    monkeypatch.setattr(training, "_TOKEN_MEMORY", 1 << 40)
    with pytest.raises(ValueError, match="vocab_size=300 would take 307200 GiB, but this machine has"):
        Tokenizer.train(tmp_path / "text", vocab_size=300)


def test_no_word_in_training_is_so_long_that_its_merges_take_quadratic_time(tmp_path: Path) -> None:
    drawn, text = random.Random(0), []
    for alphabet in ("acgt", "0123456789", "=-*", " \n", "日本語", "é1½"):
        text.append("".join(drawn.choices(alphabet, k=40_000)))
    (tmp_path / "text").write_text(" and ".join(text), encoding="utf-8")
    pieces = list(training.training_text([tmp_path / "text"], []))
    assert "".join(pieces) == " and ".join(text)
    words = [word for piece in pieces for word, _ in GPT2_WORDS.pre_tokenize_str(piece)]
    assert 1000 < max(map(len, words)) <= 3 * training.LONGEST + 1  # a space, and three bytes a character
