"""What a model is and where it comes from: architecture, licence, training record, lineage; an adapter by its own room."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.model import folder as model_folder
from train.model import layouts, sdxl
from train.model.adapters.reading import is_adapter
from train.model.folder import Weights
from train.model.source import is_standard
from train.storage import tensor_files
from train.tools.show import adapter


def report(path: Path) -> dict[str, Any]:
    """A single file, a diffusers folder or a finished run, all weights looked at.

    Raises Halt(MISMATCH) for anything that is not SDXL or not finite.
    """
    if not path.exists():
        raise Halt(ExitCode.USAGE, f"{path} does not exist")
    if is_adapter(path):
        return adapter.report(path)
    if path.is_file():
        return _single(path)
    run = (path / "lineage.json").is_file() and (path / "model").is_dir()
    folder = path / "model" if run else path
    if not (folder / "model_index.json").is_file():
        raise Halt(ExitCode.MISMATCH, f"{folder} is no diffusers folder (no model_index.json)")
    configs = layouts.read_configs(folder)
    reading = layouts.read_folder(folder, configs)
    weights = reading.weights
    tensor_files.refuse_non_finite(weights, str(folder))
    lineage = read_json(path / "lineage.json") or read_json(folder / "lineage.json") or {}
    metadata = layouts.metadata_of_folder(folder)
    return {
        "path": str(path),
        "kind": "run" if run else "folder",
        **_model(configs, weights),
        "tokenizers": all((folder / name).is_dir() for name in model_folder.TOKENIZERS),
        "adapted": list(reading.notes),
        **_origin(metadata, lineage),
    }


def _single(path: Path) -> dict[str, Any]:
    source = tensor_files.open_file(path)
    configs = layouts.configs_in(source)
    reading = layouts.single_weights(source, configs)
    weights = reading.weights
    tensor_files.refuse_non_finite(weights, str(path))
    return {
        "path": str(path),
        "kind": "single_file",
        "tensors": len(source.blobs),
        "bytes": path.stat().st_size,
        **_model(configs, weights),
        "tokenizers": False,
        "adapted": list(reading.notes),
        **_origin(source.metadata, {}),
    }


def _model(configs: sdxl.Configs, weights: Weights) -> dict[str, Any]:
    networks = {}
    for network in sdxl.NETWORKS:
        own = [blob for name, blob in weights.items() if name.startswith(f"{network}.")]
        networks[network] = {
            "tensors": len(own),
            "parameters": sum(math.prod(blob.shape) for blob in own),
            "dtypes": dict(Counter(blob.dtype for blob in own)),
        }
    standard = is_standard(configs)
    return {
        "architecture": "SDXL" if standard else "of SDXL's family, with other sizes",
        "prediction": configs["scheduler"].get("prediction_type", "epsilon"),
        "networks": networks,
    }


def _origin(metadata: dict[str, str], lineage: dict[str, Any]) -> dict[str, Any]:
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    own = ("modelspec.", layouts.RECORD_PREFIX, sdxl.CONFIGS_KEY)
    record = lineage or layouts.record_in(metadata)
    return {
        "license": record.get("license") or spec.get("license"),
        "modelspec": spec,
        "training": {key: value for key, value in record.items() if key != "ancestors"} or None,
        "ancestors": record.get("ancestors", []),
        "other_metadata": {key: value for key, value in metadata.items() if not key.startswith(own)},
    }
