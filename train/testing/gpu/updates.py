"""Rows of benchmark B in a process of their own: `python -m train.testing.gpu.updates '{"variants": [...], "tiny": false}'`.

Builds the full-size networks with random weights on the device, runs real updates (accumulation, clipping, optimizer)
on new random inputs every micro-step, and prints one JSON line for the probe and one for each row as soon as it is there.
An error or an out-of-memory ends a row alone; the next one starts with the memory given back.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from train.config.stage import LossConfig, NoiseConfig, OptimizerConfig
from train.diffusion import noise
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.engine.step import Gradients, compute_update
from train.model import speed
from train.model.networks import Components, Networks, cast_frozen, parameter_groups, set_train_mode
from train.model.recomputation import set_checkpointing, set_text_checkpointing
from train.observe.times import Times
from train.optim import collectives, optimizers
from train.optim.collectives import Place
from train.optim.loss_scale import loss_scale
from train.recipe.order import Tile, check_strict_world
from train.storage.state_files import PRECISIONS
from train.testing.counts import CLIP_BIGG, CLIP_L, SDXL_UNET, TINY_UNET
from train.testing.gpu.variants import BUCKET, Variant

WARM_UPDATES = 1
BOS, EOS = 49406, 49407
_TINY_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
              "projection_dim": 16}  # fmt: skip
DEPENDENCIES = ("diffusers", "transformers", "accelerate", "safetensors", "omegaconf", "numpy", "xformers", "torchao",
                "bitsandbytes", "triton")  # fmt: skip
PRODUCT, COPY_BYTES = 8192, 8_000_000_000


def probe() -> dict[str, Any]:
    """Versions, free memory, and the two ceilings of this card: a bf16 product and a copy, both on random data."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "versions": {}}
    for name in DEPENDENCIES:
        try:
            found["versions"][name] = str(getattr(importlib.import_module(name), "__version__", "present"))
        except Exception as error:  # any failure to import is what we want to know
            found["versions"][name] = f"absent: {type(error).__name__}"
    if not torch.cuda.is_available():
        return found | {"gpu": None, "note": "no CUDA device"}
    free, total = torch.cuda.mem_get_info()
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = _device_time(lambda: torch.mm(a, b), 20)
    source = torch.randint(0, 255, (COPY_BYTES // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = _device_time(lambda: target.copy_(source), 5)
    return found | {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "free_gib": free / 2**30,
        "total_gib": total / 2**30,
        "peak_tflops": 2 * PRODUCT**3 / product_s / 1e12,
        "copy_tb_per_s": COPY_BYTES / copy_s / 1e12,
    }


def _device_time(run: Callable[[], Any], times: int) -> float:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def build(variant: Variant, device: torch.device, *, tiny: bool) -> Networks:
    """Networks with random weights in fp32 on the device, set up as the variant says."""
    torch.manual_seed(0)
    with device:
        components = Components(
            unet=UNet2DConditionModel(**(TINY_UNET if tiny else SDXL_UNET)),
            text_encoder=CLIPTextModel(CLIPTextConfig(**(_TINY_CLIP if tiny else CLIP_L))),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**(_TINY_CLIP if tiny else CLIP_BIGG))),
            tokenizer=None,
            tokenizer_2=None,
            vae=None,
        )
    trains_text = variant.stage == 1
    networks = Networks(components, train_text_encoders=trains_text, context="stitched", pooled_projection="correct")
    set_checkpointing(networks.unet, "partial", variant.exempt_steps)
    for encoder in (networks.text_encoder, networks.text_encoder_2):
        set_text_checkpointing(encoder, trains_text)
    cast_frozen(networks, PRECISIONS[variant.precision])
    if variant.channels_last:
        speed.to_channels_last(networks.unet)
    if variant.float8:
        speed.to_float8(networks.unet)
    if variant.compile:
        speed.compile_blocks(networks.unet)
    if use_xformers(variant, device):
        networks.unet.enable_xformers_memory_efficient_attention()
    set_train_mode(networks)
    return networks


