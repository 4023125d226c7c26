"""What a checkpoint of a stage becomes for others: usable files and the record of what made them.

The same at the stage's end, at the end of an epoch (`export.every_epochs`), and for a checkpoint that convert.py is given.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.base.errors import Halt
from train.config.derived import Identity, Origin
from train.data.index import Index
from train.engine import export
from train.model import layouts, prediction
from train.model import source as model_source
from train.model.adapters import bases, runs, training
from train.model.source import LocalModel
from train.recipe import buckets
from train.recipe.order import Plan
from train.storage import manifest, tensor_files
from train.storage.checkpoint import Loaded, open_checkpoint

log = logging.getLogger("anix")
COUNTED_IMAGES, SHOWN_TAGS = 100_000, 2_000  # for the tag frequencies of an adapter's file


@dataclass(frozen=True)
class Files:
    """What the files of a stage are made from beside a checkpoint."""

    identity: Identity
    origin: Origin
    source: LocalModel
    index: Index | None  # whose tags an adapter's file counts; None: not at hand
    side_px: int | None  # of the square that was trained; None: as the parent says
    epochs: Mapping[int, int]  # updates done: epochs done, where a usable file is left


def files_of(identity: Identity, origin: Origin, source: LocalModel, index: Index, plan: Plan) -> Files:
    """Of a stage that trains `plan`."""
    return Files(identity, origin, source, index, buckets.square_of(plan.buckets), plan.ends_of(origin.files_every_epochs))


def missing_bytes(run_path: Path, files: Files, trained: Iterable[torch.Tensor], *, average: bool) -> int:
    """Of the usable files of epochs that are not there yet."""
    size, whole = 4 if files.origin.export.dtype == "fp32" else 2, files.origin.adapter is None
    values = sum(math.prod(one.shape) for one in (files.source.weights.values() if whole else trained))
    return sum(not (run_path / epoch_file(files, epoch)).exists() for epoch in files.epochs.values()) * (1 + average) * size * values


def record_of(files: Files, loaded: Loaded, *, average: bool = False) -> dict[str, Any]:
    """The lineage of the weights in a checkpoint, or of their average."""
    told, adapter, source, state = files.origin.trained_as, files.origin.adapter, files.source, loaded.state
    weights = loaded.manifest.files["ema.safetensors" if average else "model.safetensors"]
    record = export.lineage_record(
        stage=files.identity.stage,
        source=source,
        dataset_fingerprint=str(state.get("facts", {}).get("dataset")),
        config_hash=files.identity.hash,
        seed=files.identity.seed,
        updates=loaded.progress.updates,
        images=loaded.progress.images,
        versions=state.get("notes", {}).get("versions", {}),
        license=model_source.license_of(files.origin.export, source),
        weights_sha256=weights.sha256,
        conditioning={
            "max_tokens": told.max_tokens,
            "context": told.context,
            "pooled_projection": told.pooled_projection,
            "timestep_embedding": told.timestep_embedding,
        },
        accepted=state.get("accepted", ()),
        conversion=prediction.conversion(told, source, convert=files.origin.convert),
        extended=state.get("extended", ()),
    )
    if state["config"].get("optimizer.name") == "schedulefree" and not average:
        record["weights"] = "the average of schedule-free AdamW"
    if adapter is not None:
        record["adapter"] = {**training.record(adapter), "base": bases.known_as(source.base or source)}
    return record


def write_all(run_path: Path, files: Files, final: Loaded, poll: Callable[[], None]) -> None:
    """What a finished stage leaves in `run_path`: the model, or what was trained beside it, or both."""
    origin, source, adapter = files.origin, files.source, files.origin.adapter
    trained, average = final.path / "model.safetensors", final.path / "ema.safetensors" if "ema" in final.groups else None
    record = record_of(files, final)
    if adapter is not None:
        metadata = _metadata(files, record, final)
        export.export_adapter(run_path, trained, source, record, origin.export, adapter, metadata=metadata, average=average, poll=poll)
        if not origin.export.merged:
            return
        source, average = runs.summed(source, tensor_files.open_file(trained).blobs, adapter, trained), None
    export.export_stage(
        run_path,
        trained if adapter is None else None,
        source,
        record,
        origin.export,
        average=average,
        poll=poll,
        **_told(files),
    )


def write_one(out: Path, files: Files, loaded: Loaded, *, average: bool = False, poll: Callable[[], None] = lambda: None) -> str:
    """One file of a checkpoint, what lies there replaced: the whole model, or an adapter in kohya's names. Its sha256."""
    origin, record, name = files.origin, record_of(files, loaded, average=average), out.stem
    trained = loaded.path / ("ema.safetensors" if average else "model.safetensors")
    if origin.adapter is not None:
        metadata = _metadata(files, record, loaded)
        made = export.ready_adapter(trained, files.source, origin.export, origin.adapter, metadata=metadata, name=name, poll=poll)
        return export.write_kohya(out, made, files.source)
    return export.write_single(out, _ready(files, record, trained, average=average, poll=poll), files.source)


