"""gptcore.training.optim.AdamW against torch.optim.AdamW, whose updates and state dict it shares."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from grid import BACKENDS, BF16, F16, F32, F64, randn, running, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptcore import _C, ops
from gptcore.training.optim import AdamW

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = ((), (1,), (15,), (16,), (17,), (3, 5, 7), (0, 4), (257, 300))  # the last is more than one piece of 65536


def parameters(dtype: torch.dtype = F32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0, rounded_to: torch.dtype = F32) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(rounded_to).to(p.dtype)


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:3], "weight_decay": 0.1, "lr": 3e-2},
        {"params": params[3:6], "weight_decay": 0.0, "betas": (0.0, 0.95)},
        {"params": params[6:], "eps": 1e-3},
    ]


def clipped(norm: float, limit: float) -> float:
    return min(1.0, limit / (norm + 1e-6))


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("name", BACKENDS)
def test_twenty_steps_equal_pytorchs(name: str, limit: float | None, dtype: torch.dtype) -> None:
    """float32 is allowed twice the error of torch.optim's in float32; each against float64.

    So are the masters of 16 bits: their gradients are exact in float32, too.
    """
    argument = BACKENDS[name][0]
    if dtype == F64 and argument != "torch":
        argument = None  # PyTorch's functions are what there is for float64
    wide = torch.promote_types(dtype, F32)
    results = []
    with running(name):
        for kind, precision in ((AdamW, dtype), (torch.optim.AdamW, wide), (torch.optim.AdamW, F64)):
            params = [nn.Parameter(p.detach().to(precision)) for p in parameters(dtype)]
            extra = {"backend": argument} if kind is AdamW else {}
            optimizer = kind(groups(params), lr=1e-2, **extra)
            for step in range(20):
                give_gradients(params, step, scale=10.0 ** (step % 5 - 2), rounded_to=dtype)
                for group in optimizer.param_groups:
                    group["lr"] *= 0.95
                if isinstance(optimizer, AdamW):
                    scale = 1.0 if limit is None else clipped(optimizer.grad_norm(), limit)
                    before = [p.grad.clone() for p in params]
                    optimizer.step(grad_scale=scale)
                    assert all(map(torch.equal, before, [p.grad for p in params])), "gradients are only read"
                else:
                    if limit is not None:
                        nn.utils.clip_grad_norm_(params, limit)
                    optimizer.step()
            states = [optimizer.state[p] for p in params]
            if precision != wide and isinstance(optimizer, AdamW):
                assert all(torch.equal(p, state["master"].to(dtype)) for p, state in zip(params, states, strict=True))
                params = [state["master"] for state in states]
            moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
            assert precision == F64 or all(t.dtype == wide for t in [*params, *moments])
            results.append([t.detach().double() for t in [*params, *moments]])
            assert {float(state["step"]) for state in states} == {20.0}
    for ours, theirs, ref in zip(*results, strict=True):
        error, their_error = (ours - ref).norm(), (theirs - ref).norm()
        assert error <= 2 * their_error + 4 * torch.finfo(wide).eps * ref.norm() + 1e-12, (error, their_error)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_small_updates_of_16_bits_add_up(backend: str, dtype: torch.dtype) -> None:
    """Each is a fifth of what the dtype can tell from 1, and torch.optim's are all lost."""
    ours, theirs = (nn.Parameter(torch.ones(40, dtype=dtype)) for _ in range(2))
    lr = torch.finfo(dtype).eps / 10
    optimizers = AdamW([ours], lr, weight_decay=0.0, backend=backend), torch.optim.AdamW([theirs], lr, weight_decay=0.0)
    for _ in range(100):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert torch.equal(theirs, torch.ones_like(theirs))
    torch.testing.assert_close(ours, torch.full_like(ours, 1 - 100 * lr))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_other_weights_are_where_the_next_update_begins(backend: str, dtype: torch.dtype) -> None:
    """Elements written by other code, also through .data, are taken over; the others continue from their master."""
    p = nn.Parameter(torch.linspace(1, 2, 37).to(dtype))
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.0, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, master = p.detach().clone(), optimizer.state[p]["master"].clone()
    assert not torch.equal(before.float(), master)
    p.data[5:25] = 7.0
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    master[5:25] = 7.0
    assert torch.equal(optimizer.state[p]["master"], master)
    assert torch.equal(p, master.to(dtype))


