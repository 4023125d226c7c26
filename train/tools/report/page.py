"""The report of one or several runs as one HTML page, fit for printing."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file
from train.base.secrets import mask
from train.observe import runs as run_files
from train.observe.runs import Picture, Run, finite
from train.prepare.health.pages import html, joined
from train.prepare.health.pages import page as whole_page
from train.tools.quality.record import read_quality
from train.tools.report.adapters import adapters_section
from train.tools.report.charts import Points, bar_chart, colour_of, extent, line_chart, smooth
from train.tools.report.charts import number as short
from train.tools.report.heldout import files_section, held_out_section
from train.tools.report.parts import charts, digest, listed, name_of, text, with_interval
from train.tools.report.quality import quality_section
from train.tools.report.samples import comparison, strips

CHARTS = (  # key, title, noisy: dots with a running mean on a logarithmic axis, one y axis for all runs
    ("loss", "Loss", True, True),
    ("lr_unet", "Learning rate, U-Net", False, False),  # stages differ by powers of ten
    ("lr_text_encoder", "Learning rate, text encoders", False, False),
    ("grad_norm", "Gradient norm before clipping", True, True),
    ("images_per_s", "Images per second", False, True),
    ("mfu", "Share of the card's peak (MFU)", False, True),
    ("waiting", "Time spent waiting for data, %", False, True),
)
FAR = 10  # times; a decade is what a line may add to a logarithmic axis
FEW = 10  # with fewer updates each counts, whatever it is
EDGE_UPDATES = 50  # first and last updates whose mean the summary shows


def write_page(
    runs: Sequence[str | Path], out: str | Path, *, title: str = "", extra_samples: Mapping[str, Path] | None = None,
    quality: Path | None = None, losses: Path | None = None, loras: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write the report of `runs` (in the order of the recipe) to `out` and return its path.

    `extra_samples` names folders of pictures by scripts/sample.py that take part in the comparison (such as the base
    model's); `loras`: adapters to tell of beside those of the runs, FILE or FILE:weight; `quality` is a file by scripts/quality.py, `losses` one by its `loss`. Raises Halt: USAGE for a path that is no directory or a file
    that is no such record, CANNOT_WRITE.
    """
    judged, measured = (read_quality(file, key) if file is not None else None for file, key in ((quality, "--quality"), (losses, "--loss")))
    for path in runs:
        run_files.check_run(path)
    read = run_files.told_apart([run_files.read_run(path) for path in runs])
    notes: list[str] = []
    others = {name: run_files.read_pictures(folder, notes) for name, folder in (extra_samples or {}).items()}
    out, text_of_page = Path(out), page(read, others, notes, title, judged, measured, adapters_section(read, loras, notes))
    if out.is_dir():
        raise Halt(ExitCode.USAGE, f"--out {out} is a directory: name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, text_of_page)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"--out {out}: {error}") from error
    return out


def page(
    runs: Sequence[Run], others: Mapping[str, list[Picture]], notes: Sequence[str], title: str, quality: Mapping[str, Any] | None,
    losses: Mapping[str, Any] | None = None, adapters: str = "",
) -> str:  # fmt: skip
    """The whole HTML text. `adapters`: the section that tells of them."""
    heading = title or "Training report: " + ", ".join(run.name for run in runs)
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    sections = [
        ("Stage comparison", comparison(runs, others)),
        ("Held-out loss", joined([held_out_section(runs), files_section(losses)])),
        ("Summary", summary_table(runs)),
        ("Samples over time", joined(strips(run) for run in runs)),
        ("Quality of the samples", quality_section(quality, [run.name for run in runs])),
        ("Curves", curves(runs)),
        ("Time of an update", parts_of_updates(runs)),
        ("Configuration", configuration(runs)),
        ("Adapters", adapters),
        ("Lineage", lineage(runs)),
        ("Notes", listed([*notes, *(note for run in runs for note in run.notes)])),
    ]
    shown = [(name.lower().replace(" ", "-"), name, body) for name, body in sections if body]
    return whole_page(heading, "report.css", f"Made {made}", shown)


def summary_table(runs: Sequence[Run]) -> str:
    """One row per run: what was done, and what the loss did."""
    head = (
        "run", "state", "updates", "images seen", f"loss, first {EDGE_UPDATES}", f"loss, last {EDGE_UPDATES}",
        "falls by", "peak lr", "images/s", "TFLOP/s a card", "MFU", "peak GiB", "skipped", "held-out loss",
    )  # fmt: skip
    rows = []
    for number, run in enumerate(runs):
        losses, rates, speeds = ([value for _, value in run.series(key)] for key in ("loss", "lr_unet", "images_per_s"))
        edge = min(EDGE_UPDATES, max(len(losses) // 2, 1))  # in a short run the two must not overlap
        first, last = (fmean(part) if part else None for part in (losses[:edge], losses[-edge:]))
        final = run.metrics[-1] if run.metrics else {}
        rows.append([
            name_of(run, number), run.ending, text(final.get("update"), "{:,.0f}"), text(final.get("images"), "{:,.0f}"),
            text(first, "{:.4f}"), text(last, "{:.4f}"), text(first / last if first and last else None, "{:.2f}x"),
            short(float(f"{max(rates):.3g}")) if rates else "–", text(median(speeds) if speeds else None, "{:.2f}"),
            text(middle(run, "tflops"), "{:.0f}"), text(middle(run, "mfu"), "{:.1%}"), peak_memory(run),
            text(final.get("skipped"), "{:,.0f}"), with_interval(run.validation[-1] if run.validation else {}),
        ])  # fmt: skip
    said = [place for place in range(len(head)) if any(row[place] != "–" for row in rows)]  # a CPU has no card to speak of
    return joined([html.table([head[place] for place in said], [[row[place] for place in said] for row in rows])])


def middle(run: Run, key: str) -> float | None:
    """Median over the updates that have the number."""
    values = [value for _, value in run.series(key)]
    return median(values) if values else None


def peak_memory(run: Run) -> str:
    """GiB that tensors took at most, of those that torch kept; a dash on a CPU."""
    most = [max((value for _, value in run.series(f"peak_{kind}_bytes")), default=None) for kind in ("allocated", "reserved")]
    return " of ".join(text(value / 2**30, "{:.1f}") for value in most if value is not None) or "–"


def parts_of_updates(runs: Sequence[Run]) -> str:
    """Where the time of an update goes: medians over the measured ones; empty where none was."""
    measured = [[record["seconds"] for record in run.metrics if isinstance(record.get("seconds"), dict)] for run in runs]
    parts = list(dict.fromkeys(part for found in measured for one in found for part in one))
    if not parts:
        return ""
    rows = []
    for number, (run, found) in enumerate(zip(runs, measured, strict=True)):
        values = [[one[part] for one in found if finite(one.get(part))] for part in parts]
        shown = [text(median(seconds) if seconds else None, "{:.3f}") for seconds in values]
        rows.append([name_of(run, number), text(len(found) or None, "{:,.0f}"), *shown])
    return joined([html.table(("run", "updates measured", *(f"{part.replace('_', ' and ')}, s" for part in parts)), rows)])


def curves(runs: Sequence[Run]) -> str:
    """One row of charts per metric, one chart per run."""
    rows: list[str] = []
    for key, label, noisy, shared in CHARTS:
        found = [run.waiting() if key == "waiting" else run.series(key) for run in runs]
        smoothed = [smooth(points, max(len(points) // 25, 1)) if noisy else points for points in found]
        values = [
            y for points, line in zip(found, smoothed, strict=True) for y in (axis(points, line) if noisy else [y for _, y in points])
        ]
        if not values:
            continue
        cells = []
        for number, (run, points, line) in enumerate(zip(runs, found, smoothed, strict=True)):
            chart = line_chart(
                [(run.name, colour_of(number), line)],
                label=f"{label}, {run.name}",
                x_range=(0.0, max((x for x, _ in points), default=1.0)),
                y_range=extent(values if shared else [0.0, *(y for _, y in line)]),
                log=noisy,
                spread=points if noisy and len(points) > 2 else (),
                nothing="not trained" if key == "lr_text_encoder" and run.metrics else "no data",
            )
            cells.append((name_of(run, number), chart))
        rows += [html.h3(label), charts(cells)]
    if rows:
        rows.insert(0, html.p("Over updates. Dots are single updates, lines a running mean. The runs share the y axis of every row but "
                              "the learning rates', which are powers of ten apart."))  # fmt: skip
    tenths = [mean_deciles(run) for run in runs]
    high = max((value or 0.0 for of_run in tenths for _, row in of_run for value in row), default=0.0)
    if deciles := [(name_of(run, number), decile_chart(run, of_run, number, high))
                   for number, (run, of_run) in enumerate(zip(runs, tenths, strict=True)) if of_run]:  # fmt: skip
        rows += [
            html.h3("Loss by timestep, first and last tenth of the updates"),
            charts(deciles),
            html.p("Tenths of the timestep range, 0 = least noise; grey first, colour last."),
        ]
    return joined(rows or [html.p("No metrics found.")])


def axis(points: Points, line: Points) -> list[float]:
    """What the y axis shows of a noisy metric: most of the dots, and of the smoothed line what is not far outside them.

    One spike must not flatten everything else, and in the line it is as wide as the window.
    """
    values = sorted(y for _, y in points)
    cut = max(len(values) // 50, 1 if len(values) >= FEW else 0)
    if not values:
        return []
    low, high = values[cut], values[-1 - cut]
    return [low, high, *(y for _, y in line if low / FAR <= y <= high * FAR)]


def mean_deciles(run: Run) -> list[tuple[str, list[float | None]]]:
    """("first" | "last", mean loss of each timestep tenth) over the first and last tenth of the updates."""
    rows = [record["loss_by_decile"] for record in run.metrics if isinstance(record.get("loss_by_decile"), list)]
    if not rows:
        return []
    part = max(len(rows) // 10, 1)
    result = []
    for name, chunk in (("first", rows[:part]), ("last", rows[-part:])):
        columns = [[row[d] for row in chunk if len(row) > d and finite(row[d])] for d in range(10)]
        result.append((name, [fmean(column) if column else None for column in columns]))
    return result


def decile_chart(run: Run, tenths: Sequence[tuple[str, list[float | None]]], number: int, high: float) -> str:
    """Bars of the loss by timestep tenth, the axis up to `high`."""
    bars = [(name, shade, row) for (name, row), shade in zip(tenths, ("#9ca3af", colour_of(number)), strict=True)]
    return bar_chart([str(tenth) for tenth in range(10)], bars, label=f"loss by timestep, {run.name}", high=high)


def configuration(runs: Sequence[Run]) -> str:
    """The keys in which the runs differ; for a single run all of them."""
    if len(runs) == 1:
        rows = [[html.code(k), mask(run_files.as_yaml(v))] for k, v in sorted(runs[0].config.items())]
        return joined([html.table(["key", "value"], rows)]) if rows else ""
    different = run_files.config_differences(list(runs))
    if not different:
        return joined([html.p("The configurations are equal.")]) if any(run.config for run in runs) else ""
    rows = [[html.code(key), *map(mask, values)] for key, values in different]
    return joined([html.table(["key", *(name_of(run, number) for number, run in enumerate(runs))], rows)])


def lineage(runs: Sequence[Run]) -> str:
    """Where every run's weights come from."""
    rows, seen = [], set()
    for run in runs:
        for record in [*run.lineage.get("ancestors", []), run.lineage]:
            mark = record.get("weights_sha256")
            if not record or str(mark) in seen:  # as text: a damaged record holds anything
                continue
            seen.add(str(mark))
            parent = record["parent"] if isinstance(record.get("parent"), dict) else {}
            rows.append([
                str(record.get("stage", "?")),
                joined([str(parent.get("title") or parent.get("stage") or "?"), digest(parent.get("sha256"))]),
                *(digest(record.get(key)) for key in ("weights_sha256", "dataset_fingerprint", "config_hash", "code_revision")),
                text(record.get("seed"), "{}"), *(text(record.get(key), "{:,}") for key in ("updates", "images")),
                str(record.get("license", "?")),
            ])  # fmt: skip
    head = ("stage", "parent", "weights", "dataset", "config", "code", "seed", "updates", "images", "licence")
    return joined([html.table(head, rows)]) if rows else ""
