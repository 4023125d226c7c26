"""Optimizers against formulas, groups, clipping, and state that survives a round trip bit by bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from train.base.errors import ExitCode, Halt
from train.config.stage import OptimizerConfig
from train.optim import optimizers, schedule_free
from train.optim.optimizers import clip_grad_norm, load_state_tensors, make_optimizer, set_lrs, state_tensors
from train.storage import state_files

NAMES = ["adamw", "adafactor", "adamw8bit", "lion", "lion8bit", "prodigy", "came", "schedulefree"]


def settings(name: str, **more: object) -> OptimizerConfig:
    return OptimizerConfig(name=name, unet_lr=1e-3, **more)  # type: ignore[arg-type]


def network(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Conv1d(64, 32, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1


def optimizer_of(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    return make_optimizer([("unet", list(model.parameters()), config.unet_lr)], config)


def test_adamw_against_the_formula() -> None:
    """Card: weight decay 0.1, betas 0.9 and 0.99; decoupled, on every parameter (Loshchilov and Hutter)."""
    model = network()
    optimizer = optimizer_of(model, settings("adamw", weight_decay=0.1, betas=(0.9, 0.99)))
    expected = [p.detach().double().clone() for p in model.parameters()]
    first = [torch.zeros_like(p) for p in expected]
    second = [torch.zeros_like(p) for p in expected]
    for step, rate in enumerate((1e-3, 7e-4, 2e-4), 1):
        set_lrs(optimizer, {"unet": rate})
        fill(model, step)
        for w, m, v, parameter in zip(expected, first, second, model.parameters(), strict=True):
            assert parameter.grad is not None
            g = parameter.grad.double()
            w *= 1 - rate * 0.1
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            w -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        optimizer.step()
    for w, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().double(), w, rtol=2e-6, atol=2e-7)


def test_adafactor_against_the_paper() -> None:
    """The card's arguments: no relative step, no scaling by the parameter, no warmup, no momentum (1804.04235)."""
    model = network()
    optimizer = optimizer_of(model, settings("adafactor"))
    expected = [p.detach().double().clone() for p in model.parameters()]
    rows = [torch.zeros(p.shape[:-1], dtype=torch.float64) for p in expected]
    columns = [torch.zeros(p.shape[:-2] + p.shape[-1:], dtype=torch.float64) if p.ndim > 1 else None for p in expected]
    whole = [torch.zeros_like(p) for p in expected]
    for step in (1, 2, 3):
        fill(model, step)
        beta = 1 - step**-0.8
        for n, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            squared = parameter.grad.double() ** 2 + 1e-30
            column = columns[n]
            if column is not None:
                rows[n].mul_(beta).add_((1 - beta) * squared.mean(-1))
                column.mul_(beta).add_((1 - beta) * squared.mean(-2))
                r = (rows[n] / rows[n].mean(-1, keepdim=True)).unsqueeze(-1)
                estimate = r * column.unsqueeze(-2)
            else:
                estimate = whole[n].mul_(beta).add_((1 - beta) * squared)
            update = parameter.grad.double() / estimate.sqrt()
            update /= max(1.0, math.sqrt(float((update**2).mean())) / 1.0)
            expected[n] -= 1e-3 * update
        optimizer.step()
    for w, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_schedule_free_against_the_paper() -> None:
    """Defazio et al., arXiv 2405.15682, algorithm 1 with AdamW's second moments, in double precision; the rates are its weights."""
    model = network()
    optimizer = optimizer_of(model, settings("schedulefree", weight_decay=0.01, betas=(0.9, 0.99)))
    parameters = dict(model.named_parameters())
    y = [p.detach().double().clone() for p in model.parameters()]
    x, z, v = [p.clone() for p in y], [p.clone() for p in y], [torch.zeros_like(p) for p in y]
    weights = 0.0
    for step, rate in enumerate((5e-4, 1e-3, 7e-4), 1):
        set_lrs(optimizer, {"unet": rate})
        fill(model, step)
        largest = max(rate, 1e-3 if step > 1 else rate)
        weights += largest**2
        share = largest**2 / weights
        for n, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            g = parameter.grad.double()
            v[n] = 0.99 * v[n] + 0.01 * g * g
            direction = g / ((v[n] / (1 - 0.99**step)).sqrt() + 1e-8) + 0.01 * y[n]
            z[n] = z[n] - rate * direction
            x[n] = (1 - share) * x[n] + share * z[n]
            y[n] = 0.1 * z[n] + 0.9 * x[n]
        optimizer.step()
    found = schedule_free.averages(optimizer, parameters)
    for n, (name, parameter) in enumerate(parameters.items()):
        torch.testing.assert_close(parameter.detach().double(), y[n], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].double(), x[n], rtol=1e-5, atol=1e-6)
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with schedule_free.averaged(optimizer):
        assert all(torch.equal(parameter, found[name]) for name, parameter in parameters.items())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in parameters.items())
    fill(model, 4)
    optimizer.step()  # in training mode again: it would refuse nothing, and move from the wrong weights
    assert all(group["train_mode"] for group in optimizer.param_groups)


