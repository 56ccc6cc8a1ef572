"""Invalid inputs of GPT, and GPT on the meta device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_model import SMALL, ids, small

from gptcore.config import GPTConfig
from gptcore.generation import KVCache
from gptcore.model import GPT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- what it refuses


def arguments(**changes: object) -> dict:
    return {"input_ids": ids(2, 6), **changes}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (arguments(input_ids=ids(6)), ValueError, r"input_ids should be \(batch, length\) .* not \(6,\)"),
        (arguments(input_ids=ids(2, 0)), ValueError, r"a token or more, not \(2, 0\)"),
        (arguments(input_ids=ids(2, 6).float()), TypeError, "input_ids should be int64 or int32, not torch.float32"),
        (arguments(input_ids=ids(1, 40)), ValueError, "sequence of 40 tokens, but this model has 32 positions"),
        (arguments(input_ids=torch.tensor([[3, 97]])), ValueError, "token 97 is outside the vocabulary of 97 tokens"),
        (arguments(input_ids=torch.tensor([[3, -1]])), ValueError, "token -1 is outside the vocabulary of 97 tokens"),
        (arguments(labels=ids(2, 5)), ValueError, r"labels \(2, 5\) should have the shape of input_ids \(2, 6\)"),
        (arguments(labels=ids(2, 6) * 0 + 97), ValueError, "label 97 is neither -100 nor in the vocabulary of 97"),
        (arguments(labels=ids(2, 6) * 0 - 1), ValueError, "label -1 is neither -100 nor"),
        (arguments(labels=ids(2, 6).double()), TypeError, "labels should be int64 or int32, not torch.float64"),
        (arguments(attention_mask=torch.ones(2, 5)), ValueError, r"attention_mask \(2, 5\) should have the shape"),
        (arguments(attention_mask=torch.ones(2, 6)), TypeError, "attention_mask should be bool or integer"),
        (
            arguments(attention_mask=torch.tensor([[1] * 6, [1, 1, 0, 0, 1, 1]])),
            ValueError,
            "row 1 of attention_mask has 2 runs of ones, but a text is one run.*pass cu_seqlens",
        ),
        (arguments(attention_mask=torch.zeros(2, 6).bool()), ValueError, "row 0 of attention_mask has 0 runs"),
        (arguments(attention_mask=torch.full((2, 6), 2)), ValueError, "attention_mask should hold 0 and 1 only, not 2"),
        (
            arguments(attention_mask=torch.ones(2, 6).bool(), cu_seqlens=torch.tensor([0, 6, 12])),
            ValueError,
            "attention_mask and cu_seqlens both",
        ),
        (arguments(cu_seqlens=torch.tensor([0, 6])), ValueError, "from 0 to the batch's 12 tokens, not from 0 to 6"),
        (arguments(cu_seqlens=torch.tensor([0, 6, 4, 12])), ValueError, "cu_seqlens should never fall, but does by 2"),
        (arguments(cu_seqlens=torch.tensor([[0, 12]])), ValueError, r"two boundaries or more, not \(1, 2\)"),
        (arguments(cu_seqlens=(torch.tensor([0, 6, 12]),) * 2), TypeError, "cu_seqlens is a tuple, expected one"),
        (arguments(position_ids=torch.arange(5)), ValueError, r"position_ids \(5,\) should be \(6,\) or \(2, 6\)"),
        (arguments(position_ids=torch.arange(6) - 1), ValueError, "position -1 is before the first"),
        (arguments(position_ids=torch.arange(6) + 27), ValueError, "sequence of 33 tokens, but .* 32 positions"),
        (arguments(labels=ids(2, 6), logits_to_keep=1), ValueError, "labels need the logits of the whole sequence"),
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids is a list, expected a tensor \(batch, length\)"),
        (arguments(logits_to_keep=7), ValueError, r"logits_to_keep 7 should be between 0 \(all\) and the 6 tokens"),
        (arguments(logits_to_keep=torch.tensor([0.0])), ValueError, "logits_to_keep is torch.float32 of shape"),
        (arguments(return_logits=False), ValueError, "return_logits=False returns the loss alone, which needs labels"),
        (arguments(cache=KVCache(5)), ValueError, r"0 \+ 6 tokens do not fit into a KV cache of 5"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(call: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(**call)


def test_a_cache_takes_no_mask_after_its_first_tokens() -> None:
    model, cache = small(), KVCache(12)
    model(ids(2, 6), cache=cache)
    assert cache.length == 6
    with pytest.raises(ValueError, match="the cache holds 6 tokens"):
        model(ids(2, 1), torch.ones(2, 1).bool(), cache=cache)
    model(ids(2, 6), cache=cache)
    with pytest.raises(ValueError, match="12 \\+ 1 tokens do not fit into a KV cache of 12"):
        model(ids(2, 1), cache=cache)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_masks_and_packing_on_the_meta_device(tied: bool) -> None:
    with torch.device("meta"):
        model, x = GPT(dataclasses.replace(SMALL, tie_word_embeddings=tied)), ids(2, 6)
        mask, cu_seqlens = torch.ones(2, 6, dtype=torch.int64), torch.arange(0, 13, 6)
    for more in ({}, {"attention_mask": mask}, {"cu_seqlens": cu_seqlens}):
        for return_logits in (True, False):
            out = model(x, labels=x, return_logits=return_logits, **more)
            out.loss.backward()
            assert out.loss.is_meta
            assert out.logits.shape == (2, 6 if return_logits else 0, 97)
            assert model.h[0].attn.c_attn.weight.grad.is_meta


@pytest.mark.parametrize("sizes", [{"vocab_size": 2 * 10**9}, {"n_positions": 2**31 - 1}, {"n_embd": 2**20}])
def test_a_model_that_memory_cannot_hold_is_refused_with_numbers(sizes: dict) -> None:
    config = dataclasses.replace(SMALL, **{"n_embd": 2**17, "n_head": 2**13, **sizes})
    with pytest.raises(
        ValueError, match=r"parameters take [\d,.]+ GB in float32, but cpu has [\d,.]+ GB; use a smaller"
    ):
        GPT(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 10**6}, "n_layer should be at most 10,000, not 1,000,000"),
        ({"n_positions": 10**20}, "n_positions should be at most"),
        ({"n_embd": 2**62}, "n_embd should be at most"),
        ({"attention_window": 2**62}, "attention_window should be at most"),
    ],
)
def test_sizes_of_no_model_are_refused(sizes: dict, message: str) -> None:
    for make in (GPTConfig, lambda **values: GPTConfig.from_dict({"model_type": "gpt2", **values})):
        with pytest.raises(ValueError, match=message):
            make(**sizes)
