"""The health report as one HTML page, pictures embedded."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train.prepare.choosing.balance import Mixed, told_of
from train.prepare.health.browser import Shown
from train.prepare.health.facts import Facts
from train.prepare.health.pages import html, joined, render
from train.prepare.health.pages import page as whole_page

Pictures = Mapping[str, bytes]
_NUMBER = re.compile(r"[\d.,]+( %| MB)?")


def page(facts: Facts, pictures: Pictures, browser: Shown | None = None) -> str:
    """The whole HTML text. `browser`: what its script searches. A section with nothing in it is left out."""
    broken, counts = sum(not check["ok"] for check in facts["checks"]), facts["counts"]
    state = html.span(f"{counted(broken, 'limit', 'limits')} broken", "bad") if broken else html.span("healthy", "ok")
    lead = joined([f"{counts['index_images']:,} pictures ready to train on, from {counts['records']:,} records: ", state])
    made = [(name, joined(make(facts, pictures))) for name, make in SECTIONS.items()]
    if browser is not None:
        made.insert(1, ("Pictures and captions", Markup(render("browser.html", **_browser(facts, browser)))))
    sections = [(f"s{number}", name, body) for number, (name, body) in enumerate(made) if body]
    return whole_page(f"Dataset {facts['name']}", "health.css", lead, sections, "browser.js" if browser is not None else "")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> Markup:
    """A table, under its title; numbers and shares to the right. Nothing where there is no row."""
    rows = [list(row) for row in rows]
    if not rows:
        return Markup("")
    right = [all(isinstance(row[i], int | float) or _NUMBER.fullmatch(row[i] or "") for row in rows) for i in range(len(head))]
    made = Markup(html.table(head, [[_cell(cell) for cell in row] for row in rows], right))
    return Markup(html.h3(title)) + made if title else made


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
    shown = [(name, n, f"{100 * n / total:.1f} %", html.bar(f"{180 * n / most:.0f}") if n else "") for name, n in rows]
    return table([head, "images", "share", ""], shown)


def _picture(pictures: Pictures, name: str) -> Any:
    return html.picture(base64.b64encode(pictures[name]).decode()) if name in pictures else html.p("picture not shown", "note")


def _browser(facts: Facts, browser: Shown) -> dict[str, Any]:
    """What the browser's template takes: its data, and what is to be said above it."""
    told, shown, total = [*_hidden(facts)], len(browser["pictures"]), browser["of"]
    if shown < total:
        told.append(f"A random {shown:,} of {total:,} pictures are on this page: report.captions is the number.")
    told.append("Click a tag to drop it, write one below a picture to add it, then export. Struck out in red: what a stage with that "
                "many tokens does not read, as the caption stands here; in training the flexible tags are shuffled, so others are cut.")  # fmt: skip
    advice = "Save it where you keep the dataset's config, name it there (corrections: corrections.csv) and run prepare.py all again: " \
             "the captions named in it change, the latents stay. The file holds the corrections in use too."  # fmt: skip
    return {"told": told, "data": browser, "advice": advice}


def _hidden(facts: Facts) -> Iterator[str]:
    """Why some pictures are not shown, and the key that shows them."""
    hidden = facts["hidden"]
    if count := sum(hidden["unrated"].values()):
        names = ", ".join(hidden["unrated"])
        yield (f"{counted(count, 'picture is', 'pictures are')} not shown because nothing says how they are rated (sources: {names}). "
               "assume_rating: g (or s) of their source says that they are safe; report.pictures: all shows every picture.")  # fmt: skip
    if count := hidden["rated"]:
        yield f"{counted(count, 'picture is', 'pictures are')} not shown because of their rating: report.pictures is safe; all shows them."


def _figure(pictures: Pictures, name: str, *lines: str) -> Any:
    return html.figure(_picture(pictures, name), html.lines(lines))


def _grid(figures: Sequence[str]) -> Any:
    return html.div(figures, "grid") if figures else Markup("")


