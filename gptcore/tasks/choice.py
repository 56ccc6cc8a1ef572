"""Choose among texts: a sequence for each choice, a score for each, one softmax (GPT-1, section 3.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptcore.files import PathLike
from gptcore.heads import GPTForMultipleChoice
from gptcore.tasks import baselines, metrics
from gptcore.tasks.examples import Choice, Columns, Read, read_choices
from gptcore.tasks.task import Prediction, Result, Task, Window


class Choose(Task[Choice]):
    """settings: lm_coef, whose loss is over the tokens of every choice."""

    name, model_class, metric, separator = "choice", GPTForMultipleChoice, "accuracy", "\n"
    options, shown = frozenset({"lm_coef"}), ("label", "choice", "score")

    @staticmethod
    def read(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        return read_choices(path, columns, labelled)

    @classmethod
    def settle(cls, train: list[Choice], validation: list[Choice]) -> dict[str, Any]:
        count = len(train[0].choices)
        for example in (*train, *validation):
            if len(example.choices) != count:
                found = f"{len(example.choices)} choices, but {train[0].place} has {count}"
                raise ValueError(f"{example.place} has {found}; all examples to learn from have as many")
        return {}

    def windows(self, example: Choice, labelled: bool = False) -> list[Window]:
        context = self.tokenizer.encode(example.context)
        rows = [self.join(context, self.tokenizer.encode(choice)) for choice in example.choices]
        targets: dict[str, Any] = {}
        if labelled:
            targets = {"mc_labels": torch.tensor(example.label)}
            if self.settings.get("lm_coef"):
                targets["labels"] = rows
        return [Window(rows, targets=targets)]

    def pick(self, output: Any, row: int, window: Window) -> Tensor:
        logits: Tensor = output.logits[row].float().cpu()
        return logits

    def decode(self, example: Choice, windows: Sequence[Window], outputs: Sequence[Tensor]) -> Prediction:
        """Return {"label", "choice", "score", "scores"}."""
        scores = outputs[0].softmax(0).tolist()
        best = scores.index(max(scores))
        return {"label": best, "choice": example.choices[best], "score": scores[best], "scores": scores}

    def describe(self, examples: Sequence[Choice]) -> list[str]:
        counts = Counter(e.label for e in examples)
        return [
            f"choice {i} is right: {counts[i]:,} ({counts[i] / len(examples):.1%})" for i in sorted(counts, key=str)
        ]

    def score(self, examples: Sequence[Choice], predictions: Sequence[Prediction]) -> Result:
        gold, found = [str(e.label) for e in examples], [str(p["label"]) for p in predictions]
        labels = sorted({*gold, *found, *(str(i) for i in range(len(examples[0].choices)))}, key=int)
        counts = metrics.confusion(gold, found, labels)
        wrong = sorted((-p.get("score", 0.0), i) for i, p in enumerate(predictions) if gold[i] != found[i])
        errors = [
            {"place": e.place, "context": e.context[:300], "label": e.choices[e.label or 0],
             "predicted": e.choices[int(found[i])], "score": -score}
            for score, i in wrong for e in [examples[i]]
        ]  # fmt: skip
        accuracy = {"accuracy": metrics.classification(counts)["accuracy"]}
        return Result(accuracy, metrics.per_class(counts, labels), counts, labels, errors)

    def baselines(
        self, train: Sequence[Choice], validation: Sequence[Choice]
    ) -> Iterator[tuple[str, list[Prediction]]]:
        most = Counter(e.label for e in train).most_common(1)[0][0]
        yield "majority", [{"label": most}] * len(validation)
        flat = [(choice, str(int(i == e.label))) for e in train for i, choice in enumerate(e.choices)]
        texts, labels = map(list, zip(*flat, strict=True))
        found = baselines.tfidf_probabilities(texts, labels, [c for e in validation for c in e.choices])
        if found is not None:
            rows = iter(found[1][:, found[0].index("1")])
            scores = [[next(rows) for _ in e.choices] for e in validation]
            yield f"{baselines.TFIDF} of the choice", [{"label": row.index(max(row))} for row in scores]
