"""The stage config: every key, its default and its meaning, frozen and complete after loading.

A default is the recipe's value wherever all three stages share one; `MISSING` keys are what a stage decides.
Only run.py and this file handle the whole of it; everybody else takes a section or plain values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from train.base.errors import ExitCode, Halt
from train.config.schema import load_into, merge_sources
from train.config.stage_rules import stage_problems


@dataclass(frozen=True)
class ModelConfig:
    """Which weights a stage starts from, and how the networks are run."""

    init_from: str = MISSING  # run directory | diffusers folder | single file | owner/name@<40-digit commit>
    init_sha256: str | None = None  # pin of the weights file; null = not checked
    vae: str | None = None  # folder or file that replaces the VAE of init_from, in the export too
    vae_sha256: str | None = None
    tokenizers: str | None = None  # folder with tokenizer/ and tokenizer_2/; a single file means CLIP's (cliptokens)
    train_text_encoders: bool = False
    pooled_projection: Literal["correct", "sd_scripts"] = "correct"  # sd_scripts = untransposed, as released
    context: Literal["stitched", "chunks"] = "stitched"  # 227 vectors | 77 per chunk as inference UIs feed
    gradient_checkpointing: Literal["full", "partial", "none", "auto"] = "full"
    compile: bool = False
    channels_last: bool = False
    attention: Literal["auto", "flash", "cudnn", "math"] = "auto"
    float8: bool = False
    weights: Literal["fp32", "bf16"] = "fp32"  # bf16 = stochastic rounding at every update


@dataclass(frozen=True)
class DataConfig:
    """Which prepared dataset, and what is drawn from a caption."""

    path: str = MISSING
    select: str | None = None  # names select_<this>.parquet; null = the stage's name
    separator: str | None = None  # held against the set's; null = the set's
    shuffle_tags: bool = True
    tag_dropout: float = 0.0  # each flex tag alone
    caption_dropout: float = 0.0  # the whole caption
    caption_dropout_every_epochs: int = 0  # every N-th epoch without captions; 0 = off
    token_warmup_min: int = 1
    token_warmup_steps: float = 0.0  # below 1: share of all updates
    max_tokens: Literal[75, 150, 225] = 225
    overflow: Literal["tag", "token"] = "tag"  # drop whole flex tags | cut inside a tag, as released
    crop_conditioning: Literal["actual", "kohya", "zero"] = "actual"
    workers: int = 4
    prefetch: int = 2  # batches per worker
    on_read_error: Literal["stop", "substitute"] = "stop"
    worker_timeout_s: float = 300.0


@dataclass(frozen=True)
class BatchConfig:
    """Shape of an update: effective = micro x accumulation x processes."""

    micro: int = MISSING  # images per tile; part of the run's identity
    accumulation: int | None = None  # null = derived from the number of processes
    effective: int = MISSING  # images per update
    split: int | Literal["auto"] = 1  # parts in which a tile is executed; not part of the plan
    min_bucket: int | None = None  # null = buckets as prepared; a number refuses a set with smaller ones
    remainder: Literal["carry", "keep", "drop"] = "carry"
    determinism: Literal["fast", "strict"] = "fast"


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its arguments; groups are the U-Net and, where trained, each text encoder."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = MISSING
    unet_lr: float = MISSING
    text_encoder_lr: float | None = None  # needed when the encoders train
    weight_decay: float = 0.0
    decay: Literal["all", "matrices"] = "all"  # the original decays norms, biases and embeddings too
    betas: tuple[float, float] = (0.9, 0.99)
    eps: Any = None  # null: 1e-8, Adafactor [1e-30, 1e-3]
    scale_parameter: bool = False  # this and the next four are Adafactor's
    relative_step: bool = False
    warmup_init: bool = False
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    max_grad_norm: float = 1.0  # one global norm over all trained parameters; 0 = off
    sharding: Literal["none", "zero1"] = "none"


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a closed form of the updates applied."""

    name: Literal["cosine_restarts", "constant_with_warmup", "constant"] = MISSING
    cycle_steps: int | Literal["epoch"] = "epoch"
    cycles: int | None = None  # null = epochs
    min_lr: float = 0.0
    decay: float = 1.0  # of the peak, per cycle
    warmup_steps: int = 0
    unit: Literal["optimizer_step", "process_step"] = "optimizer_step"
    processes: int = 1  # with process_step: how many times the released run advanced per update
    first_step_at_min: bool = True  # the original class starts at min_lr (cosine only)


