"""The pictures of the report: which may stand on it, and small copies of them."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.choosing.facts import between
from train.prepare.health.browser import Shown
from train.prepare.images.decode import DECODE_VERSION
from train.prepare.images.looks import Look, Thumb, thumbnail
from train.prepare.probe import ok_files
from train.prepare.tables.pool import Pool
from train.prepare.tables.progress import bar
from train.prepare.tables.schemas import RECORDS
from train.prepare.tables.units import config_id, read_table, stream_table, write_parquet

CARD_PX, CARD_QUALITY = 128, 60  # of the caption browser: about 3 KB each
SAFE = ("g", "s")
THUMBNAILS = "thumbnails.parquet"
_KEPT = pa.schema([("key", pa.string()), ("sha256", pa.string()), ("jpeg", pa.binary())])


def showable(settings: DatasetConfig) -> tuple[pa.Table, dict[str, Any]]:
    """(records whose picture may stand on the page, how many others there are and why): sound, not hard-excluded, and of a
    rating that `report.pictures` allows.

    Columns key, source, uri, member, by key; {"unrated": {source: pictures}, "rated": pictures}.
    """
    dataset, places = dataset_dir(settings), ["key", "source", "uri", "member"]
    sound = ok_files(settings, ["key"]).column("key").combine_chunks()
    refused = read_table(dataset, "select", ["key"]).column("key").combine_chunks()
    safe = [source.name for source in settings.sources if source.assume_rating in SAFE]
    parts = [pa.schema([RECORDS.field(name) for name in places]).empty_table()]
    unrated, rated = Counter[str](), 0
    for part in stream_table(dataset, "records", [*places, "rating", "hard_exclusion"]):
        keys = part.column("key")
        found = pc.and_(pc.is_in(keys, value_set=between(sound, keys)), pc.invert(pc.is_in(keys, value_set=refused)))
        part = part.filter(pc.and_(found, pc.is_null(part.column("hard_exclusion"))))
        rating = part.column("rating").cast(pa.string())
        assumed = pc.and_(pc.is_null(rating), pc.is_in(part.column("source"), value_set=pa.array(safe, pa.string())))
        allowed = pc.or_(pc.is_in(rating, value_set=pa.array(SAFE)), assumed)
        if settings.report.pictures != "safe":
            allowed = pa.array([settings.report.pictures == "all"] * len(part), pa.bool_())
        else:
            left = part.filter(pc.invert(allowed))
            nothing = pc.is_null(left.column("rating"))
            unrated.update(left.filter(nothing).column("source").to_pylist())
            rated += len(left) - (pc.sum(nothing).as_py() or 0)
        parts.append(part.filter(allowed).select(places).cast(parts[0].schema))
    return pa.concat_tables(parts), {"unrated": dict(sorted(unrated.items())), "rated": rated}


def pictures_of(settings: DatasetConfig, facts: Mapping[str, Any], shown: pa.Table, browser: Shown | None) -> dict[str, bytes]:
    """JPEGs of every picture the page's sections show; keys of `crop/<key>` have the crop drawn in.

    The browser's pictures get each its `thumb`. What an earlier call made of those is kept beside the tables.
    """
    duplicates = (key for kind in facts["duplicates"].values() for group in kind["examples"] for key in group[:4])
    keys = [*(sample["key"] for sample in facts["samples"]), *duplicates,
            *(row["key"] for row in facts["sizes"]["enlarged_worst"])]  # fmt: skip
    cards = [] if browser is None else [one["key"] for one in browser["pictures"]]
    looks = _looks(settings, shown, [*keys, *cards, *(row["key"] for row in facts["crop"]["worst"])])
    jobs: dict[tuple[str, str], Thumb] = {("page", key): Thumb(looks[key], None) for key in keys if key in looks}
    for row in facts["crop"]["worst"]:
        if row["key"] in looks:
            left, top = row["crop_left"] / row["resized_w"], row["crop_top"] / row["resized_h"]
            box = (left, top, left + row["bucket_w"] / row["resized_w"], top + row["bucket_h"] / row["resized_h"])
            jobs["page", f"crop/{row['key']}"] = Thumb(looks[row["key"]], box)
    kept = Kept(settings, [key for key in cards if key in looks])
    jobs |= {("card", key): Thumb(looks[key], None, CARD_PX, CARD_QUALITY) for key in kept.missing}
    made = _made(settings, jobs)
    if browser is not None:
        thumbs = kept.with_new({key: data for (where, key), data in made.items() if where == "card"})
        for one in browser["pictures"]:
            if one["key"] in thumbs:
                one["thumb"] = base64.b64encode(thumbs[one["key"]]).decode()
    return {key: data for (where, key), data in made.items() if where == "page"}


class Kept:
    """Thumbnails that an earlier report made of the same files."""

    def __init__(self, settings: DatasetConfig, keys: Sequence[str]) -> None:
        self.path = dataset_dir(settings) / THUMBNAILS
        self.mark = config_id(px=CARD_PX, quality=CARD_QUALITY, code=DECODE_VERSION)
        sound = ok_files(settings, ["key", "sha256"])
        sound = sound.filter(pc.is_in(sound["key"], value_set=pa.array(keys, pa.string())))
        self.hashes = dict(zip(sound["key"].to_pylist(), sound["sha256"].to_pylist(), strict=True))
        self.found = {row["key"]: row["jpeg"] for row in self._read() if self.hashes.get(row["key"]) == row["sha256"]}
        self.missing = [key for key in keys if key not in self.found]

    def _read(self) -> list[dict[str, Any]]:
        try:
            table = pq.read_table(self.path)
        except (OSError, pa.ArrowInvalid):
            return []
        return table.to_pylist() if (table.schema.metadata or {}).get(b"mark") == self.mark.encode() else []

    def with_new(self, made: Mapping[str, bytes]) -> dict[str, bytes]:
        """All of them by key, kept for the next report."""
        thumbs = {**self.found, **made}
        rows = [{"key": key, "sha256": self.hashes[key], "jpeg": thumbs[key]} for key in sorted(thumbs)]
        write_parquet(self.path, pa.Table.from_pylist(rows, schema=_KEPT), {"mark": self.mark})
        return thumbs


def _looks(settings: DatasetConfig, shown: pa.Table, keys: Sequence[str]) -> dict[str, Look]:
    """Where those of `keys` lie that may be shown."""
    sources = {source.name: source for source in settings.sources}
    rows = shown.filter(pc.is_in(shown.column("key"), value_set=pa.array(keys, pa.string()))).to_pylist()
    return {row["key"]: Look(sources[row["source"]], settings.probe, row["uri"], row["member"]) for row in rows}


def _made(settings: DatasetConfig, jobs: Mapping[tuple[str, str], Thumb]) -> dict[tuple[str, str], bytes]:
    results: dict[tuple[str, str], bytes] = {}
    if not jobs:
        return results
    with Pool.of_pictures(thumbnail, settings) as pool, bar(len(jobs), "report: pictures", "pictures") as shown_bar:
        for name, data in zip(jobs, pool.map(list(jobs.values())), strict=True):
            if isinstance(data, bytes):
                results[name] = data
            shown_bar.update()
    return results
