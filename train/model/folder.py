"""Writing a diffusers SDXL folder: networks, tokenizers and pipeline, all of it or nothing. Reading stands in `layouts`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import fsync_dir, read_json, replace_file, write_json
from train.model import clip_tokens, layouts, sdxl
from train.model.other_kinds import FEW, some
from train.storage import tensor_files
from train.storage.tensor_files import Blob

TOKENIZERS = ("tokenizer", "tokenizer_2")
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of renameat2(2)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
)  # fmt: skip

Weights = dict[str, Blob]


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the place it was loaded from, which tells a user's name."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def write_networks(
    folder: Path, weights: Mapping[str, Blob], configs: sdxl.Configs, *, dtype: str | None = None, whose: str = ""
) -> dict[str, str]:
    """Write configs and weights of every network that `weights` holds, into subfolders; sha256 by relative path."""
    hashes = {}
    for network, name in layouts.FILES.items():
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
