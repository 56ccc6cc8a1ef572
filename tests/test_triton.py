"""The Triton kernels, in Triton's interpreter: the grid thinned out, since a case takes a second here.

Lengths, widths and rows are its own, because they straddle the edges of Triton's tiles and no other kernel's.

What they compile to for GPUs is checked by tools/triton_table.py, in a process of its own without the interpreter.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grid
import pytest
import test_attention as attention_grid
import test_gelu as gelu_grid
import test_layer_norm as layer_norm_grid
import test_linear_cross_entropy as cross_entropy_grid
import test_nonfinite as nonfinite
import test_ops as ops_grid
import torch

# These run here again, with the fixtures below.
from grid import BF16, DTYPES, F16, F32, covering, leaves, randn
from interpreter import interpreted  # noqa: F401
from test_attention import (  # noqa: F401
    Attention,
    test_a_limit_beyond_every_key_is_no_limit,
    test_dropout_draws_anew_for_each_call,
    test_the_gradient_of_the_log_sum_exp_alone,
)
from test_cu_seqlens import (  # noqa: F401
    test_boundaries_of_one_row_hold_for_every_row,
    test_boundaries_that_are_none,
)
from test_gelu import Gelu, test_gelu_of_every_16_bit_number, test_zero_keeps_its_sign  # noqa: F401
from test_layer_norm import LayerNorm, test_a_bad_row_stays_a_row  # noqa: F401
from test_linear_cross_entropy import (  # noqa: F401
    logits_case,
    targets_for,
    test_another_ignore_index,
    test_nothing_counts,
    test_only_what_needs_a_gradient_gets_one,
    test_strides,
    test_two_backward_passes_add_up,
)
from test_nonfinite import (  # noqa: F401
    test_gelu_of_infinity,
    test_layer_norm_that_overflows_is_nan,
    test_queries_without_heads,
)
from test_ops import (  # noqa: F401
    test_a_second_derivative_is_refused,
    test_autocast,
    test_both_backends_refuse_alike,
    test_functional_call,
    test_inputs_are_left_alone,
    test_merging_the_heads_of_an_output_is_free,
    test_only_the_gradients_that_are_needed,
    test_slices_of_one_projection_and_expanded_tensors,
    test_strides_do_not_change_a_bit,
    test_tensors_without_elements,
)
from torch import Tensor

from gptcore import GPT, GPTConfig, ops
from gptcore.ops import native

pytestmark = pytest.mark.skipif(
    ops.backends()["triton"] is not None or os.environ.get("TRITON_INTERPRET") != "1",
    reason=f"triton: {ops.backends()['triton'] or 'compiled, not interpreted'}",
)


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def kernel() -> str:
    return "triton"


@pytest.mark.parametrize(
    "case",
    [
        Attention(lengths=(9, 12), heads=(2, 1), scale=-0.2, head_dim=24, dtype=F16, dropout_p=0.25),
        Attention(lengths=(12, 16), documents=((5, 0, 7), (6, 3, 7)), head_dim=40, dtype=BF16),
        Attention(lengths=(20, 24), causal=False, window=(9, 5), head_dim=33),
    ],
    ids=grid.name_of,
)
@pytest.mark.slow
def test_a_bad_row_reaches_only_what_attends_to_it(case: Attention) -> None:
    nonfinite.check_reach("triton", case)


# ---- the grid --------------------------------------------------------------------------------------------------------

# The interpreter's tiles are 128 x 64 and 64 x 128.
LENGTHS = [(1, 1), (13, 13), (63, 64), (65, 63), (65, 130), (128, 128), (129, 127), (1, 130), (130, 1), (7, 193)]
ATTENTION = [
    Attention(causal=mask[0], window=mask[1], **axes)
    for axes in covering(
        lengths=LENGTHS,
        mask=attention_grid.MASKS,
        head_dim=[1, 3, 16, 17, 64, 96, 255, 256],
        heads=[(1, 1), (2, 1), (3, 3)],
        dtype=list(DTYPES),
        scale=[None, -0.3, 0.0],
    )
    for mask in [axes.pop("mask")]
]
# Of 25 draws: another head is the same program run once more.
ATTENTION = [replace(case, heads=(1, 1)) if case.lengths == (1, 1) else case for case in ATTENTION]
ATTENTION += [case for case in attention_grid.GRID if case.documents is not None][::4]
ATTENTION += [case for case in attention_grid.GRID if case.dropout_p]
ATTENTION += [case for case in attention_grid.TILES if case.magnitude != 1.0 and case.causal]
ATTENTION += [case for case in attention_grid.GRID if 0 in case.lengths or case.batch == 0]
ATTENTION += [Attention(lengths=(66, 130), heads=(6, 2), batch=2, head_dim=24, dtype=dtype) for dtype in DTYPES]


@pytest.mark.parametrize("case", dict.fromkeys(ATTENTION), ids=grid.name_of)
def test_attention(case: Attention) -> None:
    attention_grid.check_attention(case, "triton")


LAYER_NORMS = [
    LayerNorm(**axes)
    for axes in covering(
        width=[1, 7, 64, 127, 768, 1000, 1600, 4096],
        rows=[1, 5, 65],
        data=["normal", "shifted", "constant", "tiny", "large"],
        dtype=list(DTYPES),
        bias=[True, False],
        residual=[None, "same", "float32"],
    )
    if not (axes["data"] == "large" and axes["dtype"] == F16)  # sums beyond 65504
]
# Rows of more than half a tile have a program each, which the interpreter runs slowly.
LAYER_NORMS = [replace(case, rows=min(case.rows, 19)) if case.width > 256 else case for case in LAYER_NORMS]
LAYER_NORMS += [LayerNorm(width=65536, rows=4, dtype=BF16, residual=residual) for residual in (None, "float32")]
LAYER_NORMS += [LayerNorm(rows=0), LayerNorm(eps=0.0), LayerNorm(rows=300)]


@pytest.mark.parametrize("case", dict.fromkeys(LAYER_NORMS), ids=grid.name_of)
def test_layer_norm(case: LayerNorm) -> None:
    layer_norm_grid.test_layer_norm("triton", case)


@pytest.mark.parametrize("case", layer_norm_grid.IN_16_BITS[:5], ids=grid.name_of)
def test_layer_norm_in_16_bits(case: LayerNorm) -> None:
    layer_norm_grid.test_out_in_16_bits_has_the_bits_of_a_cast("triton", case)


@pytest.mark.parametrize(
    "case",
    [case if case in gelu_grid.FEW else pytest.param(case, marks=pytest.mark.slow) for case in gelu_grid.GELUS],
    ids=grid.name_of,
)
def test_gelu(case: Gelu) -> None:
    gelu_grid.test_gelu("triton", replace(case, shape=(min(case.shape[0], 20_000), *case.shape[1:])))


@pytest.mark.parametrize(
    ("shape", "vocab"), [((1,), 1), ((2, 5), 15), ((19,), 16), ((0,), 17), ((33,), 1041), ((2,), 50257)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(
    shape: tuple[int, ...], vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 11 rows, the last of which has fewer, and columns beyond the last multiple of 16."""
    module = sys.modules["gptcore.ops.linear_cross_entropy"]
    monkeypatch.setattr(module, "CHUNK", 11)
    monkeypatch.setattr(module, "GPU_CHUNK_BYTES", 0)
    x, weight = randn(*shape, 24, dtype=dtype, seed=1), randn(vocab, 24, dtype=dtype, seed=2, scale=0.5)
    cross_entropy_grid.compare("triton", x, weight, targets_for(shape, vocab), scale=0.7)
    if x.dim() == 2 and len(x) > 11:
        run = functools.partial(
            cross_entropy_grid.loss_and_gradients, x=x, weight=weight, targets=targets_for(shape, vocab)
        )
        ops_grid.assert_same_bits(
            *(run(functools.partial(ops.linear_cross_entropy, backend="triton")) for _ in range(2))
        )


