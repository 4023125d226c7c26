"""Adapters in and out: their two file forms, merging into a model, extraction from one, and sums of models."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, write_json
from train.model import folder as model_folder
from train.model import layouts, sdxl, single_file
from train.model.adapters import bases, extraction, merging, reading, writing
from train.model.adapters.reading import Adapter
from train.model.source import LocalModel
from train.observe import anymodel
from train.storage import state_files
from train.storage.tensor_files import Blob

SHOWN_LAYERS = 12  # the worst ones; the rest is in the total
_KEPT = ("conditioning", "vae_sha256", "license")  # of a base's record, what its merge inherits


def convert(source: Path, out: Path, config: Path | None) -> Iterator[str]:
    """An adapter in kohya's names (OUT ends in .safetensors) or as diffusers' folder; what it says of itself goes along."""
    configs = layouts.read_configs(config) if config else reading.stored_configs(source)
    adapter = reading.open_adapter(source, configs)
    yield from (f"{source}: {note}" for note in adapter.notes)
    write = writing.write_kohya if out.suffix == ".safetensors" else writing.write_diffusers
    digest = write(out, adapter.layers, configs, _foreign(adapter.metadata))
    form = "kohya's names" if out.suffix == ".safetensors" else "diffusers folder"
    yield f"{out}: {len(adapter.layers)} layers, {form}, sha256 {digest}"


def _foreign(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without what is made anew."""
    return {key: value for key, value in metadata.items() if key not in (sdxl.CONFIGS_KEY, "sshs_model_hash", "sshs_legacy_hash")}


def merge(base: Path, given: list[str], out: Path) -> Iterator[str]:
    """`base` with adapters added, written as a folder or, where OUT ends in .safetensors, as a single file. Raises Halt."""
    model_folder.refuse_existing(out)
    model = anymodel.open_any(base)
    adapters, told = bases.opened(given, model)
    yield from told
    record = _record("merge", model, {"merged": [_of_adapter(adapter, weight) for adapter, weight in adapters]})
    digest = _write_model(out, merging.merged(model.weights, adapters), model, record)
    for adapter, weight in adapters:
        yield f"{adapter.path}: {len(adapter.layers)} layers, times {weight:g}"
    yield f"{out}: sha256 {digest}"


def add(a: Path, b: Path, c: Path, times: float, out: Path) -> Iterator[str]:
    """A + times (B - C), written like a merge. Raises Halt."""
    model_folder.refuse_existing(out)
    if not abs(times) <= 100:
        raise Halt(ExitCode.USAGE, f"--times {times} is not between -100 and 100")
    one, two, three = (anymodel.open_any(path) for path in (a, b, c))
    parents = [{"role": role, **_of_model(model)} for role, model in zip("abc", (one, two, three), strict=True)]
    record = _record("sum", one, {"formula": f"a + {times:g} (b - c)", "parents": parents})
    yield f"{out}: sha256 {_write_model(out, merging.sums(one, two, three, times), one, record)}"


def extract(
    model_path: Path, base_path: Path, out: Path | None, *, rank: int | None, energy: float | None, form: str, dtype: str,
    matrices_only: bool = False,
) -> Iterator[str]:  # fmt: skip
    """The difference of a model and its base as an adapter. Raises Halt."""
    extraction.refuse_options(rank, energy)
    suffix = ".safetensors" if form == "kohya" else ""
    out = out or Path(f"{_name(model_path)}-lora{suffix}")
    if (out.suffix == ".safetensors") != (form == "kohya"):
        raise Halt(ExitCode.USAGE, f"{out}: --format {form} writes {'a .safetensors file' if form == 'kohya' else 'a folder'}")
    model_folder.refuse_existing(out)
    model, base = anymodel.open_any(model_path), anymodel.open_any(base_path)
    yield _parentage(model, base)
    rest = form == "kohya" and not matrices_only
    found = extraction.extract(model, base, rank=rank, energy=energy, rest=rest, dtype=state_files.PRECISIONS[dtype])
    for part in sorted(found.parts, key=lambda part: -part.error)[:SHOWN_LAYERS]:
        yield f"  {part.module}: rank {part.rank}, error {part.error:.3g}"
    if len(found.parts) > SHOWN_LAYERS:
        yield f"  and {len(found.parts) - SHOWN_LAYERS} layers with smaller errors"
    if found.whole:
        yield f"taken along whole: {found.whole} norms and biases (stock diffusers refuses a file with them; --matrices-only leaves them out)"
    if found.beyond:
        yield (
            f"left out: {len(found.beyond)} tensors that are no matrix with a layer (norms, biases, embeddings), "
            f"{found.beyond_share:.2%} of the squared difference"
        )
    record = _record("extraction", model, {
        "extracted": {"model": _of_model(model), "rank": rank, "energy": energy, "error": found.error, "left_out": found.beyond_share},
    })  # fmt: skip
    metadata = {**bases.fields(base), **_as_metadata(record), "modelspec.title": f"{_name(model_path)} lora"}
    write = writing.write_kohya if form == "kohya" else writing.write_diffusers
    digest = write(out, found.layers, base.configs, metadata)
    values = extraction.total_values(found.layers)
    yield f"total: {len(found.parts)} layers, {values:,} values, error {found.error:.3g} of the difference"
    yield f"{out}: sha256 {digest}"


