"""/v1/classify, /v1/entities and /v1/answer, of a model with a head for the task."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter

from gptcore.serving.errors import Problem, responses
from gptcore.serving.generate import called
from gptcore.serving.limits import MAX_TEXTS
from gptcore.serving.schema import (
    AnswerList,
    AnswerRequest,
    Classification,
    ClassifyRequest,
    EntitiesRequest,
    EntityList,
)
from gptcore.serving.served import Served

Run = Callable[[list[Any]], list[Any]]
PIPELINES = {"classify": "text-classification", "entities": "token-classification", "answer": "question-answering"}


def routes(served: Served, task: str, pipeline: Any) -> APIRouter:
    """Return the route of a task, with the pipeline of PIPELINES that does it."""
    router = APIRouter(responses=responses(404, 429))
    batcher = Batcher(served)

    async def classify(body: ClassifyRequest) -> Classification:
        """Return the labels of each text with their scores."""
        rows = await batcher.run(lambda texts: pipeline(texts, top_k=None), _listed(body.input), body.model)
        data = [{"index": index, "labels": row[: body.top_k]} for index, row in enumerate(rows)]
        return Classification.model_validate({"model": body.model, "data": data})

    async def entities(body: EntitiesRequest) -> EntityList:
        """Return the entities in each text."""
        rows = await batcher.run(
            lambda texts: pipeline(texts, aggregation_strategy="simple"), _listed(body.input), body.model
        )
        data = [{"index": index, "entities": row} for index, row in enumerate(rows)]
        return EntityList.model_validate({"model": body.model, "data": data})

    async def answer(body: AnswerRequest) -> AnswerList:
        """Return the answers to each question in its context."""

        def ask(questions: list[Any]) -> list[Any]:
            found = pipeline([question.model_dump() for question in questions], top_k=body.top_k)
            found = [found] if len(questions) == 1 else found  # as transformers' pipeline, which unpacks lists of one
            return [[row] if isinstance(row, dict) else row for row in found]

        rows = await batcher.run(ask, _listed(body.input), body.model, body.top_k)
        data = [{"index": index, "answers": row} for index, row in enumerate(rows)]
        return AnswerList.model_validate({"model": body.model, "data": data})

    known: dict[str, Any] = {"classify": classify, "entities": entities, "answer": answer}
    router.post(f"/v1/{task}")(known[task])
    return router


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list) else [given]


class Batcher:
    """Runs a function on the inputs of several requests at once: all that wait when the model is free, up to MAX_TEXTS.

    Requests go together that name the same adapter and the same option. If the function fails, each is run alone, so
    that one request's failure is its own.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._waiting: dict[Any, deque[tuple[list[Any], Future[list[Any]]]]] = defaultdict(deque)

    async def run(self, function: Run, inputs: list[Any], model: str, option: Any = None) -> list[Any]:
        """Return what the function returns for these inputs. Raises Problem if it fails or the engine is full."""
        adapter = self._served.adapter_of(model)
        entry: tuple[list[Any], Future[list[Any]]] = inputs, Future()
        waiting = self._waiting[adapter, option]
        waiting.append(entry)
        try:
            await called(self._served, lambda: self._drain(function, waiting), adapter)
            return entry[1].result(0)
        except ValueError as error:
            raise Problem(400, str(error), param="input") from None
        finally:
            entry[1].cancel()

    def _drain(self, function: Run, waiting: deque[tuple[list[Any], Future[list[Any]]]]) -> None:
        """In the engine's thread: run those that wait, of which the first may have been run before."""
        taken: list[tuple[list[Any], Future[list[Any]]]] = []
        while waiting and (not taken or sum(len(inputs) for inputs, _ in taken) + len(waiting[0][0]) <= MAX_TEXTS):
            inputs, future = waiting.popleft()
            if future.set_running_or_notify_cancel():
                taken.append((inputs, future))
        try:
            results = function([one for inputs, _ in taken for one in inputs]) if taken else []
            for inputs, future in taken:
                future.set_result(results[: len(inputs)])
                results = results[len(inputs) :]
        except Exception:
            for inputs, future in taken:
                _run_alone(function, inputs, future)


def _run_alone(function: Run, inputs: Sequence[Any], future: Future[list[Any]]) -> None:
    try:
        future.set_result(function(list(inputs)))
    except Exception as error:
        future.set_exception(error)
