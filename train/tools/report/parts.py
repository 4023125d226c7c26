"""Pieces of the runs' report: numbers, a run's name in its colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train.base.secrets import mask
from train.observe.runs import Run, finite
from train.prepare.health.pages import html
from train.tools.report.charts import colour_of


def digest(value: Any) -> Markup:
    """A hash, shortened, the whole of it as tooltip."""
    return Markup(" ") + html.code(str(value)[:10], str(value)) if value else Markup("")


def name_of(run: Run, number: int) -> Markup:
    """The run's name in its colour."""
    return Markup(html.coloured(run.name, colour_of(number)))


def text(value: Any, form: str) -> str:
    """A number formatted, a dash where there is none."""
    return form.format(value) if finite(value) else "–"


def with_interval(record: Mapping[str, Any], *, signed: bool = False) -> str:
    """`0.1234 ± 0.0056 (256)`."""
    loss, interval = record.get("loss"), record.get("interval")
    if not finite(loss):
        return "–"
    spread = f" ± {interval:.4f}" if finite(interval) else ""
    shown = f"{loss:{'+' if signed else ''}.4f}".replace("-", "−")
    return Markup(html.span(f"{shown}{spread} ({record.get('images', '?')})", "tight"))


def charts(found: Sequence[tuple[str, str]]) -> Markup:
    """(caption, SVG) side by side."""
    return Markup(html.div([html.chart(caption, body) for caption, body in found], "charts"))


def listed(notes: Sequence[str]) -> Markup:
    """A list of texts, empty for none."""
    return Markup(html.listed([mask(note) for note in notes]))
