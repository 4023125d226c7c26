"""How a start ends: the exit code that an exception stands for, and what the run directory keeps of it. Loads no torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.storage.rundir import RunDir

# Of whatever was being written: the disk is full, over quota, read-only or broken.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


class Attempt:
    """One start in its run directory: the stop it may be asked for, how far it came, and the record of its end."""

    def __init__(self, run: RunDir, config_hash: str) -> None:
        self.run, self.config_hash = run, config_hash
        self.reached: Callable[[], int] = lambda: 0  # updates done
        self.stop = signals.install(orphan=True)
        last_words = "interrupted a second time: stopped at once, the last checkpoint is valid"
        self.stop.stop_now = lambda: run.write_exit(ExitCode.STOPPED, self.stop.status, last_words, None)

    def record(self, code: ExitCode, reason: str) -> None:
        """Leave in the run directory why the run ended, other than by being done."""
        status = self.stop.status if code == ExitCode.STOPPED else "failed"
        self.run.write_exit(code, status, reason, self.reached())
        self.run.count_attempt(code, reason, self.reached(), self.config_hash)


@contextlib.contextmanager
def recorded(run: RunDir, config_hash: str) -> Iterator[Attempt]:
    """The attempt for the length of a run; however it ends is written down, and raised as a Halt where one fits."""
    run.met = run.rank == 0  # which holds the lock; it is refused it where another run is at work
    attempt = Attempt(run, config_hash)
    try:
        yield attempt
        run.write_exit(ExitCode.DONE, "done", "", attempt.reached())
    except BaseException as error:
        halt = as_halt(error, attempt.reached())
        attempt.record(halt.code, halt.message)
        if halt is error or halt.code == ExitCode.UNEXPECTED:
            raise
        raise halt from error
    finally:
        run.close()


def as_halt(error: BaseException, update: int = 0) -> Halt:
    """The exit code that an exception stands for, after `update` updates."""
    if isinstance(error, Halt):
        return error
    kind = type(error).__name__  # torch's own are known by name: it may not have been loaded yet
    after = f"after update {update}: " if update else ""  # inside a bucket the update's own code has named it
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return Halt(
            ExitCode.OUT_OF_MEMORY,
            f"{after}out of memory: {error}; try model.gradient_checkpointing=full, batch.split=2 or configs/memory/",
        )
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return Halt(ExitCode.CANNOT_WRITE, f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    if kind in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return Halt(ExitCode.PEER_LOST, f"another process is gone or silent: {error}")
    return Halt(ExitCode.UNEXPECTED, f"{kind}: {error}")
