"""Find entities: one tag a word, in IOB2.

A GPT reads from left to right, so the tag of a word is read at its last token. With the setting labelling "twice" the
text comes twice, and tags are read on the second pass, where every token has the whole text before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptcore.config import IGNORED
from gptcore.files import PathLike
from gptcore.heads import GPTForTokenClassification
from gptcore.tasks import metrics
from gptcore.tasks.examples import Columns, Read, Sentence, Span, read_sentences
from gptcore.tasks.task import Prediction, Result, Task, Window, labels_of

OVERLAP = 4  # windows of a long text share 1 / OVERLAP of their tokens


class Words(NamedTuple):
    """The words of a window, and for each the position of the token that has its tag."""

    numbers: list[int]
    positions: list[int]
    preference: list[int]  # of several windows that hold a word, that with the highest tags it


class Entities(Task[Sentence]):
    """settings: labelling, "last" or "twice"."""

    name, model_class, metric = "entities", GPTForTokenClassification, "f1"
    options, shown = frozenset({"labelling"}), ("entities",)

    @staticmethod
    def read(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        return read_sentences(path, columns, labelled)

    @classmethod
    def settle(cls, train: list[Sentence], validation: list[Sentence]) -> dict[str, Any]:
        types = labels_of(cls, train, validation)
        if not types:
            raise ValueError(f"{train[0].place} and all others have no entity; expected tags such as B-PERSON")
        return {"id2label": ["O", *(f"{mark}-{name}" for name in sorted(types) for mark in "BI")]}

    @property
    def known(self) -> set[str]:
        return _types(self.labels)

    @classmethod
    def names(cls, example: Sentence) -> set[str]:
        return _types(example.tags or ())

    def windows(self, example: Sentence, labelled: bool = False) -> list[Window]:
        encoded = self.tokenizer(example.text, return_offsets_mapping=True)
        made = self.word_windows(encoded["input_ids"], encoded["offset_mapping"], example.words)
        for window in made if labelled else ():
            assert example.tags is not None
            targets = [IGNORED] * len(window.input_ids)
            for i, position in zip(window.marks.numbers, window.marks.positions, strict=True):
                targets[position] = self.labels.index(example.tags[i])
            window.targets = {"labels": targets}
        return made

    def word_windows(self, ids: Sequence[int], offsets: Sequence[Span], words: Sequence[Span]) -> list[Window]:
        return self.windows_of(ids, _last_tokens(words, offsets))

    def windows_of(self, ids: Sequence[int], last: Sequence[int]) -> list[Window]:
        """Return the windows of a text whose words end at the tokens `last`, overlapping if there are several."""
        twice = self.settings.get("labelling") == "twice"
        room = (self.max_length - len(self.start) - len(self.end)) // (2 if twice else 1)
        step = max(1, room - room // OVERLAP)
        made = []
        for begin in range(0, max(1, len(ids) - room + step), step):
            part = list(ids[begin : begin + room])
            numbers = [i for i, token in enumerate(last) if begin <= token < begin + len(part)]
            if not numbers:
                continue
            # Of two windows the one with more before the word; a second pass has what follows as well
            before = [last[i] - begin for i in numbers]
            near = [min(n, len(part) - n) for n in before] if twice else before
            offset = len(self.start) + (len(part) if twice else 0)
            words = Words(numbers, [n + offset for n in before], near)
            made.append(Window([*self.start, *(part * 2 if twice else part), *self.end], words))
        return made

    def pick(self, output: Any, row: int, window: Window) -> Tensor:
        logits: Tensor = output.logits[row][torch.tensor(window.marks.positions)].float().cpu()
        return logits

    def decode(self, example: Sentence, windows: Sequence[Window], outputs: Sequence[Tensor]) -> Prediction:
        """Return {"tags", "scores", "entities"}; the score of an entity is the mean of its words'."""
        logits = merged(windows, outputs, len(example.words), len(self.labels))
        probabilities = logits.log_softmax(1).numpy()
        path = legal_path(probabilities, self.labels)
        tags = [self.labels[i] for i in path]
        scores = [float(np.exp(row[i])) for row, i in zip(probabilities, path, strict=True)]
        found = []
        for name, first, end in metrics.entities(tags) if _is_iob(self.labels) else []:
            span = example.words[first][0], example.words[end][1]
            score = float(np.mean(scores[first : end + 1]))
            found.append(
                {"label": name, "score": score, "text": example.text[slice(*span)], "start": span[0], "end": span[1]}
            )
        return {"tags": tags, "scores": scores, "entities": found}

    def describe(self, examples: Sequence[Sentence]) -> list[str]:
        counts = Counter(name for e in examples for name, *_ in metrics.entities(e.tags or ()))
        words = sum(len(e.words) for e in examples)
        return [f"{words:,} words", *(f"{name}: {counts[name]:,} entities" for name in sorted(_types(self.labels)))]

    def score(self, examples: Sequence[Sentence], predictions: Sequence[Prediction]) -> Result:
        gold, found = [list(e.tags or ()) for e in examples], [p["tags"] for p in predictions]
        numbers, types = metrics.entity_scores(gold, found)
        labels = ["O", *sorted(_types(self.labels))]
        names = [[tag[2:] or "O" for row in rows for tag in row] for rows in (gold, found)]
        errors: list[dict[str, Any]] = []
        for e, g, p in zip(examples, gold, predictions, strict=True):
            there = {(name, a, b) for name, a, b in metrics.entities(g)}
            for name, a, b in there ^ set(metrics.entities(p["tags"])):
                scores = p.get("scores") or [0.0] * len(g)
                text = e.text[e.words[a][0] : e.words[b][1]]
                kind = {"label": name, "predicted": "-"} if (name, a, b) in there else {"label": "-", "predicted": name}
                errors.append({"place": e.place, "text": e.text[:300], "entity": text, **kind,
                               "score": float(np.mean(scores[a : b + 1]))})  # fmt: skip
        errors.sort(key=lambda error: (-error["score"], error["place"], error["entity"]))
        return Result(numbers, types, metrics.confusion(names[0], names[1], labels), labels, errors)

    def baselines(
        self, train: Sequence[Sentence], validation: Sequence[Sentence]
    ) -> Iterator[tuple[str, list[Prediction]]]:
        yield "majority (O)", [{"tags": ["O"] * len(e.words)} for e in validation]
        seen: dict[str, Counter[str]] = {}
        for e in train:
            for span, tag in zip(e.words, e.tags or (), strict=True):
                seen.setdefault(e.text[slice(*span)], Counter())[tag] += 1
        most = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
        yield "most frequent tag of each word", [{"tags": [most.get(w, "O") for w in _texts(e)]} for e in validation]


