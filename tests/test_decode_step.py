"""The native decoding step: the bits of GPT.forward, for every model and batch, and never where Python would notice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from grid import DTYPES, running, threads
from test_generation import PROMPTS
from test_native_calls import decode_arguments
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import _C, ops
from gptcore.config import GPTConfig
from gptcore.generation.cache import KVCache
from gptcore.generation.slots import Slots
from gptcore.generation.step import next_logits
from gptcore.model import GPT, Attention, Linear
from gptcore.ops.quantized_linear import quantize
from gptcore.quantized import kinds_of, quantize_modules

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt1": {"norm_position": "post", "activation_function": "gelu"},
    "gpt3": {"attention_window": 3, "tie_word_embeddings": False, "n_head": 2},
    "sinusoidal": {"position_embedding": "sinusoidal", "scale_attn_by_inverse_layer_idx": True, "n_inner": 77},
    "wide": {"n_embd": 320, "scale_attn_weights": False, "layer_norm_epsilon": 0.1, "n_layer": 1},
}


def small(dtype: torch.dtype = torch.float32, **settings: Any) -> GPT:
    torch.manual_seed(1)
    shape = {"vocab_size": 97, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
    model = GPT(GPTConfig(**{**shape, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def filled(model: GPT, prompts: list[list[int]]) -> KVCache:
    cache, ends = KVCache(32), torch.tensor([0, *map(len, prompts)]).cumsum(0)
    model(torch.tensor([[token for prompt in prompts for token in prompt]]), cu_seqlens=ends, cache=cache)
    return cache


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of rows of the native steps so far."""
    calls: list[int] = []
    decode = _C.decode

    def counted(tokens: list[int], *others: Any) -> None:
        decode(tokens, *others)
        calls.append(len(tokens))

    monkeypatch.setattr(_C, "decode", counted)
    return calls


def check_equal(model: GPT, caches: tuple[KVCache, KVCache], steps: int = 1) -> None:
    """Make steps by next_logits and by GPT.forward; compare logits and caches bit for bit."""
    ours, page = caches
    for step in range(steps):
        tokens = [(31 * row + 7 * step) % model.config.vocab_size for row in range(len(ours.lengths))]
        expected = model(torch.tensor(tokens)[:, None], cache=page).logits[:, -1]
        logits = next_logits(model, tokens, ours)
        assert logits.isfinite().all()
        assert logits.dtype is expected.dtype
        assert torch.equal(logits, expected)
    assert ours.lengths == page.lengths
    assert torch.equal(ours.positions(), page.positions())
    assert all(map(torch.equal, ours.layers, page.layers))


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in (_C.supported_isas()[0], _C.supported_isas()[-1])])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_step_has_the_bits_of_the_page(variant: str, dtype: torch.dtype, backend: str, native: list[int]) -> None:
    model = small(dtype, **VARIANTS[variant])
    for count, prompts in ((1, PROMPTS[:1]), (2, PROMPTS), (2, [PROMPTS[2]] * 3)):
        with threads(count), running(backend):
            check_equal(model, (filled(model, prompts), filled(model, prompts)), steps=4)
    assert native == [*[1] * 4, *[4] * 4, *[3] * 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@torch.no_grad()
def test_quantized_weights_have_the_bits_of_the_page(kind: str, dtype: torch.dtype, native: list[int]) -> None:
    for settings in ({}, {"norm_position": "post", "tie_word_embeddings": False}):
        model = small(dtype, n_embd=64, **settings)
        state = model.state_dict()
        linear = [name for name, weight in state.items() if weight.ndim == 2 and not name.startswith("wpe")]
        quantize_modules(model, dict.fromkeys(linear, kind))
        assert len(kinds_of(model)) == len(linear)
        blocks = {name: quantize(state[name], kind) for name in linear}
        model.load_state_dict({**state, **blocks}, assign=True)
        model.eval()
        check_equal(model, (filled(model, PROMPTS), filled(model, PROMPTS)), steps=2)
    assert native == [4] * 4


@torch.no_grad()
def test_a_large_model_splits_over_threads_with_the_same_bits(native: list[int]) -> None:
    model = small(n_embd=512, n_layer=1, vocab_size=3000)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(next_logits(model, [1, 2], filled(model, PROMPTS[:2])))
    assert torch.equal(*results)
    assert native == [2, 2]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parts_of_prompts_beside_single_tokens_have_the_bits_of_the_page(variant: str, native: list[int]) -> None:
    model = small(torch.bfloat16, **VARIANTS[variant])
    passes = [
        ([*range(20), 5, 6], [1] * 20 + [0] * 2, [*range(20), 0, 1], [19, 3, 21]),
        ([7, 8, *range(9)], [0, 1, *[2] * 9], [2, 20, *range(9)], []),
        ([9, 1, 2], [2, 2, 0], [9, 10, 3], [0, 1, 2]),
    ]
    ours, page = Slots(model, 3), Slots(model, 3)
    for tokens, rows, places, kept in passes:
        logits = ours.read(model, tokens, rows, places, kept)
        assert len(native) > 0
        with page_alone():
            assert torch.equal(logits, page.read(model, tokens, rows, places, kept))
        assert logits.shape == (len(kept), 97)
    assert native == [22, 11, 3]
    assert torch.equal(ours.memory, page.memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [3, 0]}, r"a token is in row 3, expected 0 to 2: caches\[0\] has 3"),
        ({"rows": [-1, 0]}, "a token is in row -1, expected 0 to 2"),
        ({"places": [5, 0], "positions": None}, "a row has 5 tokens, expected 0 to 4"),
        ({"kept": [2]}, "kept has 2, expected 0 to 1"),
        ({"kept": [-1]}, "kept has -1, expected 0 to 1"),
        ({"rows": [0]}, "got 2 tokens, 1 rows and 2 places, expected as many"),
        ({"kept": [1]}, r"out has shape \(2, 9\), expected 1 rows of 9"),
    ],
)
def test_places_outside_of_the_caches_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.decode(**{**decode_arguments(), **change})


