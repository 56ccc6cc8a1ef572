"""Documents and pieces of text: a stream may be cut anywhere, a text only where no token goes across."""

from __future__ import annotations

import random
import re

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcore.text import pretokenize as module
from gptcore.text.pretokenize import in_order, split_documents
from gptcore.text.tokenizer import Tokenizer


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids by `tokenizers` alone, the whole text at once."""
    ids: list[int] = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_every_non_space_ends_a_pre_token_before_white_space() -> None:
    # _SAFE_CUT trusts Python's idea of white space; the regular expression in `tokenizers` has its own.
    # All white space is in the Basic Multilingual Plane.
    characters = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000 and not chr(c).isspace()]
    for space in " \n":
        text = "".join(f"{c}{space}" for c in characters)
        # No pre-token goes from a non-space into the space after it: the spaces all start theirs.
        pieces = module.GPT2_WORDS.pre_tokenize_str(text)
        starts = {start for _, (start, _) in pieces}
        assert starts >= set(range(1, len(text), 2))
    # Nor does white space, several of it, begin with one of these characters.
    pieces = module.GPT2_WORDS.pre_tokenize_str("".join(f"{c}  " for c in characters))
    assert {end for _, (_, end) in pieces} >= set(range(1, 3 * len(characters), 3))


def of_merges(merges: list[tuple[str, str]]) -> Tokenizer:
    vocab = dict.fromkeys([*module.BYTE_OF, *(left + right for left, right in merges)])
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    made.pre_tokenizer = module.GPT2_WORDS
    return Tokenizer(made)


def random_merges(drawn: random.Random, alphabet: str) -> list[tuple[str, str]]:
    """Any merges over few bytes, some in an order that no training gives."""
    tokens, merges = [module.STAND_IN[byte] for byte in sorted(set(alphabet.encode()))], []
    for _ in range(drawn.randint(1, 14)):
        pair = drawn.choice(tokens), drawn.choice(tokens)
        if pair not in merges and len(pair[0] + pair[1]) <= 12:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    return drawn.sample(merges, len(merges)) if drawn.random() < 0.3 else merges


@pytest.mark.slow
def test_no_token_goes_across_a_cut_in_a_word_whatever_the_merges_and_what_follows() -> None:
    drawn, cuts = random.Random(5), 0
    for _ in range(1500):
        alphabet = drawn.choice(["ab", "abé"])
        merges = random_merges(drawn, alphabet)
        if not in_order(merges):
            continue
        vocab = dict.fromkeys([*module.BYTE_OF, *(left + right for left, right in merges)])
        bpe = tokenizers.models.BPE({token: i for i, token in enumerate(vocab)}, merges)

        def tokens(text: str, bpe: tokenizers.models.BPE = bpe) -> list[str]:
            spelt = "".join(map(module.STAND_IN.__getitem__, text.encode()))
            return [token.value for token in bpe.tokenize(spelt)] if text else []

        for _ in range(6):
            word = "".join(drawn.choices(alphabet, k=drawn.randint(10, 80)))
            place = module.cut_in_word(word, bpe, max(map(len, vocab)), count=2)
            if place is None:
                continue
            cuts += 1
            for _ in range(4):
                whole = word + "".join(drawn.choices(alphabet, k=drawn.randint(0, 20)))
                assert tokens(whole[:place]) + tokens(whole[place:]) == tokens(whole)
    assert cuts > 3000


@given(seed=st.integers(0), text=st.text("abé", min_size=30, max_size=400), piece=st.integers(9, 60))
@settings(max_examples=200, deadline=None)
def test_a_word_in_pieces_has_the_ids_of_the_whole_whatever_the_merges(seed: int, text: str, piece: int) -> None:
    tokenizer = of_merges(random_merges(random.Random(seed), "abé"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        assert tokenizer.encode(text) == plain(tokenizer, text)


def test_a_long_word_is_cut_unless_its_merges_are_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 50)
    merges = [("a", "a"), ("b", "aa"), ("b", "a"), ("ba", "a")]  # "baa" comes to be in two ways
    for order, whole in (
        (merges, False),
        ([*merges, ("baa", "a")], False),
        ([*merges[:2], ("baa", "a"), *merges[2:]], True),
    ):
        assert in_order(order) != whole
        tokenizer = of_merges(order)
        text = "".join(random.Random(0).choices("ab", k=3000))
        cut = [piece for piece in module.pieces([text.encode(), None], tokenizer._cut) if piece is not None]
        assert "".join(cut) == text
        assert (len(cut) == 1) == whole
        assert tokenizer.encode(text) == plain(tokenizer, text)


PARTS = [b"<|endoftext|>", b"<|endoftext|>\n", b"<|endoftext|>\r\n", b"<|end", b"oftext|>", b"<", b"\n", b"\r", b"bc\n"]


@given(parts=st.lists(st.sampled_from(PARTS), min_size=1), size=st.integers(1, 40))
@example(parts=PARTS * 3, size=1)
@example(parts=PARTS * 3, size=2)
@example(parts=PARTS * 3, size=13)
@settings(max_examples=400, deadline=None)
def test_documents_are_the_same_however_the_stream_is_cut(parts: list[bytes], size: int) -> None:
    stream = b"".join(parts)
    documents, current = [], b""
    for chunk in split_documents(stream[at : at + size] for at in range(0, len(stream), size)):
        current += chunk or b""
        if chunk is None:
            documents.append(current)
            current = b""
    assert current == b""
    assert documents == [document for document in re.split(rb"<\|endoftext\|>(?:\r?\n)?", stream) if document]
