"""What a finished stage leaves behind: a diffusers folder with its card, a single file, and the record of what made them.

Weights are streamed from the last checkpoint, tensor by tensor; nothing of a model is held in memory.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, replace_file, write_json
from train.base.secrets import mask_settings
from train.config.adapter import AdapterConfig
from train.config.stage import ExportConfig
from train.model import folder as model_folder
from train.model import layouts, sdxl, single_file
from train.model.adapters import bases, reading, training, writing
from train.model.adapters.layers import Layer
from train.model.prediction import FLOW_SHIFT_KEY, told_scheduler
from train.model.source import LocalModel, model_sha256
from train.observe import card
from train.storage import tensor_files
from train.storage.tensor_files import Blob

_SPEC = "https://github.com/Stability-AI/generative-models"  # the implementation that the layout belongs to


def code_revision() -> str:
    """Commit of this code, `+changes` when the tree differs from it, `unknown` outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        top, head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.splitlines()  # fmt: skip
        if Path(top).resolve() != root:  # a copy inside another project: that one's commit says nothing of this code
            return "unknown"
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=30,
        ).stdout.strip()  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def metadata_of(
    record: Mapping[str, Any],
    settings: ExportConfig,
    prediction: str,
    timesteps: tuple[int, int],
    side_px: int = 1024,
    flow_shift: float = 1.0,
) -> dict[str, str]:
    """`__metadata__` of the single file: the modelspec fields and our training record."""
    fields = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": _SPEC,
        "modelspec.title": mask_settings(settings.title or str(record["stage"])),
        "modelspec.resolution": f"{side_px}x{side_px}",
        "modelspec.date": str(record["date"]),
        "modelspec.prediction_type": prediction,
        FLOW_SHIFT_KEY: f"{flow_shift:g}" if prediction == "flow" else "",
        "modelspec.timestep_range": f"{timesteps[0]},{timesteps[1]}",
        "modelspec.license": str(record["license"]),
        "modelspec.author": mask_settings(settings.author),
        "modelspec.description": mask_settings(settings.description),
        "modelspec.tags": mask_settings(settings.tags),
        **{layouts.RECORD_PREFIX + key: _as_text(value) for key, value in record.items()},
    }
    return {key: value for key, value in fields.items() if value}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """`__metadata__` of a single file, its header checked."""
    return tensor_files.open_file(path).metadata


def lineage_record(
    *,
    stage: str,
    source: LocalModel,
    dataset_fingerprint: str,
    config_hash: str,
    seed: int,
    updates: int,
    images: int,
    versions: Mapping[str, str],
    license: str,
    weights_sha256: str,
    conditioning: Mapping[str, Any],
    accepted: Sequence[str] = (),
    conversion: Mapping[str, Any] | None = None,
    extended: Sequence[str] = (),
) -> dict[str, Any]:
    """Who made these weights from what. `ancestors` carries the records of the stages before; `conditioning` is what
    inference must share with the training, because a file that was moved has no config beside it; `accepted` is what
    `resume.accept` let change under way, `conversion` what was taught anew, `extended` how often the stage was finished
    before and then made longer."""
    parent = source.lineage or {}
    stated = {key: value for key, value in parent.items() if key != "ancestors"}
    older = parent.get("ancestors")  # from a file that anybody may have written
    return {
        "stage": stage,
        "parent": {
            "stage": parent.get("stage"),
            "sha256": source.sha256,
            "title": source.metadata.get("modelspec.title") or parent.get("stage") or source.path.stem,
        },
        "dataset_fingerprint": dataset_fingerprint,
        "config_hash": config_hash,
        "code_revision": code_revision(),
        "seed": seed,
        "updates": updates,
        "images": images,
        "versions": dict(versions),
        "license": license,
        "weights_sha256": weights_sha256,
        **({"vae_sha256": source.vae_sha256} if source.vae_sha256 else {}),
        "conditioning": dict(conditioning),
        **({"conversion": dict(conversion)} if conversion else {}),
        **({"extended": list(extended)} if extended else {}),
        **({"accepted": [_without_home(mask_settings(text)) for text in accepted]} if accepted else {}),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ancestors": [*(older if isinstance(older, list) else []), stated] if stated else [],
    }


