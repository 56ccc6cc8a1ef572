"""Text to token ids and back, for every string and every byte: byte-level BPE and characters, run by `tokenizers`.

Both kinds are one model over bytes (Radford et al. 2019, section 2.2). The text is cut into pre-tokens: by GPT-2's
regular expression (kind "bpe"), or at every character (kind "char"). A pre-token starts as its UTF-8 bytes, which
merges join into longer tokens; a character that was seen in training is a token at once. All 256 bytes are tokens, so
nothing is unknown.

What `tokenizers` does not take is handled here. Bytes that are not UTF-8 become their byte tokens directly, and the
valid text on either side is encoded by itself; a lone surrogate in a str is its three bytes of "surrogatepass". Text
longer than `PIECE` characters is encoded a piece at a time, cut where a pre-token of GPT-2 ends whatever stands before
and after (`_SAFE_CUT`), so that the ids are those of the whole. Only where `PIECE` characters hold no such place, say a
run of 65,536 letters, is the run itself cut. This bounds time and memory, and it depends on the text alone: `encode`,
`encode_batch` and `encode_stream`, in chunks of any size, always agree.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptcore.files import PathLike, atomic_file

END_OF_TEXT = "<|endoftext|>"  # stands after each document, and between the documents of a text file
PIECE = 1 << 16  # characters at most that `tokenizers` sees as one text
_BATCH = 1 << 20  # characters encoded by one call, on as many threads as `tokenizers` takes
_SAMPLE = 1 << 16  # bytes looked at to tell text from anything else

# A pre-token of GPT-2 ends after a non-space before white space, and after a letter or digit before a mark: what
# follows can never join it. All versions of Unicode agree on these letters and marks. Greedy: the last place wins.
_SAFE_CUT = re.compile(
    r"(?s:.+)(?:(?<=\S)(?=[ \t\r\n])|(?<=[0-9A-Za-z\u4e00-\u9fa5])(?=[!-/:-@\[-`{-~\u3001\u3002\uff0c]))"
)
_BROKEN = re.compile("([\udc80-\udcff]+)")  # bytes that are not UTF-8, as "surrogateescape" decodes them

_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CHARACTERS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible stand-in for each byte: itself where Latin-1 shows it, else the next character from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_STAND_IN = {byte: character for character, byte in _BYTE_OF.items()}


def _surrogates_or_replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Decode the three bytes of a surrogate to that surrogate, other bytes that are not UTF-8 to U+FFFD."""
    try:
        return codecs.lookup_error("surrogatepass")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


codecs.register_error("gptcore.surrogates_or_replace", _surrogates_or_replace)


def check_text_file(path: PathLike) -> Path:
    """Check that `path` is a text file: not empty, and its first 65,536 bytes hold no NUL and at most 10 % bad UTF-8.

    Raises FileNotFoundError, or ValueError for a folder, an empty file or a binary file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path} (looked from {Path.cwd()})")
    if not path.is_file():
        raise ValueError(
            f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; name the text files themselves"
        )
    with open(path, "rb") as file:
        sample = file.read(_SAMPLE)
    if not sample:
        raise ValueError(f"{path} is empty (0 bytes): there is no text in it")
    nul, broken = sample.count(0), sum(map(len, _BROKEN.findall(sample.decode("utf-8", "surrogateescape"))))
    if nul or broken > len(sample) / 10 + 3:  # the sample may end inside a character, of which it then holds 3 bytes
        raise ValueError(
            f"{path} is not a text file: of its first {len(sample)} bytes {nul} are NUL and {broken} are not "
            "valid UTF-8; give UTF-8 text (`iconv -f UTF-16 -t UTF-8` converts other encodings)"
        )
    return path


def read_blocks(path: PathLike, size: int = 1 << 20) -> Iterator[bytes]:
    """The bytes of a file, `size` at a time."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def split_documents(blocks: Iterable[bytes], separators: Iterable[str] = (END_OF_TEXT,)) -> Iterator[bytes | None]:
    """The documents in a stream of bytes: some chunks, then None, for each.

    A separator stands between two documents and belongs to neither, nor does a newline right after it. A document
    without a byte is left out. How the stream is cut into blocks makes no difference to the documents.
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


def _pieces(chunks: Iterable[bytes | None]) -> Iterator[str | None]:
    """The same stream as text of at most PIECE characters a piece, bad bytes as "surrogateescape"; None as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text = ""
    for chunk in chunks:
        text += decoder.decode(chunk or b"", final=chunk is None)
        start = 0
        while len(text) - start > PIECE:
            match = _SAFE_CUT.match(text, start, start + PIECE + 1)
            end = match.end() if match else start + PIECE
            yield text[start:end]
            start = end
        text = text[start:]
        if chunk is None:
            if text:
                yield text
            yield None
            text = ""


