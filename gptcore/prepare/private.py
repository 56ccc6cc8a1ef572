"""Replace personal data by typed placeholders. A number is replaced only if its check digits are right."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from gptcore.prepare.document import Document, Drop

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]))"
)
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}(?: ?[A-Z0-9]{1,3})?\b")
_PHONE = re.compile(r"(?<![\w.])(?:\+|\(?\d)[\d ()./-]{6,22}\d(?![\w.]*\d)")


@dataclass(frozen=True)
class Private:
    """Kinds of personal data to replace, and the regions (ISO 3166) of phone numbers that are written without "+".

    E-mail addresses; IP addresses that are routed publicly; cards by the Luhn check (ISO/IEC 7812); IBANs by their
    country's structure and mod 97 (ISO 13616); phone numbers by Google's libphonenumber.
    """

    kinds: list[str] = field(default_factory=lambda: ["email", "iban", "card", "ip", "phone"])
    phone_regions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kinds) - _KINDS.keys()):
            raise ValueError(f"[private] kinds has {unknown[0]!r}, expected of {', '.join(_KINDS)}")

    def __call__(self, document: Document) -> Drop | None:
        text = document.text
        for kind in _KINDS:  # in this order: a card number must not be taken for a phone number
            if kind in self.kinds:
                pattern, valid = _KINDS[kind]
                text = self._replace(document, text, kind, pattern, valid)
        if text is not document.text:
            document.text = text
        return None

    def _replace(
        self, document: Document, text: str, kind: str, pattern: re.Pattern[str], valid: Callable[[str, Private], int]
    ) -> str:
        def placeholder(match: re.Match[str]) -> str:
            length = valid(match[0], self)
            if not length:
                return match[0]
            document.counts[f"private_{kind}"] += 1
            return f"<{kind.upper()}>{match[0][length:]}"

        return pattern.sub(placeholder, text) if kind != "email" or "@" in text else text


def _email(found: str, options: Private) -> int:
    return len(found)


def _ip(found: str, options: Private) -> int:
    try:
        return len(found) if ipaddress.ip_address(found).is_global else 0
    except ValueError:
        return 0


def _card(found: str, options: Private) -> int:
    from stdnum import luhn

    digits = re.sub(r"\D", "", found)
    return len(found) if len(set(digits)) > 1 and luhn.is_valid(digits) else 0


def _iban(found: str, options: Private) -> int:
    """Return the characters of the IBAN that `found` starts with: words in capitals may follow it."""
    from stdnum import iban

    while found:
        if iban.is_valid(found):
            return len(found)
        found = found.rpartition(" ")[0]
    return 0


def _phone(found: str, options: Private) -> int:
    import phonenumbers

    for region in [None] if found.startswith("+") else options.phone_regions:
        try:
            if phonenumbers.is_valid_number(phonenumbers.parse(found, region)):
                return len(found)
        except phonenumbers.NumberParseException:
            continue
    return 0


_KINDS: dict[str, tuple[re.Pattern[str], Callable[[str, Private], int]]] = {
    "email": (_EMAIL, _email),
    "iban": (_IBAN, _iban),
    "card": (_CARD, _card),
    "ip": (_IP, _ip),
    "phone": (_PHONE, _phone),
}
