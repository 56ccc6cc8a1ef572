"""Near duplicates: no false removal, high recall, and choices that follow from contents."""

import itertools

import made_texts
import numpy as np
import pytest

from gptcore.prepare.document import Document
from gptcore.prepare.duplicates import (
    NearDuplicates,
    RepeatedLines,
    exact_clusters,
    jaccard,
    minhash_bands,
    near_clusters,
    remove_units,
    shingles,
    word_spans,
)
from gptcore.prepare.mixing import Mix, repeats
from gptcore.prepare.store import Chunks, Corpus


def corpus(folder, texts, options, sizes=(7,)) -> Corpus:
    """Texts as a corpus in chunks of the sizes given, in turn."""
    chunks, count, at = Chunks(folder), 0, 0
    for size in itertools.cycle(sizes):
        part = texts[at : at + size]
        documents = [Document(text, place=str(at + i)) for i, text in enumerate(part)]
        sets = [shingles(text, options.ngram) for text in part]
        arrays = {"bands": minhash_bands(sets, options), "shingles": np.concatenate([*sets, np.empty(0, np.uint64)])}
        chunks.write(count, documents, [], {}, [""], arrays, list(map(len, sets)))
        count, at = count + 1, at + size
        if at >= len(texts):
            return Corpus(chunks, count)


def family(seeds, shares=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)) -> list[str]:
    return [made_texts.edited(made_texts.text(seed, lines=6), share, seed) for seed in seeds for share in shares]


def test_every_removal_is_similar_and_no_similar_pair_of_a_band_is_left(tmp_path):
    options, texts = NearDuplicates(), family(range(40))
    found = near_clusters(corpus(tmp_path, texts, options), options, np.ones(len(texts), bool))
    sets = [shingles(text, options.ngram) for text in texts]
    bands = minhash_bands(sets, options)
    removed = np.flatnonzero(~found.kept)
    assert 60 < len(removed) < 160
    for document in removed:
        keeper = found.keeper[document]
        assert found.kept[keeper]
        assert jaccard(sets[document], sets[keeper]) == found.similarity[document] >= options.threshold
        assert len(sets[keeper]) >= len(sets[document])
    for a, b in itertools.combinations(np.flatnonzero(found.kept).tolist(), 2):
        if (bands[a] == bands[b]).any():
            assert jaccard(sets[a], sets[b]) < options.threshold
    similar = {(a, b) for a, b in itertools.combinations(range(len(texts)), 2) if a // 7 == b // 7
               and jaccard(sets[a], sets[b]) >= options.threshold}  # fmt: skip
    proposed = sum((bands[a] == bands[b]).any() for a, b in similar)
    assert proposed / len(similar) > 0.95


def test_choices_do_not_depend_on_order_or_chunks(tmp_path):
    options, texts = NearDuplicates(), family(range(20))
    kept = set()
    for number, sizes in enumerate([(7,), (1, 30, 4)]):
        order = np.random.default_rng(number).permutation(len(texts))
        shuffled = [texts[i] for i in order]
        found = near_clusters(
            corpus(tmp_path / str(number), shuffled, options, sizes), options, np.ones(len(texts), bool)
        )
        kept.add(frozenset(itertools.compress(shuffled, found.kept)))
    assert len(kept) == 1


def test_a_chain(tmp_path):
    """a ~ b ~ c, but a and c are unlike: "keep" makes one cluster of them, "drop" drops what is like a kept one."""
    words = made_texts.text(0, lines=20).split(" ")
    texts = [" ".join(part) for part in (words[:500], words[50:550], words[100:600])]
    options = NearDuplicates(threshold=0.8, bands=60, rows=2)
    sets = [shingles(text, 5) for text in texts]
    assert min(jaccard(sets[0], sets[1]), jaccard(sets[1], sets[2])) > 0.8 > jaccard(sets[0], sets[2])
    chain, alive = corpus(tmp_path, texts, options), np.ones(3, bool)
    keep = near_clusters(chain, NearDuplicates(threshold=0.8, bands=60, rows=2, action="keep"), alive)
    assert len(set(keep.keeper.tolist())) == 1
    dropped = near_clusters(chain, options, alive)
    assert dropped.kept.tolist() in ([False, True, False], [True, False, True])
    assert near_clusters(chain, options, np.array([True, False, True])).kept.all()


def test_exact_duplicates_and_texts_without_words(tmp_path):
    options = NearDuplicates()
    texts = ["same", "", "other", "same", "...", "same", "!!!", ""]
    made = corpus(tmp_path, texts, options, (3,))
    exact = exact_clusters(made)
    assert sorted(itertools.compress(texts, exact.kept)) == sorted(set(texts))
    assert [texts[i] for i in exact.keeper] == texts
    near = near_clusters(made, options, exact.kept)
    assert near.kept.all()  # nothing is known about texts without words, so none is removed


def test_words_without_spaces_and_their_places():
    text = "日本語の文章です。ภาษาไทย and İstanbul's Words"
    assert len(shingles(text, 1)) == 8 + 7 + 4
    spans = word_spans(text)
    assert [text[start:end] for start, end in spans[-2:]] == ["s", "Words"]


def test_repeated_units():
    options = RepeatedLines(unit="line", min_chars=4)
    document = Document("first line\n\nsecond line\nabc\nthird line")
    (hash_of_second,) = RepeatedLines(unit="line", min_chars=4).hashes(Document("second line"))
    assert remove_units(document, options, {hash_of_second}) == 1
    assert document.text == "first line\n\nabc\nthird line"
    assert "".join(options.split("a\n\nb\nc\n")) == "a\n\nb\nc\n"
    with pytest.raises(ValueError, match="unit is 'word'"):
        RepeatedLines(unit="word")


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (Mix(), [1.0, 1.0]),
        (Mix(bytes=500), [0.5, 0.5]),
        (Mix(weights={"a": 1.0, "b": 1.0}), [5.0, 500 / 900]),
        (Mix(temperature=2.0), [1000 * 10 / 40 / 100, 1000 * 30 / 40 / 900]),
    ],
)
def test_repeats_of_sources(mix, expected):
    assert repeats([100, 900], ["a", "b"], mix) == pytest.approx(expected)


def test_a_weight_without_text():
    with pytest.raises(ValueError, match="source b has weight 1, but no training text is left"):
        repeats([100, 0], ["a", "b"], Mix(weights={"a": 1.0, "b": 1.0}))
    with pytest.raises(ValueError, match="must be above 0"):
        Mix(temperature=0)
