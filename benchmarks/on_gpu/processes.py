"""Parts of a measurement in processes of their own, which end in time and leave whole files."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole whenever it is read."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def part_file(output: Path, name: str) -> Path:
    return output / f"part_{name.replace(' ', '_')}.json"


class Stopped(Exception):
    """SIGINT or SIGTERM came."""


def stop(*_: object) -> None:
    raise Stopped


def in_child(name: str, output: Path, seconds: float, options: list[str]) -> dict[str, Any]:
    """Run a part in a process of its own, which is killed when its time is over; return its rows and failure."""
    path = part_file(output, name)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(output), "--part", name, *options]
    print(f"== {name}, at most {seconds:.0f} s", flush=True)
    start, failure, stopped = time.monotonic(), None, False
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = child.wait(seconds)
        failure = f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        failure = f"killed after {seconds:.0f} s"
    except Stopped:
        failure, stopped = "stopped", True
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    return {**found, "seconds": time.monotonic() - start, "failure": failure, "stopped": stopped}


def use_module(path: Path) -> None:
    """Take gptcore's native module from a file: a variant that was built before."""
    spec = importlib.util.spec_from_file_location("gptcore._C", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a native module of Python")
    sys.modules["gptcore._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
