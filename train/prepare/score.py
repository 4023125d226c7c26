"""Step `score`: an aesthetic score per image, from a column or from an image-classification model.

The score is stored as float64 with the model's id and the hash of its preprocessing; the word is derived later, by the
policy. A model's float32 output widens exactly; a decimal from a file keeps its value.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256
from train.config.dataset import DatasetConfig, ScoreConfig, dataset_dir
from train.prepare.encoding.batching import Batches, own_device
from train.prepare.folders.files import read_image
from train.prepare.formats.keyed import numbers, of_records, read_column
from train.prepare.images.decode import Refused, decode
from train.prepare.tables import units
from train.prepare.tables.progress import say
from train.prepare.tables.quarantine import judge
from train.prepare.tables.schemas import AESTHETIC, Quarantine
from train.prepare.tables.workers import Peers, rank_here

SCORE_VERSION = 1
UNIT_FILES = 2000
Predict = Callable[[list[Image.Image]], list[float]]
Answer = Callable[[list[Image.Image]], list[tuple[Any, ...]]]


def run(settings: DatasetConfig) -> None:
    """Write `aesthetic/`, or nothing with `score.source: none`."""
    config, dataset = settings.score, dataset_dir(settings)
    if config.source == "none":
        print("score: score.source is none: no aesthetic tags")
        return
    if config.source == "column":
        _from_column(config, dataset)
    else:
        _from_model(settings, dataset)
    units.merge_quarantine(dataset)
    judge(settings, "score")


def _from_column(config: ScoreConfig, dataset: Path) -> None:
    path = Path(config.path or "")
    known = units.read_table(dataset, "records", ["key"])["key"].combine_chunks()
    table = of_records(read_column(path, config.column, "score"), known, f"score.path {path}").sort_by("key")
    scores = numbers(table, f"score.path {path}")
    model, made = (pa.repeat(pa.scalar(text), len(table)) for text in (config.model or "column", "column"))
    rows = pa.table({"key": table["key"], "model": model, "preproc_hash": made, "score": scores}).cast(AESTHETIC)
    step = units.Step(
        dataset, "aesthetic", AESTHETIC, units.config_id(code=SCORE_VERSION, score=vars(config)), ("records",)
    )
    hashes = [units.row_hash(*pair) for pair in zip(rows["key"].to_pylist(), rows["score"].to_pylist(), strict=True)]
    units.take_rows(step, rows, hashes)
    print(f"score: {len(rows)} of {len(known)} records have a score")


def _from_model(settings: DatasetConfig, dataset: Path) -> None:
    predict, model, preprocessing = load_classifier(settings.score)
    batches = Batches(settings.score.batch, "score.batch", own_device(settings.score.device, rank_here()).type)
    config = units.config_id(code=SCORE_VERSION, model=model, preprocessing=preprocessing, label=settings.score.label)

    def row(key: str, score: float | None) -> dict[str, Any]:
        finite = None if score is None or math.isnan(score) else score
        return {"key": key, "model": model, "preproc_hash": preprocessing, "score": finite}

    step = units.Step(dataset, "aesthetic", AESTHETIC, config, ("records", "probe"))
    run_model(settings, step, batches, lambda images: [(v,) for v in predict(images)], row, "score")


def run_model(
    settings: DatasetConfig, step: units.Step, batches: Batches, predict: Answer,
    row: Callable[..., dict[str, Any]], name: str, keep: pa.Array | None = None,
) -> None:  # fmt: skip
    """Fill a table with what a model says of every accepted image (of those in `keep`), batch by batch.

    An image that the probe accepted and that cannot be read now gets no result and a quarantine row.
    """
    sources = {source.name: source for source in settings.sources}
    images = accepted(step.dataset, keep)

    def read(record: Mapping[str, Any]) -> Image.Image | Quarantine:
        try:
            data = read_image(sources[record["source"]], record["uri"], record["member"])
            return decode(data, settings.probe).image
        except Refused as error:
            return Quarantine(record["key"], name, error.reason, f"{record['uri']}: {error}", error.exception)
        except (OSError, ValueError) as error:
            reason = "missing_file" if isinstance(error, FileNotFoundError) else "truncated"
            message = f"{record['uri']}: accepted by the probe, cannot be read now: {error}"
            return Quarantine(record["key"], name, reason, message, type(error).__name__)  # type: ignore[arg-type]

    def see(seen: Sequence[Image.Image]) -> list[tuple[Any, ...]]:
        faults.at("predict", len(seen))
        return predict(list(seen))

    def work(part: pa.Table) -> tuple[pa.Table, list[Quarantine]]:
        rows, entries = list[dict[str, Any]](), list[Quarantine]()
        records = part.to_pylist()
        while group := records[len(rows) : len(rows) + batches.size]:
            found = [read(record) for record in group]
            entries += [image for image in found if isinstance(image, Quarantine)]
            answers = iter(batches.through(see, [image for image in found if isinstance(image, Image.Image)]))
            for record, image in zip(group, found, strict=True):
                answer = (None,) if isinstance(image, Quarantine) else next(answers)
                rows.append(row(record["key"], *answer))
            peers.tick(len(group))
        return pa.Table.from_pylist(rows, schema=step.schema), entries

    columns = ("key", "raw_hash", "file_size", "mtime_ns")
    hashes = [units.row_hash(*values) for values in zip(*(images[c].to_pylist() for c in columns), strict=True)]
    with Peers(step.dataset) as peers:
        units.run_units(step, units.cut(images, hashes, UNIT_FILES), work, peers)
    if batches.seen:
        say(batches.told(name))


def accepted(dataset: Path, keep: pa.Array | None = None) -> pa.Table:
    """Records that the probe accepted (and that are in `keep`), with where their files are, in key order."""
    probe = units.read_table(dataset, "probe", ["key", "status", "file_size", "mtime_ns"])
    records = units.read_table(dataset, "records", ["key", "source", "uri", "member", "raw_hash"])
    probe = probe.filter(pc.equal(probe["status"], "ok")).drop_columns(["status"])
    if keep is not None:
        probe = probe.filter(pc.is_in(probe["key"], value_set=keep))
    places = pc.index_in(probe["key"], value_set=records["key"].combine_chunks())
    found = records.take(places.combine_chunks())
    for name in ("file_size", "mtime_ns"):
        found = found.append_column(name, probe[name])
    return found.combine_chunks()


def load_classifier(config: ScoreConfig, option: str = "score.model") -> tuple[Predict, str, str]:
    """(probabilities of `score.label` for a batch, model id, hash of its preprocessing) of a local folder.

    The model's weights are safetensors only. bf16 on a GPU; the probability is taken in float32, by the function that
    the model was trained for, as the library's own pipeline chooses it. Raises Halt, which names `option`: USAGE
    (no such model, unknown label), MISMATCH (cannot be loaded).
    """
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = Path(config.model or "")
    if not (folder / "config.json").is_file():
        raise Halt(ExitCode.USAGE, f"{option} {folder} is not a folder with an image-classification model")
    device = own_device(config.device, rank_here())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {"local_files_only": True}
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True, dtype=dtype, **options)
    except Exception as error:  # libraries raise whatever they like: OSError, ValueError, JSONDecodeError, SafetensorError
        reason = f"{type(error).__name__}: {error}"
        raise Halt(ExitCode.MISMATCH, f"{option} {folder} cannot be loaded: {reason}") from error
    model = model.to(device).eval()
    # Softmax over a single logit is 1 for every picture.
    sigmoid = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
    labels = {str(name): int(number) for number, name in model.config.id2label.items()}
    if config.label not in labels:
        raise Halt(ExitCode.USAGE, f"score.label {config.label!r}: the model knows {', '.join(sorted(labels))}")

    def predict(images: list[Image.Image]) -> list[float]:
        pixels = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
        scores = [0.0] * len(images)
        for shape in {one.shape for one in pixels}:  # several, where the processor does not resize to one size
            places = [place for place, one in enumerate(pixels) if one.shape == shape]
            with torch.inference_mode():
                logits = model(pixel_values=torch.cat([pixels[place] for place in places]).to(device, dtype)).logits
            logits = logits.float()
            values = (logits.sigmoid() if sigmoid else logits.softmax(-1))[:, labels[config.label]].tolist()
            for place, value in zip(places, values, strict=True):
                scores[place] = value
        return scores

    preprocessing = json.dumps(processor.to_dict(), sort_keys=True, default=str) + ("sigmoid" if sigmoid else "")
    return predict, model_id(folder), hashlib.sha256(preprocessing.encode()).hexdigest()[:16]


def model_id(folder: Path) -> str:
    """Folder name and the first half of the weights' sha256."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(path)))
    return f"{folder.name}@{digest.hexdigest()[:16]}"

