"""GPT against llama.cpp, with the same GGUF file and number of threads: prefill, and decoding at batch 1 and 8.

Needs the package xllamacpp, llama.cpp in a wheel, which `make sweep` installs; skipped without it. The times of
llama.cpp are its server's: evaluation of the prompt, and generation from the second token on, sampling included.
Batch 8 is eight requests at a time; the row shows their median.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.bench_generation import SIZES
from benchmarks.measure import pick
from gptcore import GPT, Tokenizer
from gptcore.export import export_gguf
from gptcore.generation import Batch, Settings
from gptcore.ops.quantized_linear import BLOCK, BYTES

PREFILL, NEW, ROUNDS = pick((16, 4, 2), (256, 32, 5))
MOST_ROWS = 8
CASES = [(size, kind) for size in [*SIZES][pick(1, 0) :] for kind in ("f32", "bf16", "q8_0", "q4_0")]


def write_model(size: str, kind: str, folder: Path) -> Path:
    """Write a GGUF file of a model with random weights; return its path. Skips the benchmark without gguf."""
    pytest.importorskip("gguf", reason='gguf is not installed (pip install "gptcore[export]")')
    (folder / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(folder / "text.txt", vocab_size=300)
    export_gguf(GPT(SIZES[size]), tokenizer, folder / "model.gguf", kind)
    return folder / "model.gguf"


def llama_server(path: Path, rows: int, length: int) -> Any:
    """Return llama.cpp's server for texts of up to `length` tokens. Skips the benchmark without xllamacpp."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (make sweep installs it)")
    options = xllamacpp.CommonParams()
    options.model.path, options.warmup, options.verbosity = str(path), True, 0
    options.n_ctx, options.n_parallel = rows * length, rows
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(options)


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, GPT, Any]:
    """Return the name of a case, our model and llama.cpp's server, both from one file."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (make sweep installs it)")
    size, kind = request.param
    path = write_model(size, kind, tmp_path_factory.mktemp("llama"))
    server = llama_server(path, MOST_ROWS, PREFILL + NEW)
    return f"{size}, {kind}", GPT.from_pretrained(path).eval(), server


def limit_of(model: GPT, kind: str, tokens: int) -> measure.Limit:
    """Return the limit of a pass: reading all weights, or multiplying them by the tokens."""
    matrices = [w for name, w in model.state_dict().items() if w.dim() == 2 and not name.startswith("wpe.")]
    if kind in BYTES:
        arithmetic = measure.integer_matmul()
        count = sum(w.nbytes // BYTES[kind] * BLOCK for w in matrices)
    else:
        arithmetic = measure.matmul(measure.operand(matrices[0].dtype))
        count = sum(w.numel() for w in matrices)
    return measure.Slower(arithmetic, sum(w.nbytes for w in matrices), 2 * tokens * count)


def prompts(rows: int, length: int) -> list[list[int]]:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()


def time_ours(model: GPT, texts: list[list[int]]) -> tuple[float, float]:
    """Return the seconds of the prefill and of a later step."""
    batch, settings = Batch(model), Settings(NEW, eos_token_id=-1)
    for text in texts:
        batch.add(text, settings)
    start = time.perf_counter()
    batch.step()
    first = time.perf_counter()
    while len(batch):
        batch.step()
    return first - start, (time.perf_counter() - first) / (NEW - 1)


def time_theirs(server: Any, texts: list[list[int]]) -> tuple[float, float]:
    def complete(text: list[int]) -> tuple[float, float]:
        request = {"prompt": text, "n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (len(text), NEW)
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3 / (NEW - 1)

    with ThreadPoolExecutor(len(texts)) as pool:
        prefill, step = zip(*pool.map(complete, texts), strict=True)
    return median(prefill), median(step)


@pytest.mark.parametrize("rows", [1, MOST_ROWS])
def bench_llama(rows: int, sides: tuple[str, GPT, Any], record: Callable[..., None]) -> None:
    case, model, server = sides
    length = min(PREFILL, model.config.n_positions - NEW) if rows == 1 else 8
    texts = prompts(rows, length)
    kinds = [(f"prefill of {length} tokens", 0, length)] * (rows == 1) + [(f"decoding at batch {rows}", 1, rows)]
    limits = [limit_of(model, case.rpartition(" ")[2], tokens) for _, _, tokens in kinds]
    runs = [
        (time_ours(model, texts), time_theirs(server, texts), [limit.rate() for limit in limits])
        for _ in range(ROUNDS + 1)
    ][1:]
    ours, theirs, rates = zip(*runs, strict=True)
    for (group, index, tokens), limit, found in zip(kinds, limits, zip(*rates, strict=True), strict=True):
        record(
            f"against llama.cpp, {group}", case, [run[index] for run in ours], [run[index] for run in theirs],
            against="llama.cpp", limit=limit, rates=found, extra={"tokens": tokens},
        )  # fmt: skip
