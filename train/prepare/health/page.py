"""The health report as one HTML page, pictures embedded."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train.prepare.health.facts import LABEL_ORDER, Facts
from train.prepare.health.pages import html, joined
from train.prepare.health.pages import page as whole_page

SECTIONS = ("Verdict", "Samples", "Counts", "Special tags", "Tags", "Buckets and crops", "Captions", "Duplicates",
            "Sizes", "Quarantine", "Files")  # fmt: skip


def page(facts: Facts, pictures: Mapping[str, bytes]) -> str:
    """The whole HTML text."""
    bodies = (
        _verdict(facts), _samples(facts, pictures), _counts(facts), _balance(facts), _tags(facts),
        _buckets(facts, pictures), _captions(facts), _duplicates(facts, pictures), _sizes(facts, pictures),
        _quarantine(facts), _files(facts),
    )  # fmt: skip
    broken = sum(not check["ok"] for check in facts["checks"])
    counts = facts["counts"]
    state = html.span(f"{counted(broken, 'limit', 'limits')} broken", "bad") if broken else html.span("healthy", "ok")
    lead = joined(
        [f"{counts['index_images']:,} pictures ready to train on, from {counts['records']:,} records: ", state]
    )
    sections = [(f"s{number}", name, body) for number, (name, body) in enumerate(zip(SECTIONS, bodies, strict=True))]
    return whole_page(f"Dataset {facts['name']}", "health.css", lead, sections)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table; numbers and shares to the right."""
    rows = [list(row) for row in rows]
    if not rows:
        return Markup(html.p("none", "note"))
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    return Markup(html.table(head, [[_cell(cell) for cell in row] for row in rows], right))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, str) and re.fullmatch(r"[\d.,]+( %| MB)?", value) is not None
    )


def counted(number: int, one: str, many: str) -> str:
    """`1 picture is`, `2 pictures are`."""
    return f"{number:,} {one if number == 1 else many}"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else value if isinstance(value, Markup) else str(value)


