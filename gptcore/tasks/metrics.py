"""Metrics of the tasks, by the rules of the programs whose numbers are published; docs/finetuning.md names them.

seqeval and SQuAD's script are no longer maintained, and scikit-learn would only be used for a few ratios of counts. The
tests compare the rules below with the originals.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Tagged = tuple[str, int, int]  # an entity: its type, its first and its last word


class Scores(NamedTuple):
    """Precision, recall and F1; a ratio of nothing is 0."""

    precision: float
    recall: float
    f1: float
    support: int


def scores(right: float, predicted: float, there: float) -> Scores:
    """Return the scores of a class from how often it is predicted rightly, predicted at all, and there."""
    f1 = 2 * right / (predicted + there) if predicted + there else 0.0
    return Scores(right / predicted if predicted else 0.0, right / there if there else 0.0, f1, int(there))


# ---- classes ---------------------------------------------------------------------------------------------------------


def confusion(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray[Any, Any]:
    """Return how often each label (row) was predicted as each (column)."""
    number = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, ([number[g] for g in gold], [number[p] for p in predicted]), 1)
    return counts


def classification(counts: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return accuracy, macro F1 over the labels that occur, and Matthews' correlation, of a confusion matrix."""
    there, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
    total = counts.sum()
    f1 = [scores(*row).f1 for row in zip(right, predicted, there, strict=True) if row[1] + row[2]]
    # Gorodkin 2004, equation 8: the multi-class form, as in scikit-learn
    spread = (float(total) ** 2 - (predicted.astype(float) ** 2).sum()) * (
        float(total) ** 2 - (there.astype(float) ** 2).sum()
    )
    mcc = (float(right.sum()) * total - (predicted.astype(float) * there).sum()) / spread**0.5 if spread else 0.0
    return {"accuracy": float(right.sum() / total), "macro_f1": float(np.mean(f1)), "mcc": float(mcc)}


def per_class(counts: np.ndarray[Any, Any], labels: Sequence[str]) -> dict[str, Scores]:
    rows = zip(labels, counts.diagonal(), counts.sum(0), counts.sum(1), strict=True)
    return {label: scores(*map(int, numbers)) for label, *numbers in rows}


def per_label(
    gold: Sequence[Iterable[str]], found: Sequence[Iterable[str]], labels: Sequence[str]
) -> dict[str, Scores]:
    """Return the scores of each label where a text may have any number of them."""
    there, predicted, right = Counter[str](), Counter[str](), Counter[str]()
    for g, f in zip(map(set, gold), map(set, found), strict=True):
        there.update(g)
        predicted.update(f)
        right.update(g & f)
    return {label: scores(right[label], predicted[label], there[label]) for label in labels}


def correlations(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation (0 where one side is constant) and the mean squared error."""
    a, b = np.asarray(gold, float), np.asarray(predicted, float)
    return {"pearson": _pearson(a, b), "spearman": _pearson(_ranks(a), _ranks(b)), "mse": float(((a - b) ** 2).mean())}


def _pearson(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the ranks, of equal values their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray[Any, Any] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return means


# ---- entities --------------------------------------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> list[Tagged]:
    """Return the entities of a sentence by seqeval's default rule, that of conlleval: I- after another type begins one.

    A tag is O, or B- or I- and a type.
    """
    found: list[Tagged] = []
    begin = 0
    for i, (before, tag) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        ends = before != "O" and (tag == "O" or tag.startswith("B-") or tag[2:] != before[2:])
        if ends:
            found.append((before[2:], begin, i - 1))
        if tag != "O" and (before == "O" or ends):
            begin = i
    return found


def entity_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, Scores]]:
    """Return precision, recall and F1 over all entities and the macro F1 of the types, then the scores of each type.

    An entity counts if its type, its first and its last word are right: seqeval's default mode.
    """
    there, found, right = Counter[str](), Counter[str](), Counter[str]()
    for g, p in zip(map(entities, gold), map(entities, predicted), strict=True):
        there.update(name for name, *_ in g)
        found.update(name for name, *_ in p)
        right.update(name for name, *_ in set(g) & set(p))
    types = {name: scores(right[name], found[name], there[name]) for name in sorted(there | found)}
    whole = scores(right.total(), found.total(), there.total())
    macro = float(np.mean([found.f1 for found in types.values()])) if types else 0.0
    return {"precision": whole.precision, "recall": whole.recall, "f1": whole.f1, "macro_f1": macro}, types


# ---- answers ---------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_answer(text: str) -> str:
    """Return an answer as SQuAD's script compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_scores(predicted: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer, "" for none, by SQuAD 2.0's script: the best over the gold answers."""
    kept = [gold for gold in golds if normal_answer(gold)] or [""]
    exact = max(float(normal_answer(predicted) == normal_answer(gold)) for gold in kept)
    return exact, max(_overlap(normal_answer(predicted).split(), normal_answer(gold).split()) for gold in kept)


def _overlap(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    shared = (Counter(predicted) & Counter(gold)).total()
    return scores(shared, len(predicted), len(gold)).f1
