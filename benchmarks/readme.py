"""The parts of the project's README.md that follow from results.json, gpu.json and the registry of operations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tables import COMMITTED, Results, between, cpu, elsewhere, hardware, load, markdown
from gptcore.files import read_json
from gptcore.ops import registry

BEGIN, END = "<!-- {} by python -m benchmarks.report: do not edit -->", "<!-- end of {} -->"


class Headline(NamedTuple):
    """Rows of results.json that the README shows: `group` matches all of a group's name, `case` the start of a case."""

    label: str
    group: str
    case: str = ""


# The benchmarks in the chart, each in float32 and bfloat16
CHARTED = [
    Headline(
        "attention, forward + backward\n12 heads of 64, 1,024 tokens", r"attention forward \+ backward", "D=64 S=1024"
    ),
    Headline("GPT-2 124M, training step\nbatch of 4 x 256 tokens", "GPT-2 124M training step"),
]
# The rows of the README's table
SHOWN = [
    Headline("attention, forward + backward", r"attention forward \+ backward"),
    Headline("attention, one new token (decoding)", "attention decode"),
    Headline("GELU, forward + backward", r"GELU forward \+ backward"),
    Headline("layer norm with residual, forward + backward", r"layer norm with residual forward \+ backward"),
    Headline("GPT-2 124M training step", "GPT-2 124M training step"),
    Headline("GPT-2 124M generation", "generation"),
]
DTYPES = "float32", "bfloat16"
THEIRS = "PyTorch", "transformers", "PyTorch's fused operations"  # references that are not gptcore's code
OVERHEAD = {  # groups, by pattern, that measure Python and autograd rather than kernels
    "call overhead of .*": "operations on tiny tensors, dominated by Python overhead",
    "overhead of .*": "a training step of a tiny model, dominated by Python overhead",
}
WITHIN_SPREAD = "†: in at least one case the difference is within the spread of the measurements."


def find(results: Results, headline: Headline, dtype: str) -> list[dict[str, Any]]:
    """Return the rows of a headline in one dtype, by autocast or with weights of that dtype, against others' code."""
    return [
        row
        for row in results["rows"]
        if re.fullmatch(rf"{headline.group} {dtype}( autocast)?", row["group"])
        and row["case"].startswith(headline.case)
        and row["against"] in THEIRS
    ]


def speedup(rows: list[dict[str, Any]]) -> str:
    """Return the range of the ratios, marked if a row shows no difference beyond its spread."""
    ratios = [row["ratio"] for row in rows]
    return between([ratio[0] for ratio in ratios], ".2f") + "†" * any(low <= 1 <= high for _, low, high in ratios)


def slower(results: Results) -> dict[str, str]:
    """Return each group with cases in which the reference is faster, with the ratios of those cases."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["against"] in THEIRS and row["ratio"][0] < 1:
            kinds = (text for pattern, text in OVERHEAD.items() if re.fullmatch(pattern, row["group"]))
            reference = row["against"].removesuffix("'s fused operations")
            groups.setdefault((next(kinds, row["group"]), reference), []).append(row)
    return {group: f"{group} ({speedup(rows)} times as fast as {other})" for (group, other), rows in groups.items()}


def version(machines: list[Results], package: str) -> str:
    found = {machine["versions"][package].partition("+")[0] for machine in machines}
    return " and ".join(sorted(found))


def claims(results: Results, folder: Path = COMMITTED) -> str:
    """Return three lines about speed, each with shapes, versions and hardware."""
    machines = [results, *map(load, elsewhere(folder))]
    attention, step = Headline("", CHARTED[0].group), CHARTED[1]
    cases = [row["extra"] for row in find(results, attention, "float32")]
    tokens, head_dims = (between([case[axis] for case in cases], ",") for axis in "SD")

    def on(headline: Headline, against: str, bfloat16: str, name: Callable[[Results], str]) -> str:
        found = [[find(machine, headline, dtype) for dtype in ("bfloat16", "float32")] for machine in machines]
        shapes = [[{row["case"] for row in rows} for rows in pair] for pair in found]
        (first, *others) = (  # the machines on which all cases were measured
            ([speedup(rows) for rows in pair], f"on {name(machine)}")
            for pair, cases, machine in zip(found, shapes, machines, strict=True)
            if cases == shapes[0]
        )
        text = f"{first[0][0]} times as fast as {against} in {bfloat16} and {first[0][1]} in float32 {first[1]}"
        return "; ".join([text, *(f"{a} and {b} {there}" for (a, b), there in others)])

    lines = [
        f"**Attention on a CPU**, forward and backward, {tokens} tokens, head_dim {head_dims}: "
        + on(attention, f"PyTorch {version(machines, 'torch')}", "bfloat16", hardware),
        f"**A GPT-2 124M training step on a CPU**, {find(results, step, 'float32')[0]['case']}: "
        + on(step, f"transformers {version(machines, 'transformers')}", "bfloat16 (autocast)", cpu),
    ]
    if (folder / "gpu.json").exists():
        lines.append(claim_on_gpu(read_json(folder / "gpu.json")))
    text = "\n".join(f"- {line}." for line in lines)
    return f"{text} {WITHIN_SPREAD}" if "†" in text else text


def claim_on_gpu(found: Results) -> str:
    shapes = [re.findall(r"\d+", row["case"].partition("(")[2]) for row in found["rows"] if row["op"] == "attention"]
    tokens, head_dims = (between([int(shape[axis]) for shape in shapes], ",") for axis in (2, 3))
    (triton, cuda), (triton_cudnn, cuda_cudnn) = (
        [between(gpu_ratios(found, f"gptcore {ours}", reference), ".2f") for ours in ("triton", "cuda")]
        for reference in ("SDPA flash", "SDPA cudnn")
    )
    return (
        f"**Attention on a GPU** ({found['gpu']}) in bfloat16, {tokens} tokens, head_dim {head_dims}, forward and "
        f"backward timed separately: the Triton kernels are {triton} times as fast as FlashAttention-2 in PyTorch "
        f"{found['torch'].partition('+')[0]}, the CUDA kernels {cuda} times; relative to cuDNN, {triton_cudnn} and "
        f"{cuda_cudnn} times"
    )


def gpu_ratios(found: Results, ours: str, reference: str) -> list[float]:
    """Return the time of a reference by that of one of our backends, for each case and pass of attention."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in found["rows"]:
        if row["op"] == "attention" and row["ms"]:
            times.setdefault((row["case"], row["pass"]), {})[row["name"]] = row["ms"]
    return [here[reference] / here[ours] for here in times.values() if reference in here and ours in here]


