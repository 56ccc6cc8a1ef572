"""From a request to the pieces of its texts: tickets of the engine, read without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from starlette.datastructures import State

from gptcore.generation import seed_of_row
from gptcore.serving.errors import BUSY, Problem
from gptcore.serving.metrics import Clock
from gptcore.serving.requests import EngineClosed, EngineFull, Request, Ticket, Token
from gptcore.serving.schema import Sampling, TokenDetails, Usage
from gptcore.serving.served import Served
from gptcore.serving.text import Decoder, Speller

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spelled:
    """A token of a text: its bytes, where it begins in the text, and the likeliest alternatives in its place."""

    data: bytes  # of a special token its name, which is not in the text
    offset: int  # characters
    logprob: float | None  # None for the first token of a prompt
    top: list[tuple[bytes, float]]


@dataclass
class Piece:
    """What is new in one text: characters, and the tokens that begin in them; at its end why it ended."""

    text: str = ""
    tokens: list[Spelled] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


class Choice:
    """One text that the engine continues."""

    def __init__(self, served: Served, ticket: Ticket, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.served, self.ticket, self.prompt, self.stops = served, ticket, prompt, stops
        self.count = 0  # tokens generated
        self._queue: asyncio.Queue[Token | None] = asyncio.Queue()
        self._waiting: list[Token | None] = []  # before those of the queue
        loop = asyncio.get_running_loop()

        def put(token: Token | None) -> None:  # in the engine's thread; the loop may be closed at the end of a server
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._queue.put_nowait, token)

        ticket.on_token = put

    async def pieces(self, echo: bool = False) -> AsyncIterator[Piece]:
        """Yield pieces until the text ends. Raises Problem if the engine fails at it."""
        clock, reason = Clock(self.served.metrics), "cancelled"
        try:
            offset = 0
            if echo:
                self._waiting.append(await self._next())  # the prompt has been read by then
                if self._waiting == [None]:
                    self._check()
                piece = self._prompt()
                offset = len(piece.text)
                yield piece
            async for piece in self._generated(offset, clock):
                reason = piece.finish_reason or reason
                yield piece
        except Problem:
            reason = "error"
            raise
        finally:
            self.ticket.cancel()
            clock.end(self.ticket, reason)

    async def _next(self) -> Token | None:
        return self._waiting.pop() if self._waiting else await self._queue.get()

    def _check(self) -> None:
        """Raise Problem if the text has ended other than it should."""
        if self.ticket.finish_reason == "cancelled":
            raise Problem(503, "the server ended this request because it is shutting down", headers=BUSY)
        if self.ticket.finish_reason not in ("stop", "length"):
            raise Problem(500, f"the engine failed at this request: {self.ticket.error}")

    def _prompt(self) -> Piece:
        speller, decoder, tokens = Speller(self.served.tokenizer), Decoder(), []
        text = ""
        known: Sequence[Token | None] = self.ticket.prompt_logprobs or [None] * len(self.prompt)
        for token, says in zip(self.prompt, known, strict=True):
            spelled, new = _spell(speller, decoder, token, says, 0)
            tokens.append(spelled)
            text += new
        return Piece(text + decoder.end(), tokens)

    async def _generated(self, offset: int, clock: Clock) -> AsyncIterator[Piece]:
        speller, decoder = Speller(self.served.tokenizer, self.prompt[-1]), Decoder(self.stops)
        held: list[Spelled] = []  # tokens that begin in text that is held back
        while (token := await self._next()) is not None:
            clock.token()
            self.count += 1
            spelled, text = _spell(speller, decoder, token.id, token, offset)
            held.append(spelled)
            if decoder.stopped:
                break
            ready = [item for item in held if item.offset < decoder.length + offset]
            held = held[len(ready) :]
            if text:
                yield Piece(text, ready)
        if token is None:
            self._check()
            text = decoder.end()
        # The token of the end begins where the text ends, and is told; those of a stop string are not
        ready = [item for item in held if item.offset < decoder.length + offset or not decoder.stopped]
        reason: Any = "stop" if decoder.stopped else self.ticket.finish_reason
        yield Piece(text, ready, reason)


def _spell(speller: Speller, decoder: Decoder, token: int, says: Token | None, offset: int) -> tuple[Spelled, str]:
    """Return a token as it is told, and the text that is final with it."""
    name, top = speller.bytes_of(token), [] if says is None else says.top
    others = [(speller.bytes_of(other), logprob) for other, logprob in top]
    data = speller.take(token)
    begins = decoder.begins(data) + offset
    return Spelled(name, begins, None if says is None else says.logprob, others), decoder.feed(data)


def start(
    served: Served,
    state: State,
    body: Sampling,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echo: bool = False,
    stops: Sequence[str],
    stop_tokens: Sequence[int],
) -> list[Choice]:
    """Submit n texts for each prompt. They are cancelled when the request with this state ends.

    Raises Problem where the model or the engine cannot take them.
    """
    adapter = served.adapter_of(body.model)
    most, bias = served.limits.max_new_tokens, {int(key): value for key, value in (body.logit_bias or {}).items()}
    if max_tokens is not None and max_tokens > most:
        raise Problem(400, f"max_tokens is {max_tokens}, but this server allows {most}", param="max_tokens")
    if beyond := next((token for token in bias if token >= served.vocab_size), None):
        raise Problem(400, f"logit_bias has token {beyond}, but there are {served.vocab_size}", param="logit_bias")
    for prompt in prompts:
        needed = len(prompt) + max(max_tokens or 0, 1) - 1  # the last new token is never read
        if needed > served.positions:
            raise Problem(
                400,
                f"a prompt of {len(prompt)} tokens and {max_tokens} new ones need {needed} positions, but this model "
                f"has {served.positions}; shorten the prompt or max_tokens",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
    room = served.limits.max_batch + served.limits.max_waiting
    if len(prompts) * body.n > room:
        raise Problem(
            400, f"{len(prompts)} prompts with {body.n} texts each are more than the {room} that fit", param="n"
        )
    choices: list[Choice] = []
    try:
        for number in range(len(prompts) * body.n):
            prompt = prompts[number // body.n]
            request = Request(
                prompt=prompt,
                max_tokens=min(served.positions + 1 - len(prompt), most) if max_tokens is None else max_tokens,
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                seed=None if body.seed is None else seed_of_row(body.seed, number % body.n),
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=bias,
                logprobs=logprobs or 0,
                prompt_logprobs=echo and logprobs is not None,
                stop_tokens=stop_tokens,
                adapter=adapter,
                owner=state.owner,
            )
            ticket = served.engine.submit(request)
            state.at_end.append(ticket.cancel)
            choices.append(Choice(served, ticket, prompt, stops))
    except (EngineFull, EngineClosed, ValueError) as error:
        raise refusal(error) from None
    return choices


def refusal(error: Exception) -> Problem:
    """Return what a client is told when the engine does not take its request."""
    if isinstance(error, EngineFull):
        text = "the server has as many requests as it takes; try again"
        return Problem(429, text, code="rate_limit_exceeded", headers=BUSY)
    return Problem(503 if isinstance(error, EngineClosed) else 400, str(error))


async def taken(ask: Callable[[], Future[Result]]) -> Result:
    """Return the result of a call that the engine is asked to make. Raises Problem if it does not take it."""
    try:
        future = ask()
    except (EngineFull, EngineClosed) as error:
        raise refusal(error) from None
    return await asyncio.wrap_future(future)


async def merged(choices: Sequence[Choice], echo: bool = False) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of all choices as they come, each with the number of its choice. Cancels all at its end."""
    queue: asyncio.Queue[tuple[int, Piece] | Problem | None] = asyncio.Queue()

    async def read(index: int, choice: Choice) -> None:
        try:
            async for piece in choice.pieces(echo):
                queue.put_nowait((index, piece))
            queue.put_nowait(None)
        except Problem as problem:
            queue.put_nowait(problem)

    tasks = [asyncio.ensure_future(read(index, choice)) for index, choice in enumerate(choices)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Problem):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for choice, task in zip(choices, tasks, strict=True):
            choice.ticket.cancel()  # also of those whose task never began
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_of(choices: Sequence[Choice], n: int) -> Usage:
    """Return the usage of a request whose prompts have n choices each: a prompt counts once."""
    prompt = sum(len(choice.prompt) for choice in choices[::n])
    new = sum(choice.count for choice in choices)
    cached = sum(choice.ticket.cached_tokens for choice in choices[::n])
    return Usage(
        prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new,
        prompt_tokens_details=TokenDetails(cached_tokens=cached),
    )  # fmt: skip
