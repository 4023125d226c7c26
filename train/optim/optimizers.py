"""Optimizers, their groups and their state as named tensors.

The classes are the libraries': torch's AdamW, bitsandbytes' 8-bit AdamW and Lion, pytorch_optimizer's Lion, Prodigy, CAME and
schedule-free AdamW (`optim.schedule_free`), transformers' Adafactor (its step batched by shape in `optim.stepping`). Their state is saved under parameter names, not positions, so it can be checked against the
model and read by anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.base.errors import ExitCode, Halt
from train.config.stage import OptimizerConfig
from train.optim import stepping
from train.optim.schedule_free import TRAINED
from train.recipe.optimizer_state import GROUP_NUMBERS, GROUP_SHAPES, MIN_8BIT_VALUES, state_shapes

SHARED = "groups"  # owner, in a checkpoint, of the numbers that an optimizer keeps for all that trains, or SHARED/<group> of one
Groups = Sequence[tuple[str, Sequence[nn.Parameter], float]]  # (name, parameters, peak learning rate)


def make_optimizer(groups: Groups, config: OptimizerConfig, *, strict: bool = False, fused: bool = False) -> torch.optim.Optimizer:
    """The configured optimizer over named groups; `set_lrs` finds them by name. `strict`: the library's own step.
    `fused`: AdamW in one pass on a host too, as it is on a card.

    With `decay: matrices` norms, biases and other vectors are kept out of the weight decay; the recipe's original
    decayed everything. Raises Halt(USAGE) when bitsandbytes is needed and missing, or a peak learning rate is.
    """
    if without := [name for name, _, peak in groups if peak is None]:
        raise Halt(
            ExitCode.USAGE,
            f"parameter group {without[0]} has no learning rate: set optimizer.unet_lr or, for "
            "an encoder, optimizer.text_encoder_lr",
        )
    parts: list[dict[str, Any]] = []
    for name, parameters, peak in groups:
        for decay, members in _by_decay(parameters, config):
            parts.append({"params": members, "lr": peak, "weight_decay": decay, "name": name})
    if config.name == "adamw":
        # Pinned, because the implementations differ in their last bits. All are fp32 on our fp32 weights.
        fused = fused or parts[0]["params"][0].device.type == "cuda"
        return torch.optim.AdamW(parts, betas=config.betas, eps=_eps(config, 1e-8), fused=fused, foreach=False)
    if config.name == "adafactor":
        return _adafactor(parts, config, strict=strict)
    if config.name in _CLASSES:
        return _of_the_package(parts, config)
    return _in_8_bit(parts, config)


_CLASSES = {"lion": "lion", "prodigy": "prodigy", "came": "came", "schedulefree": "schedulefreeadamw"}  # to pytorch_optimizer's own table


def _by_decay(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[tuple[float, list[nn.Parameter]]]:
    if config.decay == "all" or config.weight_decay == 0:
        return [(config.weight_decay, list(parameters))]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [(decay, members) for decay, members in ((config.weight_decay, matrices), (0.0, vectors)) if members]


def _eps(config: OptimizerConfig, default: Any) -> Any:
    return default if config.eps is None else config.eps


def _adafactor(parts: list[dict[str, Any]], config: OptimizerConfig, *, strict: bool) -> torch.optim.Optimizer:
    from transformers import optimization

    return (optimization.Adafactor if strict else stepping.Adafactor)(
        parts,
        lr=parts[0]["lr"],  # required: without it and without relative_step the class fails at the first step only
        eps=tuple(_eps(config, (1e-30, 1e-3))),
        clip_threshold=config.clip_threshold,
        decay_rate=config.decay_rate,
        beta1=None,
        weight_decay=config.weight_decay,
        scale_parameter=config.scale_parameter,
        relative_step=config.relative_step,
        warmup_init=config.warmup_init,
    )


def _of_the_package(parts: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """A class of pytorch_optimizer by its own table of names; one tensor after the other, so that bits do not go with how it batches."""
    try:
        from pytorch_optimizer import load_optimizer
    except ImportError as error:
        raise Halt(ExitCode.USAGE, f"optimizer.name {config.name} needs pytorch_optimizer: pip install -e '.[optimizers]' ({error})") from error
    told: dict[str, Any] = {**config.args, "betas": tuple(config.betas)}
    if config.name == "came":
        told["betas"] = (*told["betas"], told.pop("beta3", 0.9999))
    if config.name in ("prodigy", "schedulefree"):
        told["eps"] = _eps(config, 1e-8)
    try:
        made: torch.optim.Optimizer = load_optimizer(_CLASSES[config.name])(parts, lr=parts[0]["lr"], weight_decay=config.weight_decay, foreach=False, **told)
    except (ValueError, TypeError) as error:
        raise Halt(ExitCode.USAGE, f"optimizer.args: {config.name} refuses {config.args}: {error}") from error
    return made


def _in_8_bit(parts: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.paged and parts[0]["params"][0].device.type == "cpu":
        raise Halt(ExitCode.USAGE, "optimizer.paged is true, and there is no card here: CUDA moves the pages of a card's memory; leave it out on a CPU")
    try:
        from bitsandbytes.optim import AdamW8bit, Lion8bit
    except ImportError as error:
        raise Halt(
            ExitCode.USAGE, f"optimizer.name {config.name} needs bitsandbytes, which does not import: {error}"
        ) from error
    if config.name == "lion8bit":
        return Lion8bit(
            parts, lr=parts[0]["lr"], betas=config.betas, weight_decay=config.weight_decay, min_8bit_size=MIN_8BIT_VALUES, is_paged=config.paged
        )
    return AdamW8bit(
        parts,
        lr=parts[0]["lr"],
        betas=config.betas,
        eps=_eps(config, 1e-8),
        weight_decay=config.weight_decay,
        min_8bit_size=MIN_8BIT_VALUES,
        is_paged=config.paged,
    )


def set_lrs(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Write each group's learning rate. Raises KeyError for a group without one."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm` (0 = leave them); the norm before, fp32, 0-dim.

    Nothing is read back by the host: a non-finite norm is the caller's to judge. Gradients of 16 bit are summed and scaled
    in fp32: their own norm would have three digits, and the factor too.
    """
    group: dict[str, Any] = {}
    held = [stepping.Entry("", parameter, group) for parameter in parameters if parameter.grad is not None]
    gradients = [entry.gradient for entry in held]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)))
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)  # as torch's clip_grads_with_norm_
        if all(_scaled_in_fp32(gradient) for gradient in gradients):
            torch._foreach_mul_(gradients, factor)
        else:
            for chunk in stepping.chunks(held):
                own = [entry.gradient for entry in chunk]
                torch._foreach_copy_(own, list(stepping.rows(own).mul(factor).unbind()))
    return norm


