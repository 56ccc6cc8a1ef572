"""The micro-batches of a run: number `index` of step `step` is a pure function of seed, arguments and dataset."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gptcore.config import IGNORED
from gptcore.data.datasets import epoch_order
from gptcore.training import resume
from gptcore.training.arguments import TrainingArguments
from gptcore.training.random_state import keyed, own_randomness, seed_everything

Batch = dict[str, Any]
GROUPED = 50  # micro-batches whose examples are sorted together, with group_by_length
_epoch_order = functools.lru_cache(maxsize=1)(epoch_order)  # asked for at each step, new with each epoch


class MicroBatch(NamedTuple):
    """The inputs of the model, on its device, and what is counted of them."""

    inputs: Batch
    targets: int
    tokens: int
    padding: int


class Batches:
    """Micro-batches of `dataset`, made by `collator`. Each is collated with random generators seeded by its number."""

    def __init__(self, dataset: Any, collator: Callable[[list[Any]], Batch], args: TrainingArguments) -> None:
        self.dataset, self.collator, self.args = dataset, collator, args
        self._fingerprint: str | None = None
        self._lengths: np.ndarray[Any, Any] | None = None  # of the examples, for group_by_length

    @property
    def steps_per_epoch(self) -> int:
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return -(-len(self.dataset) // per_step)

    def indices(self, step: int) -> list[list[int]]:
        """Return the examples of each micro-batch of a step; the last step of an epoch has what is left."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        size = self.args.per_device_train_batch_size
        count = size * self.args.gradient_accumulation_steps
        order = self._order(epoch)[step_in_epoch * count :][:count]
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        order = _epoch_order(len(self.dataset), self.args.seed, epoch)
        return self._grouped(order, epoch) if self.args.group_by_length else order

    def _grouped(self, order: np.ndarray[Any, Any], epoch: int) -> np.ndarray[Any, Any]:
        """Sort pieces of an order by length, then shuffle the micro-batches; one that is not full stays the last."""
        if self._lengths is None:
            self._lengths = np.array([_length(self.dataset[index]) for index in range(len(self.dataset))])
        size = self.args.per_device_train_batch_size
        pieces = [order[i : i + size * GROUPED] for i in range(0, len(order), size * GROUPED)]
        order = np.concatenate([piece[np.argsort(self._lengths[piece], kind="stable")] for piece in pieces])
        full = len(order) // size
        shuffled = order[: full * size].reshape(full, size)[epoch_order(full, self.args.seed + 1, epoch)]
        return np.concatenate([shuffled.flatten(), order[full * size :]])

    def of(self, step: int, block: range | None = None) -> list[Batch]:
        """Return the micro-batches of a step, or a block of them."""
        made = []
        for index, examples in enumerate(self.indices(step)):
            if block is None or index in block:
                seed_everything(keyed(self.args.seed, step, index, 0))
                made.append(self.collate(examples))
        return made

    def collate(self, examples: Sequence[int]) -> Batch:
        batch = self.collator([self.dataset[index] for index in examples])
        return pack(batch) if self.args.packing else batch

    def first(self) -> Batch:
        """Return the first example as a batch; random generators are afterwards as before."""
        with own_randomness(self.args.seed):
            return self.collate([0])

    def digest(self, step: int) -> str:
        """Return the SHA-256 of the batches of a step; random generators are afterwards as before."""
        with own_randomness(self.args.seed):
            return resume.digest(self.of(step))

    def check_repeatable(self, step: int) -> None:
        """Warn if collating the batches of a step twice gives different batches."""
        if self.digest(step) != self.digest(step):
            warnings.warn(
                "train_dataset or data_collator returns different batches for the same indices, as with a random "
                "generator of its own: this run's checkpoints cannot be resumed. Use the global generators of PyTorch, "
                "NumPy or Python, which are seeded for each micro-batch",
                stacklevel=5,
            )

    def describe(self) -> dict[str, Any]:
        """Return the number of examples and the fingerprint of the dataset."""
        if self._fingerprint is None:
            with own_randomness(self.args.seed):
                self._fingerprint = resume.fingerprint(self.dataset, self.collate)
        return {"examples": len(self.dataset), "fingerprint": self._fingerprint}


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device; the host does not wait for their copies to a GPU."""

    def moved(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        return pinned.to(device, non_blocking=pinned is not tensor)

    return {name: moved(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def pack(batch: Batch) -> Batch:
    """Return the tokens of a padded batch as one row without padding; cu_seqlens keeps its texts apart.

    A batch without attention_mask has no padding, and is returned as it is.
    """
    if (mask := batch.get("attention_mask")) is None:
        return batch
    if unknown := sorted(batch.keys() - {"input_ids", "labels", "attention_mask", "num_targets"}):
        raise ValueError(f"packing=True packs input_ids and labels, but a batch has {', '.join(unknown)} as well")
    kept = mask.bool()
    ends = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    packed = {name: value[kept][None] if name in ("input_ids", "labels") else value for name, value in batch.items()}
    del packed["attention_mask"]
    return {**packed, "cu_seqlens": ends}


def count_padding(batch: Mapping[str, Any]) -> int:
    """Return the number of zeros in the attention_mask of a batch."""
    mask = batch.get("attention_mask")
    return 0 if mask is None else int((mask == 0).sum())


def _length(example: Any) -> int:
    ids = example["input_ids"] if isinstance(example, Mapping) else example
    try:
        return len(ids)
    except TypeError:
        raise TypeError(
            f"group_by_length=True needs examples with a length, or a dict with input_ids, not {type(example).__name__}"
        ) from None


def count_targets(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return the number of targets that the loss of a batch is a mean over, by the rule in the docstring of Trainer."""
    if "num_targets" in batch:
        return int(batch["num_targets"])
    count = getattr(model, "count_targets", _count_shifted_labels)
    try:
        return int(count(batch))
    except KeyError as error:
        found = f"the data collator returned {sorted(batch)}"
        raise ValueError(f"{found}, but a loss needs {error.args[0]}, or num_targets to tell their number") from None


def _count_shifted_labels(batch: Mapping[str, Any]) -> int:
    labels = batch["labels"]
    return int(((labels[:, 1:] if labels.dim() > 1 else labels) != IGNORED).sum())


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of elements of input_ids, padding included, or else of the largest tensor of a batch."""
    if "input_ids" in batch:
        return int(batch["input_ids"].numel())
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)
