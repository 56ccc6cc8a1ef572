"""The gradient of a step: a sum over its micro-batches that has the same bits with any number of processes.

Micro-batch i of n is leaf i of a binary tree, cut at the largest power of two below n (`distributed.tree_sum`). A
process has a block of leaves that is a subtree, adds it up alone, and communicates once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gptcore.training.arguments import TrainingArguments
from gptcore.training.distributed import BUCKET, Processes

Leaf = list[Tensor | None]


class GradientSum:
    """Adds up gradients of `parameters` and the loss; `exact=False` in the order of time, then by an all-reduce."""

    def __init__(self, parameters: Sequence[Tensor], processes: Processes, exact: bool) -> None:
        self.parameters, self.processes, self.exact = parameters, processes, exact
        self._nodes: list[tuple[int, Leaf]] = []  # (leaves, sum) of the subtrees that are not yet joined

    def clear(self) -> None:
        """Forget all gradients, before a step."""
        self._nodes = []
        self._take()

    def add(self, loss: Tensor | None) -> None:
        """Add a micro-batch: its part of the loss, and what backward left in .grad. None: it has no target."""
        size, leaf = 1, [None if loss is None else loss.detach().float(), *self._take()]
        while self._nodes and (not self.exact or self._nodes[-1][0] == size):
            before, left = self._nodes.pop()
            size, leaf = size + before, _add(left, leaf)
        self._nodes.append((size, leaf))

    def finish(self, stop: int, device: torch.device) -> tuple[Tensor, int]:
        """Put the sums over all processes into .grad; return the loss, and the highest `stop` that a process passes."""
        leaf: Leaf = [None] * (1 + len(self.parameters))
        for _, node in reversed(self._nodes):
            leaf = _add(node, leaf)
        self._nodes = []
        if self.processes.count > 1:
            leaf, stop = self._exchange(leaf, stop, device)
        loss, *gradients = leaf
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return torch.zeros((), device=device) if loss is None else loss, stop

    def _take(self) -> Leaf:
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _exchange(self, leaf: Leaf, stop: int, device: torch.device) -> tuple[Leaf, int]:
        flags = self.processes.gather([*(tensor is not None for tensor in leaf), stop])
        shapes: list[Tensor] = [torch.zeros((), device=device), *self.parameters]
        alike: dict[tuple[tuple[int, ...], torch.dtype, torch.device], list[int]] = {}
        for i, like in enumerate(shapes):
            if ranks := tuple(rank for rank, flag in enumerate(flags) if flag[i]):  # that have this gradient
                alike.setdefault((ranks, like.dtype, like.device), []).append(i)
        summed: Leaf = [None] * len(leaf)
        for (ranks, _, _), indices in alike.items():
            for bucket in _buckets(indices, shapes):
                tensors = [leaf[i] for i in bucket]
                likes = [shapes[i] for i in bucket]
                flat = torch.cat([
                    torch.zeros_like(like).flatten() if tensor is None else tensor.flatten()
                    for tensor, like in zip(tensors, likes, strict=True)
                ])  # fmt: skip
                if self.exact:
                    flat = self.processes.add_in_tree(flat, ranks)
                else:
                    self.processes.add(flat)
                parts = flat.split([like.numel() for like in likes])
                for i, like, part in zip(bucket, likes, parts, strict=True):
                    summed[i] = torch.empty_like(like).copy_(part.view(like.shape))
                    leaf[i] = None
        return summed, max(flag[-1] for flag in flags)


def check_shares(processes: Processes, args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError if the bits of the run would depend on the number of processes."""
    count, micro_batches = processes.count, args.gradient_accumulation_steps
    each, rest = divmod(micro_batches, count)
    powers = args.gradient_reduction == "all_reduce" or each & (each - 1) == 0
    if count > 1 and (rest or not powers):
        wanted = f"{count} times a power of two" if not powers else f"a multiple of {count}"
        raise ValueError(
            f"gradient_accumulation_steps is {micro_batches} micro-batches a step, but {count} processes share "
            f"them; expected {wanted}" + ("" if rest else ', or gradient_reduction="all_reduce"')
        )
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if count > 1 and norms:
        raise ValueError(
            f"{norms[0]} keeps statistics of the batches that it sees, but each of {count} processes sees others; "
            "use a layer norm or a group norm, or one process"
        )


def _add(left: Leaf, right: Leaf) -> Leaf:
    """Return left + right, in the memory of left where both have a gradient; None adds nothing."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    with torch.no_grad():
        for a, b in both:
            a.add_(b)
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


def _buckets(indices: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices in groups whose tensors have BUCKET bytes at most, or one tensor."""
    bucket: list[int] = []
    size = 0
    for i in indices:
        if bucket and size + tensors[i].nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(i)
        size += tensors[i].nbytes
    if bucket:
        yield bucket
