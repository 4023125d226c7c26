"""Sample pictures of the report: strips over the updates of one run, and the same prompt across stages."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from train.tools.page_data import Picture, Run

SIDE_PX = 200  # longest side of a picture in the page
MOST_COLUMNS = 8  # of a strip; more updates are thinned out, first and last kept
MOST_PROMPTS = 24


def strips(run: Run) -> str:
    """For each prompt its pictures from the first sampled update to the last; EMA below raw where there is one."""
    if not run.samples:
        return ""
    updates = spaced(sorted(run.samples), MOST_COLUMNS)
    last = run.samples[updates[-1]]
    rows = []
    for wanted in last[:MOST_PROMPTS]:
        cells = []
        for update in updates:
            found = [p for p in run.samples[update] if p.same == wanted.same and p.ema == wanted.ema]
            if found:
                cells.append(cell(found[0], f"update {update:,}"))
        rows.append(row(wanted, cells))
    return f"<h3>{escape(run.name)}</h3>{''.join(rows)}"


def comparison(runs: Sequence[Run], others: Mapping[str, list[Picture]]) -> str:
    """The same prompt, seed and size in every stage's last samples; only prompts that two or more have."""
    columns = [(name, [p for p in pictures if not p.ema]) for name, pictures in others.items()]
    columns += [(run.name, run.newest_pictures()) for run in runs]
    columns = [(name, pictures) for name, pictures in columns if pictures]
    if len(columns) < 2:
        return ""
    rows = []
    for wanted in columns[-1][1][:MOST_PROMPTS]:
        cells = []
        for name, pictures in columns:
            found = [picture for picture in pictures if picture.same == wanted.same]
            if found:
                cells.append(cell(found[0], name))
        if len(cells) > 1:
            rows.append(row(wanted, cells))
    return "".join(rows)


def spaced(items: Sequence[int], most: int) -> list[int]:
    """At most `most` items spread evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def row(picture: Picture, cells: Sequence[str]) -> str:
    """A prompt and its pictures."""
    facts = ", ".join(f"{name.lower()} {picture.facts[name]}" for name in ("Seed", "Size") if name in picture.facts)
    average = " (EMA)" if picture.ema else ""
    shown = escape(picture.prompt or picture.path.stem)
    return f'<p class="prompt">{shown} <small>{escape(facts)}{average}</small></p>' \
           f'<div class="pictures">{"".join(cells)}</div>'  # fmt: skip


def cell(picture: Picture, caption: str) -> str:
    """One picture, small, inside the page itself."""
    try:
        with Image.open(picture.path) as image:
            small = image.convert("RGB")
    except OSError:
        return ""
    scale = min(SIDE_PX / max(small.size), 1.0)
    size = (max(round(small.width * scale), 1), max(round(small.height * scale), 1))
    small = small.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(picture.prompt)}" width="{size[0]}" height="{size[1]}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )
