"""Safetensors files: their header both ways, and tensors as bytes, piece by piece, never a whole model at once.

A `Blob` is one tensor that is not in memory yet. Files and casts of blobs are blobs; `write` streams them out, hashed
on the way: a hash taken by reading the file back would bless a bad write. The header of a file is checked against its
size before anything is read. Format: 8 bytes little-endian header length, JSON padded with spaces to a multiple of 8,
then the data without gaps. No torch in here; its tensors go through `state_files`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from train.base.errors import ExitCode, Halt
from train.base.files import write_all

MOST_SIDES = 16  # of a tensor; SDXL's have 4
PIECE_BYTES = 16 << 20  # a multiple of every element size, so that pieces end between elements
HEADER_LIMIT_BYTES = 8 << 20  # SDXL's is 0.4 MB; the library would read 100 MB, which parsed are gigabytes
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
NAMES_OF_PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # of the words of a config
# A float is infinite or not a number exactly when all bits of its exponent are set.
EXPONENTS = {
    "F64": (np.uint64, 0x7FF0000000000000), "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80),
}  # fmt: skip
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")

Pieces = Iterator[memoryview]


@dataclass(frozen=True)
class Blob:
    """One tensor: its dtype in safetensors' words, its shape, and a way to get its bytes in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Pieces]
    origin: str = ""  # name in the file it was read from

    @property
    def size_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def read(self) -> bytes:
        """The whole tensor; for small ones."""
        return b"".join(self.pieces())


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor; `start` and `end` are bytes of the data that follows it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Tensors:
    """A file's header: its text metadata and its tensors."""

    path: Path
    metadata: dict[str, str]
    blobs: dict[str, Blob]


def refuse_pickle(path: Path) -> None:
    """Halt(MISMATCH) for a pickled checkpoint: reading one runs the code inside it."""
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(128)
    if head[:4] == b"PK\x03\x04" and b".pkl" not in head and path.suffix.lower() not in PICKLE_SUFFIXES:
        raise Halt(ExitCode.MISMATCH, f"{path} is a zip archive, no model: unpack it and name the .safetensors in it")
    # Zip archive (torch.save), or the protocol byte of a bare pickle; a safetensors header's length may begin with
    # the same byte, but its ninth is the brace.
    pickled = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] != b"{")
    if pickled or path.suffix.lower() in PICKLE_SUFFIXES:
        raise Halt(
            ExitCode.MISMATCH,
            f"{path} is a pickle: reading one can run any code. Only .safetensors is read; "
            "ask its maker for that, or convert it on a machine you can lose.",
        )


# What lies under a model's name when it was never downloaded, or is of another format, by how it begins.
_OTHER_HEADS = (
    (rb"version https://git-lfs", "is a Git LFS pointer, a note where the model should be: run `git lfs pull`, or download the file itself"),
    (rb"\s*<(!doctype|html|head|\?xml)", "is a web page, no model (a login or an error, saved under its name): download it again, signed in"),
    (rb"\s*\{\s*\"(error|message|detail|success)\"", "is a server's error message, no model: download it again, signed in"),
    (rb"GGUF", "is a GGUF file, a quantised model: start from the fp16 or fp32 .safetensors"),
    (rb"7z\xbc\xaf|Rar!|\x1f\x8b|BZh|\xfd7zXZ", "is an archive, no model: unpack it and name the .safetensors in it"),
)  # fmt: skip


