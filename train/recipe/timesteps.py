"""From which law timesteps are drawn: how often each of the 1000 comes, and which of them the images of an update get.

Every law is a distribution function F over x = t / 1000; timestep t holds what F gives to [t / 1000, (t + 1) / 1000), and
noise.timesteps cuts a piece out. A slot draws with the first word of its own (image, epoch). Stratified, the words of an
update's G slots are spread: the slot of rank r draws from [r / G, (r + 1) / G). So every slot alone follows the law still,
and an update holds each part of it once; it is a function of the plan, whoever runs it. No torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from train.base.errors import ExitCode, Halt
from train.config.stage import NoiseConfig
from train.recipe import rng
from train.recipe.order import Tile
from train.recipe.rng import Stream

TIMESTEPS = 1000
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
_WORDS = np.uint64(32)  # bits of a word
_MAX_BYTES = 1 << 20
_TERMS = 300  # of a continued fraction: many more than any parameters that somebody trains with need


@dataclass(frozen=True)
class Law:
    """Timesteps low..high-1, how often each is drawn, and whether an update's are spread over them."""

    ends: tuple[int, int]  # upper end exclusive
    bounds: U64 | None = None  # upper end of each timestep's words, without the last's; None = all alike
    stratified: bool = False

    @staticmethod
    def of(noise: NoiseConfig) -> Law:
        """The law of a stage. Raises Halt(USAGE) for a file that is none, or one that gives noise.timesteps nothing."""
        low, high = noise.timesteps
        if noise.law == "uniform" and noise.shift == 1:
            return Law((low, high), None, noise.stratified)
        share_T = shares(noise)[low:high]
        if not share_T.sum() > 0:
            raise Halt(ExitCode.USAGE, f"noise.law {noise.law} draws none of noise.timesteps {low} to {high - 1}")
        below_T = np.cumsum(share_T)
        bounds = np.floor(below_T[:-1] / below_T[-1] * 2.0**32).astype(np.uint64)
        return Law((low, high), bounds, noise.stratified)

    def timesteps(self, seed: int, tiles: Sequence[Tile]) -> I64:
        """Timesteps of an update's slots in plan order, int64[G]; `tiles` are all tiles of the update."""
        uids_G, epochs_G = (np.concatenate([getattr(tile, name) for tile in tiles]) for name in ("uids", "epochs"))
        drawn_G4 = rng.first_words(seed, Stream.TIMESTEP, uids_G, epochs_G).astype(np.uint64)
        words_G = _spread(drawn_G4, uids_G) if self.stratified else drawn_G4[:, 0]
        low, high = self.ends
        if self.bounds is None:
            return low + ((words_G * np.uint64(high - low)) >> _WORDS).astype(np.int64)
        return low + np.searchsorted(self.bounds, words_G, side="right").astype(np.int64)


def _spread(drawn_G4: U64, uids_G: U64) -> U64:
    """Words of which every G-th part of their range holds one, uint64[G].

    Word 0 is the place within the part; the parts are dealt by the order of word 1, which knows nothing of the slots'.
    """
    count = len(uids_G)
    ranks_G = np.empty(count, dtype=np.uint64)
    ranks_G[np.lexsort((uids_G, drawn_G4[:, 1]))] = np.arange(count, dtype=np.uint64)
    spread: U64 = ((ranks_G << _WORDS) + drawn_G4[:, 0]) // np.uint64(count)
    return spread


def shares(noise: NoiseConfig) -> npt.NDArray[np.float64]:
    """How often each timestep is drawn, float64[1000], all of them together 1.

    The shift is that of Esser et al. (arXiv 2403.03206, eq. 23), here of any law: x = s u / (1 + (s - 1) u) of u by F.
    """
    edges = np.arange(TIMESTEPS + 1) / TIMESTEPS
    unshifted = edges / (noise.shift - (noise.shift - 1.0) * edges)
    below = _distribution(noise)
    return np.diff([below(float(x)) for x in unshifted])


def _distribution(noise: NoiseConfig) -> Callable[[float], float]:
    """F of the law, from [0, 1] to [0, 1]."""
    given = noise.law_args
    if noise.law == "logit_normal":
        # Esser et al., arXiv 2403.03206, eq. 19: x = 1 / (1 + exp(-z)), z of a normal distribution; (0, 1) is their rf/lognorm
        normal = NormalDist(*(given or (0.0, 1.0)))
        return lambda x: normal.cdf(math.log(x / (1.0 - x))) if 0 < x < 1 else float(x >= 1)
    if noise.law == "beta":
        return lambda x: beta_below(x, *given)
    if noise.law == "file":
        weights = read_weights(given[0])
        below = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
        return lambda x: float(np.interp(x * TIMESTEPS, np.arange(TIMESTEPS + 1), below))
    return lambda x: x


def beta_below(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22), from its far end."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly: from the other end
        return 1.0 - beta_below(1.0 - x, b, a)
    value = 1.0
    for step in range(_TERMS, 0, -1):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1.0 + term / value
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / (a * value)


def read_weights(path: str) -> npt.NDArray[np.float64]:
    """1000 weights, of timestep 0 first, from a text of numbers between blanks or commas. Raises Halt(USAGE) naming noise.law_args."""
    try:
        text = Path(path).read_text(encoding="utf-8") if Path(path).stat().st_size <= _MAX_BYTES else ""
        weights = np.array([float(word) for word in text.replace(",", " ").split()])
    except (OSError, ValueError) as error:
        raise Halt(ExitCode.USAGE, f"noise.law_args: {path} cannot be read as numbers: {error}") from error
    if len(weights) != TIMESTEPS or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise Halt(ExitCode.USAGE, f"noise.law_args: {path} holds {len(weights)} numbers; noise.law file takes {TIMESTEPS}, one of each "
                                   "timestep from 0 on, none below 0, not all of them 0")  # fmt: skip
    return weights


def file_identity(noise: NoiseConfig) -> str | None:
    """sha256 of the weights that the law reads, because their path says nothing of them; None where it reads none."""
    return hashlib.sha256(read_weights(noise.law_args[0]).tobytes()).hexdigest() if noise.law == "file" else None
