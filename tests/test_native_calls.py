"""Wrong arguments of the native functions and of the operations raise, and never crash."""

from __future__ import annotations

import ast
import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid import threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_native import stubs_of

from gptcore import _C, ops
from gptcore.ops import native, registry
from gptcore.ops.attention import Settings

ROOT = Path(__file__).resolve().parent.parent

QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


GOOD_REFUSALS = (ValueError, TypeError, RuntimeError)


def check_reason(error: BaseException) -> None:
    assert len(str(error)) > 10, f"a {type(error).__name__} that gives no reason"


KERNELS = {
    name: arguments
    for name, stub in stubs_of("_C").items()
    if isinstance(stub, ast.FunctionDef)
    and {"execution", "num_threads"} & set(arguments := [argument.arg for argument in stub.args.args])
}  # the arguments of each native function that runs one


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """Return the arguments with which the first sample of each operation calls the kernels, by native function."""
    found: dict[str, dict[str, Any]] = {}

    def record(name: str, run: Callable[..., Any], *args: Any) -> Any:
        arguments = dict(zip(KERNELS[name], args, strict=False))
        if "settings" in arguments:
            arguments |= zip(Settings._fields, arguments.pop("settings"), strict=True)
        found[name] = {argument: fresh(value) for argument, value in arguments.items()}
        return run(*args)

    with pytest.MonkeyPatch.context() as patch, threads(2):
        for name in KERNELS:
            patch.setattr(_C, name, functools.partial(record, name, getattr(_C, name)))
        for operation in registry.OPERATIONS.values():
            for sample in operation.samples[:1]:
                tensors = [tensor.requires_grad_() for tensor in sample.tensors()]
                outs = sample.run(tensors, backend="cpu")
                torch.autograd.grad(outs, tensors, [torch.ones_like(out) for out in outs])
        x, row = torch.randn(5, 12, requires_grad=True), torch.ones(12)  # and with every gradient
        narrow = {"residual": x, "out_dtype": torch.bfloat16, "backend": "cpu"}
        torch.autograd.backward(ops.layer_norm(x.bfloat16(), row, row, **narrow), [x.bfloat16(), x])
    return found


