"""Read the files of tokenizers, ours and others', and check that `Tokenizer` can reproduce their ids exactly.

A tokenizer.json can describe tokenizers of very many kinds. Only three are read, and any other setting is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from gptcore.files import entry, naming, open_file, parse_json, read_json
from gptcore.hf.gguf_file import GGUFFile
from gptcore.text.pretokenize import (
    BYTE_OF,
    CHARACTERS,
    END_OF_TEXT,
    END_OF_WORD,
    GPT1_TEXT,
    GPT1_WORDS,
    GPT2_WORDS,
    STAND_IN,
)

UNKNOWN = "<unk>"  # stands for text that is not in GPT-1's vocabulary
_SPECIAL_NAME = re.compile(r"<.+>|\[.+\]")  # "<s>", "[PAD]"
_BYTE_LEVEL = (GPT2_WORDS, CHARACTERS)
_OTHER_WORDS = (
    "its pre-tokenizer is {}, but must be GPT-2's ByteLevel (with its regex, without a prefix space) or the characters "
    "of kind 'char'"
)


def parse_tokenizer(text: str | bytes) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json, after a look at what could take memory or time out of proportion.

    Raises ValueError for a damaged file, and for a kind of tokenizer that `Tokenizer` does not read.
    """
    where = "not a whole tokenizer.json: it"
    state = parse_json(text, where)
    model = entry(state, "model", dict[str, Any], where)
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not a byte-level BPE")
    vocab = entry(model, "vocab", dict[str, int], where)
    added = entry({"added_tokens": [], **state}, "added_tokens", list[dict[str, Any]], where)
    _check_ids([*vocab.values(), *(entry(token, "id", int, where) for token in added)], len(vocab) + len(added))
    # Others may hold regular expressions, whose compilation is not bounded
    words, normalizer = state.get("pre_tokenizer"), state.get("normalizer")
    if repr(_plain(words)) not in [repr(_plain(json.loads(w.__getstate__()))) for w in (GPT1_WORDS, *_BYTE_LEVEL)]:
        raise ValueError(_OTHER_WORDS.format(words))
    if normalizer is not None and normalizer != json.loads(GPT1_TEXT.__getstate__()):
        raise ValueError(f"its normalizer is {normalizer!r}, but must be unset for exact and repeatable ids")
    state |= {"truncation": None, "padding": None, "decoder": None}  # of no use here
    with _library("not a whole tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.BPEDecoder(END_OF_WORD) if model.get("end_of_word_suffix") else decoders.ByteLevel()
    ids = tokenizer.get_vocab()
    if wrong := [token for token in added if ids.get(token["content"]) != token["id"]]:
        found, content = ids.get(wrong[0]["content"]), wrong[0]["content"]
        raise ValueError(f"its added token {content!r} has the id {wrong[0]['id']}, but it is token {found}")
    return tokenizer


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Turn what `tokenizers` raises, panics included, which are BaseExceptions, into ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {str(error)!r:.300}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what transformers wrote about special tokens: in tokenizer_config.json, formerly in a file of its own."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if os.path.lexists(folder / name):
            values = read_json(folder / name)
            for key in ("eos_token", "pad_token", "bos_token", "unk_token"):
                if values.get(key) is not None:
                    values[key] = _token(values[key], f"{folder / name}: {key}")
            found |= values
    if os.path.lexists(folder / "chat_template.jinja"):
        with open_file(folder / "chat_template.jinja") as file, naming(folder / "chat_template.jinja"):
            found["chat_template"] = file.read().decode("utf-8")
    return found


def _token(value: Any, where: str) -> str:
    """Return the text of a special token, which files spell as a string or as an object with "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"{where} should be a token, a string or an object with its content, not {value!r:.60}")
    return text


def read_merges(file: Path) -> list[tuple[str, str]]:
    """Return the merges of a merges.txt: a line each, but for the first, which may be a comment."""
    with open_file(file) as opened, naming(file, "is not a list of merges"):
        lines = opened.read().decode("utf-8").split("\n")
    if lines[-1] == "":
        lines.pop()
    merges = []
    for number, line in enumerate(lines, start=1):
        if not (number == 1 and line.startswith("#version")):
            merges.append(_merge(line.removesuffix("\r"), f"{file}, line {number}"))
    return merges


def _merge(text: str, where: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if not left or not right or " " in right:
        raise ValueError(f"{where}: a merge is two tokens with a space between them, not {text!r:.60}")
    return left, right


def read_vocab(folder: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of vocab.json and merges.txt: GPT-2's if the vocabulary has all bytes, else GPT-1's."""
    vocab, added = (
        entry({name: read_json(folder / name)}, name, dict[str, int], folder) if os.path.lexists(folder / name) else {}
        for name in ("vocab.json", "added_tokens.json")
    )
    _check_ids(vocab.values(), len(vocab) + len(added))
    gpt2 = BYTE_OF.keys() <= vocab.keys()
    settings: dict[str, Any] = {} if gpt2 else {"unk_token": UNKNOWN, "end_of_word_suffix": END_OF_WORD}
    merges = read_merges(folder / "merges.txt")
    with _library("with merges.txt it is not a whole vocabulary"):
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, **settings))
    if gpt2:
        tokenizer.pre_tokenizer, tokenizer.decoder = GPT2_WORDS, decoders.ByteLevel()
    else:
        tokenizer.normalizer, tokenizer.pre_tokenizer = GPT1_TEXT, GPT1_WORDS
        tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    in_vocabulary = [token for token in (END_OF_TEXT, UNKNOWN) if token in vocab and (token == END_OF_TEXT) == gpt2]
    special = {*in_vocabulary, *_special_names(folder)}
    for token in [*in_vocabulary, *sorted(added, key=added.__getitem__)]:
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=token in special)])
        if token in added and tokenizer.token_to_id(token) != added[token]:
            raise ValueError(
                f"added_tokens.json gives {token!r} the id {added[token]}, but it is the "
                f"{tokenizer.token_to_id(token)}th of the vocabulary"
            )
    return tokenizer


