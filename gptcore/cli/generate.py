"""gptcore generate: continue prompts."""

from __future__ import annotations

import argparse

from gptcore.cli.options import add_machine, check_range, load_model, optional, printable, refuse_without_effect

SUMMARY = "Continue each prompt."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="out", metavar="MODEL", help="folder or GGUF file of a model (default: out)"
    )
    parser.add_argument(
        "--prompt", nargs="+", default=[""], help="texts to continue (default: the start of a document)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to add (default: 100)")
    parser.add_argument("--greedy", action="store_true", help="always take the most probable token")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits (default: 0.8)")
    parser.add_argument(
        "--top-k", type=optional(int), default=50, help="sample from the k most probable tokens (default: 50)"
    )
    parser.add_argument(
        "--top-p", type=optional(float),
        help="sample from the fewest tokens whose probabilities add up to p (default: none)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: a new one each time)")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation."""
    check_range(args, 0, 2**64 - 1, "seed")
    for prompt in args.prompt:
        if lone := [character for character in prompt if "\ud800" <= character <= "\udfff"]:
            # Python passes a byte that is not UTF-8 as a lone surrogate
            raise ValueError(
                f"--prompt {prompt!a} is not UTF-8: it holds the byte 0x{ord(lone[0]) & 0xFF:02x}; "
                "set the terminal or the script to UTF-8"
            )
    model, tokenizer = load_model(args)
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else tokenizer.encode("\n")
    prompts = [tokenizer.encode(prompt) or start for prompt in args.prompt]
    sampling, names = {}, ("temperature", "top_k", "top_p", "seed")
    if args.greedy:
        refuse_without_effect(args, "--greedy takes the most probable token", *names)
    else:
        sampling = {"do_sample": True} | {name: getattr(args, name) for name in names}
    # The tokens above the tokenizer's, in a padded vocabulary, have no text
    real = min(tokenizer.vocab_size, model.config.vocab_size)
    rows = model.generate(prompts, args.max_new_tokens, vocab_size=real, **sampling)
    longest = max(map(len, prompts))
    for text, row in zip(args.prompt, rows.tolist(), strict=True):
        print(text + printable(tokenizer, row[longest:]))
    return 0
