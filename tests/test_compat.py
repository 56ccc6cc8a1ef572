"""The usual introduction to GPT-2, with its import line changed and nothing else, runs to the end."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import run_program, start_printing

from gptcore.compat import transformers as compat
from gptcore.text.tokenizer import Tokenizer

WORDS = "the of and a to in is you that it he was for on are"

# The program of many introductions, as it is printed there
FIRST_HALF = """
from transformers import GPT2LMHeadModel, GPT2Tokenizer, GPT2Config
from transformers import TextDataset, DataCollatorForLanguageModeling
from transformers import Trainer, TrainingArguments

model = GPT2LMHeadModel.from_pretrained(NAME); tokenizer = GPT2Tokenizer.from_pretrained(NAME)
config = GPT2Config.from_pretrained(NAME)
train_dataset = TextDataset(tokenizer=tokenizer, file_path="train.txt", block_size=config.n_ctx)
data_collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
training_args = TrainingArguments(output_dir="output", overwrite_output_dir=True, num_train_epochs=1,
                                  per_device_train_batch_size=4, save_steps=10_000, save_total_limit=2)
trainer = Trainer(model=model, args=training_args, data_collator=data_collator, train_dataset=train_dataset)
trainer.train()
"""
SECOND_HALF = """
model = GPT2LMHeadModel.from_pretrained("output"); tokenizer = GPT2Tokenizer.from_pretrained("output")
train_dataset = TextDataset(tokenizer=tokenizer, file_path="fine.txt", block_size=config.n_ctx)
training_args = TrainingArguments(output_dir="fine-tuned", overwrite_output_dir=True, num_train_epochs=2,
                                  per_device_train_batch_size=4, save_steps=10_000, save_total_limit=2)
trainer = Trainer(model=model, args=training_args, data_collator=data_collator, train_dataset=train_dataset)
trainer.train()
trainer.save_model("fine-tuned")
tokenizer.save_pretrained("fine-tuned")
"""
GENERATION = """
model = GPT2LMHeadModel.from_pretrained("fine-tuned"); tokenizer = GPT2Tokenizer.from_pretrained("fine-tuned")
input_ids = tokenizer.encode("the of and", return_tensors="pt")
output = model.generate(input_ids=input_ids, max_length=20, num_return_sequences=3, do_sample=True, top_k=50,
                        top_p=0.95, temperature=0.7, pad_token_id=tokenizer.eos_token_id)
for sample in output:
    print("text:", ascii(tokenizer.decode(sample, skip_special_tokens=True)))
