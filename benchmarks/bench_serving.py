"""The serving engine on GPT-2 124M: eight requests at once, and the time between tokens while a prompt is read.

The same beside llama.cpp's server, from the same GGUF file, if the package xllamacpp is installed, as by `make sweep`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.bench_llama import llama_server, write_model
from benchmarks.measure import pick
from gptcore import GPT
from gptcore.serving import Engine, Request, Token

AT_ONCE = 8
SIZE = pick("the model of make demo", "GPT-2 124M")
SHORT, NEW, LONG, ROUNDS = pick((2, 3, 8, 2), (8, 32, 512, 3))
RUNNING, STREAMED, BEFORE = pick(
    (2, 24, 4), (4, 200, 24)
)  # requests that run, their tokens, those before the long prompt
ASCII = 10  # the token that every request generates: a byte of llama.cpp's stream of text

# Starts a request and returns a function that waits for its end; the moments of its tokens go into the list
Start = Callable[[list[int], int, list[float]], Callable[[], object]]


def starts_ours(engine: Engine) -> Start:
    def start(prompt: list[int], new: int, moments: list[float]) -> Callable[[], object]:
        def heard(token: Token | None) -> None:
            if token is not None:
                moments.append(time.perf_counter())

        settings: dict[str, Any] = {"temperature": 0, "stop_tokens": (), "logit_bias": {ASCII: 1e4}}
        ticket = engine.submit(Request(prompt, new, **settings))
        ticket.on_token = heard
        return lambda: list(ticket)

    return start


def starts_theirs(server: Any) -> Start:
    def start(prompt: list[int], new: int, moments: list[float]) -> Callable[[], object]:
        def heard(answer: dict[str, Any]) -> bool:
            if answer["choices"][0]["text"]:
                moments.append(time.perf_counter())
            return False

        request = {
            "prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "stream": True, "logit_bias": [[ASCII, 1e4]],
        }  # fmt: skip
        thread = threading.Thread(target=server.handle_completions, args=(request, heard))
        thread.start()
        return thread.join

    return start


def time_of_a_token(start: Start, requests: int) -> float:
    """Return the seconds of a token, all requests together, their prompts included."""
    begin = time.perf_counter()
    moments: list[float] = []
    for wait in [start([20 + i] * SHORT, NEW, moments) for i in range(requests)]:
        wait()
    assert len(moments) == requests * NEW
    return (time.perf_counter() - begin) / len(moments)


def gaps(start: Start) -> tuple[float, float, float]:
    """Return median seconds between tokens of a request before and while a prompt is read, and those of the reading."""
    moments: list[list[float]] = [[] for _ in range(RUNNING)]
    waits = [start([20 + i] * SHORT, STREAMED, own) for i, own in enumerate(moments)]
    while len(moments[0]) < BEFORE:
        time.sleep(0.001)
    begin = time.perf_counter()
    first: list[float] = []
    start([30 + i % 60 for i in range(LONG)], 1, first)()
    for wait in waits:
        wait()
    pairs = list(zip(moments[0], moments[0][1:], strict=False))
    before = [b - a for a, b in pairs[BEFORE // 2 :] if b < begin]
    during = [b - a for a, b in pairs if begin <= b and a <= first[0]]
    return median(before), median(during), first[0] - begin


@pytest.fixture(scope="module", params=["bf16", "q8_0"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Start]]:
    path = write_model(SIZE, request.param, tmp_path_factory.mktemp("served"))
    with Engine(GPT.from_pretrained(path), max_batch=AT_ONCE, prefix_tokens=0) as engine:
        yield f"{SIZE}, {request.param}", path, starts_ours(engine)


def bench_serving(served: tuple[str, Path, Start], record: Callable[..., None]) -> None:
    case, _, start = served
    rates = [(time_of_a_token(start, AT_ONCE), time_of_a_token(start, 1)) for _ in range(ROUNDS + 1)][1:]
    ours, alone = zip(*rates, strict=True)
    record(f"serving {AT_ONCE} requests at once", case, ours, alone, against="one request", extra={"tokens": 1})
    before, during, prompt = zip(*[gaps(start) for _ in range(ROUNDS)], strict=True)
    record(
        f"serving, time between tokens while a prompt of {LONG} tokens is read", case, during, before,
        against="no prompt", extra={"tokens": 1, "seconds to read it": median(prompt)},
    )  # fmt: skip


def bench_serving_llama(served: tuple[str, Path, Start], record: Callable[..., None]) -> None:
    case, path, start = served
    theirs = starts_theirs(llama_server(path, AT_ONCE, LONG + STREAMED))
    rates = [(time_of_a_token(start, AT_ONCE), time_of_a_token(theirs, AT_ONCE)) for _ in range(ROUNDS + 1)][1:]
    record(
        f"against llama.cpp, serving {AT_ONCE} requests at once", case, *zip(*rates, strict=True), against="llama.cpp",
        extra={"tokens": 1},
    )  # fmt: skip
    pairs = [(gaps(start), gaps(theirs)) for _ in range(ROUNDS)]
    for name, index in (("time between tokens while a prompt of {} tokens is read", 1), ("time to read {} tokens", 2)):
        record(
            f"against llama.cpp, serving, {name.format(LONG)}", case, [ours[index] for ours, _ in pairs],
            [other[index] for _, other in pairs], against="llama.cpp", extra={"tokens": LONG if index == 2 else 1},
        )  # fmt: skip
