"""A faster way from a plain JPEG or PNG to a training picture through libvips. Extra `images`.

A JPEG shrinks while it is decoded. WebP stays with Pillow: its shrinking decoder falls to 31 dB on line art, and without
it nothing is gained.
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.recipe.buckets import Placement

VIPS_VERSION = 2  # part of every latent's preprocessing hash
# PNG chunks that change the picture in ways only the reference handles: orientation, profiles, transparency, frames.
_SPECIAL = (b"eXIf", b"Raw profile type", b"iCCP", b"tRNS", b"acTL")


def load_pyvips() -> Any:
    """The module pyvips, with one thread. Raises Halt(USAGE) when it is not installed."""
    # Read as libvips starts: preparation has a process for each core, where more threads only cost a fifth of CPU time.
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise Halt(ExitCode.USAGE, f"latents.backend: pyvips needs `pip install .[images]` ({error})") from error
    return pyvips


def cut_plain(data: bytes, place: Placement) -> npt.NDArray[np.uint8] | None:
    """uint8 [bucket_h, bucket_w, 3] of an upright 8-bit RGB JPEG or PNG without colour profile; None for anything else.

    Within 40 dB of the Pillow way and at the same offsets; shrinks only. Raises Halt(USAGE) when pyvips is not installed.
    """
    pyvips = load_pyvips()
    size = _plain_size(data)
    if size is None or size[0] < place.resized_w or size[1] < place.resized_h:
        return None
    try:
        whole = pyvips.Image.thumbnail_buffer(data, place.resized_w, height=place.resized_h, size="force", no_rotate=True)
        part = whole.crop(place.crop_left, place.crop_top, place.bucket_w, place.bucket_h)
        pixels: npt.NDArray[np.uint8] = np.frombuffer(part.write_to_memory(), dtype=np.uint8)
    except pyvips.Error:  # whatever it dislikes, the reference decides
        return None
    if pixels.size != place.bucket_h * place.bucket_w * 3:
        return None
    return pixels.reshape(place.bucket_h, place.bucket_w, 3)


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a picture that needs nothing but decoding, else None."""
    if data.startswith(b"\xff\xd8\xff"):
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
            plain = header.mode == "RGB" and "icc_profile" not in header.info and header.getexif().get(0x0112, 1) == 1
            return header.size if plain else None
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[24:26] == b"\x08\x02":  # 8 bits, RGB
        if any(mark in data for mark in _SPECIAL):
            return None
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return None
