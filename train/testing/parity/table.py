"""The whole comparison: every section's rows, the table as text and as a page, and what is recorded of it."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.testing.parity import data_rows, network_rows, number_rows
from train.testing.parity.checkout import Checkout
from train.testing.parity.inputs import Switches
from train.testing.parity.verdicts import Row

FULL_GIB = 18  # of memory that `full` was seen to take: fp32 weights of all networks, twice a network while it is cast
COLUMNS = ("verdict", "what", "measured", "tolerance", "reason")


@dataclass(frozen=True)
class Report:
    """What was compared with what, and the outcome."""

    checkout: Checkout
    size: str
    settings: str  # the config and what was changed of it
    rows: tuple[Row, ...]

    @property
    def different(self) -> int:
        """Rows that nobody can explain."""
        return sum(row.verdict == "DIFFERENT" for row in self.rows)


def compare(config: Switches, checkout: Checkout, work: Path, *, size: str, settings: str, say: Callable[[str], None]) -> Report:
    """Every row. Raises Halt(MISMATCH) where the trainer's modules do not run at all, or `full` would not fit."""
    if size == "full" and (free := _free_gib()) is not None and free < FULL_GIB:
        raise Halt(ExitCode.MISMATCH, f"--size full takes about {FULL_GIB} GiB of memory, {free:.0f} are free: use --size tiny")
    sections: tuple[tuple[str, Callable[[], Sequence[Row]]], ...] = (
        ("data", partial(data_rows.rows, config, checkout, work)),
        ("arithmetic", partial(number_rows.rows, config, checkout, work)),
        ("networks", partial(network_rows.rows, config, checkout, work, size)),
    )
    found: list[Row] = []
    for name, section in sections:
        say(f"{name}: {checkout.path.name} {checkout.commit[:12]} in {checkout.python}")
        try:
            found += section()
        except Halt as halt:
            if not found:
                raise
            found.append(Row(name, "DIFFERENT", "did not run", "", halt.message))
    return Report(checkout, size, settings, tuple(found))


def _free_gib() -> float | None:
    """Memory that a new program may take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)


def headline(report: Report) -> str:
    """One line: against what, under which settings, how it came out."""
    counts = Counter(row.verdict for row in report.rows)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    checkout = report.checkout
    return f"{checkout.path.name} at {checkout.commit[:12]} ({checkout.date}), size {report.size}, {report.settings}: {told}"


def describe(report: Report) -> str:
    """The table as text."""
    lines = [headline(report), ""]
    for row in report.rows:
        lines.append(f"{row.verdict:<9}  {row.name}: {row.measured}".rstrip(": "))
        lines.append(f"{'':<11}{f'tolerance {row.tolerance}; ' if row.tolerance else ''}{row.reason}")
    return "\n".join(lines)


def page(report: Report) -> str:
    """The table as one HTML file that needs nothing else."""
    title = html.escape(headline(report))
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "\n".join(
        f'<tr class="{row.verdict.split()[0]}">'
        + "".join(f"<td>{html.escape(text)}</td>" for text in (row.verdict, row.name, row.measured, row.tolerance, row.reason))
        + "</tr>"
        for row in report.rows
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>Parity with the original trainer</h1><p>{title}</p><table><tr>{head}</tr>\n{body}\n</table></html>\n"
    )


_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.4 system-ui,sans-serif;margin:2em;max-width:80em}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.3em .8em;border-bottom:1px solid #8884}"
    ".equal td:first-child{color:#287a3c}.known td:first-child{color:#9a6a00}.DIFFERENT td{color:#c0222b;font-weight:600}.not td{opacity:.6}"
)
