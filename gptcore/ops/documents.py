"""cu_seqlens, the boundaries of packed documents: their checks, and the document of each token."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gptcore import _C
from gptcore.ops import native, registry

Boundaries = Tensor | tuple[Tensor, Tensor]


def check_boundaries(cu_seqlens: Boundaries | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return cu_seqlens_q and cu_seqlens_k. Their values are checked where they are read."""
    if cu_seqlens is None:
        return None, None
    if isinstance(cu_seqlens, Tensor):
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"cu_seqlens for {q.shape[2]} queries and {k.shape[2]} keys a row must be a pair, "
                "(cu_seqlens_q, cu_seqlens_k)"
            )
        cu_seqlens = (cu_seqlens, cu_seqlens)
    if len(cu_seqlens) != 2 or not all(isinstance(cu, Tensor) for cu in cu_seqlens):
        raise ValueError("cu_seqlens must be a tensor of boundaries, or a pair of them for queries and keys")
    for cu in cu_seqlens:
        if cu.dim() != 1 or cu.dtype not in (torch.int32, torch.int64) or cu.device != q.device:
            raise ValueError(
                f"cu_seqlens is {cu.dtype} of shape {tuple(cu.shape)} on {cu.device}, "
                f"expected int32 or int64, 1-D, on {q.device}"
            )
    return cu_seqlens


# By cu_seqlens_q: cu_seqlens_k, the versions of both and the lengths for which they are valid. A check waits for the
# GPU, so the layers of a model share one.
_valid = WeakIdKeyDictionary()


def assume_valid(cu_q: Tensor, cu_k: Tensor, batch: int, query_len: int, kv_len: int) -> None:
    """Omit the check of these cu_seqlens at these lengths until one is modified in place."""
    _valid[cu_q] = weakref.ref(cu_k), _versions(cu_q, cu_k), (batch, query_len, kv_len)


def _versions(*tensors: Tensor) -> list[int | None]:
    """Return how often each was modified in place; None for those of inference mode, which do not count it."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def check_values(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise ValueError for invalid cu_seqlens; synchronises the first time. Tensors without memory are not checked."""
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if cu_q.is_meta or native.is_watched(cu_q, cu_k):
        return
    lengths = q.shape[0], q.shape[2], k.shape[2]
    if registry.is_transformed():  # torch.func's wrappers have no memory to read
        cu_q, cu_k = (torch.from_numpy(np.array(cu.tolist(), np.int64)) for cu in (cu_q, cu_k))
    known_k, *known = _valid.get(cu_q, (lambda: None,))
    if known_k() is cu_k and known == [_versions(cu_q, cu_k), lengths]:
        return
    with torch._C._DisableFuncTorch():
        _C.check_segments(cu_q.cpu(), cu_k.cpu(), *lengths)
    if None not in _versions(cu_q, cu_k):
        assume_valid(cu_q, cu_k, *lengths)


def segments(cu: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return for each token, (batch, length), the index of its document and its position in it."""
    position = torch.arange(length, device=cu.device).expand(batch, length)
    row_begin = torch.arange(batch, device=cu.device)[:, None] * length
    flat = torch.where(cu[-1] == length, position, position + row_begin)  # boundaries of one row hold for every row
    segment = torch.bucketize(flat, cu[1:].contiguous(), right=True)
    return segment, flat - cu[segment]