def test_the_numbers_of_each_group_are_kept_by_its_name() -> None:
    parts = [("unet", [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))], 1e-3), ("text_encoder", [nn.Parameter(torch.ones(2))], 1e-4)]
    config = settings("schedulefree", weight_decay=0.1, decay="matrices")
    parameters = {"unet.m": parts[0][1][0], "unet.v": parts[0][1][1], "text_encoder.v": parts[1][1][0]}
    optimizer = make_optimizer(parts, config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = state_tensors(optimizer, parameters)
    assert {key: value.item() for key, value in saved.items() if key.startswith("groups/")} == {
        "groups/unet/step": 1, "groups/unet/weight_sum": 1e-3**2, "groups/unet/lr_max": 1e-3,
        "groups/text_encoder/step": 1, "groups/text_encoder/weight_sum": 1e-4**2, "groups/text_encoder/lr_max": 1e-4,
    }  # fmt: skip
    fresh = make_optimizer(parts, config)
    load_state_tensors(fresh, parameters, saved, name="schedulefree")
    assert [group["lr_max"] for group in fresh.param_groups] == [1e-3, 1e-3, 1e-4]
    del saved["groups/text_encoder/lr_max"]
    with pytest.raises(Halt, match="1 missing: groups/text_encoder/lr_max"):
        load_state_tensors(make_optimizer(parts, config), parameters, saved, name="schedulefree")


def test_pages_need_a_card() -> None:
    for name in ("adamw8bit", "lion8bit"):
        with pytest.raises(Halt, match=r"optimizer\.paged is true, and there is no card here") as caught:
            optimizer_of(network(), settings(name, paged=True))
        assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_continues_bit_by_bit(name: str, tmp_path: Path) -> None:
    config = settings(name, weight_decay=0.01)
    straight, other = network(), network(7)
    names = [n for n, _ in straight.named_parameters()]
    optimizer = optimizer_of(straight, config)
    for step in range(3):
        fill(straight, step)
        optimizer.step()
    state_files.write(tmp_path / "optimizer.safetensors", state_tensors(optimizer, dict(straight.named_parameters())))
    saved = load_file(tmp_path / "optimizer.safetensors")
    other.load_state_dict(straight.state_dict())
    resumed = optimizer_of(other, config)
    load_state_tensors(resumed, dict(other.named_parameters()), saved, name=name)
    assert state_tensors(resumed, dict(other.named_parameters())).keys() == saved.keys()
    for step in range(3, 6):
        for model, chosen in ((straight, optimizer), (other, resumed)):
            fill(model, step)
            chosen.step()
    for n in names:
        assert torch.equal(straight.get_parameter(n), other.get_parameter(n)), n
    again = state_tensors(optimizer, dict(straight.named_parameters()))
    for key, value in state_tensors(resumed, dict(other.named_parameters())).items():
        assert torch.equal(value, again[key]), key


def test_8bit_state_is_8_bit() -> None:
    model = network()
    optimizer = optimizer_of(model, settings("adamw8bit"))
    fill(model, 0)
    optimizer.step()
    state = state_tensors(optimizer, dict(model.named_parameters()))
    assert state["0.weight/state1"].dtype == torch.uint8
    assert state["1.weight/state1"].dtype == torch.float32  # below 4,096 elements


@pytest.mark.parametrize("name", NAMES)
def test_foreign_state_is_refused_by_name(name: str) -> None:
    model, config = network(), settings(name)
    optimizer = optimizer_of(model, config)
    fill(model, 0)
    optimizer.step()
    good = state_tensors(optimizer, dict(model.named_parameters()))
    moment = next(key for key in good if key.startswith("0.weight/") and good[key].ndim)
    for bad, word in (
        ({**good, "other.weight/step": torch.tensor(1)}, "1 foreign: other.weight/step"),
        ({**good, "0.weight/momentum": torch.zeros(3)}, "1 foreign: 0.weight/momentum"),
        ({k: v for k, v in good.items() if not k.startswith("2.bias/")}, "missing: 2.bias/"),
        ({k: v for k, v in good.items() if k != moment}, f"1 missing: {moment}"),
        ({**good, moment: torch.zeros(7)}, f"1 of another shape: {moment}"),
    ):
        fresh = network()
        with pytest.raises(Halt) as caught:
            load_state_tensors(optimizer_of(fresh, config), dict(fresh.named_parameters()), bad, name=name)
        assert caught.value.code == ExitCode.MISMATCH
        assert word in caught.value.message


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_optimizer_is_refused(name: str) -> None:
    model = network()
    optimizer = optimizer_of(model, settings(name))
    fill(model, 0)
    optimizer.step()
    state = state_tensors(optimizer, dict(model.named_parameters()))
    other = NAMES[(NAMES.index(name) + 1) % 3]
    with pytest.raises(Halt, match=f"not the state of optimizer {other}"):
        load_state_tensors(optimizer_of(network(), settings(other)), dict(model.named_parameters()), state, name=other)


@pytest.mark.parametrize("name", NAMES)
def test_no_state_before_the_first_step(name: str) -> None:
    model = network()
    optimizer = optimizer_of(model, settings(name))
    assert state_tensors(optimizer, dict(model.named_parameters())) == {}
    load_state_tensors(optimizer, dict(model.named_parameters()), {}, name=name)
    fill(model, 0)
    optimizer.step()


def test_state_keys_and_shapes() -> None:
    conv = nn.Conv2d(64, 32, 3)
    for name, expected in (
        ("adamw", {"step": (), "exp_avg": (32, 64, 3, 3), "exp_avg_sq": (32, 64, 3, 3)}),
        ("adafactor", {"step": (), "RMS": (), "exp_avg_sq_row": (32, 64, 3), "exp_avg_sq_col": (32, 64, 3)}),
        (
            "adamw8bit",
            {"step": (), "state1": (32, 64, 3, 3), "state2": (32, 64, 3, 3)}
            | {"qmap1": (256,), "qmap2": (256,), "absmax1": (72,), "absmax2": (72,)},
        ),
    ):
        optimizer = optimizer_of(conv, settings(name))
        fill(conv, 0)
        optimizer.step()
        saved = state_tensors(optimizer, {"conv.weight": conv.weight})
        assert {key: tuple(value.shape) for key, value in saved.items()} == {
            f"conv.weight/{key}": shape for key, shape in expected.items()
        }


def test_a_missing_learning_rate_is_refused() -> None:
    groups = [("unet", list(network().parameters()), 1e-3), ("text_encoder", list(network(1).parameters()), None)]
    for name in NAMES:
        with pytest.raises(Halt, match=r"text_encoder has no learning rate"):
            make_optimizer(groups, settings(name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_global_generators_alone(name: str) -> None:
    model = network()
    optimizer = optimizer_of(model, settings(name))
    fill(model, 0)
    before = torch.get_rng_state()
    clip_grad_norm(model.parameters(), 1.0)
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


def test_decay_of_matrices_only() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer_of(model, settings("adamw", weight_decay=0.1, decay="matrices")).step()
    for n, p in model.named_parameters():
        factor = 1 - 1e-3 * 0.1 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[n] * factor)


def test_a_parameter_without_gradient_pressure_shrinks_as_measured() -> None:
    """3.36 % over the recipe's run: product of 1 - lr x 0.1 with mean lr 3.757e-6 over 90,990 updates."""
    assert 1 - math.exp(90_990 * math.log1p(-3.757e-6 * 0.1)) == pytest.approx(0.0336, abs=1e-4)


def test_clip_is_one_global_norm() -> None:
    model = network()
    fill(model, 0)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    norm = clip_grad_norm(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g / expected, rtol=1e-4, atol=1e-7)
    assert float(clip_grad_norm(model.parameters(), 0)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("by_chunks", [False, True], ids=["as on a CPU", "as on a card"])
def test_gradients_of_16_bit_are_measured_and_clipped_in_fp32(by_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm in bf16 has three digits: 224.0 for 224.17."""
    if by_chunks:
        monkeypatch.setattr(optimizers, "_scaled_in_fp32", lambda gradient: gradient.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((100, 100), (100, 100), (77,))]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
    gradients = [p.grad.double() for p in parameters if p.grad is not None]
    expected = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    calls: list[torch.dtype] = []
    whole = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda tensors, *a: calls.append(tensors[0].dtype) or whole(tensors, *a))
    norm = clip_grad_norm(parameters, 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    for p, g in zip(parameters, gradients, strict=True):
        assert torch.equal(p.grad, (g.float() * (1.0 / (norm + 1e-6))).bfloat16())  # type: ignore[arg-type]
    assert by_chunks != (torch.bfloat16 in calls), "a card would multiply by a factor of bf16"


def test_unequal_group_rates() -> None:
    model = network()
    parameters = list(model.parameters())
    optimizer = make_optimizer(
        [("unet", parameters[:2], 1e-3), ("text_encoder", parameters[2:], 1e-4)], settings("adamw")
    )
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-4]
    set_lrs(optimizer, {"unet": 1.0, "text_encoder": 2.0})
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 2.0]
    with pytest.raises(KeyError):
        set_lrs(optimizer, {"unet": 1.0})


def test_lion_against_the_formula() -> None:
    """Chen et al. 2023, arXiv 2302.06675: the sign of beta1 m + (1 - beta1) g, then m follows with beta2; decay decoupled."""
    model = network()
    optimizer = optimizer_of(model, settings("lion", weight_decay=0.1, betas=(0.9, 0.99)))
    expected = [p.detach().double().clone() for p in model.parameters()]
    momentum = [torch.zeros_like(p) for p in expected]
    for step, rate in enumerate((1e-3, 7e-4, 2e-4), 1):
        set_lrs(optimizer, {"unet": rate})
        fill(model, step)
        for w, m, parameter in zip(expected, momentum, model.parameters(), strict=True):
            assert parameter.grad is not None
            g = parameter.grad.double()
            w *= 1 - rate * 0.1
            w -= rate * (0.9 * m + 0.1 * g).sign()
            m.mul_(0.99).add_(0.01 * g)
        optimizer.step()
    assert all(torch.allclose(p.double(), w, atol=1e-6) for p, w in zip(model.parameters(), expected, strict=True))


def test_prodigys_first_step_is_adams_of_size_d0_times_the_rate() -> None:
    """Mishchenko and Defazio 2023, arXiv 2306.06101: before d has grown, d0 lr m / (sqrt v + d0 eps) with m = d (1 - b1) g."""
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(model, settings("prodigy", betas=(0.9, 0.99), args={"d0": 1e-3}))
    set_lrs(optimizer, {"unet": 0.5})
    fill(model, 1)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for old, new, g in zip(before, model.parameters(), gradients, strict=True):
        wanted = 0.5 * 1e-3 * (1e-3 * 0.1 * g) / ((1e-6 * 0.01 * g * g).sqrt() + 1e-3 * 1e-8)
        assert torch.allclose(old - new, wanted, atol=1e-6)
