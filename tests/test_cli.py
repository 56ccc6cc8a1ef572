"""The command line, from text to model to text, and what it says when it cannot."""

import os
import re
import signal
import time
from pathlib import Path

import made_texts
import pytest
import torch
from processes import start_command

from gptcore import GPT, GPTConfig, Tokenizer, TrainingArguments, cli
from gptcore.cli.options import pick, printable
from gptcore.training.callbacks import read_log
from gptcore.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

TINY = ["--vocab-size", "400", "--n-layer", "1", "--n-embd", "32", "--n-head", "2", "--n-positions", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(made_texts.text(0, lines=400), encoding="utf-8")  # 100 kB
    return path


@pytest.fixture(scope="module")
def small(text, tmp_path_factory):
    """Folder of a model and its tokenizer, both untrained."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer.train(text, kind="char")
    tokenizer.save_pretrained(folder)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
                       eos_token_id=0)  # fmt: skip
    GPT(config).save_pretrained(folder)
    return folder


def run(capsys, *argv):
    status = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_train_learns_and_the_rest_uses_what_it_leaves(text, tmp_path, capsys):
    """The demo at small size: the validation loss falls below 60 % of where it began."""
    out = tmp_path / "out"
    train = [
        "train", text, "--output-dir", out, "--cache-dir", tmp_path, "--tokenizer-kind", "char", "--n-layer", 2,
        "--n-embd", 64, "--n-head", 2, "--n-positions", 64, "--max-steps", 140, "--learning-rate", 4e-3,
        "--eval-steps", 70, "--save-steps", 70, "--threads", 1,
    ]  # fmt: skip
    status, printed, _ = run(capsys, *train)
    assert status == 0
    before, after = map(float, re.search(r"validation loss +([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < 0.6 * before
    assert re.search(r"training loss +[\d.]+\n", printed)
    assert re.search(r"speed +[\d,]+ tokens/s\n", printed)
    assert printed.count("---- sample") == 3
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    evaluations = [entry for entry in read_log(out / "log.jsonl") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [70, 140]
    assert evaluations[-1]["eval_loss"] == pytest.approx(after, abs=1e-4)
    model, tokenizer = GPT.from_pretrained(out), Tokenizer.from_pretrained(out)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id

    status, printed, _ = run(capsys, "evaluate", out, text, "--cache-dir", tmp_path, "--threads", 1)
    assert status == 0
    assert float(re.search(r"loss ([\d.]+)", printed)[1]) == pytest.approx(after, rel=0.15)

    status, printed, _ = run(capsys, "generate", out, "--prompt", "Return the", "A", "--max-new-tokens", 10, "--greedy")
    ids = tokenizer.encode("Return the")
    alone = model.generate(torch.tensor([ids]), 10)[0, len(ids) :].tolist()
    assert status == 0
    assert printed.startswith("Return the" + printable(tokenizer, alone))

    # Run again with --resume there is nothing left to do, and the same result
    status, printed, _ = run(capsys, *train, "--resume", "--samples", 0)
    assert status == 0
    assert float(re.search(r"-> ([\d.]+)", printed)[1]) == after


@pytest.mark.slow
def test_interrupted_it_prints_the_command_that_goes_on(text, tmp_path):
    out = tmp_path / "out"
    command = ["train", text, "--output-dir", out, "--cache-dir", tmp_path, *TINY, "--max-steps", "1000000",
               "--logging-steps", "1", "--save-steps", "0", "--eval-steps", "none", "--threads", "1",
               "--warmup-steps", "0"]  # fmt: skip
    command = [str(word) for word in command]
    process = start_command(command, tmp_path / "printed")
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len(read_log(out / "log.jsonl")) < 3:
        assert process.is_alive(), (tmp_path / "printed").read_text()
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 130, printed
    assert "Traceback" not in printed
    (checkpoint,) = list_checkpoints(out)
    step = int(checkpoint.name.split("-")[1])
    goes_on = re.search(r"To resume:\s+gptcore (.*)\n", printed)[1].split()
    assert goes_on == [*command, "--resume"]

    goes_on[goes_on.index("1000000")] = str(step + 2)
    goes_on += ["--samples", "0"]
    with pytest.warns(UserWarning, match="total_steps"):
        assert cli.main(goes_on) == 0
    assert [entry["step"] for entry in read_log(out / "log.jsonl")] == list(range(1, step + 3))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "x.txt", "--n-layr", "3"], "did you mean --n-layer?"),
        (["train", "x.txt", "--lerning_rate=1"], "did you mean --learning-rate?"),
        (["generate", "out", "--top-q", "3"], "did you mean --top-"),
        (["train", "--n-layr", "3"], "did you mean --n-layer?"),  # though FILE is missing as well
        (["train", "x.txt", "--n-embd", "8", "--sed", "1"], "did you mean --seed?"),
        (["evaluate", "--batchsize=3"], "did you mean --batch-size?"),
        (["info", "--verbos"], "unknown option or argument --verbos; see gptcore info --help"),
        (["info", "more"], "unknown option or argument more; see gptcore info --help"),
        (["generat"], "invalid choice: 'generat'"),
        (["train"], "required: FILE"),
        (["train", "x.txt", "--max-steps", "many"], "invalid int value: 'many'"),
        (["train", "x.txt", "--lr-scheduler-type", "cosin"], "invalid choice: 'cosin'"),
    ],
)
def test_wrong_usage(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_errors_are_one_line(text, tmp_path, capsys):
    def error(*argv):
        status, _, errors = run(capsys, *argv)
        assert status == 1
        assert "Traceback" not in errors
        return errors

    assert "no-such.txt" in error("train", "no-such.txt", "--output-dir", tmp_path / "out")
    assert "no-such-folder" in error("generate", "no-such-folder")
    assert "n_embd" in error("train", text, "--output-dir", tmp_path / "out", "--n-embd", 30, "--n-head", 4)
    assert "unknown backend 'gpu'" in error("train", text, "--output-dir", tmp_path / "out", "--backend", "gpu")
    assert "--device is gpu, expected cpu, cuda" in error(
        "train", text, "--output-dir", tmp_path / "out", "--device", "gpu"
    )
    assert "--device cuda:77 does not exist: PyTorch finds" in error("generate", "out", "--device", "cuda:77")
    assert "--threads is 0" in error("train", text, "--output-dir", tmp_path / "out", "--threads", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "x.txt", "--init-from", "m", "--n-layer", "3", "--no-tie-word-embeddings"],
         "--n-layer, --no-tie-word-embeddings would have no effect, because --init-from m sets it"),
        (["train", "x.txt", "--init-from", "m", "--vocab_size=3"], "--vocab-size would have no effect"),
        (["train", "x.txt", "--tokenizer", "t", "--tokenizer-kind", "bpe"], "--tokenizer-kind would have no effect"),
        (["train", "x.txt", "--tokenizer-kind", "char", "--vocab-size", "9"], "--vocab-size would have no effect"),
        (["generate", "{model}", "--greedy", "--seed", "1", "--top-p", "0.5"], "--seed, --top-p would have no effect"),
        (["train", "{text}", "--output-dir", "{new}", "--vocab-size", "400", "--block-size", "0"],
         "block_size must be at least 2"),
        (["evaluate", "{model}", "{text}", "--block-size", "0"], "block_size must be at least 2"),
    ],
)  # fmt: skip
def test_no_option_is_taken_and_ignored(text, small, tmp_path, capsys, argv, words):
    argv = [word.format(text=text, model=small, new=tmp_path / "out") for word in argv]
    status, _, errors = run(capsys, *argv)
    assert status == 1
    assert words in errors


def test_a_text_with_dashes_is_a_text(small, capsys):
    text = "--a_b is no option"
    status, printed, errors = run(capsys, "generate", small, "--greedy", "--prompt", text, "--max-new-tokens", 1)
    assert (status, printed[: len(text)]) == (0, text), errors


def test_info(capsys):
    status, printed, _ = run(capsys, "info")
    assert status == 0
    for word in ("gptcore", "torch", "instruction sets", "in use", "threads", "openmp", "cuda", "backend cpu"):
        assert re.search(rf"^{word} ", printed, re.MULTILINE), word


def test_every_option_has_help_and_a_default_that_works(capsys):
    parser = cli.make_parser()
    for name, command in parser.commands.items():
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"
    args = parser.parse(["train", "file"])
    TrainingArguments(**pick(args, TrainingArguments))
    GPTConfig(**pick(args, GPTConfig))


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The module examples/demo.py, with a folder of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import demo

    monkeypatch.setattr(demo, "OUT", tmp_path)
    (tmp_path / "corpus.txt").write_text("there already", encoding="utf-8")
    return demo


def test_the_demo_is_a_command_of_ours(demo, monkeypatch, tmp_path, capsys):
    """What `make demo` runs is parsed by the same parser; corpus and plan are made once."""
    seen = []
    monkeypatch.setattr(cli, "main", lambda argv, **overrides: seen.append((argv, overrides)) or 0)
    monkeypatch.setattr(demo.precision, "slowdown", lambda dtype: 1.0)
    monkeypatch.setattr(demo.precision, "fastest", lambda runs, seconds: [0.5, 0.25])
    assert demo.main(["--seconds", "60"]) == 0
    printed = capsys.readouterr().out
    assert "float32 4,096 tokens/s, bfloat16 8,192 tokens/s" in printed
    assert re.search(r"precision +bfloat16, which is faster here\nsteps +180 of 2,048 tokens, about 60 s", printed)
    monkeypatch.setattr(demo, "make_plan", lambda seconds: pytest.fail("measured again"))
    assert demo.main([]) == 0
    (argv, overrides), again = seen
    assert again == (argv, overrides)
    args = cli.make_parser().parse(argv)
    assert (args.command, args.resume, args.bf16, args.max_steps) == ("train", True, True, 180)
    assert overrides == {"resume_command": "make demo"}
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8") == "there already"


@pytest.mark.parametrize(
    ("ratio", "times", "steps", "words"),
    [
        (9.0, [0.1], 1000, "bfloat16 takes 9 times as long (measured on one block)"),
        (9.0, [1.0], 135, "float32 2,048 tokens/s"),
        (1.0, [0.2, 0.3], 675, "float32 10,240 tokens/s, bfloat16 6,827 tokens/s"),
        (1.0, [500.0, 600.0], 20, "float32 4 tokens/s"),
    ],
)
def test_the_demo_fits_its_steps_to_the_machine(demo, monkeypatch, ratio, times, steps, words):
    monkeypatch.setattr(demo.precision, "slowdown", lambda dtype: ratio)
    monkeypatch.setattr(demo.precision, "fastest", lambda runs, seconds: times[: len(runs)])
    plan = demo.make_plan(180)
    assert (plan["max_steps"], plan["bf16"]) == (steps, False)
    assert words in plan["speed"]


def test_the_demo_measures_a_real_step(demo, monkeypatch):
    monkeypatch.setattr(demo.precision, "slowdown", lambda dtype: 1.0)
    monkeypatch.setattr(demo, "BATCH_SIZE", 1)
    monkeypatch.setattr(demo, "LENGTH", 16)
    assert demo.make_plan(1)["max_steps"] >= 20
