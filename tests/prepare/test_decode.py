"""The decode contract: odd files get a reason or the right pixels; nothing else ever comes out of a decoder."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oddimages import Case, bomb, cases, deep, drawn, encoded
from PIL import Image, ImageCms

from train.config.dataset import ProbeConfig
from train.prepare.images.decode import Refused, decode, resize_crop
from train.prepare.images.looks import perceptual_hash
from train.recipe.buckets import assign, make_buckets, place

RULES = ProbeConfig()
ALL = list(cases())


@pytest.mark.parametrize("case", ALL, ids=[name for name, _, _ in ALL])
def test_odd_files(case: Case) -> None:
    name, data, reason = case
    if reason is None:
        assert decode(data, RULES).image.mode == "RGB", name
        return
    with pytest.raises(Refused) as refused:
        decode(data, RULES)
    assert refused.value.reason == reason, refused.value.message
    assert "0x" not in (refused.value.exception or ""), "an address differs in every run"


def test_enough_odd_files() -> None:
    assert len(ALL) >= 60
    assert len({name for name, _, _ in ALL}) == len(ALL)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_escapes(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([one for _, one, reason in ALL if reason is None])))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(whole), ProbeConfig(max_pixels=1_000_000))
    except Refused:
        return
    assert found.image.mode == "RGB"


def test_orientation_8() -> None:
    """2x1 with left red, turned as orientation 8 says: 1x2, red at the bottom."""
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 8
    upright = decode(encoded(image, "PNG", exif=exif.tobytes()), RULES).image
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 1)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_as_exif_defines_them(orientation: int) -> None:
    """Turning the stored picture by the definition (which stored side is the visual top) gives the original back."""
    upright = drawn(7, 5)
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(stored, "PNG", exif=exif.tobytes()), RULES)
    assert found.exif_orientation == orientation
    assert found.image.tobytes() == upright.tobytes()


def test_transparent_is_white_not_the_hidden_colour() -> None:
    hidden = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    assert set(decode(encoded(hidden, "PNG"), RULES).image.get_flattened_data()) == {(255, 255, 255)}
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode(encoded(half, "PNG"), RULES).image.getpixel((0, 0)) == (127, 127, 127)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode(encoded(grey, "PNG"), RULES).image.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 5)
    palette.putpalette([7] * 768)
    assert decode(encoded(palette, "PNG", transparency=5), RULES).image.getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_keeps_its_mean() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG"), RULES).image)
    assert abs(pixels.mean() - 127.5) < 0.01
    assert np.array_equal(pixels[..., 0], ramp >> 8)


def test_switches() -> None:
    frames = encoded(drawn(seed=1), "PNG", save_all=True, append_images=[drawn(seed=2)])
    first = decode(frames, ProbeConfig(animated="first"))
    assert first.n_frames == 2
    assert first.image.tobytes() == drawn(seed=1).tobytes()
    jpeg = encoded(drawn(), "JPEG")
    assert decode(jpeg[: len(jpeg) // 2], ProbeConfig(allow_truncated=True)).image.size == (90, 120)
    with pytest.raises(Refused) as refused:
        decode(jpeg, ProbeConfig(min_area_px=90 * 120 + 1))
    assert refused.value.reason == "too_small"
    wide = decode(encoded(drawn(1000, 100), "PNG"), ProbeConfig(max_aspect=12.0))
    assert wide.image.size == (1000, 100)
    with pytest.raises(Refused) as refused:
        decode(encoded(drawn(), "WEBP"), ProbeConfig(formats=["jpeg"]))
    assert refused.value.reason == "unsupported_format"


def test_bomb_costs_no_memory() -> None:
    data = bomb(30000, 30000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused):
        decode(data, RULES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_global_limits_of_pillow_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    decode(encoded(drawn(), "PNG"), RULES)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(1500, 2000), (1920, 1080), (300, 310), (2480, 3508), (90, 30)])
def test_resize_crop_equals_whole_resize(size: tuple[int, int]) -> None:
    image = drawn(*(side // 4 or 1 for side in size)).resize(size, Image.Resampling.BICUBIC)
    bucket = min(make_buckets(), key=lambda b: abs(b[0] / b[1] - size[0] / size[1]))
    put = place(*size, bucket)
    whole = image.resize((put.resized_w, put.resized_h), Image.Resampling.LANCZOS)
    box = (put.crop_left, put.crop_top, put.crop_left + put.bucket_w, put.crop_top + put.bucket_h)
    wanted = np.asarray(whole.crop(box), dtype=np.int16)
    found = resize_crop(image, put)
    assert found.shape == (put.bucket_h, put.bucket_w, 3)
    assert np.abs(found - wanted).max() <= 2


def test_area_is_the_mean_of_what_is_covered() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    put = place(90, 60, (30, 20))
    found = resize_crop(Image.fromarray(pixels), put, "area")
    wanted = pixels.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))
    assert np.abs(found - wanted).max() <= 0.5 + 1e-9
    enlarged = resize_crop(Image.fromarray(pixels), place(90, 60, (180, 120)), "area")
    assert np.array_equal(enlarged[::2, ::2], pixels)  # each output pixel lies inside one input pixel


def test_phash_is_imagehash_on_a_known_picture() -> None:
    """Written out: DCT-II of the 32x32 grey picture by its definition."""
    image = drawn(64, 64, seed=3)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    n = np.arange(32)
    low = np.empty((8, 8))
    for u in range(8):
        for v in range(8):
            wave = np.cos(np.pi * u * (2 * n + 1) / 64)[:, None] * np.cos(np.pi * v * (2 * n + 1) / 64)[None, :]
            low[u, v] = 4 * (grey * wave).sum()
    bits = "".join("1" if value > np.median(low) else "0" for value in low.flatten())
    assert perceptual_hash(image) == int(bits, 2)
    assert bin(perceptual_hash(image) ^ perceptual_hash(image.resize((200, 200)))).count("1") <= 3


@pytest.mark.parametrize("size", [(1500, 2000), (1920, 1080), (900, 1300)])
def test_faster_backend_agrees_with_the_reference(size: tuple[int, int]) -> None:
    pytest.importorskip("pyvips")
    from train.prepare.images.vips import cut_plain

    image = drawn(size[0] // 6, size[1] // 6).resize(size, Image.Resampling.BICUBIC)
    put = place(*size, assign(*size, make_buckets()))
    jpeg, png = encoded(image, "JPEG", quality=92), encoded(image, "PNG")
    for data in (jpeg, png):
        found = cut_plain(data, put)
        assert found is not None
        error = found.astype(np.float64) - resize_crop(decode(data, RULES).image, put)
        assert 10 * np.log10(255**2 / (error**2).mean()) > 40
    assert cut_plain(encoded(image, "WEBP"), put) is None
    assert cut_plain(encoded(image.convert("CMYK"), "JPEG"), put) is None
    cut_plain(jpeg[:3000], put)  # damaged: anything but an exception
    cut_plain(png[:3000], put)


def test_faster_backend_leaves_what_is_not_plain_to_the_reference() -> None:
    pytest.importorskip("pyvips")
    from train.prepare.images.vips import cut_plain

    image = drawn(300, 200)
    put = place(300, 200, (96, 64))
    assert cut_plain(encoded(image, "PNG"), put) is not None
    exif = Image.Exif()
    exif[0x0112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for options in ({"exif": exif.tobytes()}, {"icc_profile": srgb}, {"transparency": (1, 2, 3)},
                    {"save_all": True, "append_images": [drawn(300, 200, seed=1)]}):  # fmt: skip
        assert cut_plain(encoded(image, "PNG", **options), put) is None, options
    for mode in ("L", "P", "RGBA", "LA", "1"):
        assert cut_plain(encoded(image.convert(mode), "PNG"), put) is None, mode
    assert cut_plain(deep(3), place(90, 120, (32, 32))) is None  # 16 bits
    assert cut_plain(encoded(image, "PNG"), place(300, 200, (960, 640))) is None  # enlarging
