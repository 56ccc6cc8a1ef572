"""What a client may ask of the server, and how long it may take: checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

# Of one request; stated in the OpenAPI document
MAX_CHOICES = 8  # n
MAX_PROMPTS = 16  # in one request
MAX_STOPS = 4
MAX_STOP_LENGTH = 128  # characters
MAX_LOGPROBS = 5  # alternatives a token of /v1/completions
MAX_TOP_LOGPROBS = 20  # of /v1/chat/completions
MAX_LOGIT_BIAS = 300  # tokens
MAX_MESSAGES = 256
MAX_TEXTS = 64  # of /v1/embeddings, /v1/classify, /v1/entities and /v1/answer
MAX_TEXT_LENGTH = 100_000  # characters of a text that is read in windows
MAX_QUESTION_LENGTH = 1000
HEADER_BYTES = 16 << 10


def _option(default: Any, low: float, text: str) -> Any:
    return field(default=default, metadata={"help": text, "low": low})


@dataclass(frozen=True)
class Limits:
    """Limits that the command line sets. Raises ValueError for one that is out of range."""

    max_batch: int = _option(8, 1, "requests that are computed together")
    max_waiting: int = _option(64, 0, "requests that may wait; more get 429")
    max_new_tokens: int = _option(2048, 1, "tokens that a request may ask for, within the model's positions")
    max_body_bytes: int = _option(1 << 20, 1024, "bytes of a request's body; more get 413")
    max_connections: int = _option(256, 1, "open connections; more get 503")
    request_seconds: float = _option(600.0, 0.1, "seconds until a request is given up, with 504")
    client_seconds: float = _option(10.0, 0.1, "seconds for a client to send headers, to send a body, or to read")
    drain_seconds: float = _option(30.0, 0.0, "seconds that running requests have after SIGTERM")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, low = getattr(self, entry.name), entry.metadata["low"]
            if not low <= value < 2**40:
                raise ValueError(f"{entry.name} is {value}, expected {low} or more")
