"""The health report as one HTML page: no scripts, nothing loaded from anywhere, pictures embedded."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from train.prepare.health.facts import LABEL_ORDER, Facts

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667;--line:#d8dde6;--bar:#4a78c8;--card:#f6f8fb;--bad:#b3261e;
--good:#1b7f3b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ef;--soft:#9aa3b2;--line:#363d49;--bar:#7ba2e8;--card:#1d222b;
--bad:#ff8a80;--good:#7fd69a}body{background:#12161c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:1120px;margin:2rem auto;padding:0 1.2rem}
h1{margin:0 0 .3rem}
h2{margin:2.4rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}h3{margin:1.2rem 0 .4rem}
nav a{margin-right:1rem}a{color:var(--bar)}p.note,td.note{color:var(--soft)}
table{border-collapse:collapse;margin:.4rem 1.6rem .8rem 0}td,th{padding:.18rem .7rem .18rem 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.row{display:flex;flex-wrap:wrap;align-items:flex-start}.bar{background:var(--bar);height:.75em;display:inline-block;
min-width:1px;border-radius:2px}.ok{color:var(--good)}.bad{color:var(--bad);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:8px;
overflow-wrap:anywhere}
figure img{display:block;max-width:100%;max-height:220px;margin:0 auto 6px}figcaption{font-size:12.5px}
.pair{display:flex;gap:6px;flex-wrap:wrap}.pair img{max-height:150px;max-width:48%}code{font-size:12.5px}
.scroll{overflow-x:auto}
@media print{nav{display:none}}
"""
SECTIONS = ("Verdict", "Samples", "Counts", "Special tags", "Tags", "Buckets and crops", "Captions", "Duplicates",
            "Sizes", "Quarantine", "Files")  # fmt: skip


