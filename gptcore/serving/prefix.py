"""Keys and values of the beginnings of earlier texts, in blocks of BLOCK tokens."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK = 16


@dataclass(frozen=True, eq=False)
class Block:
    number: int  # which no other block ever has
    key: tuple[Hashable, tuple[int, ...]]
    parent: Block | None  # the block before
    memory: Tensor  # (layers, 2, H, BLOCK, D)


class PrefixCache:
    """Finds a block by what it was computed from: the block before, or a root for the first, and its own tokens.

    Keys are the tokens themselves, so that no two texts are ever confused. At most `limit` tokens are kept; those that
    were used least recently go first, the end of a text before its beginning.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._blocks: OrderedDict[Hashable, Block] = OrderedDict()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self._blocks) * BLOCK

    @staticmethod
    def key(root: Hashable, parent: Block | None, tokens: Sequence[int]) -> tuple[Hashable, tuple[int, ...]]:
        """Return the key of a block after `parent`, or of the first below `root`."""
        return (root if parent is None else parent.number), tuple(tokens)

    def get(self, key: Hashable) -> Block | None:
        """Return a block if it is kept."""
        block = self._blocks.get(key)
        self._use(block)
        return block

    def put(self, key: tuple[Hashable, tuple[int, ...]], parent: Block | None, memory: Tensor) -> Block:
        """Keep a copy of the keys and values of a block; return the block."""
        block = self._blocks[key] = Block(next(self._numbers), key, parent, memory.clone())
        self._use(block)
        while len(self) > self.limit:
            self._blocks.popitem(last=False)
        return block

    def _use(self, block: Block | None) -> None:
        while block is not None and self._blocks.get(block.key) is block:
            self._blocks.move_to_end(block.key)  # the beginning of the text last, so that it stays longest
            block = block.parent
