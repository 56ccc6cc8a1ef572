"""TF-IDF with logistic regression, the baseline of texts, where scikit-learn is installed (extra `tasks`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

TFIDF = "TF-IDF, logistic regression"


def tfidf(texts: Sequence[str], labels: Sequence[str], unseen: Sequence[str]) -> list[tuple[str, float]] | None:
    """Return the label of each unseen text and its probability; None without scikit-learn."""
    if (found := tfidf_probabilities(texts, labels, unseen)) is None:
        return None
    classes, probabilities = found
    best = probabilities.argmax(1)
    return [(classes[i], float(row[i])) for i, row in zip(best, probabilities, strict=True)]


def tfidf_probabilities(
    texts: Sequence[str], labels: Sequence[str], unseen: Sequence[str]
) -> tuple[list[str], np.ndarray[Any, Any]] | None:
    """Return the labels, and the probability of each for each unseen text; None without scikit-learn."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    words = TfidfVectorizer(token_pattern=r"(?u)\S+" if not any(len(t.split()) > 1 for t in texts) else r"(?u)\b\w+\b")
    model = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: it is a baseline
        try:
            model.fit(words.fit_transform(texts), labels)
        except ValueError:  # no words at all, or one class
            return None
    return [str(label) for label in model.classes_], model.predict_proba(words.transform(unseen))
