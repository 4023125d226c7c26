"""Rounding at random: without bias, to a neighbour, by (seed, update, parameter) alone."""

from __future__ import annotations

import torch

from train.optim import rounding


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return rounding.round_stochastic(values[None], [seed])[0]


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)  # neighbours in bf16
    for share in (0.0, 0.1, 0.5, 0.9):
        values = (low + share * (high - low)).expand(200_000).contiguous()
        found = rounded(values)
        assert found.dtype == torch.bfloat16
        assert set(found.unique().tolist()) <= {low.item(), high.item()}
        # four standard deviations of 200,000 draws
        assert (found.float().mean() - values[0]).abs() <= (high - low) * 4 * 0.5 / 200_000**0.5


def test_what_bf16_can_hold_stays_and_so_do_signs_and_infinities() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-30, float("inf"), -float("inf")]).bfloat16().float()
    assert torch.equal(rounded(exact), exact.bfloat16())
    values = -torch.rand(1000, generator=torch.Generator().manual_seed(1)) - 0.1
    found = rounded(values, 2).float()
    assert ((found - values).abs() <= values.abs() * 2**-7).all()
    assert (found < 0).all()
    assert torch.isnan(rounded(torch.tensor([float("nan")]))).all()


def test_memory_format_survives_and_draws_do_not_depend_on_it() -> None:
    weights = torch.randn(2, 8, 4, 3, 3)
    turned = weights.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # rows in channels_last
    found = rounding.round_stochastic(turned, [5, 6])
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, rounding.round_stochastic(weights, [5, 6]))


def test_a_row_draws_from_its_own_seed_whatever_is_beside_it() -> None:
    """The draws of checkpoints written before rows were put together: torch's generator of that seed, in order."""
    values = torch.randn(3, 40, 5)
    together = rounding.round_stochastic(values, [7, 8, 2**63 + 1])
    for row, seed in enumerate((7, 8, 2**63 + 1)):
        draws = torch.randint(0, 1 << 16, (40, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        expected = ((values[row].view(torch.int32) + draws) & -(1 << 16)).view(torch.float32).bfloat16()
        assert torch.equal(together[row], expected)


def test_seeds_go_with_the_place_among_all_parameters_and_the_update() -> None:
    first, again, later = (rounding.seeds(["a", "b", "c"], seed=3, update=update) for update in (4, 4, 5))
    assert first == again
    assert len({*first.values(), *later.values()}) == 6
    assert rounding.seeds(["x", "b"], seed=3, update=4)["b"] == first["b"]
