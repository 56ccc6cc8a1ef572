"""gptcore's operations in models of transformers: the same numbers, and all as it was after restore."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptcore import ops
from gptcore.integrations.transformers import apply, attention_forward, register, restore, segments_of

VOCABULARY = 61


@pytest.fixture(autouse=True)
def quiet_machine() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt2(**options: Any) -> Any:
    settings = {"vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2} | options
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()


def gradients(model: nn.Module, **inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def padded(B: int, T: int, left: int, right: int) -> dict[str, Tensor]:
    """Row 0 is padded on the left, row 1 on the right."""
    ids = torch.randint(VOCABULARY, (B, T))
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask[1, T - right :] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, left] = -100  # padding would foretell it
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """In float32, within 1e-5 of the largest number: both orders of summation are right."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1e-3, float(expected.detach().abs().max())))


@pytest.mark.parametrize(
    ("before", "padding", "options"),
    [
        ("sdpa", (0, 0), {}),
        ("sdpa", (4, 2), {"activation_function": "gelu"}),
        ("eager", (0, 0), {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
        ("eager", (3, 0), {"activation_function": "gelu_pytorch_tanh", "scale_attn_weights": False}),
        ("eager", (0, 5), {"n_inner": 40}),
    ],
)
def test_logits_loss_and_gradients_are_as_before(
    before: str, padding: tuple[int, int], options: dict[str, Any]
) -> None:
    model = gpt2(**options)
    model.set_attn_implementation(before)
    inputs = padded(2, 23, *padding)
    expected, expected_gradients = gradients(model, **inputs)
    apply(model)
    found, found_gradients = gradients(model, **inputs)
    defined = inputs["attention_mask"].bool()
    if before == "eager":
        defined[1] = True  # padding after a text sees it; before a text this attention takes the mean of all values
    else:
        defined[:] = True
    assert_close(found.logits[defined], expected.logits[defined])
    assert_close(found.loss, expected.loss)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(found_gradients[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_twice_the_error_of_what_was_there_before(dtype: torch.dtype) -> None:
    model, inputs = gpt2(initializer_range=0.1), padded(2, 31, 4, 5)
    exact, exact_gradients = gradients(copy.deepcopy(model).double(), **inputs)
    model = model.to(dtype)
    before, gradients_before = gradients(model, **inputs)
    after, gradients_after = gradients(apply(model), **inputs)

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())

    tiny = 2 * torch.finfo(dtype).eps
    assert error(after.logits, exact.logits) <= 2 * error(before.logits, exact.logits) + tiny
    assert error(after.loss, exact.loss) <= 2 * error(before.loss, exact.loss) + tiny
    for name, gradient in exact_gradients.items():
        assert error(gradients_after[name], gradient) <= 2 * error(gradients_before[name], gradient) + tiny, name


def test_the_loss_may_count_padding_after_a_text() -> None:
    """Who passes input_ids as labels, with padding in them, gets the loss and the gradients that they had."""
    model = gpt2()
    inputs = padded(2, 23, 4, 5)
    inputs["labels"] = inputs["input_ids"]
    expected, expected_gradients = gradients(model, **inputs)
    found, found_gradients = gradients(apply(model), **inputs)
    assert_close(found.loss, expected.loss)
    for name, gradient in expected_gradients.items():
        assert_close(found_gradients[name], gradient)


@pytest.mark.parametrize("where", ["argument", "config"])
def test_attention_weights_are_refused(where: str) -> None:
    model, ids = gpt2(), torch.randint(VOCABULARY, (2, 9))
    options = {"output_attentions": True} if where == "argument" else {}
    model.set_attn_implementation("eager")
    model.config.output_attentions = where == "config"
    assert len(model(ids, **options).attentions) == 2
    apply(model)
    for part in (model, model.transformer):
        with pytest.raises(ValueError, match="has no output_attentions"):
            part(ids, **options)
    assert len(restore(model)(ids, **options).attentions) == 2


def test_our_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply(gpt2())
    called = dict.fromkeys(("attention", "layer_norm", "gelu"), 0)
    for name in called:
        function = getattr(ops, name)

        def counting(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            called[_name] += 1
            return _function(*args, **kwargs)

        monkeypatch.setattr(ops, name, counting)
    model(torch.randint(VOCABULARY, (1, 9)))
    assert called == {"attention": 2, "layer_norm": 5, "gelu": 2}


def test_restore_leaves_no_trace() -> None:
    model = gpt2()
    inputs = {"input_ids": torch.randint(VOCABULARY, (2, 9))}
    seen: list[int] = []
    model.transformer.ln_f.register_forward_hook(lambda *_: seen.append(1))
    untouched = copy.deepcopy(model)
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    parameters = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    assert apply(model) is model
    assert model.config._attn_implementation == "gptcore"
    assert model.state_dict().keys() == untouched.state_dict().keys()
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match="already"):
        apply(model)
    assert restore(model) is model
    assert {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()} == before
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == parameters
    assert model.config._attn_implementation == untouched.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)
    assert len(seen) == 2  # the hook is there still
    assert type(restore(copied).transformer.ln_f) is nn.LayerNorm
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(model)


def test_what_is_no_gpt2_of_gelus_is_refused_and_left_alone() -> None:
    with pytest.raises(TypeError, match="not for Linear"):
        apply(nn.Linear(2, 2))  # type: ignore[arg-type]
    llama = tiny_llama()
    with pytest.raises(TypeError, match="not for llama"):
        apply(llama)
    model = gpt2(activation_function="relu")
    with pytest.raises(ValueError, match="'relu' is not supported; it should be one of gelu_new"):
        apply(model)
    assert type(model.transformer.ln_f) is nn.LayerNorm
    assert model.config._attn_implementation == "sdpa"


def test_dropout_is_drawn_and_follows_the_seed() -> None:
    model = apply(gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)).train()
    ids = torch.randint(VOCABULARY, (2, 9))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(ids).logits)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("left", "cache"), [(0, "dynamic"), (4, "dynamic"), (4, "static"), (4, None)])
