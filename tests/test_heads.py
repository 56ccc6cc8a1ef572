"""Heads for tasks: the logits, losses, gradients and folders of transformers; padding, labels, errors, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gptcore import GPT, DataCollatorForTasks, GPTConfig, Trainer, TrainingArguments
from gptcore.heads import (
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForTokenClassification,
    TaskModel,
)

B, T, VOCAB = 4, 11, 61
LENGTHS = [11, 1, 6, 9]
HEADS: dict[str, tuple[type[TaskModel], str]] = {
    "classes": (GPTForSequenceClassification, "GPT2ForSequenceClassification"),
    "several labels": (GPTForSequenceClassification, "GPT2ForSequenceClassification"),
    "regression": (GPTForSequenceClassification, "GPT2ForSequenceClassification"),
    "tokens": (GPTForTokenClassification, "GPT2ForTokenClassification"),
    "answer": (GPTForQuestionAnswering, "GPT2ForQuestionAnswering"),
    "choice": (GPTForMultipleChoice, "GPT2DoubleHeadsModel"),
    "classes of GPT-1": (GPTForSequenceClassification, "OpenAIGPTForSequenceClassification"),
    "choice of GPT-1": (GPTForMultipleChoice, "OpenAIGPTDoubleHeadsModel"),
}


def theirs(name: str, seed: int = 0) -> Any:
    """A small model of transformers with random weights, so that nothing is 0 or 1."""
    torch.manual_seed(seed)
    kind = HEADS[name][1]
    sizes = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 24 + 8 * seed, "n_layer": 2, "n_head": 4}
    config_class = transformers.OpenAIGPTConfig if "OpenAI" in kind else transformers.GPT2Config
    count = {"regression": 1, "answer": 2}.get(name, 1 if "choice" in name else 3)
    config = config_class(**sizes, num_labels=count, pad_token_id=VOCAB - 1, eos_token_id=VOCAB - 1, bos_token_id=0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch_of(name: str, side: str) -> dict[str, Tensor]:
    """Texts of LENGTHS with padding on a side, their labels, and positions from the start of each text."""
    torch.manual_seed(3)
    choices = 3 if "choice" in name else 1
    rows, lengths = B * choices, torch.tensor(LENGTHS * choices if side else [T] * (B * choices))
    column = torch.arange(T)
    start = T - lengths if side == "left" else torch.zeros_like(lengths)
    inside = (column >= start[:, None]) & (column < (start + lengths)[:, None])
    batch = {
        "input_ids": torch.where(inside, torch.randint(VOCAB - 1, (rows, T)), VOCAB - 1),
        "attention_mask": inside.long(),
        "position_ids": (column - start[:, None]).clamp(min=0),
    }
    last = start + lengths - 1
    if "choice" in name:
        batch = {key: value.view(B, choices, T) for key, value in batch.items()}
        batch |= {"mc_labels": torch.randint(3, (B,)), "mc_token_ids": last.view(B, choices)}
    elif name == "answer":
        batch |= {"start_positions": start, "end_positions": last}
    elif name == "tokens":
        batch["labels"] = torch.where(inside, torch.randint(3, (rows, T)), -100)
    elif name == "several labels":
        batch["labels"] = torch.randint(2, (rows, 3)).float()
    elif name == "regression":
        batch["labels"] = torch.randn(rows)
    else:
        batch["labels"] = torch.randint(3, (rows,))
    return batch


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("name", HEADS)
def test_logits_losses_and_gradients_are_those_of_transformers(tmp_path: Path, name: str, side: str) -> None:
    their_model = theirs(name, seed=len(side) % 2)
    their_model.save_pretrained(tmp_path)
    model = HEADS[name][0].from_pretrained(tmp_path)
    batch = batch_of(name, side)
    ours = model(**batch)
    their_batch = {**batch, "position_ids": batch["position_ids"].view(-1, T)}  # flattens the others itself
    if "choice" in name:
        their_batch["attention_mask"] = batch["attention_mask"].view(-1, T)
    expected = their_model(**their_batch)
    inside = batch["attention_mask"].bool()
    their_loss = expected.mc_loss if "choice" in name else expected.loss
    if name == "answer":
        # Padding is no candidate: its logits leave the softmax of transformers, too.
        starts, ends = (x.masked_fill(~inside, -torch.inf) for x in (expected.start_logits, expected.end_logits))
        positions = batch["start_positions"], batch["end_positions"]
        their_loss = sum(map(torch.nn.functional.cross_entropy, (starts, ends), positions)) / 2
        torch.testing.assert_close(ours.start_logits, starts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.end_logits, ends, rtol=1e-5, atol=1e-5)
    elif name == "tokens":
        torch.testing.assert_close(ours.logits[inside], expected.logits[inside], rtol=1e-5, atol=1e-5)
    else:
        logits = expected.mc_logits if "choice" in name else expected.logits
        torch.testing.assert_close(ours.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, their_loss, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    their_loss.backward()
    for full_name, (stored, transposed) in model.stored_as().items():
        grad = model.get_parameter(full_name).grad
        their_grad = their_model.get_parameter(stored).grad
        torch.testing.assert_close(grad.t() if transposed else grad, their_grad, rtol=1e-5, atol=1e-5, msg=full_name)


@pytest.mark.parametrize("name", HEADS)
def test_a_folder_goes_both_ways(tmp_path: Path, name: str) -> None:
    kind, their_class = HEADS[name]
    their_model = theirs(name)
    their_model.config.id2label = {i: f"kind {i}" for i in range(len(their_model.config.id2label))}
    their_model.config.label2id = {label: i for i, label in their_model.config.id2label.items()}
    their_model.save_pretrained(tmp_path / "theirs")
    model = kind.from_pretrained(tmp_path / "theirs")
    assert model.id2label == their_model.config.id2label
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [their_class]
    again, report = getattr(transformers, their_class).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.id2label == model.id2label
    assert again.config.label2id == model.label2id
    before, after = their_model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ours = kind.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())


def tiny(**changes: Any) -> GPTConfig:
    sizes = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": None, "bos_token_id": None}
    return GPTConfig(**{**sizes, **none, **changes})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _ in HEADS.values()))
def test_a_language_model_gets_a_fresh_head(tmp_path: Path, kind: type[TaskModel], tied: bool) -> None:
    torch.manual_seed(0)
    body = GPT(tiny(tie_word_embeddings=tied, attention_window=4, n_layer=2)).bfloat16()
    with pytest.warns(UserWarning, match="gptcore's own"):
        body.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    head = dict(getattr(model, model.head).named_parameters())
    assert all(parameter.dtype == torch.bfloat16 and not parameter.is_meta for parameter in model.parameters())
    weight = next(parameter for name, parameter in head.items() if name.endswith("weight"))
    assert 0 < weight.abs().max() < 0.15
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, body.h[1].mlp.c_fc.weight)
    assert not model.training
    model.transformer.wte.weight.data.zero_()
    with pytest.warns(UserWarning, match="gptcore's own"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected weights: "):
        GPT.from_pretrained(tmp_path)


def test_a_true_end_of_text_is_seen_though_its_id_is_the_padding() -> None:
    """transformers takes the last token whose id is not the padding's."""
    model = GPTForSequenceClassification(tiny(), 2).eval()
    text = torch.tensor([[5, 6, VOCAB - 1]])
    padded = torch.tensor([[VOCAB - 1, 5, 6, VOCAB - 1, VOCAB - 1]])
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    torch.testing.assert_close(model(padded, mask).logits, model(text).logits)
    assert not torch.allclose(model(padded, mask).logits, model(text[:, :2]).logits)


