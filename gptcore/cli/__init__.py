"""The command line: `gptcore COMMAND`, one module a command."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from gptcore import ops
from gptcore.cli import (
    bench,
    chat,
    evaluate,
    export,
    finetune,
    generate,
    info,
    plan,
    predict,
    prepare,
    quantize,
    serve,
    train,
)
from gptcore.cli.options import Parser, check_machine
from gptcore.output import SteadyOutput
from gptcore.training.checkpoint import CheckpointError

COMMANDS = {
    "prepare": prepare,
    "train": train,
    "finetune": finetune,
    "plan": plan,
    "generate": generate,
    "chat": chat,
    "predict": predict,
    "evaluate": evaluate,
    "serve": serve,
    "quantize": quantize,
    "export": export,
    "bench": bench,
    "info": info,
}


def make_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="gptcore",
        description="Train and run small GPTs on fused kernels.",
        epilog="GPTCORE_DEBUG=1 in the environment shows the traceback of an error.",
        allow_abbrev=False,
    )
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
    """Run one command.

    Returns 0; 1 after an error, which is explained on stderr; 130 after Ctrl-C; 141 if the reader of stdout went away
    (training then continues). Raises SystemExit(2) for wrong usage. With GPTCORE_DEBUG=1 errors print a traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    output = SteadyOutput(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            args = make_parser().parse(argv)
            args.argv = argv
            vars(args).update(overrides)
            status = _run(args)
        finally:
            output.flush()
    if output.error is not None and status == 0 and args.command != "train":
        return 128 + signal.SIGPIPE if isinstance(output.error, BrokenPipeError) else 1
    return status


def _run(args: argparse.Namespace) -> int:
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"gptcore {args.command}: warning: {message}\n"
    try:
        check_machine(args)
        with ops.use(getattr(args, "backend", None) or ops.in_use()):
            status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, TypeError, ImportError, ArithmeticError, CheckpointError) as error:
        return _report(args, str(error) or type(error).__name__)
    except MemoryError as error:
        return _report(args, f"not enough memory: {str(error) or 'use a smaller model or batch'}")
    except RuntimeError as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        return _report(args, f"{first}; GPTCORE_DEBUG=1 shows the traceback")
    finally:
        warnings.formatwarning = plain


def _report(args: argparse.Namespace, text: str) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed too
        if os.environ.get("GPTCORE_DEBUG") == "1":
            traceback.print_exc()
        print(f"gptcore {args.command}: error: {text}", file=sys.stderr)
    return 1
