"""Damage that decoders pass over in silence: PNG data with a wrong checksum, JPEGs closed with an end marker too early.

A decoder fills in what is missing or takes what is wrong, and the picture trains grey or torn. Also here: PNGs whose text
is so large that the decoder would refuse them for it.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

_PNG_START = 8  # bytes of the signature
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_MOST_TEXT = 1 << 20  # bytes of one text, unpacked: Pillow refuses packed ones beyond it
_MOST_TEXT_IN_ALL = 16 << 20
_NEXT_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)
_SOF_HUFFMAN, _SOF_PROGRESSIVE, _SOS, _EOI = (0xC0, 0xC1), 0xC2, 0xDA, 0xD9
_CUT_BYTES = 8  # taken from the end of the coded data to see whether they matter
_FEWEST_BITS = 2  # that code a block of 8x8
_LOOKED_AT = 16  # blocks before the grey ones
_EDGE = 2  # pixels of a block
_GREY = 128  # what libjpeg puts where data is missing


def png_damage(data: bytes) -> str | None:
    """Why the pixels of a PNG cannot be trusted, or None. What is cut off or unreadable is for the decoder to say."""
    for kind, start, end in _chunks(data):
        if kind == b"IDAT" and zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return "the checksum of its image data is wrong: the file is damaged"
    return None


def without_big_text(data: bytes) -> bytes:
    """The PNG without texts that are too large to be read, which no picture needs; itself where there is none."""
    dropped, total = [], 0
    for kind, start, end in _chunks(data):
        if kind in _TEXT:
            size = _text_size(kind, data[start:end])
            total += size
            if size > _MOST_TEXT or total > _MOST_TEXT_IN_ALL:
                dropped.append((start - 8, end + 4))
                total -= size
    if not dropped:
        return data
    edges = [0, *(edge for pair in dropped for edge in pair), len(data)]
    return b"".join(data[edges[at] : edges[at + 1]] for at in range(0, len(edges), 2))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end of the content) of each whole chunk."""
    at = _PNG_START
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        yield data[at + 4 : at + 8], at + 8, at + 8 + size
        at += 12 + size


def _text_size(kind: bytes, content: bytes) -> int:
    """Bytes of a text, unpacked as far as the limit."""
    packed = content.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and packed[:1] == b"\0"):
        return len(content)
    stream = packed[1:] if kind == b"zTXt" else packed[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return len(zlib.decompressobj().decompress(stream, _MOST_TEXT + 1))
    except zlib.error:
        return len(content)


Box = tuple[int, int, int, int]


@dataclass
class _Jpeg:
    """What the segments of a JPEG's (first) picture say."""

    progressive: bool = False
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)  # component: blocks across and down in an MCU
    scans: list[tuple[tuple[int, ...], int, int, int]] = field(default_factory=list)  # components, first, last, low bit
    end: int = 0  # where its end marker stands


def jpeg_damage(data: bytes, image: Image.Image) -> str | None:
    """Why a JPEG that was decoded is not whole although it has an end marker, or None.

    Found: scans or components that are missing, and coded data that stops early in a picture of one scan. Not found:
    data that stops early within the last scan of a progressive one, where nothing tells it from a coarser picture.
    """
    found = _segments(data)
    if found is None or not found.scans:
        return None
    if {component for scan in found.scans for component in scan[0]} != set(found.sampling):
        return "a colour component has no data: the file was cut off and closed"
    if found.progressive:
        return None if _is_complete(found) else "scans are missing: the file was cut off and closed"
    if len(found.scans) > 1 or image.mode not in ("L", "RGB"):
        return None
    whole = _grey_from(found, image)
    if whole is None:
        return None
    # Where the grey is coded, the last bytes of the code are a part of it; where it stands for missing data, they are
    # a part of the last block before it.
    shorter = data[: found.end - _CUT_BYTES].rstrip(b"\xff") + b"\xff\xd9"
    with Image.open(io.BytesIO(shorter), formats=["JPEG"]) as other:
        other.load()
    same = all(image.crop(box).tobytes() == other.crop(box).tobytes() for box in whole)
    return None if same else "its data stops before its last line: the file was cut off and closed"


def _segments(data: bytes) -> _Jpeg | None:
    """None for what is no Huffman-coded JPEG of 8 bits, or stops within a segment."""
    found, at = _Jpeg(), 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == _EOI:
            found.end = at
            return found if found.sampling else None
        if marker == 0xFF:
            at += 1
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size]
        if marker in (*_SOF_HUFFMAN, _SOF_PROGRESSIVE):
            found.progressive = marker == _SOF_PROGRESSIVE
            found.sampling = {body[n]: (body[n + 1] >> 4, body[n + 1] & 15) for n in range(6, len(body) - 2, 3)}
        elif 0xC0 < marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):
            return None
        at += 2 + size
        if marker == _SOS:
            if len(body) < 4 or len(body) < 4 + 2 * body[0]:
                return None
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            found.scans.append((tuple(body[1 : 1 + 2 * body[0] : 2]), first, last, bits & 15))
            marker_at = _NEXT_MARKER.search(data, at)
            at = marker_at.start() if marker_at else len(data)
    if data[at : at + 2] == bytes([0xFF, _EOI]) and found.sampling:
        found.end = at
        return found
    return None


def _is_complete(found: _Jpeg) -> bool:
    """Whether every coefficient of every component was sent down to its last bit."""
    sent = {
        (component, number)
        for components, first, last, low in found.scans if low == 0
        for component in components for number in range(first, min(last, 63) + 1)
    }  # fmt: skip
    return len(sent) == 64 * len(found.sampling)


def _grey_from(found: _Jpeg, image: Image.Image) -> list[Box] | None:
    """The insides of the last blocks before the grey that a picture ends with; None where it does not end so.

    So little grey that its code may be shorter than what is cut off for the test does not count.
    """
    single = len(found.sampling) == 1
    per_unit = 1 if single else sum(across * down for across, down in found.sampling.values())
    across = 8 if single else 8 * max(pair[0] for pair in found.sampling.values())
    down = 8 if single else 8 * max(pair[1] for pair in found.sampling.values())
    columns, rows = -(-image.width // across), -(-image.height // down)

    def inside(number: int) -> Box:
        """Without the edges, over which colour at half size is blended."""
        left, top = number % columns * across, number // columns * down
        right, bottom = min(left + across, image.width), min(top + down, image.height)
        return left + _EDGE, top + _EDGE, max(right - _EDGE, left + _EDGE), max(bottom - _EDGE, top + _EDGE)

    first = columns * rows
    while first and set(image.crop(inside(first - 1)).tobytes()) <= {_GREY}:
        first -= 1
    needed = -(-8 * (_CUT_BYTES + 1) // (_FEWEST_BITS * per_unit))
    if columns * rows - first < needed:
        return None
    return [inside(number) for number in range(max(first - _LOOKED_AT, 0), first)]