def test_cross_entropy_of_infinite_logits_does_as_in_pytorch() -> None:
    """Straight into the kernel, in and beyond the first block of columns. Those after the vocabulary hold NaN."""
    kernels = native.triton_module("cross_entropy")
    logits = randn(9, 3000)
    logits[0, 5] = -torch.inf
    logits[1, 2999] = torch.inf
    logits[2, 1500] = torch.nan
    logits[3] = -torch.inf
    logits[4, :2999] = -torch.inf  # two stretches without one possible token
    logits[5] = 1e4
    targets = torch.tensor([5, 4, 4, 4, 2999, 7, -100, 2998, 0])
    expected = torch.nn.functional.cross_entropy(wide := logits.clone().requires_grad_(), targets, reduction="none")
    expected.sum().backward()
    ours, losses = torch.full((9, 3008), torch.nan), torch.empty(9)
    ours[:, :3000] = logits
    for outside in (3000, 2**40, -1):
        targets[8] = outside
        again = ours.clone()
        kernels.forward(again, targets, losses, 3000, -100, True)
        assert again[8, :3000].isnan().all()
        torch.testing.assert_close(losses[:8], expected.detach()[:8], equal_nan=True)
        assert losses[8].isnan()
        torch.testing.assert_close(again[:8, :3000], wide.grad[:8], equal_nan=True, rtol=1e-5, atol=1e-7)
        assert not again[:, 3000:].any()
    kept = ours.clone()
    kernels.forward(kept, targets, losses, 3000, -100, False)
    assert torch.equal(kept[:2, :3000], logits[:2])


