"""How a command ends: exit codes, and the one exception that carries them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's end means; the same list stands in README and in `exit.json`."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2  # bad usage or config
    NO_CHECKPOINT = 3  # checkpoints exist, none is valid
    NON_FINITE = 4
    OUT_OF_MEMORY = 5
    LOCKED = 6  # another process owns the run directory
    MISMATCH = 7  # config, data or model do not fit together, or cannot fit the machine
    CANNOT_WRITE = 8
    PEER_LOST = 9
    STOPPED = 85  # by a signal; saved; start again to resume. Not 0, so that `ft1 && ft2` does not go on


class Halt(Exception):
    """Ends the command with `code`; the message names the key or file at fault and the fix."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = ExitCode(code)
        self.message = message

    def __reduce__(self) -> tuple[type[Halt], tuple[ExitCode, str]]:
        """Halts travel from data workers to the trainer, so they must survive pickling by multiprocessing."""
        return Halt, (self.code, self.message)
