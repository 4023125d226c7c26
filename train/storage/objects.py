"""One place of named objects, whatever keeps it: `s3://`, `gs://`, `hf://`, `https://` or a folder, over fsspec's interface.

s3 and gs go through pyarrow's own file systems (s3fs would pin another botocore), hf through huggingface_hub's, the rest through
fsspec's. What a network does to a read (5xx, a cut, a body that ends early) is tried again; who reads checks hashes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from train.base.errors import ExitCode, Halt
from train.base.files import replacing
from train.base.secrets import mask

log = logging.getLogger("anix")
_URL = re.compile(r"(s3|gs|hf|https|http|file)://")
_WAITS_S = (0.5, 2.0, 8.0, 30.0)  # before each further try; a store that is down for a minute ends nothing
_PIECE = 8 << 20  # bytes at a time of a whole object
T = TypeVar("T")


def is_url(text: str) -> bool:
    """Whether `text` names a store and not a path."""
    return _URL.match(text) is not None


class Damaged(OSError):
    """What was read is not what its hash or length says."""


class Store:
    """The objects below one URL. May be sent to another process or forked: each process connects by itself."""

    def __init__(self, url: str, waits_s: tuple[float, ...] = _WAITS_S) -> None:
        parts = urlsplit(url)
        if not is_url(url) or parts.query or parts.fragment:
            raise Halt(ExitCode.USAGE, f"{url} is no address of a store: s3://bucket/folder, gs://, hf://, https:// or file://")
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise Halt(ExitCode.USAGE, f"{url}: only https, since nothing says that what comes by http is what was sent")
        if parts.username or parts.password:
            raise Halt(ExitCode.USAGE, f"{mask(url)}: no user or password in an address; the store's own environment variables hold them")
        self.url, self._waits_s = url.rstrip("/"), waits_s
        self._opened: tuple[int, Any, str] | None = None  # process, file system, root in it

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "_waits_s": self._waits_s, "_opened": None}

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none. Raises Halt(UNEXPECTED) where the store cannot be asked."""

        def ask() -> int | None:
            files, root = self._files()
            try:
                return int(files.info(f"{root}/{name}")["size"])
            except FileNotFoundError:
                return None

        return self._patiently(f"{self.url}/{name} cannot be asked for", ask)

    def version(self, name: str) -> str | None:
        """What changes when an object is written again: its length, and when the store got it. None where there is none."""

        def ask() -> str | None:
            files, root = self._files()
            try:
                about = files.info(f"{root}/{name}")
            except FileNotFoundError:
                return None
            return f"{about['size']} {about.get('mtime') or about.get('ETag') or about.get('blob_id')}"

        return self._patiently(f"{self.url}/{name} cannot be asked for", ask)

    def names(self, prefix: str = "") -> list[tuple[str, int]]:
        """(name, bytes) of every object whose name begins with the folder `prefix`, sorted."""

        def ask() -> list[tuple[str, int]]:
            files, root = self._files()
            at = f"{root}/{prefix}".rstrip("/")
            found = files.find(at, detail=True)
            return sorted((path.removeprefix(root).lstrip("/"), int(about["size"] or 0)) for path, about in found.items())

        return self._patiently(f"{self.url}/{prefix} cannot be listed", ask)

    def read(self, name: str, start: int = 0, end: int | None = None, *, check: Callable[[bytes], bool] | None = None) -> bytes:
        """Bytes `start` to `end` of an object; read again where `check` says that they are not right.

        Raises FileNotFoundError, Damaged where they stay wrong, Halt(UNEXPECTED) where the store cannot be reached.
        """

        def ask() -> bytes:
            files, root = self._files()
            data = bytes(files.cat_file(f"{root}/{name}", start=start or None, end=end))
            if end is not None and len(data) != end - start:
                raise Damaged(errno.EIO, f"{len(data)} of {end - start} bytes came", name)
            if check is not None and not check(data):
                raise Damaged(errno.EIO, "is not what its hash says", name)
            return data

        return self._patiently(f"{self.url}/{name} cannot be read", ask)

    def fetch(self, name: str, path: Path, sha256: str | None = None) -> None:
        """A whole object as the file `path`, atomically, in pieces; checked where its hash is known. Raises as `read`."""

        def ask() -> None:
            digest = hashlib.sha256()
            size, begun = self.size(name), 0
            if size is None:
                raise FileNotFoundError(errno.ENOENT, "no such object", name)
            files, root = self._files()
            with replacing(path, peers=True) as tmp, open(tmp, "wb") as out, files.open(f"{root}/{name}", "rb") as source:
                while piece := source.read(_PIECE):
                    digest.update(piece)
                    begun += out.write(piece)
                out.flush()
                os.fsync(out.fileno())
                if begun != size or sha256 not in (None, digest.hexdigest()):
                    raise Damaged(errno.EIO, "is not what its hash says" if begun == size else f"{begun} of {size} bytes came", name)

        self._patiently(f"{self.url}/{name} cannot be fetched", ask)

    def put(self, path: Path, name: str) -> None:
        """A file as the object `name`, its length asked for afterwards. Raises Halt(UNEXPECTED)."""

        def ask() -> None:
            files, root = self._files()
            if self.url.startswith("file://"):
                files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            with open(path, "rb") as source, files.open(f"{root}/{name}", "wb") as out:
                while piece := source.read(_PIECE):
                    out.write(piece)
            if self.size(name) != path.stat().st_size:
                raise Damaged(errno.EIO, "has another length than what was sent", name)

        self._patiently(f"{self.url}/{name} cannot be written", ask)

    def _files(self) -> tuple[Any, str]:
        """(fsspec file system, root in it) of this process: a connection does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_connect(self.url))
        return self._opened[1], self._opened[2]

    def _patiently(self, failed: str, ask: Callable[[], T]) -> T:
        for wait_s in (*self._waits_s, None):
            try:
                return ask()
            except (FileNotFoundError, Halt):
                raise
            except PermissionError as error:
                raise Halt(ExitCode.USAGE, f"{failed}: not allowed ({_words(error)}): see the store's credentials") from error
            except OSError as error:
                if "ACCESS_DENIED" in str(error) or "INVALID_ACCESS" in str(error):
                    raise Halt(ExitCode.USAGE, f"{failed}: not allowed ({_words(error)}): see the store's credentials") from error
                if wait_s is None:
                    if isinstance(error, Damaged):
                        raise
                    raise Halt(ExitCode.UNEXPECTED, f"{failed}: {_words(error)}; tried {len(self._waits_s) + 1} times") from error
                log.warning("%s: %s; trying again in %g s", failed, _words(error), wait_s)
                time.sleep(wait_s)
        raise AssertionError("unreachable")


def _words(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return mask(text.splitlines()[0])[:300]


def _connect(url: str) -> tuple[Any, str]:
    """Raises Halt(USAGE) naming the package that a kind of store needs."""
    scheme, _, rest = url.partition("://")
    try:
        if scheme in ("s3", "gs"):
            from fsspec.implementations.arrow import ArrowFSWrapper

            return ArrowFSWrapper(_arrow(scheme), skip_instance_cache=True), rest
        import fsspec

        files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        return files, str(root).rstrip("/")
    except ImportError as error:
        raise Halt(ExitCode.USAGE, f"{url}: {error}") from error


def _arrow(scheme: str) -> Any:
    """pyarrow's file system; where it is and who asks is said by the environment, as for every client of such a store."""
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(
        **({"endpoint_override": endpoint} if endpoint else {}),
        **({"region": region} if region else {}),
        connect_timeout=10, request_timeout=60, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )  # fmt: skip