def test_generate_takes_the_step_while_rows_come_and_go(native: list[int]) -> None:
    model = small(tie_word_embeddings=False)
    texts = model.generate(PROMPTS, 9, do_sample=True, seed=3)
    assert native == [sum(map(len, PROMPTS)), *[4] * 8]
    with page_alone():
        assert torch.equal(model.generate(PROMPTS, 9, do_sample=True, seed=3), texts)
    assert native == [sum(map(len, PROMPTS)), *[4] * 8]


# ---- what Python would notice ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def page_alone() -> Iterator[None]:
    """A hook on any module is seen, so every step is GPT.forward."""
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        yield


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OtherLinear(Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def other_class(model: GPT) -> None:
    model.h[1].mlp.c_fc.__class__ = OtherLinear


def own_forward(model: GPT) -> None:
    forward = model.h[2].attn.forward
    model.h[2].attn.forward = lambda *args: 2 * forward(*args)  # type: ignore[method-assign]


def other_module(model: GPT) -> None:
    plain = nn.Linear(48, 144)
    plain.load_state_dict(model.h[0].attn.c_attn.state_dict())
    model.h[0].attn.c_attn = plain  # type: ignore[assignment]


def dropout(model: GPT) -> None:
    model.h[0].mlp.resid_dropout.train().p = 0.0  # so that it can be compared


def transposed(model: GPT) -> None:
    weight = model.h[0].mlp.c_fc.weight
    weight.data = weight.t().contiguous().t()


def other_head(model: GPT) -> None:
    model.lm_head = OtherLinear(48, 97, bias=False)


PAGE: dict[str, Callable[[GPT], Any]] = {
    **{
        f"forward hook on {name or 'model'}": lambda model, name=name: model.get_submodule(name).register_forward_hook(
            lambda *_: _[-1] if isinstance(_[-1], tuple) else 2 * _[-1]
        )
        for name in ("drop", "wpe", "h.1", "h.1.ln_1", "h.2.ln_2", "h.0.attn", "h.0.attn.c_attn", "h.1.attn.c_proj",
                     "h.0.attn.resid_dropout", "h.2.mlp", "h.2.mlp.c_fc", "h.0.mlp.c_proj", "h.1.mlp.resid_dropout",
                     "ln_f")
    },
    "pre-hook": lambda model: model.h[1].mlp.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "backward hook": lambda model: model.h[1].mlp.register_full_backward_hook(lambda *_: None),
    "class": other_class,
    "forward of an instance": own_forward,
    "module": other_module,
    "dropout": dropout,
    "parametrization": lambda model: parametrize.register_parametrization(model.h[0].mlp.c_fc, "weight", Doubled()),
    "memory": transposed,
    "class of the output projection": other_head,
    "window": lambda model: setattr(model.h[1].attn, "window", (2, 1)),
    "compiled": lambda model: setattr(model.h[0], "_compiled_call_impl", model.h[0]._call_impl),  # as by .compile()
    "weight in another dtype": lambda model: model.ln_f.double(),
}  # fmt: skip


@pytest.mark.parametrize("change", PAGE)
@torch.no_grad()
def test_what_python_would_notice_is_left_to_the_page(change: str, native: list[int]) -> None:
    model = small()
    caches = filled(model, PROMPTS), filled(model, PROMPTS)
    check_equal(model, caches)
    assert native == [4]
    PAGE[change](model)
    if change == "weight in another dtype":
        with pytest.raises(ValueError, match=r"weight is torch.float64 on cpu, expected torch.float32"):
            next_logits(model, [1] * 4, caches[0])
    else:
        check_equal(model, caches, steps=2)
    assert native == [4]


@pytest.mark.parametrize(
    "context",
    [
        page_alone,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: ops.use("torch"),
        pytest.param(Watching, marks=pytest.mark.slow),  # imports torch._dynamo
    ],
    ids=["global hook", "gradients", "autocast", "backend", "dispatch mode"],
)
@torch.no_grad()
def test_contexts_that_python_would_notice_are_left_to_the_page(context: Any, native: list[int]) -> None:
    model = small()
    with context():
        check_equal(model, (filled(model, PROMPTS), filled(model, PROMPTS)), steps=2)
    assert not native
    with ops.use("cpu"):
        check_equal(model, (filled(model, PROMPTS), filled(model, PROMPTS)))
    assert native == [4]


@torch.no_grad()
def test_a_method_of_a_class_may_be_replaced(native: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = small(), Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *args: 2 * forward(*args))
    check_equal(model, (filled(model, PROMPTS), filled(model, PROMPTS)), steps=2)
    assert not native


# ---- what changes between two steps ----------------------------------------------------------------------------------


def loaded(model: GPT) -> None:
    torch.manual_seed(9)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def trained(model: GPT) -> None:
    with torch.enable_grad():
        model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse], lr=0.1)
    optimizer.step()


