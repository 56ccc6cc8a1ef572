"""What the tasks share: examples to windows of tokens, batches by length, predictions of each example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.data.collator import DataCollatorForTasks
from gptcore.files import PathLike
from gptcore.heads import TaskModel
from gptcore.modes import module_mode
from gptcore.tasks.examples import Columns, Read
from gptcore.tasks.metrics import Scores
from gptcore.tasks.vocabulary import add_tokens
from gptcore.text.chat import with_special_tokens
from gptcore.text.tokenizer import Tokenizer
from gptcore.training.batches import move

E = TypeVar("E")
Prediction = dict[str, Any]
SHORTEST = 17  # tokens of a batch: attention has another kernel where all texts and paddings have up to 8
SETTINGS = "gptcore"  # the key of task_specific_params in config.json
# GPT-1's special tokens (Radford et al. 2018, section 3.3): [start] a [delimiter] b [extract]
START, DELIMITER, EXTRACT = GPT1_TOKENS = ("<|start|>", "<|delimiter|>", "<|extract|>")


@dataclass
class Window:
    """The tokens of an example, or of a part of it that fits the model, or several texts that belong together."""

    input_ids: Any  # list[int], or a list of them
    marks: Any = None  # where in the example its tokens are; each task has its own
    targets: dict[str, Any] = field(default_factory=dict)  # what the model takes beside input_ids, to learn

    @property
    def length(self) -> int:
        return max(map(len, self.input_ids)) if texts_in(self) else len(self.input_ids)

    @property
    def feature(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, **self.targets}


@dataclass
class Result:
    """How good the predictions of some examples are."""

    metrics: dict[str, float]
    classes: dict[str, Scores] = field(default_factory=dict)
    confusion: np.ndarray[Any, Any] | None = None  # rows: true, columns: predicted, in the order of labels
    labels: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)  # the worst first


class Task(ABC, Generic[E]):
    """One kind of task: how its examples become tokens, and the model's outputs predictions.

    settings: what config.json keeps beside the labels, so that predictions are made as in training:
        task, max_length (of a window, in tokens), layout ("plain", or "gpt1" with its special tokens), and others.
    """

    name: ClassVar[str]
    model_class: ClassVar[Any]
    separator: ClassVar[str] = ""  # between two texts, in the plain layout
    shown: ClassVar[tuple[str, ...]]  # of a prediction, by `gptcore predict`
    options: ClassVar[frozenset[str]] = frozenset()  # fields of FinetuneOptions that not every task has
    head_options: ClassVar[frozenset[str]] = frozenset({"layout", "head_dropout"})  # and that every head has
    packs: ClassVar[bool] = False  # whether the model takes packed batches

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.tokenizer, self.labels, self.settings = tokenizer, list(labels), dict(settings)
        self.max_length = int(settings["max_length"])
        self.truncated = 0  # windows that a text was cut off for
        self.start: list[int] = []
        self.end: list[int] = []
        self.delimiter = tokenizer.encode(self.separator) if self.separator else []
        if settings.get("layout") == "gpt1":
            ids = [tokenizer.special_tokens.get(token) for token in GPT1_TOKENS]
            if None in ids:
                raise ValueError(f"the layout gpt1 needs the special tokens {', '.join(GPT1_TOKENS)} in the tokenizer")
            self.start, self.delimiter, self.end = ([i] for i in ids if i is not None)

    # ---- what each task says of itself

    @staticmethod
    @abstractmethod
    def read(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
        """Return the examples of a file."""

    @classmethod
    @abstractmethod
    def settle(cls, train: list[E], validation: list[E]) -> dict[str, Any]:
        """Return the arguments of the head that follow from the examples, as id2label. Raises ValueError.

        It may replace examples of the validation set, where the training set says how to read their labels.
        """

    @property
    @abstractmethod
    def metric(self) -> str:
        """Return the name of the metric that says which model is the best; higher is better."""

    @property
    def selects(self) -> tuple[str, bool]:
        """Return the name of the metric by which a checkpoint is the best, and whether higher is better."""
        return f"eval_{self.metric}", True

    @abstractmethod
    def windows(self, example: E, labelled: bool = False) -> list[Window]:
        """Return the windows of an example, with targets if it is to be learnt."""

    def pick(self, output: Any, row: int, window: Window) -> Tensor:
        """Return what `decode` needs of the model's output, of one row of a batch: for `run`."""
        raise NotImplementedError(f"{type(self).__name__} has neither `pick` nor a `run` of its own")

    @abstractmethod
    def decode(self, example: E, windows: Sequence[Window], outputs: Sequence[Tensor]) -> Prediction:
        """Return the prediction of an example from the outputs of its windows."""

    @abstractmethod
    def score(self, examples: Sequence[E], predictions: Sequence[Prediction]) -> Result:
        """Compare predictions with the labels."""

    @abstractmethod
    def baselines(self, train: Sequence[E], validation: Sequence[E]) -> Iterator[tuple[str, list[Prediction]]]:
        """Yield predictions of the validation set that need no model: name by name."""

    def describe(self, examples: Sequence[E]) -> list[str]:
        """Return lines about the labels of examples."""
        return []

    @property
    def known(self) -> set[str]:
        """Return the labels of the model, as `names` has them."""
        return set(self.labels)

    @classmethod
    def names(cls, example: E) -> Collection[str]:
        """Return the labels of an example, which every split of the data must keep in its training part."""
        return ()

    def check(self, examples: list[E]) -> list[E]:
        """Return examples to score, their labels as the model has them. Raises ValueError for a label that it lacks."""
        refuse_unknown(self, examples, self.known, "one of the model's", "correct it, or fine-tune with it")
        return examples

    def tune(self, examples: Sequence[E], predictions: list[Prediction]) -> list[Prediction]:
        """Choose settings by predictions of the validation set, and return them as predicted with these."""
        return predictions

    # ---- the model and the tokenizer

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Tokenizer, chat_template: str | None, layout: str) -> Tokenizer:
        """Return the tokenizer to fine-tune with, to which special tokens may have been added."""
        return with_special_tokens(tokenizer, GPT1_TOKENS) if layout == "gpt1" else tokenizer

    def prepare_model(self, model: nn.Module, tokens: int) -> list[int]:
        """Give the model the tokens that its tokenizer has beyond the first `tokens`; returns their ids.

        Their rows are drawn from N(0, initializer_range), as in GPT-1: equal rows would not tell them apart.
        """
        assert isinstance(model, TaskModel)
        body = model.transformer
        if new := add_tokens(body, tokens, self.tokenizer.vocab_size):
            model.config = body.config
            with torch.no_grad():
                for layer in (body.wte, body.lm_head):
                    if layer is not None:
                        nn.init.normal_(layer.weight[new[0] : new[-1] + 1], std=body.config.initializer_range)
        return new

    @classmethod
    def load(cls, folder: PathLike, body: Mapping[str, Any], head: Mapping[str, Any]) -> nn.Module:
        """Return the model to fine-tune. body: changes of its config; head: arguments of its head."""
        model: nn.Module = cls.model_class.from_pretrained(folder, **head, **body)
        return model

    def attach(self, model: nn.Module) -> None:
        """Let the model keep the settings, which its config.json then holds."""
        model.settings = {**getattr(model, "settings", {}), SETTINGS: self.settings}  # type: ignore[assignment]

    # ---- shared

    @property
    def collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        return DataCollatorForTasks(self.tokenizer)

    def predict(self, model: nn.Module, examples: Sequence[E], batch_size: int = 32) -> list[Prediction]:
        """Return the prediction of each example, with the bits of each by itself; batches hold similar lengths."""
        made = [self.windows(example) for example in examples]
        outputs = self.run(model, [window for windows in made for window in windows], batch_size)
        rows = iter(outputs)
        return [
            self.decode(example, windows, [next(rows) for _ in windows])
            for example, windows in zip(examples, made, strict=True)
        ]

    def run(self, model: nn.Module, windows: Sequence[Window], batch_size: int) -> list[Tensor]:
        """Return what `pick` keeps of the model's output for each window."""
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, not {batch_size}")
        device = next(model.parameters()).device
        outputs: list[Tensor] = [torch.empty(0)] * len(windows)
        order = sorted(range(len(windows)), key=lambda i: (texts_in(windows[i]), windows[i].length))
        with module_mode(model, training=False), torch.no_grad():
            for batch in batches(order, batch_size, lambda i: texts_in(windows[i])):
                inputs = self.collator([{"input_ids": windows[i].input_ids} for i in batch])
                missing = min(SHORTEST, self.max_length) - inputs["input_ids"].shape[-1]
                inputs = {name: F.pad(tensor, (0, max(0, missing))) for name, tensor in inputs.items()}
                output = model(**move(inputs, device))
                for row, i in enumerate(batch):
                    outputs[i] = self.pick(output, row, windows[i])
        return outputs

    def features(self, examples: Sequence[E]) -> list[dict[str, Any]]:
        """Return the training examples of the model."""
        return [window.feature for example in examples for window in self.windows(example, labelled=True)]

    def join(self, *texts: list[int]) -> list[int]:
        """Return one sequence of one or two texts; the longer one is cut off where they do not fit."""
        room = self.max_length - len(self.start) - len(self.end) - len(self.delimiter) * (len(texts) - 1)
        lengths = [len(text) for text in texts]
        while sum(lengths) > room:
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            others = sum(lengths) - lengths[longest]
            second = max((n for i, n in enumerate(lengths) if i != longest), default=0)
            lengths[longest] = max(room - others, min(second, lengths[longest] - 1), 1)
            if max(lengths) == 1:
                raise ValueError(f"max_length {self.max_length} has no room for a token of each text")
        self.truncated += sum(lengths) < sum(map(len, texts))
        ids = list(self.start)
        for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            ids += (self.delimiter if number else []) + text[:length]
        return ids + self.end


