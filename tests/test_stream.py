"""Batches whose rows come and go: each row gets the tokens that it gets alone, as a stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_generation import PROMPTS, VARIANTS, small
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import ops
from gptcore.generation import Batch, KVCache, Settings
from gptcore.generation.sampling import sample
from gptcore.model import GPT

# ---- rows that come and go


MIXED = [
    Settings(12),
    Settings(9, do_sample=True, seed=5),
    Settings(15, do_sample=True, seed=5, top_k=7, temperature=0.7),
    Settings(7, do_sample=True, seed=6, top_p=0.8, repetition_penalty=1.3),
    Settings(14, no_repeat_ngram_size=2),
    Settings(3, do_sample=True, seed=7, top_k=7),
]


def run_alone(model: GPT, prompt: list[int], settings: Settings) -> list[int]:
    batch, tokens = Batch(model), []
    batch.add(prompt, settings)
    while len(batch):
        tokens += [token.token for token in batch.step()]
    return tokens


@pytest.mark.parametrize("variant", ["gpt2", "gpt1", "gpt3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_gets_the_tokens_that_it_gets_alone_whatever_comes_and_goes(variant: str, use_cache: bool) -> None:
    model = small(**VARIANTS[variant], eos_token_id=None)
    prompts = [*PROMPTS, [3, 1, 4], [2]]
    batch, rows, got = Batch(model, use_cache=use_cache), {}, {}
    arrivals = {0: [0, 1], 2: [2], 3: [3, 4], 8: [5]}  # step -> prompts
    step = 0
    while len(batch) or step <= max(arrivals):
        for index in arrivals.get(step, []):
            rows[batch.add(prompts[index], MIXED[index])] = index
        for token in batch.step():
            got.setdefault(rows[token.row], []).append(token.token)
        if step == 5:
            gone = next(row for row, index in rows.items() if index == 2)
            batch.drop(gone)
            with pytest.raises(KeyError, match="is not in this batch"):
                batch.drop(gone)
        step += 1
    for index, settings in enumerate(MIXED):
        alone = run_alone(model, prompts[index], settings)
        assert got[index] == (alone[:4] if index == 2 else alone), index
        assert len(alone) == settings.max_new_tokens


def test_stream_yields_what_generate_collects_as_it_comes() -> None:
    model = small()
    eos = int(model.generate(PROMPTS[:1], 5, eos_token_id=-1)[0, -1])
    options = {"do_sample": True, "seed": 3, "num_return_sequences": 2, "eos_token_id": eos}
    whole = model.generate(PROMPTS, 12, **options)
    tokens = model.stream(PROMPTS, 12, **options)
    calls: list[int] = []
    hook = model.register_forward_pre_hook(lambda _module, _args: calls.append(1))
    first = [next(tokens) for _ in range(8)]
    assert [token.row for token in first] == list(range(8))
    assert len(calls) == 1  # the first tokens come after one pass
    rows: list[list] = [[] for _ in range(8)]
    for token in [*first, *tokens]:
        rows[token.row].append(token)
    hook.remove()
    for index, row in enumerate(rows):
        assert [token.token for token in row] == whole[index, 8 : 8 + len(row)].tolist()
        assert all(token.finish_reason is None for token in row[:-1])
        assert row[-1].finish_reason == ("stop" if row[-1].token == eos else "length")
        assert (whole[index, 8 + len(row) :] == eos).all()
    assert rows[0] != rows[1]  # each row has a seed of its own
    with pytest.raises(ValueError, match="top_k should be"):
        model.stream(PROMPTS, 3, do_sample=True, top_k=0)  # at the call, before the first token


def test_a_row_draws_by_its_seed_alone_and_as_torch_multinomial_does() -> None:
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    together = sample(logits, [torch.Generator().manual_seed(n) for n in range(4)], [0.7] * 4, 20, [0.9] * 4)
    for n in range(4):
        values, candidates = logits[n].topk(20)
        probabilities = ((values - values[0]) / 0.7).softmax(-1)
        probabilities[1:][probabilities.cumsum(-1)[:-1] >= 0.9] = 0
        drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(n))
        assert together[n] == candidates[drawn]
    model = small()
    first, more = (model.generate([PROMPTS[0]] * n, 10, do_sample=True, seed=8) for n in (1, 3))
    assert torch.equal(first, more[:1])
    assert len({tuple(row) for row in more.tolist()}) == 3


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", [None, "torch"])
def test_free_space_of_the_cache_reaches_no_row(backend: str | None) -> None:
    """Neither uninitialised memory nor what a damaged row left behind."""
    model = small(eos_token_id=None)
    with ops.use(backend):
        expected = [run_alone(model, prompt, Settings(8)) for prompt in ([5, 3], [7, 7, 11, 2, 9, 4])]
        unused = next(t for t in range(97) if t not in {5, 3, 7, 11, 2, 9, 4} | {t for row in expected for t in row})
        with torch.no_grad():
            model.wte.weight[unused] = torch.nan
        batch, got, rows = Batch(model), {}, []
        arrivals = [[7, 7, 11, 2, 9, 4], [4] * 20 + [unused], [5, 3]]
        while len(batch) or arrivals:
            if arrivals:
                rows.append(batch.add(arrivals.pop(0), Settings(8)))
            for token in batch.step():
                got.setdefault(token.row, []).append(token.token)
    assert [got[row] for row in rows] == [expected[1], [-1], expected[0]]


def test_one_damaged_row_ends_with_an_error_and_the_others_go_on() -> None:
    model = small(eos_token_id=None)
    expected = [run_alone(model, prompt, Settings(5)) for prompt in ([5, 3], [7, 7, 11])]
    unused = next(t for t in range(97) if t not in {5, 3, 7, 11} | {t for row in expected for t in row})
    with torch.no_grad():
        model.wte.weight[unused] = torch.nan
    batch = Batch(model)
    rows = [batch.add(prompt, Settings(5)) for prompt in ([5, 3], [4, unused], [7, 7, 11])]
    got: dict[int, list] = {row: [] for row in rows}
    while len(batch):
        for token in batch.step():
            got[token.row].append(token)
    assert [token.token for token in got[rows[0]]] == expected[0]
    assert [token.token for token in got[rows[2]]] == expected[1]
    (bad,) = got[rows[1]]
    assert (bad.token, bad.finish_reason) == (-1, "error")
    assert isinstance(bad.error, FloatingPointError)


class Reads(TorchDispatchMode):
    """Counts what reads the value of a tensor, and so would wait for a GPU."""

    READING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in self.READING:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_value_from_the_device_but_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """tolist of the chosen tokens does not dispatch; check_values runs on the CPU alone."""
    model = small(eos_token_id=None).eval()
    monkeypatch.setattr("gptcore.model.check_values", lambda *arguments: None)
    batch = Batch(model)
    for prompt, settings in zip([*PROMPTS, [2]], MIXED, strict=False):
        batch.add(prompt, settings)
    batch.step()
    with Reads() as reads:
        batch.step()
        batch.step()
    assert reads.names == []
    with Reads() as reads:
        bool(torch.ones(1) > 0)
    assert reads.names, "this mode notices a read"


def test_a_cache_takes_in_rows_and_drops_them() -> None:
    model = small().eval()
    texts = [[5, 3, 8], [4], [7, 7, 11, 2, 9]]
    with torch.no_grad():
        caches = []
        for text in texts:
            caches.append(KVCache(7))
            model(torch.tensor([text]), cache=caches[-1])
        cache = caches[0]
        for other in caches[1:]:
            cache.extend(other)
        assert cache.lengths == [3, 1, 5]
        cache.drop(0)  # the last row takes its place
        assert cache.lengths == [5, 1]
        assert all((layer[:, 1, :, 1:] == 0).all() and (layer[:, 2] == 0).all() for layer in cache.layers)
        logits = model(torch.tensor([[6, 1], [2, 8]]), cache=cache).logits
    assert cache.lengths == [7, 3]
    for row, text in enumerate(([7, 7, 11, 2, 9, 6, 1], [4, 2, 8])):
        torch.testing.assert_close(logits[row], model(torch.tensor([text])).logits[0, -2:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="input_ids has 3 rows, but the cache holds 2"):
        model(torch.tensor([[6], [2], [1]]), cache=cache)
