"""Held-out loss of the report: over updates, by stratum, and its paired change from stage to stage."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train.base.errors import ExitCode, Halt
from train.config.vocabulary import shipped_vocabularies
from train.observe.runs import Run, finite
from train.observe.validation import LABELS, paired_change
from train.prepare.health.pages import html, joined
from train.tools.report.charts import colour_of, extent, line_chart
from train.tools.report.parts import charts, listed, name_of, with_interval

KIND_OF_LOSS = ("loss.prediction", "noise.zero_terminal_snr")  # all that train/observe/heldout.py takes from the stage's own
_INTERVAL = "Mean ± half-width of the 95 % interval over images (number of images)."
_PAIRED = (
    "The mean of each image's own difference: most of what makes one image harder than another cancels. "
    "In colour where the 95 % interval leaves 0 out: green falls, red rises."
)
BAND = "timestep/"  # how the strata of bands of timesteps begin


def held_out_section(runs: Sequence[Run]) -> str:
    """Charts, the table by stratum, and what changed on the images that two stages measured; "" without any."""
    measured = [(number, run) for number, run in enumerate(runs) if run.validation]
    if not measured:
        return ""
    lines = [
        [(float(r["update"]), float(r["loss"])) for r in run.validation if finite(r.get("loss"))] for _, run in measured
    ]
    every = [y for points in lines for _, y in points]
    shown = [
        (
            name_of(run, number),
            line_chart(
                [(run.name, colour_of(number), points)],
                label=f"held-out loss, {run.name}",
                x_range=(0.0, max((x for x, _ in points), default=1.0)),
                y_range=extent(every) if every else None,
                log=True,  # what random weights begin at is ten times what finetunes move between
            ),
        )
        for (number, run), points in zip(measured, lines, strict=True)
    ]
    names = in_order({name for _, run in measured for name in run.validation[-1]["strata"]})
    rows = [["all", *(with_interval(run.validation[-1]) for _, run in measured)]]
    rows += [
        [stratum(name), *(with_interval(r.validation[-1]["strata"].get(name, {})) for _, r in measured)]
        for name in names
    ]
    told = "Images that no stage trains on, with fixed noise and timesteps. Each stage measures its own selection, unless "
    parts = [
        html.p(joined([told, html.code("validation.select"), " names another."])),
        charts(shown),
        _by_timestep(measured),
        html.h3("At the end of each run"),
        html.table(["stratum", *(name_of(run, number) for number, run in measured)], rows),
        html.p(_INTERVAL),
        _changes([run for _, run in measured]),
    ]
    return joined(parts)


def _by_timestep(measured: Sequence[tuple[int, Run]]) -> str:
    """Each run's loss over its updates by band of timesteps, and each band from its first measurement to its last.

    What a stage learns, and above all one that teaches another objective, differs most by the amount of noise.
    """
    names = sorted({name for _, run in measured for r in run.validation for name in r["strata"] if name.startswith(BAND)})
    if not names:
        return ""
    drawn = [(number, run, [(name, _over_updates(run, name)) for name in names]) for number, run in measured]
    every = [y for _, _, lines in drawn for _, points in lines for _, y in points]
    shown = [
        (
            name_of(run, number),
            line_chart(
                [(name.removeprefix(BAND), colour_of(place), points) for place, (name, points) in enumerate(lines)],
                label=f"held-out loss by timestep, {run.name}",
                x_range=(0.0, max((x for _, points in lines for x, _ in points), default=1.0)),
                y_range=extent(every) if every else None,
                log=True,  # what random weights begin at is ten times what finetunes move between
            ),
        )
        for number, run, lines in drawn
    ]
    rows = [[html.coloured(name.removeprefix(BAND), colour_of(place)), *(_first_to_last(lines[place][1]) for _, _, lines in drawn)]
            for place, name in enumerate(names)]  # fmt: skip
    return joined([
        html.h3("By timestep, 999 = noise alone"),
        charts(shown),
        html.table(["timesteps", *(name_of(run, number) for number, run in measured)], rows),
        html.p("The first measurement → the last. With validation.at_start, and for another objective than the parent's (loss.convert) "
               "always, at update 0 stands what the parent's weights make of the stage's objective."),
    ])  # fmt: skip


def files_section(record: Mapping[str, Any] | None) -> str:
    """What `scripts/quality.py loss` measured of model files, a base, it with an adapter, a whole finetune, on the same images; "" without.

    Raises Halt(USAGE) for a record that lacks something.
    """
    if record is None:
        return ""
    try:
        models, changes = record["models"], record["changes"]
        names = in_order({name for one in models.values() for name in one["strata"]})
        rows = [["all", *(with_interval(one) for one in models.values())]]
        rows += [[stratum(name), *(with_interval(one["strata"].get(name, {})) for one in models.values())] for name in names]
        parts = [
            html.h3("Model files on the same images"),
            html.table(["stratum", *models], rows),
            html.p(f"{record['images']} images of {record['data']}, selection {record['selection']}, {record['precision']}. {_INTERVAL}"),
        ]
        if changes:
            moved = [["all", *(_coloured(one) for one in changes)]]
            moved += [[stratum(name), *(_coloured(one["strata"].get(name)) for one in changes)] for name in names]
            parts += [html.table(["stratum", *(f"{one['from']} → {one['to']}" for one in changes)], moved), html.p(_PAIRED)]
        return joined([*parts, listed([str(note) for note in record["notes"]])])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Halt(ExitCode.USAGE, f"--loss: no complete record of scripts/quality.py loss ({error!r})") from error


def _over_updates(run: Run, name: str) -> list[tuple[float, float]]:
    """(update, loss) of one stratum where it is a finite number."""
    return [(float(r["update"]), float(loss)) for r in run.validation if finite(loss := r["strata"].get(name, {}).get("loss"))]


def _first_to_last(points: Sequence[tuple[float, float]]) -> str:
    """`0.9000 (update 0) → 0.3000 (update 60)`."""
    ends = [points[0], points[-1]] if len(points) > 1 else points
    return " → ".join(f"{loss:.4f} (update {update:,.0f})" for update, loss in ends) or "–"


def _changes(runs: Sequence[Run]) -> str:
    """What the loss of an image does from stage to stage, in all and by stratum."""
    pairs = [*itertools.pairwise(runs), *([(runs[0], runs[-1])] if len(runs) > 2 else [])]
    pairs = [(before, after) for before, after in pairs if paired_change(_losses(before), _losses(after))]
    skipped = [(before, after) for before, after in pairs if _measured_otherwise(before, after)]
    pairs = [(before, after) for before, after in pairs if not _measured_otherwise(before, after)]
    told = joined(
        html.p(
            f"{before.name} → {after.name}: no change is shown, for their losses are not of one kind "
            f"(they differ in {' and '.join(_measured_otherwise(before, after))})."
        )
        for before, after in skipped
    )
    if not pairs:
        return told
    names = in_order({name for _, after in pairs for one in after.held.values() for name in one})
    rows = [["all", *(_change(before, after, None) for before, after in pairs)]]
    rows += [[stratum(name), *(_change(before, after, name) for before, after in pairs)] for name in names]
    head = ["stratum", *(f"{before.name} → {after.name}" for before, after in pairs)]
    return joined([html.h3("Change on the images both measured"), html.table(head, rows), html.p(_PAIRED), told])


def _measured_otherwise(before: Run, after: Run) -> list[str]:
    """The settings that make two held-out losses incomparable, where the runs differ in them and both are known."""
    if not (before.config and after.config):
        return []
    return [key for key in KIND_OF_LOSS if before.config.get(key) != after.config.get(key)]


def _change(before: Run, after: Run, name: str | None) -> str:
    losses = _losses(after)
    if name is not None:
        losses = {uid: loss for uid, loss in losses.items() if name in after.held.get(uid, ())}
    return _coloured(paired_change(_losses(before), losses))


def _coloured(found: Mapping[str, Any] | None) -> str:
    """A mean difference, in colour where its interval leaves 0 out."""
    if found is None:
        return "–"
    shown, interval = with_interval(found, signed=True), found["interval"]
    if interval is None or abs(found["loss"]) <= interval:
        return shown
    return Markup(html.span(shown, "good" if found["loss"] < 0 else "bad"))


def _losses(run: Run) -> Mapping[str, Any]:
    losses: dict[str, Any] = run.validation[-1]["losses"]
    return losses


def in_order(names: set[str]) -> list[str]:
    """`label/value` names: quality, rating, year, aesthetic, each from its best value down: in the words of the base that has most of them."""
    values = {name.partition("/")[2] for name in names}
    words = max((vocabulary.best_first for vocabulary in shipped_vocabularies()), key=lambda words: len(values & {*words}))

    def place(name: str) -> tuple[Any, ...]:
        label, _, value = name.partition("/")
        return (*(known.index(one) if one in known else len(known) for known, one in ((LABELS, label), (words, value))), value)

    return sorted(names, key=place)


def stratum(name: str) -> str:
    """`quality/masterpiece` as a cell."""
    label, _, value = name.partition("/")
    return joined([html.span(label, "dim"), " ", value])
