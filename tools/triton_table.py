"""Compiles the Triton kernels for each GPU, without one: registers, spills, shared memory, tensor-core instructions.

Every row of the tile tables is compiled as `forward` and `backward` would launch it, and compared with
tools/data/triton.json. `python -m tools.triton_table --write` writes that file, and its digest in
docs/kernels-triton.md. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from gptcore.kernels import adamw, attention, cross_entropy, gelu, heads, layer_norm, tiles

HERE = Path(__file__).parent
TABLE, PAGE = HERE / "data" / "triton.json", HERE.parent / "docs" / "kernels-triton.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB that a block can have; sm_86 of the first
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# ---- the cases -------------------------------------------------------------------------------------------------------


def attend(
    dtype: torch.dtype,
    head_dim: int,
    dropout_p: float = 0.0,
    documents: bool = False,
    batch: int = 2,
    length: int = 64,
    heads: int = 2,
) -> None:
    q, k, v = torch.zeros(batch, length, 3, heads, head_dim, dtype=dtype).transpose(1, 3).unbind(2)
    cu = torch.arange(batch + 1) * length if documents else None
    seed = torch.tensor([2**40 + 1]) if dropout_p else None
    settings = (cu, cu, seed, 0.5, True, -1, -1, dropout_p)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    attention.forward(q, k, v, out, lse, settings)
    attention.backward(out, None, q, k, v, out, lse, out, out, out, settings)


def attend_in_tf32(head_dim: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    attend(F32, head_dim)
    torch.backends.cuda.matmul.allow_tf32 = False


def normalise(dtype: torch.dtype, width: int, rows: int = 64) -> None:
    x, weight, mean = torch.zeros(rows, width, dtype=dtype), torch.ones(width, dtype=dtype), torch.zeros(rows)
    layer_norm.forward(x, x, weight, weight, x, x, mean, mean, 1e-5)
    layer_norm.backward(x, x, x, weight, mean, mean, x, None, weight, weight)


def curve(dtype: torch.dtype, width: int, tanh_form: bool, rows: int = 64) -> None:
    x, bias = torch.zeros(rows, width, dtype=dtype), torch.zeros(width)
    gelu.forward(x, bias, x, tanh_form)
    gelu.backward(x, x, bias, x, bias, tanh_form)


def score(dtype: torch.dtype, vocab: int, rows: int = 64) -> None:
    logits, targets, losses = (
        torch.zeros(rows, -(-vocab // 16) * 16, dtype=dtype),
        torch.zeros(rows).long(),
        torch.zeros(rows),
    )
    cross_entropy.forward(logits, targets, losses, vocab, -100, True)
    cross_entropy.mean(losses, targets, losses[:1], losses[:1], -100)


def update(dtype: torch.dtype, masters: bool) -> None:
    rows, number = torch.zeros(1, 7, dtype=torch.int64), torch.zeros(())
    adamw.step(
        rows, rows[:, :2], torch.zeros(1, dtype=dtype), masters, number, number,
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip


CASES: dict[str, Callable[[], None]] = {
    **{
        f"{str(dtype)[6:]} head_dim {head_dim}": functools.partial(attend, dtype, head_dim)
        for dtype, head_dims in ((BF16, (64, 128, 256)), (F16, (64,)), (F32, (64, 128, 256)))
        for head_dim in head_dims
    },
    **{f"tf32 head_dim {head_dim}": functools.partial(attend_in_tf32, head_dim) for head_dim in (64, 128)},
    "bfloat16 head_dim 64 dropout documents": functools.partial(attend, BF16, 64, 0.1, True),
    "bfloat16 head_dim 128 dropout": functools.partial(attend, BF16, 128, 0.1),
    "bfloat16 head_dim 256 dropout": functools.partial(attend, BF16, 256, 0.1),
    **{
        f"{str(dtype)[6:]} width {width}": functools.partial(normalise, dtype, width)
        for dtype, widths in ((BF16, (768, 4096, 8192, 65536)), (F32, (768, 8192)))
        for width in widths
    },
    "bfloat16 width 3072 tanh": functools.partial(curve, BF16, 3072, True),
    "bfloat16 width 3072 erf": functools.partial(curve, BF16, 3072, False),
    "bfloat16 masters": functools.partial(update, BF16, True),
    "float32 weights": functools.partial(update, F32, False),
    "bfloat16 vocabulary 50257": functools.partial(score, BF16, 50257),
}


def wanted(architecture: str, case: str) -> bool:
    """Less where shared memory is larger: wide float32 is slow to compile, and much the same on all of NVIDIA's."""
    if architecture == "gfx942":
        return not case.startswith("tf32")
    return architecture == "sm_80" or not re.search(r"(float32|tf32) head_dim (128|256)|(128|256) dropout", case)


