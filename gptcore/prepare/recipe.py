"""Recipes: which steps a corpus passes through, in which order, with which thresholds. TOML overrides single values.

[gopher_quality]
min_words = 20

[fineweb_quality]
enabled = false
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from gptcore.files import PathLike, from_json, naming, open_file
from gptcore.prepare.document import Step
from gptcore.prepare.duplicates import NearDuplicates, RepeatedLines
from gptcore.prepare.evaluation import Classifier, Decontaminate, Perplexity
from gptcore.prepare.filters import (
    Blocklist,
    C4Quality,
    CodeQuality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Language,
    Length,
    Origin,
)
from gptcore.prepare.mixing import Mix, Split
from gptcore.prepare.normalise import Normalise
from gptcore.prepare.private import Private
from gptcore.prepare.readers import Limits, Reading


@dataclass(frozen=True)
class Shards:
    """How the output is cut: bytes of text in a shard, tokens of a new tokenizer and the bytes that it learns from."""

    shard_bytes: int = 100_000_000
    vocab_size: int = 4096
    tokenizer_bytes: int = 20_000_000


# The steps in their order, by their sections in TOML. Those of the second pass see what exact deduplication left.
FIRST: dict[str, Any] = {
    "normalise": Normalise,
    "length": Length,
    "origin": Origin,
    "language": Language,
    "gopher_repetition": GopherRepetition,
    "gopher_quality": GopherQuality,
    "c4_quality": C4Quality,
    "fineweb_quality": FineWebQuality,
    "code_quality": CodeQuality,
    "blocklist": Blocklist,
}
SECOND: dict[str, Any] = {
    "decontaminate": Decontaminate,
    "perplexity": Perplexity,
    "classifier": Classifier,
    "private": Private,
}
SETTINGS: dict[str, Any] = {
    "reading": Reading,
    "limits": Limits,
    "repeated_lines": RepeatedLines,
    "near_duplicates": NearDuplicates,
    "split": Split,
    "mix": Mix,
    "shards": Shards,
}
SECTIONS = SETTINGS | FIRST | SECOND

# What each recipe switches on beside what all have, with the values that differ from the defaults
_ALL: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("reading", "limits", "split", "mix", "shards", "normalise", "length", "near_duplicates")},
    **{
        name: {} for name in ("origin", "blocklist", "decontaminate", "perplexity", "classifier")
    },  # without files they keep all
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "web": _ALL | {name: {} for name in ("language", "gopher_repetition", "gopher_quality", "c4_quality",
                                         "fineweb_quality", "private")},  # the order of FineWeb
    "books": _ALL | {
        "language": {}, "gopher_repetition": {}, "private": {},
        "gopher_quality": {"min_words": 200, "max_words": 10_000_000},
    },
    "code": _ALL | {"normalise": {"mojibake": False, "trailing_space": False}, "code_quality": {},
                    "private": {"kinds": ["email", "ip"]}},
    "none": {name: {} for name in ("reading", "limits", "length", "split", "mix", "shards")} | {
        "near_duplicates": {"action": "keep"}, "origin": {}, "blocklist": {}, "decontaminate": {}, "perplexity": {},
        "classifier": {}},
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. A section that is absent from `sections` is switched off."""

    name: str
    sections: dict[str, Any] = field(default_factory=dict)  # of SECTIONS, as their dataclasses

    @property
    def reading(self) -> Reading:
        return dataclasses.replace(self.sections["reading"], limits=self.sections["limits"])

    @property
    def first(self) -> dict[str, Step]:
        return {name: self.sections[name] for name in FIRST if name in self.sections}

    @property
    def second(self) -> dict[str, Step]:
        return {name: self.sections[name] for name in SECOND if name in self.sections}

    def to_json(self) -> dict[str, Any]:
        """Return every setting with its value; a section that is off is None."""
        found: dict[str, Any] = dict.fromkeys(SECTIONS)
        found |= {name: dataclasses.asdict(section) for name, section in self.sections.items()}
        found["reading"].pop("limits")
        return {"recipe": self.name, **found}


def make_recipe(name: str, changes: dict[str, Any] | None = None, where: PathLike = "the recipe") -> Recipe:
    """Return a recipe with changes, section by section.

    Raises ValueError, naming `where`, for a section, key or type that is not known.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}, only {', '.join(RECIPES)}")
    sections = {section: dict(values) for section, values in RECIPES[name].items()}
    for section, values in (changes or {}).items():
        if section not in SECTIONS:
            raise ValueError(f"{where} has the section {section!r}, which is not known; expected {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {section} should be a section [{section}], not {values!r}")
        enabled = values.get("enabled", True)
        if not isinstance(enabled, bool):
            raise ValueError(f"{where}, [{section}]: 'enabled' should be true or false, not {enabled!r}")
        if not enabled:
            if section in ("reading", "limits", "split", "shards", "mix"):
                raise ValueError(f"{where}: [{section}] cannot be switched off")
            sections.pop(section, None)
            continue
        given = {key: value for key, value in values.items() if key != "enabled"}
        sections[section] = sections.get(section, {}) | given
    return Recipe(name, {section: _section(section, values, where) for section, values in sections.items()})


def _section(name: str, values: dict[str, Any], where: PathLike) -> Any:
    """Return the dataclass of a section; values that are not given are the defaults."""
    cls = SECTIONS[name]
    defaults = dataclasses.asdict(cls())
    if unknown := sorted(values.keys() - defaults.keys() | values.keys() & {"limits"}):
        raise ValueError(f"{where}, [{name}] has {unknown[0]!r}, which is not known; expected {', '.join(defaults)}")
    return from_json(cls, defaults | values, f"{where}, [{name}]")


def read_changes(path: PathLike) -> dict[str, Any]:
    """Return the sections of a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with open_file(path) as file, naming(path, "is not TOML"):
        return tomllib.load(file)
