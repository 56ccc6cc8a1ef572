"""The record that passes through the pipeline, and the views of its text that filters share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]

# Close to the words of spaCy's English tokenizer, which datatrove's filters count, at a small part of its time
WORD = re.compile(r"(?:https?://|www\.)\S+|\w+(?:[.@]\w+)*|['’]\w+|-{2,}|\.{2,}|[^\w\s]")
_WORD_CHARACTER = re.compile(r"\w")
_PARAGRAPHS = re.compile(r"\n{2,}")
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)")


@dataclass
class Drop:
    """Why a document was dropped. `spans` are the offending parts of its text, as (start, end) in characters."""

    reason: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    detail: str = ""  # the measured value beside its limit


class Step(Protocol):
    """A dataclass of thresholds. A call keeps a document, possibly changing its text, or says why to drop it."""

    def __call__(self, document: Document) -> Drop | None: ...


class Document:
    """A text with its origin. Views of the text are computed once and forgotten when the text is replaced."""

    def __init__(
        self, text: str, *, source: str = "", place: str = "", id: str = "", metadata: dict[str, Any] | None = None
    ) -> None:
        self._text = text
        self.source, self.place = source, place  # name of the input; file and number of the record
        self.id = id  # the record's own; "" if it has none
        self.metadata = metadata or {}
        self.counts: Counter[str] = Counter()  # what steps changed, as "mojibake" or "email"

    @property
    def text(self) -> str:
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        self._text = text
        for view in ("words", "word_counts", "word_ids", "word_lengths", "lines", "paragraphs"):
            self.__dict__.pop(view, None)

    @functools.cached_property
    def words(self) -> list[str]:
        return WORD.findall(self._text)

    @functools.cached_property
    def word_counts(self) -> dict[str, int]:
        """Return how often each different word occurs, in the order of first occurrence."""
        return Counter(self.words)

    @functools.cached_property
    def word_ids(self) -> Integers:
        """Return for each word (words,) its position among the different words."""
        ids = {word: i for i, word in enumerate(self.word_counts)}
        return np.fromiter(map(ids.__getitem__, self.words), np.int64, len(self.words))

    @functools.cached_property
    def word_lengths(self) -> Integers:
        """Return the characters of each word, (words,)."""
        lengths = np.fromiter(map(len, self.word_counts), np.int64, len(self.word_counts))
        found: Integers = lengths[self.word_ids]
        return found

    @functools.cached_property
    def lines(self) -> list[str]:
        return self._text.split("\n")

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return _PARAGRAPHS.split(self._text.strip())

    def word_spans(self, first: int, count: int) -> tuple[int, int]:
        """Return the characters that words first to first + count take, as (start, end)."""
        for number, match in enumerate(WORD.finditer(self._text)):
            if number == first:
                start = match.start()
            if number == first + count - 1:
                return start, match.end()
        raise IndexError(f"the document has {len(self.words)} words, not {first + count}")

    def digest(self) -> bytes:
        """Return 16 bytes that identify the text."""
        return hashlib.blake2b(self._text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def tie(self) -> bytes:
        """Return 8 bytes that order documents of equal text: they depend on the record, never on when it was read."""
        return hashlib.blake2b(self._json(text="").encode(), digest_size=8).digest()

    def to_json(self) -> str:
        return self._json(text=self._text)

    def _json(self, text: str) -> str:
        record = {"id": self.id, "text": text, "source": self.source, "place": self.place, "metadata": self.metadata}
        return json.dumps(record, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str | bytes) -> Document:
        return cls(**json.loads(line))


def count_sentences(text: str) -> int:
    """Return the number of sentences in a line, at least 1: those with a terminal mark, and words after the last."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return max(1, len(ends) + (_WORD_CHARACTER.search(text, ends[-1] if ends else 0) is not None))


def settings(step: Any) -> dict[str, Any]:
    """Return the thresholds of a step, as they are given in TOML."""
    return dataclasses.asdict(step)
