"""Sources that lie in a store: their objects as files of this machine, fetched before anything reads them.

Every adapter reads folders and files, and pictures are read by several steps: so a bucket's folder, its tars or one object are
brought once into `<dataset>/sources/`, object by object, and again where the store says that one was written since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from train.base.errors import ExitCode, Halt
from train.base.files import free_bytes, read_json, write_json
from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.storage.objects import Damaged, Store, is_url

_MAX_JSON = 1 << 30
_EVERY = 256  # objects between two notes of what is here


def brought(settings: DatasetConfig, *, fetch: bool, say: Callable[[str], None] = print) -> DatasetConfig:
    """The settings with paths of this machine. Without `fetch` nothing is asked of a store: what was brought stands.

    Raises Halt: MISMATCH (nothing there, or not yet brought), CANNOT_WRITE (no room), UNEXPECTED (the store cannot be reached).
    """
    sources = [_source(source, dataset_dir(settings) / "sources", fetch, say) for source in settings.sources]
    return settings if sources == settings.sources else replace(settings, sources=sources)


def _source(source: SourceConfig, root: Path, fetch: bool, say: Callable[[str], None]) -> SourceConfig:
    path = _place(source, source.path, root, fetch, say) if is_url(source.path) else source.path
    images = _place(source, source.images, root, fetch, say) if source.images and is_url(source.images) else source.images
    return replace(source, path=path, images=images)


def _place(source: SourceConfig, url: str, root: Path, fetch: bool, say: Callable[[str], None]) -> str:
    """The folder or file that stands for an address."""
    folder = root / f"{source.name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    single = PurePosixPath(url).suffix != "" and not url.endswith("/")  # one object: a tar, a parquet, a picture
    place = folder / PurePosixPath(url).name if single else folder
    if fetch:
        _bring(source.name, url, folder, single, say)
    elif not _manifest(folder).is_file():
        raise Halt(ExitCode.MISMATCH, f"sources {source.name}: {url} was not brought here yet: run scripts/prepare.py ingest")
    return str(place if place.exists() or not single else folder)


def _manifest(folder: Path) -> Path:
    """What was brought, beside the folder: inside, an adapter would take it for a record."""
    return folder.with_name(f"{folder.name}.json")


def _bring(name: str, url: str, folder: Path, single: bool, say: Callable[[str], None]) -> None:
    store = Store(url.rpartition("/")[0] if single else url)
    listed = [(PurePosixPath(url).name, store.size(PurePosixPath(url).name))] if single else list(store.names())
    wanted = {path: size for path, size in listed if size is not None and path and not path.endswith("/")}
    if not wanted and single:  # a folder with a dot in its name
        return _bring(name, url + "/", folder, False, say)
    if not wanted:
        raise Halt(ExitCode.MISMATCH, f"sources {name}: nothing lies at {url}")
    if unsafe := [path for path in wanted if ".." in PurePosixPath(path).parts or PurePosixPath(path).is_absolute()]:
        raise Halt(ExitCode.MISMATCH, f"sources {name}: {unsafe[0]!r} at {url} leads out of its folder")
    folder.mkdir(parents=True, exist_ok=True)
    before: dict[str, str] = (read_json(_manifest(folder), _MAX_JSON) or {}).get("objects", {})
    for gone in before.keys() - wanted.keys():
        (folder / gone).unlink(missing_ok=True)
    missing = sum(size for path, size in wanted.items() if not (folder / path).is_file())
    if missing > (free := free_bytes(folder)):
        raise Halt(ExitCode.CANNOT_WRITE, f"sources {name}: {missing / 1e9:.1f} GB of {url} do not fit beside {folder}, {free / 1e9:.1f} GB are free")
    now: dict[str, str] = {path: mark for path, mark in before.items() if path in wanted}
    fetched = 0
    for number, (path, size) in enumerate(sorted(wanted.items())):
        version = store.version(path) or str(size)
        here = folder / path
        if now.get(path) != version or not here.is_file() or here.stat().st_size != size:
            here.parent.mkdir(parents=True, exist_ok=True)
            try:
                store.fetch(path, here)
            except (FileNotFoundError, Damaged) as error:
                raise Halt(ExitCode.UNEXPECTED, f"sources {name}: {url}/{path} could not be brought: {error}") from error
            now[path], fetched = version, fetched + 1
        if number % _EVERY == _EVERY - 1:
            write_json(_manifest(folder), {"url": url, "objects": now})
    write_json(_manifest(folder), {"url": url, "objects": now})
    say(f"sources {name}: {len(wanted)} objects of {url}, {sum(wanted.values()) / 1e9:.3f} GB, {fetched} fetched now")
