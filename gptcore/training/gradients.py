"""The gradient of a step: a sum over its micro-batches that has the same bits with any number of processes.

Micro-batch i is leaf i of a binary tree (`distributed.Tree`). A process has a block of leaves, adds up the subtrees in
it alone, and communicates once a step. A block of a power of two of leaves is one subtree. Another one is several, and
as many gradients are sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gptcore.training.arguments import TrainingArguments
from gptcore.training.distributed import BUCKET, Processes, Tree

Leaf = list[Tensor | None]


class GradientSum:
    """Adds up gradients of `parameters` and the loss; `exact=False` in the order of time, then by an all-reduce."""

    in_step = False  # whether processes communicate in each pass
    passes = 0  # that each process makes at least

    def __init__(self, parameters: Sequence[Tensor], processes: Processes, micro_batches: int, exact: bool) -> None:
        self.parameters, self.processes, self.exact = parameters, processes, exact
        blocks = [processes.block(micro_batches, rank) for rank in range(processes.count)]
        self.block = blocks[processes.rank]
        nodes = [self._filled(self._tree(block), block).nodes for block in blocks]
        self._most = max(map(len, nodes))  # subtrees that a process has
        self._leaves = [row[i][1] if i < len(row) else 0 for row in nodes for i in range(self._most)]

    def clear(self) -> None:
        """Forget all gradients, before a step."""
        self._sum = self._tree(self.block)
        self._take()

    def add(self, loss: Tensor | None) -> None:
        """Add a micro-batch: its part of the loss, and what backward left in .grad. None: it has no target."""
        self._sum.push([None if loss is None else loss.detach().float(), *self._take()])

    def finish(self, stop: int, device: torch.device) -> tuple[Tensor, int]:
        """Put the sums over all processes into .grad; return the loss, and the highest `stop` that a process passes."""
        leaf: Leaf = [None] * (1 + len(self.parameters))
        if self.processes.count > 1:
            nodes = [value for _, _, value in self._filled(self._sum, self.block).nodes]
            leaves = [leaf.copy() if value is None else value for value in nodes]
            leaf, stop = self._exchange([*leaves, *(leaf.copy() for _ in range(self._most - len(nodes)))], stop, device)
        else:
            leaf = self._sum.total() or leaf
        loss, *gradients = leaf
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return torch.zeros((), device=device) if loss is None else loss, stop

    def _tree(self, block: range) -> Tree[Leaf]:
        return Tree(_add, block.start, in_order=not self.exact)

    def _filled(self, tree: Tree[Leaf], block: range) -> Tree[Leaf]:
        """Push None for the micro-batches of a block that are not there, as at the end of an epoch."""
        while tree.end < block.stop:
            tree.push(None)
        return tree

    def _take(self) -> Leaf:
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _exchange(self, leaves: list[Leaf], stop: int, device: torch.device) -> tuple[Leaf, int]:
        flags = self.processes.gather([*(tensor is not None for leaf in leaves for tensor in leaf), stop])
        shapes: list[Tensor] = [torch.zeros((), device=device), *self.parameters]
        alike: dict[tuple[tuple[bool, ...], torch.dtype, torch.device], list[int]] = {}
        for i, like in enumerate(shapes):
            there = tuple(
                bool(found) for flag in flags for found in flag[i : -1 : len(shapes)]
            )  # by process and subtree
            if any(there):
                alike.setdefault((there, like.dtype, like.device), []).append(i)
        summed: Leaf = [None] * len(shapes)
        for (there, _, _), indices in alike.items():
            for bucket in buckets(indices, shapes):
                likes = [shapes[i] for i in bucket]
                rows = torch.cat([
                    torch.zeros_like(like).flatten() if tensor is None else tensor.flatten()
                    for leaf in leaves
                    for tensor, like in zip((leaf[i] for i in bucket), likes, strict=True)
                ]).view(len(leaves), -1)  # fmt: skip
                if self.exact:
                    flat = self.processes.add_in_tree(rows, list(zip(self._leaves, there, strict=True)))
                else:
                    self.processes.add(flat := rows[0])
                parts = flat.split([like.numel() for like in likes])
                for i, like, part in zip(bucket, likes, parts, strict=True):
                    summed[i] = torch.empty_like(like).copy_(part.view(like.shape))
                    for leaf in leaves:
                        leaf[i] = None
        return summed, max(flag[-1] for flag in flags)


def check_shares(processes: Processes, args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError if processes would have nothing to do, or the bits of the run would depend on their number."""
    count, micro_batches = processes.count, args.gradient_accumulation_steps
    if micro_batches < count:
        raise ValueError(
            f"gradient_accumulation_steps is {micro_batches} micro-batches a step, but {count} processes share them; "
            f"expected at least {count}"
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


def buckets(indices: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
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
