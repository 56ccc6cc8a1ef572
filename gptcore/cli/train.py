"""gptcore train: from text files to a model, its tokenizer, a loss curve and samples."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from gptcore.cli.options import (
    add_data,
    add_fields,
    add_machine,
    check_range,
    pick,
    printable,
    refuse_without_effect,
)
from gptcore.config import GPTConfig
from gptcore.data.collator import DataCollatorForLanguageModeling
from gptcore.data.datasets import TextDataset, TokenDataset, split
from gptcore.data.prepared import Prepared, find_prepared
from gptcore.hf.pretrained import read_header
from gptcore.memory import total_memory
from gptcore.model import GPT
from gptcore.text.tokenizer import Tokenizer
from gptcore.training import distributed
from gptcore.training.arguments import TrainingArguments
from gptcore.training.callbacks import read_log
from gptcore.training.checkpoint import list_checkpoints, newest_checkpoint
from gptcore.training.plot import plot_loss
from gptcore.training.resume import restarted
from gptcore.training.sharding import sharded_model
from gptcore.training.signals import TrainingInterrupted
from gptcore.training.trainer import Trainer

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
VOCAB_SIZE = 4096  # of a new tokenizer
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments in float32
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
    group.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, help=f"tokens of a new bpe tokenizer (default: {VOCAB_SIZE})"
    )
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
    """Train, then print losses and samples and draw the loss curve. Returns 130 if interrupted.

    Under torchrun each process runs this; that of rank 0 prints, and reads and writes what the others need first.
    """
    arguments = TrainingArguments(**pick(args, TrainingArguments))
    return in_each_process(args, functools.partial(_run, args, arguments))


def in_each_process(args: argparse.Namespace, body: Callable[[distributed.Processes], int]) -> int:
    """Return body(processes), during which only rank 0 prints; args.device becomes the device of this process."""
    args.device = distributed.local_device(args.device)
    processes = distributed.join(args.device)
    with processes.one_speaks():
        status = body(processes)
    distributed.leave()
    return status


def _run(args: argparse.Namespace, arguments: TrainingArguments, processes: distributed.Processes) -> int:
    out = Path(arguments.output_dir)
    args.resume = args.resume or processes.first(lambda: restarted(out))
    checkpoint = processes.first(lambda: _checkpoint(args, out))
    prepared = find_prepared(args.files)
    parts = processes.count if arguments.parallel == "fsdp" else 1
    _check(args, prepared, parts)
    torch.manual_seed(args.seed)
    tokenizer = processes.first(lambda: _tokenizer(args, checkpoint, prepared))
    config, dtype = processes.first(lambda: _kind_of_model(args, tokenizer))
    if parts > 1:
        make = functools.partial(_new_model, config, dtype)
        model: GPT = sharded_model(make, arguments, args.device, args.init_from)  # type: ignore[assignment]
    else:
        model = (GPT.from_pretrained(args.init_from) if args.init_from else GPT(config)).to(args.device)
    block_size = model.config.n_positions if args.block_size is None else args.block_size
    train_set, validation_set = processes.after_first(lambda: _datasets(args, tokenizer, block_size, prepared))
    if args.resume and checkpoint is None:
        arguments.overwrite_output_dir = True  # a run that was killed before its first checkpoint starts again
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        tokenizer=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint is not None)
    except TrainingInterrupted as interrupt:
        command = args.resume_command or shlex.join(["gptcore", *with_resume(args.argv)])
        print(f"\ninterrupted; saved {interrupt.checkpoint}. To resume:\n\n    {command}\n")
        return 130
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if processes.rank > 0:
        return 0

    log = read_log(out / "log.jsonl") if (out / "log.jsonl").exists() else []  # it may have been deleted meanwhile
    losses = [entry["loss"] for entry in log if "loss" in entry]
    print(f"\nvalidation loss   {before:.4f} -> {after:.4f}, perplexity {math.exp(after):.1f}")
    print(f"training loss     {losses[-1] if losses else result.training_loss:.4f}")
    print(f"speed             {result.metrics['tokens_per_second']:,.0f} tokens/s")
    if arguments.parallel == "fsdp" and args.samples:
        model = GPT.from_pretrained(out)  # the others have ended
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


def _datasets(
    args: argparse.Namespace, tokenizer: Tokenizer, block_size: int, prepared: Prepared | None
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the training and the validation set: of a prepared folder its own, else parts of the text files."""
    if prepared is None:
        dataset: TokenDataset = TextDataset(
            tokenizer, args.files, block_size, cache_dir=args.cache_dir, mask_documents=args.mask_documents
        )
        return split(dataset, args.validation_fraction)
    vocab_size, mask = tokenizer.vocab_size, args.mask_documents
    train, validation = (
        TokenDataset(paths, block_size, vocab_size=vocab_size, tokenizer=tokenizer, mask_documents=mask)
        if paths
        else None
        for paths in (prepared.train, prepared.validation)
    )
    assert train is not None
    return (train, validation) if validation is not None else split(train, args.validation_fraction)


def _checkpoint(args: argparse.Namespace, out: Path) -> Path | None:
    """Return the newest checkpoint if the run is resumed. Raises FileExistsError if results would be overwritten."""
    check_unused(out, args.resume, args.overwrite_output_dir)
    return newest_checkpoint(out) if args.resume and list_checkpoints(out) else None


