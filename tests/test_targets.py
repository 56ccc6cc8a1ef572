"""Targets in text: what the loss is on, and the errors of files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from gptcore import DataCollatorForLanguageModeling, Tokenizer, TrainingArguments
from gptcore.generation import Settings
from gptcore.lora import add_adapter, save_adapter
from gptcore.tasks.examples import Columns
from gptcore.tasks.targets import Target, read_targets
from gptcore.tasks.vocabulary import add_tokens, use_adapter
from gptcore.tasks.writing import baselines, text_metrics, write
from gptcore.text.chat import TEMPLATES, with_special_tokens, with_template
from gptcore.training.batches import Batches

ALPACA = {"instruction": "Say it.", "input": "it", "output": "It is said."}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say it."},
    {"role": "assistant", "content": "It."},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "It, again."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"Say it again in {i} words." for i in range(40)), encoding="utf-8")
    return Tokenizer.train(file, vocab_size=290)


def saved(folder: Path, *records: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def read(path: Path, template: str | None = None, labelled: bool = True) -> list[Target]:
    return read_targets(path, Columns(), chat=template is not None, labelled=labelled).examples


def learnt(tokenizer: Tokenizer, inputs: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in inputs["labels"] if label != -100])


@pytest.mark.parametrize(
    ("record", "template", "text", "target"),
    [
        ({"prompt": "it: ", "completion": "again"}, None, "it: again<|endoftext|>", " again<|endoftext|>"),
        ({"prompt": "it:", "completion": " again"}, None, "it: again<|endoftext|>", " again<|endoftext|>"),
        ({"prompt": "", "completion": "it"}, None, "<|endoftext|>it<|endoftext|>", "it<|endoftext|>"),
        ({"article": "it\n", "summary": "i"}, None, "it\ni<|endoftext|>", "i<|endoftext|>"),
        (
            ALPACA, None,
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nSay it.\n\n"
            "### Input:\nit\n\n### Response:\nIt is said.<|endoftext|>",
            "It is said.<|endoftext|>",
        ),
        (
            {**ALPACA, "input": ""}, "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nSay it.\n\n### Response:\nIt is said.<|endoftext|>",
            "It is said.<|endoftext|>",
        ),
        (
            ALPACA, "chatml",
            "<|im_start|>user\nSay it.\n\nit<|im_end|>\n<|im_start|>assistant\nIt is said.<|im_end|>\n",
            "It is said.<|im_end|>",
        ),
        (
            {"messages": MESSAGES}, "plain",
            "Be brief.\n\nUser:\nSay it.\n\nAssistant:\nIt.<|endoftext|>User:\nAgain.\n\nAssistant:\nIt, again."
            "<|endoftext|>",
            "It.<|endoftext|>It, again.<|endoftext|>",
        ),
    ],
)  # fmt: skip
def test_only_the_target_is_learnt(
    tokenizer: Tokenizer, record: Any, template: str | None, text: str, target: str, tmp_path: Path
) -> None:
    chosen = TEMPLATES[template] if template else None
    made = with_template(tokenizer, chosen) if chosen else tokenizer
    (found,) = read(saved(tmp_path, record), template)
    inputs, cut = found.example(made, chosen, 300)
    assert (made.decode(inputs["input_ids"]), learnt(made, inputs), cut) == (text, target, 0)
    prompt = found.prompt(made, chosen, 300)
    assert prompt == inputs["input_ids"][: len(prompt)]
    assert inputs["labels"][len(prompt)] != -100 == inputs["labels"][len(prompt) - 1]
    asked = {key: value for key, value in record.items() if key not in ("completion", "summary", "output")}
    asked = {key: value[:-1] if key == "messages" else value for key, value in asked.items()}
    (alone,) = read(saved(tmp_path, asked), template, labelled=False)
    if "prompt" not in record or not record["prompt"].endswith(" "):
        assert alone.prompt(made, chosen, 300) == prompt
    assert alone.label is None


def test_what_does_not_fit_is_left_out_at_the_beginning_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (text,) = read(saved(tmp_path, {"prompt": "Say it again.\n", "completion": "again"}))
    whole, _ = text.example(tokenizer, None, 300)
    size = len(whole["input_ids"])
    inputs, cut = text.example(tokenizer, None, size - 2)
    assert (inputs["input_ids"], cut) == (whole["input_ids"][2:], 2)
    assert text.prompt(tokenizer, None, 2) == whole["input_ids"][size - 5 : size - 3]
    with pytest.raises(
        ValueError, match=r"data.jsonl, line 1: the target takes 3 tokens and needs one before it, .* 2 "
    ):
        text.example(tokenizer, None, 2)
    template = TEMPLATES["plain"]
    (talk,) = read(saved(tmp_path, {"messages": MESSAGES}), "plain")
    whole, _ = talk.example(tokenizer, template, 300)
    inputs, cut = talk.example(tokenizer, template, len(whole["input_ids"]) - 1)
    assert (tokenizer.decode(inputs["input_ids"]), cut) == (template.text([MESSAGES[0], *MESSAGES[3:]]), 2)
    with pytest.raises(ValueError, match=r"line 1: the last exchange takes \d+ tokens, expected at most 9; shorten it"):
        talk.example(tokenizer, template, 9)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"prompt": "it", "completion": " "}, "line 2, 'completion' is empty"),
        ({"prompt": "it", "completion": None}, "line 2, 'completion' is null"),
        ({"prompt": 1, "completion": "it"}, "line 2, 'prompt' is the number 1"),
        ({"messages": MESSAGES[:2]}, "line 2: the last message has the role user, expected assistant"),
        (
            {"messages": [{"role": "user"}]},
            r"line 2: message 1 should be an object with role and content, not \['role'\]",
        ),
        ({"messages": [MESSAGES[1], {"role": "assistant", "content": ""}]}, "line 2: message 2 of 2 is empty"),
        ({"messages": MESSAGES[2:3]}, "line 2: the only message is the assistant's"),
        ({"instruction": "it", "output": "it", "input": 3}, "line 2, 'input' is the number 3"),
    ],
)
def test_errors_name_the_line(record: dict[str, Any], error: str, tmp_path: Path) -> None:
    first = {"messages": MESSAGES} if "messages" in record else dict.fromkeys(record, "it")
    with pytest.raises(ValueError, match=rf"data.jsonl, {error}"):
        read(saved(tmp_path, first, record), "plain" if "messages" in record else None)


def test_what_is_guessed_is_noted(tmp_path: Path) -> None:
    file = saved(tmp_path, {"prompt": "it ", "completion": "a"}, {"prompt": "b", "completion": "a"})
    assert read_targets(file, Columns(), chat=False).notes == [
        f"columns of {file}: prompt: 'prompt', target: 'completion'",
        "the prompts end differently, so a model cannot tell where one ends; end each with a line break, say",
        "1 prompts end with a space, which a token of the target takes in; in generation, leave it out",
    ]
    with pytest.raises(ValueError, match=r"line 1 has 'a', 'b', expected prompt and completion.*--text-column"):
        read(saved(tmp_path, {"a": "it", "b": "it"}))
    with pytest.raises(ValueError, match="line 1 has messages, which are for --task chat"):
        read(saved(tmp_path, {"messages": MESSAGES}))
    with pytest.raises(ValueError, match="line 1: the last message has the role assistant, expected user"):
        read(saved(tmp_path, {"messages": MESSAGES}), "plain", labelled=False)


def test_packed_examples_have_the_loss_of_padded_ones(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"prompt": "Say it" + " again" * i, "completion": " in words"} for i in range(4)]
    examples = [t.example(tokenizer, None, 60).inputs for t in read(saved(tmp_path, *records))]
    model = tiny_model(dropout=0.0, vocab_size=tokenizer.vocab_size, n_positions=64).eval()
    losses = []
    for packing in (False, True):
        arguments = TrainingArguments(str(tmp_path), packing=packing)
        batch = Batches(examples, DataCollatorForLanguageModeling(tokenizer), arguments).collate(range(4))
        assert ("cu_seqlens" in batch) == packing
        losses.append(model(**batch).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("padded", [0, 1, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_the_mean_of_the_others(padded: int, tied: bool) -> None:
    model = tiny_model(vocab_size=32 + padded, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert add_tokens(model, 32, 35) == [32, 33, 34]
    assert model.config.vocab_size == max(35, 32 + padded)
    for name in ("wte.weight", *([] if tied else ["lm_head.weight"])):
        rows = model.state_dict()[name]
        torch.testing.assert_close(rows[32:35], before[name][:32].mean(0).expand(3, -1))
        assert torch.equal(rows[:32], before[name][:32])
        assert torch.equal(rows[35:], before[name][35:])
    ids = torch.tensor([[34, 1, 33]])
    assert model(ids, labels=ids).logits.shape == (1, 3, model.config.vocab_size)


def test_an_adapter_brings_its_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    count = tokenizer.vocab_size
    made = with_special_tokens(tokenizer, ["<|a|>", "<|b|>"])
    model = tiny_model(dropout=0.0, vocab_size=count).eval()
    model.save_pretrained(tmp_path / "base")
    new = add_tokens(model, count, made.vocab_size)
    add_adapter(model, target_modules="all-linear", trainable_token_indices=new)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    made.save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    assert use_adapter(base, tokenizer, tmp_path / "adapter").fingerprint == made.fingerprint
    ids = torch.tensor([[*new, 1, 2]])
    torch.testing.assert_close(base(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not hasattr(base, "adapters")  # merged
    other = Tokenizer.from_pretrained(tmp_path / "adapter")
    other._bytes[0] = b"?"
    with pytest.raises(ValueError, match="another tokenizer than the model"):
        use_adapter(type(model).from_pretrained(tmp_path / "base"), other, tmp_path / "adapter")


def test_written_texts_are_those_of_generate(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size, n_positions=16).eval()
    prompts = [[1, 2, 3], [4], [5] * 15, [6, 7], [8] * 16]
    stop = tokenizer.special_tokens["<|endoftext|>"]
    settings = [Settings(min(6, 17 - len(prompt)), eos_token_id=stop) for prompt in prompts]
    written = write(model, tokenizer, prompts, settings, batch_size=2)
    for prompt, setting, found in zip(prompts, settings, written, strict=True):
        new = model.generate([prompt], setting.max_new_tokens, eos_token_id=stop)[0, len(prompt) :].tolist()
        assert found == new[: new.index(stop) + 1 if stop in new else None]
    with pytest.raises(ValueError, match="17 tokens and 1 new"):
        write(model, tokenizer, [[1] * 17], [Settings(1)], 1)


def test_metrics_and_baselines() -> None:
    written = ["The cat sat on the mat.", "It costs $3.50, doesn't it?", "no"]
    right = ["The cat is sitting on the mat.", "It costs 3.50 dollars, doesn't it?", "yes indeed"]
    found, each = text_metrics(written, right)
    assert found["bleu"] == pytest.approx(39.5657, abs=1e-4)
    assert found["chrf"] == pytest.approx(48.1891, abs=1e-4)
    assert found["exact"] == 0
    assert each[2] < each[0]
    rouge, _ = text_metrics(
        ["The quick brown foxes jumped. They were running."], ["A quick brown fox jumps. They run fast."]
    )
    assert [rouge[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([75, 400 / 7, 75])
    pairs = [("five two", "b"), ("two three", "a"), ("seven", "b")]
    assert baselines(["One. Two! Three? Four."], pairs) == {
        "copy of the prompt": ["One. Two! Three? Four."],
        "lead-3": ["One. Two! Three?"],
        "commonest target": ["b"],
        "nearest prompt's target": ["a"],
    }
