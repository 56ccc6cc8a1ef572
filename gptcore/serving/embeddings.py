"""/v1/embeddings."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence

import numpy as np
import torch
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from gptcore.model import GPT
from gptcore.serving.errors import Route, responses
from gptcore.serving.generate import taken
from gptcore.serving.schema import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from gptcore.serving.served import Served


def routes(served: Served, model: GPT) -> APIRouter:
    router = APIRouter(route_class=Route)

    @router.post("/v1/embeddings", responses=responses(404, 429))
    async def embeddings(body: EmbeddingRequest) -> Embeddings:
        """Return for each text the mean of its tokens' last hidden states, after the final layer norm, with length 1.

        The model was trained to predict tokens, not to place texts: compare texts by them with care.
        """
        adapter = served.adapter_of(body.model)
        prompts = await run_in_threadpool(served.prompts, body.input, "input")
        rows = []
        for prompt in prompts:
            call = functools.partial(served.engine.call, functools.partial(embed, model, prompt), adapter)
            rows.append(await taken(call))
        data = [
            Embedding(index=index, embedding=_as_base64(row) if body.encoding_format == "base64" else row.tolist())
            for index, row in enumerate(rows)
        ]
        count = sum(map(len, prompts))
        return Embeddings(model=body.model, data=data, usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count))

    return router


def embed(model: GPT, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return the embedding of one text, (n_embd,)."""
    with torch.no_grad():
        hidden = model.features(torch.tensor([ids], device=model.wte.weight.device))[0].float()  # (T, C)
        row = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    found: NDArray[np.float32] = row.cpu().numpy()
    return found


def _as_base64(row: NDArray[np.float32]) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
