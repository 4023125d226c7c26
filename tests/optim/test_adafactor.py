"""Batched Adafactor against transformers' class: numbers, state both ways, launches, and chunks that change nothing."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import optimization

from train.config.stage import OptimizerConfig
from train.optim import stepping
from train.optim.optimizers import load_state_tensors, make_optimizer, state_tensors
from train.optim.stepping import Adafactor
from train.storage import state_files
from train.testing.counts import SDXL_UNET
from train.testing.loop import least_shapes

# Kinds of SDXL's tensors: linears, norms and biases, convolutions, 1x1 convolutions, and a lone shape.
SHAPES = [(48, 32), (48,), (48, 32), (32, 16, 3, 3), (32,), (48,), (32, 16, 3, 3), (24, 40, 1, 1), (4, 320, 3, 3), (1280,)]
OPTIONS: list[dict[str, object]] = [
    {},
    {"weight_decay": 0.1},
    {"scale_parameter": True},
    {"scale_parameter": True, "weight_decay": 0.1, "decay": "matrices"},
    {"clip_threshold": 0.3, "decay_rate": -0.5},
    {"eps": (1e-10, 1e-2), "scale_parameter": True},
]


def network(shapes: list[tuple[int, ...]] = SHAPES, *, channels_last: bool = False) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator) * 0.05
        values = values.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else values
        found[str(number)] = nn.Parameter(values)
    return found


def fill(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Gradients of very unlike sizes, as the clipping of updates is there for, and one that is zero throughout."""
    generator = torch.Generator().manual_seed(1000 + step)
    for number, parameter in enumerate(parameters.values()):
        drawn = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number % 4 - step % 3)
        parameter.grad = torch.empty_like(parameter).copy_(drawn if number != 3 else torch.zeros(()))


def optimizer_of(parameters: dict[str, nn.Parameter], *, strict: bool, **more: object) -> torch.optim.Optimizer:
    config = OptimizerConfig(name="adafactor", unet_lr=1e-3, **more)  # type: ignore[arg-type]
    return make_optimizer([("unet", list(parameters.values()), 1e-3)], config, strict=strict)


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Every tensor within 1e-6 of its own size."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), name
        difference = (tensor.double() - other.double()).abs().max()
        assert difference <= 1e-6 * other.double().abs().max(), (name, float(difference))


def tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {**{n: p.detach() for n, p in parameters.items()}, **state_tensors(optimizer, parameters)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_twenty_updates_are_the_class_s(options: dict[str, object], channels_last: bool) -> None:
    ours, theirs = network(channels_last=channels_last), network(channels_last=channels_last)
    batched, own = optimizer_of(ours, strict=False, **options), optimizer_of(theirs, strict=True, **options)
    assert type(batched) is Adafactor and type(own) is optimization.Adafactor
    for step in range(20):
        for parameters, optimizer in ((ours, batched), (theirs, own)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step)
            fill(parameters, step)
            optimizer.step()
        assert_near(tensors(ours, batched), tensors(theirs, own))
    assert all(p.stride() == q.stride() for p, q in zip(ours.values(), theirs.values(), strict=True))


@pytest.mark.parametrize(("first", "second"), list(itertools.product((True, False), repeat=2)))
def test_either_goes_on_from_the_file_of_the_other(first: bool, second: bool, tmp_path: Path) -> None:
    straight, other = network(), network()
    own = optimizer_of(straight, strict=True)
    saver = optimizer_of(other, strict=first)
    for step in range(5):
        for parameters, optimizer in ((straight, own), (other, saver)):
            fill(parameters, step)
            optimizer.step()
    state_files.write(tmp_path / "optimizer.safetensors", state_tensors(saver, other))
    resumed = optimizer_of(other, strict=second)
    load_state_tensors(resumed, other, load_file(tmp_path / "optimizer.safetensors"), name="adafactor")
    for step in range(5, 20):
        for parameters, optimizer in ((straight, own), (other, resumed)):
            fill(parameters, step)
            optimizer.step()
    assert_near(tensors(other, resumed), tensors(straight, own))


def test_a_resumed_run_has_the_bits_of_a_straight_one() -> None:
    straight, other = network(), network()
    one, two = optimizer_of(straight, strict=False), optimizer_of(other, strict=False)
    for step in range(6):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in state_tensors(two, other).items()}
            two = optimizer_of(other, strict=False)
            load_state_tensors(two, other, saved, name="adafactor")
        for parameters, optimizer in ((straight, one), (other, two)):
            fill(parameters, step)
            optimizer.step()
    ours, theirs = tensors(straight, one), tensors(other, two)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_shares_a_chunk_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a share of the parameters (ZeRO-1) is stepped as in the whole. Large enough that sums use every thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for limit in (1 << 28, 1):
            monkeypatch.setattr(stepping, "CHUNK_BYTES", limit)
            more = [(640, 320), (640, 320), (70_000,), (70_000,), (96, 64, 3, 3), (96, 64, 3, 3), (), ()]
            parameters = network([*SHAPES, *more], channels_last=threads == 2)
            optimizer = optimizer_of(parameters, strict=False, scale_parameter=True, weight_decay=0.1)
            for step in range(3):
                fill(parameters, step)
                optimizer.step()
            found.append(tensors(parameters, optimizer))
        assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []
    finally:
        torch.set_num_threads(before)


