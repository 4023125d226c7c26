"""An adapter to its files: kohya's names in one file, or diffusers' folder. The same numbers, bit for bit, in both."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file, replacing
from train.model import folder as model_folder
from train.model import sdxl
from train.model.adapters import names
from train.model.adapters.layers import Layer
from train.model.adapters.reading import DIFFUSERS_FILE, DIFFUSERS_KEY
from train.model.source import is_standard
from train.storage import tensor_files
from train.storage.tensor_files import Blob

_DIFFUSERS_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight", "dora": "lora_magnitude_vector.weight"}


def write_kohya(
    out: Path, layers: Mapping[str, Layer], configs: sdxl.Configs, metadata: Mapping[str, str], *, dtype: str | None = None,
    renew: bool = False,
) -> str:  # fmt: skip
    """Write the file that A1111, Forge and ComfyUI read; its sha256. `dtype` F16 or F32 casts the weights.

    Raises Halt: USAGE (something is there), CANNOT_WRITE, MISMATCH (not finite), NON_FINITE (too large for F16).
    """
    if not renew:
        model_folder.refuse_existing(out)
    known = names.names_of(configs).modules
    blobs: dict[str, Blob] = {}
    for name, layer in layers.items():
        for part, blob in layer.parts.items():
            key = names.kohya_key(known[name], layer.kind, part)
            blobs[key] = _cast(_shaped(layer, part, blob), dtype, key)
        if layer.kind != "full":
            blobs[names.kohya_key(known[name], layer.kind, "alpha")] = number(layer.rank * layer.scale if layer.rank else layer.alpha or 1.0)
    head = {**kohya_fields(layers), **metadata}
    head["sshs_model_hash"] = _hash_of(blobs)
    return _write(out, blobs, _with_configs(head, configs))


def write_diffusers(
    out: Path, layers: Mapping[str, Layer], configs: sdxl.Configs, metadata: Mapping[str, str], *, dtype: str | None = None,
    files: Mapping[str, str] | None = None, renew: bool = False,
) -> str:
    """Write the folder that `load_lora_weights` reads; the sha256 of its file. Ranks and alphas stand in its metadata.

    `files`: texts to lie beside it, by name; `renew`: it takes the place of an earlier one.
    Raises Halt as `write_kohya`; MISMATCH for kinds that this form has no names for.
    """
    if not renew:
        model_folder.refuse_existing(out)
    kinds = Counter(layer.kind for layer in layers.values() if layer.kind != "lora" or {"mid", "bias"} & layer.parts.keys())
    if kinds:
        told = ", ".join(f"{count} layers of {kind}" for kind, count in sorted(kinds.items()))
        raise Halt(ExitCode.MISMATCH, f"{out}: {told}: diffusers' own names are of LoRA and DoRA alone; write a .safetensors file in kohya's names")
    blobs: dict[str, Blob] = {}
    for name, layer in layers.items():
        for part, blob in layer.parts.items():
            key = f"{name}.{_DIFFUSERS_PARTS[part]}"
            if part == "dora" and layer.by_input:
                raise Halt(ExitCode.MISMATCH, f"{out}: {name} has a DoRA scale by its inputs, which diffusers has no place for: write a .safetensors file")
            shaped = tensor_files.reshaped(blob, _magnitude(layer)) if part == "dora" else _shaped(layer, part, blob)
            blobs[key] = _cast(shaped, dtype, key)
    head = {**metadata, "format": "pt", DIFFUSERS_KEY: json.dumps(peft_configs(layers), sort_keys=True)}
    with model_folder.new_folder(out, renew=renew) as new:
        digest = tensor_files.write(new / DIFFUSERS_FILE, blobs, _with_configs(head, configs))
        for name, text in (files or {}).items():
            replace_file(new / name, text)
    return digest


def number(value: float) -> Blob:
    """One fp32 number, as files hold alpha."""
    data = struct.pack("<f", value)
    return Blob("F32", (), lambda: iter([memoryview(data)]))


def peft_configs(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """What diffusers writes of each network: peft's LoraConfig, the commonest rank and alpha, and patterns for the others."""
    told: dict[str, Any] = {}
    for network in names.NETWORKS:
        # Without `text_model.`, which newer transformers dropped: peft takes a name for the end of one.
        own = {name.partition(".")[2].removeprefix("text_model."): layer for name, layer in layers.items() if name.startswith(f"{network}.")}
        if not own:
            continue
        rank = Counter(layer.rank for layer in own.values()).most_common(1)[0][0]
        alpha = Counter(layer.rank * layer.scale for layer in own.values()).most_common(1)[0][0]
        told |= {
            f"{network}.{key}": value
            for key, value in {
                "r": rank, "lora_alpha": alpha, "target_modules": sorted(own),
                "rank_pattern": {name: layer.rank for name, layer in own.items() if layer.rank != rank},
                "alpha_pattern": {name: layer.rank * layer.scale for name, layer in own.items() if layer.rank * layer.scale != alpha},
                "use_dora": any("dora" in layer.parts for layer in own.values()), "bias": "none", "peft_type": "LORA",
            }.items()
        }  # fmt: skip
    return told