def test_dtypes_may_be_mixed(backend: str) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=BF16))]
    params[0].grad, params[1].grad = torch.full((3,), 3.0), torch.full((3,), 4.0, dtype=BF16)
    optimizer = AdamW(params, lr=0.5, weight_decay=0.0, backend=backend)
    assert optimizer.grad_norm() == pytest.approx(math.sqrt(75), rel=1e-6)
    optimizer.step()
    torch.testing.assert_close(params[0], params[1].float(), rtol=1e-2, atol=0)


def test_a_model_that_becomes_bfloat16_goes_on(backend: str) -> None:
    p = nn.Parameter(torch.ones(20))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0, backend=backend)
    p.grad = torch.ones(20)
    optimizer.step()
    p.data, p.grad = p.data.bfloat16(), None
    p.grad = torch.ones(20, dtype=BF16)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master"], torch.full((20,), 0.8), rtol=1e-2, atol=0)


def test_moments_of_16_bits_are_widened(backend: str) -> None:
    p = nn.Parameter(torch.ones(20, dtype=BF16))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0, backend=backend)
    moments = {key: torch.ones(20, dtype=BF16) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[p] = {"step": torch.ones(()), **moments}
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {t.dtype for t in optimizer.state[p].values()} == {F32}
    update = 0.1 / (1 - 0.9**2) * math.sqrt(1 - 0.999**2)  # both moments stay 1
    torch.testing.assert_close(optimizer.state[p]["master"], torch.full((20,), 1 - update))


def test_parameters_without_a_gradient_stay(backend: str) -> None:
    params = parameters()
    give_gradients(params, 0)
    params[3].grad = None
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, backend=backend)
    optimizer.step()
    assert torch.equal(params[3], before[3])
    assert params[3] not in optimizer.state
    assert not torch.equal(params[4], before[4])
    give_gradients(params, 1)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params[2:5]] == [2.0, 1.0, 2.0]
    for p in params:
        p.grad = None
    assert optimizer.grad_norm() == 0.0
    optimizer.step()


def test_the_number_of_threads_does_not_matter(kernel: None) -> None:
    results = []
    for count in (1, 2, 3):
        params = parameters()
        optimizer = AdamW(params, backend="cpu")
        with threads(count):
            for step in range(2):
                give_gradients(params, step)
                norm = optimizer.grad_norm()
                optimizer.step(grad_scale=clipped(norm, 1.0))
        results.append((norm, params))
    for norm, params in results[1:]:
        assert norm == results[0][0]
        assert all(map(torch.equal, params, results[0][1]))


def test_gradients_of_any_strides(backend: str) -> None:
    wide = nn.Parameter(torch.ones(4, 6))
    wide.grad = torch.arange(24.0).view(6, 4).t()
    optimizer = AdamW([wide], lr=0.1, backend=backend)
    assert optimizer.grad_norm() == pytest.approx(float(torch.arange(24.0).norm()))
    optimizer.step()
    torch.testing.assert_close(optimizer.state[wide]["exp_avg"], 0.1 * wide.grad)


# ---- the norm --------------------------------------------------------------------------------------------------------


def test_the_norm_equals_pytorchs(backend: str) -> None:
    params = parameters()
    give_gradients(params, 0)
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params))
    assert AdamW(params, backend=backend).grad_norm() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("value", [1e30, 1e-30, 3e38])
def test_squares_neither_overflow_nor_vanish(backend: str, value: float) -> None:
    p = nn.Parameter(torch.zeros(100))
    p.grad = torch.full((100,), value)
    assert AdamW([p], backend=backend).grad_norm() == pytest.approx(10 * value, rel=1e-6)
    other = nn.Parameter(torch.zeros(100, dtype=BF16))
    other.grad = p.grad.to(BF16)
    assert AdamW([p, other], backend=backend).grad_norm() == pytest.approx(math.sqrt(200) * value, rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (100, 7), (256, 299)])
def test_what_is_not_finite_is_seen_before_the_step(backend: str, value: float, place: tuple[int, int]) -> None:
    params = parameters()
    give_gradients(params, 0)
    params[-1].grad[place] = value
    optimizer = AdamW(params, backend=backend)
    norm = optimizer.grad_norm()
    assert not math.isfinite(norm)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="grad_scale is nan, expected a finite number"):
        optimizer.step(grad_scale=math.nan)
    assert all(map(torch.equal, params, before))


# ---- the state -------------------------------------------------------------------------------------------------------


def after(optimizer: Any, params: list[nn.Parameter], first: int, last: int) -> Any:
    for step in range(first, last):
        give_gradients(params, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [True, False])
