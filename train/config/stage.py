"""The stage config: every key, its default and its meaning, frozen and complete after loading.

A default is the recipe's value wherever all three stages share one; `MISSING` keys are what a stage decides.
Only run.py and this file handle the whole of it; everybody else takes a section or plain values.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from train.base.errors import ExitCode, Halt
from train.config import derived
from train.config.adapter import AdapterConfig
from train.config.derived import Identity, Images, Objective, Origin, Owners, Rates, Running, Start, TrainedAs
from train.config.key import Resume, key
from train.config.schema import flatten, keys_of, load_into, merge_sources
from train.config.stage_rules import stage_problems


@dataclass(frozen=True)
class ModelConfig:
    """Which weights a stage starts from, and how the networks are run."""

    init_from: str = key(MISSING, "run directory, diffusers folder, single file, or owner/name@<40-digit commit>")
    init_sha256: str | None = key(None, "pin of the weights file; null = not checked")
    vae: str | None = key(None, "folder or file that replaces the VAE of init_from, in the export too")
    vae_sha256: str | None = key(None, "pin of the VAE's file; null = not checked")
    tokenizers: str | None = key(None, "folder with tokenizer/ and tokenizer_2/; null = those of init_from, and CLIP's for a single file")
    train_text_encoders: bool = key(False, "both text encoders train with the U-Net")
    pooled_projection: Literal["correct", "sd_scripts"] = key("correct", "sd_scripts = untransposed, as released")
    timestep_embedding: Literal["correct", "sd_scripts"] = key("correct", "sd_scripts = frequencies shifted by one, as released")
    context: Literal["stitched", "chunks"] = key("stitched", "stitched = 227 vectors; chunks = 77 per chunk, as inference UIs feed")
    gradient_checkpointing: Literal["full", "partial", "none", "auto"] = key("full", "how much of the networks is computed again in the backward pass; auto = as memory allows", resume="warn")
    compile: bool = key(False, "the repeated blocks through torch.compile", resume="warn")
    channels_last: bool = key(False, "layout of the U-Net's convolutions", resume="warn")
    attention: Literal["auto", "flash", "cudnn", "math"] = key("auto", "kernel of the attention; auto = torch's own order", resume="warn")
    float8: bool = key(False, "matrix products of the U-Net in 8 bit (torchao)")
    weights: Literal["fp32", "bf16"] = key("fp32", "of the trained networks; bf16 = stochastic rounding at every update")


@dataclass(frozen=True)
class DataConfig:
    """Which prepared dataset, and what is drawn from a caption."""

    path: str = key(MISSING, "folder of the prepared dataset, or where scripts/publish.py put one: s3://bucket/set, gs://, hf://, https://")
    cache_dir: str | None = key(None, "of a set in a store: what is fetched of it; null = ~/.cache/anix/sets", resume="free")
    cache_gb: float | None = key(None, "most of it; the rest is read image by image; null = what the disk holds", above=0, resume="free")
    select: str | None = key(None, "names select_<this>.parquet; null = the stage's name")
    separator: str | None = key(None, "held against the set's; null = the set's", resume="free")
    shuffle_tags: bool = key(True, "flex tags in a new order every epoch")
    tag_dropout: float = key(0.0, "chance of each flex tag alone", at_least=0, below=1)
    caption_dropout: float = key(0.0, "chance of the whole caption", at_least=0, below=1)
    caption_dropout_every_epochs: int = key(0, "every N-th epoch without captions; 0 = off", at_least=0)
    token_warmup_min: int = key(1, "flex tags that are kept at the warmup's start", at_least=0)
    token_warmup_steps: float = key(0.0, "updates until all tags are kept; below 1: share of all updates", at_least=0)
    mix: dict[str, float] = key(dict, "shares of tags, tags_prose and prose among a picture's visits; empty = all that there is", at_least=0)
    protect: Any = key(list, "flex tags that warmup, tag_dropout and the token budget leave in: a list, or a text file with one on each line")
    trigger: str | None = key(None, "a tag that opens every caption")
    flip: bool = key(False, "in half of its visits a picture is its mirror image, where it has one; needs latents.flip: all in the set")
    max_tokens: Literal[75, 150, 225] = key(225, "of a caption, in chunks of 75")
    overflow: Literal["tag", "token"] = key("tag", "tag = drop whole flex tags; token = cut inside a tag, as released")
    crop_conditioning: Literal["actual", "kohya", "zero"] = key("actual", "the corner that the time ids name")
    workers: int = key(4, "processes that read ahead; 0 = none", at_least=0, resume="free")
    prefetch: int = key(2, "batches per worker", at_least=1, resume="free")
    on_read_error: Literal["stop", "substitute"] = key("stop", "substitute = another image in the place of one that cannot be read", resume="free")
    worker_timeout_s: float = key(300.0, "a batch that takes longer ends the run", above=0, resume="free")


@dataclass(frozen=True)
class BatchConfig:
    """Shape of an update: effective = micro x accumulation x processes."""

    micro: int = key(MISSING, "images per tile; part of the run's identity", at_least=1)
    accumulation: int | None = key(None, "tiles per process and update; null = derived from the number of processes", at_least=1, resume="warn")
    effective: int = key(MISSING, "images per update = micro x accumulation x processes", at_least=1)
    split: int | Literal["auto"] = key(1, "parts in which a tile is executed; not part of the plan; auto = as memory allows", at_least=1, resume="warn")
    min_bucket: int | None = key(None, "null = buckets as prepared; a number refuses a set with smaller ones", at_least=1)
    remainder: Literal["carry", "keep", "drop"] = key("carry", "images that fill no tile at an epoch's end: into the next epoch, a short tile, or left out")
    determinism: Literal["fast", "strict"] = key("fast", "strict = the same bits on any number of processes")

    @property
    def strict(self) -> bool:
        """Sums in a fixed order."""
        return self.determinism == "strict"


@dataclass(frozen=True)
class GroupConfig:
    """Trained tensors with a learning rate of their own."""

    match: str = key(MISSING, "pattern (* and ?) over the tensors' canonical names, such as unet.down_blocks.*.attentions.*; the last that fits a tensor counts")
    lr: float | None = key(None, "their peak learning rate; 0 = frozen: no gradient, no state, as in the base; null = that of their network", at_least=0)
    until: float | None = key(None, "share of all updates after which their learning rate is 0; null = to the end", above=0, below=1)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its arguments; groups are the U-Net and, where trained, each text encoder, and what `groups` takes out of them."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "lion8bit", "prodigy", "came", "schedulefree"] = key(MISSING, "which optimizer; lion, prodigy, came and schedulefree (AdamW, whose average is held out, drawn and exported) are those of pytorch_optimizer (extra: optimizers)")
    unet_lr: float = key(MISSING, "peak learning rate of the U-Net", at_least=0)
    text_encoder_lr: float | None = key(None, "peak of both text encoders; needed when they train", at_least=0)
    text_encoder_2_lr: float | None = key(None, "peak of the second text encoder; null = text_encoder_lr", at_least=0)
    groups: list[GroupConfig] = key(list, "tensors with a learning rate of their own, or frozen; part of a checkpoint's identity")
    weight_decay: float = key(0.0, "decoupled, times the learning rate", at_least=0)
    decay: Literal["all", "matrices"] = key("all", "the original decays norms, biases and embeddings too; matrices = not those")
    betas: tuple[float, float] = key((0.9, 0.99), "of all but Adafactor; CAME's third is args.beta3", at_least=0, below=1)
    eps: Any = key(None, "null: 1e-8, Adafactor [1e-30, 1e-3]")
    scale_parameter: bool = key(False, "Adafactor: learning rate times the size of the parameter")
    relative_step: bool = key(False, "Adafactor: its own learning rate; must stay false")
    warmup_init: bool = key(False, "Adafactor: warmup of relative_step; must stay false")
    clip_threshold: float = key(1.0, "Adafactor: of the update's root mean square", above=0)
    decay_rate: float = key(-0.8, "Adafactor: exponent of the running averages")
    paged: bool = key(False, "adamw8bit, lion8bit: state that CUDA moves to the host where the card's memory gets short; needs a card", resume="warn")
    args: dict[str, Any] = key(dict, "more arguments of lion, prodigy, came or schedulefree by the names of their class, such as {d_coef: 0.5}")
    max_grad_norm: float = key(1.0, "one global norm over all trained parameters; 0 = off", at_least=0)
    sharding: Literal["none", "zero1", "fsdp2", "hsdp"] = key("none", "what the processes share: zero1 the optimizer's state, fsdp2 weights and gradients too, hsdp as fsdp2 within a group", resume="warn")
    shard_group: int | None = key(None, "hsdp: processes that share; null = those of a machine", at_least=2, resume="warn")
    offload: Literal["none", "host"] = key("none", "host: fp32 weights, gradients and state lie in host memory, the card holds 16-bit copies; one process", resume="warn")
    gather: Literal["fp32", "bf16"] = key("fp32", "fsdp2, hsdp: what travels when a block is made whole; bf16 = half the bytes, other numbers", resume="warn")


OVER_THE_RUN = ("cosine", "linear", "wsd")  # schedules whose rates depend on the length of the run


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a closed form of the updates applied."""

    name: Literal["cosine_restarts", "constant_with_warmup", "constant", "cosine", "linear", "wsd"] = key(MISSING, "form of the learning rate over the updates; cosine, linear and wsd reach over the whole run")
    cycle_steps: int | Literal["epoch"] = key("epoch", "updates per cycle of cosine_restarts", at_least=1)
    cycles: int | None = key(None, "how many are announced; null = epochs", at_least=1)
    min_lr: float = key(0.0, "floor of cosine_restarts, cosine, linear and wsd", at_least=0)
    decay: float = key(1.0, "of the peak, per cycle", above=0)
    warmup_steps: float = key(0.0, "updates until the peak; below 1: share of all updates (not cosine_restarts, constant)", at_least=0)
    cooldown_steps: float = key(0.2, "wsd: updates of the fall at the end; below 1: share of all updates", at_least=0)
    unit: Literal["optimizer_step", "process_step"] = key("optimizer_step", "process_step = the released run's scheduler moved once per process")
    processes: int = key(1, "with process_step: how many times the released run advanced per update", at_least=1)
    first_step_at_min: bool = key(True, "the original class starts at min_lr (cosine_restarts only)")


