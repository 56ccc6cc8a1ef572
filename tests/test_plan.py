"""The plan of a run: published runs within 10 %, sizes to the byte, the memory of real steps, and the command line."""

from __future__ import annotations

import ctypes
import gc
import json
import re
from pathlib import Path

import pytest
import torch
from processes import processes
from tiny import tiny_trainer

from gptcore.cli import main
from gptcore.config import GPTConfig
from gptcore.model import GPT
from gptcore.training import estimate
from gptcore.training.arguments import TrainingArguments
from gptcore.training.estimate import DEVICES, memory
from gptcore.training.trainer import Trainer


@pytest.mark.parametrize(
    ("preset", "tokens", "device", "count", "mfu", "flops", "hours"),
    [
        ("gpt2", 10.26e9, "a100", 8, 0.60, 8.77e18, 94 / 60),  # llm.c, 124M
        ("gpt2-xl", 33.55e9, "h100", 8, 0.49, 3.45e20, 24.0),  # llm.c, 1558M
        ("gpt3-175b", 300e9, "v100", 10_000, 0.3, 3.14e23, None),  # Brown et al. 2020
    ],
)
def test_published_runs(
    preset: str, tokens: float, device: str, count: int, mfu: float, flops: float, hours: float | None
) -> None:
    config = GPTConfig.preset(preset)
    total = estimate.flops_per_token(config, config.n_positions) * tokens
    assert total == pytest.approx(flops, rel=0.1)
    if hours is not None:
        assert total / (DEVICES[device].flops * count * mfu) / 3600 == pytest.approx(hours, rel=0.1)


def test_states_are_exact_and_activations_as_published() -> None:
    config = GPTConfig.preset("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    found = memory(config, 8, 1024, dtype=torch.bfloat16)
    assert found.weights + found.gradients + found.moments == 16 * 124_439_808
    recomputed = memory(config, 8, 1024, dtype=torch.bfloat16, recompute=True)
    # Korthikanti et al. 2022: 34 bytes a token, layer and channel; with recomputation, the two inputs of each block and
    # one whole block. Autocast keeps weights in bfloat16 as well
    cast = 2 * 124e6
    assert found.activations == pytest.approx(2.567e9 + cast, rel=0.1)
    assert recomputed.activations == pytest.approx((2 * 0.151 + 0.214) * 1e9 + cast, rel=0.1)
    assert memory(config, 8, 1024, processes=8, fsdp=True).moments == 124_439_808


def test_the_scaling_law_is_the_refit_one() -> None:
    N, D = estimate.optimal_size(5.76e23)  # Chinchilla's budget: 72 B parameters, D/N 18.4
    assert pytest.approx([72e9, 18.4], rel=0.03) == [N, D / N]
    assert estimate.optimal_tokens(N) == pytest.approx(D)
    better = min(estimate.predicted_loss(N * f, D / f) for f in (0.9, 1.1))
    assert estimate.predicted_loss(N, D) < better


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    assert main(["plan", *options]) == 0
    return {line[:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}


def test_the_command_line_answers_either_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan(capsys, "--preset", "gpt2", "--tokens", "10B", "--device", "a100", "--count", "8", "--mfu", ".6",
                 "--price", "1.6")  # fmt: skip
    assert "124,439,808 parameters" in lines["model"]
    assert lines["time"].startswith("95.1 min, 20 dollars on 8 x a100 at 312 TFLOP/s (assumed: MFU 0.6; price 1.6")
    assert lines["start from"].startswith("scratch")
    command = lines["command"].split()
    assert command[:3] == ["torchrun", "--nproc-per-node", "8"]
    numbers = {name: int(command[command.index(name) + 1]) for name in (
        "--per-device-train-batch-size", "--gradient-accumulation-steps", "--max-steps", "--block-size")}  # fmt: skip
    product = 1
    for number in numbers.values():
        product *= number
    assert product == pytest.approx(10e9, rel=1e-3)

    for question in (["--budget", "20usd"], ["--time", "95min"]):
        options = ["--preset", "gpt2", "--device", "a100", "--count", "8", "--mfu", "0.6", "--price", "1.6"]
        answer = plan(capsys, *question, *options)["budget"]
        tokens = re.search(r"gpt2 gets ([0-9.]+)B tokens", answer)
        assert tokens is not None
        assert float(tokens[1]) == pytest.approx(10, rel=0.03)
    assert "gets" in plan(capsys, "--time", "24h", "--device", "h100")["budget"]
    few = plan(capsys, "--preset", "gpt2", "--tokens", "100M", "--device", "l4")
    assert few["start from"].startswith("the checkpoint gpt2-")
    long = plan(capsys, "--preset", "gpt2-xl", "--tokens", "1B", "--device", "l40s", "--length", "16384")
    assert "--gradient-checkpointing" in long["command"]
    assert "--n-positions 16384" in long["command"]
    large = plan(capsys, "--preset", "gpt3-13b", "--tokens", "1B", "--device", "h200", "--count", "8")
    assert large["fits"].count(", with --parallel fsdp") == 1
    assert large["command"].endswith("--parallel fsdp")
    none = plan(capsys, "--preset", "gpt3-13b", "--tokens", "1B", "--device", "l40s")
    assert none["command"] == "one example does not fit on l40s; take a larger device"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "gpt2", "--device", "h1000"], "--device h1000 is not known; expected cpu, b200"),
        (["--preset", "gpt2", "--device", "h100", "--count", "0"], "--count is 0, expected 1 or more"),
        (["--preset", "gpt2", "--device", "h100", "--mfu", "1.5"], "--mfu is 1.5, expected a part of the peak"),
        (["--preset", "gpt2", "--device", "t4", "--micro-batch", "900"], "--micro-batch is 900, but "),
        (["--device", "h100"], "expected --preset, or --budget or --time to choose one"),
        (["--device", "h100", "--budget", "5"], "--budget needs --price"),
        (["--device", "h100", "--time", "5h", "--tokens", "1B"], "--tokens would have no effect"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["plan", *options]) == 1
    assert message in capsys.readouterr().err


