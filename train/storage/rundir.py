"""The run directory: its lock, its identity, its atomic files, how the last run ended.

Standard library only: everything here is checked in the first second, before torch is imported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, replace_file, write_json
from train.base.secrets import mask, mask_settings

REPEATS_REFUSED = 2  # so many equal failures in a row, and the next start refuses
_COUNTED = (ExitCode.UNEXPECTED, ExitCode.NON_FINITE, ExitCode.OUT_OF_MEMORY, ExitCode.PEER_LOST)
_FILES = (
    "DONE", "config.yaml", "metrics.jsonl", "exit.json", "attempts.json", "run.json", "lineage.json", "trace.txt",
    "validation.jsonl", "held_out.json", "bad_step.json", "selection.safetensors",
)  # fmt: skip
# What a run makes beside these: a folder that holds any of it and no record of a run is somebody else's.
_MADE = ("model", "checkpoints")
_LEFT_OF_FILES = re.compile(
    "(" + "|".join(map(re.escape, (*_FILES, *_MADE, ".writable"))) + r"|exit\.\d+\.json|\..+\.anix)\.tmp"
)
_LEFT_OF_CHECKPOINTS = re.compile(r"step-\d{8,}(\.manifest(\.tmp)?)?\.(tmp|del)")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# A POSIX record lock belongs to the process: closing ANY descriptor of the file drops it. So a lock file
# is opened once per process; the pid is part of the key because a forked child inherits this set, not the lock.
_held: set[tuple[int, str]] = set()


# --- atomic files ------------------------------------------------------------------------------------


# --- opening -----------------------------------------------------------------------------------------


class RunDir:
    """Owner of the lock of one run directory; made by `open_run_dir`."""

    def __init__(self, path: Path, stage: str, rank: int) -> None:
        self.path, self.stage, self.rank = path, stage, rank
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.run_id = ""
        self.look_up_to: int | None = None  # checkpoints of later steps are overlooked (to replay an update)
        self.met = True  # False on another than rank 0 until they met: the directory may be another run's
        self.damaged: set[str] = set()  # names of checkpoints that were found damaged: retention does not count them
        # What exit.json says beside: why the last update could not be saved, what lies there to look at.
        self.aside: dict[str, str] = {}
        self.done: dict[str, Any] | None = None  # what DONE says, when the stage is finished
        self._lock_fd: int | None = None

    def write_config(self, yaml_text: str) -> None:
        """`config.yaml`: the complete, unresolved config of this start. Rank 0's alone, others do nothing."""
        if self.rank == 0:
            replace_file(self.path / "config.yaml", mask_settings(yaml_text))

    def write_done(self, record: Mapping[str, Any]) -> None:
        """Mark the stage finished. The last write of a stage."""
        write_json(self.path / "DONE", record)

    def write_exit(self, code: int, status: str, reason: str, update: int | None) -> bool:
        """Leave `exit.json` (rank 0) or `exit.<rank>.json`, because launchers hide the exit code.

        Returns False instead of raising: it runs when the disk may be full. `status` is one of
        done | stopped | requeue | failed. Secrets in `reason` are masked.
        """
        if not self.met:
            return False
        name = "exit.json" if self.rank == 0 else f"exit.{self.rank}.json"
        record = {
            "code": int(code), "status": status, "reason": mask(reason), "update": update,
            "checkpoint": self._newest(), "rank": self.rank, "time": _now(), **{key: mask(text) for key, text in self.aside.items()},
        }  # fmt: skip
        try:
            write_json(self.path / name, record)
        except OSError as error:
            print(f"warning: cannot write {self.path / name}: {error}", file=sys.stderr)
            return False
        return True

    def _newest(self) -> str | None:
        """The newest committed checkpoint, relative to the run directory."""
        try:
            names = [name for name in os.listdir(self.checkpoints) if re.fullmatch(r"step-\d{8,}", name)]
        except OSError:
            return None
        return f"checkpoints/{max(names, key=lambda name: int(name[5:]))}" if names else None

    def count_attempt(self, code: int, reason: str, update: int, config_hash: str) -> None:
        """Count a failure in `attempts.json`; the same one twice in a row makes `check_attempts` refuse.

        Signals, locks, full disks and bad settings are not counted: repeating those start is sound.
        """
        if self.rank != 0 or code not in _COUNTED:
            return
        record = {
            "code": int(code), "reason": _stable(reason), "update": update, "config_hash": config_hash
        }  # fmt: skip
        old = read_json(self.path / "attempts.json") or {}
        same = all(old.get(key) == value for key, value in record.items())
        count = _count(old) + 1 if same else 1
        with contextlib.suppress(OSError):
            write_json(self.path / "attempts.json", {**record, "count": count, "time": _now()})

    def check_attempts(self, config_hash: str, accept: Sequence[str] = ()) -> None:
        """Halt(MISMATCH) when the last starts ended in the same failure; `resume.accept: [attempts]` clears."""
        if "attempts" in accept:
            if self.rank == 0:
                (self.path / "attempts.json").unlink(missing_ok=True)
            return
        old = read_json(self.path / "attempts.json") or {}
        if _count(old) < REPEATS_REFUSED or old.get("config_hash") != config_hash:
            return
        raise Halt(
            ExitCode.MISMATCH,
            f"{self.path}: {old['count']} starts in a row ended at update {old.get('update')} with the same "
            f"failure: {old.get('reason')}. Starting again would end there too. Change the cause, or try once "
            "more with resume.accept='[attempts]'.",
        )

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
            _held.discard((os.getpid(), str(self.path)))


