"""Lets programs written for Hugging Face's transformers run on gptcore: only the import statement changes.

Wraps gptcore's own classes for the usual introduction to GPT-2: load, train on a text file, save, load again, generate.
Unsupported names and arguments raise; no argument is silently ignored.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptcore.config import GPTConfig
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.data.datasets import TextDataset
from gptcore.files import PathLike
from gptcore.generation import Prompts, Settings
from gptcore.generation.prompts import read_prompts
from gptcore.generation.sampling import whole_number
from gptcore.hf import pretrained
from gptcore.model import GPT
from gptcore.text.tokenizer import Tokenizer
from gptcore.training import trainer
from gptcore.training.random_state import seed_everything
from gptcore.training.trainer import TrainingArguments

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "DataCollatorForLanguageModeling",
    "GPT2Config",
    "GPT2LMHeadModel",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "TextDataset",
    "Trainer",
    "TrainingArguments",
    "set_seed",
]

_PARAMETERS = inspect.signature(GPT.generate).parameters
_OPTIONS = {name for name, parameter in _PARAMETERS.items() if parameter.kind is parameter.KEYWORD_ONLY}
_OPTIONS |= {field.name for field in dataclasses.fields(Settings)} - {"max_new_tokens"}


def __getattr__(name: str) -> Any:
    raise AttributeError(f"gptcore.compat.transformers has no {name}; it has {', '.join(__all__)}")


class GPT2Config(GPTConfig):
    """GPTConfig, with from_pretrained."""

    @staticmethod
    def from_pretrained(name_or_path: PathLike, **overrides: Any) -> GPTConfig:
        """Return the config in a model folder or on the Hub; overrides replace its settings."""
        return pretrained.load_config(name_or_path, **overrides)


class BatchEncoding(dict[str, Any]):
    """The result of a tokenizer; batch.input_ids is batch["input_ids"]."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"this batch has no {name}; it has {', '.join(self)}")
        return self[name]

    def to(self, device: str | torch.device) -> BatchEncoding:
        """Return a copy with its tensors on a device."""
        return BatchEncoding({name: value.to(device) for name, value in self.items()})


class GPT2Tokenizer(Tokenizer):
    """Tokenizer that parses special tokens in a text, as transformers does."""

    special_in_text = True

    def __call__(self, text: str | bytes | Sequence[str | bytes], **options: Any) -> BatchEncoding:
        """Return the result of Tokenizer as a BatchEncoding; the options are the same."""
        return BatchEncoding(super().__call__(text, **options))


class GPT2LMHeadModel(GPT):
    """GPT whose generate takes transformers' arguments."""

    def generate(  # type: ignore[override]
        self,
        input_ids: Prompts,
        max_length: int | None = None,
        *,
        max_new_tokens: int | None = None,
        min_length: int | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue prompts (B, T) int64; return (B * num_return_sequences, at most max_length), prompts included.

        max_length: maximum length including the prompt; or max_new_tokens: tokens to add.
        min_length: minimum length including the prompt; or the option min_new_tokens.
        pad_token_id: the token that pads a text after its end; by default as in GPT.generate.
        options: do_sample, repetition_penalty, no_repeat_ngram_size and all others of GPT.generate. As in transformers,
            top_k defaults to 50, 0 means no limit, and sampling follows set_seed. Unlike in transformers, padding
            tokens of the prompts do not count as repetitions.

        Raises TypeError for an argument of transformers that gptcore does not support.
        """
        if unknown := sorted(options.keys() - _OPTIONS):
            raise TypeError(
                f"generate does not have {', '.join(unknown)}; its options are {', '.join(sorted(_OPTIONS))}"
            )
        if (max_length is None) == (max_new_tokens is None):
            raise ValueError(f"give max_length or max_new_tokens, one of them, not {max_length} and {max_new_tokens}")
        rows, _ = read_prompts(input_ids, options.get("attention_mask"))
        T = max(len(row) for row in rows)
        new = max_new_tokens if max_new_tokens is not None else whole_number("max_length", max_length, 1) - T
        if max_length is not None and new < 1:
            raise ValueError(f"max_length {max_length} leaves nothing to generate: the prompts have {T} tokens already")
        if min_length is not None:
            if "min_new_tokens" in options:
                raise ValueError("give min_length or min_new_tokens, one of them")
            options["min_new_tokens"] = max(0, whole_number("min_length", min_length, 0) - T)
        options["no_repeat_ngram_size"] = options.get("no_repeat_ngram_size") or None
        if options.get("do_sample"):
            options["top_k"] = options.get("top_k", 50) or None
            options.setdefault("seed", int(torch.randint(2**63 - 1, (), device="cpu")))
        ids = super().generate(input_ids if isinstance(input_ids, Tensor) else rows, new, **options)
        eos = options["eos_token_id"] if options.get("eos_token_id") is not None else self.config.eos_token_id
        ends = ids[:, T:].eq(-1 if eos is None else eos).int()
        ended = ends.cumsum(1) > ends  # after the first end-of-text token
        if pad_token_id is not None:
            ids[:, T:] = ids[:, T:].masked_fill(ended, pad_token_id)
        return ids[:, : T + int((~ended).sum(1).max())]  # cut to the longest text


class Trainer(trainer.Trainer):
    """gptcore's Trainer, which saves model and tokenizer in output_dir for from_pretrained after training."""

    def __init__(self, model: GPT, args: TrainingArguments, *further: Any, **options: Any) -> None:
        super().__init__(model, args, *further, **options)
        if self.tokenizer is None and isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.tokenizer = self.data_collator.tokenizer  # as in transformers

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> trainer.TrainOutput:
        result = super().train(resume_from_checkpoint)
        self.save_model()
        return result


set_seed = seed_everything
AutoConfig = GPT2Config
AutoModelForCausalLM = GPT2LMHeadModel
AutoTokenizer = GPT2TokenizerFast = GPT2Tokenizer
