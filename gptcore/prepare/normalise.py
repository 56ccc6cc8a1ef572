"""Normalise a text before anything looks at it. Each change is an option and is counted."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from gptcore.prepare.document import Document, Drop

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb]")  # all that remain but tab and newline
_TRAILING = re.compile(r"[ \t]+(?=\n|$)")


@dataclass(frozen=True)
class Normalise:
    """What is changed: mojibake (by ftfy, Speer 2019), Unicode form, line ends, control characters, trailing space."""

    mojibake: bool = True
    form: str = "NFC"  # or NFKC, NFD, NFKD; "" leaves the text as it is
    line_ends: bool = True
    control_characters: bool = True
    trailing_space: bool = True

    def __post_init__(self) -> None:
        if self.form not in ("", "NFC", "NFKC", "NFD", "NFKD"):
            raise ValueError(f'[normalise] form is {self.form!r}, expected NFC, NFKC, NFD, NFKD or ""')

    def __call__(self, document: Document) -> Drop | None:
        text = document.text
        if self.mojibake and not text.isascii():
            text = self._changed(document, "mojibake", text, _fix(text))
        if self.line_ends:
            text = self._changed(document, "line_ends", text, _LINE_ENDS.sub("\n", text))
        if self.control_characters:
            text = self._changed(document, "control_characters", text, _CONTROLS.sub("", text))
        if self.form and not text.isascii():
            text = self._changed(document, "unicode_form", text, unicodedata.normalize(self.form, text))  # type: ignore[arg-type]
        if self.trailing_space:
            text = self._changed(document, "trailing_space", text, _TRAILING.sub("", text))
        if text is not document.text:
            document.text = text
        return None

    @staticmethod
    def _changed(document: Document, name: str, before: str, after: str) -> str:
        if after == before:
            return before
        document.counts[name] += 1
        return after


def _fix(text: str) -> str:
    import ftfy

    return ftfy.fix_encoding(text)
