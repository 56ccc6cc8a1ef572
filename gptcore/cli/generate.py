"""gptcore generate: continue prompts, or reply to them."""

from __future__ import annotations

import argparse

from gptcore.cli.options import (
    add_adapter,
    add_machine,
    add_sampling,
    add_template,
    check_utf8,
    chosen_template,
    load_model,
    printable,
    sampling_of,
)

SUMMARY = "Continue each prompt; a model with a chat template replies to it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="out", metavar="MODEL", help="folder or GGUF file of a model (default: out)"
    )
    parser.add_argument(
        "--prompt", nargs="+", default=[""], help="texts to continue (default: the start of a document)"
    )
    add_adapter(parser)
    add_template(parser, "each prompt is a message to reply to; none: a text to continue (default: the model's own)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to add (default: 100)")
    add_sampling(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation, or the reply to it."""
    for prompt in args.prompt:
        check_utf8("--prompt", prompt)
    sampling = sampling_of(args)
    model, tokenizer = load_model(args)
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else tokenizer.encode("\n")
    template = chosen_template(args, tokenizer)
    if template is None:
        texts, end = args.prompt, tokenizer.eos_token_id
        prompts = [tokenizer.encode(prompt) or start for prompt in texts]
    else:
        texts, end = [""] * len(args.prompt), template.stop_token(tokenizer)
        sampling["eos_token_id"] = end
        prompts = [
            template.encode(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in args.prompt
        ]
    # The tokens above the tokenizer's, in a padded vocabulary, have no text
    real = min(tokenizer.vocab_size, model.config.vocab_size)
    rows = model.generate(prompts, args.max_new_tokens, vocab_size=real, **sampling)
    longest = max(map(len, prompts))
    for text, row in zip(texts, rows.tolist(), strict=True):
        print(text + printable(tokenizer, row[longest:], end))
    return 0
