"""What follows from the keys of a stage: narrow frozen records, each worked out here once and handed on.

A room takes the record that it uses, never the whole config; `StageConfig` has each as a property.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from train.config.adapter import AdapterConfig
    from train.config.stage import (
        BatchConfig,
        CheckpointConfig,
        DataConfig,
        EmaConfig,
        ExportConfig,
        GroupConfig,
        LossConfig,
        ModelConfig,
        NoiseConfig,
        OptimizerConfig,
        ScheduleConfig,
        StageConfig,
        TrackingConfig,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainedAs:
    """Conventions of the training that inference must share; the defaults are the recipe's."""

    max_tokens: int = 225
    context: Literal["stitched", "chunks"] = "stitched"
    pooled_projection: Literal["correct", "sd_scripts"] = "correct"
    timestep_embedding: Literal["correct", "sd_scripts"] = "correct"
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    zero_terminal_snr: bool = False
    flow_shift: float = 1.0  # of the noise levels that are drawn and sampled at; flow only


@dataclass(frozen=True)
class Identity:
    """Who a run is: its names, where it lies, and all its settings as another start compares them."""

    stage: str
    seed: int
    output_dir: str
    hash: str  # of the whole config
    flat: Mapping[str, Any]  # {"batch.micro": 16, ...}
    defaults: Mapping[str, Any]  # the same keys where nobody sets them
    accept: tuple[str, ...]  # differences from an earlier start that are accepted


@dataclass(frozen=True)
class Order:
    """What decides the plan beside the images themselves."""

    seed: int
    tile_images: int
    tiles_per_update: int
    epochs: int
    max_updates: int | None
    remainder: Literal["carry", "keep", "drop"]

    @property
    def update_images(self) -> int:
        """Images of an update whose tiles are full."""
        return self.tile_images * self.tiles_per_update


@dataclass(frozen=True)
class Images:
    """Which images of which set are trained on and which are measured, and in what order they come."""

    folder: str  # or the address of a store
    selection: str
    separator: str | None
    held_out_share: float
    held_out_selection: str  # that gives the images to measure
    min_bucket: int | None
    average: Literal["images", "micro_batches"]  # over what an update's loss is averaged
    flip: bool  # mirror images are drawn too
    masked: bool  # their masks count
    protect: Any  # tags that are never dropped, or their file, which is part of the plan then
    noise: NoiseConfig  # its law may read a file, which is part of the plan then
    order: Order
    cache_dir: str | None = None  # of what is fetched from a store
    cache_gb: float | None = None


@dataclass(frozen=True)
class Rates:
    """From what the learning rates follow, once the length of the run is known."""

    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    epochs: int


@dataclass(frozen=True)
class Running:
    """How a tile is run and what the run holds: memory, speed and the size of a checkpoint follow from it."""

    precision: Literal["fp16", "bf16", "fp32"]
    weights: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "lion8bit", "prodigy", "came", "schedulefree"]
    sharding: Literal["none", "zero1", "fsdp2", "hsdp"]
    shard_group: int | None
    gather: Literal["fp32", "bf16"]
    offload: Literal["none", "host"]
    trains_text: bool
    groups: Sequence[GroupConfig]  # tensors with a learning rate of their own, or none
    adapter: AdapterConfig | None  # trained in place of the networks' own weights
    base: Literal["16bit", "nf4"]  # how the weights lie that an adapter leaves frozen
    seed: int  # of its first weights
    average: bool  # of the weights
    average_on_device: bool
    previews: bool  # are drawn under way
    strict: bool  # the same bits on any number of processes
    context_vectors: int
    tile_images: int
    tiles_per_update: int
    split: int | Literal["auto"]
    checkpointing: Literal["full", "partial", "none", "auto"]
    attention: Literal["auto", "flash", "cudnn", "math"]
    compile: bool
    channels_last: bool
    float8: bool


@dataclass(frozen=True)
class Origin:
    """Which model a stage starts from, and what it must agree with."""

    path: str  # as configured
    model: ModelConfig
    export: ExportConfig  # says the licence that its descendants are under
    trained_as: TrainedAs
    convert: bool  # another objective than the model's is meant
    with_vae: bool  # pictures are drawn under way
    adapter: AdapterConfig | None = None
    files_every_epochs: int | None = None  # between usable files; None: at the end alone
    timesteps: tuple[int, int] = (0, 1000)  # that are trained, upper end exclusive


@dataclass(frozen=True)
class Start:
    """What a start is judged by, and the dry run made from, before anything is loaded."""

    identity: Identity
    origin: Origin
    images: Images
    rates: Rates
    batch: BatchConfig
    running: Running
    checkpoint: CheckpointConfig
    prompts: str | None  # None: no previews
    reads: Mapping[str, str]  # key: path, of all that a run only reads


@dataclass(frozen=True)
class Learning:
    """What makes and applies the gradients."""

    rates: Rates
    ema: EmaConfig
    running: Running
    rounding_seed: int | None  # of 16-bit weights


@dataclass(frozen=True)
class Feeding:
    """How an image of the plan becomes part of a batch."""

    seed: int
    data: DataConfig
    noise: NoiseConfig
    masked: bool  # with its mask


@dataclass(frozen=True)
class Watching:
    """What looks at a run: previews, held-out loss, trackers. 0 steps: never."""

    identity: Identity
    tracking: TrackingConfig
    trained_as: TrainedAs
    prompts: str | None
    previews_every_steps: int
    preview_loras: tuple[str, ...]  # FILE or FILE:weight
    previews_first: bool  # before the first update too: what the stage starts from
    held_out_every_steps: int
    held_out_first: bool  # likewise; of a conversion always
    held_out_images: int
    held_out_share: float
    origin: str  # path of the model that the stage starts from
    tile_images: int
    crop_conditioning: Literal["actual", "kohya", "zero"]
    skip_unreadable: bool


