"""A model's files to its named tensors: a diffusers folder, a single file, a VAE alone; nothing of the data is read yet.

One reading for every place, in whichever spelling other programs write. What is wanted is taken when it is there by
name and shape; what is on the closed list of leftovers is passed over; anything else may belong to another
architecture and is refused. What was passed over or adapted is told in one line. Canonical names are
"<network>.<tensor>", with the `text_model.` prefix in both text encoders (see `sdxl.canonical`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.model import other_kinds, prediction, sdxl
from train.model.other_kinds import LEFTOVERS, PROJECTION_1, some
from train.storage import tensor_files
from train.storage.tensor_files import Blob

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
SIDECAR = "single_file.json"
RECORD_PREFIX = "anix."  # of our training record in a single file's metadata
_TEXTS = ("stage", "dataset_fingerprint", "config_hash", "code_revision", "license", "weights_sha256", "vae_sha256",
          "date")  # fmt: skip
FAIPL = "Fair AI Public License 1.0-SD"  # freedevproject.org/faipl-1.0-sd; Animagine XL 3.x and descendants
_LICENSE_IN_README = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)

# Every prefix under which a network's tensors stand in a file of several; SDXL's own comes first.
_PREFIXES = (
    *((network, prefix) for network, prefix in sdxl.PREFIXES.items()),
    ("text_encoder_2", "conditioner.embedders.1.transformer."),
    *((network, f"{network}.") for network in sdxl.NETWORKS),
)
_WRAPPER = "model."  # around the whole file, as a module that held the model saved it

@dataclass(frozen=True)
class Reading:
    """A file's wanted tensors by canonical name, and what was passed over or adapted."""

    weights: dict[str, Blob]
    scale: Blob | None  # logit_scale, which only a single file has a place for
    notes: tuple[str, ...] = ()


@dataclass
class _Sorted:
    """Tensors of a file by what they are: found under a name of SDXL's, passed over, or unknown."""

    found: dict[str, tuple[str, Blob]] = field(default_factory=dict)  # target: (name there, blob)
    passed: Counter[str] = field(default_factory=Counter)
    adapted: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """What a user is told of it, a clause each."""
        told = []
        if self.passed:
            groups = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in sorted(self.passed.items()))
            told.append(f"passed over {self.passed.total()} tensors that are no weights of SDXL: {groups}")
        return (*told, *(f"{what} ({count})" for what, count in sorted(self.adapted.items())))


def read(
    path: Path,
    blobs: Mapping[str, Blob],
    configs: sdxl.Configs,
    networks: Sequence[str] = sdxl.NETWORKS,
    *,
    alone: bool = False,
    foreign: Callable[[Path, Mapping[str, Blob]], None] = lambda path, blobs: None,
) -> Reading:
    """The weights of `networks` in a file's tensors, names and shapes proved complete.

    `alone`: the file is that of one network, its names without prefix. Tensors of other networks are not looked at.
    `foreign` is asked of a file that is not as wanted: it refuses one that it knows for something else.
    Raises Halt(MISMATCH) saying what the file is nearly, what is missing or unknown, and what to do.
    """
    links = sdxl.links(configs, networks)
    shapes = sdxl.folder_shapes(configs, networks=networks)
    mine = _sort(blobs, {link.single for link in links}, shapes, networks, alone)
    scale = mine.found.pop(sdxl.LOGIT_SCALE, None)
    in_folder_names = 2 * sum(target in shapes for target in mine.found) > len(mine.found)
    weights: dict[str, Blob] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for link in links:
        whole = link.single in mine.found
        if whole:  # what stands there a second time, in the folder's words, is one tensor too many
            mine.unknown += [mine.found[part][0] for part in link.folder if part in mine.found]
        targets = {link.single: link.shape} if whole else {part: shapes[part] for part in link.folder}
        have = {target: _fitted(target, shape, mine) for target, shape in targets.items() if target in mine.found}
        wrong += [
            f"{mine.found[target][0]} is {list(blob.shape)}, not {list(targets[target])}"
            for target, blob in have.items() if blob.shape != tuple(targets[target])
        ]  # fmt: skip
        if len(have) < len(targets):
            lacking = [target for target in targets if target not in have]
            missing += lacking if in_folder_names or have else [link.single]
        elif not wrong:
            weights.update(from_single(link, have[link.single]) if whole else have)
    unlike = bool(missing or mine.unknown or wrong)
    if unlike:
        foreign(path, blobs)
    used = dict(mine.found.values())
    if any(blob.dtype not in tensor_files.EXPONENTS for blob in used.values()):
        other_kinds.refuse_types(path, used)
    if unlike:
        other_kinds.refuse_unlike(path, missing, mine.unknown, wrong, links)
    return Reading(weights, None if scale is None else _checked_scale(path, *scale), mine.notes())


