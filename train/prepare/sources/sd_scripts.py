"""Metadata JSON of sd-scripts: `{image key: {caption, tags, ...}}`, or one object with `image_path` per line.

A key is a path or a bare stem. The text is caption + ", " + tags where both exist. `train_resolution` decides nothing
here: it may be that of an older file, so sizes are measured and the bucket follows. The .npz beside the images are taken
over by the step `latents` where the source says which VAE made them (`npz_vae`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.folders.kinds import IMAGE_SUFFIXES, JSON, is_image, media_kind
from train.prepare.folders.names import on_disk, other_ending
from train.prepare.folders.walking import each_file
from train.prepare.formats.jsonstream import Malformed, iter_members, iter_values
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found, RawPost, refusal

_PATH_KEYS = ("image_path", "image", "file_name", "path", "image_key")


def read(source: SourceConfig) -> Iterator[Found]:
    """Every image that the metadata names."""
    root = source_root(source)

    def images_of(name: str, file: Path) -> Iterator[Found]:
        members = _lines(file) if name.lower().endswith(JSON[1:]) else iter_members(file)
        for row, (key, value) in enumerate(members):
            place = f"{name} row {row}"
            try:
                yield _post(root, place, key, value)
            except REFUSALS as error:
                yield refusal(f"{source.name}:{name}#{row}", place, error)

    yield from each_file(source, images_of)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    for _, value in iter_values(file):
        named = (str(value[key]) for key in _PATH_KEYS if value.get(key)) if isinstance(value, dict) else iter(())
        yield next(named, ""), value


def _post(root: Path, place: str, key: str, value: Any) -> RawPost:
    if isinstance(value, Malformed):
        raise BadRecord(value.message)
    if not isinstance(value, dict):
        raise BadRecord(f"expected caption and tags of {key!r}, found {type(value).__name__}")
    if not key:
        raise BadRecord("no image: expected image_path")
    texts = [value[part] for part in ("caption", "tags") if value.get(part)]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord(f"caption and tags of {key!r} must be text")
    uri = find_stem(root, key)
    return RawPost(id=uri, place=place, uri=uri, caption=texts)


def find_stem(root: Path, key: str) -> str:
    """Path below the root; a path outside is kept as it is, and refused with the record."""
    if "\\" in key and not os.path.exists(root / key):
        key = key.replace("\\", "/")  # made on Windows
    path = Path(key)
    if path.is_absolute():
        for base in (root, root.resolve()):
            if path.is_relative_to(base):
                key = path.relative_to(base).as_posix()
                break
        else:
            return key
    if is_image(key) or media_kind(key):
        return on_disk(root, PurePosixPath(key).as_posix())
    if ".." not in key:
        for suffix in sorted(IMAGE_SUFFIXES):
            for found in (key + suffix, key + suffix.upper()):
                if (root / found).exists():
                    return found
        if (spelled := other_ending(root, f"{key}.png")) is not None:  # in other letters
            return spelled
    raise BadRecord(f"no image {key}.* in {root.name}")
