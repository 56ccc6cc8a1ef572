"""Classify texts or pairs of texts: one label, any number of labels, or a number."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcore.files import PathLike
from gptcore.heads import PROBLEM_TYPES, GPTForSequenceClassification
from gptcore.tasks import baselines, metrics
from gptcore.tasks.examples import Columns, Read, Text, read_texts
from gptcore.tasks.task import Prediction, Result, Task, Window, labels_of

REGRESSION, SINGLE, SEVERAL = PROBLEM_TYPES
LONGEST = 300  # characters of a text in a report
HIGHEST = {REGRESSION: "pearson", SINGLE: "accuracy", SEVERAL: "f1"}


class Classify(Task[Text]):
    """settings: problem_type, and both_orders: a pair is read in both orders (similarity, GPT-1)."""

    name, model_class = "classify", GPTForSequenceClassification
    options = frozenset({"pair_column", "both_orders", "lm_coef"})
    shown = ("label", "score")

    @staticmethod
    def read(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        return read_texts(path, columns, labelled)

    @classmethod
    def settle(cls, train: list[Text], validation: list[Text]) -> dict[str, Any]:
        kinds = {type(e.label) for e in train}
        problem = REGRESSION if float in kinds else SEVERAL if tuple in kinds else SINGLE
        validation[:] = [_as(problem, example) for example in validation]
        if problem == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        names = sorted(labels_of(cls, train, validation), key=_by_number)
        if len(names) < 2:
            raise ValueError(f"{train[0].place} and all others have the label {names}; expected two labels or more")
        return {"id2label": names, "problem_type": problem}

    @classmethod
    def names(cls, example: Text) -> tuple[str, ...]:
        label = example.label
        return label if isinstance(label, tuple) else () if isinstance(label, float) else (str(label),)

    def check(self, examples: list[Text]) -> list[Text]:
        return super().check([_as(self.problem, example) for example in examples])

    @property
    def problem(self) -> str:
        found = self.settings.get("problem_type")
        return found or (REGRESSION if len(self.labels) == 1 else SINGLE)

    @property
    def metric(self) -> str:
        return HIGHEST[self.problem]

    def windows(self, example: Text, labelled: bool = False) -> list[Window]:
        texts = [self.tokenizer.encode(text) for text in (example.text, example.pair) if text is not None]
        ids: Any = self.join(*texts)
        if self.settings.get("both_orders"):
            if len(texts) < 2:
                raise ValueError(f"{example.place} has one text, but the model reads pairs in both orders")
            ids = [ids, self.join(*texts[::-1])]
        if not labelled:
            return [Window(ids)]
        target: Any = example.label
        if self.problem == SINGLE:
            target = self.labels.index(target)
        elif self.problem == SEVERAL:
            target = [float(name in target) for name in self.labels]
        return [Window(ids, targets={"labels": torch.tensor(target)})]

    def pick(self, output: Any, row: int, window: Window) -> Tensor:
        logits: Tensor = output.logits[row].float().cpu()
        return logits

    def decode(self, example: Text, windows: Sequence[Window], outputs: Sequence[Tensor]) -> Prediction:
        """Return {"label", "score", "scores"}: of a regression the number as score and label."""
        logits = outputs[0]
        if self.problem == REGRESSION:
            return {"label": float(logits[0]), "score": float(logits[0])}
        several = self.problem == SEVERAL or len(self.labels) == 1
        scores = dict(zip(self.labels, (logits.sigmoid() if several else logits.softmax(0)).tolist(), strict=True))
        best = max(scores, key=scores.__getitem__)
        label: Any = [name for name, score in scores.items() if score >= 0.5] if several else best
        return {"label": label, "score": scores[best], "scores": scores}

    def describe(self, examples: Sequence[Text]) -> list[str]:
        if self.problem == REGRESSION:
            values = np.array([e.label for e in examples], float)
            return [f"labels from {values.min():g} to {values.max():g}, mean {values.mean():g}"]
        counts = Counter(name for e in examples for name in self.names(e))
        return [f"{name}: {counts[name]:,} ({counts[name] / len(examples):.1%})" for name in self.labels]

    def score(self, examples: Sequence[Text], predictions: Sequence[Prediction]) -> Result:
        gold: list[Any] = [example.label for example in examples]
        found: list[Any] = [prediction["label"] for prediction in predictions]
        if self.problem == REGRESSION:
            far = [(-abs(g - f), i) for i, (g, f) in enumerate(zip(gold, found, strict=True))]
            return Result(metrics.correlations(gold, found), errors=self._errors(far, examples, predictions))
        if self.problem == SEVERAL:
            classes = metrics.per_label(gold, found, self.labels)
            wrong = [
                (-sum(abs(float(name in g) - p["scores"].get(name, 0)) for name in self.labels), i)
                for i, (g, f, p) in enumerate(zip(gold, found, predictions, strict=True))
                if set(g) != set(f)
            ]
            right = sum(len(set(g) & set(f)) for g, f in zip(gold, found, strict=True))
            whole = metrics.scores(right, sum(map(len, map(set, found))), sum(map(len, map(set, gold))))
            exact = sum(set(g) == set(f) for g, f in zip(gold, found, strict=True)) / len(gold)
            means = {"f1": whole.f1, "macro_f1": float(np.mean([s.f1 for s in classes.values()])), "exact": exact}
            return Result(means, classes, errors=self._errors(wrong, examples, predictions))
        counts = metrics.confusion(gold, found, self.labels)
        wrong = [(-p.get("score", 0.0), i) for i, p in enumerate(predictions) if p["label"] != gold[i]]
        classes = metrics.per_class(counts, self.labels)
        errors = self._errors(wrong, examples, predictions)
        return Result(metrics.classification(counts), classes, counts, self.labels, errors)

    def _errors(
        self, wrong: list[tuple[float, int]], examples: Sequence[Text], predictions: Sequence[Prediction]
    ) -> list[dict[str, Any]]:
        """Return errors, those that the model was surest of first."""
        return [
            {"place": e.place, "text": e.text[: LONGEST], **({"pair": e.pair[: LONGEST]} if e.pair else {}),
             "label": e.label, "predicted": predictions[i]["label"], "score": predictions[i].get("score", 0.0)}
            for _, i in sorted(wrong) for e in [examples[i]]
        ]  # fmt: skip

    def baselines(self, train: Sequence[Text], validation: Sequence[Text]) -> Iterator[tuple[str, list[Prediction]]]:
        if self.problem == REGRESSION:
            return  # the mean has correlation 0 with everything
        if self.problem == SEVERAL:
            counts = Counter(name for e in train for name in self.names(e))
            yield (
                "majority",
                [{"label": [n for n in counts if 2 * counts[n] > len(train)], "scores": {}}] * len(validation),
            )
            return
        most = Counter(str(e.label) for e in train).most_common(1)[0]
        yield "majority", [{"label": most[0], "score": most[1] / len(train)}] * len(validation)
        texts = [[f"{e.text} {e.pair or ''}" for e in part] for part in (train, validation)]
        if found := baselines.tfidf(texts[0], [str(e.label) for e in train], texts[1]):
            yield baselines.TFIDF, [{"label": label, "score": score} for label, score in found]


def _by_number(name: str) -> tuple[int, int, str]:
    """Sort whole numbers by value, before other names."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


def _as(problem: str, example: Text) -> Text:
    """Return an example with a label for the problem. Raises ValueError for a label of another kind."""
    label, wanted = example.label, {REGRESSION: "a number", SEVERAL: "a list of labels", SINGLE: "one label"}[problem]
    if problem == REGRESSION and isinstance(label, str):  # a small file may hold whole numbers alone
        with contextlib.suppress(ValueError):
            return example._replace(label=float(label))
    if isinstance(label, {REGRESSION: float, SEVERAL: tuple, SINGLE: str}[problem]):
        return example
    raise ValueError(f"{example.place}: the label is {label!r}, expected {wanted}, as the model learns")
