"""An adapter put into the networks to be trained: where peft gets its layers, what they start from, how they are saved.

The base is frozen and lies in the dtype of the forward pass; the adapter's weights are fp32 masters like any trained
weights, so that optimizers, averages, checkpoints and resume see nothing but another list of trained tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from train.base.errors import ExitCode, Halt
from train.config.adapter import AdapterConfig
from train.model import sdxl
from train.model.adapters import layers, names
from train.model.adapters.layers import Layer
from train.model.other_kinds import some
from train.model.sdxl import canonical_name
from train.recipe import rng
from train.recipe.groups import rule_of
from train.recipe.optimizer_state import state_bytes
from train.storage import state_files
from train.storage.tensor_files import Blob

if TYPE_CHECKING:
    from train.model.networks import Networks

NAME = "default"  # peft's name of the only adapter
# Parts that start at zero, so that the whole starts as nothing; the others start uniform as torch's own layers do.
_ZEROS = ("lora_B", "hada_w2_b", "lokr_w1", "lokr_w1_a")
_PARTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "dora"}


def ranks(settings: AdapterConfig, modules: Iterable[str]) -> dict[str, int]:
    """Rank by module, of those of `modules` that the targets name. Raises Halt(USAGE) naming a pattern that fits nothing."""
    modules = list(modules)
    targets = [_Rule(pattern, settings.rank) for pattern in settings.targets]
    others = [_Rule(pattern, rank) for pattern, rank in settings.rank_pattern.items()]
    for what, rules in (("targets", targets), ("rank_pattern", others)):
        idle = [r.match for r in rules if not r.match.startswith("text_encoder") and all(rule_of(m, [r]) is None for m in modules)]
        if idle:
            raise Halt(ExitCode.USAGE, f"adapter.{what}: {some(idle)} fits no module that an adapter reaches, such as {some(modules, 2)}")
    found = {module: rule_of(module, [*targets, *others]) for module in modules if rule_of(module, targets) is not None}
    if not found:
        raise Halt(ExitCode.USAGE, f"adapter.targets {some(list(settings.targets))} fits no module of a network that trains")
    return {module: rule.rank for module, rule in found.items() if rule is not None}


class _Rule(NamedTuple):
    match: str
    rank: int


def alpha_of(settings: AdapterConfig) -> float:
    """alpha of every layer: one number, which is what files in kohya's names can say to every reader."""
    return float(settings.alpha or settings.rank)


def record(settings: AdapterConfig) -> dict[str, Any]:
    """What lineage tells of an adapter."""
    return {"type": settings.type, "rank": settings.rank, "alpha": alpha_of(settings)}


def inject(networks: Networks, settings: AdapterConfig, seed: int, dtype: torch.dtype, *, base: str = "16bit") -> None:
    """Freeze the networks in `dtype`, with base nf4 their matrices in 4 bit, and put the adapter's layers into what would have trained.

    First weights follow from (seed, name) alone. Raises Halt(USAGE) where the extra is not installed or nothing fits.
    """
    try:
        from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Halt(ExitCode.USAGE, f"adapter.type: {settings.type} needs peft: pip install -e '.[lora]' ({error})") from error
    modules = reachable(networks)
    chosen = ranks(settings, modules)
    networks.requires_grad_(False)
    if base == "nf4":
        _to_nf4(networks, dtype)
    kind: dict[str, Any] = {
        "lora": (LoraConfig, {"lora_alpha": alpha_of(settings)}), "dora": (LoraConfig, {"lora_alpha": alpha_of(settings), "use_dora": True}),
        "loha": (LoHaConfig, {"alpha": alpha_of(settings)}), "lokr": (LoKrConfig, {"alpha": alpha_of(settings)}),
    }  # fmt: skip
    made, options = kind[settings.type]
    for network in names.NETWORKS:
        own = {modules[name].partition(".")[2]: rank for name, rank in chosen.items() if name.startswith(f"{network}.")}
        if own:
            others = {name: rank for name, rank in own.items() if rank != settings.rank}
            config = made(r=settings.rank, target_modules=sorted(own), rank_pattern=others, **options)
            inject_adapter_in_model(config, getattr(networks, network), adapter_name=NAME)
    for name, parameter in networks.named_parameters():
        trains = part_of(name) is not None
        parameter.requires_grad_(trains)
        if not trains and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _start(networks, seed)


