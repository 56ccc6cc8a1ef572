"""The pipelines that write: "text-generation" of transformers, and the verbs that its version 5 has no more.

A language model continues a prompt or a conversation. For a verb it writes what follows a prompt, as `gptcore finetune
--task text` has taught it. Version 4 of transformers had these for models with an encoder; the outputs are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from gptcore.generation import Settings, seed_of_row
from gptcore.model import GPT
from gptcore.tasks.writing import Write, write
from gptcore.text.chat import Message, check_messages, encode_parts, template_of
from gptcore.text.tokenizer import Tokenizer

NEW_TOKENS = 256  # by default, as in transformers' pipeline
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 50}  # as there
DRAWN = ("temperature", "top_k", "top_p", "seed")  # settings of sampling alone
Chat = Sequence[Message]


class TextGeneration:
    """Prompts to [{"generated_text"}], conversations to the same with the reply as a last message."""

    kind = Write
    key = "generated_text"
    full_text = True
    defaults_of_task: ClassVar[Mapping[str, Any]] = SAMPLING

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, batch_size: int, **defaults: Any) -> None:
        if not isinstance(model, GPT):
            raise ValueError(f"the model is a {type(model).__name__}, expected a language model, GPT")
        self.model, self.tokenizer, self.batch_size, self.defaults = model, tokenizer, batch_size, defaults

    def __call__(self, inputs: str | Chat | Sequence[str] | Sequence[Chat], **options: Any) -> Any:
        """Return a list of texts for one input, a list of such lists for a list of inputs.

        return_full_text: False leaves out the prompt or conversation. return_tensors: True returns the ids instead, as
            "generated_token_ids", with the prompt's. skip_special_tokens: of the text that is written; True by default.
        prefix: a text before each prompt that is not returned. continue_final_message: whether the last message of a
            conversation is continued; by default if it is the assistant's.
        max_new_tokens: by default 256, or as many as the model has positions for; or max_length, with the prompt.
        handle_long_generation: "hole" leaves out the beginning of a prompt that leaves too little room.
        stop_sequence: a text, or several, at which writing ends. num_return_sequences: texts for each input.
        do_sample, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, min_new_tokens, eos_token_id,
            seed: as `gptcore.generation.Settings` has them. By default texts are drawn, with temperature 0.7, top_k 50.
        """
        single = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], Mapping))
        rows = self._write([inputs] if single else list(inputs), **{**self.defaults, **options})
        return rows[0] if single else rows

    def _write(
        self,
        inputs: list[Any],
        *,
        return_full_text: bool | None = None,
        return_tensors: bool = False,
        skip_special_tokens: bool = True,
        prefix: str = "",
        continue_final_message: bool | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        handle_long_generation: str | None = None,
        stop_sequence: str | Sequence[str] = (),
        num_return_sequences: int = 1,
        **settings: Any,
    ) -> list[list[dict[str, Any]]]:
        if return_tensors and return_full_text is not None:
            raise ValueError("return_full_text has no effect on return_tensors, which has all ids; leave it out")
        if handle_long_generation not in (None, "hole"):
            raise ValueError(f"handle_long_generation is {handle_long_generation!r}, expected None or 'hole'")
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences is {num_return_sequences}, expected 1 or more")
        made = {**self.defaults_of_task, **settings}
        if not made.get("do_sample"):
            made = {name: value for name, value in made.items() if name not in DRAWN or name in settings}
            if num_return_sequences > 1:
                raise ValueError(f"num_return_sequences={num_return_sequences} is the same text: pass do_sample=True")
        prompts = [self._prompt(one, prefix, continue_final_message) for one in inputs]
        lengths = []
        for number, prompt in enumerate(prompts):
            fits = self.model.config.n_positions + 1 - len(prompt)
            new = max_new_tokens
            if new is None:
                new = max(1, min(NEW_TOKENS, fits)) if max_length is None else max_length - len(prompt)
            if new > fits and handle_long_generation == "hole":
                prompts[number] = prompt[new - fits :]
            lengths.append(new)
        options = [Settings(new, **made) for new in lengths for _ in range(num_return_sequences)]
        if (seed := made.get("seed")) is not None:
            options = [dataclasses.replace(option, seed=seed_of_row(seed, i)) for i, option in enumerate(options)]
        stops = [stop_sequence] if isinstance(stop_sequence, str) else list(stop_sequence)
        copies = [prompt for prompt in prompts for _ in range(num_return_sequences)]
        written = iter(write(self.model, self.tokenizer, copies, options, self.batch_size, stops))
        full = self.full_text if return_full_text is None else return_full_text
        rows = []
        for one, prompt in zip(inputs, prompts, strict=True):
            found: list[dict[str, Any]] = []
            for _ in range(num_return_sequences):
                ids = next(written)
                if return_tensors:
                    found.append({"generated_token_ids": prompt + ids})
                    continue
                text: Any = self.tokenizer.decode(ids, skip_special_tokens)
                found.append({self.key: _joined(one, text, continue_final_message) if full else text})
            rows.append(found)
        return rows

    def _prompt(self, one: Any, prefix: str, continues: bool | None) -> list[int]:
        if isinstance(one, str):
            ids = self.tokenizer.encode(prefix + one)
            if not ids:
                raise ValueError("a prompt is empty; expected a text")
            return ids
        messages = check_messages(one)
        template = template_of(self.tokenizer)
        if template is None:
            raise ValueError("the tokenizer has no chat template, so a conversation cannot be a prompt; pass a text")
        if not _continues(messages, continues):
            return template.encode(self.tokenizer, messages, add_generation_prompt=True)
        return encode_parts(self.tokenizer, template.open_parts(messages))[0]


class Text2Text(TextGeneration):
    """Texts to [{"generated_text"}], what follows them; a list of texts to a list of such dicts. Greedy by default."""

    full_text = False
    defaults_of_task: ClassVar[Mapping[str, Any]] = {}

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Return what follows a text, or each of several: see TextGeneration; with one text for each, a flat list."""
        rows = super().__call__(inputs, **options)
        nested = not isinstance(inputs, str) and all(isinstance(row, list) and len(row) == 1 for row in rows)
        return [row[0] for row in rows] if nested else rows


class Summarization(Text2Text):
    """Texts to [{"summary_text"}]."""

    key = "summary_text"


class Translation(Text2Text):
    """Texts to [{"translation_text"}]."""

    key = "translation_text"


def _continues(messages: Sequence[Message], chosen: bool | None) -> bool:
    return bool(messages[-1]["role"] == "assistant") if chosen is None else chosen


def _joined(one: Any, text: str, continues: bool | None) -> Any:
    """Return a prompt or a conversation with what was written after it."""
    if isinstance(one, str):
        return one + text
    messages = list(one)
    if _continues(messages, continues):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]
