"""Where a stage starts from: a finished run, a diffusers folder, a single file, or a pinned revision of a hub model.

Everything becomes a `LocalModel`: configs, weights by canonical name that are not read yet, and who they are.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train import checkpoint, modelfolder, sdxl, singlefile, weightfile
from train.config import ModelConfig
from train.exits import ExitCode, Halt
from train.rundir import read_done, read_json
from train.weightfile import Blob

HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+@(.+)$")
HUB_FILES = ("*.json", "*.txt", "*.safetensors")
DTYPE_NAMES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    kind: Literal["run", "folder", "single_file"]
    path: Path  # what the config names
    sha256: str  # of the weights file read; of a folder: of its U-Net's and encoders' files together
    configs: sdxl.Configs
    weights: Mapping[str, Blob]  # canonical name to tensor; the configured VAE's in place of the model's own
    tokenizers: Path | None  # folder with tokenizer/ and tokenizer_2/
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the single file
    lineage: Mapping[str, Any] | None = None  # the parent run's lineage.json
    logit_scale: Blob | None = None

    @property
    def license(self) -> str | None:
        """The licence that the model declares."""
        stated = (self.lineage or {}).get("license") or self.metadata.get("modelspec.license")
        return str(stated) if stated else None


def resolve(settings: ModelConfig) -> LocalModel:
    """The model that `model.init_from` names, complete and with the hashes the config pins.

    Raises Halt: USAGE (no such path, malformed name), MISMATCH (unfinished or changed run, pickle, damaged or
    foreign file, wrong sha256).
    """
    path = find(settings.init_from)
    vae = _vae_folder(settings)
    tokenizers = Path(settings.tokenizers) if settings.tokenizers else None
    if (path / "DONE").exists() or (path / "run.json").exists() or (path / "config.yaml").exists():
        model = _open_run(path, vae, tokenizers)
    elif path.is_dir():
        model = open_folder(path, vae=vae, tokenizers=tokenizers)
    else:
        model = open_single_file(path, vae=vae, tokenizers=tokenizers)
    if settings.init_sha256 and settings.init_sha256 != model.sha256:
        raise Halt(
            ExitCode.MISMATCH,
            f"model.init_from {path} has sha256 {model.sha256}, model.init_sha256 says {settings.init_sha256}",
        )
    modelfolder.check_weights(
        {name: blob.shape for name, blob in model.weights.items()}, sdxl.folder_shapes(model.configs), str(path)
    )
    return model


def find(init_from: str) -> Path:
    """The local path of `init_from`; a hub name is looked up in, or fetched into, the library's cache."""
    path = Path(init_from)
    if path.exists():
        weightfile.refuse_pickle(path)
        return path
    hub = HUB_NAME.match(init_from)
    if hub is None:
        weightfile.refuse_pickle(path)  # says the more useful thing first
        raise Halt(
            ExitCode.USAGE,
            f"model.init_from {init_from} does not exist: give a finished run's directory, a diffusers folder, "
            "a .safetensors file, or owner/name@<40-digit commit>",
        )
    if not re.fullmatch(r"[0-9a-f]{40}", hub.group(1)):
        raise Halt(
            ExitCode.USAGE,
            f"model.init_from {init_from}: a hub model needs its full 40-digit commit, because a branch may change",
        )
    return _fetch(init_from)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {name} cannot be fetched: {error}") from error


def open_folder(path: Path, *, vae: Path | None = None, tokenizers: Path | None = None) -> LocalModel:
    """A diffusers SDXL folder."""
    if not (path / "model_index.json").is_file():
        raise Halt(
            ExitCode.MISMATCH, f"{path} is neither a finished run (DONE) nor a diffusers folder (model_index.json)"
        )
    files = [file for network in sdxl.NETWORKS[:3] for file in modelfolder.weight_files(path / network)]
    return LocalModel(
        kind="folder",
        path=path,
        sha256=_joint_hash(path, files),
        configs=modelfolder.read_configs(path, vae=vae),
        weights=modelfolder.read_weights(path, vae=vae),
        tokenizers=tokenizers or (path if (path / "tokenizer").is_dir() else None),
        metadata=_folder_metadata(path, files[0]),
        logit_scale=singlefile.stored_scale(path),
    )


