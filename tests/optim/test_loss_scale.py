"""Loss scaling: halves on overflow, doubles after a quiet interval, counts skips."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from train.optim.loss_scale import GROWTH_INTERVAL, LossScale, loss_scale


def test_halves_and_counts() -> None:
    scale = loss_scale("fp16")
    for n in range(1, 21):
        assert not scale.exhausted
        scale = scale.after(overflowed=True)
        assert scale.scale == 65536.0 / 2**n
    assert scale.exhausted
    assert not scale.after(overflowed=False).exhausted


def test_doubles_after_the_interval() -> None:
    scale = LossScale(good_updates=GROWTH_INTERVAL - 1).after(overflowed=False)
    assert (scale.scale, scale.good_updates) == (131072.0, 0)


def test_off_for_other_precisions() -> None:
    for precision in ("fp32", "bf16"):
        scale = loss_scale(precision)
        assert scale.after(overflowed=True) == scale
        assert scale.scale == 1.0


@given(st.lists(st.booleans(), max_size=60))
def test_always_a_power_of_two_and_survives_json(history: list[bool]) -> None:
    scale = loss_scale("fp16")
    for overflowed in history:
        scale = scale.after(overflowed=overflowed)
        again = loss_scale("fp16", json.loads(json.dumps(asdict(scale))))
        assert again == scale
        mantissa, _ = math.frexp(scale.scale)
        assert mantissa == 0.5
