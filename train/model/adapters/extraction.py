"""The difference of two models as an adapter: a singular value decomposition per layer, one layer in memory at a time.

The best product of a rank (Eckart and Young 1936). Large matrices are decomposed in a random subspace (Halko, Martinsson,
Tropp, arXiv 0909.4061), drawn by a seed of their name, so that the same two models give the same file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from train.base.errors import ExitCode, Halt
from train.model.adapters import names
from train.model.adapters.layers import Layer
from train.model.adapters.names import Module
from train.model.source import LocalModel
from train.storage import state_files
from train.storage.tensor_files import Blob

OVERSAMPLED = 16  # columns beyond the rank in the random subspace
TURNS = 3  # power iterations: singular values that lie close are told apart
ALPHA = 16.0  # of layers of different ranks: stock diffusers reads one alpha a network of a file in kohya's names
LARGE = 8  # a side this many times the subspace is decomposed in it


@dataclass(frozen=True)
class Part:
    """How well a layer was met: squares of its difference, and of what is left of it."""

    module: str
    rank: int
    squares: float
    left: float

    @property
    def error(self) -> float:
        """|difference - product| / |difference|."""
        return math.sqrt(self.left / self.squares) if self.squares else 0.0


@dataclass
class Extracted:
    """Layers in their files' form, what each of them misses, and the tensors that no adapter of this kind reaches."""

    layers: dict[str, Layer] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    whole: int = 0  # norms and biases that go along as they are
    beyond: list[str] = field(default_factory=list)  # tensors that differ and go along in no form
    beyond_squares: float = 0.0

    @property
    def error(self) -> float:
        """Over all that was extracted, as of one layer."""
        squares = sum(part.squares for part in self.parts)
        return math.sqrt(sum(part.left for part in self.parts) / squares) if squares else 0.0

    @property
    def beyond_share(self) -> float:
        """Of the whole squared difference: what lies in tensors that no layer reaches."""
        whole = self.beyond_squares + sum(part.squares for part in self.parts)
        return self.beyond_squares / whole if whole else 0.0


def extract(
    model: LocalModel, base: LocalModel, *, rank: int | None = None, energy: float | None = None, rest: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Extracted:  # fmt: skip
    """Layers of `rank`, or of the least rank that holds `energy` of each layer's squared difference.

    Only the factors stay in memory. `rest`: norms, and biases of modules that get a layer, go along whole.
    Raises Halt: MISMATCH (two architectures, nothing differs, not finite), NON_FINITE (a factor too large for `dtype`).
    """
    shapes = [{n: b.shape for n, b in m.weights.items() if not n.startswith("vae.")} for m in (model, base)]
    if unlike := sorted(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n)):
        raise Halt(ExitCode.MISMATCH, f"{model.path} and {base.path} are of two architectures: {len(unlike)} tensors differ in shape, as {unlike[0]}")
    known = names.names_of(base.configs).modules
    found, alpha = Extracted(), float(rank or ALPHA)
    beside: dict[str, dict[str, torch.Tensor]] = {}  # vectors
    for name in sorted(shapes[0]):
        one, two = state_files.to_tensor(model.weights[name]), state_files.to_tensor(base.weights[name])
        narrow = model.weights[name].dtype
        if narrow != base.weights[name].dtype and torch.equal(two.to(state_files.DTYPES[narrow]).float(), one):
            continue  # what did not train lies rounded in a run's export
        difference = one.sub_(two)
        squares = float(difference.double().square_().sum())
        if not math.isfinite(squares):
            raise Halt(ExitCode.MISMATCH, f"{name} of {model.path} or {base.path} is not finite (NaN or infinity)")
        if squares == 0:
            continue
        place, _, leaf = name.rpartition(".")
        module = known.get(place) if not place.endswith("text_projection") else None  # programs disagree about its name
        if module is None or leaf != "weight" or len(module.shape) == 1:
            aside = rest and module is not None and (leaf == "bias" or len(module.shape) == 1)
            if aside:
                beside.setdefault(place, {})["bias" if leaf == "bias" else "diff"] = difference
            if not aside:
                found.beyond.append(name)
                found.beyond_squares += squares
            continue
        up, down = factors(difference.flatten(1), rank=rank, energy=energy, name=name)
        evened = math.sqrt(up.shape[1] / alpha)  # on both, for the scale alpha / rank that readers apply
        found.parts.append(Part(module.name, up.shape[1], squares, _left(difference.flatten(1), up, down)))
        found.layers[module.name] = Layer(
            "lora", {"down": _blob(down * evened, dtype, name), "up": _blob(up * evened, dtype, name)}, alpha, module.shape
        )
    _take_along(found, beside, known, dtype)
    if not found.layers:
        raise Halt(ExitCode.MISMATCH, f"{model.path} and {base.path} do not differ in any layer that an adapter reaches")
    return found


