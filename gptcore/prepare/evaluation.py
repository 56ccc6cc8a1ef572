"""Steps that compare documents with something given: evaluation files, or a model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

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
    model, tokenizer = _model(folder)
    size = model.config.n_positions
    ids = tokenizer.encode(text[: 16 * size * max_windows], allowed_special=False)[: size * max_windows]
    if tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids]
    total, count = 0.0, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's matrix products may round differently with others
    with torch.no_grad():
        for start in range(0, len(ids) - 1, size):
            window = torch.tensor([ids[start : start + size]])
            if window.shape[1] > 1:
                loss = model(window, labels=window, return_logits=False).loss
                total += float(loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
    torch.set_num_threads(threads)
    return float(np.exp(min(700.0, total / count))) if count else 1.0


@functools.lru_cache(maxsize=1)
def _model(folder: str) -> tuple[GPT, Tokenizer]:
    return GPT.from_pretrained(folder).eval(), Tokenizer.from_pretrained(folder)