def number(value: float) -> str:
    """A share or a count: `0.1639`, `200,000`."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def bars(counts: Iterable[tuple[str, int]], head: str) -> Markup:
    """Names with counts and bars as long as the largest allows."""
    rows = list(counts)
    most = max((count for _, count in rows), default=0) or 1
    total = sum(count for _, count in rows) or 1
    return table(
        [head, "images", "share", ""],
        [
            (name, count, f"{100 * count / total:.1f} %",
             html.bar(f"{180 * count / most:.0f}") if count else "")
            for name, count in rows
        ],
    )  # fmt: skip


def _picture(pictures: Mapping[str, bytes], name: str) -> Markup:
    data = pictures.get(name)
    return Markup(
        html.p("picture not shown", "note") if data is None else html.picture(base64.b64encode(data).decode())
    )


def _figure(pictures: Mapping[str, bytes], name: str, *lines: str) -> Markup:
    return Markup(html.figure(_picture(pictures, name), html.lines(lines)))


def _grid(figures: Sequence[str]) -> Markup:
    return Markup(html.div(figures, "grid") if figures else html.p("none", "note"))


def _verdict(facts: Facts) -> Markup:
    rows = [
        (html.span("ok", "ok") if c["ok"] else html.span("broken", "bad"), c["what"],
         float(c["value"]), float(c["limit"]), f"report.fail_if.{c['name']}")
        for c in facts["checks"]
    ]  # fmt: skip
    return table(["", "what", "found", "limit", "key"], rows)


def _samples(facts: Facts, pictures: Mapping[str, bytes]) -> Markup:
    samples = facts["samples"]
    figures = [_figure(pictures, s["key"], html.code(s["key"]), s["text"]) for s in samples]
    shuffles = [(s["key"], html.lines([s["text"], *s["shuffles"]])) for s in samples if "shuffles" in s]
    note = "As written, then as training sees it in three epochs: the fixed part stays in front."
    return joined(
        [_grid(figures), html.h3("Shuffled captions"), html.p(note, "note"), table(["key", "text"], shuffles)]
    )


def _counts(facts: Facts) -> Markup:
    counts = facts["counts"]
    found = [("found by ingest", counts["found"]), *((f"left out: {reason}", -n) for reason, n in counts["refused"].items()),
             ("records", counts["records"]), ("images in the index", counts["index_images"]),
             ("rows of the index (one per image and bucket)", counts["index_rows"])]  # fmt: skip
    parts = [html.h3("From files to the index"), table(["", "images"], found),
             html.h3("Records by source"), table(["source", "records", "without rating counted as"],
                [(*row, counts["assume_rating"].get(row[0], "explicit")) for row in counts["by_source"].items()])]  # fmt: skip
    for stage, steps in counts["select"].items():
        before = [steps[0][1], *(count for _, count in steps)]
        rows = [(name, count, count - previous) for (name, count), previous in zip(steps, before, strict=False)]
        parts.append(html.h3(f"{stage}: images left after each filter"))
        parts.append(table(["filter", "left", "change"], rows))
        parts.append(html.p(f"{counted(counts['visits'][stage], 'visit', 'visits')} an epoch, with repeats."))
    parts += [html.p(note, "bad") for note in counts["notes"]]
    parts.append(html.h3("Hard exclusions"))
    rows = [(rule, word, n) for rule, words in facts["hard_exclusions"].items() for word, n in words.items()]
    parts.append(table(["rule", "word", "records"], rows))
    parts.append(html.h3("Selected in two stages"))
    parts.append(table(["stages", "images in both"], facts["overlap"].items()))
    return joined(parts)


def _balance(facts: Facts) -> Markup:
    sets = facts["balance"]
    parts: list[str] = []
    for tag in LABEL_ORDER:
        names = list(dict.fromkeys(name for counts in sets.values() for name in counts[tag]))
        head = [tag, *(part for name in sets for part in (name, "%"))]
        rows = [
            [name, *(part for counts in sets.values() for part in
                     (counts[tag].get(name, 0), f"{100 * counts[tag].get(name, 0) / max(counts['rows'], 1):.1f}"))]
            for name in names
        ]  # fmt: skip
        parts += [html.h3(tag.capitalize()), table(head, rows)]
    for other in ("rating", "year"):
        crossed = sets["all sound files"][f"quality_by_{other}"]
        rows = [
            [column, sum(words.values()), *(f"{100 * n / max(sum(words.values()), 1):.1f} %" for n in words.values())]
            for column, words in crossed.items()
        ]
        parts.append(html.h3(f"Quality by {other}, all sound files"))
        parts.append(table([other, "images", *LABEL_ORDER["quality"]], rows))
    return joined(parts)


def _tags(facts: Facts) -> Markup:
    parts: list[str] = []
    for stage, tags in facts["tags"].items():
        parts.append(html.h3(f"{stage}: {tags['distinct']:,} tags, {tags['rarer_than_5']:,} on fewer than 5 images"))
        halves = table(["most frequent", "images"], tags["top"][:20]), table(["then", "images"], tags["top"][20:])
        parts.append(html.div(halves, "row"))
        parts.append(html.p("Rare: " + (", ".join(tags["rare"]) or "none"), "note"))
    return joined(parts)


def _buckets(facts: Facts, pictures: Mapping[str, bytes]) -> Markup:
    parts: list[str] = []
    for stage, buckets in facts["buckets"].items():
        parts += [html.h3(stage), bars(buckets["images"].items(), "bucket")]
        if buckets["merged"]:
            pairs = ", ".join(f"{a} into {b}" for a, b in buckets["merged"].items())
            parts.append(html.p(f"Merged because too small: {pairs}"))
        if buckets["merging"]:
            parts.append(_merging(buckets["merging"]))
        lost = buckets["crop_loss"]
        cut = (
            f"The crop cuts {100 * lost['mean']:.1f} % of these pictures' area away, {100 * lost['max']:.1f} % at most."
        )
        parts.append(html.p(cut))
    crop = facts["crop"]
    figures = [
        _figure(pictures, f"crop/{row['key']}", html.code(row["key"]),
                f"{row['orig_w']}x{row['orig_h']} to {row['bucket_w']}x{row['bucket_h']}: {100 * row['loss']:.1f} % cut away")
        for row in crop["worst"] if row["loss"] > 0
    ]  # fmt: skip
    parts.append(html.h3(f"Crop loss: mean {100 * crop['mean']:.1f} %, largest {100 * crop['max']:.1f} %"))
    return joined([*parts, _grid(figures)])


def _merging(cost: Facts) -> Markup:
    moved = counted(cost["moved"], "picture", "pictures")
    text = f"Merging moved {moved} to another bucket" + (
        f": {100 * cost['mean']:.1f} % more of their area is cut away on average, {100 * cost['worst']:.1f} % at most"
        if cost["moved"] else "")  # fmt: skip
    if cost["small_buckets"]:
        small = counted(cost["small_buckets"], "bucket is", "buckets are")
        text += f". {small} still small ({counted(cost['small_pictures'], 'picture', 'pictures')}) and trained in short tiles"
    return Markup(html.p(f"{text}."))


def _captions(facts: Facts) -> Markup:
    captions = facts["captions"]
    rows = [
        ("captions", captions["rows"]),
        ("empty", captions["empty"]),
        ("without fixed part", captions["no_fixed_part"]),
        ("same text as another", captions["texts_that_repeat"]),
    ]
    tokens = captions["tokens"]
    if tokens is None:
        return joined(
            [table(["", "images"], rows), html.p("Tokens were not counted: `tokenizers` is not set.", "note")]
        )
    rows += [(f"over {limit} tokens", tokens[f"over_{limit}"]) for limit in (75, 150, 225)]
    rows.append(("fixed part alone over 225 tokens", tokens["fixed_over_225"]))
    shown = [(f"{low} to {high}" if high < 1000 else f"{low} and more", n) for low, high, n in tokens["histogram"]]
    parts = [table(["", "images"], rows), html.h3(f"Tokens: mean {tokens['mean']}, most {tokens['max']}"),
             bars(shown, "tokens")]  # fmt: skip
    for limit, examples in tokens["examples"].items():
        if examples:
            found = [(row["key"], row["n_tokens"], row["text"]) for row in examples]
            parts += [html.h3(f"Examples over {limit} tokens"), table(["key", "tokens", "caption"], found)]
    return joined(parts)


def _duplicates(facts: Facts, pictures: Mapping[str, bytes]) -> Markup:
    found = facts["duplicates"]
    names = {"sha256": "same file", "pixel": "same pixels", "phash": "look alike"}
    parts = [table(["", "groups", "images", "left out"],
                   [(names[m], d["groups"], d["rows"], d["dropped"]) for m, d in found.items()])]  # fmt: skip
    for method, data in found.items():
        figures = [
            html.figure(html.div([_picture(pictures, key) for key in group[:4]], "pair"),
                        html.lines([html.code(key) for key in group[:8]]))
            for group in data["examples"]
        ]  # fmt: skip
        if figures:
            parts += [html.h3(names[method].capitalize()), _grid(figures)]
    return joined(parts)


def _sizes(facts: Facts, pictures: Mapping[str, bytes]) -> Markup:
    sizes = facts["sizes"]
    figures = [
        _figure(pictures, row["key"], html.code(row["key"]),
                f"{row['orig_w']}x{row['orig_h']} enlarged {row['scale']:.2f} times")
        for row in sizes["enlarged_worst"]
    ]  # fmt: skip
    parts = [html.h3(f"{counted(sizes['enlarged'], 'picture is', 'pictures are')} enlarged"), _grid(figures)]
    for name, title in (("size_mismatches", "another size than their metadata says"),
                        ("wrong_extensions", "the wrong extension")):  # fmt: skip
        parts.append(html.h3(f"{counted(sizes[name]['count'], 'file has', 'files have')} {title}"))
        parts.append(html.p(Markup(", ").join(html.code(key) for key in sizes[name]["examples"])))
    return joined(parts)


def _quarantine(facts: Facts) -> Markup:
    data = facts["quarantine"]
    rows = [(row["key"], row["step"], row["reason"], row["message"], row["exception"] or "") for row in data["listed"]]
    parts = [table(["step", "kind", "reason", "records"], data["counts"]), html.h3("List"),
             table(["key", "step", "reason", "message", "exception"], rows)]  # fmt: skip
    if data["rows"] > len(rows):
        parts.append(html.p(f"and {data['rows'] - len(rows):,} more in quarantine.parquet", "note"))
    return joined(parts)


def _files(facts: Facts) -> Markup:
    latents = facts["latents"]
    disk = [(name, f"{size / 1e6:,.1f} MB") for name, size in facts["disk_bytes"].items()]
    stale = table(["table", "files of other settings (safe to delete)"], facts["stale_files"].items())
    told = (
        f"{latents['rows']:,} latents in {latents['shards']:,} shards; {latents['read']:,} read and checked, "
        f"{latents['unreadable']:,} unreadable."
    )
    return joined([html.p(told), table(["on disk", "size"], disk), html.h3("Stale"), stale])
