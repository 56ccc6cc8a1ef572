"""The engine: the bits of a request are its own, whatever runs beside it; requests come, go and fail alone."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import running
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_step import VARIANTS, small
from torch import nn

from gptcore import _C
from gptcore.config import GPTConfig
from gptcore.generation import seed_of_row, step
from gptcore.generation.slots import Slots
from gptcore.heads import GPTForTokenClassification
from gptcore.lora import add_adapter, merge_adapter, set_adapter
from gptcore.lora.layers import LoRA
from gptcore.model import GPT
from gptcore.ops.quantized_linear import quantize
from gptcore.quantized import quantize_modules
from gptcore.serving import Engine, EngineClosed, EngineFull, Request, Ticket, Token

ISAS = _C.supported_isas()
TEXT = [(7 * i) % 97 for i in range(60)]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(small(n_positions=128), prefill_chunk=8) as engine:
        yield engine


def ask(prompt: list[int], max_tokens: int = 5, **settings: Any) -> Request:
    return Request(prompt, max_tokens, **{"temperature": 0, "stop_tokens": (), **settings})


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Held:
    """Keeps an engine between two steps while the block runs."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inside, self.leave = engine, threading.Event(), threading.Event()

    def __enter__(self) -> None:
        def hold() -> None:
            self.inside.set()
            assert self.leave.wait(20)

        self.future = self.engine.call(hold)
        assert self.inside.wait(20)

    def __exit__(self, *error: object) -> None:
        self.leave.set()
        self.future.result(20)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    variant: str
    dtype: torch.dtype
    isa: str
    kind: str | None = None  # of quantized weights


CASES = [
    Case("gpt2", torch.float32, ISAS[2 % len(ISAS)]),
    Case("gpt3", torch.bfloat16, ISAS[-1]),
    Case("gpt1", torch.float16, ISAS[0]),
    Case("sinusoidal", torch.bfloat16, ISAS[1 % len(ISAS)]),
    Case("gpt2", torch.float32, ISAS[3 % len(ISAS)], "q8_0"),
    Case("gpt3", torch.bfloat16, ISAS[-1], "q4_0"),
]
assert {case.isa for case in CASES} == set(ISAS)


@functools.cache
def model_of(case: Case) -> GPT:
    """Return a model with three adapters, whose logits are far from those of its base."""
    shape = {"n_positions": 128, "n_embd": 64, "n_layer": 2}
    model = small(case.dtype, **{**VARIANTS[case.variant], **shape})
    if case.kind:
        state = model.state_dict()
        linear = [name for name, weight in state.items() if weight.ndim == 2 and not name.startswith("wpe")]
        quantize_modules(model, dict.fromkeys(linear, case.kind))
        blocks = {name: quantize(state[name], case.kind) for name in linear}
        model.load_state_dict({**state, **blocks}, assign=True)
    add_adapter(model, "one", r=4, target_modules="all-linear")
    add_adapter(model, "two", r=2, target_modules=["c_attn.q", "c_attn.v"], rslora=True)
    for module in model.modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.B, std=0.3)
    return model


Answer = tuple[list[Token], list[Token | None] | None, str | None]


def answer_of(ticket: Ticket) -> Answer:
    return list(ticket), ticket.prompt_logprobs, ticket.finish_reason


@functools.cache
def alone(case: Case, prompt: tuple[int, ...], adapter: str | None, wants: int, seed: int | None) -> Answer:
    """Return the answer of an engine that has no other request, reads the prompt at once, and knows no prefix."""
    with Engine(model_of(case), max_batch=1, prefill_chunk=1000, prefix_tokens=0) as engine:
        return answer_of(engine.submit(request_of(prompt, adapter, wants, seed)))


def request_of(prompt: tuple[int, ...], adapter: str | None, wants: int, seed: int | None) -> Request:
    """Return a request for all log-probabilities; without a seed it is greedy."""
    sampling = {} if seed is None else {"temperature": 1.5, "seed": seed, "top_p": 0.9, "presence_penalty": 0.5}
    return ask(list(prompt), 12, logprobs=97, adapter=adapter, prompt_logprobs=wants == 0, **sampling)


