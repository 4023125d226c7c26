"""Where a stage starts from: a finished run, a diffusers folder, a single file, or a pinned revision of a hub model.

Everything becomes a `LocalModel`: configs, weights by canonical name that are not read yet, and who they are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, read_json
from train.config.stage import ExportConfig, ModelConfig
from train.model import layouts, sdxl, vae_file
from train.storage import hub, revision, tensor_files
from train.storage.tensor_files import Blob

log = logging.getLogger("anix")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    kind: Literal["run", "folder", "single_file"]
    path: Path  # what the config names
    sha256: str  # of the weights file read; of a folder: of its U-Net's and encoders' files together
    configs: sdxl.Configs
    weights: Mapping[str, Blob]  # canonical name to tensor; the configured VAE's in place of the model's own
    tokenizers: Path | None  # folder with tokenizer/ and tokenizer_2/; None = the shipped CLIP ones (cliptokens)
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the single file
    lineage: Mapping[str, Any] | None = None  # our record of the run that made it, where there is one
    logit_scale: Blob | None = None
    notes: tuple[str, ...] = ()  # what was passed over or adapted in its files
    base: LocalModel | None = None  # of an adapter's run: the model without it (model/adapters/runs.py), and its tensors
    adapter: Mapping[str, Blob] | None = None
    vae_sha256: str | None = None  # of the file of `model.vae`, else what the lineage says; None = the VAE it came with

    @property
    def license(self) -> str | None:
        """The licence that the model declares."""
        stated = (self.lineage or {}).get("license") or self.metadata.get("modelspec.license")
        return str(stated).strip() or None if stated else None

    @property
    def note(self) -> str | None:
        """One line about what was passed over or adapted in its files; None where nothing was."""
        return f"{self.path}: {'; '.join(self.notes)}" if self.notes else None


def resolve(settings: ModelConfig, *, hashed: bool = True) -> LocalModel:
    """The model that `model.init_from` names, complete and with the hashes the config pins.

    Without `hashed` only files whose hash the config pins are read to their end; other hashes are empty then.

    Raises Halt: USAGE (no such path, malformed name), MISMATCH (unfinished or changed run, pickle, damaged or
    foreign file, wrong sha256).
    """
    path = look(settings)
    read_all = hashed or settings.init_sha256 is not None
    networks = layouts.networks_without(settings.vae)
    if _is_run(path):
        model = _open_run(path, hashed, networks)
    else:
        opened = open_folder if path.is_dir() else open_single_file
        model = opened(path, read_all, networks)
    if settings.tokenizers:
        model = replace(model, tokenizers=Path(settings.tokenizers))
    model = replace(model, vae_sha256=(model.lineage or {}).get("vae_sha256"))
    if settings.vae is not None:
        vae, digest = _vae(settings, hashed or settings.vae_sha256 is not None, model.configs.get("vae", sdxl.STANDARD["vae"]))
        kept = {name: blob for name, blob in model.weights.items() if not name.startswith("vae.")}
        notes = (*model.notes, *(f"model.vae: {note}" for note in vae.notes))
        configs, weights = {**model.configs, "vae": vae.config}, {**kept, **vae.weights}
        model = replace(model, configs=configs, weights=weights, vae_sha256=digest, notes=notes)
    own, usual = model.configs["vae"], sdxl.STANDARD["vae"]
    keys = ("scaling_factor", "shift_factor", "latents_mean")
    if other := [f"{key} {own[key]}" for key in keys if own.get(key) not in (None, 0, usual.get(key))]:
        told = f"trains and samples with its VAE's {', '.join(other)}; other programs take {usual['scaling_factor']} and no shift for a single file"
        model = replace(model, notes=(*model.notes, told))
    return model


def look(settings: ModelConfig) -> Path:
    """The model's place: the first part of `resolve`, which needs none of the libraries that build networks.

    Files, headers, records and pinned hashes are right then. Raises the Halts of `resolve`.
    """
    path = find(settings.init_from)
    digest = None
    if _is_run(path):
        if not (path / "DONE").is_file():
            raise Halt(ExitCode.MISMATCH, f"model.init_from {path} is not finished (no DONE): run that stage to its end")
        tensor_files.open_file(_final_of(path))
        digest = (read_json(path / "lineage.json") or {}).get("weights_sha256")
    elif path.is_dir():
        refuse_no_model(path)
        for network in layouts.networks_without(settings.vae):
            for file in layouts.weight_files(path / network) if (path / network).is_dir() else ():
                tensor_files.open_file(file)
        digest = model_sha256(path) if settings.init_sha256 else None
    else:
        tensor_files.open_file(path)
        digest = sha256_of(path) if settings.init_sha256 else None
    if settings.init_sha256 and settings.init_sha256 != digest:
        raise Halt(
            ExitCode.MISMATCH,
            f"model.init_from {path} has sha256 {digest}, model.init_sha256 says {settings.init_sha256}",
        )
    return path


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("DONE", "run.json", "config.yaml"))


def find(init_from: str, key: str = "model.init_from") -> Path:
    """The local path of a model; one of the hub, named with its commit, is looked up on this machine or fetched."""
    path = Path(init_from)
    if path.exists():
        tensor_files.refuse_pickle(path)
        return path
    if revision.pinned(init_from):
        return hub.resolve(init_from, key)[0]
    tensor_files.refuse_pickle(path)  # says the more useful thing first
    line = hub.line_with_commit(init_from, key)
    if line is None:
        ways = "a finished run's directory, a diffusers folder, a .safetensors file, or owner/name@<40-digit commit>"
        raise Halt(ExitCode.USAGE, f"{key} {init_from} does not exist: give {ways}")
    raise Halt(
        ExitCode.USAGE,
        f"{key} {init_from} does not exist on this machine, and a model of the hub needs its full 40-digit commit, because a "
        f"branch may change: {line}",
    )


def refuse_no_model(folder: Path) -> None:
    """Halt(MISMATCH) for a folder that is no diffusers folder, saying what it is and what to name."""
    if (folder / "model_index.json").is_file():
        return
    said = f"{folder} is neither a finished run (DONE) nor a diffusers folder (model_index.json)"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / "manifest.json").is_file():
        said += f": it is a checkpoint of a run; name the run, {folder.parent.parent}"
    elif (folder.parent / "model_index.json").is_file():
        said += f": it is one network of a folder; name the folder, {folder.parent}"
    elif files:
        said += f": name the file in it, as {folder / files[0]}"
    raise Halt(ExitCode.MISMATCH, said)


def open_folder(path: Path, hashed: bool = True, networks: Sequence[str] = sdxl.NETWORKS) -> LocalModel:
    """A diffusers SDXL folder."""
    metadata = _folder_metadata(path)
    configs = layouts.read_configs(path, networks)
    reading = layouts.read_folder(path, configs, networks)
    return LocalModel(
        kind="folder",
        path=path,
        sha256=model_sha256(path) if hashed else "",
        configs=configs,
        weights=reading.weights,
        tokenizers=path if (path / "tokenizer").is_dir() else None,
        metadata=metadata,
        lineage=read_json(path / "lineage.json") or layouts.record_in(metadata) or None,
        logit_scale=layouts.stored_scale(path),
        notes=reading.notes,
    )


def open_single_file(path: Path, hashed: bool = True, networks: Sequence[str] = sdxl.NETWORKS) -> LocalModel:
    """An original-layout SDXL checkpoint."""
    source = tensor_files.open_file(path)
    configs = layouts.configs_in(source, networks)
    reading = layouts.single_weights(source, configs, networks)
    lineage = layouts.record_in(source.metadata) or None
    digest = sha256_of(path) if hashed else ""
    metadata = dict(source.metadata)
    if "modelspec.license" not in metadata and (stated := revision.license_beside(path)):
        metadata["modelspec.license"] = layouts.license_named(stated)
    return LocalModel(
        "single_file", path, digest, configs, reading.weights, None, metadata, lineage, reading.scale, reading.notes
    )


def _open_run(path: Path, hashed: bool, networks: Sequence[str]) -> LocalModel:
    """Trained weights in fp32 from the run's last checkpoint, the rest from its export."""
    lineage = read_json(path / "lineage.json")
    if lineage is None:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {path}: lineage.json is missing or damaged")
    if lineage.get("adapter"):
        from train.model.adapters import runs  # needs this room

        return runs.open_run(path, lineage, _final_of(path), hashed=hashed)
    exported = open_folder(path / "model", hashed, networks)
    if hashed and lineage.get("model_sha256") not in (None, exported.sha256):
        raise Halt(
            ExitCode.MISMATCH,
            f"model.init_from {path} changed since it was finished: model/ has sha256 {exported.sha256}, "
            f"lineage.json says {lineage['model_sha256']}",
        )
    trained, stated = tensor_files.open_file(_final_of(path)), str(lineage.get("weights_sha256"))
    if hashed and (digest := sha256_of(trained.path)) != stated:
        raise Halt(
            ExitCode.MISMATCH,
            f"model.init_from {path} changed since it was finished: {os.path.relpath(trained.path, path)} has sha256 "
            f"{digest}, lineage.json says {stated}",
        )
    foreign = [name for name, blob in sorted(trained.blobs.items()) if _shape(exported.weights.get(name)) != blob.shape]
    if foreign:
        raise Halt(ExitCode.MISMATCH, f"{trained.path} does not belong to {path / 'model'}: {foreign[:5]}")
    return LocalModel(
        "run",
        path,
        stated,
        exported.configs,
        {**exported.weights, **trained.blobs},
        exported.tokenizers,
        exported.metadata,
        lineage,
        exported.logit_scale,
    )


