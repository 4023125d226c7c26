"""What a config of another trainer is: its text and values read, what we cannot take refused by its name, stage and dataset told apart."""

from __future__ import annotations

import codecs
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.tools.convert.keys import CHOICES, DATASET, DATASET_PART, DIRECT, NO_COUNTERPART, SPECIAL

Table = dict[str, Any]
_STAGE = {*DIRECT, *CHOICES, *DATASET, *NO_COUNTERPART, *SPECIAL} - DATASET_PART
_MAX_BYTES = 1 << 22
_TRUTH = {"true": True, "false": False}
_OTHER_KINDS = {  # key that tells it: what it is, what to do
    **dict.fromkeys(("network_module", "network_dim", "network_args", "network_weights", "network_alpha",
                     "network_train_unet_only", "network_train_text_encoder_only"), "trains a LoRA"),
    "token_string": "trains an embedding (textual inversion)", "init_word": "trains an embedding (textual inversion)",
    "controlnet_model_name_or_path": "trains a ControlNet", "conditioning_data_dir": "trains a ControlNet",
    "t5xxl": "trains a diffusion transformer (SD3 or Flux)", "clip_l": "trains a diffusion transformer (SD3 or Flux)",
}  # fmt: skip


def read_table(source: Path) -> Table:
    """The keys of a TOML, or of a JSON that holds the same. Raises Halt(USAGE) naming what the file is instead."""
    try:
        if source.stat().st_size > _MAX_BYTES:
            raise Halt(ExitCode.USAGE, f"{source} is larger than {_MAX_BYTES} bytes, no config")
        data = source.read_bytes()
    except OSError as error:
        raise Halt(ExitCode.USAGE, f"{source} cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Halt(ExitCode.USAGE, f"{source} is UTF-16 text: save it as UTF-8")
    kind = "JSON" if source.suffix.lower() == ".json" else "TOML"
    try:
        text = data.decode("utf-8-sig")
        table = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Halt(ExitCode.USAGE, f"{source} is no {kind}: {error}") from None
    if kind == "JSON":
        _refuse_other_json(source, table)
    return dict(table)


def _refuse_other_json(source: Path, table: Any) -> None:
    """Of JSON files only a dataset config is read."""
    keys = set(table) if isinstance(table, dict) else set()
    if isinstance(table, dict) and isinstance(table.get("datasets"), list):
        return
    if keys & {"LoRA_type", "model_list", "max_resolution", "stop_text_encoder_training"}:
        kind = "a LoRA" if table.get("LoRA_type") else "a model"
        what = (
            f"the settings that a training GUI (kohya_ss) saved for {kind}: their names are the GUI's. Press its button that "
            "prints the training command: it writes a config .toml, which is what convert.py reads"
        )
    elif keys & {"training_method", "base_model_name", "concept_file_name"}:
        what = "a config of OneTrainer, which convert.py does not read: start from configs/ft1.yaml"
    elif isinstance(table, dict) and table and all(isinstance(value, dict) for value in table.values()):
        what = "no config; if it is image metadata, name it in dataset.yaml: {adapter: sd_scripts, path: " + str(source) + "}"
    else:
        what = "no training config: convert.py reads sd-scripts' .toml files, and .json files with `datasets`"
    raise Halt(ExitCode.USAGE, f"{source} is {what}")


def leaves(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and value whatever its section, those of lists of tables too."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            for entry in value:
                yield from leaves(entry)
        else:
            yield key, value


def parts(source: Path, table: Table) -> tuple[Table | None, Table | None]:
    """(keys of the stage, {"general", "datasets"} of its pictures); None for the part that the file does not have.

    Raises Halt(USAGE) for a file of another kind, by that name.
    """
    for key, value in leaves({name: part for name, part in table.items() if name != "datasets"}):  # there masks have a folder too
        if key in _OTHER_KINDS and value not in (None, "", [], False, 0):
            raise Halt(
                ExitCode.USAGE,
                f"{source} {_OTHER_KINDS[key]} ({key} = {value!r}), and convert.py reads configs of full training alone. Start from "
                + ("configs/lora.yaml: adapter.rank is network_dim, adapter.alpha network_alpha" if "LoRA" in _OTHER_KINDS[key] else "configs/ft1.yaml"),
            )
    datasets = table.get("datasets")
    if "subsets" in table:  # some front ends leave the one dataset out
        datasets = [{"subsets": table["subsets"]}] if datasets is None else datasets
    general = table["general"] if isinstance(table.get("general"), Mapping) else {}
    stage = {key: value for key, value in table.items() if key not in ("datasets", "subsets", "general")}
    trains = any(key in _STAGE for key, _ in leaves(stage)) or "pretrained_model_name_or_path" in general
    if datasets is not None:
        loose = {key: value for key, value in stage.items() if not isinstance(value, Mapping)}
        if not trains:
            return None, {"general": {**loose, **general}, "datasets": datasets}
        of_pictures = {key: value for key, value in general.items() if key in DATASET_PART}
        return {**stage, "general": general}, {"general": of_pictures, "datasets": datasets}
    own = [key for key, _ in leaves(table)]
    if set(table) == {"general"} and not trains:
        raise Halt(ExitCode.USAGE, f"{source} is a dataset config without [[datasets]]: it names no pictures")
    if not any(key in {*_STAGE, *DATASET_PART} - {"name"} for key in own):
        raise Halt(ExitCode.USAGE, f"{source} holds no key of a training config" + (f" ({', '.join(own[:5])})" if own else ""))
    return table, _named_pictures(source, dict(leaves(table)))


def _named_pictures(source: Path, flat: Mapping[str, Any]) -> Table | None:
    """The dataset config that a training TOML names, or the one that its own keys make up."""
    named = flat.get("dataset_config")
    if named:
        path = next((p for p in (source.parent / str(named), Path(str(named))) if p.is_file()), None)
        if path is None:
            raise Halt(
                ExitCode.USAGE,
                f"{source}: dataset_config {named} is not there: it decides batch size, shuffle and captions. Put it beside "
                "the TOML, or remove the key",
            )
        held = read_table(path)
        if not held.keys() & {"datasets", "subsets"}:
            raise Halt(ExitCode.USAGE, f"{source}: dataset_config {path} has no [[datasets]]")
        return parts(path, held)[1]
    if not flat.get("train_data_dir"):
        return None
    subset = {"image_dir": flat["train_data_dir"]}
    if flat.get("in_json"):
        subset["metadata_file"] = flat["in_json"]
    else:
        subset["num_repeats"] = "kohya"  # folders inside it, called <repeats>_<name>
    regularisation = {"image_dir": flat["reg_data_dir"], "num_repeats": "kohya", "is_reg": True} if flat.get("reg_data_dir") else None
    return {"general": {}, "datasets": [{"subsets": [subset, *([regularisation] if regularisation else [])]}]}


def number(value: Any) -> int | float | None:
    """A finite number from TOML or from text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(found):
        return None
    exact = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
    return int(value) if exact else found


def whole(theirs: Mapping[str, Any], key: str, least: int, default: int, where: str = "") -> int:
    """A whole number of the TOML. Raises Halt(USAGE) naming the key."""
    value = theirs.get(key)
    if value is None or value == "":
        return default
    found = number(value)
    if found is None or found != int(found) or found < least:
        raise Halt(ExitCode.USAGE, f"{where}{key} is {value!r}, must be a whole number of at least {least}")
    return int(found)


def switch(value: Any) -> Any:
    """True or false where they are written as text; anything else as it is."""
    return _TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value
