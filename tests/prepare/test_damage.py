"""Damage that decoders pass over is found, whole pictures never are, and a PNG is read whatever its texts say."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from oddimages import deep, drawn, encoded
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train.config.dataset import ProbeConfig
from train.prepare.images.damage import jpeg_damage, png_damage, without_big_text
from train.prepare.images.decode import Refused, decode

RULES = ProbeConfig()
KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {}, "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1}, "optimized": {"optimize": True},
    "coarse": {"quality": 20}, "fine": {"quality": 97}, "restarts": {"restart_marker_blocks": 4}, "progressive": {"progressive": True},
}  # fmt: skip


def refused(data: bytes, **rules: Any) -> str | None:
    try:
        decode(data, ProbeConfig(**rules))
    except Refused as error:
        return error.reason
    return None


def judged(data: bytes) -> str | None:
    image = Image.open(io.BytesIO(data))
    image.load()
    return jpeg_damage(data, image)


def grey_ended(share: float, mode: str = "RGB", size: tuple[int, int] = (120, 160)) -> Image.Image:
    """A picture whose lower part is the very grey that a decoder puts where data is missing."""
    values = np.array(drawn(*size))
    values[int(size[1] * (1 - share)) :] = 128
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_whole_pictures_are_whole(kind: str, mode: str) -> None:
    if mode == "L" and "subsampling" in KINDS[kind]:
        return
    for picture in (
        *(drawn(width, height).convert(mode) for width, height in ((90, 120), (64, 96), (17, 33), (8, 8), (1, 1))),
        *(grey_ended(share, mode) for share in (0.05, 0.1, 0.3, 0.9, 1.0)),
        grey_ended(0.2, mode, (16, 16)), Image.new(mode, (70, 50)), Image.new("RGB", (70, 50), (128, 128, 128)).convert(mode),
    ):  # fmt: skip
        data = encoded(picture, "JPEG", **KINDS[kind])
        assert (judged(data), refused(data)) == (None, None)
        assert judged(data + b"a film" * 100) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_a_jpeg_that_was_cut_off_and_closed(kind: str, mode: str, share: float) -> None:
    if mode == "L" and "subsampling" in KINDS[kind]:
        return
    data = encoded(drawn(200, 240).convert(mode), "JPEG", **KINDS[kind])
    start = data.index(b"\xff\xda") + 14
    for more in range(4):
        cut = data[: start + int((len(data) - start) * share) + more].rstrip(b"\xff") + b"\xff\xd9"
        assert refused(cut) == "truncated"
        assert refused(cut, allow_truncated=True) is None


def test_a_progressive_jpeg_without_its_last_scans() -> None:
    data = encoded(drawn(200, 240), "JPEG", progressive=True)
    scans = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for at in scans[1:]:
        assert refused(data[: data.rindex(b"\xff\xc4", 0, at)] + b"\xff\xd9") == "truncated"


def test_a_jpeg_without_a_colour_component() -> None:
    data = encoded(drawn(), "JPEG")
    at = data.index(b"\xff\xda")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # the first scan of a file that keeps a scan for each component
    assert "component" in str(jpeg_damage(data[:at] + scan + data[at + 14 :], drawn()))


def chunks(data: bytes) -> list[tuple[bytes, bytes, int]]:
    found, at = [], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size], struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0]))
        at += 12 + size
    return found


def png(parts: list[tuple[bytes, bytes, int]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", c) for k, d, c in parts)


def test_a_png_whose_data_has_a_wrong_checksum() -> None:
    whole = encoded(drawn(400, 300), "PNG")
    parts = chunks(whole)
    assert png(parts) == whole
    data_chunks = [number for number, part in enumerate(parts) if part[0] == b"IDAT"]
    assert len(data_chunks) > 2
    for number in data_chunks:
        kind, content, crc = parts[number]
        damaged = png([*parts[:number], (kind, content, crc ^ 1), *parts[number + 1 :]])
        Image.open(io.BytesIO(damaged)).load()  # the decoder passes it over
        assert refused(damaged) == "damaged"
        assert refused(damaged, allow_truncated=True) is None
    assert (refused(whole), png_damage(whole)) == (None, None)


def test_one_flipped_bit_of_stored_pixels_is_found() -> None:
    raw = np.asarray(drawn(), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in raw)
    header = struct.pack(">IIBBBBB", 90, 120, 8, 2, 0, 0, 0)
    packed = zlib.compress(rows, 0)
    parts = [(b"IHDR", header, zlib.crc32(b"IHDR" + header)), (b"IDAT", packed, zlib.crc32(b"IDAT" + packed)), (b"IEND", b"", zlib.crc32(b"IEND"))]
    assert refused(png(parts)) is None
    flipped = bytearray(packed)
    flipped[1000] ^= 4
    assert refused(png([parts[0], (b"IDAT", bytes(flipped), parts[1][2]), parts[2]])) == "damaged"


BIG = "prompt, " * 300_000  # 2.4 MB


def texts(kind: str) -> PngInfo:
    info = PngInfo()
    if kind == "many":
        for number in range(40):
            info.add_text(f"note {number}", "x" * 900_000, zip=True)
    elif kind == "itxt":
        info.add_itxt("note", BIG, zip=True)
    elif kind == "plain itxt":
        info.add_itxt("note", BIG)
    else:
        info.add_text("note", BIG, zip=kind == "packed")
    info.add_text("parameters", "1girl", zip=False)
    return info


@pytest.mark.parametrize("kind", ["packed", "plain", "itxt", "plain itxt", "many"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_large_texts_is_read_without_them(kind: str, behind: bool) -> None:
    plain = encoded(drawn(), "PNG")
    data = encoded(drawn(), "PNG", pnginfo=texts(kind))
    if behind:  # the texts stand behind the pixels, where some programs put them
        parts = chunks(data)
        text = [part for part in parts if part[0] in (b"tEXt", b"zTXt", b"iTXt")]
        data = png([*(part for part in parts[:-1] if part not in text), *text, parts[-1]])
    assert np.array_equal(np.asarray(decode(data, RULES).image), np.asarray(decode(plain, RULES).image))
    assert len(without_big_text(data)) < len(data)
    kept = Image.open(io.BytesIO(without_big_text(data)))
    kept.load()
    assert "parameters" in kept.text or kind == "many"  # type: ignore[attr-defined]


def test_a_text_that_unpacks_to_the_moon_is_never_unpacked() -> None:
    info = PngInfo()
    info.add_text("note", "x" * (100 << 20), zip=True)
    data = encoded(drawn(), "PNG", pnginfo=info)
    tracemalloc.start()
    assert len(without_big_text(data)) < len(data)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("data", [deep(3), deep(4), encoded(drawn(), "PNG"), encoded(drawn().convert("P"), "PNG", transparency=3)])
def test_other_pngs_are_left_alone(data: bytes) -> None:
    assert without_big_text(data) is data


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + bytes(100), encoded(drawn(), "PNG")[:70]])
def test_what_is_no_whole_png_is_for_the_decoder(data: bytes) -> None:
    assert (png_damage(data), without_big_text(data)) == (None, data)


CONTENTS = {
    b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41": "video", b"\x1aE\xdf\xa3\x9fB\x86\x81": "video", b"PK\3\4\x14\0": "archive",
    b"CWS\x0b\x12\x34": "flash", b"Rar!\x1a\x07\x01\0": "archive",
}  # fmt: skip


@pytest.mark.parametrize("start", CONTENTS)
def test_videos_and_archives_under_a_pictures_name(start: bytes) -> None:
    with pytest.raises(Refused, match=CONTENTS[start]) as found:
        decode(start + bytes(300), RULES)
    assert found.value.reason == "not_a_picture"
