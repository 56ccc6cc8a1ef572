"""What the report counts: documents by step and reason, examples, distributions. Summaries add up in any order."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptcore.prepare.document import Document, Drop
from gptcore.prepare.store import Rejected

EXAMPLES = 5  # of each reason
_AROUND = 160  # characters shown beside an offending part
_SAMPLE = 1 << 16  # characters of a document that are compressed

# Distributions: the edges of their bins. A value on an edge belongs to the bin above it.
BINS: dict[str, list[float]] = {
    "characters": [float(2**i) for i in range(27)],
    "repeated lines": [i / 20 for i in range(21)],
    "compression ratio": [i / 20 for i in range(25)],
    "type-token ratio": [i / 20 for i in range(21)],
    "perplexity": [float(2**i) for i in range(21)],
    "probability of the unwanted label": [i / 20 for i in range(21)],
}
MEASURES = list(BINS)


def measure(document: Document) -> list[float]:
    """Return a document's value in each distribution; NaN for one that does not apply."""
    text, words = document.text, len(document.words)
    lines = [line for line in document.lines if line.strip()]
    chars = sum(map(len, lines))
    unique = sum(map(len, set(lines)))
    data = text[:_SAMPLE].encode("utf-8", "replace")
    return [
        float(len(text)),
        1 - unique / chars if chars else float("nan"),
        len(zlib.compress(data, 1)) / len(data) if data else float("nan"),
        len(document.word_counts) / words if words else float("nan"),
        float(document.metadata.get("perplexity", "nan")),
        float(document.metadata.get("probability", "nan")),
    ]


def histogram(values: np.ndarray[Any, Any]) -> dict[str, list[int]]:
    """Return the counts of each distribution from measures (documents, len(MEASURES))."""
    found = {}
    for column, name in enumerate(MEASURES):
        of_one = values[:, column]
        edges = np.array(BINS[name])
        clipped = np.clip(of_one[~np.isnan(of_one)], edges[0], np.nextafter(edges[-1], 0))
        found[name] = np.histogram(clipped, edges)[0].tolist()
    return found


def language_of(document: Document) -> str:
    return str(document.metadata.get("language", ""))


def licence_of(document: Document) -> str:
    return str(document.metadata.get("license", document.metadata.get("licence", "")))


def example(document: Document, drop: Drop) -> dict[str, Any]:
    """Return the place of a dropped document and its text around the first offending part."""
    start, stop = drop.spans[0] if drop.spans else (0, 0)
    stop = min(stop, start + _AROUND)
    before = document.text[max(0, start - _AROUND) : start]
    after = document.text[stop : stop + (_AROUND if drop.spans else 2 * _AROUND)]
    return {
        "order": document.digest().hex() + document.place, "place": document.place, "detail": drop.detail,
        "before": before, "marked": document.text[start:stop], "after": after,
    }  # fmt: skip


@dataclass
class Summary:
    """The counts of some documents."""

    read: int = 0
    bytes: int = 0
    bad_count: int = 0
    bad: list[list[str]] = field(default_factory=list)  # [place, reason], the first 100
    dropped: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # step: reason: [documents, bytes]
    changed: dict[str, dict[str, int]] = field(default_factory=dict)  # step: what: how often
    examples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)  # step: reason: the first ones
    languages: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    sources: dict[str, list[int]] = field(default_factory=dict)  # [documents, bytes] read

    def add_document(self, document: Document, size: int) -> None:
        self.read += 1
        self.bytes += size
        of_source = self.sources.setdefault(document.source, [0, 0])
        of_source[0] += 1
        of_source[1] += size

    def add_drop(self, rejected: Rejected) -> None:
        reasons = self.dropped.setdefault(rejected.step, {})
        counts = reasons.setdefault(rejected.drop.reason, [0, 0])
        counts[0] += 1
        counts[1] += len(rejected.document.text.encode("utf-8", "surrogatepass"))
        of_step = self.examples.setdefault(rejected.step, {})
        of_step[rejected.drop.reason] = _first(
            [*of_step.get(rejected.drop.reason, []), example(rejected.document, rejected.drop)]
        )

    def add_changes(self, step: str, counts: Counter[str]) -> None:
        if counts:
            of_step = Counter(self.changed.get(step, {}))
            of_step.update(counts)
            self.changed[step] = dict(of_step)

    def merge(self, other: Summary) -> None:
        """Add the counts of other documents."""
        self.read += other.read
        self.bytes += other.bytes
        self.bad_count += other.bad_count
        self.bad = sorted([*self.bad, *other.bad])[:100]
        for name, languages in other.languages.items():
            self.languages[name] = self.languages.get(name, 0) + languages
        for name, counts in other.sources.items():
            self.sources[name] = [a + b for a, b in zip(self.sources.get(name, [0, 0]), counts, strict=True)]
        for name, counts in other.histograms.items():
            mine = self.histograms.get(name, [0] * len(counts))
            self.histograms[name] = [a + b for a, b in zip(mine, counts, strict=True)]
        for step, changes in other.changed.items():
            self.add_changes(step, Counter(changes))
        for step, reasons in other.dropped.items():
            for reason, (documents, size) in reasons.items():
                mine = self.dropped.setdefault(step, {}).setdefault(reason, [0, 0])
                self.dropped[step][reason] = [mine[0] + documents, mine[1] + size]
                examples = self.examples.setdefault(step, {})
                examples[reason] = _first([*examples.get(reason, []), *other.examples[step][reason]])


def _first(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those with the smallest digests: a sample that depends on contents alone."""
    return sorted(examples, key=lambda item: str(item["order"]))[:EXAMPLES]
