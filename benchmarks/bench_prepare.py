"""Preparing data: filters against datatrove's, MinHash against datasketch's and rensa's, and memory a document."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import pick
from gptcore.data.corpus import write_standard_library_corpus
from gptcore.prepare.document import Document
from gptcore.prepare.duplicates import NearDuplicates, minhash_bands, shingles
from gptcore.prepare.filters import C4Quality, FineWebQuality, GopherQuality, GopherRepetition
from gptcore.text.tokenizer import END_OF_TEXT

Compare = Callable[..., None]
COUNT = pick(3, 300)
NEAR = NearDuplicates()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Return the documents of the standard library's documentation, cut to 20,000 characters, in a random order."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_standard_library_corpus(Path(folder) / "corpus.txt").read_text(encoding="utf-8")
    documents = [text[:20_000] for text in re.split(rf"\n{re.escape(END_OF_TEXT)}\n", corpus)]
    random.Random(0).shuffle(documents)
    return documents[:COUNT]


def bench_filters(texts: list[str], compare: Compare) -> None:
    """Time the four filters of FineWeb on every document, whatever the others say."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    pytest.importorskip("spacy", reason="spacy, which splits words for datatrove, is not installed")
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline import filters
    from datatrove.utils import text as their_text

    ours: list[Any] = [GopherRepetition(), GopherQuality(), C4Quality(), FineWebQuality()]
    theirs: list[Any] = [
        filters.GopherRepetitionFilter(), filters.GopherQualityFilter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False), filters.FineWebQualityFilter(),
    ]  # fmt: skip

    def run_ours() -> None:
        for text in texts:
            document = Document(text)
            for step in ours:
                step(document)

    def run_theirs() -> None:
        their_text.split_into_parts.cache_clear()  # it keeps the words of the last documents
        for text in texts:
            document = TheirDocument(text=text, id="")
            for step in theirs:
                step.filter(document)

    size = sum(map(len, texts))
    compare(
        "filters of FineWeb", f"{len(texts)} documents, {size / 1e6:.1f} MB", run_ours, run_theirs, against="datatrove"
    )


def bench_minhash(texts: list[str], compare: Compare) -> None:
    """Time text to signature, the splitting into words and n-grams included, with as many hashes."""
    datasketch = pytest.importorskip("datasketch", reason="datasketch is not installed")
    count = NEAR.bands * NEAR.rows

    def their_shingles(text: str) -> set[str]:
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[i : i + NEAR.ngram]) for i in range(max(1, len(words) - NEAR.ngram + 1))}

    def ours() -> None:
        minhash_bands([shingles(text, NEAR.ngram) for text in texts], NEAR)

    def by_datasketch() -> None:
        datasketch.MinHash.bulk([[item.encode() for item in their_shingles(text)] for text in texts], num_perm=count)

    def by_rensa() -> None:
        from rensa import RMinHash

        RMinHash.digest_matrix_from_token_sets([list(their_shingles(text)) for text in texts], count, 1)

    case = f"{len(texts)} documents, {count} hashes"
    compare("MinHash of texts", case, ours, by_datasketch, against="datasketch")
    compare("MinHash of texts, n-grams as strings", case, ours, by_rensa, against="rensa")


def recall_and_precision(shares: list[float], copies: int = 200, words: int = 300) -> list[dict[str, float]]:
    """Return what becomes of copies whose words were replaced by a share, for the table in docs/data.md."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    rows = []
    for share in shares:
        pairs = []
        for _ in range(copies):
            original = rng.choices(vocabulary, k=words)
            copy = list(original)
            for i in rng.sample(range(words), round(share * words)):
                copy[i] = rng.choice(vocabulary)
            pairs.append((" ".join(original), " ".join(copy)))
        sets = [shingles(text, NEAR.ngram) for pair in pairs for text in pair]
        bands = minhash_bands(sets, NEAR)
        exact = np.array([_jaccard(sets[2 * i], sets[2 * i + 1]) for i in range(copies)])
        proposed = np.array([(bands[2 * i] == bands[2 * i + 1]).any() for i in range(copies)])
        similar = exact >= NEAR.threshold
        rows.append(
            {
                "edited": share, "jaccard": float(exact.mean()), "similar": int(similar.sum()),
                "found": int((similar & proposed).sum()), "proposed": int(proposed.sum()),
                "removed": int((similar & proposed).sum()),
            }
        )  # fmt: skip
    return rows


def _jaccard(a: Any, b: Any) -> float:
    from gptcore.prepare.duplicates import jaccard

    return jaccard(a, b)
