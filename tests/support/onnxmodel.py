"""A model file with the WD tagger's interface, written without the onnx package: protobuf by hand."""

from __future__ import annotations

import struct

import numpy as np

_FLOAT, _INT, _INTS = 1, 2, 7


def wd_model(weights_3K: np.ndarray, bias_K: np.ndarray) -> bytes:
    """Input `input` float32 [batch, 448, 448, 3], output `output` [batch, K]: sigmoid(mean colour @ weights + bias)."""
    count = len(bias_K)
    nodes = [
        _node("ReduceMean", ["input"], ["mean"], _attribute("axes", [1, 2]), _attribute("keepdims", 0)),
        _node("MatMul", ["mean", "weights"], ["sums"]),
        _node("Add", ["sums", "bias"], ["logits"]),
        _node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"tagger")
    graph += _bytes(5, _tensor("weights", weights_3K)) + _bytes(5, _tensor("bias", bias_K))
    graph += _bytes(11, _value("input", ["batch_size", 448, 448, 3])) + _bytes(12, _value("output", ["batch_size", count]))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _number(2, 13))


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _attribute(name: str, value: int | list[int]) -> bytes:
    if isinstance(value, int):
        return _bytes(1, name.encode()) + _number(3, value) + _number(20, _INT)
    return _bytes(1, name.encode()) + b"".join(_number(8, one) for one in value) + _number(20, _INTS)


def _node(kind: str, inputs: list[str], outputs: list[str], *attributes: bytes) -> bytes:
    body = b"".join(_bytes(1, name.encode()) for name in inputs) + b"".join(_bytes(2, name.encode()) for name in outputs)
    return body + _bytes(4, kind.encode()) + b"".join(_bytes(5, attribute) for attribute in attributes)


def _tensor(name: str, values: np.ndarray) -> bytes:
    data = struct.pack(f"<{values.size}f", *values.ravel().tolist())
    dims = b"".join(_number(1, side) for side in values.shape)
    return dims + _number(2, _FLOAT) + _bytes(8, name.encode()) + _bytes(9, data)


def _value(name: str, shape: list[str | int]) -> bytes:
    dims = (_bytes(2, side.encode()) if isinstance(side, str) else _number(1, side) for side in shape)
    sides = b"".join(_bytes(1, dim) for dim in dims)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, _FLOAT) + _bytes(2, sides)))
