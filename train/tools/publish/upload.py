"""Sending a publication to a page of the hub: what is there with the same hash is not sent again, and one commit holds all of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256
from train.base.secrets import mask
from train.storage import download, revision
from train.tools.publish import licences
from train.tools.publish.gather import Publication

log = logging.getLogger("anix")


def page_of(to: str) -> str:
    """`owner/name` that `--to` names. Raises Halt(USAGE)."""
    name = revision.parse(to)
    if name is not None and name.revision is None and name.file is None:
        return name.repository
    if "://" in to:
        raise Halt(ExitCode.USAGE, f"--to {mask(to)}: an object store is named s3://bucket/folder or gs://, a page of the hub owner/name")
    raise Halt(ExitCode.USAGE, f"--to {to}: a page of the hub is named owner/name, without a revision or a file")


def send(found: Publication, page: str, *, public: bool) -> str:
    """Address of the commit that holds the whole publication, made where it does not exist yet.

    Raises Halt(MISMATCH): no token, no right to write, another licence stated there, server down, or what arrived differs. What
    arrived before a failure is known to the hub by its hash and not sent again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise Halt(ExitCode.MISMATCH, "nobody is signed in: `hf auth login` with a token that may write, or HF_TOKEN")
    api, kind = HfApi(endpoint=revision.endpoint()), found.repository_type
    try:
        api.create_repo(page, repo_type=kind, private=not public, exist_ok=True)
        before = api.repo_info(page, repo_type=kind, files_metadata=True)
        _refuse_other_licence(found, page, before.card_data)
        there = _hashes_there(before)
        new = {name: content for name, content in found.files.items() if there.get(name) not in _hashes(content)}
        log.info("%d of %d files are there with the same hash", len(found.files) - len(new), len(found.files))
        commit = before.sha
        if new:
            added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sorted(new.items())]
            commit = api.create_commit(page, added, repo_type=kind, commit_message=f"{found.stage}: {len(new)} files").oid
        after = api.repo_info(page, repo_type=kind, revision=commit, files_metadata=True)
    except Halt:
        raise
    except Exception as error:  # each HTTP library raises its own, and which one the hub's client uses changes
        raise _failed(page, error) from error
    there = _hashes_there(after)
    if wrong := sorted(name for name, content in found.files.items() if there.get(name) not in _hashes(content)):
        raise Halt(ExitCode.MISMATCH, f"{page} holds other bytes than were sent: {', '.join(wrong[:5])}. Start again")
    folder = "datasets/" if kind == "dataset" else ""
    return f"{revision.endpoint()}/{folder}{page} @{commit}"


def _hashes_there(info: Any) -> Mapping[str, str]:
    return {file.rfilename: file.lfs.sha256 if file.lfs is not None else str(file.blob_id) for file in info.siblings or []}


def _hashes(content: Path | bytes) -> tuple[str, str]:
    """The two hashes that the hub may know a file by: sha256 of large ones, git's of small ones."""
    if isinstance(content, Path):
        return file_sha256(content), download.git_sha1(content)
    return hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _refuse_other_licence(found: Publication, page: str, card_data: Any) -> None:
    stated = [getattr(card_data, key, None) for key in ("license", "license_name")]
    there = stated[1] if stated[0] in (None, "other") else stated[0]
    if there and licences.short(str(there)) not in (licences.short(found.license), *licences.fields(found.license).values()):
        raise Halt(ExitCode.MISMATCH, f"{page} states {there}, and this is under {found.license}: publish it on a page of its own")


def _failed(page: str, error: BaseException) -> Halt:
    cause: BaseException | None = error
    while cause is not None and download.status_of(cause) is None and isinstance(cause, RuntimeError):
        cause = cause.__cause__
    status = download.status_of(cause) if cause is not None else None
    if status in (401, 403):
        return Halt(ExitCode.MISMATCH, f"{page} may not be written by you ({status}): the token needs the right to write there. `hf auth login`")
    halt = download.unreachable(page, cause or error, page=f"{revision.endpoint()}/{page}")
    return Halt(halt.code, halt.message.replace("fetched", "published") + " Start again: what arrived is not sent twice")
