"""Checkpoints: written beside their final name, committed by one rename, proved before they are read.

`checkpoints/step-00012000/` holds `model.safetensors`, `optimizer.safetensors`, with EMA `ema.safetensors`,
`state.json` and `manifest.json`; 12000 is the number of plan steps done, so the next step is 12000.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.files import free_bytes, fsync_dir, replace_file, write_all
from train.config.stage import CheckpointConfig
from train.storage import manifest, resume, state_files
from train.storage.manifest import Damaged, FileRecord, Manifest, committed
from train.storage.rundir import RunDir
from train.storage.space import SPACE_FACTOR, gb

STATE_SCHEMA = 1
_DISK_POLL_S = 0.5  # with on_full_disk: wait
_DISK_WARN_S = 60.0
STATE_LIMIT_BYTES = 8 << 20  # 10 kB and 20 bytes per restart are usual


@dataclass(frozen=True)
class Progress:
    """Where a run stands. The plan step alone decides the position, the applied updates alone the LR."""

    step: int = 0  # plan steps done
    updates: int = 0  # of these, applied to the weights
    skipped: int = 0  # of these, left out because fp16 gradients overflowed
    images: int = 0  # seen


class SaveFailed(OSError):
    """This checkpoint could not be written; older ones are untouched and training may go on."""


Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # {"model": {...}, "optimizer": {...}, maybe "ema": {...}}


# --- saving ------------------------------------------------------------------------------------------


def save(
    run: RunDir,
    progress: Progress,
    tensors: Tensors,
    state: Mapping[str, Any],
    settings: CheckpointConfig,
    *,
    permanent: bool = False,
    give_up: Callable[[], bool] = lambda: False,
) -> Path:
    """Write and commit `step-<progress.step>`, then remove what is no longer kept; its path.

    A sound checkpoint of that step of this run is left as it is. Raises SaveFailed (nothing of it remains),
    or Halt(CANNOT_WRITE) with `on_full_disk: stop`. `give_up` ends the waiting of `on_full_disk: wait`.
    """
    target = run.checkpoints / f"step-{progress.step:08d}"
    tmp = target.with_name(target.name + ".tmp")
    try:
        faults.at("save.begin", progress.step)
        in_the_way = os.path.lexists(target)
        if in_the_way and _is_ours_and_sound(run, target):
            _set_permanent(target, permanent)
            return target
        shutil.rmtree(tmp, ignore_errors=True)
        require_space(run.checkpoints, checkpoint_bytes(tensors), settings, progress.step, give_up)
        _write_folder(tmp, run, progress, tensors, state, permanent)
        if in_the_way:  # damaged: we fell back past it and have come here again
            _discard(target)
            run.damaged.discard(target.name)
        faults.at("save.rename", progress.step)
        os.rename(tmp, target)  # the commit
        fsync_dir(run.checkpoints)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise SaveFailed(error.errno, f"checkpoint {target.name} not written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    try:
        retain(run, settings.keep, progress.step)
    except OSError as error:
        print(f"warning: old checkpoints not removed: {error}", file=sys.stderr)
    return target


def require_space(
    folder: Path, one_bytes: int, settings: CheckpointConfig, step: int, give_up: Callable[[], bool]
) -> None:
    """Return once a checkpoint of that size has room; what happens without is `checkpoint.on_full_disk`.

    Raises OSError(ENOSPC) (skip, or `give_up` while waiting) or Halt(CANNOT_WRITE) (stop).
    """
    need = int(one_bytes * SPACE_FACTOR)
    warned_at = float("-inf")
    while (have := free_bytes(folder)) < need:
        text = f"checkpoint step-{step:08d} needs {gb(need)}, the disk has {gb(have)}; nothing old is deleted for it"
        if settings.on_full_disk == "stop":
            raise Halt(ExitCode.CANNOT_WRITE, text)
        if settings.on_full_disk == "skip" or give_up():
            raise OSError(errno.ENOSPC, text)
        if time.monotonic() - warned_at > _DISK_WARN_S:
            print(f"warning: {text}; waiting for space", file=sys.stderr)
            warned_at = time.monotonic()
        time.sleep(_DISK_POLL_S)


def ends_when_full(settings: CheckpointConfig) -> bool:
    """Whether a file that finds no room ends the run."""
    return settings.on_full_disk == "stop"


def retain(run: RunDir, keep: int, newest: int) -> list[int]:
    """Delete this run's checkpoints up to step `newest` but the last `keep` and the permanent ones; the steps.

    Directories of other runs, those whose manifest is damaged, and those found damaged at the start are not touched.
    """
    own = [(step, path, m.permanent) for step, path, m in committed(run.checkpoints)
           if step <= newest and m.run_id == run.run_id and path.name not in run.damaged]  # fmt: skip
    victims = [(step, path) for step, path, permanent in sorted(own)[:-keep] if not permanent]
    for _step, path in victims:
        faults.at("retention", newest)
        _discard(path)
    return [step for step, _ in victims]


def checkpoint_bytes(tensors: Tensors) -> int:
    """Exact bytes of the tensor files of one checkpoint, from metadata alone."""
    return sum(state_files.file_bytes(group) for group in tensors.values())


# --- loading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint. `problems` are the reasons why newer ones were passed over."""

    path: Path
    progress: Progress
    state: Mapping[str, Any]
    manifest: Manifest
    comparison: resume.Comparison = field(default_factory=resume.Comparison)
    problems: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the tensor files, such as ("model", "optimizer")."""
        return tuple(sorted(n.removesuffix(".safetensors") for n in self.manifest.files if n.endswith(".safetensors")))

    def stream(self, group: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, host tensor) one after the other, so that a large state needs no second copy."""
        return state_files.read(self.path / f"{group}.safetensors")

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """All tensors of a group, on the host."""
        return dict(self.stream(group))


