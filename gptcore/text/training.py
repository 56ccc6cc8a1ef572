"""Learn a vocabulary from text files, read as a stream."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from operator import index
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, trainers

from gptcore.memory import total_memory
from gptcore.text.pretokenize import (
    BROKEN,
    BYTE_OF,
    CHARACTERS,
    END_OF_TEXT,
    GPT2_WORDS,
    PIECE,
    SAFE_CUT,
    STAND_IN,
    pieces,
    read_blocks,
    split_documents,
)

LONGEST = 1 << 12  # characters of a word in training: each merge takes time in proportion to the words that it is in
_TOKEN_MEMORY = 256  # bytes that `tokenizers` takes for a token while it trains, at most

# A run without a boundary that GPT-2's expression always cuts at. \w and \p{L} differ, but not by more than the class.
_LONG_RUN = re.compile(f"[^\\W_]{{{LONGEST}}}|[\\W_]{{{LONGEST}}}")


def learn_characters(paths: Sequence[Path], special: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer with a token for each character in the files."""
    seen: set[str] = set()
    for text in training_text(paths, special):
        seen.update(text)
    longer = ["".join(STAND_IN[byte] for byte in c.encode()) for c in sorted(seen) if ord(c) >= 128]
    vocab = {token: i for i, token in enumerate([*special, *sorted(BYTE_OF), *longer])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = CHARACTERS  # and ignore_merges: a character in the vocabulary is a token at once
    tokenizer.add_special_tokens(list(special))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def learn_merges(paths: Sequence[Path], vocab_size: int | None, special: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with the merges that the files give.

    Raises ValueError for a vocabulary too small for the bytes, or too large for the memory of this machine.
    """
    base = 256 + len(special)
    if vocab_size is None or index(vocab_size) < base:
        raise ValueError(
            f"kind='bpe' needs a vocab_size of at least {base} (256 bytes and {len(special)} special tokens), "
            f"not {vocab_size}; 8192 suits a few megabytes of text"
        )
    most = base + sum(path.stat().st_size for path in paths)  # a merge needs a byte more of text
    memory = total_memory()
    if min(vocab_size, most) > memory // _TOKEN_MEMORY:
        raise ValueError(
            f"vocab_size={vocab_size} would take {min(vocab_size, most) * _TOKEN_MEMORY >> 30} GiB, but this machine "
            f"has {memory >> 30}; give at most {memory // _TOKEN_MEMORY}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = GPT2_WORDS
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, most),
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(paths, special), trainer)
    if (learnt := tokenizer.get_vocab_size()) < vocab_size:
        warnings.warn(f"the text gives only {learnt} of the {vocab_size} tokens asked for", stacklevel=3)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def training_text(paths: Sequence[Path], separators: Sequence[str]) -> Iterator[str]:
    """Yield the valid text of the files in pieces, without separators: these are never learnt as text.

    A word of more than LONGEST characters is cut: `tokenizers` takes quadratic time in the length of a word.
    """

    def cut(beginning: str) -> int:
        match = SAFE_CUT.match(beginning)
        return match.end() if match else PIECE

    for path in paths:
        for piece in pieces(split_documents(read_blocks(path), separators or [END_OF_TEXT]), cut):
            for run in BROKEN.split(piece)[::2] if piece else ():
                start = 0
                for long_run in _LONG_RUN.finditer(run):
                    yield run[start : long_run.end()]
                    start = long_run.end()
                if start < len(run):
                    yield run[start:]
