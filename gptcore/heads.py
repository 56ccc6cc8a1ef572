"""GPT with a head for a task: classify texts, label tokens, mark an answer, choose among texts.

Each is a GPT as `transformer`, and a linear layer on its last hidden states:

    GPTForSequenceClassification    score                           of the last token of a text
    GPTForTokenClassification       classifier                      of every token
    GPTForQuestionAnswering         qa_outputs                      of every token: scores of a start and of an end
    GPTForMultipleChoice            multiple_choice_head.summary    of the last token of each choice

Arguments, outputs and parameters have the names of transformers' GPT-2 and GPT-1 models, and a folder that one writes
the other reads. The four heads stand on GPT-1, GPT-2 and GPT-3 alike. Where transformers is wrong, they differ:

- attention_mask says what is padding, never a token's id: a true end of text at the end is the last token, though its
  id is the padding's. Positions count from the start of the text, also after padding on the left.
- Padding has no label and holds no answer: its labels are left out, and its start and end logits are -inf.
- problem_type is never written into the config by a forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore import ops
from gptcore.config import IGNORED, GPTConfig
from gptcore.files import PathLike
from gptcore.hf import pretrained
from gptcore.inputs import check_range, label_names, readable, targets_of
from gptcore.model import GPT, Linear, mean_cross_entropy

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
Self = TypeVar("Self", bound="TaskModel")


class ClassifierOutput(NamedTuple):
    loss: Tensor | None  # (), float32; None without labels
    logits: Tensor  # (B, num_labels), or (B, T, num_labels) for tokens


class QuestionAnsweringOutput(NamedTuple):
    loss: Tensor | None  # (), float32; None without positions
    start_logits: Tensor  # (B, T)
    end_logits: Tensor  # (B, T)


class MultipleChoiceOutput(NamedTuple):
    loss: Tensor | None  # mc_loss + lm_coef * lm_loss; transformers leaves the sum to its caller
    logits: Tensor  # (B, N), of the choices: mc_logits of transformers
    mc_loss: Tensor | None  # (), float32; None without mc_labels
    lm_loss: Tensor | None  # (), float32; None without labels, or if lm_coef is 0


class TaskModel(nn.Module):
    """What the four models share: labels, the body, folders.

    config: of the body. An output projection of its own is left out where no language-model loss needs it.
    num_labels: how many there are; 2 if neither it nor id2label is given.
    id2label: their names, a list or a dict from 0, 1, ...; "LABEL_0" and so on if it is not given.
    head_dropout: probability, before the head; None for transformers' default, 0.1 for tokens and choices, else 0.
    lm_coef: of the language-model loss that is added to that of the task; 0 for none, 0.5 in GPT-1 (Radford et al.
        2018, section 3.2). It is the mean over the texts of each text's mean.

    Raises TypeError or ValueError for labels that do not fit.
    """

    head: ClassVar[str]  # the name of its module
    suffix: ClassVar[str]  # of the class in transformers, after GPT2 or OpenAIGPT
    has_gpt1: ClassVar[bool] = False  # whether transformers has the class for GPT-1, too
    dropout_key: ClassVar[str] = "classifier_dropout"  # in config.json
    dropout: ClassVar[float] = 0.0  # transformers' default

    def __init__(
        self,
        config: GPTConfig,
        num_labels: int | None = None,
        *,
        id2label: Sequence[str] | Mapping[int, str] | None = None,
        problem_type: str | None = None,
        head_dropout: float | None = None,
        lm_coef: float = 0.0,
    ) -> None:
        super().__init__()
        head_dropout = self.dropout if head_dropout is None else head_dropout
        self.labels = label_names(num_labels, id2label)
        if problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type {problem_type!r} should be None or one of {', '.join(PROBLEM_TYPES)}")
        for name, value, below in (("head_dropout", head_dropout, 1.0), ("lm_coef", lm_coef, float("inf"))):
            if not 0 <= value < below:
                raise ValueError(f"{name} {value} should be in [0, {below})")
        self.problem_type, self.head_dropout, self.lm_coef = problem_type, head_dropout, lm_coef
        self.settings: dict[str, Any] = {}  # task_specific_params of config.json, which say how texts are read
        if lm_coef == 0:
            config = dataclasses.replace(config, tie_word_embeddings=True)
        self.config = config
        self.transformer = GPT(config)

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    save_pretrained = pretrained.save_pretrained
    stored_as = pretrained.stored_as

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name_or_path: PathLike,
        *,
        dtype: torch.dtype | None = None,
        num_labels: int | None = None,
        id2label: Sequence[str] | Mapping[int, str] | None = None,
        problem_type: str | None = None,
        head_dropout: float | None = None,
        lm_coef: float = 0.0,
        **overrides: Any,
    ) -> Self:
        """Return a model with the weights of a folder, in eval mode (see GPT.from_pretrained).

        The folder may hold the same head, by gptcore or transformers, with its labels. From a language model, in a
        folder or GGUF file, the head is drawn from N(0, initializer_range) by PyTorch's global generator.
        """
        found = pretrained.read_config(name_or_path)
        if num_labels is None and id2label is None:
            id2label = found.get("id2label")
            num_labels = found.get("num_labels") if id2label is None else None
        if head_dropout is None:
            head_dropout = found.get(cls.dropout_key)
        settings: dict[str, Any] = {"id2label": id2label, "head_dropout": head_dropout, "lm_coef": lm_coef}
        settings["problem_type"] = found.get("problem_type") if problem_type is None else problem_type
        model: Self = pretrained.load(
            lambda config: cls(config, num_labels, **settings), name_or_path, dtype, overrides
        )
        model.settings = dict(found.get("task_specific_params") or {})
        head = getattr(model, cls.head)
        if any(parameter.is_meta for parameter in head.parameters()):
            body = next(model.transformer.parameters())  # the embedding may be in blocks
            head.to(body.dtype).to_empty(device=body.device).requires_grad_(True)
            model.init_head()
        return model

    def task_config(self) -> dict[str, Any]:
        """Return the entries of config.json that the head adds, as transformers names them."""
        config = self.config
        body = "OpenAIGPT" if config.is_gpt1 else "GPT2"
        theirs = self.has_gpt1 if config.is_gpt1 else config.is_gpt2
        return {
            "architectures": [body + self.suffix if theirs else type(self).__name__],
            "id2label": {str(i): label for i, label in self.id2label.items()},
            "label2id": self.label2id,
            "problem_type": self.problem_type,
            self.dropout_key: self.head_dropout,
            **({"task_specific_params": self.settings} if self.settings else {}),
        }

    @torch.no_grad()
    def init_head(self) -> None:
        """Initialise the head in place: weights N(0, initializer_range), biases 0."""
        for name, parameter in getattr(self, self.head).named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.head_dropout, self.training)

    def _lm_loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the mean over the texts (B, T) of the mean cross entropy of each text's next tokens."""
        targets = targets_of(labels, attention_mask).long()
        losses = [
            ops.linear_cross_entropy(text, weight, target, ignore_index=IGNORED)
            for text, target in zip(hidden, targets, strict=True)
        ]
        return torch.stack(losses).mean()


