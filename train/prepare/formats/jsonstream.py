"""JSON values one at a time: objects, arrays, pages of an API, or one object per line, without holding a whole file.

A value that cannot be read is reported and the next one is tried: in a stream of lines the next line, elsewhere the next
object that looks like those before. What stands where no value can be found any more is one report for the rest.
Arrays may follow each other, as when pages of an API are appended to one file, and so may objects.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Generator, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from train.prepare.tables.progress import counted
from train.prepare.tables.schemas import REST_UNREAD

MAX_VALUE_BYTES = 8 << 20  # of one post; a real one is about 5 KB
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Malformed:
    """What stands in a value's place when it cannot be read."""

    message: str


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_CONSTANTS: list[str] = []  # NaN and its like in the value that was read last: they spoil it, and end nothing
_LENIENT = json.JSONDecoder(parse_constant=_CONSTANTS.append)
_OPENING = re.compile(r'\s*(\{\s*(?:"@attributes"\s*:\s*\{[^{}]*\}\s*,\s*)?"posts?"\s*:\s*)?\[')  # of an array, or of a page of an API
_SIBLING = re.compile(r"[\[,}\n]\s*(?=(\{))")  # where the next object of an array may begin
_BEHIND = re.compile(r"\}\s*(?=(\{))")  # two objects without a comma between them stand side by side, never one in another
_MEMBER = re.compile(r'[,}]\s*(?="(?:[^"\\]|\\.)*"\s*:\s*(\{))')  # where the next member of an object of objects may begin
_LAST = re.compile(r"\}\s*\]?\s*\}?\s*\Z")
_BLANKS = re.compile(r"\s*")
_BLANKS_AND_COMMAS = re.compile(r"[\s,]*")
_IDS = {"id", "file_name", "image_path", "image"}  # keys of posts; objects inside them have others, or are tags
_TAG = {"name", "category"}
_MOST_TRIES = 10_000  # at finding the next object: a hostile file is one try after the other
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def iter_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 0, value or Malformed) for each value of the file, whichever form it has."""
    with counted(path) as file:
        head = file.read(_CHUNK_BYTES)
        file.seek(0)
        if head.startswith(_UTF_16):
            yield 0, Malformed(f"the file is UTF-16: save it as UTF-8; {REST_UNREAD}")
            return
        head = head.removeprefix(codecs.BOM_UTF8).lstrip()
        lines = path.suffix.lower() in (".jsonl", ".ndjson") or _first_line_is_whole(head)
        if _OPENING.match(head.decode("utf-8", "replace")) and not (lines and head.startswith(b"{")):
            yield from enumerate(value for _, value in _arrays(_Window(file)))
        elif lines:
            yield from _lines(file)
        else:
            yield from enumerate(_objects(_Window(file)))


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


class _Window:
    """The text of a file from `at` on, as much of it as was asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        # Bytes that are not UTF-8 become marks that a record's checks refuse, so only their post is lost.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._file, self.text, self.at, self.ended = file, "", 0, False
        self.known = set[str]()  # keys of the object that was read last

    def fill(self, wanted: int) -> None:
        """Have so many characters from `at` on, or all there are."""
        have = len(self.text) - self.at
        if have >= wanted or self.ended:
            return
        parts = [self.text[self.at :]]
        while have < wanted and not self.ended:
            data = self._file.read(_CHUNK_BYTES)
            self.ended = not data
            parts.append(self._decode(data, final=self.ended))
            have += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def letter(self, passed: re.Pattern[str] = _BLANKS) -> str:
        """The next character that is not passed over, `at` standing on it; none at the end."""
        while True:
            found = passed.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.fill(1)

    def opening(self) -> re.Match[str] | None:
        """The opening of an array or page at `at`, which then moves behind it."""
        self.letter()
        self.fill(1 << 12)
        found = _OPENING.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def value(self) -> Any:
        """The value at `at`, which moves behind it. Raises ValueError or RecursionError, and `at` stays."""
        wanted = 1 << 12
        while True:
            self.fill(wanted)
            _CONSTANTS.clear()
            try:
                value, end = _LENIENT.raw_decode(self.text, self.at)
                if end == len(self.text) and not self.ended:
                    raise ValueError("the value may go on")
            except ValueError as error:
                have = len(self.text) - self.at
                if have > MAX_VALUE_BYTES:
                    raise ValueError(f"longer than {MAX_VALUE_BYTES} bytes, or {error}") from None
                if self.ended:
                    raise
                wanted = max(2 * have, _CHUNK_BYTES)
                continue
            self.at = end
            return Malformed(f"{_CONSTANTS[0]} is not JSON") if _CONSTANTS else value

    def skip_broken(self, start: re.Pattern[str], *, any_keys: bool) -> Literal["next", "last", "lost"]:
        """Move to the next object that can be read and is like those before it, or like any."""
        for found in itertools.islice(start.finditer(self.text, self.at), _MOST_TRIES):
            try:
                value, _ = _LENIENT.raw_decode(self.text, found.start(1))
            except (ValueError, RecursionError):
                continue
            if found.start(1) > self.at and (any_keys or self._is_alike(value.keys())):
                self.at = found.end()
                return "next"
        return "last" if self.ended and _LAST.search(self.text, max(self.at, len(self.text) - 200)) else "lost"


    def _is_alike(self, keys: Set[str]) -> bool:
        """Whether an object is one of those that a file lists, not one inside another; without any before it, by its id."""
        if self.known:
            return 2 * len(self.known & keys) > len(self.known)
        return bool(keys & _IDS and not keys >= _TAG)

    def listed(self, closing: str, read: Callable[[_Window], tuple[str, Any]], start: re.Pattern[str]) -> Generator[tuple[str, Any], None, str | None]:
        """(name, value or Malformed) up to a bracket, behind which `at` then stands.

        Returns that bracket, none at the end of the text, None where the rest is lost, which has been told.
        """
        while (letter := self.letter(_BLANKS_AND_COMMAS)) not in (closing, ""):
            try:
                name, value = read(self)
                self.known = set(value) if isinstance(value, dict) else self.known
            except (ValueError, RecursionError) as error:
                name, value = "", _report(error)
                found = self.skip_broken(start, any_keys=start is _MEMBER and not self.known)
                if found != "next":
                    yield name, value if found == "last" else _rest(value.message)
                    return None
            yield name, value
        self.at += len(letter)
        return letter


