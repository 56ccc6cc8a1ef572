"""Filters: each a dataclass whose fields are its thresholds, with the paper that they are from.

The rules are those of datatrove's filters of the same names, down to the names of reasons, and are tested against them.
They were made for English web pages: other languages and kinds of text need other thresholds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gptcore.prepare.document import Document, Drop, Integers, count_sentences

STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]
TERMINAL = tuple(  # of Unicode's property Sentence_Terminal; no quotation marks
    "!.?\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a"
    "\u104b\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u17d6\u17d9\u17da\u1803\u1809\u1944\u1945"
    "\u1aa8\u1aa9\u1aaa\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d"
    "\u2047\u2048\u2049\u2e2e\u2e3c\u2e53\u2e54\u3002\uff0e\uff01\uff1f\uff61"
)
_LINES = re.compile(r"\n+")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_PUNCTUATION_ONLY = re.compile(r"[\W_]+")


def _over(name: str, value: float, limit: float, spans: Iterable[tuple[int, int]] = ()) -> Drop:
    return Drop(name, list(spans)[:20], f"{value:.4g}, at most {limit:g}")


def _under(name: str, value: float, limit: float) -> Drop:
    return Drop(name, [], f"{value:.4g}, at least {limit:g}")


@dataclass(frozen=True)
class Length:
    """Bounds on the characters of a document."""

    min_chars: int = 1
    max_chars: int = 50_000_000

    def __call__(self, document: Document) -> Drop | None:
        length = len(document.text)
        if not document.text.strip():
            return Drop("empty")
        if length < self.min_chars:
            return _under("too_short", length, self.min_chars)
        if length > self.max_chars:
            return _over("too_long", length, self.max_chars)
        return None


@dataclass(frozen=True)
class Origin:
    """The sources and licences that are allowed, empty for all. The licence is metadata "license" or "licence"."""

    sources: list[str] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)

    def __call__(self, document: Document) -> Drop | None:
        if self.sources and document.source not in self.sources:
            return Drop("source_not_allowed", [], document.source)
        licence = str(document.metadata.get("license", document.metadata.get("licence", "")))
        if self.licences and licence.lower() not in [name.lower() for name in self.licences]:
            return Drop("licence_not_allowed", [], licence or "no licence")
        return None


@dataclass(frozen=True)
class Language:
    """Naive Bayes over byte n-grams (Lui and Baldwin 2012, langid.py); FineWeb's threshold of .65, of another model."""

    languages: list[str] = field(default_factory=lambda: ["en"])  # ISO 639-1; empty: only recorded
    min_confidence: float = 0.65
    sample_chars: int = 2000  # that are looked at: half from the beginning, half from the middle

    def __call__(self, document: Document) -> Drop | None:
        half, middle = self.sample_chars // 2, len(document.text) // 2
        text = document.text
        sample = text if len(text) <= self.sample_chars else text[:half] + "\n" + text[middle : middle + half]
        language, confidence = _identifier().classify(sample)
        document.metadata["language"] = language
        if not self.languages:
            return None
        if language not in self.languages:
            return Drop("language", [], f"{language} with {confidence:.2f}")
        if confidence < self.min_confidence:
            return _under("language_confidence", confidence, self.min_confidence)
        return None