def load_newest(run: RunDir, expectations: resume.Expectations, *, verify: str = "full") -> Loaded | None:
    """The newest sound checkpoint, or None when the run never wrote one.

    Raises Halt: NO_CHECKPOINT when some exist and none is sound (with every reason), MISMATCH when the newest
    sound one was written under settings that must not change.
    """
    # Half-written and half-deleted ones have never been, or are no more: they go when the run begins.
    names = (e for e in os.listdir(run.checkpoints) if not e.startswith(".") and not e.endswith((".tmp", ".del")))
    entries = sorted(names, key=_newest_first)
    if run.look_up_to is not None:
        entries = [e for e in entries if (step := manifest.step_of(e)) is not None and step <= run.look_up_to]
    problems: list[str] = []
    for name in entries:
        try:
            loaded = open_checkpoint(run.checkpoints / name, verify=verify)
        except Damaged as damage:
            problems.append(f"{name}: {damage}")
            run.damaged.add(name)
            print(f"warning: checkpoint {problems[-1]}; trying an older one", file=sys.stderr)
            continue
        comparison = _compare(loaded, expectations)
        return replace(loaded, comparison=comparison, problems=tuple(problems))
    if problems:
        raise Halt(
            ExitCode.NO_CHECKPOINT,
            f"{run.checkpoints}: no checkpoint is usable, and starting over is not done silently:\n  "
            + "\n  ".join(problems) + "\nRestore one from a copy, or choose another output_dir",
        )  # fmt: skip
    return None


def open_checkpoint(path: Path, *, verify: str = "full") -> Loaded:
    """One checkpoint directory, verified by itself. Raises Damaged."""
    if manifest.step_of(path.name) is None:
        raise Damaged("not a checkpoint: the name is not step-NNNNNNNN")
    found = manifest.verify(path, full=verify == "full")
    try:
        if found.files["state.json"].bytes > STATE_LIMIT_BYTES:
            raise Damaged(f"state.json: larger than {STATE_LIMIT_BYTES >> 20} MiB")
        state = json.loads((path / "state.json").read_bytes(), parse_constant=_refuse_constant)
        if state["schema_version"] != STATE_SCHEMA:
            raise Damaged(f"state.json: schema version {state['schema_version']}, known is {STATE_SCHEMA}")
        progress = _progress_of(state, found.step)
    except Damaged:
        raise
    except Exception as error:  # readers have many ways to refuse damage
        raise Damaged(f"state.json: cannot be read ({type(error).__name__}: {error})") from error
    for name, record in found.files.items():
        if name.endswith(".safetensors") and _count_tensors(path / name) != record.tensors:
            raise Damaged(f"{name}: other tensors than the manifest counts")
    return Loaded(path, progress, state, found)