@dataclass(frozen=True)
class NoiseConfig:
    """Forward diffusion."""

    offset: float = key(0.0, "one number per image and channel is added to its noise, times this", at_least=0)
    offset_adaptive: float = key(0.0, "adds this x |mean of the latent's channel| to the offset")
    multires_iterations: int = key(0, "octaves of coarser noise; 0 = off", at_least=0)
    multires_discount: float = key(0.3, "strength of each coarser octave")
    input_perturbation: float = key(0.0, "extra noise on the input alone", at_least=0)
    dtype: Literal["fp32", "compute"] = key("fp32", "compute = drawn and added in half, as released")
    timesteps: tuple[int, int] = key((0, 1000), "that are drawn; upper end exclusive")
    zero_terminal_snr: bool = key(False, "only with v: epsilon carries no signal at snr 0")
    law: Literal["uniform", "logit_normal", "beta", "file"] = key("uniform", "how often each timestep is drawn, over t / 1000")
    law_args: tuple[Any, ...] = key((), "logit_normal: mean and deviation (none: 0, 1); beta: its two parameters; file: path of 1000 weights as text")
    shift: float = key(1.0, "moves the law towards noise: s x / (1 + (s - 1) x) of x = t / 1000; with flow in sampling too", above=0)
    stratified: bool = key(False, "an update's timesteps from equal parts of the law, one each")