# ---- compiling -------------------------------------------------------------------------------------------------------


def specialised(backend: Any, kernel: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], list[Any]]:
    """The arguments by name, and what of them a kernel is compiled for: types, constants, multiples of 16."""
    bound = {param.name: value for param, value in zip(kernel.params, args, strict=False)}
    bound |= {param.name: kwargs[param.name] for param in kernel.params if param.name in kwargs}
    return bound, [
        ("constexpr", bound[param.name])
        if param.is_constexpr
        else native_specialize_impl(type(backend), bound[param.name], False, not param.do_not_specialize, True)
        for param in kernel.params
    ]


def compile_for(target: GPUTarget, kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """Compile a kernel as Triton's launcher would for these arguments on such a GPU, without launching it."""
    backend = make_backend(target)
    bound, special = specialised(backend, kernel, args, kwargs)
    options, signature, constants, attrs = kernel._pack_args(backend, kwargs, bound, special, None)
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def measured(compiled: Any, architecture: str) -> dict[str, int]:
    """The compiler's own figures; the last is how many tensor-core instructions of its kind there are."""
    if architecture == "gfx942":
        assembly = compiled.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
        registers, spills = found["vgpr_count"], found["vgpr_spill_count"]
    else:
        assembly = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
        found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        registers, spills = found["REG"], found["STACK"] + found["LOCAL"]
    figures = {"registers": registers, "spills": spills, "shared": compiled.metadata.shared}
    for instruction in (TENSOR_CORES[architecture], "mma.sync"):
        if count := assembly.count(instruction):
            return figures | {instruction: count}
    return figures


@contextlib.contextmanager
def launching(run: Callable[..., None], architecture: str) -> Iterator[None]:
    """Calls `run` in place of starting kernels, as on a GPU of that architecture."""
    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(tiles, "architecture", return_value=architecture),
        mock.patch.object(layer_norm, "processors", return_value=132),
        mock.patch.object(gelu, "processors", return_value=132),
        mock.patch.object(heads, "cache_bytes", return_value=50 << 20),
    ):
        yield


def compile_case(architecture: str, case: str) -> dict[str, dict[str, int]]:
    """Figures by "kernel, case" of all kernels that a case launches."""
    figures = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = compile_for(TARGETS[architecture], kernel, *args, **kwargs)
        module = kernel.__module__.rpartition(".")[2]
        figures[f"{module}.{kernel.__name__.strip('_')} {case}"] = {
            "warps": compiled.metadata.num_warps, **measured(compiled, architecture)
        }  # fmt: skip

    with launching(run, architecture):
        CASES[case]()
    return figures


