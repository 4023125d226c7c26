"""One module's part of an adapter, and what it adds to the weight: LoRA and DoRA, LoHa, LoKr, or the whole difference.

Sources: LoRA arXiv 2106.09685 (W + alpha/r BA), DoRA 2402.09353 (m (W + alpha/r BA) / ||W + alpha/r BA||), LoHa and LoKr
2309.14859 (LyCORIS). A missing alpha is the rank: a scale of 1, as every reader takes it.
Shapes: O outputs, I inputs, K the sides of a kernel, R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from train.storage import tensor_files
from train.storage.state_files import to_tensor
from train.storage.tensor_files import Blob

# What a kind must have, and what it may have beside; lokr is judged by `_problem_of_lokr`.
_NEEDS = {"lora": {"down", "up"}, "loha": {"w1_a", "w1_b", "w2_a", "w2_b"}, "lokr": set[str](), "full": set[str]()}
_MAY = {
    "lora": {"mid", "dora", "bias"}, "loha": {"t1", "t2", "dora", "bias"}, "full": {"diff", "bias"},
    "lokr": {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "dora", "bias"},
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What an adapter holds for one module, not read yet. `alpha`: None where the file says none."""

    kind: str  # lora, loha, lokr, full; with any of them a part "bias", the whole difference of the module's bias
    parts: Mapping[str, Blob]
    alpha: float | None
    shape: tuple[int, ...]  # of the weight it is added to: [O, I] or [O, I, K, K], of a norm [O]

    @property
    def rank(self) -> int:
        """The inner width; 0 where nothing is factored."""
        inner = next((part for part in ("down", "w2_b", "w1_b") if part in self.parts), None)
        return self.parts[inner].shape[0] if inner is not None and self.parts[inner].shape else 0

    @property
    def scale(self) -> float:
        """What the product is multiplied with: alpha / rank."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def weighs(self) -> bool:
        """Whether it changes the weight, and not the bias alone."""
        return bool(self.parts.keys() - {"bias"})

    @property
    def by_input(self) -> bool:
        """Whether a DoRA scale measures columns, as OneTrainer's and older LyCORIS' do: [1, I, ...], in readers' own rule by its first side alone.

        peft's magnitude of a convolution has such a shape too and measures rows: who reads one makes it a vector (`as_vector`).
        """
        scale = self.parts["dora"].shape if "dora" in self.parts else ()
        return len(scale) > 1 and scale[0] == 1 != self.shape[0] and math.prod(scale) == self.shape[1]

    @property
    def values(self) -> int:
        """Numbers that are stored."""
        return sum(math.prod(blob.shape) for blob in self.parts.values())


def as_vector(blob: Blob) -> Blob:
    """A magnitude that measures rows, whatever sides of 1 it is stored with."""
    return tensor_files.reshaped(blob, (math.prod(blob.shape),))


def problem(layer: Layer) -> str | None:
    """What is wrong with a layer by its parts and shapes alone; None for a sound one."""
    have = set(layer.parts)
    if lacking := _NEEDS[layer.kind] - have:
        return f"a {layer.kind} without {', '.join(sorted(lacking))}"
    if foreign := have - _NEEDS[layer.kind] - _MAY[layer.kind]:
        return f"a {layer.kind} with {', '.join(sorted(foreign))}"
    if any(math.prod(blob.shape) == 0 for blob in layer.parts.values()):
        return "an empty tensor"
    if layer.alpha is not None and not (math.isfinite(layer.alpha) and abs(layer.alpha) < 1e6):
        return f"alpha {layer.alpha}"
    shapes = {part: blob.shape for part, blob in layer.parts.items()}
    if len(layer.shape) == 1 and layer.kind != "full":
        return f"a {layer.kind} of a norm"
    if "bias" in shapes and shapes["bias"] != layer.shape[:1]:
        return f"a difference {list(shapes['bias'])} for a bias of {list(layer.shape[:1])}"
    checks = {"lora": _problem_of_lora, "loha": _problem_of_loha, "lokr": _problem_of_lokr, "full": _problem_of_full}
    return checks[layer.kind](shapes, layer.shape) or _problem_of_dora(shapes, layer.shape)


Shapes = Mapping[str, tuple[int, ...]]


def _problem_of_lora(shapes: Shapes, weight: tuple[int, ...]) -> str | None:
    down, up, outputs, inputs = shapes["down"], shapes["up"], weight[0], math.prod(weight[1:])
    rank = down[0]
    if "mid" in shapes:  # a kernel between two matrices (Tucker)
        fits = shapes["mid"] == (rank, rank, *weight[2:]) and math.prod(down) == rank * weight[1] and len(weight) == 4
    else:
        fits = down[1:] == (inputs,) or _sides(down[1:]) == _sides(weight[1:])
    if not fits or up[0] != outputs or math.prod(up) != outputs * (up[1] if len(up) > 1 else 1) or up[1:2] != (rank,):
        return f"{list(down)} and {list(up)} make no {list(weight)}"
    return None


def _sides(shape: tuple[int, ...]) -> list[int]:
    return [side for side in shape if side != 1]


def _problem_of_loha(shapes: Shapes, weight: tuple[int, ...]) -> str | None:
    tucker = {"t1", "t2"} & set(shapes)
    if len(tucker) == 1:
        return "one of t1 and t2 alone"
    for a, b, t in (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2")):
        first, second = shapes[a], shapes[b]
        if len(first) != 2 or len(second) != 2:
            return f"{a} {list(first)} and {b} {list(second)} are no matrices"
        if tucker:  # t: [R, R, K, K]; a: [R, O]; b: [R, I]
            fits = shapes[t] == (first[0], second[0], *weight[2:]) and (first[1], second[1]) == weight[:2] and len(weight) == 4
        else:
            fits = first[1] == second[0] and first[0] == weight[0] and second[1] == math.prod(weight[1:])
        if not fits:
            return f"{a} {list(first)} and {b} {list(second)} make no {list(weight)}"
    return None


def _problem_of_lokr(shapes: Shapes, weight: tuple[int, ...]) -> str | None:
    sides: list[tuple[int, ...]] = []
    for name in ("w1", "w2"):
        whole, pair = name in shapes, {f"{name}_a", f"{name}_b"} & set(shapes)
        if whole == bool(pair) or len(pair) == 1:
            return f"a lokr needs {name}, or both {name}_a and {name}_b"
        if whole:
            sides.append(shapes[name])
        elif name == "w2" and "t2" in shapes:  # t2: [R, R, K, K]; a: [R, O]; b: [R, I]
            a, b = shapes["w2_a"], shapes["w2_b"]
            if len(a) != 2 or len(b) != 2 or shapes["t2"][:2] != (a[0], b[0]) or len(shapes["t2"]) != 4:
                return f"t2 {list(shapes['t2'])} does not go with w2_a {list(a)} and w2_b {list(b)}"
            sides.append((a[1], b[1], *shapes["t2"][2:]))
        else:
            a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
            if len(a) < 2 or len(b) < 2 or len(a) > 2 or a[1] != b[0]:
                return f"{name}_a {list(a)} and {name}_b {list(b)} are no product"
            sides.append((a[0], *b[1:]))
    if "t2" in shapes and "w2" in shapes:
        return "t2 beside a whole w2"
    (one, two) = sides
    wanted = weight[0], math.prod(weight[1:])
    if len(one) != 2 or len(two) < 2 or (one[0] * two[0], one[1] * math.prod(two[1:])) != wanted:
        return f"{list(one)} and {list(two)} make no {list(weight)}"
    if len(weight) == 4 and two[1] * one[1] != weight[1] and (len(two) != 2 or two[1] % math.prod(weight[2:])):
        return f"{list(one)} and {list(two)} make no {list(weight)}"
    return None


def _problem_of_full(shapes: Shapes, weight: tuple[int, ...]) -> str | None:
    return None if shapes.get("diff", weight) == weight else f"a difference {list(shapes['diff'])} for {list(weight)}"


def _problem_of_dora(shapes: Shapes, weight: tuple[int, ...]) -> str | None:
    if "dora" not in shapes:
        return None
    sides = _sides(shapes["dora"])
    if sides in ([weight[0]], []) or (sides == [weight[1]] and shapes["dora"][:1] == (1,)):
        return None if math.prod(shapes["dora"]) in weight[:2] else f"a dora scale {list(shapes['dora'])} for {list(weight)}"
    return f"a dora scale {list(shapes['dora'])} for {list(weight)}"


def delta(layer: Layer, base: torch.Tensor | None = None) -> torch.Tensor:
    """What the layer adds to its weight at full strength, fp32 of the weight's shape. `base`: the weight; DoRA alone needs it."""
    product = _product(layer) if layer.kind != "full" else to_tensor(layer.parts["diff"])
    product = product.reshape(layer.shape).mul_(layer.scale)
    if "dora" not in layer.parts:
        return product
    assert base is not None
    whole, scale = base + product, to_tensor(layer.parts["dora"])
    kept = 1 if layer.by_input else 0
    across = tuple(dim for dim in range(whole.ndim) if dim != kept)
    sizes = torch.linalg.vector_norm(whole, dim=across, keepdim=True)
    return whole.mul_(scale.reshape(sizes.shape) / sizes).sub_(base)


def _product(layer: Layer) -> torch.Tensor:
    """The product of the factors, fp32."""
    parts = {name: to_tensor(blob) for name, blob in layer.parts.items() if name not in ("dora", "bias")}
    if layer.kind == "lora":
        down, up = parts["down"], parts["up"].flatten(1)
        if "mid" in parts:
            return torch.einsum("or,rskl,si->oikl", up, parts["mid"], down.flatten(1))
        return up @ down.flatten(1)
    if layer.kind == "loha":
        if "t1" in parts:
            one, two = (torch.einsum("rskl,ro,si->oikl", parts[f"t{n}"], parts[f"w{n}_a"], parts[f"w{n}_b"]) for n in (1, 2))
            return one * two
        return (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    one = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:
        two = parts["w2"]
    elif "t2" in parts:
        two = torch.einsum("rskl,ro,si->oikl", parts["t2"], parts["w2_a"], parts["w2_b"])
    else:
        two = parts["w2_a"] @ parts["w2_b"].flatten(1)
    kernel = layer.shape[2:]
    two = two.reshape(two.shape[0], -1, *kernel)
    return torch.kron(one.reshape(*one.shape, *[1] * len(kernel)), two)
