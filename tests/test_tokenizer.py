"""The tokenizer: all text and bytes round-trip, ids equal plain `tokenizers`, no text forges a special token."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.text import pretokenize as module
from gptcore.text.offsets import join_surrogates
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
    text = join_surrogates(text)
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
    def seconds(count: int) -> float:
        start = time.process_time()
        ids = tokenizer.encode(character * count)
        took = time.process_time() - start
        assert tokenizer.decode(ids) == character * count
        return took

    few = min(seconds(20_000) for _ in range(2))
    assert seconds(4 * PIECE) < 65 * max(0.01, few)  # 13 times the text; 170 times the time if it were quadratic


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


@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_offsets_cover_every_text(both: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in both.values():
        result = tokenizer(text, return_offsets_mapping=True)
        for i, (start, end) in zip(result["input_ids"], result["offset_mapping"], strict=True):
            assert tokenizer.decode_bytes([i]) in join_surrogates(text[start:end]).encode("utf-8", "surrogatepass")
        covered = {at for start, end in result["offset_mapping"] for at in range(start, end)}
        assert covered == set(range(len(text)))
