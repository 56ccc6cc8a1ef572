"""Gradient checkpointing: blocks keep their inputs only, and are computed again in the backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a GPT. Raises ValueError for a model that does not have them in a ModuleList `h`."""
    if not isinstance(blocks := getattr(model, "h", None), nn.ModuleList):
        kind = type(model).__name__
        raise ValueError(f"gradient_checkpointing=True recomputes the blocks model.h, but {kind} has none")
    return list(blocks)


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Recompute each block in the backward pass (Chen et al. 2016, arXiv:1604.06174), with the same random numbers."""
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # that of the class again
