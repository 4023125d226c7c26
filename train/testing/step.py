"""`bench.py step`: one real full-size update on this machine, our way in turn with two neighbours', on the same weights.

Ours: the product's own forward, loss, gradients and step, recomputing all, some or nothing. diffusers: the loop of its
text-to-image example for SDXL, restated, on the same U-Net. sd-scripts: its own U-Net and loss, from a checkout, unmodified.
All sides share one set of random bf16 weights, one batch (latents, noise, timesteps), one text context and one Adafactor
whose learning rate is 0: nothing moves, so every loss of every turn must be the same. Text encoders run on no side, and
weights are rounded to nearest on every side, as the neighbours do: `model.weights: bf16` would round ours at random.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers.optimization import Adafactor

from train.base.errors import ExitCode, Halt
from train.config.stage import LossConfig, NoiseConfig, OptimizerConfig
from train.diffusion import noise
from train.diffusion.objective import Batch, Diffusion
from train.engine.step import Gradients, Trained, compute_update
from train.model import memory, sdxl
from train.model.recomputation import set_checkpointing
from train.optim import optimizers
from train.optim.collectives import Place
from train.optim.loss_scale import loss_scale
from train.testing import peers, timing
from train.testing.counts import SDXL_UNET, TINY_UNET
from train.testing.gpu.updates import batches
from train.testing.gpu.variants import Variant

OURS = {"ours, full recomputation": "full", "ours, partial": "partial", "ours, none": "none"}
DIFFUSERS, SD_SCRIPTS = "diffusers' example", "sd-scripts"
AGREE = 1e-2  # relative, of bf16 losses: the limit of section 3 of BENCHMARKS.md
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_GIB = 2**30


@dataclass
class Turns:
    """What one side took, turn by turn."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    gradients_s: list[float] = field(default_factory=list)  # of cpu_s: forward, backward, clip; the rest is the optimizer
    peak_gib: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


