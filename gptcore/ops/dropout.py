"""Which softmax weights dropout keeps, as every backend computes it."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_keep(shape: torch.Size, seed: Tensor, dropout_p: float, device: torch.device) -> Tensor:
    """Return which softmax weights are kept, by Philox4x32-10 (Salmon et al. 2011) of (seed, head, query, key).

    Word key % 4 of the counter (key // 4, query, batch x heads + head, 0); kept where it is at least dropout_p x 2^32.
    """
    batch, heads, query_len, kv_len = shape
    low = 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # the high and the low 32 bits of a product
        b_high, b_low = b >> 16, b & 0xFFFF  # in halves: int64 has no room for a full 64-bit product
        middle = a * b_high + (a * b_low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (a * b_low & 0xFFFF)

    grid = torch.meshgrid(
        *(torch.arange(n, device=device) for n in (batch * heads, query_len, (kv_len + 3) // 4)), indexing="ij"
    )
    c2, c1, c0 = grid
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(2)[..., :kv_len]
    return (words >= int(dropout_p * 2**32)).view(batch, heads, query_len, kv_len)