def _report(error: Exception) -> Malformed:
    return Malformed(f"{type(error).__name__}: {error}")


def _rest(message: str) -> Malformed:
    return Malformed(f"{message}; {REST_UNREAD}")


def _objects(window: _Window) -> Iterator[Any]:
    """Values that follow each other: one post, or several as jq and appending scripts write them."""
    first = True
    while letter := window.letter():
        if not first and letter != "{":
            yield _rest("more text after the value")
            return
        try:
            value = window.value()
        except (ValueError, RecursionError) as error:
            value = _report(error)
            if window.skip_broken(_BEHIND, any_keys=True) != "next":
                yield value if window.ended else _rest(value.message)
                return
        yield value
        first = False


def _arrays(window: _Window) -> Iterator[tuple[str, Any]]:
    """("", value) of the arrays or pages that follow each other."""
    while (opening := window.opening()) is not None:
        letter = yield from window.listed("]", lambda inner: ("", inner.value()), _SIBLING)
        if letter is None:
            return
        if not letter or (opening[1] and not _page_ends(window)):
            yield "", _rest("the array has no end" if not letter else "more text after the posts of a page")
            return
    if window.letter():
        yield "", _rest("more text after the array")


def _page_ends(window: _Window) -> bool:
    """Whether a page ends properly behind its posts; what else it says about itself is passed over."""
    try:
        while (letter := window.letter(_BLANKS_AND_COMMAS)) == '"':
            _member(window)
    except (ValueError, RecursionError):
        return False
    window.at += 1
    return letter == "}"


def _member(window: _Window) -> tuple[str, Any]:
    name = window.value()
    if not isinstance(name, str) or window.letter() != ":":
        raise ValueError("expected a name and a colon")
    window.at += 1
    window.letter()
    return name, window.value()


def iter_members(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, value or Malformed) of the members of the one object in a file, as they are read."""
    with counted(path) as file:
        window = _Window(file)
        if window.letter() != "{":
            yield "", Malformed("expected an object of objects")
            return
        window.at += 1
        letter = yield from window.listed("}", _member, _MEMBER)
        if letter == "" or (letter and window.letter()):
            yield "", _rest("the object has no end" if not letter else "more text after the object")