def summary(results: Results, folder: Path = COMMITTED) -> str:
    """Return the README's table of ratios, the cases that are slower, and where all rows are."""
    lines = [["times as fast as the reference", *DTYPES, "reference"]]
    for headline in SHOWN:
        found = {dtype: find(results, headline, dtype) for dtype in DTYPES}
        if against := {row["against"] for rows in found.values() for row in rows}:
            ratios = [speedup(found[dtype]) if found[dtype] else "" for dtype in DTYPES]
            lines.append([headline.label, *ratios, ", ".join(sorted(against))])
    others = [(load(path), f"benchmarks/results/{path.parent.name}/README.md") for path in elsewhere(folder)]
    here = slower(results)
    losses = [f"Slower than the reference on {cpu(results)}: {'; '.join(here.values()) or 'no case'}."]
    for other, _ in others:
        there = [text for group, text in slower(other).items() if group not in here]
        losses.append(f"Also slower on {cpu(other)}: {'; '.join(there) or 'no case'}.")
    links = [f"[{cpu(results)}](benchmarks/results/README.md)", *(f"[{cpu(other)}]({to})" for other, to in others)]
    return "\n\n".join([
        f"Medians on {hardware(results)}, PyTorch {version([results], 'torch')}, {results['date']}. A range covers "
        f"several sequence lengths, head dimensions or batch sizes. {WITHIN_SPREAD}",
        markdown(lines),
        " ".join(losses),
        f"All measurements, their spread, and the performance goals that are not met: {', '.join(links)}. CPU names "
        "are those in `/proc/cpuinfo`.",
    ])  # fmt: skip


def support() -> str:
    """Return the README's table of operations, backends and dtypes, from the registry."""
    names = ("cpu", "cuda", "triton", "torch")
    formula = registry.BACKENDS["torch"].implementations
    lines = [["operation", *names]]
    for operation in formula:
        cells = []
        for name in names:
            backend = registry.BACKENDS[name]
            own = name == "torch" or backend.implementations.get(operation) is not formula[operation]
            short = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
            cells.append(short if own else "PyTorch")
        lines.append([f"`{operation}`", *cells])
    return markdown(lines)


def insert(text: str, name: str, made: str) -> str:
    """Return `text` with `made` between the markers of that name. Raises ValueError unless it has both, once."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected the lines {begin!r} and {end!r}, once each and in this order")
    return re.sub(re.escape(begin) + r".*" + re.escape(end), lambda _: f"{begin}\n{made}\n{end}", text, flags=re.DOTALL)


def readme(text: str, results: Results) -> str:
    """Return the project's README with the parts that are made here."""
    parts = {"claims": claims(results), "support": support(), "results": summary(results)}
    for name, made in parts.items():
        text = insert(text, name, made)
    return text
