"""bf16 weights: rounding without bias, updates that nearest rounding would lose, every optimizer, exact repetition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.config.stage import OptimizerConfig
from train.optim import optimizers as optimizers_module
from train.optim import rounding


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)  # neighbours in bf16
    for share in (0.0, 0.1, 0.5, 0.9):
        values = (low + share * (high - low)).expand(200_000).contiguous()
        rounded = rounding.round_stochastic(values, generator())
        assert rounded.dtype == torch.bfloat16
        assert set(rounded.unique().tolist()) <= {low.item(), high.item()}
        # four standard deviations of 200,000 draws
        assert (rounded.float().mean() - values[0]).abs() <= (high - low) * 4 * 0.5 / 200_000**0.5


def test_what_bf16_can_hold_stays_and_so_do_signs_and_infinities() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-30, float("inf"), -float("inf")]).bfloat16().float()
    assert torch.equal(rounding.round_stochastic(exact, generator()), exact.bfloat16())
    values = -torch.rand(1000, generator=generator(1)) - 0.1
    rounded = rounding.round_stochastic(values, generator(2)).float()
    assert ((rounded - values).abs() <= values.abs() * 2**-7).all()
    assert (rounded < 0).all()
    assert torch.isnan(rounding.round_stochastic(torch.tensor([float("nan")]), generator())).all()


def test_memory_format_survives() -> None:
    weights = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert rounding.round_stochastic(weights, generator()).is_contiguous(memory_format=torch.channels_last)


def config(name: str) -> OptimizerConfig:
    return OptimizerConfig(name=name, unet_lr=1e-5, betas=(0.9, 0.99))  # type: ignore[arg-type]


def named(parameters: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {str(number): parameter for number, parameter in enumerate(parameters)}


def train(weights: str, name: str, updates: int, seed: int = 1) -> list[nn.Parameter]:
    """`updates` steps of constant gradients on weights of 1.0, in fp32 or in bf16 with stochastic rounding."""
    parameters = [nn.Parameter(torch.ones(96, 64)), nn.Parameter(torch.ones(64))]
    if weights == "bf16":
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
    optimizer = optimizers_module.make_optimizer([("unet", parameters, 1e-5)], config(name))
    for update in range(updates):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.01)
        if weights == "bf16":
            rounding.step(optimizer, named(parameters), seed=seed, update=update)
        else:
            optimizer.step()
    return parameters


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_updates_below_the_resolution_of_bf16_arrive(name: str) -> None:
    exact, rounded = train("fp32", name, 60), train("bf16", name, 60)
    moved = 1 - exact[0].mean().item()
    assert 0 < moved < 2**-9  # half the distance below 1: nearest rounding would have moved nothing
    assert rounded[0].dtype == torch.bfloat16
    # the mean over 6,144 weights; each ends at most one bf16 distance from where it should be
    assert 1 - rounded[0].float().mean().item() == pytest.approx(moved, rel=0.35)


def test_equal_seed_and_update_round_alike() -> None:
    one, again, other = (train("bf16", "adamw", 20, seed)[0].detach() for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_state_is_fp32_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("bf16", "adamw", 5)
    monkeypatch.setattr(rounding, "CHUNK_BYTES", 1)
    parts = train("bf16", "adamw", 5)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
    parameters = [nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))]
    optimizer = optimizers_module.make_optimizer([("unet", parameters, 1e-5)], config("adamw"))
    parameters[0].grad = gradient = torch.ones_like(parameters[0])
    rounding.step(optimizer, named(parameters), seed=1, update=0)
    assert optimizer.state[parameters[0]]["exp_avg"].dtype == torch.float32
    assert parameters[0].grad is gradient, "DDP's buckets hold it"


def test_a_share_of_the_parameters_rounds_as_the_whole() -> None:
    """Two optimizers over one parameter each, as on two processes, against one optimizer over both."""
    whole = train("bf16", "adamw", 5)
    shared = [nn.Parameter(torch.ones(96, 64).bfloat16()), nn.Parameter(torch.ones(64).bfloat16())]
    optimizers = [optimizers_module.make_optimizer([("unet", [p], 1e-5)], config("adamw")) for p in shared]
    for update in range(5):
        for optimizer in optimizers:
            for parameter in shared:
                parameter.grad = torch.full_like(parameter, 0.01)
            rounding.step(optimizer, named(shared), seed=1, update=update)
    for one, other in zip(whole, shared, strict=True):
        assert torch.equal(one, other)


def test_a_step_leaves_the_parameter_itself_in_place() -> None:
    """Same memory, same gradient accumulator: DDP's hooks hang on it, and a lost hook is a gradient never reduced."""
    parameter = nn.Parameter(torch.ones(8, 8).bfloat16())
    optimizer = optimizers_module.make_optimizer([("unet", [parameter], 1e-5)], config("adamw"))
    accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    called: list[int] = []
    accumulator.register_hook(lambda *_: called.append(1))
    place = parameter.data_ptr()
    for update in range(3):
        (parameter.float() * 0.01).sum().backward()
        rounding.step(optimizer, {"a": parameter}, seed=1, update=update)
        assert parameter.data_ptr() == place
        assert parameter.dtype == torch.bfloat16
        assert optimizer.param_groups[0]["params"] == [parameter]
        assert optimizer.state.keys() == {parameter}
    assert len(called) == 3
