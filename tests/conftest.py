"""One thread unless a test says otherwise: two fight on a busy machine, and small tensors gain nothing from them.

Without a GPU the Triton kernels run in Triton's interpreter, which must be said before anybody imports triton.

A shell that starts the tests in the background has them ignore SIGINT, which some of them send.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("grid")
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
