"""Datasets of token windows: text files are encoded into a checked cache on the disk, which is read by windows.

A file is a document; a literal "<|endoftext|>" inside it ends one document and begins the next, and a newline right
after it is part of the separator. The tokenizer's end-of-text id, if it has one, follows each document. All
documents in the order given make one row of tokens, which is cut into windows of `block_size`; the tail that fills no
window is dropped.

The cache is one file of `gptcore.data.shards`, named by the SHA-256 of the text, the tokenizer and the format. So it
can never be stale. TokenDataset reads such files, and others', directly.

Every file is checked as a whole when it is opened. A file that changes later raises ValueError at the next window read
from it; see `gptcore.data.shards`.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from gptcore.data.shards import Shard, read_shard, write_shard
from gptcore.files import PathLike, cache_folder, sweep
from gptcore.text.pretokenize import check_text_file, read_blocks, split_documents
from gptcore.text.tokenizer import Tokenizer

_FORMAT = 2  # of the ids in the cache: how a text is cut into documents and ended
_KEPT_OPEN = 64  # files of a dataset whose descriptors are kept: far below any limit on them


class TokenDataset(Dataset[Any]):
    """Windows of `block_size` tokens over files of tokens (see `gptcore.data.shards`), each read when it is asked for.

    An item is an int64 tensor (block_size,). With `mask_documents` it is a dict of that tensor as "input_ids" and of
    "document_starts", int64: the positions in the window at which a document starts. From these the collator keeps
    attention and loss inside each document.

    Windows follow each other without overlap; the tail of a file that fills no window is dropped. A pickled dataset is
    the paths of its files and their checksums.

    Attributes: fingerprint (SHA-256 of all items), shards, block_size, mask_documents.
    """

    def __init__(
        self,
        file_path: PathLike | Sequence[PathLike],
        block_size: int,
        *,
        vocab_size: int,
        format: str | None = None,
        tokenizer: Tokenizer | None = None,
        mask_documents: bool = False,
    ) -> None:
        """Open and check files of tokens.

        Args:
            file_path: one path or several, in this order.
            block_size: tokens in a window, at least 2: the first of a window is not predicted.
            vocab_size: the model's; an id from here on would be a wild read, and is an error.
            format: "nanogpt" for files without a header; None for ours and llm.c's.
            tokenizer: that the files must have been made with; only ours tell.
            mask_documents: items tell where documents start; only our files do.

        Raises OSError, or ValueError for a damaged file, an id outside the vocabulary, a file of another
        tokenizer, or one with fewer tokens than a window.
        """
        paths = _paths(file_path)
        fingerprint = None if tokenizer is None else tokenizer.fingerprint
        shards = [read_shard(path, vocab_size=vocab_size, format=format, fingerprint=fingerprint) for path in paths]
        self._open(paths, shards, block_size, mask_documents)

    def _open(self, names: Sequence[Path], shards: list[Shard], block_size: int, mask_documents: bool) -> None:
        _check_block_size(block_size)
        for name, shard in zip(names, shards, strict=True):
            if len(shard) < block_size:
                raise ValueError(
                    f"{name}: {len(shard)} tokens are fewer than one window of block_size={block_size}; "
                    f"give more text, or a block_size of at most {len(shard)}"
                )
            if mask_documents and shard.documents is None:
                raise ValueError(f"{name} does not say where documents start: mask_documents=True needs a file of ours")
        self.shards, self.block_size, self.mask_documents = shards, block_size, mask_documents
        self._ends = list(itertools.accumulate(len(shard) // block_size for shard in shards))  # in windows
        for shard in shards if len(shards) <= _KEPT_OPEN else ():
            shard.keep_open()
        contents = f"{block_size} {mask_documents} {' '.join(shard.sha256 for shard in shards)}"
        self.fingerprint = hashlib.sha256(contents.encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> torch.Tensor | dict[str, torch.Tensor]:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no window {i}: this dataset has {len(self)}")
        i %= len(self)
        s = bisect.bisect_right(self._ends, i)
        shard = self.shards[s]
        start = (i - (self._ends[s - 1] if s else 0)) * self.block_size
        end = start + self.block_size
        window = torch.from_numpy(shard.read(start, end).astype(np.int64))
        if not self.mask_documents:
            return window
        assert shard.document_starts is not None
        first, last = np.searchsorted(shard.document_starts, [start, end])
        return {"input_ids": window, "document_starts": torch.from_numpy(shard.document_starts[first:last] - start)}


class TextDataset(TokenDataset):
    """Windows over text files: `ds[i]` holds tokens i * block_size to (i + 1) * block_size.

    The ids are those of the tokenizer's `encode` of each document. They are made once, in bounded memory, and kept in
    `cache_file`, which TokenDataset reads too. gptcore never deletes it.

    Attributes: as TokenDataset, and tokens (all ids, as a memory map), document_starts (int64, positions in tokens),
    cache_file.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        file_path: PathLike | Sequence[PathLike],
        block_size: int,
        *,
        cache_dir: PathLike | None = None,
        overwrite_cache: bool = False,
        mask_documents: bool = False,
    ) -> None:
        """Open the cached ids of some UTF-8 text files, or make them.

        Args:
            tokenizer: turns text into ids.
            file_path: one path or several, each a document or more.
            block_size: tokens in a window, at least 2: the first of a window is not predicted.
            cache_dir: folder of the cache; see `cache_folder` for the default.
            overwrite_cache: make the ids anew even if they are there.
            mask_documents: items tell where documents start.

        Raises OSError for a file that cannot be read; ValueError for a folder, an empty or a binary file, fewer tokens
        than one window, or a file that changes while it is read; OSError for a cache folder that cannot be written.
        """
        _check_block_size(block_size)
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}, expected a gptcore.Tokenizer")
        paths = [check_text_file(path) for path in _paths(file_path)]
        digests = [_digest(read_blocks(path)) for path in paths]
        source = hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()
        parts = f"{_FORMAT} {tokenizer.fingerprint} {tokenizer.eos_token_id} {' '.join(digests)}"
        key = hashlib.sha256(parts.encode()).hexdigest()
        self.cache_file = cache_folder(cache_dir) / "tokens" / f"{key}.tokens"
        vocab_size, fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        shard = None
        sweep(self.cache_file.parent)
        if os.path.lexists(self.cache_file) and not overwrite_cache:
            try:
                shard = read_shard(self.cache_file, vocab_size=vocab_size, format="gptcore", fingerprint=fingerprint)
            except ValueError as error:
                warnings.warn(f"the token cache {error}; making it again", stacklevel=2)
        if shard is None:
            try:
                ids = _encode(tokenizer, paths, digests)
                write_shard(self.cache_file, ids, vocab_size=vocab_size, fingerprint=fingerprint, source=source)
            except OSError as error:
                help = "give cache_dir, or set GPTCORE_CACHE, to a folder with room that you may write to"
                raise OSError(f"cannot write the token cache {self.cache_file}: {error}; {help}") from error
            shard = read_shard(self.cache_file, vocab_size=vocab_size, format="gptcore", fingerprint=fingerprint)
        names_of = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
        self._open([Path(names_of)], [shard], block_size, mask_documents)

    @property
    def tokens(self) -> np.ndarray[Any, Any]:
        return self.shards[0].tokens

    @property
    def document_starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        starts = self.shards[0].document_starts
        assert starts is not None
        return starts


