"""What values a dataset config may hold, key by key and together; every problem is one sentence with the key's name."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from train.config.source_rules import source_problems

if TYPE_CHECKING:
    from train.config.dataset import DatasetConfig, PolicyConfig, QuotaConfig

MAX_REPEATS = 32_767  # what the tables' int16 holds
MAX_NAME = 100  # characters of what names a file or folder; file systems take 255 bytes, ours with an ending


def settings_problems(settings: DatasetConfig) -> list[str]:
    """Every problem of a loaded dataset config; empty where there is none."""
    names = [source.name for source in settings.sources]
    stages = list(settings.select)
    buckets = settings.buckets
    rules = [
        (not _is_name(settings.name), f"name is {settings.name!r}: letters, digits, . - and _ only, at most {MAX_NAME}, it names a folder"),
        (settings.seed < 0, "seed must be at least 0"),
        (not settings.sources, "sources is empty: name at least one source"),
        (len(set(names)) != len(names), f"sources: two have the same name in {names}"),
        (not all(map(_is_name, stages)), f"select: {stages}: letters, digits, . - and _ only, at most {MAX_NAME}, they name files"),
        (not 0 < buckets.min_px <= buckets.max_px, "buckets.min_px must be above 0 and at most buckets.max_px"),
        (buckets.area_px <= 0, "buckets.area_px must be above 0"),
        (buckets.step_px <= 0 or buckets.step_px % 8 != 0, "buckets.step_px must be a multiple of 8"),
        (not all(map(str.strip, settings.exclude.tags)), "exclude.tags holds an empty tag"),
        (not 0 <= settings.max_quarantine_fraction <= 1, "max_quarantine_fraction must be in [0, 1]"),
        (settings.workers < 0, "workers must be at least 0"),
        (not 0 <= settings.dedupe.phash_distance <= 4, "dedupe.phash_distance must be in 0..4"),
        (settings.probe.max_aspect < 1, "probe.max_aspect must be at least 1"),
        (settings.score.source == "column" and not settings.score.path, "score.source: column needs score.path"),
        (settings.score.source == "hf_image_classification" and not settings.score.model,
         "score.source: hf_image_classification needs score.model, a folder"),
        (settings.tag.source == "column" and not settings.tag.path, "tag.source: column needs tag.path"),
        (settings.tag.source == "wd" and not settings.tag.model, "tag.source: wd needs tag.model, a folder"),
        (settings.tag.character_threshold < settings.tag.general_threshold,
         "tag.character_threshold must be at least tag.general_threshold"),
    ]  # fmt: skip
    found = [message for broken, message in rules if broken] + source_problems(settings)
    for number, source in enumerate(settings.sources):
        if not _is_name(source.name) or ":" in source.name:
            found.append(f"sources[{number}].name is {source.name!r}: letters, digits, . - and _ only, at most {MAX_NAME}")
        if source.adapter == "table" and not source.columns:
            found.append(f"sources[{number}].columns is needed by adapter table: our column: theirs")
        if source.npz_vae is not None and settings.latents.content != "sample":
            found.append(f"sources[{number}].npz_vae: .npz hold one draw, which needs latents.content: sample")
        if source.repeats != "kohya" and not 1 <= source.repeats <= MAX_REPEATS:
            found.append(f"sources[{number}].repeats must be in 1..{MAX_REPEATS}, or kohya")
    for stage, select in settings.select.items():
        if not 1 <= select.repeats <= MAX_REPEATS or select.min_bucket < 1:
            found.append(f"select.{stage}: repeats must be in 1..{MAX_REPEATS}, min_bucket at least 1")
        if not 0 <= select.merge_crop <= 1:
            found.append(f"select.{stage}.merge_crop is {select.merge_crop:g}, must be in [0, 1]: a share of a picture's area")
        if select.quota is not None and not _is_division(select.quota):
            found.append(f"select.{stage}.quota: shares are parts of 1 and sum up to it at most; total is at least 1")
    return found + _policy_problems(settings.policy)


def _is_division(quota: QuotaConfig) -> bool:
    shares = quota.shares.values()
    return quota.total >= 1 and all(share >= 0 for share in shares) and 0 < sum(shares) <= 1 + 1e-9


def _policy_problems(policy: PolicyConfig) -> list[str]:
    high, mid, low = policy.aesthetic.thresholds
    groups = [list(option) for option in (("rating",), ("rating", "year"))]
    years = policy.year.ranges
    rules = [
        (not 1 >= high > mid > low >= 0, "policy.aesthetic.thresholds must fall, within 0..1"),
        (list(policy.quality.group_by) not in groups, "policy.quality.group_by must be [rating] or [rating, year]"),
        (policy.quality.min_group < 1, "policy.quality.min_group must be at least 1"),
        (policy.quality.min_distinct < 1, "policy.quality.min_distinct must be at least 1"),
        (policy.quality.min_age_days < 0, "policy.quality.min_age_days must be at least 0"),
        (any(r.first > r.last for r in years) or any(a.last >= b.first for a, b in itertools.pairwise(years)),
         "policy.year.ranges must rise without overlap"),
        (any(r.tag == "old" for r in years), "policy.year.ranges: `old` is a real general tag, use another word"),
    ]  # fmt: skip
    return [message for broken, message in rules if broken]


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None
