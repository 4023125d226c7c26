"""Diffusers folder <-> original SDXL single file, bit for bit, tensor by tensor.

Both readers return blobs by canonical name ("unet.conv_in.weight", "text_encoder.text_model...."), so the writers do
not care where weights come from. What a folder has no place for (the file's metadata, logit_scale) stays beside it in
`single_file.json`, and what a file has no place for (configs other than SDXL's own) in its metadata.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train import modelfolder, sdxl, weightfile
from train.exits import ExitCode, Halt
from train.modelfolder import Weights, check_weights, refuse_existing, refuse_types, some
from train.rundir import fsync_dir, read_json, write_json
from train.weightfile import Blob

FAIPL = "Fair AI Public License 1.0-SD"  # freedevproject.org/faipl-1.0-sd; Animagine XL 3.x and descendants
LICENSE_IN_README = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
SIDECAR = "single_file.json"
_EMPTY = Blob("F32", (0,), lambda: iter(()))
RECORD_PREFIX = "anix."  # of our training record in a single file's metadata
VAE_KEY = f"{RECORD_PREFIX}vae_sha256"
_TEXTS = ("stage", "dataset_fingerprint", "config_hash", "code_revision", "license", "weights_sha256", "vae_sha256",
          "date")  # fmt: skip
CONFIGS_KEY = "anix.configs"  # metadata of a single file whose architecture is not SDXL's own


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
    `tokenizers` names a folder with tokenizer/ and tokenizer_2/ (default: those of `config`); without any the folder
    has none. `vae`, a folder or a file, replaces the file's own. Raises Halt: USAGE (paths), MISMATCH (not an SDXL file, damaged, or not finite; names the tensors).
    """
    file, out = Path(file), Path(out)
    refuse_existing(out)
    source = weightfile.open_file(file)
    configs = modelfolder.read_configs(Path(config)) if config else configs_in(source)
    weights, logit_scale = single_weights(source, configs)
    configs, weights, metadata = _with_vae(configs, weights, source.metadata, vae)
    with modelfolder.new_folder(out) as new:
        modelfolder.write_networks(new, weights, configs, whose=f"{file}: ")
        if tokenizers or config:
            modelfolder.copy_tokenizers(Path(str(tokenizers or config)), new)
        modelfolder.write_pipeline(new, configs["scheduler"])
        write_sidecar(new, metadata, logit_scale)


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
    configs, weights = modelfolder.read_configs(folder), modelfolder.read_weights(folder)
    configs, weights, metadata = _with_vae(configs, weights, metadata, vae)
    return write_single_file(out, weights, configs, metadata, logit_scale=stored_scale(folder))


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
        weights = {name: weightfile.cast(blob, dtype, name) for name, blob in weights.items()}
    blobs = {link.single: _to_single(link, weights) for link in links}
    scale = logit_scale or _default_scale(next(iter(weights.values())).dtype)
    blobs[sdxl.LOGIT_SCALE] = weightfile.cast(scale, dtype, sdxl.LOGIT_SCALE) if dtype else scale
    if configs["scheduler"].get("prediction_type") == "v_prediction":
        blobs[sdxl.V_MARK] = _EMPTY
        if configs["scheduler"].get("rescale_betas_zero_snr"):
            blobs[sdxl.ZERO_SNR_MARK] = _EMPTY
    metadata = dict(metadata)
    if not is_standard(configs):
        kept = {name: modelfolder.loadable(name, configs[name]) for name in sorted(configs)}
        metadata[CONFIGS_KEY] = json.dumps(kept)
    tmp = modelfolder.half_written(out)
    tmp.unlink(missing_ok=True)
    try:
        digest = weightfile.write(tmp, blobs, metadata)
        os.rename(tmp, out)
        fsync_dir(out.parent)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{out}: {error.strerror}") from error
    finally:
        tmp.unlink(missing_ok=True)
    return digest


