"""Prepare a corpus: read and filter, deduplicate, split, mix, tokenize, report.

All work is done in a folder beside the output, OUT.partial; its result becomes OUT when everything is done. A run that
was killed is continued by the same command. The steps, of which those marked * run on several processes:

    first*     records -> documents, normalised and filtered        OUT.partial/first/000000 ...
    exact      of equal texts one is kept
    second*    repeated lines, contamination, models, private data; n-grams   OUT.partial/second/000000 ...
    near       of similar texts one is kept; clusters
    shards*    split by cluster, mix, shuffle, tokenize             OUT.partial/result/train-00000.tokens ...
    report     report.json, report.html, README.md, rejected/
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcore.files import (
    PathLike,
    absolute,
    atomic_directory,
    atomic_file,
    lock,
    make_folder,
    read_json,
    remove,
    sweep,
    unlock,
    write_json,
)
from gptcore.prepare.duplicates import Clusters, exact_clusters, near_clusters, repeated_units
from gptcore.prepare.evaluation import Decontaminate, evaluation_ngrams
from gptcore.prepare.mixing import SPLITS, copies, repeats, shuffled, split_of
from gptcore.prepare.passes import Context, ShardTask, first_pass, make_shard, second_pass
from gptcore.prepare.readers import Input, Raw, find_inputs, read_raw
from gptcore.prepare.recipe import Recipe
from gptcore.prepare.report import Result
from gptcore.prepare.store import Corpus, source_hash
from gptcore.text.pretokenize import END_OF_TEXT
from gptcore.text.tokenizer import Tokenizer

CHUNK_RECORDS, CHUNK_BYTES = 2000, 8 << 20  # a chunk ends at whichever comes first
_PACKAGES = (
    "gptcore",
    "numpy",
    "ftfy",
    "rensa",
    "py3langid",
    "trafilatura",
    "phonenumbers",
    "python-stdnum",
    "tokenizers",
)
Log = Callable[[str], None]
Task = tuple[Callable[..., None], tuple[Any, ...]]


def prepare(
    inputs: Sequence[str],
    output: PathLike,
    recipe: Recipe,
    *,
    tokenizer: PathLike | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    keep_rejected: bool = True,
    overwrite: bool = False,
    command: str = "",
    log: Log = print,
) -> dict[str, Any]:
    """Prepare a corpus and return its report, which is also OUT/report.json.

    Args:
        inputs: files, folders and globs, each as PATH or NAME=PATH.
        output: the folder to make.
        tokenizer: folder of the tokenizer; None trains one on the training text.
        workers: processes; the output is the same for any number.
        skip_bad: leave out what cannot be read, and list it in the report.
        keep_rejected: write the dropped documents to OUT/rejected.
        overwrite: replace `output`, and an unfinished run with other settings.
        command: how to make the output again, for the report.

    Raises OSError, or ValueError for a record that cannot be read, settings that contradict each other, or an output
    that was made otherwise.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected 1 or more")
    out = absolute(output)
    work = out.with_name(out.name + ".partial")
    made = [folder.resolve() for folder in (out, work)]  # an input folder may hold them
    files = [file for file in find_inputs(inputs) if not any(file.path.resolve().is_relative_to(path) for path in made)]
    if not files:
        raise ValueError(f"all files of {', '.join(inputs)} are in the output folder {out}; give other inputs")
    sources = sorted({file.source for file in files})
    encoder = None if tokenizer is None else Tokenizer.from_pretrained(tokenizer)
    _check(recipe, sources)
    plan = _plan(files, recipe, encoder, keep_rejected)
    if os.path.lexists(out) and not overwrite:
        if (out / "report.json").is_file() and read_json(out / "report.json").get("plan") == plan:
            if (work / "plan.json").is_file() and read_json(work / "plan.json") == plan:
                remove(work)  # the run was killed after its last step
            log(f"{out} is complete, and was made by this command from these files")
            return read_json(out / "report.json")
        raise FileExistsError(f"{out} exists and was not made by this command; choose another folder, or --overwrite")
    with _work_folder(out, work, plan, overwrite):
        context = Context(recipe, sources, work, skip_bad)
        with _Pool(workers) as pool:
            found = _run(context, pool, files, encoder, plan, command, keep_rejected, log)
        if os.path.lexists(out):
            remove(out)
        os.rename(work / "result", out)
        remove(work)
    return found


