"""What scripts/quality.py measured, as a section of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train.base.errors import ExitCode, Halt
from train.prepare.health.pages import html, joined
from train.tools.quality.record import TITLES, shown
from train.tools.report.charts import bar_chart, colour_of
from train.tools.report.parts import charts

MOST_TAGS = 40  # rows of the table by tag, the most asked for first
GREY = "#6b7280"
EXPLAINED = {
    "aesthetic": "Aesthetic score: the classifier's probability of the class named below.",
    "clip": "CLIP cosine: between the picture and its own prompt, without the quality prefix (CLIPScore, Hessel 2021).",
    "clip_first": "Own prompt nearest: share of pictures to which no other prompt of the set is nearer.",
    "tag_recall": "Tags seen of those asked: of what the prompts ask for, how much the tagger sees.",
    "tag_precision": "Tags asked of those seen: of what the tagger sees, among tags that some prompt names, how much "
    "this picture's prompt asked for.",
}


def quality_section(record: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """The whole section, "" without a record; `names` are the runs in the order of their colours.

    Raises Halt(USAGE) for a record that lacks something.
    """
    if record is None:
        return ""
    try:
        return _section(record, names)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise Halt(ExitCode.USAGE, f"--quality: no complete record of scripts/quality.py ({error!r})") from error


def _section(record: Mapping[str, Any], names: Sequence[str]) -> str:
    stages = record["stages"]
    colours = {name: colour_of(number) for number, name in enumerate(names)}
    statistics = [key for key in TITLES if any(key in stage["statistics"] for stage in stages.values())]
    rows = [
        [_name(name, colours), stage["pictures"], *(_cell(stage["statistics"].get(key)) for key in statistics)]
        for name, stage in stages.items()
    ]
    return joined([
        html.table(["stage", "pictures", *(TITLES[key] for key in statistics)], rows),
        html.listed([*(EXPLAINED[key] for key in statistics), *_judges(record)], "told"),
        _changes(record, statistics), _scores(stages, colours), _tags(stages, colours),
    ])  # fmt: skip


def _name(name: str, colours: Mapping[str, str]) -> str:
    return Markup(html.coloured(name, colours.get(name, GREY)))


def _cell(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    told = shown(estimate, signed=signed)
    if not signed or estimate["low"] is None or estimate["low"] <= 0 <= estimate["high"]:
        return told
    return Markup(html.span(told, "good" if estimate["low"] > 0 else "bad"))


def _judges(record: Mapping[str, Any]) -> list[str]:
    judges, bootstrap = record["judges"], record["bootstrap"]
    told = []
    if "aesthetic" in judges:
        told.append(f"Score: {judges['aesthetic']['model']}, class {judges['aesthetic']['label']}.")
    if "clip" in judges:
        cut = judges["clip"]["prompts_cut"]
        told.append(f"CLIP: {judges['clip']['model']}{f', {cut} prompts cut at its length' if cut else ''}.")
    if "tags" in judges:
        told.append(f"Tagger: {judges['tags']['model']}, {judges['tags']['thresholds']}.")
    level, draws = bootstrap["level"], bootstrap["draws"]
    how = f"bootstrap of {draws:,} resamples; for single tags and words Wilson's"
    return [*told, f"In brackets the {level:.0%} interval over pictures: {how}."]


def _changes(record: Mapping[str, Any], statistics: Sequence[str]) -> str:
    rows = [
        [f"{one['from']} → {one['to']}", one["pictures"], *(_cell(one["statistics"].get(key), signed=True) for key in statistics)]
        for one in record["changes"] if one["pictures"]
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["from → to", "pairs", *(TITLES[key] for key in statistics)]
    explained = "Resampled in pairs. In colour where the interval leaves 0 out: green rises, red falls."
    return joined([html.h3("Change on the same prompts and seeds"), html.table(head, rows), html.p(explained)])


def _scores(stages: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    found = {name: stage["aesthetic"] for name, stage in stages.items() if "aesthetic" in stage}
    if not found:
        return ""
    shares = {name: [count / sum(one["histogram"]) for count in one["histogram"]] for name, one in found.items()}
    high = max(value for row in shares.values() for value in row)
    bars = []
    for name, row in shares.items():
        edges = [f"{place / len(row):g}" for place in range(len(row))]
        chart = bar_chart(edges, [(name, colours.get(name, GREY), row)], label=f"aesthetic scores, {name}", high=high)
        bars.append((_name(name, colours), chart))
    first = next(iter(found.values()))
    rows = [
        [_name(name, colours), *(f"{value:.3f}" for value in one["quantiles"].values()), *(_cell(one["words"][word]) for word in first["words"])]
        for name, one in found.items()
    ]
    return joined([
        html.h3("Aesthetic score, share of pictures"), charts(bars),
        html.table(["stage", *(f"{float(q):.0%} quantile" for q in first["quantiles"]), *first["words"]], rows),
        html.p("Left edge of each bin below it. Words by the card's thresholds."),
    ])  # fmt: skip


def _tags(stages: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    found = {name: stage["by_tag"] for name, stage in stages.items() if "by_tag" in stage}
    if not found:
        return ""
    asked = Counter[str]()
    for tags in found.values():
        asked |= Counter({tag: one["asked"] for tag, one in tags.items()})  # the larger of both, none of 0
    rows = []
    for tag in sorted(asked, key=lambda tag: (-asked[tag], tag))[:MOST_TAGS]:
        cells = [tags[tag][key] if tag in tags else None for tags in found.values() for key in ("recall", "precision")]
        rows.append([tag, asked[tag], *("–" if one is None else html.span(shown(one, digits=2), "tight") for one in cells)])
    head = ["tag", "asked", *(cell for name in found for cell in (joined([_name(name, colours), " recall"]), "precision"))]
    return joined([html.h3("By tag"), html.table(head, rows)])
