"""The list of what a checkpoint directory holds, and the proof that it holds exactly that.

`manifest.json` is canonical JSON and carries its own sha256, so that a flipped bit anywhere in the directory,
the manifest included, is found. It is written last; a directory without a sound manifest is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.base.files import file_sha256

NAME = "manifest.json"
SCHEMA_VERSION = 1
_MAX_BYTES = 16 << 20  # of the manifest itself
_SMALL_BYTES = 64 << 20  # files up to here are hashed even with `verify: size`, if they are not tensors
_FIELDS = {"schema_version", "run_id", "step", "permanent", "files", "sha256"}


class Damaged(Exception):
    """A checkpoint directory that must not be used; the message says why."""


@dataclass(frozen=True)
class FileRecord:
    """What one file must be: its length, its sha256, the tensors in it (0 for JSON)."""

    bytes: int
    sha256: str
    tensors: int


@dataclass(frozen=True)
class Manifest:
    """A verified or freshly made list of files."""

    run_id: str
    step: int
    permanent: bool
    files: Mapping[str, FileRecord]

    @property
    def total_bytes(self) -> int:
        """Sum over the listed files."""
        return sum(record.bytes for record in self.files.values())


def encode(manifest: Manifest) -> bytes:
    """The only bytes that `decode` accepts for `manifest`."""
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "permanent": manifest.permanent,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
    }
    body["sha256"] = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical(body)


def decode(data: bytes) -> Manifest:
    """Raises Damaged unless `data` is exactly what `encode` wrote."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or set(body) != _FIELDS:
            raise Damaged(f"{NAME}: not a checkpoint manifest")
        if body["schema_version"] != SCHEMA_VERSION:
            raise Damaged(f"{NAME}: schema version {body['schema_version']}, known is {SCHEMA_VERSION}")
        files = {str(name): FileRecord(**record) for name, record in body["files"].items()}
        manifest = Manifest(body["run_id"], body["step"], body["permanent"], files)
        _check_types(manifest)
        intact = encode(manifest) == data
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{NAME}: not readable ({type(error).__name__}: {str(error)[:100]})") from None
    if not intact:
        raise Damaged(f"{NAME}: its own sha256 does not match")
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Whoever can compute a sha256 can sign nonsense; it must not come further than here."""
    expected = [(manifest.run_id, str), (manifest.step, int), (manifest.permanent, bool)]
    for name, record in manifest.files.items():
        if os.path.basename(name) != name or name in ("", ".", "..", NAME):
            raise ValueError(f"{name!r} is no file of a checkpoint")
        expected += [(record.bytes, int), (record.sha256, str), (record.tensors, int)]
    if any(type(value) is not kind for value, kind in expected):
        raise TypeError("a value of another type")


def step_of(name: str) -> int | None:
    """12000 for `step-00012000`, None for every other name."""
    found = re.fullmatch(r"step-(\d{8,})", name)
    return int(found.group(1)) if found else None


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint directory, itself checked, the files not. Raises Damaged."""
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise Damaged("not a directory")
    path = folder / NAME
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Damaged(f"{NAME}: not a regular file")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise Damaged(f"{NAME}: missing") from None
    except OSError as error:
        raise Damaged(f"{NAME}: cannot be read ({error.strerror})") from None
    if len(data) > _MAX_BYTES:
        raise Damaged(f"{NAME}: larger than {_MAX_BYTES >> 20} MiB")
    manifest = decode(data)
    if step_of(folder.name) not in (None, manifest.step):
        raise Damaged(f"{NAME}: is that of step {manifest.step}")
    return manifest


def verify(folder: Path, *, full: bool = True) -> Manifest:
    """The manifest, after every listed file proved to be there, unchanged, and alone. Raises Damaged.

    `full=False` checks lengths only, except for small JSON files, which are always hashed.
    """
    try:
        manifest = read(folder)
        present = set(os.listdir(folder))
        for name in sorted(set(manifest.files) - present):
            raise Damaged(f"{name}: missing")
        for name in sorted(present - set(manifest.files) - {NAME}):
            raise Damaged(f"{name}: not in the manifest")
        for name, record in manifest.files.items():
            _verify_file(folder / name, record, full)
    except OSError as error:
        raise Damaged(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    return manifest


def _verify_file(path: Path, record: FileRecord, full: bool) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path.name}: not a regular file")
    if status.st_size != record.bytes:
        raise Damaged(f"{path.name}: {status.st_size} bytes, the manifest says {record.bytes}")
    if full or (record.tensors == 0 and record.bytes <= _SMALL_BYTES):
        digest = file_sha256(path)
        if digest != record.sha256:
            raise Damaged(f"{path.name}: sha256 is {digest[:12]}…, the manifest says {record.sha256[:12]}…")


def committed(folder: Path) -> Iterator[tuple[int, Path, Manifest]]:
    """(step, path, manifest) of every directory with a sound manifest; the files are not read."""
    for name in os.listdir(folder):
        step = step_of(name)
        if step is not None:
            with contextlib.suppress(Damaged, OSError):
                yield step, folder / name, read(folder / name)


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode("utf-8")
