"""Rows about arithmetic: embeddings, noise, weights of the loss, optimizers, learning rates."""

from __future__ import annotations

import functools
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.config.stage import NoiseConfig, OptimizerConfig, ScheduleConfig
from train.diffusion import noise, objective
from train.model.networks import TimestepEmbedding, embedding_as
from train.optim import optimizers
from train.recipe import rng, schedule
from train.recipe.rng import Stream
from train.testing.counts import sdxl_unet
from train.testing.parity import inputs, verdicts
from train.testing.parity.checkout import Answer, Checkout, ask
from train.testing.parity.inputs import Switches
from train.testing.parity.verdicts import Known, Row

CLASS = "LoraEasyCustomOptimizer.CustomOptimizers.CosineAnnealingWarmupRestarts"  # notebook
FP32 = "fp32 against float64 on one side"
NOISES: dict[str, dict[str, Any]] = {  # options of the trainer's function, and ours beside them in `_our_noise`
    "plain": {"dtype": "float32"},
    "offset": {"dtype": "float32", "noise_offset": 0.0357},
    "adaptive": {"dtype": "float32", "noise_offset": 0.0357, "adaptive_noise_scale": 0.00357},
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "fp16 offset": {"dtype": "float16", "noise_offset": 0.0357},
}


@functools.cache  # only its embeddings are asked, and building it takes seconds
def _unet() -> Any:
    return sdxl_unet()


def timestep_embedding(embedding: TimestepEmbedding) -> torch.Tensor:
    """fp32 [12, 320] of `inputs.TIMESTEPS` by SDXL's U-Net as the switch sets it."""
    unet = _unet()
    with embedding_as(unet, embedding):
        embedded: torch.Tensor = unet.time_proj(torch.tensor(inputs.TIMESTEPS))
        return embedded


def given() -> dict[str, torch.Tensor]:
    """What the trainer's `numbers` is asked with; the draws are ours."""
    shape, uids, epochs = inputs.LATENT, range(inputs.BATCH), [0] * inputs.BATCH
    latents = rng.normals_many(inputs.SEED, Stream.VAE_SAMPLE, uids, epochs, shape) * 0.8 + 0.1
    normals = rng.normals_many(inputs.SEED, Stream.NOISE, uids, epochs, shape)
    offsets = rng.normals_many(inputs.SEED, Stream.NOISE_OFFSET, uids, epochs, shape[:1])
    sizes = [[2000, 1500, 0, 16, 1152, 896], [1080, 1920, 6, 0, 768, 1344], [512, 512, 0, 0, 1024, 1024], [4096, 512, 0, 128, 2048, 512]]
    return {
        "timesteps": torch.tensor(inputs.TIMESTEPS), "sizes": torch.tensor(sizes).float(),
        "latents": torch.from_numpy(latents).half().float(), "normals": torch.from_numpy(normals),
        "offsets": torch.from_numpy(offsets)[:, :, None, None],
    }  # fmt: skip


def our_noise(options: Mapping[str, Any], told: Mapping[str, torch.Tensor], setting: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise, noisy latents) as a stage with `noise.dtype: setting` makes them."""
    dtype = getattr(torch, options["dtype"])
    half = dtype if setting == "compute" and dtype != torch.float32 else None
    config = NoiseConfig(offset=options.get("noise_offset", 0.0), offset_adaptive=options.get("adaptive_noise_scale", 0.0))
    latents = told["latents"]
    drawn, _ = noise.tile_noise(
        config, inputs.SEED, range(inputs.BATCH), [0] * inputs.BATCH, inputs.LATENT, latent_means_BC=latents.numpy().mean(axis=(2, 3))
    )
    target = noise.as_drawn(torch.from_numpy(drawn), config, half)
    return target, noise.add_noise(latents, target, told["timesteps"][: inputs.BATCH], noise.alphas_cumprod(), dtype=half)


def rows(config: Switches, checkout: Checkout, work: Path) -> list[Row]:
    """The table's rows about arithmetic."""
    told = given()
    theirs = ask(checkout, "numbers", work / "numbers", tensors=told, facts={"noises": NOISES}).tensors
    found = [*embeddings(config, told, theirs), *_tables(theirs)]
    for name, options in NOISES.items():
        found += _noise_rows(name, options, told, theirs, config.noise.dtype)
    return [*found, *_optimizers(config, checkout, work), *_schedules(config, checkout, work)]


def shift_of(theirs: Mapping[str, torch.Tensor]) -> int | None:
    """Which shift the trainer's U-Net embeds its timesteps with; None where it is neither."""
    return next((shift for shift in (0, 1) if torch.equal(theirs["embedding.unet"], theirs[f"embedding.{shift}"])), None)


