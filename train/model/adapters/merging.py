"""A model with adapters added to its weights, and sums of models: tensor by tensor while they are written, added up in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from train.base.errors import ExitCode, Halt
from train.model.adapters import layers
from train.model.adapters.reading import Adapter
from train.model.source import LocalModel
from train.storage import state_files, tensor_files
from train.storage.tensor_files import Blob, Pieces

Weighted = Sequence[tuple[Adapter, float]]


def merged(weights: Mapping[str, Blob], adapters: Weighted) -> dict[str, Blob]:
    """The weights with every adapter added, times its weight, in their own dtypes; what no adapter touches is the same blob.

    Reading one raises Halt: MISMATCH (an adapter that is not finite), NON_FINITE (a sum too large for the weight's dtype).
    """
    touched = reached(adapters)
    return {
        name: _computed(blob, partial(_added, name, blob, adapters)) if name in touched else blob for name, blob in weights.items()
    }


def reached(adapters: Weighted) -> set[str]:
    """Canonical names of the tensors that adapters change."""
    layers = [(module, layer) for adapter, _ in adapters for module, layer in adapter.layers.items()]
    return {f"{m}.weight" for m, layer in layers if layer.weighs} | {f"{m}.bias" for m, layer in layers if "bias" in layer.parts}


def widened(weights: Mapping[str, Blob], adapters: Weighted) -> dict[str, Blob]:
    """`merged`, in fp32 where an adapter reaches: for networks that are built from it, not for a file."""
    touched = reached(adapters)
    wide = {name: tensor_files.cast(blob, "F32", name) if name in touched else blob for name, blob in weights.items()}
    return merged(wide, adapters)


def added(name: str, base: torch.Tensor, adapters: Weighted) -> torch.Tensor:
    """A weight in fp32 with what the adapters add to it, in their order. Raises Halt(MISMATCH) naming one that is not finite."""
    module, _, leaf = name.rpartition(".")
    total = base.clone()
    for adapter, strength in adapters:
        layer = adapter.layers.get(module)
        if layer is None or strength == 0 or not (layer.weighs if leaf == "weight" else "bias" in layer.parts):
            continue
        difference = layers.delta(layer, base) if leaf == "weight" else state_files.to_tensor(layer.parts["bias"])
        if not bool(torch.isfinite(difference).all()):
            raise Halt(ExitCode.MISMATCH, f"{adapter.path}: {module} is not finite (NaN or infinity)")
        total.add_(difference, alpha=strength)
    return total


def _added(name: str, blob: Blob, adapters: Weighted) -> torch.Tensor:
    return added(name, state_files.to_tensor(blob), adapters)


def _computed(like: Blob, value: partial[torch.Tensor]) -> Blob:
    """A blob of the same dtype and shape whose fp32 values are made when it is read."""

    def pieces() -> Pieces:
        yield from rounded(value(), like)

    return Blob(like.dtype, like.shape, pieces, like.origin)


def rounded(values: torch.Tensor, like: Blob) -> Iterator[memoryview]:
    """fp32 values as the bytes of a blob's dtype. Raises Halt(NON_FINITE) where one does not fit."""
    told = values.to(state_files.DTYPES[like.dtype]).contiguous()
    if not bool(torch.isfinite(told).all()):
        raise Halt(ExitCode.NON_FINITE, f"{like.origin}: a merged weight is too large for {like.dtype}: merge into an fp32 base, or with a smaller weight")
    data = memoryview(told.reshape(-1).view(torch.uint8).numpy().data)
    for start in range(0, len(data), tensor_files.PIECE_BYTES):
        yield data[start : start + tensor_files.PIECE_BYTES]


def sums(a: LocalModel, b: LocalModel, c: LocalModel, times: float) -> dict[str, Blob]:
    """a + times (b - c), tensor by tensor in fp32, in the dtypes of `a`; the VAE is that of `a`.

    Raises Halt(MISMATCH) naming tensors that differ in shape.
    """
    trained = {name: blob for name, blob in a.weights.items() if not name.startswith("vae.")}
    for other in (b, c):
        if unlike := [n for n, blob in trained.items() if n not in other.weights or other.weights[n].shape != blob.shape]:
            raise Halt(ExitCode.MISMATCH, f"{a.path} and {other.path} are of two architectures: {len(unlike)} tensors differ in shape, as {unlike[0]}")

    def value(name: str) -> torch.Tensor:
        one, two, three = (state_files.to_tensor(model.weights[name]) for model in (a, b, c))
        return one.add_(two.sub_(three), alpha=times)

    return {**a.weights, **{name: _computed(blob, partial(value, name)) for name, blob in trained.items()}}