@dataclass(frozen=True)
class Keeping:
    """Where a run lies, what it saves and leaves behind, and how long it has to do so."""

    identity: Identity
    origin: Origin  # of what it leaves behind
    checkpoint: CheckpointConfig
    grace_s: float


@dataclass(frozen=True)
class Owners:
    """What each owner of a running stage is made from."""

    trained: Learning
    data: Feeding
    observers: Watching
    run: Keeping
    images: Images


@dataclass(frozen=True)
class Objective:
    """What is learnt: the noise, the loss, and the conventions."""

    noise: NoiseConfig
    loss: LossConfig
    trained_as: TrainedAs


def trained_as(config: StageConfig) -> TrainedAs:
    """The conventions under which this stage's weights make sense."""
    model = config.model
    return TrainedAs(
        max_tokens=config.data.max_tokens,
        context=model.context,
        pooled_projection=model.pooled_projection,
        timestep_embedding=model.timestep_embedding,
        prediction=config.loss.prediction,
        zero_terminal_snr=config.noise.zero_terminal_snr,
        flow_shift=config.noise.shift if config.loss.prediction == "flow" else 1.0,
    )


def images(config: StageConfig) -> Images:
    """The stage's images and their order."""
    batch, selection = config.batch, config.data.select or config.stage
    order = Order(
        config.seed, batch.micro, batch.effective // batch.micro, config.epochs, config.max_updates, batch.remainder
    )
    return Images(
        folder=config.data.path,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        selection=selection,
        separator=config.data.separator,
        held_out_share=config.validation.share,
        held_out_selection=config.validation.select or selection,
        min_bucket=batch.min_bucket,
        average=config.loss.average,
        flip=config.data.flip,
        masked=config.loss.mask,
        protect=config.data.protect,
        noise=config.noise,
        order=order,
    )


def running(config: StageConfig) -> Running:
    """How tiles are run."""
    model, batch, chunks = config.model, config.batch, config.data.max_tokens // 75
    return Running(
        precision=config.precision,
        weights=model.weights,
        optimizer=config.optimizer.name,
        sharding=config.optimizer.sharding,
        shard_group=config.optimizer.shard_group,
        gather=config.optimizer.gather,
        offload=config.optimizer.offload,
        trains_text=model.train_text_encoders,
        groups=config.optimizer.groups,
        adapter=_adapter(config),
        base=config.adapter.base,
        seed=config.seed,
        average=bool(config.ema.decay),
        average_on_device=bool(config.ema.decay) and config.ema.device == "same",
        previews=config.sampling.every_steps > 0,
        strict=batch.strict,
        context_vectors=chunks * 77 if model.context == "chunks" else chunks * 75 + 2,
        tile_images=batch.micro,
        tiles_per_update=batch.effective // batch.micro,
        split=batch.split,
        checkpointing=model.gradient_checkpointing,
        attention=model.attention,
        compile=model.compile,
        channels_last=model.channels_last,
        float8=model.float8,
    )


def _adapter(config: StageConfig) -> AdapterConfig | None:
    return None if config.adapter.type == "none" else config.adapter


def origin(config: StageConfig) -> Origin:
    """The model to start from."""
    with_vae = config.sampling.every_steps > 0
    adapter = _adapter(config)
    return Origin(
        config.model.init_from, config.model, config.export, config.trained_as, config.loss.convert, with_vae, adapter,
        config.export.every_epochs, config.noise.timesteps,
    )  # fmt: skip


def start(config: StageConfig) -> Start:
    """What a start is judged by."""
    model = config.model
    reads = {"model.init_from": model.init_from, "model.vae": model.vae, "model.tokenizers": model.tokenizers,
             "data.path": config.data.path, "data.protect": config.data.protect if isinstance(config.data.protect, str) else None,
             "noise.law_args": config.noise.law_args[0] if config.noise.law == "file" else None}  # fmt: skip
    return Start(
        identity=config.identity,
        origin=config.origin,
        images=config.images,
        rates=config.rates,
        batch=config.batch,
        running=config.running,
        checkpoint=config.checkpoint,
        prompts=_prompts(config),
        reads={key: path for key, path in reads.items() if path is not None},
    )


def owners(config: StageConfig) -> Owners:
    """What the owners of a running stage are made from."""
    watching = Watching(
        identity=config.identity,
        tracking=config.tracking,
        trained_as=config.trained_as,
        prompts=_prompts(config),
        previews_every_steps=config.sampling.every_steps,
        preview_loras=tuple(config.sampling.loras) if config.sampling.every_steps else (),
        previews_first=config.sampling.at_start and config.sampling.every_steps > 0,
        held_out_every_steps=config.validation.every_steps,
        held_out_first=(config.loss.convert or config.validation.at_start) and config.validation.every_steps > 0,
        held_out_images=config.validation.images,
        held_out_share=config.validation.share,
        origin=config.model.init_from,
        tile_images=config.batch.micro,
        crop_conditioning=config.data.crop_conditioning,
        skip_unreadable=config.data.on_read_error == "substitute",
    )
    rounding_seed = config.seed if config.model.weights == "bf16" else None
    return Owners(
        Learning(config.rates, config.ema, config.running, rounding_seed),
        Feeding(config.seed, config.data, config.noise, config.loss.mask),
        watching,
        Keeping(config.identity, config.origin, config.checkpoint, config.launch.grace_s),
        config.images,
    )


def _prompts(config: StageConfig) -> str | None:
    return config.sampling.prompts if config.sampling.every_steps else None