def placed(name: str) -> tuple[str | None, str]:
    """(network, name within it) of a tensor in a file of several networks; (None, name) where no prefix says so."""
    for candidate in (name, name.removeprefix(_WRAPPER)):
        for network, prefix in _PREFIXES:
            if candidate.startswith(prefix):
                return network, candidate.removeprefix(prefix)
    return None, name


def _sort(
    blobs: Mapping[str, Blob],
    singles: set[str],
    shapes: Mapping[str, tuple[int, ...]],
    networks: Sequence[str],
    alone: bool,
) -> _Sorted:
    mine = _Sorted()
    for name in sorted(blobs, key=lambda name: (name not in singles, name)):  # SDXL's own spelling goes first
        if name in (sdxl.V_MARK, sdxl.ZERO_SNR_MARK):
            continue
        network, rest = (networks[0], name) if alone else placed(name)
        if network not in networks and (network is not None or "unet" not in networks):
            continue  # another network's, that nobody asked for
        target = None if network is None else _target(network, rest, singles, shapes, alone)
        if target is not None and target not in mine.found:
            mine.found[target] = name, blobs[name]
            if (what := _adaptation(network, name, target, singles, alone)) is not None:
                mine.adapted[what] += 1
        elif target is None and (label := leftover(network, name, rest)) is not None:
            mine.passed[label] += 1
        else:
            mine.unknown.append(name)
    return mine


def _target(network: str, rest: str, singles: set[str], shapes: Mapping[str, tuple[int, ...]], alone: bool) -> str | None:
    """The tensor of SDXL that is meant, by its name in the single file or, canonical, in the folder."""
    single, folder = sdxl.PREFIXES[network] + rest, f"{network}.{rest}"
    if not alone and (single in singles or single == sdxl.LOGIT_SCALE):
        return single
    if folder not in shapes:  # by an older version of the libraries
        folder = sdxl.canonical(network, rest)
    return folder if folder in shapes else single if single in singles else None


def _adaptation(network: str | None, name: str, target: str, singles: set[str], alone: bool) -> str | None:
    """What is unusual about finding `target` under `name`; None for what every reader knows."""
    usual = target not in singles if alone else target == name
    if usual or target == sdxl.LOGIT_SCALE or (alone and network == "vae"):  # a VAE alone is usual in both layouts
        return None
    if "text_projection" in name:
        return "text_projection in its other layout"
    return "tensors under other names" if alone else f"{network}: tensors under other names"


def leftover(network: str | None, name: str, rest: str) -> str | None:
    """What a tensor is that means nothing here, by the closed list; None for anything else."""
    if network == "text_encoder" and rest in ("text_projection", "text_projection.weight"):
        return PROJECTION_1
    candidates = {name, rest, name.removeprefix(_WRAPPER)}
    return next((what for what, form in LEFTOVERS.items() if any(re.fullmatch(form, c) for c in candidates)), None)


def _fitted(target: str, shape: tuple[int, ...], mine: _Sorted) -> Blob:
    """The found tensor, as a matrix where it is a 1x1 convolution there, or the reverse."""
    blob = mine.found[target][1]
    flat = [side for side in blob.shape if side != 1] == [side for side in shape if side != 1]
    if blob.shape != tuple(shape) and flat:
        mine.adapted["matrices that are 1x1 convolutions there, or the reverse"] += 1
        return tensor_files.reshaped(blob, tuple(shape))
    return blob


def _checked_scale(path: Path, name: str, blob: Blob) -> Blob:
    """logit_scale, read now: it is in no network, so that nobody else would look before an export is written."""
    if math.prod(blob.shape) != 1:
        raise Halt(ExitCode.MISMATCH, f"{path}: {name} is {list(blob.shape)}, not one number")
    if blob.dtype not in tensor_files.EXPONENTS:
        other_kinds.refuse_types(path, {name: blob})
    if not tensor_files.finite(blob.read(), blob.dtype):
        raise Halt(ExitCode.MISMATCH, f"{path}: {name} is not finite (NaN or infinity)")
    return tensor_files.reshaped(blob, ())


