"""Bounds the threads of the tests, and holds the fixtures that run a test on every backend.

A test computes with one thread unless it asks for more. Threads wait passively: OpenMP's spinning makes a parallel
region a hundred times slower where another process uses the cores, as a second pytest worker does.

Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when triton is imported.

A shell that starts the tests in the background has them ignore SIGINT, which some of them send.

Garbage is collected only from the first test on, and not among the million objects that were imported before.
"""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

gc.disable()
# Read when the libraries load, here and in the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402  (after the environment that it reads)
import unsynced  # noqa: E402, F401
from hypothesis import settings  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("any machine", deadline=None)  # else an example that takes 200 ms fails, as under load
settings.load_profile("any machine")
CASES = 2  # of each test function, with --quick


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"run {CASES} cases of each test, and none marked slow")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick keep the first, the last and evenly spread cases of each test, in the file that defines it."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)  # else a worker begins it when others end
    if not config.getoption("quick"):
        return
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.function.__module__ != item.module.__name__:
            continue
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: dict[int, pytest.Item] = {}  # by identity, each once
    for cases in functions.values():
        cases = [case for case in cases if case.get_closest_marker("slow") is None]
        step = max(1, -(-(len(cases) - 1) // (CASES - 1)))
        kept |= {id(case): case for case in [*cases[::step], *cases[-1:]]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = kept.values()


pytest.register_assert_rewrite("grid", "tiny_run", "test_tensor_file")
from grid import BACKENDS, NATIVE, running  # noqa: E402  (imports gptcore, so after what must be said first)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param) as argument:
        yield argument


@pytest.fixture(params=NATIVE)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param) as argument:
        yield argument


@pytest.fixture(params=NATIVE)
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those whose native functions can be called by themselves."""
    with running(request.param) as argument:
        yield argument