def test_generation_is_as_before(left: int, cache: str | None) -> None:
    model = gpt2(eos_token_id=None, pad_token_id=0)
    inputs = padded(2, 9, left, 0)
    options: dict[str, Any] = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 12, "do_sample": False}
    options |= {"use_cache": cache is not None, "disable_compile": True}
    if cache:
        options["cache_implementation"] = cache
    expected = model.generate(inputs["input_ids"], **options)
    assert torch.equal(apply(model).generate(inputs["input_ids"], **options), expected)
    assert expected.shape == (2, 21)


def tiny_llama(**options: Any) -> Any:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, **options)).eval()


def tiny_mistral() -> Any:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": 0}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("padding", [(0, 0), (6, 5)])
def test_other_causal_models_take_our_attention_by_name(make: Any, padding: tuple[int, int]) -> None:
    register()
    model = make()
    inputs = padded(2, 17, *padding)
    expected, expected_gradients = gradients(model, **inputs)
    model.set_attn_implementation("gptcore")
    found, found_gradients = gradients(model, **inputs)
    assert_close(found.logits, expected.logits)
    for name, gradient in expected_gradients.items():
        assert_close(found_gradients[name], gradient)


def test_packed_documents_are_kept_apart() -> None:
    model = gpt2()
    ids = torch.randint(VOCABULARY, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    found = apply(model)(ids, position_ids=positions, use_cache=False).logits
    assert_close(found, expected)
    assert_close(found[:, 5:8], model(ids[:, 5:8]).logits)


# Masks


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention by the formula; 0 for a query that sees nothing."""
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def causal_mask(rows: list[list[int]], past: int, width: int | None) -> Tensor:
    """Rows of document lengths, negative for padding; the first `past` tokens are keys only."""
    K = sum(map(abs, rows[0]))
    seen = torch.zeros(len(rows), 1, K, K, dtype=torch.bool)
    for b, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            end = start + abs(length)
            if length > 0:
                seen[b, 0, start:end, start:end] = torch.ones(length, length).tril().bool()
            start = end
    if width is not None:
        seen &= torch.ones(K, K).triu(1 - width).bool()
    return seen[:, :, past:]


def cut(total: int, places: set[int], padding: set[int]) -> list[int]:
    edges = [0, *sorted(p for p in places if 0 < p < total), total]
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    return [-n if i in padding else n for i, n in enumerate(lengths)]


ROW = st.tuples(st.sets(st.integers(1, 13), max_size=4), st.sets(st.integers(0, 4), max_size=2))


@given(
    total=st.integers(1, 14),
    rows=st.lists(ROW, min_size=1, max_size=3),
    past=st.integers(0, 13),
    width=st.none() | st.integers(1, 14),
    as_float=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_every_mask_of_documents_padding_and_window_is_done_exactly(
    total: int, rows: list[tuple[set[int], set[int]]], past: int, width: int | None, as_float: bool
) -> None:
    past = min(past, total - 1)
    seen = causal_mask([cut(total, places, padding) for places, padding in rows], past, width)
    B, _, Q, K = seen.shape
    q, k, v = torch.randn(B, 2, Q, 8), torch.randn(B, 2, K, 8), torch.randn(B, 2, K, 8)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if as_float else seen
    found, weights = attention_forward(nn.Module(), q, k, v, mask, scaling=None)
    assert weights is None
    torch.testing.assert_close(found.transpose(1, 2), dense(q, k, v, seen), rtol=1e-4, atol=1e-5)


@given(
    bits=st.lists(st.integers(0, 1), min_size=16, max_size=16),
    causal=st.booleans(),
    kind=st.sampled_from([torch.bool, torch.float32, torch.float64]),
)
@settings(max_examples=600, deadline=None)
def test_any_other_mask_is_refused_and_never_done_wrong(bits: list[int], causal: bool, kind: torch.dtype) -> None:
    seen = torch.tensor(bits).bool().view(1, 1, 4, 4)
    q, k, v = torch.randn(3, 1, 1, 4, 8).unbind(0)
    try:
        mask = seen if kind == torch.bool else torch.zeros(1, 1, 4, 4, dtype=kind).masked_fill(~seen, -torch.inf)
        found, _ = attention_forward(nn.Module(), q, k, v, mask, is_causal=causal)
    except ValueError as error:
        assert "gptcore's attention does not support this mask" in str(error)  # noqa: PT017
        return
    expected = dense(q, k, v, seen).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unsupported_masks_raise() -> None:
    prefix = torch.ones(1, 1, 5, 5).tril().bool()
    prefix[..., :3, :3] = True
    holes = torch.ones(1, 1, 5, 5).tril().bool()
    holes[..., 1] = False
    heads = torch.ones(1, 2, 5, 5).tril().bool()
    heads[0, 1, :, 0] = False
    for mask, message in [
        (prefix, "the last key that a query attends to is not its own"),
        (holes, "not contiguous .first in row 0, query 2"),
        (heads, "differs between heads"),
        (torch.ones(1, 1, 5, 5).tril() - 1.0, "other values than 0 and the lowest"),
    ]:
        with pytest.raises(ValueError, match=message):
            segments_of(mask, causal=True)
    q = torch.randn(1, 1, 2, 8)
    k = torch.randn(1, 1, 5, 8)
    with pytest.raises(ValueError, match="2 queries for 5 keys need a mask"):
        attention_forward(nn.Module(), q, k, k, None)
    with pytest.raises(ValueError, match=r"expected \(1, 1, 2, 5\)"):
        attention_forward(nn.Module(), q, k, k, torch.ones(1, 1, 5, 5).bool())
    with pytest.raises(ValueError, match="no softcap"):
        attention_forward(nn.Module(), q, q, q, None, softcap=30.0)


def test_cross_attention_is_not_causal() -> None:
    model = gpt2(add_cross_attention=True)
    ids, memory = torch.randint(VOCABULARY, (2, 7)), torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "encoder_hidden_states": memory, "encoder_attention_mask": mask}
    expected = model(**inputs).logits
    assert_close(apply(model)(**inputs).logits, expected)
