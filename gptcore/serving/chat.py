"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from gptcore.serving.completions import STREAM, add, events
from gptcore.serving.errors import Problem, Route, responses
from gptcore.serving.generate import Choice, Piece, Spelled, merged, start, usage_of
from gptcore.serving.schema import (
    Alternative,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChatToken,
)
from gptcore.serving.served import Served
from gptcore.text.chat import Template


def routes(served: Served, template: Template) -> APIRouter:
    router = APIRouter(route_class=Route)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**responses(429), **STREAM})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer the messages, written by the model's chat template."""
        prompt = await run_in_threadpool(_prompt, served, template, body)
        choices = start(
            served, request.state, body, [prompt], max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            stops=[*body.stops, *template.stop_strings],
            stop_tokens=[*served.stop_tokens, template.stop_token(served.tokenizer)],
        )  # fmt: skip
        head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            return events(_chunks(choices, body, head))
        texts = [Piece() for _ in choices]
        async for index, piece in merged(choices):
            add(texts[index], piece)
        done = [
            ChatChoice(index=index, message=AssistantMessage(content=piece.text), logprobs=_logprobs(piece, body),
                       finish_reason=piece.finish_reason or "stop")
            for index, piece in enumerate(texts)
        ]  # fmt: skip
        whole = ChatCompletion(**head, choices=done, usage=usage_of(choices, body.n))
        return JSONResponse(whole.model_dump())

    return router


def _prompt(served: Served, template: Template, body: ChatRequest) -> list[int]:
    """Return the token ids of the messages, in which no special token is forged, and of the beginning of a reply."""
    for number, message in enumerate(body.messages):
        served.check_length(message.text, f"messages.{number}.content")
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        return template.encode(served.tokenizer, messages, add_generation_prompt=True)
    except ValueError as error:
        raise Problem(400, str(error), param="messages") from None


def _logprobs(piece: Piece, body: ChatRequest) -> ChatLogprobs | None:
    return ChatLogprobs(content=[_token(token) for token in piece.tokens]) if body.logprobs else None


def _token(token: Spelled) -> ChatToken:
    top = [_alternative(data, logprob) for data, logprob in token.top]
    return ChatToken(**_alternative(token.data, token.logprob or 0.0).model_dump(), top_logprobs=top)


def _alternative(data: bytes, logprob: float) -> Alternative:
    return Alternative(token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data))


async def _chunks(choices: Sequence[Choice], body: ChatRequest, head: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    usage: dict[str, Any] = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}
    common = {**head, "object": "chat.completion.chunk", **usage}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**common, "choices": [choice]}

    for index in range(len(choices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, piece in merged(choices):
        if piece.text or piece.tokens:
            logprobs = _logprobs(piece, body)
            yield chunk(index, {"content": piece.text}, logprobs and logprobs.model_dump())
        if piece.finish_reason:
            yield chunk(index, {}, None, piece.finish_reason)
    if usage:
        yield {**common, "choices": [], "usage": usage_of(choices, body.n).model_dump()}
