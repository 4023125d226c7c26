"""Which model an adapter belongs to: by which hashes a model is known, and what an adapter's file says of its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from train.model.adapters import reading
from train.model.adapters.reading import Adapter
from train.model.other_kinds import some
from train.model.source import LocalModel

_SHOWN = 12  # digits of a hash in a message


def known_as(model: LocalModel) -> dict[str, str]:
    """The hashes of a model by what they are of: the file or folder itself, and, of a stage of ours, its weights and its export.

    A run, its folder and its single file are other bytes of one model: they have `weights_sha256` in common.
    """
    lineage = model.lineage or {}
    found = {"sha256": model.sha256, **{key: lineage.get(key) for key in ("weights_sha256", "model_sha256")}}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def fields(model: LocalModel) -> dict[str, str]:
    """Metadata that names the base: our keys, and the ones of sd-scripts that other programs show."""
    own = dict(zip(reading.BASE_KEYS, (known_as(model).get(key) for key in ("sha256", "weights_sha256", "model_sha256")), strict=True))
    name = model.metadata.get("modelspec.title") or (model.lineage or {}).get("stage") or model.path.stem
    return {key: value for key, value in own.items() if value} | {"ss_sd_model_name": str(name), "ss_new_sd_model_hash": model.sha256}


def remark(adapter: Adapter, model: LocalModel) -> str | None:
    """A line where an adapter names another base than `model`; None where they belong together or it names none."""
    stated = adapter.bases | ({adapter.metadata["ss_new_sd_model_hash"]} if adapter.metadata.get("ss_new_sd_model_hash") else set())
    if not stated or not model.sha256 or stated & set(known_as(model).values()):
        return None
    name = adapter.metadata.get("ss_sd_model_name", "")
    called = f" ({some([name])})" if name else ""
    return (
        f"{adapter.path} was made for the base {some([min(stated)[:_SHOWN]])}{called}, and this is {model.path} "
        f"({model.sha256[:_SHOWN]}): pictures will differ from those that its maker saw"
    )


def opened(given: list[str], model: LocalModel) -> tuple[list[tuple[Adapter, float]], list[str]]:
    """The adapters that a command names, for a model, and a line for each that says of another base. Raises Halt."""
    pairs = [reading.given(text) for text in given]
    adapters = [(reading.open_adapter(path, model.configs), weight) for path, weight in pairs]
    told = [line for adapter, _ in adapters for line in (remark(adapter, model), *(f"{adapter.path}: {n}" for n in adapter.notes)) if line]
    return adapters, told


def stated(metadata: Mapping[str, str], path: Path) -> str:
    """What an adapter is called: its title, else its file's name."""
    return metadata.get("modelspec.title") or metadata.get("ss_output_name") or path.stem
