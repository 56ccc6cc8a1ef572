"""The parser of the command line, and the options that several commands share.

Options are made from the fields of GPTConfig and TrainingArguments, so each is described in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
from torch import nn

from gptcore import ops
from gptcore.lora import load_adapter
from gptcore.model import GPT
from gptcore.ops.registry import BACKENDS
from gptcore.tasks.pipelines import load
from gptcore.tasks.task import Task
from gptcore.tasks.vocabulary import use_adapter
from gptcore.text.chat import TEMPLATES, Template, find_template, template_of
from gptcore.text.tokenizer import Tokenizer

THREADS_PER_CORE = 8  # more are refused: OpenMP aborts the process where the system has no more threads


class Parser(argparse.ArgumentParser):
    """Suggests the nearest known option for an unknown one. Takes --n_layer for --n-layer, too."""

    commands: Mapping[str, argparse.ArgumentParser] = {}

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        argv = [_dashes(word) for word in argv]
        command = self.commands.get(argv[0], self) if argv else self
        known = [option for action in command._actions for option in action.option_strings]
        # Checked before argparse, which would report missing arguments first. A word with a space is text, as there.
        words = itertools.takewhile(lambda word: word != "--", argv)
        options = [word.partition("=")[0] for word in words if word.startswith("--") and " " not in word]
        unknown = [option for option in options if option not in known]
        if not unknown:
            args, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; see {command.prog} --help"
            self.error(f"unknown option or argument {unknown[0]}{hint}")
        args.given = set(options)
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") and " " not in word else word


# ---- adding options ----------------------------------------------------------------------------------------------


def add_fields(
    parser: argparse._ArgumentGroup, cls: type, defaults: Mapping[str, Any], skip: Sequence[str] = ()
) -> None:
    """Add an option for each field of a dataclass, with its name, type and help."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        default = defaults.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        kind, options = hints[field.name], {"default": default, "help": field.metadata["help"]}
        types = [part for part in get_args(kind) if part is not type(None)]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif types:  # int | None
            options["type"] = optional(types[0])
        else:
            options["type"] = kind
        if not isinstance(default, bool):
            options["help"] += f" (default: {'none' if default is None else default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def add_machine(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add --threads, --backend and --device."""
    parser.add_argument("--threads", type=int, help="threads to compute with (default: as many as cores)")
    backends = ", ".join(ops.backends())
    parser.add_argument("--backend", help=f"kernels to compute with: {backends} (default: the fastest)")
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N (default: a GPU if the backend runs on one, else the CPU)"
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add --adapter, for `load_model`."""
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter to compute with, in peft's files (default: none)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add how the next token is chosen, for `sampling_of`."""
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


def add_template(parser: argparse.ArgumentParser, help: str) -> None:
    """Add --chat-template, for `chosen_template`."""
    parser.add_argument("--chat-template", choices=[*TEMPLATES, "none"], help=help)


def add_data(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the text files and how they are cut into examples."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="text files; <|endoftext|> in a file separates documents"
    )
    parser.add_argument("--block-size", type=int, help="tokens in an example (default: the model's n_positions)")
    parser.add_argument("--cache-dir", help="folder for the token cache (default: $XDG_CACHE_HOME/gptcore)")


