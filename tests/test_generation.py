"""Generation: neither the cache nor the batch changes a token, draws follow their own seed, bad options are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptcore import ops
from gptcore.config import GPTConfig
from gptcore.generation.sampling import sample
from gptcore.model import GPT

VARIANTS = {
    "gpt2": {},
    "gpt1": {"norm_position": "post"},
    "gpt3": {"attention_window": 3},
    "sinusoidal": {"position_embedding": "sinusoidal"},
}
PROMPTS = [[5, 3, 8, 13, 2, 9, 9, 1], [4], [7, 7, 11], [96, 0, 50, 21, 33]]


def small(**settings: object) -> GPT:
    """A model whose greedy text varies: large weights, and an output that is not the input embedding."""
    torch.manual_seed(1)
    shape = {"vocab_size": 97, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
    return GPT(GPTConfig(**{**shape, "tie_word_embeddings": False, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_and_the_batch_change_no_token(variant: str, backend: str | None) -> None:
    model = small(**VARIANTS[variant])
    with ops.use(backend):
        batch = model.generate(PROMPTS, 20)
        slow = model.generate(PROMPTS, 20, use_cache=False)
        alone = [model.generate([prompt], 20) for prompt in PROMPTS]
    assert batch.shape == (4, 28)
    assert batch.dtype == torch.int64
    assert len(batch[:, 8:].unique()) > 10  # not the same token again and again
    assert torch.equal(batch, slow)
    for row, prompt in enumerate(PROMPTS):
        assert batch[row, 8 - len(prompt) : 8].tolist() == prompt
        assert torch.equal(batch[row, 8 - len(prompt) :], alone[row][0])


def test_greedy_takes_the_likeliest_token_of_the_model() -> None:
    model = small().eval()
    ids = model.generate([PROMPTS[0]], 10)
    for t in range(8, 18):
        assert ids[0, t] == model(ids[:, :t]).logits[0, -1].argmax()


def test_a_padded_tensor_is_a_list_of_prompts() -> None:
    model = small()
    ids, mask = torch.full((4, 8), 60), torch.zeros(4, 8, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 8 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 8 - len(prompt) :] = 1
    expected = model.generate(PROMPTS, 6)[:, 8:]
    assert torch.equal(model.generate(ids, 6, attention_mask=mask)[:, 8:], expected)
    assert torch.equal(model.generate(ids.int(), 6, attention_mask=mask.bool())[:, 8:], expected)
    assert torch.equal(model.generate(ids, 6)[:1, 8:], expected[:1])  # without a mask nothing is padding
    assert not torch.equal(model.generate(ids, 6)[:, 8:], expected)


@pytest.mark.parametrize("pad_token_id", [None, 96])
def test_a_row_is_filled_after_its_end(pad_token_id: int | None) -> None:
    free = small().generate(PROMPTS, 20)[:, 8:]
    eos = int(free[0, 4])
    model = small(eos_token_id=eos, pad_token_id=pad_token_id)
    ends = model.generate(PROMPTS, 20)[:, 8:]
    fill = eos if pad_token_id is None else pad_token_id
    for row in range(4):
        where = (free[row] == eos).nonzero()
        end = int(where[0]) + 1 if len(where) > 0 else 20
        assert torch.equal(ends[row, :end], free[row, :end])
        assert (ends[row, end:] == fill).all()
    assert (ends[0, 5:] == fill).all()
    assert torch.equal(small(pad_token_id=fill).generate(PROMPTS, 20, eos_token_id=eos)[:, 8:], ends)
    assert torch.equal(model.generate(PROMPTS, 20, eos_token_id=-1)[:, 8:], free)
    assert model.generate(PROMPTS[:1], 20).shape == (1, 28)  # all rows ended early: the shape is what was asked for


def test_draws_follow_their_own_seed_and_leave_the_global_one_alone() -> None:
    model = small()
    state = torch.get_rng_state()
    first = model.generate(PROMPTS, 20, do_sample=True, seed=1)
    torch.manual_seed(99)
    assert torch.equal(model.generate(PROMPTS, 20, do_sample=True, seed=1), first)
    assert not torch.equal(model.generate(PROMPTS, 20, do_sample=True, seed=2), first)
    torch.set_rng_state(state)
    assert not torch.equal(model.generate(PROMPTS, 20, do_sample=True), model.generate(PROMPTS, 20, do_sample=True))
    model.generate(PROMPTS, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(PROMPTS, 9, do_sample=True, top_k=1), model.generate(PROMPTS, 9))


def test_the_model_is_left_as_it_was() -> None:
    model = small(attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.h[1].eval()
    before = [module.training for module in model.modules()]
    first = model.generate(PROMPTS, 8)
    assert torch.equal(first, model.generate(PROMPTS, 8))  # no dropout
    with torch.no_grad():
        model.h[2].mlp.c_proj.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="logits for token 8 are not finite"):
        model.generate(PROMPTS, 8)
    assert [module.training for module in model.modules()] == before
    assert any(before)
    assert not all(before)


def test_generated_ids_can_be_trained_on() -> None:
    model = small()
    ids = model.generate(PROMPTS, 4)
    model(ids, labels=ids).loss.backward()


def test_generation_under_bfloat16_autocast() -> None:
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(PROMPTS, 4).shape == (4, 12)


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}],
)
def test_limits_see_no_padding_and_no_other_row(options: dict) -> None:
    eos, pad = (int(small().generate([prompt], n)[0, -1]) for prompt, n in ((PROMPTS[0], 3), ([4], 1)))
    model = small(eos_token_id=eos, pad_token_id=pad)  # both are tokens that come by themselves
    batch = model.generate(PROMPTS, 20, **options)
    assert not torch.equal(batch, model.generate(PROMPTS, 20))
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(batch[row, 8 - len(prompt) :], model.generate([prompt], 20, **options)[0])


def test_no_run_of_tokens_comes_twice_in_what_is_drawn() -> None:
    model = small(eos_token_id=None)
    drawn = model.generate(PROMPTS, 24, do_sample=True, top_k=3, seed=0, no_repeat_ngram_size=2, num_return_sequences=3)
    assert drawn.shape == (12, 32)
    for row, ids in enumerate(drawn.tolist()):
        text = ids[8 - len(PROMPTS[row // 3]) :]
        assert text[: len(PROMPTS[row // 3])] == PROMPTS[row // 3]
        new = list(itertools.pairwise(text))[len(PROMPTS[row // 3]) - 1 :]
        assert len(set(new)) == len(new)
    assert not torch.equal(drawn[0], drawn[1])


def test_limits_on_repetition_take_a_prompt_beyond_the_vocabulary_of_the_tokenizer() -> None:
    new = small().generate([[96, 5, 96]], 9, vocab_size=90, repetition_penalty=1.5, no_repeat_ngram_size=1)[0, 3:]
    assert (new < 90).all()
    assert len({5, *new.tolist()}) == 10


def test_where_no_token_is_left_says_so() -> None:
    model = small(vocab_size=5, eos_token_id=None)
    with pytest.raises(ValueError, match="no token is left that could be token 5: loosen the limits"):
        model.generate([[0, 1]], 9, no_repeat_ngram_size=1)


# ---- sampling


def draw(logits: Tensor, *, seed: int = 0, temperature: float = 1.0, top_k: int | None = None,
         top_p: float | None = None) -> Tensor:  # fmt: skip
    N = len(logits)
    return sample(logits, [torch.Generator().manual_seed(seed)] * N, [temperature] * N, top_k, [top_p] * N)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [3, 4]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1e-9}, [3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3, 4]),  # 0.4, 0.3 and 0.2 are 0.44, 0.33 and 0.22 of the three
        ({"top_k": 3, "top_p": 0.77}, [3, 4]),
    ],
)
def test_draws_have_the_frequencies_that_the_options_say(options: dict, kept: list[int]) -> None:
    probabilities = torch.tensor([0.04, 0.2, 0.06, 0.4, 0.3])
    N = 40_000
    counts = draw(probabilities.log().expand(N, 5), **options).bincount(minlength=5)
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept] ** (1 / options.get("temperature", 1.0))
    expected /= expected.sum()
    torch.testing.assert_close(counts / N, expected, rtol=0, atol=0.012)  # 5 standard deviations
    assert (counts[expected == 0] == 0).all()


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    temperature=st.floats(1e-6, 1e6),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_drawn_token_is_always_one_of_the_allowed(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    row = torch.tensor(logits)
    token = int(draw(row[None], seed=seed, temperature=temperature, top_k=top_k, top_p=top_p))
    better = row > row[token]
    assert top_k is None or int(better.sum()) < top_k
    mass = ((row - row.max()).double() / temperature).softmax(-1)[better].sum()
    assert top_p is None or top_k is not None or mass < top_p + 1e-5


# ---- what it refuses


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (PROMPTS, {"max_new_tokens": 26}, ValueError, "8 tokens and 26 new ones need 33 positions, but .* has 32"),
        (PROMPTS, {"max_new_tokens": 0}, ValueError, "max_new_tokens should be a whole number of at least 1, not 0"),
        (PROMPTS, {"max_new_tokens": 2.0}, ValueError, "max_new_tokens should be a whole number"),
        (PROMPTS, {"do_sample": True, "temperature": 0.0}, ValueError, "temperature should be positive"),
        (PROMPTS, {"do_sample": True, "temperature": float("nan")}, ValueError, "temperature should be positive"),
        (PROMPTS, {"do_sample": True, "top_k": 0}, ValueError, "top_k should be a whole number of at least 1, not 0"),
        (PROMPTS, {"do_sample": True, "top_p": 0.0}, ValueError, r"top_p should be in \(0, 1\], not 0.0"),
        (PROMPTS, {"do_sample": True, "top_p": 1.1}, ValueError, r"top_p should be in \(0, 1\], not 1.1"),
        (PROMPTS, {"do_sample": True, "seed": -1}, ValueError, "seed should be .* not -1"),
        (PROMPTS, {"do_sample": True, "seed": "1"}, ValueError, "seed should be a whole number .* not '1'"),
        (PROMPTS, {"temperature": 0.7}, ValueError, "pass do_sample=True"),
        (PROMPTS, {"top_k": 5}, ValueError, "pass do_sample=True"),
        (PROMPTS, {"top_p": 0.5}, ValueError, "pass do_sample=True"),
        (PROMPTS, {"repetition_penalty": 0.0}, ValueError, "repetition_penalty should be positive"),
        (PROMPTS, {"no_repeat_ngram_size": 0}, ValueError, "no_repeat_ngram_size should be a whole number"),
        (PROMPTS, {"min_new_tokens": -1}, ValueError, "min_new_tokens should be a whole number of at least 0, not -1"),
        (PROMPTS, {"num_return_sequences": 0}, ValueError, "num_return_sequences should be a whole number"),
        (PROMPTS, {"num_return_sequences": 2}, ValueError, "would be one text as often: pass do_sample=True"),
        (PROMPTS, {"eos_token_id": 97}, ValueError, "eos_token_id 97 is outside the vocabulary of 97 tokens"),
        ([], {}, ValueError, "each prompt needs a token or more"),
        ([[1], []], {}, ValueError, "each prompt needs a token or more"),
        ([1, 2], {}, TypeError, r"each a list of token ids: \[ids\] for a single one"),
        ("text", {}, TypeError, "each a list of token ids"),
        (["text"], {}, TypeError, "each a list of token ids"),
        ([[1.5]], {}, TypeError, "float"),
        ([[1, 97]], {}, ValueError, "token 97 is outside the vocabulary of 97 tokens"),
        ([[1]], {"attention_mask": torch.ones(1, 1)}, ValueError, "attention_mask goes with a tensor"),
        (torch.ones(3).long(), {}, ValueError, r"input_ids should be \(batch, length\) .* not \(3,\)"),
        (torch.ones(2, 3), {}, TypeError, "input_ids should be int64 or int32, not torch.float32"),
        (torch.ones(2, 3).long(), {"attention_mask": torch.ones(2, 2)}, ValueError, r"attention_mask \(2, 2\) should"),
        (torch.ones(1, 3).long(), {"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, "padded on the left"),
        (torch.ones(1, 3).long(), {"attention_mask": torch.tensor([[0, 0, 0]])}, ValueError, "padded on the left"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_refused(
    prompt: object, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small().generate(prompt, **{"max_new_tokens": 4, **options})  # type: ignore[arg-type]


def test_padding_does_not_count_against_the_positions() -> None:
    ids = torch.tensor([[0] * 30 + [5]])
    mask = torch.tensor([[0] * 30 + [1]])
    model = small()
    assert torch.equal(model.generate(ids, 20, attention_mask=mask)[:, 30:], model.generate([[5]], 20))


# ---- what callers give


def test_a_prompt_as_long_as_the_model_is_continued_by_a_token() -> None:
    model, prompt = small(), [[t % 97 for t in range(32)]]
    ids = model.generate(prompt, 1)
    assert torch.equal(ids, model.generate(prompt, 1, use_cache=False))
    assert ids[0, -1] == model.eval()(torch.tensor(prompt)).logits[0, -1].argmax()
    with pytest.raises(
        ValueError, match="a prompt of 32 tokens and 2 new ones need 33 positions, but this model has 32"
    ):
        model.generate(prompt, 2)


@pytest.mark.parametrize(
    "prompts",
    [
        [torch.tensor(prompt) for prompt in PROMPTS],
        [np.array(prompt) for prompt in PROMPTS],
        [tuple(np.int64(token) for token in prompt) for prompt in PROMPTS],
        (torch.tensor(prompt, dtype=torch.int32) for prompt in PROMPTS),
        [[torch.tensor(token) for token in prompt] for prompt in PROMPTS],
    ],
    ids=["tensors", "arrays", "NumPy numbers", "iterator", "scalars"],
)
def test_prompts_and_numbers_of_pytorch_and_numpy(prompts: object) -> None:
    model = small()
    whole = {"max_new_tokens": np.int64(6), "no_repeat_ngram_size": np.int32(2), "min_new_tokens": torch.tensor(2)}
    expected = model.generate(PROMPTS, 6, no_repeat_ngram_size=2, min_new_tokens=2)
    assert torch.equal(model.generate(prompts, **whole), expected)  # type: ignore[arg-type]
    drawn = model.generate(
        np.array([PROMPTS[0]]), 6, do_sample=True, seed=np.int64(3), top_k=np.int64(5), temperature=np.float32(0.5),
        eos_token_id=np.int64(3), vocab_size=np.int64(90), num_return_sequences=np.int64(2),
    )  # fmt: skip
    assert torch.equal(
        drawn, model.generate([PROMPTS[0]], 6, do_sample=True, seed=3, top_k=5, temperature=0.5, eos_token_id=3,
                              vocab_size=90, num_return_sequences=2)
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-39, 1e39, 1e300, 10**400])
@pytest.mark.parametrize("top_p", [None, 1e-46, 1 - 1e-9])
def test_extreme_temperatures_are_their_limits(temperature: float, top_p: float | None) -> None:
    model = small()
    drawn = model.generate(
        PROMPTS, 5, do_sample=True, temperature=temperature, top_p=top_p, seed=1, no_repeat_ngram_size=2
    )
    greedy = model.generate(PROMPTS, 5, no_repeat_ngram_size=2)
    assert torch.equal(drawn, greedy) == (temperature < 1 or top_p == 1e-46)


@pytest.mark.parametrize("penalty", [1e-320, 1e-46, 1e39, 1e300])
def test_extreme_penalties_leave_logits_finite(penalty: float) -> None:
    new = small().generate([[5, 3, 8]], 6, do_sample=True, seed=1, repetition_penalty=penalty)[0, 3:]
    assert ((new >= 0) & (new < 97)).all()


def test_neither_default_dtype_nor_default_device_matters() -> None:
    models = [small(**VARIANTS[variant]) for variant in ("gpt2", "sinusoidal")]
    options = [{}, {"do_sample": True, "seed": 1, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}]
    expected = [model.generate(PROMPTS, 6, **some) for model in models for some in options]

    def loss(model: GPT, ids: Tensor) -> Tensor:
        model.train()(ids, labels=ids, return_logits=False)  # dropout draws a seed
        return model.eval()(ids, labels=ids).loss

    losses = [loss(model, ids) for model, ids in zip(models, expected[::2], strict=True)]
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        again = [model.generate(PROMPTS, 6, **some) for model in models for some in options]
        later = [loss(model, ids) for model, ids in zip(models, again[::2], strict=True)]
    finally:
        torch.set_default_device(None)  # type: ignore[arg-type]
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(losses, later, strict=True))


def test_a_weight_of_another_dtype_is_named() -> None:
    model = small()
    model.h[1].mlp.c_fc.weight.data = model.h[1].mlp.c_fc.weight.double()
    with pytest.raises(ValueError, match=r"as most are, not h.1.mlp.c_fc.weight torch.float64; model.to"):
        model.generate(PROMPTS, 3)
