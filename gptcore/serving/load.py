"""From a folder to what the server serves: a language model with its engine, or a model with a head for a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fastapi import APIRouter
from torch import nn

from gptcore.files import PathLike
from gptcore.hf.hub import find_folder
from gptcore.lora.adapters import set_adapter
from gptcore.lora.files import CONFIG, WEIGHTS, load_adapter
from gptcore.model import GPT
from gptcore.serving import embeddings, tasks
from gptcore.serving.engine import Engine
from gptcore.serving.limits import Limits
from gptcore.serving.served import Served
from gptcore.tasks.pipelines import PIPELINES, pipeline, task_name
from gptcore.text.chat import Template, find_template, template_of
from gptcore.text.tokenizer import FILES, Tokenizer


def load(
    path: PathLike,
    name: str,
    limits: Limits,
    *,
    adapters: Mapping[str, PathLike] | None = None,
    device: torch.device | str = "cpu",
    chat_template: str | None = None,
) -> tuple[Served, list[APIRouter]]:
    """Return the model in a folder or GGUF file, and the routes that it has beside completions.

    Raises OSError or ValueError for files that cannot be used, and for names that are taken.
    """
    adapters = dict(adapters or {})
    if name in adapters:
        raise ValueError(f"--adapter {name} has the name of the model; choose another with --name")
    tokenizer, task = Tokenizer.from_pretrained(path), task_name(path)
    if task is not None and task not in tasks.PIPELINES:
        known = ", ".join(tasks.PIPELINES)
        raise ValueError(f"{path} holds a model for the task {task}, which has no route here; those with one: {known}")
    template = _template(tokenizer, chat_template) if task is None else None
    model: Any = GPT if task is None else PIPELINES[tasks.PIPELINES[task]].kind.model_class
    model = model.from_pretrained(path).to(device).eval()
    for adapter, folder in adapters.items():
        _check_tokenizer(tokenizer, path, folder)
        load_adapter(model, folder, adapter)
    if adapters:
        set_adapter(model, None)
    served = serve(model, tokenizer, name, limits, list(adapters), template)
    if task is None:
        return served, [embeddings.routes(served, model)]
    return served, [tasks.routes(served, task, pipeline(tasks.PIPELINES[task], model, tokenizer))]


def serve(
    model: nn.Module,
    tokenizer: Tokenizer,
    name: str,
    limits: Limits,
    adapters: list[str] | None = None,
    template: Template | None = None,
) -> Served:
    """Return a model as it is served, with an engine that has begun to run."""
    config: Any = model.config
    vocab_size = min(tokenizer.vocab_size, config.vocab_size)  # no text has a token above, in a padded vocabulary
    engine = Engine(
        model, max_batch=limits.max_batch, max_waiting=limits.max_waiting, adapters=adapters, vocab_size=vocab_size
    )
    return Served(
        name, tokenizer, config.n_positions, vocab_size, limits, engine, adapters or [], template,
        generates=isinstance(model, GPT),
    )  # fmt: skip


def _check_tokenizer(tokenizer: Tokenizer, path: PathLike, adapter: PathLike) -> None:
    """Raise ValueError for an adapter that was trained with other tokens than those of the model in `path`."""
    folder = find_folder(adapter, [CONFIG, WEIGHTS, *FILES])
    if (folder / "tokenizer.json").exists() and Tokenizer.from_pretrained(folder).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} has another tokenizer than {path}, so they cannot be served together; serve the model in which "
            "the adapter is merged, as gptcore finetune saves it"
        )


def _template(tokenizer: Tokenizer, name: str | None) -> Template | None:
    template = template_of(tokenizer) if name is None else find_template(name)
    if template is not None:
        template.stop_token(tokenizer)  # raises for a tokenizer without the template's special tokens
    return template
