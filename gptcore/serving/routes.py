"""The routes beside completions: models, tokens, health, metrics and the page."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from gptcore.serving.errors import Problem, Route, responses
from gptcore.serving.schema import (
    DetokenizeRequest,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
)
from gptcore.serving.served import Served
from gptcore.serving.text import spell

PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "tokens.js": "text/javascript",
        "icon.svg": "image/svg+xml"}  # fmt: skip


def routes(served: Served) -> APIRouter:
    """Return the routes that every model has."""
    router = APIRouter(route_class=Route, responses=responses())
    template = None if served.template is None else served.template.name
    cards = [
        ModelCard(
            id=name, created=served.created, root=served.name, max_model_len=served.positions,
            vocab_size=served.vocab_size, routes=list(served.routes), chat_template=template,
        )
        for name in (served.name, *served.adapters)
    ]  # fmt: skip

    @router.get("/health")
    async def health() -> Health:
        """Say that the server takes requests; needs no key."""
        return Health()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counters, gauges and histograms in Prometheus' format."""
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    async def models() -> ModelList:
        """List the model and its adapters."""
        return ModelList(data=cards)

    @router.get("/v1/models/{model}", responses=responses(404))
    async def model(model: str) -> ModelCard:
        """Describe one model."""
        served.adapter_of(model)
        return next(card for card in cards if card.id == model)

    @router.post("/tokenize", response_model_exclude_none=True)
    def tokenize(body: TokenizeRequest) -> Tokens:
        """Return the token ids of a text. Special tokens in it are plain text."""
        ids = served.tokenizer.encode(body.prompt)
        names = [spell(served.tokenizer.decode_bytes([token])) for token in ids] if body.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=served.positions, tokens=ids, token_strs=names)

    @router.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> Text:
        """Return the text of token ids; bytes that are no character are U+FFFD."""
        try:
            return Text(prompt=served.tokenizer.decode_bytes(body.tokens).decode("utf-8", "replace"))
        except ValueError as error:
            raise Problem(400, str(error), param="tokens") from None

    return router


def page_routes() -> APIRouter:
    """Return the page and its files, read once."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("gptcore.serving") / "page"

    def add(name: str, kind: str) -> None:
        content = (folder / (name or "index.html")).read_bytes()

        @router.get(f"/{name}")
        async def file() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    for name, kind in PAGE.items():
        add(name, kind)
    return router
