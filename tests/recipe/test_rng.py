"""Counter-based randomness: published known answers, a scalar oracle, and the statistics of the draws."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.recipe import rng
from train.recipe.rng import Stream

U = rng.uid_of("danbooru:6814120")
FULL = 0xFFFFFFFF
u64s = st.integers(0, 2**64 - 1)
u32s = st.integers(0, 2**32 - 1)


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in plain integers, one block."""
    c, k = list(counter), list(key)
    for _ in range(10):
        hi0, lo0 = divmod(c[0] * 0xD2511F53, 2**32)
        hi1, lo1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((FULL, FULL, FULL, FULL), (FULL, FULL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert " ".join(f"{word:08x}" for word in rng.philox(counter, key)) == expected


def test_keys_are_the_outputs_of_splitmix64():
    low, high = rng.stream_key(0, 1)
    assert high << 32 | low == 0xE220A8397B1DCDAF  # published first output for seed 0
    halves = [" ".join(f"{half:08x}" for half in rng.stream_key(31, n)) for n in (1, 2, 3, 4)]
    assert halves == ["879feaea d7599677", "43bf3fd8 bcd4dd25", "2518d4d5 813dde28", "6824196d 8a62b606"]


def test_uid_is_blake2b_of_the_key():
    assert rng.uid_of("danbooru:1") == 0x9B31406BE0ACA655
    assert U == 0xE660CA8EFBEDC98A
    assert rng.uid_of("a", 2) == rng.uid_of("a\0" + "2") != rng.uid_of("a2")


def test_draws_of_one_known_image():
    assert [f"{key:016x}" for key in rng.sort_keys(31, Stream.ORDER, [U, U], [0, 1])] == [
        "04887aec33972951",
        "51daceaf8d1ee019",
    ]
    assert rng.timesteps(31, [U] * 4, range(4), 0, 1000).tolist() == [273, 161, 808, 758]
    noise = rng.normals(31, Stream.NOISE, U, 0, (4, 128, 128))
    assert noise.dtype == np.float32
    assert [f"{bits:08x}" for bits in noise.reshape(-1)[:4].view(np.uint32)] == [
        "3e8c9c40", "3e476e84", "bff79054", "3eab7f83",
    ]  # fmt: skip
    assert " ".join(rng.shuffled("abcdefgh", 31, U, 0)) == "a e d h g b f c"
    assert " ".join(rng.shuffled("abcdefgh", 31, U, 1)) == "e c a b h g f d"


@settings(max_examples=60, deadline=None)
@given(u64s, st.sampled_from(Stream), u64s, u32s, st.integers(0, 40))
def test_words_equal_the_scalar_generator(seed, stream, uid, epoch, count):
    key = list(rng.stream_key(seed, stream))
    expected = []
    for block in range(-(-count // 4)):
        expected += philox_scalar([block, uid % 2**32, uid >> 32, epoch], key)
    assert rng.words(seed, stream, uid, epoch, count).tolist() == expected[:count]


@settings(max_examples=40, deadline=None)
@given(u64s, st.lists(st.tuples(u64s, u32s), min_size=1, max_size=20), st.integers(0, 900), st.integers(1, 100))
def test_vectorised_draws_equal_single_ones(seed, slots, low, span):
    uids, epochs = zip(*slots, strict=True)
    singly = [rng.words(seed, Stream.TIMESTEP, uid, epoch, 4).tolist() for uid, epoch in slots]
    assert rng.first_words(seed, Stream.TIMESTEP, uids, epochs).tolist() == singly
    drawn = rng.timesteps(seed, uids, epochs, low, low + span)
    assert drawn.tolist() == [low + (four[0] * span >> 32) for four in singly]
    assert drawn.dtype == np.int64


def test_chunked_draws_equal_unchunked_ones(monkeypatch):
    uids = np.arange(100, dtype=np.uint64)
    whole = rng.first_words(1, Stream.ORDER, uids, 3)
    monkeypatch.setattr(rng, "_CHUNK", 7)
    assert (rng.first_words(1, Stream.ORDER, uids, 3) == whole).all()


@settings(max_examples=25, deadline=None)
@given(u64s, u64s, u32s, st.integers(1, 23))
def test_normals_equal_box_muller_in_plain_floats(seed, uid, epoch, count):
    words = rng.words(seed, Stream.NOISE, uid, epoch, 24).tolist()
    uniform = [(word + 0.5) / 2**32 for word in words]
    expected = []
    for u0, u1 in zip(uniform[::2], uniform[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(u0))
        expected += [radius * math.cos(2 * math.pi * u1), radius * math.sin(2 * math.pi * u1)]
    drawn = rng.normals_float64(seed, Stream.NOISE, uid, epoch, count)
    np.testing.assert_allclose(drawn, expected[:count], rtol=1e-12, atol=1e-15)


def test_normals_are_standard_and_independent_between_streams():
    noise = rng.normals(31, Stream.NOISE, U, 0, (4, 128, 128)).astype(np.float64).reshape(-1)
    n = noise.size
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for other in (
        rng.normals(31, Stream.NOISE, U, 1, (n,)),
        rng.normals(32, Stream.NOISE, U, 0, (n,)),
        rng.normals(31, Stream.MULTIRES, U, 0, (n,)),
        rng.normals(31, Stream.NOISE, U + 1, 0, (n,)),
    ):
        assert abs((noise * other).mean()) < 4 / math.sqrt(n)


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 210)])
def test_timesteps_cover_their_range_evenly(low, high):
    drawn = rng.timesteps(31, np.arange(200_000, dtype=np.uint64), 0, low, high)
    counts = np.bincount(drawn - low, minlength=high - low)
    expected = len(drawn) / (high - low)
    assert drawn.min() == low
    assert drawn.max() == high - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = high - low - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(), max_size=30), u64s, u64s, u32s)
