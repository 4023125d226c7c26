"""Headers of safetensors files: whole numbers are whole numbers, and everything else is refused by the tensor's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.base.errors import ExitCode, Halt
from train.data.shards import ShardReader, write_shard
from train.storage import state_files, tensor_files
from train.storage.state_files import DTYPE_NAMES, DTYPES, PRECISIONS
from train.storage.tensor_files import ITEM_BYTES, open_file, read_header


def written(path: Path, header: bytes, data: bytes = bytes(16)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}).encode()


SHAPES = ([4.0], ["4"], [4, True], [4.7], [-4], [-2, -2], [None], [[4]], "4", {"4": 1}, 4, None, [10**30, 0], [1] * 17 + [4])
OFFSETS = ([0.0, 16.0], ["0", "16"], [False, 16], [0, True], [-16, 0], [0, 16, 16], [16], None, "01", {"0": 1, "16": 2},
           [0, 10**30], [16, 0], [0, 12])  # fmt: skip
BAD: dict[str, bytes] = {
    **{f"shape {shape}"[:40]: entry(shape=shape) for shape in SHAPES},
    **{f"offsets {offsets}"[:40]: entry(data_offsets=offsets) for offsets in OFFSETS},
    **{f"dtype {dtype}": entry(dtype=dtype) for dtype in (["F32"], 4, None, "F99", "f32")},
    "infinite side": b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,16]}}',
    "side that is no number": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}',
    "5000 digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "no shape": b'{"a":{"dtype":"F32","data_offsets":[0,16]}}',
    "entry is a list": b'{"a":[1]}',
    "entry is null": b'{"a":null}',
    "one name twice": entry()[:-1] + b"," + entry()[1:],
    "name is no text": entry().replace(b'"a"', b'"a\\ud800"'),
    "metadata is a list": b'{"__metadata__":[1],' + entry()[1:],
    "header is a list": b"[1]",
    "header is a text": b'"x"',
    "other encoding": entry().decode().encode("utf-16"),
    "deep": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_header_that_breaks_the_rules_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        read_header(BAD[kind])
    with pytest.raises(Halt, match="damaged header") as caught:
        open_file(written(tmp_path / "x.safetensors", BAD[kind]))
    assert caught.value.code == ExitCode.MISMATCH
    assert "x.safetensors" in caught.value.message
    assert len(caught.value.message) < 500


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    found = open_file(written(tmp_path / "x.safetensors", b'{"__metadata__":{"k":"v"},' + entry()[1:]))
    assert (found.metadata, found.blobs["a"].shape, found.blobs["a"].read()) == ({"k": "v"}, (4,), bytes(16))
    assert read_header(entry(shape=[], dtype="F64", data_offsets=[0, 8]))[1]["a"].shape == ()


@pytest.mark.parametrize(("old", "new"), [
    (b"[2,4,8,8]", b"[2,4,8,8.0]"), (b"[2,4,8,8]", b'[2,4,8,"8"]'), (b"[2,4,8,8]", b"[-2,-4,8,8]"),
    (b"[2,4,8,8]", b"[2,4,64,true]"), (b"[2,4,8,8]", b"[4611686018427387904,4,8,8]"), (b"[0,1024]", b"[false,1024]"),
    (b"[0,1024]", b"[0,1024.0]"), (b'{"__metadata__":{"k":"v"}', b'{"__metadata__":' + b"[" * 50_000),
])  # fmt: skip
def test_a_shard_with_such_a_header_is_refused_by_name(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = tmp_path / "8x8.safetensors"
    write_shard(path, torch.zeros(2, 4, 8, 8, dtype=torch.float16), {"k": "v"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b" ", b"")
    assert old in header
    header = header.replace(old, new)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(Halt, match=r"8x8\.safetensors") as caught:
        ShardReader(tmp_path).read(["8x8.safetensors"], [0])
    assert caught.value.code == ExitCode.MISMATCH


def test_both_tables_of_dtypes_say_the_same() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()}.items() <= ITEM_BYTES.items()
    assert [DTYPES[DTYPE_NAMES[dtype]] for dtype in PRECISIONS.values()] == list(PRECISIONS.values())


def test_three_writers_have_one_header(tmp_path: Path) -> None:
    """A model's file, a checkpoint's and a shard are the same format to the library; the first two also to the byte."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}
    record = state_files.write(tmp_path / "state", tensors)
    blobs = open_file(tmp_path / "state").blobs
    assert tensor_files.write(tmp_path / "model", blobs, {"format": "pt"}) == record.sha256
    assert (tmp_path / "model").read_bytes() == (tmp_path / "state").read_bytes()
    assert record.bytes == (tmp_path / "state").stat().st_size
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(tmp_path / "state").items())
    write_shard(tmp_path / "shard", torch.ones(2, 4, 1, 1, dtype=torch.float16), {"b": "2", "a": "1"})
    data = (tmp_path / "shard").read_bytes()
    told = b'{"__metadata__": {"a": "1", "b": "2"}, "latents": {"data_offsets": [0, 16], "dtype": "F16", "shape": [2, 4, 1, 1]}}'
    assert data[8:].startswith(told) and len(data) % 8 == 0 and data.endswith(b"\x00\x3c" * 8)
    # ^ as written before there was one writer
