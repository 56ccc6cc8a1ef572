"""The fixtures that measure, and the file of results that is written after the last benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, tables
from benchmarks.measure import Limit, Run, seconds
from gptcore.files import write_json

ROWS = pytest.StashKey[list[dict[str, Any]]]()
ENVIRONMENT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--output", default="out/benchmarks.json", metavar="FILE", help="where the results go")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[ENVIRONMENT] = measure.environment()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return record(group, case, ours, reference, ...), which keeps a row of results; see measure.row."""

    def record(*args: Any, **details: Any) -> None:
        request.config.stash[ROWS].append(measure.row(*args, **details))

    return record


@pytest.fixture
def compare(benchmark: Any, record: Callable[..., None]) -> Callable[..., None]:
    """Return compare(group, case, ours, reference, limit=..., ...), which times all three in interleaved rounds.

    pytest-benchmark times ours; limit and reference are timed in the setup of each round.
    """

    def compare(
        group: str, case: str, ours: Run, reference: Run, *, limit: Limit | None = None, **details: Any
    ) -> None:
        # the first call compiles, allocates and fills caches; it is used only if it takes over a second anyway
        once = [first if (first := seconds(run)) > 1 else seconds(run) for run in (ours, reference)]
        warm = min(once) < measure.WARM and measure.FORM != "toy"
        rounds, calls = measure.plan(seconds(limit.run) if limit is not None else 0.0, sum(once), min(once))
        rates: list[float] = []
        references: list[float] = []

        def before() -> None:
            if limit is not None:
                rates.append(limit.rate())
            if warm:
                reference()
            references.append(seconds(reference, calls))
            if warm:
                ours()

        def block() -> None:
            for _ in range(calls):
                ours()

        benchmark.pedantic(block, setup=before, rounds=rounds)
        times = [value / calls for value in benchmark.stats.stats.data]
        record(group, case, times, references, limit=limit, rates=rates, calls=calls, **details)

    return compare


def pytest_unconfigure(config: pytest.Config) -> None:
    environment: dict[str, Any] = config.stash[ENVIRONMENT]
    results: tables.Results = {
        "schema": tables.SCHEMA,
        **environment,
        "limits": measure.limits(),
        "rows": config.stash[ROWS],
    }
    if not results["rows"]:
        return
    write_json(Path(config.getoption("--output")), results)
