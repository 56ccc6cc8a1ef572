"""Pipelines: the labels, scores and shapes of transformers' own on the same folders, and what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model

from gptcore import GPTForMultipleChoice, GPTForSequenceClassification, GPTForTokenClassification, Tokenizer
from gptcore.tasks import FinetuneOptions, finetune, pipeline

TEXTS = ["Alice lives in New York.", "Bob", "a caf\u00e9, or two;  spaces", "New York and Alice Bob, of course!"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(TEXTS * 3), encoding="utf-8")
    Tokenizer.train(folder / "text.txt", vocab_size=300).save_pretrained(folder)
    return folder


def theirs(folder: Path, tokenizer: Path, kind: str, labels: list[str], **settings: Any) -> Path:
    """A folder that transformers wrote, with random weights and our tokenizer through theirs."""
    fast = transformers.AutoTokenizer.from_pretrained(tokenizer)
    fast.save_pretrained(folder)
    torch.manual_seed(len(labels))
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        pad_token_id=fast.eos_token_id, bos_token_id=fast.eos_token_id, eos_token_id=fast.eos_token_id,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}, **settings,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def close(found: Any, expected: Any) -> None:
    """Assert the same structure and strings, and numbers within 1e-5."""
    if isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected), (found, expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            close(found[key], value)
    elif isinstance(expected, str) or type(expected) is int:
        assert found == expected
    else:
        assert float(found) == pytest.approx(float(expected), abs=1e-5)


PAIRS = [{"text": "Alice", "text_pair": "Bob lives"}, {"text": "New", "text_pair": " York"}]


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
def test_text_classification(tmp_path: Path, tokenizer: Path, problem: str | None) -> None:
    labels = ["score"] if problem == "regression" else ["bad", "fine", "good"]
    theirs(tmp_path, tokenizer, "GPT2ForSequenceClassification", labels, problem_type=problem)
    ours, their = pipeline("sentiment-analysis", tmp_path), transformers.pipeline("text-classification", str(tmp_path))
    for inputs in (TEXTS[0], TEXTS, TEXTS[:1], PAIRS[0], PAIRS):
        close(ours(inputs), their(inputs))
        for options in ({"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "none"},
                        {"function_to_apply": "sigmoid", "top_k": 2}):  # fmt: skip
            close(ours(inputs, **options), their(inputs, **options))
    built = {"task": "text-classification", "model": str(tmp_path), "top_k": None}
    close(pipeline(**built)(TEXTS[0]), transformers.pipeline(**built)(TEXTS[0]))
    assert ours(TEXTS) == [ours(text)[0] for text in TEXTS], "other bits in a batch"


@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_token_classification(tmp_path: Path, tokenizer: Path, strategy: Any) -> None:
    theirs(tmp_path, tokenizer, "GPT2ForTokenClassification", TAGS)
    ours, their = pipeline("ner", tmp_path), transformers.pipeline("token-classification", str(tmp_path))
    for ignored in (["O"], []):
        expected = their(TEXTS, aggregation_strategy=strategy, ignore_labels=ignored)
        for text, entities in zip(TEXTS, expected, strict=True):
            for entity in entities:  # spans there begin with the space before a word
                part = text[entity["start"] : entity["end"]]
                entity["start"] += len(part) - len(part.lstrip())
                if strategy != "none":
                    entity["word"], entity["end"] = part.strip(), entity["start"] + len(part.strip())
        found = ours(TEXTS, aggregation_strategy=strategy, ignore_labels=ignored)
        close(found, expected)
        assert ours(TEXTS[0], aggregation_strategy=strategy, ignore_labels=ignored) == found[0]


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
def test_words_are_the_units_of_the_other_strategies(tmp_path: Path, tokenizer: Path, strategy: Any) -> None:
    """transformers takes punctuation for a part of the word before it; the groups must be whole words here."""
    theirs(tmp_path, tokenizer, "GPT2ForTokenClassification", TAGS)
    ner = pipeline("ner", tmp_path, aggregation_strategy=strategy, ignore_labels=[])
    for text in TEXTS:
        groups = ner(text)
        assert "".join(group["word"] for group in groups).replace(" ", "") == text.replace(" ", "")
        assert all(group["word"] == text[group["start"] : group["end"]] == group["word"].strip() for group in groups)
    with pytest.raises(ValueError, match="aggregation_strategy is 'last', expected none, simple"):
        ner("x", aggregation_strategy="last")


def test_folders_of_ours_in_their_pipeline(tmp_path: Path, tokenizer: Path) -> None:
    """A model fine-tuned from a folder of transformers gives the same in transformers' pipeline as in ours."""
    theirs(tmp_path / "base", tokenizer, "GPT2LMHeadModel", ["x", "y"])
    rows = [{"text": text, "label": ["plain", "name"]["Alice" in text]} for text in TEXTS * 4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = FinetuneOptions("classify", str(tmp_path / "train.jsonl"))
    finetune(tmp_path / "base", options, output_dir=str(tmp_path / "tuned"), num_train_epochs=1, disable_tqdm=True)
    built = {"task": "text-classification", "model": str(tmp_path / "tuned"), "top_k": None}
    close(pipeline(**built)(TEXTS), transformers.pipeline(**built)(TEXTS))

    torch.manual_seed(0)
    model = GPTForTokenClassification.from_pretrained(tmp_path / "base", id2label=TAGS)
    model.save_pretrained(tmp_path / "tags")
    Tokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "tags")
    built = {"task": "token-classification", "model": str(tmp_path / "tags"), "ignore_labels": []}
    for found, expected in zip(pipeline(**built)(TEXTS), transformers.pipeline(**built)(TEXTS), strict=True):
        close([[e["entity"], e["score"]] for e in found], [[e["entity"], e["score"]] for e in expected])


