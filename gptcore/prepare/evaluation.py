"""Steps that compare documents with something given: evaluation files, or a model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gptcore.heads import GPTForSequenceClassification
from gptcore.model import GPT
from gptcore.prepare.document import Document, Drop
from gptcore.prepare.duplicates import Hashes, ngram_hashes, word_hashes, word_spans
from gptcore.prepare.readers import BadRecord, Reading, find_inputs, make_document, read_raw
from gptcore.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Decontaminate:
    """Drop documents that share an n-gram of words with evaluation files: Brown et al. 2020, appendix C (13 words).

    Case and punctuation do not count. The whole document goes, and the report names the n-gram.
    """

    files: list[str] = field(default_factory=list)  # of any format that is read
    ngram: int = 13
    text_field: str = "text"

    def __call__(self, document: Document) -> Drop | None:
        if not self.files:
            return None
        known = evaluation_ngrams(self)
        found = ngram_hashes(words := word_hashes(document.text), self.ngram)
        if len(words) < self.ngram or not len(known):
            return None
        places = np.searchsorted(known, found)
        matches = np.flatnonzero(known[np.minimum(places, len(known) - 1)] == found)
        if not len(matches):
            return None
        first = int(matches[0])
        span = _span(document.text, first, self.ngram)
        return Drop("contaminated", [span], f"{len(matches)} {self.ngram}-grams of the evaluation files")


@functools.lru_cache(maxsize=4)
def _ngrams_of(files: tuple[str, ...], ngram: int, text_field: str) -> Hashes:
    reading = Reading(text_field=text_field)
    parts = [np.empty(0, np.uint64)]
    for file in find_inputs(files):
        for raw in read_raw(file, reading):
            made = make_document(raw, reading)  # an evaluation file that cannot be read is an error
            document = made if isinstance(made, Document) else made[0]
            words = word_hashes(document.text)
            if len(words) >= ngram:
                parts.append(ngram_hashes(words, ngram))
    return np.unique(np.concatenate(parts))


def evaluation_ngrams(step: Decontaminate) -> Hashes:
    """Return the sorted n-grams of the evaluation files. Raises ValueError if they have none."""
    try:
        known = _ngrams_of(tuple(step.files), step.ngram, step.text_field)
    except BadRecord as error:
        raise ValueError(f"evaluation file {error}") from error
    if not len(known):
        raise ValueError(f"no text of {', '.join(step.files)} has {step.ngram} words; lower [decontaminate] ngram")
    return known


def _span(text: str, first: int, count: int) -> tuple[int, int]:
    spans = word_spans(text)[first : first + count]
    return spans[0][0], spans[-1][1]


@dataclass(frozen=True)
class Perplexity:
    """Bounds on the perplexity under a GPT: Wenzek et al. 2020 (CCNet, arXiv 1911.00359) used an n-gram model.

    The document is read in windows of the model's positions, the first `max_windows` of them, one at a time and on one
    thread, so that the number does not depend on other documents or on the number of processes.
    """

    model: str = ""  # folder of a gptcore model with its tokenizer
    min_perplexity: float = 0.0
    max_perplexity: float = 1e9
    max_windows: int = 4

    def __call__(self, document: Document) -> Drop | None:
        if not self.model:
            return None
        value = perplexity(document.text, self.model, self.max_windows)
        document.metadata["perplexity"] = round(value, 2)
        if value < self.min_perplexity:
            return Drop("perplexity_too_low", [], f"{value:.4g}, at least {self.min_perplexity:g}")
        if value > self.max_perplexity:
            return Drop("perplexity_too_high", [], f"{value:.4g}, at most {self.max_perplexity:g}")
        return None


def perplexity(text: str, folder: str, max_windows: int) -> float:
    """Return exp of the mean loss a token; 1 for a text without two tokens."""
    model, tokenizer = _model(GPT, folder)
    size = model.config.n_positions
    ids = _tokens(tokenizer, text, size * max_windows)
    if tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids]
    total, count = 0.0, 0
    with _one_thread():
        for start in range(0, len(ids) - 1, size):
            window = torch.tensor([ids[start : start + size]])
            if window.shape[1] > 1:
                loss = model(window, labels=window, return_logits=False).loss
                total += float(loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
    return float(np.exp(min(700.0, total / count))) if count else 1.0


@dataclass(frozen=True)
class Classifier:
    """Drop documents of an unwanted label, as toxic ones, by a classifier of texts, as `gptcore finetune` makes them.

    A document is read in windows, the first `max_windows` of them, one at a time and on one thread, as for perplexity;
    the window in which the label is most probable decides.
    """

    model: str = ""  # folder of a GPTForSequenceClassification with its tokenizer
    label: str = ""  # one of its labels
    max_probability: float = 0.5
    max_windows: int = 16

    def __call__(self, document: Document) -> Drop | None:
        if not self.model:
            return None
        value, span = classify(document.text, self.model, self.label, self.max_windows)
        document.metadata["probability"] = round(value, 4)
        if value > self.max_probability:
            return Drop(f"classified_{self.label}", [span], f"{value:.4g}, at most {self.max_probability:g}")
        return None


def classify(text: str, folder: str, label: str, max_windows: int) -> tuple[float, tuple[int, int]]:
    """Return the highest probability of a label in a window, and the characters of that window."""
    model, tokenizer = _model(GPTForSequenceClassification, folder)
    if label not in model.labels or model.num_labels == 1 or model.problem_type == "regression":
        raise ValueError(f"[classifier] label is {label!r}, expected one of {folder}: {', '.join(model.labels)}")
    settings = model.settings.get("gptcore", {})  # of gptcore finetune
    gpt1 = settings.get("layout") == "gpt1"  # Radford et al. 2018, section 3.3
    start, end = ([tokenizer.special_tokens[f"<|{name}|>"]] if gpt1 else [] for name in ("start", "extract"))
    size = int(settings.get("max_length", model.config.n_positions)) - len(start) - len(end)
    ids, number = _tokens(tokenizer, text, size * max_windows), model.labels.index(label)
    best, place = 0.0, 0
    with _one_thread():
        for begin in range(0, len(ids), size):
            logits = model(torch.tensor([[*start, *ids[begin : begin + size], *end]])).logits[0].float()
            several = model.problem_type == "multi_label_classification"
            found = float((logits.sigmoid() if several else logits.softmax(0))[number])
            if found > best:
                best, place = found, begin
    edges = (len(tokenizer.decode(ids[:stop])) for stop in (place, place + size))
    return best, (next(edges), next(edges))


def _tokens(tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    """Return the first tokens of a text, without reading all of a long one."""
    return tokenizer.encode(text[: 16 * count], allowed_special=False)[:count]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's matrix products may round differently with others
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=2)
def _model(kind: Any, folder: str) -> tuple[Any, Tokenizer]:
    return kind.from_pretrained(folder).eval(), Tokenizer.from_pretrained(folder)
