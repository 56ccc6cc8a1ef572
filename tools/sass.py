"""Reads the resources of every compiled CUDA kernel from the built module, and compares them with a table.

    python -m tools.sass           compare with tools/data/sass.json
    python -m tools.sass --write   rewrite it, after an intended change

For each kernel and architecture: registers a thread, bytes of stack (spilled registers), shared memory and threads of a
block, resident blocks per multiprocessor, counts of some instructions, and the length of the main loop.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptcore import _C
from tools.sass_loops import main_loop

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tools" / "data" / "sass.json"
DOCS = ROOT / "docs" / "kernels.md"
MARKERS = "<!-- sass -->\n", "<!-- end of sass -->"
MODULE = Path(_C.__file__)

# Of one multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"): threads,
# blocks, bytes of shared memory. Each has 65536 registers, given to warps by 256, and each block costs 1 KiB more.
MULTIPROCESSOR = {
    "sm_80": (2048, 32, 164 << 10),
    "sm_86": (1536, 16, 100 << 10),
    "sm_89": (1536, 24, 100 << 10),
    "sm_90": (2048, 32, 228 << 10),
    "sm_100": (2048, 32, 228 << 10),
    "sm_120": (1536, 24, 100 << 10),
}

# Instructions that are counted, by what their names match.
COUNTED = {
    "mma": r"HG?MMA",  # tensor cores
    "ldmatrix": r"LDSM",
    "cp_async": r"LDGSTS|UTMALDG",  # and bulk copies
    "wide": r"(LDG|STG)\..*128",  # 16-byte accesses to global memory
    "local": r"LDL|STL",  # accesses to the stack
    "fp64": r"D(ADD|MUL|FMA|MMA|SETP)|.*\.F64",
}
# Of what a warp executes in one pass through the main loop; 0 without tensor cores
LOOP = {"loop": "", "loop_mma": COUNTED["mma"], "loop_ldmatrix": COUNTED["ldmatrix"]}
FIELDS = ("registers", "stack", "shared", "threads", "blocks", *COUNTED, *LOOP)
MORE_IS_WORSE = ("registers", "stack", "shared", "local", "fp64", "loop", "loop_ldmatrix")
LESS_IS_WORSE = ("blocks", "mma", "ldmatrix", "cp_async", "wide")

COUNTED_IN_SUMMARY = {
    "mma": "HMMA", "ldmatrix": "LDSM", "cp_async": "LDGSTS, UTMALDG", "wide": "16-byte LDG, STG", "loop": "loop",
    "loop_mma": "HMMA", "loop_ldmatrix": "LDSM",
}  # fmt: skip
# What the template arguments of a kernel mean
CALLS = {"Calls0": "common calls", "Calls1": ""}
ARGUMENTS = {
    "attention_forward": {"false": "", "true": "decoding", **CALLS},
    "attention_backward": {
        "Gradients0": "dQ", "Gradients1": "dK", "Gradients2": "dV", "Gradients3": "dK and dV", **CALLS
    },
    "gelu": {"false": "erf", "true": "tanh"},
}  # fmt: skip

Row = dict[str, int]
Table = dict[str, dict[str, Row]]  # kernel: architecture: row


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: of a toolkit, of NVIDIA's wheels or of Triton's."""
    packages = Path(sysconfig.get_path("purelib"))
    folders = [
        *os.environ.get("PATH", "").split(os.pathsep),
        *(f"{os.environ[key]}/bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)),
        "/usr/local/cuda/bin",
        *map(str, sorted(packages.glob("nvidia/cu*/bin"))),
        str(packages / "triton" / "backends" / "nvidia" / "bin"),
    ]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(f"no {name}; pip install nvidia-cuda-{name}")
    return found


def plain_names(mangled: list[str]) -> list[str]:
    """layer_norm_forward_kernel<bfloat16, float> for each of the mangled names."""
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = []
    for line in lines.splitlines():
        name = re.sub(r"^void |gptcore::(cuda::)?", "", line)
        name = re.sub(r"\((\w+)\)(\d)", r"\1\2", name)  # (Gradients)0 is Gradients0
        names.append(name[: name.index("(")])
    return names


def launches() -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of a block, by the beginning of the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/launches"
        command = ["g++", "-std=c++17", "-DGPTCORE_SIMT", "-DGPTCORE_GPU=simulated", "-w", f"-I{ROOT}"]
        subprocess.run([*command, str(ROOT / "tools/launches.cpp"), "-o", program], check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = (line.rsplit(" ", 2) for line in lines)
    return {name: (int(threads), int(shared)) for name, threads, shared in rows}


def resident_blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    max_threads, max_blocks, max_shared = MULTIPROCESSOR[arch.removesuffix("a")]
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(by_registers, max_threads // threads, max_blocks, max_shared // (shared + 1024))


def count_kinds(names: list[str], kinds: dict[str, str]) -> collections.Counter[str]:
    counted = collections.Counter(names)
    return collections.Counter(
        {kind: sum(n for name, n in counted.items() if re.match(match, name)) for kind, match in kinds.items()}
    )


def code_of(cubin: Path) -> bytes:
    """Return the machine code and the names of its functions: the sections .text.NAME of an ELF file."""
    data = cubin.read_bytes()
    (table,), (size, count, names) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<3H", data, 58)
    sections = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    code = b""
    for name, _, _, _, begin, length in sections:
        at = sections[names][4] + name
        title = data[at : data.index(0, at)]
        if title.startswith(b".text."):
            code += title + data[begin : begin + length]
    return code


def instructions(cubin: Path) -> dict[str, collections.Counter[str]]:
    """How often each kind of COUNTED occurs, by function."""
    text = subprocess.run([find_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts = {}
    for part in re.split(r"^\.text\.", text, flags=re.M)[1:]:
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", part, re.M)
        count = count_kinds(names, COUNTED)
        loop = main_loop(part.splitlines()) if count["mma"] else []
        counts[part[: part.index(":")]] = count + count_kinds(loop, LOOP)
    return counts


def measure(module: Path = MODULE) -> Table:
    """The table of a built module."""
    cuobjdump = find_tool("cuobjdump")
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    arch = function = ""
    text = subprocess.run([cuobjdump, "-res-usage", str(module)], capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\d+a?)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            function = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+)", line):
            usage[function, arch] = int(match[1]), int(match[2])

    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        subprocess.run([cuobjdump, "-xelf", "all", str(module)], cwd=folder, capture_output=True, check=True)
        alike: dict[bytes, list[Path]] = {}  # sm_86 and sm_89 have the same code: it is disassembled once
        for cubin in Path(folder).iterdir():
            alike.setdefault(code_of(cubin), []).append(cubin)
        disassembled = pool.map(instructions, [cubins[0] for cubins in alike.values()])
        for cubins, counted in zip(alike.values(), disassembled, strict=True):
            for cubin in cubins:  # name.3.sm_90.cubin
                counts |= {(function, cubin.suffixes[-2][1:]): count for function, count in counted.items()}

    known = launches()
    functions = sorted({function for function, _ in usage})
    names = dict(zip(functions, plain_names(functions), strict=True))
    table: Table = collections.defaultdict(dict)
    for (function, arch), (registers, stack) in usage.items():
        name = names[function]
        fitting = [start for start in known if name.startswith(start)]
        if not fitting:
            raise KeyError(f"tools/launches.cpp does not know {name}")
        threads, shared = known[max(fitting, key=len)]
        blocks = resident_blocks(arch, registers, threads, shared)
        count = counts[function, arch]
        row = {"registers": registers, "stack": stack, "shared": shared, "threads": threads, "blocks": blocks}
        table[name][arch] = row | {kind: count[kind] for kind in (*COUNTED, *LOOP)}
    return {name: table[name] for name in sorted(table)}


def problems(table: Table) -> list[str]:
    """Return violations of the limits that hold for every kernel, independent of the committed table."""
    found = []
    for name, archs in table.items():
        for arch, row in archs.items():
            at = f"{name} {arch}"
            for field in ("stack", "local", "fp64"):
                if row[field]:
                    found.append(f"{at}: {field} is {row[field]}, expected 0")
            if row["blocks"] < 1:
                found.append(f"{at}: no block fits on a multiprocessor")
            attention = re.match(r"attention_(forward|backward)_(?:kernel|bulk)<(\w+)", name)
            needs = ["wide"] if name.startswith(("layer_norm", "gelu")) else []
            if attention:
                without = {"float": ["mma", "ldmatrix"], "Warpgroup": ["ldmatrix"]}.get(attention[2], [])
                needs += [field for field in ("cp_async", "mma", "ldmatrix") if field not in without]
            found += [f"{at}: {field} is 0, expected some" for field in needs if not row[field]]
    return found


def amount(row: Row, field: str) -> float:
    """Return a figure of a row that can be compared: for loops per tensor-core instruction, since tiles differ."""
    return row[field] / max(row["loop_mma"], 1) if field in LOOP else row[field]


def worsened(table: Table, before: Table) -> list[str]:
    """Numbers that are worse than they were, and kernels that one of the tables lacks."""
    found = [f"{name} is new" for name in table if name not in before]
    found += [f"{name} is gone" for name in before if name not in table]
    for name, archs in table.items():
        for arch, row in archs.items():
            old = before.get(name, {}).get(arch)
            if old is None:
                continue
            for field in FIELDS:
                new, before_it = amount(row, field), amount(old, field)
                if (field in MORE_IS_WORSE and new > before_it) or (field in LESS_IS_WORSE and new < before_it):
                    found.append(f"{name} {arch}: {field} was {old[field]}, is {row[field]}")
    return found


def compiler() -> str:
    """The nvcc that built the module: numbers of another cannot be compared."""
    return str(_C.build_info()["nvcc"])


def load() -> tuple[str, Table]:
    content = json.loads(TABLE.read_text())
    rows = content["kernels"]
    return content["nvcc"], {
        name: {arch: dict(zip(FIELDS, row, strict=True)) for arch, row in archs.items()} for name, archs in rows.items()
    }


def write(table: Table) -> None:
    lines = []
    for name, archs in table.items():
        rows = ",\n".join(f'   "{arch}": {list(row.values())}' for arch, row in archs.items())
        lines.append(f"  {json.dumps(name)}: {{\n{rows}}}")
    kernels = ",\n".join(lines)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(
        f'{{"nvcc": "{compiler()}",\n "fields": {json.dumps(FIELDS)},\n "kernels": {{\n{kernels}\n }}\n}}\n'
    )


def title(name: str) -> str:
    """Return a kernel's name in words: attention backward, bfloat16, 64, dQ."""
    kernel, _, arguments = name.removesuffix(">").partition("<")
    words = arguments.split(", ")
    for start, meanings in ARGUMENTS.items():
        if kernel.startswith(start):
            words = [meanings.get(word, word) for word in words]
    return ", ".join(filter(None, [kernel.removesuffix("_kernel").replace("_", " "), *words]))


def summary(table: Table) -> str:
    """Return the part of docs/kernels.md between the markers. Equal rows of bfloat16 and float16 are one, "16 bits"."""
    heads = "kernel", "threads", "shared memory", "registers", "resident blocks", *COUNTED_IN_SUMMARY.values()
    titles: dict[tuple[str, ...], str] = {}  # by the cells of the row, and the title without its dtype
    for name, archs in table.items():
        rows = list(archs.values())
        least, most = (pick(row["registers"] for row in rows) for pick in (min, max))
        registers = str(most) if least == most else f"{least} to {most}"
        blocks = ", ".join(str(archs[arch]["blocks"]) for arch in ("sm_80", "sm_90", "sm_90a") if arch in archs)
        counts = [str(rows[0][kind]) for kind in COUNTED_IN_SUMMARY]
        cells = str(rows[0]["threads"]), str(rows[0]["shared"]), registers, blocks, *counts
        words = title(name)
        key = (*cells, words.replace("bfloat16", "float16"))
        titles[key] = words.replace("float16", "16 bits") if key in titles else words
    lines = [f"| {' | '.join((words, *cells))} |" for (*cells, _), words in titles.items()]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]) + "\n"


def documented(text: str, table: Table) -> str:
    begin, end = (text.index(marker) for marker in MARKERS)
    return text[: begin + len(MARKERS[0])] + summary(table) + text[end:]


def main() -> int:
    if not _C.cuda_archs():
        print(f"this module has no CUDA kernels: {_C.cuda_problem()}", file=sys.stderr)
        return 2
    table = measure()
    bad = problems(table)
    if "--write" in sys.argv[1:]:
        write(table)
        DOCS.write_text(documented(DOCS.read_text(), table))
    elif TABLE.exists():
        bad += worsened(table, load()[1])
    print("\n".join(bad) or f"{sum(map(len, table.values()))} rows, none worse", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
