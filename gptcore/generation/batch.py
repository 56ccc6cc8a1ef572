"""Rows of text that grow by a token a step, each by its own settings; rows come and go between steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gptcore.generation.cache import KVCache
from gptcore.generation.prompts import EMPTY
from gptcore.generation.sampling import Settings, limit_repetition, limits, sample, whole_number
from gptcore.generation.step import first_logits, next_logits
from gptcore.inputs import check_one_dtype
from gptcore.modes import module_mode
from gptcore.ops.documents import assume_valid

if TYPE_CHECKING:
    from gptcore.model import GPT

NOT_FINITE, NONE_LEFT = -1, -2  # in place of a token


class Token(NamedTuple):
    """A token that a step has added to a row, or the error that ended the row instead."""

    row: int  # as Batch.add returned it
    token: int  # -1 with an error
    finish_reason: str | None = None  # "stop" after the end token, "length" after max_new_tokens, "error", or None
    error: Exception | None = None


class Batch:
    """Continues rows of text together: `add` a prompt, `step` for a token a row, `drop` a row.

    A step reads a prompt that was added before it, and yields its first token; for all other rows it is one forward
    pass over a token a row. In float32 a row gets the same greedy tokens as alone; its draws depend on its seed alone.
    A row whose logits are not finite, or that its limits leave no token, ends with an error; the others continue.
    Not safe with threads: one thread adds, steps and drops.

    vocab_size: of the tokenizer, if the model's was padded to a round number: no token from there on is ever taken.
    use_cache: False computes every row from its beginning in each step, slowly, as a check.
    """

    def __init__(self, model: GPT, *, vocab_size: int | None = None, use_cache: bool = True) -> None:
        limit = model.config.vocab_size
        if vocab_size is not None and not 1 <= (vocab_size := whole_number("vocab_size", vocab_size, 1)) <= limit:
            raise ValueError(f"vocab_size {vocab_size} should be between 1 and the model's {limit} tokens")
        check_one_dtype(dict(model.named_parameters()))
        self.model, self.vocab_size, self.use_cache = model, vocab_size, use_cache
        self._modules, self._device = list(model.modules()), next(model.parameters()).device
        self._rows: list[_Row] = []  # in the order of the cache's
        self._waiting: list[_Row] = []  # whose prompts the next step reads
        self._cache = KVCache(0)
        self._next_row = 0

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting)

    def add(self, prompt: Sequence[int], settings: Settings) -> int:
        """Add a row; return its number, which no other row of this batch ever has.

        Raises ValueError for tokens outside the vocabulary and for more tokens than the model has positions.
        """
        row = _Row(self._next_row, list(prompt), settings, self.model, self._device)
        self._waiting.append(row)
        self._next_row += 1
        return row.number

    def step(self) -> list[Token]:
        """Add a token to every row; return the tokens. Rows that are finished leave the batch.

        The only transfer from the device to the host is that of the tokens.
        """
        if not len(self):
            return []
        training = any(module.training for module in self._modules)
        with module_mode(self.model, training=False) if training else contextlib.nullcontext(), torch.no_grad():
            chosen = self._choose(self._next_logits()).tolist()
        tokens = [row.take(token) for row, token in zip(self._rows, chosen, strict=True)]
        for token in tokens:
            if token.finish_reason is not None:
                self.drop(token.row)
        return tokens

    def drop(self, row: int) -> None:
        """Remove a row before its end. Raises KeyError for a row that is not in the batch."""
        for index, waiting in enumerate(self._waiting):
            if waiting.number == row:
                del self._waiting[index]
                return
        index = next((index for index, other in enumerate(self._rows) if other.number == row), -1)
        if index < 0:
            raise KeyError(f"row {row} is not in this batch: it has ended, was dropped, or was never added")
        last = self._rows.pop()
        if index < len(self._rows):
            self._rows[index] = last
        if self.use_cache:
            self._cache.drop(index)

    def _next_logits(self) -> Tensor:
        """Return float32 logits (rows, V) for the next token of each row, after adding the waiting rows."""
        logits, old, new = [], self._rows, self._waiting
        fresh = KVCache(0)
        if not self.use_cache:
            logits.append(self._read(old + new, None))
        elif new:  # the rows' own cache if there is no other, else only until it is copied
            lengths = [len(row.tokens) for row in new]
            fresh = KVCache(max(lengths) if old else max(row.capacity for row in new), lengths)
            logits.append(self._read(new, fresh))
        if self.use_cache and old:
            logits.insert(0, next_logits(self.model, [row.tokens[-1] for row in old], self._cache))
        if fresh.lengths and old:
            self._cache.capacity = max(self._cache.capacity, *(row.capacity for row in new))
            self._cache.extend(fresh)
        elif fresh.lengths:
            self._cache = fresh
        self._rows, self._waiting = old + new, []
        return torch.cat(logits)[:, : self.vocab_size].float()

    def _read(self, rows: list[_Row], cache: KVCache | None) -> Tensor:
        """Return logits (rows, V) after the whole text of each row, packed if their lengths differ; fills the cache."""
        if cache is not None and (logits := first_logits(self.model, [row.tokens for row in rows], cache)) is not None:
            return logits
        lengths = [len(row.tokens) for row in rows]
        if len(set(lengths)) == 1:
            ids = torch.tensor([row.tokens for row in rows], device=self._device)
            return self.model(ids, cache=cache, logits_to_keep=1).logits[:, -1]
        packed = torch.tensor([[token for row in rows for token in row.tokens]], device=self._device)
        cu_seqlens = torch.tensor([0, *lengths], device=self._device).cumsum(0)
        assume_valid(cu_seqlens, cu_seqlens, 1, sum(lengths), sum(lengths))  # a check would wait for the device
        return self.model(packed, cu_seqlens=cu_seqlens, cache=cache, logits_to_keep=cu_seqlens[1:] - 1).logits[0]

    def _choose(self, logits: Tensor) -> Tensor:
        """Return the next token of each row, (rows,), from logits (rows, V), or NOT_FINITE or NONE_LEFT."""
        finite = logits.isfinite().all(-1)
        for index, row in enumerate(self._rows):
            if row.ids is not None:
                logits[index] = limit_repetition(logits[index], row.ids[: len(row.tokens)], row.settings)
            if row.new < row.settings.min_new_tokens and 0 <= row.eos_token_id < logits.shape[1]:
                logits[index, row.eos_token_id] = -torch.inf
        tokens = logits.argmax(-1)
        drawn: dict[object, list[int]] = {}  # together where the order of the tokens, which depends on k, is the same
        for index, row in enumerate(self._rows):
            if row.settings.do_sample:
                top_k = row.settings.top_k
                drawn.setdefault((top_k, limits(top_k, row.settings.top_p)), []).append(index)
        for members in drawn.values():
            rows = [self._rows[index] for index in members]
            some = logits if len(members) == len(self._rows) else logits[members]
            tokens[members] = sample(
                some, [row.generator for row in rows], [row.settings.temperature for row in rows],
                rows[0].settings.top_k, [row.settings.top_p for row in rows],
            )  # fmt: skip
        for index, row in enumerate(self._rows):
            if row.ids is not None:
                row.ids[len(row.tokens)] = tokens[index]
        tokens = tokens.masked_fill(logits.amax(-1) == -torch.inf, NONE_LEFT)
        return tokens.masked_fill(~finite, NOT_FINITE)


class _Row:
    """A text, how it is continued, and what its next token depends on beside the logits."""

    def __init__(self, number: int, prompt: list[int], settings: Settings, model: GPT, device: torch.device) -> None:
        config, new = model.config, settings.max_new_tokens
        if not prompt:
            raise ValueError(EMPTY)
        if (wrong := next((token for token in prompt if not 0 <= token < config.vocab_size), None)) is not None:
            raise ValueError(f"token {wrong} is outside the vocabulary of {config.vocab_size} tokens")
        self.capacity = len(prompt) + new - 1  # the last new token is never an input
        if self.capacity > config.n_positions:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {new} new ones need {self.capacity} positions, "
                f"but this model has {config.n_positions} positions"
            )
        eos = settings.eos_token_id if settings.eos_token_id is not None else config.eos_token_id
        self.eos_token_id = -1 if eos is None else eos
        if self.eos_token_id >= config.vocab_size:
            raise ValueError(f"eos_token_id {eos} is outside the vocabulary of {config.vocab_size} tokens")
        self.number, self.tokens, self.settings, self.new = number, prompt, settings, 0
        self.generator = torch.Generator(device) if settings.do_sample else torch.default_generator
        if settings.do_sample:
            self.generator.manual_seed(self.generator.seed() if settings.seed is None else settings.seed)
        self.ids: Tensor | None = None  # the tokens on the device, where limits on repetition read them
        if settings.limits_repetition:
            self.ids = torch.empty(len(prompt) + new, dtype=torch.int64, device=device)
            self.ids[: len(prompt)] = torch.tensor(prompt, device=device)

    def take(self, token: int) -> Token:
        """Add a token, or NOT_FINITE or NONE_LEFT, to the row."""
        if token < 0:
            here = f"token {len(self.tokens)}"
            error = (
                FloatingPointError(f"logits for {here} are not finite: the model's weights are damaged")
                if token == NOT_FINITE
                else ValueError(f"no token is left that could be {here}: loosen the limits on repetition")
            )
            return Token(self.number, -1, "error", error)
        self.tokens.append(token)
        self.new += 1
        reason = (
            "stop" if token == self.eos_token_id else "length" if self.new == self.settings.max_new_tokens else None
        )
        return Token(self.number, token, reason)
