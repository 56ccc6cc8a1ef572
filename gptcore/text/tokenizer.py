"""Convert text to token ids and back, for every string and every byte: byte-level BPE and characters.

`tokenizers` runs both kinds, one model over bytes (Radford et al. 2019, section 2.2). The text is cut into pre-tokens:
by GPT-2's regular expression (kind "bpe"), or at every character (kind "char"). A pre-token starts as its UTF-8 bytes,
which merges join into longer tokens; a character that was seen in training is a token at once. All 256 bytes are
tokens, so every text can be encoded. GPT-1's tokenizer (kind "gpt1") is read too. It is the one that does not decode to
the same text: it folds case, accents and white space, and text that is not in its vocabulary becomes <unk>.

What `tokenizers` does not take is handled here. Bytes that are not UTF-8 become their byte tokens directly, and the
valid text on either side is encoded by itself. A lone surrogate in a str is its three bytes of "surrogatepass", and a
pair of surrogates is the character that it stands for. A long text is encoded in pieces (see `pretokenize.py`), which
bounds memory. The ids are those of the whole: `encode`, `encode_batch` and `encode_stream`, in chunks of any size,
always agree. Only a word that is longer than a piece stays whole, and takes memory in proportion, where it is GPT-1's,
the merges are not `in_order`, or there are added tokens.

Added tokens that are not special (transformers' `add_tokens`) stand for themselves in every text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import tokenizers
import torch

from gptcore.files import PathLike, atomic_file, naming, open_file, write_json
from gptcore.hf.gguf_file import is_gguf
from gptcore.hf.hub import find_folder
from gptcore.text.offsets import byte_offsets, folded_offsets, in_original, join_surrogates
from gptcore.text.pretokenize import (
    BROKEN,
    BYTE_OF,
    END_OF_TEXT,
    END_OF_WORD,
    SAFE_CUT,
    STAND_IN,
    check_text_file,
    cut_in_word,
    end_of_a_word,
    in_order,
    pieces,
)
from gptcore.text.tokenizer_files import UNKNOWN, kind_of, parse_tokenizer, read_gguf, read_settings, read_vocab
from gptcore.text.training import learn_characters, learn_merges

Made = TypeVar("Made", bound="Tokenizer")
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
         "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
_BATCH = 1 << 20  # characters encoded by one call, on as many threads as `tokenizers` takes


def _surrogates_or_replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Decode the three bytes of a surrogate to that surrogate, other bytes that are not UTF-8 to U+FFFD."""
    try:
        return codecs.lookup_error("surrogatepass")(error)
    except UnicodeError:
        return codecs.replace_errors(error)


codecs.register_error("gptcore.surrogates_or_replace", _surrogates_or_replace)