def check_unused(out: Path, resumes: bool, overwrites: bool) -> None:
    """Raise FileExistsError if results in the folder of a run would be overwritten."""
    checkpoints = list_checkpoints(out)
    held = checkpoints or [path for name in ("model.safetensors", "tokenizer.json") if (path := out / name).exists()]
    if held and not overwrites and not (resumes and checkpoints):
        resume = "resume it with --resume, " if checkpoints else ""
        raise FileExistsError(
            f"{out} holds {'an earlier run' if checkpoints else 'a model'} ({held[-1].name}): {resume}"
            "delete it with --overwrite-output-dir, or choose another --output-dir"
        )


def _check(args: argparse.Namespace, prepared: Prepared | None, parts: int) -> None:
    """Refuse options that would have no effect, and sizes that the machine cannot hold, before any work.

    parts: processes that share the model.
    """
    check_range(args, 0, 1000, "samples")
    check_range(args, 0, 10**6, "sample_tokens")
    if prepared is not None:
        held = ("validation_fraction",) if prepared.validation else ()
        names = ("tokenizer", "cache_dir", *held)
        refuse_without_effect(args, f"{prepared.folder} holds tokens and their tokenizer", *names)
    if args.tokenizer or args.init_from or prepared:
        folder = args.tokenizer or args.init_from or args.files[0]
        refuse_without_effect(args, f"the tokenizer comes from {folder}", "vocab_size", "tokenizer_kind")
    elif args.tokenizer_kind == "char":
        refuse_without_effect(args, "a char tokenizer has a token for each character", "vocab_size")
    else:
        # 256 bytes, <|endoftext|>, and merges of bytes that the text holds
        size = sum(Path(path).stat().st_size for path in args.files)
        check_range(args, 257, max(VOCAB_SIZE, 257 + size), "vocab_size")
    if args.init_from:
        fields = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in NO_OPTIONS]
        refuse_without_effect(args, f"--init-from {args.init_from} sets it", *fields)
        return
    config = GPTConfig(**pick(args, GPTConfig))  # before the tokenizer says how many tokens there are
    needed, there = config.num_parameters * BYTES_PER_PARAMETER / parts, total_memory(args.device)
    if needed > there:
        share = f" on each of {parts} processes" if parts > 1 else ""
        raise ValueError(
            f"{config.num_parameters:,} parameters need {needed / 1e9:,.1f} GB to train{share} (weights, gradients and "
            f"two moments in float32), but {args.device} has {there / 1e9:,.1f} GB; use a smaller model"
        )


def _tokenizer(args: argparse.Namespace, checkpoint: Path | None, prepared: Prepared | None) -> Tokenizer:
    """Return the tokenizer of --tokenizer, the run to resume, --init-from or a prepared folder, else a new one."""
    if checkpoint is not None and not args.tokenizer:
        tokenizer = Tokenizer.from_pretrained(checkpoint)
        _check_same(args, tokenizer, checkpoint)
        return tokenizer
    if source := args.tokenizer or args.init_from or (prepared and prepared.tokenizer):
        return Tokenizer.from_pretrained(source)
    return _train_tokenizer(args)


def _train_tokenizer(args: argparse.Namespace) -> Tokenizer:
    vocab_size = {} if args.tokenizer_kind == "char" else {"vocab_size": args.vocab_size}
    return Tokenizer.train(args.files, kind=args.tokenizer_kind, **vocab_size)


def _check_same(args: argparse.Namespace, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Raise ValueError if --tokenizer-kind or --vocab-size asks for another tokenizer than that of the run."""
    ours = f"the tokenizer of {checkpoint} is of kind {tokenizer.kind} and has {tokenizer.vocab_size} tokens"
    advice = "resume with the options that the run was started with, or start another run"
    if "--tokenizer-kind" in args.given and args.tokenizer_kind != tokenizer.kind:
        raise ValueError(f"--tokenizer-kind is {args.tokenizer_kind}, but {ours}; {advice}")
    if "--vocab-size" in args.given and args.vocab_size != tokenizer.vocab_size:
        # A text may give fewer tokens than were asked for; only training again can tell
        fewer = args.vocab_size > tokenizer.vocab_size
        if not fewer or _train_tokenizer(args).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"--vocab-size is {args.vocab_size}, but {ours}; {advice}")


def _kind_of_model(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[GPTConfig, torch.dtype]:
    """Return config and dtype of the model in --init-from, else of a new one."""
    if not args.init_from:
        eos = tokenizer.eos_token_id
        special = {"vocab_size": tokenizer.vocab_size, "bos_token_id": eos, "eos_token_id": eos}
        return GPTConfig(**pick(args, GPTConfig) | special), torch.float32
    config, dtype, kinds = read_header(args.init_from)
    if kinds:
        raise ValueError(
            f"{args.init_from} is in {', '.join(kinds)}, and quantized weights are not trained; decode them first: "
            f"gptcore export {args.init_from} --to hf --dtype f32 -o FOLDER"
        )
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model in {args.init_from} has {config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}"
        )
    return config, dtype


def _new_model(config: GPTConfig, dtype: torch.dtype) -> GPT:
    return GPT(config).to(dtype)


def with_resume(argv: Sequence[str]) -> list[str]:
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