PROMPTS = st.builds(
    lambda shared, own, token: tuple(TEXT[:shared] + [token] * own),
    st.sampled_from([0, 15, 16, 17, 40]), st.integers(1, 9), st.sampled_from([3, 4]),
)  # fmt: skip
JOINS = st.tuples(
    st.integers(0, 24),  # the step of the first request in which it joins
    PROMPTS, st.sampled_from([None, None, "one", "two"]), st.integers(0, 3), st.sampled_from([None, 1, 2]),
    st.sampled_from([None, None, None, 1, 4]),  # tokens after which it is cancelled
    st.sampled_from(["", "", "other"]),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    joins=st.lists(JOINS, min_size=1, max_size=7), max_batch=st.integers(2, 5), chunk=st.sampled_from([1, 7, 16, 50]),
    prefix=st.sampled_from([0, 48, 4096]),
)  # fmt: skip
def test_no_schedule_changes_a_bit(case: Case, joins: list[Any], max_batch: int, chunk: int, prefix: int) -> None:
    with (
        running(f"cpu-{case.isa}"),
        Engine(model_of(case), max_batch=max_batch, prefill_chunk=chunk, prefix_tokens=prefix) as engine,
    ):
        tickets: list[tuple[Ticket, Any]] = []
        count = 0

        def join(token: Token | None) -> None:  # in the engine's thread, so that a schedule is always the same
            nonlocal count
            for at, prompt, adapter, wants, seed, cancel, owner in joins:
                if token is not None and at == count:
                    request = replace(request_of(prompt, adapter, wants, seed), owner=owner)
                    ticket = engine.submit(request)
                    tickets.append((ticket, (prompt, adapter, wants, seed, cancel)))
                    if cancel:
                        ticket.on_token = functools.partial(cancel_after, ticket, [cancel])
            count += 1

        clock = engine.submit(ask(TEXT[:3], 25))
        clock.on_token = join
        list(clock)
        answers = [answer_of(ticket) for ticket, _ in tickets]
        assert len(answers) == len(joins)
        assert engine.stats()["running"] == engine.stats()["waiting"] == 0
        for answer, (_, (*which, cancel)) in zip(answers, tickets, strict=True):
            expected = alone(case, *which)
            assert expected[2] == "length"
            if cancel:
                assert answer[0] == expected[0][:cancel]
                assert answer[2] == "cancelled"
            else:
                assert answer == expected


def cancel_after(ticket: Ticket, left: list[int], token: Token | None) -> None:
    left[0] -= 1
    if left[0] == 0:
        ticket.cancel()


