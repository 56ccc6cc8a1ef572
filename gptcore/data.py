"""Token windows for training: text files to a checked, memory-mapped cache of ids, and windows to batches.

A file is a document; a literal "<|endoftext|>" inside it ends one document and begins the next, and a newline right
after it is part of the separator. The tokenizer's end-of-text id, if it has one, stands after each document. All
documents in the order given make one row of tokens, which is cut into windows of `block_size`; the tail that fills no
window is dropped.

The cache is one file, named by the SHA-256 of the text, the tokenizer and the format, so that it can never be stale,
and checked by a SHA-256 of its own when it is opened. All numbers are little endian:

    magic "GPTCTOK\\0", u32 format, u32 bytes a token, u64 vocab_size, u64 tokens, u64 documents, 32 bytes SHA-256
    tokens: u16 or u32 each, zeros up to a multiple of 8 bytes
    document starts: u64 each, as positions among the tokens
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from gptcore.files import PathLike, atomic_file
from gptcore.tokenizer import Tokenizer, check_text_file, read_blocks, split_documents

Feature = torch.Tensor | Sequence[int] | Mapping[str, Any]

_MAGIC, _FORMAT = b"GPTCTOK\0", 1
_FIELDS = struct.Struct("<8sIIQQQ")  # magic, format, bytes a token, vocab_size, tokens, documents
_HEADER = _FIELDS.size + 32  # and the SHA-256 of the fields and of all that follows
_IGNORED = -100  # the label that the loss leaves out


def cache_folder(cache_dir: PathLike | None = None) -> Path:
    """Where caches are kept: `cache_dir`, else $GPTCORE_CACHE, else $XDG_CACHE_HOME/gptcore, else ~/.cache/gptcore."""
    if folder := cache_dir or os.environ.get("GPTCORE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptcore"


class TextDataset(Dataset[Any]):
    """Windows of `block_size` tokens over text files: `ds[i]` holds tokens i * block_size to (i + 1) * block_size.

    An item is an int64 tensor (block_size,). With `mask_documents` it is a dict of that tensor as "input_ids" and of
    "document_starts", int64: the positions in the window at which a document starts. From these the collator keeps
    attention and loss inside each document.

    The ids are those of the tokenizer's `encode` of each document. They are made once, in bounded memory, and kept in
    `cache_file`; nothing ever deletes it but you.

    Attributes: tokens (the memory-mapped ids), document_starts (int64, positions in tokens), cache_file, block_size.
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

        Raises FileNotFoundError for a missing file; ValueError for a folder, an empty or a binary file, fewer tokens
        than one window, or a file that changes while it is read; OSError for a cache folder that cannot be written.
        """
        if block_size < 2:
            raise ValueError(f"block_size must be at least 2 tokens, one to read and one to predict, not {block_size}")
        paths = [check_text_file(p) for p in ([file_path] if isinstance(file_path, str | os.PathLike) else file_path)]
        if not paths:
            raise ValueError("no file to read: file_path is an empty list")
        self.block_size = block_size
        self.mask_documents = mask_documents
        digests = [_digest(read_blocks(path)) for path in paths]
        key = hashlib.sha256(f"{_FORMAT} {tokenizer.fingerprint} {' '.join(digests)}".encode()).hexdigest()
        self.cache_file = cache_folder(cache_dir) / "tokens" / f"{key}.tokens"
        ready = None
        if self.cache_file.exists() and not overwrite_cache:
            try:
                ready = _open_cache(self.cache_file, tokenizer.vocab_size)
            except ValueError as error:
                warnings.warn(f"{error}; making it again", stacklevel=2)
        if ready is None:
            try:
                _write_cache(self.cache_file, tokenizer, paths, digests)
            except OSError as error:
                help = "give cache_dir, or set GPTCORE_CACHE, to a folder with room that you may write to"
                raise OSError(f"cannot write the token cache {self.cache_file}: {error}; {help}") from error
            ready = _open_cache(self.cache_file, tokenizer.vocab_size)
        self.tokens, self.document_starts = ready
        if len(self) == 0:
            names = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
            raise ValueError(
                f"{names}: {len(self.tokens)} tokens are fewer than one window of block_size={block_size}; "
                f"give more text, or a block_size of at most {len(self.tokens)}"
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, i: int) -> torch.Tensor | dict[str, torch.Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no window {i}: this dataset has {len(self)}")
        start = i % len(self) * self.block_size
        end = start + self.block_size
        window = torch.from_numpy(self.tokens[start:end].astype(np.int64))
        if not self.mask_documents:
            return window
        first, last = np.searchsorted(self.document_starts, [start, end])
        return {"input_ids": window, "document_starts": torch.from_numpy(self.document_starts[first:last] - start)}


class DataCollatorForLanguageModeling:
    """Stack windows into a batch for a model that predicts each next token, and shifts the labels itself.

    Takes a list of id tensors, id lists, or dicts with "input_ids" and maybe "document_starts"; gives int64 tensors:

        input_ids       (batch, length), shorter rows padded on the right
        labels          (batch, length), the same ids; -100 on padding and on the first token of each document, which
                        no earlier token foretells
        attention_mask  (batch, length), 1 on tokens and 0 on padding; only if a row is padded
        cu_seqlens      (segments + 1,), boundaries in the flattened batch x length: 0, the end of each row, the start
                        of each document and of padding; only if the windows carry document_starts

    What is padding follows from the lengths, never from the ids: an end-of-text token in the text counts.
    """

    def __init__(self, tokenizer: Tokenizer, mlm: bool = False) -> None:
        """`tokenizer` gives the padding id (its end-of-text id, else 0). Raises ValueError for mlm=True."""
        if mlm:
            raise ValueError("mlm=True is for models like BERT; a GPT predicts the next token: give mlm=False")
        self.pad_token_id = tokenizer.eos_token_id or 0

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        if len(features) == 0:
            raise ValueError("a batch needs at least one window, but the list is empty")
        windows = [dict(f) if isinstance(f, Mapping) else {"input_ids": f} for f in features]
        keys = windows[0].keys()
        if any(w.keys() != keys for w in windows) or keys not in ({"input_ids"}, {"input_ids", "document_starts"}):
            found = sorted({tuple(sorted(w)) for w in windows})
            raise ValueError(f"each window has input_ids, and all or none document_starts, but these have {found}")
        rows = [_ids(w["input_ids"]) for w in windows]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full_like(input_ids, _IGNORED)
        attention_mask = torch.zeros_like(input_ids)
        boundaries = {0}
        for r, row in enumerate(rows):
            input_ids[r, : len(row)] = row
            labels[r, : len(row)] = row
            attention_mask[r, : len(row)] = 1
            boundaries |= {r * length + len(row), (r + 1) * length}
            if "document_starts" in keys:
                starts = torch.as_tensor(windows[r]["document_starts"], dtype=torch.int64)
                if ((starts < 0) | (starts >= len(row))).any():
                    raise ValueError(f"document_starts must be from 0 to {len(row) - 1}, but are {starts.tolist()}")
                labels[r, starts] = _IGNORED
                boundaries |= set((r * length + starts).tolist())
        batch = {"input_ids": input_ids, "labels": labels}
        if min(map(len, rows)) < length:
            batch["attention_mask"] = attention_mask
        if "document_starts" in keys:
            batch["cu_seqlens"] = torch.tensor(sorted(boundaries))
        return batch


def _ids(row: Any) -> torch.Tensor:
    ids = torch.as_tensor(row)
    if ids.dim() != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be a row of token ids, but are {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.to(torch.int64)


def split(dataset: Dataset[Any], validation_fraction: float) -> tuple[Subset[Any], Subset[Any]]:
    """The first windows of a dataset for training and the last ones for validation, as two views.

    The validation view has the nearest whole number of windows to the fraction, and at least one. Windows never
    overlap, so no token is in both; a document may go on from one view into the other. Raises ValueError if a view
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


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A permutation of range(length) that depends on the three numbers alone: the order of windows in an epoch.

    It has a generator of its own, and takes only what NumPy promises to keep between versions (SeedSequence and the raw
    stream of a bit generator, not `permutation`), so that a run can go on from its counters anywhere.
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