def replaced(model: GPT) -> None:
    for name, parameter in list(model.h[1].mlp.c_proj.named_parameters()):
        setattr(model.h[1].mlp.c_proj, name, nn.Parameter(2 * parameter))
    model.h[0].ln_1, model.h[2].ln_1 = model.h[2].ln_1, model.h[0].ln_1
    model.ln_f.eps = 0.5  # type: ignore[union-attr]
    model.h[0].attn.scale = 0.01


def moved(model: GPT) -> None:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def renormed(model: GPT) -> None:
    model.wpe.max_norm = 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [loaded, trained, replaced, moved, renormed])
@torch.no_grad()
def test_changes_between_steps_count(change: Callable[[GPT], None], native: list[int]) -> None:
    model = small(tie_word_embeddings=False)
    caches = filled(model, PROMPTS), filled(model, PROMPTS)
    check_equal(model, caches)
    change(model)
    check_equal(model, caches, steps=2)
    assert native == [4, 4, 4]


@pytest.mark.parametrize(("n_positions", "full"), [(40, "do not fit into a KV cache of 32"), (32, "has 32 positions")])
@torch.no_grad()
def test_wrong_tokens_and_full_caches_are_refused_by_the_page(n_positions: int, full: str, native: list[int]) -> None:
    model = small(n_positions=n_positions)
    cache = filled(model, PROMPTS)
    for token in (-1, 97):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary of 97 tokens"):
            next_logits(model, [1, 2, 3, token], cache)
    while cache.length < cache.capacity:
        next_logits(model, [1] * 4, cache)
    with pytest.raises(ValueError, match=full):
        next_logits(model, [1] * 4, cache)
    assert native == [4] * 24


@torch.no_grad()
def test_a_cache_in_another_dtype_is_refused_by_the_page() -> None:
    model = small()
    cache = filled(model, PROMPTS)
    model.bfloat16()
    with pytest.raises(RuntimeError, match="dtypes match, got Float for the destination and BFloat16"):
        next_logits(model, [1] * 4, cache)