def use_xformers(variant: Variant, device: torch.device) -> bool:
    """sd-scripts' settings ask for xformers; where it does not import, SDPA takes its place and the row says so."""
    if variant.style != "sd_scripts" or device.type != "cuda":
        return False
    try:
        importlib.import_module("xformers.ops")
    except Exception:  # a build for another torch fails in its own ways
        return False
    return True


def batches(variant: Variant, device: torch.device, update: int, bucket: tuple[int, int]) -> Iterator[Batch]:
    """New random inputs for every micro-step of one update, made on the device but for what all have in common."""
    width, height = bucket
    sizes_B6 = torch.tensor([[height, width, 0, 0, height, width]] * variant.micro, device=device).float()
    for number in range(variant.accumulation):
        generator = torch.Generator(device).manual_seed(update * 1000 + number)
        size = (variant.micro, 4, height // 8, width // 8)
        drawn = torch.randn((2, *size), device=device, generator=generator)
        ids = torch.randint(300, 40_000, (variant.micro, 3, 77), device=device, generator=generator)
        ids[..., 0], ids[..., 76] = BOS, EOS
        rows = np.arange(variant.micro)
        tile = Tile(width, height, number, rows, rows.astype(np.uint64), np.zeros_like(rows))
        yield Batch(
            latents_BCHW=drawn[0],
            noise_BCHW=drawn[1],
            input_noise_BCHW=drawn[1],
            timesteps_B=torch.randint(0, 1000, (variant.micro,), device=device, generator=generator),
            ids_1_BN77=ids,
            ids_2_BN77=ids,
            size_B6=sizes_B6,
            slots_B=torch.arange(number * variant.micro, (number + 1) * variant.micro, device=device),
            step=update,
            tile=tile,
            tags_dropped=0,
        )


def make_optimizer(variant: Variant, networks: Networks) -> torch.optim.Optimizer:
    """The product's, or for the references the libraries' defaults."""
    groups = [(name, list(named.values()), 1e-5) for name, named in parameter_groups(networks).items()]
    if variant.stage == 2:
        own = variant.strict or variant.style != "ours"  # the references step tensor by tensor
        return optimizers.make_optimizer(groups, OptimizerConfig(name="adafactor", unet_lr=1e-5), strict=own)
    if variant.style == "ours":
        return optimizers.make_optimizer(groups, OptimizerConfig(name="adamw", unet_lr=1e-5, weight_decay=0.1))
    parameters = [parameter for _, members, _ in groups for parameter in members]
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.1)


def run(variant: Variant, *, tiny: bool = False) -> dict[str, Any]:
    """Timings and peak memory of the variant; see the module's docstring."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    bucket = (64, 128) if tiny else BUCKET
    if variant.strict:  # as stage.open_machine does
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    networks = build(variant, device, tiny=tiny)
    optimizer = make_optimizer(variant, networks)
    parameters = [p for named in parameter_groups(networks).values() for p in named.values()]
    diffusion = Diffusion(
        noise.alphas_cumprod().to(device), NoiseConfig(), LossConfig(), variant.precision,
        deterministic=variant.strict, channels_last=variant.channels_last,
    )  # fmt: skip
    update = _our_update if variant.style == "ours" else _reference_update
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spent, losses, parts = list[float](), list[float](), list[dict[str, float]]()
    times = Times(device, 1)
    state: dict[str, Any] = {
        "times": times,
        "scale": loss_scale(variant.precision) if variant.style == "ours" else _grad_scaler(variant, device),
        "gradients": _gradients(variant, networks, parameters),
    }
    for number in range(variant.updates):
        _synchronise(on_gpu)
        started = time.perf_counter()
        times.begin(number)
        made = batches(variant, device, number, bucket)
        losses.append(update(variant, networks, parameters, optimizer, diffusion, made, number, state))
        _synchronise(on_gpu)
        spent.append(time.perf_counter() - started)
        parts.append(times.seconds() or {})
    timed = spent[WARM_UPDATES:]
    syncs = micro_step_sync(networks, next(batches(variant, device, 0, bucket)), diffusion) if on_gpu else None
    return {
        "micro_step_sync": syncs,
        "update_s": {"median": statistics.median(timed), "min": min(timed), "max": max(timed)},
        "first_update_s": spent[0],
        **{f"ms_{part}": 1000 * statistics.median(one[part] for one in parts[WARM_UPDATES:]) for part in parts[0]},
        "images_per_s": variant.images / statistics.median(timed),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "bits": _bits(parameters) if variant.strict else None,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "attention": _attention_of(variant, device),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def micro_step_sync(networks: Networks, batch: Batch, diffusion: Diffusion) -> str:
    """What CUDA says about a host synchronisation inside one forward and backward; empty when there is none."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with speed.pin_attention(diffusion.attention, "cuda"):
            image_losses(networks, batch, diffusion).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _gradients(variant: Variant, networks: Networks, parameters: list[torch.nn.Parameter]) -> Gradients:
    place = Place(0, 1, parameters[0].device)
    if not variant.strict:
        return Gradients(networks, parameters, place)
    virtual = check_strict_world(variant.accumulation, 1)
    return Gradients(networks, parameters, place, strict_groups={}, virtual_per_rank=virtual)