def test_long_texts_are_tagged_by_windows(tmp_path: Path, tokenizer: Path) -> None:
    theirs(tmp_path, tokenizer, "GPT2ForTokenClassification", TAGS)
    ner = pipeline("ner", tmp_path, ignore_labels=[])
    text, made = " ".join(TEXTS * 5), Tokenizer.from_pretrained(tokenizer)
    ids = made.encode(text)
    assert len(ids) > 2 * 64
    assert [entity["word"] for entity in ner(text)] == [made.id_to_token(i) for i in ids]
    assert [entity["index"] for entity in ner(text)] == list(range(len(ids)))


QUESTION = {"question": "Who lives here?", "context": "Alice lives in New York. Bob does not."}


def test_question_answering(tmp_path: Path, tokenizer: Path) -> None:
    theirs(tmp_path, tokenizer, "GPT2ForQuestionAnswering", ["LABEL_0", "LABEL_1"])
    answer = pipeline("question-answering", tmp_path)
    single = answer(QUESTION)
    assert single.keys() == {"score", "start", "end", "answer"}
    assert single["answer"] == QUESTION["context"][single["start"] : single["end"]] != ""
    assert (
        answer(**QUESTION)
        == answer([QUESTION])
        == answer(question=[QUESTION["question"]], context=QUESTION["context"])
        == single
    )
    assert answer([QUESTION, QUESTION]) == [single, single]
    best = answer(QUESTION, top_k=5, max_answer_len=3)
    assert len(best) == 5
    assert [one["score"] for one in best] == sorted((one["score"] for one in best), reverse=True)
    assert all(one["answer"] for one in best)
    some = answer(QUESTION, top_k=10**4, handle_impossible_answer=True)
    assert sum(one["answer"] == "" for one in some) == 1
    assert 0.9 < sum(one["score"] for one in some) <= 1 + 1e-9
    windows = answer(QUESTION, max_seq_len=24, doc_stride=4)
    assert windows["answer"] == QUESTION["context"][windows["start"] : windows["end"]]
    for wrong in ({}, {"question": "x"}, {"inputs": {"question": "x", "context": " "}}):
        with pytest.raises(ValueError, match="question"):
            answer(**wrong)
    with pytest.raises(TypeError, match="align_to_words"):
        answer(QUESTION, align_to_words=True)


def test_choices_and_wrong_use(tmp_path: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    made = Tokenizer.from_pretrained(tokenizer)
    base = tiny_model(vocab_size=made.vocab_size, n_positions=32)
    model = GPTForMultipleChoice(base.config)
    choose = pipeline("multiple-choice", model, made)
    both = [
        {"context": "Alice lives in", "choices": ["New York", "Bob", "a"]},
        {"context": "Bob", "choices": ["a", "Alice"]},
    ]
    found = choose(both)
    assert [choose(one) for one in both] == found
    assert all(one["choice"] == asked["choices"][one["label"]] for one, asked in zip(found, both, strict=True))
    for build, expected in (
        (lambda: pipeline("fill-mask", model, made), "there is no pipeline 'fill-mask'; there are text-classification"),
        (lambda: pipeline("multiple-choice", model), "a model needs its tokenizer"),
        (lambda: pipeline("ner", model, made), "the model is for the task choice, but the pipeline for entities"),
        (lambda: pipeline("ner", base, made), "the model is a GPT, expected one of GPTForSequenceClassification"),
    ):
        with pytest.raises(ValueError, match=expected):
            build()
    classify = pipeline("text-classification", GPTForSequenceClassification(base.config), made)
    for options, expected in (
        ({"top_k": 0}, "top_k is 0"),
        ({"function_to_apply": "tanh"}, "function_to_apply is 'tanh'"),
    ):
        with pytest.raises(ValueError, match=expected):
            classify("x", **options)
    with pytest.raises(ValueError, match="an input is 3, expected a text"):
        classify([3])