def _shape(blob: Blob | None) -> tuple[int, ...] | None:
    return None if blob is None else blob.shape


def _final_of(path: Path) -> Path:
    """The weights file of the checkpoint that a finished run ended with; its lineage says which bytes it must hold.

    Not simply the newest: damaged ones of later steps may lie beside it, and stay where they are.
    """
    step = (read_json(path / "DONE") or {}).get("step")
    last = f"step-{step:08d}" if type(step) is int else "step-*[0-9]"  # a DONE without a record: the only one, or the newest
    files = sorted(path.glob(f"checkpoints/{last}/model.safetensors"), key=lambda file: (len(str(file)), file))
    if not files:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {path}: the checkpoint of its last step is gone ({last})")
    return files[-1]


def _vae(settings: ModelConfig, hashed: bool, like: Mapping[str, Any] | None) -> tuple[vae_file.Vae, str]:
    """`model.vae` and the sha256 of its file."""
    vae = vae_file.open_vae(find(str(settings.vae), "model.vae"), "model.vae", like)
    digest = sha256_of(vae.file) if hashed else ""
    if settings.vae_sha256 and settings.vae_sha256 != digest:
        raise Halt(
            ExitCode.MISMATCH, f"model.vae {vae.file} has sha256 {digest}, model.vae_sha256 says {settings.vae_sha256}"
        )
    return vae, digest


