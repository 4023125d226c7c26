"""The report of one or several runs as one HTML page: no scripts, nothing loaded from anywhere, fit for printing."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from train.masking import mask
from train.rundir import replace_file
from train.tools.page_charts import COLOURS, bar_chart, extent, line_chart, smooth
from train.tools.page_data import Picture, Run, config_differences, read_pictures, read_run
from train.tools.page_samples import comparison, strips
from train.validation import paired_change

CHARTS = (  # key, title, noisy: drawn as dots with a running mean, on a logarithmic axis
    ("loss", "Loss per update", True),
    ("lr_unet", "Learning rate, U-Net", False),
    ("lr_text_encoder", "Learning rate, text encoders", False),
    ("grad_norm", "Gradient norm before clipping", True),
    ("images_per_s", "Images per second", False),
)
EDGE_UPDATES = 50  # first and last updates whose mean the summary shows
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    runs: Sequence[str | Path], out: str | Path, *, title: str = "", extra_samples: Mapping[str, Path] | None = None
) -> Path:
    """Write the report of `runs` (in the order of the recipe) to `out` and return its path.

    `extra_samples` names folders of pictures by scripts/sample.py that take part in the comparison (such as the base
    model's). Raises Halt: USAGE for a path that is no directory, CANNOT_WRITE.
    """
    read = [read_run(path) for path in runs]
    notes: list[str] = []
    others = {name: read_pictures(folder, notes) for name, folder in (extra_samples or {}).items()}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page(read, others, notes, title))
    return out


def page(runs: Sequence[Run], others: Mapping[str, list[Picture]], notes: Sequence[str], title: str) -> str:
    """The whole HTML text."""
    heading = title or "Training report: " + ", ".join(run.name for run in runs)
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    sections = [
        ("Summary", summary_table(runs)),
        ("Curves", curves(runs)),
        ("Held-out loss", held_out_section(runs)),
        ("Stage comparison", comparison(runs, others)),
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


def anchor(name: str) -> str:
    """An id for a section."""
    return name.lower().replace(" ", "-")


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
                text(max((value for _, value in run.series("lr_unet")), default=None), "{:.3g}"),
                text(median(speeds) if speeds else None, "{:.2f}"),
                text(final.get("skipped"), "{:,.0f}"),
                with_interval(held),
            ]
        )
    return table(head, rows)


def curves(runs: Sequence[Run]) -> str:
    """One row of charts per metric, one chart per run, the y axis shared along the row."""
    rows = []
    for key, label, noisy in CHARTS:
        found = [run.series(key) for run in runs]
        smoothed = [smooth(points, max(len(points) // 25, 1)) if noisy else points for points in found]
        # The axis follows the smoothed lines and most of the dots: one spike must not flatten everything else.
        values = [y for points in smoothed for _, y in points] + [y for points in found for y in middle(points)]
        if not values:
            continue
        cells = [
            figure(
                name_of(run, number),
                line_chart(
                    [(run.name, COLOURS[number % len(COLOURS)], line)],
                    label=f"{label}, {run.name}",
                    y_range=extent(values),
                    log=noisy,
                    spread=points if noisy and len(points) > 2 else (),
                ),
            )
            for number, (run, points, line) in enumerate(zip(runs, found, smoothed, strict=True))
        ]
        rows.append(f'<h3>{label}</h3><div class="charts">{"".join(cells)}</div>')
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


def middle(points: Sequence[tuple[float, float]]) -> list[float]:
    """The 2nd and 98th percentile of the values."""
    values = sorted(y for _, y in points)
    cut = len(values) // 50
    return [values[cut], values[-1 - cut]] if values else []


def mean_deciles(run: Run) -> list[tuple[str, list[float | None]]]:
    """("first" | "last", mean loss of each timestep tenth) over the first and last tenth of the updates."""
    rows = [record["loss_by_decile"] for record in run.metrics if isinstance(record.get("loss_by_decile"), list)]
    if not rows:
        return []
    part = max(len(rows) // 10, 1)
    result = []
    for name, chunk in (("first", rows[:part]), ("last", rows[-part:])):
        columns = [[row[d] for row in chunk if len(row) > d and isinstance(row[d], int | float)] for d in range(10)]
        result.append((name, [fmean(column) if column else None for column in columns]))
    return result


def decile_chart(run: Run, colour: str, high: float) -> str:
    """Bars of the loss by timestep tenth, the axis up to `high`."""
    bars = [(name, shade, row) for (name, row), shade in zip(mean_deciles(run), ("#9ca3af", colour), strict=True)]
    return bar_chart([str(tenth) for tenth in range(10)], bars, label=f"loss by timestep, {run.name}", high=high)


def held_out_section(runs: Sequence[Run]) -> str:
    """Held-out loss over updates, by stratum, and its paired change from run to run."""
    measured = [(number, run) for number, run in enumerate(runs) if run.validation]
    if not measured:
        return ""
    lines = [
        [(float(r["update"]), float(r["loss"])) for r in run.validation if isinstance(r.get("loss"), float)]
        for _, run in measured
    ]
    every = [y for points in lines for _, y in points]
    charts = [
        figure(
            name_of(run, number),
            line_chart(
                [(run.name, COLOURS[number % len(COLOURS)], points)],
                label=f"held-out loss, {run.name}",
                y_range=extent(every) if every else None,
            ),
        )
        for (number, run), points in zip(measured, lines, strict=True)
    ]
    names = sorted({name for _, run in measured for name in run.validation[-1].get("strata", {})})
    rows = [["all", *(with_interval(run.validation[-1]) for _, run in measured)]]
    for name in names:
        rows.append(
            [escape(name), *(with_interval(r.validation[-1].get("strata", {}).get(name, {})) for _, r in measured)]
        )
    return (
        f'<div class="charts">{"".join(charts)}</div><h3>By stratum, at the end of each run</h3>'
        + table(["stratum", *(name_of(run, number) for number, run in measured)], rows)
        + "<p>Mean ± half-width of the 95 % interval over images (number of images).</p>"
        + _changes([run for _, run in measured])
    )


def _changes(runs: Sequence[Run]) -> str:
    rows = []
    pairs = [*itertools.pairwise(runs), *([(runs[0], runs[-1])] if len(runs) > 2 else [])]
    for before, after in pairs:
        change = paired_change(before.validation[-1].get("losses", {}), after.validation[-1].get("losses", {}))
        if change:
            rows.append([f"{escape(before.name)} → {escape(after.name)}", with_interval(change, signed=True)])
    if not rows:
        return ""
    return "<h3>Change on the images both measured</h3>" + table(["from → to", "change of the loss"], rows)


def configuration(runs: Sequence[Run]) -> str:
    """The keys in which the runs differ; for a single run all of them."""
    if len(runs) == 1:
        rows = [[f"<code>{escape(k)}</code>", escape(mask(str(v)))] for k, v in sorted(runs[0].config.items())]
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
            if not record or mark in seen:
                continue
            seen.add(mark)
            parent: dict[str, Any] = record.get("parent") or {}
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


def digest(value: Any) -> str:
    """A hash, shortened, the whole of it as tooltip."""
    return f' <code title="{escape(str(value))}">{escape(str(value)[:10])}</code>' if value else ""


def name_of(run: Run, number: int) -> str:
    """The run's name in its colour."""
    return f'<b style="color:{COLOURS[number % len(COLOURS)]}">{escape(run.name)}</b>'


def text(value: Any, form: str) -> str:
    """A number formatted, a dash where there is none."""
    return form.format(value) if isinstance(value, int | float) else "–"


def with_interval(record: Mapping[str, Any], *, signed: bool = False) -> str:
    """`0.1234 ± 0.0056 (256)`."""
    loss, interval = record.get("loss"), record.get("interval")
    if not isinstance(loss, int | float):
        return "–"
    spread = f" ± {interval:.4f}" if isinstance(interval, int | float) else ""
    return f"{loss:{'+' if signed else ''}.4f}{spread} ({record.get('images', '?')})"


def figure(caption: str, body: str) -> str:
    """A chart with its caption above."""
    return f"<figure><figcaption>{caption}</figcaption>{body}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def listed(notes: Sequence[str]) -> str:
    """A list of plain texts, empty for none."""
    return f"<ul>{''.join(f'<li>{escape(mask(note))}</li>' for note in notes)}</ul>" if notes else ""


STYLE = """
:root{font:15px/1.5 system-ui,sans-serif;color:#1f2937;background:#fff}
body{margin:0 auto;max-width:1180px;padding:0 24px 48px}
header{border-bottom:1px solid #e5e7eb;margin-bottom:8px}h1{font-size:1.6rem;margin:28px 0 0}
header p{margin:2px 0;color:#6b7280}nav{display:flex;flex-wrap:wrap;gap:16px;padding:8px 0 12px}nav a{color:#2563eb}
h2{font-size:1.25rem;margin:36px 0 10px}h3{font-size:1rem;margin:22px 0 6px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:12px}
figure{margin:0;max-width:560px}figcaption{font-size:.85rem}svg{width:100%;height:auto;display:block}
svg text{font:10px system-ui,sans-serif;fill:#6b7280}svg .y{text-anchor:end}svg .x,svg .none{text-anchor:middle}
svg .rule{stroke:#e5e7eb}svg polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}svg .raw{fill:#cbd5e1}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid #f1f5f9;vertical-align:top}
th{color:#6b7280;font-weight:600;white-space:nowrap}code{font:12px ui-monospace,monospace}
.pictures{display:flex;gap:8px;overflow-x:auto;padding-bottom:4px;align-items:flex-end}
.pictures figure{flex:0 0 auto}.pictures img{display:block;border-radius:3px}.pictures figcaption{color:#6b7280}
.prompt{margin:16px 0 4px;font-size:.85rem}section>p{color:#6b7280;font-size:.85rem}
@media print{body{max-width:none;padding:0;font-size:11px}nav{display:none}a{color:inherit}
h2{break-after:avoid}h3,.prompt{break-after:avoid}figure,tr{break-inside:avoid}.scroll,.pictures{overflow:visible}
.pictures{flex-wrap:wrap}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
