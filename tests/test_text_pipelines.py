"""The pipelines that write: texts and shapes of transformers' "text-generation" on the same folder, and the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptcore import GPT, GPTForSequenceClassification, Tokenizer
from gptcore.tasks import pipeline
from gptcore.text.chat import TEMPLATES, with_template

TEXTS = ["Alice lives in", "Bob", "New York and Alice Bob,"]
TALK = [{"role": "user", "content": "Alice?"}]
OPEN = [*TALK, {"role": "assistant", "content": "Bob lives"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that transformers wrote, with random weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("\n".join(TEXTS * 3), encoding="utf-8")
    tokenizer = Tokenizer.train(folder / "text.txt", vocab_size=280)
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    with_template(tokenizer, TEMPLATES["plain"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    built = {"task": "text-generation", "model": str(folder), "do_sample": False}
    return pipeline(**built), transformers.pipeline(**built)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (TEXTS[0], {"max_new_tokens": 8}),
        (TEXTS, {"max_new_tokens": 8, "return_full_text": False, "repetition_penalty": 1.3}),
        (TEXTS, {"max_length": 20, "return_tensors": True}),
        (TEXTS[1], {"max_new_tokens": 12, "prefix": "Alice: ", "min_new_tokens": 12}),
        (TEXTS[:1], {"max_new_tokens": 40, "stop_sequence": "STOP", "return_full_text": False}),
        (TEXTS[2] * 9, {"max_new_tokens": 6, "handle_long_generation": "hole"}),
        (TALK, {"max_new_tokens": 8}),
        ([TALK, OPEN], {"max_new_tokens": 8}),
        (TALK, {"max_new_tokens": 8, "return_full_text": False}),
        (OPEN, {"max_new_tokens": 8, "continue_final_message": False}),
    ],
)
def test_greedy_texts_are_those_of_transformers(both: tuple[Any, Any], inputs: Any, options: dict[str, Any]) -> None:
    ours, theirs = both
    if "stop_sequence" in options:  # two letters of a longer text
        longer = theirs(inputs, max_new_tokens=20, return_full_text=False)[0][0]["generated_text"]
        options = {**options, "stop_sequence": [longer[6:8], "never"]}
    found, expected = ours(inputs, **options), theirs(inputs, **options)
    assert found == expected
    if "stop_sequence" in options:
        assert found[0][0]["generated_text"] == longer[:8]


def test_texts_are_drawn_by_default(folder: Path) -> None:
    write = pipeline("text-generation", folder, max_new_tokens=8)
    drawn = write(TEXTS[0], seed=1, num_return_sequences=3)
    assert drawn == write(TEXTS[0], seed=1, num_return_sequences=3)
    assert len({one["generated_text"] for one in drawn}) == 3
    assert write(TEXTS[0], seed=1) == drawn[:1]
    assert write(TEXTS[0], seed=1, temperature=1e-4) == write(TEXTS[0], do_sample=False)


def test_the_verbs_have_the_shapes_of_version_4(folder: Path) -> None:
    expected = pipeline("text-generation", folder, do_sample=False, return_full_text=False, max_new_tokens=6)(TEXTS)
    texts = [rows[0]["generated_text"] for rows in expected]
    for task, key in (
        ("summarization", "summary_text"), ("translation_en_to_fr", "translation_text"),
        ("translation", "translation_text"), ("text2text-generation", "generated_text"),
    ):  # fmt: skip
        write = pipeline(task, folder, max_new_tokens=6)
        assert write(TEXTS[0]) == [{key: texts[0]}]
        assert write(TEXTS) == [{key: text} for text in texts]
    longest = write(TEXTS[0], max_new_tokens=None, return_tensors=True, eos_token_id=-1)[0]["generated_token_ids"]
    assert len(longest) == 65, "as many tokens as the model has positions for"
    assert [len(rows) for rows in write(TEXTS, do_sample=True, num_return_sequences=2)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("inputs", "options", "error"),
    [
        ("", {}, "a prompt is empty"),
        ("a", {"max_new_tokens": 65}, "need 65 positions, but this model has 64"),
        ("a", {"num_return_sequences": 2, "do_sample": False}, "pass do_sample=True"),
        ("a", {"return_tensors": True, "return_full_text": True}, "return_full_text has no effect"),
        ("a", {"handle_long_generation": "cut"}, "handle_long_generation is 'cut', expected None or 'hole'"),
        ("a", {"do_sample": False, "top_k": 3}, "are for sampling"),
        ([{"role": "robot", "content": "a"}], {}, "message 1 has the role 'robot'"),
    ],
)
def test_wrong_use(folder: Path, inputs: Any, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        pipeline("text-generation", folder)(inputs, **options)


def test_models_that_do_not_write(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="the model is a GPTForSequenceClassification, expected a language model"):
        pipeline("text-generation", GPTForSequenceClassification.from_pretrained(folder), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        pipeline("text-generation", GPT.from_pretrained(folder), tokenizer)(TALK)
    with pytest.raises(TypeError, match="num_beams"):
        pipeline("summarization", folder)("a", num_beams=4)
