"""One file over HTTP, through the hub's own client: goes on where an earlier start was cut, and is whole or not there.

That client itself resumes within one start only, and holds nothing against a hash.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, fsync_dir
from train.base.secrets import mask

log = logging.getLogger("anix")
TRIES = 5  # in a row that brought nothing
_LONGEST_WAIT_S = 8.0
_BUSY = (500, 502, 503, 504)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Wanted:
    """What is known of a file before it is here."""

    size_bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None  # of small files of the hub, which have no sha256 there
    mark: str | None = None  # what else tells this content from another under the same address: an ETag

    @property
    def identity(self) -> str | None:
        """Names the part that a cut download leaves; None = nothing tells whether a part belongs to it."""
        known = self.sha256 or self.git_sha1 or self.mark
        return hashlib.sha256(f"{known} {self.size_bytes}".encode()).hexdigest()[:12] if known else None


def bring(url: str, target: Path, wanted: Wanted, headers: Mapping[str, str] | None = None) -> str:
    """sha256 of `target`, which holds what `url` gives; a part of an earlier start is gone on with.

    Raises Halt: CANNOT_WRITE (full or read-only disk), MISMATCH (no such file, no access, no network, server down, or
    another length or hash than `wanted`). A part stays for the next start unless its content is wrong.
    """
    part = target.with_name(f".{target.name}.{wanted.identity or 'new'}.part")
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{_literal(target.name)}.*.part"):
            if old != part or wanted.identity is None:  # of another content
                old.unlink()
    _bring(url, part, wanted, headers, target.name)
    digest = file_sha256(part)
    if said := unlike(part, digest, wanted):
        part.unlink()
        raise Halt(ExitCode.MISMATCH, f"{mask(url)} sent {said}: nothing of it was kept. Start again; if it stays so, that server's file is damaged")
    with writing(target.parent):
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        fsync_dir(target.parent)
    return digest


def _literal(name: str) -> str:
    return "".join(f"[{character}]" if character in "[]*?" else character for character in name)


def _bring(url: str, part: Path, wanted: Wanted, headers: Mapping[str, str] | None, shown: str) -> None:
    from huggingface_hub.file_download import http_get

    failed, waited_s = 0, 1.0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if wanted.size_bytes is not None and have > wanted.size_bytes:
            part.unlink()
            have = 0
        if have and have == wanted.size_bytes:
            return
        try:
            with writing(part.parent), open(part, "r+b" if part.exists() else "w+b") as file:
                file.seek(have)
                size = wanted.size_bytes
                http_get(url, file, resume_size=have, headers=dict(headers or {}), expected_size=size, displayed_filename=shown)
            return
        except Halt:
            raise
        except Exception as error:  # each HTTP library raises its own, and which one the hub's client uses changes
            status = status_of(error)
            grew = part.exists() and part.stat().st_size > have
            failed = 1 if grew else failed + 1
            if status == 416 and have:  # a part longer than the file is: it was of another content
                part.unlink()
            elif isinstance(error, ValueError) or (type(error) is OSError and "Consistency check" in str(error)):
                part.unlink(missing_ok=True)
                raise Halt(ExitCode.MISMATCH, f"{mask(url)} sent another length than it told: nothing of it was kept. {_first_line(error)}") from error
            elif status not in _BUSY or failed >= TRIES:
                raise unreachable(url, error, kept=part) from error
            else:
                log.warning("%s answers %s; trying again in %.0f s", mask(url), status, waited_s)
                time.sleep(waited_s)
                waited_s = 1.0 if grew else min(2 * waited_s, _LONGEST_WAIT_S)


def unlike(part: Path, digest: str, wanted: Wanted) -> str | None:
    """What is wrong with the bytes that came; None where nothing is."""
    size = part.stat().st_size
    if wanted.size_bytes is not None and size != wanted.size_bytes:
        return f"{size} bytes where {wanted.size_bytes} were listed"
    if wanted.sha256 is not None and digest != wanted.sha256:
        return f"bytes with sha256 {digest} where {wanted.sha256} was listed"
    if wanted.sha256 is None and wanted.git_sha1 is not None and (sha1 := git_sha1(part)) != wanted.git_sha1:
        return f"bytes with git hash {sha1} where {wanted.git_sha1} was listed"
    return None


def git_sha1(path: Path) -> str:
    """The hash by which git, and so the hub, knows a small file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Full, read-only and foreign places become Halt(CANNOT_WRITE); what a server said passes through."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Halt(ExitCode.CANNOT_WRITE, f"{folder}: no space is left. What came stays: free some, and the same command goes on") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | IsADirectoryError) or error.errno == errno.EROFS:
            raise Halt(ExitCode.CANNOT_WRITE, f"{folder} cannot be written ({error.strerror}): choose another folder with --out") from error
        raise


def status_of(error: BaseException) -> int | None:
    """HTTP status that an error of the hub's client carries."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: BaseException) -> str:
    return mask(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))


def unreachable(what: str, error: BaseException, *, kept: Path | None = None, page: str | None = None) -> Halt:
    """Halt(MISMATCH) that says why a server did not give `what`, and what to do. `page`: where a model is looked at."""
    status, names = status_of(error), [kind.__name__ for kind in type(error).__mro__]
    goes_on = " What came stays: the same command goes on from there." if kept is not None and kept.exists() else ""
    log_in = f"accept its terms at {page or 'its page'} where it has some, and sign in with `hf auth login`"
    if "GatedRepoError" in names:
        said = f"is gated: {log_in}"
    elif "RepositoryNotFoundError" in names or status == 401:
        said = f"does not exist on the hub, or is private or gated (401): check the spelling; {log_in}"
    elif "RevisionNotFoundError" in names:
        said = f"exists, but not that revision: look at {page or 'its page'} for its branches and commits"
    elif status == 403:
        said = f"may not be read by you (403): {log_in}"
    elif status == 404:
        said = "does not exist there (404): check the spelling"
    elif status is not None:
        said = f"cannot be fetched now: the server answers {status}. Try again later.{goes_on}"
    elif "OfflineModeIsEnabled" in names:
        said = f"cannot be fetched: HF_HUB_OFFLINE is set.{goes_on}"
    else:
        said = f"cannot be fetched: {_first_line(error)}.{goes_on}"
    return Halt(ExitCode.MISMATCH, f"{mask(what)} {said}")
