"""What a command says goes to whoever still listens, and costs the command nothing. Standard library only.

A reader that goes away (`| head -1`), a full disk under a log file, or a stream that was closed from the start must
not end a training, nor change an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from train.base.secrets import mask

_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)  # EIO: the terminal was closed


class LastingStream(io.TextIOBase):
    """Writes on to `stream`, line by line, as long as that works; what it cannot write is dropped. Never raises.

    `lost` is the first error of a stream that is there but takes nothing (a full disk), None otherwise.
    """

    def __init__(self, stream: TextIO, *, masked: bool) -> None:
        self._stream, self._masked = stream, masked
        self._begun = threading.local()  # each thread's line; no lock, which a forked worker could inherit locked
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Keep until the line ends or `flush` comes: a secret may be written in pieces."""
        self._begun.line = getattr(self._begun, "line", "") + text
        if "\n" in text or "\r" in text:
            self._pass_on()
        return len(text)

    def flush(self) -> None:
        """Pass on what there is."""
        self._pass_on()
        with self._kept_going():
            self._stream.flush()

    def _pass_on(self) -> None:
        line, self._begun.line = getattr(self._begun, "line", ""), ""
        if line:
            with self._kept_going():
                self._stream.write(mask(line) if self._masked else line)

    @contextlib.contextmanager
    def _kept_going(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                self._to_nowhere()
            else:
                self.lost = self.lost or error
        except ValueError:  # closed by somebody in this process
            pass

    def _to_nowhere(self) -> None:
        """From now on nothing of this process, its libraries and its children fails on that descriptor."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def give_up(self) -> None:
        """Drop what is still buffered after a failure, so that the interpreter's last flush does not fail on it."""
        self.flush()
        if self.lost is not None:
            self._to_nowhere()

    def __getattr__(self, name: str) -> Any:
        """What libraries ask of a stream beside writing (`buffer`, `reconfigure`)."""
        return getattr(self.__dict__["_stream"], name)

    def fileno(self) -> int:
        """Of the stream below."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Of the stream below."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """True."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream below."""
        return self._stream.encoding


def install() -> None:
    """Make sys.stdout and sys.stderr last; secrets in stderr are masked. A second call does nothing.

    Descriptors that were closed from the start are opened first: the next file would get their number, and what a
    library prints would land in it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the process's life)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that is no text must not hide the message
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream, masked=name == "stderr"))


def finish() -> OSError | None:
    """Flush both; why the output on stdout was lost, None where it was not or nobody wanted it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LastingStream):
            stream.give_up()
        elif stream is not None:
            stream.flush()
    return sys.stdout.lost if isinstance(sys.stdout, LastingStream) else None
