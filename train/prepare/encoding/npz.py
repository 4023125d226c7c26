"""Latents that sd-scripts left beside the pictures: found, checked and taken over instead of encoding again.

`a/b.png` has them in `a/b.npz` (older releases and prepare_buckets_latents.py) or in `a/b_<width>x<height>_sdxl.npz`
(newer ones): arrays `latents` fp32 [4,h,w], unscaled, one frozen draw, `original_size` [width, height], `crop_ltrb`.
They say nothing of the VAE, so a source declares it (`sources[].npz_vae`); flipped latents and masks are left alone.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.config.dataset import SourceConfig
from train.data.shards import read_meta
from train.prepare.folders.files import UnsafePath, resolve_inside, source_root

NPZ_PREPROCESSING = "sd-scripts"  # stands in the index where ours would: resized by that trainer, by area averaging
_MOST_BYTES = 16 * 2**20  # four times the latents of 4096x4096 pixels
# What a cut, encrypted, foreign or forged file raises.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Unusable:
    """Why a .npz is not taken over; the picture is encoded instead. `name` is relative to the source's images."""

    why: str
    name: str


def imported(
    source: SourceConfig, fact: Mapping[str, Any], bucket: tuple[int, int], store: str
) -> npt.NDArray[np.float32] | Unusable | None:
    """fp32 [4,h,w] of one picture in `bucket` (width, height), why its file is of no use, or None where there is none.

    `fact` has the record's uri and member and the probe's width, height, has_alpha, exif_orientation. `store` is the
    dtype kept, which the values must fit.
    """
    if source.npz_vae is None or fact["member"] is not None:
        return None
    root = source_root(source)
    name = _find(source, root, str(fact["uri"]), (fact["width"], fact["height"]))
    if name is None or isinstance(name, Unusable):
        return name
    if (fact["exif_orientation"] or 1) != 1:
        return Unusable("turned by EXIF, which sd-scripts ignores", name)
    if fact["has_alpha"]:
        return Unusable("transparent, and sd-scripts shows the colour behind it", name)
    try:
        latents, size = _load(root / name, bucket)
    except _DAMAGE as error:
        return Unusable(f"{error}"[:200], name)
    if size != (fact["width"], fact["height"]):
        return Unusable("of a picture of another size", name)
    limit = float(np.finfo(np.float16).max) if store == "fp16" else float(np.finfo(np.float32).max)
    if not bool((np.abs(latents) <= limit).all()):  # false for NaN too
        return Unusable(f"not finite in {store}", name)
    return latents


def _find(source: SourceConfig, root: Path, uri: str, size: tuple[int, int]) -> str | Unusable | None:
    """The file below the root, by the older name first, as sd-scripts looks."""
    stem = os.path.splitext(uri)[0]
    for name in (f"{stem}.npz", f"{stem}_{size[0]:04d}x{size[1]:04d}_sdxl.npz"):
        try:
            path = resolve_inside(root, name, source.follow_links)
        except UnsafePath as error:
            return Unusable(f"{error}", name)
        if path.is_file():
            return name
    return None


def _load(path: Path, bucket: tuple[int, int]) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """(latents, size of the picture they were made from). Raises ValueError and what a damaged zip raises."""
    shape = (4, bucket[1] // 8, bucket[0] // 8)
    with zipfile.ZipFile(path) as archive:
        # New releases may keep several resolutions in one file, each under its latent height and width.
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        suffix = f"_{shape[1]}x{shape[2]}" if f"latents_{shape[1]}x{shape[2]}" in names else ""
        if f"latents{suffix}" not in names:
            raise ValueError("no array `latents`: of an older release, or of another kind of model")
        if f"original_size{suffix}" not in names:
            raise ValueError("no array `original_size`: of an older release")
        size = _array(archive, f"original_size{suffix}")
        latents = _array(archive, f"latents{suffix}")
    if latents.shape != shape:
        sides = "x".join(str(8 * side) for side in latents.shape[:0:-1]) if latents.ndim == 3 else str(latents.shape)
        raise ValueError(f"latents of the bucket {sides}, ours is {bucket[0]}x{bucket[1]}")
    if size.shape != (2,) or latents.dtype.kind != "f" or size.dtype.kind not in "iu":
        raise ValueError(f"latents {latents.dtype}, original_size {size.dtype} {size.shape}: not of sd-scripts")
    return latents.astype(np.float32), (int(size[0]), int(size[1]))


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """One member. Sizes are checked before anything is unpacked or allocated; objects would be pickles: refused."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > _MOST_BYTES:
        raise ValueError(f"`{name}` unpacks to {info.file_size} bytes, more than latents have")
    data = archive.read(info)
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"`{name}` is of npy version {version}")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = header(file)
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(data) - file.tell():
        raise ValueError(f"`{name}` is {dtype} {shape} in {len(data)} bytes")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if columns_first else "C")


def tally(dataset: Path, shards: Iterable[str]) -> dict[str, Any]:
    """{images taken over, unusable by reason, one file of each as example} over the shards' headers."""
    images, reasons, examples = 0, Counter[str](), dict[str, str]()
    for shard in shards:
        meta = read_meta(dataset / shard)
        images += len(json.loads(meta.get("npz", "[]")))
        for name, why in json.loads(meta.get("npz_unusable", "[]")):
            reasons[why] += 1
            examples.setdefault(why, name)
    return {"images": images, "unusable": dict(sorted(reasons.items())), "examples": dict(sorted(examples.items()))}