def test_a_tensor_that_once_had_no_gradient_keeps_its_own_count() -> None:
    ours, theirs = network(), network()
    pairs = [(ours, optimizer_of(ours, strict=False)), (theirs, optimizer_of(theirs, strict=True))]
    for step in range(4):
        for parameters, optimizer in pairs:
            fill(parameters, step)
            if step == 1:
                parameters["2"].grad = None
            optimizer.step()
    assert pairs[0][1].state[ours["2"]]["step"] == 3
    assert_near(tensors(*pairs[0]), tensors(*pairs[1]))


def test_what_the_rows_do_not_know_is_the_class_s_own_step() -> None:
    ours, theirs = network(), network()
    arguments = {"lr": None, "relative_step": True, "warmup_init": True, "scale_parameter": True, "beta1": 0.9}
    batched, own = Adafactor(list(ours.values()), **arguments), optimization.Adafactor(list(theirs.values()), **arguments)
    for step in range(2):
        for parameters, optimizer in ((ours, batched), (theirs, own)):
            fill(parameters, step)
            optimizer.step()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])


def test_gradients_are_left_as_they_are() -> None:
    parameters = network()
    optimizer = optimizer_of(parameters, strict=False)
    for step in range(2):
        fill(parameters, step)
        before = copy.deepcopy([p.grad for p in parameters.values()])
        optimizer.step()
        assert all(torch.equal(p.grad, b) for p, b in zip(parameters.values(), before, strict=True))  # type: ignore[arg-type]


def launches(optimizer: torch.optim.Optimizer) -> Counter[str]:
    """Operations of one step that a device would launch kernels for: the outermost, views left out."""
    views = {"aten::unbind", "aten::as_strided", "aten::view", "aten::unsqueeze", "aten::empty", "aten::select", "aten::to"}
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    found = Counter()
    for event in profiled.events():
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        if event.name.startswith("aten::") and parent is None and event.name not in views:
            found[event.name] += 1
    return found


def stepped(parameters: dict[str, nn.Parameter], *, strict: bool) -> int:
    """Launches of a step that is not the first."""
    optimizer = optimizer_of(parameters, strict=strict)
    fill(parameters, 0)
    optimizer.step()
    return launches(optimizer).total()


def test_launches_for_the_whole_unet() -> None:
    """All 1,680 tensors in their 44 shapes, with few values each: the class launches 33,232 operations."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in UNet2DConditionModel(**SDXL_UNET).parameters()]
    small = least_shapes()
    assert len(small) == len(shapes) == 1680 and len(set(small)) == len(set(shapes)) == 44
    assert sorted(Counter(small).values()) == sorted(Counter(shapes).values())
    matrix, vector = (stepped(network([shape]), strict=True) for shape in ((8, 8), (8,)))
    assert sum(matrix if len(shape) > 1 else vector for shape in shapes) > 30_000
    assert 500 < stepped(network(small), strict=False) <= 1_000
    # At full size chunks of 256 MB cut the largest shapes: 75 chunks instead of 44.
    real = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for parameter in real:
        parameter.grad = parameter.detach()
    assert len(list(stepping.chunks(stepping.entries(torch.optim.SGD(real), {})))) == 75
