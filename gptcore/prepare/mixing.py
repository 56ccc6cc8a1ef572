"""Split documents into training, validation and test sets, and mix sources."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptcore.prepare.document import Integers
from gptcore.prepare.store import Rows

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Fractions of the clusters of documents that are held out. The hash of a cluster and `seed` decide."""

    validation: float = 0.05
    test: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise ValueError(
                f"[split] validation {self.validation} and test {self.test} must not be negative, and leave a part "
                "for training"
            )


@dataclass(frozen=True)
class Mix:
    """What part of the training text each source is.

    weights: of the sources by name, all of them or none. temperature: without weights, a source of n bytes has the
    weight n^(1 / temperature); 1 leaves sources as they are (Conneau and Lample 2019, section 3.1, arXiv 1901.07291).
    bytes: of the mixed training text; 0 for as many as all sources have together.
    """

    weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    bytes: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.bytes < 0 or any(weight < 0 for weight in self.weights.values()):
            raise ValueError(
                f"[mix] temperature {self.temperature} must be above 0, bytes {self.bytes} and the weights "
                f"{self.weights} not negative"
            )
        if self.weights and not sum(self.weights.values()) > 0:
            raise ValueError(f"[mix] the weights {self.weights} add up to 0")


def split_of(rows: Rows, keeper: Integers, options: Split) -> Integers:
    """Return for each document the number of its split in SPLITS: that of the document that stands for its cluster."""
    place = _uniform(rows["high"][keeper], rows["low"][keeper], f"split {options.seed}")
    held = np.where(place < options.test, 2, np.where(place < options.test + options.validation, 1, 0))
    return held.astype(np.int64)


def repeats(available: Sequence[int], names: Sequence[str], options: Mix) -> list[float]:
    """Return how often the training text of each source occurs in the mix, from the bytes that there are.

    Raises ValueError for weights of sources that do not exist, a source without weight, or a weight without text.
    """
    total = options.bytes or sum(available)
    if options.weights:
        if sorted(options.weights) != sorted(names):
            raise ValueError(f"[mix] weights are of {', '.join(options.weights)}; the sources are {', '.join(names)}")
        weights = [float(options.weights[name]) for name in names]
    elif options.temperature == 1.0 and not options.bytes:
        return [1.0 for _ in names]
    else:
        weights = [size ** (1 / options.temperature) if size else 0.0 for size in available]
    for name, weight, size in zip(names, weights, available, strict=True):
        if weight and not size:
            raise ValueError(f"[mix] the source {name} has weight {weight:g}, but no training text is left of it")
    return [
        weight / sum(weights) * total / size if size else 0.0 for weight, size in zip(weights, available, strict=True)
    ]


def copies(rows: Rows, of_source: Sequence[float], seed: int) -> Integers:
    """Return how many times each document occurs: repeats 2.3 is two, and three for three tenths of the documents."""
    wanted = np.asarray(of_source)[rows["source"]]
    whole = np.floor(wanted)
    extra = _uniform(rows["high"], rows["low"], f"mix {seed}") < wanted - whole
    return (whole + extra).astype(np.int64)


def shuffled(rows: Rows, documents: Integers, copy: Integers, seed: int) -> Integers:
    """Return the order of some documents, (documents,): by a hash of digest, copy and seed, so never by input order."""
    key = _hashed(rows["high"][documents], rows["low"][documents] + copy.astype(np.uint64), f"order {seed}")
    return np.lexsort((copy, rows["low"][documents], rows["high"][documents], key))


def _hashed(high: Any, low: Any, purpose: str) -> Any:
    """Return a 64-bit hash of digests for one purpose; digests are uniform already, so that a mix of bits is enough."""
    salt = hashlib.blake2b(purpose.encode(), digest_size=16).digest()
    mixed = high ^ np.uint64(int.from_bytes(salt[:8], "big"))
    for add in (low, np.uint64(int.from_bytes(salt[8:], "big"))):
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93) + add
    return (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)


def _uniform(high: Any, low: Any, purpose: str) -> Any:
    return _hashed(high, low, purpose) / 2.0**64
