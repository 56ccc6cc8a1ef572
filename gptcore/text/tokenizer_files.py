"""The files that hold tokenizers, ours and others': what they say, and whether `Tokenizer` can read them exactly.

A tokenizer.json can describe tokenizers of very many kinds; all but the few that are known to the last setting are
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from gptcore.files import read_json
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

UNKNOWN = "<unk>"  # what GPT-1's vocabulary does not have


def read_settings(folder: Path) -> dict[str, Any]:
    """What transformers wrote about special tokens: by now in tokenizer_config.json, formerly in a file of its own."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= read_json(folder / name)
    return {key: value["content"] if isinstance(value, dict) and "content" in value else value
            for key, value in found.items()}  # fmt: skip


def read_vocab(folder: Path) -> tokenizers.Tokenizer:
    """A tokenizer of vocab.json and merges.txt: GPT-2's if the vocabulary has all bytes, else GPT-1's."""
    vocab = read_json(folder / "vocab.json")
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    gpt2 = BYTE_OF.keys() <= vocab.keys()
    settings: dict[str, Any] = {} if gpt2 else {"unk_token": UNKNOWN, "end_of_word_suffix": END_OF_WORD}
    try:
        merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))[1]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, **settings))
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise ValueError(f"with merges.txt it is not a whole vocabulary: {error}") from error
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


def _special_names(folder: Path) -> set[str]:
    """The tokens that transformers' settings name as special, one by one or in lists of further ones."""
    names = set()
    for key, value in read_settings(folder).items():
        if key.endswith("_token"):
            names.add(value)
        elif key.endswith("special_tokens"):
            names |= {token["content"] if isinstance(token, dict) else token for token in value or ()}
        elif key == "added_tokens_decoder":
            names |= {token["content"] for token in value.values() if token["special"]}
    return names


def kind_of(state: dict[str, Any], vocab: dict[str, int]) -> str:
    """ "bpe", "char" or "gpt1". Raises ValueError unless a tokenizer.json is one of these, to the last setting."""
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not a byte-level BPE")
    if model.get("end_of_word_suffix") == END_OF_WORD:
        kind = _check_gpt1(state)
    else:
        kind = _check_byte_level(state, vocab)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"its {len(vocab)} tokens must have the ids 0 to {len(vocab) - 1}, each once, but do not")
    return kind


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
    kinds = {repr(_plain(words.__getstate__())): words is CHARACTERS for words in (GPT2_WORDS, CHARACTERS)}
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


def _plain(pre_tokenizer: str | bytes) -> Any:
    """A pre-tokenizer's JSON without trim_offsets, on which no id depends."""
    return json.loads(pre_tokenizer, object_hook=lambda entry: {k: v for k, v in entry.items() if k != "trim_offsets"})
