"""Files of examples: what is read, what is guessed, and errors that name file, line, column and what was expected."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptcore.tasks import TASKS
from gptcore.tasks.examples import Columns
from gptcore.tasks.recipe import FinetuneOptions, read

QUESTION = {"question": "Who?", "context": "It was Ada."}
WRONG: dict[str, tuple[str, str, bytes | list[Any], str]] = {
    # task, name of the file, contents or objects, what the error says
    "ending": ("classify", "a.xlsx", b"x", r"a\.xlsx has the ending '\.xlsx', expected one of \.csv, \.tsv"),
    "empty file": ("classify", "a.csv", b" \n", r"a\.csv is empty"),
    "only a header": ("classify", "a.csv", b"text,label\n", r"a\.csv has no example"),
    "Latin-1": ("classify", "a.csv", b"text,label\nok,1\ncaf\xe9,1\n", r"a\.csv, line 3, byte 4 .*0xe9 is not UTF-8"),
    "UTF-16": ("classify", "a.csv", "text,label\na,1\n".encode("utf-16"), r"a\.csv is UTF-16, expected UTF-8; `iconv"),
    "NUL": ("classify", "a.csv", b"text,label\na\0,1\n", r"a\.csv, line 2: a NUL"),
    "column twice": ("classify", "a.csv", b"text,text\na,1\n", r"line 1 has the column 'text' twice"),
    "unquoted comma": (
        "classify",
        "a.csv",
        b"text,label\na, b,1\n",
        r"line 2 has 3 columns, expected 2 \(text, label\); put",
    ),
    "open quote": ("classify", "a.csv", b'text,label\nb,1\n"a,1\n', r"line 3 is not valid CSV: unexpected end of data"),
    "stray quote": ("classify", "a.csv", b'text,label\n"a" b,1\n', r"line 2 is not valid CSV: .*written twice"),
    "after a text of two lines": ("classify", "a.csv", b'text,label\n"a\nb",1\nc\n', r"line 4 has 1 columns"),
    "empty text": ("classify", "a.csv", b"text,label\na,1\n ,1\n", r"line 3, 'text' is empty"),
    "empty label": ("classify", "a.csv", b"text,label\na,1\nb,\n", r"line 3, 'label' is empty"),
    "unknown columns": (
        "classify",
        "a.csv",
        b"x,y,z\na,1,2\n",
        r"line 2 has the columns 'x', 'y', 'z'; say with --text-c",
    ),
    "key twice": (
        "classify",
        "a.jsonl",
        b'{"text": "a", "label": 1, "text": "b"}',
        r"line 1: the key 'text' is there twice",
    ),
    "not JSON": ("classify", "a.jsonl", b'{"text": "a", "label": "b"}\n{"text": }', r"line 2, column 10 is not JSON"),
    "not an object": ("classify", "a.jsonl", b"[1]", r"line 1 holds a list, expected an object"),
    "surrogate": ("classify", "a.jsonl", b'{"text": "\\ud800", "label": "b"}', r"line 1: an unpaired surrogate"),
    "no text": ("classify", "a.jsonl", [{"text": "a", "label": "x"}, {"label": "y"}], r"line 2, 'text' is missing"),
    "number as text": (
        "classify",
        "a.jsonl",
        [{"text": 1, "label": "x"}],
        r"line 1, 'text' is the number 1, expected a text",
    ),
    "null label": ("classify", "a.jsonl", [{"text": "a", "label": None}], r"line 1, 'label' is null, expected a text"),
    "mixed labels": (
        "classify",
        "a.jsonl",
        [{"text": "a", "label": ["x"]}, {"text": "b", "label": "x"}],
        r"line 2: .*expected a list",
    ),
    "number among names": (
        "classify",
        "a.jsonl",
        [{"text": "a", "label": 0.5}, {"text": "b", "label": "x"}],
        r"line 1: the label is 0.5, but others are names",
    ),
    "a list in JSON": ("classify", "a.json", b'{"a": 1}', r"a\.json holds an object, expected a list of objects"),
    "tag": (
        "entities",
        "a.conll",
        b"Ada B-PER\nLovelace E-PER\n",
        r"line 1, word 2 \('Lovelace'\) has the tag 'E-PER', expected O, B-NAME",
    ),
    "no tag": ("entities", "a.conll", b"Ada B-PER\nran\n", r"line 2 is 'ran', expected a word and a tag"),
    "fewer tags": (
        "entities",
        "a.jsonl",
        [{"tokens": ["a", "b"], "tags": ["O"]}],
        r"line 1, 'tags' is 1 values, expected 2 names",
    ),
    "numbers as tags": (
        "entities",
        "a.jsonl",
        [{"tokens": ["a"], "ner_tags": [0]}],
        r"'ner_tags' is 1 values, expected 1 names",
    ),
    "space in a word": (
        "entities",
        "a.jsonl",
        [{"tokens": ["a "], "tags": ["O"]}],
        r"word 0 is 'a ', expected a word without spaces",
    ),
    "offsets outside": (
        "entities",
        "a.jsonl",
        [{"text": "Ada", "entities": [[0, 4, "PER"]]}],
        r"entity 0: 0 to 4 is outside of the text, expected 0 to 3",
    ),
    "offsets in a word": (
        "entities",
        "a.jsonl",
        [{"text": "Ada ran", "entities": [[0, 2, "PER"]]}],
        r"0 to 2 is 'Ad', expected whole words; the nearest are at \(0, 3\)",
    ),
    "offsets of other text": (
        "entities",
        "a.jsonl",
        [{"text": "Ada ran", "entities": [{"start": 0, "end": 3, "label": "PER", "text": "ran"}]}],
        r"is 'Ada', but the entity says 'ran'",
    ),
    "entities overlap": (
        "entities",
        "a.jsonl",
        [{"text": "Ada ran", "entities": [[0, 3, "A"], [0, 7, "B"]]}],
        r"entity 1: 'Ada' is in an entity already",
    ),
    "no label": (
        "entities",
        "a.jsonl",
        [{"text": "Ada", "entities": [{"start": 0, "end": 3}]}],
        r"entity 0 has no label",
    ),
    "answer not there": (
        "answer",
        "a.jsonl",
        [{**QUESTION, "answers": ["Bob"]}],
        r"answer 0: 'Bob' is not in the context",
    ),
    "answer elsewhere": (
        "answer",
        "a.jsonl",
        [{**QUESTION, "answers": [{"text": "Ada", "answer_start": 3}]}],
        r"answer_start 3 is 'was', expected 'Ada', which is at 7",
    ),
    "answer before": (
        "answer",
        "a.jsonl",
        [{**QUESTION, "answers": [{"text": "Ada", "answer_start": -1}]}],
        r"answer_start -1 is 'It '",
    ),
    "unequal lists": (
        "answer",
        "a.jsonl",
        [{**QUESTION, "answers": {"text": ["Ada"], "answer_start": []}}],
        r"as many 'text' as",
    ),
    "no context": ("answer", "a.jsonl", [{"question": "Who?", "answers": []}], r"expected question and context"),
    "nested": (
        "answer",
        "a.json",
        b'{"data": [{"paragraphs": [{"context": "It.", "qas": [{"question": "", "answers": []}]}]}]}',
        r"number 1, paragraph 1, question 1, 'question' is empty",
    ),
    "label too high": (
        "choice",
        "a.jsonl",
        [{"context": "a", "choices": ["b", "c"], "label": 2}],
        r"'label' is 2, expected a number from 0 to 1, a letter from A to B",
    ),
    "one choice": (
        "choice",
        "a.jsonl",
        [{"context": "a", "choices": ["b"], "label": 0}],
        r"'choices' is a list, expected a list of two",
    ),
    "no choices": (
        "choice",
        "a.csv",
        b"context,label\na,0\n",
        r"expected context, choices \(or choice0, choice1\) and label",
    ),
}


def write(path: Path, contents: bytes | list[Any]) -> Path:
    if isinstance(contents, list):
        contents = "".join(json.dumps(item) + "\n" for item in contents).encode()
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    task, file, contents, expected = WRONG[name]
    path = write(tmp_path / file, contents)
    with pytest.raises(ValueError, match=expected) as error:
        TASKS[task].read(path, Columns())
    assert str(path) in str(error.value)


READ: dict[str, tuple[str, str, bytes | list[Any], list[tuple[Any, ...]]]] = {
    # task, name of the file, contents or objects, the examples without their places
    "byte order mark": ("classify", "a.csv", b"\xef\xbb\xbftext,label\na,1\n", [("a", None, "1")]),
    "quotes and lines": ("classify", "a.csv", b'text,label\r\n"a ""b"",\nc",1\r\n\r\n', [('a "b",\nc', None, "1")]),
    "semicolons": ("classify", "a.csv", b"text;label\na, b;1\n", [("a, b", None, "1")]),
    "tabs": ("classify", "a.tsv", b'label\ttext\n1\tan "open quote\n', [('an "open quote', None, "1")]),
    "fewer values": (
        "classify",
        "a.csv",
        b"x,y\na,1\nb,1\nc,2\n",
        [("a", None, "1"), ("b", None, "1"), ("c", None, "2")],
    ),
    "pairs": ("classify", "a.jsonl", [{"premise": "a", "hypothesis": "b", "label": True}], [("a", "b", "true")]),
    "several": (
        "classify",
        "a.jsonl",
        [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}],
        [("a", None, ("x", "y")), ("b", None, ())],
    ),
    "numbers": ("classify", "a.csv", b"text,score\na,1\nb,2.5\n", [("a", None, 1.0), ("b", None, 2.5)]),
    "IOB1": (
        "entities",
        "a.conll",
        b"-DOCSTART- O\n\nAda\tI-PER\nran\tO\n\t\nUK\tI-LOC\nEU\tB-LOC",
        [("Ada ran", ((0, 3), (4, 7)), ("B-PER", "O")), ("UK EU", ((0, 2), (3, 5)), ("B-LOC", "B-LOC"))],
    ),
    "columns between": (
        "entities",
        "a.txt",
        b"Ada NNP B-PER\nB. NNP I-PER",
        [("Ada B.", ((0, 3), (4, 6)), ("B-PER", "I-PER"))],
    ),
    "offsets": (
        "entities",
        "a.jsonl",
        [{"text": "\u00e9, New York", "entities": [{"start": 3, "end": 11, "label": "LOC"}]}],
        [("\u00e9, New York", ((0, 1), (1, 2), (3, 6), (7, 11)), ("O", "O", "B-LOC", "I-LOC"))],
    ),
    "flat SQuAD": (
        "answer",
        "a.jsonl",
        [
            {**QUESTION, "id": 7, "answers": {"text": ["Ada"], "answer_start": [7]}},
            {**QUESTION, "answers": {"text": [], "answer_start": []}},
        ],
        [("Who?", "It was Ada.", (("Ada", 7),), "7"), ("Who?", "It was Ada.", (), None)],
    ),
    "SQuAD": (
        "answer",
        "a.json",
        json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": "It was Ada.",
                                "qas": [
                                    {"id": "q", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 7}]}
                                ],
                            }
                        ]
                    }
                ]
            }
        ).encode(),
        [("Who?", "It was Ada.", (("Ada", 7),), "q")],
    ),
    "answer as text": (
        "answer",
        "a.csv",
        b"question,context,answer\nWho?,It was Ada.,Ada\nWho?,It was Ada.,\n",
        [("Who?", "It was Ada.", (("Ada", 7),), None), ("Who?", "It was Ada.", (), None)],
    ),
    "choices": ("choice", "a.jsonl", [{"context": "a", "choices": ["b", "c"], "label": "B"}], [("a", ("b", "c"), 1)]),
    "columns of choices": ("choice", "a.csv", b"premise,ending1,ending0,label\na,c,b,c\n", [("a", ("b", "c"), 1)]),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    task, file, contents, expected = READ[name]
    found = TASKS[task].read(write(tmp_path / file, contents), Columns())
    assert [tuple(example)[1:] for example in found.examples] == expected
    assert found.notes[0].startswith(f"columns of {tmp_path / file}: ")


def test_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = ["x" + "".join(rng.choices('ab ,;"\t\r\n\u00e9', k=12)) for _ in range(200)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((text, "l") for text in texts)])
    assert [e.text for e in TASKS["classify"].read(tmp_path / "a.csv", Columns()).examples] == texts


def options(tmp_path: Path, train: list[Any], validation: list[Any] | None, task: str = "classify") -> FinetuneOptions:
    write(tmp_path / "train.jsonl", train)
    other = None if validation is None else str(write(tmp_path / "validation.jsonl", validation))
    return FinetuneOptions(task, str(tmp_path / "train.jsonl"), other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "train", "validation", "expected"),
    [
        (
            "classify",
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            [{"text": "c", "label": "z"}],
            "the label 'z' is not in the",
        ),
        (
            "classify",
            [{"text": "a", "label": 0.5}],
            [{"text": "b", "label": "z"}],
            "the label is 'z', expected a number",
        ),
        (
            "classify",
            [{"text": "a", "label": ["x"]}],
            [{"text": "b", "label": "x"}],
            "expected a list of labels",
        ),
        (
            "entities",
            [{"tokens": ["a"], "tags": ["B-X"]}],
            [{"tokens": ["a"], "tags": ["B-Y"]}],
            "the label 'Y' is not in the",
        ),
    ],
)
def test_labels_that_cannot_be_learnt(
    tmp_path: Path, task: str, train: list[Any], validation: list[Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=rf"validation\.jsonl, line 1: .*{expected}"):
        TASKS[task].settle(*read(options(tmp_path, train, validation, task), 0))


def test_a_part_is_set_aside_for_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the same each time, keeps a rare label for training, and texts that are in both parts are counted."""
    rows = [{"text": f"text {i % 20}", "label": "rare" if i == 7 else "often"} for i in range(40)]
    train, validation = read(options(tmp_path, rows, None), 0)
    assert (train, validation) == read(options(tmp_path, rows, None), 0)
    assert (len(train), len(validation)) == (36, 4)
    assert any(example.label == "rare" for example in train)
    known = {example.text for example in train}
    shared = sum(example.text in known for example in validation)
    assert f"warning: {shared} validation examples have the text of a training example" in capsys.readouterr().out
    assert shared > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "sort"}, "task is 'sort', expected one of classify"),
        ({"task": "classify", "labelling": "twice"}, "labelling has no effect on the task classify"),
        ({"task": "answer", "lm_coef": 0.5}, "lm_coef has no effect on the task answer"),
        ({"task": "classify", "lora": 0}, "lora should be a rank of at least 1"),
        ({"task": "classify", "validation_fraction": 1.0}, "validation_fraction should be between 0 and 1"),
    ],
)
def test_options_without_effect_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FinetuneOptions(train="a.csv", **changes)
