"""Serving a model: the engine, which batches requests, and above it an HTTP server."""

from gptcore.serving.engine import Engine
from gptcore.serving.requests import EngineClosed, EngineFull, Request, Ticket, Token

__all__ = ["Engine", "EngineClosed", "EngineFull", "Request", "Ticket", "Token"]