def _run(
    context: Context,
    pool: _Pool,
    files: Sequence[Input],
    encoder: Tokenizer | None,
    plan: dict[str, Any],
    command: str,
    keep_rejected: bool,
    log: Log,
) -> dict[str, Any]:
    work, recipe, result = context.work, context.recipe, make_folder(context.work / "result")
    log(f"reading {len(files):,} files")
    count = _first(context, pool, files)
    first = Corpus(context.first, count)
    exact = exact_clusters(first)
    log(f"{len(first):,} documents pass the filters, {int(exact.kept.sum()):,} of them different")
    _find_repeated(context, first, exact)
    pool.run(
        (
            second_pass,
            (context, number, exact.kept[first.starts[number] : first.starts[number + 1]], int(first.starts[number])),
        )
        for number in range(count)
        if not context.second.has(number)
    )
    second = Corpus(context.second, count)
    near, kept = _near(context, second)
    log(f"{len(second):,} documents after the second pass, {int(kept.sum()):,} without near duplicates")

    splits = split_of(second.rows, near.keeper, recipe.sections["split"])
    training = kept & (splits == 0)
    size_of = [
        int(second.rows["bytes"][training & (second.rows["source"] == i)].sum()) for i in range(len(context.sources))
    ]
    times = repeats(size_of, context.sources, recipe.sections["mix"])
    for name, size, factor in zip(context.sources, size_of, times, strict=True):
        log(f"source {name}: {size:,} bytes for training, {factor:.2f} times")
    if not training.any():
        raise ValueError(
            f"no document is left for training: of {len(first):,} that passed the filters, {int(kept.sum()):,} were "
            f"kept, none of them in the training set; rejected.jsonl in {work} says why others were dropped"
        )
    order = _order(second, splits, kept, times, recipe)
    folder = _tokenizer(context, second, order["train"], encoder)
    tasks = [
        task for name, documents in order.items() for task in _shards(context, second, name, documents, folder, result)
    ]
    pool.run((make_shard, (context, task)) for task in tasks)
    if not (result / "tokenizer").is_dir():
        with atomic_directory(result / "tokenizer") as aside:
            Tokenizer.from_pretrained(folder).save_pretrained(aside)
    log(f"{len(tasks)} shards written")
    found = Result(context, first, exact, second, near, kept, splits, order, times, tasks)
    return found.write(plan, command, keep_rejected)


# ---- before anything is written --------------------------------------------------------------------------------------


def _check(recipe: Recipe, sources: Sequence[str]) -> None:
    """Load what the steps need, so that a missing file or package is an error now and not in an hour."""
    steps = recipe.first | recipe.second
    for package, sections in {
        "ftfy": ["normalise"], "py3langid": ["language"], "rensa": ["near_duplicates"], "phonenumbers": ["private"],
        "stdnum": ["private"], "zstandard": ["shards"],
    }.items():  # fmt: skip
        if any(section in recipe.sections for section in sections):
            try:
                __import__(package)
            except ImportError:
                raise ImportError(
                    f'[{sections[0]}] needs the package {package}: pip install "gptcore[prepare]"'
                ) from None
    decontaminate = steps.get("decontaminate")
    if isinstance(decontaminate, Decontaminate) and decontaminate.files:
        evaluation_ngrams(decontaminate)
    from gptcore.prepare.document import Document

    for name in ("blocklist", "perplexity", "classifier"):
        if name in steps:
            steps[name](Document("a text"))
    mix = recipe.sections["mix"]
    repeats([1 for _ in sources], sources, mix)


def _plan(files: Sequence[Input], recipe: Recipe, encoder: Tokenizer | None, keep_rejected: bool) -> dict[str, Any]:
    """Return all that the output depends on. A run is continued only if it is the same."""
    listed = hashlib.sha256()
    for file in [*files, *_given_files(recipe)]:
        status = os.stat(file.path)
        listed.update(
            f"{file.source}\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "settings": recipe.to_json(),
        "inputs": {
            "files": len(files),
            "bytes": sum(os.stat(file.path).st_size for file in files),
            "sha256": listed.hexdigest(),
        },
        "tokenizer": None if encoder is None else encoder.fingerprint,
        "keep_rejected": keep_rejected,
        "versions": versions,
    }


