"""A diffusers SDXL folder: its weights as blobs by canonical name, its configs, its tokenizers, and writing one.

Canonical names are "<network>.<tensor>", with the `text_model.` prefix in both text encoders (see `sdxl.canonical`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import fsync_dir, read_json, replace_file, write_json
from train.model import clip_tokens, other_kinds, sdxl, spellings
from train.model.other_kinds import FEW, some
from train.storage import tensor_files
from train.storage.tensor_files import Blob

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of renameat2(2)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
)  # fmt: skip

Weights = dict[str, Blob]


def read(folder: Path, configs: sdxl.Configs, networks: Sequence[str] = sdxl.NETWORKS) -> spellings.Reading:
    """Weights by canonical name of a diffusers folder, sharded or not; fp16 variants only where nothing else is.

    Raises Halt(MISMATCH) as `spellings.read`, for each network by its file.
    """
    weights: Weights = {}
    notes: list[str] = []
    for network in networks:
        files, others = _choice(folder / network)
        blobs: dict[str, Blob] = {}
        for file in files:
            blobs |= tensor_files.open_file(file).blobs
        reading = spellings.read(files[0], blobs, configs, (network,), alone=True)
        weights |= reading.weights
        told = [f"passed over files beside {files[0].name}: {some(others)}"] if others else []
        notes += [f"{network}: {note}" for note in (*told, *reading.notes)]
    return spellings.Reading(weights, None, tuple(notes))


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
        configs["vae"] = other_kinds.checked_vae(configs["vae"], str(folder))
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


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the place it was loaded from, which tells a user's name."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def write_networks(
    folder: Path, weights: Mapping[str, Blob], configs: sdxl.Configs, *, dtype: str | None = None, whose: str = ""
) -> dict[str, str]:
    """Write configs and weights of every network that `weights` holds, into subfolders; sha256 by relative path."""
    hashes = {}
    for network, name in FILES.items():
        own = {key.partition(".")[2]: blob for key, blob in weights.items() if key.startswith(f"{network}.")}
        if not own:
            continue
        if dtype:
            own = {key: tensor_files.cast(blob, dtype, f"{network}.{key}") for key, blob in own.items()}
        (folder / network).mkdir()
        write_json(folder / network / "config.json", loadable(network, configs[network]))
        hashes[f"{network}/{name}"] = tensor_files.write(
            folder / network / name, own, {"format": "pt"}, f"{whose}{network}."
        )
    return hashes


def loadable(network: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's config such that a pipeline loaded without a dtype is fp32 throughout.

    Left alone, transformers 5 takes an encoder's dtype from its file and diffusers the U-Net's to be fp32; the two
    then do not fit together. Whoever asks for fp16 gets it as before.
    """
    kept = {key: value for key, value in without_paths(config).items() if key not in ("dtype", "torch_dtype")}
    return kept | ({"torch_dtype": "float32"} if network.startswith("text_encoder") else {})


def write_tokenizers(source: Path | None, folder: Path) -> None:
    """Copy tokenizer/ and tokenizer_2/ of `source`, or write the shipped ones (None).

    Each is readable by transformers 4 too (vocab.json, merges.txt).
    """
    for name in TOKENIZERS:
        if source is None:
            clip_tokens.tokenizer(name).save_pretrained(str(folder / name))
            _add_vocabulary(folder / name)
            continue
        place = source / name
        if not (place / "tokenizer.json").is_file() and not (place / "vocab.json").is_file():
            raise Halt(ExitCode.USAGE, f"{source} has no {name}/: model.tokenizers needs tokenizer/ and tokenizer_2/")
        (folder / name).mkdir()
        for file in _TOKENIZER_FILES:
            if (place / file).is_file():
                shutil.copyfile(place / file, folder / name / file)
        _add_vocabulary(folder / name)


def _add_vocabulary(place: Path) -> None:
    """vocab.json and merges.txt from tokenizer.json: 4.x reads nothing else, and 5.x no longer writes them."""
    whole = read_json(place / "tokenizer.json")
    if whole is None or (place / "vocab.json").is_file():
        return
    vocabulary = dict(whole["model"]["vocab"])
    for token in whole.get("added_tokens", []):
        vocabulary.setdefault(token["content"], token["id"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    replace_file(place / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    replace_file(place / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")


def write_pipeline(folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Scheduler config and model_index.json, so that StableDiffusionXLPipeline.from_pretrained finds the parts."""
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler/scheduler_config.json", without_paths(scheduler))
    present = all((folder / name).is_dir() for name in TOKENIZERS)
    tokenizer = ["transformers", "CLIPTokenizer"] if present else [None, None]
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": version("diffusers"),
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler.get("_class_name", "EulerAncestralDiscreteScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def refuse_existing(out: Path) -> None:
    """Halt(USAGE) when writing `out` would replace something, or its parent folder is missing."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise Halt(ExitCode.USAGE, f"{out} exists; nothing is written over. Remove it or choose another name")
    if not out.parent.is_dir():
        raise Halt(ExitCode.USAGE, f"{out.parent} is no folder; make it first")


def half_written(out: Path) -> Path:
    """Where `out` grows before it gets its name. What a kill left there is replaced, so no user's file may be called so."""
    return out.with_name(f".{out.name}.anix.tmp")


@contextlib.contextmanager
def new_folder(out: Path, *, renew: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `out` at the end, synced, or vanishes with the first error.

    With `renew` it takes the place of an earlier `out`, which is whole until then.
    """
    tmp = half_written(out)
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        yield tmp
        for place, _, _ in os.walk(tmp):
            fsync_dir(place)
        if renew and out.exists():
            _exchange(tmp, out)
        else:
            if out.exists():
                out.rmdir()
            os.rename(tmp, out)
        fsync_dir(out.parent)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{out}: {error.strerror}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _exchange(new: Path, out: Path) -> None:
    """Both names change places: in one step where the system can, so that `out` is one of the two whenever it stops."""
    at_once = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    if at_once is not None and at_once(_HERE, os.fsencode(new), _HERE, os.fsencode(out), _RENAME_EXCHANGE) == 0:
        return
    old = half_written(out.with_name(out.name + ".old"))  # a file system that cannot
    shutil.rmtree(old, ignore_errors=True)
    os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old)


def check_weights(have: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], whose: str) -> None:
    """Halt(MISMATCH) naming missing tensors, foreign tensors and wrong shapes, all three at once."""
    problems = []
    if missing := sorted(wanted.keys() - have.keys()):
        problems.append(f"{len(missing)} tensors are missing: {some(missing, FEW)}")
    if foreign := sorted(have.keys() - wanted.keys()):
        problems.append(f"{len(foreign)} tensors are foreign: {some(foreign, FEW)}")
    wrong = [
        f"{name} is {list(have[name])}, not {list(wanted[name])}"
        for name in sorted(wanted.keys() & have.keys())
        if tuple(have[name]) != tuple(wanted[name])
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape: {some(wrong, FEW)}")
    if problems:
        raise Halt(ExitCode.MISMATCH, f"{whose} is no SDXL model of this architecture: {'; '.join(problems)}")