def add_output(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --output and --overwrite."""
    parser.add_argument("-o", "--output", required=True, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def check_output(args: argparse.Namespace, *, folder: bool = False) -> Path:
    """Return --output. Raises an error for one that exists, without --overwrite, or that is of another type."""
    output = Path(args.output)
    kind, is_kind = ("folder", output.is_dir()) if folder else ("regular file", output.is_file())
    if os.path.lexists(output) and not is_kind:
        raise ValueError(f"--output {output} is not a {kind}; choose another --output")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists; replace it with --overwrite, or choose another --output")
    return output


def print_size(output: Path) -> None:
    """Print the name and the size of a file, or of a folder with all in it."""
    size = sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file())
    print(f"{output}    {size:,} bytes")


def optional(kind: Any) -> Any:
    """Return a parser of `kind` that reads the word none as None."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"
    return read


# ---- using options -----------------------------------------------------------------------------------------------


def pick(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the values of those options that are fields of the dataclass."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(cls) if hasattr(args, field.name)}


def refuse_without_effect(args: argparse.Namespace, reason: str, *names: str) -> None:
    """Raise ValueError if one of these options was given although it would change nothing."""
    options = {f"--{no}{name.replace('_', '-')}" for name in names for no in ("", "no-")}
    if useless := sorted(options & args.given):
        raise ValueError(f"{', '.join(useless)} would have no effect, because {reason}; leave it out")


def check_range(args: argparse.Namespace, low: int, high: int, *names: str) -> None:
    """Raise ValueError if one of these options is given and outside low to high."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {low:,} to {high:,}")


def check_machine(args: argparse.Namespace) -> None:
    """Check --threads, --backend and --device where the command has them, set the threads and resolve the device."""
    if not hasattr(args, "threads"):
        return
    check_range(args, 1, THREADS_PER_CORE * (os.cpu_count() or 1), "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.backend is not None and (reason := ops.backends().get(args.backend)):
        raise ValueError(f"--backend {args.backend} is not usable here: {reason}")
    if args.device is None:
        devices = BACKENDS[args.backend].devices if args.backend in BACKENDS else ()
        gpu = torch.cuda.is_available() and (not devices or "cuda" in devices)
        args.device = torch.device("cuda" if gpu else "cpu")
        return
    match = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", args.device)
    if match is None:
        raise ValueError(f"--device is {args.device}, expected cpu, cuda or cuda:N")
    if args.device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device} does not exist: PyTorch finds {torch.cuda.device_count()} GPUs")
    args.device = torch.device(args.device)


def load_model(args: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """Return the model in the folder or GGUF file MODEL, on --device, and its tokenizer, both with --adapter."""
    model, tokenizer = GPT.from_pretrained(args.model).to(args.device), Tokenizer.from_pretrained(args.model)
    if args.adapter is not None:
        tokenizer = use_adapter(model, tokenizer, args.adapter)
    return model, tokenizer


def load_head(args: argparse.Namespace) -> tuple[Task, nn.Module]:
    """Return the model with a head for a task in the folder MODEL, on --device, with --adapter, and its task."""
    task, model = load(args.model, args.device)
    if args.adapter is not None:
        load_adapter(model, args.adapter)
    return task, model


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of `add_sampling` as arguments of generate. Raises ValueError for those without effect."""
    check_range(args, 0, 2**64 - 1, "seed")
    names = ("temperature", "top_k", "top_p", "seed")
    if args.greedy:
        refuse_without_effect(args, "--greedy takes the most probable token", *names)
        return {}
    return {"do_sample": True} | {name: getattr(args, name) for name in names}


def chosen_template(args: argparse.Namespace, tokenizer: Tokenizer) -> Template | None:
    """Return --chat-template, by default the model's own; None without either."""
    if args.chat_template is None:
        return template_of(tokenizer)
    return None if args.chat_template == "none" else find_template(args.chat_template)


def check_utf8(name: str, text: str) -> None:
    """Raise ValueError for text of the command line, a file or a pipe that is not UTF-8."""
    if lone := [character for character in text if "\ud800" <= character <= "\udfff"]:
        # Python passes a byte that is not UTF-8 as a lone surrogate
        raise ValueError(
            f"{name} {text!a} is not UTF-8: it holds the byte 0x{ord(lone[0]) & 0xFF:02x}; "
            "set the terminal or the script to UTF-8"
        )


def printable(tokenizer: Tokenizer, ids: list[int], end: int | None = None) -> str:
    """Return the text up to the token `end`, by default the end-of-text token; unpaired surrogates are replaced."""
    end = tokenizer.eos_token_id if end is None else end
    text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    return text.encode("utf-8", errors="replace").decode()
