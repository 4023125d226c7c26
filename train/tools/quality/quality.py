"""What judges say of the samples of each stage, with intervals, and what changes from stage to stage.

Stages are compared on the prompts and seeds that they share: their pictures are resampled in pairs.
Shape legend: N pictures of a stage, M distinct prompts, T tags, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.prompts import QUALITY_PREFIX
from train.observe.runs import Picture, read_pictures, read_run
from train.recipe import captions
from train.recipe.tag_policy import AESTHETIC_TAGS, aesthetic_tag, preset
from train.tools.quality import intervals
from train.tools.quality.judges import Aesthetic, Clip, Tagger, written
from train.tools.quality.record import VERSION

BATCH = 8
BINS = 10  # of the aesthetic score's distribution, over 0..1
QUANTILES = (0.1, 0.5, 0.9)
_POLICY = preset("default")  # the card's thresholds of the aesthetic tags

F64 = npt.NDArray[np.float64]


@dataclass
class Measured:
    """One stage: its pictures, and for each statistic two numbers per picture whose sums are divided."""

    name: str
    pictures: list[Picture]
    columns: dict[str, tuple[F64, F64]] = field(default_factory=dict)
    asked_NT: npt.NDArray[np.bool_] | None = None
    seen_NT: npt.NDArray[np.bool_] | None = None


def stage_pictures(given: Sequence[str]) -> dict[str, list[Picture]]:
    """{name: pictures} of `NAME=DIR` (pictures by scripts/sample.py) and run directories (their newest samples).

    Averaged weights' pictures are left out. Raises Halt(USAGE) for what has none, or a name given twice.
    """
    stages: dict[str, list[Picture]] = {}
    for one in given:
        # A directory of that very name comes first: a run may be called lr=1e-5.
        name, equals, folder = one.partition("=") if not Path(one).is_dir() else (one, "", "")
        if equals and not Path(folder).is_dir():
            raise Halt(ExitCode.USAGE, f"{one}: {folder} is no folder; needed is NAME=DIR or a run directory")
        if equals:
            found = read_pictures(Path(folder), [])
        else:
            run = read_run(one)
            name, found = run.name, run.newest_pictures()
        found = [picture for picture in found if not picture.ema]
        if not found:
            raise Halt(ExitCode.USAGE, f"{one}: no pictures NN.png; make some with scripts/sample.py --out DIR")
        if name in stages:
            raise Halt(ExitCode.USAGE, f"{one}: the name {name} is given twice; use NAME=DIR")
        stages[name] = found
    return stages


def joined(stages: Mapping[str, list[Picture]], more: Mapping[str, list[Picture]]) -> dict[str, list[Picture]]:
    """Both, in their order. Raises Halt(USAGE) for a name that both have."""
    if both := sorted(stages.keys() & more.keys()):
        raise Halt(ExitCode.USAGE, f"two stages are called {both[0]}: give the one with pictures as NAME=DIR")
    return {**stages, **more}


def measure(
    stages: Mapping[str, Sequence[Picture]],
    *,
    aesthetic: Aesthetic | None = None,
    clip: Clip | None = None,
    tagger: Tagger | None = None,
) -> dict[str, Any]:
    """The record (train/tools/quality/record.py keeps it): judges, one entry per stage, paired changes between stages."""
    measured = [Measured(name, list(pictures)) for name, pictures in stages.items()]
    record: dict[str, Any] = {
        "version": VERSION,
        "bootstrap": {"draws": intervals.DRAWS, "seed": intervals.SEED, "level": intervals.LEVEL},
        "judges": {},
        "stages": {one.name: {"pictures": len(one.pictures)} for one in measured},
    }
    if aesthetic is not None:
        record["judges"]["aesthetic"] = {"model": aesthetic.name, "label": aesthetic.label}
        for one in measured:
            record["stages"][one.name]["aesthetic"] = _aesthetic(one, aesthetic)
    if clip is not None:
        record["judges"]["clip"] = {"model": clip.name, "prompts_cut": _clip(measured, clip)}
    if tagger is not None:
        record["judges"]["tags"] = {"model": tagger.name, "thresholds": tagger.thresholds}
        _tags(measured, tagger)
        for one in measured:
            record["stages"][one.name]["by_tag"] = _by_tag(one, tagger.tags)
    for one in measured:
        found = {name: asdict(intervals.ratio(*columns)) for name, columns in one.columns.items()}
        record["stages"][one.name]["statistics"] = found
    record["changes"] = changes(measured)
    return record


def _aesthetic(stage: Measured, judge: Aesthetic) -> dict[str, Any]:
    scores = np.array(_in_batches(stage.pictures, judge.score), np.float64)
    stage.columns["aesthetic"] = scores, np.ones(len(scores))
    words = [aesthetic_tag(score, _POLICY) for score in scores.tolist()]
    return {
        "quantiles": {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES},
        "histogram": np.histogram(scores, bins=BINS, range=(0.0, 1.0))[0].tolist(),
        "words": {word: asdict(intervals.share(words.count(word), len(words))) for word in AESTHETIC_TAGS},
    }


def _clip(stages: Sequence[Measured], judge: Clip) -> int:
    """Cosine with the own prompt, and whether no other prompt of the set is nearer; returns how many were cut."""
    texts = sorted({content(picture) for stage in stages for picture in stage.pictures})
    texts_MD = np.concatenate([judge.texts(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)])
    place = {text: number for number, text in enumerate(texts)}
    for stage in stages:
        images_ND = np.stack(_in_batches(stage.pictures, lambda images: list(judge.pictures(images))))
        cosines_NM = images_ND.astype(np.float64) @ texts_MD.astype(np.float64).T
        own = cosines_NM[np.arange(len(stage.pictures)), [place[content(picture)] for picture in stage.pictures]]
        ones = np.ones(len(own))
        stage.columns["clip"] = own, ones
        if len(texts) > 1:
            stage.columns["clip_first"] = (own >= cosines_NM.max(axis=1)).astype(np.float64), ones
    return sum(judge.cut(text) for text in texts)


def _tags(stages: Sequence[Measured], judge: Tagger) -> None:
    """Recall: of the tags asked for, how many are seen. Precision: of those seen, how many were asked for.

    Only tags that some prompt of the set asks for count; nobody lists everything that a picture may show.
    """
    asked = {stage.name: _asked(stage.pictures, judge.tags) for stage in stages}
    known_T = np.any(np.concatenate(list(asked.values())), axis=0)
    for stage in stages:
        seen_NT = np.stack(_in_batches(stage.pictures, lambda images: list(judge.see(images)))) & known_T
        asked_NT = asked[stage.name]
        stage.asked_NT, stage.seen_NT = asked_NT, seen_NT
        both = (asked_NT & seen_NT).sum(axis=1).astype(np.float64)
        stage.columns["tag_recall"] = both, asked_NT.sum(axis=1).astype(np.float64)
        stage.columns["tag_precision"] = both, seen_NT.sum(axis=1).astype(np.float64)


def _asked(pictures: Sequence[Picture], tags: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which of the judge's tags each prompt asks for, bool[N,T]."""
    wanted = [{written(tag) for tag in captions.split(picture.prompt)[1]} for picture in pictures]
    return np.array([[tag in one for tag in tags] for one in wanted], np.bool_)