@pytest.mark.parametrize("adapter", [None, "one"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_generate_draws_the_tokens_of_the_engine(case: Case, adapter: str | None) -> None:
    """In one native call for the base, and by GPT.forward with an adapter."""
    model, prompts = model_of(case), [TEXT[:40], TEXT[3:12], [5]]
    with running(f"cpu-{case.isa}"), Engine(model) as engine:
        tickets = [
            engine.submit(ask(prompt, 9, temperature=1.5, top_p=0.9, seed=seed_of_row(7, row), adapter=adapter))
            for row, prompt in enumerate(prompts)
        ]
        answers = [[token.id for token in ticket] for ticket in tickets]
    set_adapter(model, adapter)
    with running(f"cpu-{case.isa}"):
        settings: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 7}
        texts = model.generate(prompts, 9, **settings)[:, -9:].tolist()
        assert texts == answers
        assert model.generate(prompts[:1], 9, **settings)[0, -9:].tolist() == answers[0]


def test_a_prefix_is_computed_once_and_never_for_another_owner_or_adapter() -> None:
    with Engine(model_of(CASES[0]), prefill_chunk=16) as engine:
        with Held(engine):
            tickets = [engine.submit(ask([*TEXT[:50], token])) for token in range(4)]
        for ticket in tickets:
            list(ticket)
        assert [ticket.cached_tokens for ticket in tickets] == [0, 48, 48, 48]
        for settings, cached in (({"owner": "b"}, 0), ({"owner": "b"}, 48), ({"adapter": "one"}, 0), ({}, 48)):
            list(ticket := engine.submit(ask([*TEXT[:48], 8], **settings)))  # type: ignore[arg-type]
            assert ticket.cached_tokens == cached
        answer = [token.id for token in engine.submit(ask(TEXT[:30], 20))]
        list(ticket := engine.submit(ask([*TEXT[:30], *answer, 5])))  # what was generated is kept, too
        assert ticket.cached_tokens == 48
        assert engine.stats()["cached_tokens"] == 5 * 48 + 16 + 48  # and of TEXT[:30]


def test_the_prefix_cache_is_bounded_and_keeps_beginnings_longest() -> None:
    with Engine(small(n_positions=128), prefix_tokens=64) as engine:
        for start, length, cached in ((0, 50, 0), (1, 40, 0), (0, 50, 32), (1, 40, 16), (0, 128, 32)):
            list(ticket := engine.submit(ask([(7 * i + start) % 97 for i in range(length)], 1)))
            assert ticket.cached_tokens == cached, (start, length)
            assert engine.stats()["prefix_tokens"] <= 64


# ---- what a request says ---------------------------------------------------------------------------------------------


def test_settings_do_what_they_say(engine: Engine) -> None:
    greedy = [token.id for token in engine.submit(ask(TEXT[:9], 20))]
    probabilities = engine.model(torch.tensor([TEXT[:9]])).logits[0].log_softmax(-1)
    ticket = engine.submit(ask(TEXT[:9], 1, logprobs=3, prompt_logprobs=True))
    (token,) = ticket
    assert token.id == token.top[0][0] == greedy[0]
    assert token.top[0][1] == token.logprob
    assert [value for _, value in token.top] == pytest.approx(probabilities[-1].topk(3).values.tolist(), abs=1e-4)
    assert ticket.prompt_logprobs is not None
    assert ticket.prompt_logprobs[0] is None
    assert [known.id for known in ticket.prompt_logprobs if known] == TEXT[1:9]
    expected = probabilities[torch.arange(8), torch.tensor(TEXT[1:9])]
    assert [known.logprob for known in ticket.prompt_logprobs if known] == pytest.approx(expected.tolist(), abs=1e-4)

    first = engine.submit(ask(TEXT[:9], 20, stop_tokens=[greedy[3]]))
    assert [token.id for token in first] == greedy[: greedy.index(greedy[3]) + 1]
    assert first.finish_reason == "stop"
    biased = [token.id for token in engine.submit(ask(TEXT[:9], 3, logit_bias={55: 1e4}))]
    assert biased == [55] * 3
    for penalty, size, expected_ids in (
        ("presence_penalty", 700.0, [55, 55, 55, 55]), ("presence_penalty", 1200.0, [55, 56, 55, 55]),
        ("frequency_penalty", 400.0, [55, 55, 55, 56]), ("frequency_penalty", 1200.0, [55, 56, 55, 56]),
    ):  # fmt: skip
        ticket = engine.submit(ask(TEXT[:9], 4, logit_bias={55: 1e4, 56: 9e3}, **{penalty: size}))
        assert [token.id for token in ticket] == expected_ids
    assert len({token.id for token in engine.submit(ask(TEXT[:9], 40, repetition_penalty=1e6))}) == 40
    assert [token.id for token in engine.submit(ask(TEXT[:9], 5, temperature=1.0, top_k=1))] == greedy[:5]
    assert [token.id for token in engine.submit(ask(TEXT[:9], 5, temperature=1e-9))] == greedy[:5]
    drawn = [[token.id for token in engine.submit(ask(TEXT[:9], 9, temperature=2.0, seed=seed))] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    empty = engine.submit(ask(TEXT[:9], 0, prompt_logprobs=True))
    assert list(empty) == []
    assert (empty.finish_reason, len(empty.prompt_logprobs or ())) == ("length", 9)


def test_the_end_token_and_the_padding_of_the_vocabulary() -> None:
    model = small(n_positions=128)
    with Engine(model) as engine:
        (first,) = engine.submit(ask(TEXT[:9], 1))
    model.config = replace(model.config, eos_token_id=first.id)
    with Engine(model, vocab_size=60) as engine:
        ticket = engine.submit(ask(TEXT[:9], stop_tokens=None))
        assert ([token.id for token in ticket], ticket.finish_reason) == ([first.id], "stop")
        ids = [token.id for token in engine.submit(ask(TEXT[:9], 60, temperature=5.0, seed=1))]
        assert max(ids) < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "each prompt needs a token"),
        ({"prompt": [97]}, "token 97 is outside the vocabulary of 97 tokens"),
        ({"prompt": [-1]}, "a token of the prompt should be a whole number of at least 0, not -1"),
        ({"prompt": [True]}, "a token of the prompt should be a whole number"),
        ({"max_tokens": -1}, "max_tokens should be a whole number of at least 0"),
        ({"max_tokens": 128}, "a prompt of 3 tokens and 128 new ones need 130 positions, but this model has 128"),
        ({"temperature": float("nan")}, "temperature should be a finite number, not nan"),
        ({"temperature": -0.5}, "temperature should be positive"),
        ({"temperature": True}, "temperature should be a finite number, not True"),
        ({"top_k": 0}, "top_k should be a whole number of at least 1"),
        ({"top_p": 0.0}, r"top_p should be in \(0, 1\]"),
        ({"seed": -1}, "seed should be a whole number of at least 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty should be a finite number"),
        ({"repetition_penalty": 0}, "repetition_penalty should be positive and finite"),
        ({"logit_bias": {97: 1.0}}, "logit_bias has token 97, but there are 97 tokens"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias should be a finite number"),
        ({"logprobs": 98}, "logprobs is 98, but there are 97 tokens"),
        ({"logprobs": -1}, "logprobs should be a whole number of at least 0"),
        ({"stop_tokens": [1.5]}, "a stop token should be a whole number"),
        ({"adapter": "one"}, "there is no adapter 'one'; there are none"),
    ],
)
def test_requests_that_do_not_fit_are_refused(change: dict[str, Any], message: str, engine: Engine) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**{"prompt": [1, 2, 3], "max_tokens": 5, **change}))