def merged(windows: Sequence[Window], outputs: Sequence[Tensor], words: int, labels: int) -> Tensor:
    """Return the logits of all words (words, labels), each from the window that is best for it."""
    logits, best = torch.zeros(words, labels), [-1] * words
    for window, output in zip(windows, outputs, strict=True):
        for i, preference, row in zip(window.marks.numbers, window.marks.preference, output, strict=True):
            if preference > best[i]:
                best[i], logits[i] = preference, row
    return logits


def _texts(example: Sentence) -> list[str]:
    return [example.text[slice(*span)] for span in example.words]


def _types(labels: Sequence[str]) -> set[str]:
    return {label[2:] for label in labels if label != "O"}


def _last_tokens(words: Sequence[Span], offsets: Sequence[Span]) -> list[int]:
    """Return the last token that covers a character of each word."""
    last, token = [], 0
    for _, end in words:
        while token + 1 < len(offsets) and offsets[token + 1][0] < end:
            token += 1
        last.append(token)
    return last


def _is_iob(labels: Sequence[str]) -> bool:
    """Return whether these are IOB2 tags: models of others may have I- without B-."""
    return all(
        label == "O" or label[:2] == "B-" or (label[:2] == "I-" and "B-" + label[2:] in labels) for label in labels
    )


def legal_path(scores: np.ndarray[Any, Any], labels: Sequence[str]) -> list[int]:
    """Return the best tags of a sentence by the sum of their scores (words, labels) in which I-X follows B-X or I-X.

    Labels that are not IOB tags may follow each other in any order.
    """
    if not _is_iob(labels) or not len(scores):
        return [int(i) for i in scores.argmax(1)]
    names = np.array([label[2:] for label in labels])
    inside = np.array([label.startswith("I-") for label in labels])
    allowed = ~inside[None, :] | ((names[:, None] == names[None, :]) & (names[:, None] != ""))  # before, after
    penalty = np.where(allowed, 0.0, -np.inf)
    best, back = np.where(inside, -np.inf, scores[0]), []
    for row in scores[1:]:
        ways = best[:, None] + penalty
        back.append(ways.argmax(0))
        best = ways.max(0) + row
    path = [int(best.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1]