def _token_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _hashed(blocks: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for block in blocks:
        digest.update(block)
        yield block


def _write_cache(file: Path, tokenizer: Tokenizer, paths: Sequence[Path], digests: Sequence[str]) -> None:
    """Write the ids of all documents aside, then rename: of two processes at once, both write the same and one wins."""
    dtype, eos = _token_type(tokenizer.vocab_size), tokenizer.eos_token_id
    count, starts, start = 0, array("Q"), 0
    with atomic_file(file) as aside, open(aside, "r+b") as out:
        out.seek(_HEADER)
        for path, expected in zip(paths, digests, strict=True):
            read = hashlib.sha256()
            for ids in tokenizer.encode_stream(split_documents(_hashed(read_blocks(path), read))):
                if ids is None:  # the document ends
                    starts.append(start)
                    ids = [] if eos is None else [eos]
                    start = count + len(ids)
                out.write(np.asarray(ids, dtype).tobytes())
                count += len(ids)
            if read.hexdigest() != expected:
                raise ValueError(f"{path} changed while it was read; try again when nothing writes to it")
        out.write(bytes(-count * dtype.itemsize % 8))
        out.write(np.asarray(starts, "<u8").tobytes())
        fields = _FIELDS.pack(_MAGIC, _FORMAT, dtype.itemsize, tokenizer.vocab_size, count, len(starts))
        out.flush()
        digest = hashlib.sha256(fields)
        out.seek(_HEADER)
        while block := out.read(1 << 20):
            digest.update(block)
        out.seek(0)
        out.write(fields + digest.digest())


def _open_cache(file: Path, vocab_size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, np.dtype[np.int64]]]:
    """Map the tokens and read the document starts. Raises ValueError unless every byte is what was written."""
    dtype = _token_type(vocab_size)
    with open(file, "rb") as f:  # one handle: the file may be replaced under its name meanwhile
        header = f.read(_HEADER)
        if len(header) < _HEADER:
            raise ValueError(f"the token cache {file} is damaged: {len(header)} bytes, a header has {_HEADER}")
        fields, expected = header[: _FIELDS.size], header[_FIELDS.size :]
        *kind, count, documents = _FIELDS.unpack(fields)
        if kind != [_MAGIC, _FORMAT, dtype.itemsize, vocab_size]:
            raise ValueError(f"the token cache {file} is not one of format {_FORMAT} for {vocab_size} tokens: {kind}")
        padded = -(-count * dtype.itemsize // 8) * 8
        size, found = _HEADER + padded + 8 * documents, os.fstat(f.fileno()).st_size
        if size != found:
            raise ValueError(f"the token cache {file} is damaged: {found} bytes instead of {size}")
        digest = hashlib.sha256(fields)
        while block := f.read(1 << 20):
            digest.update(block)
        if digest.digest() != expected:
            raise ValueError(f"the token cache {file} is damaged: its SHA-256 is not the one that it was written with")
        if count == 0:
            return np.empty(0, dtype), np.empty(0, np.int64)
        tokens = np.memmap(f, dtype, "r", _HEADER, (count,))
        f.seek(_HEADER + padded)
        return tokens, np.frombuffer(f.read(), "<u8").astype(np.int64)
