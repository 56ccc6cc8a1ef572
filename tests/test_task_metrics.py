"""Metrics: the cases that seqeval and SQuAD's script test themselves with, and scikit-learn on random labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from gptcore.tasks import metrics

PER = ["B-PER", "I-PER", "O", "B-LOC"]


@pytest.mark.parametrize(
    ("tags", "expected"),  # of seqeval's own tests, and of its README
    [
        (["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O", "B-PER", "I-PER"], [("MISC", 3, 5), ("PER", 7, 8)]),
        (["B-PER", "I-PER", "O", "B-LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),
        (["I-PER", "I-PER", "O", "I-LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),
        (["B-PER", "I-LOC", "O", "O"], [("PER", 0, 0), ("LOC", 1, 1)]),
        (["B-PER", "B-PER", "I-PER"], [("PER", 0, 0), ("PER", 1, 2)]),
        (["O"], []),
        ([], []),
    ],
)
def test_entities(tags: list[str], expected: list[Any]) -> None:
    assert metrics.entities(tags) == expected


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ([PER], [["I-PER", "I-PER", "O", "I-LOC"]], (1, 1, 1, 1)),
        ([PER], [["B-PER", "O", "O", "B-LOC"]], (0.5, 0.5, 0.5, 0.5)),
        ([["B-PER", "I-PER", "O", "O"]], [["B-PER", "I-LOC", "O", "O"]], (0, 0, 0, 0)),
        ([["B-PER", "I-PER", "O", "O"]], [["B-PER", "B-PER", "O", "O"]], (0, 0, 0, 0)),
        ([["O", "O"]], [["O", "O"]], (0, 0, 0, 0)),
        (
            [PER, PER, ["B-PER", "I-PER", "O", "O"], ["B-PER", "I-PER", "O", "O"], ["O", "O"], PER],
            [["I-PER", "I-PER", "O", "I-LOC"], ["B-PER", "O", "O", "B-LOC"], ["B-PER", "I-LOC", "O", "O"],
             ["B-PER", "B-PER", "O", "O"], ["O", "O"], PER],
            (0.5, 0.625, 0.5556, 0.6104),
        ),
    ],
)  # fmt: skip
def test_entity_scores_are_seqevals(gold: Any, predicted: Any, expected: tuple[float, ...]) -> None:
    found, _ = metrics.entity_scores(gold, predicted)
    assert tuple(found.values()) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("predicted", "golds", "expected"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], (1, 1)),
        ("in the year 1889", ["1889"], (0, 0.5)),
        ("the", [""], (1, 1)),
        ("", [], (1, 1)),
        ("something", [], (0, 0)),
        ("", ["gold"], (0, 0)),
        ("a b c", ["x", "a b"], (0, 2 / 3)),  # articles are no words; the best of the golds
        ("x x y", ["x y y"], (0, 2 / 3)),
    ],
)
def test_answer_scores_are_squads(predicted: str, golds: list[str], expected: tuple[float, float]) -> None:
    assert metrics.answer_scores(predicted, golds) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_class_scores_are_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [f"l{i}" for i in range(5)]
    gold, predicted = (rng.choice(labels[: 3 + seed % 2], 40).tolist() for _ in range(2))
    counts = metrics.confusion(gold, predicted, labels)
    found = metrics.classification(counts)
    assert counts.tolist() == theirs.confusion_matrix(gold, predicted, labels=labels).tolist()
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(gold, predicted))
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(gold, predicted, average="macro"))
    assert found["mcc"] == pytest.approx(theirs.matthews_corrcoef(gold, predicted))
    report = theirs.classification_report(gold, predicted, labels=labels, output_dict=True, zero_division=0)
    for label, scores in metrics.per_class(counts, labels).items():
        assert list(scores) == pytest.approx(list(report[label].values()))
    sets = [[{label for label in labels if rng.random() < 0.4} for _ in range(30)] for _ in range(2)]
    rows = [[[int(label in one) for label in labels] for one in side] for side in sets]
    several = theirs.classification_report(*rows, target_names=labels, output_dict=True, zero_division=0)
    for label, scores in metrics.per_label(*sets, labels).items():
        assert list(scores) == pytest.approx(list(several[label].values()))


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50).tolist(), rng.normal(size=50).round(1).tolist()
    found = metrics.correlations(a, b)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found["mse"] == pytest.approx(theirs.mean_squared_error(a, b))
    assert metrics.correlations(a, [1.0] * 50)["pearson"] == 0
