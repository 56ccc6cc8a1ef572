"""Hopper's units in the GPU simulator: every classic mistake is reported, and the layouts are those of CuTe and PTX.

The expected places of elements are closed formulas, written independently of csrc/simt: byte offsets of element (r, c)
of a 16-bit matrix in CuTe's canonical layouts (mma_traits_sm90_gmma.hpp), with the swizzle as an exclusive or.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_attention as attention_grid
import torch
from grid import F32

from gptcore import _simt, ops

EXAMPLES = _simt.hopper_examples()
ORDERS = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(4))]
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def default_configuration() -> Iterator[None]:
    yield
    _simt.configure()
    _simt.reset_counters()


def run(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randint(-2, 3, (250, 64), generator=torch.Generator().manual_seed(0)).to(BF16)
    y, out = torch.full((256, 64), torch.nan, dtype=BF16), torch.full((128, 32), torch.nan)
    _simt.run_hopper_example(name, x, y, out)
    return x.float(), y.float(), out


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name]])
def test_every_classic_mistake_is_reported_in_any_order(name: str, order: tuple[str, int]) -> None:
    _simt.configure(order=order[0], seed=order[1])
    with pytest.raises(_simt.SimtError) as report:
        run(name)
    assert str(report.value).split(" in kernel ")[0] in EXAMPLES[name].split(", "), report.value


def accumulators(matrix: torch.Tensor) -> torch.Tensor:
    """(128, n / 2): value v of thread t is row 16 (t / 32) + t % 32 / 4 + 8 (v / 2 % 2), column 8 (v / 4) + 2 (t % 4)
    + v % 2 of the matrix (64, n)."""
    t, v = torch.arange(128)[:, None], torch.arange(matrix.shape[1] // 2)[None]
    return matrix[t // 32 * 16 + t % 32 // 4 + v // 2 % 2 * 8, v // 4 * 8 + t % 4 * 2 + v % 2]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_kernels_without_a_mistake_compute_what_they_should(order: tuple[str, int]) -> None:
    _simt.configure(order=order[0], seed=order[1])
    x, _, out = run("pipeline: none")
    tiles = torch.nn.functional.pad(x, (0, 0, 0, 6)).reshape(4, 64, 64)  # rows 250 to 255 do not exist: zeros
    assert torch.equal(out, accumulators((tiles @ tiles.mT).sum(0)))
    x, _, out = run("product: none")
    assert torch.equal(out, accumulators(torch.full((64, 64), 2.0) @ x[:64]))
    assert (run("exchange: none")[2].reshape(-1)[:128] == 10).all()
    x, _, out = run("column_sums: none")
    assert torch.equal(out.reshape(-1)[:64], x.sum(0))
    _, y, _ = run("store: none")
    assert torch.equal(y[:128], torch.arange(1.0, 3)[:, None, None].expand(2, 64, 64).reshape(128, 64))
    assert y[128:].isnan().all()


def test_a_deadlock_names_what_each_thread_waits_for() -> None:
    with pytest.raises(_simt.SimtError) as report:
        run("pipeline: too_many_bytes")
    text = str(report.value)
    assert "thread 128" in text
    assert (
        "waits for parity 0 of the mbarrier at byte 16384 of shared memory (phase 0: 1 of 1 arrivals, 8192 bytes"
        in text
    )
    assert "thread 0 waits for parity 0 of the mbarrier at byte 16400" in text or "thread 0: waits for parity" in text


def test_what_the_units_do_is_counted() -> None:
    run("pipeline: none")
    count = _simt.counters()["pipeline"]
    assert count["wgmma_flops"] == 4 * 2 * 64 * 64 * 64
    assert count["wgmma_shared_bytes"] == 4 * 4 * (64 + 64) * 32  # A and B once for each of four products a tile
    assert count["bulk_bytes"] == 4 * 64 * 128
    assert count["mbarrier_waits"] == 4 + 4 * 128


# ---- attention's forward kernel for sm_90a ---------------------------------------------------------------------------

FORWARD = [
    case
    for case in attention_grid.TILES
    if case.dtype != F32 and case.head_dim <= 128 and case.magnitude == 1.0 and case.batch * case.lengths[0] > 0
    if case.lengths[0] * case.heads[0] > 16 * case.heads[1]  # not decoding
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_attention_on_wgmma(case: attention_grid.Attention) -> None:
    _simt.configure(compute_capability=90)
    attention_grid.check_attention(case, "simt")
    kernels = {"attention_forward_sm90", "attention_backward_query_sm90", "attention_backward_key_value_sm90"}
    assert kernels <= _simt.counters().keys()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_attention_on_wgmma_has_the_same_bits_in_every_schedule_and_keeps_bad_numbers(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 150, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for order, seed in ORDERS:
        _simt.configure(order=order, seed=seed, compute_capability=90)
        results.append(ops.attention_with_lse(q, k, v, window=(70, 0), backend="simt"))
    for out, lse in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
    v[0, 1, 100, 5] = torch.nan
    out = ops.attention(q, k, v, window=(70, 0), backend="simt")
    assert torch.equal(out[0, 0], results[0][0][0, 0])
    torch.testing.assert_close(out[0, 1, :100], results[0][0][0, 1, :100], atol=1e-3, rtol=1e-2)  # summed anew
    assert out[0, 1, 100:, 5].isnan().all()


# ---- attention's backward kernels for sm_90a -------------------------------------------------------------------------

Gradients = tuple[torch.Tensor, ...]


def gradients_of(
    case: attention_grid.Attention, configurations: list[dict[str, Any]], bad: tuple[tuple[int, int, float], ...] = ()
) -> list[Gradients]:
    """Return dQ, dK and dV in each configuration, from one forward pass. `bad`: q, k or v, a row, and its number."""
    q, k, v, grad_out, grad_lse = case.inputs()
    for which, row, number in bad:
        (q, k, v)[which][-1, -1, row, case.head_dim // 2] = number
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    torch.manual_seed(0)
    results = ops.attention_with_lse(*inputs, backend="simt", **case.settings())
    gradients = []
    for configuration in configurations:
        _simt.configure(**configuration)
        gradients.append(torch.autograd.grad(results, inputs, [grad_out, grad_lse], retain_graph=True))
    return gradients


@pytest.mark.parametrize(
    "case",
    [
        attention_grid.Attention((150, 150), 64, (4, 2), window=(70, 0), dropout_p=0.25, dtype=BF16),
        attention_grid.Attention((130, 200), 128, (2, 1), dtype=BF16),
        attention_grid.Attention((70, 150), 124, (1, 1), causal=False, window=(9, 40), dropout_p=0.25, dtype=F16),
        attention_grid.Attention((97, 97), 90, (1, 1), documents=((40, 0, 1, 56),) * 2, dtype=F16),
        attention_grid.Attention((65, 129), 31, (2, 2), scale=-0.2, dtype=F16),
    ],
    ids=str,
)
def test_the_backward_on_wgmma_has_the_bits_of_that_on_mma_in_every_schedule(case: attention_grid.Attention) -> None:
    """The simulator sums both products in the same order."""
    schedules = [{"order": order, "seed": seed, "compute_capability": 90} for order, seed in ORDERS]
    expected, *gradients = gradients_of(case, [{}, *schedules])
    assert {"attention_backward_query_sm90", "attention_backward_key_value_sm90"} <= _simt.counters().keys()
    for got in gradients:
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("head_dim", [61, 128])
def test_bad_numbers_reach_the_same_gradients_on_wgmma_as_on_mma(head_dim: int) -> None:
    case = attention_grid.Attention((130, 170), head_dim, (2, 1), window=(40, 0), dtype=BF16)
    bad = ((2, 60, torch.nan), (0, 5, torch.inf))
    for mma, wgmma in zip(*gradients_of(case, [{}, {"compute_capability": 90}], bad), strict=True):
        assert mma.isnan().any()
        assert torch.equal(mma.isfinite(), wgmma.isfinite())
        torch.testing.assert_close(wgmma, mma, atol=2e-2, rtol=2e-2, equal_nan=True)  # some sums are in float32


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
def test_attention_copies_keys_and_values_in_bulk_unless_a_stride_forbids_it(head_dim: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 70, head_dim, generator=torch.Generator().manual_seed(0)).to(BF16)
    outs = []
    for keys in (k[:, :1].expand(-1, 2, -1, -1), k[:, :1].repeat(1, 2, 1, 1)):
        _simt.reset_counters()
        _simt.configure(compute_capability=90)
        outs.append(ops.attention(q, keys, v, backend="simt"))
        bulk_bytes = _simt.counters()["attention_forward_sm90"]["bulk_bytes"]
        tiles = 2 * (1 + 2)  # heads x (of rows 0 to 63, of rows 64 to 69), of 64 keys, padded
        width = {40: 64, 72: 96}.get(head_dim, head_dim)
        assert bulk_bytes == (0 if keys.stride(1) == 0 else tiles * 2 * 64 * width * 2)
    assert torch.equal(*outs)


# ---- layouts of wgmma's operands -------------------------------------------------------------------------------------

Major = Callable[[int, int], tuple[torch.Tensor, int, int]]
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of the pattern: the value in a descriptor


def swizzle(offset: torch.Tensor, span: int) -> torch.Tensor:
    return offset ^ (offset // 128 % (span // 16) * 16) if span else offset


def k_major(rows: int, span: int, k: int = 16) -> tuple[torch.Tensor, int, int]:
    """Byte offsets of elements (r, c) of (rows, k), and the leading and stride bytes."""
    r, c = torch.arange(rows)[:, None], torch.arange(k)[None]
    if span == 0:  # 8 x 8 core matrices of 128 bytes: those of eight rows first
        return r // 8 * 128 + r % 8 * 16 + c // 8 * (rows // 8 * 128) + c % 8 * 2, rows // 8 * 128, 128
    return swizzle(r * span + c * 2, span), 16, span * 8


def mn_major(extent: int, span: int, k: int = 16) -> tuple[torch.Tensor, int, int]:
    n, c = torch.arange(extent)[:, None], torch.arange(k)[None]
    if span == 0:
        return n // 8 * 128 + n % 8 * 2 + c % 8 * 16 + c // 8 * (extent // 8 * 128), extent // 8 * 128, 128
    width = span // 2
    return swizzle(n // width * (k * span) + c * span + n % width * 2, span), k * span, span * 8


def descriptor(start: int, leading: int, stride: int, span: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("n", [32, 128])
@pytest.mark.parametrize(("a_major", "b_major"), list(itertools.product((k_major, mn_major), repeat=2)))
@pytest.mark.parametrize("span", SWIZZLES)
def test_operands_lie_where_cute_puts_them(
    span: int, a_major: Major, b_major: Major, n: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(span + n)
    a, b = (torch.randint(-8, 9, (rows, 16), generator=generator).float() for rows in (64, n))
    image = torch.full((16384,), torch.nan, dtype=dtype)
    begin_b = 8192
    (at_a, *bytes_a), (at_b, *bytes_b) = a_major(64, span), b_major(n, span)
    image[at_a // 2] = a.to(dtype)
    image[(begin_b + at_b) // 2] = b.to(dtype)
    fragments = torch.zeros(128, 4, dtype=torch.int32)
    out = torch.empty(128, n // 2)
    descriptors = descriptor(0, *bytes_a, span), descriptor(begin_b, *bytes_b, span)
    transposed = a_major is mn_major, b_major is mn_major
    _simt.run_product(image, fragments, out, *descriptors, *transposed)
    assert torch.equal(out, accumulators(1 + a @ b.T))
    if a_major is k_major:  # and A from registers: its fragment is that of mma_16816
        t, v = torch.arange(128)[:, None], torch.arange(8)[None]
        held = a[t // 32 * 16 + t % 32 // 4 + v // 2 % 2 * 8, t % 4 * 2 + v % 2 + v // 4 * 8]
        _simt.run_product(image, held.to(dtype).view(torch.int32), out, 0, descriptors[1], False, transposed[1], True)
        assert torch.equal(out, accumulators(1 + a @ b.T))


@pytest.mark.parametrize("span", [128, 64, 32])
def test_the_next_k_lies_32_bytes_further_in_a_row(span: int) -> None:
    """The exclusive or is of address bits, so a descriptor that begins within a row needs no correction."""
    a, b = (torch.randint(-8, 9, (rows, span // 2)).float() for rows in (64, 32))
    image = torch.full((16384,), torch.nan, dtype=BF16)
    (at_a, *bytes_a), (at_b, *bytes_b) = k_major(64, span, span // 2), k_major(32, span, span // 2)
    image[at_a // 2], image[(8192 + at_b) // 2] = a.to(BF16), b.to(BF16)
    for k in range(span // 32):
        out = torch.empty(128, 16)
        starts = descriptor(k * 32, *bytes_a, span), descriptor(8192 + k * 32, *bytes_b, span)
        _simt.run_product(image, torch.zeros(128, 4, dtype=torch.int32), out, *starts)
        assert torch.equal(out, accumulators(1 + a[:, k * 16 : k * 16 + 16] @ b[:, k * 16 : k * 16 + 16].T))


def test_a_descriptor_with_undefined_bits_is_reported() -> None:
    image, out = torch.zeros(16384, dtype=BF16), torch.empty(128, 16)
    with pytest.raises(_simt.SimtError, match=r"^matrix descriptor in kernel"):
        _simt.run_product(image, torch.zeros(128, 4, dtype=torch.int32), out, 1 << 55, 0)


# ---- tensor maps -----------------------------------------------------------------------------------------------------


def box_of(x: torch.Tensor, box: tuple[int, ...], at: tuple[int, ...]) -> torch.Tensor:
    """The box, with zeros where x ends; box and at are innermost dimension first."""
    padded = torch.zeros([size + 2 * extent for size, extent in zip(x.shape, box[::-1], strict=True)], dtype=x.dtype)
    padded[tuple(slice(extent, extent + size) for size, extent in zip(x.shape, box[::-1], strict=True))] = x
    begins = [place + extent for place, extent in zip(at[::-1], box[::-1], strict=True)]
    return padded[tuple(slice(begin, begin + extent) for begin, extent in zip(begins, box[::-1], strict=True))]


@pytest.mark.parametrize(
    ("span", "box", "at"),
    [
        (128, (64, 16, 1, 1), (0, 0, 0, 0)),
        (128, (64, 16, 1, 1), (-5, -3, 1, 1)),  # before the begin, in two dimensions
        (128, (64, 8, 3, 1), (40, 15, 1, 0)),  # after the end, in three
        (64, (32, 20, 2, 2), (64, 3, 0, 1)),
        (32, (16, 5, 1, 2), (8, 18, 2, 0)),
        (0, (24, 7, 2, 1), (70, 0, 0, 1)),
        (128, (64, 4, 1, 1), (80, 0, 0, 0)),  # outside altogether: zeros, and all the bytes count
    ],
)
def test_a_bulk_copy_fills_its_box_and_counts_all_of_its_bytes(
    span: int, box: tuple[int, ...], at: tuple[int, ...]
) -> None:
    x = torch.randn(2, 3, 20, 80).to(BF16).transpose(1, 2).contiguous().transpose(1, 2)  # strides of (batch, row, head)
    out = torch.empty(torch.Size(box).numel(), dtype=BF16)
    for order in ("forward", "reverse"):
        _simt.configure(order=order)
        _simt.run_copy(x, out, box=box, swizzle_bytes=span, at=at)
        offset = torch.arange(out.numel()) * 2
        assert torch.equal(out[swizzle(offset, span) // 2], box_of(x, box, at).reshape(-1))
        y = torch.full((2, 3, 20, 80), torch.inf, dtype=BF16)  # and back, in bounds alone
        _simt.run_copy(x, y, box=box, swizzle_bytes=span, at=at, at_out=at)
        assert torch.equal(box_of(y, box, at), box_of(x, box, at))
        assert int(y.isfinite().sum()) == int(box_of(torch.ones(y.shape), box, at).sum())


@pytest.mark.parametrize(
    ("box", "span", "offset", "width", "words"),
    [
        ((64, 257, 1, 1), 128, 0, 64, "box of dimension 1 is 257, expected 1 to 256"),
        ((32, 8, 1, 1), 128, 0, 64, "row of the box is 64, expected swizzle_bytes"),
        ((64, 8, 1, 1), 48, 0, 64, "swizzle_bytes is 48, expected 0, 32, 64 or 128"),
        ((9, 8, 1, 1), 0, 0, 64, "row of the box is 18, expected a multiple of 16"),
        ((64, 8, 1, 1), 128, 1, 64, "the address is"),
        ((64, 8, 1, 1), 128, 0, 68, "the stride of dimension 1 is 136, expected a multiple of 16"),
    ],
)
def test_a_map_that_the_driver_refuses_is_refused(
    box: tuple[int, ...], span: int, offset: int, width: int, words: str
) -> None:
    x = torch.zeros(4096, dtype=BF16)[offset:].as_strided((1, 1, 8, 64), (1024, 1024, width, 1))
    with pytest.raises(ValueError, match=words):
        _simt.run_copy(
            x, torch.empty(torch.Size(box).numel(), dtype=BF16), box=box, swizzle_bytes=span, at=(0, 0, 0, 0)
        )