def single_weights(source: weightfile.Tensors, configs: sdxl.Configs) -> tuple[Weights, Blob | None]:
    """(weights by canonical name, logit_scale) of an opened single file, names and shapes proved complete."""
    no_weights = (sdxl.POSITION_IDS, sdxl.V_MARK, sdxl.ZERO_SNR_MARK)
    have = {name: blob for name, blob in source.blobs.items() if name not in no_weights}
    refuse_other_kinds(source.path, have)
    links = sdxl.links(configs)
    wanted = {link.single: link.shape for link in links}
    optional = {sdxl.LOGIT_SCALE: ()} if sdxl.LOGIT_SCALE in have else {}
    check_weights({name: blob.shape for name, blob in have.items()}, wanted | optional, str(source.path))
    refuse_types(source.path, have)
    weights: Weights = {}
    for link in links:
        weights.update(_to_folder(link, have[link.single]))
    scale = have.get(sdxl.LOGIT_SCALE)
    # read now: it is in no network, so that nobody else would look before an export is written
    if scale is not None and not weightfile.finite(scale.read(), scale.dtype):
        raise Halt(ExitCode.MISMATCH, f"{source.path}: {sdxl.LOGIT_SCALE} is not finite (NaN or infinity)")
    return weights, scale


def _with_vae(
    configs: sdxl.Configs, weights: Weights, metadata: Mapping[str, str], vae: str | Path | None
) -> tuple[sdxl.Configs, Weights, Mapping[str, str]]:
    """The same model with another VAE; its record no longer names the one that it was trained with."""
    if vae is None:
        return configs, weights, metadata
    config, own, _ = open_vae(Path(vae), "--vae")
    kept = {name: blob for name, blob in weights.items() if not name.startswith("vae.")}
    told = {key: value for key, value in metadata.items() if key != VAE_KEY}
    return {**configs, "vae": config}, kept | own, told


def open_vae(path: Path, asked_by: str) -> tuple[Mapping[str, Any], Weights, Path]:
    """(config, weights by canonical name, their file) of a VAE: its folder, a model folder that has one, or a file."""
    if path.is_file():
        return sdxl.STANDARD["vae"], vae_weights(weightfile.open_file(path)), path
    if (path / "vae").is_dir():
        path = path / "vae"
    config = read_json(path / "config.json")
    if config is None:
        raise Halt(ExitCode.MISMATCH, f"{asked_by} {path} is no folder of an AutoencoderKL (config.json and weights)")
    weights = modelfolder.read_weights(path.parent, vae=path, networks=("vae",))
    return config, weights, modelfolder.weight_files(path)[0]


def vae_weights(source: weightfile.Tensors) -> Weights:
    """Weights of a file that holds SDXL's VAE alone, or with the model, in the original names."""
    prefix = sdxl.PREFIXES["vae"]
    whole = any(name.startswith(prefix) for name in source.blobs)
    have = {name if whole else prefix + name: blob for name, blob in source.blobs.items()}
    have = {name: blob for name, blob in have.items() if name.startswith(prefix)}
    links = [link for link in sdxl.links(sdxl.STANDARD) if link.single.startswith(prefix)]
    shapes = {name: blob.shape for name, blob in have.items()}
    check_weights(shapes, {link.single: link.shape for link in links}, f"{source.path} as model.vae")
    refuse_types(source.path, have)
    return {name: blob for link in links for name, blob in _to_folder(link, have[link.single])}


def configs_in(source: weightfile.Tensors) -> sdxl.Configs:
    """The configs that a single file carries in its metadata, else SDXL's own."""
    text = source.metadata.get(CONFIGS_KEY)
    if not text:
        v = sdxl.V_MARK in source.blobs or source.metadata.get("modelspec.prediction_type", "").startswith("v")
        scheduler = sdxl.told_scheduler(
            sdxl.STANDARD["scheduler"], v=v, zero_terminal_snr=v and sdxl.ZERO_SNR_MARK in source.blobs
        )
        return {**sdxl.STANDARD, "unet": sdxl.drawn_at(sdxl.STANDARD["unet"], _side_px(source)), "scheduler": scheduler}
    try:
        stored = json.loads(text)
        configs = {name: dict(stored[name]) for name in (*sdxl.NETWORKS, "scheduler")}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Halt(ExitCode.MISMATCH, f"{source.path}: its metadata entry {CONFIGS_KEY} is damaged") from None
    sdxl.folder_shapes(configs, str(source.path))  # refused here, where the file's name is known
    return configs