def split(dataset: Dataset[Any], validation_fraction: float) -> tuple[Subset[Any], Subset[Any]]:
    """Return the first windows of a dataset for training and the last ones for validation, as two views.

    The validation view has the nearest whole number of windows to the fraction, and at least one. Windows never
    overlap, so no token is in both; a document may continue from one view into the other. Raises ValueError if a view
    would be empty.
    """
    assert isinstance(dataset, Sized)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    count = len(dataset)
    validation = max(1, round(count * validation_fraction))
    if validation >= count:
        raise ValueError(f"of {count} windows, {validation} for validation leaves none for training; give more text")
    return Subset(dataset, range(count - validation)), Subset(dataset, range(count - validation, count))


def fingerprint_of(dataset: Any) -> str | None:
    """Return the SHA-256 of all items of a dataset: its `fingerprint`, or one derived for a Subset or ConcatDataset.

    None means that the dataset has no fingerprint. Equal fingerprints mean equal items in the same order.
    """
    if isinstance(dataset, Subset):
        inner, indices = fingerprint_of(dataset.dataset), dataset.indices
        listed = repr(indices) if isinstance(indices, range) else np.asarray(indices, np.int64).tobytes().hex()
        parts = [inner, listed]
    elif isinstance(dataset, ConcatDataset):
        parts = [fingerprint_of(part) for part in dataset.datasets]
    else:
        found = getattr(dataset, "fingerprint", None)
        return found if isinstance(found, str) else None
    if None in parts:
        return None
    return hashlib.sha256(json.dumps([type(dataset).__name__, *parts]).encode()).hexdigest()


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the order of windows in an epoch: a permutation of range(length) that follows from the three numbers.

    It uses only what NumPy keeps the same between versions (SeedSequence and the raw stream of a bit generator, not
    `permutation`), so that a run can resume from its counters on any machine.
    """
    if length < 0 or seed < 0 or epoch < 0:
        raise ValueError(f"length, seed and epoch must not be negative: {length}, {seed}, {epoch}")
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(length)
    return np.argsort(keys, kind="stable")


def _digest(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _hashed(blocks: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for block in blocks:
        digest.update(block)
        yield block


def _encode(tokenizer: Tokenizer, paths: Sequence[Path], digests: Sequence[str]) -> Iterator[list[int] | None]:
    """Yield the ids of all documents, each with its end-of-text id and then None."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for path, expected in zip(paths, digests, strict=True):
        read = hashlib.sha256()
        for ids in tokenizer.encode_stream(split_documents(_hashed(read_blocks(path), read))):
            if ids is None:
                yield eos
            yield ids
        if read.hexdigest() != expected:
            raise ValueError(f"{path} changed while it was read; try again when nothing writes to it")


def _paths(file_path: PathLike | Sequence[PathLike]) -> list[Path]:
    listed = [file_path] if isinstance(file_path, str | os.PathLike) else file_path
    if not isinstance(listed, Sequence) or not all(isinstance(path, str | os.PathLike) for path in listed):
        raise TypeError(f"file_path is {file_path!r}, expected a path or a list of paths")
    paths = [Path(path) for path in listed]
    if not paths:
        raise ValueError("no file to read: file_path is an empty list")
    return paths


def _check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int):
        raise TypeError(f"block_size is {block_size!r}, expected a whole number of tokens")
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 tokens, one to read and one to predict, not {block_size}")
