"""The moving average against its formula."""

from __future__ import annotations

import pytest
import torch

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