def _given_files(recipe: Recipe) -> list[Input]:
    """Return the files that steps read: word lists, evaluation files, and models."""
    steps = recipe.first | recipe.second
    paths = [Path(path) for path in getattr(steps.get("blocklist"), "files", [])]
    for name in ("perplexity", "classifier"):
        if model := getattr(steps.get(name), "model", ""):
            paths += sorted(path for path in Path(model).iterdir() if path.is_file())
    found = [Input("", path, str(path)) for path in paths]
    evaluation = getattr(steps.get("decontaminate"), "files", [])
    return found + (find_inputs(evaluation) if evaluation else [])


@contextlib.contextmanager
def _work_folder(out: Path, work: Path, plan: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """Make and lock the folder of intermediate results, which an unfinished run of the same plan may have left."""
    make_folder(work)
    descriptor = lock(work)
    if descriptor is None:
        raise FileExistsError(f"{work} is in use: another process prepares {out}")
    try:
        known = read_json(work / "plan.json") if (work / "plan.json").is_file() else None
        if known not in (None, plan):
            assert known is not None
            differs = sorted(key for key in plan if known.get(key) != plan[key])
            if not overwrite:
                raise FileExistsError(
                    f"{work} holds an unfinished run that differs in {', '.join(differs)}; continue it with its own "
                    "command and files, delete it, or give --overwrite"
                )
            known = None
        if known is None:
            for entry in list(work.iterdir()):
                remove(entry)
            write_json(work / "plan.json", plan)
        for folder in (work, work / "first", work / "second", work / "result", work / "result" / "text"):
            sweep(folder)
        yield
    finally:
        unlock(descriptor)


# ---- the passes ------------------------------------------------------------------------------------------------------


def _first(context: Context, pool: _Pool, files: Sequence[Input]) -> int:
    """Run the first pass where it is not done; returns the number of its chunks."""
    done = context.work / "first.json"
    if not done.is_file():
        count = 0

        def tasks() -> Iterator[Task]:
            nonlocal count
            for records in _chunks(raw for file in files for raw in read_raw(file, context.recipe.reading)):
                if not context.first.has(count):
                    yield first_pass, (context, count, records)
                count += 1

        pool.run(tasks())
        write_json(done, {"chunks": count})
    return int(read_json(done)["chunks"])


def _chunks(records: Iterable[Raw]) -> Iterator[list[Raw]]:
    """Cut records into chunks, by their number and size alone."""
    chunk: list[Raw] = []
    size = 0
    for raw in records:
        chunk.append(raw)
        size += _size(raw.data)
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(data: Any) -> int:
    if isinstance(data, str | bytes):
        return len(data)
    values = data.values() if isinstance(data, dict) else data
    return sum(len(value) if isinstance(value, str | bytes) else 8 for value in values)


def _find_repeated(context: Context, first: Corpus, exact: Clusters) -> None:
    """Write the hashes of lines that several documents have, and which document keeps each."""
    if "repeated_lines" not in context.recipe.sections:
        return
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number in range(first.count):
        units = first.chunks.array(number, "units")
        owner = units[:, 1].astype(np.int64) + first.starts[number]
        alive = exact.kept[owner]
        hashes.append(np.asarray(units[:, 0])[alive])
        owners.append(owner[alive])
    rows = first.rows
    rank = np.empty(len(rows), np.int64)
    rank[np.lexsort((rows["low"], rows["high"], -rows["chars"].astype(np.int64)))] = np.arange(len(rows))
    found = repeated_units(np.concatenate(hashes), np.concatenate(owners), rank)
    for name, values in zip(("hashes", "owners"), found, strict=True):
        with atomic_file(context.work / f"repeated_{name}.npy") as aside, open(aside, "wb") as file:
            np.save(file, values)


def _near(context: Context, second: Corpus) -> tuple[Clusters, np.ndarray[Any, Any]]:
    """Cluster near duplicates, and texts that the second pass has made equal; returns which documents are kept, too."""
    exact = exact_clusters(second)
    options = context.recipe.sections.get("near_duplicates")
    if options is None:
        return exact, exact.kept
    near = near_clusters(second, options, exact.kept)
    clusters = Clusters(near.keeper[exact.keeper], np.where(exact.kept, near.similarity, 1.0), near.candidates)
    return clusters, clusters.kept if options.action == "drop" else exact.kept


def _order(
    second: Corpus, splits: np.ndarray[Any, Any], kept: np.ndarray[Any, Any], times: Sequence[float], recipe: Recipe
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the documents of each split in their order; only training documents are repeated."""
    seed = recipe.sections["split"].seed
    number = copies(second.rows, times, seed)
    order = {}
    for code, name in enumerate(SPLITS):
        documents = np.flatnonzero(kept & (splits == code))
        times_of = number[documents] if code == 0 else np.ones(len(documents), np.int64)
        repeated = np.repeat(documents, times_of)
        copy = np.arange(len(repeated)) - np.repeat(np.cumsum(times_of) - times_of, times_of)
        order[name] = repeated[shuffled(second.rows, repeated, copy, seed)]
    return order


def _tokenizer(context: Context, second: Corpus, train: np.ndarray[Any, Any], encoder: Tokenizer | None) -> Path:
    """Return the folder of the tokenizer, which is copied, or trained on the first documents in their random order."""
    folder = context.work / "tokenizer"
    if folder.is_dir():
        return folder
    if encoder is None:
        options = context.recipe.sections["shards"]
        sizes = np.cumsum(second.rows["bytes"][train].astype(np.int64))
        chosen = train[: int(np.searchsorted(sizes, options.tokenizer_bytes)) + 1]
        sample = context.work / "sample.txt"
        with open(sample, "wb") as file:
            for document in chosen.tolist():
                file.write(second.read(document).text.encode() + f"\n{END_OF_TEXT}\n".encode())
        encoder = Tokenizer.train(sample, vocab_size=options.vocab_size)
        sample.unlink()
    with atomic_directory(folder) as aside:
        encoder.save_pretrained(aside)
    return folder


def _shards(
    context: Context, second: Corpus, split: str, documents: np.ndarray[Any, Any], tokenizer: Path, result: Path
) -> list[ShardTask]:
    """Cut the documents of a split into shards of about equal size."""
    if not len(documents):
        return []
    sizes = np.cumsum(second.rows["bytes"][documents].astype(np.int64))
    count = max(1, -(-int(sizes[-1]) // context.recipe.sections["shards"].shard_bytes))
    bounds = np.searchsorted(sizes, sizes[-1] * np.arange(1, count) / count)
    chunk_of = np.searchsorted(second.starts, documents, side="right") - 1
    tasks = []
    for number, part in enumerate(np.split(np.arange(len(documents)), bounds)):
        rows = second.rows[documents[part]]
        name = f"{split}-{number:05d}"
        tasks.append(
            ShardTask(name, tokenizer, result, chunk_of[part], rows["offset"], rows["size"], source_hash(rows))
        )
    return [task for task in tasks if len(task.sizes)]


# ---- processes -------------------------------------------------------------------------------------------------------


class _Pool:
    """Runs tasks on processes that are started for this, or here if one is enough. At most twice as many tasks wait."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Iterable[Task]) -> None:
        """Run all tasks, in any order. The first error ends it; tasks that have begun are finished."""
        if self.workers == 1:
            for function, arguments in tasks:
                function(*arguments)
            return
        if self._executor is None:
            server = multiprocessing.get_context("forkserver")  # no copy of threads or of OpenMP's state
            server.set_forkserver_preload([__name__])
            self._executor = ProcessPoolExecutor(self.workers, mp_context=server, initializer=_one_thread)
        waiting: set[Future[None]] = set()
        try:
            for function, arguments in tasks:
                waiting.add(self._executor.submit(function, *arguments))
                if len(waiting) >= 2 * self.workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in waiting:
                future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps for want of memory; the same command continues the run, "
                "with fewer --workers if need be"
            ) from error


def _one_thread() -> None:
    """Let a worker compute on one thread, as others use the other cores, and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    torch.set_num_threads(1)
