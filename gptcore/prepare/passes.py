"""What a worker does: make one chunk of a pass, or one shard. Each result follows from its task alone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.data.shards import write_shard
from gptcore.prepare.document import Document, Drop, Step
from gptcore.prepare.duplicates import minhash_bands, remove_units, shingles
from gptcore.prepare.readers import BadRecord, Raw, make_document
from gptcore.prepare.recipe import Recipe
from gptcore.prepare.store import Chunks, Rejected, write_zst
from gptcore.prepare.summary import MEASURES, Summary, histogram, language_of, licence_of, measure
from gptcore.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Context:
    """What all tasks of a run have in common."""

    recipe: Recipe
    sources: list[str]  # sorted
    work: Path
    skip_bad: bool

    @property
    def first(self) -> Chunks:
        return Chunks(self.work / "first")

    @property
    def second(self) -> Chunks:
        return Chunks(self.work / "second")


def _apply(steps: dict[str, Step], document: Document, summary: Summary) -> Rejected | None:
    """Pass a document through steps, counting what they change."""
    for name, step in steps.items():
        before = document.counts
        document.counts = Counter()
        drop = step(document)
        summary.add_changes(name, document.counts)
        document.counts = before
        if drop is not None:
            return Rejected(document, name, drop)
    return None


def first_pass(context: Context, number: int, records: Sequence[Raw]) -> None:
    """Make documents of records, normalise and filter them."""
    recipe, summary = context.recipe, Summary()
    steps = dict(recipe.first)
    prepare = {name: steps.pop(name) for name in ("normalise",) if name in steps}
    kept: list[Document] = []
    rejected: list[Rejected] = []
    measures: list[list[float]] = []
    languages: Counter[str] = Counter()
    for raw in records:
        try:
            made = make_document(raw, recipe.reading)
        except BadRecord as error:
            if not context.skip_bad:
                raise
            summary.bad_count += 1
            summary.bad.append([error.place, error.reason])
            continue
        document, drop = made if isinstance(made, tuple) else (made, None)
        summary.add_document(document, len(document.text.encode("utf-8", "surrogatepass")))
        summary.add_changes("read", document.counts)
        document.counts = Counter()
        out = Rejected(document, "read", drop) if drop else _apply(prepare, document, summary)
        if out is None:
            measures.append(measure(document))
            out = _apply(steps, document, summary)
            if language := language_of(document):
                languages[language] += 1
        if out is None:
            kept.append(document)
        else:
            rejected.append(out)
            summary.add_drop(out)
    summary.languages = dict(sorted(languages.items()))
    summary.histograms = histogram(np.array(measures).reshape(len(measures), len(MEASURES)))
    arrays = {}
    if (units := recipe.sections.get("repeated_lines")) is not None:
        found = [(hash, row) for row, document in enumerate(kept) for hash in units.hashes(document)]
        arrays["units"] = np.array(found, np.uint64).reshape(-1, 2)
    context.first.write(number, kept, rejected, dataclasses.asdict(summary), context.sources, arrays)


def second_pass(context: Context, number: int, alive: np.ndarray[Any, Any], first_document: int) -> None:
    """Take the steps that come after exact deduplication, and find the n-grams of what is left.

    alive: which documents of the chunk to take. first_document: the number of its first among all.
    """
    recipe, summary = context.recipe, Summary()
    kept: list[Document] = []
    rejected: list[Rejected] = []
    near = recipe.sections.get("near_duplicates")
    for row, document in enumerate(context.first.documents(number)):
        if not alive[row]:
            continue
        out = _without_repeated(context, document, first_document + row, summary) or _apply(
            recipe.second, document, summary
        )
        if out is None:
            kept.append(document)
        else:
            rejected.append(out)
            summary.add_drop(out)
    measures = np.array([measure(document) for document in kept]).reshape(len(kept), len(MEASURES))
    arrays: dict[str, np.ndarray[Any, Any]] = {"measures": measures}
    sets = []
    if near is not None:
        sets = [shingles(document.text, near.ngram) for document in kept]
        arrays["shingles"] = np.concatenate([*sets, np.empty(0, np.uint64)])
        arrays["bands"] = minhash_bands(sets, near)
    labels = [[language_of(document), licence_of(document)] for document in kept]
    summary_json = dataclasses.asdict(summary) | {"labels": labels}
    context.second.write(number, kept, rejected, summary_json, context.sources, arrays, list(map(len, sets)))


def _without_repeated(context: Context, document: Document, number: int, summary: Summary) -> Rejected | None:
    """Remove the lines that other documents keep; returns why nothing is left, if so."""
    units = context.recipe.sections.get("repeated_lines")
    if units is None:
        return None
    hashes, owners = (np.load(context.work / f"repeated_{name}.npy", mmap_mode="r") for name in ("hashes", "owners"))
    mine = np.fromiter(units.hashes(document), np.uint64)
    if not len(hashes) or not len(mine):
        return None
    places = np.minimum(np.searchsorted(hashes, mine), len(hashes) - 1)
    elsewhere = mine[(hashes[places] == mine) & (owners[places] != number)]
    before = document.text
    if removed := remove_units(document, units, set(elsewhere.tolist())):
        summary.add_changes("repeated_lines", Counter({units.unit: removed}))
        if not document.text.strip():
            document.text = before
            return Rejected(document, "repeated_lines", Drop("all_repeated", [(0, len(before))]))
    return None


# ---- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardTask:
    """One shard: the lines of documents in the chunks of the second pass, in their order."""

    name: str  # as train-00000
    tokenizer: Path
    result: Path
    chunks: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]
    source: str  # source_hash of the documents


def read_lines(chunks: Chunks, task: ShardTask) -> Iterator[bytes]:
    """Yield the documents of a shard as lines of JSON."""
    descriptors: dict[int, int] = {}
    try:
        for chunk, offset, size in zip(task.chunks.tolist(), task.offsets.tolist(), task.sizes.tolist(), strict=True):
            if chunk not in descriptors:
                if len(descriptors) == 256:
                    os.close(descriptors.pop(next(iter(descriptors))))
                descriptors[chunk] = os.open(chunks.path(chunk) / "documents.jsonl", os.O_RDONLY | os.O_CLOEXEC)
            yield os.pread(descriptors[chunk], size, offset)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def make_shard(context: Context, task: ShardTask) -> None:
    """Write the tokens of a shard, and its documents as JSON lines."""
    tokenizer = Tokenizer.from_pretrained(task.tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    text, tokens = task.result / "text" / f"{task.name}.jsonl.zst", task.result / f"{task.name}.tokens"
    if not text.exists():
        write_zst(text, read_lines(context.second, task))
    if tokens.exists():
        return

    def chunks() -> Iterator[bytes | None]:
        for line in read_lines(context.second, task):
            yield json.loads(line)["text"].encode()
            yield None

    def ids() -> Iterator[list[int] | None]:
        for part in tokenizer.encode_stream(chunks()):
            if part is None:
                yield eos
            yield part

    vocab_size, fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
    write_shard(tokens, ids(), vocab_size=vocab_size, fingerprint=fingerprint, source=task.source)
