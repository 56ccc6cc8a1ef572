"""The model that a server serves, and what all routes ask of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gptcore.serving.engine import Engine
from gptcore.serving.errors import Problem
from gptcore.serving.limits import Limits
from gptcore.serving.metrics import Metrics
from gptcore.text.chat import Template
from gptcore.text.tokenizer import Tokenizer


@dataclass
class Served:
    """A model under a name, its adapters under theirs, its tokenizer and its engine.

    generates: whether it continues texts; a model with a head for a task does not.
    """

    name: str
    tokenizer: Tokenizer
    positions: int
    vocab_size: int
    limits: Limits
    engine: Engine
    adapters: Sequence[str] = ()
    template: Template | None = None
    generates: bool = True
    routes: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.stats)
        spelled = [self.tokenizer.decode_bytes([token]) for token in range(self.tokenizer.vocab_size)]
        self._longest = max(map(len, spelled))

    def close(self) -> None:
        """End the engine and its thread."""
        self.engine.close(1.0)

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that a request names as its model, or None for the base. Raises Problem for others."""
        if model == self.name:
            return None
        if model in self.adapters:
            return model
        known = ", ".join([self.name, *self.adapters])
        raise Problem(
            404, f"there is no model {ascii(model)[:80]} here, but {known}", param="model", code="model_not_found"
        )

    def check_length(self, text: str, param: str) -> None:
        """Raise Problem for a text that cannot fit: GPT-1's aside, no token has more characters than bytes."""
        least = len(text) // self._longest
        if least > self.positions and self.tokenizer.kind != "gpt1":
            raise Problem(
                400, f"the text has at least {least:,} tokens, but this model has {self.positions} positions",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    def check_prompt(self, prompt: Sequence[int], param: str) -> None:
        """Raise Problem for token ids that the model does not have, and for more than it has positions."""
        if len(prompt) > self.positions:
            raise Problem(
                400, f"a prompt of {len(prompt):,} tokens, but this model has {self.positions} positions",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        if (wrong := next((token for token in prompt if not 0 <= token < self.vocab_size), None)) is not None:
            raise Problem(400, f"token {wrong} is outside the vocabulary of {self.vocab_size} tokens", param=param)

    def prompts(self, given: str | Sequence[Any], param: str) -> list[list[int]]:
        """Return the token ids of a text, of texts, of token ids, or of lists of token ids."""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        found = []
        for prompt in given:
            if isinstance(prompt, str):
                self.check_length(prompt, param)
                prompt = self.tokenizer.encode(prompt) or self.start
            self.check_prompt(prompt, param)
            found.append(prompt)
        return found

    @property
    def stop_tokens(self) -> list[int]:
        """Return the tokens that end a text."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    @property
    def start(self) -> list[int]:
        """Return the prompt for an empty text: the start of a document."""
        end = self.tokenizer.eos_token_id
        return [end] if end is not None else self.tokenizer.encode("\n")
