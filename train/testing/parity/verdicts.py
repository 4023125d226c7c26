"""Rows of the parity table: what was compared, how far it may be apart and why, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Verdict = Literal["equal", "known", "DIFFERENT", "not run"]


@dataclass(frozen=True)
class Row:
    """One comparison. `reason` says where the tolerance comes from or, of a known difference, what is documented."""

    name: str
    verdict: Verdict
    measured: str
    tolerance: str
    reason: str


@dataclass(frozen=True)
class Known:
    """A difference that is documented: up to `most` it is no surprise."""

    most: float
    reason: str


def row(
    name: str, difference: float, tolerance: float, reason: str, *, known: Known | None = None, note: str = ""
) -> Row:
    """The verdict on a measured difference (0 = the same bits); not a number counts as different."""
    measured = f"{difference:.3g}" + (f"; {note}" if note else "")
    if difference <= tolerance:
        return Row(name, "equal", measured, _said(tolerance), reason)
    if known is not None and difference <= known.most:
        return Row(name, "known", measured, f"{_said(tolerance)}, known up to {known.most:g}", known.reason)
    return Row(name, "DIFFERENT", measured, _said(tolerance), reason)


def counted(name: str, wrong: Sequence[object], total: int, reason: str, *, known: str | None = None) -> Row:
    """The verdict on things that must be the same one by one. `known` names what is documented of those that are not."""
    measured = f"{total - len(wrong):,} of {total:,} the same" + (f"; first: {wrong[0]}" if wrong else "")
    if not wrong:
        return Row(name, "equal", measured, "none", reason)
    return Row(name, "known" if known else "DIFFERENT", measured, "none", known or reason)


def not_run(name: str, why: str) -> Row:
    """A comparison that this checkout, environment or size does not allow."""
    return Row(name, "not run", "", "", why)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| over all values in float64; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    size = float(theirs.double().norm())
    distance = float((ours.double() - theirs.double()).norm())
    return distance / size if size else distance


def farthest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0


def _said(tolerance: float) -> str:
    return f"{tolerance:g}" if tolerance else "the same bits"
