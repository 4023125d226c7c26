"""JSON values one at a time: one object, an array, or one object per line, without holding a whole file.

A value that cannot be read is reported and the next one is tried, except inside an array, where a broken value
hides the beginning of the next: there the rest of the file is one report. Arrays may follow each other, as when pages
of an API are appended to one file; anything else behind the last one is a report too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from train.prepare.progress import counted
from train.prepare.records import REST_UNREAD

MAX_VALUE_BYTES = 8 << 20  # of one post; a real one is about 5 KB
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Malformed:
    """What stands in a value's place when it cannot be read."""

    message: str


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def iter_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 0, value or Malformed) for each value of the file, whichever of the three forms it has."""
    with counted(path) as file:
        head = file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if head.startswith(b"["):
            yield from _array(file)
        elif path.suffix.lower() in (".jsonl", ".ndjson") or _first_line_is_whole(head):
            yield from _lines(file)
        else:
            yield 0, _single(file)


def _first_line_is_whole(head: bytes) -> bool:
    first, newline, rest = head.partition(b"\n")
    return bool(newline) and bool(rest.strip()) and not isinstance(parse(first), Malformed)


def parse(data: bytes | str) -> Any:
    """The value, or Malformed."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value, end = _DECODER.raw_decode(text.strip())
        if text.strip()[end:]:
            return Malformed("more text after the value")
        return value
    except (ValueError, RecursionError) as error:
        return Malformed(f"{type(error).__name__}: {error}")


def _single(file: IO[bytes]) -> Any:
    data = file.read(MAX_VALUE_BYTES + 1)
    return Malformed(f"longer than {MAX_VALUE_BYTES} bytes") if len(data) > MAX_VALUE_BYTES else parse(data)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    row = 0
    while line := file.readline(MAX_VALUE_BYTES + 1):
        if len(line) > MAX_VALUE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_VALUE_BYTES)
            yield row, Malformed(f"longer than {MAX_VALUE_BYTES} bytes")
        elif line.strip():
            yield row, parse(line)
        row += 1


def _array(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    # Bytes that are not UTF-8 become marks that a record's checks refuse, so only their post is lost.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    buffer, row, ended, wanted = "", 0, False, _CHUNK_BYTES
    opened = False
    while True:
        while len(buffer) < wanted and not ended:
            data = file.read(_CHUNK_BYTES)
            ended = not data
            buffer += decode(data, final=ended)
        buffer = buffer.lstrip() if opened else buffer.lstrip()[1:].lstrip()
        opened = True
        buffer = buffer.removeprefix(",").lstrip() if row else buffer
        if buffer.startswith("]"):
            buffer = _behind(buffer[1:], file, decode)
            if not buffer.startswith("["):
                if buffer:
                    yield row, Malformed(f"more text after the array; {REST_UNREAD}")
                return
            opened = False
            continue
        try:
            value, end = _DECODER.raw_decode(buffer)
            if end == len(buffer) and not ended:
                raise ValueError("the value may go on")
        except (ValueError, RecursionError) as error:
            if ended or len(buffer) > MAX_VALUE_BYTES or isinstance(error, RecursionError):
                yield row, Malformed(f"{type(error).__name__}: {error}; {REST_UNREAD}")
                return
            wanted = max(2 * len(buffer), _CHUNK_BYTES)
            continue
        yield row, value
        row, buffer, wanted = row + 1, buffer[end:], 1 << 12


def _behind(buffer: str, file: IO[bytes], decode: Callable[..., str]) -> str:
    """What follows a closing bracket, without white space; at the end of the file nothing."""
    while not (buffer := buffer.lstrip()) and (data := file.read(_CHUNK_BYTES)):
        buffer = decode(data)
    return buffer


def iter_members(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, value or Malformed) of the members of the one object in a file, as they are read."""
    with counted(path) as file:
        head = file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        if not head.startswith(b"{"):
            yield "", Malformed("expected an object of objects")
            return
        file.seek(0)
        yield from _members(file)


def _members(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    buffer, ended, wanted, opened = "", False, _CHUNK_BYTES, False
    while True:
        while len(buffer) < wanted and not ended:
            data = file.read(_CHUNK_BYTES)
            ended = not data
            buffer += decode(data, final=ended)
        buffer = buffer.lstrip() if opened else buffer.lstrip()[1:].lstrip()
        opened = True
        buffer = buffer.removeprefix(",").lstrip()
        if buffer.startswith("}"):
            if _behind(buffer[1:], file, decode):
                yield "", Malformed(f"more text after the object; {REST_UNREAD}")
            return
        try:
            name, end = _DECODER.raw_decode(buffer)
            rest = buffer[end:].lstrip()
            if not isinstance(name, str) or not rest.startswith(":"):
                raise ValueError("expected a name and a colon")
            value, end = _DECODER.raw_decode(rest[1:].lstrip())
            rest = rest[1:].lstrip()[end:]
            if not rest and not ended:
                raise ValueError("the value may go on")
        except (ValueError, RecursionError) as error:
            if ended or len(buffer) > MAX_VALUE_BYTES or isinstance(error, RecursionError):
                yield "", Malformed(f"{type(error).__name__}: {error}; {REST_UNREAD}")
                return
            wanted = max(2 * len(buffer), _CHUNK_BYTES)
            continue
        yield name, value
        buffer, wanted = rest, 1 << 12
