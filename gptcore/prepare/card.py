"""README.md of a prepared corpus: a dataset card in the form of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def render(report: dict[str, Any]) -> str:
    """Return the card: YAML for the Hub, then what was done, in tables."""
    read, kept, splits = report["read"], report["kept"], report["splits"]
    languages = sorted(report["languages"]["after"])
    licences = sorted(report["licences"])
    size = next(
        name for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
                                 (10**7, "1M<n<10M"), (10**99, "10M<n<100M"))
        if kept["documents"] < limit
    )  # fmt: skip
    head = ["---", "task_categories:", "- text-generation", "size_categories:", f"- {size}"]
    for name, values in (
        ("language", languages),
        ("license", [licences[0].lower() if len(licences) == 1 else "other"]),
    ):
        head += [f"{name}:", *(f"- {_yaml(value)}" for value in values)] if values else []
    head += ["configs:", "- config_name: default", "  data_files:"]
    for name, split in splits.items():
        if split["shards"]:
            head += [f"  - split: {name}", f"    path: text/{name}-*.jsonl.zst"]
    lines = [
        *head, "---", "", "# Prepared corpus", "",
        f"{kept['documents']:,} of {read['documents']:,} documents, {kept['bytes']:,} of {read['bytes']:,} bytes, "
        "prepared by [gptcore](report.html). `gptcore train` takes this folder; `text/` has the documents.", "",
        "## Splits", "",
        "Documents that are near duplicates of each other are on the same side.", "",
        *_table("split", ["documents", "bytes", "tokens"], splits), "",
        "## Sources", "",
        *_table("source", ["documents_read", "documents_kept", "bytes_kept", "repeats"], report["sources"]), "",
        f"Licences: {', '.join(f'{name} ({n:,})' for name, n in report['licences'].items()) or 'not stated'}.", "",
        "## Curation", "",
        *_table("step: reason", ["documents", "bytes"],
                {f"{step['step']}: {reason}": dropped for step in report["steps"]
                 for reason, dropped in step["dropped"].items()}), "",
        "## Personal and sensitive information", "",
        ("Replaced by placeholders: " + ", ".join(f"{name} {n:,}" for name, n in report["private"].items()) + "."
         if report["private"] else "Nothing was replaced by placeholders."),
        "Names of persons are not detected.", "",
        "## How to make it again", "", "```", report["command"], "```", "",
        "with " + ", ".join(f"{name} {version}" for name, version in report["plan"]["versions"].items()) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _yaml(text: str) -> str:
    return "'no'" if text == "no" else text  # Norwegian, which YAML would read as false


def _table(head: str, keys: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table: the name of each row, then its numbers."""
    cells = [[head, *(key.replace("_", " ") for key in keys)], ["---"] * (len(keys) + 1)]
    for name, row in rows.items():
        numbers = (f"{row[key]:.2f}" if isinstance(row[key], float) else f"{row[key]:,}" for key in keys)
        cells.append([name.replace("|", "\\|"), *numbers])
    return [f"| {' | '.join(row)} |" for row in cells]
