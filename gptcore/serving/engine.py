"""Continuous batching: requests join and leave a batch between any two steps, and none changes the bits of another.

A step is one forward pass for each adapter in use, over a token of every running request and a part of the prompts of
new ones (`generation/slots.py`). The engine knows nothing of texts or HTTP. A thread of its own runs the model; all
methods may be called from any thread.
"""

from __future__ import annotations

import contextvars
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gptcore.generation.sampling import whole_number
from gptcore.generation.slots import Slots
from gptcore.lora import set_adapter
from gptcore.model import GPT
from gptcore.serving.calls import Call, make, take
from gptcore.serving.prefix import PrefixCache
from gptcore.serving.requests import EngineClosed, EngineFull, Request, Ticket
from gptcore.serving.rows import Row, described

Item = TypeVar("Item")
Result = TypeVar("Result")
Part = tuple[Row, int]  # so many tokens of a row, which a pass reads

COUNTED = ("steps", "prompt_tokens", "cached_tokens", "generated_tokens", "stop", "length", "cancelled", "error")
IDLE_CHUNKS = 16  # prefill_chunks that a step reads while no request is running


class Engine:
    """Answers requests to a model, which it uses alone until it is closed.

    model: a GPT, in eval mode from now on; or a model with a head for a task, for `call` and `batch`.
    max_batch: requests that run at once. Each has memory for the keys and values of all positions of the model.
    max_waiting: requests that may wait beside them.
    prefill_chunk: tokens of prompts that a step reads beside running requests: more of them delay the tokens of those,
        fewer delay the first token of a new request.
    prefix_tokens: tokens whose keys and values are kept for later prompts that begin with them; 0 keeps none.
    adapters: names of the model's adapters that requests may use; None for all.
    vocab_size: of the tokenizer, if the model's was padded to a round number: no token from there on is ever taken.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        prefill_chunk: int = 8,
        prefix_tokens: int = 4096,
        adapters: Sequence[str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.max_batch = whole_number("max_batch", max_batch, 1)
        self.max_waiting = whole_number("max_waiting", max_waiting, 0)
        self.prefill_chunk = whole_number("prefill_chunk", prefill_chunk, 1)
        self._prefix = PrefixCache(whole_number("prefix_tokens", prefix_tokens, 0))
        state = getattr(model, "adapters", None)
        found = [] if state is None or state.merged else list(state.configs)
        if missing := [name for name in adapters or () if name not in found]:
            raise ValueError(f"the model has no adapter {missing[0]!r} to select; it has {', '.join(found) or 'none'}")
        self.adapters = found if adapters is None else list(adapters)
        self._selected: str | None = state.active if state is not None and found else None
        self.model = model.eval()
        self._gpt = model if isinstance(model, GPT) else None
        if self._gpt is not None:
            limit = self._gpt.config.vocab_size
            self.vocab_size = limit if vocab_size is None else whole_number("vocab_size", vocab_size, 1)
            if self.vocab_size > limit:
                raise ValueError(f"vocab_size {vocab_size} should be between 1 and the model's {limit} tokens")
            self._slots, self._ends = Slots(self._gpt, max_batch), [self._gpt.config.eos_token_id]
        self._rows: list[Row] = []  # in the order in which they joined
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[Call] = deque()
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closing = self._aborted = False
        context = contextvars.copy_context()  # of ops.use
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="gptcore engine", daemon=True)
        self._thread.start()

    # ---- from any thread ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises ValueError for one that does not fit the model, EngineFull if too many wait, and EngineClosed.
        """
        self._check(request)
        ticket = Ticket(request, self._wake)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.max_waiting + self.max_batch - len(self._rows):
                raise EngineFull(f"{len(self._rows)} requests run and {len(self._waiting)} wait; try again later")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def call(self, function: Callable[[], Result], adapter: str | None = None) -> Future[Result]:
        """Run a function that uses the model between two steps, with an adapter of the model, or the base alone.

        Raises ValueError for an adapter that the model lacks, EngineFull if too many calls wait, and EngineClosed.
        """
        return self._queue(Call(lambda items: [function()], None, adapter))

    def batch(
        self, function: Callable[[list[Item]], Sequence[Result]], item: Item, adapter: str | None = None
    ) -> Future[Result]:
        """Run a function between two steps, as `call` does, for all items that wait for it; return this one's result.

        function: takes up to max_batch items and returns as many results, such as a model with a head. An exception is
            that of one item: if it raises for several, it is called with each alone.
        """
        return self._queue(Call(function, item, adapter))

    def _queue(self, call: Call) -> Future[Any]:
        self._check_adapter(call.adapter)
        with self._changed:
            self._check_open()
            if len(self._calls) > self.max_waiting:
                raise EngineFull(f"{len(self._calls)} calls wait; try again later")
            self._calls.append(call)
            self._changed.notify_all()
        return call.future

    def stats(self) -> dict[str, int]:
        """Return what there is now, and sums since the start: steps, tokens, requests by how they ended."""
        with self._changed:
            return {
                "running": len(self._rows), "waiting": len(self._waiting), "max_batch": self.max_batch,
                "held_tokens": sum(row.done for row in self._rows), "prefix_tokens": len(self._prefix),
                **{name: self._counts[name] for name in COUNTED},
            }  # fmt: skip

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait for the others, and cancel those that have not ended after `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        self._aborted = True
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(0 if any(error) else None)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosed("the engine is closed and takes no more requests")

    def _check_adapter(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"there is no adapter {adapter!r}; there are {', '.join(self.adapters) or 'none'}")

    def _check(self, request: Request) -> None:
        if self._gpt is None:
            raise ValueError(f"a {type(self.model).__name__} does not continue texts; use Engine.batch")
        self._check_adapter(request.adapter)
        config, prompt = self._gpt.config, request.prompt
        if (highest := max(prompt)) >= config.vocab_size:
            raise ValueError(f"token {highest} is outside the vocabulary of {config.vocab_size} tokens")
        needed = len(prompt) + max(0, request.max_tokens - 1)  # the last new token is never an input
        if needed > config.n_positions:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {request.max_tokens} new ones need {needed} positions, "
                f"but this model has {config.n_positions} positions"
            )
        if request.logprobs > self.vocab_size:
            raise ValueError(f"logprobs is {request.logprobs}, but there are {self.vocab_size} tokens")
        if wrong := [token for token in request.logit_bias if token >= self.vocab_size]:
            raise ValueError(f"logit_bias has token {wrong[0]}, but there are {self.vocab_size} tokens")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason, failure, selected = "cancelled", None, self._selected
        try:
            with torch.no_grad():
                while self._wait():
                    self._make_calls()
                    self._admit()
                    self._step()
            self._select(selected)
        except Exception as error:  # a fault of the engine itself: nothing may wait for it forever
            reason, failure = "error", error
        with self._changed:
            self._closing = True
            tickets, self._rows = [*(row.ticket for row in self._rows), *self._waiting], []
            self._waiting.clear()
        for ticket in tickets:
            self._finish(ticket, reason, failure)
        for call in self._calls:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(failure or EngineClosed("the engine was closed"))

    def _wait(self) -> bool:
        """Wait for work; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._waiting or self._calls or self._closing)
            return not self._aborted and bool(self._rows or self._waiting or self._calls)

    def _make_calls(self) -> None:
        with self._changed:
            calls = take(self._calls, self.max_batch)
        make(calls, self._select)

    def _admit(self) -> None:
        """Drop cancelled requests, and let waiting ones take the free slots."""
        with self._changed:
            gone = [row.ticket for row in self._rows if row.ticket.cancelled]
            gone += [ticket for ticket in self._waiting if ticket.cancelled]
            self._rows = [row for row in self._rows if not row.ticket.cancelled]
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
            free = sorted({*range(self.max_batch)} - {row.slot for row in self._rows})
            for slot in free[: len(self._waiting)]:
                self._rows.append(Row(self._waiting.popleft(), slot, self._slots.memory.device))
        for ticket in gone:
            self._finish(ticket, "cancelled")

    def _step(self) -> None:
        """Make a pass for each adapter in use."""
        running = any(row.unread == 1 for row in self._rows)
        budget = self.prefill_chunk * (1 if running else IDLE_CHUNKS)
        coming: set[Any] = set()  # blocks that this step computes: other requests take them from the prefix cache
        for adapter in dict.fromkeys(row.request.adapter for row in self._rows):
            parts: list[Part] = []
            for row in self._rows:
                if row.request.adapter != adapter:
                    continue
                self._counts["cached_tokens"] += row.take_prefix(self._prefix, self._slots.memory)
                key = row.next_key(self._prefix)
                if row.unread == 1:
                    parts.append((row, 1))
                elif budget and (key is None or key not in coming):
                    parts.append((row, min(row.unread, budget)))
                    budget -= parts[-1][1]
                    coming.add(key)
            if parts:
                self._pass(adapter, parts)
                self._counts["steps"] += 1

    def _pass(self, adapter: str | None, parts: list[Part]) -> None:
        """Read parts of rows in one forward pass; if it fails, each alone, so that an error ends one row only."""
        assert self._gpt is not None
        tokens: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        kept: list[int] = []
        for row, count in parts:
            tokens += row.tokens[row.done : row.done + count]
            places += range(row.done, row.done + count)
            rows += [row.slot] * count
            kept += range(len(tokens) - row.outputs(count), len(tokens))
        try:
            self._select(adapter)
            logits = self._slots.read(self._gpt, tokens, rows, places, kept)[:, : self.vocab_size]
        except Exception as error:
            if len(parts) == 1:
                return self._drop(parts[0][0], "error", error)
            for part in parts:
                self._pass(adapter, [part])
            return
        outputs = [row.outputs(count) for row, count in parts]
        scores = logits.log_softmax(-1)
        finite = torch.stack(logits.aminmax(dim=-1)).isfinite().all(0)
        for (row, count), *mine in zip(parts, *(t.split(outputs) for t in (logits, scores, finite)), strict=True):
            self._counts["prompt_tokens"] += 0 if row.new else count
            row.done += count
            row.keep_prefix(self._prefix, self._slots.memory)
            try:
                self._continue(row, *mine)
            except Exception as error:
                self._drop(row, "error", error)

    def _continue(self, row: Row, logits: Tensor, scores: Tensor, finite: Tensor) -> None:
        """Take the logits and log-probabilities (outputs, V) of the tokens that were read last."""
        request, first = row.request, row.done - len(logits) + 1
        if not finite.all():
            raise FloatingPointError(f"logits for token {row.done} are not finite: the model's weights are damaged")
        if row.ticket.prompt_logprobs is not None and not row.new:
            known = zip(row.tokens[first:], scores, strict=False)
            row.ticket.prompt_logprobs += [described(token, its, request.logprobs) for token, its in known]
        if row.unread:
            return
        if row.new < request.max_tokens:
            token = row.choose(logits[-1])
            row.tokens.append(token)
            self._counts["generated_tokens"] += 1
            row.ticket.add(described(token, scores[-1], request.logprobs))
            if token in (self._ends if request.stop_tokens is None else request.stop_tokens):
                return self._drop(row, "stop")
        if row.new >= request.max_tokens:
            self._drop(row, "length")

    def _drop(self, row: Row, reason: str, error: Exception | None = None) -> None:
        with self._changed:
            self._rows = [other for other in self._rows if other is not row]
        self._finish(row.ticket, reason, error)

    def _finish(self, ticket: Ticket, reason: str, error: Exception | None = None) -> None:
        self._counts[reason] += 1
        ticket.finish(reason, error)

    def _select(self, adapter: str | None) -> None:
        if adapter != self._selected:
            set_adapter(self.model, adapter)
            self._selected = adapter