def _verdict(facts: Facts, _: Pictures) -> Iterator[str]:
    rows = [
        (html.span("ok", "ok") if c["ok"] else html.span("broken", "bad"), c["what"],
         float(c["value"]), float(c["limit"]), f"report.fail_if.{c['name']}")
        for c in facts["checks"]
    ]  # fmt: skip
    yield table(["", "what", "found", "limit", "key"], rows)


def _samples(facts: Facts, pictures: Pictures) -> Iterator[str]:
    samples = facts["samples"]
    if not samples:
        yield from (html.p(line, "note") for line in _hidden(facts))
        return
    yield _grid([_figure(pictures, s["key"], html.code(s["key"]), s["text"]) for s in samples])
    yield html.h3("Shuffled captions")
    yield html.p("As written, then as training sees it in three epochs: the fixed part stays in front.", "note")
    yield table(["key", "text"], [(s["key"], html.lines([s["text"], *s["shuffles"]])) for s in samples if "shuffles" in s])


def _counts(facts: Facts, _: Pictures) -> Iterator[str]:
    counts = facts["counts"]
    found = [("found by ingest", counts["found"]), *((f"left out: {reason}", -n) for reason, n in counts["refused"].items()),
             ("records", counts["records"]), ("images in the index", counts["index_images"]),
             ("rows of the index (one per image, bucket and mirror image)", counts["index_rows"])]  # fmt: skip
    if (flips := counts["flips"]) is not None:
        found += [("images with a mirror image", flips["pictures"]), ("images without one, for a tag of latents.flip_not", flips["without"])]
    yield html.h3("From files to the index")
    yield table(["", "images"], found)
    yield html.h3("Records by source")
    yield table(["source", "records", "without rating counted as"],
                [(*row, counts["assume_rating"].get(row[0], "explicit")) for row in counts["by_source"].items()])  # fmt: skip
    yield table(["source", "weight of its images in the loss"], counts["weights"].items())
    for stage, steps in counts["select"].items():
        before = [steps[0][1], *(count for _, count in steps)]
        yield html.h3(f"{stage}: images left after each filter")
        yield table(["filter", "left", "change"], [(name, n, n - previous) for (name, n), previous in zip(steps, before, strict=False)])
        yield html.p(f"{counted(counts['visits'][stage], 'visit', 'visits')} an epoch, with repeats.")
        if (mixed := counts["mixed"][stage]) is not None:
            yield from _mixing(mixed)
    yield from (html.p(note, "bad") for note in counts["notes"])
    yield from _corrected(counts["corrections"])
    excluded = [(rule, *one) for rule, words in facts["hard_exclusions"].items() for one in words.items()]
    yield table(["rule", "word", "records"], excluded, "Hard exclusions")
    yield table(["stages", "images in both"], facts["overlap"].items(), "Selected in two stages")


def _corrected(told: Facts | None) -> Iterator[str]:
    if told is None:
        return
    yield html.h3("Corrections")
    yield html.p(f"{counted(told['dropped'], 'tag', 'tags')} dropped and {told['added']:,} added, in {counted(told['captions'], 'caption', 'captions')}"
                 + (f"; {told['of_excluded']:,} of excluded records, which stay out" if told["of_excluded"] else "") + ".")  # fmt: skip
    yield table(["changes nothing", "tag", "change"], told["idle"][:50])


def _mixing(mixed: Facts) -> Iterator[str]:
    yield html.p(told_of(Mixed(**mixed)) + ".")
    if mixed["boosts"]:
        rows = [(" and ".join(one["where"]), one["times"], one["pictures"], one["visits"]) for one in mixed["boosts"]]
        yield table(["boost", "times", "pictures", "visits of the selection after it"], rows)
    if (found := mixed["balance"]) is not None:
        yield table([found["by"], "visits before", "after"], found["shown"])
        if found["values"] > len(found["shown"]):
            yield html.p(f"The rarest and the most frequent of {found['values']:,} values.", "note")


