"""The moving average against its formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train.optim import stepping
from train.optim.ema import Ema


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_it_is_the_weighted_sum_of_all_weights_so_far(device: str) -> None:
    decay, start = 0.9, weights(0)
    average = Ema(start, decay, 1, device)
    for n in range(1, 8):
        average.update(weights(n), n)
    for name, found in average.average.items():
        wanted = decay**7 * start[name].double()
        wanted += sum((1 - decay) * decay ** (7 - n) * weights(n)[name].double() for n in range(1, 8))
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-7)


class Launched(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "channels_last"])
def test_it_takes_one_operation_a_shape_and_has_the_bits_of_a_lerp_a_tensor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {str(n): torch.randn(*((8, 4, 3, 3) if n % 2 else (40, 30)), generator=generator) for n in range(60)}
    start = {n: w.bfloat16() if kind == "bf16" else w for n, w in start.items()}
    if kind == "channels_last":
        start = {n: w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for n, w in start.items()}
    later = {n: w * 1.01 + 0.001 for n, w in start.items()}
    average = Ema(start, 0.999, 1, "same")
    with Launched() as launched:
        average.update(later, 1)
    assert launched.found["_foreach_lerp_"] == 2 and launched.found["lerp_"] == 0
    for n, weight in later.items():
        assert torch.equal(average.average[n], start[n].float().clone().lerp_(weight.float(), 1.0 - 0.999))
        assert average.average[n].stride() == weight.stride()
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 1)  # one tensor at a time, as where they come from another device
    alone = Ema(start, 0.999, 1, "cpu")
    alone.update(later, 1)
    assert all(torch.equal(alone.average[n], average.average[n]) for n in start)


def test_every_tenth_update_with_the_tenth_power_is_the_same_average_to_a_twentieth_of_a_percent() -> None:
    """Weights that drift by 1 an update: the average lies behind by d / (1 - d), by n d^n / (1 - d^n) with every n-th."""
    decay, n = 0.9999, 10
    often, seldom = Ema({"a": torch.zeros(1)}, decay, 1, "same"), Ema({"a": torch.zeros(1)}, decay**n, n, "same")
    for average in (often, seldom):
        average.average["a"] = average.average["a"].double()  # fp32 would add its rounding of 20,000 updates
    for update in range(1, 20_001):
        for average in (often, seldom):
            average.update({"a": torch.full((1,), float(update), dtype=torch.float64)}, update)
    behind = [20_000 - float(average.average["a"]) for average in (often, seldom)]
    assert behind[0] == pytest.approx((decay / (1 - decay)) * (1 - decay**20_000), rel=1e-6)
    assert behind[1] == pytest.approx(behind[0], rel=5e-4)


def test_it_starts_as_a_copy_in_fp32() -> None:
    start = {"a": torch.ones(3, dtype=torch.bfloat16)}
    average = Ema(start, 0.5, 1, "same")
    start["a"].zero_()
    assert average.average["a"].dtype == torch.float32
    assert average.average["a"].tolist() == [1.0] * 3


def test_it_follows_every_nth_update_only() -> None:
    average = Ema({"a": torch.zeros(1)}, 0.5, 3, "same")
    seen = []
    for n in range(1, 8):
        average.update({"a": torch.ones(1)}, n)
        seen.append(float(average.average["a"]))
    assert seen == [0.0, 0.0, 0.5, 0.5, 0.5, 0.75, 0.75]


def test_a_checkpoint_brings_it_back_exactly() -> None:
    average, other = Ema(weights(0), 0.99, 1, "same"), Ema(weights(5), 0.99, 1, "same")
    average.update(weights(1), 1)
    buffers = {name: tensor.data_ptr() for name, tensor in other.average.items()}
    other.load({name: tensor.clone() for name, tensor in average.average.items()})
    assert all(torch.equal(other.average[name], average.average[name]) for name in average.average)
    assert buffers == {name: tensor.data_ptr() for name, tensor in other.average.items()}, "in place"
    with pytest.raises(KeyError):
        other.load({"a": torch.zeros(3, 4)})


def test_gradients_do_not_reach_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    average = Ema({"a": parameter}, 0.5, 1, "same")
    average.update({"a": parameter}, 1)
    assert not average.average["a"].requires_grad
