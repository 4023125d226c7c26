"""The report of one or several runs as one HTML page: no scripts, nothing loaded from anywhere, fit for printing."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file
from train.base.secrets import mask
from train.observe.runs import (
    Picture,
    Run,
    as_yaml,
    check_run,
    config_differences,
    finite,
    read_pictures,
    read_run,
    told_apart,
)
from train.tools.quality.record import read_quality
from train.tools.report.charts import COLOURS, Points, bar_chart, extent, line_chart, smooth
from train.tools.report.charts import number as short
from train.tools.report.heldout import held_out_section
from train.tools.report.parts import STYLE, anchor, digest, figure, listed, name_of, table, text, with_interval
from train.tools.report.quality import quality_section
from train.tools.report.samples import comparison, strips

CHARTS = (  # key, title, noisy: dots with a running mean on a logarithmic axis, one y axis for all runs
    ("loss", "Loss", True, True),
    ("lr_unet", "Learning rate, U-Net", False, False),  # stages differ by powers of ten
    ("lr_text_encoder", "Learning rate, text encoders", False, False),
    ("grad_norm", "Gradient norm before clipping", True, True),
    ("images_per_s", "Images per second", False, True),
    ("waiting", "Time spent waiting for data, %", False, True),
)
FAR = 10  # times; a decade is what a line may add to a logarithmic axis
FEW = 10  # with fewer updates each counts, whatever it is
EDGE_UPDATES = 50  # first and last updates whose mean the summary shows
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "",
    extra_samples: Mapping[str, Path] | None = None,
    quality: Path | None = None,
) -> Path:
    """Write the report of `runs` (in the order of the recipe) to `out` and return its path.

    `extra_samples` names folders of pictures by scripts/sample.py that take part in the comparison (such as the base
    model's); `quality` is a file by scripts/quality.py. Raises Halt: USAGE for a path that is no directory or a file
    that is no such record, CANNOT_WRITE.
    """
    judged = read_quality(quality) if quality is not None else None
    for path in runs:
        check_run(path)
    read = told_apart([read_run(path) for path in runs])
    notes: list[str] = []
    others = {name: read_pictures(folder, notes) for name, folder in (extra_samples or {}).items()}
    out, text_of_page = Path(out), page(read, others, notes, title, judged)
    if out.is_dir():
        raise Halt(ExitCode.USAGE, f"--out {out} is a directory: name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, text_of_page)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"--out {out}: {error}") from error
    return out


def page(
    runs: Sequence[Run],
    others: Mapping[str, list[Picture]],
    notes: Sequence[str],
    title: str,
    quality: Mapping[str, Any] | None = None,
) -> str:
    """The whole HTML text."""
    heading = title or "Training report: " + ", ".join(run.name for run in runs)
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    sections = [
        ("Summary", summary_table(runs)),
        ("Curves", curves(runs)),
        ("Held-out loss", held_out_section(runs)),
        ("Stage comparison", comparison(runs, others)),
        ("Quality of the samples", quality_section(quality, [run.name for run in runs])),
        ("Samples over time", "".join(strips(run) for run in runs)),
        ("Configuration", configuration(runs)),
        ("Lineage", lineage(runs)),
        ("Notes", listed([*notes, *(note for run in runs for note in run.notes)])),
    ]
    shown = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{anchor(name)}">{name}</a>' for name, _ in shown)
    body = "".join(f'<section id="{anchor(name)}"><h2>{name}</h2>{body}</section>' for name, body in shown)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(heading)}</h1><p>Made {made}</p><nav>{links}</nav></header>"
        f"<main>{body}</main></body></html>\n"
    )


def summary_table(runs: Sequence[Run]) -> str:
    """One row per run: what was done, and what the loss did."""
    head = (
        "run", "state", "updates", "images seen", f"loss, first {EDGE_UPDATES}", f"loss, last {EDGE_UPDATES}",
        "falls by", "peak lr", "images/s", "skipped", "held-out loss",
    )  # fmt: skip
    rows = []
    for number, run in enumerate(runs):
        losses = [value for _, value in run.series("loss")]
        edge = min(EDGE_UPDATES, max(len(losses) // 2, 1))  # in a short run the two must not overlap
        first, last = (fmean(part) if part else None for part in (losses[:edge], losses[-edge:]))
        final = run.metrics[-1] if run.metrics else {}
        speeds = [value for _, value in run.series("images_per_s")]
        rates = [value for _, value in run.series("lr_unet")]
        held = run.validation[-1] if run.validation else {}
        rows.append(
            [
                name_of(run, number),
                escape(run.ending),
                text(final.get("update"), "{:,.0f}"),
                text(final.get("images"), "{:,.0f}"),
                text(first, "{:.4f}"),
                text(last, "{:.4f}"),
                text(first / last if first and last else None, "{:.2f}x"),
                short(float(f"{max(rates):.3g}")) if rates else "–",
                text(median(speeds) if speeds else None, "{:.2f}"),
                text(final.get("skipped"), "{:,.0f}"),
                with_interval(held),
            ]
        )
    return table(head, rows)


def curves(runs: Sequence[Run]) -> str:
    """One row of charts per metric, one chart per run."""
    rows = []
    for key, label, noisy, shared in CHARTS:
        found = [run.waiting() if key == "waiting" else run.series(key) for run in runs]
        smoothed = [smooth(points, max(len(points) // 25, 1)) if noisy else points for points in found]
        axes = [
            axis(points, line) if noisy else [y for _, y in points]
            for points, line in zip(found, smoothed, strict=True)
        ]
        values = [y for own in axes for y in own]
        if not values:
            continue
        cells = []
        for number, (run, points, line) in enumerate(zip(runs, found, smoothed, strict=True)):
            chart = line_chart(
                [(run.name, COLOURS[number % len(COLOURS)], line)],
                label=f"{label}, {run.name}",
                x_range=(0.0, max((x for x, _ in points), default=1.0)),
                y_range=extent(values if shared else [0.0, *(y for _, y in line)]),
                log=noisy,
                spread=points if noisy and len(points) > 2 else (),
                nothing="not trained" if key == "lr_text_encoder" and run.metrics else "no data",
            )
            cells.append(figure(name_of(run, number), chart))
        rows.append(f'<h3>{label}</h3><div class="charts">{"".join(cells)}</div>')
    if rows:
        rows.insert(
            0,
            "<p>Over updates. Dots are single updates, lines a running mean. The runs share the y axis of every row but "
            "the learning rates', which are powers of ten apart.</p>",
        )
    tenths = [(number, run, mean_deciles(run)) for number, run in enumerate(runs)]
    high = max((value or 0.0 for _, _, rows in tenths for _, row in rows for value in row), default=0.0)
    deciles = [
        figure(name_of(run, number), decile_chart(run, COLOURS[number % len(COLOURS)], high))
        for number, run, rows in tenths
        if rows
    ]
    if deciles:
        rows.append(
            "<h3>Loss by timestep, first and last tenth of the updates</h3>"
            f'<div class="charts">{"".join(deciles)}</div>'
            "<p>Tenths of the timestep range, 0 = least noise; grey first, colour last.</p>"
        )
    return "".join(rows) or "<p>No metrics found.</p>"


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


def decile_chart(run: Run, colour: str, high: float) -> str:
    """Bars of the loss by timestep tenth, the axis up to `high`."""
    bars = [(name, shade, row) for (name, row), shade in zip(mean_deciles(run), ("#9ca3af", colour), strict=True)]
    return bar_chart([str(tenth) for tenth in range(10)], bars, label=f"loss by timestep, {run.name}", high=high)


def configuration(runs: Sequence[Run]) -> str:
    """The keys in which the runs differ; for a single run all of them."""
    if len(runs) == 1:
        rows = [[f"<code>{escape(k)}</code>", escape(mask(as_yaml(v)))] for k, v in sorted(runs[0].config.items())]
        return table(["key", "value"], rows) if rows else ""
    different = config_differences(list(runs))
    if not different:
        return "<p>The configurations are equal.</p>" if any(run.config for run in runs) else ""
    rows = [[f"<code>{escape(key)}</code>", *(escape(mask(value)) for value in values)] for key, values in different]
    return table(["key", *(name_of(run, number) for number, run in enumerate(runs))], rows)


def lineage(runs: Sequence[Run]) -> str:
    """Where every run's weights come from."""
    rows, seen = [], set()
    for run in runs:
        for record in [*run.lineage.get("ancestors", []), run.lineage]:
            mark = record.get("weights_sha256")
            if not record or str(mark) in seen:  # as text: a damaged record holds anything
                continue
            seen.add(str(mark))
            parent = record.get("parent")
            parent = parent if isinstance(parent, dict) else {}
            rows.append(
                [
                    escape(str(record.get("stage", "?"))),
                    escape(str(parent.get("title") or parent.get("stage") or "?")) + digest(parent.get("sha256")),
                    digest(mark),
                    digest(record.get("dataset_fingerprint")),
                    digest(record.get("config_hash")),
                    digest(record.get("code_revision")),
                    text(record.get("seed"), "{}"),
                    text(record.get("updates"), "{:,}"),
                    text(record.get("images"), "{:,}"),
                    escape(str(record.get("license", "?"))),
                ]
            )
    head = ("stage", "parent", "weights", "dataset", "config", "code", "seed", "updates", "images", "licence")
    return table(head, rows) if rows else ""
