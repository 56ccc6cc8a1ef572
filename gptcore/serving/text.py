"""Tokens to text as they come: whole characters only, stop strings, and what each token says."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptcore.text.tokenizer import Tokenizer


def spell(data: bytes) -> str:
    """Return the text of a token's bytes, or for parts of a character "bytes:" and their escapes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Speller:
    """Turns the tokens of one text into bytes, one after another.

    previous: the token before the text, if there is one: GPT-1 writes a space between two words.
    """

    def __init__(self, tokenizer: Tokenizer, previous: int | None = None) -> None:
        self._tokenizer, self._previous = tokenizer, previous
        self._special = set(tokenizer.special_tokens.values())

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token in this place, without moving on; of a special token its name."""
        if token >= self._tokenizer.vocab_size:  # in a padded vocabulary
            return b""
        before = [] if self._previous is None or self._previous >= self._tokenizer.vocab_size else [self._previous]
        skip = len(self._tokenizer.decode_bytes(before))
        return self._tokenizer.decode_bytes([*before, token])[skip:]

    def take(self, token: int) -> bytes:
        """Return what a token adds to the text, and move on; a special token adds nothing."""
        data = b"" if token in self._special else self.bytes_of(token)
        self._previous = token
        return data


class Decoder:
    """Turns bytes into characters, holds back what a stop string may still become, and ends at one.

    `feed` and `end` return text that is final: never part of a character, never the beginning of a stop string that
    follows. Bytes that are not UTF-8 become U+FFFD. `stopped` says that a stop string was found; it is not in the text.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = list(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.length = 0  # characters returned
        self.stopped = False

    def begins(self, data: bytes) -> int:
        """Return where in the text the first character of `data` begins, which must be fed next."""
        position, pending = self.length + len(self._held), self._decoder.getstate()[0]
        try:
            (pending + data[:1]).decode()
        except UnicodeDecodeError as error:
            if pending and error.reason != "unexpected end of data":  # what is pending becomes U+FFFD
                position += 1
        return position

    def feed(self, data: bytes, final: bool = False) -> str:
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data, final)
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, so that the division into tokens does not matter
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - (0 if final else self._possible()))

    def end(self) -> str:
        """Return what was held back, after the last token."""
        return self.feed(b"", final=True)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], "" if self.stopped else self._held[count:]
        self.length += count
        return text

    def _possible(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
