"""Preparing data: filters against datatrove's, MinHash against datasketch's and rensa's."""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import FORM, in_child, pick
from gptcore.data.corpus import write_standard_library_corpus
from gptcore.prepare.document import Document
from gptcore.prepare.duplicates import NearDuplicates, jaccard, minhash_bands, shingles
from gptcore.prepare.filters import C4Quality, FineWebQuality, GopherQuality, GopherRepetition
from gptcore.prepare.pipeline import prepare
from gptcore.prepare.recipe import make_recipe
from gptcore.text.tokenizer import END_OF_TEXT

Compare = Callable[..., None]
COUNT = pick(3, 100)
NEAR = NearDuplicates()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Return the documents of the standard library's documentation, cut to 20,000 characters, in a random order."""
    if FORM == "toy":  # the corpus takes seconds
        return [Path(__file__).read_text(encoding="utf-8")] * COUNT
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_standard_library_corpus(Path(folder) / "corpus.txt").read_text(encoding="utf-8")
    documents = [text[:20_000] for text in re.split(rf"\n{re.escape(END_OF_TEXT)}\n", corpus)]
    random.Random(0).shuffle(documents)
    return documents[:COUNT]


def bench_filters(texts: list[str], compare: Compare) -> None:
    """Time the four filters of FineWeb on every document, whatever the others say."""
    pytest.importorskip("datatrove", reason='datatrove is not installed (pip install "gptcore[test]")')
    pytest.importorskip("spacy", reason="spacy, which splits words for datatrove, is not installed (pip install spacy)")
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


def their_shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return list({" ".join(words[i : i + NEAR.ngram]) for i in range(max(1, len(words) - NEAR.ngram + 1))})


@pytest.mark.parametrize("library", ["datasketch", "rensa"])
def bench_minhash(texts: list[str], compare: Compare, library: str) -> None:
    """Time text to signature, with the splitting into words and n-grams. Ours passes hashes of n-grams to rensa."""
    module = pytest.importorskip(library, reason=f"{library} is not installed (pip install {library})")
    count = NEAR.bands * NEAR.rows

    def ours() -> None:
        minhash_bands([shingles(text, NEAR.ngram) for text in texts], NEAR)

    def theirs() -> None:
        sets = [their_shingles(text) for text in texts]
        if library == "datasketch":
            module.MinHash.bulk([[item.encode() for item in items] for items in sets], num_perm=count)
        else:
            module.RMinHash.digest_matrix_from_token_sets(sets, count, 1)

    compare("MinHash of texts", f"{len(texts)} documents, {count} hashes", ours, theirs, against=library)


SIZES = pick((20, 40), (10_000, 40_000))
BOUND = 2e9  # bytes of docs/data.md


@pytest.mark.skipif(FORM == "quick", reason="takes a minute: only in the full form")
def bench_memory(record: Callable[..., None]) -> None:
    """Measure what the peak memory of a run grows by; one document in twenty is a near duplicate."""
    growths = []
    for _ in range(2):
        few, many = (in_child("benchmarks.bench_prepare", str(count)) for count in SIZES)
        growths.append(1e6 * max(1.0, many - few) / (SIZES[1] - SIZES[0]))
    case = f"1,000,000 documents, from {SIZES[0]:,} and {SIZES[1]:,}"
    record("memory of gptcore prepare", case, growths, [BOUND] * len(growths), against="stated bound", unit="B")


def peak_memory(count: int) -> int:
    """Prepare so many documents of 60 words in this process, and return its peak memory."""
    rng = random.Random(0)
    texts: list[list[str]] = []
    vocabulary = [f"w{i}" for i in range(5000)]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/in.jsonl", "w", encoding="utf-8") as file:
            for i in range(count):
                texts = [*texts[-18:], [*texts[0][:-1], "x"] if i % 20 == 19 else rng.choices(vocabulary, k=60)]
                file.write(json.dumps({"text": " ".join(texts[-1])}) + "\n")
        recipe = make_recipe("none", {"near_duplicates": {"action": "drop"}, "shards": {"tokenizer_bytes": 100_000}})
        report = prepare([f"{folder}/in.jsonl"], f"{folder}/out", recipe, log=lambda line: None)
    assert report["duplicates"]["near"] == count // 20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def recall_and_precision(shares: list[float], copies: int = 200, words: int = 300) -> list[dict[str, float]]:
    """Return what becomes of copies in which a share of the words was replaced: the table of docs/data.md."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    rows = []
    for share in shares:
        sets = []
        for _ in range(copies):
            copy = rng.choices(vocabulary, k=words)
            sets.append(shingles(" ".join(copy), NEAR.ngram))
            for i in rng.sample(range(words), round(share * words)):
                copy[i] = rng.choice(vocabulary)
            sets.append(shingles(" ".join(copy), NEAR.ngram))
        bands = minhash_bands(sets, NEAR)
        similarity = np.array([jaccard(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)])
        proposed = (bands[::2] == bands[1::2]).any(axis=1)
        similar = similarity >= NEAR.threshold
        rows.append(
            {
                "edited": share, "mean similarity": round(float(similarity.mean()), 3), "similar": int(similar.sum()),
                "proposed": int(proposed.sum()), "dropped": int((similar & proposed).sum()),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__" and sys.argv[1:]:
    print(peak_memory(int(sys.argv[1])))
elif __name__ == "__main__":
    for line in recall_and_precision([0.002, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.1, 0.2, 0.4]):
        print(line)