def test_shuffle_is_a_permutation_and_leaves_its_input(items, seed, uid, epoch):
    before = list(items)
    assert sorted(rng.shuffled(items, seed, uid, epoch)) == sorted(items)
    assert items == before


def test_every_order_of_three_is_equally_likely():
    counts: dict[str, int] = {}
    for uid in range(6000):
        order = "".join(rng.shuffled("abc", 31, uid, 0))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 25


@pytest.mark.parametrize(("probability", "limit"), [(0.0, 0), (0.25, 2**30), (0.1, 429496729), (1.0, 2**32)])
def test_threshold_is_a_share_of_all_words(probability, limit):
    assert rng.threshold(probability) == limit


def test_canary_is_the_hash_of_the_canary_normals():
    drawn = rng.normals_float64(31, Stream.CANARY, 0, 0, 4096)
    assert rng.canary(31) == hashlib.sha256(drawn.tobytes()).hexdigest() != rng.canary(32)
    # On a machine with another logarithm this differs in an ulp; the run then warns and goes on.
    np.testing.assert_allclose(drawn[:2], rng.normals_float64(31, Stream.CANARY, 0, 0, 2), rtol=0)


def test_stream_numbers_are_fixed():
    assert {stream.name: int(stream) for stream in Stream} == {
        "ORDER": 1, "TILE": 2, "NOISE": 3, "TIMESTEP": 4, "NOISE_OFFSET": 5, "CAPTION_SHUFFLE": 6, "CAPTION_DROP": 7,
        "TAG_DROP": 8, "CROP": 9, "FLIP": 10, "VAE_SAMPLE": 11, "PREVIEW": 12, "CANARY": 13, "MULTIRES": 14,
        "INPUT_PERTURBATION": 15, "VALIDATION_NOISE": 16, "VALIDATION_TIMESTEP": 17, "ROUNDING": 18, "ADAPTER": 40, "CAPTION_KIND": 50,
    }  # fmt: skip
