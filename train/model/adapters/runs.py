"""A run that trained an adapter, as a model: its base, found by its hash, with the adapter of a checkpoint added.

Whoever opens it gets the sum, in fp32 where the adapter reaches; a stage that goes on with the same adapter takes
`base` and `adapter` apart (`continued`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.config.adapter import AdapterConfig
from train.config.stage import load_stage
from train.model import source
from train.model.adapters import bases, merging, training
from train.model.adapters.reading import Adapter
from train.model.other_kinds import some
from train.model.sdxl import canonical_name
from train.model.source import LocalModel
from train.storage import state_files, tensor_files
from train.storage.tensor_files import Blob


def trained(run: Path) -> AdapterConfig | None:
    """The adapter that the stage in this run directory trains; None for one that trains the model's own weights."""
    return load_stage([run / "config.yaml"]).running.adapter if (run / "config.yaml").is_file() else None


def summed(model: LocalModel, tensors: Mapping[str, Blob], settings: AdapterConfig, path: Path) -> LocalModel:
    """`model` with the adapter of a checkpoint added, and both apart beside it. Raises Halt(MISMATCH) for one of another model."""
    base = model.base or model
    shapes = {name: blob.shape for name, blob in base.weights.items()}
    adapter = Adapter(path, training.layers_of(tensors, shapes, settings), {})
    return replace(model, weights=merging.widened(base.weights, [(adapter, 1.0)]), base=base, adapter=tensors)


def open_run(path: Path, lineage: Mapping[str, Any], file: Path, *, hashed: bool) -> LocalModel:
    """A finished run of an adapter. Its base is what its config names or, moved, a run beside it, told by the hash.

    Raises Halt(MISMATCH): the base is gone or another one, the checkpoint changed.
    """
    settings = trained(path)
    if settings is None:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {path}: its lineage tells of an adapter, its config.yaml of none")
    base = _base_of(path, lineage)
    opened, stated = tensor_files.open_file(file), str(lineage.get("weights_sha256"))
    if hashed and (digest := source.sha256_of(file)) != stated:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {path} changed since it was finished: {file.name} has sha256 {digest}, lineage.json says {stated}")
    whole = replace(base.base or base, kind="run", path=path, sha256=stated, metadata={"modelspec.title": str(lineage.get("stage"))}, lineage=lineage, notes=())
    found = summed(replace(whole, base=base.base or base), opened.blobs, settings, file)
    # Once the whole model was exported, what comes after starts from that: with an adapter of its own, if any.
    return replace(found, base=None, adapter=None) if (path / "model").is_dir() else found


def _base_of(path: Path, lineage: Mapping[str, Any]) -> LocalModel:
    """The model that the run started from."""
    parent = lineage.get("parent")
    wanted = parent.get("sha256") if isinstance(parent, dict) else None
    origin = load_stage([path / "config.yaml"]).origin
    beside = [str(place) for place in sorted(path.parent.iterdir()) if place != path and (place / "DONE").is_file()]
    tried = []
    for name in (origin.path, *beside):
        if name != origin.path and (read_json(Path(name) / "lineage.json") or {}).get("weights_sha256") != wanted:
            continue
        try:
            found = source.resolve(replace(origin.model, init_from=name, init_sha256=None))
        except Halt as halt:
            tried.append(halt.message)
            continue
        if wanted in bases.known_as(found).values():
            return found
        tried.append(f"{name} has sha256 {found.sha256[:12]}")
    raise Halt(
        ExitCode.MISMATCH,
        f"model.init_from {path} is an adapter, and its base (sha256 {str(wanted)[:12]}) is not there: {some(tried, 3)}. Put it back under "
        f"{origin.path}, or merge the adapter with convert.py merge",
    )


def continued(model: LocalModel) -> LocalModel:
    """The parent of a stage that trains an adapter: where that is an adapter's run, its base, with the adapter to go on from."""
    if model.base is None:
        return model
    vae = {name: blob for name, blob in model.weights.items() if name.startswith("vae.")}  # `model.vae` may have replaced it
    return replace(model, weights={**model.base.weights, **vae})


@torch.no_grad()
def go_on_from(networks: torch.nn.Module, tensors: Mapping[str, Blob], whose: Path) -> None:
    """Start from a parent's adapter. Raises Halt(MISMATCH) where this stage's has other layers."""
    own = {name: parameter for name, parameter in networks.named_parameters() if training.part_of(name) is not None}
    named = {canonical_name(name): parameter for name, parameter in own.items()}
    wrong = sorted(n for n in {*named, *tensors} if n not in named or n not in tensors or tuple(named[n].shape) != tensors[n].shape)
    if wrong:
        raise Halt(
            ExitCode.MISMATCH,
            f"adapter: {whose} trained an adapter with other layers ({len(wrong)} differ, as {some(wrong, 2)}): keep its adapter.* keys to go on "
            "with it, or set export.merged: true there and finish it again to start anew on the sum",
        )
    for name, parameter in named.items():
        parameter.copy_(state_files.to_tensor(tensors[name]))
