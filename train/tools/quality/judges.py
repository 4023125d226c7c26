"""Models that judge pictures: aesthetic score, CLIP, tagger. The user's own folders; nothing is ever fetched.

Safetensors or ONNX weights only, no code of a model folder is run. Shape legend: B pictures, T tags, D width.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.dataset import ScoreConfig
from train.observe.inference import open_device
from train.prepare import score, tag

DRAWN_WORLD = "tiny_world"  # in place of a tagger's folder: the rule that knows the drawn world's hair colours
_CHARACTER, _RATING = 4, 9  # categories of the WD tagger

Images = Sequence[Image.Image]
F32 = npt.NDArray[np.float32]
Seen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Aesthetic:
    """Probability of one class of an image classifier."""

    name: str
    label: str
    score: Callable[[list[Image.Image]], list[float]]


@dataclass(frozen=True)
class Clip:
    """Unit vectors of pictures and of texts in one space, [B,D]; `cut` says whether a text was too long for it."""

    name: str
    pictures: Callable[[Images], F32]
    texts: Callable[[Sequence[str]], F32]
    cut: Callable[[str], bool]


@dataclass(frozen=True)
class Tagger:
    """Which of `tags` (as written in prompts) are in a picture: bool[B,T]."""

    name: str
    tags: tuple[str, ...]
    thresholds: str
    see: Callable[[Images], Seen]


def open_aesthetic(given: str, label: str, device: str = "auto") -> Aesthetic:
    """The classifier in folder `given`. Raises Halt: USAGE (no folder, unknown label), MISMATCH (cannot be loaded)."""
    folder = local_folder("--aesthetic", given)
    labels = _labels("--aesthetic", folder)
    if label not in labels:
        raise Halt(ExitCode.USAGE, f"--aesthetic-label {label}: {folder} knows {', '.join(labels)}")
    config = ScoreConfig(model=str(folder), label=label, device=str(open_device(device)))
    predict, name, _ = score.load_classifier(config, "--aesthetic")
    return Aesthetic(name, label, predict)


def open_clip(given: str, device: str = "auto") -> Clip:
    """The CLIP model in folder `given`. Raises Halt: USAGE (no folder, no CLIP), MISMATCH (cannot be loaded)."""
    import torch
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

    folder = local_folder("--clip", given)
    kind = _config("--clip", folder).get("model_type")
    if kind != "clip":
        raise Halt(ExitCode.USAGE, f"--clip {folder}: config.json says model_type {kind!r}, needed is 'clip'")
    with _loading("--clip", folder):
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    place = open_device(device)
    model = model.to(place).eval()
    longest = model.config.text_config.max_position_embeddings

    def unit(features: Any) -> F32:
        vectors = getattr(features, "pooler_output", features).float().cpu().numpy()
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    @torch.inference_mode()
    def pictures(images: Images) -> F32:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(place)
        return unit(model.get_image_features(pixel_values=pixels))

    @torch.inference_mode()
    def texts(lines: Sequence[str]) -> F32:
        tokens = tokenizer(list(lines), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return unit(model.get_text_features(**{name: value.to(place) for name, value in tokens.items()}))

    return Clip(score.model_id(folder), pictures, texts, lambda text: len(tokenizer(text)["input_ids"]) > longest)


def open_tagger(given: str, general: float = 0.35, character: float = 0.85, device: str = "auto") -> Tagger:
    """A tagger by what its folder holds: model.onnx (WD v3; extra `tag`), or an image-classification model.

    A tag is seen above its threshold; a single-label classifier sees its most probable class. `tiny_world` names the
    rule of the drawn world. Raises Halt: USAGE, MISMATCH.
    """
    if given == DRAWN_WORLD:
        return _drawn_world()
    folder = local_folder("--tagger", given)
    if (folder / "model.onnx").is_file():
        return _wd(folder, general, character)
    return _classifier(folder, general, device)


def _wd(folder: Path, general: float, character: float) -> Tagger:
    probabilities, vocabulary = tag.load_tagger(folder, "--tagger")
    kept = [number for number, (_, category) in enumerate(vocabulary) if category != _RATING]
    limits = np.array([character if vocabulary[n][1] == _CHARACTER else general for n in kept], np.float32)

    def see(images: Images) -> Seen:
        return np.asarray(probabilities(images)[:, kept] > limits, np.bool_)

    thresholds = f"general {general:g}, character {character:g}"
    return Tagger(folder.name, tuple(written(vocabulary[n][0]) for n in kept), thresholds, see)


def _classifier(folder: Path, threshold: float, device: str) -> Tagger:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    labels = _labels("--tagger", folder)
    with _loading("--tagger", folder):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        model = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    place = open_device(device)
    model = model.to(place).eval()
    several = model.config.problem_type == "multi_label_classification"

    @torch.inference_mode()
    def see(images: Images) -> Seen:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(place)
        logits_BT = model(pixel_values=pixels).logits.float().cpu()
        found_BT = logits_BT.sigmoid() > threshold if several else logits_BT == logits_BT.amax(1, keepdim=True)
        return np.asarray(found_BT.numpy(), np.bool_)

    thresholds = f"{threshold:g}" if several else "most probable class"
    return Tagger(score.model_id(folder), tuple(written(label) for label in labels), thresholds, see)


def _drawn_world() -> Tagger:
    from train.tools.tiny.check import HAIR, hair_of

    def see(images: Images) -> Seen:
        found = [hair_of(image) for image in images]
        return np.array([[name == one for name in HAIR] for one in found], np.bool_)

    return Tagger("the drawn world's palette", tuple(f"{name} hair" for name in HAIR), "nearest hair colour", see)


def written(tag_name: str) -> str:
    """A tag as prompts and models are compared: spaces for underscores, lower case, brackets unescaped."""
    return tag_name.replace("_", " ").replace("\\", "").strip().lower()


def local_folder(option: str, given: str) -> Path:
    """The folder of a model. Raises Halt(USAGE), with the way to get one for a name of the hub."""
    folder = Path(given)
    if folder.is_dir():
        return folder
    fix = "give the folder that holds the model"
    if given.count("/") == 1 and not given.startswith((".", "/")):
        name = given.partition("/")[2]
        fix = f"models are never downloaded here: hf download {given} --local-dir models/{name}, then {option} models/{name}"
    raise Halt(ExitCode.USAGE, f"{option} {given}: no such folder; {fix}")


def _config(option: str, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Halt(ExitCode.USAGE, f"{option} {folder}: config.json cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}


def _labels(option: str, folder: Path) -> list[str]:
    """The classes of an image classifier, in the order of its outputs."""
    named = _config(option, folder).get("id2label")
    if not isinstance(named, dict) or not named:
        raise Halt(ExitCode.USAGE, f"{option} {folder}: config.json names no classes (id2label)")
    return [str(named[number]) for number in sorted(named, key=int)]


@contextlib.contextmanager
def _loading(option: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Halt(ExitCode.MISMATCH, f"{option} {folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
