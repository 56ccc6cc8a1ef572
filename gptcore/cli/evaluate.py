"""gptcore evaluate: the loss of a model on text files."""

from __future__ import annotations

import argparse

from gptcore.cli.options import add_data, add_machine, load_model
from gptcore.data.datasets import TextDataset
from gptcore.training.arguments import TrainingArguments
from gptcore.training.trainer import Trainer

SUMMARY = "Print the loss and the perplexity of a model on text files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or GGUF file of a model")
    add_data(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="examples in a forward pass (default: 16)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=False, help="compute in bfloat16")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Print the mean loss over all tokens but the first of each example."""
    model, tokenizer = load_model(args)
    block_size = model.config.n_positions if args.block_size is None else args.block_size
    dataset = TextDataset(tokenizer, args.files, block_size, cache_dir=args.cache_dir)
    options = TrainingArguments(
        output_dir=args.model, per_device_eval_batch_size=args.batch_size, bf16=args.bf16, disable_tqdm=True
    )
    metrics = Trainer(model, options, eval_dataset=dataset, tokenizer=tokenizer).evaluate()
    print(f"loss {metrics['eval_loss']:.4f} nats a token, perplexity {metrics['perplexity']:.2f}")
    return 0