def test_a_forward_pass_changes_no_setting_and_needs_no_padding_token() -> None:
    """transformers guesses problem_type from the first labels, keeps it, and refuses batches without a padding id."""
    model, ids = GPTForSequenceClassification(tiny(), 3).eval(), torch.tensor([[5, 6], [7, 8]])
    assert model.config.pad_token_id is None
    logits, labels = model(ids, labels=torch.tensor([0, 2])).logits, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert model.problem_type is None
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_padding_has_neither_label_nor_answer() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    tokens = GPTForTokenClassification(tiny(), 3, head_dropout=0.0)
    labels = torch.tensor([[0, 1, 2, 2, 2]])
    torch.testing.assert_close(tokens(ids, mask, labels).loss, tokens(ids[:, :3], None, labels[:, :3]).loss)
    assert tokens.count_targets({"labels": labels, "attention_mask": mask}) == 3
    answer = GPTForQuestionAnswering(tiny())
    out = answer(ids, mask, torch.tensor([1]), torch.tensor([2]))
    assert out.start_logits[0, 3:].tolist() == [-torch.inf] * 2
    torch.testing.assert_close(out.loss, answer(ids[:, :3], None, torch.tensor([1]), torch.tensor([2])).loss)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in answer.parameters())


def test_the_recipes_of_gpt1() -> None:
    """Both orders of a pair added; the loss of the language model, a mean over texts; one dropout for all choices."""
    config = tiny(norm_position="post")
    model = GPTForSequenceClassification(config, 2, lm_coef=0.5)
    pair = torch.randint(VOCAB, (3, 2, 7))
    singles = [model(pair[:, order]).logits for order in range(2)]
    torch.testing.assert_close(model(pair).logits, singles[0] + singles[1])

    ids, mask, labels = torch.randint(VOCAB, (2, 7)), torch.ones(2, 7, dtype=torch.long), torch.tensor([0, 1])
    mask[1, 3:] = 0
    plain = GPTForSequenceClassification(config, 2)
    plain.load_state_dict(model.state_dict())
    language = [
        model.transformer(ids[:1], labels=ids[:1]).loss,
        model.transformer(ids[1:, :3], labels=ids[1:, :3]).loss,
    ]
    expected = plain(ids, mask, labels).loss + 0.5 * (language[0] + language[1]) / 2
    torch.testing.assert_close(model(ids, mask, labels).loss, expected)

    choice = GPTForMultipleChoice(config, head_dropout=0.5, lm_coef=0.5)
    same = torch.randint(VOCAB, (8, 1, 5)).expand(8, 3, 5)
    out = choice(same, mc_labels=torch.zeros(8, dtype=torch.long), labels=same)
    assert torch.equal(out.logits, out.logits[:, :1].expand(8, 3))
    assert len(out.logits[:, 0].unique()) == 8
    torch.testing.assert_close(out.loss, out.mc_loss + 0.5 * out.lm_loss)


