"""The adapters of a report: those that its runs trained, and files that stand beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.base.errors import Halt
from train.model.adapters import reading
from train.observe.runs import Run
from train.prepare.health.pages import html, joined
from train.tools.report.parts import digest
from train.tools.show import adapter


def adapters_section(runs: Sequence[Run], given: Sequence[str], notes: list[str]) -> str:
    """One row for each adapter; empty without any. A run's damaged one is a note, one that was named is refused (Halt)."""
    rows = [_row(path.stem, weight, adapter.report(path)) for path, weight in map(reading.given, given)]
    for run in runs:
        if reading.is_adapter(run.path):
            try:
                rows.insert(0, _row(run.name, 1.0, adapter.report(run.path)))
            except Halt as halt:
                notes.append(halt.message)
    head = ("adapter", "weight", "kind", "layers", "of these convolutions", "ranks", "alphas", "values", "MB", "base")
    return joined([html.table(head, rows)]) if rows else ""


def _row(name: str, weight: float, report: dict[str, Any]) -> list[Any]:
    networks: list[dict[str, Any]] = [one for one in report["networks"].values() if one]
    kinds, ranks, alphas = ({key for one in networks for key in one[what]} for what in ("kinds", "ranks", "alphas"))
    hashes = report["base"]["hashes"]
    first = hashes[0] if isinstance(hashes, list) and hashes else hashes
    return [
        name, f"{weight:g}", ", ".join(sorted(kinds)), f"{report['layers']:,}", f"{sum(one['convolutions'] for one in networks):,}",
        ", ".join(sorted(ranks, key=float)), ", ".join(sorted(alphas, key=float)), f"{report['values']:,}", f"{report['bytes'] / 1e6:.1f}",
        joined([str(report["base"]["name"] or "?"), digest(first)]),
    ]  # fmt: skip