def test_adapters_are_those_of_the_model_and_the_selected_one_comes_back() -> None:
    model = small(n_positions=128)
    add_adapter(model, "one")
    with pytest.raises(ValueError, match="the model has no adapter 'two' to select; it has one"):
        Engine(model, adapters=["two"])
    with Engine(model, adapters=[]) as engine, pytest.raises(ValueError, match="there is no adapter 'one'"):
        engine.submit(ask([1], adapter="one"))
    with Engine(model) as engine:
        list(engine.submit(ask([1])))
    assert model.adapters.active == "one"
    merge_adapter(model)
    with Engine(model) as engine, pytest.raises(ValueError, match="there is no adapter 'one'; there are none"):
        engine.submit(ask([1], adapter="one"))


# ---- coming, going, failing ------------------------------------------------------------------------------------------


def test_too_many_requests_are_refused() -> None:
    with Engine(small(n_positions=128), max_batch=2, max_waiting=1) as engine, Held(engine):
        tickets = [engine.submit(ask([1])) for _ in range(3)]
        assert engine.stats()["waiting"] == 3
        with pytest.raises(EngineFull, match="0 requests run and 3 wait; try again later"):
            engine.submit(ask([1]))
        engine.call(lambda: None), engine.call(lambda: None)
        with pytest.raises(EngineFull, match="2 calls wait"):
            engine.call(lambda: None)
    assert [len(list(ticket)) for ticket in tickets] == [5, 5, 5]


def test_cancelled_requests_leave_within_a_step(engine: Engine) -> None:
    waiting = engine.submit(ask([1]))
    list(waiting)
    waiting.cancel()  # after its end
    assert waiting.finish_reason == "length"
    steps = engine.stats()["steps"]
    with Held(engine):
        tickets = [engine.submit(ask(TEXT, 60)) for _ in range(12)]  # 8 run, 4 wait
        tickets[0].cancel(), tickets[11].cancel()
    wait_for(lambda: tickets[0].finish_reason and tickets[11].finish_reason)
    with Held(engine):
        assert engine.stats()["running"] + engine.stats()["waiting"] == 10
        for ticket in tickets:
            ticket.cancel()
    assert all(len(list(ticket)) < 60 and ticket.finish_reason == "cancelled" for ticket in tickets)
    assert engine.stats()["running"] == engine.stats()["waiting"] == engine.stats()["held_tokens"] == 0
    assert engine.stats()["steps"] - steps < 60


def test_an_error_ends_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(n_positions=128)
    with torch.no_grad():
        model.wpe.weight[9] = torch.nan  # type: ignore[union-attr]
    choose = step.native_logits

    def fail(model: GPT, tokens: list[int], *others: Any) -> Any:
        if 96 in tokens:
            raise MemoryError("no memory for this token")
        return choose(model, tokens, *others)

    monkeypatch.setattr("gptcore.generation.slots.native_logits", fail)
    with Engine(model) as engine:
        with Held(engine):
            good, damaged, failing, raising = (engine.submit(ask(prompt)) for prompt in ([1], TEXT[:7], [96], [2]))
            raising.on_token = lambda token: 1 / 0
        for ticket, error, message in (
            (damaged, FloatingPointError, "logits for token 10 are not finite: the model's weights are damaged"),
            (failing, MemoryError, "no memory for this token"),
        ):
            with pytest.raises(error, match=message):
                list(ticket)
            assert ticket.finish_reason == "error"
            assert isinstance(ticket.error, error)
        assert len(list(good)) == 5
        assert len(list(raising)) < 5
        assert raising.finish_reason == "cancelled"
        assert len(list(engine.submit(ask([1])))) == 5
        assert engine.stats()["error"] == 2