def _bits(parameters: list[torch.nn.Parameter]) -> str:
    """Equal for two runs whose weights are equal to the bit (sums of the bit patterns, hashed)."""
    sums = collectives.checksums({str(number): parameter for number, parameter in enumerate(parameters)})
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]


def _our_update(
    variant: Variant,
    networks: Networks,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    diffusion: Diffusion,
    made: Iterator[Batch],
    number: int,
    state: dict[str, Any],
) -> float:
    """The project's own update, as the loop calls it."""
    outcome = compute_update(
        state["gradients"],
        made,
        diffusion=diffusion,
        scale=state["scale"],
        images=variant.images,
        tiles_here=variant.accumulation,
        tiles_in_update=variant.accumulation,
        step=number,
        max_grad_norm=1.0,
        stop_asked=lambda: False,
        times=state["times"],
    )
    applied = outcome.losses_finite and bool(np.isfinite(outcome.grad_norm))
    if applied:
        optimizer.step()
        state["times"].mark("optimizer")
    state["scale"] = state["scale"].after(overflowed=not applied)
    return outcome.mean_loss


def _reference_update(
    variant: Variant,
    networks: Networks,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    diffusion: Diffusion,
    made: Iterator[Batch],
    number: int,
    state: dict[str, Any],
) -> float:
    """The loop of a reference restated from its description: a scaler for fp16, and host reads in every micro-step."""
    scaler, total = state["scale"], 0.0
    for batch in made:
        state["times"].mark("data")
        loss = image_losses(networks, batch, diffusion).mean()
        if variant.style == "diffusers":  # its example gathers the loss and reads two values per micro-step
            loss.detach().repeat(1).mean().item()
        total += loss.detach().item()
        scaler.scale(loss / variant.accumulation).backward()
        state["times"].mark("forward_backward")
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    state["times"].mark("optimizer")
    return total / variant.accumulation


def _grad_scaler(variant: Variant, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=variant.precision == "fp16")


def _attention_of(variant: Variant, device: torch.device) -> str:
    """Which attention ran: the references' own package is used only where it is installed, and named either way."""
    if use_xformers(variant, device):
        return "xformers"
    return "SDPA, xformers does not import" if variant.style == "sd_scripts" else "SDPA"


def _synchronise(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def main(arguments: Sequence[str]) -> None:
    """Probe, then the rows that the one JSON argument asks for; errors become a row, not a traceback."""
    asked = json.loads(arguments[0])
    print(json.dumps({"probe": _answer(probe)}), flush=True)
    for wanted in asked["variants"]:
        print(json.dumps({"row": _answer(partial(run, Variant(**wanted), tiny=asked["tiny"]))}), flush=True)
        gc.collect()  # the networks of a row that failed hang on its traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _answer(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # an out-of-memory, a kernel that does not exist: this row's result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


if __name__ == "__main__":
    main(sys.argv[1:])