def from_single(link: sdxl.Link, blob: Blob) -> Iterator[tuple[str, Blob]]:
    """The folder's tensors that one tensor of the single file holds."""
    if link.operation == "join":
        yield from ((name, tensor_files.rows(blob, i, 3)) for i, name in enumerate(link.folder))
    elif link.operation == "transpose":
        yield link.folder[0], tensor_files.transposed(blob)
    elif link.operation == "to_conv":
        yield link.folder[0], tensor_files.reshaped(blob, blob.shape[:2])
    else:
        yield link.folder[0], blob


def read_folder(folder: Path, configs: sdxl.Configs, networks: Sequence[str] = sdxl.NETWORKS) -> Reading:
    """Weights by canonical name of a diffusers folder, sharded or not; fp16 variants only where nothing else is.

    Raises Halt(MISMATCH) as `read`, for each network by its file.
    """
    weights: dict[str, Blob] = {}
    notes: list[str] = []
    for network in networks:
        files, others = _choice(folder / network)
        blobs: dict[str, Blob] = {}
        for file in files:
            blobs |= tensor_files.open_file(file).blobs
        reading = read(files[0], blobs, configs, (network,), alone=True)
        weights |= reading.weights
        told = [f"passed over files beside {files[0].name}: {some(others)}"] if others else []
        notes += [f"{network}: {note}" for note in (*told, *reading.notes)]
    return Reading(weights, None, tuple(notes))


def weight_files(place: Path) -> list[Path]:
    """The safetensors files that make up one network's folder. Halt(MISMATCH) when there are none, or not all."""
    return _choice(place)[0]


def _choice(place: Path) -> tuple[list[Path], list[str]]:
    """(files of one network, names of older ones beside them that would be another copy of it).

    One whole file goes before shards, which a program that saved anew may have left; of shards only whole sets count.
    """
    every = sorted(p for p in place.glob("*.safetensors") if ".non_ema" not in p.name)
    groups: dict[str, list[Path]] = {}
    for path in every:
        groups.setdefault(re.sub(r"-\d{5}-of-", "-*-of-", path.name), []).append(path)
    whole = {name: files for name, files in groups.items() if "-*-of-" not in name or len(files) == _shards(name)}
    plain = [name for name in whole if ".fp16" not in name]
    usual = [name for name in plain if name in FILES.values()]  # before an .ema or other variant beside it
    sharded = [name for name in plain if "-*-of-" in name]
    halves = [name for name in whole if name not in plain]
    ranked = usual or sharded or plain or sorted(halves, key=lambda name: "-*-of-" in name)
    if ranked:
        if ranked[0] in plain and ranked[0] not in usual and len(ranked) > 1:
            raise Halt(ExitCode.MISMATCH, f"{place} holds several copies of its weights ({some(ranked)}): leave one of them")
        old = [path.name for name, files in groups.items() if name != ranked[0] and "-*-of-" in name for path in files]
        index = [p.name for p in place.glob("*.index*.json") if "-*-of-" not in ranked[0]]
        return whole[ranked[0]], sorted(old + index)
    if groups:
        name, files = next(iter(groups.items()))
        raise Halt(ExitCode.MISMATCH, f"{place} holds {len(files)} of {_shards(name)} shards {name}: copy or download the others")
    pickles = sorted(p.name for p in place.glob("*") if p.suffix in tensor_files.PICKLE_SUFFIXES)
    hint = f"; {pickles[0]} is a pickle and is not read, because reading one can run any code" if pickles else ""
    raise Halt(ExitCode.MISMATCH, f"{place} holds no .safetensors weights{hint}")


def _shards(name: str) -> int:
    """How many files a set of shards has by its name."""
    match = re.search(r"-\*-of-(\d{5})", name)
    return int(match[1]) if match else 1


