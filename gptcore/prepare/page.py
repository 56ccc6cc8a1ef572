"""report.html: one file without scripts or anything from elsewhere; its frame serves other reports, too."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --before: #9aa5b1; --after: #2f6fb0; --mark: #ffd54d; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; }
td, th { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem; margin: .4rem 0; }
mark { background: var(--mark); color: #000; } ins { background: #7fd18b66; } del { background: #f08a8a66; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.before { fill: var(--before); } .after { fill: var(--after); }
.key::before { content: "\\25A0 "; } .key.b::before { color: var(--before); } .key.a::before { color: var(--after); }
summary { cursor: pointer; } small { opacity: .7; }
"""


def render(report: dict[str, Any]) -> str:
    """Return the page of a report."""
    read, kept = report["read"], report["kept"]
    parts = [
        f"<p>{_n(read['documents'])} documents ({_size(read['bytes'])}) were read, {_n(kept['documents'])} "
        f"({_size(kept['bytes'])}) kept: {_share(kept['documents'], read['documents'])} of the documents, "
        f"{_share(kept['bytes'], read['bytes'])} of the bytes. {_n(read['bad'])} records could not be read.</p>",
        f"<pre>{escape(report['command'])}</pre>",
        "<h2>What each step dropped</h2>", _steps(report),
        "<h2>Before and after</h2>", _pictures(report),
        "<h2>Sources</h2>", _sources(report),
        "<h2>Splits</h2>", _splits(report),
        "<h2>Near duplicates</h2>", _duplicates(report),
        "<h2>Examples</h2>", _examples(report),
        "<h2>Settings and versions</h2>",
        f"<pre>{escape(json.dumps(report['plan'], indent=2, ensure_ascii=False))}</pre>",
    ]  # fmt: skip
    if read["bad_records"]:
        rows = ((escape(place), escape(reason)) for place, reason in read["bad_records"])
        parts += ["<h2>Records that could not be read</h2>", table(["place", "reason"], rows)]
    return document("Corpus report", parts)


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title><style>{_STYLE}</style>\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _n(value: int) -> str:
    return f"{value:,}"


def _size(value: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} bytes"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table of cells that are HTML already; `numbers` are the columns to align right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="n"' if i in numbers else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    return f"<table>{row('th', heads)}{''.join(row('td', cells) for cells in rows)}</table>"


def _steps(report: dict[str, Any]) -> str:
    rows = []
    for step in report["steps"]:
        name = escape(step["step"])
        for reason, dropped in step["dropped"].items():
            share = _share(dropped["documents"], step["documents_in"])
            link = f'<a href="#{name}-{escape(reason)}">{escape(reason)}</a>'
            rows.append((name, link, _n(dropped["documents"]), share, _size(dropped["bytes"])))
        for what, count in step["changed"].items():
            rows.append((name, f"changed: {escape(what)}", _n(count), "", ""))
    heads = ["step", "reason", "documents or changes", "of those that came to it", "bytes dropped"]
    return table(heads, rows, (2, 3, 4))


def _pictures(report: dict[str, Any]) -> str:
    distributions = report["distributions"]
    figures = []
    for name, edges in distributions["edges"].items():
        before, after = distributions["before"][name], distributions["after"][name]
        if any(before) or any(after):
            figures.append(_bars(name, [f"{edge:g}" for edge in edges[:-1]], before, after))
    before, after = report["languages"]["before"], report["languages"]["after"]
    if before:
        names = sorted(before, key=lambda name: (-before[name], name))[:12]
        figures.append(_bars("language", names, [before[n] for n in names], [after.get(n, 0) for n in names]))
    key = '<p><span class="key b">read</span> <span class="key a">kept</span>; each as a share of its own documents</p>'
    return key + '<div class="pictures">' + "".join(figures) + "</div>"


