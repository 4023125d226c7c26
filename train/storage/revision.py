"""What a model of the hub is called, and `revision.json`: where the files beside it came from, at which commit, with which sha256."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from train.base.files import read_json, write_json
from train.storage import download

REVISION = "revision.json"
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^\s:@]+))?(?::([^\s:]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(text: object) -> bool:
    """Whether `text` is a whole commit's name."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


@dataclass(frozen=True)
class Name:
    """`owner/name[@revision][:file]`, or a hub's address of one file."""

    repository: str
    revision: str | None = None  # branch, tag or commit; None = main
    file: str | None = None  # one file of it, where the whole is not wanted

    @property
    def commit(self) -> str | None:
        """The revision, where it is a commit."""
        return self.revision if is_commit(self.revision) else None

    @property
    def short(self) -> str:
        """The folder that it gets."""
        return self.repository.partition("/")[2]

    def at(self, commit: str | None) -> str:
        """The same at a commit, as a config names it."""
        return self.repository + (f"@{commit}" if commit else "") + (f":{self.file}" if self.file else "")

    def __str__(self) -> str:
        return self.at(self.revision)


def parse(text: str) -> Name | None:
    """The hub's model that `text` names; None where it has another form."""
    if text.startswith(("http://", "https://")):
        parts = urlsplit(text)
        found = re.fullmatch(r"/([\w-][\w.-]*/[\w-][\w.-]*)(?:/(?:resolve|blob)/([^/]+)/(.+)|/tree/([^/]+))?/?", unquote(parts.path))
        if found is None or parts.netloc not in (urlsplit(endpoint()).netloc, "huggingface.co"):
            return None
        name = Name(found[1], found[2] or found[4], found[3])
    else:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        name = Name(*match.groups())
    return name if name.file is None or _inside(name.file) else None


def _inside(file: object) -> bool:
    """Whether a file's name leads nowhere but below its folder."""
    return isinstance(file, str) and all(part not in ("", ".", "..") for part in re.split(r"[/\\]", file))


def pinned(text: str) -> bool:
    """Whether `text` names a model of the hub at one commit."""
    name = parse(text)
    return name is not None and name.commit is not None


def endpoint() -> str:
    """The hub's address, as its library was told it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def records(folder: Path) -> list[dict[str, Any]]:
    """What `revision.json` of a folder says of its sources: from, revision, commit, license, single, files {name: bytes, sha256}."""
    found = (read_json(folder / REVISION) or {}).get("sources")
    found = found if isinstance(found, list) else []
    sound = [one for one in found if isinstance(one, dict) and isinstance(one.get("files"), dict) and one["files"]]
    return [one for one in sound if all(_inside(file) for file in (*one["files"], one.get("single") or "it"))]


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Put it in the place of an earlier one of the same source. Raises Halt(CANNOT_WRITE)."""
    others = [one for one in records(folder) if (one.get("from"), one.get("file")) != (record["from"], record["file"])]
    with download.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REVISION, {"sources": [*others, dict(record)]})


def target(folder: Path, record: Mapping[str, Any], file: str) -> Path:
    """Where a file of the source lies; one that was fetched alone lies in `folder` itself."""
    return folder / (record.get("single") or file)


def place(folder: Path, record: Mapping[str, Any]) -> Path:
    """What a config names: the folder, or the one file."""
    return folder / record["single"] if record.get("single") else folder


def fetched_before(name: Name, out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, record) of each earlier fetch of `name` into `out`, finished or not."""
    return [
        (folder, one) for folder in (out / name.short, out) for one in records(folder)
        if one.get("from") == name.repository and one.get("file") == name.file
    ]  # fmt: skip


def said_of(files: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """What a record says of a file: bytes, listed, sha256. Whoever likes may have written it."""
    said = files.get(file)
    return said if isinstance(said, dict) else {}


def commit_in(record: Mapping[str, Any]) -> str | None:
    """The commit of a record; None where it holds none."""
    commit = record.get("commit")
    return commit if isinstance(commit, str) and is_commit(commit) else None


def record_beside(path: Path) -> dict[str, Any]:
    """What `revision.json` says of a fetched folder or file; {} where nothing was fetched."""
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    return next((record for record in records(folder) if record.get("single") == file), {})


def license_beside(path: Path) -> str | None:
    """The licence that the page of a fetched file or folder stated."""
    stated = record_beside(path).get("license")
    return stated if isinstance(stated, str) and stated else None