def open_run_dir(output_dir: Path | str, stage: str, *, rank: int = 0, go_on: bool = False) -> RunDir:
    """Create, lock and test the run directory; the first thing a run does.

    A finished directory is returned with `.done` set, unlocked, and nothing in it is touched; with `go_on`, for more
    updates, it is opened like any other, and its DONE stands until the new end. Only rank 0 locks. What a killed run left stays until this one really begins: see `remove_leftovers`. Raises Halt:
    MISMATCH (directory of another stage, or of something else), LOCKED (names pid and host), CANNOT_WRITE.
    """
    run = RunDir(Path(os.path.abspath(output_dir)), stage, rank)
    _refuse_what_is_in_the_way(run.path)
    if rank == 0:  # by then the others may see what the first one has made
        _refuse_foreign(run)
    _refuse_other_stage(run)
    run.done = read_done(run.path)
    if run.done is not None and not go_on:
        return run
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _lock(run)
            _test_writable(run.path)
            _identify(run)
            _remove_exits(run.path)
    except OSError as error:
        run.close()
        raise Halt(
            ExitCode.CANNOT_WRITE, f"output_dir {run.path}: cannot write there ({_errno_text(error)})"
        ) from error
    except Halt:
        run.close()
        raise
    return run


def read_done(path: Path | str) -> dict[str, Any] | None:
    """What `DONE` says, {} for a DONE that holds no record, None for a stage that is not finished."""
    done = Path(path) / "DONE"
    return (read_json(done) or {}) if done.is_file() else None


def leftovers(path: Path) -> list[os.DirEntry[str]]:
    """What a killed run left half-written (`.tmp`) or half-deleted (`.del`), by the names that runs give."""
    found = [entry for entry in os.scandir(path) if _LEFT_OF_FILES.fullmatch(entry.name)]
    return found + [e for e in os.scandir(path / "checkpoints") if _LEFT_OF_CHECKPOINTS.fullmatch(e.name)]


def remove_leftovers(path: Path) -> None:
    """Delete the leftovers. Needs the lock, and a start that can be refused no more: until then nothing is lost."""
    for entry in leftovers(path):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def leftover_bytes(path: Path) -> int:
    """Room that `remove_leftovers` will make."""
    total = 0
    for entry in leftovers(path):
        held = [Path(entry.path)] if not entry.is_dir(follow_symlinks=False) else Path(entry.path).rglob("*")
        total += sum(file.lstat().st_size for file in held)
    return total


# --- parts of opening --------------------------------------------------------------------------------


def _refuse_what_is_in_the_way(path: Path) -> None:
    """A folder or a device under the name of a file of ours would end the run only when that file is written."""
    for name in _FILES:
        try:
            mode = os.stat(path / name).st_mode
        except OSError:
            continue  # absent, or a dangling link: told when it is written
        if not stat.S_ISREG(mode):
            raise Halt(ExitCode.CANNOT_WRITE, f"{path / name} is not a regular file: move it away")