@functools.cache
def _identifier():  # type: ignore[no-untyped-def]  # py3langid has no types
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@dataclass(frozen=True)
class GopherRepetition:
    """Repetition within a document: Rae et al. 2021, table A1 (arXiv 2112.11446). Fractions of characters, or of items.

    top_ngrams: most that the commonest n-gram of words may take, for n = 2, 3, 4.
    duplicate_ngrams: most that repeated n-grams may take, for n = 5 to 10; an n-gram counts from its second occurrence,
    without overlap.
    """

    duplicate_lines: float = 0.3
    duplicate_paragraphs: float = 0.3
    duplicate_line_chars: float = 0.2
    duplicate_paragraph_chars: float = 0.2
    top_ngrams: list[float] = field(default_factory=lambda: [0.2, 0.18, 0.16])
    duplicate_ngrams: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.1])

    def __call__(self, document: Document) -> Drop | None:
        text, size = document.text, len(document.text)
        if not text:
            return Drop("empty")
        for parts, name, of_items, of_chars in (
            (document.paragraphs, "para", self.duplicate_paragraphs, self.duplicate_paragraph_chars),
            (_LINES.split(text), "line", self.duplicate_lines, self.duplicate_line_chars),
        ):
            repeated = _repeated(parts)
            if len(repeated) / len(parts) > of_items:
                return _over(f"dup_{name}_frac", len(repeated) / len(parts), of_items, _find(text, repeated))
            chars = sum(map(len, repeated))
            if chars / size > of_chars:
                return _over(f"dup_{name}_char_frac", chars / size, of_chars, _find(text, repeated))
        return self._ngrams(document)

    def _ngrams(self, document: Document) -> Drop | None:
        """Refine classes of equal n-grams from n to n + 1: only starts of repeated n-grams can repeat at n + 1."""
        ids, size, words = document.word_ids, len(document.text), len(document.words)
        ends = np.concatenate(([0], np.cumsum(document.word_lengths)))  # characters before each word, without spaces
        starts: Integers = np.arange(words)  # of the n-grams whose class occurs twice, in order
        classes = ids
        tops = dict(enumerate(self.top_ngrams, start=2))
        duplicates = dict(enumerate(self.duplicate_ngrams, start=5))
        for n in range(2, max([*tops, *duplicates], default=1) + 1):
            inside = starts + n <= words
            starts, classes = starts[inside], classes[inside]
            keys = classes * (len(document.word_counts) + 1) + ids[starts + n - 1]
            _, first, inverse, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            if n in tops and words >= n:
                best, times = 0, 1  # with no repeated n-gram it is the first
                if len(count) and count.max() > 1:
                    most = first[count == count.max()].min()
                    best, times = int(starts[most]), int(count.max())
                share = (int(ends[best + n] - ends[best]) + n - 1) * times / size
                if share > tops[n]:
                    return _over(f"top_{n}_gram", share, tops[n], [document.word_spans(best, n)])
            repeated = count[inverse] > 1
            starts, classes = starts[repeated], inverse[repeated]
            if n in duplicates:
                found = _without_overlap(starts.tolist(), classes.tolist(), n)
                share = sum(int(ends[start + n] - ends[start]) for start in found) / size
                if share > duplicates[n]:
                    spans = [document.word_spans(start, n) for start in found[:5]]
                    return _over(f"duplicated_{n}_n_grams", share, duplicates[n], spans)
        return None


def _without_overlap(starts: list[int], classes: list[int], n: int) -> list[int]:
    """Return the starts of n-grams seen before, skipping the n words of each."""
    seen: set[int] = set()
    found, free = [], 0
    for start, kind in zip(starts, classes, strict=True):
        if start < free:
            continue
        if kind in seen:
            found.append(start)
            free = start + n
        else:
            seen.add(kind)
    return found


def _repeated(parts: list[str]) -> list[str]:
    """Return every occurrence of a part after its first."""
    if len(parts) == len(set(parts)):
        return []
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _find(text: str, parts: list[str]) -> list[tuple[int, int]]:
    """Return where the second and later occurrences of the first few parts are."""
    spans = []
    for part in list(dict.fromkeys(filter(None, parts)))[:5]:
        start = text.find(part, text.find(part) + len(part))
        spans.append((start, start + len(part)))
    return spans