def read_configs(folder: Path, networks: Sequence[str] = sdxl.NETWORKS) -> sdxl.Configs:
    """The networks' configs and the scheduler's, from a diffusers folder.

    Of a network that is not among `networks`, because another takes its place, the config is there if the folder has it.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for network in sdxl.NETWORKS:
        path = folder / network / "config.json"
        config = read_json(path)
        if config is not None:
            configs[network] = config
        elif network in networks:
            raise Halt(ExitCode.MISMATCH, _no_config(folder, path))
    path = folder / "scheduler/scheduler_config.json"
    scheduler = read_json(path) if path.exists() else sdxl.STANDARD["scheduler"]
    if scheduler is None:
        raise Halt(ExitCode.MISMATCH, f"{path} is damaged: it says what the model predicts")
    configs["scheduler"] = scheduler
    other_kinds.refuse_unet(configs["unet"], str(folder))
    if "vae" in networks:
        configs["vae"] = sdxl.checked_vae(configs["vae"], str(folder))
    sdxl.folder_shapes(configs, str(folder), networks)  # refused here, where the folder's name is known
    return configs


def _no_config(folder: Path, path: Path) -> str:
    kind = str((read_json(folder / "model_index.json") or {}).get("_class_name", ""))
    if kind and not kind.startswith("StableDiffusionXL"):
        return f"{folder} is a folder of {some([kind])}, no SDXL model: the recipe trains StableDiffusionXLPipeline's"
    if path.parent.name == "vae" and not path.parent.is_dir():
        return f"{folder} has no VAE: set model.vae (convert.py: --vae) to SDXL's VAE, a folder or a file"
    if path.parent.name == "text_encoder" and (folder / "text_encoder_2").is_dir():
        return f"{path} is missing: {folder} has encoder 2 alone, as an SDXL refiner has; the recipe trains the base model"
    return f"{path} is missing or damaged: {folder} is no complete diffusers SDXL folder"


def networks_without(vae: str | Path | None) -> tuple[str, ...]:
    """The networks that a model must hold itself: all, or all but the VAE where another takes its place."""
    return sdxl.NETWORKS if vae is None else tuple(network for network in sdxl.NETWORKS if network != "vae")


def single_weights(
    source: tensor_files.Tensors, configs: sdxl.Configs, networks: Sequence[str] = sdxl.NETWORKS
) -> Reading:
    """The tensors of an opened single file, names and shapes proved complete, and what was passed over."""
    return read(source.path, source.blobs, configs, networks, foreign=other_kinds.refuse_other_kinds)


def configs_in(source: tensor_files.Tensors, networks: Sequence[str] = sdxl.NETWORKS) -> sdxl.Configs:
    """The configs that a single file carries in its metadata, else SDXL's own."""
    configs = prediction.configs_of(source.metadata, source.blobs, str(source.path))
    sdxl.folder_shapes(configs, str(source.path), networks)  # refused here, where the file's name is known
    other_kinds.refuse_unet(configs["unet"], str(source.path))
    if "vae" not in networks:
        return configs
    return {**configs, "vae": sdxl.checked_vae(configs["vae"], str(source.path))}


def record_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The training record back from a single file's metadata; empty for files of other makers."""
    record: dict[str, Any] = {}
    for key, text in metadata.items():
        if key.startswith(RECORD_PREFIX) and key != sdxl.CONFIGS_KEY:
            name = key.removeprefix(RECORD_PREFIX)
            try:
                record[name] = text if name in _TEXTS else json.loads(text)
            except (ValueError, RecursionError):
                record[name] = text
    return record


def metadata_of_folder(folder: Path) -> dict[str, str]:
    """Metadata of the single file that a folder was made from; of any other, its U-Net file's and its licence."""
    kept = (read_json(folder / SIDECAR) or {}).get("metadata")
    if isinstance(kept, dict):
        return {str(key): str(value) for key, value in kept.items()}
    metadata = dict(tensor_files.open_file(weight_files(folder / "unet")[0]).metadata)
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
    names = [name.strip("\"'") for name in _LICENSE_IN_README.findall(head)]
    stated = [name for name in names if name != "other"]
    if not stated:
        return None
    return license_named(stated[-1])


def license_named(stated: str) -> str:
    """A licence as exports name it, of the short form that a hub's page has."""
    return FAIPL if stated.lower().startswith("faipl-1.0-sd") else stated


def stored_scale(folder: Path) -> Blob | None:
    """logit_scale of the single file that a folder was made from."""
    stored = (read_json(folder / SIDECAR) or {}).get("logit_scale")
    if stored is None:
        return None
    try:
        scale = scalar(bytes.fromhex(stored["hex"]), str(stored["dtype"]))
        whole = scale.dtype in tensor_files.EXPONENTS and len(scale.read()) == scale.size_bytes
        if whole and tensor_files.finite(scale.read(), scale.dtype):
            return scale
    except (ValueError, TypeError, KeyError):
        pass
    raise Halt(ExitCode.MISMATCH, f"{folder / SIDECAR}: logit_scale is damaged; without that file the usual value is taken")


def scalar(data: bytes, dtype: str) -> Blob:
    return Blob(dtype, (), lambda: iter([memoryview(data)]))