def compiled_anew() -> list[str]:
    """Kernels that another batch size or length would compile once more."""
    backend, seen = make_backend(TARGETS["sm_90"]), defaultdict(set)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kinds = tuple(getattr(arg, "dtype", arg is None) for arg in args)
        seen[kernel.__module__, kernel.__name__, kinds].add(str(specialised(backend, kernel, args, kwargs)[1]))

    with launching(run, "sm_90"):
        for batch, length, heads in itertools.product((1, 2, 16), (1, 2, 16, 77), (1, 12, 16)):
            attend(BF16, 64, 0.1, True, batch, length, heads)
            normalise(BF16, 768, batch * length)
            curve(BF16, 3072, True, batch * length)
            score(BF16, 50257, batch * length)
    return [f"{name[0]} {name[1]} is compiled for {len(keys)} shapes" for name, keys in seen.items() if len(keys) > 1]


def wrong_with(name: str, figures: dict[str, int], architecture: str) -> list[str]:
    """Return violations of the limits that hold for every kernel, independent of the committed table."""
    found = []
    if figures["shared"] > SHARED[architecture] * 1024:
        found.append(f"{figures['shared']} bytes of shared memory, {architecture} has {SHARED[architecture]} KB")
    # At 256, and in 32 bits, the registers do not suffice for tiles of the 64 rows that the instructions of sm_90 and
    # sm_100 take.
    enough = {TENSOR_CORES[architecture], *(["mma.sync"] if re.search(r"head_dim 256|tf32", name) else [])}
    if re.search(r"attention\.(?!spans).*(float16|tf32)", name) and not enough & figures.keys():
        found.append(f"no {' or '.join(sorted(enough))}")
    return [f"{architecture} {name}: {problem}" for problem in found]


def differences(table: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Where a kernel got worse than the committed table, or is not in it; a few registers come and go."""
    found = []
    for architecture, rows in table.items():
        for name in sorted(rows.keys() | committed.get(architecture, {}).keys()):
            new, old = rows.get(name), committed.get(architecture, {}).get(name)
            if new is None or old is None:
                found.append(f"{architecture} {name}: {'no longer compiled' if new is None else 'not in the table'}")
            elif new["registers"] > old["registers"] + 8 or any(new[key] > old[key] for key in ("spills", "shared")):
                found.append(f"{architecture} {name}: {new}, in the table {old}")
    return found


def digest(table: dict[str, Any]) -> str:
    """The table of the documentation: registers, spilled bytes and shared memory of the main kernels."""
    names = [name for name in table["sm_80"] if re.search(r"(16|32) (head_dim (64|128|256)|width (768|4096))$", name)]
    names = [name for name in names if "sum" not in name and " float16" not in name]
    lines = ["| kernel | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    for name in names:
        cells = (
            f"{rows[name]['registers']} / {rows[name]['spills']} / {rows[name]['shared'] / 1024:.0f}"
            if name in rows
            else "-"
            for rows in table.values()
        )
        lines.append(f"| {name.replace('_kernel', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compiled_table() -> dict[str, dict[str, dict[str, int]]]:
    work = [(architecture, case) for architecture in TARGETS for case in CASES if wanted(architecture, case)]
    table: dict[str, dict[str, dict[str, int]]] = {architecture: {} for architecture in TARGETS}
    with ProcessPoolExecutor(2) as pool:
        for (architecture, _), figures in zip(work, pool.map(compile_case, *zip(*work, strict=True)), strict=True):
            table[architecture] |= figures
    return table


def main() -> None:
    table = compiled_table()
    wrong = compiled_anew() + [
        line
        for architecture, rows in table.items()
        for name, figures in rows.items()
        for line in wrong_with(name, figures, architecture)
    ]
    if "--write" in sys.argv:
        lines = (
            f' "{architecture}": {{\n'
            + ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in rows.items())
            + "\n }"
            for architecture, rows in table.items()
        )
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        if PAGE.exists():
            begin, end = "<!-- table -->\n", "\n<!-- end of table -->"
            head, rest = PAGE.read_text().split(begin)
            PAGE.write_text(head + begin + digest(table) + end + rest.split(end)[1])
    else:
        wrong += differences(table, json.loads(TABLE.read_text()))
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