@dataclass(frozen=True)
class NoiseConfig:
    """Forward diffusion."""

    offset: float = 0.0
    offset_adaptive: float = 0.0
    multires_iterations: int = 0
    multires_discount: float = 0.3
    input_perturbation: float = 0.0
    dtype: Literal["fp32", "compute"] = "fp32"  # compute = drawn and added in half, as released
    timesteps: tuple[int, int] = (0, 1000)  # upper end exclusive
    zero_terminal_snr: bool = False  # only with v: epsilon carries no signal at snr 0


@dataclass(frozen=True)
class LossConfig:
    """What the network predicts and how errors are weighted and averaged."""

    prediction: Literal["epsilon", "v"] = "epsilon"
    average: Literal["images", "micro_batches"] = "images"
    min_snr_gamma: float | None = None
    debiased: bool = False
    type: Literal["l2", "huber"] = "l2"
    huber_c: float = 0.1
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    convert: bool = False  # must be true where prediction or zero terminal SNR differ from the parent's


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights, exported beside them."""

    decay: float | None = None  # null = off
    every_steps: int = 1
    device: Literal["same", "cpu"] = "same"


@dataclass(frozen=True)
class CheckpointConfig:
    """How often, how many, and what to do when the disk is full or busy."""

    every_steps: int = 120
    keep: int = 2
    permanent_every_steps: int | None = None  # null = one epoch
    background: bool = True
    when_busy: Literal["skip", "wait"] = "skip"
    on_full_disk: Literal["skip", "stop", "wait"] = "skip"
    verify: Literal["full", "size"] = "full"


@dataclass(frozen=True)
class ResumeConfig:
    """Named exceptions to the refusal to resume with changed settings."""

    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportConfig:
    """What the exported files say about themselves."""

    dtype: Literal["fp16", "fp32"] = "fp16"
    license: str | None = None  # null = the parent's; none there and none here is an error
    title: str | None = None
    author: str | None = None
    description: str | None = None
    tags: str | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """Preview pictures during training."""

    every_steps: int = 0  # 0 = off; otherwise at the stage's end too
    prompts: str = "configs/prompts.yaml"


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out loss."""

    every_steps: int = 0  # 0 = off; otherwise at the stage's end too
    share: float = 0.0  # keys held out by a hash of the key alone
    images: int = 256  # those with the lowest hashes
    select: str | None = None  # selection that gives the images; null = the stage's. The last stage's in all: comparable


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside metrics.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    tensorboard: bool = False
    project: str | None = None
    name: str | None = None
    trace: bool = False  # writes trace.txt: update, bucket, uid, epoch, timestep of every slot


@dataclass(frozen=True)
class LaunchConfig:
    """What the launcher and the process group allow."""

    grace_s: float = 30.0  # between SIGTERM and SIGKILL
    collective_timeout_s: float = 600.0


@dataclass(frozen=True)
class StageConfig:
    """One stage of the recipe."""

    stage: str = MISSING  # names select_<stage>.parquet and the exported file
    seed: int = MISSING
    output_dir: str = MISSING
    epochs: int = MISSING
    max_updates: int | None = None
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    model: ModelConfig = field(default_factory=ModelConfig)
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

    @property
    def tiles_per_update(self) -> int:
        """Tiles per update, T = effective / micro."""
        return self.batch.effective // self.batch.micro

    @property
    def selection(self) -> str:
        """Name of the selection this stage trains on."""
        return self.data.select or self.stage


def load_stage(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> StageConfig:
    """Load a stage from YAML files (later override earlier) and `key=value` overrides.

    Raises Halt(USAGE) naming the key, with a suggestion for a misspelt one; nothing is repaired.
    """
    config = load_into(StageConfig, paths, overrides)
    problems = stage_problems(config)
    if problems:
        raise Halt(ExitCode.USAGE, "; ".join(problems))
    return config


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