@dataclass(frozen=True)
class LossConfig:
    """What the network predicts and how errors are weighted and averaged."""

    prediction: Literal["epsilon", "v", "flow"] = key("epsilon", "what the network predicts; flow = rectified flow")
    average: Literal["images", "micro_batches"] = key("images", "over the images of an update, or first within each micro-batch, as released")
    min_snr_gamma: float | None = key(None, "weight min(snr, gamma) by timestep; null = off", above=0)
    debiased: bool = key(False, "weight 1 / sqrt(snr)")
    type: Literal["l2", "huber"] = key("l2", "of the error")
    huber_c: float = key(0.1, "where huber turns from square to line", above=0)
    huber_schedule: Literal["constant", "exponential", "snr"] = key("snr", "how huber_c changes with the timestep")
    mask: bool = key(False, "the error counts where a picture's mask says so (source key mask); the mean is still over all places")
    convert: bool = key(False, "must be true where prediction or zero terminal SNR differ from the parent's; held-out loss is then measured before the first update too")


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights, exported beside them."""

    decay: float | None = key(None, "of the moving average; null = off", at_least=0, below=1)
    every_steps: int = key(1, "updates between two averagings; n of them ask for decay to the power of n", at_least=1)
    device: Literal["same", "cpu"] = key("same", "where the average lies", resume="warn")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often, how many, and what to do when the disk is full or busy."""

    every_steps: int = key(120, "plan steps between checkpoints", at_least=1, resume="free")
    every_minutes: float | None = key(None, "minutes between checkpoints, in the place of every_steps; null = by steps", above=0, resume="free")
    keep: int = key(2, "newest ones that stay beside the permanent", at_least=2, resume="free")
    permanent_every_steps: int | None = key(None, "these stay for ever; null = one epoch", at_least=1, resume="free")
    background: bool = key(True, "written while training goes on", resume="free")
    when_busy: Literal["skip", "wait"] = key("skip", "what to do while the last one is still being written", resume="free")
    on_full_disk: Literal["skip", "stop", "wait"] = key("skip", "what to do when one does not fit", resume="free")
    verify: Literal["full", "size"] = key("full", "how a checkpoint is checked before a resume: every byte, or sizes", resume="free")


