"""Counter-based randomness: every draw is a function of (seed, stream, image uid, epoch), never of a generator's state.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by SplitMix64. Our own,
because torch and numpy promise no fixed bits across releases and CPU code paths. numpy and the standard library only.
Word j of a stream is output j mod 4 of the block with counter (j div 4, uid low, uid high, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_MASK_32 = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = np.array((0xD2511F53, 0xCD9E8D57), dtype=np.uint64)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_SPLITMIX_STEP = 0x9E3779B97F4A7C15
_LOW, _SHIFT = np.uint64(_MASK_32), np.uint64(32)
_CHUNK = 1 << 15  # images per vectorised pass: keeps the temporaries inside the cache and far below 100 MB
_NORMALS_AT_ONCE = 1 << 16  # one image of 1024x1024: half a MB per temporary
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
    CAPTION_KIND = 50  # tags, prose or both, and which of several captions
    ADAPTER = 40  # first weights of an adapter; keyed by the tensor's name


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
    shape = np.broadcast_shapes(*(np.shape(word) for word in counter))
    even, odd = np.empty((2, 2, *shape), dtype=np.uint64)  # (c0, c2) and (c1, c3): half the calls, and no new arrays
    even[0], odd[0], even[1], odd[1] = counter
    product = np.empty_like(even)
    pair = (2, *(1,) * len(shape))
    multipliers = _MULTIPLIERS.reshape(pair)
    for round_key in _round_keys(key):
        crossed = np.multiply(even, multipliers, out=product)[::-1]
        np.right_shift(crossed, _SHIFT, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, round_key.reshape(pair), out=even)
        np.bitwise_and(crossed, _LOW, out=odd)
    result = np.empty((*shape, 4), dtype=np.uint32)
    result[..., 0], result[..., 1], result[..., 2], result[..., 3] = even[0], odd[0], even[1], odd[1]
    return result


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, int]) -> U64:
    """uint64[10, 2]: both key words of every round."""
    keys = [[(key[0] + i * _WEYL_0) & _MASK_32, (key[1] + i * _WEYL_1) & _MASK_32] for i in range(_ROUNDS)]
    return np.array(keys, dtype=np.uint64)


def words(seed: int, stream: int, uid: int, epoch: int, count: int) -> U32:
    """The first `count` words of one stream, uint32[count]."""
    return words_many(seed, stream, [int(uid)], [int(epoch)], count)[0]


def words_many(seed: int, stream: int, uids: Sequence[int], epochs: Sequence[int], count: int) -> U32:
    """`words` of many (image, epoch) at once, uint32[B, count]: for few words the call costs more than the words."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    uids_B1 = np.array(uids, dtype=np.uint64)[:, None]
    epochs_B1 = np.array(epochs, dtype=np.uint64)[:, None]
    drawn = philox((blocks, uids_B1 & _LOW, uids_B1 >> _SHIFT, epochs_B1), stream_key(seed, stream))
    return drawn.reshape(len(uids_B1), 4 * len(blocks))[:, :count]


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
    return _box_muller(words(seed, stream, uid, epoch, -(-count // 4) * 4))[:count]


def _box_muller(words: U32) -> npt.NDArray[np.float64]:
    """float64[..., n] from uint32[..., n], n even: two normals from each pair of words."""
    uniform = (words.reshape(*words.shape[:-1], -1, 2) + 0.5) * 2.0**-32  # never 0, so the logarithm is finite
    radius, angle = np.sqrt(-2.0 * np.log(uniform[..., 0])), 2.0 * np.pi * uniform[..., 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(words.shape)


def normals(seed: int, stream: int, uid: int, epoch: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normals of one stream in C order over `shape`, rounded once from float64 to float32."""
    count = int(np.prod(shape, dtype=np.int64))
    return normals_float64(seed, stream, uid, epoch, count).astype(np.float32).reshape(tuple(shape))


def normals_many(
    seed: int, stream: int, uids: Sequence[int], epochs: Sequence[int], shape: Sequence[int]
) -> npt.NDArray[np.float32]:
    """`normals` of many (image, epoch) at once: float32 [B, *shape]."""
    count = int(np.prod(shape, dtype=np.int64))
    pairs = -(-count // 2) * 2
    result = np.empty((len(uids), count), dtype=np.float32)
    together = max(1, _NORMALS_AT_ONCE // count)
    for start in range(0, len(uids), together):
        part = slice(start, start + together)
        result[part] = _box_muller(words_many(seed, stream, uids[part], epochs[part], pairs))[:, :count]
    return result.reshape(-1, *shape)


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
    """A copy of `items` in the order that stream CAPTION_SHUFFLE gives this image in this epoch."""
    return shuffled_many([items], seed, [uid], [epoch])[0]


def shuffled_many(many: Sequence[Sequence[T]], seed: int, uids: Sequence[int], epochs: Sequence[int]) -> list[list[T]]:
    """`shuffled` of many (image, epoch) at once (Fisher-Yates: D. Knuth, TAOCP vol. 2, algorithm 3.4.2 P)."""
    longest = max(map(len, many), default=0)
    drawn = words_many(seed, Stream.CAPTION_SHUFFLE, uids, epochs, max(longest - 1, 0)).tolist()
    result = [list(items) for items in many]
    for items, own in zip(result, drawn, strict=True):
        for i, word in zip(range(len(items) - 1, 0, -1), own, strict=False):
            j = (word * (i + 1)) >> 32
            items[i], items[j] = items[j], items[i]
    return result


def canary(seed: int) -> str:
    """sha256 of 4,096 float64 normals: another value on resume means another machine's logarithm or sine.

    float64, because after rounding to float32 such machines differ in almost no value.
    """
    drawn = normals_float64(seed, Stream.CANARY, 0, 0, _CANARY_NORMALS)
    return hashlib.sha256(drawn.astype("<f8").tobytes()).hexdigest()