def test_state_dicts_are_interchangeable(backend: str, fused: bool) -> None:
    """Three steps with one, three with the other: the same as six with either."""

    def ours(params: list[nn.Parameter]) -> AdamW:
        return AdamW(groups(params), lr=1e-2, backend=backend)

    def theirs(params: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups(params), lr=1e-2, fused=fused)

    expected = parameters()
    after(theirs(expected), expected, 0, 6)
    for begin, end in ((ours, theirs), (theirs, ours), (ours, ours)):
        params = parameters()
        saved = after(begin(params), params, 0, 3).state_dict()
        saved = pickle.loads(pickle.dumps(saved))
        resumed = end(params)
        resumed.load_state_dict(saved)
        after(resumed, params, 3, 6)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert {float(s["step"]) for s in resumed.state.values()} == {6.0}
        assert all(s["step"].dtype == F32 and s["step"].shape == () for s in resumed.state.values())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_state_dicts_of_16_bits_lose_nothing(backend: str, dtype: torch.dtype) -> None:
    """Our state resumes bit-exactly; it also loads to and from PyTorch's, which has 16-bit moments and no master."""
    expected = parameters(dtype)
    after(AdamW(expected, lr=1e-4, backend=backend), expected, 0, 6)
    params = parameters(dtype)
    saved = pickle.dumps(after(AdamW(params, lr=1e-4, backend=backend), params, 0, 3).state_dict())
    resumed = AdamW(params, backend=backend)
    resumed.load_state_dict(pickle.loads(saved))
    after(resumed, params, 3, 6)
    assert all(map(torch.equal, params, expected))
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(resumed.state_dict())
    ours = AdamW(params, backend=backend)
    ours.load_state_dict(after(theirs, params, 6, 7).state_dict())
    after(ours, params, 7, 8)
    assert {float(state["step"]) for state in ours.state.values()} == {8.0}
    for p, state in ours.state.items():
        assert {key: t.dtype for key, t in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "master"), F32
        )
        assert torch.equal(p, state["master"].to(dtype))


def test_copies_keep_backend_and_state() -> None:
    params = parameters()
    optimizer = copy.deepcopy(after(AdamW(params, backend="torch"), params, 0, 1))
    assert optimizer.backend == "torch"
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def test_use_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    give_gradients(params, 0)

    def fail(*_: Any) -> None:
        raise AssertionError("the native kernel was called")

    monkeypatch.setattr(_C, "adamw", fail)
    with ops.use("torch"):
        AdamW(params).step()
    with pytest.raises(AssertionError, match="the native kernel"):
        AdamW(params).step()


