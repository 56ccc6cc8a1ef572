"""Find exact and near duplicates. Which member of a cluster is kept depends on the contents of the documents alone.

Near duplicates (Broder 1997; Lee et al. 2021, arXiv 2107.06499) are documents whose sets of word n-grams have a Jaccard
similarity of at least a threshold. MinHash proposes pairs, the sets themselves decide. Documents are visited longest
first, then by digest. One is dropped if it is similar to one that was kept, so each dropped document has a kept one
like it, and no two kept documents that share a band are similar.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptcore.prepare.document import Document, Integers
from gptcore.prepare.store import Corpus

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")  # a character is a word in scripts without spaces
_SEED = 0x6770_7463  # of MinHash: another one finds other candidates


@dataclass(frozen=True)
class NearDuplicates:
    """Thresholds of FineWeb (Penedo et al. 2024, section 3.4): 5-grams, 14 bands of 8 hashes; Jaccard of Lee et al.

    A pair of similarity s becomes a candidate with probability 1 - (1 - s^rows)^bands: .80 .924, .85 .988, .90 .9996.
    """

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.8
    action: str = "drop"  # or "keep": near duplicates stay, and are only kept on one side of the split

    def __post_init__(self) -> None:
        if self.action not in ("drop", "keep"):
            raise ValueError(f'[near_duplicates] action is {self.action!r}, expected "drop" or "keep"')
        if min(self.ngram, self.bands, self.rows) < 1 or not 0 < self.threshold <= 1:
            raise ValueError(
                f"[near_duplicates] ngram {self.ngram}, bands {self.bands} and rows {self.rows} must be at least 1, "
                f"threshold {self.threshold} above 0 and at most 1"
            )


@dataclass(frozen=True)
class RepeatedLines:
    """Remove lines, or paragraphs, that another document has too: all but one occurrence (Raffel et al. 2020: spans).

    Off in every recipe: FineWeb found that global removal of this kind lowers quality (Penedo et al. 2024, 3.4).
    """

    unit: str = "paragraph"  # or "line"
    min_chars: int = 100  # shorter ones stay: headings and list items repeat rightly

    def __post_init__(self) -> None:
        if self.unit not in ("line", "paragraph"):
            raise ValueError(f'[repeated_lines] unit is {self.unit!r}, expected "line" or "paragraph"')

    def split(self, text: str) -> list[str]:
        """Return units and what divides them in turn, so that their concatenation is the text."""
        return re.split(r"(\n+)" if self.unit == "line" else r"(\n{2,})", text)

    def hashes(self, document: Document) -> dict[int, str]:
        """Return the units of a document that could repeat, by their hash."""
        units = {unit.strip() for unit in self.split(document.text)[::2]}
        return {_hash(unit): unit for unit in units if len(unit) >= self.min_chars}


# ---- sets of n-grams -------------------------------------------------------------------------------------------------


class _WordHashes(dict[str, int]):
    """The hash of each word seen, computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1_000_000:
            self.clear()
        self[word] = value = _hash(word)
        return value


_word_hashes = _WordHashes()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(text: str) -> Hashes:
    """Return a 64-bit hash of each word in lower case, (words,)."""
    words = _WORDS.findall(text.lower())
    return np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where the words of `word_hashes` are in a text."""
    if len(lower := text.lower()) == len(text):
        return [match.span() for match in _WORDS.finditer(lower)]
    return [match.span() for match in _WORDS.finditer(text)]  # a rare letter becomes two in lower case


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """Return a hash of each n-gram, (words - n + 1,); a shorter text is one n-gram, an empty one has none."""
    n = min(n, len(words))
    return _mixed([words[i : len(words) - n + 1 + i] for i in range(n)]) if n else np.empty(0, np.uint64)


def _mixed(columns: Sequence[Hashes]) -> Hashes:
    """Return one hash for each row of columns, in which their order matters."""
    mixed = np.zeros(columns[0].shape, np.uint64)
    for column in columns:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def shingles(text: str, n: int) -> Hashes:
    """Return the set of n-grams of a text, sorted."""
    return np.unique(ngram_hashes(word_hashes(text), n))


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the Jaccard similarity of two sorted sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def minhash_bands(sets: Sequence[Hashes], options: NearDuplicates) -> Hashes:
    """Return for each set one hash a band, (sets, bands), from rensa's MinHash."""
    from rensa import RMinHash

    count = options.bands * options.rows
    if not sets:
        return np.empty((0, options.bands), np.uint64)
    offsets = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, count, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(sets), options.bands, options.rows)
    return _mixed([signatures[:, :, row] for row in range(options.rows)])


# ---- clusters --------------------------------------------------------------------------------------------------------