def write_folder(out: Path, files: Files, loaded: Loaded, yaml: str, *, average: bool = False) -> None:
    """A diffusers folder of a checkpoint, or the folder of its adapter. Raises Halt(USAGE) where something lies there."""
    origin, record = files.origin, record_of(files, loaded, average=average)
    trained = loaded.path / ("ema.safetensors" if average else "model.safetensors")
    if origin.adapter is not None:
        metadata = _metadata(files, record, loaded)
        made = export.ready_adapter(trained, files.source, origin.export, origin.adapter, metadata=metadata, name=out.name)
        export.write_lora_folder(out, made, files.source, record, yaml)
        return
    told = origin.trained_as
    model = _ready(files, record, trained, average=average)
    objective = {"prediction": told.prediction, "zero_terminal_snr": told.zero_terminal_snr}
    export.write_folder(out, model, files.source, record, yaml, **objective)  # type: ignore[arg-type]


def epoch_file(files: Files, epoch: int, *, average: bool = False) -> str:
    """`<stage>-e0005.safetensors`: the name of the stage's own file, `-ema` and `-lora` included, with the epoch behind it."""
    kind = ("-ema" if average else "") + ("-lora" if files.origin.adapter is not None else "")
    return f"{files.identity.stage}{kind}-e{epoch:04d}.safetensors"


def leave_epochs(run_path: Path, files: Files, done: int, poll: Callable[[], None]) -> list[str]:
    """Write the usable files of all epochs up to `done` updates that are missing and whose checkpoint is there; their names.

    What lies there is never written over; one that is of other weights is told. What `poll` raises ends the writing.
    """
    written = []
    for step, epoch in files.epochs.items():
        folder = run_path / "checkpoints" / f"step-{step:08d}"
        if step > done or not folder.is_dir():
            continue
        missing = [average for average in _kinds(folder) if not (run_path / epoch_file(files, epoch, average=average)).exists()]
        if not missing:
            _tell_other(run_path / epoch_file(files, epoch), folder)
            continue
        try:
            loaded = open_checkpoint(folder, verify="size")
        except manifest.Damaged as damage:
            log.warning("%s: no usable file of epoch %d: %s", folder, epoch, damage)
            continue
        for average in missing:
            name = epoch_file(files, epoch, average=average)
            write_one(run_path / name, files, loaded, average=average, poll=poll)
            written.append(name)
    return written


def _kinds(folder: Path) -> tuple[bool, ...]:
    return (False, True) if (folder / "ema.safetensors").is_file() else (False,)


def _tell_other(file: Path, folder: Path) -> None:
    """Say that a usable file is not of the checkpoint beside it: of an earlier run, or of earlier settings."""
    try:
        stated = layouts.record_in(export.read_metadata(file)).get("weights_sha256")
        own = manifest.read(folder).files["model.safetensors"].sha256
    except (Halt, manifest.Damaged, OSError, KeyError):
        stated = own = ""
    if stated != own:
        log.warning("%s was there before and is not of %s: it stays; move it away for a new one", file, folder)


def _told(files: Files) -> dict[str, Any]:
    """What the exported model says of its objective and sizes."""
    told = files.origin.trained_as
    return {
        "prediction": told.prediction, "zero_terminal_snr": told.zero_terminal_snr, "flow_shift": told.flow_shift,
        "timesteps": files.origin.timesteps, "side_px": files.side_px,
    }  # fmt: skip


def _ready(
    files: Files, record: Mapping[str, Any], trained: Path, *, average: bool, poll: Callable[[], None] = lambda: None
) -> export.Ready:
    """The whole model with the tensors of `trained`, a checkpoint's weights or their average over them."""
    weights = trained.with_name("model.safetensors") if average else trained
    model = export.ready(weights, files.source, record, files.origin.export, poll=poll, **_told(files))
    return export.averaged(model, trained, poll) if average else model


def _metadata(files: Files, record: Mapping[str, Any], loaded: Loaded) -> dict[str, str]:
    """Of an adapter's files."""
    told = files.origin.trained_as
    said = export.metadata_of(record, files.origin.export, told.prediction, files.origin.timesteps, files.side_px or 1024, told.flow_shift)
    return said | (_said_of_training(files.index, files.identity, loaded.progress.updates) if files.index is not None else {})


def _said_of_training(index: Index, identity: Identity, updates: int) -> dict[str, str]:
    """The `ss_*` fields of sd-scripts that programs show of a training: how often each tag was trained, under the stage's name.

    Of very many images every n-th is counted. No path and no file's name goes along.
    """
    every = -(-len(index) // COUNTED_IMAGES)
    found: Counter[str] = Counter()
    for i in range(0, len(index), max(every, 1)):
        fixed, flex = index.caption(i)[:2]
        found.update([*fixed, *flex])
    common = {tag: count * max(every, 1) for tag, count in found.most_common(SHOWN_TAGS)}
    return {
        "ss_tag_frequency": json.dumps({identity.stage: common}, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps({identity.stage: {"n_repeats": 1, "img_count": len(index)}}),
        "ss_num_train_images": str(len(index)),
        "ss_steps": str(updates),
        "ss_seed": str(identity.seed),
    }
