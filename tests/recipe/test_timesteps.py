"""Laws of the timesteps against closed forms; stratified draws as a function of the plan."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.base.errors import ExitCode, Halt
from train.config.stage import NoiseConfig
from train.recipe import rng
from train.recipe.order import Plan, Tile
from train.recipe.timesteps import Law, beta_below, file_identity, shares


def update(images: int, epoch: int = 0, first: int = 0) -> Tile:
    uids = np.array([rng.uid_of(f"k{first + i}") for i in range(images)], dtype=np.uint64)
    return Tile(64, 64, 0, np.arange(images), uids, np.full(images, epoch))


def test_the_default_draws_what_it_always_drew() -> None:
    tile = update(500, 3)
    for ends in ((0, 1000), (100, 300)):
        expected = rng.timesteps(31, tile.uids, tile.epochs, *ends)
        assert np.array_equal(Law.of(NoiseConfig(timesteps=ends)).timesteps(31, [tile]), expected)


@pytest.mark.parametrize(("args", "mean", "deviation"), [((), 0.0, 1.0), ((-0.2, 1.5), -0.2, 1.5)])
def test_logit_normal(args: Any, mean: float, deviation: float) -> None:
    found = shares(NoiseConfig(law="logit_normal", law_args=args))
    middle = (np.arange(1000) + 0.5) / 1000  # Esser et al., eq. 19
    logit = np.log(middle / (1 - middle))
    density = np.exp(-((logit - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi) * middle * (1 - middle))
    np.testing.assert_allclose(found[50:950], density[50:950] / 1000, rtol=2e-3)
    assert found.sum() == pytest.approx(1)


def test_beta() -> None:
    for x in (0.01, 0.2, 0.5, 0.77, 0.99):
        assert beta_below(x, 1, 1) == pytest.approx(x, rel=1e-12)
        assert beta_below(x, 2, 5) == pytest.approx(1 - (1 - x) ** 5 * (1 + 5 * x), rel=1e-11)
        assert beta_below(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), rel=1e-11)
        assert beta_below(x, 80, 60) + beta_below(1 - x, 60, 80) == pytest.approx(1, rel=1e-11)


def test_shift_is_that_of_sd3() -> None:
    found = np.cumsum(shares(NoiseConfig(shift=3.0)))
    for u in (0.1, 0.25, 0.5, 0.9):  # half of a uniform law lies below u; shifted, below 3u / (1 + 2u)
        at = 3 * u / (1 + 2 * u)
        assert np.interp(at * 1000, np.arange(1, 1001), found) == pytest.approx(u, abs=1e-3)


@pytest.mark.parametrize("noise", [
    NoiseConfig(law="logit_normal"), NoiseConfig(law="beta", law_args=(2.0, 5.0), shift=2.0), NoiseConfig(shift=3.0, timesteps=(200, 900)),
])  # fmt: skip
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_their_law(noise: NoiseConfig, stratified: bool) -> None:
    law = Law.of(replace(noise, stratified=stratified))
    drawn = np.concatenate([law.timesteps(7, [update(64, epoch)]) for epoch in range(400)])
    low, high = noise.timesteps
    wanted = shares(noise)[low:high] / shares(noise)[low:high].sum()
    assert low <= drawn.min() and drawn.max() < high
    for cut in range(low + 50, high, 50):  # 25,600 draws: five deviations of a share
        assert (drawn < cut).mean() == pytest.approx(wanted[: cut - low].sum(), abs=5 * 0.5 / math.sqrt(len(drawn)))


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text(", ".join("1" if t in (3, 700) else "3" if t == 701 else "0" for t in range(1000)))
    noise = NoiseConfig(law="file", law_args=(str(path),))
    drawn = np.concatenate([Law.of(noise).timesteps(1, [update(500, epoch)]) for epoch in range(20)])
    assert sorted(set(drawn.tolist())) == [3, 700, 701]
    assert (drawn == 701).mean() == pytest.approx(0.6, abs=0.03)
    before = file_identity(noise)
    path.write_text("1 " * 1000)
    assert file_identity(noise) not in (before, None) and file_identity(NoiseConfig()) is None
    for text in ("1 " * 999, "-1 " * 1000, "0 " * 1000, "nan " * 1000, "x"):
        path.write_text(text)
        with pytest.raises(Halt, match=r"noise\.law_args.*weights\.txt") as caught:
            Law.of(noise)
        assert caught.value.code == ExitCode.USAGE


def test_stratified_holds_one_of_every_part_whatever_the_tiles() -> None:
    law = Law.of(NoiseConfig(stratified=True))
    uids = np.array([rng.uid_of(str(i)) for i in range(96)], dtype=np.uint64)
    plan = Plan(uids, [64] * 60 + [96] * 36, [64] * 96, seed=5, tile_images=4, tiles_per_update=4, epochs=4)
    for step in range(plan.total_updates):
        tiles = plan.update(step)
        times = law.timesteps(5, tiles)
        # of 16 parts of 62.5 timesteps one each; a part's end may fall inside a timestep
        parts = np.sort(times) * 16 / 1000
        assert np.all(parts > np.arange(16) - 1 / 62) and np.all(parts < np.arange(1, 17))
        # the same for the same slots in another cut: who runs which tile, and how large tiles are, says nothing
        slots = dict(zip(np.concatenate([t.uids for t in tiles]).tolist(), times.tolist(), strict=True))
        turned = tiles[::-1]
        again = dict(zip(np.concatenate([t.uids for t in turned]).tolist(), law.timesteps(5, turned).tolist(), strict=True))
        assert again == slots
    assert np.any(np.diff(law.timesteps(5, plan.update(0))) < 0), "no rising order over the slots"


def test_stratified_narrows_the_spread_of_an_updates_loss() -> None:
    """The loss of an image as a function of its timestep alone, of the shape that epsilon's has: falling, steep at first."""
    loss = 1 / (1 + np.arange(1000) / 30)
    spread = {}
    for stratified in (False, True):
        law = Law.of(NoiseConfig(stratified=stratified))
        means = [loss[law.timesteps(9, [update(48, epoch)])].mean() for epoch in range(1500)]
        assert np.mean(means) == pytest.approx(loss.mean(), abs=0.004)
        spread[stratified] = float(np.var(means))
    print(f"variance of an update's loss, 48 images: plain {spread[False]:.2e}, stratified {spread[True]:.2e}")
    assert spread[True] < spread[False] / 20  # measured: a 44th
