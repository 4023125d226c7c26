"""Images with a `.txt` beside each: a caption, with or without the separator."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from train.prepare.files import UnsafePath, require_source, resolve_inside, source_root
from train.prepare.names import same_name
from train.prepare.normalise import MAX_CAPTION_BYTES, BadCaption, RawPost
from train.prepare.progress import counted
from train.prepare.records import Quarantine
from train.prepare.settings import SourceConfig
from train.prepare.walking import pictures


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every image below the source's folder, with its caption."""
    require_source(source)
    root = source_root(source)
    # A path that is one picture means that one.
    path = Path(source.path)
    for found in pictures(source, root) if path.is_dir() else [path.name]:
        yield found if isinstance(found, Quarantine) else _image(source, root, found)


def _image(source: SourceConfig, root: Path, uri: str) -> RawPost | Quarantine:
    # everything before the LAST dot: the sidecar of a.b.jpg is a.b.txt
    stem = os.path.splitext(uri)[0]
    if (name := same_name(root, f"{stem}.txt")) is not None:
        try:
            file = resolve_inside(root, name, source.follow_links)
            if not file.is_file():  # a pipe would block the reader for ever
                raise BadCaption("not a regular file")
            return RawPost(id=uri, place=name, uri=uri, caption=read_caption(file))
        except UnsafePath as error:
            return Quarantine(f"{source.name}:{uri}", "ingest", "outside_root", str(error), "UnsafePath")
        except (BadCaption, OSError) as error:
            return Quarantine(f"{source.name}:{uri}", "ingest", "bad_caption", f"{name}: {error}", type(error).__name__)
    if source.on_missing_caption == "take":
        return RawPost(id=uri, place=uri, uri=uri)
    message = f"{stem}.txt does not exist: see on_missing_caption"
    return Quarantine(f"{source.name}:{uri}", "ingest", "missing_caption", message)


def read_caption(path: Path) -> str:
    """Text of a caption file without its byte-order mark. Raises BadCaption for one too long or not UTF-8."""
    with counted(path) as file:
        data = file.read(MAX_CAPTION_BYTES + 4)
    data = data.removeprefix(codecs.BOM_UTF8)
    if len(data) > MAX_CAPTION_BYTES:
        raise BadCaption(f"longer than {MAX_CAPTION_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadCaption(f"not UTF-8: {error}") from error
