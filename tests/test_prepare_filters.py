"""The filters of gptcore prepare: equal to datatrove's reason by reason, and each threshold from both sides."""

import random

import made_texts
import pytest
from datatrove.data import Document as TheirDocument
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    c4_filters,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)

from gptcore.prepare import document as document_module
from gptcore.prepare.document import WORD, Document, count_sentences
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
from gptcore.prepare.normalise import Normalise
from gptcore.prepare.private import Private

PAIRS = {
    "gopher_repetition": (GopherRepetition(), GopherRepetitionFilter),
    "gopher_quality": (GopherQuality(), GopherQualityFilter),
    "c4": (C4Quality(), lambda: C4QualityFilter(filter_no_terminal_punct=False)),
    "c4_strict": (C4Quality(terminal_punctuation=True), C4QualityFilter),
    "fineweb": (FineWebQuality(), FineWebQualityFilter),
}


def damaged_texts() -> list[str]:
    """Texts with the faults that the filters look for, in growing doses."""
    rng = random.Random(0)
    texts = ["word", "a b", "the of " * 30, "•\n" * 60, "# " * 60, "Lorem ipsum dolor. " * 6]
    texts += ["".join(f"Short line {i}.\n" for i in range(20))]
    texts += ["".join(f"internationalisation{i} characterisation{i}.\n" for i in range(20))]
    for seed in range(200):
        lines = made_texts.text(seed, lines=rng.randint(2, 12)).split("\n")
        for _ in range(rng.choice([0, 0, 1, 2, 5, 9])):
            fault = rng.choice(
                [lines[0], made_texts.sentence(rng)[:25], "# # #", "...", "- item of the list", "• more...",
                 "[12] and [edit]. Yes.", "if (this) { return that; } else.", "JavaScript must be enabled here.",
                 "See our privacy policy, which is long.",
                 "12 345 67 8 9 10 11 12 13", "\n", "one two three four five six. " * rng.randint(1, 9), "x" * 1001,
                 "Home", "MENU", made_texts.sentence(rng)[:-1] + "...", "no end here at all",
                 f'"{made_texts.sentence(rng)}"', "See https://example.org/a/b. ::",
                 "Don't say 'no' to well-known e-mail@example.org 你好。"]
            )  # fmt: skip
            lines.insert(rng.randrange(len(lines) + 1), fault)
        texts.append("\n".join(lines))
    return texts


@pytest.mark.parametrize("name", PAIRS)
def test_agrees_with_datatrove(name, monkeypatch):
    """The same words and sentences go in; then every decision, reason and changed text is the same."""
    modules = (c4_filters, fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter)
    for module in modules:
        if hasattr(module, "split_into_words"):
            monkeypatch.setattr(module, "split_into_words", lambda text, language: WORD.findall(text))
    # datatrove counts symbols that are not in its list of punctuation, as a bullet, as words
    monkeypatch.setattr(gopher_quality_filter, "PUNCTUATION_SET", gopher_quality_filter.PUNCTUATION_SET | {"•"})
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda line, language: [""] * count_sentences(line))
    ours, make = PAIRS[name]
    theirs = make()
    reasons = set()
    for text in damaged_texts():
        document, their_document = Document(text), TheirDocument(text=text, id="")
        drop, verdict = ours(document), theirs.filter(their_document)
        reason = None if verdict is True else verdict[1]
        assert (drop.reason if drop else None) == reason, (text, drop)
        if reason is None:
            assert document.text == their_document.text
        reasons.add(reason)
        for start, end in drop.spans if drop else ():
            assert 0 <= start < end <= len(text)
    assert len(reasons) > 3, reasons


def test_repetition_marks_what_repeats():
    phrase = "again and again we say the same few words"
    text = made_texts.text(0) + "\n" + f"{phrase} " * 12
    drop = GopherRepetition()(Document(text))
    assert drop.reason.startswith("duplicated_")
    assert all(text[start:end] in f"{phrase} " * 2 for start, end in drop.spans)


