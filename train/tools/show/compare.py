"""How far two models lie apart, block by block; with a base, how far and in which direction each moved from it.

Tensor by tensor, in fp32 with sums in float64: two models in their own files need the memory of their largest tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.base.errors import ExitCode, Halt
from train.model.other_kinds import some
from train.model.source import LocalModel
from train.observe import anymodel
from train.storage import tensor_files

F32 = npt.NDArray[np.float32]
CHUNK = 1 << 20  # values summed at once
DIGITS = 8  # that are shown


@dataclass
class Sums:
    """Over the values of a block: x and y are those of A and B, or what they are away from the base."""

    values: int = 0
    tensors: int = 0
    equal: int = 0  # tensors
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    apart: float = 0.0  # (x - y)^2
    base: float = 0.0  # of the base's values

    def add(self, x: F32, y: F32, base: F32 | None) -> None:
        """One tensor more."""
        self.tensors += 1
        self.values += x.size
        self.equal += bool(np.array_equal(x, y))
        for at in range(0, x.size, CHUNK):
            a, b = (part[at : at + CHUNK].astype(np.float64) for part in (x, y))
            if base is not None:
                c = base[at : at + CHUNK].astype(np.float64)
                self.base += float(c @ c)
                a -= c
                b -= c
            self.xx += float(a @ a)
            self.yy += float(b @ b)
            self.xy += float(a @ b)
            a -= b
            self.apart += float(a @ a)

    def join(self, other: Sums) -> None:
        """The same over both."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def told(self, with_base: bool) -> dict[str, Any]:
        """The numbers of a block; None where one has no meaning, because nothing moved."""
        moved = {"a_moved": _share(self.xx, self.base), "b_moved": _share(self.yy, self.base)} if with_base else {}
        both = math.sqrt(self.xx) * math.sqrt(self.yy)
        return {
            **moved,
            "distance": _share(self.apart, self.yy),
            "cosine": _shown(min(max(self.xy / both, -1.0), 1.0)) if both else None,
            **({"equal": f"{self.equal} of {self.tensors}"} if self.equal else {}),
        }


def report(a: Path, b: Path, base: Path | None = None) -> dict[str, Any]:
    """distance = |A - B| / |B| and cosine of A and B, of every network and block of networks; with a base of A - base
    and B - base, beside how far each moved from it relative to its size.

    Any of them a run, checkpoint, folder or single file. Raises Halt: USAGE (no such path), MISMATCH (other
    architectures, not finite; names the tensors).
    """
    models = [anymodel.open_any(path, hashed=False) for path in (a, b, *([base] if base else []))]
    _refuse_unlike(models)
    networks: dict[str, Sums] = {}
    blocks: dict[str, Sums] = {}
    for name in models[0].weights:
        x, y, *rest = (_values(model, name) for model in models)
        sums = Sums()
        sums.add(x, y, rest[0] if rest else None)
        blocks.setdefault(block_of(name), Sums()).join(sums)
        networks.setdefault(name.partition(".")[0], Sums()).join(sums)
    return {
        "a": str(a),
        "b": str(b),
        **({"base": str(base)} if base else {}),
        "reads": (
            "a_moved = |A - base| / |base|, b_moved likewise; distance and cosine of what each is away from the base"
            if base else "distance = |A - B| / |B|; cosine of all values"
        ),
        "networks": {name: sums.told(bool(base)) for name, sums in networks.items()},
        "blocks": {name: blocks[name].told(bool(base)) for name in sorted(blocks, key=_numbers_as_numbers)},
    }  # fmt: skip


def block_of(name: str) -> str:
    """`unet.down_blocks.1.attentions.0` of a tensor in there, `text_encoder.layers.3`, `unet.conv_in`."""
    network, *parts = name.split(".")[:-1]
    parts = [part for part in parts if part != "text_model"]
    if network.startswith("text") and parts[0] == "encoder":
        parts = parts[1:]
    kept: list[str] = []
    for _ in range(1 if network.startswith("text") else 2):
        kept += parts[:1]
        parts = parts[1:]
        if parts and parts[0].isdecimal():
            kept.append(parts.pop(0))
    return ".".join((network, *kept))


def _numbers_as_numbers(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _values(model: LocalModel, name: str) -> F32:
    """All values of a tensor, in a row."""
    values = np.frombuffer(tensor_files.cast(model.weights[name], "F32", name).read(), dtype=np.float32)
    if not np.isfinite(values).all():
        raise Halt(ExitCode.MISMATCH, f"{model.path}: {tensor_files.named(name, model.weights[name])} is not finite")
    return values


def _refuse_unlike(models: Sequence[LocalModel]) -> None:
    shapes = [{name: blob.shape for name, blob in model.weights.items()} for model in models]
    for model, other in zip(models[1:], shapes[1:], strict=True):
        unlike = sorted(name for name in {*shapes[0], *other} if shapes[0].get(name) != other.get(name))
        if unlike:
            raise Halt(
                ExitCode.MISMATCH, f"{models[0].path} and {model.path} are of two architectures: {len(unlike)} tensors differ in shape, {some(unlike)}"
            )


def _share(part: float, whole: float) -> float | None:
    return _shown(math.sqrt(part) / math.sqrt(whole)) if whole else None


def _shown(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
