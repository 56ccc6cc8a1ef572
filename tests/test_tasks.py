"""Tasks from file to model to prediction: training, resuming, folders, batches, windows, commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import processes
from tiny import tiny_model

from gptcore import Tokenizer, cli
from gptcore.heads import GPTForQuestionAnswering, GPTForTokenClassification
from gptcore.tasks import TASKS, Answer, Classify, Entities, Task, recipe
from gptcore.tasks.entities import legal_path
from gptcore.tasks.examples import Columns, Question, Sentence, Text, words_of
from gptcore.tasks.pipelines import load
from gptcore.tasks.recipe import FinetuneOptions, finetune
from gptcore.tasks.report import Report, render
from gptcore.tasks.task import GPT1_TOKENS, settings_of
from gptcore.tensor_file import TensorFile
from gptcore.training.callbacks import TrainerCallback
from gptcore.training.trainer import Trainer

COLOURS, ANIMALS = ("red", "blue", "green"), ("cat", "dog", "cow")
NAMES = ("Ada", "Bob", "Eve")


def examples_of(task: str) -> list[dict[str, Any]]:
    """Examples that a small model learns without error: the answer is in single words."""
    rows: list[dict[str, Any]] = []
    for i in range(60):
        colour, animal, name = COLOURS[i % 3], ANIMALS[i // 3 % 3], NAMES[i // 9 % 3]
        if task == "classify":
            rows.append({"text": f"the {animal} is {colour}", "label": f"is {colour}"})
        elif task == "entities":
            words = ["the", animal, "of", name, "is", colour]
            rows.append({"tokens": words, "tags": ["O", "B-ANIMAL", "O", "B-NAME", "O", "O"]})
        elif task == "answer":
            context = f"the {animal} is {colour}. {name} ran."
            asked, text = [("who?", name), ("what?", animal), ("where?", "")][i % 3]
            answers = (
                {"text": [text], "answer_start": [context.index(text)]} if text else {"text": [], "answer_start": []}
            )
            rows.append({"question": asked, "context": context, "answers": answers})
        else:
            rows.append({"context": f"the {animal} is", "choices": [name, colour, animal][i % 2 :], "label": 1 - i % 2})
            rows[-1]["choices"] = rows[-1]["choices"][:2]
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("\n".join(json.dumps(examples_of(task)) for task in TASKS), encoding="utf-8")
    tokenizer = Tokenizer.train(folder / "text.txt", vocab_size=330)
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=tokenizer.vocab_size, n_positions=48, n_embd=32, initializer_range=0.1).save_pretrained(
        folder
    )
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(base: Path, folder: Path, task: str, resume: bool = False, rows: Any = None, **changes: Any) -> Any:
    file = write(folder / f"{task}.jsonl", examples_of(task) if rows is None else rows)
    own = {name: changes.pop(name) for name in list(changes) if name in FinetuneOptions.__dataclass_fields__}
    options = FinetuneOptions(task, str(file), str(file), **own)  # type: ignore[arg-type]
    settings = {"output_dir": str(folder / "out"), "num_train_epochs": 12, "learning_rate": 5e-3, "disable_tqdm": True}
    return finetune(base, options, resume, **{**settings, **changes})


def same_weights(a: Path, b: Path) -> bool:
    with TensorFile(a / "model.safetensors") as one, TensorFile(b / "model.safetensors") as other:
        return one.entries.keys() == other.entries.keys() and all(
            torch.equal(one.read(name), other.read(name)) for name in one.entries
        )


@pytest.mark.parametrize("task", TASKS)
def test_from_file_to_model_to_prediction(
    base: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(base, tmp_path, task, num_train_epochs=24 if task == "answer" else 12)
    result = report.result
    assert result.metrics[report.metric] > 0.9  # five seeds gave 1 for each task
    assert next(iter(report.baselines.values()))[report.metric] < 0.6, "the majority"
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["metrics"] == result.metrics
    page = (tmp_path / "out/report.html").read_text()
    assert "fine-tuned" in page
    assert ("<svg" in page) == (task != "answer")
    made, model = load(tmp_path / "out")
    assert type(made) is TASKS[task]
    examples = made.read(tmp_path / f"{task}.jsonl", Columns()).examples
    predictions = made.predict(model, examples)
    assert made.score(examples, predictions).metrics == result.metrics
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "out"), str(tmp_path / f"{task}.jsonl"), "--device", "cpu"]) == 0
    assert f" {result.metrics[report.metric]:.4f}" in capsys.readouterr().out
    for example, prediction in list(zip(examples, predictions, strict=True))[:6]:
        assert made.predict(model, [example], 1) == [prediction], "a prediction has other bits in a batch"


class Kill(TrainerCallback):
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def work(rank: int, count: int, command: list[str], output: Path, killed: bool) -> None:
    """Run `gptcore finetune` as one of `count` processes; the output goes into a file."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f"{output}.{rank}", "w")  # noqa: SIM115 (to the end of the process)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{output}.group", rank=rank, world_size=count)
    if killed:
        recipe.Trainer = lambda *args: Trainer(*args[:-1], [*args[-1], Kill()])  # type: ignore[assignment, misc]
    status = cli.main(command)
    sys.stdout.flush()
    os._exit(status)


