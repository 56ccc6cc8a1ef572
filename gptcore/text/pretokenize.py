"""Split text before it is tokenized: into the documents of a file, and into pieces that are encoded one by one.

`tokenizers` needs far more memory than the text that it is given, so that a long text goes to it a piece at a time. The
ids must be those of the whole, so a text is cut only where no token can cross, for any text before and after.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from gptcore.files import PathLike, open_file

END_OF_TEXT = "<|endoftext|>"  # follows each document, and separates the documents of a text file
PIECE = 1 << 16  # characters that are encoded as one text, where the text can be cut
_SAMPLE = 1 << 16  # bytes looked at to tell text from anything else

BROKEN = re.compile("([\udc80-\udcff]+)")  # bytes that are not UTF-8, as "surrogateescape" decodes them

# A pre-token ends after a non-space before white space, after a letter or digit before a mark, and beside a byte that
# is not UTF-8: what follows can never join it. All versions of Unicode agree on these letters and marks. Greedy: the
# last place wins.
SAFE_CUT = re.compile(
    r"(?s:.+)(?:(?<=\S)(?=[ \t\r\n])|(?<=[0-9A-Za-z\u4e00-\u9fa5])(?=[!-/:-@\[-`{-~\u3001\u3002\uff0c])"
    "|(?<=[\udc80-\udcff])|(?=[\udc80-\udcff]))"
)

GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
GPT1_WORDS = pre_tokenizers.BertPreTokenizer()
GPT1_TEXT = normalizers.BertNormalizer(lowercase=True)
END_OF_WORD = "</w>"  # at the end of GPT-1's tokens
CHARACTERS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's visible stand-in for each byte: itself if Latin-1 shows it, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
STAND_IN = {byte: character for character, byte in BYTE_OF.items()}


def check_text_file(path: PathLike) -> Path:
    """Check that `path` is a text file: not empty, and its first 65,536 bytes hold no NUL and at most 10 % bad UTF-8.

    Raises OSError, or ValueError for a folder, a device, an empty file or a binary file.
    """
    path = Path(path)
    with open_file(path) as file:
        sample = file.read(_SAMPLE)
    if not sample:
        raise ValueError(f"{path} is empty (0 bytes): there is no text in it")
    nul, broken = sample.count(0), sum(map(len, BROKEN.findall(sample.decode("utf-8", "surrogateescape"))))
    if nul or broken > len(sample) / 10 + 3:  # the sample may end inside a character, of which it then holds 3 bytes
        raise ValueError(
            f"{path} is not a text file: of its first {len(sample)} bytes {nul} are NUL and {broken} are not "
            "valid UTF-8; give UTF-8 text (`iconv -f UTF-16 -t UTF-8` converts other encodings)"
        )
    return path


def read_blocks(path: PathLike, size: int = 1 << 20) -> Iterator[bytes]:
    """Yield the bytes of a file, `size` at a time."""
    with open_file(path) as file:
        while block := file.read(size):
            yield block


def split_documents(blocks: Iterable[bytes], separators: Iterable[str] = (END_OF_TEXT,)) -> Iterator[bytes | None]:
    """Yield the documents in a stream of bytes: some chunks, then None, for each.

    A separator between two documents belongs to neither, nor does a newline right after it. Empty documents are left
    out. How the stream is cut into blocks makes no difference to the documents.
    """
    names = sorted((name.encode() for name in separators), key=len, reverse=True)
    pattern = re.compile(b"(?:" + b"|".join(map(re.escape, names)) + rb")(?:\r?\n)?")
    longest = len(names[0]) + 2
    rest, inside = b"", False
    for block in itertools.chain(blocks, [None]):
        rest += block or b""
        settled = len(rest) if block is None else max(0, len(rest) - longest)  # what starts later may not be whole yet
        start = 0
        for match in pattern.finditer(rest):
            if match.start() >= settled:
                break
            if match.start() > start:
                yield rest[start : match.start()]
                inside = True
            if inside:
                yield None
            start, inside = match.end(), False
        if settled > start:
            yield rest[start:settled]
            inside = True
        rest = rest[max(start, settled) :]
    if inside:
        yield None


Cut = Callable[[str], int | None]


def pieces(chunks: Iterable[bytes | None], cut: Cut) -> Iterator[str | None]:
    """Yield documents that come in chunks, as from `split_documents`, as text in pieces, bad bytes escaped.

    cut: given the beginning of a text, of PIECE + 1 characters, or 2 * PIECE + 1 and so on where it returned None, the
        number of characters of the first piece. So where a text is cut depends on the text and not on the chunks.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, size = "", PIECE
    asked, place = "", None
    for chunk in chunks:
        text += decoder.decode(chunk or b"", final=chunk is None)
        start = 0
        while len(text) - start > size:
            beginning = text[start : start + size + 1]
            if beginning != asked:  # a run of one character asks the same again and again
                asked, place = beginning, cut(beginning)
            if place is None:
                size *= 2
            else:
                yield text[start : start + place]
                start, size = start + place, PIECE
        text = text[start:]
        if chunk is None:
            if text:
                yield text
            yield None
            text, size = "", PIECE


