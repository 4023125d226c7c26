"""Where downloaders put a post's picture: beside its JSON, by id, by md5, in numbered folders."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.folders.kinds import is_image, media_kind
from train.prepare.folders.names import first_like

_FOLDERS = ("images", "original", "data")  # where sets keep their pictures below the root
_SITES = ("danbooru", "gelbooru", "e621")  # first part of a name that gallery-dl gives
_BY_ID = ("danbooru", "gelbooru", "e621", "danbooru2023", "deepghs")  # adapters that look for pictures here


def find_image(root: Path, name: str, post_id: int, fields: Mapping[str, Any], post: Mapping[str, Any]) -> str:
    """Path of the post's image below `root`: the first candidate that is there, by its name or by a like one.

    The probe reports those that are not there. `name` is the file that has the post for itself, or its folder and a slash.
    """
    extension = str(fields.get("file_ext") or "").lower().lstrip(".") or "jpg"
    candidates: dict[str, None] = {}
    stems = (f"{stem}.{extension}" for stem in _stems(root, name, post_id, fields.get("md5"), post))
    for candidate in itertools.chain(_listed(name, post), stems):
        if candidate in candidates:
            continue
        candidates[candidate] = None
        if _is_safe(candidate) and os.path.exists(f"{root}/{candidate}"):
            return candidate
    return first_like(root, filter(_is_safe, candidates), any_of=True) or next(iter(candidates))


def _is_safe(path: str) -> bool:
    return ".." not in path and "\0" not in path


def tried(source: SourceConfig, record: Mapping[str, Any]) -> str:
    """Where a record's picture was looked for, for the message that it is not there."""
    root = source_root(source)
    text = f"{record['uri']} is not in {root}, in no spelling and with no other picture's ending"
    number = record["source_id"]
    searched = source.adapter in _BY_ID or (source.adapter == "table" and "image" not in source.columns)
    if number is None or not searched or "uri" in source.columns:
        return text
    names = dict.fromkeys(stem.rpartition("//")[2] for stem in _stems(root, "", number, record["md5"], {}))
    text += f"; the names tried are {', '.join(names)}, with the ending .{record['file_ext']} or that of any picture"
    return text if record["md5"] else f"{text} (the post has no md5, by which boorus name their files)"


def _listed(name: str, post: Mapping[str, Any]) -> Iterator[str]:
    """What the post says itself, and what stands beside the file that it has for itself."""
    listed = next((post[key] for key in ("file_name", "file_path", "local_path") if post.get(key) is not None), None)
    if isinstance(listed, str) and listed:
        yield listed
    without = name.rpartition(".")[0]
    if name.lower().endswith(".json") and (is_image(without) or media_kind(without)):
        yield without  # gallery-dl: a.jpg.json


def _stems(root: Path, name: str, post_id: int, md5: Any, post: Mapping[str, Any]) -> Iterator[str]:
    if name.lower().endswith(".json"):
        yield name.rpartition(".")[0]
    folder = name.rpartition("/")[0]
    parts = [str(post_id), f"{post_id % 1000:04d}/{post_id}"]
    kept = [part for part in (md5, post.get("filename")) if isinstance(part, str) and part]
    if isinstance(md5, str) and md5:
        parts += [md5, f"{md5[:2]}/{md5}", f"{md5[:2]}/{md5[2:4]}/{md5}"]
    parts += kept[-1:] if len(kept) > bool(md5) else []
    parts += [f"{site}_{post_id}_{part}" for site in _SITES for part in kept]
    for below in dict.fromkeys([f"{folder}/" if folder else "", "", *_folders(str(root))]):
        yield from (f"{below}{part}" for part in parts)


@lru_cache(maxsize=64)
def _folders(root: str) -> tuple[str, ...]:
    return tuple(f"{name}/" for name in _FOLDERS if os.path.isdir(f"{root}/{name}"))
