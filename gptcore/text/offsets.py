"""Where tokens are in a text, counted in characters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import tokenizers

from gptcore.text.pretokenize import BROKEN, Cut, pieces

Offsets = list[tuple[int, int]]


def join_surrogates(text: str) -> str:
    """Return the text with each surrogate pair as the character that it stands for; lone surrogates stay."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def byte_offsets(data: bytes, lengths: Iterable[int]) -> Offsets:
    """Return the characters [start, end) that tokens of so many bytes come from."""
    character = list(itertools.accumulate(int(byte & 0xC0 != 0x80) for byte in data))  # of each byte, from 1
    offsets: Offsets = []
    start = 0
    for length in lengths:
        end = start + length
        offsets.append((character[start] - 1, character[end - 1]))
        start = end
    return offsets


def folded_offsets(parts: Sequence[bytes], cut: Cut, encode: Callable[[str], tokenizers.Encoding]) -> Offsets:
    """Return the offsets of GPT-1's tokens, which are not made of the text's own bytes.

    parts: text, special token, text, ..., text.
    """
    offsets: Offsets = []
    thirds = 0  # of the characters so far: a lone surrogate is three bytes, between which a piece may end
    for i, part in enumerate(parts):
        if i % 2:
            offsets.append((thirds // 3, thirds // 3 + len(part.decode())))
            thirds += 3 * len(part.decode())
            continue
        for piece in pieces([part, None], cut):
            for j, run in enumerate(BROKEN.split(piece or "")):
                if j % 2:
                    offsets += [(at // 3, at // 3 + 1) for at in range(thirds, thirds + len(run))]
                    thirds += len(run)
                else:
                    found = encode(run).offsets
                    offsets += [(thirds // 3 + start, thirds // 3 + end) for start, end in found]
                    thirds += 3 * len(run)
    return offsets


def in_original(offsets: Offsets, text: str, joined: str) -> Offsets:
    """Return offsets in `joined`, the text with its surrogate pairs joined, as offsets in the text itself."""
    if len(joined) == len(text):
        return offsets
    places = [0]
    for character in joined:
        places.append(places[-1] + 1 + (text[places[-1]] != character))
    return [(places[start], places[end]) for start, end in offsets]
