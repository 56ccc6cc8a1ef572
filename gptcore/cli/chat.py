"""gptcore chat: talk with a model, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from gptcore.cli.options import (
    add_adapter,
    add_machine,
    add_sampling,
    add_template,
    check_range,
    check_utf8,
    chosen_template,
    load_model,
    sampling_of,
)
from gptcore.generation import seed_of_row
from gptcore.model import GPT
from gptcore.serving.text import Decoder, Speller
from gptcore.text.chat import TEMPLATES, Message, Template
from gptcore.text.tokenizer import Tokenizer

SUMMARY = "Talk with a model: each line is a message, and gets a reply."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or GGUF file of a model")
    add_adapter(parser)
    add_template(parser, "how messages become text (default: as the model was trained)")
    parser.add_argument("--system", metavar="TEXT", help="message before all others (default: none)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="tokens of a reply, at most (default: 256, or half of the model's positions)"
    )
    add_sampling(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Reply to each line of stdin. Ctrl-C ends a reply and, at the prompt, the conversation."""
    sampling = sampling_of(args)
    model, tokenizer = load_model(args)
    positions = model.config.n_positions
    check_range(args, 1, positions - 1, "max_new_tokens")
    new = min(256, positions // 2) if args.max_new_tokens is None else args.max_new_tokens
    template = chosen_template(args, tokenizer)
    if template is None:
        raise ValueError(
            f"{args.model} has no chat template; say how messages become text with --chat-template "
            f"{', '.join(TEMPLATES)}: plain and alpaca are text that any model continues"
        )
    history: list[Message] = []
    if args.system is not None:
        check_utf8("--system", args.system)
        history.append({"role": "system", "content": args.system})
    terminal = sys.stdin.isatty()
    if terminal:
        note(f"{template.name}, {positions} tokens; Ctrl-C ends a reply, Ctrl-D the conversation")
    for turn, line in enumerate(lines(terminal)):
        check_utf8("the message", line)
        talk: list[Message] = [*history, {"role": "user", "content": line}]
        try:
            kept = template.fit(tokenizer, talk, positions - new, add_generation_prompt=True)
        except ValueError as error:
            if not terminal:
                raise
            note(f"{error}; a reply takes {new} more (--max-new-tokens)")
            continue
        if left_out := len(talk) - len(kept):
            note(f"the model has {positions} positions: the oldest {left_out} messages are left out")
        reply = ""
        seed = None if sampling.get("seed") is None else seed_of_row(sampling["seed"], turn)
        settings = sampling | ({} if seed is None else {"seed": seed})
        try:
            for piece in stream(model, tokenizer, template, kept, new, settings):
                print(piece, end="", flush=True)
                reply += piece
        except KeyboardInterrupt:
            if not terminal:
                raise
        print(flush=True)
        history = [*kept, {"role": "assistant", "content": reply}]
    if terminal:
        note("")
    return 0


def lines(terminal: bool) -> Iterator[str]:
    """Yield the lines of stdin that are not empty; a terminal shows a prompt, and can edit lines and find old ones."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it)
    while True:
        try:
            # Only with the real stdout, not the one that survives a closed pipe, does input() edit lines
            with contextlib.redirect_stdout(sys.__stdout__ if terminal else sys.stdout):
                line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            return
        if not terminal and not line:
            return
        if line := line.strip():
            yield line


def stream(
    model: GPT, tokenizer: Tokenizer, template: Template, messages: list[Message], new: int, settings: dict[str, Any]
) -> Iterator[str]:
    """Yield the text of a reply as it comes, whole characters only, up to an end of the template's."""
    prompt = template.encode(tokenizer, messages, add_generation_prompt=True)
    stop = template.stop_token(tokenizer)
    speller, decoder = Speller(tokenizer, prompt[-1]), Decoder(template.stop_strings)
    real = min(tokenizer.vocab_size, model.config.vocab_size)
    for token in model.stream([prompt], new, vocab_size=real, eos_token_id=stop, **settings):
        if token.token != stop:
            yield decoder.feed(speller.take(token.token))
        if decoder.stopped:
            return
    yield decoder.end()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
