"""Diffusers folder <-> original SDXL single file, bit for bit, tensor by tensor.

The readers (`layouts`) return blobs by canonical name ("unet.conv_in.weight", "text_encoder.text_model...."), so the writers do
not care where weights come from. What a folder has no place for (the file's metadata, logit_scale) stays beside it in
`single_file.json`, and what a file has no place for (configs other than SDXL's own) in its metadata.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import replacing, write_json
from train.model import clip_tokens, layouts, sdxl, vae_file
from train.model import folder as model_folder
from train.model.folder import Weights, check_weights, refuse_existing
from train.model.source import is_standard
from train.storage import tensor_files
from train.storage.tensor_files import Blob

_EMPTY = Blob("F32", (0,), lambda: iter(()))
VAE_KEY = f"{layouts.RECORD_PREFIX}vae_sha256"
log = logging.getLogger("anix")


def to_folder(
    file: str | Path,
    out: str | Path,
    *,
    tokenizers: str | Path | None = None,
    config: str | Path | None = None,
    vae: str | Path | None = None,
) -> None:
    """Write a diffusers folder from a single file. `out` appears complete or not at all.

    Networks' configs come from `config` (a diffusers folder), else from the file's metadata, else SDXL's own.
    `tokenizers` names a folder with tokenizer/ and tokenizer_2/ (default: those of `config`, else the shipped CLIP
    ones; a model of another vocabulary then gets none, which is told). `vae`, a folder or a file, replaces the file's
    own. Raises Halt: USAGE (paths), MISMATCH (not an SDXL file, damaged, or not finite; names the tensors).
    """
    file, out = Path(file), Path(out)
    refuse_existing(out)
    source = tensor_files.open_file(file)
    networks = layouts.networks_without(vae)
    configs = layouts.read_configs(Path(config), networks) if config else layouts.configs_in(source, networks)
    reading = layouts.single_weights(source, configs, networks)
    tell(file, reading.notes)
    configs, weights, metadata = _with_vae(configs, reading.weights, source.metadata, vae)
    given = Path(str(tokenizers or config)) if tokenizers or config else None
    unlike = clip_tokens.unlike(configs) if given is None else None
    with model_folder.new_folder(out) as new:
        model_folder.write_networks(new, weights, configs, whose=f"{file}: ")
        if unlike is None:
            model_folder.write_tokenizers(given, new)
        model_folder.write_pipeline(new, configs["scheduler"])
        write_sidecar(new, metadata, reading.scale)
    if unlike is not None:
        log.warning("%s has no tokenizers: %s; --tokenizers adds the model's own", out, unlike)


def to_single_file(
    folder: str | Path, out: str | Path, *, vae: str | Path | None = None, metadata: Mapping[str, str] | None = None
) -> str:
    """Write the single file of a diffusers folder; its sha256. `vae`, a folder or a file, replaces the folder's own.

    Raises Halt: USAGE (paths), MISMATCH (not an SDXL folder, or not finite; names the tensors).
    """
    folder, out = Path(folder), Path(out)
    refuse_existing(out)
    if metadata is None:
        metadata = layouts.metadata_of_folder(folder)
    networks = layouts.networks_without(vae)
    configs = layouts.read_configs(folder, networks)
    reading = layouts.read_folder(folder, configs, networks)
    tell(folder, reading.notes)
    configs, weights, metadata = _with_vae(configs, reading.weights, metadata, vae)
    return write_single_file(out, weights, configs, metadata, logit_scale=layouts.stored_scale(folder))


def tell(path: Path, notes: Sequence[str]) -> None:
    """One line about what was passed over or adapted in the tensors at `path`; none where nothing was."""
    if notes:
        log.info("%s: %s", path, "; ".join(notes))


def write_single_file(
    out: Path,
    weights: Mapping[str, Blob],
    configs: sdxl.Configs,
    metadata: Mapping[str, str],
    *,
    logit_scale: Blob | None = None,
    dtype: str | None = None,
) -> str:
    """Stream weights by canonical name into `out`, atomically; its sha256. `dtype` F16 or F32 casts all of them."""
    links = sdxl.links(configs)
    check_weights({name: blob.shape for name, blob in weights.items()}, sdxl.folder_shapes(configs), "the model")
    if dtype:
        weights = {name: tensor_files.cast(blob, dtype, name) for name, blob in weights.items()}
    blobs = {link.single: _to_single(link, weights) for link in links}
    scale = logit_scale or _default_scale(next(iter(weights.values())).dtype)
    blobs[sdxl.LOGIT_SCALE] = tensor_files.cast(scale, dtype, sdxl.LOGIT_SCALE) if dtype else scale
    if configs["scheduler"].get("prediction_type") == "v_prediction":
        blobs[sdxl.V_MARK] = _EMPTY
        if configs["scheduler"].get("rescale_betas_zero_snr"):
            blobs[sdxl.ZERO_SNR_MARK] = _EMPTY
    metadata = dict(metadata)
    if not is_standard(configs):
        kept = {name: model_folder.loadable(name, configs[name]) for name in sorted(configs)}
        metadata[sdxl.CONFIGS_KEY] = json.dumps(kept)
    try:
        with replacing(out, model_folder.half_written(out)) as tmp:
            return tensor_files.write(tmp, blobs, metadata)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{out}: {error.strerror}") from error


def _with_vae(
    configs: sdxl.Configs, weights: Weights, metadata: Mapping[str, str], path: str | Path | None
) -> tuple[sdxl.Configs, Weights, Mapping[str, str]]:
    """The same model with another VAE; its record no longer names the one that it was trained with."""
    if path is None:
        return configs, weights, metadata
    vae = vae_file.open_vae(Path(path), "--vae", configs.get("vae", sdxl.STANDARD["vae"]))
    tell(vae.file, vae.notes)
    told = {key: value for key, value in metadata.items() if key != VAE_KEY}
    return {**configs, "vae": vae.config}, weights | vae.weights, told


def _to_single(link: sdxl.Link, weights: Mapping[str, Blob]) -> Blob:
    blobs = [weights[name] for name in link.folder]
    if len({blob.dtype for blob in blobs}) > 1:  # in fp32 nothing of fp16 or bf16 is lost
        blobs = [tensor_files.cast(blob, "F32", name) for name, blob in zip(link.folder, blobs, strict=True)]
    if link.operation == "join":
        return tensor_files.concatenated(blobs)
    if link.operation == "transpose":
        return tensor_files.transposed(blobs[0])
    return tensor_files.reshaped(blobs[0], link.shape)


def write_sidecar(folder: Path, metadata: Mapping[str, str], logit_scale: Blob | None) -> None:
    """Keep beside a folder what only a single file has a place for."""
    beside: dict[str, Any] = {"metadata": dict(metadata)}
    if logit_scale:
        beside["logit_scale"] = {"dtype": logit_scale.dtype, "hex": logit_scale.read().hex()}
    write_json(folder / layouts.SIDECAR, beside)


def _default_scale(dtype: str) -> Blob:
    half = dtype == "F16"
    return layouts.scalar(struct.pack("<e" if half else "<f", sdxl.LOGIT_SCALE_DEFAULT), "F16" if half else "F32")


def vae_weights(source: tensor_files.Tensors) -> Weights:
    """Weights by canonical name of an opened file that holds SDXL's VAE, alone or with a model."""
    return vae_file.read_weights(source, sdxl.STANDARD["vae"]).weights
