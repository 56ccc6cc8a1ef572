"""/v1/classify, /v1/entities and /v1/answer, of a model with a head for the task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter

from gptcore.serving.errors import Problem, Route, responses
from gptcore.serving.generate import taken
from gptcore.serving.schema import (
    AnswerList,
    AnswerRequest,
    Classification,
    ClassifyRequest,
    EntitiesRequest,
    EntityList,
)
from gptcore.serving.served import Served

PIPELINES = {"classify": "text-classification", "entities": "token-classification", "answer": "question-answering"}


def routes(served: Served, task: str, pipeline: Any) -> APIRouter:
    """Return the route of a task, with the pipeline of PIPELINES that does it.

    The engine batches requests that wait at once: for each route, number of answers and adapter.
    """
    router = APIRouter(route_class=Route, responses=responses(404, 429))
    labels = _of_requests(lambda texts: pipeline(texts, top_k=None))
    spans = _of_requests(lambda texts: pipeline(texts, aggregation_strategy="simple"))
    answers = functools.cache(lambda top_k: _of_requests(lambda questions: _ask(pipeline, questions, top_k)))

    async def classify(body: ClassifyRequest) -> Classification:
        """Return the labels of each text with their scores."""
        rows = await _batched(served, labels, body.input, body.model)
        data = [{"index": index, "labels": row[: body.top_k]} for index, row in enumerate(rows)]
        return Classification.model_validate({"model": body.model, "data": data})

    async def entities(body: EntitiesRequest) -> EntityList:
        """Return the entities in each text."""
        rows = await _batched(served, spans, body.input, body.model)
        data = [{"index": index, "entities": row} for index, row in enumerate(rows)]
        return EntityList.model_validate({"model": body.model, "data": data})

    async def answer(body: AnswerRequest) -> AnswerList:
        """Return the answers to each question in its context."""
        rows = await _batched(served, answers(body.top_k), body.input, body.model)
        data = [{"index": index, "answers": row} for index, row in enumerate(rows)]
        return AnswerList.model_validate({"model": body.model, "data": data})

    known: dict[str, Any] = {"classify": classify, "entities": entities, "answer": answer}
    router.post(f"/v1/{task}")(known[task])
    return router


def _ask(pipeline: Any, questions: list[Any], top_k: int) -> list[list[Any]]:
    """Return lists of answers: as in transformers, the pipeline unpacks lists of one."""
    found = pipeline([question.model_dump() for question in questions], top_k=top_k)
    found = [found] if len(questions) == 1 else found
    return [[row] if isinstance(row, dict) else row for row in found]


def _of_requests(function: Callable[[list[Any]], list[Any]]) -> Callable[[list[list[Any]]], list[list[Any]]]:
    """Return a function of the inputs of several requests, which calls `function` once with all of them."""

    def run(requests: list[list[Any]]) -> list[list[Any]]:
        rows = iter(function([one for inputs in requests for one in inputs]))
        return [[next(rows) for _ in inputs] for inputs in requests]

    return run


async def _batched(served: Served, function: Any, given: Any, model: str) -> list[Any]:
    """Return what a function says of the input, or inputs, of one request. Raises Problem if they do not suit it."""
    inputs = list(given) if isinstance(given, list) else [given]
    adapter = served.adapter_of(model)
    try:
        found: list[Any] = await taken(lambda: served.engine.batch(function, inputs, adapter))
    except ValueError as error:
        raise Problem(400, str(error), param="input") from None
    return found