def test_callbacks_get_every_token_once_and_the_end(engine: Engine) -> None:
    ticket = engine.submit(ask([1], 20))
    iterator = iter(ticket)
    early = [next(iterator), next(iterator)]
    heard: list[Token | None] = []
    ticket.on_token = heard.append
    assert early + list(iterator) == list(ticket) == heard[:-1]
    wait_for(lambda: heard[-1] is None)
    assert len(heard) == 21
    again: list[Token | None] = []
    ticket.on_token = again.append
    assert again == heard


def test_a_closed_engine_finishes_or_cancels_what_runs() -> None:
    model = small(n_positions=128).train()
    for timeout, reason in ((None, "length"), (0, "cancelled")):
        engine = Engine(model, max_batch=1)
        assert not model.training
        with Held(engine):
            tickets = [engine.submit(ask([1], 100)) for _ in range(2)]
            late = engine.call(lambda: time.sleep(0.05))
        engine.close(timeout)
        assert [ticket.finish_reason for ticket in tickets][-1] == reason
        assert late.done()
        with pytest.raises(EngineClosed, match="takes no more requests"):
            engine.submit(ask([1]))
        with pytest.raises(EngineClosed):
            engine.call(lambda: None)
        engine.close()


def test_a_fault_of_the_engine_leaves_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small(n_positions=128))
    with Held(engine):
        ticket = engine.submit(ask([1]))
        call = engine.call(lambda: 1)
        monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(ticket)
    assert call.exception(20) is None or isinstance(call.exception(20), ZeroDivisionError)
    with pytest.raises(EngineClosed):
        engine.submit(ask([1]))


def test_calls_run_between_steps_with_their_adapter() -> None:
    model = model_of(CASES[0])
    with Engine(model) as engine:
        ticket = engine.submit(ask([1], 100))
        assert engine.call(lambda: model.adapters.active, "two").result(20) == "two"
        assert engine.call(lambda: model.adapters.active).result(20) is None
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0).result(20)
        with pytest.raises(ValueError, match="there is no adapter 'three'; there are one, two"):
            engine.call(lambda: 1, "three")
        assert len(list(ticket)) == 100


def test_heads_run_in_batches_with_the_bits_of_each_text_alone() -> None:
    torch.manual_seed(1)
    shape = {"vocab_size": 97, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    model = GPTForTokenClassification(GPTConfig(**shape), 3).eval()  # type: ignore[arg-type]
    batches: list[int] = []

    def logits_of(texts: list[list[int]]) -> list[torch.Tensor]:
        batches.append(len(texts))
        mask = torch.tensor([[1] * len(text) + [0] * (64 - len(text)) for text in texts])
        ids = torch.tensor([text + [0] * (64 - len(text)) for text in texts])
        return [row[: len(text)] for row, text in zip(model(ids, mask).logits, texts, strict=True)]

    texts = [TEXT[:length] for length in (60, 5, 8, 33, 9, 1)]
    with Engine(model, max_batch=4) as engine:
        with Held(engine):
            futures = [engine.batch(logits_of, text) for text in texts]
            wrong = engine.batch(logits_of, [97])
        together = [future.result(20) for future in futures]
        alone = [engine.batch(logits_of, text).result(20) for text in texts]
        with pytest.raises(ValueError, match="token 97 is outside the vocabulary"):
            wrong.result(20)
        with pytest.raises(ValueError, match=r"a GPTForTokenClassification does not continue texts; use Engine\.batch"):
            engine.submit(ask([1]))
        with pytest.raises(ValueError, match="the function returned 0 results for 1 items"):
            engine.batch(lambda items: [], 1).result(20)
    assert all(map(torch.equal, together, alone))
    assert batches[:5] == [4, 3, 1, 1, 1]


def test_the_program_of_the_docs_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    section = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8").split("## The engine")[1]
    monkeypatch.setattr(GPT, "from_pretrained", lambda folder: small(n_positions=128))
    exec(section.split("```python")[1].split("```")[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("] length") and line.count(",") == 19 for line in lines)


def test_a_first_token_alone_in_a_later_row_reads_its_own_keys():
    """One key in the whole pass: its length has no stride, by which another row could be found."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        logits = [Slots(model, 3).read(model, [5], [row], [0], [0]) for row in range(3)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