def reachable(networks: Networks) -> dict[str, str]:
    """Canonical module: its name in the networks, of the matrices and convolutions that would have trained and every program knows."""
    found = {}
    for name, module in networks.named_modules():
        kept = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Conv2d) and kept is not None and kept.requires_grad:
            module_name = canonical_name(f"{name}.weight").removesuffix(".weight")
            if names.is_usual(module_name):
                found[module_name] = name
    return found


def part_of(name: str) -> tuple[str, str] | None:
    """(canonical module, part of peft's) of a parameter's name; None for one of the base."""
    pieces = canonical_name(name).split(".")
    at = next((i for i, piece in enumerate(pieces) if piece.startswith(("lora_", "hada_", "lokr_"))), None)
    return None if at is None else (".".join(pieces[:at]), pieces[at])


def _to_nf4(networks: Networks, dtype: torch.dtype) -> None:
    """The matrices of attention, feed-forward and encoders in 4 bit (QLoRA, arXiv 2305.14314), made whole in `dtype` where they are used.

    What is trained on them belongs to the rounded weights; files and merges add it to the ones that were not.
    """
    import bitsandbytes

    for network in names.NETWORKS:
        for name, module in list(getattr(networks, network).named_modules()):
            if isinstance(module, nn.Linear) and names.is_usual(canonical_name(f"{network}.{name}.weight").removesuffix(".weight")):
                packed = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
                )
                packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(module.weight.device)
                packed.bias = module.bias
                packed.support_avx512bf16_for_cpu = False  # its layout for pictures alone wants sides of 32, and packs anew in place
                parent, _, leaf = name.rpartition(".")
                setattr(getattr(networks, network).get_submodule(parent), leaf, packed)


@torch.no_grad()
def _start(networks: Networks, seed: int) -> None:
    """First weights: zero, or uniform within 1 / sqrt(inputs) (kaiming_uniform_ with a = sqrt 5), drawn by name; DoRA's scale is its weight's."""
    from peft.utils.integrations import dequantize_module_weight

    modules = dict(networks.named_modules())
    for name, parameter in networks.named_parameters():
        part = part_of(name)
        if part is None:
            continue
        if part[1] == "lora_magnitude_vector":
            base = dequantize_module_weight(modules[name.partition(".lora_magnitude_vector")[0]].base_layer).float()
            parameter.data = torch.linalg.vector_norm(base.flatten(1), dim=1).reshape(parameter.shape)
        elif part[1] in _ZEROS:
            parameter.data = torch.zeros(parameter.shape)
        else:
            inputs = math.prod(parameter.shape[1:])
            drawn = rng.words(seed, rng.Stream.ADAPTER, rng.uid_of(f"{part[0]}.{part[1]}"), 0, parameter.numel())
            uniform = (torch.from_numpy(drawn.astype("float64")) + 0.5) * 2.0**-31 - 1.0
            parameter.data = (uniform / math.sqrt(inputs)).float().reshape(parameter.shape)