def _scaled_in_fp32(gradient: torch.Tensor) -> bool:
    """Whether a product with a 0-dim fp32 factor is rounded once. A card would first round the factor to 16 bit."""
    return gradient.dtype == torch.float32 or gradient.is_cpu


def keeps_average(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what is judged and exported is an average that the optimizer keeps (`optim.schedule_free`)."""
    return "weight_sum" in optimizer.param_groups[0]


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """`<parameter name>/<state key>` to tensor; host numbers become 0-dim int64 or float64 tensors."""
    tensors: dict[str, torch.Tensor] = {}
    held = [(name, optimizer.state.get(parameter, {})) for name, parameter in parameters.items()]
    shared = optimizer.param_groups[0]
    if "d_numerator" in shared:  # prodigy after a step: the same numbers in every group
        held.append((SHARED, {key: shared[key] for key in GROUP_SHAPES["prodigy"]}))
    if keeps_average(optimizer) and "step" in shared:
        held += [(f"{SHARED}/{g['name']}", {key: g[key] for key in GROUP_NUMBERS["schedulefree"]}) for g in optimizer.param_groups]
        held += [(name, {TRAINED: parameter}) for name, parameter in parameters.items()]
    for name, state in held:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach()
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"optimizer state {name}/{key} is a {type(value).__name__}")
            else:
                tensors[f"{name}/{key}"] = torch.tensor(
                    value, dtype=torch.int64 if isinstance(value, int) else torch.float64
                )
    return tensors


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    *,
    name: str,
    source: Path | str = "checkpoint",
    cut: Callable[[str, torch.Tensor, nn.Parameter], torch.Tensor] | None = None,
) -> None:
    """Put saved state back, exactly; `name` is the config's optimizer. No tensors at all: no step was taken yet.

    `parameters` and `tensors` are whole; of parameters that this optimizer does not hold (ZeRO-1: another process's
    does) the state is checked and left; `cut` (state key, tensor, its parameter) takes this process's part. With schedule-free
    AdamW the weights become those that train. Raises Halt(MISMATCH) naming foreign, missing or misshapen entries: a moment
    that is silently zero ruins a run slowly.
    """
    if not tensors:
        return
    expected = _expected(optimizer, parameters, name)
    problems = {
        "foreign": sorted(set(tensors) - set(expected)),
        "missing": sorted(set(expected) - set(tensors)),
        "of another shape": sorted(k for k in set(tensors) & set(expected) if tuple(tensors[k].shape) != expected[k]),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        raise Halt(ExitCode.MISMATCH, f"{source} is not the state of optimizer {name} for this model: {listed}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    states: dict[str, dict[str, Any]] = {owner: {} for owner, p in parameters.items() if id(p) in held}
    for full, tensor in tensors.items():
        owner, _, key = full.rpartition("/")
        if owner.partition("/")[0] == SHARED:
            for group in optimizer.param_groups:
                if owner in (SHARED, f"{SHARED}/{group['name']}"):
                    group[key] = _placed(key, tensor, group["params"][0]) if tensor.ndim else tensor.item()
        elif owner in states and key == TRAINED:
            parameters[owner].data.copy_(tensor)
        elif owner in states:
            parameter = parameters[owner]
            states[owner][key] = _placed(key, tensor, parameter) if cut is None or not tensor.ndim else cut(key, tensor, parameter)
    for owner, state in states.items():
        optimizer.state[parameters[owner]] = _paged(optimizer, parameters[owner], state)


def _expected(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every entry that a checkpoint of optimizer `name` holds."""
    found = {
        f"{owner}/{key}": shape
        for owner, parameter in parameters.items()
        for key, shape in state_shapes(name, tuple(parameter.shape)).items()
    }
    found |= {f"{SHARED}/{key}": shape for key, shape in GROUP_SHAPES.get(name, {}).items()}
    if (numbers := GROUP_NUMBERS.get(name)) is not None:
        found |= {f"{owner}/{TRAINED}": tuple(parameter.shape) for owner, parameter in parameters.items()}
        found |= {f"{SHARED}/{group['name']}/{key}": () for group in optimizer.param_groups for key in numbers}
    return found


def _paged(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
    """State of an optimizer with pages in them, where its first step would have put it: else a resumed run takes the card's own memory."""
    if not getattr(optimizer, "is_paged", False):
        return state
    for key in ("state1", "state2"):
        if key in state:
            page = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)  # type: ignore[attr-defined]
            state[key] = page.copy_(state[key])
    return state


def _placed(key: str, value: torch.Tensor, parameter: nn.Parameter) -> Any:
    if value.ndim == 0 and value.dtype in (torch.int64, torch.float64):
        return value.item()
    if key == "step":  # torch keeps AdamW's counter on the host unless fused
        return value.clone() if parameter.device.type == "cpu" else value.to(parameter.device, copy=True)
    placed = value.to(parameter.device, copy=True)
    if placed.shape == parameter.shape and not parameter.is_contiguous():
        placed = placed.contiguous(memory_format=torch.channels_last) if placed.ndim == 4 else placed
    return placed


def shapes_of(parameters: Iterable[torch.nn.Parameter]) -> list[tuple[int, ...]]:
    """Shape of each parameter."""
    return [tuple(parameter.shape) for parameter in parameters]