def _refuse_other_formats(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(200)
    if head[8:9] == b"{":
        return  # whatever its length begins with
    for form, what in _OTHER_HEADS:
        if re.match(form, head, re.IGNORECASE):
            raise Halt(ExitCode.MISMATCH, f"{path} {what}")


def open_file(path: str | Path) -> Tensors:
    """Header of a safetensors file, checked against the file's size. Halt(MISMATCH) says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise Halt(ExitCode.USAGE, f"{path}: no such file")
    refuse_pickle(path)
    if path.stat().st_size == 0:
        raise Halt(ExitCode.MISMATCH, f"{path} is empty (0 bytes): the copy or download did not happen")
    _refuse_other_formats(path)
    try:
        start, metadata, entries = header_of(path)
    except ValueError as error:
        raise Halt(ExitCode.MISMATCH, f"{path} {error}: download or copy it again") from None
    blobs = {
        name: Blob(entry.dtype, entry.shape, partial(_read_range, path, start + entry.start, entry.end - entry.start), name)
        for name, entry in entries.items()
    }
    return Tensors(path, metadata, blobs)


def header_of(path: Path) -> tuple[int, dict[str, str], dict[str, Entry]]:
    """(first byte of the data, metadata, tensors) of a safetensors file, held against its size.

    Raises OSError; ValueError that says what is wrong with the file, to be read after its name.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > HEADER_LIMIT_BYTES:
            raise ValueError("is no safetensors file of a model (its first 8 bytes are no header length)")
        if 8 + length > size:
            raise ValueError(f"is truncated: {size} bytes, the header alone needs {8 + length}")
        text = file.read(length)
    try:
        metadata, entries = read_header(text)
    except ValueError as error:
        raise ValueError(f"is no safetensors file: damaged header ({error})") from None
    at = 0
    for start, end in sorted((entry.start, entry.end) for entry in entries.values()):
        if start != at:
            raise ValueError("is no safetensors file: its tensors overlap or leave gaps")
        at = end
    if (needed := 8 + length + at) != size:
        what = "is truncated" if needed > size else "has foreign bytes at its end"
        raise ValueError(f"{what}: {size} bytes, its header describes {needed}")
    return 8 + length, metadata, entries


def read_header(text: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a safetensors header. Raises ValueError naming the tensor that breaks the format's rules.

    Sides and offsets are whole numbers: what Python would take for one (1.0, "1", true) means another tensor elsewhere.
    """
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("it holds no names")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("__metadata__ holds no names")
    return {str(k): str(v) for k, v in metadata.items()}, {name: _entry(name, value) for name, value in header.items()}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(max(names, key=names.count))} stands there twice")
    return found


def _entry(name: str, value: Any) -> Entry:
    shown = _shown(name)
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"{shown} has no dtype, shape and data_offsets")
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{shown} is no text")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{shown} is of the unknown dtype {_shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MOST_SIDES or not all(map(_is_count, shape)):
        raise ValueError(f"shape {_shown(shape)} of {shown} is no list of at most {MOST_SIDES} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"data_offsets {_shown(offsets)} of {shown} are no two whole numbers")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{end - start} bytes for {shown}, {dtype} {shape}")
    return Entry(dtype, tuple(shape), start, end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # bool is an int to Python


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_range(path: Path, start: int, count: int) -> Pieces:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count:
            piece = file.read(min(count, PIECE_BYTES))
            if not piece:
                raise Halt(ExitCode.MISMATCH, f"{path} became shorter while it was read")
            count -= len(piece)
            yield memoryview(piece)


def rows(blob: Blob, part: int, parts: int) -> Blob:
    """The `part`-th of `parts` equal slices along the first dimension."""
    count = blob.shape[0] // parts
    size = blob.size_bytes // parts

    def pieces() -> Pieces:
        at, begin, end = 0, part * size, (part + 1) * size
        for piece in blob.pieces():
            here = piece[max(begin - at, 0) : max(end - at, 0)]
            at += len(piece)
            if here:
                yield here
            if at >= end:
                return

    return replace(blob, shape=(count, *blob.shape[1:]), pieces=pieces)


def concatenated(blobs: list[Blob]) -> Blob:
    """Blobs of one dtype, joined along the first dimension."""

    def pieces() -> Pieces:
        for blob in blobs:
            yield from blob.pieces()

    rows_in_all = sum(blob.shape[0] for blob in blobs)
    return Blob(blobs[0].dtype, (rows_in_all, *blobs[0].shape[1:]), pieces, ", ".join(blob.origin for blob in blobs))


def transposed(blob: Blob) -> Blob:
    """A matrix, turned over; the only operation that holds a whole tensor."""
    height, width = blob.shape

    def pieces() -> Pieces:
        matrix = np.frombuffer(blob.read(), dtype=f"V{ITEM_BYTES[blob.dtype]}").reshape(height, width)
        yield memoryview(matrix.T.copy().tobytes())

    return replace(blob, shape=(width, height), pieces=pieces)


def reshaped(blob: Blob, shape: tuple[int, ...]) -> Blob:
    """The same bytes under another shape."""
    return replace(blob, shape=shape)


def cast(blob: Blob, dtype: str, name: str) -> Blob:
    """F32, F16 or BF16 rounded to F16 or F32. Reading raises Halt(NON_FINITE) where a weight does not fit."""
    if blob.dtype == dtype:
        return blob
    if blob.dtype not in ("F64", "F32", "F16", "BF16") or dtype not in ("F16", "F32"):
        raise Halt(ExitCode.MISMATCH, f"{name}: cannot turn {blob.dtype} into {dtype}")

    def pieces() -> Pieces:
        for piece in blob.pieces():
            with np.errstate(over="ignore"):
                values = _values(piece, blob.dtype).astype(np.float16 if dtype == "F16" else np.float32)
            data = memoryview(values.view(np.uint8))
            if not finite(data, dtype) and finite(piece, blob.dtype):
                raise Halt(ExitCode.NON_FINITE, f"{name} has weights beyond 65504, too large for fp16: use fp32")
            yield data

    return replace(blob, dtype=dtype, pieces=pieces)


def _values(piece: memoryview, dtype: str) -> Any:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(piece, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(piece, dtype={"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])


def finite(piece: memoryview | bytes, dtype: str) -> bool:
    """No infinity, no NaN among the elements; true for types that have none."""
    if dtype not in EXPONENTS:
        return True
    kind, mask = EXPONENTS[dtype]
    return not bool(((np.frombuffer(piece, dtype=kind) & kind(mask)) == mask).any())


def refuse_non_finite(blobs: Mapping[str, Blob], whose: str) -> None:
    """Halt(MISMATCH) naming the tensors that hold NaN or infinity. Reads every byte."""
    bad = [named(n, blob) for n, blob in blobs.items() if not all(finite(p, blob.dtype) for p in blob.pieces())]
    if bad:
        raise Halt(
            ExitCode.MISMATCH,
            f"{whose} holds weights that are not finite (NaN or infinity) in {len(bad)} tensors: {', '.join(bad[:8])}",
        )


def write(path: str | Path, blobs: Mapping[str, Blob], metadata: Mapping[str, str], whose: str = "") -> str:
    """Write and fsync `path`, which must not exist; the sha256 of its bytes, taken on the way out.

    Mode by umask (the library's writer leaves 0600). Raises Halt(MISMATCH) at a weight that is not finite, naming
    its tensor after `whose`; OSError. The caller removes what a failure leaves.
    """
    head, order = header({name: (blob.dtype, blob.shape) for name, blob in blobs.items()}, metadata)

    def pieces() -> Pieces:
        yield memoryview(head)
        for name in order:
            for piece in blobs[name].pieces():
                if not finite(piece, blobs[name].dtype):
                    raise Halt(ExitCode.MISMATCH, f"{whose}{named(name, blobs[name])} holds weights that are not finite (NaN or infinity)")
                yield piece

    return stream(path, pieces())


def stream(path: str | Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write and fsync `path`, which must not exist; the sha256 of its bytes as they were in memory. Raises OSError."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            digest.update(piece)
            write_all(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def named(name: str, blob: Blob) -> str:
    """A tensor by the name it gets, and the one under which the user finds it in the file it comes from."""
    return f"{name} (there: {blob.origin})" if blob.origin not in ("", name) else name


def header(
    kinds: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str], *, sort_keys: bool = False
) -> tuple[bytes, list[str]]:
    """What a file of tensors of these (dtype, shape) begins with, and the order in which their data follows.

    sort_keys: the JSON of a shard, spaced and sorted; elsewhere it is compact.
    """
    # Widest element first: with the header padded to 8 every tensor lies at a multiple of its element size.
    order = sorted(kinds, key=lambda name: (-ITEM_BYTES[kinds[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = kinds[name]
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, sort_keys=sort_keys, separators=None if sort_keys else (",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order
