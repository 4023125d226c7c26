"""Colour profiles wherever they occur, colour keys of 16-bit pictures, and a JPEG that is cheap to store and dear to read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from oddimages import encoded, png_of
from PIL import Image, ImageCms

from train.config.dataset import ProbeConfig
from train.prepare.images.decode import Refused, decode

RULES = ProbeConfig()


def linear_profile(space: bytes, name: str) -> bytes:
    """An ICC profile of version 2 with sRGB's primaries and a straight line for its curve."""

    def numbers(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    tags = [(b"desc", text + bytes(-len(text) % 4)), (b"wtpt", b"XYZ \0\0\0\0" + numbers(0.9642, 1, 0.8249))]
    primaries = {b"r": (0.4360, 0.2225, 0.0139), b"g": (0.3851, 0.7169, 0.0971), b"b": (0.1431, 0.0606, 0.7139)}
    for letter, values in primaries.items() if space == b"RGB " else ():
        tags += [(letter + b"XYZ", b"XYZ \0\0\0\0" + numbers(*values)), (letter + b"TRC", curve)]
    tags += [(b"kTRC", curve)] if space == b"GRAY" else []
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags:
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", 128 + len(table + body), b"", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    return (header + bytes(28) + numbers(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16"])
@pytest.mark.parametrize("name", ["Linear", "sRGB-elle-V2-g10.icc"])
def test_a_linear_profile_is_applied_in_every_mode(mode: str, name: str) -> None:
    profile = linear_profile(b"RGB " if mode.startswith("RGB") else b"GRAY", name)
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    else:
        image = Image.new("RGBA", (8, 8), (128, 128, 128, 255)).convert(mode)
    pixels = np.asarray(decode(encoded(image, "PNG", icc_profile=profile), RULES).image)
    assert abs(pixels.astype(int) - 188).max() <= 1  # half the light is 188 of 255 in sRGB


def test_srgb_profiles_change_nothing() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(encoded(image, "PNG", icc_profile=srgb), RULES).image.tobytes() == image.tobytes()


@pytest.mark.parametrize(("key", "hidden"), [(0x1234, 0x12), (0x0034, 0x00), (0x3456, 0x34)])
def test_colour_key_of_a_16_bit_picture(key: int, hidden: int) -> None:
    """Left half in the key's colour, right half in one whose high byte is the key's low one."""
    other = (key & 0xFF) << 8
    rows = (b"\0" + struct.pack(">H", key) * 3 * 15 + struct.pack(">H", other) * 3 * 15) * 20
    chunk = b"tRNS" + struct.pack(">HHH", key, key, key)
    key_chunk = struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    plain = png_of(struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0), zlib.compress(rows))
    pixels = np.asarray(decode(plain[:33] + key_chunk + plain[33:], RULES).image)
    assert hidden == key >> 8
    assert (pixels[:, :15] == 255).all()
    assert (pixels[:, 15:] == other >> 8).all()


def test_a_jpeg_of_thousands_of_scans_is_refused_unread() -> None:
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000), 100).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    assert decode(data + b"\xff\xda" * 500, RULES).format == "jpeg"  # bytes behind the end are no scans
    with pytest.raises(Refused, match="scans") as refused:
        decode(data[:-2] + data[last:-2] * 3000 + data[-2:], RULES)
    assert refused.value.reason == "unsupported_format"