@pytest.mark.parametrize(
    ("step", "kept", "dropped", "reason"),
    [
        (Length(min_chars=3), "abc", "ab", "too_short"),
        (Length(max_chars=3), "abc", "abcd", "too_long"),
        (Length(), "a", " \n", "empty"),
        (CodeQuality(max_line_length=10), "a\n" + "b" * 10, "a\n" + "b" * 11, "line_too_long"),
        (CodeQuality(max_mean_line_length=5), "abcd\nabcd", "abcdef\nabcdef", "mean_line_too_long"),
        (CodeQuality(), "ab=+()", "a=+()", "too_few_alphanumeric"),
        (Language(["de"]), "Die Würde des Menschen ist unantastbar, und sie zu achten ist Pflicht aller Gewalt.",
         "All human beings are born free and equal in dignity and rights, and should act so.", "language"),
        (Language(["en"], min_confidence=0.999), made_texts.text(0), "of the", "language_confidence"),
    ],
)  # fmt: skip
def test_thresholds(step, kept, dropped, reason):
    assert step(Document(kept)) is None
    assert step(Document(dropped)).reason == reason


def test_lists_of_sources_licences_and_words(tmp_path):
    allowed = Origin(sources=["a"], licences=["MIT"])
    assert allowed(Document("x", source="a", metadata={"license": "mit"})) is None
    assert allowed(Document("x", source="b", metadata={"license": "mit"})).reason == "source_not_allowed"
    assert allowed(Document("x", source="a", metadata={"license": "gpl"})).reason == "licence_not_allowed"
    assert allowed(Document("x", source="a")).detail == "no licence"
    (tmp_path / "words.txt").write_text("# unwanted\nbad word\nugly\n")
    step = Blocklist([str(tmp_path / "words.txt")])
    assert step(Document("a badword, uglyness")) is None
    drop = step(Document("so Ugly a bad word"))
    assert drop.spans == [(3, 7), (10, 18)]
    assert Blocklist(step.files, max_matches=0.5)(Document("so Ugly a bad word")) is None
    (tmp_path / "words.txt").write_text("\n")
    document_module.settings(step)
    with pytest.raises(ValueError, match="holds no words"):
        Blocklist([f"{tmp_path}/../{tmp_path.name}/words.txt"])(Document("x"))


def test_normalise_counts_what_it_changes():
    document = Document("\ufeffcafÃ© e\u0301\x00\r\nline\u2028end  \n\x07")
    assert Normalise()(document) is None
    assert document.text == "café é\nline\nend\n"
    assert document.counts == dict.fromkeys(
        ("mojibake", "line_ends", "control_characters", "unicode_form", "trailing_space"), 1
    )
    raw = Document("\ufeffe\u0301\r\n ")
    off = Normalise(mojibake=False, form="", line_ends=False, control_characters=False, trailing_space=False)
    assert off(raw) is None
    assert raw.text == "\ufeffe\u0301\r\n "
    assert not raw.counts
    with pytest.raises(ValueError, match="expected NFC"):
        Normalise(form="NFX")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail a.b+c@mail.example.com, now", "mail <EMAIL>, now"),
        ("x@y and @name, a@b", "x@y and @name, a@b"),
        ("card 4111 1111 1111 1111.", "card <CARD>."),
        ("card 4111 1111 1111 1112.", "card 4111 1111 1111 1112."),
        ("zeros 0000000000000000", "zeros 0000000000000000"),
        ("IBAN DE89 3704 0044 0532 0130 00 PLEASE", "IBAN <IBAN> PLEASE"),
        ("IBAN DE89370400440532013000", "IBAN <IBAN>"),
        ("IBAN DE88 3704 0044 0532 0130 00", "IBAN DE88 3704 0044 0532 0130 00"),
        ("at 8.8.8.8, not 192.168.0.1 or 1.2.3.4.5", "at <IP>, not 192.168.0.1 or 1.2.3.4.5"),
        ("v6 2001:4860:4860::8888 at 12:30:45", "v6 <IP> at 12:30:45"),
        ("call +44 20 7031 3000 or +1 000", "call <PHONE> or +1 000"),
        ("call (415) 555-2671? 1234567890", "call (415) 555-2671? 1234567890"),
    ],
)
def test_private_data(text, expected):
    document = Document(text)
    assert Private()(document) is None
    assert document.text == expected
    assert sum(document.counts.values()) == (text != expected)


def test_phones_of_a_region_and_unknown_kinds():
    document = Document("call (415) 600-2671 today")
    Private(phone_regions=["US"])(document)
    assert document.text == "call <PHONE> today"
    with pytest.raises(ValueError, match="kinds has 'name', expected of email, iban"):
        Private(kinds=["name"])
