"""What a full-size SDXL training step costs: FLOPs and bytes per image and bucket, predicted without torch or a GPU.

Every coefficient is a count of the real modules (meta device; attention as flash attention keeps it) and tests hold
them to the last digit. With L = bucket area / 1024 pixels, the tokens at the 1280-channel level, FLOPs are quadratic
in L and kept bytes linear, so one row of coefficients serves every bucket; orientation does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from train.base.errors import ExitCode, Halt
from train.config.derived import Running
from train.recipe import groups
from train.recipe.optimizer_state import GROUP_NUMBERS, MOMENT_BYTES
from train.recipe.order import partial_sums, virtual_ranks

if TYPE_CHECKING:
    from train.model.adapters.training import Footprint

GIB = 2**30
CONTEXT = 227  # stitched vectors of 225 tokens
PARAMETERS = {
    "unet": 2_567_463_684,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
    "vae": 83_653_863,
}
UNUSED_TEXT_PARAMETERS = 7_089_408  # encoder 1's last layer and final norm: its output is not read, so never trained
ALL_STEPS = 5  # checkpointing steps that exempt everything (train.model.recomputation.CHECKPOINT_STEPS)
STEPS_OF_MODE = {"full": 0, "partial": 3, "none": ALL_STEPS}

# FLOPs of one image: (1, L, L^2, context, context * L)
_FORWARD_CONTEXT = 681_574_400  # of each context vector, forward alone
_RECOMPUTE = (  # by exempted steps 0 (full) .. 5 (none)
    (31_948_800, 4_272_947_200, 716_800, 681_574_400, 409_600),
    (28_672_000, 3_784_704_000, 665_600, 576_716_800, 358_400),
    (22_118_400, 2_793_472_000, 563_200, 367_001_600, 256_000),
    (12_288_000, 1_166_540_800, 409_600, 52_428_800, 102_400),
    (4_096_000, 353_894_400, 0, 0, 0),
    (0, 0, 0, 0, 0),
)
_TRAIN = (141_393_920, 17_357_414_400, 2_150_400, 1_363_148_800, 1_228_800)  # forward + backward, frozen context
_POOLED_GRADIENT = 7_208_960  # FLOPs towards the pooled vector; also bytes: the 16-bit copy of the layer it enters
_TEXT_FORWARD = 333_484_830_720
_TEXT_TRAIN = 975_436_861_440  # forward + backward from the penultimate layers

# Bytes kept for backward per image: (1, L, context), by exempted steps. Autocast over fp32 weights, and 16-bit weights.
_KEPT_AUTOCAST = (
    (25_216, 645_248, 8_192),
    (28_288, 1_489_328, 141_312),
    (34_432, 3_173_648, 407_552),
    (43_648, 5_745_568, 806_912),
    (59_008, 7_715_808, 906_240),
    (74_368, 8_412_128, 906_240),
)
_KEPT_PURE = (
    (23_424, 573_568, 4_096),
    (26_240, 1_279_408, 55_296),
    (31_872, 2_688_528, 157_696),
    (40_320, 4_818_848, 311_296),
    (54_400, 6_364_128, 336_896),
    (68_480, 6_702_048, 336_896),
)
# 16-bit copies of weights kept for backward, with a frozen context; a trained one adds the keys' and values' weights.
_CASTS_FROZEN = (162_452_480, 814_535_680, 2_105_594_880, 4_153_594_880, 4_410_823_680, 4_442_158_080)
_CASTS_TRAINED = (169_661_440, 926_602_240, 2_427_376_640, 4_789_949_440, 5_099_607_040, 5_130_941_440)
_TEXT_KEPT = {False: 483_450_120, True: 48_268_296}  # per image, by "text encoders checkpointed"
_TEXT_CASTS = {False: 1_431_438_544, True: 3_278_032}
_ADAFACTOR_STATE = {"unet": 977_322_000, "text_encoder": 1_251_636, "text_encoder_2": 5_307_700}
_NEVER_CAST = {"unet": 588_160, "text_encoder": 38_038_272, "text_encoder_2": 63_507_200}  # values of norms and embeddings

# Counted: the fp32 decoder's tensors at once, for a picture of 1024x1024; the U-Net's forward without gradients keeps 0.3 GiB.
_DECODE_BYTES = 3_225_681_920

# Not counted but estimated, and said so wherever a prediction is printed:
RECOMPUTE_BYTES = GIB // 4  # of the block being recomputed, per image
WORKSPACE_BYTES = 2 * GIB  # CUDA context, cuDNN workspaces, fragmentation
GATHERED_BYTES = 2_362_232_013  # FSDP2: 2.2 GiB; the units that are whole at once and their gradients under way
USABLE_SHARE = 0.92  # of the free memory; the rest is for what the estimate misses
SMALL_MICRO = 8  # images at once below which kernels stop filling the card: `auto` goes lower only if it must


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a stage, apart from bucket, batch and checkpointing."""

    trains_text: bool
    optimizer: str  # optimizer.name
    precision: str  # fp16 | bf16 | fp32
    weights: str = "fp32"  # fp32 | bf16
    shards: int = 1  # processes that share the optimizer state (ZeRO-1, FSDP2)
    divides: int = 1  # processes that share weights, gradients and average too (FSDP2)
    ema_on_device: bool = False
    ema: bool = False  # an average is kept, wherever it lies
    context: int = CONTEXT
    previews: bool = False  # pictures are drawn while training: the VAE stays on the device from the first on
    ddp: bool = False  # gradients lie in its buckets, which it makes once more after the first update
    gradients_stay: bool = False  # in DDP's buckets or the flat buffer of strict, also while pictures are drawn
    frozen: tuple[int, int, int] = (0, 0, 0)  # values of each network that trains which `optimizer.groups` freezes
    frozen_state: int = 0  # bytes of optimizer state that they would have had
    adapter: Footprint | None = None  # trained in place of the networks, which lie frozen
    offload: bool = False  # weights, gradients and optimizer state lie in host memory, copies of the weights on the device
    partial_sums: int = 0  # whole gradients that `batch.determinism: strict` keeps beside the one being summed

    def trained(self) -> dict[str, int]:
        """Trained parameters by network."""
        if self.adapter is not None:
            return {"adapter": self.adapter.values}
        return {name: values - kept for (name, values), kept in zip(self._whole().items(), self.frozen, strict=False)}

    def _whole(self) -> dict[str, int]:
        trained = {"unet": PARAMETERS["unet"]}
        if self.trains_text:
            trained["text_encoder"] = PARAMETERS["text_encoder"] - UNUSED_TEXT_PARAMETERS
            trained["text_encoder_2"] = PARAMETERS["text_encoder_2"]
        return trained


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device at the peak of an update, by part."""

    weights: int
    gradients: int
    optimizer: int
    frozen: int  # text encoders that are not trained; with previews the VAE
    ema: int
    partial_sums: int  # of strict
    buckets: int  # gradients held twice while DDP makes its buckets anew, as far as activations do not take that room later
    casts: int  # 16-bit copies of weights kept for backward
    activations: int
    recompute: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Choice:
    """What `auto` settled on, and what it assumed."""

    exempt_steps: int  # 0 = full .. 5 = none
    split: int  # parts in which a tile is executed
    text_checkpointing: bool
    prediction: Prediction
    bucket: tuple[int, int]  # the largest, for which it was predicted
    usable_bytes: int


def setup_of(running: Running, world: int = 1) -> Setup:
    """The `Setup` of a stage on `world` processes."""
    per_process = virtual_ranks(running.tiles_per_update) // world
    divides = min(running.shard_group or world, world) if running.sharding in ("fsdp2", "hsdp") else 1
    adapter = None
    if running.adapter is not None:
        from train.model.adapters.training import footprint  # with torch

        adapter = footprint(
            running.adapter, base=running.base, precision=running.precision, trains_text=running.trains_text, optimizer=running.optimizer
        )
    saved = {}
    if running.groups and adapter is None:
        from train.model.networks import saves  # with torch

        saved = saves(running)
    return Setup(
        adapter=adapter,
        frozen=tuple(sum(one.values.get(network, 0) for one in saved.values()) for network in groups.NETWORKS),  # type: ignore[arg-type]
        frozen_state=sum(one.state_bytes for one in saved.values()),
        trains_text=running.trains_text,
        optimizer=running.optimizer,
        precision=running.precision,
        weights=running.weights,
        shards=world if running.sharding == "zero1" else divides,
        divides=divides,
        ema_on_device=running.average_on_device,
        ema=running.average,
        context=running.context_vectors,
        previews=running.previews,
        offload=running.offload == "host",
        ddp=world > 1 and not running.strict and running.sharding not in ("fsdp2", "hsdp"),
        gradients_stay=world > 1 or running.strict,
        partial_sums=partial_sums(max(per_process, 1)) if running.strict else 0,
    )


def _tokens(width_px: int, height_px: int) -> int:
    if width_px % 32 or height_px % 32:
        raise Halt(ExitCode.USAGE, f"bucket {width_px}x{height_px}: both sides must be multiples of 32")
    return width_px * height_px // 1024


def _poly(coefficients: Sequence[int], tokens: int, context: int) -> int:
    terms = (1, tokens, tokens * tokens, context, context * tokens)
    return sum(c * x for c, x in zip(coefficients, terms, strict=True))


def train_flops(width_px: int, height_px: int, exempt_steps: int, *, trains_text: bool, context: int = CONTEXT) -> int:
    """FLOPs of one U-Net forward and backward of one image, recomputation included. Text encoders not included.

    trains_text: gradient flows on into the context and the pooled vector.
    """
    tokens = _tokens(width_px, height_px)
    flops = _poly(_TRAIN, tokens, context) + _poly(_RECOMPUTE[exempt_steps], tokens, context)
    return flops + (_FORWARD_CONTEXT * context + _POOLED_GRADIENT if trains_text else 0)


def text_flops(*, trained: bool, checkpointed: bool = False) -> int:
    """FLOPs of both text encoders on one caption of three chunks, backward included when trained."""
    return (_TEXT_TRAIN + _TEXT_FORWARD * checkpointed) if trained else _TEXT_FORWARD


def image_flops(setup: Setup, width_px: int, height_px: int, exempt_steps: int = ALL_STEPS) -> int:
    """FLOPs of one training image in all. With the default (no recomputation) it is what counts as useful work."""
    unet = train_flops(width_px, height_px, exempt_steps, trains_text=setup.trains_text, context=setup.context)
    return unet + text_flops(trained=setup.trains_text, checkpointed=exempt_steps < ALL_STEPS)


def kept_bytes(width_px: int, height_px: int, exempt_steps: int, setup: Setup) -> tuple[int, int]:
    """(bytes per image, fixed bytes) that the U-Net keeps for backward; the fixed part is 16-bit copies of weights.

    `precision: fp32` was not counted: it is bounded by twice the 16-bit figure, without copies.
    """
    pure = setup.weights != "fp32" or setup.precision == "fp32"
    if setup.adapter is not None:  # no copies of frozen weights; each layer's input stays for the adapter, as it did for the weights
        per_image = kept_bytes(width_px, height_px, exempt_steps, replace(setup, adapter=None))[0]
        return per_image, 0 if setup.precision == "fp32" else 2 * setup.adapter.values
    constant, per_token, per_context = (_KEPT_PURE if pure else _KEPT_AUTOCAST)[exempt_steps]
    per_image = constant + per_token * _tokens(width_px, height_px) + per_context * setup.context
    if pure:
        return per_image * (2 if setup.precision == "fp32" else 1), 0
    return per_image, (_CASTS_TRAINED if setup.trains_text else _CASTS_FROZEN)[exempt_steps]


def optimizer_bytes(setup: Setup) -> int:
    """Optimizer state of the trained parameters on one process."""
    everything = replace(setup, frozen=(0, 0, 0)).trained()
    if setup.adapter is not None:
        whole = setup.adapter.state_bytes
    elif setup.optimizer == "adafactor":
        whole = sum(_ADAFACTOR_STATE[name] for name in everything)
    else:
        whole = sum(everything.values()) * MOMENT_BYTES[setup.optimizer]
        if setup.optimizer == "came":  # rows and columns twice; of vectors, which it keeps once, a little too much
            whole += 2 * sum(_ADAFACTOR_STATE[name] for name in everything)
    return -(-max(whole - setup.frozen_state, 0) // setup.shards)


def checkpoint_bytes(setup: Setup) -> int:
    """Bytes on disk of one resume checkpoint: weights as they train, the whole optimizer state, the average."""
    trained = sum(setup.trained().values())
    state = optimizer_bytes(setup) * setup.shards
    ema = 4 * trained if setup.ema or setup.ema_on_device or setup.optimizer in GROUP_NUMBERS else 0
    return trained * (2 if setup.weights == "bf16" else 4) + state + ema


def predict(setup: Setup, bucket: tuple[int, int], images: int, exempt_steps: int, *, text_checkpointing: bool = True) -> Prediction:
    """Peak bytes of an update that runs `images` of `bucket` (width, height in pixels) at once on one device.

    With FSDP2 the blocks that are whole at a time, gathered and reduced, count as workspace.
    Assumes that gradients lie in DDP's buckets throughout (`engine.step.adopted_by_buckets`), and autocast without a weight cache.
    """
    trained = sum(setup.trained().values())
    weight_bytes = 2 if setup.weights == "bf16" else 4
    text = PARAMETERS["text_encoder"] + PARAMETERS["text_encoder_2"]
    frozen_text = UNUSED_TEXT_PARAMETERS if setup.trains_text else text
    per_image, casts = kept_bytes(*bucket, exempt_steps, setup)
    if setup.trains_text:
        per_image += _TEXT_KEPT[text_checkpointing]
        casts += _TEXT_CASTS[text_checkpointing]
    frozen = frozen_text * (4 if setup.precision == "fp32" else 2) // setup.divides if setup.adapter is None else setup.adapter.base_bytes
    frozen += sum(setup.frozen) * weight_bytes // setup.divides if setup.adapter is None else 0
    weights = trained * weight_bytes
    if setup.offload:  # the copies that autocast would keep are the weights; what else belongs to them is the host's
        casts, weights = 0, weights if setup.precision == "fp32" else 2 * trained + 2 * sum(_NEVER_CAST[name] for name in setup.trained())
    vae = PARAMETERS["vae"] * 4 if setup.previews else 0
    recompute = RECOMPUTE_BYTES * images if exempt_steps < ALL_STEPS else 0
    return Prediction(
        weights=weights // setup.divides,
        gradients=0 if setup.offload else trained * weight_bytes // setup.divides,
        optimizer=0 if setup.offload else optimizer_bytes(setup),
        frozen=frozen + vae,
        ema=4 * trained // setup.divides if setup.ema_on_device and not setup.offload else 0,
        partial_sums=0 if setup.offload else 4 * trained * setup.partial_sums,
        buckets=max(0, trained * weight_bytes - casts - per_image * images - recompute) if setup.ddp else 0,
        casts=casts,
        activations=per_image * images,
        recompute=recompute,
        workspace=WORKSPACE_BYTES + (GATHERED_BYTES if setup.divides > 1 else 0),
    )


def host_bytes(setup: Setup) -> int:
    """Host memory that a stage holds with masters there: weights, gradients, state, average, sums of strict; 0 without."""
    held = sum(setup.trained().values()) * 4 * (2 + setup.ema + setup.partial_sums) + optimizer_bytes(setup)
    return held if setup.offload else 0


def previews_bytes(setup: Setup) -> int:
    """Peak bytes on the main process's device while previews are drawn, between two updates; 0 where none are.

    With an average its networks are a copy on the device, wherever the average lies.
    """
    if not setup.previews:
        return 0
    found = predict(setup, (1024, 1024), 1, 0)
    copied = found.weights if setup.ema or setup.ema_on_device else 0
    stays = found.weights + found.optimizer + found.frozen + found.ema + (found.gradients if setup.gradients_stay else 0)
    return stays + copied + _DECODE_BYTES + found.workspace


def largest(buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the greatest area, the most square of equals: what memory is planned for."""
    return max(buckets, key=lambda bucket: (bucket[0] * bucket[1], -abs(bucket[0] - bucket[1]), bucket))


