"""Whatever text a page is given stays text: in every piece, in every place."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from train.prepare.health.pages import html, joined, page
from train.tools.report.charts import COLOURS, as_file, bar_chart, line_chart

BAD = "<script>alert(1)</script>\"'&"
PIECES = {
    "h3": (BAD,), "p": (BAD, BAD), "span": (BAD, BAD), "small": (BAD,), "coloured": (BAD, BAD), "code": (BAD, BAD),
    "div": ([BAD, BAD], BAD), "lines": ([BAD, BAD],), "listed": ([BAD, BAD], BAD), "picture": (BAD, BAD, (BAD, BAD)),
    "chart": (BAD, BAD), "figure": (BAD, BAD), "bar": (BAD,), "table": ([BAD], [[BAD], [BAD]], [True]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_pieces_escape(name: str) -> None:
    made = getattr(html, name)(*PIECES[name])
    assert isinstance(made, Markup)
    assert "<script" not in made
    assert "&lt;script&gt;" in made
    assert '"\'' not in made


def test_every_piece_is_tried() -> None:
    assert {name for name in dir(html) if not name.startswith("_")} - {"marked"} == set(PIECES)


def test_what_is_markup_already_is_kept() -> None:
    assert html.p(html.code("a&b")) == "<p><code>a&amp;b</code></p>"
    assert joined(["<", html.small(">")]) == "&lt;<small>&gt;</small>"


def test_pages_and_charts_escape() -> None:
    made = page(BAD, "report.css", BAD, [("one", BAD, BAD)])
    assert made.startswith("<!doctype html>")
    assert "default-src 'none'" in made
    assert "script>" not in made.replace("script&gt;", "")
    lines = [(BAD, COLOURS[0], [(0.0, 1.0), (1.0, 2.0)])]
    for chart in (as_file(BAD, lines, y_range=(0.0, 2.0)), line_chart(lines, label=BAD), line_chart([], label=BAD),
                  bar_chart([BAD], [(BAD, COLOURS[0], [1.0])], label=BAD)):  # fmt: skip
        assert "<script" not in chart
        assert ElementTree.fromstring(chart).tag.endswith("svg")
