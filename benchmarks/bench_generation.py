"""Generating text greedily: GPT-2 124M against no KV cache and against transformers; single steps.

The limit: each new token needs all weights of the model once, read from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import FORM, name_of, pick
from benchmarks.models import GPT2, transformers_gpt2
from gptcore import _C, GPT, GPTConfig
from gptcore.cli.train import SMALL_MODEL
from gptcore.generation import step
from gptcore.generation.cache import KVCache

Compare = Callable[..., None]
PROMPT, NEW = pick((8, 4), (64, 10))


SIZES = {"GPT-2 124M": GPT2, "the model of make demo": GPTConfig(**SMALL_MODEL, vocab_size=2048)}


@cache
def model_in(dtype: torch.dtype, size: str = "GPT-2 124M") -> GPT:
    torch.manual_seed(0)
    return GPT(SIZES[size]).to(dtype).eval()


def bytes_of(model: GPT) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("wpe."))


@pytest.mark.parametrize("against", ["no cache", "transformers"])
@pytest.mark.parametrize("batch", pick([2], [1, 8]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_generation(dtype: torch.dtype, batch: int, against: str, compare: Compare) -> None:
    if against == "no cache" and (batch > 1 or dtype is torch.bfloat16) and FORM == "quick":
        pytest.skip("takes half a minute: in the full form only")
    model = model_in(dtype)
    ids = torch.randint(GPT2.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    if against == "transformers":
        other = transformers_gpt2(model).to(dtype).eval()
        other.generation_config.pad_token_id = 0

        def theirs() -> torch.Tensor:
            tokens: torch.Tensor = other.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW
            )
            return tokens
    else:

        def theirs() -> torch.Tensor:
            return model.generate(ids, NEW, eos_token_id=-1, use_cache=False)

    def ours() -> torch.Tensor:
        return model.generate(ids, NEW, eos_token_id=-1)

    assert ours().shape == theirs().shape == (batch, PROMPT + NEW)
    compare(
        f"generation {name_of(dtype)}", f"batch {batch}, against {against}", ours, theirs,
        against=against, limit=measure.read(), bytes=NEW * bytes_of(model), extra={"tokens": batch * NEW},
    )  # fmt: skip


@pytest.mark.parametrize("against", ["GPT.forward", "the whole step"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def bench_step(dtype: torch.dtype, size: str, against: str, compare: Compare) -> None:
    """Time a step at batch 1 against GPT.forward, and the native function in it against the whole step."""
    model, tokens = model_in(dtype, size), [1]
    cache = KVCache(PROMPT + 1)
    model(torch.ones(1, PROMPT, dtype=torch.int64), cache=cache)

    def whole() -> torch.Tensor:
        cache.set_lengths([PROMPT])
        return step.next_logits(model, tokens, cache)

    def forward() -> torch.Tensor:
        cache.set_lengths([PROMPT])
        return model(torch.tensor([tokens]), cache=cache).logits[:, -1]

    assert torch.equal(whole(), forward())
    found = step._describe(model, cache.layers)
    assert found is not None
    weights, layers, embeddings, positions = found
    assert embeddings is not None
    logits, eps = whole(), model.config.layer_norm_epsilon

    def native() -> None:
        _C.decode(
            tokens, embeddings, positions, weights, cache.layers, [0], [PROMPT], [0], layers, eps, logits,
            torch.get_num_threads(),
        )  # fmt: skip

    compare(
        f"decoding step{', native function alone' * (against != 'GPT.forward')} {name_of(dtype)}", size,
        *((whole, forward) if against == "GPT.forward" else (native, whole)), against=against, limit=measure.read(),
        bytes=bytes_of(model), extra={"tokens": 1},
    )  # fmt: skip
