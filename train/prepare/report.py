"""Step `report`: is this dataset fit to train on? report.json, report.html, and an exit code that says so."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.choosing.facts import among, between
from train.prepare.health.facts import Facts, gather
from train.prepare.health.page import counted, number, page
from train.prepare.images.looks import Look, Thumb, thumbnail
from train.prepare.probe import ok_files
from train.prepare.tables.pool import Pool
from train.prepare.tables.progress import bar
from train.prepare.tables.quarantine import Complaint, too_many
from train.prepare.tables.schemas import RECORDS
from train.prepare.tables.units import merge_quarantine, read_table, row_hash, stream_table, sweep, write_text
from train.prepare.tables.workers import Peers
from train.recipe.captions import Caption, DrawOptions, draw_captions, render
from train.recipe.rng import uid_of

SAMPLES = 24  # pictures in the grid of random ones
SHUFFLES = 5  # captions shown with their shuffles
_SAFE = ("g", "s")


def run(settings: DatasetConfig) -> None:
    """Write both files. Raises Complaint(MISMATCH) naming every limit of `report.fail_if` that is broken."""
    dataset = dataset_dir(settings)
    with Peers(dataset) as peers:
        if peers.rank != 0:  # reads all, writes two files: one process's work
            return
        merge_quarantine(dataset)
        sweep(dataset)
        facts = gather(settings)
        facts["checks"] = checks(settings, facts)
        facts["samples"] = _samples(settings)
        facts = {"schema": 1, "name": settings.name, **facts}
        write_text(dataset / "report.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        write_text(dataset / "report.html", page(facts, _pictures(settings, facts)))
    broken = [check for check in facts["checks"] if not check["ok"]]
    print(f"report: {dataset / 'report.html'}: " + (f"{counted(len(broken), 'limit', 'limits')} broken" if broken else "healthy"))
    if broken:
        names = "; ".join(
            f"report.fail_if.{c['name']}: {number(c['value'])} > {number(c['limit'])} ({c['what']})" for c in broken
        )
        raise Complaint(ExitCode.MISMATCH, f"report: {names}: see {dataset / 'report.html'}")


def checks(settings: DatasetConfig, facts: Facts) -> list[Facts]:
    """Every limit with the value found."""
    limits = settings.report.fail_if
    captions, records = facts["captions"], max(facts["counts"]["records"], 1)
    tokens = captions["tokens"] or {"over_225": 0, "rows": 0}
    best = next(iter(facts["words"]["quality"]), "the best quality word")  # of the set's vocabulary
    crop = max((stage["crop_loss"]["mean"] for stage in facts["buckets"].values()), default=0.0)
    found: list[tuple[str, float, float, int | None, str]] = [  # key, limit, count, of how many (None: no share), what it is
        ("hard_excluded", limits.hard_excluded, captions["hard_excluded"], None, "hard-excluded rows in a selection"),
        ("quarantine_errors", limits.quarantine_errors, facts["quarantine"]["errors"], records, "share of records that are broken"),
        ("missing_rating", limits.missing_rating, *_missing_rating(settings), "share without rating, in sources that carry ratings"),
        ("over_225_tokens", limits.over_225_tokens, tokens["over_225"], tokens["rows"], "share of captions over 225 tokens"),
        ("empty_captions", limits.empty_captions, captions["empty"], captions["rows"], "share of empty captions"),
        ("masterpiece", limits.masterpiece, *_of_the_best(settings, facts, best), f"largest share of {best} within a rating"),
        ("crop_loss", limits.crop_loss, crop, None, "largest mean share of a selection's area that the crop cuts away"),
        ("unreadable_latents", limits.unreadable_latents, facts["latents"]["unreadable"], None, "index rows without readable latent"),
    ]
    return [_check(name, count, total, limit, what) for name, limit, count, total, what in found]


def _check(name: str, count: float, total: int | None, limit: float, what: str) -> Facts:
    value = round(count / max(total or 1, 1), 6)
    ok = count <= limit if total is None else not too_many(count, total, limit)
    if ok and value > limit:
        what += f", {number(count)} of {total} here: too few to judge by"
    return {"name": name, "value": value, "limit": limit, "what": what, "ok": ok}


def _missing_rating(settings: DatasetConfig) -> tuple[int, int]:
    """(records without rating, all records) of the sources that carry ratings."""
    records = read_table(dataset_dir(settings), "records", ["source", "rating"])
    rated = pc.is_valid(records.column("rating"))
    carrying = pc.unique(records.column("source").filter(rated))
    rows = pc.sum(pc.is_in(records.column("source"), value_set=carrying)).as_py() or 0
    return rows - (pc.sum(rated).as_py() or 0), rows


def _of_the_best(settings: DatasetConfig, facts: Facts, best: str) -> tuple[int, int]:
    """(rows with the best quality word, all) of the rating with the largest share of them."""
    crossed = facts["balance"]["all sound files"]["quality_by_rating"]
    sums = {rating: sum(words.values()) for rating, words in crossed.items()}
    least = settings.policy.quality.min_group
    counts = [(words.get(best, 0), sums[rating]) for rating, words in crossed.items() if sums[rating] >= least]
    return max(counts, key=lambda pair: pair[0] / max(pair[1], 1), default=(0, 1))


def _samples(settings: DatasetConfig) -> list[Facts]:
    """Random pictures of the largest selection with their captions: the same ones for the same data."""
    shown, dataset = _showable(settings).column("key").combine_chunks(), dataset_dir(settings)
    found: list[tuple[int, str, Facts]] = []
    for part in stream_table(dataset, "labels", ["key", "fixed_tags", "flex_tags", "tail_tags", "prose"]):
        part = among(part, shown)
        marks = [(row_hash(settings.seed, "sample", key), row) for row, key in enumerate(part.column("key").to_pylist())]
        best = heapq.nsmallest(SAMPLES, marks)
        rows = part.take(pa.array([row for _, row in best], pa.int64())).to_pylist()
        found = heapq.nsmallest(SAMPLES, [*found, *((m, r["key"], r) for (m, _), r in zip(best, rows, strict=True))])
    by_key = {key: row for _, key, row in found}
    picked = list(by_key)
    samples = []
    for place, key in enumerate(picked):
        fixed, flex = by_key[key]["fixed_tags"], by_key[key]["flex_tags"]
        tail, prose = (by_key[key][name] or [] for name in ("tail_tags", "prose"))
        sample: Facts = {"key": key, "text": render(fixed, flex, tail, prose)}
        if place < SHUFFLES:
            sample["shuffles"] = [_shuffled(Caption(fixed, flex, tail, prose), key, epoch) for epoch in range(3)]
        samples.append(sample)
    return samples


def _shuffled(caption: Caption, key: str, epoch: int) -> str:
    drawn = draw_captions([caption], DrawOptions(), seed=0, uids=[uid_of(key)], epochs=[epoch], update=0)[0]
    return ", ".join([*drawn.fixed, *drawn.flex, *drawn.after])


def _showable(settings: DatasetConfig) -> pa.Table:
    """Records whose picture may stand on the page: sound, not hard-excluded, and of a rating that `pictures` allows.

    Columns key, source, uri, member, by key.
    """
    dataset, places = dataset_dir(settings), ["key", "source", "uri", "member"]
    sound = ok_files(settings, ["key"]).column("key").combine_chunks()
    refused = read_table(dataset, "select", ["key"]).column("key").combine_chunks()
    safe = [source.name for source in settings.sources if source.assume_rating in _SAFE]
    parts = [pa.schema([RECORDS.field(name) for name in places]).empty_table()]
    for part in stream_table(dataset, "records", [*places, "rating", "hard_exclusion"]):
        keys, rating = part.column("key"), part.column("rating").cast(pa.string())
        assumed = pc.and_(pc.is_null(rating), pc.is_in(part.column("source"), value_set=pa.array(safe, pa.string())))
        allowed = pc.or_(pc.is_in(rating, value_set=pa.array(_SAFE)), assumed)
        if settings.report.pictures != "safe":
            allowed = pa.array([settings.report.pictures == "all"] * len(part))
        found = pc.and_(pc.is_in(keys, value_set=between(sound, keys)), pc.invert(pc.is_in(keys, value_set=refused)))
        kept = part.filter(pc.and_(pc.and_(allowed, found), pc.is_null(part.column("hard_exclusion"))))
        parts.append(kept.select(places).cast(parts[0].schema))
    return pa.concat_tables(parts)


def _pictures(settings: DatasetConfig, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """JPEG thumbnails of every picture the page shows; keys of `crop/<key>` have the crop drawn in."""
    duplicates = (key for kind in facts["duplicates"].values() for group in kind["examples"] for key in group[:4])
    keys = [*(sample["key"] for sample in facts["samples"]), *duplicates,
            *(row["key"] for row in facts["sizes"]["enlarged_worst"])]  # fmt: skip
    wanted = pa.array([*keys, *(row["key"] for row in facts["crop"]["worst"])], pa.string())
    shown, sources = _showable(settings), {source.name: source for source in settings.sources}
    looks = {
        row["key"]: Look(sources[row["source"]], settings.probe, row["uri"], row["member"])
        for row in shown.filter(pc.is_in(shown.column("key"), value_set=wanted)).to_pylist()
    }
    jobs = {key: Thumb(looks[key], None) for key in keys if key in looks}
    for row in facts["crop"]["worst"]:
        if row["key"] in looks:
            left, top = row["crop_left"] / row["resized_w"], row["crop_top"] / row["resized_h"]
            box = (left, top, left + row["bucket_w"] / row["resized_w"], top + row["bucket_h"] / row["resized_h"])
            jobs[f"crop/{row['key']}"] = Thumb(looks[row["key"]], box)
    results = {}
    with Pool.of_pictures(thumbnail, settings) as pool, bar(len(jobs), "report: pictures", "pictures") as shown_bar:
        for name, data in zip(jobs, pool.map(list(jobs.values())), strict=True):
            if isinstance(data, bytes):
                results[name] = data
            shown_bar.update()
    return results
