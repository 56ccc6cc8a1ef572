"""Generating text with GPT-2 124M, greedily: against the same without a KV cache, and against transformers.

The limit: each new token needs all weights of the model once, read from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import FORM, pick
from benchmarks.models import GPT2, transformers_gpt2
from gptcore import GPT

Compare = Callable[..., None]
PROMPT, NEW = pick((8, 4), (64, 10))


@cache
def model_in(dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    return GPT(GPT2).to(dtype).eval()


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
    weights = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("wpe."))
    compare(
        f"generation {str(dtype).removeprefix('torch.')}", f"batch {batch}, against {against}", ours, theirs,
        against=against, limit=measure.read(), bytes=NEW * weights, extra={"tokens": batch * NEW},
    )  # fmt: skip
