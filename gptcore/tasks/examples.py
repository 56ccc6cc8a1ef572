"""Examples for the tasks with a head, read from files: columns are guessed from their names, every value is checked.

Nothing is left out in silence: what cannot be used raises ValueError with the file, the line, the column and what was
expected. What was decided for the user is a note, for `gptcore finetune` to print.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptcore.files import PathLike
from gptcore.tasks.records import SUFFIXES, Record, choose, kind, read_records, read_text, string

Span = tuple[int, int]  # [start, end) in characters
TEXTS = ("text", "sentence", "review", "content", "document", "tweet", "message", "comment", "body",
         "text1", "sentence1", "premise", "question1")  # fmt: skip
PAIRS = ("text_pair", "text2", "sentence2", "hypothesis", "question2")
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "score", "stars", "tags")
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
ENTITIES = ("entities", "spans", "labels", "label")
CONTEXTS = ("context", "passage", "premise", "story", "ctx")
CHOICES = ("choices", "endings", "options", "answers")
ANSWERS = ("label", "answer", "gold", "correct")
# A word ends where the pre-tokenizers of GPT-1 and GPT-2 cut: between letters, digits and other characters
_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")


class Columns(NamedTuple):
    """Names of columns or keys; None to guess them."""

    text: str | None = None
    label: str | None = None
    pair: str | None = None


class Text(NamedTuple):
    place: str
    text: str
    pair: str | None = None
    label: str | tuple[str, ...] | float | None = None  # one of several, any number of them, or a number


class Sentence(NamedTuple):
    place: str
    text: str
    words: tuple[Span, ...]
    tags: tuple[str, ...] | None = None  # of the words, IOB2


class Question(NamedTuple):
    place: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None  # (text, start); () if the context has no answer
    id: str | None = None


class Choice(NamedTuple):
    place: str
    context: str
    choices: tuple[str, ...]
    label: int | None = None


class Read(NamedTuple):
    examples: list[Any]
    notes: list[str]  # what was guessed and converted


# ---- classification --------------------------------------------------------------------------------------------------


def read_texts(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
    """Return the Text of each record. Labels are strings, lists of strings (any number of labels), or numbers.

    Numbers are values to predict (regression) if one of them has a fraction, else names of classes.
    """
    records = _records(path)
    text = choose(records, columns.text, "--text-column", TEXTS)
    label = choose(records, columns.label, "--label-column", LABELS)
    pair = choose(records, columns.pair, "--pair-column", PAIRS)
    names = list(records[0].values)
    if text is None and label is None and len(names) == 2:  # the label is the one with fewer values
        text, label = sorted(names, key=lambda name: -len({str(r.values.get(name)) for r in records}))
    if text is None:
        text = next((name for name in names if name not in (label, pair)), None) if len(names) == 2 else None
    if label is None and len(names) == 2 and labelled:
        label = next(name for name in names if name != text)
    for name, option in ((text, "--text-column"), (label if labelled else "", "--label-column")):
        if name is None:
            raise ValueError(
                f"{records[0].place} has the columns {', '.join(map(repr, names))}; say with {option} which"
            )
    assert text is not None
    if not labelled:
        label = None
    examples = [
        Text(r.place, string(r, text), string(r, pair) if pair else None, _label(r, label) if label else None)
        for r in records
    ]
    shown = [f"text: {text!r}", *([f"pair: {pair!r}"] if pair else []), *([f"label: {label!r}"] if label else [])]
    return Read(_as_numbers(examples), [f"columns of {path}: {', '.join(shown)}"])


def _label(record: Record, key: str) -> str | tuple[str, ...] | float:
    value = record.values.get(key)
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, str) or not item:
                raise ValueError(f"{record.place}, {key!r} holds {kind(item)}, expected names of labels")
        return tuple(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"{record.place}, {key!r} is {value}, expected a finite number")
        return value if isinstance(value, float) and not value.is_integer() else str(int(value))
    return string(record, key).strip()


def _as_numbers(examples: list[Text]) -> list[Text]:
    """Return the examples with numbers as labels if all are, and one of them has a fraction."""
    kinds = {type(e.label) for e in examples}
    if tuple in kinds and len(kinds) > 1:
        odd = next(e for e in examples if not isinstance(e.label, tuple))
        raise ValueError(f"{odd.place}: the label is {odd.label!r}, but others are lists; expected a list")
    if tuple in kinds or type(None) in kinds:
        return examples
    numbers = [_number(str(e.label)) for e in examples]
    fractions = any(number is not None and not number.is_integer() for number in numbers)
    if fractions and None not in numbers:
        return [e._replace(label=number) for e, number in zip(examples, numbers, strict=True)]
    if odd_one := next((e for e in examples if isinstance(e.label, float)), None):
        raise ValueError(f"{odd_one.place}: the label is {odd_one.label}, but others are names; expected a name")
    return examples


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- entities --------------------------------------------------------------------------------------------------------


def words_of(text: str) -> tuple[Span, ...]:
    """Return the words of a text as spans."""
    return tuple(match.span() for match in _WORD.finditer(text))


def trimmed(text: str, span: Span) -> Span:
    """Return a span without the white space around it; of white space alone, an empty one at its end."""
    part = text[slice(*span)]
    if not part.strip():
        return span[1], span[1]
    return span[1] - len(part.lstrip()), span[1] - len(part) + len(part.rstrip())


def read_sentences(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
    """Return the Sentence of each record: CoNLL lines, {"tokens", "tags"}, or {"text", "entities"}."""
    if Path(path).suffix.lower() not in SUFFIXES:
        return _read_conll(path, labelled)
    records = _records(path)
    words = choose(records, columns.text, "--text-column", (*WORDS, *TEXTS))
    label = choose(records, columns.label, "--label-column", (*TAGS, *ENTITIES)) if labelled else None
    if words is None or (labelled and label is None):
        names = ", ".join(map(repr, records[0].values))
        raise ValueError(f"{records[0].place} has {names}, expected tokens and tags, or text and entities")
    read = _tagged if isinstance(records[0].values[words], list) else _annotated
    found = [read(record, words, label) for record in records]
    notes = [f"columns of {path}: text: {words!r}" + (f", label: {label!r}" if label else "")]
    return _iob2(found, notes)


def _read_conll(path: PathLike, labelled: bool) -> Read:
    """Read lines of a word, maybe other columns, and a tag; an empty line ends a sentence."""
    sentences: list[Sentence] = []
    rows: list[tuple[str, str]] = []
    first = 1
    for number, line in enumerate([*read_text(path).splitlines(), ""], start=1):
        fields = line.split("\t") if "\t" in line.strip() else line.split()
        fields = [field.strip() for field in fields]
        if line.strip() and fields[0] != "-DOCSTART-":
            if len(fields) < 2 and labelled:
                raise ValueError(f"{path}, line {number} is {line.strip()!r}, expected a word and a tag")
            if not fields[0] or not fields[-1]:
                raise ValueError(f"{path}, line {number} has an empty column, expected a word and a tag")
            first = first if rows else number
            rows.append((fields[0], fields[-1]))
        elif rows:
            place = f"{path}, line {first}"
            words, tags = zip(*rows, strict=True)
            sentences.append(_sentence(place, words, tags if labelled else None))
            rows = []
    if not sentences:
        raise ValueError(f"{path} has no sentence, expected lines of a word and a tag")
    return _iob2(sentences, [f"columns of {path}: the first is the word, the last the tag"])


def _sentence(place: str, words: Sequence[str], tags: Sequence[str] | None) -> Sentence:
    """Return a sentence of words with a space between."""
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    return Sentence(place, " ".join(words), tuple(spans), None if tags is None else tuple(tags))


def _tagged(record: Record, words: str, label: str | None) -> Sentence:
    listed = record.values.get(words)
    if not isinstance(listed, list) or not listed or not all(isinstance(word, str) for word in listed):
        raise ValueError(f"{record.place}, {words!r} is {kind(listed)}, expected a list of words")
    if empty := [i for i, word in enumerate(listed) if not word.strip() or word != word.strip()]:
        raise ValueError(
            f"{record.place}, {words!r}: word {empty[0]} is {listed[empty[0]]!r}, expected a word without spaces around"
        )
    tags = record.values.get(label) if label else None
    if label and (not isinstance(tags, list) or len(tags) != len(listed) or not all(isinstance(t, str) for t in tags)):
        found = f"{len(tags)} values" if isinstance(tags, list) else kind(tags)
        raise ValueError(
            f"{record.place}, {label!r} is {found}, expected {len(listed)} names of tags, as many as {words!r}"
        )
    return _sentence(record.place, listed, tags)


def _annotated(record: Record, key: str, label: str | None) -> Sentence:
    """Return the sentence of a text with entities: {"start", "end", "label"} or [start, end, label]."""
    text = string(record, key)
    words = words_of(text)
    if label is None:
        return Sentence(record.place, text, words)
    entities = record.values.get(label)
    if not isinstance(entities, list):
        raise ValueError(f"{record.place}, {label!r} is {kind(entities)}, expected a list of entities")
    tags = ["O"] * len(words)
    for number, entity in enumerate(entities):
        where = f"{record.place}, {label!r}, entity {number}"
        start, end, name = _entity(where, entity, text)
        inside = [i for i, (a, b) in enumerate(words) if a < end and b > start]
        if not inside or words[inside[0]][0] != start or words[inside[-1]][1] != end:
            near = (words[inside[0]][0], words[inside[-1]][1]) if inside else "none"
            raise ValueError(
                f"{where}: {start} to {end} is {text[start:end]!r}, expected whole words; the nearest are at {near}"
            )
        if taken := [i for i in inside if tags[i] != "O"]:
            raise ValueError(
                f"{where}: {text[slice(*words[taken[0]])]!r} is in an entity already; they may not overlap"
            )
        for i in inside:
            tags[i] = ("B-" if i == inside[0] else "I-") + name
    return Sentence(record.place, text, words, tuple(tags))


def _entity(where: str, entity: Any, text: str) -> tuple[int, int, str]:
    if isinstance(entity, list) and len(entity) == 3:
        entity = dict(zip(("start", "end", "label"), entity, strict=True))
    if not isinstance(entity, dict):
        raise ValueError(f"{where} is {kind(entity)}, expected start, end and label")
    name = next((entity[key] for key in ("label", "entity", "type", "tag") if key in entity), None)
    start, end = entity.get("start"), entity.get("end")
    for key, value in (("start", start), ("end", end)):
        if type(value) is not int:
            raise ValueError(f"{where}, {key!r} is {kind(value)}, expected a whole number")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has no label, expected a name")
    assert isinstance(start, int)
    assert isinstance(end, int)
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{where}: {start} to {end} is outside of the text, expected 0 to {len(text)} characters")
    said = entity.get("text", entity.get("word"))
    if said is not None and said != text[start:end]:
        raise ValueError(
            f"{where}: the text at {start} to {end} is {text[start:end]!r}, but the entity says {said!r}; offsets "
            "count characters from 0, and the end is the first after the entity"
        )
    return start, end, name


def _iob2(sentences: list[Sentence], notes: list[str]) -> Read:
    """Check the tags and return them in IOB2; an entity of IOB1 may begin with I-."""
    converted, made = 0, []
    for sentence in sentences:
        tags, before = [], "O"
        for i, tag in enumerate(sentence.tags or ()):
            if tag != "O" and not re.fullmatch(r"[BI]-.+", tag):
                word = sentence.text[slice(*sentence.words[i])]
                raise ValueError(
                    f"{sentence.place}, word {i + 1} ({word!r}) has the tag {tag!r}, expected O, B-NAME or I-NAME"
                )
            begins = tag.startswith("I-") and before[2:] != tag[2:]
            converted += begins
            tags.append("B-" + tag[2:] if begins else tag)
            before = tag
        made.append(sentence if sentence.tags is None else sentence._replace(tags=tuple(tags)))
    if converted:
        notes.append(f"{converted} entities begin with I- (IOB1), which is read as B-")
    return Read(made, notes)


# ---- question answering ----------------------------------------------------------------------------------------------


def read_questions(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
    """Return the Question of each record: SQuAD's format, nested or flat."""
    records = _records(path)
    context = choose(records, columns.text, "--text-column", CONTEXTS)
    if context is None or "question" not in records[0].values:
        names = ", ".join(map(repr, records[0].values))
        raise ValueError(f"{records[0].place} has {names}, expected question and context")
    label = choose(records, columns.label, "--label-column", ("answers", "answer")) if labelled else None
    if labelled and label is None:
        raise ValueError(f"{records[0].place} has no answers, expected {{'text': [...], 'answer_start': [...]}}")
    searched: Counter[str] = Counter()
    examples = []
    for record in records:
        found, text = None, string(record, context)
        if label is not None and not (label not in record.values and record.values.get("is_impossible") is True):
            found = _answers(record, label, text, searched)
        elif label is not None:
            found = ()
        id = record.values.get("id")
        examples.append(
            Question(record.place, string(record, "question"), text, found, None if id is None else str(id))
        )
    notes = [
        f"columns of {path}: context: {context!r}, question: 'question'" + (f", answer: {label!r}" if label else "")
    ]
    notes += [f"{count} answers without a start are {name} in their contexts" for name, count in searched.items()]
    return Read(examples, notes)