def test_it_trains_and_resumes_with_the_trainer(tmp_path: Path) -> None:
    """Whether a text holds token 7; the last label is unknown."""
    torch.manual_seed(0)
    ids = torch.randint(8, VOCAB, (64, 9))
    ids[::2, 4] = 7
    rows = [{"input_ids": row, "labels": torch.tensor(int(7 in row) if i < 63 else -100)} for i, row in enumerate(ids)]

    def run(folder: str, steps: int) -> Trainer:
        torch.manual_seed(1)
        model = GPTForSequenceClassification(tiny(), id2label=["no", "yes"])
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2,
            gradient_accumulation_steps=2, save_steps=15, logging_steps=1, lr_scheduler_type="constant", warmup_steps=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=DataCollatorForTasks(), train_dataset=rows)
        trainer.train(resume_from_checkpoint=folder == "b" and steps > 15)
        return trainer

    whole = run("a", 30).model
    run("b", 15)
    resumed = run("b", 30).model
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    losses = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < 0.2 < losses[0]
    assert GPTForSequenceClassification.from_pretrained(tmp_path / "a/checkpoint-30").labels == ["no", "yes"]
    assert whole.count_targets({"labels": torch.tensor([0, 1, -100])}) == 2


def test_the_collator_pads_texts_and_labels_of_tokens_and_stacks_the_rest() -> None:
    collate = DataCollatorForTasks()
    batch = collate([{"input_ids": [3, 4], "labels": [1, 2]}, {"input_ids": torch.tensor([5]), "labels": [0]}])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[3, 4], [5, 0]], "attention_mask": [[1, 1], [1, 0]], "labels": [[1, 2], [0, -100]],
    }  # fmt: skip
    batch = collate([{"input_ids": [3, 4], "labels": 1}, {"input_ids": [5], "labels": 0}])
    assert batch["labels"].tolist() == [1, 0]
    batch = collate([{"input_ids": [3, 4], "labels": [0.0, 1.0]}, {"input_ids": [5], "labels": [1.0, 1.0]}])
    assert batch["labels"].tolist() == [[0.0, 1.0], [1.0, 1.0]]
    question = {"input_ids": [[3, 4, 5], [6]], "labels": [[3, 4, 5], [6]], "mc_labels": 1}
    batch = collate([question, question])
    assert batch["input_ids"].tolist() == [[[3, 4, 5], [6, 0, 0]]] * 2
    assert batch["labels"].tolist() == [[[3, 4, 5], [6, -100, -100]]] * 2
    assert batch["mc_labels"].tolist() == [1, 1]
    GPTForMultipleChoice(tiny(), lm_coef=0.5)(**batch).loss.backward()
    for wrong, message in [
        ([], "one example or more"),
        ([{"labels": 1}], r"should have \['input_ids', 'labels'\]"),
        ([question, {"input_ids": [1]}], "but one has"),
        ([{"input_ids": [[1], [2]]}, {"input_ids": [[1]]}], r"as many texts, but they have \[2, 1\]"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
        ([{"input_ids": [1], "labels": [0.5]}, {"input_ids": [1], "labels": 0.5}], r"the shapes \[\(1,\), \(\)\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            collate(wrong)


IDS = torch.zeros(2, 5, dtype=torch.long)
WRONG: dict[str, tuple[type[TaskModel], dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no labels": (GPTForSequenceClassification, {"num_labels": 0}, {}, ValueError, "from 1 to 1,048,576, not 0"),
    "two counts": (
        GPTForSequenceClassification, {"num_labels": 3, "id2label": ["a", "b"]}, {}, ValueError, "but id2label has 2",
    ),
    "twice": (GPTForSequenceClassification, {"id2label": ["a", "a"]}, {}, ValueError, "the name 'a' twice"),
    "gap": (GPTForSequenceClassification, {"id2label": {0: "a", 2: "b"}}, {}, ValueError, "key '2', expected 0 to 1"),
    "no name": (GPTForSequenceClassification, {"id2label": ["a", None]}, {}, TypeError, "the name None"),
    "problem": (GPTForSequenceClassification, {"problem_type": "rank"}, {}, ValueError, "'rank' should be None or"),
    "dropout": (GPTForSequenceClassification, {"head_dropout": 1.0}, {}, ValueError, r"head_dropout 1.0 should be in"),
    "high": (
        GPTForSequenceClassification, {}, {"labels": torch.tensor([0, 2])}, ValueError, "label 2 should be from 0 to 1",
    ),
    "shape": (GPTForSequenceClassification, {}, {"labels": IDS}, ValueError, r"should be \(2,\), not \(2, 5\)"),
    "kind": (
        GPTForSequenceClassification, {"problem_type": "single_label_classification"}, {"labels": torch.zeros(2)},
        TypeError, "should be integers, not torch.float32",
    ),
    "numbers": (
        GPTForSequenceClassification, {"num_labels": 1}, {"labels": torch.zeros(2, dtype=torch.long)}, TypeError,
        "should be floating-point numbers, not torch.int64",
    ),
    "tokens": (GPTForTokenClassification, {}, {"labels": IDS[:1]}, ValueError, r"\(1, 5\) should have the shape"),
    "half": (GPTForQuestionAnswering, {}, {"start_positions": IDS[:, 0]}, ValueError, "belong together"),
    "outputs": (GPTForQuestionAnswering, {"num_labels": 3}, {}, ValueError, "2 outputs"),
    "outside": (
        GPTForQuestionAnswering, {}, {"start_positions": IDS[:, 0], "end_positions": IDS[:, 0] + 5}, ValueError,
        "end_positions 5 should be from 0 to 4",
    ),
    "before": (
        GPTForQuestionAnswering, {}, {"start_positions": IDS[:, 0] + 1, "end_positions": IDS[:, 0]}, ValueError,
        "ends before it starts",
    ),
    "padding": (
        GPTForQuestionAnswering, {},
        {
            "start_positions": IDS[:, 0], "end_positions": IDS[:, 0] + 1,
            "attention_mask": torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
        },
        ValueError, "in padding",
    ),
    "flat": (GPTForMultipleChoice, {}, {}, ValueError, r"\(batch, choices, length\), not \(2, 5\)"),
    "weightless": (
        GPTForMultipleChoice, {}, {"input_ids": IDS[None], "mc_labels": IDS[:1, 0], "labels": IDS[None]}, ValueError,
        "set lm_coef",
    ),
    "nothing to add to": (
        GPTForMultipleChoice, {"lm_coef": 0.5}, {"input_ids": IDS[None], "labels": IDS[None]}, ValueError, "pass both",
    ),
    "index": (
        GPTForMultipleChoice, {}, {"input_ids": IDS[None], "mc_token_ids": IDS[:1, :2] + 5}, ValueError,
        "mc_token_ids 5 should be from 0 to 4$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    kind, settings, inputs, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        kind(tiny(), **settings)(**{"input_ids": IDS, **inputs})


def test_a_folder_with_another_head_is_refused_by_name(tmp_path: Path) -> None:
    GPTForTokenClassification(tiny(), 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected weights: classifier\.bias, classifier\.weight"):
        GPTForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.bias \(3,\) instead of \(4,\)"):
        GPTForTokenClassification.from_pretrained(tmp_path, num_labels=4)
