"""What a run directory tells, read for the report: whatever is missing or damaged becomes a note, never an error."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.observe.metrics import read_metrics
from train.storage import manifest

STEP_FOLDER = re.compile(r"step-(\d+)$")
LARGEST = 1e150  # its square is finite still, and a sum of such squares
_OF_A_RUN = ("run.json", "config.yaml", "metrics.jsonl", "lineage.json", "samples", "DONE")
PICTURE = re.compile(r"(\d+)(-ema)?\.png$")


@dataclass(frozen=True)
class Picture:
    """One sample: what it was asked for, and where it lies. `same` is equal for pictures that compare."""

    path: Path
    prompt: str
    facts: dict[str, str]
    ema: bool

    @property
    def same(self) -> tuple[str, ...]:
        """Prompt, seed, noise index, size and settings."""
        names = ("Seed", "Noise index", "Size", "Sampler", "Steps", "CFG scale", "CFG rescale")
        return (self.prompt, *(self.facts.get(name, "") for name in names))


@dataclass
class Run:
    """Everything the report shows of one run."""

    path: Path
    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)  # uid of a held-out image: its strata
    ending: str = ""
    samples: dict[int, list[Picture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def epoch_of(self, update: int) -> str:
        """`epoch 3 of 10` for an update of the metrics, empty for another."""
        found = [one["epoch"] for one in self.metrics if one.get("step") == update and finite(one.get("epoch"))]
        of = f" of {self.config['epochs']}" if self.config.get("epochs") else ""
        return f"epoch {int(found[-1]) + 1}{of}" if found else ""

    def series(self, key: str) -> list[tuple[float, float]]:
        """(update, value) where the metric is a finite number."""
        points = []
        for record in self.metrics:
            update, value = record.get("update"), record.get(key)
            if finite(update) and finite(value):
                points.append((float(update), float(value)))
        return points

    def waiting(self) -> list[tuple[float, float]]:
        """(update, % of its time that the training waited for data)."""
        points, before = [], 0.0
        for record in self.metrics:
            found = [record.get(key) for key in ("update", "images", "images_per_s", "data_wait_s")]
            if not all(finite(value) for value in found):
                continue
            update, images, speed, wait_s = map(float, found)  # type: ignore[arg-type]
            update_s = (images - before) / speed if speed else 0.0
            if update_s > 0:
                points.append((update, min(100.0 * wait_s / update_s, 100.0)))
            before = images
        return points

    def newest_pictures(self, *, ema: bool = False) -> list[Picture]:
        """The samples of the last whole preview, of the raw weights or of their average.

        One that a stop cut short has some of the prompts of the one before and nothing else. Prompts of older previews
        are not mixed in: what is judged here are one update's weights.
        """
        found: list[Picture] = []
        for update in sorted(self.samples.keys() - {0}, reverse=True):  # those of update 0 are the parent's
            pictures = [picture for picture in self.samples[update] if picture.ema == ema]
            if found and not {p.same for p in found} < {p.same for p in pictures}:
                break
            found = pictures or found
        return found


def check_run(path: str | Path) -> None:
    """Raises Halt(USAGE) for a folder that holds other things alone, such as a prepared set: it would be an empty page."""
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / manifest.NAME).is_file() and not any((folder / name).exists() for name in _OF_A_RUN):
        raise Halt(ExitCode.USAGE, f"{folder} is no run directory: it holds none of {', '.join(_OF_A_RUN)}")


def read_run(path: str | Path) -> Run:
    """The run at `path`; of a checkpoint its run up to that update. Raises Halt(USAGE) only when there is no such directory."""
    folder = Path(path)
    if not folder.is_dir():
        raise Halt(ExitCode.USAGE, f"{folder} is no run directory")
    if (folder / manifest.NAME).is_file() and (step := manifest.step_of(folder.resolve().name)) is not None:
        return _up_to(read_run(folder.resolve().parents[1]), step)
    run = Run(folder, folder.resolve().name)
    run.metrics = _latest(_lines(run, "metrics.jsonl"))
    run.validation = _measurements(run)
    run.lineage = _lineage(_json(run, "lineage.json"))
    run.held = {
        uid: [str(name) for name in one["strata"]]
        for uid, one in _json(run, "held_out.json").items()
        if isinstance(one, dict) and isinstance(one.get("strata"), list)
    }
    run.config = _config(run)
    run.ending = _ending(run)
    for child in sorted((folder / "samples").glob("step-*")) if (folder / "samples").is_dir() else ():
        match = STEP_FOLDER.search(child.name)
        pictures = read_pictures(child, run.notes) if match else []
        if match and pictures:
            run.samples[int(match.group(1))] = pictures
    return run


def _up_to(run: Run, step: int) -> Run:
    """What was there after `step` updates. What came of the run later is left out, its lineage too."""
    run.metrics, run.validation = (
        [one for one in records if one.get("step", one.get("update", 0)) <= step] for records in (run.metrics, run.validation)
    )
    run.samples = {update: pictures for update, pictures in run.samples.items() if update <= step}
    run.name, run.ending, run.lineage = f"{run.name} at update {step}", "a checkpoint", {}
    return run


def told_apart(runs: list[Run]) -> list[Run]:
    """`runs`, those of equal names renamed by the end of their paths: two runs of one stage are the usual comparison."""
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] == 1:
            continue
        own = run.path.resolve().parts
        others = {one.path.resolve().parts for one in runs} - {own}
        length = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        tail = "/".join(own[-length:])
        run.name = tail if own[-1] == run.name else f"{run.name} ({tail})"
    return runs


def read_pictures(folder: Path, notes: list[str]) -> list[Picture]:
    """The pictures NN.png of one folder, with what their PNG text says."""
    from PIL import Image

    found: dict[tuple[int, bool, str], Picture] = {}
    for path in sorted(folder.glob("*.png")):
        match = PICTURE.fullmatch(path.name)
        if match is None:
            continue
        try:
            with Image.open(path) as image:
                text = str(image.info.get("parameters", ""))
                size = f"{image.width}x{image.height}"
        except OSError as error:
            notes.append(f"{path}: unreadable ({error})")
            continue
        prompt, facts = read_parameters(text)
        known = {"Size": size, "Noise index": match.group(1), **facts}
        ema = bool(match.group(2))
        found[int(match.group(1)), ema, path.name] = Picture(path, prompt, known, ema)
    return [found[place] for place in sorted(found)]  # by number: 100.png comes after 99.png, not after 10.png


def newest_of_each(previews: Iterable[Sequence[Picture]]) -> list[Picture]:
    """The first picture of each prompt, the previews given from the newest to the oldest."""
    found: dict[tuple[str, ...], Picture] = {}
    for pictures in previews:
        for picture in pictures:
            found.setdefault(picture.same, picture)
    return list(found.values())


def read_parameters(text: str) -> tuple[str, dict[str, str]]:
    """(prompt, settings) of the text that A1111 writes into a PNG; ("", {}) where there is none."""
    lines = text.strip().split("\n")
    settings = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', lines[-1]))
    if "Steps" not in settings:
        return text.strip(), {}
    prompt = []
    for line in lines[:-1]:
        if line.startswith("Negative prompt:"):
            break
        prompt.append(line)
    return "\n".join(prompt), settings


def config_differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(key, value of each run) for every key in which the runs differ; a run without config shows "?"."""
    keys = sorted({key for run in runs for key in run.config})
    rows = []
    for key in keys:
        values = ["?" if not run.config else as_yaml(run.config.get(key)) for run in runs]
        known = {value for run, value in zip(runs, values, strict=True) if run.config}
        if len(known) > 1:
            rows.append((key, values))
    return rows