def choose(
    setup: Setup,
    free_bytes: int,
    buckets: Sequence[tuple[int, int]],
    micro: int,
    *,
    exempt_steps: int | None = None,
    split: int | None = None,
) -> Choice:
    """The least recomputation that fits `free_bytes` before anything is loaded, for the largest bucket.

    micro: most images of a tile. exempt_steps, split: None = free to choose (`auto`), else kept as given. Of equal
    recomputation the fewest parts win; fewer than 8 images at once are taken only when nothing else fits, and no split that does not divide micro.
    Raises Halt(MISMATCH), naming the smallest prediction, when nothing fits.
    """
    usable = int(free_bytes * USABLE_SHARE)
    bucket = largest(buckets)
    splits = [split] if split else [parts for parts in range(1, micro + 1) if micro % parts == 0]
    steps = [exempt_steps] if exempt_steps is not None else list(range(ALL_STEPS, -1, -1))
    at_once = {parts: -(-micro // parts) for parts in splits}  # a split that is given may not divide a short tile
    roomy = [parts for parts in splits if at_once[parts] >= min(SMALL_MICRO, micro)]
    tight = [parts for parts in splits if parts not in roomy]
    text_choices = (False,) if exempt_steps is not None and split is not None else (False, True)
    candidates = [(s, p) for s in steps for p in roomy] + [(s, p) for p in tight for s in steps]
    for chosen_steps, parts in candidates:
        # Text encoders keep their activations only beside a U-Net that keeps all of its own: 1.2 % of the work.
        # With both given, nothing is chosen: `none` then keeps theirs as well.
        for text_checkpointing in text_choices if chosen_steps == ALL_STEPS else (True,):
            found = predict(setup, bucket, at_once[parts], chosen_steps, text_checkpointing=text_checkpointing)
            if found.total <= usable:
                return Choice(chosen_steps, parts, text_checkpointing, found, bucket, usable)
    parts, chosen_steps = max(splits), min(steps)
    need = predict(setup, bucket, at_once[parts], chosen_steps, text_checkpointing=text_choices[-1] or chosen_steps < ALL_STEPS).total
    raise Halt(
        ExitCode.MISMATCH,
        f"does not fit: {need / GIB:.1f} GiB are needed for {at_once[parts]} image(s) of {bucket[0]}x{bucket[1]} "
        f"at once, {usable / GIB:.1f} GiB ({USABLE_SHARE:.0%} of {free_bytes / GIB:.1f} free) may be used; "
        + _advice(setup, exempt_steps, split),
    )


def _advice(setup: Setup, exempt_steps: int | None, split: int | None) -> str:
    """What to change, cheapest first."""
    changes = []
    if exempt_steps:
        changes.append("model.gradient_checkpointing: auto")
    if split is not None:
        changes.append("batch.split: auto")
    if setup.weights == "fp32" and not setup.offload:
        alone = setup.shards == 1 and not setup.ddp and setup.adapter is None
        changes += (["optimizer.offload: host"] if alone else []) + ["model.weights: bf16"]
    if setup.optimizer == "adamw" and not setup.offload:
        changes.append("optimizer.name: adamw8bit")
    if setup.trains_text:
        changes.append("model.train_text_encoders: false")
    return "try " + ", ".join(changes) if changes else "a card with more memory is needed"


def settle(
    running: Running, free_bytes: int, buckets: Sequence[tuple[int, int]], world: int = 1, *, tile_images: int | None = None
) -> Choice:
    """`choose` with what a stage leaves open: `auto` in model.gradient_checkpointing and batch.split.

    tile_images: most images of a tile, where no bucket holds batch.micro.
    """
    mode, split = running.checkpointing, running.split
    return choose(
        setup_of(running, world),
        free_bytes,
        buckets,
        tile_images or running.tile_images,
        exempt_steps=None if mode == "auto" else STEPS_OF_MODE[mode],
        split=None if isinstance(split, str) else split,
    )