def test_a_direct_call_of_an_operator_reads_nothing_out_of_bounds() -> None:
    """Past the checks of ops, as from a wrapper subclass that lies about its shape: the native checks come first."""
    run, x, row = torch.ops.gptcore, randn(6, 8), randn(8)
    q, k, cu = randn(1, 2, 5, 8), randn(1, 2, 9, 8), torch.tensor([0, 2, 5])
    settings = (None, None, None, 1.0, True, -1, -1, 0.0, False, "triton")
    entropy = (F32, -100, True, True, "triton")
    out, lse = run.attention_forward(q, k, k, *settings)
    _, _, mean, rstd = run.layer_norm_forward(x, row, None, None, 1e-5, None, "triton")
    cut = randn(6, 16)[:, 8:]
    cut.untyped_storage().resize_(4)
    for call, message in (
        (lambda: run.gelu_forward(x, row[:4], True, "triton"), r"bias has shape \(4\), expected \(8\)"),
        (lambda: run.gelu_forward(x.T, None, True, "triton"), "x is not contiguous"),
        (lambda: run.gelu_forward(cut, None, True, "triton"), "storage was resized"),
        (lambda: run.gelu_backward(x[:2], x, None, True, "triton"), r"grad_out has shape \(2, 8\), expected \(6, 8\)"),
        (lambda: run.layer_norm_forward(x, row[:4], None, None, 1e-5, None, "triton"), r"weight has shape \(4\)"),
        (lambda: run.layer_norm_forward(x, row, None, x[:2], 1e-5, None, "triton"), r"residual has shape \(2, 8\)"),
        (
            lambda: run.layer_norm_backward(x, None, x, row, mean[:2], rstd, True, False, "triton"),
            r"mean has shape \(2\)",
        ),
        (lambda: run.attention_forward(q, k, k[:, :, :4], *settings), r"value has shape \(1, 2, 4, 8\)"),
        (lambda: run.attention_forward(q, k[:, :, :, :4], k[..., :4], *settings), r"key has shape \(1, 2, 9, 4\)"),
        (lambda: run.attention_forward(q, k, k, cu, cu, *settings[2:]), r"cu_seqlens_k ends at 5, expected length = 9"),
        (lambda: run.attention_backward(q, None, q, k, k, out[:, :1], lse, *settings), r"out has shape \(1, 1, 5, 8\)"),
        (lambda: run.attention_backward(q, None, q, k, k, out, lse[..., :2], *settings), r"lse has shape \(1, 2, 2\)"),
        (lambda: run.linear_cross_entropy(x, x, cu, *entropy), r"targets is torch.int64 of shape \(3,\), expected .*6"),
        (lambda: run.linear_cross_entropy(cut, x, cu[[0] * 6], *entropy), "storage was resized"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_dropout_drops_what_the_reference_drops() -> None:
    q, v = torch.zeros(2, 2, 70, 64), torch.eye(64).expand(2, 2, 64, 64)
    for p in (0.1, 0.75):
        weights = []
        for backend, dtype in (("torch", F32), ("triton", F32), ("triton", BF16)):
            torch.manual_seed(7)
            k = torch.zeros_like(v)
            tensors = (t.to(dtype) for t in (q, k, v))
            weights.append(ops.attention(*tensors, causal=False, dropout_p=p, backend=backend))
        assert 0 < int((weights[0] == 0).sum()) < weights[0].numel()
        for ours in weights[1:]:
            assert torch.equal(ours == 0, weights[0] == 0)


@pytest.mark.parametrize("head_dim", [3, 64, 80, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (3, 130)])
def test_a_key_with_all_the_weight_has_no_gradient(lengths: tuple[int, int], head_dim: int) -> None:
    attention_grid.check_a_key_with_all_the_weight("triton", lengths, head_dim)


@pytest.mark.parametrize("settings", attention_grid.PACKED, ids=["causal", "full", "window", "documents"])
def test_packed_attention(settings: dict[str, Any]) -> None:
    attention_grid.check_packed("triton", settings)


def test_no_query_heads() -> None:
    q, k, v = leaves(torch.randn(2, 0, 5, 8), *(torch.randn(2, 3, 5, 8) for _ in range(2)))
    out, lse = ops.attention_with_lse(q, k, v, backend="triton")
    out.sum().backward()
    assert out.shape == q.shape
    assert lse.shape == (2, 0, 5)
    assert not k.grad.any()
    assert not v.grad.any()


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "head", "token"])
def test_more_than_2_to_the_31_elements(far: int, tmp_path: Path) -> None:
    """Offsets are int64: the third batch row, head or token lies 2^31 elements behind the first. The file is sparse."""
    near = [randn(3, 3, 3, 16, seed=s, dtype=F16) for s in range(4)]
    memory = torch.from_file(str(tmp_path / "elements"), shared=True, size=2**31 + 2**16, dtype=F16)
    strides = [16 * 9, 16 * 3, 16]
    strides[far] = 2**30
    tensors = [memory[n * 4096 :].as_strided((3, 3, 3, 16), (*strides, 1)) for n in range(4)]
    for tensor, values in zip(tensors, near, strict=True):
        tensor.copy_(values)
    results = []
    for *inputs, grad in (near, tensors):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        out = ops.attention(*inputs, backend="triton")
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    ops_grid.assert_same_bits(*results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_key_stays_with_those_who_see_it(bad: float) -> None:
    q, k, v = (randn(1, 2, 130, 16, seed=s) for s in range(3))
    clean = ops.attention(q, k, v, backend="triton")
    k[0, 0, 70, 3] = bad
    same = (ops.attention(q, k, v, backend="triton") == clean).all(-1)
    assert same[0, 1].all()
    assert same[0, 0, :70].all()


@pytest.mark.slow
def test_the_same_bits_again_and_every_element_written() -> None:
    tensors = ops_grid.ordinary("triton")
    settings = {"dropout_p": 0.2, "window": (30, 3), "cu_seqlens": torch.tensor([0, 50, 70])}
    first = ops_grid.run_all("triton", *tensors, **settings)
    torch.use_deterministic_algorithms(True)  # it fills new tensors with NaN
    try:
        again = ops_grid.run_all("triton", *tensors, **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in first)
    ops_grid.assert_same_bits(first, again)


# ---- with others -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [pair for name in ("cpu", *grid.SLOW) for pair in ((name, "triton"), ("triton", name))]
)
def test_a_forward_by_one_backend_and_a_backward_by_another(one: str, other: str) -> None:
    native = torch.ops.gptcore
    q, k, v, grad = (randn(2, heads, 70, 24, seed=s) for s, heads in enumerate((2, 1, 1, 2)))
    cu, seed = torch.tensor([0, 30, 70]), torch.tensor([2**40 + 3])
    for settings in ((None, None, None, 0.3, True, -1, -1, 0.0, False), (cu, cu, seed, 0.3, False, 20, 3, 0.2, False)):
        gradients = []
        for backend in (one, other):
            out, lse = native.attention_forward(q, k, v, *settings, backend)
            gradients.append(native.attention_backward(grad, lse, q, k, v, out, lse, *settings, other))
        for mixed, pure in zip(*gradients, strict=True):
            torch.testing.assert_close(mixed, pure, rtol=1e-5, atol=1e-5)
    x, weight = randn(65, 300), randn(300, seed=1)
    results = []
    for backend in (one, other):
        _, total, mean, rstd = native.layer_norm_forward(x, weight, weight, x, 1e-5, None, backend)
        results.append(native.layer_norm_backward(x, None, total, weight, mean, rstd, True, False, other))
    for mixed, pure in zip(*results, strict=True):
        torch.testing.assert_close(mixed, pure, rtol=1e-5, atol=1e-5)


