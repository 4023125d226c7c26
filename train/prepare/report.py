"""Step `report`: is this dataset fit to train on? report.json, report.html, and an exit code that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from train.captions import DrawOptions, draw, render
from train.exits import ExitCode
from train.prepare.judge import Complaint
from train.prepare.peers import Peers
from train.prepare.pictures import Look, Thumb, thumbnail
from train.prepare.pool import Pool
from train.prepare.report_facts import Facts, gather
from train.prepare.report_page import page
from train.prepare.settings import DatasetConfig, dataset_dir
from train.prepare.units import merge_quarantine, read_table, row_hash, sweep, write_text
from train.rng import uid_of

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
    print(f"report: {dataset / 'report.html'}: " + (f"{len(broken)} limits broken" if broken else "healthy"))
    if broken:
        names = "; ".join(
            f"report.fail_if.{c['name']}: {c['value']:.4g} > {c['limit']:.4g} ({c['what']})" for c in broken
        )
        raise Complaint(ExitCode.MISMATCH, f"report: {names}: see {dataset / 'report.html'}")


def checks(settings: DatasetConfig, facts: Facts) -> list[Facts]:
    """Every limit with the value found."""
    limits = settings.report.fail_if
    captions, records = facts["captions"], max(facts["counts"]["records"], 1)
    tokens = captions["tokens"]
    over_225 = tokens["over_225"] / tokens["rows"] if tokens else 0.0
    found = [
        ("hard_excluded", captions["hard_excluded"], "hard-excluded rows in a selection"),
        ("quarantine_errors", facts["quarantine"]["errors"] / records, "share of records that are broken"),
        ("missing_rating", _missing_rating(settings), "share without rating, in sources that carry ratings"),
        ("over_225_tokens", over_225, "share of captions over 225 tokens"),
        ("empty_captions", captions["empty"] / max(captions["rows"], 1), "share of empty captions"),
        ("masterpiece", _masterpiece(settings, facts), "largest share of masterpiece within a rating"),
        ("unreadable_latents", facts["latents"]["unreadable"], "index rows without readable latent"),
    ]
    return [
        {"name": name, "value": round(value, 6), "limit": getattr(limits, name), "what": what,
         "ok": value <= getattr(limits, name)}
        for name, value, what in found
    ]  # fmt: skip


def _missing_rating(settings: DatasetConfig) -> float:
    records = read_table(dataset_dir(settings), "records", ["source", "rating"])
    rated = pc.is_valid(records.column("rating"))
    carrying = pc.unique(records.column("source").filter(rated))
    rows = pc.is_in(records.column("source"), value_set=carrying)
    total = pc.sum(rows).as_py() or 0
    return 1 - (pc.sum(rated).as_py() or 0) / total if total else 0.0


def _masterpiece(settings: DatasetConfig, facts: Facts) -> float:
    crossed = facts["balance"]["all sound files"]["quality_by_rating"]
    sums = {rating: sum(words.values()) for rating, words in crossed.items()}
    least = settings.policy.quality.min_group
    shares = [words["masterpiece"] / sums[rating] for rating, words in crossed.items() if sums[rating] >= least]
    return max(shares, default=0.0)


def _samples(settings: DatasetConfig) -> list[Facts]:
    """Random pictures of the largest selection with their captions: the same ones for the same data."""
    shown = _showable(settings)
    labels = read_table(dataset_dir(settings), "labels", ["key", "fixed_tags", "flex_tags"])
    keys = [key for key in labels.column("key").to_pylist() if key in shown]
    picked = sorted(keys, key=lambda key: row_hash(settings.seed, "sample", key))[:SAMPLES]
    rows = labels.filter(pc.is_in(labels.column("key"), value_set=pa.array(picked, pa.string()))).to_pylist()
    by_key = {row["key"]: row for row in rows}
    samples = []
    for number, key in enumerate(picked):
        fixed, flex = by_key[key]["fixed_tags"], by_key[key]["flex_tags"]
        sample: Facts = {"key": key, "text": render(fixed, flex)}
        if number < SHUFFLES:
            sample["shuffles"] = [_shuffled(fixed, flex, key, epoch) for epoch in range(3)]
        samples.append(sample)
    return samples


def _shuffled(fixed: list[str], flex: list[str], key: str, epoch: int) -> str:
    options = DrawOptions(
        shuffle=True, tag_dropout=0, caption_dropout=0, caption_dropout_every_epochs=0, warmup_min=1, warmup_updates=0
    )
    drawn = draw(fixed, flex, options, seed=0, uid=uid_of(key), epoch=epoch, update=0)
    return ", ".join([*drawn[0], *drawn[1]])


def _showable(settings: DatasetConfig) -> dict[str, Look]:
    """Records whose picture may stand on the page: sound, not hard-excluded, and of a rating that `pictures` allows."""
    if settings.report.pictures == "none":
        return {}
    dataset = dataset_dir(settings)
    sources = {source.name: source for source in settings.sources}
    columns = ["key", "source", "uri", "member", "rating", "hard_exclusion"]
    probe = read_table(dataset, "probe", ["key", "status"])
    sound = set(probe.column("key").filter(pc.equal(probe.column("status"), "ok")).to_pylist())
    refused = set(read_table(dataset, "select", ["key"]).column("key").to_pylist())
    found = {}
    for row in read_table(dataset, "records", columns).to_pylist():
        rating = row["rating"] or sources[row["source"]].assume_rating
        allowed = rating in _SAFE or settings.report.pictures == "all"
        if allowed and row["hard_exclusion"] is None and row["key"] in sound - refused:
            found[row["key"]] = Look(sources[row["source"]], settings.probe, row["uri"], row["member"])
    return found


def _pictures(settings: DatasetConfig, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """JPEG thumbnails of every picture the page shows; keys of `crop/<key>` have the crop drawn in."""
    looks = _showable(settings)
    duplicates = (key for kind in facts["duplicates"].values() for group in kind["examples"] for key in group[:4])
    keys = [*(sample["key"] for sample in facts["samples"]), *duplicates,
            *(row["key"] for row in facts["sizes"]["enlarged_worst"])]  # fmt: skip
    jobs = {key: Thumb(looks[key], None) for key in keys if key in looks}
    for row in facts["crop"]["worst"]:
        if row["key"] in looks:
            left, top = row["crop_left"] / row["resized_w"], row["crop_top"] / row["resized_h"]
            box = (left, top, left + row["bucket_w"] / row["resized_w"], top + row["bucket_h"] / row["resized_h"])
            jobs[f"crop/{row['key']}"] = Thumb(looks[row["key"]], box)
    limit = 512 * 2**20 + 14 * settings.probe.max_pixels
    with Pool(settings.workers, thumbnail, settings.probe.timeout_s, limit) as pool:
        results = dict(zip(jobs, pool.map(list(jobs.values())), strict=True))
    return {name: data for name, data in results.items() if isinstance(data, bytes)}