@dataclass
class Clusters:
    """For each document the one that stands for it, itself if it is kept, and their similarity."""

    keeper: Integers  # (documents,)
    similarity: np.ndarray[Any, np.dtype[np.float64]]  # (documents,), 1 for a document that is kept
    candidates: int = 0  # pairs that MinHash proposed and that were compared

    @property
    def kept(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.keeper == np.arange(len(self.keeper))
        return found


def exact_clusters(corpus: Corpus) -> Clusters:
    """Keep of equal texts the one whose record has the smallest hash."""
    rows = corpus.rows
    order = np.lexsort((rows["tie"], rows["low"], rows["high"]))
    ordered = rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (ordered["high"][1:] != ordered["high"][:-1]) | (ordered["low"][1:] != ordered["low"][:-1])
    keeper = np.empty(len(rows), np.int64)
    keeper[order] = order[new][np.cumsum(new) - 1]
    return Clusters(keeper, np.ones(len(rows)))


def near_clusters(corpus: Corpus, options: NearDuplicates, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> Clusters:
    """Cluster the documents of `alive` whose similarity reaches the threshold."""
    rows = corpus.rows
    rank = np.empty(len(rows), np.int64)
    rank[np.lexsort((rows["low"], rows["high"], -rows["shingles"].astype(np.int64)))] = np.arange(len(rows))
    documents, groups = _shared_bands(corpus, options, alive & (rows["shingles"] > 0))
    order = np.lexsort((groups, rank[documents]))
    documents, groups = documents[order], groups[order]
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    stops = np.append(starts[1:], len(documents))[: len(starts)]

    found = Clusters(np.arange(len(rows)), np.ones(len(rows)))
    members: dict[int, list[int]] = defaultdict(list)  # of each group: those that later documents are compared with
    shingles_of = functools.lru_cache(maxsize=20_000)(corpus.shingles)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        document, shared = int(documents[start]), groups[start:stop].tolist()
        best = 0.0
        for other in sorted({other for group in shared for other in members[group]}, key=rank.__getitem__):
            if options.action == "keep" and _root(found.keeper, other) == _root(found.keeper, document):
                continue
            found.candidates += 1
            similarity = _at_least(shingles_of(document), shingles_of(other), options.threshold)
            if similarity and options.action == "keep":  # single linkage: a pair never falls on two sides
                a, b = sorted((_root(found.keeper, other), _root(found.keeper, document)), key=rank.__getitem__)
                found.keeper[b] = a
            elif similarity > best:
                best, found.keeper[document], found.similarity[document] = similarity, other, similarity
        if options.action == "keep" or not best:
            for group in shared:
                members[group].append(document)
    if options.action == "keep":
        found.keeper = np.array([_root(found.keeper, i) for i in range(len(rows))], np.int64)
    return found


def _root(keeper: Integers, document: int) -> int:
    while (above := int(keeper[document])) != document:
        keeper[document] = keeper[above]
        document = above
    return document


def _at_least(a: Hashes, b: Hashes, threshold: float) -> float:
    """Return the similarity of two sets if it reaches the threshold, else 0."""
    if min(len(a), len(b)) < threshold * max(len(a), len(b)):
        return 0.0  # their sizes alone rule it out
    found = jaccard(a, b)
    return found if found >= threshold else 0.0


def _shared_bands(
    corpus: Corpus, options: NearDuplicates, alive: np.ndarray[Any, np.dtype[np.bool_]]
) -> tuple[Integers, Integers]:
    """Return (document, group) pairs, as two arrays: documents of a group have a band in common."""
    live = np.flatnonzero(alive)
    documents, groups, count = [], [], 0
    for band in range(options.bands):  # one at a time: 8 bytes a document
        values = corpus.band(band)[live]
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        same = ordered[1:] == ordered[:-1]
        shared = np.concatenate(([False], same)) | np.concatenate((same, [False])) if len(live) else np.empty(0, bool)
        number = np.cumsum(np.concatenate(([True], ~same)))[shared] if len(live) else np.empty(0, np.int64)
        documents.append(live[order[shared]])
        groups.append(number + count)
        count += len(live) + 1
    return np.concatenate(documents), np.concatenate(groups)


# ---- repeated lines --------------------------------------------------------------------------------------------------


def repeated_units(hashes: Hashes, owners: Integers, rank: Integers) -> tuple[Hashes, Integers]:
    """Return the hashes, sorted, that several documents have, and the document that keeps each, the lowest in rank."""
    order = np.lexsort((rank[owners], hashes))
    hashes, owners = hashes[order], owners[order]
    new = np.concatenate(([True], hashes[1:] != hashes[:-1])) if len(hashes) else np.empty(0, bool)
    first = new & np.concatenate((~new[1:], [False])) if len(hashes) else new
    return hashes[first], owners[first]


def remove_units(document: Document, options: RepeatedLines, kept_elsewhere: set[int]) -> int:
    """Remove the units whose hashes are given; returns how many."""
    parts, removed = options.split(document.text), 0
    kept: list[str] = []
    for i in range(0, len(parts), 2):
        unit = parts[i].strip()
        if len(unit) >= options.min_chars and _hash(unit) in kept_elsewhere:
            removed += 1
        else:
            kept += parts[i : i + 2]
    if removed:
        document.text = "".join(kept).strip("\n")
    return removed
