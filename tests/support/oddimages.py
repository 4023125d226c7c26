"""Image files of every odd kind, made from scratch: name -> (bytes, reason why it is refused, or None where it is taken)."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

Case = tuple[str, bytes, str | None]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(width: int = 90, height: int = 120, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: no encoder can make it tiny."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 190, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour without memory: its rows are compressed as they are made."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row * 1000) for _ in range(height // 1000)) + packer.flush()
    return png_of(struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), data)


def deep(channels: int) -> bytes:
    """A PNG of 16 bits per channel: RGB, or RGBA, which Pillow cannot write."""
    values = np.random.default_rng(channels).integers(0, 1 << 16, (120, 90 * channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png_of(struct.pack(">IIBBBBB", 90, 120, 16, {3: 2, 4: 6}[channels], 0, 0, 0), zlib.compress(rows))


def png_of(header: bytes, data: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def png_with_text(text: str, *, packed: bool) -> bytes:
    info = PngInfo()
    info.add_text("note", text, zip=packed)
    return encoded(drawn(), "PNG", pnginfo=info)


def cases() -> Iterator[Case]:
    yield from _formats()
    yield from _modes()
    yield from _metadata()
    yield from _shapes()
    yield from _not_images()


def _formats() -> Iterator[Case]:
    image = drawn()
    for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("GIF", "gif"), ("AVIF", "avif")):
        whole = encoded(image, kind)
        yield f"good.{ending}", whole, None
        yield f"half.{ending}", whole[: len(whole) // 2], "truncated"
        yield f"start.{ending}", whole[:40], "truncated"
        yield f"nearly.{ending}", whole[:-14], "truncated"
    yield "zeros-behind.jpg", encoded(image, "JPEG")[:3000] + bytes(5000), "truncated"
    yield "more-behind.jpg", encoded(image, "JPEG") + b"a film" * 500, None
    yield "lossless.webp", encoded(image, "WEBP", lossless=True), None
    yield "progressive.jpg", encoded(image, "JPEG", progressive=True), None
    yield "interlaced.png", encoded(image, "PNG", interlace=1), None
    yield "picture.tiff", encoded(image, "TIFF"), "unsupported_format"
    yield "picture.ico", encoded(image, "ICO"), "unsupported_format"
    yield "picture.jp2", encoded(image, "JPEG2000"), "unsupported_format"
    yield "tiff-named.png", encoded(image, "TIFF"), "unsupported_format"
    yield "jpeg-named.png", encoded(image, "JPEG"), None
    yield "webp-named.jpg", encoded(image, "WEBP"), None
    frames = [drawn(seed=1), drawn(seed=2)]
    yield "moving.gif", encoded(image, "GIF", save_all=True, append_images=frames), "animated"
    yield "moving.webp", encoded(image, "WEBP", save_all=True, append_images=frames), "animated"
    yield "apng-named.png", encoded(image, "PNG", save_all=True, append_images=frames), "animated"
    yield "moving.avif", encoded(image, "AVIF", save_all=True, append_images=frames), "animated"


def _modes() -> Iterator[Case]:
    image = drawn()
    ramp = np.linspace(0, 65535, 90 * 120).astype(np.uint16).reshape(120, 90)
    yield "grey16.png", encoded(Image.fromarray(ramp), "PNG"), None
    yield "rgb16.png", deep(3), None
    yield "rgba16.png", deep(4), None
    for mode in ("1", "L", "P", "LA", "RGBA"):
        yield f"mode-{mode}.png", encoded(image.convert(mode), "PNG"), None
    yield "palette-trns.png", encoded(image.convert("P"), "PNG", transparency=3), None
    yield "grey-trns.png", encoded(image.convert("L"), "PNG", transparency=7), None
    yield "cmyk.jpg", encoded(image.convert("CMYK"), "JPEG"), None
    yield "grey.jpg", encoded(image.convert("L"), "JPEG"), None
    clear = image.convert("RGBA")
    clear.putalpha(0)
    yield "clear.png", encoded(clear, "PNG"), None
    yield "clear.webp", encoded(clear, "WEBP", lossless=True, exact=True), None
    yield "clear.gif", encoded(image.convert("P"), "GIF", transparency=0), None


def _metadata() -> Iterator[Case]:
    for orientation in (*range(1, 9), 9):  # 9 does not exist
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"turned-{orientation}.jpg", encoded(drawn(), "JPEG", exif=exif.tobytes()), None
    yield "bad-exif.jpg", encoded(drawn(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 60), None
    yield "bad-profile.jpg", encoded(drawn(), "JPEG", icc_profile=b"not a profile" * 40), None
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "profile.jpg", encoded(drawn(), "JPEG", icc_profile=srgb), None
    yield "wrong-profile.jpg", encoded(drawn().convert("CMYK"), "JPEG", icc_profile=srgb), None
    yield "text-bomb.png", png_with_text("a" * 20_000_000, packed=True), None
    international = PngInfo()
    international.add_itxt("note", "b" * 20_000_000, zip=True)
    yield "itxt-bomb.png", encoded(drawn(), "PNG", pnginfo=international), None
    yield "text.png", png_with_text("prompt " * 3000, packed=True), None


def _shapes() -> Iterator[Case]:
    yield "dot.png", encoded(Image.new("RGB", (1, 1)), "PNG"), None
    yield "strip.png", encoded(Image.new("RGB", (20000, 20)), "PNG"), "aspect_ratio"
    yield "tall.jpg", encoded(Image.new("RGB", (100, 1000)), "JPEG"), "aspect_ratio"
    yield "edge.png", encoded(drawn(400, 100), "PNG"), None
    yield "bomb.png", bomb(30000, 30000), "too_many_pixels"
    lossless = encoded(drawn(), "WEBP", lossless=True)
    yield "bomb.webp", lossless[:21] + b"\xff\xff\xff\x0f" + lossless[25:], "too_many_pixels"


def _not_images() -> Iterator[Case]:
    yield "empty.jpg", b"", "zero_bytes"
    yield "page.jpg", b"<!doctype html><html><body>404</body></html>", "unidentified"
    yield "words.png", b"BM is how this text begins, which is not enough", "unidentified"
    yield "zeros.png", bytes(4096), "unidentified"
    yield "noise.jpg", np.random.default_rng(5).bytes(4096), "unidentified"
    yield "archive.png", b"PK\x03\x04" + bytes(200), "not_a_picture"
    yield "drawing.svg.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unidentified"
    yield "magic.gif", b"GIF89a", "truncated"
    yield "magic.png", b"\x89PNG\r\n\x1a\n" + bytes(100), "truncated"
    yield "document.jpg", b"%PDF-1.7\n", "unsupported_format"
