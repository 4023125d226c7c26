"""A prepared set whose captions have all parts: posts in a vocabulary with a tail, and texts with tails and sentences."""

from __future__ import annotations

from pathlib import Path

import preparedset
from oddimages import drawn, encoded

VOCABULARY = """
quality: {words: [great, poor], criterion: absolute, cuts: [20]}
rating: {g: [safe], s: [safe], q: [lewd], e: [lewd]}
order: {fixed: [count, character, series], flexible: [artist, general, meta, rating], tail: [quality]}
"""
TEXTS = {
    "full": "my oc ||| standing, smile, hat, river, boat ||| grainy\nA boat lies on the river, and she looks at it.",
    "told": "She stands on a bridge and waves at a boat.",
    "plain": "my oc ||| sitting, chair, table, " + ", ".join(f"zzzz{number}" for number in range(30)),
    "pair": "my oc ||| running, park\nShe runs through the park with her dog.\nThe dog is faster than she is.",
}


def write(folder: Path, *, posts: int = 4) -> Path:
    """The set, prepared, in data/set below the folder; its stage is pretrain."""
    preparedset.write_posts(folder / "pictures", posts)
    (folder / "texts").mkdir()
    for number, (name, text) in enumerate(TEXTS.items()):
        (folder / f"texts/{name}.png").write_bytes(encoded(drawn(100, 100, seed=90 + number), "PNG"))
        (folder / f"texts/{name}.txt").write_text(text)
    preparedset.write_vae(folder / "vae")
    (folder / "words.yaml").write_text(VOCABULARY)
    (folder / "dataset.yaml").write_text(
        f"sources:\n  - {{name: booru, adapter: danbooru, path: {folder / 'pictures'}}}\n"
        f"  - {{name: texts, adapter: sidecar, path: {folder / 'texts'}, on_second_separator: tail, assume_rating: g}}\n"
        f"policy: {{vocabulary: {folder / 'words.yaml'}}}\nselect:\n  pretrain: {{min_bucket: 2}}\n"
    )
    steps = ("ingest", "probe", "dedupe", "label", "select", "latents")
    preparedset.prepare(preparedset.settings_of(folder), *steps)
    return folder / "data/set"