def read_gguf(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return GPT-2's kind of tokenizer from a GGUF file, and what tokenizer_config.json would say of it."""
    with GGUFFile(file) as opened:
        chat = opened.metadata.get("tokenizer.chat_template")
        values = {name.removeprefix("tokenizer.ggml."): value for name, value in opened.metadata.items()}
    for name, expected in (("model", "gpt2"), ("pre", "gpt-2")):  # kind of tokenizer, and how text is cut into words
        if (found := values.get(name)) != expected:
            raise ValueError(f"its tokenizer.ggml.{name} is {found!r:.60}, expected {expected!r}")
    if adds := [name for name in ("add_bos_token", "add_eos_token", "add_space_prefix") if values.get(name)]:
        raise ValueError(f"its tokenizer.ggml.{adds[0]} is true, but gptcore adds nothing to a text")
    tokens, types = entry(values, "tokens", list[str], file), entry(values, "token_type", list[int], file)
    if len(types) != len(tokens) or len(set(tokens)) < len(tokens):
        raise ValueError(f"its {len(tokens)} tokens are {len(set(tokens))} different ones, and have {len(types)} types")
    normal, control, user_defined, unused = 1, 3, 4, 5  # gguf.TokenType
    if strange := set(types) - {normal, control, user_defined, unused}:
        raise ValueError(f"its tokens have the type {min(strange)}, expected 1, 3, 4 or 5")
    while types and types[-1] == unused:  # they fill the vocabulary up to that of the model
        types.pop()
    known = tokens[: len(types)]
    options = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = [
        {"id": i, "content": token, "special": kind != user_defined, **options}
        for i, (token, kind) in enumerate(zip(known, types, strict=True))
        if kind != normal
    ]
    merges = [
        list(_merge(text, f"{file}, merge {i}")) for i, text in enumerate(entry(values, "merges", list[str], file))
    ]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(known)}, "merges": merges}
    words = json.loads(GPT2_WORDS.__getstate__())
    tokenizer = parse_tokenizer(json.dumps({"added_tokens": added, "pre_tokenizer": words, "model": model}))
    settings = {"chat_template": chat}
    for ours, theirs in (("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        if (number := entry({theirs: None, **values}, theirs, int | None, file)) is not None:
            if not 0 <= number < len(known):
                raise ValueError(f"its {theirs} is {number:,}, expected one of its {len(known):,} tokens")
            settings[ours] = known[number]
    return tokenizer, settings


def _special_names(folder: Path) -> set[str]:
    """Return the tokens that transformers' settings name as special, one by one or in lists of further ones."""
    names = set()
    for key, value in read_settings(folder).items():
        where = f"{folder / 'tokenizer_config.json'}: {key}"
        if key == "added_tokens_decoder":
            for token in entry({key: value}, key, dict[str, dict[str, Any]], folder / "tokenizer_config.json").values():
                if token.get("special"):
                    names.add(_token(token, where))
        elif key.endswith("special_tokens"):
            names |= {_token(token, where) for token in (value.values() if isinstance(value, dict) else value or ())}
        elif key.endswith("_token") and isinstance(value, str | dict):  # "add_bos_token" is a bool
            names.add(_token(value, where))
    return names


def _check_ids(ids: Collection[int], count: int) -> None:
    """Raise ValueError for an id that is far beyond the number of tokens, before memory is taken for it."""
    if not ids or min(ids) < 0 or max(ids) >= count:
        found = f"{min(ids)} to {max(ids)}" if ids else "missing"
        raise ValueError(f"its {count} tokens must have the ids 0 to {count - 1}, each once, but they are {found}")


def kind_of(state: dict[str, Any], vocab: dict[str, int]) -> str:
    """Return "bpe", "char" or "gpt1". Raises ValueError unless every setting of a tokenizer.json is one of these."""
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not a byte-level BPE")
    if model.get("end_of_word_suffix") == END_OF_WORD:
        kind = _check_gpt1(state)
    else:
        kind = _check_byte_level(state, vocab)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"its {len(vocab)} tokens must have the ids 0 to {len(vocab) - 1}, each once, but do not")
    if kind != "char":
        _check_merges(state, vocab)
    return kind


def _check_merges(state: dict[str, Any], vocab: dict[str, int]) -> None:
    """Raise ValueError if a merge is missing, as from a merges.txt that is cut off: each token is made by one.

    Exceptions are single characters, added tokens, and names of special tokens that a vocabulary begins with.
    """
    merges = state["model"]["merges"]
    made = {left + right for left, right in merges} | {token["content"] for token in state["added_tokens"]}
    longer = (token for token in vocab if len(token.removesuffix(END_OF_WORD)) > 1)
    missing = [token for token in longer if token not in made and not _SPECIAL_NAME.fullmatch(token)]
    if missing:
        raise ValueError(
            f"no merge makes {len(missing)} of its tokens, such as {missing[0]!r}: its vocabulary needs "
            f"{len(merges) + len(missing)} merges, but there are {len(merges)}; the merges are cut off, or these "
            "tokens should be among the added ones"
        )


def _check_gpt1(state: dict[str, Any]) -> str:
    """Raise ValueError unless a tokenizer.json with GPT-1's end of words is GPT-1's in all else. Returns the kind."""
    expected = {
        "normalizer": json.loads(GPT1_TEXT.__getstate__()),
        "pre_tokenizer": json.loads(GPT1_WORDS.__getstate__()),
        "unk_token": UNKNOWN,
    }
    found = state | state["model"]
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(f"its {name} is {found[name]!r}, but GPT-1's is {value!r}")
    for name in ("dropout", "continuing_subword_prefix", "fuse_unk", "byte_fallback", "ignore_merges"):
        if found.get(name):
            raise ValueError(f"its {name} is {found[name]!r}, but GPT-1's is unset")
    _check_added(state, only_special=True)
    if UNKNOWN not in [token["content"] for token in state["added_tokens"]]:
        raise ValueError(f"its special tokens must have {UNKNOWN!r} among them, for what is not in the vocabulary")
    return "gpt1"


def _check_added(state: dict[str, Any], only_special: bool) -> None:
    for token in state["added_tokens"]:
        normalized = token["normalized"] and state["normalizer"] is not None
        if token["lstrip"] or token["rstrip"] or token["single_word"] or normalized:
            raise ValueError(f"its added token must neither strip, nor normalise, nor ask for a single word: {token}")
        if only_special and not token["special"]:
            raise ValueError(f"its added token must be special in a tokenizer of this kind: {token}")


def _check_byte_level(state: dict[str, Any], vocab: dict[str, int]) -> str:
    """Raise ValueError unless a tokenizer.json round-trips every text, and no plain text can become a special token.

    Returns the kind, "bpe" or "char".
    """
    model = state["model"]
    kinds = {repr(_plain(json.loads(words.__getstate__()))): words is CHARACTERS for words in _BYTE_LEVEL}
    by_character = kinds.get(repr(_plain(state["pre_tokenizer"])))
    if by_character is None:
        raise ValueError(_OTHER_WORDS.format(state["pre_tokenizer"]))
    unset = ["normalizer", "dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    for name in unset if by_character else [*unset, "ignore_merges"]:
        if found := (state | model)[name]:
            raise ValueError(f"its {name} is {found!r}, but must be unset for exact and repeatable ids")
    if by_character and not model["ignore_merges"]:
        raise ValueError("its ignore_merges must be true for kind 'char': a character is a token at once")
    _check_added(state, only_special=by_character)
    added = {token["content"]: token["special"] for token in state["added_tokens"]}
    if missing := [byte for byte in range(256) if STAND_IN[byte] not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes are not in its vocabulary (the first is {missing[0]:#04x})")
    if strange := [token for token in vocab if token not in added and not (token and BYTE_OF.keys() >= set(token))]:
        raise ValueError(f"{len(strange)} of its tokens are not made of bytes, such as {strange[0]!r}")
    reachable = {left + right for left, right in model["merges"]} | BYTE_OF.keys()
    for name, is_special in added.items():
        spelt = bytes(map(BYTE_OF.__getitem__, name)) if BYTE_OF.keys() >= set(name) else b""
        if not is_special and spelt == name.encode():
            continue  # plain text that becomes it means the same bytes
        if name in reachable or (by_character and len(spelt.decode("utf-8", "ignore")) == 1):
            raise ValueError(f"plain text can become its added token {name!r}; choose another")
    return "char" if by_character else "bpe"


def _plain(part: Any) -> Any:
    """Return a pre-tokenizer with its defaults and without trim_offsets, on which no id depends."""
    if isinstance(part, list):
        return [_plain(value) for value in part]
    if not isinstance(part, dict):
        return part
    defaults = {"add_prefix_space": True, "use_regex": True} if part.get("type") == "ByteLevel" else {}
    return {key: _plain(value) for key, value in sorted((defaults | part).items()) if key != "trim_offsets"}
