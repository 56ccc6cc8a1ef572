"""A small grid of calls of the CUDA kernels in the simulator, which reaches every line of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], list[torch.Tensor]]


def attention(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    tf32: bool = False,
    lse_grad: bool = True,
    bad: tuple[tuple[int, int, float], ...] = (),  # which of q, k and v has this number in this row
    gradients: bool = True,
    **options: Any,
) -> Call:
    batch, query_heads, kv_heads, query_len, kv_len, head_dim = shape

    def call() -> list[torch.Tensor]:
        from gptcore import ops  # after tools.mutants has replaced gptcore._simt

        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.manual_seed(0)
        sizes = ((query_heads, query_len), (kv_heads, kv_len), (kv_heads, kv_len))
        q, k, v = (torch.randn(batch, *size, head_dim).to(dtype) for size in sizes)
        for which, at, number in bad:
            (q, k, v)[which][-1, -1, at, head_dim // 2] = number
        for tensor in (q, k, v):
            tensor.requires_grad_()
        out, lse = ops.attention_with_lse(q, k, v, backend="simt", **options)
        if not gradients:
            return [out, lse]
        loss = out.square().sum() + (lse[lse.isfinite()].sum() if lse_grad else 0)
        grads = torch.autograd.grad(loss, (q, k, v))
        return [out, lse, *grads]

    return call


def decode(dtype: torch.dtype, shape: tuple[int, ...], bad: float = 0.0, **options: Any) -> Call:
    query_heads, query_len, kv_len, head_dim = shape

    def call() -> list[torch.Tensor]:
        from gptcore import ops  # after tools.mutants has replaced gptcore._simt

        torch.manual_seed(0)
        q = torch.randn(1, query_heads, query_len, head_dim).to(dtype)
        k, v = (torch.randn(1, 2, kv_len, head_dim).to(dtype) for _ in range(2))
        if bad:
            v[0, 1, [700, -1], head_dim - 1] = bad
        return list(ops.attention_with_lse(q, k, v, backend="simt", **options))

    return call


def layer_norm(
    dtype: torch.dtype,
    rows: int,
    width: int,
    bias: bool,
    residual: torch.dtype | None = None,
    constant: bool = False,
    eps: float = 1e-5,
    out: torch.dtype | None = None,
    weights: torch.dtype = torch.float32,
) -> Call:
    def call() -> list[torch.Tensor]:
        from gptcore import ops  # after tools.mutants has replaced gptcore._simt

        torch.manual_seed(0)
        mean = 1e6 if dtype == F32 else 3.0  # one that matters, also to the backward, which corrects for a wrong one
        x = torch.randn(rows, 1 if constant else width).expand(rows, width)
        x = (x + mean).to(dtype).requires_grad_()
        parameters = [torch.randn(width).to(weights).requires_grad_() for _ in range(1 + bias)]
        added = [torch.randn(rows, width).to(residual).requires_grad_()] if residual else []
        options: dict[str, Any] = {"eps": eps, "out_dtype": out, "backend": "simt"}
        result = ops.layer_norm(x, *parameters, residual=added[0] if added else None, **options)
        outs = list(result) if isinstance(result, tuple) else [result]
        loss = sum(((o.float() * torch.arange(1, width + 1)).sin().sum() for o in outs), torch.zeros(()))
        return [*outs, *torch.autograd.grad(loss, [x, *parameters, *added])]

    return call


def gelu(dtype: torch.dtype, rows: int, width: int, bias: bool, approximate: str) -> Call:
    def call() -> list[torch.Tensor]:
        from gptcore import ops  # after tools.mutants has replaced gptcore._simt

        torch.manual_seed(0)
        x = (torch.randn(rows, width) * 4).to(dtype)
        large = torch.finfo(dtype).max
        x[0, :6] = torch.tensor([-large, large, -torch.inf, torch.inf, 0.0, -1e-6], dtype=torch.float64).to(dtype)
        x.requires_grad_()
        given = [torch.randn(width, requires_grad=True)] if bias else []
        out = ops.gelu(x, bias=given[0] if given else None, approximate=approximate, backend="simt")
        return [out, *torch.autograd.grad(out.float().sin().sum(), [x, *given])]

    return call


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")
PACKED = torch.tensor([0, 40, 40, 41, 150])
BLIND = torch.tensor([0, 20, 150]), torch.tensor([0, 20, 20])
HALF_BLIND = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1100])
attention_sm90 = functools.partial(attention, gradients=False)
GRID = {
    "attention": [
        attention(BF16, (1, 2, 1, 150, 150, 64)),
        attention(BF16, (2, 2, 1, 70, 130, 72), causal=False),
        attention(BF16, (1, 1, 1, 130, 70, 61), window=(40, 0)),
        attention(F16, (1, 2, 1, 150, 150, 32), cu_seqlens=PACKED, dropout_p=0.25),
        attention(F16, (1, 1, 1, 80, 80, 33), causal=False, window=(9, 20), scale=-0.2),
        attention(F32, (1, 2, 1, 70, 75, 40)),
        attention(F32, (1, 2, 1, 70, 75, 40), tf32=True, dropout_p=0.25),
        attention(BF16, (1, 1, 1, 130, 150, 64), window=(10, 0), lse_grad=False),  # warps with no key in a tile
        attention(F16, (2, 1, 1, 40, 40, 32), causal=False, cu_seqlens=torch.tensor([0, 13, 40])),  # of every row
        attention(BF16, (1, 1, 1, 150, 20, 64), cu_seqlens=BLIND),  # a block of queries with no key
        attention(BF16, (1, 1, 1, 130, 192, 64)),  # the first query sees all of a tile but its last key
        attention(BF16, (1, 1, 1, 130, 192, 64), causal=False, window=(28, 200)),  # a warp's last, all but the first
        attention(F16, (1, 4, 2, 33, 33, 32)),
        attention(F16, (1, 7, 7, 150, 20, 32), causal=False),  # waves of four and three heads
        # Pairs of warps, some with no key in a tile, and masks within half of the rows of a pair
        attention(BF16, (1, 2, 1, 150, 150, 128), window=(90, 0)),
        attention(F16, (1, 1, 1, 70, 85, 124), causal=False, window=(9, 40), dropout_p=0.25),
        attention(BF16, (1, 2, 1, 70, 70, 128), cu_seqlens=torch.tensor([0, 40, 70]), bad=((2, 60, NAN), (0, 5, INF))),
        decode(BF16, (4, 1, 1100, 64)),
        decode(BF16, (6, 1, 1100, 45)),
        decode(BF16, (2, 2, 1100, 64), cu_seqlens=HALF_BLIND),
        # Non-finite numbers, which some rows of their tiles do not attend to
        attention(BF16, (1, 4, 2, 70, 70, 64), dropout_p=0.25, bad=((2, 60, NAN),)),
        attention(F32, (1, 2, 1, 70, 75, 40), scale=-0.2, window=(40, 0), bad=((0, 20, NAN), (1, 60, INF))),
        decode(BF16, (4, 2, 1100, 45), window=(398, 0), bad=INF),
    ],
    "attention_forward_sm90": [
        attention_sm90(BF16, (1, 2, 1, 150, 150, 64)),
        attention_sm90(F16, (1, 1, 1, 70, 200, 33), causal=False, window=(90, 20), scale=-0.2),
        attention_sm90(BF16, (1, 2, 1, 70, 150, 128), window=(90, 0)),
        attention_sm90(F16, (1, 2, 2, 70, 70, 96), cu_seqlens=torch.tensor([0, 40, 41, 70]), dropout_p=0.25),
        attention_sm90(BF16, (1, 1, 1, 150, 20, 64), cu_seqlens=BLIND),  # a block of queries with no key
        attention_sm90(BF16, (1, 1, 1, 20, 1100, 32), causal=False),  # three splits
        attention_sm90(BF16, (1, 4, 2, 70, 70, 64), dropout_p=0.25, bad=((2, 60, NAN),)),
    ],
    "attention_backward_sm90": [
        attention(BF16, (1, 4, 2, 150, 150, 64)),
        attention(F16, (1, 1, 1, 70, 200, 33), causal=False, window=(90, 20), scale=-0.2, dropout_p=0.25),
        attention(BF16, (1, 1, 1, 150, 150, 128), window=(40, 0)),  # a warpgroup with no key in a tile of the other
        attention(F16, (1, 1, 1, 97, 97, 90), cu_seqlens=torch.tensor([0, 40, 41, 97])),
        attention(BF16, (1, 2, 1, 70, 70, 32), bad=((2, 60, NAN), (0, 5, INF))),
    ],
    "layer_norm": [
        layer_norm(BF16, 9, 1000, True),
        layer_norm(BF16, 130, 96, True, BF16),  # several rows at a time share weight and bias
        layer_norm(F16, 1800, 8, True),  # and several times
        layer_norm(BF16, 1800, 8, True, BF16, weights=BF16),  # whose loads are a row ahead
        layer_norm(BF16, 5, 96, True, weights=BF16),
        layer_norm(F16, 5, 1007, False),
        layer_norm(BF16, 6, 768, True, F32),
        layer_norm(BF16, 5, 1504, True),  # several rows at a time, of several warps each
        layer_norm(BF16, 10, 4504, True),  # and in the backward several times
        layer_norm(F32, 3, 8200, True),
        layer_norm(BF16, 3, 40004, True, BF16),
        layer_norm(F32, 2, 40001, False, F32),
        layer_norm(F16, 2, 12301, True),
        layer_norm(F32, 9, 1000, True, constant=True, eps=1e-12),  # variances of next to nothing
        layer_norm(BF16, 9, 1000, True, F32, out=BF16),
        layer_norm(F32, 9, 1000, True, out=BF16),
        layer_norm(F16, 2, 12304, True, F32, out=F16),
        layer_norm(F32, 2, 12304, False, out=F16),
    ],
    "gelu": [
        gelu(BF16, 70, 264, True, "tanh"),
        gelu(F16, 300, 261, True, "none"),
        gelu(F32, 3, 700, False, "tanh"),
        gelu(F32, 3, 701, False, "none"),
        gelu(BF16, 33000, 8, True, "none"),  # blocks of 129 rows in the backward
    ],
}