def page(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    """The whole HTML text."""
    bodies = (
        _verdict(facts), _samples(facts, pictures), _counts(facts), _balance(facts), _tags(facts),
        _buckets(facts, pictures), _captions(facts), _duplicates(facts, pictures), _sizes(facts, pictures),
        _quarantine(facts), _files(facts),
    )  # fmt: skip
    links = "".join(f'<a href="#s{number}">{name}</a>' for number, name in enumerate(SECTIONS))
    named = enumerate(zip(SECTIONS, bodies, strict=True))
    body = "".join(f'<h2 id="s{number}">{name}</h2>{text}' for number, (name, text) in named)
    broken = sum(not check["ok"] for check in facts["checks"])
    state = f'<span class="bad">{counted(broken, "limit", "limits")} broken</span>' if broken else '<span class="ok">healthy</span>'
    name = escape(facts["name"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Dataset {name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<h1>Dataset {name}</h1><p>{facts["counts"]["index_images"]:,} pictures ready to train on, from '
        f'{facts["counts"]["records"]:,} records: {state}</p><nav>{links}</nav>{body}</body></html>\n'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers and shares to the right, everything escaped but what `Html` marks."""
    rows = [list(row) for row in rows]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    top = "".join(f"<th{' class=n' if r else ''}>{escape(name)}</th>" for name, r in zip(head, right, strict=True))
    marks = [" class=n" if number else "" for number in right]
    cells = ("".join(f"<td{m}>{_cell(c)}</td>" for c, m in zip(row, marks, strict=True)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>" if rows else (
        '<p class="note">none</p>')  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and re.fullmatch(r"[\d.,]+( %| MB)?", value) is not None)


def counted(number: int, one: str, many: str) -> str:
    """`1 picture is`, `2 pictures are`."""
    return f"{number:,} {one if number == 1 else many}"


class Html(str):
    """Text that is HTML already."""


def _cell(value: Any) -> str:
    if isinstance(value, Html):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else escape(str(value))


def number(value: float) -> str:
    """A share or a count: `0.1639`, `200,000`."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def bars(counts: Iterable[tuple[str, int]], head: str) -> str:
    """Names with counts and bars as long as the largest allows."""
    rows = list(counts)
    most = max((count for _, count in rows), default=0) or 1
    total = sum(count for _, count in rows) or 1
    return table(
        [head, "images", "share", ""],
        [
            (name, count, f"{100 * count / total:.1f} %",
             Html(f'<span class="bar" style="width:{180 * count / most:.0f}px"></span>' if count else ""))
            for name, count in rows
        ],
    )  # fmt: skip


def _picture(pictures: Mapping[str, bytes], name: str) -> str:
    data = pictures.get(name)
    if data is None:
        return '<p class="note">picture not shown</p>'
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def _figure(pictures: Mapping[str, bytes], name: str, text: str) -> str:
    return f"<figure>{_picture(pictures, name)}<figcaption>{text}</figcaption></figure>"


def _grid(figures: Iterable[str]) -> str:
    inner = "".join(figures)
    return f'<div class="grid">{inner}</div>' if inner else '<p class="note">none</p>'


def _verdict(facts: Facts) -> str:
    rows = [
        (Html('<span class="ok">ok</span>' if c["ok"] else '<span class="bad">broken</span>'), c["what"],
         float(c["value"]), float(c["limit"]), f"report.fail_if.{c['name']}")
        for c in facts["checks"]
    ]  # fmt: skip
    return table(["", "what", "found", "limit", "key"], rows)


def _samples(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    figures = [
        _figure(pictures, s["key"], f"<code>{escape(s['key'])}</code><br>{escape(s['text'])}") for s in facts["samples"]
    ]
    shuffles = [
        (s["key"], Html("<br>".join(escape(text) for text in [s["text"], *s["shuffles"]])))
        for s in facts["samples"]
        if "shuffles" in s
    ]
    note = '<p class="note">As written, then as training sees it in three epochs: the fixed part stays in front.</p>'
    return _grid(figures) + "<h3>Shuffled captions</h3>" + note + table(["key", "text"], shuffles)


def _counts(facts: Facts) -> str:
    counts = facts["counts"]
    found = [("found by ingest", counts["found"]), *((f"left out: {reason}", -n) for reason, n in counts["refused"].items()),
             ("records", counts["records"]), ("images in the index", counts["index_images"]),
             ("rows of the index (one per image and bucket)", counts["index_rows"])]  # fmt: skip
    parts = ["<h3>From files to the index</h3>", table(["", "images"], found),
             "<h3>Records by source</h3>", table(["source", "records", "without rating counted as"],
                [(*row, counts["assume_rating"].get(row[0], "explicit")) for row in counts["by_source"].items()])]  # fmt: skip
    for stage, steps in counts["select"].items():
        before = [steps[0][1], *(count for _, count in steps)]
        rows = [(name, count, count - previous) for (name, count), previous in zip(steps, before, strict=False)]
        parts.append(f"<h3>{escape(stage)}: images left after each filter</h3>")
        parts.append(table(["filter", "left", "change"], rows))
        parts.append(f"<p>{counted(counts['visits'][stage], 'visit', 'visits')} an epoch, with repeats.</p>")
    parts += [f'<p class="bad">{escape(note)}</p>' for note in counts["notes"]]
    parts.append("<h3>Hard exclusions</h3>")
    rows = [(rule, word, n) for rule, words in facts["hard_exclusions"].items() for word, n in words.items()]
    parts.append(table(["rule", "word", "records"], rows))
    parts.append("<h3>Selected in two stages</h3>")
    parts.append(table(["stages", "images in both"], facts["overlap"].items()))
    return "".join(parts)


def _balance(facts: Facts) -> str:
    sets = facts["balance"]
    parts = []
    for tag in LABEL_ORDER:
        names = list(dict.fromkeys(name for counts in sets.values() for name in counts[tag]))
        head = [tag, *(part for name in sets for part in (name, "%"))]
        rows = [
            [name, *(part for counts in sets.values() for part in
                     (counts[tag].get(name, 0), f"{100 * counts[tag].get(name, 0) / max(counts['rows'], 1):.1f}"))]
            for name in names
        ]  # fmt: skip
        parts.append(f"<h3>{tag.capitalize()}</h3>" + table(head, rows))
    for other in ("rating", "year"):
        crossed = sets["all sound files"][f"quality_by_{other}"]
        rows = [
            [column, sum(words.values()), *(f"{100 * n / max(sum(words.values()), 1):.1f} %" for n in words.values())]
            for column, words in crossed.items()
        ]
        parts.append(f"<h3>Quality by {other}, all sound files</h3>")
        parts.append(table([other, "images", *LABEL_ORDER["quality"]], rows))
    return "".join(parts)


def _tags(facts: Facts) -> str:
    parts = []
    for stage, tags in facts["tags"].items():
        rare = ", ".join(escape(name) for name in tags["rare"]) or "none"
        parts.append(
            f"<h3>{escape(stage)}: {tags['distinct']:,} tags, {tags['rarer_than_5']:,} on fewer than 5 images</h3>"
            f"<div class=row>{table(['most frequent', 'images'], tags['top'][:20])}"
            f"{table(['then', 'images'], tags['top'][20:])}</div><p class=note>Rare: {rare}</p>"
        )
    return "".join(parts)


def _buckets(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    parts = []
    for stage, buckets in facts["buckets"].items():
        parts.append(f"<h3>{escape(stage)}</h3>" + bars(buckets["images"].items(), "bucket"))
        if buckets["merged"]:
            parts.append("<p>Merged because too small: " + ", ".join(
                f"{escape(a)} into {escape(b)}" for a, b in buckets["merged"].items()) + "</p>")  # fmt: skip
        if buckets["merging"]:
            parts.append(_merging(buckets["merging"]))
        lost = buckets["crop_loss"]
        parts.append(f"<p>The crop cuts {100 * lost['mean']:.1f} % of these pictures' area away, {100 * lost['max']:.1f} % at most.</p>")
    crop = facts["crop"]
    figures = [
        _figure(pictures, f"crop/{row['key']}", f"<code>{escape(row['key'])}</code><br>{row['orig_w']}x{row['orig_h']} "
                f"to {row['bucket_w']}x{row['bucket_h']}: {100 * row['loss']:.1f} % cut away")
        for row in crop["worst"] if row["loss"] > 0
    ]  # fmt: skip
    parts.append(f"<h3>Crop loss: mean {100 * crop['mean']:.1f} %, largest {100 * crop['max']:.1f} %</h3>")
    return "".join(parts) + _grid(figures)


def _merging(cost: Facts) -> str:
    moved = counted(cost["moved"], "picture", "pictures")
    text = f"Merging moved {moved} to another bucket" + (
        f": {100 * cost['mean']:.1f} % more of their area is cut away on average, {100 * cost['worst']:.1f} % at most"
        if cost["moved"] else "")  # fmt: skip
    if cost["small_buckets"]:
        small = counted(cost["small_buckets"], "bucket is", "buckets are")
        text += f". {small} still small ({counted(cost['small_pictures'], 'picture', 'pictures')}) and trained in short tiles"
    return f"<p>{text}.</p>"


def _captions(facts: Facts) -> str:
    captions = facts["captions"]
    rows = [("captions", captions["rows"]), ("empty", captions["empty"]),
            ("without fixed part", captions["no_fixed_part"]), ("same text as another", captions["texts_that_repeat"])]
    tokens = captions["tokens"]
    if tokens is None:
        return table(["", "images"], rows) + '<p class="note">Tokens were not counted: `tokenizers` is not set.</p>'
    rows += [(f"over {limit} tokens", tokens[f"over_{limit}"]) for limit in (75, 150, 225)]
    rows.append(("fixed part alone over 225 tokens", tokens["fixed_over_225"]))
    shown = [(f"{low} to {high}" if high < 1000 else f"{low} and more", n) for low, high, n in tokens["histogram"]]
    long = "".join(
        f"<h3>Examples over {limit} tokens</h3>"
        + table(["key", "tokens", "caption"], [(row["key"], row["n_tokens"], row["text"]) for row in examples])
        for limit, examples in tokens["examples"].items() if examples
    )  # fmt: skip
    return (
        table(["", "images"], rows) + f"<h3>Tokens: mean {tokens['mean']}, most {tokens['max']}</h3>"
        + bars(shown, "tokens") + long
    )  # fmt: skip


def _duplicates(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    found = facts["duplicates"]
    names = {"sha256": "same file", "pixel": "same pixels", "phash": "look alike"}
    parts = [table(["", "groups", "images", "left out"],
                   [(names[m], d["groups"], d["rows"], d["dropped"]) for m, d in found.items()])]  # fmt: skip
    for method, data in found.items():
        figures = [
            f'<figure><div class="pair">{"".join(_picture(pictures, key) for key in group[:4])}</div>'
            f"<figcaption>{'<br>'.join(f'<code>{escape(key)}</code>' for key in group[:8])}</figcaption></figure>"
            for group in data["examples"]
        ]
        if figures:
            parts.append(f"<h3>{names[method].capitalize()}</h3>" + _grid(figures))
    return "".join(parts)


def _sizes(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    sizes = facts["sizes"]
    figures = [
        _figure(pictures, row["key"], f"<code>{escape(row['key'])}</code><br>{row['orig_w']}x{row['orig_h']} enlarged "
                f"{row['scale']:.2f} times")
        for row in sizes["enlarged_worst"]
    ]  # fmt: skip
    parts = [f"<h3>{counted(sizes['enlarged'], 'picture is', 'pictures are')} enlarged</h3>", _grid(figures)]
    for name, title in (("size_mismatches", "another size than their metadata says"),
                        ("wrong_extensions", "the wrong extension")):  # fmt: skip
        parts.append(f"<h3>{counted(sizes[name]['count'], 'file has', 'files have')} {title}</h3>")
        parts.append("<p>" + ", ".join(f"<code>{escape(key)}</code>" for key in sizes[name]["examples"]) + "</p>")
    return "".join(parts)


def _quarantine(facts: Facts) -> str:
    data = facts["quarantine"]
    rows = [(row["key"], row["step"], row["reason"], row["message"], row["exception"] or "") for row in data["listed"]]
    more = f'<p class="note">and {data["rows"] - len(rows):,} more in quarantine.parquet</p>' if (
        data["rows"] > len(rows)) else ""  # fmt: skip
    return (
        table(["step", "kind", "reason", "records"], data["counts"]) + "<h3>List</h3>"
        + table(["key", "step", "reason", "message", "exception"], rows) + more
    )  # fmt: skip


def _files(facts: Facts) -> str:
    latents = facts["latents"]
    disk = [(name, f"{size / 1e6:,.1f} MB") for name, size in facts["disk_bytes"].items()]
    stale = table(["table", "files of other settings (safe to delete)"], facts["stale_files"].items())
    return (
        f"<p>{latents['rows']:,} latents in {latents['shards']:,} shards; {latents['read']:,} read and checked, "
        f"{latents['unreadable']:,} unreadable.</p>" + table(["on disk", "size"], disk) + "<h3>Stale</h3>" + stale
    )  # fmt: skip
