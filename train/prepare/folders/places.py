"""Whether `path` and `images` of a source are of a kind that its adapter reads: a file means that one, or is refused."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.kinds import ENDINGS, JSON, TABLES, is_image, media_kind

_OPEN_ENDED = ("danbooru", "gelbooru", "e621", "sd_scripts", "danbooru2023")  # dumps come with other endings, or none


def check_place(source: SourceConfig) -> None:
    """Raises Halt(USAGE) naming the key and the fix for a file that the adapter would pass over or take for its folder."""
    if source.images is not None and Path(source.images).is_file():
        raise Halt(ExitCode.USAGE, f"sources {source.name}: images {source.images} is a file: name the folder of the pictures")
    path = Path(source.path)
    if path.is_dir() or not path.exists():  # what does not exist is told by the adapter
        return
    if not path.is_file():
        raise Halt(ExitCode.USAGE, f"sources {source.name}: path {source.path} is a device or a pipe: name a folder or a file")
    suffix, name = PurePosixPath(path.name).suffix.lower(), f"sources {source.name}: path {source.path}"
    endings = ENDINGS[source.adapter]
    if suffix in endings or (source.adapter == "sidecar" and is_image(path.name)):
        return
    kind = "picture" if is_image(path.name) else media_kind(path.name)
    if kind is None and source.adapter in _OPEN_ENDED and suffix not in (*TABLES, ".tar", ".txt", ".arrow"):
        return
    fixes = [f"name a folder{' or a file ending in ' + ', '.join(endings) if endings else ' or one picture'}"]
    if "archive" in (kind or "") or suffix == ".tar":
        fixes = [f"unpack it and name the {'.tar' if source.adapter == 'webdataset' else 'folder'}"]
    if suffix in JSON + TABLES + (".tar",):
        other = [adapter for adapter, theirs in ENDINGS.items() if suffix in theirs]
        fixes.append(f"or another adapter: {', '.join(other)} read {suffix}")
    raise Halt(
        ExitCode.USAGE, f"{name} is {f'a file ({kind})' if kind else 'a file'} that adapter {source.adapter} cannot read: {', '.join(fixes)}"
    )
