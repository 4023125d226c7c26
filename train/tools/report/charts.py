"""Charts as inline SVG: nothing is loaded, everything prints sharp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from markupsafe import Markup, escape

from train.prepare.health.pages import render

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 26
POINTS = 300  # per line; more cannot be told apart at this size
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d")


Points = Sequence[tuple[float, float]]
Range = tuple[float, float]


def colour_of(number: int) -> str:
    """Of the run with this number, in every chart and name."""
    return COLOURS[number % len(COLOURS)]


def line_chart(
    series: Sequence[tuple[str, str, Points]],
    *,
    label: str,
    x_range: Range | None = None,
    y_range: Range | None = None,
    log: bool = False,
    spread: Points = (),
    nothing: str = "no data",
) -> Markup:
    """An SVG of named lines (name, colour, points); `spread` is drawn faintly behind them, raw values as dots.

    `log` makes the y axis logarithmic where every value is above 0. Without points it says `nothing`.
    """
    everything = [point for _, _, points in series for point in points] + list(spread)
    if not everything:
        return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}: {nothing}">'
                      f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" class="none">{nothing}</text></svg>')  # fmt: skip
    x_low, x_high = x_range or extent([x for x, _ in everything])
    y_low, y_high = y_range or extent([y for _, y in everything])
    log = log and y_low > 0
    across = _scale((x_low, x_high), (LEFT, WIDTH - RIGHT), log=False)
    up = _scale((y_low, y_high), (HEIGHT - BOTTOM, TOP), log=log)
    parts = _ruled(label, up, log_ticks(y_low, y_high) if log else ticks(y_low, y_high))
    for value in ticks(x_low, x_high, 4):
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - 8}" class="x">{number(value)}</text>')
    for x, y in thin(spread):
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(_inside(y, y_low, y_high)):.1f}" r="0.9" class="raw"/>')
    for name, colour, points in series:
        path = " ".join(f"{across(x):.1f},{up(_inside(y, y_low, y_high)):.1f}" for x, y in thin(points))
        parts.append(f'<polyline points="{path}" stroke="{colour}"><title>{escape(name)}</title></polyline>')
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" fill="{colour}"/>')
    return Markup("".join([*parts, "</svg>"]))


def bar_chart(
    groups: Sequence[str],
    bars: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    label: str,
    high: float | None = None,
) -> Markup:
    """An SVG of grouped bars from 0 to `high`: (name, colour, one value per group or None)."""
    values = [value for _, _, row in bars for value in row if value is not None]
    if not values:
        return line_chart([], label=label)
    high = high or max(values) or 1.0
    up = _scale((0.0, high), (HEIGHT - BOTTOM, TOP), log=False)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = slot * 0.8 / len(bars)
    parts = _ruled(label, up, ticks(0.0, high))
    for place, group in enumerate(groups):
        parts.append(f'<text x="{LEFT + (place + 0.5) * slot:.1f}" y="{HEIGHT - 8}" class="x">{escape(group)}</text>')
        for at, (name, colour, row) in enumerate(bars):
            value = row[place]
            if value is not None:
                x, y = LEFT + place * slot + slot * 0.1 + at * width, up(value)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - y:.1f}" '
                    f'fill="{colour}"><title>{escape(name)}: {number(value)}</title></rect>'
                )
    return Markup("".join([*parts, "</svg>"]))


def _ruled(label: str, up: Callable[[float], float], marks: Sequence[float]) -> list[str]:
    """The beginning of a chart: its frame, and a line with a number for each mark of the y axis."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in marks:
        y = up(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="y">{number(value)}</text>')
    return parts


def as_file(title: str, series: Sequence[tuple[str, str, Points]], *, y_range: Range) -> str:
    """A line chart with title and legend as the text of an SVG file, light or dark as its viewer is."""
    chart, legend = line_chart(series, label=title, y_range=y_range), [(name, colour) for name, colour, _ in series]
    return render("chart.svg", title=title, legend=legend, chart=chart, width=WIDTH, height=HEIGHT, left=LEFT)


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Centred running mean over `window` points (an even number counts one more), shorter at the ends.

    Sums run to the end of every block of that width and from its start, and a window is put together from two of
    them: nothing is taken away again, so one huge value leaves the digits of all windows without it alone.
    """
    values, half = [y for _, y in points], window // 2
    width = 2 * half + 1
    blocks = [values[start : start + width] for start in range(0, len(values), width)]
    from_start = [total for block in blocks for total in accumulate(block)]
    to_end = [total for block in blocks for total in [*accumulate(reversed(block))][::-1]]
    result = []
    for place, (x, _) in enumerate(points):
        low, high = max(place - half, 0), min(place + half, len(points) - 1)
        if low // width < high // width:
            total = to_end[low] + from_start[high]
        else:  # the window is the start of a block, or the end of the last
            total = from_start[high] if low % width == 0 else to_end[low]
        result.append((x, total / (high - low + 1)))
    return result


def thin(points: Points, most: int = POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: of every run of neighbours its lowest and highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most / 2))
    kept = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        kept += sorted({min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})
    return kept


def extent(values: Sequence[float]) -> Range:
    """(lowest, highest), widened when they are equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * abs(high):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, at most about `most`."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`; plain ticks when fewer than two fall there."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [mark for mark in marks if low <= mark <= high]
    if len(found) > 7:
        found = [mark for mark in found if str(mark / 10.0 ** math.floor(math.log10(mark) + 1e-9)).startswith("1")]
    return found if len(found) >= 2 else ticks(low, high)


def number(value: float) -> str:
    """Short text: 0.033, 12k, 1e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _inside(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _scale(domain: Range, span: Range, *, log: bool) -> Callable[[float], float]:
    change: Callable[[float], float] = math.log10 if log else float
    low, high = change(domain[0]), change(domain[1])
    return lambda value: span[0] + (change(value) - low) / (high - low) * (span[1] - span[0])