def _side_px(source: weightfile.Tensors) -> int:
    """Side of the square that the file names as its resolution, SDXL's own where it names none."""
    named = re.fullmatch(r"(\d{2,4})x(\d{2,4})", source.metadata.get("modelspec.resolution", ""))
    return int(named[1]) if named and named[1] == named[2] and int(named[1]) >= 64 else 1024


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


def refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Halt(MISMATCH) naming what the file is, when it is a model of another kind."""
    names = set(names)
    unet = any(name.startswith("model.diffusion_model.") for name in names)
    if any(mark in name for name in names for mark in ("lora_", ".lora", "hada_w", "lokr_")):
        kind = "a LoRA (a set of differences, no model); merge it into its base model first"
    elif any(name.startswith("conditioner.embedders.0.model.") for name in names):
        kind = "an SDXL refiner (one text encoder, another U-Net); the recipe trains the base model"
    elif any(name.startswith("cond_stage_model.model.") for name in names):
        kind = "a Stable Diffusion 2 model"
    elif any(name.startswith("cond_stage_model.") for name in names):
        kind = "a Stable Diffusion 1 model"
    elif any(name.startswith(("down_blocks.", "text_model.", "encoder.down_blocks.")) for name in names) and not unet:
        kind = "one network of a diffusers folder; give the folder itself"
    elif any("joint_blocks" in name or "double_blocks" in name for name in names):
        kind = "a diffusion transformer (SD3 or Flux)"
    elif not unet:
        kind = f"no diffusion model (first tensors: {some(sorted(names)[:3]) or 'none'})"
    else:
        return
    raise Halt(ExitCode.MISMATCH, f"{path} is {kind}, not an SDXL single file")


def _to_single(link: sdxl.Link, weights: Mapping[str, Blob]) -> Blob:
    blobs = [weights[name] for name in link.folder]
    if len({blob.dtype for blob in blobs}) > 1:
        raise Halt(ExitCode.MISMATCH, f"{', '.join(link.folder)} have different dtypes and cannot be joined")
    if link.operation == "join":
        return weightfile.concatenated(blobs)
    if link.operation == "transpose":
        return weightfile.transposed(blobs[0])
    return weightfile.reshaped(blobs[0], link.shape)


def _to_folder(link: sdxl.Link, blob: Blob) -> Iterator[tuple[str, Blob]]:
    if link.operation == "join":
        yield from ((name, weightfile.rows(blob, i, 3)) for i, name in enumerate(link.folder))
    elif link.operation == "transpose":
        yield link.folder[0], weightfile.transposed(blob)
    elif link.operation == "to_conv":
        yield link.folder[0], weightfile.reshaped(blob, blob.shape[:2])
    else:
        yield link.folder[0], blob


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
    metadata = dict(weightfile.open_file(modelfolder.weight_files(folder / "unet")[0]).metadata)
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
        whole = scale.dtype in weightfile.EXPONENTS and len(scale.read()) == scale.size_bytes
        if whole and weightfile.finite(scale.read(), scale.dtype):
            return scale
    except (ValueError, TypeError, KeyError):
        pass
    raise Halt(ExitCode.MISMATCH, f"{folder / SIDECAR}: logit_scale is damaged; without that file the usual value is taken")


def _default_scale(dtype: str) -> Blob:
    half = dtype == "F16"
    return _scalar(struct.pack("<e" if half else "<f", sdxl.LOGIT_SCALE_DEFAULT), "F16" if half else "F32")


def _scalar(data: bytes, dtype: str) -> Blob:
    return Blob(dtype, (), lambda: iter([memoryview(data)]))