def license_of(settings: ExportConfig, source: LocalModel) -> str:
    """The licence to declare: the config's, else the parent's, else the family's. Never empty.

    Raises Halt(USAGE) when nobody states one. A config that replaces an inherited licence is warned about.
    """
    own, inherited, stated = (settings.license or "").strip(), _inherited(source), stated_license(settings, source)
    if own and inherited and own != inherited:
        log.warning("export.license is %r, the parent's is %r: make sure you may", own, inherited)
    if not stated:
        raise Halt(
            ExitCode.USAGE,
            f"{source.path} declares no licence: set export.license to the one its weights are under",
        )
    return stated


def stated_license(settings: ExportConfig, source: LocalModel) -> str | None:
    """The licence that `license_of` takes, None where nobody states one."""
    return (settings.license or "").strip() or _inherited(source)


def _inherited(source: LocalModel) -> str | None:
    return source.license or license_of_family(str(source.path), source.metadata.get("modelspec.title", ""))


def license_of_family(*names: str) -> str | None:
    """The licence that models of such a name are under, whether or not their files say so."""
    return layouts.FAIPL if any(re.search(r"animagine[ _-]?xl[ _-]?v?3", name.lower()) for name in names) else None


_INDIFFERENT = (
    "_class_name", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "force_upcast", "sample_size",
    "initializer_factor", "initializer_range", "dropout", "attention_dropout", "model_type",
)  # fmt: skip


def is_standard(configs: sdxl.Configs) -> bool:
    """True when SDXL's own configs describe the same tensors and the same arithmetic."""
    decisive = {
        network: {key: value for key, value in sdxl.STANDARD[network].items() if key not in _INDIFFERENT}
        for network in sdxl.NETWORKS
    }
    return all(configs[n].get(key, value) == value for n, config in decisive.items() for key, value in config.items())


def vae_identity(model: LocalModel) -> str:
    """Identity of the model's VAE, as the latents made with it carry it."""
    return vae_file.identity(dict(network_weights(model, "vae")))


def sha256_of(path: Path) -> str:
    """`file_sha256`, read once for as long as the file stays as it is: a start looks at its model twice."""
    status = os.stat(path)
    return _sha256_while(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256_while(path: Path, inode: int, size_bytes: int, changed_ns: int) -> str:
    return file_sha256(path)


def model_sha256(folder: Path) -> str:
    """sha256 over the lines "<sha256>  <file>" (as sha256sum prints them) of a folder's U-Net and encoder files."""
    files = [file for network in sdxl.NETWORKS[:3] for file in layouts.weight_files(folder / network)]
    lines = [f"{sha256_of(file)}  {os.path.relpath(file, folder)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _folder_metadata(path: Path) -> dict[str, str]:
    """What a folder says about itself, our lineage first."""
    lineage = read_json(path / "lineage.json") or read_json(path.parent / "lineage.json") or {}
    stated = {"modelspec.license": str(lineage["license"])} if lineage.get("license") else {}
    return {**layouts.metadata_of_folder(path), **stated}


def network_weights(model: LocalModel, network: str) -> Iterator[tuple[str, Blob]]:
    """(canonical name, tensor) of one network."""
    return ((name, blob) for name, blob in model.weights.items() if name.startswith(f"{network}."))
