"""`pipeline`: predictions from Python, with the task names, arguments and outputs of transformers' `pipeline`.

Three outputs differ. Spans have no white space around them. Answers of all windows of a context share one softmax, in
which "no answer" has a score of its own. A model of `gptcore finetune --task entities` tags words, not tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gptcore.files import PathLike
from gptcore.hf.pretrained import read_config
from gptcore.tasks.answer import LONGEST_ANSWER, Answer
from gptcore.tasks.choice import Choose
from gptcore.tasks.classify import SEVERAL, Classify
from gptcore.tasks.entities import Entities, legal_path, merged
from gptcore.tasks.examples import Choice, Question, Span, Text, trimmed, words_of
from gptcore.tasks.table import TASKS
from gptcore.tasks.task import SETTINGS, Task, settings_of
from gptcore.tasks.text_pipelines import Summarization, Text2Text, TextGeneration, Translation
from gptcore.text.tokenizer import Tokenizer

Strategy = Literal["none", "simple", "first", "average", "max"]


def task_name(folder: PathLike) -> str | None:
    """Return the task that the model in a folder has a head for, by its config.json; None for a language model."""
    if os.path.isfile(folder):
        return None
    architectures = read_config(folder).get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        for task in TASKS.values():
            suffix = getattr(task.model_class, "suffix", None)
            if suffix is not None and name in (task.model_class.__name__, f"GPT2{suffix}", f"OpenAIGPT{suffix}"):
                return task.name
    return None


def load(folder: PathLike, device: torch.device | str = "cpu") -> tuple[Task, nn.Module]:
    """Return the task and the model of a folder. Raises ValueError for a model without a head for a task."""
    name = task_name(folder)
    if name is None:
        raise ValueError(f"{folder} holds a language model, without a head for a task; `gptcore finetune` makes one")
    model = TASKS[name].model_class.from_pretrained(folder)
    return task_of(model, Tokenizer.from_pretrained(folder)), model.to(device)


def task_of(model: nn.Module, tokenizer: Tokenizer) -> Task:
    """Return the task of a model, with its settings. Raises ValueError for one without a head for a task."""
    found = next((task for task in TASKS.values() if isinstance(model, task.model_class)), None)
    if found is None:
        heads = ", ".join(task.model_class.__name__ for task in TASKS.values())
        raise ValueError(f"the model is a {type(model).__name__}, expected one of {heads}")
    settings = settings_of(model)
    problem = getattr(model, "problem_type", None)
    labels: list[str] = model.labels  # type: ignore[assignment]
    return found(tokenizer, labels, {**settings, **({"problem_type": problem} if problem else {})})


class Pipeline:
    """A task and a model, to be called with texts."""

    kind: type[Task]

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, batch_size: int, **defaults: Any) -> None:
        self.task = task_of(model, tokenizer)
        if not isinstance(self.task, self.kind):
            raise ValueError(f"the model is for the task {self.task.name}, but the pipeline for {self.kind.name}")
        self.model, self.tokenizer, self.batch_size, self.defaults = model, tokenizer, batch_size, defaults


class TextClassification(Pipeline):
    """Texts, or pairs as {"text", "text_pair"}, to {"label", "score"}, or a list of them with top_k."""

    kind = Classify

    def __call__(self, inputs: str | Mapping[str, str] | Sequence[str | Mapping[str, str]], **options: Any) -> Any:
        """top_k: how many labels, None for all. function_to_apply: "none", "sigmoid", "softmax" or "default"."""
        single = isinstance(inputs, (str, Mapping))
        texts = [_text(one) for one in ([inputs] if single else inputs)]
        results = self._rows(texts, **{**self.defaults, **options})
        if not single:
            return results
        return [results[0]] if isinstance(inputs, str) and "top_k" not in options else results[0]

    def _rows(
        self, texts: list[Text], top_k: int | Literal["one"] | None = "one", function_to_apply: str = "default"
    ) -> list[Any]:
        if top_k not in ("one", None) and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}, expected a number of labels, or None for all")
        task = self.task
        problem, labels = task.settings.get("problem_type"), task.labels
        if function_to_apply == "default":
            one = problem == SEVERAL or len(labels) == 1
            function_to_apply = "none" if problem == "regression" else "sigmoid" if one else "softmax"
        functions = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}
        if function_to_apply not in functions:
            raise ValueError(f"function_to_apply is {function_to_apply!r}, expected default, {', '.join(functions)}")
        windows = [task.windows(text)[0] for text in texts]
        made = []
        for logits in task.run(self.model, windows, self.batch_size):
            scores = functions[function_to_apply](logits).tolist()
            row = [{"label": label, "score": score} for label, score in zip(labels, scores, strict=True)]
            row.sort(key=lambda entry: -entry["score"])
            made.append(row[0] if top_k == "one" else row[:top_k])
        return made


class TokenClassification(Pipeline):
    """Texts to their entities, a list of dicts for each."""

    kind = Entities

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """Return the entities of a text, or of each.

        aggregation_strategy: "none": each token, with "entity", "score", "index", "word", "start" and "end"; "simple":
            neighbours with one type together, with "entity_group" instead; "first", "average", "max": of the tokens of
            each word the first, the mean of all or the surest gives its tag. Words of a model that tags words are one.
        ignore_labels: by default ["O"].
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        rows = [self._entities(text, **{**self.defaults, **options}) for text in texts]
        return rows[0] if isinstance(inputs, str) else rows

    def _entities(
        self, text: str, aggregation_strategy: Strategy = "none", ignore_labels: Sequence[str] = ("O",)
    ) -> list[dict[str, Any]]:
        if aggregation_strategy not in ("none", "simple", "first", "average", "max"):
            raise ValueError(
                f"aggregation_strategy is {aggregation_strategy!r}, expected none, simple, first, average or max"
            )
        task = self.task
        assert isinstance(task, Entities)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        tags_words = SETTINGS in getattr(self.model, "settings", {})
        spans: list[Span] = list(words_of(text)) if tags_words else [trimmed(text, span) for span in offsets]
        windows = task.word_windows(ids, offsets, spans) if tags_words else task.windows_of(ids, range(len(ids)))
        logits = merged(windows, task.run(self.model, windows, self.batch_size), len(spans), len(task.labels))
        scores = logits.softmax(1).numpy()
        pieces = [text[a:b] for a, b in spans] if tags_words else [self.tokenizer.id_to_token(i) for i in ids]
        if not tags_words and aggregation_strategy not in ("none", "simple"):
            spans, scores = _by_words(text, spans, scores, aggregation_strategy)
            pieces = [text[a:b] for a, b in spans]
        chosen = legal_path(np.log(np.maximum(scores, 1e-30)), task.labels) if tags_words else scores.argmax(1).tolist()
        found = [
            {"entity": task.labels[i], "score": float(row[i]), "index": index, "word": piece, "start": a, "end": b}
            for index, (i, row, piece, (a, b)) in enumerate(zip(chosen, scores, pieces, spans, strict=True))
        ]
        if aggregation_strategy != "none":
            found = _grouped(text, found)
        ignored = set(ignore_labels)
        return [entry for entry in found if entry.get("entity", entry.get("entity_group")) not in ignored]


