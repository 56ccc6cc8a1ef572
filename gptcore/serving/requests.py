"""What the engine is asked for, and the handle through which the answer comes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptcore.generation.prompts import EMPTY
from gptcore.generation.sampling import Settings, whole_number


class EngineFull(RuntimeError):
    """As many requests wait as may."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued.

    prompt: token ids.
    max_tokens: new tokens after which it ends; 0 only reads the prompt.
    temperature: 0 takes the likeliest token.
    top_k, top_p, repetition_penalty: see `gptcore.generation.Settings`.
    seed: of the request's own generator, on which alone its draws depend; None draws a new one.
    presence_penalty, frequency_penalty: subtracted from the logit of each token that was generated before: once, and
        as often as it was.
    logit_bias: added to the logits of these tokens.
    logprobs: how many of the likeliest tokens are returned with each token.
    prompt_logprobs: whether the log-probabilities of the prompt's own tokens are returned; its prefix is then read,
        never taken from the cache.
    stop_tokens: a token that ends the answer, as its last; None for the model's end token, empty to ignore it.
    adapter: the name of an adapter of the model; None for the base.
    owner: requests of different owners never share a cached prefix.

    Raises ValueError or TypeError for values that are out of range. Those that depend on the model, Engine.submit
    refuses.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int = 0
    prompt_logprobs: bool = False
    stop_tokens: Collection[int] | None = None
    adapter: str | None = None
    owner: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", [whole_number("a token of the prompt", t, 0) for t in self.prompt])
        if not self.prompt:
            raise ValueError(EMPTY)
        whole_number("max_tokens", self.max_tokens, 0)
        whole_number("logprobs", self.logprobs, 0)
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            check_finite(name, getattr(self, name))
        for token, bias in self.logit_bias.items():
            whole_number("a token of logit_bias", token, 0)
            check_finite("logit_bias", bias)
        for token in self.stop_tokens or ():
            whole_number("a stop token", token, 0)
        self.settings  # noqa: B018 - checks the other values

    @property
    def settings(self) -> Settings:
        """Return what it has in common with `generate`, as if temperature 0 were 1."""
        return Settings(
            max(1, self.max_tokens), do_sample=True, temperature=self.temperature or 1.0, top_k=self.top_k,
            top_p=self.top_p, repetition_penalty=self.repetition_penalty, seed=self.seed,
        )  # fmt: skip


def check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} should be a finite number, not {value!r}")


class Token(NamedTuple):
    """A token, its log-probability, and the likeliest tokens in its place with theirs, in descending order.

    Log-probabilities are the model's own: before temperature, penalties and logit_bias.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Ticket:
    """An answer in the making. Iterate over its tokens, or set `on_token`; any thread may.

    finish_reason: "stop" (after a stop token), "length", "cancelled" or "error"; None until then.
    error: what ended it, with finish_reason "error".
    prompt_logprobs: of the prompt's tokens, None for the first, if they were asked for; complete with the first token.
    prompt_tokens, cached_tokens: tokens of the prompt, and how many of them were found in the prefix cache.
    """

    def __init__(self, request: Request, cancel: Callable[[], None]) -> None:
        self.request, self.prompt_tokens, self.cached_tokens = request, len(request.prompt), 0
        self.prompt_logprobs: list[Token | None] | None = [None] if request.prompt_logprobs else None
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self._wake_engine = cancel
        self._tokens: list[Token] = []
        self._changed = threading.Condition()
        self._on_token: Callable[[Token | None], None] | None = None

    def __iter__(self) -> Iterator[Token]:
        """Yield the tokens from the first on, as they come. Raises `error` after the last."""
        index = 0
        while True:
            with self._changed:
                while len(self._tokens) == index and self.finish_reason is None:
                    self._changed.wait()
                tokens = self._tokens[index:]
            if not tokens:
                break
            yield from tokens
            index += len(tokens)
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Leave the engine within a step. Does nothing after the end."""
        self.cancelled = True
        self._wake_engine()

    @property
    def on_token(self) -> Callable[[Token | None], None] | None:
        """The function that is called with each token, those before it was set included, and with None at the end.

        It is called in the engine's thread and should return at once, as loop.call_soon_threadsafe does. If it raises,
        it is not called again, and the request is cancelled.
        """
        return self._on_token

    @on_token.setter
    def on_token(self, callback: Callable[[Token | None], None]) -> None:
        with self._changed:
            self._on_token = callback
            self._call(*self._tokens, *([] if self.finish_reason is None else [None]))

    def add(self, token: Token) -> None:
        """For the engine: append a token."""
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()
            self._call(token)

    def finish(self, reason: str, error: Exception | None = None) -> None:
        """For the engine: end the answer."""
        with self._changed:
            self.finish_reason, self.error = reason, error
            self._changed.notify_all()
            self._call(None)

    def _call(self, *tokens: Token | None) -> None:
        try:
            for token in tokens:
                if self._on_token is not None:
                    self._on_token(token)
        except Exception:  # not the engine's fault, nor that of other requests
            self._on_token = None
            self.cancel()
