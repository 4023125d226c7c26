"""A checkpoint of a run as a file for others: what its stage would have left had it ended there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from train.engine import usable
from train.model import folder as model_folder
from train.model import source as model_source
from train.model.adapters import runs
from train.observe import anymodel
from train.storage import checkpoint


def is_one(source: Path) -> bool:
    """A checkpoint's folder or weights file, or a run that is not finished, whose newest one it means. Raises Halt for a damaged one."""
    return anymodel.checkpoint_file(source) is not None


def convert(source: Path, out: Path) -> Iterator[str]:
    """The model, or the adapter, as a file (OUT ends in .safetensors) or as a diffusers folder, in the stage's `export.dtype`.

    Raises Halt: USAGE (something lies at OUT, no licence), NO_CHECKPOINT (damaged), MISMATCH (what it started from is gone).
    """
    model_folder.refuse_existing(out)
    file = anymodel.checkpoint_file(source)
    assert file is not None
    stage, average = anymodel.stage_at(file.parent), file.name == anymodel.AVERAGE
    loaded = checkpoint.of_step(file.parents[2], anymodel.step_at(file.parent))
    identity = replace(stage.identity, hash=str(loaded.state.get("config_hash", stage.identity.hash)))
    files = usable.Files(identity, stage.origin, runs.continued(model_source.resolve(stage.origin.model)), None, None, {})
    if out.suffix == ".safetensors":
        told = f"sha256 {usable.write_one(out, files, loaded, average=average)}"
    else:
        yaml = (file.parents[2] / "config.yaml").read_text(encoding="utf-8")
        usable.write_folder(out, files, loaded, yaml, average=average)
        told = "diffusers folder"
    kind = "adapter" if stage.origin.adapter is not None else "model"
    whose = "the average of the weights" if average else "the weights as they were trained"
    yield f"{out}: {kind} of stage {identity.stage} after update {loaded.progress.step}, {whose}; {told}"
    if not average and (file.parent / anymodel.AVERAGE).is_file():
        yield f"their average: convert.py {file.parent / anymodel.AVERAGE} OUT"