def _take_along(
    found: Extracted, beside: Mapping[str, Mapping[str, torch.Tensor]], known: Mapping[str, Module], dtype: torch.dtype
) -> None:
    """Norms as layers of their own, weight and bias together as programs want them; biases beside the layer of their module."""
    for place, parts in beside.items():
        module, layer = known[place], found.layers.get(place)
        if len(module.shape) == 1:
            both = {"diff": torch.zeros(module.shape), **({"bias": torch.zeros(module.shape)} if module.bias else {}), **parts}
            found.layers[place] = Layer("full", {part: _blob(value, dtype, place) for part, value in both.items()}, None, module.shape)
            found.whole += len(parts)
        elif layer is not None:
            found.layers[place] = replace(layer, parts={**layer.parts, "bias": _blob(parts["bias"], dtype, place)})
            found.whole += 1
        else:
            found.beyond.append(f"{place}.bias")
            found.beyond_squares += float(parts["bias"].double().square().sum())


def factors(matrix_OI: torch.Tensor, *, rank: int | None, energy: float | None, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [O, R], down [R, I]), the singular values divided evenly between them."""
    most = min(matrix_OI.shape)
    if rank is not None and LARGE * (rank + OVERSAMPLED) < most:
        u, s, v = _in_subspace(matrix_OI, rank + OVERSAMPLED, name)
    else:
        u, s, v = torch.linalg.svd(matrix_OI, full_matrices=False)
    kept = min(rank, most) if rank is not None else _holding(s, energy or 1.0)
    root = s[:kept].clamp(min=0).sqrt()
    return u[:, :kept] * root, root[:, None] * v[:kept]


def _holding(values: torch.Tensor, energy: float) -> int:
    """How many of the largest singular values hold that share of all squares."""
    shares = values.double().square().cumsum(0)
    return int((shares < energy * shares[-1] * (1 - 1e-12)).sum()) + 1


def _in_subspace(matrix_OI: torch.Tensor, width: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    basis = torch.linalg.qr(matrix_OI @ torch.randn(matrix_OI.shape[1], width, generator=generator)).Q
    for _ in range(TURNS):
        basis = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix_OI, full_matrices=False)
    return basis @ u, s, v


def _left(matrix_OI: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """Squares of what the product misses."""
    return float(torch.addmm(matrix_OI, up, down, alpha=-1).double().square_().sum())


def _blob(values: torch.Tensor, dtype: torch.dtype, name: str) -> Blob:
    stored = values.to(dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise Halt(ExitCode.NON_FINITE, f"{name} has factors too large for fp16: use --dtype fp32")
    data = memoryview(stored.reshape(-1).view(torch.uint8).numpy().data)
    return Blob(state_files.DTYPE_NAMES[dtype], tuple(stored.shape), lambda: iter([data]))


def total_values(layers: Mapping[str, Layer]) -> int:
    """Numbers that an adapter stores."""
    return sum(layer.values for layer in layers.values())


def refuse_options(rank: int | None, energy: float | None) -> None:
    """Halt(USAGE) unless exactly one of them is given, in its range."""
    if (rank is None) == (energy is None):
        raise Halt(ExitCode.USAGE, "give --rank N or --energy SHARE (for example 0.95), one of them")
    if rank is not None and not 1 <= rank <= 4096:
        raise Halt(ExitCode.USAGE, f"--rank {rank} is not between 1 and 4096")
    if energy is not None and not 0 < energy <= 1:
        raise Halt(ExitCode.USAGE, f"--energy {energy} is not above 0 and at most 1")
