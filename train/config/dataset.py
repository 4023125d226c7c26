"""The dataset config: every key of `configs/dataset.yaml`, its default and its meaning.

Loaded like a stage config (files, then `key=value`; an unknown key is an error with a suggestion), frozen and
complete after loading. Steps take the section they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from train.base.errors import ExitCode, Halt
from train.config.dataset_rules import settings_problems
from train.config.schema import load_into

STEPS = ("ingest", "probe", "score", "tag", "dedupe", "label", "select", "latents", "report")


@dataclass(frozen=True)
class BucketsConfig:
    """The table of training sizes, as in the recipe."""

    area_px: int = 1048576
    min_px: int = 512
    max_px: int = 2048
    step_px: int = 64


@dataclass(frozen=True)
class SourceConfig:
    """One place that images and their metadata come from."""

    name: str = MISSING  # first half of every key, `<name>:<id>`
    adapter: Literal[
        "danbooru", "table", "sidecar", "sd_scripts", "imagefolder", "webdataset", "danbooru2023", "e621", "gelbooru",
        "deepghs", "simpletuner", "huggingface",
    ] = MISSING
    path: str = MISSING  # folder or file with the metadata
    images: str | None = None  # the source root that pictures are looked up in; null = `path` or its folder
    columns: dict[str, str] = field(default_factory=dict)  # our column: theirs
    tag_separator: str | None = None  # of tags joined in one text, in columns of tags or else captions; null = commas
    dictionary: str | None = None  # CSV (name, category, count, aliases) that gives uncategorised tags a category
    rating_scheme: Literal["gsqe", "sqe"] | None = None  # sqe: s means safe; null = the adapter's, or asked for
    assume_rating: Literal["g", "s"] | None = None  # of records without any rating; never overrides one
    escaped: bool = False  # tags carry backslashes before brackets
    on_bad_tag: Literal["error", "drop", "replace"] = "error"
    on_second_separator: Literal["error", "fork", "suffix"] = "error"
    caption_ext: str | None = None  # ending of the caption files, such as .caption; null = .txt
    caption_lines: Literal["join", "first", "variants"] = "join"  # of a caption of several lines; variants comes later
    keep_tokens: int = 0  # the first N tags of a caption without separator are fixed
    repeats: int | Literal["kohya"] = 1  # visits of each image; kohya = the number that its folder's name begins with
    follow_links: bool = False  # read what links that lead out of the source point to
    on_missing_caption: Literal["error", "take"] = "error"  # take = a picture without .txt is a record without caption
    npz_vae: str | None = None  # the VAE that made the sd-scripts .npz beside the images; null = they are not used


@dataclass(frozen=True)
class QualityConfig:
    """Quality tags from the score within the rating."""

    source: Literal["table", "empirical", "none"] = "table"
    table: str = "full"  # full | after_5m | path of a JSON file {g: [six thresholds], s: ..., q: ..., e: ...}
    group_by: list[str] = field(default_factory=lambda: ["rating"])  # empirical: [rating] or [rating, year]
    min_group: int = 200  # smaller groups use the pooled thresholds
    min_distinct: int = 7  # so do groups with fewer distinct scores
    min_age_days: int = 0  # younger posts get no quality tag


@dataclass(frozen=True)
class YearRange:
    """Posts of the years first..last get `tag`."""

    tag: str = MISSING
    first: int = MISSING
    last: int = MISSING


def _card_years() -> list[YearRange]:
    return [
        YearRange("oldest", 2005, 2010),
        YearRange("early", 2011, 2014),
        YearRange("mid", 2015, 2017),
        YearRange("recent", 2018, 2020),
        YearRange("newest", 2021, 2024),
    ]


@dataclass(frozen=True)
class YearConfig:
    """Year tags."""

    ranges: list[YearRange] = field(default_factory=_card_years)  # card
    before: Literal["none", "clamp"] = "none"  # years before the first range
    after: Literal["none", "clamp"] = "none"  # years after the last range


@dataclass(frozen=True)
class AestheticConfig:
    """Aesthetic tags; thresholds belong to one classifier."""

    thresholds: tuple[float, float, float] = (0.71, 0.45, 0.27)  # card


@dataclass(frozen=True)
class StringsConfig:
    """How a tag is written."""

    underscore: Literal["len3", "kaomoji"] = "len3"


@dataclass(frozen=True)
class PolicyConfig:
    """From metadata to caption. A switch left null has the preset's value."""

    preset: Literal["default", "animagine31"] = "default"
    meta_blacklist: Literal["per_tag", "whole_group"] | None = None
    year_source: Literal["media_or_post", "media"] | None = None
    year_fallback: Literal["none", "early"] | None = None
    aesthetic_edges: Literal["lower_bin", "very_displeasing"] | None = None
    aesthetic_skip_substring: bool | None = None
    banned_artist: Literal["drop", "keep"] | None = None
    missing_rating_or_score: Literal["omit", "raise"] | None = None
    rating_words: Literal["accept", "raise"] | None = None
    empty_tags: Literal["remove", "keep"] | None = None
    duplicate_tags: Literal["first", "all"] | None = None
    quality: QualityConfig = field(default_factory=QualityConfig)
    year: YearConfig = field(default_factory=YearConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    strings: StringsConfig = field(default_factory=StringsConfig)


@dataclass(frozen=True)
class ExcludeConfig:
    """Filters of the user's. The hard exclusions are code and have no key."""

    deleted: bool = True
    banned: bool = True
    tags: list[str] = field(default_factory=list)  # of posts and of captions; spaces and underscores are one


@dataclass(frozen=True)
class ProbeConfig:
    """Which files are accepted; everything else is quarantined with a reason."""

    formats: list[str] = field(default_factory=lambda: ["jpeg", "png", "webp", "bmp", "gif", "avif"])
    max_pixels: int = 200_000_000  # refused from the header, before decoding
    max_aspect: float = 4.0  # 2048/512: beyond it the crop grows without limit
    min_area_px: int | None = None  # null = small images are enlarged and counted
    animated: Literal["refuse", "first"] = "refuse"
    allow_truncated: bool = False
    timeout_s: float = 60.0  # per file


@dataclass(frozen=True)
class ScoreConfig:
    """Where aesthetic scores come from."""

    source: Literal["none", "column", "hf_image_classification"] = "none"
    path: str | None = None  # column: parquet or CSV with `key` and `column`
    column: str = "score"
    model: str | None = None  # folder of an image-classification model, or the name that a column's scores carry
    label: str = "hq"  # class whose probability is the score
    batch: int = 8
    device: str = "auto"


@dataclass(frozen=True)
class TagConfig:
    """Where tags come from for pictures that have none."""

    source: Literal["none", "column", "wd"] = "none"
    path: str | None = None  # column: parquet or CSV with `key` and `column`
    column: str = "tags"
    model: str | None = None  # wd: folder with model.onnx and selected_tags.csv, or a name for the column's tags
    general_threshold: float = 0.35
    character_threshold: float = 0.85
    use: Literal["missing", "all"] = "missing"  # missing = only pictures without any tag
    batch: int = 8


@dataclass(frozen=True)
class DedupeConfig:
    """Equal files and equal pixels are always reduced to one; similar ones are reported or dropped."""

    phash: Literal["report", "drop"] = "report"
    phash_distance: int = 3  # bits of 64; at most 4


@dataclass(frozen=True)
class QuotaConfig:
    """Shares of a column's values in a selection of `total` images."""

    by: str = MISSING
    shares: dict[str, float] = field(default_factory=dict)
    total: int = MISSING


@dataclass(frozen=True)
class SelectConfig:
    """What one stage trains on."""

    where: list[str] = field(default_factory=list)  # `column op value`, all must hold
    allow: str | None = None  # file of keys that skip the predicates
    deny: str | None = None  # file of keys that are never taken; wins over allow
    caps: dict[str, int] = field(default_factory=dict)  # most images per artist, character, ...
    quota: QuotaConfig | None = None
    repeats: int = 1
    seed: int | None = None  # null = the dataset's
    min_bucket: int = 16  # smaller buckets are merged into one of like shape, or stay; the stage's micro-batch
    merge_crop: float = 0.125  # most of its area that a picture may lose by that; 0 = nothing, 1 = always the nearest shape


@dataclass(frozen=True)
class LatentsConfig:
    """How images are encoded and stored."""

    vae: str | None = None  # folder or single file; needed by the step `latents`
    dtype: Literal["fp16", "bf16"] = "fp16"  # of the stored values
    encode: Literal["fp32", "fp16", "bf16"] = "fp32"  # of the VAE; fp16 needs the fp16-fix VAE
    content: Literal["sample", "mean", "moments"] = "sample"
    resize: Literal["lanczos", "area"] = "lanczos"
    backend: Literal["pillow", "pyvips"] = "pillow"
    batch: int = 8
    device: str = "auto"


@dataclass(frozen=True)
class FailIfConfig:
    """A larger share than this makes the report exit 7; `judge.too_many` says what that is in a small set."""

    hard_excluded: float = 0.0  # in any selection
    quarantine_errors: float = 0.02
    missing_rating: float = 0.05  # of rows whose source carries ratings
    over_225_tokens: float = 0.05
    empty_captions: float = 0.01
    masterpiece: float = 0.25  # within a rating of at least quality.min_group rows
    unreadable_latents: float = 0.0
    crop_loss: float = 0.15  # mean share of a selection's area that the crop takes: 0.028 in the recipe's buckets + merge_crop


@dataclass(frozen=True)
class ReportConfig:
    """The health report."""

    pictures: Literal["safe", "all", "none"] = "safe"  # safe = ratings g and s only
    fail_if: FailIfConfig = field(default_factory=FailIfConfig)


@dataclass(frozen=True)
class DatasetConfig:
    """From raw images to a training set."""

    name: str = MISSING
    root: str = "data"  # the dataset is <root>/<name>
    seed: int = 0
    tokenizers: str | None = None  # folder with tokenizer/ and tokenizer_2/; null = token counts are left out
    separator: str = "|||"  # between the fixed and the flexible part of a caption
    buckets: BucketsConfig = field(default_factory=BucketsConfig)
    sources: list[SourceConfig] = field(default_factory=list)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    exclude: ExcludeConfig = field(default_factory=ExcludeConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    tag: TagConfig = field(default_factory=TagConfig)
    dedupe: DedupeConfig = field(default_factory=DedupeConfig)
    select: dict[str, SelectConfig] = field(default_factory=lambda: {"pretrain": SelectConfig()})
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    max_quarantine_fraction: float = 0.02
    workers: int = 4


def load_settings(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DatasetConfig:
    """Load a dataset config from YAML files (later win) and `key=value` overrides.

    Raises Halt(USAGE) naming the key; nothing is repaired.
    """
    settings = load_into(DatasetConfig, paths, overrides)
    problems = settings_problems(settings)
    if problems:
        raise Halt(ExitCode.USAGE, "; ".join(problems))
    return settings


def dataset_dir(settings: DatasetConfig) -> Path:
    """`<root>/<name>`, where all tables and shards of this dataset live."""
    return Path(settings.root) / settings.name


def check_paths(settings: DatasetConfig) -> None:
    """For a run of all steps: what a later step needs is asked for before the first has worked for hours.

    Raises Halt(USAGE) naming every key whose file or folder is not there.
    """
    score, tag = settings.score, settings.tag
    named = {
        "tokenizers": settings.tokenizers, "latents.vae": settings.latents.vae,
        "score.path": score.path if score.source == "column" else None,
        "score.model": score.model if score.source == "hf_image_classification" else None,
        "tag.path": tag.path if tag.source == "column" else None, "tag.model": tag.model if tag.source == "wd" else None,
        **{f"select.{stage}.{key}": getattr(select, key) for stage, select in settings.select.items() for key in ("allow", "deny")},
        **{f"sources {source.name}.{key}": getattr(source, key) for source in settings.sources
           for key in ("path", "images", "dictionary", "npz_vae")},
    }  # fmt: skip
    problems = [f"{key}: {path} does not exist" for key, path in named.items() if path is not None and not Path(path).exists()]
    if settings.latents.vae is None:
        problems.append("latents.vae is not set: the step latents needs a VAE folder, a model folder or a .safetensors file")
    if problems:
        raise Halt(ExitCode.USAGE, "; ".join(problems))
