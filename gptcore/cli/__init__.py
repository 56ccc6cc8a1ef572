"""The command line: gptcore train | generate | evaluate | export | bench | info. One module a command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from gptcore import ops
from gptcore.cli import bench, evaluate, export, generate, info, train
from gptcore.cli.options import Parser, device_of
from gptcore.training.checkpoint import CheckpointError

COMMANDS = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "bench": bench,
    "info": info,
}


def make_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="gptcore", description="Train and run small GPTs on fused kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = module.SUMMARY
        help = text[0].lower() + text[1:].rstrip(".")
        command = commands.add_parser(name, help=help, description=text, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parser.commands = commands.choices
    return parser


def main(argv: Sequence[str] | None = None, **overrides: Any) -> int:
    """Run one command. Returns 0, 1 after an error that it explains, 2 for wrong usage, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse(argv)
    args.argv = argv
    vars(args).update(overrides)
    try:
        if getattr(args, "threads", None) is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is {args.threads}, expected at least 1")
            torch.set_num_threads(args.threads)
        backend = getattr(args, "backend", None)
        if backend is not None and (reason := ops.backends().get(backend)):
            raise ValueError(f"--backend {backend} is not usable here: {reason}")
        with ops.use(backend or ops.in_use()):
            if hasattr(args, "device"):
                args.device = device_of(args)
            status: int = args.run(args)
        return status
    except (OSError, ValueError, TypeError, ImportError, CheckpointError, ArithmeticError) as error:
        print(f"gptcore {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