def losses(backend: str) -> list[float]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_positions=32, n_layer=2, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    tokens = torch.randint(50, (2, 32), generator=torch.Generator().manual_seed(1))
    found = []
    with ops.use(backend):
        for _ in range(5):
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


@pytest.mark.slow
def test_a_tiny_gpt_trains_five_steps_like_the_reference() -> None:
    ours, reference = losses("triton"), losses("torch")
    assert reference[-1] < reference[0] - 0.5
    assert ours == pytest.approx(reference, abs=1e-3)


@pytest.mark.slow
def test_torch_compile_finds_one_graph() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        out = ops.attention(q, k, v, dropout_p=0.5, backend="triton").transpose(1, 2).flatten(2)
        out, total = ops.layer_norm(out, weight, residual=x, backend="triton")
        return ops.gelu(out, bias=weight, backend="triton") + total

    tensors = leaves(*(randn(2, heads, 9, 8, seed=heads) for heads in (4, 2, 2)), randn(2, 9, 32), randn(32))
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        torch.manual_seed(1)
        out = run(*tensors)
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


# ---- tiles -----------------------------------------------------------------------------------------------------------


def test_tuning_takes_the_fastest_and_remembers_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launch = native.triton_module("launch")
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "_chosen", {})
    slow, fast, never = (launch.Tile(n, n, 4, 2) for n in (16, 32, 64))
    times = {slow: 2.0, fast: 1.0, never: float("inf")}
    ran: list[Any] = []

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        return times[ran[-1]]

    monkeypatch.setattr(launch, "milliseconds", milliseconds)
    choose = functools.partial(launch.tuned, "a kernel", run=ran.append)
    assert choose(tiles=[slow, fast, never]) == fast
    assert ran == [slow, fast, never]
    launch._chosen.clear()
    assert choose(tiles=[slow, fast, never]) == fast
    assert len(ran) == 3  # read from the file
    launch._chosen.clear()
    assert choose(tiles=[slow, never]) == slow  # no longer in the table: measured again
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{broken")
    launch._chosen.clear()
    assert choose(tiles=[slow, fast]) == fast
    assert json.loads(file.read_text()) == {"a kernel": list(fast)}
    file.unlink()
    os.mkfifo(file)  # neither read nor replaced, and no reason to fail
    launch._chosen.clear()
    assert choose(tiles=[slow, fast]) == fast


def test_few_lanes_idle() -> None:
    from gptcore.kernels.rows import block_of

    for width, largest in itertools.product([*range(1, 300), 768, 1600, 12288, 40000, 65536], (256, 4096, 65536)):
        block = block_of(width, largest)
        padded = -(-width // block) * block
        assert padded <= max(width * 9 // 8, -(-width // 128) * 128), (width, largest)
        assert padded // block <= 16 or largest < width, (width, largest)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.longest
@pytest.mark.slow
def test_the_table_of_compiled_kernels_holds() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tools.triton_table"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
