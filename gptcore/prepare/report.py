"""Gather the report of a run, and write it as JSON, as a page, and as a dataset card, with the dropped documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.data.prepared import MANIFEST
from gptcore.data.shards import read_shard
from gptcore.files import atomic_file, write_json
from gptcore.prepare import card, page
from gptcore.prepare.document import Drop
from gptcore.prepare.duplicates import Clusters
from gptcore.prepare.mixing import SPLITS
from gptcore.prepare.passes import Context, ShardTask
from gptcore.prepare.recipe import FIRST, SECOND
from gptcore.prepare.store import Chunks, Corpus, Rejected, source_hash, write_zst
from gptcore.prepare.summary import BINS, EXAMPLES, MEASURES, Summary, histogram
from gptcore.text.tokenizer import Tokenizer

_STEPS = ["read", *FIRST, "exact_duplicates", "repeated_lines", *SECOND, "near_duplicates"]
_PAIR_CHARS = 1500  # of two near duplicates that are compared in the report


class Result:
    """What the pipeline has found, from which the report is made."""

    def __init__(
        self,
        context: Context,
        first: Corpus,
        exact: Clusters,
        second: Corpus,
        near: Clusters,
        kept: np.ndarray[Any, Any],
        splits: np.ndarray[Any, Any],
        order: dict[str, np.ndarray[Any, Any]],
        repeats: Sequence[float],
        shards: Sequence[ShardTask],
    ) -> None:
        self.context, self.first, self.exact, self.second, self.near = context, first, exact, second, near
        self.kept, self.splits, self.order, self.repeats, self.shards = kept, splits, order, repeats, shards
        self.path = context.work / "result"

    def write(self, plan: dict[str, Any], command: str, keep_rejected: bool) -> dict[str, Any]:
        """Write manifest.json, rejected/, README.md, report.html and report.json, the last; returns the last."""
        summary = Summary()
        summaries = [
            chunks.summary(number)
            for chunks in (self.first.chunks, self.second.chunks)
            for number in range(self.first.count)
        ]
        labels = [label for values in summaries for label in values.pop("labels", [])]
        for values in summaries:
            summary.merge(Summary(**values))
        exact = Rejections(self.first, self.exact, ~self.exact.kept, "exact_duplicates", "exact_duplicate")
        near = Rejections(self.second, self.near, ~self.kept, "near_duplicates", "near_duplicate")
        for rejections in (exact, near):
            for rejected in rejections:
                summary.add_drop(rejected)
        splits = self._splits()
        report = {
            "command": command,
            "read": {
                "documents": summary.read, "bytes": summary.bytes,
                "bad": summary.bad_count, "bad_records": summary.bad,
            },
            "kept": {"documents": int(self.kept.sum()), "bytes": int(self.second.rows["bytes"][self.kept].sum())},
            "steps": _flow(summary),
            "examples": summary.examples,
            "distributions": {
                "edges": BINS,
                "before": summary.histograms or histogram(np.empty((0, len(MEASURES)))),
                "after": self._after(),
            },
            "languages": {"before": summary.languages, "after": _counts(labels, 0, self.kept)},
            "licences": _counts(labels, 1, self.kept),
            "sources": self._sources(summary),
            "private": {
                what.removeprefix("private_"): n for what, n in sorted(summary.changed.get("private", {}).items())
            },
            "duplicates": {
                "exact": int((~self.exact.kept).sum()),
                "near": int((~self.kept).sum()),
                "near_clusters": len(np.unique(self.near.keeper[~self.near.kept])),
                "candidates": self.near.candidates,
                "pairs": near.pairs(),
            },
            "splits": splits,
            "plan": plan,
        }  # fmt: skip
        write_json(self.path / MANIFEST, self._manifest(splits))
        if keep_rejected:
            for name, lines in {
                "filters": _rejected(self.first.chunks, self.first.count),
                "exact_duplicates": (rejected.to_json().encode() + b"\n" for rejected in exact),
                "second_pass": _rejected(self.second.chunks, self.second.count),
                "near_duplicates": (rejected.to_json().encode() + b"\n" for rejected in near),
            }.items():
                write_zst(self.path / "rejected" / f"{name}.jsonl.zst", lines)
        _write(self.path / "README.md", card.render(report))
        _write(self.path / "report.html", page.render(report))
        write_json(self.path / "report.json", report)
        return report

    def _after(self) -> dict[str, list[int]]:
        total: dict[str, list[int]] = histogram(np.empty((0, len(MEASURES))))
        for number in range(self.second.count):
            kept = self.kept[self.second.starts[number] : self.second.starts[number + 1]]
            for name, counts in histogram(self.second.chunks.array(number, "measures")[kept]).items():
                total[name] = [a + b for a, b in zip(total[name], counts, strict=True)]
        return total

    def _sources(self, summary: Summary) -> dict[str, Any]:
        found, rows = {}, self.second.rows
        for i, name in enumerate(self.context.sources):
            mine = self.kept & (rows["source"] == i)
            training = mine & (self.splits == 0)
            read = summary.sources.get(name, [0, 0])
            found[name] = {
                "documents_read": read[0], "bytes_read": read[1],
                "documents_kept": int(mine.sum()), "bytes_kept": int(rows["bytes"][mine].sum()),
                "training_bytes": int(rows["bytes"][training].sum()), "repeats": self.repeats[i],
            }  # fmt: skip
        return found

    def _splits(self) -> dict[str, Any]:
        tokenizer = Tokenizer.from_pretrained(self.path / "tokenizer")
        found: dict[str, Any] = {}
        for name in SPLITS:
            documents = self.order[name]
            rows = self.second.rows[documents]
            shards = []
            for task in self.shards:
                if task.name.rpartition("-")[0] == name:
                    file = self.path / f"{task.name}.tokens"
                    shard = read_shard(file, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
                    shards.append(
                        {"file": file.name, "tokens": len(shard), "documents": shard.documents, "sha256": shard.sha256}
                    )
            found[name] = {
                "documents": len(documents),
                "different_documents": len(np.unique(documents)),
                "bytes": int(self.second.rows["bytes"][documents].astype(np.int64).sum()),
                "tokens": sum(shard["tokens"] for shard in shards),
                "documents_sha256": source_hash(rows),
                "shards": shards,
            }
        return found

    def _manifest(self, splits: dict[str, Any]) -> dict[str, Any]:
        """Return what `gptcore train OUT` reads."""
        tokenizer = Tokenizer.from_pretrained(self.path / "tokenizer")
        return {
            "format": 1, "vocab_size": tokenizer.vocab_size, "tokenizer_fingerprint": tokenizer.fingerprint,
            "splits": {name: [shard["file"] for shard in split["shards"]] for name, split in splits.items()},
            "documents_sha256": {name: split["documents_sha256"] for name, split in splits.items()},
        }  # fmt: skip


class Rejections:
    """The documents that duplicate others, each with the one that was kept."""

    def __init__(
        self, corpus: Corpus, clusters: Clusters, dropped: np.ndarray[Any, Any], step: str, reason: str
    ) -> None:
        self.corpus, self.clusters, self.dropped = corpus, clusters, np.flatnonzero(dropped)
        self.step, self.reason = step, reason

    def __iter__(self) -> Iterator[Rejected]:
        for number in self.dropped.tolist():
            keeper, similarity = int(self.clusters.keeper[number]), float(self.clusters.similarity[number])
            detail = f"like {self.corpus.read(keeper).place}, similarity {similarity:.3f}"
            yield Rejected(self.corpus.read(number), self.step, Drop(self.reason, [], detail))

    def pairs(self) -> list[dict[str, Any]]:
        """Return a few pairs whose texts differ: kept and dropped, with their similarity; those of lowest digest."""
        rows = self.corpus.rows
        differ = self.dropped[rows["low"][self.dropped] != rows["low"][self.clusters.keeper[self.dropped]]]
        chosen = differ[np.lexsort((rows["low"][differ], rows["high"][differ]))][:EXAMPLES]
        found = []
        for number in chosen.tolist():
            kept, dropped = self.corpus.read(int(self.clusters.keeper[number])), self.corpus.read(number)
            found.append(
                {
                    "similarity": round(float(self.clusters.similarity[number]), 4),
                    "kept": {"place": kept.place, "text": kept.text[:_PAIR_CHARS]},
                    "dropped": {"place": dropped.place, "text": dropped.text[:_PAIR_CHARS]},
                }
            )
        return found


def _flow(summary: Summary) -> list[dict[str, Any]]:
    """Return the steps in their order, each with what came in, what it dropped and why, and what it changed."""
    documents = summary.read
    found = []
    for step in _STEPS:
        reasons, changed = summary.dropped.get(step, {}), summary.changed.get(step, {})
        dropped = {reason: {"documents": n, "bytes": b} for reason, (n, b) in sorted(reasons.items())}
        if dropped or changed:
            found.append(
                {"step": step, "documents_in": documents, "dropped": dropped, "changed": dict(sorted(changed.items()))}
            )
        documents -= sum(n for n, _ in reasons.values())
    return found


def _counts(labels: Sequence[Sequence[str]], column: int, kept: np.ndarray[Any, Any]) -> dict[str, int]:
    found = Counter(label[column] for label, keep in zip(labels, kept.tolist(), strict=True) if keep)
    return {name: n for name, n in sorted(found.items()) if name}


def _rejected(chunks: Chunks, count: int) -> Iterator[bytes]:
    for number in range(count):
        yield from chunks.rejected(number)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