def _training_text(paths: Sequence[Path], separators: Sequence[str]) -> Iterator[str]:
    """The valid text of the files in pieces, without separators: these are never learnt as text."""
    for path in paths:
        for piece in _pieces(split_documents(read_blocks(path), separators or [END_OF_TEXT])):
            yield from filter(None, _BROKEN.split(piece)[::2]) if piece else ()


class Tokenizer:
    """A byte-level tokenizer: `train` one, or `from_pretrained` a folder with a tokenizer.json.

    `decode_bytes(encode(data)) == data` for all bytes and `decode(encode(text)) == text` for all str, broken or not.
    Special tokens in a text are plain text unless the caller of `encode` allows them, so that no prompt can forge one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers.Tokenizer`. Raises ValueError for one that cannot keep the promises above."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        state = json.loads(tokenizer.to_str())
        vocab = tokenizer.get_vocab()
        _check_byte_level(state, vocab)
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # as plain text: `encode` finds those allowed by itself
        self.fingerprint = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        self.kind = "bpe" if state["pre_tokenizer"]["type"] == "ByteLevel" else "char"
        self.special_tokens: dict[str, int] = {token["content"]: token["id"] for token in state["added_tokens"]}
        self._bytes = [b""] * len(vocab)  # of each id
        for token, i in vocab.items():
            self._bytes[i] = token.encode() if token in self.special_tokens else bytes(map(_BYTE_OF.__getitem__, token))
        self._byte_ids = [vocab[_STAND_IN[byte]] for byte in range(256)]
        # The longest special token wins, as in `tokenizers`.
        names = sorted(map(re.escape, self.special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(names) or '(?!)'})".encode())

    @classmethod
    def train(
        cls,
        files: PathLike | Sequence[PathLike],
        *,
        vocab_size: int | None = None,
        kind: str = "bpe",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
    ) -> Tokenizer:
        """Learn a vocabulary from UTF-8 text files, read as a stream.

        Args:
            files: one path or several. Special tokens in them end a document and are not learnt from.
            vocab_size: tokens in all, the 256 bytes and the special tokens included. "bpe" needs it, and learns fewer,
                with a warning, if no pair of tokens is left that occurs twice. For "char" the text decides: give None.
            kind: "bpe", or "char" for a token a character seen (others are spelt in bytes).
            special_tokens: tokens that no text can become; "<|endoftext|>" among them is the end-of-text token.

        Raises FileNotFoundError, or ValueError for a folder, an empty or a binary file, or a bad argument.
        """
        special = list(special_tokens)
        if isinstance(special_tokens, str) or len(set(special)) < len(special) or min(map(len, special), default=2) < 2:
            raise ValueError(
                f"special_tokens must be different strings of 2 characters or more, not {special_tokens!r}"
            )
        paths = [check_text_file(path) for path in ([files] if isinstance(files, str | os.PathLike) else files)]
        if not paths:
            raise ValueError("no file to train on: `files` is an empty list")
        base = 256 + len(special)
        if kind == "char":
            if vocab_size is not None:
                raise ValueError(f"vocab_size={vocab_size} with kind='char': there the text decides; leave it out")
            seen: set[str] = set()
            for text in _training_text(paths, special):
                seen.update(text)
            longer = ["".join(_STAND_IN[byte] for byte in c.encode()) for c in sorted(seen) if ord(c) >= 128]
            vocab = {token: i for i, token in enumerate([*special, *sorted(_BYTE_OF), *longer])}
            tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
            tokenizer.pre_tokenizer = _CHARACTERS  # and ignore_merges: one in the vocabulary is a token at once
            tokenizer.add_special_tokens(special)
        elif kind == "bpe":
            if vocab_size is None or vocab_size < base:
                raise ValueError(
                    f"kind='bpe' needs a vocab_size of at least {base} (256 bytes and {len(special)} special tokens), "
                    f"not {vocab_size}; 8192 suits a few megabytes of text"
                )
            tokenizer = tokenizers.Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = _GPT2_WORDS
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size,
                min_frequency=2,
                special_tokens=special,
                initial_alphabet=sorted(_BYTE_OF),
                show_progress=False,
            )
            tokenizer.train_from_iterator(_training_text(paths, special), trainer)
            if tokenizer.get_vocab_size() < vocab_size:
                learnt = tokenizer.get_vocab_size()
                warnings.warn(f"the text gives only {learnt} of the {vocab_size} tokens asked for", stacklevel=2)
        else:
            raise ValueError(f"kind must be 'bpe' or 'char', not {kind!r}")
        tokenizer.decoder = decoders.ByteLevel()
        return cls(tokenizer)

    @classmethod
    def from_pretrained(cls, path: PathLike) -> Tokenizer:
        """Load a tokenizer.json, or the one in a folder: ours, or GPT-2's own.

        Raises FileNotFoundError, or ValueError for a file that is damaged or not a byte-level tokenizer of these kinds.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; give a tokenizer.json or the folder that holds it")
        try:
            return cls._from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from error

    @classmethod
    def _from_json(cls, text: str) -> Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ValueError(f"not a whole tokenizer.json: {error}") from error
        return cls(tokenizer)

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return self._from_json, (self._tokenizer.to_str(),)  # `tokenizers` would forget encode_special_tokens

    def save_pretrained(self, path: PathLike) -> Path:
        """Write tokenizer.json into the folder `path`, whole or not at all; returns the file."""
        file = Path(path) / "tokenizer.json"
        with atomic_file(file) as aside:
            aside.write_text(self._tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        return file

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; the ids are 0 to vocab_size - 1."""
        return len(self._bytes)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The id of "<|endoftext|>", or None if that is not a special token here."""
        return self.special_tokens.get(END_OF_TEXT)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as tokenizer.json spells it (a space is "Ġ"), or None."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, text: str | bytes, allowed_special: bool = False) -> list[int]:
        """The ids of a text. Special tokens in it become their id if `allowed_special`; else they are plain text."""
        return self.encode_batch([text], allowed_special)[0]

    def encode_batch(self, texts: Iterable[str | bytes], allowed_special: bool = False) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        if isinstance(texts, str | bytes):
            raise TypeError("encode_batch takes a list of texts; encode takes one")
        split = [self._special.split(_to_bytes(t)) if allowed_special else [_to_bytes(t)] for t in texts]
        stream = self.encode_stream(chunk for parts in split for part in parts[::2] for chunk in (part, None))
        results = []
        for parts in split:  # text, special token, text, ..., text
            ids: list[int] = []
            for i, part in enumerate(parts):
                if i % 2:
                    ids.append(self.special_tokens[part.decode()])
                else:
                    while (more := next(stream)) is not None:
                        ids += more
            results.append(ids)
        return results

    def encode_stream(self, chunks: Iterable[bytes | None]) -> Iterator[list[int] | None]:
        """The ids of documents that come in chunks, as from `split_documents`: None ends a document, in and out.

        A document's lists make up the ids of `encode` of all its bytes, wherever the chunks begin. Memory is bounded.
        A last document without its None is not finished: its end is still held back.
        """
        batch: list[str | None] = []
        size = 0
        for piece in _pieces(chunks):
            batch.append(piece)
            size += len(piece or "") + 1
            if size >= _BATCH:
                yield from self._encode_pieces(batch)
                batch, size = [], 0
        yield from self._encode_pieces(batch)

    def _encode_pieces(self, pieces: Sequence[str | None]) -> Iterator[list[int] | None]:
        split = [None if piece is None else _BROKEN.split(piece) for piece in pieces]  # valid, broken, valid, ...
        valid = [run for runs in split if runs for run in runs[::2]]
        encodings = iter(self._tokenizer.encode_batch_fast(valid, add_special_tokens=False))
        for runs in split:
            if runs is None:
                yield None
                continue
            ids: list[int] = []
            for i, run in enumerate(runs):
                if i % 2:
                    ids += [self._byte_ids[byte] for byte in run.encode("utf-8", "surrogateescape")]
                else:
                    ids += next(encodings).ids
            yield ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of some ids. Raises ValueError for an id that is not in the vocabulary."""
        numbers = [index(i) for i in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            at, bad = next((at, i) for at, i in enumerate(numbers) if not 0 <= i < self.vocab_size)
            raise ValueError(f"there is no token {bad} (at position {at}): the ids are 0 to {self.vocab_size - 1}")
        return b"".join([self._bytes[i] for i in numbers])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Bytes that are no text, such as half a character, are shown as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "gptcore.surrogates_or_replace")

    def __repr__(self) -> str:
        special = list(self.special_tokens)
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, special_tokens={special})"


def _to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8", "surrogatepass")
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    raise TypeError(f"a text is str or bytes, not {type(text).__name__}")


def _check_byte_level(state: dict[str, Any], vocab: dict[str, int]) -> None:
    """Raise ValueError unless a tokenizer.json round-trips every text, and no plain text can become a special token."""
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not a byte-level BPE")
    kinds = {repr(_plain(words.__getstate__())): words is _CHARACTERS for words in (_GPT2_WORDS, _CHARACTERS)}
    by_character = kinds.get(repr(_plain(json.dumps(state["pre_tokenizer"]))))
    if by_character is None:
        raise ValueError(
            f"its pre-tokenizer is {state['pre_tokenizer']}, but must be GPT-2's ByteLevel (with its regex, without a "
            "prefix space) or the characters of kind 'char'"
        )
    unset = ["normalizer", "dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    for name in unset if by_character else [*unset, "ignore_merges"]:
        if found := (state | model)[name]:
            raise ValueError(f"its {name} is {found!r}, but must be unset for exact and repeatable ids")
    if by_character and not model["ignore_merges"]:
        raise ValueError("its ignore_merges must be true for kind 'char': a character is a token at once")
    special = [token["content"] for token in state["added_tokens"]]
    for token in state["added_tokens"]:
        if not token["special"] or token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]:
            raise ValueError(f"its added token must be special, and neither strip nor normalise: {token}")
    if missing := [byte for byte in range(256) if _STAND_IN[byte] not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes are not in its vocabulary (the first is {missing[0]:#04x})")
    if strange := [token for token in vocab if token not in special and not (token and _BYTE_OF.keys() >= set(token))]:
        raise ValueError(f"{len(strange)} of its tokens are not made of bytes, such as {strange[0]!r}")
    reachable = {left + right for left, right in model["merges"]} | _BYTE_OF.keys()
    for name in special:
        spelt = bytes(map(_BYTE_OF.__getitem__, name)) if _BYTE_OF.keys() >= set(name) else b""
        if name in reachable or (by_character and len(spelt.decode("utf-8", "ignore")) == 1):
            raise ValueError(f"plain text can become its special token {name!r}; choose another")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"its {len(vocab)} tokens must have the ids 0 to {len(vocab) - 1}, each once, but do not")


def _plain(pre_tokenizer: str | bytes) -> Any:
    """A pre-tokenizer's JSON without trim_offsets, on which no id depends."""
    return json.loads(pre_tokenizer, object_hook=lambda entry: {k: v for k, v in entry.items() if k != "trim_offsets"})
