"""/v1/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from gptcore.serving.errors import Problem, Route, responses
from gptcore.serving.generate import Choice, Piece, Spelled, merged, start, usage_of
from gptcore.serving.schema import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from gptcore.serving.served import Served
from gptcore.serving.text import spell

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def routes(served: Served) -> APIRouter:
    router = APIRouter(route_class=Route)

    @router.post("/v1/completions", response_model=Completion, responses={**responses(429), **STREAM})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue each prompt by n texts. Token ids of `prompt` and `logit_bias` are those of /tokenize."""
        prompts = await run_in_threadpool(served.prompts, body.prompt, "prompt")
        choices = start(
            served, request.state, body, prompts, max_tokens=16 if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs, echo=body.echo, stops=body.stops, stop_tokens=served.stop_tokens,
        )  # fmt: skip
        head: dict[str, Any] = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            return events(_chunks(choices, body, head))
        texts: list[Piece] = [Piece() for _ in choices]
        async for index, piece in merged(choices, body.echo):
            add(texts[index], piece)
        done = [_choice(index, piece, body) for index, piece in enumerate(texts)]
        whole = Completion(**head, choices=done, usage=usage_of(choices, body.n))
        return JSONResponse(whole.model_dump())

    return router


def add(whole: Piece, piece: Piece) -> None:
    """Add a piece to those before it."""
    whole.text += piece.text
    whole.tokens += piece.tokens
    whole.finish_reason = piece.finish_reason


def _choice(index: int, piece: Piece, body: CompletionRequest) -> CompletionChoice:
    logprobs = _logprobs(piece.tokens) if body.logprobs is not None else None
    return CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason)


def _logprobs(tokens: Sequence[Spelled]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[spell(token.data) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[
            None if token.logprob is None else {spell(data): logprob for data, logprob in token.top}
            for token in tokens
        ],
        text_offset=[token.offset for token in tokens],
    )  # fmt: skip


async def _chunks(
    choices: Sequence[Choice], body: CompletionRequest, head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    usage = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
    common = {**head, "object": "text_completion", **usage}
    async for index, piece in merged(choices, body.echo):
        yield {**common, "choices": [_choice(index, piece, body).model_dump()]}
    if usage:
        yield {**common, "choices": [], "usage": usage_of(choices, body.n).model_dump()}


def events(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Return a response of server-sent events, ended by [DONE], or by an error."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
            yield b"data: [DONE]\n\n"
        except Problem as problem:
            yield problem.event()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx buffers otherwise
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)