@dataclass(frozen=True)
class ResumeConfig:
    """Named exceptions to the refusal to resume with changed settings."""

    accept: tuple[str, ...] = key((), "keys, sections, or data, plan, parent, attempts whose change is accepted", resume="free")


@dataclass(frozen=True)
class ExportConfig:
    """What the exported files say about themselves."""

    dtype: Literal["fp16", "fp32"] = key("fp16", "of the exported files", resume="free")
    license: str | None = key(None, "null = the parent's; none there and none here is an error", resume="free")
    title: str | None = key(None, "in the single file's metadata", resume="free")
    author: str | None = key(None, "in the single file's metadata", resume="free")
    description: str | None = key(None, "in the single file's metadata", resume="free")
    tags: str | None = key(None, "in the single file's metadata", resume="free")
    merged: bool = key(False, "of an adapter's stage: write the whole model with the adapter added too", resume="free")
    every_epochs: int | None = key(None, "epochs between usable files <stage>-eNNNN.safetensors (of an adapter's stage <stage>-lora-eNNNN.safetensors); null = at the end alone", at_least=1, resume="free")


@dataclass(frozen=True)
class SamplingConfig:
    """Preview pictures during training."""

    every_steps: int = key(0, "updates between previews; also at the stage's end and where export.every_epochs leaves a file; 0 = off", at_least=0, resume="free")
    at_start: bool = key(False, "previews before the first update too, of what the stage starts from: with them the report begins at the base", resume="free")
    prompts: str = key("configs/prompts.yaml", "the prompts file", resume="free")
    loras: list[str] = key(list, "adapters that are added for the previews alone: FILE or FILE:weight", resume="free")


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out loss."""

    every_steps: int = key(0, "updates between held-out losses; also at the stage's end and where export.every_epochs leaves a file; 0 = off", at_least=0, resume="free")
    at_start: bool = key(False, "measured before the first update too, of what the stage starts from; with loss.convert always", resume="free")
    share: float = key(0.0, "keys held out by a hash of the key alone", at_least=0, below=1)
    images: int = key(256, "those with the lowest hashes", at_least=1, resume="free")
    select: str | None = key(None, "selection that gives the images; null = the stage's. The last stage's in all: comparable", resume="free")


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside metrics.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = key("disabled", "Weights & Biases beside metrics.jsonl", resume="free")
    tensorboard: bool = key(False, "event files beside metrics.jsonl", resume="free")
    project: str | None = key(None, "of wandb", resume="free")
    name: str | None = key(None, "of the run in wandb", resume="free")
    times_every: int = key(50, "updates from one measurement of an update's parts (data, forward and backward, communication, optimizer) to the next; 0 = never", at_least=0, resume="free")
    profile_at: int | None = key(None, "plan step from which torch.profiler traces 3 updates into <run>/profile/", at_least=0, resume="free")
    trace: bool = key(False, "writes trace.txt: update, bucket, uid, epoch, timestep of every slot", resume="free")


@dataclass(frozen=True)
class LaunchConfig:
    """What the launcher and the process group allow."""

    grace_s: float = key(30.0, "between SIGTERM and SIGKILL", at_least=0, resume="free")
    collective_timeout_s: float = key(600.0, "of one collective; a process without a sign of life is lost after 30 s, whatever this says", above=0, resume="free")


@dataclass(frozen=True)
class StageConfig:
    """One stage of the recipe."""

    stage: str = key(MISSING, "names select_<stage>.parquet and the exported file")
    seed: int = key(MISSING, "of order, captions, noise and timesteps", at_least=0)
    output_dir: str = key(MISSING, "the run directory", resume="free")
    epochs: int = key(MISSING, "visits of every image", at_least=1, resume="warn")
    max_updates: int | None = key(None, "ends the stage earlier; null = all epochs", at_least=1, resume="warn")
    precision: Literal["fp16", "bf16", "fp32"] = key("fp16", "of the forward and backward pass")
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    # What follows from the keys, by who uses it (train/config/derived.py).

    @property
    def identity(self) -> Identity:
        """Names, place and settings as others compare them."""
        flat, defaults = flatten(self), flatten(StageConfig())
        return Identity(self.stage, self.seed, self.output_dir, config_hash(self), flat, defaults, self.resume.accept)

    @property
    def trained_as(self) -> TrainedAs:
        """The conventions under which this stage's weights make sense."""
        return derived.trained_as(self)

    @property
    def images(self) -> Images:
        """Which images, in what order."""
        return derived.images(self)

    @property
    def rates(self) -> Rates:
        """From what the learning rates follow."""
        return Rates(self.schedule, self.optimizer, self.epochs)

    @property
    def running(self) -> Running:
        """How a tile is run and what the run holds."""
        return derived.running(self)

    @property
    def objective(self) -> Objective:
        """Noise, loss and conventions."""
        return Objective(self.noise, self.loss, self.trained_as)

    @property
    def origin(self) -> Origin:
        """Which model the stage starts from."""
        return derived.origin(self)

    @property
    def start(self) -> Start:
        """What a start is judged by, and the dry run made from."""
        return derived.start(self)

    @property
    def owners(self) -> Owners:
        """What the owners of a running stage are made from."""
        return derived.owners(self)


