"""The global random generators of Python, NumPy and PyTorch: seeded, stored as JSON, and restored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy (with the low 32 bits) and PyTorch (of every device)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 (a dataset may use it)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed formats a traceback for each kind of device: 0.2 ms and more for each micro-batch
        torch.default_generator.manual_seed(seed)


def keyed(*numbers: int) -> int:
    """Return a seed of 64 bits that depends on each of the numbers, as (seed, step, micro-batch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators with `seed` inside the block; restore their state afterwards."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)


def random_state() -> dict[str, Any]:
    """Return the state of every global generator that training may draw from, as JSON; words are hexadecimal."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, np.asarray(words, "<u4").tobytes().hex(), gauss],
        "numpy": [str(kind), np.asarray(keys, "<u4").tobytes().hex(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in _cuda_states()],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state()` returned. Raises an error, with every generator as it was, for anything else."""
    before = random_state()
    try:
        _set(state)
    except BaseException:
        _set(before)
        raise


def _set(state: dict[str, Any]) -> None:
    version, python_words, gauss = state["python"]
    random.setstate((version, tuple(_words(python_words).tolist()), gauss))
    kind, numpy_words, *rest = state["numpy"]
    np.random.set_state((kind, _words(numpy_words), *rest))  # noqa: NPY002
    torch.set_rng_state(_tensor(state["torch"]))
    for device, text in enumerate(state["cuda"][: len(_cuda_states())]):
        torch.cuda.set_rng_state(_tensor(text), device)


def _words(text: str) -> Any:
    return np.frombuffer(bytes.fromhex(text), "<u4")


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
