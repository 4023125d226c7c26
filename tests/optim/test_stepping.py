"""The stepping room: chunks, rows that are views or copies, and 16-bit weights through every optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from train.config.stage import OptimizerConfig
from train.optim import optimizers, stepping
from train.optim.optimizers import make_optimizer

NAMES = ["adamw", "adafactor", "adamw8bit"]
SHAPES = {"a": (96, 64), "b": (64,), "c": (96, 64), "d": (8, 4, 3, 3), "e": (64,), "f": (8, 4, 3, 3), "g": (8, 16, 1, 1)}


def config(name: str, **more: object) -> OptimizerConfig:
    return OptimizerConfig(name=name, unet_lr=1e-5, betas=(0.9, 0.99), **more)  # type: ignore[arg-type]


def many(dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator).to(dtype)
        if channels_last and len(shape) == 4:
            values = values.to(memory_format=torch.channels_last)
        found[name] = nn.Parameter(values)
    return found


def fill(parameters: Mapping[str, nn.Parameter], update: int) -> None:
    generator = torch.Generator().manual_seed(100 + update)
    for parameter in parameters.values():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def optimizer_of(parameters: Mapping[str, nn.Parameter], name: str, **more: object) -> torch.optim.Optimizer:
    return make_optimizer([("unet", list(parameters.values()), 1e-5)], config(name, **more))


# --- chunks and rows -----------------------------------------------------------------------------------


def test_chunks_hold_equal_shapes_of_one_group_and_no_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = many()
    members = list(parameters.values())
    optimizer = make_optimizer([("unet", members[:5], 1e-5), ("text_encoder", members[5:], 1e-6)], config("adamw"))
    fill(parameters, 0)
    parameters["e"].grad = None

    def cut() -> list[list[str]]:
        return [[entry.name for entry in chunk] for chunk in stepping.chunks(stepping.entries(optimizer, parameters))]

    assert cut() == [["a", "c"], ["b"], ["d"], ["f"], ["g"]]  # f is of another group than d
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 96 * 64 * 4)
    assert cut() == [["a"], ["c"], ["b"], ["d"], ["f"], ["g"]]
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 1)
    assert len(cut()) == 6


def test_rows_are_the_tensors_themselves_where_they_lie_so_and_else_a_copy() -> None:
    whole = torch.arange(24.0).reshape(4, 3, 2)
    assert stepping.rows(list(whole.unbind())).data_ptr() == whole.data_ptr()
    assert stepping.rows([whole[1]]).data_ptr() == whole[1].data_ptr()
    for tensors in ([whole[1], whole[0]], [whole[0], whole[2]], [whole[0], whole[1].t().contiguous().t()],
                    [whole[0].clone(), whole[1].clone()], list(whole.bfloat16().unbind())):  # fmt: skip
        found = stepping.rows(tensors)
        assert found.dtype == torch.float32 and torch.equal(found, torch.stack([t.float() for t in tensors]))
        found.zero_()
        assert whole.sum() == 276


def test_two_neighbours_that_are_no_one_piece_of_memory_are_copied() -> None:
    """Allocators hand out pieces side by side; a row across both would end outside of the first."""
    numbers = torch.zeros(1 << 12)
    one, other = (torch.frombuffer(numbers.numpy()[part], dtype=torch.float32) for part in (slice(8), slice(8, 16)))
    assert other.data_ptr() == one.data_ptr() + 32
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert stepping.rows([one, other]).data_ptr() != one.data_ptr()


def test_rows_keep_the_layout_of_their_tensors() -> None:
    tensors = [torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last) for _ in range(3)]
    found = stepping.rows(tensors)
    assert torch.equal(found, torch.stack(tensors))
    assert found[1].stride() == tensors[1].stride()


# --- 16-bit weights ------------------------------------------------------------------------------------


def train(weights: str, name: str, updates: int, seed: int = 1) -> list[nn.Parameter]:
    """`updates` steps of constant gradients on weights of 1.0, in fp32 or in bf16 with stochastic rounding."""
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    parameters = {"a": nn.Parameter(torch.ones(96, 64, dtype=dtype)), "b": nn.Parameter(torch.ones(64, dtype=dtype))}
    optimizer = optimizer_of(parameters, name)
    for update in range(updates):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 0.01)
        stepping.apply(optimizer, parameters, update=update, rounding_seed=seed if weights == "bf16" else None)
    return list(parameters.values())


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize(("name", "channels_last"), [  # 8-bit blocks go by memory order: that pair is refused
    *((name, False) for name in NAMES), ("adamw", True), ("adafactor", True),
])  # fmt: skip
def test_a_step_of_16_bit_weights_is_the_class_in_fp32_and_then_rounded(name: str, channels_last: bool) -> None:
    """Weights within one bf16 distance of the library's own step of fp32 weights, and the state its own."""
    half, whole = many(torch.bfloat16, channels_last=channels_last), many(torch.bfloat16, channels_last=channels_last)
    for parameter in whole.values():
        parameter.data = parameter.data.float()
    ours = optimizer_of(half, name, weight_decay=0.1)
    theirs = make_optimizer([("unet", list(whole.values()), 1e-5)], config(name, weight_decay=0.1), strict=True)
    for update in range(3):
        for named in (half, whole):
            fill(named, update)
        for parameter in whole.values():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.bfloat16().float()
        stepping.apply(ours, half, update=update, rounding_seed=3)
        theirs.step()
        for key, parameter in half.items():
            reached = whole[key].detach()
            assert ((parameter.float() - reached).abs() <= reached.abs() * 2**-7 + 1e-30).all(), (update, key)
            whole[key].data = parameter.data.float()  # the next update starts at the rounded weights on both sides
    found, wanted = optimizers.state_tensors(ours, half), optimizers.state_tensors(theirs, whole)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert (value.dtype, value.shape) == (wanted[key].dtype, wanted[key].shape), key
        torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_shares_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One optimizer over all, chunk after chunk or tensor after tensor, and one for each half as on two processes."""

    def trained(holders: int) -> dict[str, nn.Parameter]:
        parameters = many(torch.bfloat16)
        shares = [{n: p for place, (n, p) in enumerate(parameters.items()) if place % holders == k} for k in range(holders)]
        all_of_them = [optimizer_of(share, name) for share in shares]
        for update in range(4):
            fill(parameters, update)
            for optimizer in all_of_them:
                stepping.apply(optimizer, parameters, update=update, rounding_seed=1)
        return parameters

    whole, shared = trained(1), trained(2)
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 1)
    alone = trained(1)
    for key, parameter in whole.items():
        assert torch.equal(parameter, alone[key]) and torch.equal(parameter, shared[key]), key


def test_a_step_leaves_parameter_and_gradient_in_place() -> None:
    """Same memory, same gradient accumulator: DDP's hooks hang on it, and a lost hook is a gradient never reduced."""
    parameter = nn.Parameter(torch.ones(8, 8).bfloat16())
    optimizer = optimizer_of({"a": parameter}, "adamw")
    accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    called: list[int] = []
    accumulator.register_hook(lambda *_: called.append(1))
    place, gradients = parameter.data_ptr(), set()
    for update in range(3):
        (parameter.float() * 0.01).sum().backward()
        stepping.apply(optimizer, {"a": parameter}, update=update, rounding_seed=1)
        assert parameter.data_ptr() == place and parameter.dtype == torch.bfloat16
        assert optimizer.param_groups[0]["params"] == [parameter]
        assert optimizer.state.keys() == {parameter}
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
        assert parameter.grad is not None, "it may lie in a bucket of DDP, which clears it in place"
        gradients.add(parameter.grad.data_ptr())
    assert len(called) == 3 and len(gradients) == 1


# --- on a card -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_16_bit_weights_on_a_card_are_a_rounding_of_the_host_s_step(name: str, channels_last: bool) -> None:
    """The card draws other bits, so each weight may be either neighbour of what the host computes in fp32."""
    half, whole = many(torch.bfloat16, channels_last=channels_last), many(torch.bfloat16, channels_last=channels_last)
    half = {key: nn.Parameter(parameter.detach().cuda()) for key, parameter in half.items()}
    for parameter in whole.values():
        parameter.data = parameter.data.float()
    fill(whole, 0)
    for key, parameter in half.items():
        gradient = whole[key].grad
        assert gradient is not None
        whole[key].grad = gradient.bfloat16().float()
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    ours = optimizer_of(half, name)
    theirs = make_optimizer([("unet", list(whole.values()), 1e-5)], config(name), strict=True)
    stepping.apply(ours, half, update=0, rounding_seed=3)
    theirs.step()
    for key, parameter in half.items():
        reached = whole[key].detach()
        assert ((parameter.float().cpu() - reached).abs() <= reached.abs() * 2**-7 + 1e-6).all(), key
        assert parameter.stride() == whole[key].stride()