class Tokenizer:
    """A byte-level tokenizer: `train` one, or `from_pretrained` a folder with a tokenizer.json.

    `decode_bytes(encode(data)) == data` for all bytes and `decode(encode(text)) == text` for all str, broken or not,
    except that a pair of surrogates becomes its character. Special tokens in a text are plain text unless the caller of
    `encode` allows them, so that no prompt can forge one.
    """

    special_in_text = False  # whether `encode` allows them where its caller does not say

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers.Tokenizer`. Raises ValueError for one that cannot keep the promises above."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        state = json.loads(tokenizer.to_str())
        vocab = tokenizer.get_vocab()
        self.kind = kind_of(state, vocab)
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # as plain text: `encode` finds those allowed by itself
        if count := tokenizer.num_special_tokens_to_add(is_pair=False):
            raise ValueError(
                f"its post-processor adds {count} special tokens to every text, but gptcore adds none; to encode texts "
                "without them, set post_processor in tokenizer.json to null"
            )
        tokens = state["added_tokens"]
        self._added: dict[str, int] = {token["content"]: token["id"] for token in tokens}
        self.special_tokens: dict[str, int] = {token["content"]: token["id"] for token in tokens if token["special"]}
        self._plain = sorted(self._added.keys() - self.special_tokens.keys())  # these are found in every text
        # All that ids depend on, however a file spells it
        merges = [list(merge) for merge in state["model"]["merges"]]
        whole = [self.kind, vocab, merges, self.special_tokens, *self._plain]
        self.fingerprint = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        self._eos_token = END_OF_TEXT if END_OF_TEXT in self.special_tokens else None
        self._pad_token: str | None = None
        self.padding_side = "right"  # of what `__call__` gives; generation needs "left"
        self.chat_template: str | None = None  # in Jinja, never run here: see gptcore.text.chat
        self._bytes = [b""] * len(vocab)  # of each id
        for token, i in vocab.items():
            if token in self._added:
                self._bytes[i] = token.encode()
            elif self.kind == "gpt1":
                self._bytes[i] = token.replace(END_OF_WORD, " ").encode()
            else:
                self._bytes[i] = bytes(map(BYTE_OF.__getitem__, token))
        self._cuts_words = self.kind == "bpe" and in_order(merges)
        self._longest = max(map(len, self._bytes))
        self._byte_ids = [vocab[UNKNOWN if self.kind == "gpt1" else STAND_IN[byte]] for byte in range(256)]
        # The longest token wins, as in `tokenizers`, which looks for those with "normalized" later, in what is left
        first = [token["content"] for token in tokens if token["special"] or not token["normalized"]]
        names = sorted(map(re.escape, first), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(names) or '(?!)'})".encode())

    @classmethod
    def train(
        cls,
        files: PathLike | Sequence[PathLike],
        vocab_size: int | None = None,
        *,
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
        if kind == "char":
            if vocab_size is not None:
                raise ValueError(f"vocab_size={vocab_size} with kind='char': there the text decides; leave it out")
            return cls(learn_characters(paths, special))
        if kind == "bpe":
            return cls(learn_merges(paths, vocab_size, special))
        raise ValueError(f"kind must be 'bpe' or 'char', not {kind!r}")

    @classmethod
    def from_pretrained(cls: type[Made], path: PathLike) -> Made:
        """Load a tokenizer: ours, GPT-2's or GPT-1's.

        Args:
            path: a folder with tokenizer.json, or with vocab.json and merges.txt, as transformers writes them; or a
                tokenizer.json or a NAME.gguf; or, as a str, a name on the Hugging Face Hub (see `gptcore.hf.hub`).

        Raises FileNotFoundError, or ValueError for a file that is damaged or not a tokenizer of these kinds.
        """
        if is_gguf(path) or (os.path.lexists(path) and not Path(path).is_dir()):
            return cls._load(Path(path), Path(path))
        folder = find_folder(path, FILES)
        if os.path.lexists(folder / "tokenizer.json"):
            return cls._load(folder / "tokenizer.json", folder)
        if os.path.lexists(folder / "vocab.json") and os.path.lexists(folder / "merges.txt"):
            return cls._load(folder / "vocab.json", folder)
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no tokenizer.json, nor vocab.json and merges.txt, but {found}")

    @classmethod
    def _load(cls: type[Made], file: Path, folder: Path) -> Made:
        with naming(file, "cannot be used"):
            settings = read_settings(folder) if folder.is_dir() else {}
            if is_gguf(file):
                tokenizer, settings = read_gguf(file)
            elif file.name == "vocab.json":
                tokenizer = read_vocab(folder)
            else:
                with open_file(file) as opened:
                    tokenizer = parse_tokenizer(opened.read())
            made = cls(tokenizer)
            made._configure(settings)
            return made

    @classmethod
    def _restore(cls: type[Made], text: str, settings: dict[str, Any]) -> Made:
        made = cls(parse_tokenizer(text))
        made._configure(settings)
        return made

    def _configure(self, settings: dict[str, Any]) -> None:
        """Take what tokenizer_config.json says beside the vocabulary."""
        self.padding_side = _side(settings.get("padding_side") or "right")
        self.pad_token = settings.get("pad_token")
        chat = settings.get("chat_template")
        self.chat_template = chat if isinstance(chat, str) else None  # not one of several by name
        for name in ("add_prefix_space", "add_bos_token"):
            if settings.get(name):
                raise ValueError(f"its tokenizer_config.json has {name}: true, but gptcore adds nothing to a text")
        if settings.get("eos_token") is not None:
            self._eos_token = self._known_special("eos_token", settings["eos_token"])

    def _settings(self) -> dict[str, Any]:
        chat = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {"eos_token": self.eos_token, "pad_token": self.pad_token, "padding_side": self.padding_side, **chat}

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str, dict[str, Any]]]:
        return self._restore, (self._tokenizer.to_str(), self._settings())  # `tokenizers` would forget one setting

    def save_pretrained(self, path: PathLike) -> Path:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them, into the folder `path`.

        Each is written whole or not at all. Returns tokenizer.json.
        """
        file = Path(path) / "tokenizer.json"
        unknown = {"unk_token": UNKNOWN} if self.kind == "gpt1" else {}
        # The class that takes tokenizer.json as it is; transformers' GPT2Tokenizer opens it as well
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **unknown, **self._settings()}
        config |= {"bos_token": self.eos_token, "clean_up_tokenization_spaces": False}
        with atomic_file(file) as aside:
            aside.write_text(self._tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
            write_json(file.with_name("tokenizer_config.json"), config)
        return file

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, special ones included; the ids are 0 to vocab_size - 1."""
        return len(self._bytes)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eos_token(self) -> str | None:
        """Return the special token that ends a text: what the files say, else "<|endoftext|>" if that is one here."""
        return self._eos_token

    @property
    def eos_token_id(self) -> int | None:
        return None if self._eos_token is None else self.special_tokens[self._eos_token]

    @property
    def pad_token(self) -> str | None:
        """Return the special token that fills a batch; None means the end-of-text token. It must be special."""
        return self._pad_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self._pad_token = None if token is None else self._known_special("pad_token", token)

    @property
    def pad_token_id(self) -> int | None:
        return self.eos_token_id if self._pad_token is None else self.special_tokens[self._pad_token]

    def _known_special(self, name: str, token: str) -> str:
        if token not in self.special_tokens:
            raise ValueError(f"{name} {token!r} is not one of the special tokens, {list(self.special_tokens)}")
        return token

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as tokenizer.json spells it (a space is "Ġ"), or None."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        """Return a token as tokenizer.json spells it, or None."""
        return self._tokenizer.id_to_token(id)

    @overload
    def encode(
        self, text: str | bytes, allowed_special: bool | None = ..., *, return_tensors: None = ...
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: str | bytes, allowed_special: bool | None = ..., *, return_tensors: Literal["pt"]
    ) -> torch.Tensor: ...
    def encode(
        self, text: str | bytes, allowed_special: bool | None = None, *, return_tensors: Literal["pt"] | None = None
    ) -> list[int] | torch.Tensor:
        """Return the ids of a text; with return_tensors="pt" as an int64 tensor (1, length).

        Special tokens in it become their id if `allowed_special`; else they are plain text. None means what the class
        says, `special_in_text`.
        """
        ids = self.encode_batch([text], allowed_special)[0]
        if _tensors(return_tensors):
            return torch.tensor([ids], dtype=torch.int64)
        return ids

    def __call__(
        self,
        text: str | bytes | Sequence[str | bytes],
        *,
        padding: bool | Literal["longest", "max_length", "do_not_pad"] = False,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: Literal["left", "right"] | None = None,
        return_tensors: Literal["pt"] | None = None,
        return_offsets_mapping: bool = False,
        allowed_special: bool | None = None,
    ) -> dict[str, Any]:
        """Return what a model takes, for one text or several: ids, and a mask with 1 on tokens and 0 on padding.

        Args:
            text: one text gives plain rows, several a list of rows; in tensors, both have a first dimension for them.
            padding: fill rows with `pad_token_id` up to the longest (True or "longest") or to "max_length".
            truncation: leave out all tokens after the first max_length.
            padding_side: None means the attribute of this name.
            return_tensors: "pt" for int64 tensors instead of lists.
            return_offsets_mapping: where each token is in the text: [start, end) in characters. Tokens that share a
                character all have it; padding has (0, 0).
            allowed_special: as in `encode`.

        Returns {"input_ids", "attention_mask"} and with offsets "offset_mapping". Raises ValueError for arguments that
        cannot be met together, and for rows of different lengths that should make a tensor.
        """
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding {padding!r} should be False, True, 'longest', 'max_length' or 'do_not_pad'")
        if not isinstance(truncation, bool):
            raise ValueError(f"truncation {truncation!r} should be True or False: there is one way to cut a text off")
        if (truncation or padding == "max_length") != (max_length is not None):
            raise ValueError(
                f"max_length={max_length} with truncation={truncation} and padding={padding!r}: a length is for "
                "truncation=True or padding='max_length', and they need one"
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length should be at least 1, not {max_length}")
        left = _side(padding_side or self.padding_side) == "left"
        single = isinstance(text, str | bytes | bytearray | memoryview)
        texts: Sequence[Any] = [text] if single else text
        rows = [ids[:max_length] if truncation else ids for ids in self.encode_batch(texts, allowed_special)]
        length = 0  # no row is shorter
        if padding in (True, "longest"):
            length = max(map(len, rows), default=0)
        elif padding == "max_length":
            length = max_length or 0
        fill = [max(0, length - len(row)) for row in rows]
        if any(fill) and self.pad_token_id is None:
            raise ValueError(f"there is no token to pad with: set pad_token to one of {list(self.special_tokens)}")

        def padded(rows: list[list[Any]], value: Any) -> list[list[Any]]:
            return [[value] * n + r if left else r + [value] * n for n, r in zip(fill, rows, strict=True)]

        result = {
            "input_ids": padded(rows, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
        }
        if return_offsets_mapping:
            offsets = [self._offsets(text, row, allowed_special) for text, row in zip(texts, rows, strict=True)]
            result["offset_mapping"] = padded(offsets, (0, 0))
        if _tensors(return_tensors):
            if len(lengths := {len(row) for row in result["input_ids"]}) > 1:
                raise ValueError(f"rows of {min(lengths)} to {max(lengths)} tokens make no tensor: give padding=True")
            shape = (len(rows), *lengths)
            return {
                name: torch.tensor(value, dtype=torch.int64).reshape(shape + (2,) * (name == "offset_mapping"))
                for name, value in result.items()
            }
        return {name: value[0] for name, value in result.items()} if single else dict(result)

    def _offsets(self, text: Any, ids: Sequence[int], allowed_special: bool | None) -> list[tuple[int, int]]:
        """Return for each token the characters [start, end) that it comes from."""
        if not isinstance(text, str):
            raise ValueError("offsets are for str: they count characters")
        joined = join_surrogates(text)
        data = _to_bytes(joined)
        if self.kind == "gpt1":
            encode = functools.partial(self._tokenizer.encode, add_special_tokens=False)
            found = folded_offsets(self._split_special(data, allowed_special), self._cut, encode)
        else:
            found = byte_offsets(data, (len(self._bytes[i]) for i in ids))
        return in_original(found[: len(ids)], text, joined)

    def _split_special(self, data: bytes, allowed: bool | None) -> list[bytes]:
        """Return text, special token, text, ..., text; all of it is text unless special tokens are allowed."""
        return self._special.split(data) if (self.special_in_text if allowed is None else allowed) else [data]

    def encode_batch(self, texts: Iterable[str | bytes], allowed_special: bool | None = None) -> list[list[int]]:
        """Return `encode` of each text, computed on several threads."""
        if isinstance(texts, str | bytes):
            raise TypeError("encode_batch takes a list of texts; encode takes one")
        split = [self._split_special(_to_bytes(text), allowed_special) for text in texts]
        stream = self.encode_stream(chunk for parts in split for part in parts[::2] for chunk in (part, None))
        results = []
        for parts in split:
            ids: list[int] = []
            for i, part in enumerate(parts):
                if i % 2:
                    ids.append(self._added[part.decode()])
                else:
                    while (more := next(stream)) is not None:
                        ids += more
            results.append(ids)
        return results

    def encode_stream(self, chunks: Iterable[bytes | None]) -> Iterator[list[int] | None]:
        """Yield the ids of documents that come in chunks, as from `split_documents`: None ends a document, in and out.

        A document's lists make up the ids of `encode` of all its bytes, wherever the chunks begin. Memory is bounded.
        A last document without its None is not finished: its end is still held back.
        """
        batch: list[str | None] = []
        size = 0
        for piece in pieces(chunks, self._cut):
            batch.append(piece)
            size += len(piece or "") + 1
            if size >= _BATCH:
                yield from self._encode_pieces(batch)
                batch, size = [], 0
        yield from self._encode_pieces(batch)

    def _cut(self, beginning: str) -> int | None:
        """Return a place that no token crosses for any continuation of `beginning`, or None if none is found."""
        if self.kind == "char":
            return len(beginning) - 1
        end = len(beginning) - max(map(len, self._plain), default=0)  # an added token may continue after `beginning`
        while match := SAFE_CUT.match(beginning, 0, end):
            place = match.end()
            if not any(beginning[max(0, place - len(t) + 1) : place + len(t) - 1].count(t) for t in self._plain):
                return place
            end = place - 1
        if self.kind == "gpt1" or self._plain:  # words are those of a text that is changed, or divided, first
            return None
        if word_end := end_of_a_word(beginning):
            return word_end
        return cut_in_word(beginning[:-3], self._tokenizer.model, self._longest) if self._cuts_words else None

    def _encode_pieces(self, batch: Sequence[str | None]) -> Iterator[list[int] | None]:
        split = [None if piece is None else BROKEN.split(piece) for piece in batch]  # valid, broken, valid, ...
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
        """Return the exact bytes of some ids. Raises ValueError for an id that is not in the vocabulary."""
        numbers = [index(i) for i in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            at, bad = next((at, i) for at, i in enumerate(numbers) if not 0 <= i < self.vocab_size)
            raise ValueError(f"there is no token {bad} (at position {at}): the ids are 0 to {self.vocab_size - 1}")
        data = b"".join([self._bytes[i] for i in numbers])
        if self.kind == "gpt1" and numbers and numbers[-1] not in self.special_tokens.values():
            return data.removesuffix(b" ")  # between words there is one, but not after the last
        return data

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of some ids. Bytes that are not UTF-8, such as half a character, are shown as U+FFFD."""
        if skip_special_tokens:
            special = set(self.special_tokens.values())
            ids = [i for i in map(index, ids) if i not in special]
        return self.decode_bytes(ids).decode("utf-8", "gptcore.surrogates_or_replace")

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """Return `decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __repr__(self) -> str:
        special = list(self.special_tokens)
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, special_tokens={special})"


def _to_bytes(text: str | bytes) -> bytes:
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError:
            return join_surrogates(text).encode("utf-8", "surrogatepass")
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    raise TypeError(f"a text is str or bytes, not {type(text).__name__}")


def _tensors(return_tensors: str | None) -> bool:
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors {return_tensors!r} should be None for lists, or 'pt' for PyTorch")
    return return_tensors is not None


def _side(side: str) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"padding_side {side!r} should be 'left' or 'right'")
    return side