def kohya_fields(layers: Mapping[str, Layer]) -> dict[str, str]:
    """The `ss_*` fields that programs show of every adapter: its module, rank and alpha, the widest use of each."""
    kinds = Counter(layer.kind for layer in layers.values()).most_common(1)[0][0]
    factored = [layer for layer in layers.values() if layer.rank]
    rank = Counter(layer.rank for layer in factored).most_common(1)[0][0] if factored else 0
    alpha = Counter(layer.rank * layer.scale for layer in factored).most_common(1)[0][0] if factored else 1.0
    dora = any("dora" in layer.parts for layer in layers.values())
    lycoris = kinds != "lora" or dora or any("mid" in layer.parts for layer in layers.values())
    arguments = {"algo": {"lora": "lora", "full": "full"}.get(kinds, kinds), **({"dora_wd": "True"} if dora else {})}
    return {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(arguments if lycoris else {}),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
    }


def _shaped(layer: Layer, part: str, blob: Blob) -> Blob:
    """As every reader expects it: a kernel's factors with the kernel's sides, a matrix's as matrices."""
    kernel = [1] * len(layer.shape[2:])
    if part == "dora":
        return tensor_files.reshaped(blob, (1, layer.shape[1], *kernel) if layer.by_input else (layer.shape[0], 1, *kernel))
    if layer.kind != "lora" or part not in ("down", "up"):
        return blob
    if part == "up":
        return tensor_files.reshaped(blob, (layer.shape[0], layer.rank, *kernel))
    return tensor_files.reshaped(blob, (layer.rank, layer.shape[1], *(kernel if "mid" in layer.parts else layer.shape[2:])))


def _magnitude(layer: Layer) -> tuple[int, ...]:
    """peft's magnitude: a vector, of a convolution with the sides of its kernel and of the batch."""
    return (1, layer.shape[0], 1, 1) if len(layer.shape) == 4 else (layer.shape[0],)


def _cast(blob: Blob, dtype: str | None, name: str) -> Blob:
    return blob if dtype is None else tensor_files.cast(blob, dtype, name)


def _with_configs(metadata: Mapping[str, str], configs: sdxl.Configs) -> dict[str, str]:
    """Of a base that is not SDXL's own the file carries the configs, by which its modules get their names back."""
    if is_standard(configs):
        return dict(metadata)
    kept = {name: model_folder.loadable(name, configs[name]) for name in sorted(configs)}
    return {**metadata, sdxl.CONFIGS_KEY: json.dumps(kept)}


def _hash_of(blobs: Mapping[str, Blob]) -> str:
    """sha256 of a file's data without its header, by which programs find two files with other metadata to be one adapter."""
    digest = hashlib.sha256()
    _, order = tensor_files.header({name: (blob.dtype, blob.shape) for name, blob in blobs.items()}, {})
    for name in order:
        for piece in blobs[name].pieces():
            digest.update(piece)
    return digest.hexdigest()


def _write(out: Path, blobs: Mapping[str, Blob], metadata: Mapping[str, str]) -> str:
    try:
        with replacing(out, model_folder.half_written(out)) as tmp:
            return tensor_files.write(tmp, blobs, metadata)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{out}: {error.strerror}") from error
