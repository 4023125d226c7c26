"""Pieces of the report's HTML: tables, figures, numbers, the style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.base.secrets import mask
from train.observe.runs import Run, finite
from train.tools.report.charts import COLOURS


def anchor(name: str) -> str:
    """An id for a section."""
    return name.lower().replace(" ", "-")


def digest(value: Any) -> str:
    """A hash, shortened, the whole of it as tooltip."""
    return f' <code title="{escape(str(value))}">{escape(str(value)[:10])}</code>' if value else ""


def name_of(run: Run, number: int) -> str:
    """The run's name in its colour."""
    return f'<b style="color:{COLOURS[number % len(COLOURS)]}">{escape(run.name)}</b>'


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
    return f'<span class="tight">{shown}{spread} ({escape(str(record.get("images", "?")))})</span>'


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


# A caption wraps at its picture's width: the columns of raw and averaged weights stand under one another.
# Paper does not scroll: long settings such as paths wrap anywhere there, in that table alone, so that no number breaks.
STYLE = """
:root{font:15px/1.5 system-ui,sans-serif;color:#1f2937;background:#fff}
body{margin:0 auto;max-width:1180px;padding:0 24px 48px}
header{border-bottom:1px solid #e5e7eb;margin-bottom:8px}h1{font-size:1.6rem;margin:28px 0 0}
header p{margin:2px 0;color:#6b7280}nav{display:flex;flex-wrap:wrap;gap:16px;padding:8px 0 12px}nav a{color:#2563eb}
h2{font-size:1.25rem;margin:36px 0 10px}h3{font-size:1rem;margin:22px 0 6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:12px}
figure{margin:0;max-width:560px;min-width:0}figcaption{font-size:.85rem;overflow-wrap:anywhere}svg{width:100%;height:auto;display:block}
svg text{font:10px system-ui,sans-serif;fill:#6b7280}svg .y{text-anchor:end}svg .x,svg .none{text-anchor:middle}
svg .rule{stroke:#e5e7eb}svg polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}svg .raw{fill:#a3b1c4}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid #f1f5f9;vertical-align:top}
th{color:#6b7280;font-weight:600;white-space:nowrap}code{font:12px ui-monospace,monospace}
.pictures{display:flex;gap:8px;overflow-x:auto;padding-bottom:4px;align-items:flex-start}
.pictures figure{flex:0 0 auto}.pictures img{display:block;border-radius:3px}
.pictures figcaption{color:#6b7280;width:0;min-width:100%}
.prompts{display:flex;flex-wrap:wrap;gap:18px 36px}.prompts>div{max-width:100%;min-width:260px}
.prompt{margin:0 0 4px;font-size:.85rem;width:0;min-width:100%;overflow-wrap:anywhere}.prompt small{color:#6b7280;white-space:nowrap}
section>p,.told{color:#6b7280;font-size:.85rem;max-width:860px}.told{padding-left:18px}
.good,.bad,.tight{white-space:nowrap}.good{color:#047857}.bad{color:#b91c1c}.dim{color:#9ca3af}th:first-child,td:first-child{white-space:nowrap}
b{display:inline-block;max-width:20em;overflow-wrap:break-word;white-space:normal;vertical-align:top}h1{overflow-wrap:anywhere}
@media print{body{max-width:none;padding:0;font-size:11px}nav{display:none}a{color:inherit}
h2,h3,h2+p,h3+p,.prompt{break-after:avoid}figure,tr,p,.prompts>div{break-inside:avoid}.scroll,.pictures{overflow:visible}
#configuration :is(td,b){overflow-wrap:anywhere}
.pictures{flex-wrap:wrap}.charts{grid-template-columns:repeat(3,1fr)}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