def test_a_scheduler_and_a_closure() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_backward_pass_that_needs_the_old_parameters_says_so(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    AdamW([p], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected a finite number, at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": torch.tensor(0.1)}, "lr is tensor"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0), expected two numbers, at least 0 and below 1"),
        ({"betas": (0.9,)}, "betas is (0.9,)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamW([nn.Parameter(torch.ones(3))], **settings)


def test_what_it_does_not_have_is_refused(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="amsgrad"):
        AdamW([p], amsgrad=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="maximize is True, which this AdamW does not have"):
        AdamW([{"params": [p], "maximize": True}])
    optimizer = AdamW([p], backend=backend)
    with pytest.raises(ValueError, match="amsgrad is True"):
        optimizer.load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())
    with pytest.raises(ValueError, match=re.escape("a parameter is torch.complex64")):
        AdamW([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = AdamW(table.parameters(), backend=backend)
    for call in (optimizer.step, optimizer.grad_norm):
        with pytest.raises(RuntimeError, match=r"no sparse gradients, but that of a parameter \(5, 3\) is one"):
            call()


def two_groups(backend: str | None) -> tuple[list[nn.Parameter], AdamW]:
    """Of which the second is refused, once its state or itself is spoiled."""
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.ones(4, 3)
    optimizer.step()
    return params, optimizer


def transpose(params: list[nn.Parameter], optimizer: AdamW) -> None:
    params[2].data = torch.ones(3, 4).t()


SPOILED: dict[str, tuple[Any, str]] = {
    "strides": (transpose, r"strides \(1, 4\)|contiguous"),
    "shape": (lambda params, o: o.state[params[2]].update(exp_avg=torch.ones(5)), r"shapes? .*expected"),
    "setting": (lambda params, o: o.param_groups[1].update(lr=math.nan), "lr is nan"),
    "negated": (lambda params, o: setattr(params[2], "grad", torch._neg_view(torch.ones(4, 3))), "negative bit"),
    "storage": (lambda params, o: params[2].grad.untyped_storage().resize_(8), "storage was resized"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_nothing_is_updated_if_one_parameter_is_refused(backend: str, name: str) -> None:
    params, optimizer = two_groups(backend)
    SPOILED[name][0](params, optimizer)
    if backend != "cpu" and name in ("strides", "negated"):
        return  # PyTorch's functions take these
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises((ValueError, RuntimeError), match=SPOILED[name][1]):
        optimizer.step()
    assert all(map(torch.equal, params, before[0]))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][number][key]) for key, value in state.items())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_without_a_backend_parameters_of_any_strides_are_updated(dtype: torch.dtype) -> None:
    params = [nn.Parameter(randn(6, 5, seed=s).to(dtype)) for s in range(2)]
    params.append(nn.Parameter(randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)))
    params[1].data = params[1].data.t().contiguous().t()
    dense = [nn.Parameter(p.detach().contiguous()) for p in params]
    assert [p.is_contiguous() for p in params] == [True, False, False]
    for some in (params, dense):
        optimizer = AdamW([{"params": some[:1]}, {"params": some[1:]}], lr=0.1)
        for step in range(2):
            for p in some:
                p.grad = torch.sin(p.detach() + step)
            optimizer.step()
    for ours, theirs in zip(params, dense, strict=True):
        torch.testing.assert_close(ours, theirs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AdamW(params, backend="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run adamw: a parameter of shape \(6, 5\) has strides"):
        optimizer.step()


def test_default_dtype_and_device_change_no_step(backend: str) -> None:
    results = []
    for device in (None, "meta"):
        params = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(40, dtype=BF16))]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = AdamW(params, lr=1e-3, backend=backend)
        try:
            torch.set_default_dtype(F32 if device is None else BF16)
            torch.set_default_device(device)
            norm = optimizer.grad_norm()
            for _ in range(3):
                optimizer.step(grad_scale=0.5)
        finally:
            torch.set_default_dtype(F32)
            torch.set_default_device(None)
        results.append([torch.tensor(norm), *params, *(t for s in optimizer.state.values() for t in s.values())])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


@QUICK
@given(st.data())
def test_the_native_function_refuses_what_does_not_fit(data: st.DataObject) -> None:
    """Each list may have one wrong tensor, or one too few; then nothing is changed."""
    names = ("params", "copies", "grads", "exp_avgs", "exp_avg_sqs", "steps")
    model = data.draw(st.sampled_from([None, BF16, F16]), "dtype of copies")
    dtypes = dict.fromkeys(names, F32) | ({} if model is None else dict.fromkeys(("copies", "grads"), model))
    lists = {key: [torch.ones(() if key == "steps" else (4, 3), dtype=dtypes[key]) for _ in range(2)] for key in names}
    if model is None:
        lists["copies"] = []
    key, index = data.draw(st.sampled_from([name for name in names if lists[name]])), data.draw(st.integers(0, 1))
    wrong = data.draw(st.sampled_from(["dtype", "shape", "strides", "fewer", "meta", "shared", "setting"]))
    scale = math.inf if wrong == "setting" else 1.0
    if wrong == "dtype":
        others = [dtype for dtype in (F64, F32, BF16, torch.int32) if dtype != dtypes[key]]
        lists[key][index] = lists[key][index].to(data.draw(st.sampled_from(others)))
    elif wrong == "shape":
        lists[key][index] = torch.ones(3, 4, 1, dtype=dtypes[key])
    elif wrong == "strides":
        key = "params" if key == "steps" else key
        lists[key][index] = torch.ones(3, 4, dtype=dtypes[key]).t()
    elif wrong == "fewer":
        lists[key].pop()
    elif wrong == "meta":
        lists[key][index] = lists[key][index].to("meta")
    elif wrong == "shared":
        pairs = [("exp_avgs", "params"), ("exp_avg_sqs", "params"), ("exp_avg_sqs", "exp_avgs")]
        pairs += [("grads", "params")] if model is None else [("grads", "copies")]
        one, other = data.draw(st.sampled_from(pairs))
        lists[one][index] = lists[other][index]
    before = [t.clone() for key in names for t in lists[key]]
    with pytest.raises(ValueError, match=r"expected|contiguous|shares memory|without storage"):
        _C.adamw(*(lists[key] for key in names), 0.1, 0.9, 0.999, 1e-8, 0.01, scale, 1)
    after = [t for key in names for t in lists[key]]
    assert all(a.device.type == "meta" or torch.equal(a, b) for a, b in zip(after, before, strict=True))