_FOR_ONE = re.compile(r"([^=:]+):([^=]+=.*)", re.DOTALL)


def load_stage(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> StageConfig:
    """Load a stage from YAML files (later override earlier) and `key=value` overrides.

    Raises Halt(USAGE) naming the key, with a suggestion for a misspelt one; nothing is repaired.
    """
    return load_into(StageConfig, paths, overrides, [stage_problems])


def overrides_of(configs: Sequence[str | Path], overrides: Sequence[str]) -> list[list[str]]:
    """Each config's own overrides: `key=value` is for every stage, `ft1:key=value` for the stage of that name and wins.

    Raises Halt(USAGE) for a name that no config has, with a suggestion.
    """
    named = [(found[1], found[2]) if (found := _FOR_ONE.fullmatch(one)) else ("", one) for one in overrides]
    for_all = [one for stage, one in named if not stage]
    stages = [str(merge_sources([config], for_all).get("stage")) for config in configs]
    for stage, one in named:
        if stage and stage not in stages:
            near = get_close_matches(stage, stages, n=1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise Halt(ExitCode.USAGE, f"{stage}:{one}: no config is of the stage {stage!r}{meant} There are {', '.join(stages)}")
    return [[*for_all, *(one for stage, one in named if stage == its)] for its in stages]


def resume_classes() -> dict[str, Resume]:
    """What a resume may do with each key, as it stands at the key."""
    return {name: found.said.resume for name, found in keys_of(StageConfig).items()}


def unresolved_yaml(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> str:
    """The complete config as YAML with environment references left unresolved, as saved beside a run."""
    merged = OmegaConf.merge(OmegaConf.structured(StageConfig), merge_sources(paths, overrides))
    return OmegaConf.to_yaml(merged, resolve=False)


def to_yaml(config: Any) -> str:
    """A loaded config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def config_hash(config: Any) -> str:
    """sha256 over the canonical JSON of a loaded config."""
    text = json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
