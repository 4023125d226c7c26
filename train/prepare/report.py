"""Step `report`: is this dataset fit to train on? report.json, report.html, and an exit code that says so."""

from __future__ import annotations

import heapq
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.choosing.facts import among
from train.prepare.health.browser import browsed
from train.prepare.health.facts import Facts, gather
from train.prepare.health.page import counted, number, page
from train.prepare.health.pictures import pictures_of, showable
from train.prepare.select import selection_path
from train.prepare.tables.quarantine import Complaint, too_many
from train.prepare.tables.units import merge_quarantine, read_table, row_hash, stream_table, sweep, write_text
from train.prepare.tables.workers import Peers
from train.recipe.captions import Caption, DrawOptions, draw_captions, render
from train.recipe.rng import uid_of

SAMPLES = 24  # pictures in the grid of random ones
SHUFFLES = 5  # captions shown with their shuffles


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
        shown, facts["hidden"] = showable(settings)
        facts["samples"] = _samples(settings, shown["key"].combine_chunks())
        facts = {"schema": 1, "name": settings.name, **facts}
        browser = None
        if settings.report.captions:
            browser = browsed(settings, {stage: pq.read_table(selection_path(dataset, stage), columns=["key"])["key"] for stage in settings.select})
        pictures = pictures_of(settings, facts, shown, browser)
        write_text(dataset / "report.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        write_text(dataset / "report.html", page(facts, pictures, browser))
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


def _samples(settings: DatasetConfig, shown: pa.Array) -> list[Facts]:
    """Random pictures of those `shown` with their captions: the same ones for the same data."""
    dataset = dataset_dir(settings)
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