class GivenContext(nn.Module):
    """The U-Net as the product's loss calls its networks, with a context in place of token ids."""

    def __init__(self, unet: nn.Module, context_BLD: torch.Tensor, pooled_BP: torch.Tensor) -> None:
        super().__init__()
        self.unet, self.context_BLD, self.pooled_BP = unet, context_BLD, pooled_BP

    def forward(
        self, noisy_BCHW: torch.Tensor, timesteps_B: torch.Tensor, _1: torch.Tensor, _2: torch.Tensor, size_B6: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B,C,H,W]."""
        added = {"text_embeds": self.pooled_BP, "time_ids": size_B6}
        found: torch.Tensor = self.unet(
            noisy_BCHW, timesteps_B, encoder_hidden_states=self.context_BLD, added_cond_kwargs=added, return_dict=False
        )[0]
        return found


@dataclass
class Bench:
    """One set of weights, the batch, and the product's own owner of gradients and step."""

    networks: GivenContext
    batch: Batch
    trained: Trained
    scheduler: DDPMScheduler  # of both neighbours
    marks: dict[str, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Of the update."""
        return len(self.batch.slots_B)

    def ours(self, mode: str) -> float:
        """Our update: as the loop calls it, without plan, data and log."""
        set_checkpointing(self.networks.unet, mode)
        outcome = compute_update(
            self.trained.gradients,
            iter([self.batch]),
            diffusion=self.trained.diffusion,
            scale=self.trained.scale,
            images=self.images,
            tiles_here=1,
            tiles_in_update=1,
            step=0,
            max_grad_norm=1.0,
            stop_asked=lambda: False,
        )
        self.marks["gradients"] = time.process_time()
        self.trained.step(0)
        return outcome.mean_loss

    def diffusers(self) -> float:
        """The example's update (examples/text_to_image/train_text_to_image_sdxl.py): cached context, mean loss, two reads."""
        unet: Any = self.networks.unet
        batch = self.batch
        unet.enable_gradient_checkpointing()
        noisy_BCHW = self.scheduler.add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B).bfloat16()
        added = {"time_ids": batch.size_B6.bfloat16(), "text_embeds": self.networks.pooled_BP}
        with torch.autocast("cpu", torch.bfloat16):
            predicted_BCHW = unet(
                noisy_BCHW, batch.timesteps_B, self.networks.context_BLD, added_cond_kwargs=added, return_dict=False
            )[0]
        loss = F.mse_loss(predicted_BCHW.float(), batch.noise_BCHW.float(), reduction="mean")
        loss.repeat(self.images).mean().item()
        return self._theirs(loss)

    def sd_scripts(self, peer: peers.SdScripts) -> float:
        """sd-scripts' update (sdxl_train.py) with cached text outputs."""
        batch = self.batch
        noisy_BCHW = self.scheduler.add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B).bfloat16()
        vector_BV = torch.cat([self.networks.pooled_BP, peer.size_embeddings(batch.size_B6).bfloat16()], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted_BCHW = peer.unet(noisy_BCHW, batch.timesteps_B, self.networks.context_BLD, vector_BV)
        return self._theirs(peer.loss(predicted_BCHW.float(), batch.noise_BCHW.float(), "l2", "mean"))

    def _theirs(self, loss: torch.Tensor) -> float:
        """What both neighbours do with a loss: backward, clip, the class's own step, gradients dropped, one more read."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.gradients.parameters, 1.0)
        self.marks["gradients"] = time.process_time()
        Adafactor.step(self.trained.optimizer)
        self.trained.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach().item())


def open_bench(size_px: tuple[int, int], images: int, *, tiny: bool = False) -> Bench:
    """Random weights and inputs; on the CPU, in bf16."""
    torch.manual_seed(0)
    config = TINY_UNET if tiny else SDXL_UNET
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).bfloat16()
    fill(unet.to_empty(device="cpu"))
    (batch,) = batches(Variant("step", 2, images, 1), torch.device("cpu"), 0, size_px)
    context_BLD = torch.randn(images, memory.CONTEXT, config["cross_attention_dim"]).bfloat16()
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    networks = GivenContext(unet, context_BLD, torch.randn(images, pooled).bfloat16())
    networks.train()
    parameters = {f"unet.{name}": parameter for name, parameter in unet.named_parameters()}
    settings = OptimizerConfig(name="adafactor", unet_lr=0.0)
    return Bench(
        networks,
        batch,
        Trained(
            gradients=Gradients(networks, parameters.values(), Place(0, 1, torch.device("cpu"))),
            diffusion=Diffusion(noise.alphas_cumprod(), NoiseConfig(), LossConfig(), "bf16"),
            optimizer=optimizers.make_optimizer([("unet", list(parameters.values()), 0.0)], settings, strict=True),
            optimizer_name=settings.name,
            parameters=parameters,
            ema=None,
            shares=None,
            scale=loss_scale("bf16"),
            rates_at=lambda updates: {"unet": 0.0},
            max_grad_norm=1.0,
        ),
        DDPMScheduler(beta_start=noise.BETA_START, beta_end=noise.BETA_END, beta_schedule="scaled_linear"),
    )


def fill(unet: nn.Module) -> None:
    """Weights of the size that training gives them, in place: one block of random numbers again and again, since drawing
    2.6 billion takes longer than the updates that are measured.
    """
    block = torch.randn(2**20)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
                continue
            scaled = (block / parameter[0].numel() ** 0.5).to(parameter.dtype)
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(scaled)):
                piece = flat[start : start + len(scaled)]
                piece.copy_(scaled[: len(piece)])


def command(arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], object]) -> tuple[dict[str, Any], str]:
    """(result, its text) of `bench.py step`; `keep` hears of the result after every turn. Raises Halt(USAGE)."""
    width, _, height = arguments.size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise Halt(ExitCode.USAGE, f"--size {arguments.size} is no size: width x height in pixels, such as 512x512")
    for option in ("images", "rounds"):
        if getattr(arguments, option) < 1:
            raise Halt(ExitCode.USAGE, f"--{option} {getattr(arguments, option)}: at least 1")
    result = run((int(width), int(height)), arguments.images, arguments.rounds, tiny=arguments.tiny, told=keep)
    return result, describe(result)


def run(
    size_px: tuple[int, int], images: int, rounds: int, *, tiny: bool = False, told: Callable[[dict[str, Any]], object] = lambda _: None
) -> dict[str, Any]:
    """{"machine", "size", "sides", "ratios", "agree"}; sides take turns, `told` hears of the result after every one.

    Raises Halt(USAGE) for a size that is no bucket's.
    """
    memory.image_flops(memory.Setup(False, "adafactor", "bf16"), *size_px)  # refuses other sizes than multiples of 32
    _return_freed_memory()
    before = resident_bytes("VmRSS")
    bench = open_bench(size_px, images, tiny=tiny)
    sides: dict[str, Callable[[], float]] = {name: _ours(bench, mode) for name, mode in OURS.items()}
    sides[DIFFUSERS] = bench.diffusers
    peer, why = peers.sd_scripts(_by_single_name(bench.networks.unet)) if not tiny else (None, "it has one size only")
    if peer is not None:
        sides[SD_SCRIPTS] = lambda: bench.sd_scripts(peer)
    turns = {name: Turns() for name in sides}
    result: dict[str, Any] = {
        "machine": timing.machine() | {"threads": torch.get_num_threads()},
        "size": f"{size_px[0]}x{size_px[1]}", "images": images, "tiny": tiny,
        "skipped": {} if peer else {SD_SCRIPTS: why},
    }  # fmt: skip
    names = list(sides)
    _turn(bench, sides[names[0]], Turns(), before)  # nobody's: the optimizer's state and every kernel are made in it
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # no side is always the first
            _turn(bench, sides[name], turns[name], before)
            told(result | judged(turns))
    return result | judged(turns)


def _ours(bench: Bench, mode: str) -> Callable[[], float]:
    return lambda: bench.ours(mode)


def _turn(bench: Bench, side: Callable[[], float], turns: Turns, before_bytes: int) -> None:
    for parameter in bench.trained.gradients.parameters:
        parameter.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    cpu, wall = time.process_time(), time.perf_counter()
    loss = side()
    turns.cpu_s.append(time.process_time() - cpu)
    turns.wall_s.append(time.perf_counter() - wall)
    turns.gradients_s.append(bench.marks["gradients"] - cpu)
    turns.peak_gib.append((resident_bytes("VmHWM") - before_bytes) / _GIB)
    turns.loss.append(loss)


def judged(turns: Mapping[str, Turns]) -> dict[str, Any]:
    """Medians of every side, ratios of CPU time within the rounds that both sides finished, and whether losses agree."""
    done = {name: one for name, one in turns.items() if one.cpu_s}
    ratios = {
        f"{one} / {other}": {
            part: spread([b / a for a, b in zip(getattr(done[one], part), getattr(done[other], part), strict=False)])
            for part in ("cpu_s", "gradients_s")
        }
        for one in done for other in done if one != other
    }  # fmt: skip
    losses = [loss for one in done.values() for loss in one.loss]
    apart = (max(losses) - min(losses)) / abs(statistics.median(losses))
    sides = {
        name: {key: statistics.median(values) for key, values in vars(one).items()} | {"turns": vars(one)}
        for name, one in done.items()
    }
    return {"sides": sides, "ratios": ratios, "losses_apart": apart, "agree": apart <= AGREE}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def describe(result: Mapping[str, Any]) -> str:
    """Seconds and peaks of every side, and how many times as fast it is as each neighbour and as full recomputation."""
    where = result["machine"]
    lines = [
        f"{where['date']}  {where['cpu']}  load {where['load_average']}  commit {where['commit']}",
        f"one update of {result['images']} x {result['size']}, {'tiny' if result['tiny'] else 'full-size'} U-Net, bf16 weights, "
        f"Adafactor, {where['threads']} threads",
    ]
    for name, side in result["sides"].items():
        lines.append(
            f"{name:26} {side['cpu_s']:8.2f} s cpu ({side['gradients_s']:.2f} s without the optimizer) {side['wall_s']:8.2f} s wall "
            f"{side['peak_gib']:6.2f} GiB  loss {side['loss']:.6f}  {len(side['turns']['cpu_s'])} turns"
        )
    against = [name for name in (next(iter(OURS)), DIFFUSERS, SD_SCRIPTS) if name in result["sides"]]
    for other in against:
        for name in result["sides"]:
            if found := result["ratios"].get(f"{name} / {other}"):
                whole, part = (f"{one['median']:.3f}x ({one['least']:.3f} to {one['most']:.3f})" for one in found.values())
                lines.append(f"  {name} is {part} as fast as {other} in forward, backward and clip, {whole} in all")
    lines += [f"{name}: skipped: {why}" for name, why in result["skipped"].items()]
    verdict = "agree" if result["agree"] else "DIFFER: the sides did not do the same work"
    return "\n".join([*lines, f"losses {verdict}: {result['losses_apart']:.1e} apart, limit {AGREE:g}"])


def resident_bytes(what: str) -> int:
    """VmRSS or VmHWM of this process."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise Halt(ExitCode.MISMATCH, "bench.py step reads memory from /proc/self/status, which is not here")
    return int(found.group(1)) * 1024


def _return_freed_memory() -> None:
    """Freed tensors go back to the system at once; in glibc's arenas they would count for every side that follows."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def _by_single_name(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The U-Net's parameters under the names of the original layout, without prefix."""
    parameters = dict(unet.named_parameters())
    links = sdxl.links({"unet": dict(SDXL_UNET)}, networks=("unet",))
    return {
        link.single.removeprefix(sdxl.PREFIXES["unet"]): parameters[link.folder[0].removeprefix("unet.")] for link in links
    }
