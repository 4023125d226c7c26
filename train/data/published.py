"""A prepared set that lies in a store: its tables are brought here, its latents as they are needed.

`publish` puts a set there with `published.json`: size and sha256 of every file, and a digest of every image's latents. A start
brings the tables of its selections into a folder of the cache, which then stands for the set everywhere. Whole shards are
fetched behind the training, in the order in which the plan first asks for them, until the cache is full; an image whose shard
is not here is read by itself, as a range. Both are checked against the digests: the trained bits are those of a local set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, read_json, replace_file, write_json
from train.data.index import INDEX, MARK, Index
from train.storage import tensor_files
from train.storage.objects import Damaged, Store, is_url

PUBLISHED, SENT = "published.json", "published.part.json"
_VERSION = 1
DIGEST_BYTES = 8  # of an image's latents: enough to notice, little enough for a million images
_MAX_JSON = 1 << 30
GB = 10**9


@dataclass(frozen=True)
class Cache:
    """Where sets of stores are kept, and how much of them; None: what the disk holds."""

    folder: Path
    most_gb: float | None


def files_of(folder: Path) -> list[str]:
    """What of a prepared set is published: tables, captions, selections, latents and masks; no picture, no record of a source."""
    patterns = ("dataset.json", "index*.arrow", "labels/*", "select_*.parquet", "latents/*.safetensors", "masks/*.safetensors")
    return sorted(str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def publish(folder: Path, store: Store) -> list[str]:
    """Put a prepared set into a store; the lines to show. What lies there with the right hash is not sent again.

    Raises Halt(MISMATCH) for a folder that is no prepared set, Halt(UNEXPECTED) where the store fails.
    """
    if not (folder / "dataset.json").is_file() or not (folder / INDEX).is_file():
        raise Halt(ExitCode.MISMATCH, f"{folder} is not a prepared dataset: run scripts/prepare.py all --config <dataset.yaml>")
    for path in folder.glob("index_*.arrow"):
        Index.open(folder, path.stem.removeprefix("index_"))  # refused here, where preparing again can mend it
    there = _sent(store)
    files: dict[str, dict[str, Any]] = {}
    sent = 0
    for name in files_of(folder):
        files[name] = {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        version = store.version(name)
        if version is None or there.get(name) != {**files[name], "version": version}:
            store.put(folder / name, name)
            sent += files[name]["size"]
            there[name] = {**files[name], "version": store.version(name)}
            _put_json(store, SENT, {"files": there})
    rows = {name: _rows_of(folder / name) for name in files if name.endswith(".safetensors")}
    _put_json(store, PUBLISHED, {"version": _VERSION, "files": files, "rows": rows})
    whole = sum(entry["size"] for entry in files.values())
    return [f"{store.url}: {len(files)} files, {whole / GB:.3f} GB, {sent / GB:.3f} GB of them sent now"]


def _sent(store: Store) -> dict[str, dict[str, Any]]:
    """Files that an earlier start put there, finished or not, and what the store said of them then."""
    try:
        found = json.loads(store.read(SENT))["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_json(store: Store, name: str, record: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # nothing is written into somebody's set
        path = Path(folder) / name
        path.write_text(json.dumps(record))
        store.put(path, name)


def _rows_of(path: Path) -> dict[str, Any]:
    """Where each image's latents lie in a shard, and their digests."""
    start, _, entries = tensor_files.header_of(path)
    (entry,) = entries.values()
    count, size = entry.shape[0], path.stat().st_size - start
    each = size // max(count, 1)
    with open(path, "rb") as file:
        file.seek(start)
        digests = "".join(digest_of(file.read(each)) for _ in range(count))
    return {"start": start, "dtype": entry.dtype, "shape": list(entry.shape), "each": each, "digests": digests}