def _refuse_foreign(run: RunDir) -> None:
    """A run in somebody's folder would write over files that happen to have the names of ours."""
    path = run.path
    record = read_json(path / "run.json") or read_done(path) or {}
    if "stage" in record or _stage_of_config(path) is not None:
        return
    names = (*_FILES, *_MADE, "lora", *(f"{run.stage}{end}.safetensors" for end in ("", "-ema", "-lora", "-ema-lora")))
    found = [path / name for name in names if os.path.lexists(path / name)]
    taken = [file.name for file in found if not (file.name == "checkpoints" and _is_empty(file))]
    if taken:
        raise Halt(
            ExitCode.MISMATCH,
            f"output_dir {path} holds {', '.join(taken)} and is no run directory (no run.json of a stage): a run would "
            "write over that. Choose another output_dir, or move these away",
        )


def _is_empty(folder: Path) -> bool:
    """True for an empty folder, and for what is none: that is told when a checkpoint's folder is made."""
    return not folder.is_dir() or not any(folder.iterdir())


def _refuse_other_stage(run: RunDir) -> None:
    owner = (read_json(run.path / "run.json") or {}).get("stage") or _stage_of_config(run.path)
    used = any((run.path / name).exists() for name in ("DONE", "metrics.jsonl"))
    checkpoints = run.checkpoints
    used = used or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    if owner is not None and owner != run.stage and used:
        raise Halt(
            ExitCode.MISMATCH,
            f"output_dir {run.path} belongs to stage {owner!r}, this config is stage {run.stage!r}: "
            "give every stage its own output_dir",
        )


def _stage_of_config(path: Path) -> str | None:
    try:
        with open(path / "config.yaml", "rb") as file:
            text = file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"^stage:\s*['\"]?([^'\"\s#]+)", text, re.MULTILINE)
    return found.group(1) if found else None


def _identify(run: RunDir) -> None:
    """Read or make the run id. Retention deletes only checkpoints that carry it."""
    known = read_json(run.path / "run.json") or {}
    if known.get("stage") != run.stage or not re.fullmatch(r"[0-9a-f]{16}", str(known.get("run_id"))):
        known = {"run_id": secrets.token_hex(8), "stage": run.stage, "created": _now()}
        write_json(run.path / "run.json", known)
    run.run_id = str(known["run_id"])


def _remove_exits(path: Path) -> None:
    """exit.json and what it names speak of the previous start; a SIGKILL would leave them standing."""
    for old in path.iterdir():
        if re.fullmatch(r"exit(\.\d+)?\.json|flight_recorder\.\d+\.json|memory_snapshot\.\d+\.(json|pickle)", old.name):
            old.unlink()


def _lock(run: RunDir) -> None:
    """POSIX record lock, not flock: a data worker forked from a killed owner would keep a flock alive."""
    key = (os.getpid(), str(run.path))
    if key in _held:
        raise Halt(ExitCode.LOCKED, f"{run.path} is already open in this process (pid {key[0]})")
    fd = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(fd, 4096).decode("utf-8", "replace").strip()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(fd)
            raise Halt(
                ExitCode.LOCKED, f"{run.path} is in use by {holder or 'another process'}: one run per directory"
            ) from None
        if error.errno not in _NO_LOCKS:
            os.close(fd)
            raise
        print(
            f"warning: {run.path} lies on a file system without record locks; nothing keeps a second run out",
            file=sys.stderr,
        )
    run._lock_fd = fd
    _held.add(key)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"pid {os.getpid()} on host {socket.gethostname()}, since {_now()}\n".encode(), 0)


def _test_writable(path: Path) -> None:
    probe = path / ".writable.tmp"
    replace_file(probe, b"x" * 4096)
    probe.unlink()


def _count(attempts: Mapping[str, Any]) -> int:
    count = attempts.get("count")
    return count if isinstance(count, int) else 0


def _errno_text(error: OSError) -> str:
    return error.strerror or str(error)


def _stable(reason: str) -> str:
    """`reason` without what changes from one run to the next: secrets, addresses, process ids, how a loss was seen."""
    return re.sub(r"0x[0-9a-fA-F]+|\bpid \d+|\[[0-9a-fA-F.:]+\]:\d+| \(rank \d+ saw: .*", "*", mask(reason))[:500]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
