"""A request in the engine's batch: what is read of it, and how its next token is chosen."""

from __future__ import annotations

import secrets
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from gptcore.generation.sampling import limit_repetition, sample
from gptcore.serving.prefix import BLOCK, Block, PrefixCache
from gptcore.serving.requests import Ticket, Token


class Row:
    """A request in a slot."""

    def __init__(self, ticket: Ticket, slot: int, device: torch.device) -> None:
        self.request = request = ticket.request
        self.ticket, self.slot, self.tokens = ticket, slot, list(request.prompt)
        self.done = 0  # tokens that are read
        self.root = request.owner, request.adapter
        self.block: Block | None = None  # the last of its blocks in the prefix cache
        self.kept = 0  # tokens up to the end of that block
        self.generator = torch.Generator(device)
        self.generator.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.done

    @property
    def new(self) -> int:
        return len(self.tokens) - self.ticket.prompt_tokens

    def outputs(self, count: int) -> int:
        """Return for how many of the next `count` tokens logits are needed: the last ones."""
        return count if self.request.prompt_logprobs and not self.new else int(self.unread == count)

    def next_key(self, prefix: PrefixCache) -> Any:
        """Return the key of the next block; None if it may not be taken, or no token would remain to be read."""
        end = self.kept + BLOCK
        if prefix.limit < BLOCK or end >= len(self.tokens) or self.request.prompt_logprobs:
            return None
        return PrefixCache.key(self.root, self.block, self.tokens[self.kept : end])

    def take_prefix(self, prefix: PrefixCache, memory: Tensor) -> int:
        """Copy blocks of the prefix cache into the slot as far as the next tokens are there; return how many they are.

        memory: of all slots (layers, 2, slots, H, places, D).
        """
        before = self.done
        while self.unread > 1 and (block := prefix.get(self.next_key(prefix))) is not None:
            memory[:, :, self.slot, :, self.kept : self.kept + BLOCK] = block.memory
            self.block, self.kept = block, self.kept + BLOCK
            self.done = max(self.done, self.kept)
        self.ticket.cached_tokens += self.done - before
        return self.done - before

    def keep_prefix(self, prefix: PrefixCache, memory: Tensor) -> None:
        """Copy whole blocks of what is read into the prefix cache."""
        while prefix.limit >= BLOCK and self.kept + BLOCK <= self.done:
            end = self.kept + BLOCK
            key = PrefixCache.key(self.root, self.block, self.tokens[self.kept : end])
            self.block = prefix.get(key) or prefix.put(key, self.block, memory[:, :, self.slot, :, self.kept : end])
            self.kept = end

    def choose(self, logits: Tensor) -> int:
        """Return the next token, given logits (V,)."""
        request = self.request
        if request.repetition_penalty != 1.0:
            logits = limit_repetition(logits, torch.tensor(self.tokens, device=logits.device), request.settings)
        changes = dict(request.logit_bias)
        if request.presence_penalty or request.frequency_penalty:
            for token, count in Counter(self.tokens[self.ticket.prompt_tokens :]).items():
                penalty = request.presence_penalty + request.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            values = torch.tensor(list(changes.values()), dtype=logits.dtype, device=logits.device)
            logits = logits.index_add(0, torch.tensor(list(changes), device=logits.device), values)
        if request.temperature == 0:
            return int(logits.argmax())
        return int(sample(logits[None], [self.generator], [request.temperature], request.top_k, [request.top_p]))


def described(token: int, scores: Tensor, top: int) -> Token:
    """Return a token with its log-probability and the `top` likeliest, given log-probabilities (V,)."""
    best = [values.tolist() for values in scores.topk(top)] if top else [[], []]
    return Token(token, float(scores[token]), list(zip(best[1], best[0], strict=True)))
