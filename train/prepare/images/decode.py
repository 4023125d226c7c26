"""From the bytes of an image file to an upright RGB picture, or a typed reason why not.

One contract for every step that opens a picture: what is refused from the header before a pixel is decoded, how
transparency, depth, colour profiles and orientation are read. A change of what comes out raises DECODE_VERSION,
which is part of every latent's preprocessing hash.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

from train.config.dataset import ProbeConfig
from train.prepare.images.damage import jpeg_damage, png_damage, without_big_text
from train.prepare.images.sniff import NO_PICTURES, ends_early, header_size, jpeg_scans, lacks_end, sniff
from train.prepare.tables.schemas import ErrorReason, ExcludedReason
from train.recipe.buckets import Placement

DECODE_VERSION = 2  # 2: profiles of grey with alpha or 16 bits, keys of 16-bit colour, sRGB known by what it does
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", *_ALPHA_MODES)
_ORIENTATION = 0x0112
_MAX_PROFILE_BYTES = 4 << 20
_MAX_SCANS = 100  # progressive pictures have about ten; each passes over all pixels, and costs a bomb 60 bytes
_PROFILE_SPACE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}


class Refused(Exception):
    """A picture that is not taken: `reason` of the closed list, the library's exception where there was one."""

    def __init__(self, reason: ErrorReason | ExcludedReason, message: str, exception: str | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.exception = reason, message, exception

    def __reduce__(self) -> tuple[Any, ...]:
        return Refused, (self.reason, self.message, self.exception)


@dataclass(frozen=True)
class Decoded:
    """An upright RGB picture and what its file said about itself."""

    image: Image.Image
    format: str  # by content, lower case
    mode: str  # Pillow's, as stored
    has_alpha: bool
    n_frames: int
    exif_orientation: int  # 1..8; 1 where none is given
    alpha: Image.Image | None = None  # L, upright, where has_alpha: 255 = not transparent


def decode(data: bytes, rules: ProbeConfig) -> Decoded:
    """The picture in `data`. Raises Refused; nothing else comes out of a decoder, whatever the bytes are."""
    if not data:
        raise Refused("zero_bytes", "the file is empty")
    found = sniff(data)
    if found is None:
        raise Refused("unidentified", f"no known image format begins with {data[:16]!r}")
    if found in NO_PICTURES:
        raise Refused("not_a_picture", f"content is {found}")
    if found not in rules.formats:
        raise Refused("unsupported_format", f"content is {found}, probe.formats has {', '.join(rules.formats)}")
    if not rules.allow_truncated and lacks_end(found, data):
        raise Refused("truncated", f"the {found} has no end marker")
    if found == "png":
        if not rules.allow_truncated and (damage := png_damage(data)) is not None:
            raise Refused("damaged", damage)
        data = without_big_text(data)
    if found == "jpeg" and (scans := jpeg_scans(data)) > _MAX_SCANS:
        raise Refused("unsupported_format", f"a JPEG of {scans} scans, expected at most {_MAX_SCANS}")
    if (size := header_size(found, data)) is not None:  # decoders that allocate when they open
        _check_size(*size, rules)
    with _pillow_limits(rules):
        image = _open(data, found)
        try:
            return _decode(image, data, found, rules)
        except Refused:
            raise
        except MemoryError as error:
            raise Refused("too_many_pixels", f"out of memory while decoding {image.size}", repr(error)) from None
        except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error, ...
            raise Refused("truncated", f"decoding stopped: {error}", _name(error)) from None


def peek(file: IO[bytes], rules: ProbeConfig) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header alone. Raises Refused for what `decode` refuses by that."""
    found = sniff(file.read(64))
    file.seek(0)
    if found is None or found in NO_PICTURES or found not in rules.formats:
        raise Refused("unsupported_format" if found else "unidentified", f"content is {found}")
    with _pillow_limits(rules):
        try:
            image = Image.open(file, formats=[found.upper()])
            frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
            turned = _orientation(image) >= 5  # a quarter turn
        except Exception as error:  # decoders raise whatever they like
            raise Refused("unidentified", f"{found} that cannot be opened", _name(error)) from None
    _check_size(*image.size, rules)
    if frames > 1 and rules.animated == "refuse":
        raise Refused("animated", f"{frames} frames")
    return (image.height, image.width) if turned else image.size


@contextmanager
def _pillow_limits(rules: ProbeConfig) -> Iterator[None]:
    """Our limits in place of Pillow's: it warns at 89 MP and its switch for truncated files is global."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, rules.allow_truncated
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata; what matters raises
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open(data: bytes, found: str) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=[found.upper()])
    except MemoryError as error:
        raise Refused("too_many_pixels", "out of memory while opening", repr(error)) from None
    except Exception as error:
        reason: ErrorReason = "truncated" if ends_early(found, data) else "unidentified"
        if found == "png" and isinstance(error, ValueError):  # Pillow's cap on colour profiles
            raise Refused("unsupported_format", f"{found}: {error}", _name(error)) from None
        raise Refused(reason, f"{found} that cannot be opened", _name(error)) from None


