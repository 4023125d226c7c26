"""What an adapter is: its kinds, ranks and alphas by network, the base it was made for, what its file says of its making."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from train.model import layouts, sdxl
from train.model.adapters import names, reading
from train.model.adapters.layers import Layer
from train.storage import tensor_files


def report(path: Path) -> dict[str, Any]:
    """A file or folder of an adapter, all values looked at. Raises Halt(MISMATCH) for what is not read or not finite."""
    configs = reading.stored_configs(path)
    adapter = reading.open_adapter(path, configs)
    blobs = {f"{name} {part}": blob for name, layer in adapter.layers.items() for part, blob in layer.parts.items()}
    tensor_files.refuse_non_finite(blobs, str(path))
    file, metadata = reading.file_of(path), adapter.metadata
    record = layouts.record_in(metadata)
    return {
        "path": str(path),
        "kind": "adapter",
        "bytes": file.stat().st_size,
        "layers": len(adapter.layers),
        "values": sum(layer.values for layer in adapter.layers.values()),
        "dtypes": dict(Counter(blob.dtype for blob in blobs.values())),
        "networks": {
            network: _of([layer for name, layer in adapter.layers.items() if name.startswith(f"{network}.")]) for network in names.NETWORKS
        },
        "base": {"name": metadata.get("ss_sd_model_name"), "hashes": sorted(adapter.bases) or metadata.get("ss_new_sd_model_hash")},
        "adapted": list(adapter.notes),
        "ss": {key: value for key, value in metadata.items() if key.startswith(("ss_", "sshs_"))},
        "modelspec": {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")},
        "training": {key: value for key, value in record.items() if key != "ancestors"} or None,
        "ancestors": record.get("ancestors", []),
        "other_metadata": {
            key: value for key, value in metadata.items()
            if not key.startswith(("ss_", "sshs_", "modelspec.", layouts.RECORD_PREFIX)) and key != sdxl.CONFIGS_KEY
        },
    }  # fmt: skip


def _of(layers: list[Layer]) -> dict[str, Any] | None:
    """Kinds, ranks and alphas with how many layers have each; None for a network without any."""
    if not layers:
        return None
    kinds = Counter("dora" if "dora" in layer.parts else layer.kind for layer in layers)
    convolutions = sum(len(layer.shape) == 4 for layer in layers)
    return {
        "layers": len(layers),
        "convolutions": convolutions,
        "kinds": dict(kinds),
        "ranks": {str(rank): count for rank, count in sorted(Counter(layer.rank for layer in layers).items())},
        "alphas": {f"{alpha:g}": count for alpha, count in sorted(Counter(layer.rank * layer.scale for layer in layers).items())},
    }
