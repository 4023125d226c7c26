"""Writing safetensors as a stream: tensor by tensor, hashed in memory, synced; no second copy of the state.

The library's own writer needs all tensors on the host at once, does not fsync, and a hash taken by reading the
file back would bless a bad write. Reading is the library's. Format: 8 bytes little-endian header length, JSON
header padded with spaces to a multiple of 8, then the data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from train.base import faults
from train.base.files import write_all
from train.storage.manifest import FileRecord
from train.storage.weightfile import HEADER_LIMIT_BYTES

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK_BYTES = 64 << 20  # per hash and write call


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor, e.g. Spec((320, 4, 3, 3), torch.float32)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the data."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    """Shape and dtype of every tensor."""
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Exact length of the file that `write` makes of `tensors`, from their metadata alone."""
    header, _ = _header(specs(tensors))
    return len(header) + sum(spec.bytes for spec in specs(tensors).values())


def write(path: Path, tensors: Mapping[str, torch.Tensor], *, step: int | None = None) -> FileRecord:
    """Write and fsync `path`; the record holds the sha256 of the bytes as they were in memory.

    One tensor at a time passes through the host. Raises OSError; KeyError for a dtype the format lacks.
    """
    header, order = _header(specs(tensors))
    digest = hashlib.sha256()
    total = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        faults.at("save.write", step)
        for piece in _pieces(header, order, tensors):
            digest.update(piece)
            write_all(fd, piece)
            total += len(piece)
        faults.at("save.fsync", step)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(total, digest.hexdigest(), len(tensors))


def read_specs(path: Path) -> dict[str, Spec]:
    """Shape and dtype of every tensor of a file, from its header. Raises SafetensorError, OSError."""
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    with open(path, "rb") as raw:
        if int.from_bytes(raw.read(8), "little") > HEADER_LIMIT_BYTES:
            raise SafetensorError("its first 8 bytes are no header length")
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {n: Spec(tuple(s.get_shape()), by_name[s.get_dtype()]) for n, s in slices.items()}


def read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the host) one after the other, bit for bit what was written."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _header(wanted: Mapping[str, Spec]) -> tuple[bytes, list[str]]:
    # Widest element first: with the header padded to 8 every tensor then lies at a multiple of its element size.
    order = sorted(wanted, key=lambda name: (-wanted[name].dtype.itemsize, name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        spec = wanted[name]
        end = offset + spec.bytes
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _pieces(header: bytes, order: list[str], tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for name in order:
        host = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        data = memoryview(host.view(torch.uint8).numpy().data) if host.numel() else memoryview(b"")
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]