def command_of(base: Path, folder: Path, task: str, *options: str) -> list[str]:
    file = write(folder.parent / f"{task}.jsonl", examples_of(task))
    command = ["finetune", str(base), "--task", task, "--train", str(file), "--validation", str(file), *options]
    command += ["--num-train-epochs", "3", "--learning-rate", "5e-3", "--device", "cpu"]
    return [*command, "--output-dir", str(folder / "out")]


@pytest.mark.parametrize(
    ("task", "options", "count"),
    [
        ("classify", ["--lora", "2"], 1),
        ("answer", ["--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "2"], 2),
    ],
)
def test_a_killed_run_resumes_with_the_bits_of_an_undisturbed_one_in_one_process(
    base: Path, tmp_path: Path, task: str, options: list[str], count: int
) -> None:
    """SIGKILL comes between two checkpoints. Several processes write the files of one, and share its predictions."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert cli.main(command_of(base, whole, task, *options)) == 0
    for number, deadly in enumerate((True, False)):
        members = [
            processes.Process(
                target=work,
                args=(rank, count, [*command_of(base, killed, task, *options), "--resume"],
                      tmp_path / f"run{number}", deadly and rank == count - 1),
            )
            for rank in range(count)
        ]  # fmt: skip
        for member in members:
            member.start()
        for member in members:
            member.join(120)
        outputs = [(tmp_path / f"run{number}.{rank}").read_text() for rank in range(count)]
        codes = [member.exitcode for member in members]
        assert codes == [0] * count if not deadly else codes[-1] == -signal.SIGKILL, outputs
        if deadly:
            assert "checkpoint-6" in os.listdir(killed / "out")
            assert "model.safetensors" not in os.listdir(killed / "out")
    assert "baseline" in outputs[0]
    assert ("trained parameters" in outputs[0]) == (task == "classify"), "memory with and without an adapter"
    assert outputs[1:] == [""] * (count - 1), "one process prints"
    assert same_weights(whole / "out", killed / "out")
    reports = [json.loads((folder / "out/report.json").read_text()) for folder in (whole, killed)]
    for name in ("metrics", "errors", "steps", "best_step"):
        assert reports[0][name] == reports[1][name]
    if task == "classify":
        assert (killed / "out/adapter/adapter_model.safetensors").exists()


def test_the_best_checkpoint_is_kept_and_training_stops_early(base: Path, tmp_path: Path) -> None:
    report = run(base, tmp_path, "classify", num_train_epochs=100, early_stopping_patience=2, eval_steps=4)
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    evaluated = {entry["step"]: entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry}
    assert report.steps < 400
    assert (report.options["load_best_model_at_end"], recipe.RUN["early_stopping_patience"]) == (True, 4)
    assert report.best_step == max(evaluated, key=lambda step: (evaluated[step], -step))
    assert report.result.metrics["accuracy"] == evaluated[report.best_step]


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (
            [{"text": f"{c} {a}", "labels": [x for x in (c, a) if x != "dog"]} for c in COLOURS for a in ANIMALS] * 4,
            "f1",
        ),
        ([{"text": f"{c} cat", "label": i + 0.5} for i, c in enumerate(COLOURS)] * 8, "pearson"),
    ],
)
def test_several_labels_and_numbers(base: Path, tmp_path: Path, rows: Any, metric: str) -> None:
    report = run(base, tmp_path, "classify", rows=rows, num_train_epochs=30)
    assert report.metric == metric
    assert report.result.metrics[metric] > 0.9  # four seeds gave 0.93 to 1, with early stopping


@pytest.mark.parametrize("labelling", ["last", "twice"])
def test_windows_tag_each_word_once(base: Path, labelling: str) -> None:
    """Each word of a long text gets its tag from one window, at its last token; training labels go the same way."""
    tokenizer = Tokenizer.from_pretrained(base)
    labels = ["O", "B-NAME", "I-NAME"]
    task = Entities(tokenizer, labels, {"max_length": 20, "labelling": labelling})
    words = [f"w{i}Ada"[: 2 + i % 5] for i in range(40)]
    spans, text = [], ""
    for word in words:
        spans.append((len(text), len(text) + len(word)))
        text += word + " "
    example = Sentence("here", text, tuple(spans), tuple(labels[i % 2] for i in range(40)))
    windows = task.windows(example, labelled=True)
    assert len(windows) > 3
    seen = set()
    for window in windows:
        assert len(window.input_ids) <= 20
        for number, position in zip(window.marks.numbers, window.marks.positions, strict=True):
            seen.add(number)
            assert words[number].endswith(tokenizer.decode([window.input_ids[position]]).strip())
            assert window.targets["labels"][position] == number % 2
        kept = [label for label in window.targets["labels"] if label != -100]
        assert len(kept) == len(window.marks.numbers)
        if labelling == "twice":
            half = len(window.input_ids) // 2
            assert window.input_ids[:half] == window.input_ids[half:]
            assert min(window.marks.positions) >= half
    assert seen == set(range(40))


def test_words_without_an_entity_before_them_are_never_inside_one() -> None:
    labels = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.normal(size=(5, 5))
        path = legal_path(scores, labels)
        every = np.array(np.meshgrid(*[range(5)] * 5)).reshape(5, -1).T

        def legal(tags: Any) -> bool:
            return all(
                not labels[b].startswith("I-")
                or (a is not None and labels[a] != "O" and labels[a][2:] == labels[b][2:])
                for a, b in zip([None, *tags], tags, strict=False)
            )

        best = max((tags for tags in every if legal(tags)), key=lambda tags: scores[range(5), tags].sum())
        assert path == best.tolist()
    assert legal_path(np.array([[0.0, 1.0]]), ["O", "I-X"]) == [1], (
        "tags of a model that has no B- are taken as they are"
    )


def test_answers_of_all_windows_share_one_softmax(base: Path) -> None:
    """The sum of the softmax is over each span once and no answer, whatever the windows; spans hold no outer spaces."""
    tokenizer = Tokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = GPTForQuestionAnswering.from_pretrained(base).eval()
    with torch.no_grad():
        model.qa_outputs.weight.normal_(std=1.0)
    context = "the cat is red. Ada ran. the dog is blue. Bob ran. the cow is green. Eve ran."
    example = Question("here", "who?", context, (("Bob", context.index("Bob")),))
    for length in (24, 48):
        task = Answer(tokenizer, [], {"max_length": length})
        task.stride = 8
        windows = task.windows(example, labelled=True)
        assert (len(windows) > 2) == (length == 24)
        outputs = task.run(model, windows, 2)
        total = task.decode(example, windows, outputs, top_k=10**6)
        found, none, log_total = task.candidates(windows, outputs, 5)
        # Every span of up to five tokens, each from the first window that has it
        logits = {}
        for window, output in zip(windows, outputs, strict=True):
            at, tokens = window.marks.begin, list(enumerate(window.marks.spans))
            words = [(i, a, b) for i, (a, b) in tokens if a < b]  # not of white space alone
            for i, a, _ in words:
                for j, _, b in words:
                    if i <= j < i + 5:
                        logits.setdefault((a, b), float(output[0, at + i] + output[1, at + j]))
        assert log_total == pytest.approx(float(np.logaddexp.reduce([*logits.values(), none])), rel=1e-6)
        assert found[0][0] == pytest.approx(max(logits.values()))
        assert all(one["answer"] == one["answer"].strip() for one in total["candidates"])
        starts = {int(window.targets["start_positions"]) for window in windows}
        assert len(starts) > 1 or length == 48, "windows without the answer point to their last token"


def test_the_first_word_and_no_answer_can_win(base: Path) -> None:
    """The pipeline of transformers 4 finds neither: it masks position 0, whose scores are those of no answer."""
    task = Answer(Tokenizer.from_pretrained(base), [], {"max_length": 48, "threshold": 0.0})
    example = Question("here", "who?", "Ada ran.")
    (window,) = task.windows(example)
    part, outputs = window.marks, torch.zeros(2, len(window.input_ids))
    last = max(i for i, (_, end) in enumerate(part.spans) if end <= len("Ada"))
    outputs[0, part.begin] = outputs[1, part.begin + last] = 5.0
    found = task.decode(example, [window], [outputs])
    assert (found["answer"], found["start"], found["no_answer"]) == ("Ada", 0, -10.0)
    outputs[:, -1] = 6.0
    found = task.decode(example, [window], [outputs], top_k=2)
    assert [one["answer"] for one in found["candidates"]] == ["", "Ada"]
    assert found["answer"] == ""
    assert found["no_answer"] == 2.0


def test_the_threshold_of_no_answer_is_the_best_of_the_validation_set(base: Path) -> None:
    """The reported predictions are by thresholds of other contexts: own labels change nothing."""
    task = Answer(Tokenizer.from_pretrained(base), [], {"max_length": 16})
    there, none = (("x", 0),), ()
    span = {"answer": "x", "score": 0.5, "start": 0, "end": 1}

    def answers(golds: Any, scores: Any, contexts: Any) -> list[str]:
        examples = [Question("here", "q", f"x {c}", gold) for gold, c in zip(golds, contexts, strict=True)]
        return [p["answer"] for p in task.tune(examples, [{**span, "no_answer": s, "span": span} for s in scores])]

    scores = [-2.0, 1.5, 1.0, 3.0, -1.0, 0.5, 0.2, 2.0]
    golds, contexts = [there, none, there, none, there, none, there, none], [0, 0, 1, 1, 2, 2, 3, 3]
    found = answers(golds, scores, contexts)
    assert task.settings["threshold"] == 1.25
    # Contexts 0 and 2 by the threshold (1 + 2) / 2 of contexts 1 and 3, and those by (-1 + 0.5) / 2
    assert found == ["x", "x", "", "", "x", "x", "", ""]
    for half in (0, 1):
        other = [none if context % 2 == half else gold for gold, context in zip(golds, contexts, strict=True)]
        again = answers(other, scores, contexts)
        assert [a for a, c in zip(again, contexts, strict=True) if c % 2 == half] == [
            a for a, c in zip(found, contexts, strict=True) if c % 2 == half
        ]
    answers([there], [-2.0], [0])
    assert task.settings["threshold"] is None, "every question has an answer"


def test_batches_hold_texts_of_similar_lengths(base: Path) -> None:
    task = Entities(Tokenizer.from_pretrained(base), ["O", "B-X", "I-X"], {"max_length": 48})
    model = GPTForTokenClassification.from_pretrained(base, id2label=task.labels)
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(sorted(kwargs["attention_mask"].sum(1).tolist())), with_kwargs=True
    )
    texts = ["a b " * (4 + 8 * (i % 2)) for i in range(6)]
    task.predict(model, [Sentence("here", text, words_of(text)) for text in texts], batch_size=3)
    assert len(seen) == 2
    assert all(lengths[0] == lengths[-1] for lengths in seen)
    assert seen[0] < seen[1]


def test_the_report_shows_the_twenty_worst_errors() -> None:
    """Those that the model was surest of come first; the matrix is drawn, row by row."""
    task = Classify.__new__(Classify)
    task.labels, task.settings = ["a", "b"], {}
    examples = [Text("here", f"text {i}", label="a") for i in range(25)]
    predictions: list[Any] = [{"label": "b", "score": i / 25} for i in range(24)] + [{"label": "a", "score": 1.0}]
    result = task.score(examples, predictions)
    report = Report("classify", "base", "accuracy", result, {}, {}, {"train": 1, "validation": 25}, 1, None)
    saved, page = report.to_json(), render(report)
    assert [error["text"] for error in saved["errors"]] == [f"text {i}" for i in range(23, 3, -1)]
    assert (saved["number_of_errors"], saved["confusion"]) == (24, [[1, 24], [0, 0]])
    assert "The worst errors: 20 of 24" in page
    assert page.count(">text ") == 20
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert [picture.count("<rect"), picture.count(">24</text>")] == [4, 1]


def test_settings_are_checked(base: Path) -> None:
    model = GPTForTokenClassification.from_pretrained(base)
    for settings, expected in (
        ({"max_length": 49}, "max_length is 49, expected 2 to 48"),
        ({"layout": "own"}, "layout is 'own', expected one of"),
        ({"threshold": "x"}, "threshold is 'x', expected a number"),
        ([], r"is \[\], expected an object"),
    ):
        model.settings = {"gptcore": settings}
        with pytest.raises(ValueError, match=expected):
            settings_of(model)


def test_commands(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = examples_of("classify")
    train, unseen = write(tmp_path / "train.jsonl", rows), write(tmp_path / "unseen.jsonl", rows[:5])
    out = tmp_path / "out"
    command = ["finetune", str(base), "--task", "classify", "--train", str(train), "--validation", str(unseen)]
    command += ["--output-dir", str(out), "--learning-rate", "5e-3", "--num-train-epochs", "12"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "columns of " in printed
    assert "is blue: 20 (33.3%)" in printed
    assert "no text is cut off at max_length 48" in printed
    assert "baseline          majority: accuracy" in printed
    assert cli.main(command) == 1, "the folder holds a run"
    assert "holds an earlier run" in capsys.readouterr().err
    assert cli.main(["evaluate", str(out), str(unseen)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main(["predict", str(out), str(unseen), "the cat is blue", "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows[:5]] + ["is blue"]
    for wrong, expected in (
        (["predict", str(base), "x", "--with", "y"], "--with has 1 texts"),
        (["predict", str(out), "none.csv"], "none.csv does not exist"),
        (["evaluate", str(out), str(unseen), "--block-size", "8"], "--block-size would have no effect"),
        (
            ["evaluate", str(base), str(base / "text.txt"), "--text-column", "text"],
            "--text-column would have no effect",
        ),
        (
            ["evaluate", str(out), str(write(tmp_path / "odd.jsonl", [{"text": "a", "label": "z"}]))],
            "odd.jsonl, line 1: the label 'z' is not one of the model's; there are 'is blue'",
        ),
        (
            ["evaluate", str(out), str(write(tmp_path / "list.jsonl", [{"text": "a", "label": ["z"]}]))],
            "list.jsonl, line 1: the label is ('z',), expected one label",
        ),
    ):
        assert cli.main(wrong) == 1
        assert expected in capsys.readouterr().err


def test_the_layout_of_gpt1(base: Path, tmp_path: Path) -> None:
    """Pairs with start, delimiter and extract tokens, in both orders, with the language-model loss; and with LoRA."""
    rows = [
        {"text": a, "text_pair": b, "label": str(a == b).lower()} for a in ANIMALS for b in ANIMALS for _ in range(3)
    ]
    settings = {"rows": rows, "layout": "gpt1", "both_orders": True, "lm_coef": 0.5, "dropout": 0.2}
    report = run(base, tmp_path, "classify", **settings, num_train_epochs=2, lora=2)
    task, model = load(tmp_path / "out")
    start, delimiter, extract = (task.tokenizer.special_tokens[name] for name in GPT1_TOKENS)
    assert model.config.vocab_size == task.tokenizer.vocab_size == Tokenizer.from_pretrained(base).vocab_size + 3
    cat, dog = (task.tokenizer.encode(text) for text in ("cat", "dog"))
    assert task.windows(Text("here", "cat", "dog"))[0].input_ids == [
        [start, *cat, delimiter, *dog, extract],
        [start, *dog, delimiter, *cat, extract],
    ]
    found = [task.predict(model, [Text("here", *pair)])[0]["scores"] for pair in (("cat", "dog"), ("dog", "cat"))]
    assert found[0] == pytest.approx(found[1])
    new = model.transformer.wte.weight[start : extract + 1]
    assert not torch.equal(new[0], new[1])
    assert (tmp_path / "out/adapter/tokenizer.json").exists()
    assert report.options["lm_coef"] == 0.5
    assert (model.config.resid_pdrop, model.config.attn_pdrop, model.config.embd_pdrop) == (0.2, 0.2, 0.2)
    with pytest.raises(ValueError, match="has one text, but the model reads pairs"):
        task.predict(model, [Text("here", "cat")])


def test_long_texts_are_cut_at_the_longer_part(base: Path) -> None:
    task: Task[Any] = TASKS["choice"](Tokenizer.from_pretrained(base), ["x"], {"max_length": 10})
    assert task.join([1] * 20, [2] * 3)[:6] == [1] * 6
    assert task.join([1] * 20, [2] * 3)[-3:] == [2] * 3
    assert len(task.join([1] * 20, [2] * 20)) == 10
    assert task.join([1] * 2, [2] * 3) == [1, 1, *task.delimiter, 2, 2, 2]
    assert task.truncated == 3
    assert words_of("it's 3.50\u20ac") == ((0, 2), (2, 3), (3, 4), (5, 6), (6, 7), (7, 9), (9, 10))