def digest_of(data: bytes) -> str:
    """Of one image's latents as they lie in a shard."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def default_cache() -> Cache:
    """Where commands keep what they read of a store, without a bound."""
    return Cache(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anix" / "sets", None)


def local_set(path: str, cache: Cache, selections: Sequence[str]) -> str:
    """The folder that stands for a set: `path`, or where its tables were brought to.

    Raises Halt: MISMATCH (not published, or changed since), CANNOT_WRITE (the cache), UNEXPECTED (the store).
    A selection that was not published is left to who opens the folder.
    """
    if not is_url(path):
        return path
    store = Store(path)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.split("://", 1)[1])[-40:].strip("-.")
    folder = cache.folder / f"{name}-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"data.cache_dir {cache.folder}: cannot be written ({error.strerror})") from error
    try:
        if (store.size(PUBLISHED) or 0) > _MAX_JSON:
            raise ValueError("too large")
        text = store.read(PUBLISHED)
        files = _checked(json.loads(text))
    except FileNotFoundError:
        raise Halt(ExitCode.MISMATCH, f"data.path {path} holds no set that scripts/publish.py put there (no {PUBLISHED})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Halt(ExitCode.MISMATCH, f"data.path {path}: {PUBLISHED} is damaged or of another version ({error!r}): publish the set again") from None
    _forget_other(folder, files)
    replace_file(folder / PUBLISHED, text)
    for needed in ("dataset.json", INDEX, *(f"index_{selection}.arrow" for selection in dict.fromkeys(selections))):
        _bring(store, folder, needed, files)
    most = None if cache.most_gb is None else int(cache.most_gb * GB)
    write_json(folder / MARK, {"url": store.url, "most_bytes": most})
    return str(folder)


def _checked(record: Any) -> dict[str, Any]:
    """The files of a `published.json`. Raises ValueError and its like for anything that ours does not write: it names what is
    written, read and removed in the cache."""
    if record["version"] != _VERSION:
        raise ValueError(f"version {record['version']!r}")
    for name, entry in record["files"].items():
        if not re.fullmatch(r"(dataset\.json|[\w-]+\.(arrow|parquet)|(labels|latents|masks)/[\w.-]+)", name) or ".." in name:
            raise ValueError(f"name {name!r}")
        if type(entry["size"]) is not int or entry["size"] < 0 or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"what it says of {name}")
    for name, about in record["rows"].items():
        count, *shape = about["shape"]
        numbers = (about["start"], about["each"], count, *shape)
        fits = all(type(number) is int and 0 < number < 1 << 40 for number in numbers) and len(shape) == 3
        if not fits or name not in record["files"] or about["each"] % math.prod(shape) or len(about["digests"]) != 2 * DIGEST_BYTES * count:
            raise ValueError(f"what it says of the images of {name}")
    return dict(record["files"])


def _forget_other(folder: Path, files: dict[str, Any]) -> None:
    """Remove what is kept of an earlier publication under the same address."""
    before = (read_json(folder / PUBLISHED, _MAX_JSON) or {}).get("files", {})
    for name, entry in before.items():
        if files.get(name) != entry:
            (folder / name).unlink(missing_ok=True)


def _bring(store: Store, folder: Path, name: str, files: dict[str, Any]) -> None:
    if name not in files:
        return  # who opens the set says which selections there are
    path = folder / name
    if path.is_file() and file_sha256(path) == files[name]["sha256"]:
        return
    try:
        store.fetch(name, path, files[name]["sha256"])
    except (FileNotFoundError, Damaged) as error:
        raise changed(store, name) from error


def changed(store: Store, name: str) -> Halt:
    """What to raise for an object that is not the published one."""
    return Halt(ExitCode.MISMATCH, f"{store.url}/{name} is not what {PUBLISHED} says: it was changed or removed; publish the set again")


class Published:
    """What a folder of the cache stands for. Sent to workers, it connects there."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.store = folder, Store(url)
        self._record: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "store": self.store, "_record": None}

    @classmethod
    def of(cls, folder: Path) -> Published | None:
        """The store behind a folder of the cache; None for a set of this machine."""
        mark = read_json(folder / MARK)
        return None if mark is None else cls(folder, str(mark["url"]))

    @property
    def record(self) -> dict[str, Any]:
        """`published.json`, read once a process."""
        if self._record is None:
            self._record = read_json(self.folder / PUBLISHED, _MAX_JSON) or {"files": {}, "rows": {}}
        return self._record

    def lacks(self, shards: Iterable[str]) -> list[str]:
        """Those that were not published."""
        return [shard for shard in shards if shard not in self.record["rows"]]

    def row(self, shard: str, row: int) -> tuple[bytes, str, list[int]]:
        """(bytes, dtype in a header's word, [C,H,W]) of one image's latents, read by themselves.

        Raises Halt: MISMATCH where it is not what was published, UNEXPECTED where the store cannot be reached.
        """
        about = self.record["rows"].get(shard)
        if about is None or not 0 <= row < about["shape"][0]:
            raise Halt(ExitCode.MISMATCH, f"{self.store.url}/{shard} row {row} was not published: publish the set again")
        each, wide = about["each"], 2 * DIGEST_BYTES
        start = about["start"] + row * each
        wanted = about["digests"][wide * row : wide * (row + 1)]
        try:
            data = self.store.read(shard, start, start + each, check=lambda data: digest_of(data) == wanted)
        except (FileNotFoundError, Damaged) as error:
            raise changed(self.store, shard) from error
        return data, about["dtype"], about["shape"][1:]

    def keep(self, shards: Iterable[str], still: Callable[[], bool] = lambda: True) -> int:
        """Fetch whole shards in this order while the cache has room and `still()`; how many lie here at the end."""
        kept = 0
        most = (read_json(self.folder / MARK) or {}).get("most_bytes")
        for shard in shards:
            if not still():
                break
            path = self.folder / shard
            if not path.is_file():
                entry = self.record["files"][shard]
                if not _room(self.folder, int(entry["size"]), most):
                    break
                path.parent.mkdir(exist_ok=True)
                try:
                    self.store.fetch(shard, path, entry["sha256"])
                except (FileNotFoundError, Damaged) as error:
                    raise changed(self.store, shard) from error
            kept += 1
        return kept


def _room(folder: Path, wanted: int, most: int | None) -> bool:
    """Whether `wanted` bytes fit into the cache beside what lies there; sets that are used by nobody now make room."""
    if most is None:
        return os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize > 2 * wanted + GB
    shards = [(path, path.stat()) for path in folder.parent.glob("*/*/*.safetensors")]
    used = sum(status.st_size for _, status in shards)
    others = sorted((status.st_mtime, path, status.st_size) for path, status in shards if path.parents[1] != folder)
    if used - sum(size for *_, size in others) + wanted > most:
        return False
    for changed, path, size in others:
        if used + wanted <= most:
            break
        if time.time() - changed > 3600:  # a set that another run is filling now is left alone
            path.unlink(missing_ok=True)
            used -= size
    return used + wanted <= most
