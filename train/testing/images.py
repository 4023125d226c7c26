"""Row A7 of benchmark A: encoded picture to 832x1216 RGB, speed and PSNR against the Pillow LANCZOS of `prepare`."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from train.base.errors import Halt
from train.prepare.images import vips
from train.prepare.images.decode import resize_crop
from train.recipe.buckets import place
from train.testing.timing import interleave, lasting, row, skipped

BUCKET = (832, 1216)
PICTURES = [("JPEG", (1500, 2000)), ("PNG", (1500, 2000)), ("WEBP", (1500, 2000)), ("JPEG", (3000, 4000))]
GOAL = ">= 1.8x at PSNR > 40 dB"
LEAST_S = 0.3  # of one repeat: a picture takes 0.02 s to 0.25 s


def image_rows(repeats: int) -> list[dict[str, Any]]:
    """One row per format, size and kind of picture; the reference is PIL decode + cv2 INTER_AREA."""
    try:
        import cv2
    except ImportError:
        why = "skipped: pip install -e '.[bench]' (opencv-python-headless, simplejpeg) for the reference"
        return [skipped("A7", "image preparation", why)]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # preparation has a process for each core; more threads would cost the reference CPU time
    try:
        return [_image_row(encoding, size, kind, repeats, cv2) for encoding, size in PICTURES for kind in KINDS]
    finally:
        cv2.setNumThreads(threads)


def _image_row(encoding: str, size: tuple[int, int], kind: str, repeats: int, cv2: Any) -> dict[str, Any]:
    data = _encode(KINDS[kind](size), encoding)
    sides: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: pillow(data),
        "PIL + cv2 INTER_AREA": lambda: _area(data, cv2),
    } | _extras(data, encoding, cv2)
    exact = pillow(data)
    quality = {name: round(_psnr(exact, run()), 1) for name, run in sides.items() if name != "ours"}
    timings = interleave({name: lasting(run, LEAST_S) for name, run in sides.items()}, repeats)
    against = timings["PIL + cv2 INTER_AREA"].report()["cpu_s"]
    notes = {
        "PSNR to ours, dB": quality,
        "speed over PIL + cv2": {n: round(against / t.report()["cpu_s"], 2) for n, t in timings.items()},
    }
    return row("A7", f"{encoding} {size[0]}x{size[1]}, {kind}", GOAL, timings, notes=notes)


def pillow(data: bytes) -> np.ndarray:
    """Our default: Pillow decode, LANCZOS with box."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return resize_crop(image, place(*image.size, BUCKET))


def _extras(data: bytes, encoding: str, cv2: Any) -> dict[str, Callable[[], np.ndarray]]:
    sides: dict[str, Callable[[], np.ndarray]] = {"cv2 decode + INTER_AREA": lambda: _cv2(data, cv2)}
    with contextlib.suppress(Halt):  # not installed
        vips.load_pyvips()
        sides["latents.backend: pyvips"] = lambda: _vips(data)
    try:
        import simplejpeg

        if encoding == "JPEG":
            sides["simplejpeg + INTER_AREA"] = lambda: _resize_area(simplejpeg.decode_jpeg(data), cv2)
    except ImportError:
        pass
    return sides


def _area(data: bytes, cv2: Any) -> np.ndarray:
    return _resize_area(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), cv2)


def _cv2(data: bytes, cv2: Any) -> np.ndarray:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return _resize_area(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), cv2)


def _resize_area(pixels_HWC: np.ndarray, cv2: Any) -> np.ndarray:
    height, width = pixels_HWC.shape[:2]
    to = place(width, height, BUCKET)
    resized: np.ndarray = cv2.resize(pixels_HWC, (to.resized_w, to.resized_h), interpolation=cv2.INTER_AREA)
    return resized[to.crop_top : to.crop_top + to.bucket_h, to.crop_left : to.crop_left + to.bucket_w]


def _vips(data: bytes) -> np.ndarray:
    """`latents.backend: pyvips`, with the reference for what it does not take."""
    with Image.open(io.BytesIO(data)) as image:
        to = place(*image.size, BUCKET)
    fast = vips.cut_plain(data, to)
    return pillow(data) if fast is None else fast


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def _line_art(size: tuple[int, int]) -> Image.Image:
    chance = np.random.default_rng(1)
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    for _ in range(400):
        x0, y0, x1, y1 = (int(v) for v in chance.integers(0, min(size), 4))
        colour = tuple(int(v) for v in chance.integers(0, 256, 3))
        canvas.line([x0, y0, x1, y1], fill=colour, width=int(chance.integers(1, 6)))
        canvas.ellipse([x0, y0, x0 + 60, y0 + 60], outline="black", width=2)
    return image


def _smooth(size: tuple[int, int]) -> Image.Image:
    chance = np.random.default_rng(2)
    coarse = chance.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


KINDS: dict[str, Callable[[tuple[int, int]], Image.Image]] = {"line art": _line_art, "smooth": _smooth}


def _encode(image: Image.Image, encoding: str) -> bytes:
    out = io.BytesIO()
    options: dict[str, Any] = {"quality": 92, "subsampling": 2} if encoding == "JPEG" else {"quality": 90}
    image.save(out, encoding, **({} if encoding == "PNG" else options))
    return out.getvalue()
