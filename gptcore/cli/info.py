"""gptcore info: what is installed and which backends work."""

from __future__ import annotations

import argparse

from gptcore import info

SUMMARY = "Print versions, hardware, available backends, and why any is unavailable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


def run(args: argparse.Namespace) -> int:
    """Print a line for each fact."""
    for name, text in info.describe().items():
        first, *rest = text.splitlines()
        print(f"{name:<17} {first}")
        for line in rest:
            print(" " * 18 + line)
    return 0