def layers_of(tensors: Mapping[str, Blob], shapes: Mapping[str, tuple[int, ...]], settings: AdapterConfig) -> dict[str, Layer]:
    """The layers that a checkpoint's tensors hold, by module. `shapes`: of the base's weights, by canonical name.

    A part that is not factored (LoKr of a high rank) carries peft's scale in itself, since its file has no place for it.
    Raises Halt(MISMATCH) for a tensor of another model.
    """
    parts: dict[str, dict[str, Blob]] = {}
    kind = {"dora": "lora"}.get(settings.type, settings.type)
    for name, blob in tensors.items():
        part = part_of(name)
        if part is None or f"{part[0]}.weight" not in shapes:
            raise Halt(ExitCode.MISMATCH, f"{name} is no tensor of this run's adapter")
        kept = layers.as_vector(blob) if part[1] == "lora_magnitude_vector" else blob
        parts.setdefault(part[0], {})[_PARTS.get(part[1], part[1].removeprefix("hada_").removeprefix("lokr_"))] = kept
    chosen = ranks(settings, parts)
    found = {}
    for module, own in sorted(parts.items()):
        layer = Layer(kind, own, alpha_of(settings), shapes[f"{module}.weight"])
        if kind == "lokr" and layer.rank == 0:
            layer = Layer(kind, {**own, "w1": _times(own["w1"], alpha_of(settings) / chosen[module])}, None, layer.shape)
        found[module] = layer
    return found


def _times(blob: Blob, factor: float) -> Blob:
    if factor == 1:
        return blob
    data = memoryview((state_files.to_tensor(blob) * factor).reshape(-1).view(torch.uint8).numpy().data)
    return Blob("F32", blob.shape, lambda: iter([data]))


@dataclass(frozen=True)
class Footprint:
    """What an adapter of SDXL's own size weighs: values that train, bytes of optimizer state, bytes of the frozen networks."""

    values: int
    state_bytes: int
    base_bytes: int


def footprint(settings: AdapterConfig, *, base: str, precision: str, trains_text: bool, optimizer: str) -> Footprint:
    """Counted from the names and shapes of SDXL's modules; in 4 bit a matrix has one fp32 scale for 64 of its values."""
    every = sdxl.folder_shapes(sdxl.STANDARD, networks=names.NETWORKS)
    matrices = {name for name, shape in every.items() if base == "nf4" and len(shape) == 2 and name.endswith(".weight") and names.is_usual(name.removesuffix(".weight"))}
    packed = sum(math.prod(every[name]) for name in matrices)
    others = sum(math.prod(shape) for name, shape in every.items() if name not in matrices)
    modules = {name: module.shape for name, module in names.names_of(sdxl.STANDARD).modules.items() if module.usual}
    last = max((int(name.split("layers.")[1].split(".")[0]) for name in modules if name.startswith("text_encoder.")), default=-1)
    unread = f"text_encoder.text_model.encoder.layers.{last}."  # its output is not used, so it does not train
    reached = {n: s for n, s in modules.items() if n.startswith("unet.") or (trains_text and not n.startswith(unread))}
    shapes = factors(settings, reached)
    return Footprint(
        values=sum(map(math.prod, shapes)),
        state_bytes=state_bytes(optimizer, shapes),
        base_bytes=others * (4 if precision == "fp32" else 2) + packed // 2 + packed // 64 * 4,
    )


def factors(settings: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes of all tensors that train, from those of the modules that would train without; what a checkpoint weighs."""
    found: list[tuple[int, ...]] = []
    for module, rank in ranks(settings, shapes).items():
        outputs, inputs, *kernel = shapes[module]
        columns = inputs * math.prod(kernel)
        if settings.type == "lokr":
            found += _lokr_factors(rank, outputs, inputs, math.prod(kernel))
        else:
            pairs = 2 if settings.type == "loha" else 1
            found += [(outputs, rank), (rank, columns)] * pairs
            found += [(outputs,)] if settings.type == "dora" else []
    return found


def _lokr_factors(rank: int, outputs: int, inputs: int, kernel: int) -> list[tuple[int, ...]]:
    """As peft divides them: each side into two numbers near its root."""
    from peft.tuners.lokr.layer import factorization

    (small_out, large_out), (small_in, large_in) = factorization(outputs), factorization(inputs)
    whole = rank >= max(large_out, large_in) / 2
    two = [(large_out, large_in * kernel)] if whole else [(large_out, rank), (rank, large_in * kernel)]
    return [(small_out, small_in), *two]