def _progress_of(state: Mapping[str, Any], step: int) -> Progress:
    """The counters of a state.json whose parts are what a resume takes them for. Raises Damaged, KeyError."""
    counts = {key: state[key] for key in ("step", "updates", "skipped", "images")}
    if any(type(count) is not int or count < 0 for count in counts.values()):  # bool is an int to Python
        raise Damaged(f"state.json: {str(counts)[:200]} are no counts")
    if counts["step"] != step:
        raise Damaged(f"state.json is that of step {counts['step']}")
    if counts["updates"] + counts["skipped"] != counts["step"]:
        raise Damaged("state.json: updates and skipped ones do not add up to its step")
    for key in ("config", "held", "facts", "notes", "history"):
        if not isinstance(state.get(key, [] if key == "history" else {}), list if key == "history" else dict):
            raise Damaged(f"state.json: {key} is {str(state[key])[:100]}")
    return Progress(**counts)


def _count_tensors(path: Path) -> int:
    try:
        return len(state_files.read_specs(path))
    except Exception as error:  # the library's own kind, and KeyError for a dtype that is not ours
        raise Damaged(f"{path.name}: cannot be read ({type(error).__name__}: {error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"state.json holds {name}, which is no JSON")


def of_step(run_path: Path, step: int) -> Loaded:
    """The checkpoint of that step, for the stage's end. Raises Halt(MISMATCH) when it is damaged or gone."""
    path = run_path / "checkpoints" / f"step-{step:08d}"
    try:
        return open_checkpoint(path)
    except (Damaged, OSError) as damage:
        raise Halt(ExitCode.MISMATCH, f"{path} cannot be read: {damage}") from damage


# --- parts of saving ---------------------------------------------------------------------------------


def _write_folder(
    tmp: Path, run: RunDir, progress: Progress, tensors: Tensors, state: Mapping[str, Any], permanent: bool
) -> None:
    os.mkdir(tmp)
    files: dict[str, FileRecord] = {}
    for group, named in tensors.items():
        files[f"{group}.safetensors"] = state_files.write(tmp / f"{group}.safetensors", named, step=progress.step)
    record = {**state, "schema_version": STATE_SCHEMA, **asdict(progress)}
    text = json.dumps(record, indent=1, allow_nan=False).encode("utf-8")
    files["state.json"] = FileRecord(len(text), hashlib.sha256(text).hexdigest(), 0)
    _write_synced(tmp / "state.json", text)
    faults.at("save.manifest", progress.step)
    _write_synced(tmp / manifest.NAME, manifest.encode(Manifest(run.run_id, progress.step, permanent, files)))
    fsync_dir(tmp)


def _write_synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_ours_and_sound(run: RunDir, path: Path) -> bool:
    try:
        return manifest.verify(path).run_id == run.run_id
    except Damaged:
        return False


def _set_permanent(path: Path, permanent: bool) -> None:
    found = manifest.read(path)
    if permanent and not found.permanent:
        # Through the parent directory: a tmp inside would be an extra file if we are killed here.
        tmp = path.with_name(path.name + ".manifest.tmp")
        replace_file(tmp, manifest.encode(replace(found, permanent=True)))
        os.rename(tmp, path / manifest.NAME)
        fsync_dir(path)


def _discard(path: Path) -> None:
    """Rename, then delete: a half-deleted checkpoint never carries a checkpoint's name."""
    doomed = path.with_name(path.name + ".del")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    if doomed.is_dir():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


# --- parts of loading --------------------------------------------------------------------------------


def _compare(loaded: Loaded, now: resume.Expectations) -> resume.Comparison:
    comparison = resume.compare(loaded.state, now)
    saved = {group: state_files.read_specs(loaded.path / f"{group}.safetensors") for group in loaded.groups}
    shapes = resume.tensor_differences(saved, now.tensors) if now.tensors else []
    if comparison.refused or shapes:
        lines = [comparison.table(), *(f"  refuse    {line}" for line in shapes)]
        raise Halt(
            ExitCode.MISMATCH,
            f"{loaded.path} is sound but belongs to another run:\n" + "\n".join(filter(None, lines))
            + "\nRestore these settings, choose another output_dir, or name what you accept in resume.accept",
        )  # fmt: skip
    return comparison


def _newest_first(name: str) -> tuple[int, str]:
    step = manifest.step_of(name)
    return (1 if step is None else -step, name)