def _check_size(width: int, height: int, rules: ProbeConfig) -> None:
    if width < 1 or height < 1:
        raise Refused("unidentified", f"the header says {width}x{height}")
    if width * height > rules.max_pixels:
        raise Refused("too_many_pixels", f"{width}x{height} is more than probe.max_pixels {rules.max_pixels}")
    if max(width, height) > rules.max_aspect * min(width, height):
        raise Refused("aspect_ratio", f"{width}x{height} is beyond probe.max_aspect {rules.max_aspect:g}")
    if rules.min_area_px is not None and width * height < rules.min_area_px:
        raise Refused("too_small", f"{width}x{height} is less than probe.min_area_px {rules.min_area_px}")


def _decode(image: ImageFile.ImageFile, data: bytes, found: str, rules: ProbeConfig) -> Decoded:
    _check_size(*image.size, rules)
    # An MPO is a JPEG with further pictures (depth, gain map) behind it; the first one is the picture.
    n_frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    if n_frames > 1 and rules.animated == "refuse":
        raise Refused("animated", f"{n_frames} frames; probe.animated: first takes the first one")
    if n_frames > 1:
        image.seek(0)
    mode = image.mode
    deep = found == "png" and any("16" in str(tile.args) for tile in image.tile)
    orientation = _orientation(image)
    image.load()
    if found == "jpeg" and not rules.allow_truncated and (damage := jpeg_damage(data, image)) is not None:
        raise Refused("truncated", damage)
    key = image.info.get("transparency")
    if deep and isinstance(key, tuple):  # Pillow keeps the high bytes of the pixels, and would take the key's low ones
        image.info["transparency"] = tuple(value >> 8 for value in key)
    has_alpha = mode in _ALPHA_MODES or "transparency" in image.info
    rgb, alpha = _to_rgb(image), _alpha(image) if has_alpha else None
    if orientation in _TURN:
        rgb, alpha = rgb.transpose(_TURN[orientation]), alpha and alpha.transpose(_TURN[orientation])
    return Decoded(rgb, found, mode, has_alpha, n_frames, orientation, alpha)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1
    return value if isinstance(value, int) and value in _TURN else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Colour profile applied, composited on white, as RGB."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode not in _PLAIN_MODES:
        raise Refused("unsupported_mode", f"Pillow mode {image.mode}")
    profile = image.info.get("icc_profile")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        colour = _with_profile(image.convert("L") if image.mode in ("LA", "L") else rgba.convert("RGB"), profile)
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(colour, mask=rgba.getchannel("A"))
        return white
    if image.mode in ("L", "CMYK"):
        return _with_profile(image, profile)
    return _with_profile(image.convert("RGB"), profile)


def _alpha(image: Image.Image) -> Image.Image:
    """What is not transparent of a picture that says what is."""
    if image.mode.startswith("I"):  # 16-bit grey, of which one value may be transparent
        return Image.fromarray((np.asarray(image) != image.info.get("transparency")).astype(np.uint8) * 255, "L")
    return image.convert("RGBA").getchannel("A")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey by its high byte: Pillow's own conversion clips at 255 and makes almost everything white."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
        raise Refused("unsupported_mode", f"Pillow mode {image.mode} with values beyond 16 bits")
    colour = _with_profile(Image.fromarray((values >> 8).astype(np.uint8), "L"), image.info.get("icc_profile"))
    key = image.info.get("transparency")
    if isinstance(key, int):
        colour.paste((255, 255, 255), mask=Image.fromarray((values == key).astype(np.uint8) * 255, "L"))
    return colour