def fresh(value: Any) -> Any:
    """Return a copy of a tensor, or of a list of tensors, with their strides."""
    if isinstance(value, list):
        return [fresh(item) for item in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def decode_arguments() -> dict[str, Any]:
    """Return the arguments of a decoding step of two tokens and two layers, 8 wide."""
    torch.manual_seed(0)
    shapes = [(8,), (8,), (24, 8), (24,), (8, 8), (8,), (8,), (8,), (12, 8), (12,), (8, 12), (8,)]
    return {
        "tokens": [3, 5],
        "embeddings": torch.randn(6, 8),
        "positions": torch.randn(5, 8),
        "weights": [torch.randn(shape) for shape in (*shapes, *shapes, (8,), (8,), (9, 8))],
        "caches": [torch.randn(2, 3, 2, 5, 4) for _ in range(2)],
        "rows": [2, 0],
        "places": [4, 1],
        "kept": [0, 1],
        "layers": [(0.5, -1, 1e-5, 1e-5, True), (0.5, 2, 1e-5, 1e-5, False)],
        "final_eps": 1e-5,
        "logits": torch.empty(2, 9),
        "num_threads": 2,
    }


Place = tuple[str, int | None]  # of a tensor: the argument, and its index if that is a list


def tensors_in(arguments: dict[str, Any]) -> dict[Place, torch.Tensor]:
    found: dict[Place, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found[name, None] = value
        elif isinstance(value, list):
            found |= {(name, i): t for i, t in enumerate(value) if isinstance(t, torch.Tensor)}
    return found


def replaced(arguments: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """Return the arguments with another value in this place."""
    name, index = place
    if index is None:
        return {**arguments, name: value}
    return {**arguments, name: [*arguments[name][:index], value, *arguments[name][index + 1 :]]}


@functools.cache
def calls() -> dict[str, dict[str, Any]]:
    """Return valid arguments of each function of both modules; those of _simt.<name> are the simulator's."""
    cu_q, cu_k = torch.tensor([0, 2, 5, 10]), torch.tensor([0, 3, 6, 12])
    segments = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "batch": 2, "query_len": 5, "kv_len": 6}
    found = {
        **recorded(),
        "check_segments": segments,
        "segments": segments,
        "use_cpu_isa": {"name": _C.cpu_isa()},
        "decode": decode_arguments(),
    }
    if ops.backends()["simt"] is None:
        execution = native.execution("simt", torch.zeros(1))
        found |= {
            f"_simt.{name}": {**arguments, "execution": execution}
            for name, arguments in found.items()
            if "execution" in arguments and hasattr(native.module("simt"), name)
        }
    return found


def arguments_of(name: str) -> dict[str, Any]:
    """Return a copy of the valid arguments of a function, which may be modified."""
    return {argument: fresh(value) for argument, value in calls()[name].items()}


def test_the_samples_call_every_kernel() -> None:
    assert {*recorded()} == {*KERNELS} - {"adamw", "grad_norm", "decode"}  # which have no samples
    for name, arguments in recorded().items():
        given = {key for key, value in arguments.items() if value is not None}
        assert {*arguments} - given <= {"scale"}, name  # which accumulates a gradient


# Ways to spoil a tensor; `others` are the tensors of the same call
SPOILED: list[Callable[[torch.Tensor, list[torch.Tensor]], Any]] = [
    *(lambda t, _, dtype=dtype: t.to(dtype) for dtype in (
        torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64
    )),
    lambda t, _: t.to("meta"),
    lambda t, _: t.to_sparse(),
    lambda t, _: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t, _: t.float().requires_grad_(),
    lambda t, _: torch.nn.Parameter(t.float()),
    lambda t, _: t[:0],
    lambda t, _: t[:-1],
    lambda t, _: t[..., :-1],
    lambda t, _: t[..., None],
    lambda t, _: t[0],
    lambda t, _: t.sum(),
    lambda t, _: t.flatten(),
    lambda t, _: t.T if t.dim() == 2 else t.transpose(0, -1),
    lambda t, _: t.transpose(0, -1).contiguous().transpose(0, -1),
    lambda t, _: t[..., ::2].repeat_interleave(2, -1)[..., ::2],
    lambda t, _: t[:1].expand(t.shape),
    lambda t, _: t.flatten()[0].expand(t.shape),
    lambda t, _: t.as_strided(t.shape, (1,) * t.dim()),
    lambda t, _: t.new_zeros(1).expand(2**40) if t.dim() == 1 else t.new_zeros(1).expand(*t.shape[:-1], 2**40),
    lambda t, _: t.new_zeros((2**40, *t.shape[1:-1], 0)),
    lambda t, _: t.new_zeros((1,) * 9),
    lambda t, others: others[0],
    lambda t, others: others[-1],
    lambda t, others: others[len(others) // 2],
    lambda t, _: t * math.nan if t.is_floating_point() else -t,
    lambda t, _: t * math.inf if t.is_floating_point() else t + 2**40,
    lambda t, _: np.asarray(t.tolist()),
    lambda t, _: t.tolist(),
]  # fmt: skip
ANYTHING = st.sampled_from(
    [None, 0, -1, 1, 3, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 0.5, 1.0, -2.5, 1e39, 1e300, math.nan,
     math.inf, -math.inf, True, "", "text", b"\xff", [], [1.0], (), {}, object(), np.float32(2), np.zeros(3),
     torch.float32, torch.zeros(())]
)  # fmt: skip


def call(name: str, arguments: dict[str, Any]) -> None:
    """Return a native function; _simt.<name> is one of the GPU simulator."""
    module = _C
    if name.startswith("_simt."):
        module, name = importlib.import_module("gptcore._simt"), name.removeprefix("_simt.")
    if name.startswith("attention_") and name != "attention_takes":
        settings = {field: arguments.pop(field) for field in Settings._fields}
        arguments |= {"settings": Settings(**settings)}
    getattr(module, name)(**arguments)


@pytest.mark.parametrize("name", calls())
def test_right_arguments_are_taken(name: str) -> None:
    call(name, arguments_of(name))


class Named(torch.Tensor):
    """What the native functions read by its attributes, as they read every tensor of an older PyTorch."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attributes_and_dlpack_say_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv, out, lse = torch.randn(2, 6, 4, 2, 16).to(dtype), torch.empty(2, 4, 6, 16, dtype=dtype), torch.empty(2, 4, 6)
    q, k, v = torch.randn(2, 4, 6, 16).to(dtype), kv[:, :, :2, 0].transpose(1, 2), kv[:, :, 2:, 1].transpose(1, 2)
    boundaries, results = torch.tensor([0, 2, 6], dtype=torch.int32), []
    for kind in (torch.Tensor, Named):
        *tensors, cu = (tensor.as_subclass(kind) for tensor in (q, k, v, out.fill_(7), lse.fill_(7), boundaries))
        _C.attention_forward(*tensors, Settings(cu, cu, scale=0.3), 1)
        results.append((out.clone(), lse.clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for tensor in (torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.float64), torch.zeros((1,) * 9), torch.zeros(0, 3)):
        words = []
        for kind in (torch.Tensor, Named):
            with pytest.raises(ValueError, match=r"expected|supported") as error:
                _C.gelu_forward(torch.zeros(2, 3), None, tensor.as_subclass(kind), True, 1)
            words.append(str(error.value))
        assert words[0] == words[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings()[:-1], "settings is not a tuple of 8 fields"),
        (None, "settings is not a tuple of 8 fields"),
        (Settings(scale="1"), "scale is '1', which has the wrong type"),  # type: ignore[arg-type]
        (Settings(dropout_p=0.1), "dropout_p and seed must be given together"),
        (Settings(seed=torch.tensor([7])), "dropout_p and seed must be given together"),
        (Settings(seed=torch.tensor([7, 8]), dropout_p=0.1), r"seed has shape \(2\), expected \(1\)"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings: Any, message: str) -> None:
    q, lse = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        _C.attention_forward(q, q, q, q.clone(), lse, settings, 1)


def test_what_attention_takes() -> None:
    q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)
    assert _C.attention_takes(q, k, k)
    assert _C.attention_takes(torch.nn.Parameter(q), k.transpose(2, 1).contiguous().transpose(2, 1), k)
    for wrong in (
        k[0], k[:1], k[..., :7], k[..., ::2], k.half(), k.double(), k.long(), k.to("meta"), k[:, :0], q[:, :3],
        k.to_sparse(), torch.empty(2, 2, 6, 300), k.as_subclass(Named), k.numpy(), None, 3,
    ):  # fmt: skip
        assert not _C.attention_takes(q, k, wrong)
        assert not _C.attention_takes(q, wrong, k)
    for wrong in (q.half(), q[:, :3], q[:1], q[..., :0], torch.zeros(2, 4, 5, 257), None):
        assert not _C.attention_takes(wrong, k, k)


def test_a_fake_tensor_is_refused() -> None:
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(6, 10)
    with pytest.raises((ValueError, RuntimeError)), pytest.warns(UserWarning, match="data pointer of FakeTensor"):
        _C.gelu_forward(fake, None, torch.zeros(6, 10), True, 1)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.parametrize("name", calls())
@given(data=st.data())
@QUICK
def test_wrong_arguments_of_native_functions_raise(name: str, data: st.DataObject) -> None:
    arguments = arguments_of(name)
    places = tensors_in(arguments)
    for argument in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        own = [place for place in places if place[0] == argument]
        if own and data.draw(st.integers(0, 3)):
            place = data.draw(st.sampled_from(own))
            spoiled = data.draw(st.sampled_from(SPOILED))(places[place], [*places.values()])
            arguments = replaced(arguments, place, spoiled)
        elif isinstance(arguments[argument], list) and data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(arguments[argument]) - 1))
            arguments = replaced(arguments, (argument, index), data.draw(ANYTHING))
        else:
            arguments[argument] = data.draw(ANYTHING)
    isa = _C.cpu_isa()
    try:
        call(name, arguments)
    except GOOD_REFUSALS as error:
        check_reason(error)
    finally:
        _C.use_cpu_isa(isa)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@given(data=st.data())
@settings(QUICK, max_examples=400)
def test_wrong_arguments_of_operations_raise_alike_on_every_backend(data: st.DataObject) -> None:
    """Each backend gives the same result as the others, or refuses with the same type of exception."""
    q, k, x, row = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(6, 10), torch.ones(10)
    boundaries = st.lists(st.integers(-1, 11), max_size=4).map(lambda inner: torch.tensor([0, *sorted(inner), 10]))
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
        "attention": (
            ops.attention,
            {"q": q, "k": k, "v": k.clone()},
            {
                "scale": ANYTHING,
                "window": st.tuples(ANYTHING, ANYTHING) | st.tuples(st.integers(-2, 7), st.integers(-2, 7)) | ANYTHING,
                "cu_seqlens": boundaries | st.tuples(boundaries, boundaries) | ANYTHING,
                "dropout_p": ANYTHING | st.floats(),
            },
        ),
        "layer_norm": (
            ops.layer_norm,
            {"x": x, "weight": row, "bias": row + 1, "residual": x + 1},
            {"eps": ANYTHING | st.floats(), "out_dtype": ANYTHING | st.sampled_from([torch.bfloat16, torch.float16])},
        ),
        "gelu": (ops.gelu, {"x": x, "bias": row}, {"approximate": ANYTHING | st.just("none")}),
    }
    run, tensors, others = calls[data.draw(st.sampled_from(sorted(calls)))]
    arguments = dict(tensors)
    for name in data.draw(st.lists(st.sampled_from([*tensors, *others]), max_size=2, unique=True)):
        if name in others:
            arguments[name] = data.draw(others[name])
        elif data.draw(st.booleans()):
            arguments[name] = data.draw(st.sampled_from(SPOILED))(tensors[name], list(tensors.values()))
        else:
            arguments[name] = data.draw(ANYTHING)
    results: dict[str, Any] = {}
    for backend in ("cpu", "torch"):
        torch.manual_seed(0)
        try:
            results[backend] = run(**arguments, backend=backend)
        except GOOD_REFUSALS as error:
            check_reason(error)
            results[backend] = type(error)
    cpu, reference = results["cpu"], results["torch"]
    if cpu is RuntimeError:  # what it cannot do, such as float64 or sparse tensors, others may
        return
    if isinstance(cpu, type) or isinstance(reference, type):
        assert cpu is reference
        return
    for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (cpu, reference)), strict=True):
        assert ours.dtype == theirs.dtype
        if ours.isfinite().all() and theirs.isfinite().all():
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
