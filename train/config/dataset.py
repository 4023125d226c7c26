"""The dataset config: every key of `configs/dataset.yaml`, its default and its meaning.

Loaded like a stage config (files, then `key=value`; an unknown key is an error with a suggestion), frozen and
complete after loading. Steps take the section they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from train.base.errors import ExitCode, Halt
from train.config.dataset_rules import DATASET_RULES
from train.config.key import key
from train.config.schema import load_into

MAX_REPEATS = 32_767  # what the tables' int16 holds
GONE = {"policy.rating_words": "ingest reads letters and words of ratings alike"}  # keys of earlier configs: why nothing reads them
STEPS = ("ingest", "probe", "score", "tag", "dedupe", "label", "select", "latents", "report")


@dataclass(frozen=True)
class BucketsConfig:
    """The table of training sizes, as in the recipe."""

    area_px: Any = key(1048576, "most pixels of a size; a list = several sets, a picture in the largest it fills without being enlarged", at_least=1)
    min_px: int = key(512, "shortest side", at_least=1)
    max_px: int = key(2048, "longest side", at_least=1)
    step_px: int = key(64, "sides are multiples of this, itself one of 8", at_least=8)


@dataclass(frozen=True)
class SourceConfig:
    """One place that images and their metadata come from."""

    name: str = key(MISSING, "first half of every key, `<name>:<id>`")
    adapter: Literal[
        "danbooru", "table", "sidecar", "sd_scripts", "imagefolder", "webdataset", "danbooru2023", "e621", "gelbooru",
        "deepghs", "simpletuner", "huggingface",
    ] = key(MISSING, "which layout is read")
    path: str = key(MISSING, "folder or file with the metadata; s3://, gs://, hf://datasets/..., https://...file are brought here first")
    images: str | None = key(None, "the source root that pictures are looked up in; null = `path` or its folder")
    columns: dict[str, str] = key(dict, "our column: theirs")
    tag_separator: str | None = key(None, "of tags joined in one text, in columns of tags or else captions; null = commas")
    dictionary: str | None = key(None, "CSV (name, category, count, aliases) that gives uncategorised tags a category")
    rating_scheme: Literal["gsqe", "sqe"] | None = key(None, "sqe: s means safe; null = the adapter's, or asked for")
    assume_rating: Literal["g", "s"] | None = key(None, "of records without any rating; never overrides one")
    escaped: bool = key(False, "tags carry backslashes before brackets")
    on_bad_tag: Literal["error", "drop", "replace"] = key("error", "a tag that no caption can hold")
    on_second_separator: Literal["error", "fork", "suffix", "tail"] = key("error", "a caption with the separator twice; tail = what follows the second one stays behind the flex tags")
    prose: Literal["auto", "all", "none"] = key("auto", "sentences of captions, kept whole: auto = recognised, all = every line is one, none = commas part them")
    caption_ext: Any = key(None, "ending of the caption files, such as .caption; a list = several files a picture, whose texts are those of caption_lines; null = .txt")
    caption_lines: Literal["join", "first", "variants"] = key("join", "of a caption of several lines, or a list of captions: joined, the first, or each one of its own")
    keep_tokens: int = key(0, "the first N tags of a caption without separator are fixed", at_least=0)
    repeats: int | Literal["kohya"] = key(1, "visits of each image; kohya = the number that its folder's name begins with", at_least=1, at_most=MAX_REPEATS)
    weight: float = key(1.0, "the loss of each image is multiplied by this, and by columns.weight where a row has one; the mean is still over all images", at_least=0)
    mask: str | None = key(None, "which part of a picture counts in the loss (loss.mask): alpha = what is not transparent; or a folder of grey pictures of the same names, white = all of it; null = no masks")
    follow_links: bool = key(False, "read what links that lead out of the source point to")
    on_missing_caption: Literal["error", "take"] = key("error", "take = a picture without .txt is a record without caption")
    class_tokens: str | None = key(None, "the caption of pictures that have none; kohya = the name of their folder, behind its number")
    npz_vae: str | None = key(None, "the VAE that made the sd-scripts .npz beside the images; null = they are not used")


@dataclass(frozen=True)
class QualityConfig:
    """Quality tags from the score within the rating."""

    source: Literal["table", "empirical", "none"] | None = key(None, "table = fixed thresholds; empirical = from the set itself; null = the vocabulary's criterion")
    table: str = key("full", "full, after_5m, or a JSON file {g: [six thresholds], s: ..., q: ..., e: ...}")
    group_by: list[str] = key(lambda: ["rating"], "of empirical: [rating] or [rating, year]")
    min_group: int = key(200, "smaller groups use the pooled thresholds", at_least=1)
    min_distinct: int = key(7, "so do groups with fewer distinct scores", at_least=1)
    min_age_days: int = key(0, "younger posts get no quality tag", at_least=0)


@dataclass(frozen=True)
class YearRange:
    """Posts of the years first..last get `tag`."""

    tag: str = key(MISSING, "the year tag")
    first: int = key(MISSING, "first year of its posts")
    last: int = key(MISSING, "last year of its posts")


@dataclass(frozen=True)
class YearConfig:
    """Year tags."""

    ranges: list[YearRange] = key(list, "tag, first and last year of each; empty = the vocabulary's")
    before: Literal["none", "clamp"] = key("none", "years before the first range; clamp = the first tag")
    after: Literal["none", "clamp"] = key("none", "years after the last range; clamp = the last tag")


@dataclass(frozen=True)
class AestheticConfig:
    """Aesthetic tags; thresholds belong to one classifier."""

    thresholds: list[float] = key(list, "least score of each aesthetic word but the last, falling; empty = the vocabulary's", at_least=0, at_most=1)


@dataclass(frozen=True)
class StringsConfig:
    """How a tag is written."""

    underscore: Literal["len3", "kaomoji"] = key("len3", "which tags keep their underscores: those of up to 3 characters, or the kaomoji")


@dataclass(frozen=True)
class PolicyConfig:
    """From metadata to caption. A switch left null has the preset's value."""

    preset: Literal["default", "animagine31"] = key("default", "values of the switches below that are null; animagine31 = as released")
    vocabulary: str = key("animagine31", "words, criteria and order of the captions: a name in configs/vocabularies, or a YAML file; keys below that are set win over it")
    meta_blacklist: Literal["per_tag", "whole_group"] | None = key(None, "meta tags that no caption shows: tag by tag, or the whole group")
    year_source: Literal["media_or_post", "media"] | None = key(None, "whose date is the year")
    year_fallback: Literal["none", "early"] | None = key(None, "year tag of posts without a date")
    aesthetic_edges: Literal["lower_bin", "very_displeasing"] | None = key(None, "where a score on a threshold belongs")
    aesthetic_skip_substring: bool | None = key(None, "no aesthetic tag where a quality tag holds the same words")
    banned_artist: Literal["drop", "keep"] | None = key(None, "the tag banned_artist")
    missing_rating_or_score: Literal["omit", "raise"] | None = key(None, "of posts that lack one")
    empty_tags: Literal["remove", "keep"] | None = key(None, "tags that are empty after cleaning")
    duplicate_tags: Literal["first", "all"] | None = key(None, "tags that stand twice")
    quality: QualityConfig = field(default_factory=QualityConfig)
    year: YearConfig = field(default_factory=YearConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    strings: StringsConfig = field(default_factory=StringsConfig)


@dataclass(frozen=True)
class ExcludeConfig:
    """Filters of the user's. The hard exclusions are code and have no key."""

    deleted: bool = key(True, "leave out deleted posts")
    banned: bool = key(True, "leave out banned posts")
    tags: list[str] = key(list, "of posts and of captions; spaces and underscores are one")


@dataclass(frozen=True)
class ProbeConfig:
    """Which files are accepted; everything else is quarantined with a reason."""

    formats: list[str] = key(lambda: ["jpeg", "png", "webp", "bmp", "gif", "avif"], "file formats that are accepted, by content")
    max_pixels: int = key(200_000_000, "refused from the header, before decoding", at_least=1)
    max_aspect: float = key(4.0, "2048/512: beyond it the crop grows without limit", at_least=1)
    min_area_px: int | None = key(None, "null = small images are enlarged and counted", at_least=0)
    animated: Literal["refuse", "first"] = key("refuse", "first = the first frame is the picture")
    allow_truncated: bool = key(False, "take what can be read of a cut file")
    timeout_s: float = key(60.0, "per file", above=0)


@dataclass(frozen=True)
class ScoreConfig:
    """Where aesthetic scores come from."""

    source: Literal["none", "column", "hf_image_classification"] = key("none", "where aesthetic scores come from")
    path: str | None = key(None, "column: parquet or CSV with `key` and `column`")
    column: str = key("score", "name of the column with scores")
    model: str | None = key(None, "folder of an image-classification model, or the name that a column's scores carry")
    label: str = key("hq", "class whose probability is the score")
    batch: int | Literal["auto"] = key(8, "pictures at once; auto = as many as fit, halved when memory runs out", at_least=1)
    device: str = key("auto", "auto = a GPU where there is one")


@dataclass(frozen=True)
class TagConfig:
    """Where tags come from for pictures that have none."""

    source: Literal["none", "column", "wd"] = key("none", "where tags come from for pictures that have none")
    path: str | None = key(None, "column: parquet or CSV with `key` and `column`")
    column: str = key("tags", "name of the column with tags")
    model: str | None = key(None, "wd: folder with model.onnx and selected_tags.csv, or a name for the column's tags")
    general_threshold: float = key(0.35, "least probability of a general tag", at_least=0)
    character_threshold: float = key(0.85, "least probability of a character", at_least=0)
    use: Literal["missing", "all"] = key("missing", "missing = only pictures without any tag")
    batch: int | Literal["auto"] = key(8, "pictures at once; auto = as many as fit, halved when memory runs out", at_least=1)


@dataclass(frozen=True)
class DedupeConfig:
    """Equal files and equal pixels are always reduced to one; similar ones are reported or dropped."""

    phash: Literal["report", "drop"] = key("report", "similar pictures are reported, or all but one dropped")
    phash_distance: int = key(3, "bits of 64 that may differ", at_least=0, at_most=4)


@dataclass(frozen=True)
class QuotaConfig:
    """Shares of a column's values in a selection of `total` images."""

    by: str = key(MISSING, "column whose values are shared out")
    shares: dict[str, float] = key(dict, "value: its part of 1")
    total: int = key(MISSING, "images in all", at_least=1)


@dataclass(frozen=True)
class BoostConfig:
    """Pictures that are visited more often."""

    where: list[str] = key(MISSING, "`column op value`, all must hold")
    times: int = key(MISSING, "their visits are multiplied by this", at_least=1, at_most=MAX_REPEATS)


@dataclass(frozen=True)
class BalanceConfig:
    """Rare values of a column are visited more often, frequent ones never less."""

    by: str = key(MISSING, "column whose values are counted: character, artist, ..., or any other")
    to: int = key(MISSING, "visits an epoch that rarer values are raised to", at_least=1)
    most: int = key(8, "times as often as before that a picture is visited at most", at_least=1, at_most=MAX_REPEATS)


@dataclass(frozen=True)
class SelectConfig:
    """What one stage trains on."""

    where: list[str] = key(list, "`column op value`, all must hold")
    allow: str | None = key(None, "file of keys that skip the predicates")
    deny: str | None = key(None, "file of keys that are never taken; wins over allow")
    caps: dict[str, int] = key(dict, "most images per artist, character, ...")
    quota: QuotaConfig | None = key(None, "shares of a column's values")
    repeats: int = key(1, "visits of each image an epoch, times the source's", at_least=1, at_most=MAX_REPEATS)
    boost: list[BoostConfig] = key(list, "pictures visited `times` as often, where all of `where` holds; several multiply")
    balance: BalanceConfig | None = key(None, "rare values visited more often, after repeats and boost")
    seed: int | None = key(None, "null = the dataset's")
    min_bucket: int = key(16, "smaller buckets are merged into one of like shape, or stay; the stage's micro-batch", at_least=1)
    merge_crop: float = key(0.125, "most of its area that a picture may lose by that; 0 = nothing, 1 = always the nearest shape", at_least=0, at_most=1)


@dataclass(frozen=True)
class LatentsConfig:
    """How images are encoded and stored."""

    vae: str | None = key(None, "folder, single file, or owner/name@<40-digit commit>; needed by the step `latents`")
    dtype: Literal["fp16", "bf16"] = key("fp16", "of the stored values")
    encode: Literal["fp32", "fp16", "bf16"] = key("fp32", "of the VAE; fp16 needs the fp16-fix VAE")
    content: Literal["sample", "mean", "moments"] = key("sample", "one draw of the distribution, its mean, or both moments")
    resize: Literal["lanczos", "area"] = key("lanczos", "filter")
    backend: Literal["pillow", "pyvips"] = key("pillow", "library that decodes and resizes")
    batch: int | Literal["auto"] = key(8, "pictures at once; auto = as many as fit, halved when memory runs out", at_least=1)
    flip: Literal["none", "all"] = key("none", "all = a second latent of each picture's mirror image, for data.flip; twice the room and the time")
    flip_not: Any = key("configs/flip_not.yaml", "tags (* stands for any letters) whose pictures have no flip: a list, or a YAML file that holds one")
    device: str = key("auto", "auto = a GPU where there is one")


@dataclass(frozen=True)
class FailIfConfig:
    """A larger share than this makes the report exit 7; `judge.too_many` says what that is in a small set."""

    hard_excluded: float = key(0.0, "share of any selection")
    quarantine_errors: float = key(0.02, "share of all files")
    missing_rating: float = key(0.05, "share of rows whose source carries ratings")
    over_225_tokens: float = key(0.05, "share of captions that are cut")
    empty_captions: float = key(0.01, "share of captions without a tag")
    masterpiece: float = key(0.25, "share of the vocabulary's best quality word within a rating of at least quality.min_group rows")
    unreadable_latents: float = key(0.0, "share of stored latents")
    crop_loss: float = key(0.15, "mean share of a selection's area that the crop takes: 0.028 in the recipe's buckets + merge_crop")


@dataclass(frozen=True)
class ReportConfig:
    """The health report."""

    pictures: Literal["safe", "all", "none"] = key("safe", "safe = ratings g and s only; what has no rating is shown by its source's assume_rating: g or s, or by all")
    captions: int = key(2000, "pictures whose captions the page can search and correct; of more a random draw; 0 = none", at_least=0)
    fail_if: FailIfConfig = field(default_factory=FailIfConfig)


@dataclass(frozen=True)
class DatasetConfig:
    """From raw images to a training set."""

    name: str = key(MISSING, "the dataset is <root>/<name>")
    root: str = key("data", "folder of all datasets")
    seed: int = key(0, "of frozen latents and selections", at_least=0)
    tokenizers: str | None = key(None, "folder with tokenizer/ and tokenizer_2/; null = token counts are left out")
    separator: str = key("|||", "between the fixed and the flexible part of a caption, as the sources write it")
    buckets: BucketsConfig = field(default_factory=BucketsConfig)
    sources: list[SourceConfig] = key(list, "where images and metadata come from")
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    aliases: str | None = key(None, "CSV of alias and tag, or of name, category, count and aliases: other sites' and taggers' names of a tag, which becomes the tag before the policy reads it")
    corrections: str | None = key(None, "CSV with key, tag and add or drop: what changes in single captions; the dataset's page exports it")
    exclude: ExcludeConfig = field(default_factory=ExcludeConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    tag: TagConfig = field(default_factory=TagConfig)
    dedupe: DedupeConfig = field(default_factory=DedupeConfig)
    select: dict[str, SelectConfig] = key(lambda: {"pretrain": SelectConfig()}, "name of a stage: what it trains on")
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    max_quarantine_fraction: float = key(0.02, "a step that sets aside more ends with 7", at_least=0, at_most=1)
    workers: int = key(4, "processes; 0 = none beside the first", at_least=0)


def load_settings(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DatasetConfig:
    """Load a dataset config from YAML files (later win) and `key=value` overrides.

    Raises Halt(USAGE) naming the key; nothing is repaired.
    """
    return load_into(DatasetConfig, paths, overrides, DATASET_RULES, GONE)


def dataset_dir(settings: DatasetConfig) -> Path:
    """`<root>/<name>`, where all tables and shards of this dataset live."""
    return Path(settings.root) / settings.name


def check_paths(settings: DatasetConfig) -> None:
    """For a run of all steps: what a later step needs is asked for before the first has worked for hours.

    Raises Halt(USAGE) naming every key whose file or folder is not there.
    """
    score, tag = settings.score, settings.tag
    named = {
        "tokenizers": settings.tokenizers, "latents.vae": settings.latents.vae, "corrections": settings.corrections, "aliases": settings.aliases,
        "score.path": score.path if score.source == "column" else None,
        "score.model": score.model if score.source == "hf_image_classification" else None,
        "tag.path": tag.path if tag.source == "column" else None, "tag.model": tag.model if tag.source == "wd" else None,
        **{f"select.{stage}.{key}": getattr(select, key) for stage, select in settings.select.items() for key in ("allow", "deny")},
        **{f"sources {source.name}.{key}": getattr(source, key) for source in settings.sources
           for key in ("path", "images", "dictionary", "npz_vae")},
        **{f"sources {source.name}.mask": source.mask for source in settings.sources if source.mask != "alpha"},
    }  # fmt: skip
    problems = [f"{key}: {path} does not exist" for key, path in named.items() if path is not None and not Path(path).exists()]
    if settings.latents.vae is None:
        problems.append("latents.vae is not set: the step latents needs a VAE folder, a model folder or a .safetensors file")
    if problems:
        raise Halt(ExitCode.USAGE, "; ".join(problems))