def _by_words(
    text: str, spans: Sequence[Span], scores: np.ndarray[Any, Any], strategy: str
) -> tuple[list[Span], np.ndarray[Any, Any]]:
    """Return the words that tokens are in, and the scores of each."""
    found, rows = [], []
    for a, b in words_of(text):
        inside = [i for i, (start, end) in enumerate(spans) if start < b and end > a]
        if inside:
            part = scores[inside]
            rows.append(
                part[0]
                if strategy == "first"
                else part.mean(0)
                if strategy == "average"
                else part[part.max(1).argmax()]
            )
            found.append((a, b))
    return found, np.stack(rows) if rows else scores[:0]


def _grouped(text: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put neighbours with one type together, unless the second begins with B-."""
    groups: list[list[dict[str, Any]]] = []
    for entry in found:
        kind = entry["entity"].removeprefix("B-").removeprefix("I-")
        if groups and groups[-1][0]["kind"] == kind and not entry["entity"].startswith("B-"):
            groups[-1].append({**entry, "kind": kind})
        else:
            groups.append([{**entry, "kind": kind}])
    made = []
    for group in groups:
        start, end = trimmed(text, (group[0]["start"], group[-1]["end"]))
        score = float(np.mean([entry["score"] for entry in group]))
        word = text[start:end]
        made.append({"entity_group": group[0]["kind"], "score": score, "word": word, "start": start, "end": end})
    return made


class QuestionAnswering(Pipeline):
    """Questions and contexts to {"score", "start", "end", "answer"}, or a list of them with top_k above 1."""

    kind = Answer

    def __call__(
        self, inputs: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None, *, question: Any = None,
        context: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Return the answers of {"question", "context"}, a list of them, or of the arguments of these names.

        top_k: answers of each question. max_answer_len: tokens. max_seq_len: of a window. doc_stride: that two windows
        share. handle_impossible_answer: whether "" may be the answer; by default if the model has a threshold for it.
        """
        if (inputs is None) == (question is None) or (question is None) != (context is None):
            raise ValueError("give {'question': ..., 'context': ...}, a list of them, or question= and context=")
        if inputs is None:
            questions = [question] if isinstance(question, str) else list(question)
            contexts = [context] * len(questions) if isinstance(context, str) else list(context)
            inputs = [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
        listed = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        examples = []
        for number, one in enumerate(listed):
            texts = [one.get(name) for name in ("question", "context")]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"input {number} should have a 'question' and a 'context', texts that are not empty")
            examples.append(Question(f"input {number}", one["question"], one["context"]))
        rows = self._answers(examples, **{**self.defaults, **options})
        return rows[0] if len(rows) == 1 else rows

    def _answers(
        self,
        examples: list[Question],
        top_k: int = 1,
        max_answer_len: int = LONGEST_ANSWER,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        handle_impossible_answer: bool | None = None,
    ) -> list[Any]:
        positions: int = self.model.config.n_positions  # type: ignore[union-attr, assignment]
        task = Answer(self.tokenizer, self.task.labels, {**self.task.settings})
        task.max_length = min(max_seq_len or task.max_length, positions)
        task.stride = task.stride if doc_stride is None else doc_stride
        if top_k < 1 or max_answer_len < 1 or task.stride < 0:
            raise ValueError("top_k and max_answer_len should be at least 1, doc_stride at least 0")
        impossible = handle_impossible_answer
        if impossible is None:
            impossible = task.settings.get("threshold") is not None
        made = [task.windows(example) for example in examples]
        outputs = iter(task.run(self.model, [window for windows in made for window in windows], self.batch_size))
        rows = []
        for example, windows in zip(examples, made, strict=True):
            found = [next(outputs) for _ in windows]
            best = task.decode(example, windows, found, top_k, max_answer_len, impossible)["candidates"]
            rows.append(best[0] if top_k == 1 else best)
        return rows


class MultipleChoice(Pipeline):
    """{"context", "choices"} to {"label", "choice", "score"}; transformers has no pipeline for it."""

    kind = Choose

    def __call__(self, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Any:
        listed = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        examples = [Choice(f"input {i}", one["context"], tuple(one["choices"])) for i, one in enumerate(listed)]
        found = self.task.predict(self.model, examples, self.batch_size)
        rows = [{name: prediction[name] for name in self.task.shown} for prediction in found]
        return rows[0] if isinstance(inputs, Mapping) else rows


def _text(value: Any) -> Text:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise ValueError(f"an input is {value!r}, expected a text, or a pair as {{'text': ..., 'text_pair': ...}}")
    return Text("input", value["text"], value.get("text_pair"))


PIPELINES: dict[str, type[Any]] = {
    "text-classification": TextClassification,
    "sentiment-analysis": TextClassification,
    "token-classification": TokenClassification,
    "ner": TokenClassification,
    "question-answering": QuestionAnswering,
    "multiple-choice": MultipleChoice,
    "text-generation": TextGeneration,
    "text2text-generation": Text2Text,
    "summarization": Summarization,
    "translation": Translation,
}


def pipeline(
    task: str,
    model: PathLike | nn.Module,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    **defaults: Any,
) -> Any:
    """Return a function of texts for a task of PIPELINES.

    task: also "translation_en_to_fr" and the like: what a model translates, its training has decided.
    model: a folder, a name on the Hub, or a model; then with its tokenizer.
    defaults: arguments of the calls, as top_k=None or aggregation_strategy="simple".
    """
    name = "translation" if re.fullmatch(r"translation_\w+_to_\w+", task) else task
    if name not in PIPELINES:
        raise ValueError(f"there is no pipeline {task!r}; there are {', '.join(PIPELINES)}")
    made = PIPELINES[name]
    if not isinstance(model, nn.Module):
        tokenizer = Tokenizer.from_pretrained(model) if tokenizer is None else tokenizer
        model = made.kind.model_class.from_pretrained(model)
    elif tokenizer is None:
        raise ValueError("a model needs its tokenizer; pass tokenizer=, or the folder of both instead of the model")
    assert isinstance(model, nn.Module)
    return made(model if device is None else model.to(device), tokenizer, batch_size, **defaults)