class GPTForSequenceClassification(TaskModel):
    """Classify texts: one label of several, any number of labels, or numbers (regression).

    With lm_coef the loss includes that of the text's next tokens.
    """

    head, suffix, has_gpt1 = "score", "ForSequenceClassification", True

    def __init__(self, config: GPTConfig, num_labels: int | None = None, **settings: Any) -> None:
        super().__init__(config, num_labels, **settings)
        self.score = Linear(config.n_embd, self.num_labels, bias=False)
        self.init_head()

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return how many texts the mean loss of a batch is taken over."""
        labels = batch["labels"]
        return int((labels != IGNORED).sum()) if self._problem(labels) == PROBLEM_TYPES[1] else len(labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> ClassifierOutput:
        """Return the logits of the labels of each text, from its last token, and the loss.

        input_ids: (B, T) int64 or int32; or (B, S, T): S orders of the same texts, whose hidden states are added
            (similarity in GPT-1: both orders of a pair).
        attention_mask: as input_ids, of 0 and 1; padding may be on both sides.
        labels: by problem_type, or if that is None by their dtype and num_labels, as in transformers:
            regression (num_labels 1): (B,) or (B, num_labels) floating-point numbers; mean squared error.
            single_label_classification (integers): (B,) from 0 to num_labels - 1, or -100 for none; cross entropy.
            multi_label_classification (floating-point): (B, num_labels) of 0 to 1; binary cross entropy.

        Raises ValueError or TypeError for inputs that do not fit the model or each other.
        """
        if labels is not None:
            self._check_labels(labels, len(input_ids))
        orders = input_ids.shape[1] if input_ids.ndim == 3 else 1
        input_ids, attention_mask = _rows(input_ids), _rows(attention_mask)
        weight = self.transformer.output_weight()
        hidden = self.transformer.features(input_ids, attention_mask, position_ids=_rows(position_ids))
        last = self._drop(_last(hidden, attention_mask)).unflatten(0, (-1, orders)).sum(1)  # (B, C)
        logits = self.score(last)
        if labels is None:
            return ClassifierOutput(None, logits)
        loss = self._loss(logits, labels)
        if self.lm_coef:
            loss = loss + self.lm_coef * self._lm_loss(hidden, weight, input_ids, attention_mask)
        return ClassifierOutput(loss, logits)

    def _problem(self, labels: Tensor) -> str:
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def _check_labels(self, labels: Tensor, rows: int) -> None:
        problem = self._problem(labels)
        single = problem == "single_label_classification"
        expected: list[tuple[int, ...]] = [(rows,)] if single else [(rows, self.num_labels)]
        if problem == "regression" and self.num_labels == 1:
            expected.append((rows,))
        if tuple(labels.shape) not in expected:
            shapes = " or ".join(map(str, expected))
            raise ValueError(f"labels of {problem} should be {shapes}, not {tuple(labels.shape)}")
        if single == labels.is_floating_point():
            kind = "integers" if single else "floating-point numbers"
            raise TypeError(f"labels of {problem} should be {kind}, not {labels.dtype}")
        if single:
            check_range("label", labels, self.num_labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self._problem(labels)
        if problem == "single_label_classification":
            return mean_cross_entropy(logits[:, None], labels[:, None].long())
        if problem == "regression":
            return F.mse_loss(logits.float(), labels.view_as(logits).float())
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


class GPTForTokenClassification(TaskModel):
    """Label tokens, as parts of entities."""

    head, suffix, dropout = "classifier", "ForTokenClassification", 0.1

    def __init__(self, config: GPTConfig, num_labels: int | None = None, **settings: Any) -> None:
        super().__init__(config, num_labels, **settings)
        self.classifier = Linear(config.n_embd, self.num_labels)
        self.init_head()

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return how many labels the mean loss of a batch is taken over."""
        return int((_without_padding(batch["labels"], batch.get("attention_mask")) != IGNORED).sum())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> ClassifierOutput:
        """Return the logits of each token's label, (B, T, num_labels), and the loss.

        labels: (B, T) from 0 to num_labels - 1, or -100 for tokens to leave out, as is padding; the loss is the mean
            cross entropy of the others.
        Raises ValueError or TypeError for inputs that do not fit the model or each other.
        """
        if labels is not None:
            if labels.shape != input_ids.shape:
                shape = tuple(input_ids.shape)
                raise ValueError(f"labels {tuple(labels.shape)} should have the shape of input_ids {shape}")
            check_range("label", labels, self.num_labels)
        hidden = self.transformer.features(input_ids, attention_mask, position_ids=position_ids)
        logits = self.classifier(self._drop(hidden))
        if labels is None:
            return ClassifierOutput(None, logits)
        return ClassifierOutput(mean_cross_entropy(logits, _without_padding(labels, attention_mask).long()), logits)


