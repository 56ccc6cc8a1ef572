"""gptcore train: from text files to a model, its tokenizer, a loss curve and samples."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptcore.cli.options import add_data, add_fields, add_machine, pick, printable, refuse_without_effect
from gptcore.config import GPTConfig
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.data.datasets import TextDataset, split
from gptcore.model import GPT
from gptcore.text.tokenizer import Tokenizer
from gptcore.training.callbacks import read_log
from gptcore.training.checkpoint import list_checkpoints
from gptcore.training.plot import plot_loss
from gptcore.training.trainer import Trainer, TrainingArguments, TrainingInterrupted

SUMMARY = "Train a model on text files, and a tokenizer unless one is given."

# Where the defaults differ from those of the classes: a model that a laptop trains in minutes.
SMALL_MODEL: dict[str, Any] = {
    "n_positions": 256,
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SMALL_RUN: dict[str, Any] = {
    "output_dir": "out",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "logging_steps": 10,
    "eval_steps": 100,
    "save_steps": 100,
    "save_total_limit": 2,
}
# Set by the tokenizer, but for the last, which only affects transformers.
NO_OPTIONS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "reorder_and_upcast_attn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and tokenizer")
    add_data(group)
    group.add_argument(
        "--validation-fraction", type=float, default=0.05, help="part of the data, at its end, to evaluate on"
        " (default: 0.05)",
    )  # fmt: skip
    group.add_argument(
        "--mask-documents", action=argparse.BooleanOptionalAction, default=False,
        help="attend only within a document",
    )  # fmt: skip
    group.add_argument("--tokenizer", help="folder of a tokenizer (default: train one on FILE)")
    group.add_argument(
        "--tokenizer-kind", choices=("bpe", "char"), default="bpe", help="tokenizer to train (default: bpe)"
    )
    group.add_argument("--vocab-size", type=int, default=4096, help="tokens of a new bpe tokenizer (default: 4096)")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--init-from", help="folder of a model to start from; the other options of this group are then invalid"
    )
    add_fields(group, GPTConfig, SMALL_MODEL, skip=NO_OPTIONS)
    group = parser.add_argument_group("training")
    group.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in output_dir, if any")
    add_fields(group, TrainingArguments, SMALL_RUN)
    group = parser.add_argument_group("samples and machine")
    group.add_argument("--samples", type=int, default=3, help="texts to generate after training (default: 3)")
    group.add_argument("--sample-tokens", type=int, default=120, help="tokens in a sample, at most (default: 120)")
    add_machine(group)
    parser.set_defaults(resume_command=None)


def run(args: argparse.Namespace) -> int:
    """Train, then print losses and samples and draw the loss curve. Returns 130 if interrupted."""
    if args.init_from:
        fields = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in NO_OPTIONS]
        refuse_without_effect(args, f"--init-from {args.init_from} sets it", *fields)
    tokenizer_options = ("vocab_size", "tokenizer_kind")
    if args.tokenizer or args.init_from:
        folder = args.tokenizer or args.init_from
        refuse_without_effect(args, f"the tokenizer comes from {folder}", *tokenizer_options)
    elif args.tokenizer_kind == "char":
        refuse_without_effect(args, "a char tokenizer has a token for each character", "vocab_size")
    out = Path(args.output_dir)
    resume = args.resume and bool(list_checkpoints(out))
    torch.manual_seed(args.seed)
    tokenizer = _tokenizer(args, out, resume)
    model = _model(args, tokenizer).to(args.device)
    block_size = model.config.n_positions if args.block_size is None else args.block_size
    dataset = TextDataset(
        tokenizer, args.files, block_size, cache_dir=args.cache_dir, mask_documents=args.mask_documents
    )
    train_set, validation_set = split(dataset, args.validation_fraction)
    if args.resume and not resume:
        args.overwrite_output_dir = True  # a run that was killed before its first checkpoint starts again
    trainer = Trainer(
        model,
        TrainingArguments(**pick(args, TrainingArguments)),
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        tokenizer=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    tokenizer.save_pretrained(out)
    try:
        result = trainer.train(resume_from_checkpoint=resume)
    except TrainingInterrupted as interrupt:
        command = args.resume_command or shlex.join(["gptcore", *_with_resume(args.argv)])
        print(f"\ninterrupted; saved {interrupt.checkpoint}. To resume:\n\n    {command}\n")
        return 130
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    log = read_log(out / "log.jsonl")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    print(f"\nvalidation loss   {before:.4f} -> {after:.4f} ({after / before:.0%}), perplexity {math.exp(after):.1f}")
    print(f"training loss     {losses[-1] if losses else result.training_loss:.4f}")
    print(f"speed             {result.metrics['tokens_per_second']:,.0f} tokens/s")
    for number, text in enumerate(_samples(model, tokenizer, args.samples, args.sample_tokens, args.seed), start=1):
        print(f"\n---- sample {number} " + "-" * 60 + f"\n{text}")
    print()
    try:
        plot_loss(log, out / "loss.png")
        print(f"loss curve        {out / 'loss.png'}")
    except ImportError:
        print('loss curve        not drawn: matplotlib is missing (pip install "gptcore[plot]")')
    print(f"model             {out}    (gptcore generate {out} --prompt ...)")
    return 0


def _tokenizer(args: argparse.Namespace, out: Path, resume: bool) -> Tokenizer:
    """Return the tokenizer of --tokenizer, of the run to resume, or of --init-from, else a newly trained one."""
    if not resume and not args.overwrite_output_dir and list_checkpoints(out):
        raise FileExistsError(
            f"{out} holds an earlier run: resume it with --resume, delete it with --overwrite-output-dir, "
            "or choose another --output-dir"
        )
    source = args.tokenizer or (out if resume else args.init_from)
    if source:
        return Tokenizer.from_pretrained(source)
    vocab_size = {} if args.tokenizer_kind == "char" else {"vocab_size": args.vocab_size}
    return Tokenizer.train(args.files, kind=args.tokenizer_kind, **vocab_size)


def _model(args: argparse.Namespace, tokenizer: Tokenizer) -> GPT:
    """Return the model in --init-from, else a new one."""
    if not args.init_from:
        eos = tokenizer.eos_token_id
        special = {"vocab_size": tokenizer.vocab_size, "bos_token_id": eos, "eos_token_id": eos}
        return GPT(GPTConfig(**pick(args, GPTConfig) | special))
    model = GPT.from_pretrained(args.init_from)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model in {args.init_from} has {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}"
        )
    return model


def _with_resume(argv: Sequence[str]) -> list[str]:
    kept = [word for word in argv if word not in ("--overwrite-output-dir", "--resume")]
    return [*kept, "--resume"]


def _samples(model: GPT, tokenizer: Tokenizer, count: int, new_tokens: int, seed: int) -> list[str]:
    """Return texts that the model generates from the start of a document."""
    start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.encode("\n")[0]
    new_tokens = min(new_tokens, model.config.n_positions - 1)
    if count < 1 or new_tokens < 1:
        return []
    ids = model.generate(
        [[start]] * count,
        new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        seed=seed,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    return [printable(tokenizer, row[1:].tolist()) for row in ids]