def _answers(record: Record, key: str, context: str, searched: Counter[str]) -> tuple[tuple[str, int], ...]:
    value = record.values.get(key)
    where = f"{record.place}, {key!r}"
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError(f"{where} should have as many 'text' as 'answer_start', in two lists")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(value, str):
        value = [{"text": value}] if value else []
    if value is None:
        value = []
    if not isinstance(value, list):
        raise ValueError(f"{where} is {kind(value)}, expected a text, or a list of text and answer_start")
    return tuple(_answer(f"{where}, answer {i}", answer, context, searched) for i, answer in enumerate(value))


def _answer(where: str, answer: Any, context: str, searched: Counter[str]) -> tuple[str, int]:
    if isinstance(answer, str):
        answer = {"text": answer}
    text = answer.get("text") if isinstance(answer, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text; a question without an answer has an empty list")
    start = answer.get("answer_start")
    at = context.find(text)
    if start is None and at >= 0:
        searched["unique" if context.count(text) == 1 else "taken where they are first"] += 1
        return text, at
    if start is None or (type(start) is int and at < 0):
        raise ValueError(f"{where}: {text!r} is not in the context; expected its exact characters")
    if type(start) is not int:
        raise ValueError(f"{where}, 'answer_start' is {kind(start)}, expected a whole number")
    if start < 0 or context[start : start + len(text)] != text:
        raise ValueError(
            f"{where}: the context at answer_start {start} is {context[max(0, start) : max(0, start) + len(text)]!r}, "
            f"expected {text!r}, which is at {at}; offsets count characters from 0"
        )
    return text, start


# ---- multiple choice -------------------------------------------------------------------------------------------------


def read_choices(path: PathLike, columns: Columns, labelled: bool = True) -> Read:
    """Return the Choice of each record: a list "choices", or columns choice0, choice1, ... or ending0, ..."""
    records = _records(path)
    names = list(records[0].values)
    context = choose(records, columns.text, "--text-column", (*CONTEXTS, *TEXTS, "question"))
    listed = choose(records, None, "", CHOICES)
    if listed is not None and not isinstance(records[0].values[listed], list):
        listed = None
    numbered = [name for name in names if re.fullmatch(r"(choice|ending|option|answer)_?[0-9a-eA-E]", name)]
    label = choose(records, columns.label, "--label-column", ANSWERS) if labelled else None
    if context is None or (listed is None and len(numbered) < 2) or (labelled and label is None):
        shown = ", ".join(map(repr, names))
        raise ValueError(f"{records[0].place} has {shown}, expected context, choices (or choice0, choice1) and label")
    examples = []
    for record in records:
        if listed is None:
            choices = [string(record, name) for name in sorted(numbered)]
        else:
            choices = record.values.get(listed)  # type: ignore[assignment]
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(c, str) and c.strip() for c in choices)
        ):
            raise ValueError(f"{record.place}, {listed!r} is {kind(choices)}, expected a list of two texts or more")
        right = _right(record, label, choices) if label else None
        examples.append(Choice(record.place, string(record, context), tuple(choices), right))
    shown = repr(listed) if listed else f"{sorted(numbered)[0]!r} to {sorted(numbered)[-1]!r}"
    notes = [f"columns of {path}: context: {context!r}, choices: {shown}" + (f", label: {label!r}" if label else "")]
    return Read(examples, notes)


def _right(record: Record, key: str, choices: Sequence[str]) -> int:
    """Return the number of the right choice, from its number, its letter or its text."""
    value = record.values.get(key)
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        if re.fullmatch(r"\d+", value.strip()):
            value = int(value)
        elif re.fullmatch(r"[A-Za-z]", value.strip()):
            value = ord(value.strip().upper()) - ord("A")
    if type(value) is not int or not 0 <= value < len(choices):
        raise ValueError(
            f"{record.place}, {key!r} is {value!r}, expected a number from 0 to {len(choices) - 1}, a letter from A to "
            f"{chr(ord('A') + len(choices) - 1)}, or the text of a choice"
        )
    return value


def _records(path: PathLike) -> list[Record]:
    records = read_records(path)
    if not records:
        raise ValueError(f"{path} has no example")
    return records