def as_yaml(value: Any) -> str:
    """A setting's value as the config spells it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per step, the last written (a resumed run repeats some), in order."""
    kept: dict[float, dict[str, Any]] = {}
    for record in records:
        step = record.get("step", record.get("update"))
        if finite(step):
            kept[float(step)] = record
    return [kept[step] for step in sorted(kept)]


def _lines(run: Run, name: str, *, needed: bool = True) -> list[dict[str, Any]]:
    path = run.path / name
    if not path.is_file():
        if needed:
            run.notes.append(f"{path} is missing")
        return []
    try:
        return read_metrics(path)
    except OSError as error:
        run.notes.append(f"{path}: {error}")
        return []


def finite(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number that a chart or a mean can hold; true, false, NaN and infinity are none.

    Nor is an integer of hundreds of digits, which no float holds.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _measurements(run: Run) -> list[dict[str, Any]]:
    """The records of validation.jsonl; what is not finite is left out of them and told in a note."""
    found = []
    for record in _latest(_lines(run, "validation.jsonl", needed=False)):
        update, losses = record.get("update"), _mapping(record.get("losses"))
        if not finite(update):
            run.notes.append(f"{run.path / 'validation.jsonl'}: a record without its update")
            continue
        kept = {uid: loss for uid, loss in losses.items() if finite(loss)}
        if len(kept) < len(losses):
            lost = len(losses) - len(kept)
            run.notes.append(f"{run.path}: held-out loss of update {update}: {lost} of {len(losses)} images not finite")
        strata = {name: one for name, one in _mapping(record.get("strata")).items() if isinstance(one, dict)}
        found.append({**record, "losses": kept, "strata": strata})
    return found


def _lineage(record: dict[str, Any]) -> dict[str, Any]:
    ancestors = record.get("ancestors")
    kept = [one for one in ancestors if isinstance(one, dict)] if isinstance(ancestors, list) else []
    return {**record, "ancestors": kept} if record else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(run: Run, name: str) -> dict[str, Any]:
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{path}: unreadable ({error})")
        return {}
    return found if isinstance(found, dict) else {}


def _config(run: Run) -> dict[str, Any]:
    path = run.path / "config.yaml"
    if not path.is_file():
        run.notes.append(f"{path} is missing")
        return {}
    try:
        identity = load_stage([path]).identity
    except Halt as halt:
        run.notes.append(f"{path}: {halt.message}")
        return {}
    run.name = identity.stage
    return dict(identity.flat)


def _ending(run: Run) -> str:
    if (run.path / "DONE").exists():
        return "done"
    record = _json(run, "exit.json")
    if record.get("reason"):
        run.notes.append(f"{run.path} ended: {record['reason']}")
    return f"{record.get('status', '?')} (code {record.get('code', '?')})" if record else "not finished"
