"""Sample pictures of the report: strips over the updates of one run, and the same prompt across stages."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from PIL import Image

from train.observe.runs import Picture, Run, newest_of_each
from train.prepare.health.pages import html, joined
from train.recipe import captions

SIDE_PX = 200  # longest side of a picture in the page
SMALL_PX = 112  # pictures of a tiny model are shown this large, scaled by the browser
MOST_COLUMNS = 8  # of a strip; more updates are thinned out, first and last kept
MOST_PROMPTS = 24


def strips(run: Run) -> str:
    """For each prompt its pictures from the first sampled update to the last; EMA below raw where there is one."""
    if not run.samples:
        return ""
    updates = spaced(sorted(run.samples), MOST_COLUMNS)
    every = newest_of_each([p for p in run.samples[update] if not p.ema] for update in reversed(updates))
    common = shared_tags([picture.prompt for picture in every])
    rows = []
    for wanted in every[:MOST_PROMPTS]:
        raw, average = (
            [
                cell(found[0], ", ".join(filter(None, (f"update {update:,}{' (EMA)' if ema else ''}", run.epoch_of(update)))))
                for update in updates
                if (found := [p for p in run.samples[update] if p.same == wanted.same and p.ema == ema])
            ]
            for ema in (False, True)
        )
        rows.append(row(wanted, raw, common, below=average))
    return joined([html.h3(run.name), _told(common), html.div(rows, "prompts")])


def comparison(runs: Sequence[Run], others: Mapping[str, list[Picture]]) -> str:
    """The same prompt, seed and size in the base and in every stage's last samples, side by side; without any, how to get them.

    A column that only it has a prompt of is shown as well: the pictures of one run are better than none.
    """
    columns = [(name, [p for p in pictures if not p.ema]) for name, pictures in others.items()]
    if (before := _before(runs, set(others))) is not None:
        columns.append(before)
    for run in runs:
        columns += [(run.name, run.newest_pictures()), (f"{run.name} (EMA)", run.newest_pictures(ema=True))]
    columns = [(name, pictures) for name, pictures in columns if pictures]
    if not columns:
        return Markup(html.p(joined(["None: ", *_HOW])))
    common = shared_tags([picture.prompt for picture in columns[-1][1]])
    wanted = [*{picture.same: picture for _, pictures in reversed(columns) for picture in pictures}.values()]
    rows: dict[int, list[str]] = {}
    for one in wanted:
        found = [(name, [picture for picture in pictures if picture.same == one.same]) for name, pictures in columns]
        cells = [cell(pictures[0], name) for name, pictures in found if pictures]
        rows.setdefault(-len(cells), []).append(row(one, cells, common))  # what most stages have comes first
    every = [made for count in sorted(rows) for made in rows[count]]
    told = [_told(common), html.div(every[:MOST_PROMPTS], "prompts")]
    if len(every) > MOST_PROMPTS:
        told.append(html.p(f"The first {MOST_PROMPTS} of {len(every)} prompts; all pictures lie in the runs' samples/."))
    if len(columns) == 1:
        told.append(html.p(joined(["Beside another model's: ", *_HOW])))
    return joined(told)


_HOW = (
    "the same prompts are drawn from the base with ", Markup(html.code("sampling.at_start=true")), ", from every stage with ",
    Markup(html.code("sampling.every_steps")), ", and afterwards from any model by ",
    Markup(html.code("scripts/sample.py --model M --out DIR")), " for ", Markup(html.code("report.py --samples NAME=DIR")), ".",
)  # fmt: skip


def _before(runs: Sequence[Run], taken: set[str]) -> tuple[str, list[Picture]] | None:
    """What the first run started from, by the name of the stage that made it, else as the base; None where it drew none, or `--samples` has it."""
    first = next((run for run in runs if run.samples), None)
    pictures = [p for p in first.samples.get(0, []) if not p.ema] if first else []
    if first is None or not pictures:
        return None
    parent = first.lineage.get("parent")
    known = parent if isinstance(parent, dict) else {}
    name = str(known.get("stage") or "base")
    name = name if name not in {run.name for run in runs} else f"before {first.name}"
    return None if name in taken else (name, pictures)


def spaced(items: Sequence[int], most: int) -> list[int]:
    """At most `most` items spread evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def shared_tags(prompts: Sequence[str]) -> list[str]:
    """The tags that every prompt starts with, such as a quality prefix: shown once instead of in every row."""
    split = [captions.split(prompt)[1] for prompt in prompts]
    if len(split) < 2:
        return []
    common = []
    for tags in zip(*split, strict=False):
        if len(set(tags)) > 1:
            break
        common.append(tags[0])
    return common if all(len(tags) > len(common) for tags in split) else []


def _told(common: Sequence[str]) -> str:
    return Markup(html.p(f"Every prompt starts: {', '.join(common)}")) if common else ""


def row(picture: Picture, cells: Sequence[str], common: Sequence[str] = (), *, below: Sequence[str] = ()) -> str:
    """A prompt, less the tags that all have in common, its pictures, and a second line of them."""
    facts = ", ".join(f"{name.lower()} {picture.facts[name]}" for name in ("Seed", "Size") if name in picture.facts)
    tags = captions.split(picture.prompt)[1]
    shown = captions.join(tags[len(common) :]) if common else picture.prompt
    heading = html.p(joined([shown or picture.path.stem, " ", html.small(facts)]), "prompt")
    return Markup(html.div([heading, *(html.div(line, "pictures") for line in (cells, below) if line)]))


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
    larger = max(SMALL_PX / max(size), 1.0)
    width, height = (round(side * larger) for side in size)
    return Markup(html.figure(html.picture(data, picture.prompt, (width, height)), caption))