class GPTForQuestionAnswering(TaskModel):
    """Mark the answer in a text that holds the question and its context."""

    head, suffix = "qa_outputs", "ForQuestionAnswering"

    def __init__(self, config: GPTConfig, num_labels: int | None = None, **settings: Any) -> None:
        super().__init__(config, num_labels, **settings)
        if self.num_labels != 2:
            raise ValueError(f"num_labels is {self.num_labels}, but a head for answers has 2 outputs: start and end")
        self.qa_outputs = Linear(config.n_embd, 2)
        self.init_head()

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return how many answers the mean loss of a batch is taken over."""
        return int((batch["start_positions"] != IGNORED).sum())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """Return the logits of each token as the first and as the last of the answer, -inf for padding, and the loss.

        start_positions, end_positions: (B,) indices of tokens, or -100 in both for a text to leave out. The loss is
            the mean of the two cross entropies over the tokens of a text.
        Raises ValueError or TypeError for inputs that do not fit the model or each other.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions belong together; pass both or neither")
        if start_positions is not None and end_positions is not None:
            self._check_positions(start_positions, end_positions, input_ids, attention_mask)
        hidden = self.transformer.features(input_ids, attention_mask, position_ids=position_ids)
        logits = self.qa_outputs(self._drop(hidden))
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        start, end = logits.unbind(-1)
        if start_positions is None or end_positions is None:
            return QuestionAnsweringOutput(None, start, end)
        targets = torch.stack([start_positions, end_positions], 1).long()
        return QuestionAnsweringOutput(mean_cross_entropy(logits.mT, targets), start, end)

    @staticmethod
    def _check_positions(start: Tensor, end: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        B, T = input_ids.shape
        for name, positions in (("start_positions", start), ("end_positions", end)):
            if tuple(positions.shape) != (B,):
                raise ValueError(f"{name} {tuple(positions.shape)} should be {(B,)}, one for each text")
            check_range(name, positions, T)
        if not readable(start):
            return
        if not torch.equal(start == IGNORED, end == IGNORED) or (start > end).any():
            raise ValueError("an answer ends before it starts; both positions are -100 where a text is to be left out")
        there = start != IGNORED
        if attention_mask is not None:
            for positions in (start[there], end[there]):
                if not attention_mask[there].gather(1, positions[:, None].long()).all():
                    raise ValueError("an answer starts or ends in padding, according to attention_mask")


class GPTForMultipleChoice(TaskModel):
    """Choose among texts, by one score for each: GPT-1's question answering and commonsense reasoning."""

    head, suffix, has_gpt1 = "multiple_choice_head", "DoubleHeadsModel", True
    dropout_key, dropout = "summary_first_dropout", 0.1

    def __init__(self, config: GPTConfig, num_labels: int | None = None, **settings: Any) -> None:
        if num_labels is None and settings.get("id2label") is None:
            num_labels = 1
        super().__init__(config, num_labels, **settings)
        if self.num_labels != 1:
            raise ValueError(f"num_labels is {self.num_labels}, but each choice has 1 score, whatever their number")
        self.multiple_choice_head = nn.ModuleDict({"summary": Linear(config.n_embd, 1)})
        self.init_head()

    def task_config(self) -> dict[str, Any]:
        summary = {"summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True}
        return {**super().task_config(), **summary, "summary_activation": None}

    def count_targets(self, batch: Mapping[str, Any]) -> int:
        """Return how many questions the mean loss of a batch is taken over."""
        return int((batch["mc_labels"] != IGNORED).sum())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mc_labels: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        mc_token_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> MultipleChoiceOutput:
        """Return the score of each choice, and the losses.

        input_ids, attention_mask, position_ids: (B, N, T): a text for each of N choices.
        mc_labels: (B,), the number of the right choice, or -100 for none; mc_loss is the mean cross entropy.
        labels: (B, N, T), which the model shifts, for lm_loss: usually input_ids, -100 where it is the question.
        mc_token_ids: (B, N), the index of the token that is scored; by default the last that is not padding.
        Raises ValueError or TypeError for inputs that do not fit the model or each other.
        """
        if input_ids.ndim != 3:
            raise ValueError(f"input_ids should be (batch, choices, length), not {tuple(input_ids.shape)}")
        B, N, T = input_ids.shape
        if mc_token_ids is not None:
            if tuple(mc_token_ids.shape) != (B, N):
                raise ValueError(f"mc_token_ids {tuple(mc_token_ids.shape)} should be {(B, N)}, one for each choice")
            check_range("mc_token_ids", mc_token_ids, T, ignored=None)
        if mc_labels is not None:
            if tuple(mc_labels.shape) != (B,):
                raise ValueError(f"mc_labels {tuple(mc_labels.shape)} should be {(B,)}, one for each question")
            check_range("mc_labels", mc_labels, N)
        if labels is not None and not self.lm_coef:
            raise ValueError("labels are for the language-model loss, which has no weight; set lm_coef, 0.5 in GPT-1")
        if labels is not None and mc_labels is None:
            raise ValueError("labels are for the language-model loss, which is added to that of mc_labels; pass both")
        weight = self.transformer.output_weight()
        mask = _rows(attention_mask)
        hidden = self.transformer.features(_rows(input_ids), mask, position_ids=_rows(position_ids))
        last = _last(hidden, mask) if mc_token_ids is None else _at(hidden, mc_token_ids.flatten())
        last = last.unflatten(0, (B, N))
        last = last * self._drop(torch.ones_like(last[:, :1]))  # the same for all choices, as in GPT-1
        logits = self.multiple_choice_head["summary"](last).squeeze(-1)  # (B, N)
        if mc_labels is None:
            return MultipleChoiceOutput(None, logits, None, None)
        mc_loss = mean_cross_entropy(logits[:, None], mc_labels[:, None].long())
        if labels is None:
            return MultipleChoiceOutput(mc_loss, logits, mc_loss, None)
        lm_loss = self._lm_loss(hidden, weight, labels.flatten(0, 1), mask)
        return MultipleChoiceOutput(mc_loss + self.lm_coef * lm_loss, logits, mc_loss, lm_loss)


def _rows(tensor: Tensor | None) -> Any:
    """Return (B, S, T) as (B * S, T)."""
    return tensor.flatten(0, 1) if tensor is not None and tensor.ndim == 3 else tensor


def _last(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the hidden states of the last token of each text, (B, C)."""
    if attention_mask is None:
        return hidden[:, -1]
    T = attention_mask.shape[1]
    return _at(hidden, T - 1 - attention_mask.int().flip(1).argmax(1))


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def _without_padding(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    return labels if attention_mask is None else labels.masked_fill(attention_mask == 0, IGNORED)
