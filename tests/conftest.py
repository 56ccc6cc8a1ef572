"""Bounds the threads of the tests, and holds the fixtures that run a test on every backend.

A test computes with one thread unless it asks for more. Threads wait passively: OpenMP's spinning makes a parallel
region a hundred times slower where another process uses the cores, as a second pytest worker does.

Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when triton is imported.

A shell that starts the tests in the background has them ignore SIGINT, which some of them send.
"""

import os
import signal
from collections.abc import Iterator

import pytest

# Read when the libraries load, here and in the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402  (after the environment that it reads)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