def _balance(facts: Facts, _: Pictures) -> Iterator[str]:
    sets = facts["balance"]
    for tag in facts["words"]:
        rows = []
        for name in dict.fromkeys(name for counts in sets.values() for name in counts[tag]):
            shares = [(counts[tag].get(name, 0), max(counts["rows"], 1)) for counts in sets.values()]
            if any(n for n, _ in shares):
                rows.append([name, *(cell for n, total in shares for cell in (n, f"{100 * n / total:.1f}"))])
        named = any(counts[tag].get(name) for counts in sets.values() for name in counts[tag] if name != "(none)")
        if named:
            yield table([tag, *(part for name in sets for part in (name, "%"))], rows, tag.capitalize())
        else:
            yield html.p(f"No picture has a {tag} tag.", "note")
    for other in ("rating", "year"):
        rows = []
        for column, words in sets["all sound files"][f"quality_by_{other}"].items():
            if total := sum(words.values()):
                rows.append([column, total, *(f"{100 * n / total:.1f} %" for n in words.values())])
        yield table([other, "images", *facts["words"]["quality"]], rows, f"Quality by {other}, all sound files")


def _tags(facts: Facts, _: Pictures) -> Iterator[str]:
    for stage, tags in facts["tags"].items():
        yield html.h3(f"{stage}: {tags['distinct']:,} tags, {tags['rarer_than_5']:,} on fewer than 5 images")
        yield html.div([table(["most frequent", "images"], tags["top"][:20]), table(["then", "images"], tags["top"][20:])], "row")
        yield html.p("Rare: " + (", ".join(tags["rare"]) or "none"), "note")


def _buckets(facts: Facts, pictures: Pictures) -> Iterator[str]:
    for stage, buckets in facts["buckets"].items():
        yield html.h3(stage)
        yield bars(buckets["images"].items(), "bucket")
        yield table(["sizes up to this many px", "images"], (buckets["areas"] or {}).items())
        if buckets["merged"]:
            yield html.p(f"Merged because too small: {', '.join(f'{a} into {b}' for a, b in buckets['merged'].items())}")
        if buckets["merging"]:
            yield _merging(buckets["merging"])
        lost = buckets["crop_loss"]
        yield html.p(f"The crop cuts {100 * lost['mean']:.1f} % of these pictures' area away, {100 * lost['max']:.1f} % at most.")
    crop = facts["crop"]
    yield html.h3(f"Crop loss: mean {100 * crop['mean']:.1f} %, largest {100 * crop['max']:.1f} %")
    yield _grid([
        _figure(pictures, f"crop/{row['key']}", html.code(row["key"]),
                f"{row['orig_w']}x{row['orig_h']} to {row['bucket_w']}x{row['bucket_h']}: {100 * row['loss']:.1f} % cut away")
        for row in crop["worst"] if row["loss"] > 0
    ])  # fmt: skip


def _merging(cost: Facts) -> Any:
    text = f"Merging moved {counted(cost['moved'], 'picture', 'pictures')} to another bucket"
    if cost["moved"]:
        text += f": {100 * cost['mean']:.1f} % more of their area is cut away on average, {100 * cost['worst']:.1f} % at most"
    if cost["small_buckets"]:
        small = counted(cost["small_buckets"], "bucket is", "buckets are")
        text += f". {small} still small ({counted(cost['small_pictures'], 'picture', 'pictures')}) and trained in short tiles"
    return html.p(f"{text}.")


