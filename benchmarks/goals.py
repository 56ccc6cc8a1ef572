"""Goals of the kernels and the training step, as data; the report states whether each is met."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from benchmarks.measure import Spread, verdict


class Goal(NamedTuple):
    """A goal for all rows whose "group case" is a full match of the regular expression `rows`."""

    rows: str
    ratio: float | None = None  # minimum of reference / ours, in time or memory
    percent: float | None = None  # of the limit measured in the same rounds
    stops: str = ""  # prefix of the rows that measure the obstacle; \1 is the first group of `rows`


REST = r"attention without its matmuls, \1 \2 \3"
FORWARD, BOTH = r"attention (forward) (bfloat16)", r"attention (forward \+ backward) (bfloat16)"
WITH_BFLOAT16 = [
    Goal(r"attention (forward) (float32) (.*)", ratio=1.8, stops=REST),
    Goal(r"attention forward float32 .* S=(1024|2048|4096)", percent=80),
    Goal(FORWARD + r" (.* S=256)", ratio=4, stops=REST),
    Goal(FORWARD + r" (.* S=1024)", ratio=3.3, stops=REST),
    Goal(FORWARD + r" (.* S=(?:2048|4096))", ratio=2.8, stops=REST),
    Goal(FORWARD + r" (.* S=(?:1024|2048|4096))", percent=75, stops=REST),
    Goal(r"attention (forward \+ backward) (float32) (.*)", ratio=1.8, percent=70, stops=REST),
    Goal(BOTH + r" (.*)", ratio=3, percent=60, stops=REST),
    Goal(r"small model training step float32 against ops\.use\(\"torch\"\)", ratio=1.6),
]
# of instruction sets without products of bfloat16, which are made in float32
WITHOUT_BFLOAT16 = [
    Goal(r"attention (forward|forward \+ backward) (\w+) (.*)", percent=85, stops=REST),
    Goal(r"attention (forward|forward \+ backward) (float32) (.* S=(?:256|1024))", ratio=1.5, stops=REST),
    Goal(r"attention (forward|forward \+ backward) (float32) (.* S=(?:2048|4096))", ratio=1, stops=REST),
    Goal(FORWARD + r" (.*)", ratio=1, stops=REST),
    Goal(BOTH + r" (.*)", ratio=4, stops=REST),
    Goal(r"small model training step float32 against ops\.use\(\"torch\"\)", ratio=1.8),
]
GOALS = [
    Goal(r"attention decode (\w+) .*", ratio=1.5, percent=80, stops=r"attention decode, native function alone \1 "),
    Goal(r"GELU forward \+ backward (\w+) .*", ratio=4, percent=85, stops=r"GELU into preallocated outputs \1 "),
    Goal(
        r"layer norm forward \+ backward (\w+) .*", ratio=1.2, percent=85,
        stops=r"layer norm into preallocated outputs \1 ",
    ),
    Goal(
        r"layer norm with residual forward \+ backward (\w+) .*", ratio=1.6, percent=85,
        stops=r"layer norm with residual into preallocated outputs \1 ",
    ),
    Goal(r"GPT-2 124M training step (\w+) .*", ratio=1.3, percent=85, stops=r"GPT-2 124M step with parts removed \1 "),
    Goal(
        r"small model training step (bfloat16(?: \w+)?) against ops\.use\(\"torch\"\)", ratio=2.5,
        stops=r"small model step with parts removed \1 ",
    ),
    Goal(
        r"linear layer of few rows, weights in memory, (\w+ \d+ x) .*", percent=85,
        stops=r"linear layer of few rows, weights in the cache, \1 ",
    ),
    Goal(r"linear layer forward \+ backward \w+ against float32 .*", percent=90),
    Goal(r"GPT-2 124M training step, bfloat16 autocast against float32 .*", ratio=1),
    Goal(r"GPT-2 124M step without bfloat16 instructions .*", ratio=5),
    Goal(r"training step with a busy process on each core .*", ratio=1 / 1.2),
    Goal(r"GPT-2 124M LoRA step .*", ratio=1),
    Goal(r"peak memory of a GPT-2 124M step .*", ratio=1),
    Goal(r"against llama\.cpp, prefill .*", ratio=1.3),
    Goal(r"against llama\.cpp, decoding .*", ratio=1),
    Goal(r"against llama\.cpp, serving 8 requests at once .*", ratio=1),
    Goal(r"serving 8 requests at once .*", ratio=4),
    Goal(r"serving, time between tokens while a prompt .*", ratio=0.5),
]  # fmt: skip


class Outcome(NamedTuple):
    measured: Spread
    goal: float
    unit: str  # "x" or "%"
    verdict: str
    stops: str  # prefix of the rows that measure the obstacle

    @property
    def met(self) -> bool:
        return self.verdict.startswith("met")


def outcomes(row: dict[str, Any], isa: str) -> list[Outcome]:
    """Return the outcome of each goal for a row of results.json, measured with an instruction set."""
    name, found = f"{row['group']} {row['case']}", []
    for goal in [*(WITH_BFLOAT16 if "bf16" in isa else WITHOUT_BFLOAT16), *GOALS]:
        if match := re.fullmatch(goal.rows, name):
            stops = match.expand(goal.stops)
            for minimum, key, unit in ((goal.ratio, "ratio", "x"), (goal.percent, "percent", "%")):
                if minimum is not None and row[key] is not None:
                    measured = Spread(*row[key])
                    found.append(Outcome(measured, minimum, unit, verdict(measured, minimum), stops))
    return found
