"""A corpus that is on every machine: the documentation inside Python's own standard library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from gptcore.files import PathLike, atomic_file
from gptcore.text.tokenizer import END_OF_TEXT

_NO_DOCUMENTATION = {"test", "tests", "idlelib", "idle_test", "turtledemo", "lib2to3", "site-packages", "dist-packages"}


def write_standard_library_corpus(path: PathLike) -> Path:
    """Write the topics of `help()` and the docstrings of the standard library as one UTF-8 text file; returns it.

    Each topic and each module is a document; "<|endoftext|>" on a line of its own separates two. The sources are
    parsed, never run. A topic or docstring that occurs again is left out. The documents are in the order of their
    hashes: one Python always gives the same text, and its tail is a fair sample for validation. Takes seconds; the
    file is whole or absent.

    Raises FileNotFoundError if this Python has no sources of its standard library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = [*_topics(library / "pydoc_data" / "topics.py"), *_modules(library)]
    if not documents:
        raise FileNotFoundError(f"there is no documented source in {library}; use a Python with its standard library")
    encoded = {document.encode("utf-8", "backslashreplace") for document in documents}
    ordered = sorted(encoded, key=lambda document: hashlib.sha256(document).digest())
    path = Path(path)
    with atomic_file(path) as aside:
        aside.write_bytes(f"\n{END_OF_TEXT}\n".encode().join(ordered) + b"\n")
    return path


def _parse(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own escape sequences
        return ast.parse(file.read_bytes(), str(file))


def _topics(file: Path) -> Iterator[str]:
    """Yield the values of the one dictionary in pydoc_data/topics.py, which some distributions leave out."""
    if file.is_file():
        for node in _parse(file).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                topics: dict[str, str] = ast.literal_eval(node.value)
                yield from (_clean(topics[name]) for name in sorted(topics))


def _modules(library: Path) -> Iterator[str]:
    """Yield the docstrings of each module, each under the name and the parameters of what it describes."""
    seen: set[str] = set()
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if _NO_DOCUMENTATION.isdisjoint(parts):
            try:
                tree = _parse(file)
            except (SyntaxError, ValueError, OSError):  # a template, or not ours to read
                continue
            module = ".".join(parts).removesuffix(".__init__")
            sections = []
            for heading, text in _docstrings(tree, module):
                if text not in seen:
                    seen.add(text)
                    sections.append(f"{heading}\n\n{text}")
            if sections:
                yield "\n\n\n".join(sections)


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(node: ast.Module | ast.ClassDef | _Function, name: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of a module, class or function and of all inside it, in the order of the source."""
    if text := _clean(ast.get_docstring(node, clean=False) or ""):
        yield f"{name}({ast.unparse(node.args)})" if isinstance(node, _Function) else name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | _Function):
            yield from _docstrings(child, f"{name}.{child.name}")


def _clean(text: str) -> str:
    """Strip indentation and surrounding white space; spell out NULs, which would make the file binary."""
    return inspect.cleandoc(text).strip().replace("\0", r"\0")
