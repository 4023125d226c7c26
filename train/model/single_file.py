"""Diffusers folder <-> original SDXL single file, bit for bit, tensor by tensor.

Both readers return blobs by canonical name ("unet.conv_in.weight", "text_encoder.text_model...."), so the writers do
not care where weights come from. What a folder has no place for (the file's metadata, logit_scale) stays beside it in
`single_file.json`, and what a file has no place for (configs other than SDXL's own) in its metadata.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, replacing, write_json
from train.model import clip_tokens, other_kinds, sdxl, spellings, vae_file
from train.model import folder as model_folder
from train.model.folder import Weights, check_weights, refuse_existing
from train.storage import tensor_files
from train.storage.tensor_files import Blob

FAIPL = "Fair AI Public License 1.0-SD"  # freedevproject.org/faipl-1.0-sd; Animagine XL 3.x and descendants
LICENSE_IN_README = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
SIDECAR = "single_file.json"
_EMPTY = Blob("F32", (0,), lambda: iter(()))
RECORD_PREFIX = "anix."  # of our training record in a single file's metadata
VAE_KEY = f"{RECORD_PREFIX}vae_sha256"
_TEXTS = ("stage", "dataset_fingerprint", "config_hash", "code_revision", "license", "weights_sha256", "vae_sha256",
          "date")  # fmt: skip
CONFIGS_KEY = sdxl.CONFIGS_KEY
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
    networks = networks_without(vae)
    configs = model_folder.read_configs(Path(config), networks) if config else configs_in(source, networks)
    reading = single_weights(source, configs, networks)
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
        metadata = metadata_of_folder(folder)
    networks = networks_without(vae)
    configs = model_folder.read_configs(folder, networks)
    reading = model_folder.read(folder, configs, networks)
    tell(folder, reading.notes)
    configs, weights, metadata = _with_vae(configs, reading.weights, metadata, vae)
    return write_single_file(out, weights, configs, metadata, logit_scale=stored_scale(folder))


def tell(path: Path, notes: Sequence[str]) -> None:
    """One line about what was passed over or adapted in the tensors at `path`; none where nothing was."""
    if notes:
        log.info("%s: %s", path, "; ".join(notes))


def networks_without(vae: str | Path | None) -> tuple[str, ...]:
    """The networks that a model must hold itself: all, or all but the VAE where another takes its place."""
    return sdxl.NETWORKS if vae is None else tuple(network for network in sdxl.NETWORKS if network != "vae")


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
        metadata[CONFIGS_KEY] = json.dumps(kept)
    try:
        with replacing(out, model_folder.half_written(out)) as tmp:
            return tensor_files.write(tmp, blobs, metadata)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{out}: {error.strerror}") from error


def single_weights(
    source: tensor_files.Tensors, configs: sdxl.Configs, networks: Sequence[str] = sdxl.NETWORKS
) -> spellings.Reading:
    """The tensors of an opened single file, names and shapes proved complete, and what was passed over."""
    other_kinds.refuse_other_kinds(source.path, source.blobs)
    return spellings.read(source.path, source.blobs, configs, networks)


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


def configs_in(source: tensor_files.Tensors, networks: Sequence[str] = sdxl.NETWORKS) -> sdxl.Configs:
    """The configs that a single file carries in its metadata, else SDXL's own."""
    configs = sdxl.configs_of(source.metadata, source.blobs, str(source.path))
    sdxl.folder_shapes(configs, str(source.path), networks)  # refused here, where the file's name is known
    other_kinds.refuse_unet(configs["unet"], str(source.path))
    if "vae" not in networks:
        return configs
    return {**configs, "vae": other_kinds.checked_vae(configs["vae"], str(source.path))}


def record_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The training record back from a single file's metadata; empty for files of other makers."""
    record: dict[str, Any] = {}
    for key, text in metadata.items():
        if key.startswith(RECORD_PREFIX) and key != CONFIGS_KEY:
            name = key.removeprefix(RECORD_PREFIX)
            try:
                record[name] = text if name in _TEXTS else json.loads(text)
            except (ValueError, RecursionError):
                record[name] = text
    return record


def is_standard(configs: sdxl.Configs) -> bool:
    """True when SDXL's own configs describe the same tensors and the same arithmetic."""
    decisive = {
        network: {key: value for key, value in sdxl.STANDARD[network].items() if key not in _INDIFFERENT}
        for network in sdxl.NETWORKS
    }
    return all(configs[n].get(key, value) == value for n, config in decisive.items() for key, value in config.items())


_INDIFFERENT = (
    "_class_name", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "force_upcast", "sample_size",
    "initializer_factor", "initializer_range", "dropout", "attention_dropout", "model_type",
)  # fmt: skip


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
    write_json(folder / SIDECAR, beside)


def metadata_of_folder(folder: Path) -> dict[str, str]:
    """Metadata of the single file that a folder was made from; of any other, its U-Net file's and its licence."""
    kept = (read_json(folder / SIDECAR) or {}).get("metadata")
    if isinstance(kept, dict):
        return {str(key): str(value) for key, value in kept.items()}
    metadata = dict(tensor_files.open_file(model_folder.weight_files(folder / "unet")[0]).metadata)
    metadata.pop("format", None)
    if "modelspec.license" not in metadata and (license := _license_in_readme(folder / "README.md")):
        metadata["modelspec.license"] = license
    return metadata


def _license_in_readme(path: Path) -> str | None:
    """A hub model states its licence in the head of its README; after "other" comes license_name."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")[:4000]
    head = text.partition("\n---")[0] if text.startswith("---") else ""
    names = [name.strip("\"'") for name in LICENSE_IN_README.findall(head)]
    stated = [name for name in names if name != "other"]
    if not stated:
        return None
    return FAIPL if stated[-1].lower().startswith("faipl-1.0-sd") else stated[-1]


def stored_scale(folder: Path) -> Blob | None:
    """logit_scale of the single file that a folder was made from."""
    stored = (read_json(folder / SIDECAR) or {}).get("logit_scale")
    if stored is None:
        return None
    try:
        scale = _scalar(bytes.fromhex(stored["hex"]), str(stored["dtype"]))
        whole = scale.dtype in tensor_files.EXPONENTS and len(scale.read()) == scale.size_bytes
        if whole and tensor_files.finite(scale.read(), scale.dtype):
            return scale
    except (ValueError, TypeError, KeyError):
        pass
    raise Halt(ExitCode.MISMATCH, f"{folder / SIDECAR}: logit_scale is damaged; without that file the usual value is taken")


def _default_scale(dtype: str) -> Blob:
    half = dtype == "F16"
    return _scalar(struct.pack("<e" if half else "<f", sdxl.LOGIT_SCALE_DEFAULT), "F16" if half else "F32")


def _scalar(data: bytes, dtype: str) -> Blob:
    return Blob(dtype, (), lambda: iter([memoryview(data)]))
