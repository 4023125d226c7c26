"""Any model by its path: run directory, checkpoint of a run, diffusers folder, single file. No tensor is read yet.

A checkpoint's folder means its weights as they were trained; its ema.safetensors their average. A stage starts from finished models alone (`model.source`); whoever looks may also look at a run that is under way.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.derived import Owners, Start, TrainedAs
from train.config.stage import ModelConfig, load_stage
from train.diffusion.sampling import RECIPE
from train.model import prediction, source
from train.model.adapters import bases, merging, reading, runs
from train.model.source import LocalModel
from train.storage import manifest, tensor_files
from train.storage.rundir import read_done

log = logging.getLogger("anix")
TRAINED, AVERAGE = "model.safetensors", "ema.safetensors"  # of a checkpoint
CONDITIONING: dict[str, tuple[Any, ...]] = {
    "max_tokens": (75, 150, 225),
    "context": ("stitched", "chunks"),
    "pooled_projection": ("correct", "sd_scripts"),
    "timestep_embedding": ("correct", "sd_scripts"),
}


def open_any(path: str | Path, *, tokenizers: str | None = None, hashed: bool = True) -> LocalModel:
    """The model at `path`; of a run that is not finished its newest sound checkpoint, over the stage's own start.

    Raises Halt: USAGE (no such path), MISMATCH (damaged or foreign, the start of a checkpoint's stage gone),
    NO_CHECKPOINT (a run without a sound one, a checkpoint that is damaged).
    """
    found = checkpoint_file(Path(path))
    if found is None:
        try:
            return source.resolve(ModelConfig(init_from=str(path), tokenizers=tokenizers), hashed=hashed)
        except Halt as halt:  # nobody wrote that key
            raise Halt(halt.code, halt.message.removeprefix("model.init_from ")) from halt
    folder, stage = found.parent, stage_at(found.parent)
    model, adapter = stage.origin.model, stage.running.adapter
    start = source.resolve(replace(model, tokenizers=tokenizers) if tokenizers else model, hashed=False)
    trained = tensor_files.open_file(found)
    record = manifest.read(folder).files[found.name]
    averaged = " (EMA)" if found.name == AVERAGE else ""
    title = f"{stage.identity.stage} at update {step_at(folder)}{averaged}"
    other = f"; their average: {folder / AVERAGE}" if not averaged and (folder / AVERAGE).is_file() else ""
    told = (f"the average of its weights{averaged}" if averaged else f"its weights as they were trained{other}",)
    said: dict[str, Any] = {"path": folder, "sha256": record.sha256, "metadata": {"modelspec.title": title}, "lineage": None, "notes": told}
    if adapter is not None:
        return replace(runs.summed(start, trained.blobs, adapter, trained.path), kind="run", **said)
    foreign = [name for name, blob in sorted(trained.blobs.items()) if name not in start.weights or start.weights[name].shape != blob.shape]
    if foreign:
        raise Halt(ExitCode.MISMATCH, f"{trained.path} does not belong to model.init_from {start.path}: {foreign[:5]}")
    return replace(start, kind="run", weights={**start.weights, **trained.blobs}, **said)


def step_at(checkpoint: Path) -> int:
    """Plan steps that a checkpoint has behind it."""
    return manifest.read(checkpoint).step


def stage_at(checkpoint: Path) -> Start:
    """The stage that a checkpoint is of. Raises Halt(MISMATCH) for one that was moved out of its run."""
    config = checkpoint.parents[1] / "config.yaml"
    if not config.is_file():
        raise Halt(ExitCode.MISMATCH, f"{checkpoint} is a checkpoint without its run: {config.parent} holds no config.yaml, which says what it started from")
    return load_stage([config]).start


def with_adapters(local: LocalModel, given: Sequence[str]) -> LocalModel:
    """The model with adapters added, FILE or FILE:weight each; itself where none is given. Another base than theirs is told.

    Its hash is of all of them together. Raises Halt: USAGE (no such path, no weight), MISMATCH (an adapter of another model).
    """
    if not given:
        return local
    adapters, told = bases.opened(list(given), local)
    for line in told:
        log.warning("%s", line)
    parts = [f"{source.sha256_of(reading.file_of(adapter.path))}:{weight:g}" for adapter, weight in adapters]
    digest = hashlib.sha256("\n".join([local.sha256, *parts]).encode()).hexdigest()
    title = local.metadata.get("modelspec.title") or local.path.stem
    named = " + ".join([title, *(f"{adapter.path.stem}:{weight:g}" for adapter, weight in adapters)])
    weights = merging.widened(local.weights, adapters)
    return replace(local, weights=weights, sha256=digest, metadata={**local.metadata, "modelspec.title": named})


def checkpoint_file(path: Path) -> Path | None:
    """The weights file that `path` means where it means a checkpoint: of its trained weights or, named itself, their average."""
    if path.name in (TRAINED, AVERAGE) and (path.parent / manifest.NAME).is_file():
        folder, name = checkpoint_at(path.parent), path.name
    else:
        folder, name = checkpoint_at(path), TRAINED
    if folder is not None and not (folder / name).is_file():
        raise Halt(ExitCode.MISMATCH, f"{folder} holds no {name}: the stage kept no average (ema.decay)")
    return folder / name if folder is not None else None


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the newest sound one of a run that is not finished; else None."""
    if (path / manifest.NAME).is_file():
        try:
            manifest.verify(path, full=False)
        except manifest.Damaged as damage:
            raise Halt(ExitCode.NO_CHECKPOINT, f"{path} must not be used: {damage}") from damage
        return path.absolute()
    if not (path / "checkpoints").is_dir() or read_done(path) is not None:
        return None
    named = {step: p for p in (path / "checkpoints").iterdir() if (step := manifest.step_of(p.name)) is not None}
    for _, folder in sorted(named.items(), reverse=True):
        try:
            manifest.verify(folder, full=False)
        except manifest.Damaged:
            continue  # left by a kill; a resume passes over it as well
        return folder.absolute()
    raise Halt(ExitCode.NO_CHECKPOINT, f"{path} is not finished and holds no sound checkpoint")


def stage_of(path: Path) -> Owners | None:
    """What the config says that a run, its checkpoint, its exported folder or its single file was made with; None without one.

    Beside a lone file only the config of a finished run counts: any other may be of a stage that starts from the file.
    """
    inside = path.absolute().parent if path.name in (TRAINED, AVERAGE) and (path.parent / manifest.NAME).is_file() else path.absolute()
    own = [inside / "training.yaml", inside / "config.yaml", *([inside.parents[1] / "config.yaml"] if (inside / manifest.NAME).is_file() else [])]
    beside = inside.parent / "config.yaml"
    if (inside.parent / "DONE").is_file():
        own.append(beside)
    file = next((file for file in own if file.is_file()), None)
    return None if file is None else load_stage([file]).owners


def conventions(path: Path, local: LocalModel) -> TrainedAs:
    """As the config beside the weights says; without one as the model's record and scheduler, else the recipe's."""
    stage = stage_of(path)
    if stage is not None:
        return stage.observers.trained_as
    scheduler, stated = local.configs["scheduler"], (local.lineage or {}).get("conditioning")
    known = {
        name: stated[name]
        for name, choices in CONDITIONING.items()
        if isinstance(stated, dict) and stated.get(name) in choices  # from a file that anybody may have written
    }
    return replace(RECIPE, **prediction.sampled_as(scheduler), **known)