def texts_in(window: Window) -> int:
    """Return how many texts a window has, 0 for one that is not in a list."""
    return len(window.input_ids) if window.input_ids and isinstance(window.input_ids[0], list) else 0


def batches(order: Sequence[int], size: int, kind: Callable[[int], int]) -> Iterator[list[int]]:
    """Yield up to `size` of the numbers in order, those of one kind together."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or kind(batch[0]) != kind(i)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Return the settings that gptcore finetune left in a model; of another model, those of transformers.

    Raises ValueError for values that config.json may not have.
    """
    positions: int = model.config.n_positions  # type: ignore[union-attr, assignment]
    found = getattr(model, "settings", {}).get(SETTINGS, {})
    where = f"config.json, task_specific_params, {SETTINGS!r}"
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {found!r}, expected an object")
    settings: dict[str, Any] = {"layout": "plain", "max_length": positions, **found}
    length, threshold = settings["max_length"], settings.get("threshold")
    if type(length) is not int or not 2 <= length <= positions:
        raise ValueError(f"{where}: max_length is {length!r}, expected 2 to {positions}")
    if threshold is not None and type(threshold) not in (int, float):
        raise ValueError(f"{where}: threshold is {threshold!r}, expected a number or null")
    for name, allowed in (("layout", ("plain", "gpt1")), ("labelling", (None, "last", "twice"))):
        if settings.get(name) not in allowed:
            raise ValueError(f"{where}: {name} is {settings[name]!r}, expected one of {allowed}")
    return settings


def labels_of(task: type[Task[E]], train: Sequence[E], validation: Sequence[E]) -> set[str]:
    """Return the labels in the training set. Raises ValueError for one that only the validation set has."""
    known = {name for example in train for name in task.names(example)}
    advice = "no model can learn it: correct the label, or add training examples"
    refuse_unknown(task, validation, known, "in the training examples", advice)
    return known


def refuse_unknown(
    task: Task[E] | type[Task[E]], examples: Sequence[E], known: Collection[str], where: str, advice: str
) -> None:
    for example in examples:
        if missing := [name for name in task.names(example) if name not in known]:
            listed = ", ".join(map(repr, sorted(known)[:20]))
            place = example.place  # type: ignore[attr-defined]
            raise ValueError(f"{place}: the label {missing[0]!r} is not {where}; there are {listed}; {advice}")
