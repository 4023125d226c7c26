"""What workers do with one picture file: look at it once (probe), or cut the training picture out of it (latents).

Kept apart from the steps so that a worker imports Pillow and numpy and little else.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from train.config.dataset import ProbeConfig, SourceConfig
from train.prepare.folders.files import UnsafePath, read_image, source_root
from train.prepare.images.decode import Decoded, Refused, decode, means, resize_crop
from train.prepare.images.sniff import ext_mismatch
from train.recipe.buckets import Placement

THUMB_PX = 256


@dataclass(frozen=True)
class Look:
    """One record's picture: where it is and what its metadata says."""

    source: SourceConfig
    rules: ProbeConfig
    uri: str
    member: str | None
    stated_size: tuple[int | None, int | None] = (None, None)


@dataclass(frozen=True)
class Cut:
    """One training picture to make: resized and cropped as `place` says."""

    look: Look
    place: Placement
    resize: str
    backend: str
    orig_size: tuple[int, int]  # as probed; the file must still be so
    sha256: str


def probe_one(look: Look) -> dict[str, Any] | Refused:
    """Columns of the probe table that come from the file's content, or why it is not taken. Raises nothing."""
    try:
        data = _read(look)
        found = decode(data, look.rules)
        return _describe(found, data, look)
    except Refused as refused:
        return refused
    except MemoryError as error:
        return Refused("too_many_pixels", f"{_where(look)}: out of memory", repr(error))


def cut_one(job: Cut) -> npt.NDArray[np.uint8] | Refused:
    """uint8 [bucket_h, bucket_w, 3], or why the file cannot be read (any more). Raises nothing."""
    try:
        data = _read(job.look)
        if hashlib.sha256(data).hexdigest() != job.sha256:
            return Refused("bad_record", f"{_where(job.look)}: the file changed after it was probed")
        if job.backend == "pyvips":
            from train.prepare.images.vips import cut_plain  # the optional extra

            if (fast := cut_plain(data, job.place)) is not None:
                return fast
        image = decode(data, job.look.rules).image
        if image.size != job.orig_size:
            return Refused("bad_record", f"{_where(job.look)}: {image.size} pixels, probed as {job.orig_size}")
        return np.ascontiguousarray(resize_crop(image, job.place, job.resize))
    except Refused as refused:
        return refused
    except MemoryError as error:
        return Refused("too_many_pixels", f"{_where(job.look)}: out of memory", repr(error))


@dataclass(frozen=True)
class Veil:
    """One mask to make, of a picture's own transparency or of another file of its shape, cut as the picture is."""

    look: Look  # of the file that holds it
    place: Placement  # of the picture
    orig_size: tuple[int, int]  # of the picture, as probed
    sha256: str | None  # of the picture where it holds its own; None = another file, read as grey
    flip: bool  # of its mirror image


def mask_one(job: Veil) -> npt.NDArray[np.float16] | Refused:
    """float16 [bucket_h/8, bucket_w/8] in 0..1, or why there is none. Raises nothing."""
    try:
        data = _read(job.look)
        if job.sha256 is not None and hashlib.sha256(data).hexdigest() != job.sha256:
            return Refused("bad_record", f"{_where(job.look)}: the file changed after it was probed")
        found = decode(data, job.look.rules)
        grey = found.image.convert("L") if job.sha256 is None else found.alpha
        if grey is None:
            return Refused("bad_record", f"{_where(job.look)}: has no transparency any more")
        (width, height), (own_w, own_h) = job.orig_size, grey.size
        if abs(own_w * height / width - own_h) > max(1.0, 0.02 * own_h):  # rounded sizes are one shape
            return Refused("bad_record", f"{_where(job.look)}: the mask is {own_w}x{own_h}, its picture {width}x{height}: another shape")
        values = means(grey, job.place).astype(np.float16)
        return np.ascontiguousarray(values[:, ::-1]) if job.flip else values
    except Refused as refused:
        return refused
    except MemoryError as error:
        return Refused("too_many_pixels", f"{_where(job.look)}: out of memory", repr(error))


def file_stamp(source: SourceConfig, uri: str) -> tuple[int, int]:
    """(bytes, modification time in ns) of a file, or of the archive that holds it; (-1, -1) when it is not there."""
    try:
        info = os.stat(os.path.join(_root(source.path, source.images), uri))
    except (OSError, ValueError):
        return -1, -1
    return info.st_size, info.st_mtime_ns


@lru_cache(maxsize=64)
def _root(path: str, images: str | None) -> str:
    return str(source_root(SourceConfig(path=path, images=images)))


def _where(look: Look) -> str:
    return look.uri if look.member is None else f"{look.uri} ({look.member})"


def _read(look: Look) -> bytes:
    where = _where(look)
    try:
        return read_image(look.source, look.uri, look.member)
    except UnsafePath as error:
        raise Refused("outside_root", f"{where}: {error}") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused("missing_file", f"{where}: {error.strerror or error}", type(error).__name__) from None
    except (OSError, ValueError, KeyError) as error:  # a damaged archive raises what it likes
        raise Refused("missing_file", f"{where} cannot be read: {error}", type(error).__name__) from None


def _describe(found: Decoded, data: bytes, look: Look) -> dict[str, Any]:
    image = found.image
    width, height = look.stated_size
    # A cell of a table has no name of its own.
    named = "" if (look.member or "").startswith("row:") else PurePosixPath(look.member or look.uri).suffix
    return {
        "status": "ok", "reason": None, "width": image.width, "height": image.height, "mode": found.mode,
        "has_alpha": found.has_alpha, "n_frames": found.n_frames, "exif_orientation": found.exif_orientation,
        "ext_mismatch": bool(named) and ext_mismatch(found.format, named),
        # Metadata gives the stored size on some sites and the upright one on others.
        "size_mismatch": None not in (width, height) and sorted((width, height)) != sorted(image.size),  # type: ignore[type-var]
        "sha256": hashlib.sha256(data).hexdigest(), "pixel_hash": pixel_hash(image),
        "phash": perceptual_hash(image), "file_size": len(data),
    }  # fmt: skip


def pixel_hash(image: Image.Image) -> str:
    """Of size and RGB values: equal for equal pictures, however they are stored."""
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).hexdigest()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the 8x8 lowest frequencies of the 32x32 grey picture lie above their median (as ImageHash)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_DCT @ grey @ _DCT.T)[:8, :8]
    bits = (low > np.median(low)).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


_DCT = 2 * np.cos(np.pi * np.arange(32)[:, None] * (2 * np.arange(32)[None, :] + 1) / 64)


@dataclass(frozen=True)
class Thumb:
    """A small picture for the report; `box` is the part that is kept, as shares of width and height."""

    look: Look
    box: tuple[float, float, float, float] | None
    px: int = THUMB_PX  # of its longest side
    quality: int = 75


def thumbnail(job: Thumb) -> bytes | None:
    """JPEG without metadata; None where the file cannot be read."""
    try:
        image = decode(_read(job.look), job.look.rules).image
    except (Refused, MemoryError):
        return None
    image.thumbnail((job.px, job.px))
    if job.box is not None:
        outline = [value * side for value, side in zip(job.box, image.size * 2, strict=True)]
        corners = (outline[0], outline[1], outline[2] - 1, outline[3] - 1)
        ImageDraw.Draw(image).rectangle(corners, outline=(230, 30, 30), width=2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=job.quality)
    return buffer.getvalue()
