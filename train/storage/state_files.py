"""Torch's tensors to and from safetensors files, one at a time: no second copy of a stage's state.

The library's own writer needs all tensors on the host at once and does not fsync; reading data is the library's.
Here stands the one table between torch's dtypes and the format's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from train.base import faults
from train.storage import tensor_files
from train.storage.manifest import FileRecord

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PRECISIONS = {word: DTYPES[name] for word, name in tensor_files.NAMES_OF_PRECISIONS.items()}
_CHUNK_BYTES = 64 << 20  # per hash and write call


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor, e.g. Spec((320, 4, 3, 3), torch.float32)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    """Shape and dtype of every tensor."""
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Exact length of the file that `write` makes of `tensors`, from their metadata alone."""
    return len(_header(tensors)[0]) + sum(spec.bytes for spec in specs(tensors).values())


def write(path: Path, tensors: Mapping[str, torch.Tensor], *, step: int | None = None) -> FileRecord:
    """Write and fsync `path`; the record holds the sha256 of the bytes as they were in memory.

    One tensor at a time passes through the host. Raises OSError; KeyError for a dtype the format lacks.
    """
    header, order = _header(tensors)
    digest = tensor_files.stream(path, _pieces(header, order, tensors, step))
    return FileRecord(file_bytes(tensors), digest, len(tensors))


def read_specs(path: Path) -> dict[str, Spec]:
    """Shape and dtype of every tensor of a file, from its header. Raises ValueError, OSError; KeyError for a dtype."""
    _, _, entries = tensor_files.header_of(path)
    return {name: Spec(entry.shape, DTYPES[entry.dtype]) for name, entry in entries.items()}


def read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the host) one after the other, bit for bit what was written."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def to_tensor(blob: tensor_files.Blob) -> torch.Tensor:
    """The tensor of a blob, in fp32."""
    if not blob.size_bytes:
        return torch.empty(blob.shape)
    data = torch.frombuffer(bytearray(blob.read()), dtype=DTYPES[blob.dtype])
    return data.reshape(blob.shape).to(torch.float32)


def _header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, list[str]]:
    kinds = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return tensor_files.header(kinds, {"format": "pt"})


def _pieces(
    header: bytes, order: list[str], tensors: Mapping[str, torch.Tensor], step: int | None
) -> Iterator[memoryview]:
    faults.at("save.write", step)
    yield memoryview(header)
    for name in order:
        host = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        data = memoryview(host.view(torch.uint8).numpy().data) if host.numel() else memoryview(b"")
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]
    faults.at("save.fsync", step)