def _with_profile(image: Image.Image, profile: object) -> Image.Image:
    """RGB of an L, RGB or CMYK picture, through its ICC profile; one that is broken or of another space is ignored."""
    space = _PROFILE_SPACE.get(image.mode)
    usable = isinstance(profile, bytes) and 128 <= len(profile) <= _MAX_PROFILE_BYTES
    if not usable or space is None:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))  # type: ignore[arg-type]
        if source.profile.xcolor_space != space or (space == "RGB " and _is_srgb(profile)):
            return image.convert("RGB")
        result = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")
    return result if result is not None else image.convert("RGB")


@lru_cache(maxsize=16)
def _is_srgb(profile: bytes) -> bool:
    """Whether converting from the profile moves no colour by more than rounding does.

    Nearly all profiles are copies of sRGB: converting sRGB to itself only costs time and rounds. Their names do not tell,
    "sRGB-elle-V2-g10" is linear.
    """
    levels = (0, 40, 90, 128, 180, 220, 255)
    colours = [colour for v in levels for colour in ((v, v, v), (v, 0, 0), (0, v, 0), (0, 0, v), (v, 255, 90), (90, v, 255))]
    before = Image.fromarray(np.array([colours], np.uint8))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    after = ImageCms.profileToProfile(before, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return after is not None and int(np.abs(np.asarray(after).astype(int) - np.asarray(before)).max()) <= 2


def _name(error: Exception) -> str:
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", str(error))  # an address would differ in every run
    return f"{type(error).__name__}: {text}"[:300]


def resize_crop(image: Image.Image, place: Placement, kind: str = "lanczos") -> np.ndarray:
    """uint8 [bucket_h, bucket_w, 3]: the picture resized to `place` and cropped, in one pass.

    `lanczos`: Pillow, equal to resizing the whole and cropping to within 2 levels. `area`: average over the covered
    area, also when enlarging, as the original trainer's resizing did.
    """
    box, size = _box(image, place), (place.bucket_w, place.bucket_h)
    resizers: dict[str, Callable[[], np.ndarray]] = {
        "lanczos": lambda: np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box)),
        "area": lambda: _area(np.asarray(image), box, size),
    }
    return resizers[kind]()


def means(grey: Image.Image, place: Placement, cell_px: int = 8) -> np.ndarray:
    """float64 [bucket_h / cell_px, bucket_w / cell_px] in 0..1: the mean of an L picture over each cell of the same crop."""
    left, top, right, bottom = _box(grey, place)
    rows = _area_axis(np.asarray(grey).astype(np.float64), np.linspace(top, bottom, place.bucket_h // cell_px + 1))
    return _area_axis(rows.swapaxes(0, 1), np.linspace(left, right, place.bucket_w // cell_px + 1)).swapaxes(0, 1) / 255.0


def _box(image: Image.Image, place: Placement) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the crop in the picture's own pixels."""
    width, height = image.size
    x, y = width / place.resized_w, height / place.resized_h  # two scales: with one, the picture shifts
    return (
        place.crop_left * x,
        place.crop_top * y,
        min((place.crop_left + place.bucket_w) * x, width),
        min((place.crop_top + place.bucket_h) * y, height),
    )


def _area(pixels_HWC: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    left, top, right, bottom = box
    rows_HWC = _area_axis(pixels_HWC.astype(np.float64), np.linspace(top, bottom, size[1] + 1))
    both_WHC = _area_axis(rows_HWC.swapaxes(0, 1), np.linspace(left, right, size[0] + 1))
    return np.clip(np.rint(both_WHC.swapaxes(0, 1)), 0, 255).astype(np.uint8)


def _area_axis(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean over [edges[i], edges[i+1]) along axis 0, from the running sum interpolated at the edges."""
    total = np.concatenate((np.zeros_like(values[:1]), np.cumsum(values, axis=0)))
    whole = np.minimum(np.floor(edges).astype(np.int64), len(values) - 1)
    part = (edges - whole).reshape(-1, *([1] * (values.ndim - 1)))
    at_edges = total[whole] + part * values[whole]
    return np.diff(at_edges, axis=0) / np.diff(edges).reshape(part[1:].shape)