def _bars(name: str, labels: Sequence[str], before: Sequence[int], after: Sequence[int]) -> str:
    """Return two rows of bars over the bins that hold something."""
    used = [i for i in range(len(labels)) if before[i] or after[i]]
    first, last = used[0], used[-1] + 1
    width, height, bin_width = 320, 120, 320 / (last - first)
    shares = [[value / max(1, sum(values)) for value in values[first:last]] for values in (before, after)]
    top = max(map(max, shares))
    bars = []
    for side, (kind, values) in enumerate(zip(("before", "after"), shares, strict=True)):
        for i, value in enumerate(values):
            x, high = (i + 0.08 + 0.42 * side) * bin_width, value / top * height
            place = f'x="{x:.1f}" y="{height - high:.1f}" width="{0.42 * bin_width:.1f}" height="{high:.1f}"'
            bars.append(f'<rect class="{kind}" {place}/>')
    every = max(1, -(-(last - first) // 8))
    texts = [
        f'<text x="{(i + 0.08) * bin_width:.1f}" y="{height + 14}">{escape(labels[first + i])}</text>'
        for i in range(0, last - first, every)
    ]
    return (
        f"<figure><figcaption>{escape(name)} <small>(highest bar {top:.0%})</small></figcaption>"
        f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="{escape(name)} before and after">'
        f"{''.join(bars)}{''.join(texts)}</svg></figure>"
    )


def _sources(report: dict[str, Any]) -> str:
    rows = [
        (
            escape(name), _n(s["documents_read"]), _size(s["bytes_read"]), _n(s["documents_kept"]),
            _size(s["bytes_kept"]), _size(s["training_bytes"]), f"{s['repeats']:.2f}",
        )
        for name, s in report["sources"].items()
    ]  # fmt: skip
    heads = ["source", "read", "bytes", "kept", "bytes", "for training", "times in the mix"]
    text = table(heads, rows, range(1, 7))
    for title, counts in (("licence", report["licences"]), ("private data replaced", report["private"])):
        if counts:
            text += table([title, "count"], [(escape(name), _n(n)) for name, n in counts.items()], (1,))
    return text


def _splits(report: dict[str, Any]) -> str:
    rows = [
        (
            name,
            _n(s["documents"]),
            _n(s["different_documents"]),
            _size(s["bytes"]),
            _n(s["tokens"]),
            str(len(s["shards"])),
        )
        for name, s in report["splits"].items()
    ]
    return table(["split", "documents", "different", "bytes", "tokens", "shards"], rows, range(1, 6))


def _duplicates(report: dict[str, Any]) -> str:
    found = report["duplicates"]
    text = (
        f"<p>{_n(found['exact'])} exact duplicates. {_n(found['near'])} near duplicates dropped, of "
        f"{_n(found['near_clusters'])} clusters; {_n(found['candidates'])} pairs were compared.</p>"
    )
    for pair in found["pairs"]:
        kept, dropped = pair["kept"], pair["dropped"]
        heading = f"similarity {pair['similarity']:.3f}: kept {kept['place']}, dropped {dropped['place']}"
        text += f"<details open><summary>{escape(heading)}</summary>"
        text += f"<pre>{_diff(kept['text'], dropped['text'])}</pre></details>"
    return text


def _diff(kept: str, dropped: str) -> str:
    """Return the two texts as one, with what only the kept one has as <del> and what only the other has as <ins>."""
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (kept, dropped))
    parts = []
    for operation, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = escape("".join(a[i:j])), escape("".join(b[k:m]))
        if operation == "equal":
            parts.append(old if len(old) < 300 else f"{old[:120]} <small>…</small> {old[-120:]}")
        else:
            parts.append((f"<del>{old}</del>" if old else "") + (f"<ins>{new}</ins>" if new else ""))
    return "".join(parts)


def _examples(report: dict[str, Any]) -> str:
    text = ""
    for step, reasons in report["examples"].items():
        for reason, examples in sorted(reasons.items()):
            text += f'<details id="{escape(step)}-{escape(reason)}"><summary>{escape(step)}: {escape(reason)}</summary>'
            for item in examples:
                marked = f"<mark>{escape(item['marked'])}</mark>" if item["marked"] else ""
                text += (
                    f"<p><small>{escape(item['place'])} {escape(item['detail'])}</small></p>"
                    f"<pre>{escape(item['before'])}{marked}{escape(item['after'])}</pre>"
                )
            text += "</details>"
    return text or "<p>Nothing was dropped.</p>"