def _name(path: Path) -> str:
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.stem if resolved.suffix == ".safetensors" else resolved.name


def _parentage(model: LocalModel, base: LocalModel) -> str:
    """Whether the base is what the model's lineage names as its parent."""
    parent = (model.lineage or {}).get("parent")
    stated = parent.get("sha256") if isinstance(parent, dict) else None
    if not isinstance(stated, str) or not stated:
        return f"{model.path} names no parent: taken as made from {base.path}"
    if stated in bases.known_as(base).values():
        return f"{base.path} is the parent of {model.path} by its hash"
    return (
        f"{base.path} is not the parent of {model.path}, whose lineage names {stated[:12]}: the adapter holds everything "
        "that lies between the two"
    )


def _of_model(model: LocalModel) -> dict[str, Any]:
    return {"title": model.metadata.get("modelspec.title") or model.path.stem, **bases.known_as(model)}


def _of_adapter(adapter: Adapter, weight: float) -> dict[str, Any]:
    file = adapter.path if adapter.path.is_file() else reading.file_of(adapter.path)
    said = layouts.record_in(adapter.metadata)
    return {
        "title": bases.stated(adapter.metadata, file), "sha256": file_sha256(file), "weight": weight,
        "base": sorted(adapter.bases), **({"lineage": said} if said else {}),
    }  # fmt: skip


def _record(kind: str, model: LocalModel, own: Mapping[str, Any]) -> dict[str, Any]:
    """Who made a file from what: the record of a stage, for files that no stage made."""
    parent = model.lineage or {}
    stated = {key: value for key, value in parent.items() if key != "ancestors"}
    older = parent.get("ancestors")
    return {
        "stage": kind,
        "parent": {"stage": parent.get("stage"), **_of_model(model)},
        **{key: parent[key] for key in _KEPT if parent.get(key)},
        **({"license": model.license} if model.license else {}),
        **own,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ancestors": [*(older if isinstance(older, list) else []), stated] if stated else [],
    }


def _as_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        layouts.RECORD_PREFIX + key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in record.items()
    }


def _write_model(out: Path, weights: Mapping[str, Blob], model: LocalModel, record: Mapping[str, Any]) -> str:
    """A single file or a diffusers folder of these weights; the sha256 of the file, or of the folder's weights."""
    spec = {k: v for k, v in model.metadata.items() if not k.startswith((layouts.RECORD_PREFIX, sdxl.CONFIGS_KEY, "ss_", "sshs_"))}
    metadata = {**spec, **_as_metadata(record), "modelspec.title": out.stem if out.suffix == ".safetensors" else out.name}
    if out.suffix == ".safetensors":
        return single_file.write_single_file(out, weights, model.configs, metadata, logit_scale=model.logit_scale)
    with model_folder.new_folder(out) as new:
        hashes = model_folder.write_networks(new, dict(weights), model.configs, whose=f"{out}: ")
        model_folder.write_tokenizers(model.tokenizers, new)
        model_folder.write_pipeline(new, model.configs["scheduler"])
        single_file.write_sidecar(new, metadata, model.logit_scale)
        write_json(new / "lineage.json", dict(record))
    return hashes["unet/" + layouts.FILES["unet"]]