@dataclass(frozen=True)
class GopherQuality:
    """Shape of a text: Rae et al. 2021, appendix A.1 (arXiv 2112.11446), as in datatrove.

    Words without a letter or digit do not count as words for min_words, max_words and the mean length. Stop words are
    compared in lower case only.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3
    max_mean_word_length: float = 10
    max_symbols_per_word: float = 0.1  # "#", and "..." or "…"
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_words_with_letter: float = 0.8
    min_stop_words: int = 2
    stop_words: list[str] = field(default_factory=lambda: list(STOP_WORDS))

    def __call__(self, document: Document) -> Drop | None:
        text, counts, total = document.text, document.word_counts, len(document.words)
        spoken = [(len(word), n) for word, n in counts.items() if not _PUNCTUATION_ONLY.fullmatch(word)]
        words = sum(n for _, n in spoken)
        if words < self.min_words:
            return _under("gopher_short_doc", words, self.min_words)
        if words > self.max_words:
            return _over("gopher_long_doc", words, self.max_words)
        if not words:
            return None
        mean = sum(length * n for length, n in spoken) / words
        if mean < self.min_mean_word_length:
            return _under("gopher_below_avg_threshold", mean, self.min_mean_word_length)
        if mean > self.max_mean_word_length:
            return _over("gopher_above_avg_threshold", mean, self.max_mean_word_length)
        for name, symbols in (("hashes", ("#",)), ("ellipsis", ("...", "…"))):
            share = sum(map(text.count, symbols)) / total
            if share > self.max_symbols_per_word:
                spans = (match.span() for symbol in symbols for match in re.finditer(re.escape(symbol), text))
                return _over(f"gopher_too_many_{name}", share, self.max_symbols_per_word, spans)
        lines = text.splitlines()
        bullets = [line for line in lines if line.lstrip().startswith(("•", "-"))]
        if len(bullets) / len(lines) > self.max_bullet_lines:
            return _over("gopher_too_many_bullets", len(bullets) / len(lines), self.max_bullet_lines)
        ellipses = [line for line in lines if line.rstrip().endswith(("...", "…"))]
        if len(ellipses) / len(lines) > self.max_ellipsis_lines:
            return _over("gopher_too_many_end_ellipsis", len(ellipses) / len(lines), self.max_ellipsis_lines)
        letters = sum(n for word, n in counts.items() if word.isalpha() or any(map(str.isalpha, word))) / total
        if letters < self.min_words_with_letter:
            return _under("gopher_below_alpha_threshold", letters, self.min_words_with_letter)
        stop_words = len(counts.keys() & set(self.stop_words))
        if stop_words < self.min_stop_words:
            return _under("gopher_enough_stop_words", stop_words, self.min_stop_words)
        return None


@dataclass(frozen=True)
class C4Quality:
    """Lines and marks of web pages: Raffel et al. 2020, section 2.2 (arXiv 1910.10683). Removes lines, then documents.

    terminal_punctuation is off, as in FineWeb (Penedo et al. 2024, section 3.5), where it removed too much.
    """

    terminal_punctuation: bool = False
    remove_citations: bool = True
    min_sentences: int = 5
    min_words_per_line: int = 3
    max_word_length: int = 1000
    drop_lorem_ipsum: bool = True
    drop_curly_bracket: bool = True
    drop_javascript_lines: bool = True
    drop_policy_lines: bool = True

    def __call__(self, document: Document) -> Drop | None:
        text, kept, sentences = document.text, [], 0
        lower = text.lower()
        for line in text.splitlines():
            line = line.strip()
            words = line.split()
            if max(map(len, words), default=0) > self.max_word_length:
                document.counts["c4_line_too_long_word"] += 1
                continue
            if self.remove_citations and "[" in line:
                line = _CITATION.sub("", line)
            if self.terminal_punctuation and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
                document.counts["c4_line_no_terminal_punctuation"] += 1
                continue
            if len(words) < self.min_words_per_line:
                document.counts["c4_line_too_few_words"] += 1
                continue
            line_lower = line.lower()
            if self.drop_lorem_ipsum and "lorem ipsum" in line_lower:
                start = lower.find("lorem ipsum")
                return Drop("lorem_ipsum", [(start, start + 11)])
            if self.drop_javascript_lines and "javascript" in line_lower:
                document.counts["c4_line_javascript"] += 1
                continue
            if self.drop_curly_bracket and "{" in line:
                start = text.find("{")
                return Drop("curly_bracket", [(start, start + 1)])
            if self.drop_policy_lines and any(phrase in line_lower for phrase in _POLICY):
                document.counts["c4_line_policy"] += 1
                continue
            sentences += count_sentences(line) if line else 0
            kept.append(line)
        if sentences < self.min_sentences:
            return _under("too_few_sentences", sentences, self.min_sentences)
        changed = "\n".join(kept).strip()
        if changed != text:
            document.text = changed
        return None


@dataclass(frozen=True)
class FineWebQuality:
    """Lists and menus: Penedo et al. 2024, section 3.6 (arXiv 2406.17557)."""

    min_lines_ending_in_punctuation: float = 0.12
    max_short_lines: float = 0.67
    short_line_chars: int = 30
    max_duplicate_line_chars: float = 0.01
    max_newlines_per_word: float = 0.3

    def __call__(self, document: Document) -> Drop | None:
        text = document.text
        lines = [line for line in document.lines if line.strip()]
        if not lines:
            return Drop("empty")
        share = sum(line.endswith(TERMINAL) for line in lines) / len(lines)
        if share < self.min_lines_ending_in_punctuation:
            return _under("line_punct_ratio", share, self.min_lines_ending_in_punctuation)
        share = sum(len(line) <= self.short_line_chars for line in lines) / len(lines)
        if share > self.max_short_lines:
            return _over("short_line_ratio", share, self.max_short_lines)
        repeated = _repeated(lines)
        share = sum(map(len, repeated)) / (len(text) - text.count("\n"))
        if share > self.max_duplicate_line_chars:
            return _over("char_dup_ratio", share, self.max_duplicate_line_chars, _find(text, repeated))
        share = text.count("\n") / len(document.words)
        if share > self.max_newlines_per_word:
            return _over("list_ratio", share, self.max_newlines_per_word)
        return None


@dataclass(frozen=True)
class CodeQuality:
    """Generated and binary files: Chen et al. 2021, section 3.1 (arXiv 2107.03374); .25 is CodeParrot's."""

    max_mean_line_length: float = 100
    max_line_length: int = 1000
    min_alphanumeric: float = 0.25

    def __call__(self, document: Document) -> Drop | None:
        longest = max(document.lines, key=len)
        if len(longest) > self.max_line_length:
            start = document.text.find(longest)
            return _over("line_too_long", len(longest), self.max_line_length, [(start, start + len(longest))])
        mean = len(document.text) / len(document.lines)
        if mean > self.max_mean_line_length:
            return _over("mean_line_too_long", mean, self.max_mean_line_length)
        share = sum(map(str.isalnum, document.text)) / max(1, len(document.text))
        if share < self.min_alphanumeric:
            return _under("too_few_alphanumeric", share, self.min_alphanumeric)
        return None


@dataclass(frozen=True)
class Blocklist:
    """Words and phrases of files, one a line: a document with more than max_matches of them per word is dropped."""

    files: list[str] = field(default_factory=list)
    max_matches: float = 0.0

    def __call__(self, document: Document) -> Drop | None:
        if not self.files:
            return None
        spans = [match.span() for match in _phrases(tuple(self.files)).finditer(document.text)]
        share = len(spans) / max(1, len(document.words))
        return _over("blocked_words", share, self.max_matches, spans) if share > self.max_matches else None


@functools.lru_cache(maxsize=8)
def _phrases(files: tuple[str, ...]) -> re.Pattern[str]:
    lines = [line.strip() for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    phrases = sorted({line for line in lines if line and not line.startswith("#")}, key=lambda p: (-len(p), p))
    if not phrases:
        raise ValueError(f"{', '.join(files)} holds no words; write one word or phrase a line")
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)", re.IGNORECASE)