def embeddings(config: Switches, told: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[Row]:
    """The timesteps' and the sizes' embedding. One row is red where `model.timestep_embedding` is not the trainer's."""
    mine, other = timestep_embedding(config.model.timestep_embedding), theirs["embedding.unet"]
    later = config.model.timestep_embedding == "sd_scripts" and shift_of(theirs) == 0
    known = Known(2.0, "docs/as_run.md: repaired in kohya-ss/sd-scripts on 2024-03-15 (PR 1187); the released run was before") if later else None
    cosine = torch.nn.functional.cosine_similarity(mine.double(), other.double(), dim=1)
    said = ", ".join(f"{value:.4f}" for value in cosine.tolist()[4::2])
    note = f"shift there {shift_of(theirs)}; cosine at t = {', '.join(map(str, inputs.TIMESTEPS[4::2]))}: {said}"
    unet = _unet()
    sizes = unet.add_time_proj(told["sizes"].flatten()).reshape(len(told["sizes"]), -1)
    return [
        verdicts.row("timestep embedding", verdicts.farthest(mine, other), 1e-6, "fp32 sines of angles up to 999", known=known, note=note),
        verdicts.row("size embedding", verdicts.farthest(sizes, theirs["size_embedding"]), 1e-6, "fp32 sines of angles up to 4,096"),
    ]


def _tables(theirs: Mapping[str, torch.Tensor]) -> list[Row]:
    timesteps, alphas = torch.tensor(inputs.TIMESTEPS), noise.alphas_cumprod()
    snr = objective.snr(timesteps, alphas)
    mine = {
        "alphas": alphas,
        "alphas.zero_snr": noise.alphas_cumprod(zero_terminal_snr=True),
        "min_snr": objective.min_snr_weights(snr, 5.0, "epsilon"),
        "min_snr.v": objective.min_snr_weights(snr, 5.0, "v"),
        "debiased": objective.debiased_weights(snr, "epsilon"),
        "debiased.v": objective.debiased_weights(snr, "v"),
    }
    names = {
        "alphas": "noise schedule", "alphas.zero_snr": "zero terminal SNR table", "min_snr": "min-SNR weights",
        "min_snr.v": "min-SNR weights, v", "debiased": "debiased weights", "debiased.v": "debiased weights, v",
    }  # fmt: skip
    found = []
    for key, value in mine.items():
        if key in theirs:
            # relative to the value: 1 - a_0 = 8.5e-4 keeps four digits less in fp32 than a_0 does
            apart = float(((value - theirs[key].double()).abs() / value.abs().clamp(min=1e-6)).max())
            found.append(verdicts.row(names[key], apart, 3e-4, f"{FP32}; 1 - a at t = 0 is 8.5e-4", note="relative"))
        else:
            found.append(verdicts.not_run(names[key], "this version has no such option"))
    return found


def _noise_rows(
    name: str, options: Mapping[str, Any], told: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], setting: str
) -> list[Row]:
    target, noisy = our_noise(options, told, setting)
    other, other_noisy = theirs[f"noise.{name}"], theirs[f"noisy.{name}"]
    half = options["dtype"] != "float32"
    tolerance, reason = (0.0, "the same operations in half") if half else (5e-6, f"{FP32}, of values up to 5")
    known = None
    if half and "noise_offset" in options and setting == "compute":
        known = Known(4e-3, "docs/as_run.md: below an offset our draw is not rounded to half")
    rows = [verdicts.row(f"noise and noisy latents, {name}", max(verdicts.farthest(target, other), verdicts.farthest(noisy, other_noisy)), tolerance, reason, known=known)]
    if target.dtype != other.dtype:
        rows.append(verdicts.row(f"type of the noise, {name}", float("inf"), 0.0, f"{target.dtype} here, {other.dtype} there"))
    return rows


