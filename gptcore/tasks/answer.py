"""Answer questions by a span of a context, or say that it has no answer.

A window is the question, a part of the context, and a last token, which reads all of it: a window without the answer is
learnt as one that starts and ends there. Scores of all windows of a question share one softmax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptcore.files import PathLike
from gptcore.heads import GPTForQuestionAnswering
from gptcore.tasks import metrics
from gptcore.tasks.examples import Columns, Question, Read, Span, read_questions, trimmed
from gptcore.tasks.task import Prediction, Result, Task, Window

LONGEST_QUESTION, STRIDE, LONGEST_ANSWER = 64, 128, 30  # tokens, as in transformers' examples


class Part(NamedTuple):
    """The context in a window: its first token, and the characters of each, without spaces around."""

    begin: int
    spans: list[Span]
    seen: int  # spans that end before here are in the window before


class Answer(Task[Question]):
    """settings: threshold of `no_answer` above which no answer is given, chosen on the validation set; None: never."""

    name, model_class, metric, separator = "answer", GPTForQuestionAnswering, "f1", "\n"
    shown = ("id", "answer", "score", "start", "end")
    stride = STRIDE  # tokens that two windows of a context share

    @staticmethod
    def read(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        return read_questions(path, columns, labelled)

    @classmethod
    def settle(cls, train: list[Question], validation: list[Question]) -> dict[str, Any]:
        if not any(e.answers for e in train):
            raise ValueError(
                f"{train[0].place} and all others have no answer; a model cannot learn to answer from them"
            )
        return {}

    @property
    def threshold(self) -> float:
        return _limit(self.settings.get("threshold"))

    def windows(self, example: Question, labelled: bool = False) -> list[Window]:
        end = self.end or [
            self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.delimiter[-1]
        ]
        question = self.tokenizer.encode(example.question)
        limit = min(LONGEST_QUESTION, self.max_length // 2)
        self.truncated += len(question) > limit
        head = [*self.start, *question[:limit], *self.delimiter]
        encoded = self.tokenizer(example.context, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], [trimmed(example.context, s) for s in encoded["offset_mapping"]]
        room = self.max_length - len(head) - len(end)
        if room < 2:
            raise ValueError(f"max_length {self.max_length} has no room for a context beside a question of {len(head)}")
        step = room - min(self.stride, room // 2)
        made, seen = [], 0
        for begin in range(0, max(1, len(ids) - room + step), step):
            part = ids[begin : begin + room]
            window = Window([*head, *part, *end], Part(len(head), spans[begin : begin + room], seen))
            seen = spans[begin + len(part) - 1][1]
            if labelled:
                window.targets = self._target(example, window)
            made.append(window)
        return made

    @staticmethod
    def _target(example: Question, window: Window) -> dict[str, Any]:
        """Return the first and last token of the first answer; the last of the window if it is not all there."""
        first = last = len(window.input_ids) - 1
        if example.answers:
            text, start = example.answers[0]
            inside = [i for i, (a, b) in enumerate(window.marks.spans) if a < start + len(text) and b > start and a < b]
            spans = window.marks.spans
            if inside and spans[inside[0]][0] <= start and spans[inside[-1]][1] >= start + len(text.rstrip()):
                first, last = inside[0] + window.marks.begin, inside[-1] + window.marks.begin
        return {"start_positions": torch.tensor(first), "end_positions": torch.tensor(last)}

    def pick(self, output: Any, row: int, window: Window) -> Tensor:
        length = len(window.input_ids)
        return torch.stack([output.start_logits[row, :length], output.end_logits[row, :length]]).float().cpu()

    def candidates(
        self, windows: Sequence[Window], outputs: Sequence[Tensor], longest: int
    ) -> tuple[list[tuple[float, Span]], float, float]:
        """Return spans with their logits, the best 100; the logit of no answer; log of the sum of all exponentials."""
        found: list[tuple[float, Span]] = []
        total, null_score = -np.inf, np.inf
        for window, output in zip(windows, outputs, strict=True):
            part: Part = window.marks
            start, end = output[:, part.begin : part.begin + len(part.spans)].double().numpy()
            null_score = min(null_score, float(output[0, -1] + output[1, -1]))  # low in a window with the answer
            begins, ends = (np.array(side) for side in zip(*part.spans, strict=True))
            first = np.arange(len(start))
            distance = first[None, :] - first[:, None]
            legal = (distance >= 0) & (distance < longest) & (begins < ends)[:, None] & (begins < ends)[None, :]
            legal &= ends[None, :] > part.seen
            scores = np.where(legal, start[:, None] + end[None, :], -np.inf)
            if legal.any():
                total = float(np.logaddexp(total, np.logaddexp.reduce(scores[legal])))
                for place in np.argsort(-scores, axis=None, kind="stable")[: min(100, int(legal.sum()))]:
                    i, j = divmod(int(place), len(end))
                    found.append((float(scores[i, j]), (int(begins[i]), int(ends[j]))))
        found.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        return found[:100], null_score, float(np.logaddexp(total, null_score))

    def decode(
        self,
        example: Question,
        windows: Sequence[Window],
        outputs: Sequence[Tensor],
        top_k: int = 1,
        longest: int = LONGEST_ANSWER,
        impossible: bool = True,
    ) -> Prediction:
        """Return {"answer", "score", "start", "end", "no_answer", "candidates"}, with "" for no answer.

        no_answer: by how much the null score exceeds that of the best span.
        candidates: the best top_k answers, with the empty one if `impossible`; their scores are of one softmax.
        """
        found, null_score, total = self.candidates(windows, outputs, longest)
        listed: list[dict[str, Any]] = [
            {"score": float(np.exp(logit - total)), "start": a, "end": b, "answer": example.context[a:b]}
            for logit, (a, b) in found
        ]
        no_answer = float(null_score - found[0][0]) if found else np.inf
        empty: dict[str, Any] = {"score": float(np.exp(null_score - total)), "start": 0, "end": 0, "answer": ""}
        best = empty if (no_answer > self.threshold and impossible) or not listed else listed[0]
        listed += [empty] if impossible or not listed else []
        others = sorted((one for one in listed if one is not best), key=lambda one: -one["score"])
        shown = {} if example.id is None else {"id": example.id}
        span = listed[0] if found else empty
        return {**shown, **best, "no_answer": no_answer, "span": span, "candidates": [best, *others][:top_k]}

    def tune(self, examples: Sequence[Question], predictions: list[Prediction]) -> list[Prediction]:
        """Choose the threshold with the highest F1; return predictions to report, by thresholds chosen on others.

        Each half of the contexts is judged by the threshold that is the best for the other half.
        """
        contexts = {context: i % 2 for i, context in enumerate(dict.fromkeys(e.context for e in examples))}
        halves = [contexts[e.context] if len(contexts) > 1 else i % 2 for i, e in enumerate(examples)]
        rows = list(zip(examples, predictions, halves, strict=True))
        limits = [_best_threshold([(e, p) for e, p, half in rows if half != number]) for number in (0, 1)]
        self.settings["threshold"] = _best_threshold([(e, p) for e, p, _ in rows])
        no_span = {"answer": "", "start": 0, "end": 0}
        return [{**p, **(no_span if p["no_answer"] > _limit(limits[half]) else p["span"])} for _, p, half in rows]

    def describe(self, examples: Sequence[Question]) -> list[str]:
        count = sum(not e.answers for e in examples)
        return [f"{count:,} questions without an answer ({count / len(examples):.1%})"]

    def score(self, examples: Sequence[Question], predictions: Sequence[Prediction]) -> Result:
        rows = [
            metrics.answer_scores(p["answer"], [text for text, _ in e.answers or ()])
            for e, p in zip(examples, predictions, strict=True)
        ]
        answered = [bool(e.answers) for e in examples]
        numbers = {"f1": float(np.mean([f1 for _, f1 in rows])), "exact": float(np.mean([exact for exact, _ in rows]))}
        if not all(answered) and any(answered):
            for name, kind in (("f1_with_answer", True), ("f1_without_answer", False)):
                numbers[name] = float(
                    np.mean([f1 for (_, f1), there in zip(rows, answered, strict=True) if there is kind])
                )
        wrong = sorted(
            (f1, -p.get("score", 0.0), i)
            for i, ((_, f1), p) in enumerate(zip(rows, predictions, strict=True))
            if f1 < 1
        )
        errors = [
            {"place": e.place, "question": e.question, "label": [text for text, _ in e.answers or ()],
             "predicted": predictions[i]["answer"], "f1": f1, "score": -score}
            for f1, score, i in wrong for e in [examples[i]]
        ]  # fmt: skip
        return Result(numbers, errors=errors)

    def baselines(
        self, train: Sequence[Question], validation: Sequence[Question]
    ) -> Iterator[tuple[str, list[Prediction]]]:
        if not all(e.answers for e in validation):
            yield "no answer", [{"answer": ""}] * len(validation)
        yield "sentence with most words of the question", [{"answer": _sentence_like(e)} for e in validation]


def _limit(threshold: float | None) -> float:
    return np.inf if threshold is None else float(threshold)


def _best_threshold(rows: Sequence[tuple[Question, Prediction]]) -> float | None:
    """Return the threshold of `no_answer` with the highest F1; None if every question has an answer."""
    if all(e.answers for e, _ in rows):
        return None
    gains = []
    for e, p in rows:
        golds = [text for text, _ in e.answers or ()]
        empty, span = (metrics.answer_scores(text, golds)[1] for text in ("", p["span"]["answer"]))
        gains.append((p["no_answer"], empty - span))
    gains.sort(reverse=True)
    best = int(np.cumsum([0.0, *(gain for _, gain in gains)]).argmax())  # as many get no answer
    edges = [gains[0][0] + 1, *(score for score, _ in gains), gains[-1][0] - 1]
    return float((edges[best] + edges[best + 1]) / 2)


def _sentence_like(example: Question) -> str:
    words = set(metrics.normal_answer(example.question).split())
    sentences = re.split(r"(?<=[.!?])\s+|\n+", example.context)
    return max(sentences, key=lambda text: len(words & set(metrics.normal_answer(text).split())))