def open_single_file(path: Path, *, vae: Path | None = None, tokenizers: Path | None = None) -> LocalModel:
    """An original-layout SDXL checkpoint."""
    source = weightfile.open_file(path)
    configs = singlefile.configs_in(source)
    weights, logit_scale = singlefile.single_weights(source, configs)
    if vae is not None:
        weights = {name: blob for name, blob in weights.items() if not name.startswith("vae.")}
        weights |= modelfolder.read_weights(vae.parent, vae=vae, networks=("vae",))
        configs = {**configs, "vae": read_json(vae / "config.json") or {}}
    return LocalModel(
        "single_file", path, file_sha256(path), configs, weights, tokenizers, source.metadata, None, logit_scale
    )


def _open_run(path: Path, vae: Path | None, tokenizers: Path | None) -> LocalModel:
    """Trained weights in fp32 from the run's last checkpoint, the rest from its export."""
    if read_done(path) is None:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {path} is not finished (no DONE): run that stage to its end")
    lineage = read_json(path / "lineage.json")
    if lineage is None:
        raise Halt(ExitCode.MISMATCH, f"model.init_from {path}: lineage.json is missing or damaged")
    exported = open_folder(path / "model", vae=vae, tokenizers=tokenizers)
    newest = checkpoint.newest_of(path)
    weights_hash = newest.manifest.files["model.safetensors"].sha256
    if weights_hash != lineage.get("weights_sha256"):
        raise Halt(
            ExitCode.MISMATCH,
            f"model.init_from {path} changed since it was finished: {newest.path.name}/model.safetensors has sha256 "
            f"{weights_hash}, lineage.json says {lineage.get('weights_sha256')}",
        )
    trained = weightfile.open_file(newest.path / "model.safetensors")
    foreign = sorted(set(trained.blobs) - set(exported.weights))
    if foreign:
        raise Halt(ExitCode.MISMATCH, f"{trained.path} does not belong to {path / 'model'}: {foreign[:5]}")
    return LocalModel(
        "run",
        path,
        weights_hash,
        exported.configs,
        {**exported.weights, **trained.blobs},
        exported.tokenizers,
        exported.metadata,
        lineage,
        exported.logit_scale,
    )


def _vae_folder(settings: ModelConfig) -> Path | None:
    if settings.vae is None:
        return None
    folder = find(settings.vae)
    if not (folder / "config.json").is_file():
        raise Halt(ExitCode.MISMATCH, f"model.vae {folder} is no folder of an AutoencoderKL (config.json and weights)")
    if settings.vae_sha256:
        found = file_sha256(modelfolder.weight_files(folder)[0])
        if found != settings.vae_sha256:
            raise Halt(
                ExitCode.MISMATCH,
                f"model.vae {folder} has sha256 {found}, model.vae_sha256 says {settings.vae_sha256}",
            )
    return folder


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joint_hash(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.path.relpath(file, root)} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _folder_metadata(path: Path, unet_file: Path) -> Mapping[str, str]:
    """What a folder says about itself: our lineage, the single file it came from, or its U-Net file's header."""
    lineage = read_json(path / "lineage.json") or read_json(path.parent / "lineage.json") or {}
    stated = {"modelspec.license": str(lineage["license"])} if lineage.get("license") else {}
    stored = singlefile.stored_metadata(path)
    return stated or stored or weightfile.open_file(unet_file).metadata


def network_weights(model: LocalModel, network: str) -> Iterator[tuple[str, Blob]]:
    """(canonical name, tensor) of one network."""
    return ((name, blob) for name, blob in model.weights.items() if name.startswith(f"{network}."))