def end_of_a_word(beginning: str) -> int | None:
    """Return the end of a pre-token of GPT-2 at which a text can be cut, for any continuation of `beginning`, or None.

    None means that the first pre-token extends to the last three characters or further.
    """
    words = GPT2_WORDS.pre_tokenize_str(beginning)
    for _, (start, end) in reversed(words):
        # GPT-2's expression looks one character beyond a match, or at three where it matches one, the ' of 're.
        # And it leaves the last of several spaces to the next word, but not at the end of a text.
        left_over = start > 0 and beginning[start - 1].isspace() and beginning[end - 1].isspace()
        if end <= len(beginning) - 3 and not left_over:
            return end
    return None


def cut_in_word(word: str, model: models.BPE, longest: int, count: int = 8) -> int | None:
    """Return a place in `word`, the start of a longer pre-token, that no token crosses for any continuation; or None.

    model: its merges are in an order in which each comes after all that make its two halves.
    longest: bytes of its longest token.
    count: of the last tokens of `word` that are looked at; if these may all change, 4 times as many, and so on.

    BPE merges the pair of the lowest rank first, and the leftmost of these. Hence (1) some neighbours in an encoding
    are the encoding of their own bytes: no merge went across their edges. And (2) tokens are the encoding of their
    bytes where each two neighbours are that of theirs. For take the first merge across an edge: up to then each token
    has been built as if it stood alone. Ranks never fall in this order of merges, so that in the two tokens alone
    nothing could come before this merge either, and they would not be an encoding.

    Wherever the longer word is cut into tokens, one ends less than `longest` bytes before the end of `word`. If the
    encodings up to each such place have a token in common, then by (2) so does that of the longer word, and
    what follows this token is by (1) encoded as if it stood alone.
    """
    data = word.encode()
    tokens = [token.value for token in model.tokenize("".join(map(STAND_IN.__getitem__, data)))]
    while count < len(tokens):
        tail = "".join(tokens[-count:])
        if len(tail) > longest and all(
            model.tokenize(tail[: len(tail) - missing])[0].value == tokens[-count] for missing in range(longest)
        ):
            break
        count *= 4
    else:
        return None
    end = sum(map(len, tokens[: 1 - count]))
    for token in reversed(tokens[: 1 - count]):
        if data[end] & 0xC0 != 0x80:  # between two characters, as a piece has to be a str
            return len(data[:end].decode())
        end -= len(token)
    return None


def in_order(merges: Sequence[Sequence[str]]) -> bool:
    """Return whether each merge comes after all that make its two halves."""
    made = {left + right: rank for rank, (left, right) in enumerate(merges)}  # the last that makes each token
    return all(max(made.get(left, -1), made.get(right, -1)) < rank for rank, (left, right) in enumerate(merges))
