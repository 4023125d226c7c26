"""Counter-based randomness: every draw is a function of (seed, stream, image uid, epoch), never of a generator's state.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by SplitMix64. Our own,
because torch and numpy promise no fixed bits across releases and CPU code paths. numpy and the standard library only.
Word j of a stream is output j mod 4 of the block with counter (j div 4, uid low, uid high, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_SPLITMIX_STEP = 0x9E3779B97F4A7C15
_LOW, _SHIFT = np.uint64(_MASK_32), np.uint64(32)
_CHUNK = 1 << 15  # images per vectorised pass: keeps the temporaries inside the cache and far below 100 MB
_CANARY_NORMALS = 4096


class Stream(IntEnum):
    """Purposes of randomness. A number is never reused: checkpoints and plans depend on it."""

    ORDER = 1
    TILE = 2
    NOISE = 3
    TIMESTEP = 4
    NOISE_OFFSET = 5
    CAPTION_SHUFFLE = 6
    CAPTION_DROP = 7
    TAG_DROP = 8
    CROP = 9
    FLIP = 10
    VAE_SAMPLE = 11
    PREVIEW = 12
    CANARY = 13
    MULTIRES = 14
    INPUT_PERTURBATION = 15
    VALIDATION_NOISE = 16
    VALIDATION_TIMESTEP = 17
    ROUNDING = 18  # of bf16 weights; keyed by update, not by image


def uid_of(key: str, repeat: int = 0) -> int:
    """Unsigned 64-bit identity of a record's key; repeat r >= 1 hashes the key, a NUL and the decimal r."""
    text = key if repeat == 0 else f"{key}\0{repeat}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stream_key(seed: int, stream: int) -> tuple[int, int]:
    """Low and high half of the stream's Philox key: the `stream`-th output of SplitMix64 started at `seed`."""
    z = (seed + stream * _SPLITMIX_STEP) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    z ^= z >> 31
    return z & _MASK_32, z >> 32


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> U32:
    """Philox4x32-10 of broadcast counter words (below 2^32 each): uint32 of the broadcast shape + (4,)."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK_32, (k1 + _WEYL_1) & _MASK_32
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, stream: int, uid: int, epoch: int, count: int) -> U32:
    """The first `count` words of one stream, uint32[count]."""
    uid, blocks = int(uid), np.arange(-(-count // 4), dtype=np.uint64)
    counter = (blocks, uid & _MASK_32, uid >> 32, int(epoch))
    return philox(counter, stream_key(seed, stream)).reshape(-1)[:count]


def first_words(seed: int, stream: int, uids: npt.ArrayLike, epochs: npt.ArrayLike) -> U32:
    """Words 0..3 of many streams at once: uint32[N, 4] for `uids` uint64[N] and `epochs`, a number or [N]."""
    uids_N = np.asarray(uids, dtype=np.uint64)
    epochs_N = np.broadcast_to(np.asarray(epochs, dtype=np.uint64), uids_N.shape)
    key = stream_key(seed, stream)
    words_N4 = np.empty((*uids_N.shape, 4), dtype=np.uint32)
    for start in range(0, len(uids_N), _CHUNK):
        part = slice(start, start + _CHUNK)
        counter = (np.uint64(0), uids_N[part] & _LOW, uids_N[part] >> _SHIFT, epochs_N[part])
        words_N4[part] = philox(counter, key)
    return words_N4


def sort_keys(seed: int, stream: int, uids: npt.ArrayLike, epochs: npt.ArrayLike) -> U64:
    """word0 << 32 | word1 of each stream, uint64[N]: what ORDER and TILE sort by."""
    words_N4 = first_words(seed, stream, uids, epochs)
    return (words_N4[:, 0].astype(np.uint64) << _SHIFT) | words_N4[:, 1]


def normals_float64(seed: int, stream: int, uid: int, epoch: int, count: int) -> npt.NDArray[np.float64]:
    """The first `count` standard normals of one stream before rounding (Box-Muller on pairs of words)."""
    words_B4 = words(seed, stream, uid, epoch, -(-count // 4) * 4).reshape(-1, 2, 2)
    uniform = (words_B4 + 0.5) * 2.0**-32  # never 0, so the logarithm is finite
    radius, angle = np.sqrt(-2.0 * np.log(uniform[..., 0])), 2.0 * np.pi * uniform[..., 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[:count]


def normals(seed: int, stream: int, uid: int, epoch: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normals of one stream in C order over `shape`, rounded once from float64 to float32."""
    count = int(np.prod(shape, dtype=np.int64))
    return normals_float64(seed, stream, uid, epoch, count).astype(np.float32).reshape(tuple(shape))


def timesteps(
    seed: int, uids: npt.ArrayLike, epochs: npt.ArrayLike, low: int, high: int, stream: int = Stream.TIMESTEP
) -> npt.NDArray[np.int64]:
    """Uniform timesteps in [low, high), int64[N]: low + (word0 * (high - low) >> 32)."""
    word_N = first_words(seed, stream, uids, epochs)[:, 0].astype(np.uint64)
    return low + ((word_N * np.uint64(high - low)) >> _SHIFT).astype(np.int64)


def threshold(probability: float) -> int:
    """A word below this number means "drop" with the given probability: floor(p * 2^32)."""
    return int(probability * 2.0**32)


def shuffled(items: Sequence[T], seed: int, uid: int, epoch: int) -> list[T]:
    """A copy of `items` in the order that stream CAPTION_SHUFFLE gives this image in this epoch (Fisher-Yates)."""
    result = list(items)
    last = len(result) - 1
    drawn = words(seed, Stream.CAPTION_SHUFFLE, uid, epoch, max(last, 0)).tolist()
    for i, word in zip(range(last, 0, -1), drawn, strict=True):
        j = (word * (i + 1)) >> 32
        result[i], result[j] = result[j], result[i]
    return result


def canary(seed: int) -> str:
    """sha256 of 4,096 float64 normals: another value on resume means another machine's logarithm or sine.

    float64, because after rounding to float32 such machines differ in almost no value.
    """
    drawn = normals_float64(seed, Stream.CANARY, 0, 0, _CANARY_NORMALS)
    return hashlib.sha256(drawn.astype("<f8").tobytes()).hexdigest()