def _by_tag(stage: Measured, tags: Sequence[str]) -> dict[str, Any]:
    assert stage.asked_NT is not None
    assert stage.seen_NT is not None
    found = {}
    for number, tag in enumerate(tags):
        asked_N, seen_N = stage.asked_NT[:, number], stage.seen_NT[:, number]
        asked, seen, both = (int(column.sum()) for column in (asked_N, seen_N, asked_N & seen_N))
        if asked or seen:
            recall, precision = intervals.share(both, asked), intervals.share(both, seen)
            found[tag] = {"asked": asked, "seen": seen, "recall": asdict(recall), "precision": asdict(precision)}
    return found


def changes(stages: Sequence[Measured]) -> list[dict[str, Any]]:
    """From each stage to the next and from the first to the last, on the prompts and seeds that both have."""
    pairs = [*itertools.pairwise(stages), *([(stages[0], stages[-1])] if len(stages) > 2 else [])]
    found = []
    for before, after in pairs:
        rows = {picture.same: number for number, picture in reversed(list(enumerate(before.pictures)))}
        kept = {picture.same: number for number, picture in reversed(list(enumerate(after.pictures)))}
        common = sorted(set(rows) & set(kept))
        left, right = [rows[same] for same in common], [kept[same] for same in common]
        statistics = {
            name: asdict(intervals.change(_take(before.columns[name], left), _take(after.columns[name], right)))
            for name in before.columns
        }
        found.append({"from": before.name, "to": after.name, "pictures": len(common), "statistics": statistics})
    return found


def _take(columns: tuple[F64, F64], rows: Sequence[int]) -> tuple[F64, F64]:
    return columns[0][list(rows)], columns[1][list(rows)]


def content(picture: Picture) -> str:
    """The prompt without the card's quality prefix: CLIP reads 77 tokens, and nobody sees `absurdres`."""
    prefix = captions.split(QUALITY_PREFIX)[1]
    tags = captions.split(picture.prompt)[1]
    return captions.join(tags[len(prefix) :] if tags[: len(prefix)] == prefix else tags)


def _in_batches(pictures: Sequence[Picture], judge: Callable[[list[Image.Image]], list[Any]]) -> list[Any]:
    """One answer per picture, in order. A batch holds one size, because some models keep a picture's shape."""
    found: dict[int, Any] = {}
    by_size: dict[str, list[int]] = {}
    for number, picture in enumerate(pictures):
        by_size.setdefault(picture.facts.get("Size", ""), []).append(number)
    for numbers in by_size.values():
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            found |= zip(batch, judge([_load(pictures[number].path) for number in batch]), strict=True)
    return [found[number] for number in range(len(pictures))]


def _load(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise Halt(ExitCode.MISMATCH, f"{path}: unreadable ({error})") from error
