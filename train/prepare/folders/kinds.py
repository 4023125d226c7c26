"""What the name of a file says it is: a picture, something else that boorus and folders hold, litter, or what an adapter reads.

Names only; what a file really holds is the probe's business.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig

JSON, TABLES = (".json", ".jsonl", ".ndjson"), (".parquet", ".csv", ".tsv")
ENDINGS: dict[str, tuple[str, ...]] = {  # adapter: endings of the files that hold its records; sidecar's are named in the config
    "sidecar": (), "imagefolder": (".jsonl", ".csv", ".parquet", ".arrow"), "webdataset": (".tar",), "table": TABLES,
    "danbooru": JSON, "gelbooru": JSON, "e621": JSON, "sd_scripts": JSON, "deepghs": (".parquet",), "simpletuner": (".parquet",),
    "huggingface": (*JSON, *TABLES, ".arrow", ".tar"), "danbooru2023": (".db", ".sqlite", ".sqlite3"),
}  # fmt: skip
_OPEN_ENDED = ("danbooru", "gelbooru", "e621", "sd_scripts", "danbooru2023")  # dumps come with other endings, or none
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff", ".jxl"]
)
# Pictures of kinds that no decoder here takes: they are opened all the same, so that the report says why they are missing.
_OTHER_PICTURES = frozenset(
    [".dib", ".avifs", ".heic", ".heif", ".ico", ".cur", ".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".jp2", ".j2k",
     ".jpx", ".jxr", ".tga", ".pcx", ".dds", ".exr", ".hdr", ".qoi", ".ppm", ".pgm", ".pbm", ".pnm"]
)  # fmt: skip
_OTHER_MEDIA = {
    "video": "mp4 webm mkv mov avi m4v wmv flv f4v mpg mpeg ogv 3gp m2ts", "Flash": "swf",
    "archive (boorus keep ugoiras so)": "zip ugoira", "archive": "rar 7z tgz gz bz2 xz zst cbz cbr",
    "sound": "mp3 wav ogg oga opus flac m4a aac wma", "document": "pdf epub",
}  # fmt: skip
_MEDIA_OF = {f".{suffix}": kind for kind, suffixes in _OTHER_MEDIA.items() for suffix in suffixes.split()}
# What macOS, Windows, NAS systems, browsers, editors and trainers with masks leave beside pictures.
_LITTER = re.compile(
    r"__MACOSX|\._.*|\.DS_Store|\.AppleDouble|Icon\r|\.Spotlight-V100|\.fseventsd|\.Trashes|\.Trash.*|\.trashed-.*|\.pending-.*"
    r"|Thumbs(?:_\w+)?\.db|ehthumbs(?:_\w+)?\.db|desktop\.ini|\$RECYCLE\.BIN|RECYCLER|System Volume Information|lost\+found"
    r"|@eaDir|SYNO(?:FILE|PHOTO|INDEX).*|#recycle|@Recycle|@Recently-Snapshot|#snapshot|@tmp|\.@__thumb|\.thumbnails|\.picasa\.ini"
    r"|Picasa\.ini|\.directory|\.nomedia|ZbThumbnail\.info|\.nfs\w+|\.fuse_hidden.*|\.sync(?:thing\..*)?|\.stfolder|~\$.*|\.~lock\..*"
    r"|.*:Zone\.Identifier|\.localized|\.dropbox.*|.*~|.*\.(?:part|crdownload|partial|download|aria2|!qB|opdownload|swp|tmp)|.*-(?:mask|cond)label\.png",
    re.IGNORECASE | re.DOTALL,
)


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image of any kind, in any case."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in IMAGE_SUFFIXES or suffix in _OTHER_PICTURES


def media_kind(name: str) -> str | None:
    """What a file that is no picture is by its suffix (`video`, `archive`, ...); None for pictures and for all else."""
    return _MEDIA_OF.get(PurePosixPath(name).suffix.lower())


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name (its last part) is a leftover of another program and nobody's picture."""
    return _LITTER.fullmatch(name) is not None


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
