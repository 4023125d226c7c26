"""What values of a dataset config do not go together; every problem is one sentence with the keys' names.

Types and ranges stand at the keys (`train/config/dataset.py`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from train.config.sound import judged
from train.config.source_rules import source_problems

if TYPE_CHECKING:
    from train.config.dataset import DatasetConfig, PolicyConfig, SelectConfig, SourceConfig

MAX_NAME = 100  # characters of what names a file or folder; file systems take 255 bytes, ours with an ending


def settings_problems(settings: DatasetConfig) -> Iterator[str]:
    """What does not go together beside the policy, the sources and the selections."""
    yield from judged(settings, _RULES)


def policy_problems(settings: DatasetConfig) -> Iterator[str]:
    """What does not go together in the policy."""
    yield from judged(settings.policy, _POLICY)


def named_source_problems(settings: DatasetConfig) -> Iterator[str]:
    """What does not go together in a source, told by its number."""
    for number, source in enumerate(settings.sources):
        yield from (f"sources[{number}].{told}" for told in judged(source, _SOURCE))
        yield from judged(settings, [partial(_npz, number=number)])


def selection_problems(settings: DatasetConfig) -> Iterator[str]:
    """What does not go together in a selection."""
    for stage, select in settings.select.items():
        yield from judged(select, [partial(_quota, stage=stage), partial(_boosts, stage=stage)])


def _quota(select: SelectConfig, stage: str) -> str | None:
    quota = select.quota
    if quota is None or (all(share >= 0 for share in quota.shares.values()) and 0 < sum(quota.shares.values()) <= 1 + 1e-9):
        return None
    return f"select.{stage}.quota: shares are parts of 1 and sum up to it at most"


def _boosts(select: SelectConfig, stage: str) -> str | None:
    empty = [number for number, boost in enumerate(select.boost) if not boost.where]
    return f"select.{stage}.boost[{empty[0]}].where is empty: for every picture, that is repeats" if empty else None


def _npz(settings: DatasetConfig, number: int) -> str | None:
    if settings.sources[number].npz_vae is None or settings.latents.content == "sample":
        return None
    return f"sources[{number}].npz_vae: .npz hold one draw, which needs latents.content: sample"


def _areas(areas_px: Any) -> str | None:
    areas = list(areas_px) if isinstance(areas_px, list | tuple) else [areas_px]
    if areas and len(set(map(str, areas))) == len(areas) and all(type(area) is int for area in areas):
        return None
    return f"buckets.area_px is {areas_px!r}, must be a whole number of pixels or a list of different ones, such as [1048576, 589824]"


def _doubled(settings: DatasetConfig) -> str | None:
    names = [source.name for source in settings.sources]
    return f"sources: two have the same name in {names}" if len(set(names)) != len(names) else None


def _years(policy: PolicyConfig) -> str | None:
    years = policy.year.ranges
    falling = any(r.first > r.last for r in years) or any(a.last >= b.first for a, b in itertools.pairwise(years))
    return "policy.year.ranges must rise without overlap" if falling else None


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


_RULES: tuple[Callable[[DatasetConfig], str | None], ...] = (
    lambda s: None if _is_name(s.name) else f"name is {s.name!r}: letters, digits, . - and _ only, at most {MAX_NAME}, it names a folder",
    lambda s: None if s.sources else "sources is empty: name at least one source",
    _doubled,
    lambda s: None if all(map(_is_name, s.select)) else
    f"select: {list(s.select)}: letters, digits, . - and _ only, at most {MAX_NAME}, they name files",
    lambda s: _areas(s.buckets.area_px),
    lambda s: "buckets.min_px must be at most buckets.max_px" if s.buckets.min_px > s.buckets.max_px else None,
    lambda s: f"buckets.step_px is {s.buckets.step_px}, must be a multiple of 8" if s.buckets.step_px % 8 else None,
    lambda s: None if all(map(str.strip, s.exclude.tags)) else "exclude.tags holds an empty tag",
    lambda s: "score.source: column needs score.path" if s.score.source == "column" and not s.score.path else None,
    lambda s: "score.source: hf_image_classification needs score.model, a folder"
    if s.score.source == "hf_image_classification" and not s.score.model else None,
    lambda s: "tag.source: column needs tag.path" if s.tag.source == "column" and not s.tag.path else None,
    lambda s: "tag.source: wd needs tag.model, a folder" if s.tag.source == "wd" and not s.tag.model else None,
    lambda s: "tag.character_threshold must be at least tag.general_threshold"
    if s.tag.character_threshold < s.tag.general_threshold else None,
)  # fmt: skip
_SOURCE: tuple[Callable[[SourceConfig], str | None], ...] = (
    lambda s: f"name is {s.name!r}: letters, digits, . - and _ only, at most {MAX_NAME}" if not _is_name(s.name) or ":" in s.name else None,
    lambda s: "columns is needed by adapter table: our column: theirs" if s.adapter == "table" and not s.columns else None,
)
_POLICY: tuple[Callable[[PolicyConfig], str | None], ...] = (
    lambda p: "policy.aesthetic.thresholds must fall, within 0..1"
    if any(a <= b for a, b in itertools.pairwise(p.aesthetic.thresholds)) else None,
    lambda p: None if list(p.quality.group_by) in (["rating"], ["rating", "year"]) else
    "policy.quality.group_by must be [rating] or [rating, year]",
    _years,
    lambda p: "policy.year.ranges: `old` is a real general tag, use another word"
    if p.vocabulary == "animagine31" and any(r.tag == "old" for r in p.year.ranges) else None,
)  # fmt: skip

DATASET_RULES = (settings_problems, named_source_problems, source_problems, selection_problems, policy_problems)