"""


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS.split(" "), k=count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as transformers writes it, with a tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("listing")
    (folder / "train.txt").write_text(words(2000, 0))
    (folder / "fine.txt").write_text(words(700, 1))
    vocab = Tokenizer.train(folder / "train.txt", vocab_size=280)
    vocab.save_pretrained(folder / "bare")
    transformers.AutoTokenizer.from_pretrained(str(folder / "bare")).save_pretrained(folder / "gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab.vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder


@pytest.mark.slow
def test_the_listing_its_second_half_and_generation_run_as_written(folder: Path) -> None:
    program = (FIRST_HALF + SECOND_HALF + GENERATION).replace("from transformers", "from gptcore.compat.transformers")
    program = 'NAME = "gpt2"\n' + program
    environment = {"GPTCORE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    process = start_printing(folder / "printed", run_program, program, folder, environment)
    process.join(100)
    printed = (folder / "printed").read_text()
    assert process.exitcode == 0, printed
    texts = [line for line in printed.splitlines() if re.match("text: ['\"]the of and", line)]
    assert len(texts) == 3
    # What came out is what transformers opens, weights and ids
    for name in ("output", "fine-tuned"):
        theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(str(folder / name), output_loading_info=True)
        assert not any(loading.values())
        ours = compat.GPT2LMHeadModel.from_pretrained(folder / name)
        ids = torch.randint(0, ours.config.vocab_size, (2, 20))
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)
        tokenizer = compat.GPT2Tokenizer.from_pretrained(folder / name)
        for cls in (transformers.GPT2Tokenizer, transformers.AutoTokenizer):
            text = "the of<|endoftext|> Größe\n"
            assert cls.from_pretrained(str(folder / name)).encode(text) == tokenizer.encode(text)
    before = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "gpt2"))
    assert not torch.equal(before.lm_head.weight, theirs.lm_head.weight)


def test_greedy_generation_is_that_of_transformers(folder: Path) -> None:
    ours = compat.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "gpt2")).eval()
    tokenizer = compat.GPT2Tokenizer.from_pretrained(folder / "gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["the of", "and a to in is"], padding=True, padding_side="left", return_tensors="pt")
    expected = theirs.generate(**batch, max_length=25, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(**batch, max_length=25, pad_token_id=0), expected)
    # An end that comes early: the rows are no longer than the longest, and filled up
    eos = int(expected[0, -6])
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 7}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, do_sample=False, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 0},
        {"min_new_tokens": 5},
        {"min_length": 12, "no_repeat_ngram_size": 2},
    ],
)
def test_limits_on_repetition_and_length_are_those_of_transformers(folder: Path, options: dict[str, Any]) -> None:
    ours = compat.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(folder / "gpt2")).eval()
    ids = torch.tensor([[1, 2, 3, 1, 2], [7, 7, 7, 7, 7], [9, 50, 8, 50, 9]])
    plain = ours.generate(ids, max_length=30)
    eos = int(plain[0, 6])  # an end that comes early unless it may not
    options = {**options, "max_length": 30, "pad_token_id": 0, "eos_token_id": eos}
    expected = theirs.generate(ids, do_sample=False, attention_mask=torch.ones_like(ids), **options)
    found = ours.generate(ids, **options)
    assert torch.equal(found, expected)
    if options.get("no_repeat_ngram_size") != 0:
        assert not torch.equal(found, ours.generate(ids, max_length=30, pad_token_id=0, eos_token_id=eos))


def test_what_a_tokenizer_returns_is_moved_and_has_attributes(folder: Path) -> None:
    model = compat.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    tokenizer = compat.GPT2Tokenizer.from_pretrained(folder / "gpt2")
    inputs = tokenizer("the of", return_tensors="pt").to("cpu")
    assert torch.equal(inputs.input_ids, tokenizer.encode("the of", return_tensors="pt"))
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), model.generate(inputs.input_ids, max_new_tokens=5))
    assert inputs.to("meta").attention_mask.is_meta
    with pytest.raises(AttributeError, match="has no token_type_ids; it has input_ids, attention_mask"):
        inputs.token_type_ids  # noqa: B018


def test_set_seed_decides_what_is_drawn(folder: Path) -> None:
    model = compat.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    ids = torch.tensor([[1, 2, 3]])
    drawn = []
    for seed in (1, 1, 2):
        compat.set_seed(seed)
        drawn.append(model.generate(ids, max_length=25, do_sample=True, num_return_sequences=2, top_k=0))
    assert drawn[0].shape[0] == 2
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_what_is_not_supported_says_so(folder: Path) -> None:
    model = compat.GPT2LMHeadModel.from_pretrained(folder / "gpt2")
    tokenizer = compat.GPT2Tokenizer.from_pretrained(folder / "gpt2")
    ids = torch.tensor([[1, 2, 3]])
    calls: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"max_length": 9, "num_beams": 4, "early_stopping": True}, TypeError, "not have early_stopping, num_beams"),
        ({"max_length": 9, "min_length": 5, "min_new_tokens": 2}, ValueError, "min_length or min_new_tokens"),
        ({}, ValueError, "give max_length or max_new_tokens"),
        ({"max_length": 9, "max_new_tokens": 2}, ValueError, "one of them, not 9 and 2"),
        ({"max_length": 3}, ValueError, "the prompts have 3 tokens already"),
        ({"max_length": 9, "num_return_sequences": 2}, ValueError, "do_sample=True"),
        ({"max_length": 9, "temperature": 0.7}, ValueError, "are for sampling"),
    ]
    for options, error, message in calls:
        with pytest.raises(error, match=message):
            model.generate(ids, **options)
    with pytest.raises(ValueError, match="mlm=True is for models like BERT"):
        compat.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=True)
    with pytest.raises(TypeError, match="evaluation_strategy"):
        compat.TrainingArguments(output_dir="x", evaluation_strategy="epoch")  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match=r"has no pipeline; it has AutoConfig"):
        compat.pipeline  # noqa: B018
    with pytest.raises(ImportError, match="BertModel"):
        from gptcore.compat.transformers import BertModel  # noqa: F401


def test_n_ctx_is_the_length_of_the_model(folder: Path) -> None:
    config = compat.GPT2Config.from_pretrained(folder / "gpt2")
    assert config.n_ctx == config.n_positions == 32


def test_special_tokens_in_a_text_are_read_as_transformers_does(folder: Path) -> None:
    tokenizer = compat.GPT2Tokenizer.from_pretrained(folder / "gpt2")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(folder / "gpt2"))
    text = "the<|endoftext|> of"
    assert tokenizer.encode(text) == theirs.encode(text) != Tokenizer.from_pretrained(folder / "gpt2").encode(text)
    assert tokenizer(text) == dict(theirs(text))
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text)), skip_special_tokens=True) == "the of"
    assert tokenizer.batch_decode([[0], [1, 2]]) == [tokenizer.decode([0]), tokenizer.decode([1, 2])]