def export_stage(
    run_path: Path,
    trained: Path | None,
    source: LocalModel,
    record: Mapping[str, Any],
    settings: ExportConfig,
    *,
    prediction: str = "epsilon",
    zero_terminal_snr: bool = False,
    flow_shift: float = 1.0,
    timesteps: tuple[int, int] = (0, 1000),
    side_px: int | None = None,
    average: Path | None = None,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Write `model/`, `<stage>.safetensors`, `lineage.json`, and with EMA `<stage>-ema.safetensors`.

    `trained` is the final checkpoint's model.safetensors (None: `source` holds all), `average` its ema.safetensors; `side_px` is the side of the
    square that was trained (null = as the parent says), which diffusers draws where a call names no size. Repeatable: what an
    interrupted export left is replaced. `poll` is called between pieces of tensors and may raise. Raises Halt(CANNOT_WRITE), or Halt(MISMATCH) when a file reads back wrong.
    """
    faults.at("export")
    folder, stage = run_path / "model", str(record["stage"])
    model = ready(
        trained, source, record, settings, prediction=prediction, zero_terminal_snr=zero_terminal_snr, flow_shift=flow_shift,
        timesteps=timesteps, side_px=side_px, poll=poll,
    )  # fmt: skip
    yaml = (run_path / "config.yaml").read_text(encoding="utf-8")
    write_folder(folder, model, source, record, yaml, prediction=prediction, zero_terminal_snr=zero_terminal_snr, renew=True)
    write_single(run_path / f"{stage}.safetensors", model, source)
    if average is not None:
        write_single(run_path / f"{stage}-ema.safetensors", averaged(model, average, poll), source)
    poll()
    write_json(run_path / "lineage.json", {**record, "model_sha256": model_sha256(folder)})


@dataclass(frozen=True)
class Ready:
    """A model as it will be written: its tensors by canonical name, configs and metadata, and the dtype they are cast to."""

    weights: Mapping[str, Blob]
    configs: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    dtype: str


def ready(
    trained: Path | None,
    source: LocalModel,
    record: Mapping[str, Any],
    settings: ExportConfig,
    *,
    prediction: str,
    zero_terminal_snr: bool,
    flow_shift: float,
    timesteps: tuple[int, int],
    side_px: int | None,
    poll: Callable[[], None] = lambda: None,
) -> Ready:
    """`source` with a checkpoint's tensors over its own. The arguments are those of `export_stage`."""
    factor = sdxl.vae_factor(source.configs["vae"])
    side_px = side_px or int(source.configs["unet"].get("sample_size") or 1024 // factor) * factor
    configs = {
        **source.configs,
        "unet": sdxl.drawn_at(source.configs["unet"], side_px, factor),
        "scheduler": told_scheduler(
            source.configs["scheduler"], v=prediction == "v", zero_terminal_snr=zero_terminal_snr,
            flow_shift=flow_shift if prediction == "flow" else None,
        ),
    }  # fmt: skip
    return Ready(
        _polled({**source.weights, **(tensor_files.open_file(trained).blobs if trained is not None else {})}, poll),
        configs,
        metadata_of(record, settings, prediction, timesteps, side_px, flow_shift),
        tensor_files.NAMES_OF_PRECISIONS[settings.dtype],
    )


def averaged(model: Ready, average: Path, poll: Callable[[], None] = lambda: None) -> Ready:
    """The same model with the averaged weights of a checkpoint's ema.safetensors, which it says."""
    told = {
        **model.metadata,
        "modelspec.title": model.metadata["modelspec.title"] + " (EMA)",
        f"{layouts.RECORD_PREFIX}weights_sha256": file_sha256(average),
    }
    return replace(model, weights={**model.weights, **_polled(tensor_files.open_file(average).blobs, poll)}, metadata=told)


def write_folder(
    folder: Path, model: Ready, source: LocalModel, record: Mapping[str, Any], yaml: str,
    *, prediction: str, zero_terminal_snr: bool, renew: bool = False,
) -> None:  # fmt: skip
    """A diffusers folder with its card, the record and `yaml`, the run's config; complete or not at all."""
    with model_folder.new_folder(folder, renew=renew) as new:
        hashes = model_folder.write_networks(new, dict(model.weights), model.configs, dtype=model.dtype)
        model_folder.write_tokenizers(source.tokenizers, new)
        model_folder.write_pipeline(new, model.configs["scheduler"])
        scale = source.logit_scale and tensor_files.cast(source.logit_scale, model.dtype, "logit_scale")
        single_file.write_sidecar(new, model.metadata, scale)  # as in the single file, so that converting gives that file
        replace_file(new / "training.yaml", _without_home(yaml))
        write_json(new / "lineage.json", record)
        said = card.text(record, model.metadata, prediction=prediction, zero_terminal_snr=zero_terminal_snr, vae=model.configs["vae"])
        replace_file(new / "README.md", said)
        for name, digest in hashes.items():  # before it takes the place of an earlier one
            _require_hash(new / name, digest)


def write_single(path: Path, model: Ready, source: LocalModel) -> str:
    """The single file of a model; its sha256."""
    digest = single_file.write_single_file(
        path, model.weights, model.configs, model.metadata, logit_scale=source.logit_scale, dtype=model.dtype
    )
    _require_hash(path, digest)
    return digest


def export_adapter(
    run_path: Path,
    trained: Path,
    source: LocalModel,
    record: Mapping[str, Any],
    settings: ExportConfig,
    adapter: AdapterConfig,
    *,
    metadata: Mapping[str, str],
    average: Path | None = None,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Write `<stage>-lora.safetensors` in kohya's names, `lora/` as diffusers', `lineage.json`; with EMA `<stage>-ema-lora.safetensors`.

    `source.weights` are the base's. Repeatable, polled and checked as `export_stage`. LoKr and LoHa have no `lora/`: diffusers
    knows no names for them.
    """
    faults.at("export")
    stage, yaml = str(record["stage"]), (run_path / "config.yaml").read_text(encoding="utf-8")
    made = ready_adapter(trained, source, settings, adapter, metadata=metadata, name=stage, poll=poll)
    write_kohya(run_path / f"{stage}-lora.safetensors", made, source)
    if made.folder:
        write_lora_folder(run_path / "lora", made, source, record, yaml, renew=True)
    if average is not None:
        named = {**metadata, f"{layouts.RECORD_PREFIX}weights_sha256": file_sha256(average)}
        made = ready_adapter(average, source, settings, adapter, metadata=named, name=f"{stage}-ema", poll=poll)
        write_kohya(run_path / f"{stage}-ema-lora.safetensors", made, source)
    poll()
    write_json(run_path / "lineage.json", record)


@dataclass(frozen=True)
class ReadyAdapter:
    """An adapter as it will be written. `folder`: whether diffusers has names for its kind."""

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str]
    dtype: str

    @property
    def folder(self) -> bool:
        """LoKr and LoHa have a single file alone."""
        return all(layer.kind == "lora" for layer in self.layers.values())


def ready_adapter(
    trained: Path, source: LocalModel, settings: ExportConfig, adapter: AdapterConfig,
    *, metadata: Mapping[str, str], name: str, poll: Callable[[], None] = lambda: None,
) -> ReadyAdapter:  # fmt: skip
    """The adapter in a checkpoint's file; it says `metadata`, its base and the `name` it goes by."""
    shapes = {tensor: blob.shape for tensor, blob in source.weights.items()}
    told = {
        **metadata, **bases.fields(source.base or source), "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_output_name": name,
    }  # fmt: skip
    layers = training.layers_of(_polled(tensor_files.open_file(trained).blobs, poll), shapes, adapter)
    return ReadyAdapter(layers, told, tensor_files.NAMES_OF_PRECISIONS[settings.dtype])


def write_kohya(path: Path, made: ReadyAdapter, source: LocalModel) -> str:
    """The adapter's file in kohya's names; its sha256. What lies there is replaced."""
    digest = writing.write_kohya(path, made.layers, source.configs, made.metadata, dtype=made.dtype, renew=True)
    _require_hash(path, digest)
    return digest


def write_lora_folder(
    folder: Path, made: ReadyAdapter, source: LocalModel, record: Mapping[str, Any], yaml: str, *, renew: bool = False
) -> None:
    """The folder that diffusers' `load_lora_weights` reads."""
    files = {"lineage.json": json.dumps(record), "training.yaml": _without_home(yaml)}
    digest = writing.write_diffusers(folder, made.layers, source.configs, made.metadata, dtype=made.dtype, files=files, renew=renew)
    _require_hash(folder / reading.DIFFUSERS_FILE, digest)


def _polled(weights: Mapping[str, Blob], poll: Callable[[], None]) -> dict[str, Blob]:
    """The same tensors; reading one calls `poll` before every piece."""

    def pieces(blob: Blob) -> Iterator[memoryview]:
        for piece in blob.pieces():
            poll()
            yield piece

    return {name: replace(blob, pieces=partial(pieces, blob)) for name, blob in weights.items()}


def _without_home(text: str) -> str:
    """No user's name in what is passed on."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _require_hash(path: Path, digest: str) -> None:
    """Read back what was written: a bad disk must not pass as a finished stage."""
    if file_sha256(path) != digest:
        os.unlink(path)
        raise Halt(ExitCode.CANNOT_WRITE, f"{path} reads back otherwise than it was written: check that disk")
