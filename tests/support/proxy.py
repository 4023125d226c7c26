"""A connection between two processes that can be cut without a word, as a switch that dies does: nothing is closed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator


class Proxy:
    """Owner of a forked process that forwards `port` to `target`; `cut` and `heal` say whether bytes pass."""

    def __init__(self, target: int) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self._read, self._write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._write)
            try:
                _forward(listener, target, self._read)
            finally:
                os._exit(0)
        listener.close()
        os.close(self._read)

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told."""
        os.write(self._write, b"0")

    def heal(self) -> None:
        """What was held back arrives, and all that follows."""
        os.write(self._write, b"1")

    def close(self) -> None:
        """End the process."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._write)


def _forward(listener: socket.socket, target: int, commands: int) -> None:
    passing, other = True, {}
    while True:
        waiting = [commands, *([listener, *other] if passing else ())]
        for ready in select.select(waiting, [], [])[0]:
            if ready == commands:
                word = os.read(commands, 1)
                if not word:
                    return
                passing = word == b"1"
            elif ready is listener:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", target))
                other |= {near: far, far: near}
            elif ready in other and passing:
                data = b""
                with contextlib.suppress(OSError):
                    data = ready.recv(65536)
                    other[ready].sendall(data)
                if not data:
                    peer = other.pop(ready)
                    other.pop(peer)
                    ready.close()
                    peer.close()


@contextlib.contextmanager
def hosted() -> Iterator[int]:
    """The port of a store that a process of its own keeps, as torchrun's agent does."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            import torch.distributed as dist

            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(write, str(store.port).encode())
            while True:
                time.sleep(3600)
        finally:
            os._exit(0)
    try:
        yield int(os.read(read, 16))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