def _captions(facts: Facts, _: Pictures) -> Iterator[str]:
    captions, tokens = facts["captions"], facts["captions"]["tokens"]
    rows = [("captions", captions["rows"]), ("empty", captions["empty"]), ("without fixed part", captions["no_fixed_part"]),
            ("same text as another", captions["texts_that_repeat"])]  # fmt: skip
    if tokens is None:
        yield table(["", "images"], rows)
        yield html.p("Tokens were not counted: `tokenizers` is not set.", "note")
        return
    rows += [(f"over {limit} tokens", tokens[f"over_{limit}"]) for limit in (75, 150, 225)]
    yield table(["", "images"], [*rows, ("fixed part alone over 225 tokens", tokens["fixed_over_225"])])
    yield html.h3(f"Tokens: mean {tokens['mean']}, most {tokens['max']}")
    yield bars([(f"{low} to {high}" if high < 1000 else f"{low} and more", n) for low, high, n in tokens["histogram"]], "tokens")
    for limit, examples in tokens["examples"].items():
        if examples:
            yield html.h3(f"Examples over {limit} tokens")
            yield table(["key", "tokens", "caption"], [(row["key"], row["n_tokens"], row["text"]) for row in examples])


def _duplicates(facts: Facts, pictures: Pictures) -> Iterator[str]:
    found, names = facts["duplicates"], {"sha256": "same file", "pixel": "same pixels", "phash": "look alike"}
    rows = [(names[method], data["groups"], data["rows"], data["dropped"]) for method, data in found.items() if data["groups"]]
    yield table(["", "groups", "images", "left out"], rows)
    for method, data in found.items():
        if data["examples"]:
            yield html.h3(names[method].capitalize())
            yield _grid([
                html.figure(html.div([_picture(pictures, key) for key in group[:4]], "pair"), html.lines(map(html.code, group[:8])))
                for group in data["examples"]
            ])  # fmt: skip


def _sizes(facts: Facts, pictures: Pictures) -> Iterator[str]:
    sizes = facts["sizes"]
    if sizes["enlarged"]:
        yield html.h3(f"{counted(sizes['enlarged'], 'picture is', 'pictures are')} enlarged")
    yield _grid([
        _figure(pictures, row["key"], html.code(row["key"]), f"{row['orig_w']}x{row['orig_h']} enlarged {row['scale']:.2f} times")
        for row in sizes["enlarged_worst"]
    ])  # fmt: skip
    for name, title in (("size_mismatches", "another size than their metadata says"), ("wrong_extensions", "the wrong extension")):
        if sizes[name]["count"]:
            yield html.h3(f"{counted(sizes[name]['count'], 'file has', 'files have')} {title}")
            yield html.p(Markup(", ").join(map(html.code, sizes[name]["examples"])))


def _quarantine(facts: Facts, _: Pictures) -> Iterator[str]:
    data = facts["quarantine"]
    rows = [(row["key"], row["step"], row["reason"], row["message"], row["exception"] or "") for row in data["listed"]]
    yield table(["step", "kind", "reason", "records"], data["counts"])
    yield table(["key", "step", "reason", "message", "exception"], rows, "List")
    if data["rows"] > len(rows):
        yield html.p(f"and {data['rows'] - len(rows):,} more in quarantine.parquet", "note")


def _files(facts: Facts, _: Pictures) -> Iterator[str]:
    latents = facts["latents"]
    yield html.p(f"{latents['rows']:,} latents in {latents['shards']:,} shards; {latents['read']:,} read and checked, "
                 f"{latents['unreadable']:,} unreadable.")  # fmt: skip
    yield table(["on disk", "size"], [(name, f"{size / 1e6:,.1f} MB") for name, size in facts["disk_bytes"].items()])
    yield table(["table", "files of other settings (safe to delete)"], facts["stale_files"].items(), "Stale")


SECTIONS: dict[str, Callable[[Facts, Pictures], Iterator[str]]] = {
    "Verdict": _verdict, "Samples": _samples, "Counts": _counts, "Special tags": _balance, "Tags": _tags,
    "Buckets and crops": _buckets, "Captions": _captions, "Duplicates": _duplicates, "Sizes": _sizes,
    "Quarantine": _quarantine, "Files": _files,
}  # fmt: skip
