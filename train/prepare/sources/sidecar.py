"""Images with a text beside each: a caption, with or without the separator.

Its name is the picture's with another ending, `.txt` unless `caption_ext` names one; what is named is also taken after
the whole name (`a.png.txt`). Endings count in any case. With `images` the pictures lie there and the texts in `path`,
in folders of the same names.
"""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from train.config.dataset import SourceConfig
from train.prepare.folders.files import UnsafePath, require_source, resolve_inside, source_root
from train.prepare.folders.kinds import is_image
from train.prepare.folders.walking import pictures
from train.prepare.posts.caption_text import MAX_CAPTION_BYTES, TEXT_ENDINGS, BadCaption, caption_endings
from train.prepare.posts.normalise import Found, RawPost
from train.prepare.tables.progress import counted
from train.prepare.tables.schemas import Quarantine

# Texts of a folder: what their names begin with, up to each dot: [(ending, name)].
Texts = Mapping[str, list[tuple[str, str]]]


def read(source: SourceConfig) -> Iterator[Found]:
    """Every image below the source's folder, with its caption."""
    path = require_source(source)
    # A path that is one picture means that one.
    yield from captioned(source, pictures(source, source_root(source)) if path.is_dir() else [path.name])


def captioned(source: SourceConfig, found_pictures: Iterable[str | Quarantine]) -> Iterator[Found]:
    """These images, each with its caption; those of one folder come one after another."""
    path = require_source(source)
    texts_root = path if path.is_dir() else path.parent
    folder: str | None = None
    texts: Texts = {}
    for found in found_pictures:
        if isinstance(found, Quarantine):
            yield found
            continue
        if (parent := os.path.dirname(found)) != folder:
            folder, texts = parent, _texts(texts_root, parent)
        yield _image(source, texts_root, found, texts)


def _texts(root: Path, folder: str) -> Texts:
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    try:
        names = sorted(os.listdir(root / folder))
    except OSError:  # told as captions that are missing
        names = []
    for name in names:
        if not is_image(name):
            plain = _composed(name)
            for dot in (place for place, letter in enumerate(plain) if letter == "."):
                found[plain[:dot]].append((plain[dot:].lower(), os.path.join(folder, name)))
    return found


def _image(source: SourceConfig, root: Path, uri: str, texts: Texts) -> Found:
    endings, whole = caption_endings(source), _composed(os.path.basename(uri))
    # everything before the LAST dot: the sidecar of a.b.jpg is a.b.txt
    stem, suffix = os.path.splitext(whole)
    beside = [(found, name) for found, name in texts.get(stem, ()) if found in endings or found in TEXT_ENDINGS]
    beside += [(suffix + found, name) for found, name in texts.get(whole, ()) if found in endings or found in TEXT_ENDINGS]
    of_ending = {ending: {ending} if source.caption_ext is None else {ending, suffix + ending} for ending in endings}
    names = {name: ending for ending, wanted in of_ending.items() for found, name in beside if found in wanted}
    other = next((found for found, name in beside if name not in names), None)
    key = f"{source.name}:{uri}"
    try:
        captions = {name: _caption(root, name, source.follow_links) for name in names}
    except UnsafePath as error:
        return Quarantine(key, "ingest", "outside_root", str(error), "UnsafePath")
    except (BadCaption, OSError) as error:
        return Quarantine(key, "ingest", "bad_caption", f"{', '.join(names)}: {error}", type(error).__name__)
    told = [{name: text for name, text in captions.items() if names[name] == ending} for ending in endings]
    if (two := next((one for one in told if len(set(one.values())) > 1), None)) is not None:
        message = f"{' and '.join(two)} are two captions of one picture: keep one, or name its ending in caption_ext"
        return Quarantine(key, "ingest", "bad_caption", message, "BadCaption")
    if captions:  # several files: their texts in the order of the endings, equal ones once
        texts_of = list(dict.fromkeys(text for one in told for text in one.values()))
        caption = texts_of[0] if len(endings) == 1 else texts_of
        return RawPost(id=uri, place=next(iter(captions)), uri=uri, caption=caption, beside=other)
    if source.on_missing_caption == "take":
        return RawPost(id=uri, place=uri, uri=uri, beside=other)
    message = f"{os.path.splitext(uri)[0]}{' nor '.join(endings)} does not exist"
    if other is None:
        return Quarantine(key, "ingest", "missing_caption", f"{message}: see on_missing_caption")
    named = next(name for found, name in beside if found == other)
    message += f", but {named} does: set caption_ext: {other.removeprefix(suffix)} to read it"
    return Quarantine(key, "ingest", "missing_caption", message)


def _composed(name: str) -> str:
    """Names that look alike are alike: some systems write letters and their accents apart."""
    return unicodedata.normalize("NFC", name)


def _caption(root: Path, name: str, follow_links: bool) -> str:
    file = resolve_inside(root, name, follow_links)
    if not file.is_file():  # a pipe would block the reader for ever
        raise BadCaption("not a regular file")
    return read_text(file)


def read_text(path: Path) -> str:
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