def test_gptcore_train_prints_the_plan_and_its_correction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, disable_tqdm=False, max_steps=12, data=[torch.arange(8)] * 22).train()
    printed = capsys.readouterr().out
    assert re.search(r"(?m)^time +[0-9.]+ s \(assumed: MFU 0.5 of 1 x", printed)
    assert re.search(r"(?m)^memory +0.00 GB at the peak \(weights", printed)
    assert re.search(r"(?m)^after 10 steps: [0-9,]+ tokens/s, so [0-9.]+ s left, MFU 0\.", printed)


SHAPES = [
    ({"vocab_size": 2048, "n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 4}, 4),
    ({"vocab_size": 8192, "n_positions": 256, "n_embd": 512, "n_layer": 3, "n_head": 8}, 2),
]


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measure(folder: Path, shape: dict[str, int], batch: int, recompute: bool) -> int:
    """Train two steps; return by how many bytes the peak of resident memory rose over that before the model."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=2, save_steps=0, logging_steps=0,
        gradient_checkpointing=recompute, disable_tqdm=True,
    )  # fmt: skip
    data = [torch.arange(shape["n_positions"]) % shape["vocab_size"]] * (2 * batch)
    Trainer(GPT(no_dropout(shape)), args, data).train()
    return resident("VmHWM") - before


def no_dropout(shape: dict[str, int]) -> GPTConfig:
    return GPTConfig(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # type: ignore[arg-type]


RUNS = [(shape, batch, recompute) for shape, batch in SHAPES for recompute in (False, True)]


def measure_all(folder: Path) -> None:
    assert ctypes.CDLL(None).mallopt(-3, 65536) == 1  # M_MMAP_THRESHOLD: tensors that are freed go back to the system
    torch.set_num_threads(1)
    tiny_trainer(folder / "first", max_steps=1, gradient_checkpointing=True).train()  # what libraries allocate once
    measured = [measure(folder / str(number), *run) for number, run in enumerate(RUNS)]
    (folder / "measured.json").write_text(json.dumps(measured))


@pytest.mark.slow
def test_memory_of_real_steps_is_that_of_the_plan(tmp_path: Path) -> None:
    """Measure in another process, because its malloc is changed, all sizes one after another."""
    process = processes.Process(target=measure_all, args=(tmp_path,))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    planned = [
        memory(no_dropout(shape), batch, shape["n_positions"], recompute=recompute).total
        for shape, batch, recompute in RUNS
    ]
    assert planned == pytest.approx(json.loads((tmp_path / "measured.json").read_text()), rel=0.1)
