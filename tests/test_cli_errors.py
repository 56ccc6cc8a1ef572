"""Errors of the commands, that they change nothing, and output that cannot be written."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from gptcore import GPT, GPTConfig, Tokenizer, Trainer, TrainingArguments, cli, precision
from gptcore.cli import train as train_command
from gptcore.output import SteadyOutput
from gptcore.training.checkpoint import exclusive

TINY = [
    "--vocab-size", "265", "--n-layer", "1", "--n-embd", "8", "--n-head", "1", "--n-positions", "16",
    "--threads", "1", "--warmup-steps", "0", "--eval-steps", "none", "--samples", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("the cat sat on the mat, the café sat on the cat. " * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text("colourless green ideas sleep furiously, green furious ideas colour sleep. " * 40, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run_folder(words, tmp_path, capsys):
    """Folder of a finished run of two steps."""
    out = tmp_path / "out"
    assert main("train", words, "--output-dir", out, *TINY, "--max-steps", 2) == 0
    capsys.readouterr()
    return out


@pytest.fixture(scope="module")
def model_folder(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(words, kind="char")
    tokenizer.save_pretrained(folder)
    GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        folder
    )
    return folder


def main(*argv, **overrides):
    return cli.main([str(word) for word in argv], **overrides)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*argv, interpreter=(), **options):
    """Run gptcore in a process of its own."""
    words = [sys.executable, *interpreter, "-m", "gptcore", *map(str, argv)]
    return subprocess.run(words, text=True, timeout=300, check=False, **{"capture_output": True, **options})


# ---- a refused command changes nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds an earlier run"),
        (["--overwrite-output-dir", "--max-steps", 10, "--warmup-steps", 20], "warmup_steps is 20"),
        (["--overwrite-output-dir", "--device", "cuda:99"], "does not exist"),
        (["--overwrite-output-dir", "--vocab-size", 100], "--vocab-size is 100"),
    ],
)
def test_a_refused_run_leaves_the_run_before_it_alone(run_folder, other, capsys, options, message):
    before = contents(run_folder)
    assert main("train", other, "--output-dir", run_folder, *TINY, *options) == 1
    assert message in capsys.readouterr().err
    assert contents(run_folder) == before


def test_a_folder_that_another_process_trains_into_is_left_alone(run_folder, other, capsys):
    before = contents(run_folder)
    with exclusive(run_folder):
        assert main("train", other, "--output-dir", run_folder, *TINY, "--max-steps", 2, "--overwrite-output-dir") == 1
    assert "another process is training" in capsys.readouterr().err
    assert contents(run_folder) == before


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["new", "resumed"])
def test_a_model_without_checkpoints_is_not_overwritten(model_folder, words, tmp_path, capsys, options):
    out = tmp_path / "out"
    out.mkdir()
    for name, content in contents(model_folder).items():
        (out / name).write_bytes(content)
    before = contents(out)
    train = ["train", words, "--output-dir", out, *TINY, "--max-steps", 1, *options]
    assert main(*train) == 1
    assert f"{out} holds a model" in capsys.readouterr().err
    assert contents(out) == before
    assert main(*train, "--overwrite-output-dir") == 0
    assert contents(out)["tokenizer.json"] != before["tokenizer.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", 260], "--vocab-size is 260, but the tokenizer of"),
        (["--vocab-size", 270], "--vocab-size is 270, but the tokenizer of"),
        (["--tokenizer-kind", "char"], "--tokenizer-kind is char, but the tokenizer of"),
    ],
)
def test_resuming_with_another_tokenizer_is_refused(run_folder, words, capsys, options, message):
    before = contents(run_folder)
    tiny = TINY[2:] if "--tokenizer-kind" in options else TINY
    assert main("train", words, "--output-dir", run_folder, *tiny, "--max-steps", 3, "--resume", *options) == 1
    assert message in capsys.readouterr().err
    assert contents(run_folder) == before


def test_a_run_whose_text_gave_fewer_tokens_is_resumed(words, tmp_path, capsys):
    train = ["train", words, "--output-dir", tmp_path / "out", *TINY, "--vocab-size", 600]
    with pytest.warns(UserWarning, match="of the 600 tokens"):
        assert main(*train, "--max-steps", 1) == 0
    with pytest.warns(UserWarning, match="of the 600 tokens"):
        assert main(*train, "--max-steps", 2, "--resume") == 0


def test_exporting_over_a_device_or_a_folder_is_refused(model_folder, tmp_path, capsys):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for output in ("/dev/null", fifo, tmp_path):
        assert main("export", model_folder, "-o", output, "--overwrite") == 1
        assert f"--output {output} is not a regular file" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()
    assert fifo.is_fifo()
    file = tmp_path / "file"
    file.write_text("mine")
    assert main("export", model_folder, "--to", "hf", "-o", file, "--overwrite") == 1
    assert f"--output {file} is not a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "{words}", "--vocab-size", 2_000_000_000], "--vocab-size is 2000000000, expected 257 to"),
        (["train", "{words}", "--n-layer", 10**6], "n_layer should be at most 10,000, not 1,000,000"),
        (["train", "{words}", "--n-layer", 10**4, "--n-embd", 4096, "--n-head", 64], "parameters need"),
        (["train", "{words}", "--n-positions", 10**20], "n_positions should be at most"),
        (["train", "{words}", "--n-embd", 2**62, "--n-head", 2**61], "n_embd should be at most"),
        (["train", "{words}", "--max-steps", 10**30], "max_steps"),
        (["train", "{words}", "--num-train-epochs", "1e300"], "num_train_epochs"),
        (["train", "{words}", "--seed", 10**30], "seed"),
        (["train", "{words}", "--samples", 10**12], "--samples is 1000000000000, expected 0 to 1,000"),
        (["train", "{words}", "--threads", 10**6], "--threads is 1000000, expected 1 to"),
        (["train", "{words}", "--device", "cuda:99"], "--device cuda:99 does not exist"),
        (["train", "{words}", "--device", "cuda:" + "9" * 30], "does not exist"),
        (["generate", "{model}", "--device", "cuda:²"], "expected cpu, cuda or cuda:N"),
        (["generate", "{model}", "--seed", 2**64], "--seed is 18446744073709551616, expected 0 to"),
        (["generate", "{model}", "--max-new-tokens", 10**20], "positions"),
        (["evaluate", "{model}", "{words}", "--block-size", 10**20], "block_size"),
        (["evaluate", "{model}", "{words}", "--batch-size", 0], "batch_size"),
    ],
    ids=lambda value: " ".join(map(str, value[::2])) if isinstance(value, list) else "",
)
def test_absurd_sizes_are_refused_before_any_work(words, model_folder, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(Tokenizer, "train", lambda *_, **__: pytest.fail("a tokenizer was trained"))
    argv = [str(word).format(words=words, model=model_folder) for word in argv]
    if argv[0] == "train":
        argv += ["--output-dir", str(tmp_path / "out")]
    threads = torch.get_num_threads()
    assert main(*argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"gptcore {argv[0]}: error: "), error
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
    assert torch.get_num_threads() == threads


def test_a_model_that_memory_cannot_hold_is_refused(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_command, "total_memory", lambda device: 10**6)
    assert main("train", words, "--output-dir", tmp_path / "out", *TINY, "--n-embd", 128) == 1
    assert "parameters need" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("no room\nat line 3"), MemoryError(), RecursionError("too deep")])
def test_runtime_errors_are_a_sentence_and_a_traceback_on_demand(model_folder, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(GPT, "generate", fail)
    assert main("generate", model_folder) == 1
    said = capsys.readouterr().err
    assert said.startswith("gptcore generate: error: ")
    assert said.count("\n") == 1
    monkeypatch.setenv("GPTCORE_DEBUG", "1")
    assert main("generate", model_folder) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# ---- text in and out -----------------------------------------------------------------------------------------------


def test_a_prompt_that_is_not_utf8_is_refused_before_the_model_is_loaded(capsys):
    assert main("generate", "no-such-folder", "--prompt", os.fsdecode(b"caf\xe9")) == 1
    error = capsys.readouterr().err
    assert "is not UTF-8: it holds the byte 0xe9" in error
    assert error.isascii()


@pytest.mark.slow
def test_ascii_output_and_python_without_docstrings(words, tmp_path):
    """Everything that a run prints goes to an ASCII stdout, with -OO, which removes docstrings and assertions."""
    out = tmp_path / "é"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    tiny = [*TINY, "--samples", "1", "--sample-tokens", "4", "--max-steps", "1"]
    done = command("train", words, "--output-dir", out, *tiny, interpreter=["-OO"], env=environment)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert r"saved" in done.stdout
    assert r"\xe9/checkpoint-1" in done.stdout
    assert "---- sample 1" in done.stdout


@pytest.mark.slow
def test_a_reader_that_goes_away_never_ends_training(words, tmp_path):
    out = tmp_path / "out"
    end, stdout = os.pipe()
    os.close(end)
    train = ["train", words, "--output-dir", out, *TINY, "--max-steps", 3, "--logging-steps", 1]
    done = command(*train, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    os.close(stdout)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("stdout cannot be written") == 1
    assert (out / "checkpoint-3").is_dir()
    assert (out / "model.safetensors").is_file()


class Broken:
    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    flush = isatty = lambda self: False

    def fileno(self):
        raise OSError


@pytest.mark.parametrize(("error", "status"), [(BrokenPipeError(), 141), (OSError(28, "No space left"), 1)])
def test_output_that_is_lost_is_reported(words, model_folder, tmp_path, monkeypatch, capsys, error, status):
    """Training reports it on stderr and continues; other commands also return an error status."""
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert main("generate", model_folder, "--max-new-tokens", 1) == status
    assert capsys.readouterr().err.count("stdout cannot be written") == 1
    assert main("train", words, "--output-dir", tmp_path, *TINY, "--max-steps", 3, "--logging-steps", 1) == 0
    assert capsys.readouterr().err.count("stdout cannot be written") == 1
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_trainer_outlives_its_progress_line(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left")))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1)
    Trainer(GPT.from_pretrained(model_folder), arguments, [torch.arange(8)] * 4).train()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_steady_output_escapes_what_the_encoding_lacks(tmp_path):
    with open(tmp_path / "file", "w", encoding="latin-1") as file:
        assert SteadyOutput(file).write("é → \ud800") == 5
    assert (tmp_path / "file").read_bytes() == b"\xe9 \\u2192 \\ud800"


# ---- 16 bits that are slower than 32 -------------------------------------------------------------------------------


@pytest.fixture
def slow_16_bits(monkeypatch):
    monkeypatch.setattr(precision, "_warned", set())
    monkeypatch.setattr(precision, "_measured", lambda dtype, *_: 7.5)


def test_slow_16_bits_are_announced(slow_16_bits, words, model_folder, tmp_path, capsys, monkeypatch):
    message = "bfloat16 takes 7.5 times as long as float32 on this CPU"
    for argv in (
        ["train", words, "--output-dir", tmp_path / "out", *TINY, "--max-steps", 1, "--bf16"],
        ["evaluate", model_folder, words, "--bf16"],
        ["generate", tmp_path / "16", "--max-new-tokens", 1],
    ):
        precision._warned.clear()
        if argv[0] == "generate":
            GPT.from_pretrained(model_folder).bfloat16().save_pretrained(tmp_path / "16")
            Tokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "16")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(*argv) == 0
        assert [message in str(warning.message) for warning in caught].count(True) == 1, argv
    assert main("info") == 0
    assert "bfloat16 7.5, float16 7.5 times as long as float32" in capsys.readouterr().out


def test_the_trainer_announces_slow_16_bits_once(slow_16_bits, model_folder):
    model = GPT.from_pretrained(model_folder)
    with pytest.warns(UserWarning, match="bfloat16 takes 7.5 times"):
        Trainer(model, TrainingArguments("unused", bf16=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(model, TrainingArguments("unused", bf16=True))
        Trainer(model, TrainingArguments("unused"))


def test_warnings_are_a_line(monkeypatch):
    formatted = []

    def run(args):
        formatted.append(warnings.formatwarning("slow", UserWarning, "file.py", 3))
        return 0

    monkeypatch.setattr(cli.COMMANDS["info"], "run", run)
    assert main("info") == 0
    assert formatted == ["gptcore info: warning: slow\n"]
    assert warnings.formatwarning("slow", UserWarning, "file.py", 3) != formatted[0]


def test_precision_is_measured_without_a_trace():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ratio = precision._measured.__wrapped__(torch.bfloat16, 1, "", None)
    assert 0 < ratio < 1000
    assert torch.equal(torch.rand(3), expected)
    assert precision.slowdown(torch.float32) == precision.slowdown(torch.float64) == 1.0