def optimizer_steps(settings: OptimizerConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters after each of the steps, `<step>.<name>`, by our optimizer at its peak learning rate."""
    members = {name.removeprefix("start."): torch.nn.Parameter(t.clone()) for name, t in tensors.items() if name.startswith("start.")}
    optimizer = optimizers.make_optimizer([("unet", list(members.values()), settings.unet_lr)], settings)
    found: dict[str, torch.Tensor] = {}
    for step in range(inputs.STEPS):
        for name, parameter in members.items():
            parameter.grad = tensors[f"gradient.{step}.{name}"].clone()
        optimizer.step()
        found |= {f"{step}.{name}": parameter.detach().clone() for name, parameter in members.items()}
    return found


def optimizer_kinds(config: Switches) -> dict[str, OptimizerConfig]:
    """The stage's optimizer and the finetunes', by the trainer's names."""
    return {"AdamW": config.optimizer, "Adafactor": config.finetune_optimizer}


def their_steps(config: Switches, checkout: Checkout, work: Path) -> dict[str, torch.Tensor]:
    """Parameters after each step by the trainer's own choice of optimizer, `<kind>.<step>.<name>`."""
    arguments = {
        "AdamW": [f"weight_decay={config.optimizer.weight_decay}", f"betas={','.join(map(str, config.optimizer.betas))}"],
        "Adafactor": ["scale_parameter=False", "relative_step=False", "warmup_init=False"],
    }
    kinds = {kind: {"arguments": arguments[kind], "lr": one.unet_lr} for kind, one in optimizer_kinds(config).items()}
    facts = {"steps": inputs.STEPS, "kinds": kinds}
    return ask(checkout, "optimizers", work / "optimizers", tensors=inputs.optimizer_tensors(), facts=facts).tensors


def _optimizers(config: Switches, checkout: Checkout, work: Path) -> list[Row]:
    theirs, found = their_steps(config, checkout, work), []
    for kind, settings in optimizer_kinds(config).items():
        mine = optimizer_steps(settings, inputs.optimizer_tensors())
        equal = sum(torch.equal(value, theirs[f"{kind}.{name}"]) for name, value in mine.items())
        apart = max(verdicts.farthest(value, theirs[f"{kind}.{name}"]) for name, value in mine.items())
        note = f"{equal} of {len(mine)} tensors the same bits"
        found.append(verdicts.row(f"{kind}, {inputs.STEPS} steps", apart, 3e-8, "one fp32 rounding: weights here are below 0.5", note=note))
    return found


def our_rates(settings: ScheduleConfig, peak: float, updates: int) -> torch.Tensor:
    """Learning rate of every update, float64; `cycle_steps` must be a number."""
    plan = {"cycle_updates": schedule.cycle_length(settings, epoch_updates=9_099), "total_updates": 90_990}  # card
    rates = [schedule.lr_at(update, peak=peak, config=settings, **plan) for update in range(updates)]
    return torch.tensor(rates, dtype=torch.float64)


@dataclass(frozen=True)
class Curve:
    """A schedule: our settings, and the trainer's options on so many processes."""

    settings: ScheduleConfig
    peak: float
    processes: int
    options: Mapping[str, Any]


def curves(config: Switches) -> dict[str, Curve]:
    """The released run's class on as many processes as it had and on one, and the finetunes' schedule on one."""
    own, later = config.schedule, config.finetune_schedule
    restarts = {
        "lr_scheduler_type": CLASS,
        "lr_scheduler_args": [f"min_lr={own.min_lr}", f"gamma={own.decay}", f"first_cycle_steps={own.cycle_steps}"],
    }
    warm = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": int(later.warmup_steps)}  # to it every float is a share of the run
    one_process = replace(own, unit="optimizer_step", processes=1)
    return {
        "2 processes": Curve(own, config.optimizer.unet_lr, 2, restarts),
        "1 process": Curve(one_process, config.optimizer.unet_lr, 1, restarts),
        "constant with warmup": Curve(later, config.finetune_optimizer.unet_lr, 1, warm),
    }


def their_rates(curve: Curve, checkout: Checkout, work: Path) -> Answer:
    """The trainer's learning rates of `inputs.UPDATES` updates, prepared by accelerate as in its loop."""
    facts = {"options": dict(curve.options), "peak": curve.peak, "updates": inputs.UPDATES}
    kind = "class" if "lr_scheduler_type" in curve.options else "name"
    return _on(curve.processes, checkout, work / f"schedule_{kind}_{curve.processes}", facts)


def _schedules(config: Switches, checkout: Checkout, work: Path) -> list[Row]:
    found = []
    for name, curve in curves(config).items():
        answer = their_rates(curve, checkout, work)
        if "rates" not in answer.tensors:
            why = f"{answer.facts['missing']}: the notebook installs it from derrian-distro/LoRA_Easy_Training_Scripts, custom_scheduler"
            found.append(verdicts.not_run(f"learning rates, {name}", why))
            continue
        mine, theirs = our_rates(curve.settings, curve.peak, inputs.UPDATES), answer.tensors["rates"]
        apart, wrong = verdicts.farthest(mine, theirs), int((mine != theirs).sum())
        note = f"{inputs.UPDATES - wrong:,} of {inputs.UPDATES:,} the same bits"
        found.append(verdicts.row(f"learning rates, {name}", apart, 1e-20, "a float64 rounding of 1e-5", note=note))
    return found


def _on(processes: int, checkout: Checkout, work: Path, facts: Mapping[str, Any]) -> Answer:
    """Rank 0's answer of that many processes, which accelerate joins over loopback."""
    if processes == 1:
        return ask(checkout, "schedule", work, facts=facts)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with ThreadPoolExecutor(processes) as together:
        asked = [together.submit(ask, checkout, "schedule", work / str(n), facts=facts, environment=one) for n, one in enumerate(ranks)]
        first, *_ = [one.result() for one in asked]
        return first
