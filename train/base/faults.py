"""Faults on demand, for tests: inert unless the environment variable ANIX_FAULT is set. Standard library only.

    ANIX_FAULT="point@step[:rank][:action[=x]]"      several joined by ";"

step and rank may be `*` (always; rank absent = every rank). A number after the step is the rank, a word the
action. Without an action a RuntimeError is raised. Examples: `loss@7:1:nan`, `save.write@*:enospc`,
`forward@8:*:raise=KeyError`, `worker@3:sleep=0.5`. At `loss` the values of nan, inf and scale are the losses, at
`backward` the gradients behind finite losses; what can never be due at a point is refused. At `encode_vae` and `predict` (a
scorer or tagger of a preparation) the step is the number of pictures in the batch: `encode_vae@8:oom`.
"""

from __future__ import annotations

import builtins
import errno
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from train.base.errors import ExitCode, Halt

VARIABLE = "ANIX_FAULT"
POINTS = (
    "read", "worker", "forward", "loss", "backward", "reduce", "control", "clip", "optimizer",
    "save.begin", "save.write", "save.fsync", "save.manifest", "save.rename", "retention", "snapshot",
    "sample", "encode_vae", "predict", "encode_text", "export", "handoff", "track", "upload",
)  # fmt: skip
ACTIONS = (
    "raise", "kill", "term", "exit", "sleep", "hang", "nan", "inf", "scale", "skip", "oom", "enospc", "eio",
)  # fmt: skip
# What can be due at some points only; everywhere else it would silently do nothing.
_POINTS_OF = {
    "nan": ("loss", "backward"), "inf": ("loss", "backward"), "scale": ("loss", "backward"), "skip": ("reduce", "control"),
}  # fmt: skip
_WITHOUT_STEP = ("encode_text", "export", "handoff")  # so only `*` can be meant
_WITH_NUMBER = {"exit": "1", "sleep": "1", "scale": "100"}  # action: value when none is given


@dataclass(frozen=True)
class Fault:
    """One injected fault; None for step or rank = always."""

    point: str
    step: int | None
    rank: int | None
    action: str
    value: str

    def matches(self, point: str, step: int | None, rank: int) -> bool:
        """Whether this fault is due at `point` of plan step `step` on `rank`."""
        return self.point == point and self.step in (None, step) and self.rank in (None, rank)


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that `text` asks for. Raises Halt(USAGE) naming the part that is not understood."""
    return tuple(_parse_one(part.strip()) for part in text.split(";") if part.strip())


def at(point: str, step: int | None = None, rank: int | None = None) -> Fault | None:
    """Do what is due here: raise, die, sleep, hang. Actions on values (nan, inf, scale, skip) are returned.

    `step` is the plan step, `rank` defaults to the environment's RANK. Costs one dictionary look-up when off.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    here = int(os.environ.get("RANK", "0")) if rank is None else rank
    for fault in _parsed(text):
        if fault.matches(point, step, here):
            if fault.action in ("nan", "inf", "scale", "skip"):
                return fault
            _act(fault)
    return None


def bend(point: str, value: Any, step: int | None = None, rank: int | None = None) -> Any:
    """`value` (a number or tensor), or what a nan, inf or scale fault due here makes of it."""
    fault = at(point, step, rank)
    if fault is None or fault.action == "skip":
        return value
    factor = {"nan": float("nan"), "inf": float("inf")}.get(fault.action)
    return value * (float(fault.value) if factor is None else factor)


def skips(point: str, step: int | None = None, rank: int | None = None) -> bool:
    """Whether the caller shall leave out what it was about to do here."""
    fault = at(point, step, rank)
    return fault is not None and fault.action == "skip"


def warn_if_set() -> None:
    """One line on stderr when faults are armed, so that no real run carries them unnoticed."""
    text = os.environ.get(VARIABLE)
    if text:
        print(f"WARNING: {VARIABLE} is set, {len(_parsed(text))} faults will be injected", file=sys.stderr)


@lru_cache(maxsize=8)
def _parsed(text: str) -> tuple[Fault, ...]:
    return parse(text)


def _parse_one(part: str) -> Fault:
    point, at_sign, rest = part.partition("@")
    if not at_sign or point not in POINTS:
        raise Halt(ExitCode.USAGE, f"{VARIABLE}: {part!r} needs point@step with a point of: {' '.join(POINTS)}")
    step_text, *more = rest.split(":")
    rank_text = more.pop(0) if more and (more[0] == "*" or more[0].isdigit()) else "*"
    action, _, value = (more.pop(0) if more else "raise").partition("=")
    if more or action not in ACTIONS:
        raise Halt(ExitCode.USAGE, f"{VARIABLE}: {part!r}: the action must be one of {' '.join(ACTIONS)}")
    if action in _POINTS_OF and point not in _POINTS_OF[action]:
        possible = " and ".join(_POINTS_OF[action])
        raise Halt(ExitCode.USAGE, f"{VARIABLE}: {part!r}: {action} is possible at {possible} only, not at {point}")
    if step_text != "*" and not re.fullmatch(r"-?[0-9]+", step_text):
        raise Halt(ExitCode.USAGE, f"{VARIABLE}: {part!r}: the step must be a whole number or *")
    if step_text != "*" and point in _WITHOUT_STEP:
        raise Halt(ExitCode.USAGE, f"{VARIABLE}: {part!r}: {point} belongs to no step, so the step must be *")
    value = value or _WITH_NUMBER.get(action, "")
    if action in _WITH_NUMBER:
        try:
            if not (action == "scale" or 0 <= float(value) < 1e9):
                raise ValueError
            float(value)
        except ValueError:
            raise Halt(ExitCode.USAGE, f"{VARIABLE}: {part!r}: {action}= needs a number") from None
    return Fault(
        point, None if step_text == "*" else int(step_text), None if rank_text == "*" else int(rank_text),
        action, value,
    )  # fmt: skip


def _act(fault: Fault) -> None:
    where = f"injected at {fault.point}"
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(int(float(fault.value)))
        case "sleep":
            time.sleep(float(fault.value))
        case "hang":
            while True:
                time.sleep(3600)
        case "oom":
            torch = sys.modules.get("torch")  # this file must not import it
            raise getattr(torch, "OutOfMemoryError", MemoryError)(f"out of memory, {where}")
        case "enospc":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {where}")
        case "eio":
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}, {where}")
        case _:
            kind = getattr(builtins, fault.value or "RuntimeError", None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = RuntimeError
            raise kind(where)
