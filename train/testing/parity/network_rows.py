"""Rows about the networks: single files both ways, encoders, VAE, and one step in fp32, fp16 and bf16.

Both sides open the same file of random weights and take the same step. Of the released run's conventions the step has
the trainer's own, so that each convention is judged by its own row and by no other.
"""

from __future__ import annotations

import gc
import math
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config.stage import LossConfig, ModelConfig, NoiseConfig
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.model import layouts, networks, sdxl, single_file, source, text
from train.model.networks import Networks, set_train_mode
from train.model.recomputation import set_checkpointing, set_text_checkpointing
from train.recipe.order import Tile
from train.storage import tensor_files
from train.storage.tensor_files import Blob
from train.testing.parity import data_rows, inputs, number_rows, verdicts
from train.testing.parity.checkout import Answer, Checkout, ask
from train.testing.parity.child.halves import quick_halves
from train.testing.parity.inputs import Switches
from train.testing.parity.verdicts import Row

TINY: dict[str, Any] = {  # the smallest that the trainer's code allows: it counts on 2,048 wide contexts and layer 11
    "channels": 32, "vae_channels": 32,
    "encoders": {"768": {"intermediate_size": 64}, "1280": {"intermediate_size": 64, "num_hidden_layers": 2}},
}  # fmt: skip
WANTED = (  # 20 tensors from every kind of block; the first of each network lets gradients through a checkpointed one
    "unet.conv_in.weight", "unet.time_embedding.linear_1.weight", "unet.add_embedding.linear_2.weight",
    "unet.down_blocks.0.resnets.0.conv1.weight", "unet.down_blocks.1.attentions.0.proj_in.weight",
    "unet.down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k.weight",
    "unet.down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj.weight", "unet.down_blocks.1.downsamplers.0.conv.weight",
    "unet.mid_block.attentions.0.transformer_blocks.4.attn1.to_q.weight", "unet.mid_block.resnets.1.time_emb_proj.weight",
    "unet.up_blocks.0.attentions.2.transformer_blocks.0.norm2.weight", "unet.up_blocks.1.resnets.0.conv_shortcut.weight",
    "unet.up_blocks.2.resnets.2.norm2.bias", "unet.conv_out.weight",
    "text_encoder.text_model.embeddings.position_embedding.weight", "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
    "text_encoder.text_model.encoder.layers.10.self_attn.v_proj.weight",
    "text_encoder_2.text_model.embeddings.position_embedding.weight",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj.weight", "text_encoder_2.text_projection.weight",
)  # fmt: skip
ORDER = [0, 1]  # images of the step; the trainer's second run has them the other way round and another number of threads
SCALE = 2.0**12  # of the loss in fp16: gradients of single values vanish below 6e-8
PROJECTION = "text_encoder_2.text_projection.weight"
HALVES = ("fp16", "bf16")
ROUNDINGS = 3  # two sides that round at other places are 1.4 times one's rounding apart, more at single values
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def configs_of(size: str) -> sdxl.Configs:
    """SDXL's configs, or those of `TINY`."""
    if size == "full":
        return sdxl.STANDARD
    wide = TINY["channels"]
    channels = [wide, 2 * wide, 4 * wide]
    unet = {"block_out_channels": channels, "attention_head_dim": [max(one // 64, 1) for one in channels]}
    vae = {"block_out_channels": [TINY["vae_channels"] * by for by in (1, 2, 4, 4)]}
    smaller = {"unet": unet, "vae": vae, "text_encoder": TINY["encoders"]["768"], "text_encoder_2": TINY["encoders"]["1280"]}
    return {name: {**config, **smaller.get(name, {})} for name, config in sdxl.STANDARD.items()}


def write_weights(file: Path, configs: sdxl.Configs) -> None:
    """A single file of random fp16 weights, of a size that keeps activations about 1 in every layer."""
    shapes = sdxl.folder_shapes(configs)
    blobs = {name: Blob("F16", shape, partial(_random, name, shape)) for name, shape in shapes.items()}
    single_file.write_single_file(file, blobs, configs, {"modelspec.license": "CC0-1.0"})


def _random(name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    values = draw.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        values = values * np.float32(0.05) + np.float32("norm" in name and name.endswith("weight"))
    else:
        values /= np.float32(math.sqrt(math.prod(shape[1:]))) if "embedding.weight" not in name else np.float32(4.0)
    yield memoryview(values.astype(np.float16).tobytes())


def step_inputs(tokenizer: text.TagTokenizer) -> dict[str, torch.Tensor]:
    """Two images: latents, noise, timesteps 100 and 700, captions of one and of three chunks, sizes."""
    draw = np.random.default_rng(11)
    latents, noise = (torch.from_numpy(draw.normal(size=(2, *inputs.LATENT)).astype(np.float16)) for _ in range(2))
    contents = [tokenizer.content_ids(one.split(", ")) for one in inputs.texts(tokenizer)]
    chosen = [contents[inputs.LENGTHS.index(length)] for length in (76, 225)]
    ids_1, ids_2 = tokenizer.chunk_ids_many(chosen, 225)
    sizes = torch.tensor([[2000, 1500, 0, 16, 1152, 896], [1080, 1920, 6, 0, 768, 1344]]).float()
    return {
        "latents": latents.float(), "noise": noise.float(), "timesteps": torch.tensor([100, 700]), "sizes": sizes,
        "ids_1": torch.from_numpy(ids_1), "ids_2": torch.from_numpy(ids_2),
    }  # fmt: skip


def rows(config: Switches, checkout: Checkout, work: Path, size: str) -> list[Row]:
    """The table's rows about networks."""
    configs = configs_of(size)
    file = work / "weights.safetensors"
    write_weights(file, configs)
    cache = work / "tokenizers"
    if not cache.exists():
        inputs.write_tokenizers(cache)
    tokenizer = text.load_tag_tokenizer(None)
    data = data_rows.ours(config, inputs.texts(tokenizer))
    step = step_inputs(tokenizer)
    names = _single_names(configs)
    facts = {
        "file": str(file), "tiny": TINY if size == "tiny" else None, "tokenizers": str(cache),
        "wanted": [[name.partition(".")[0], names[name]] for name in WANTED], "runs": _runs(),
    }  # fmt: skip
    told = {"ids_1": data.ids_1, "ids_2": data.ids_2, **{f"step.{name}": value for name, value in step.items()}}
    theirs = ask(checkout, "networks", work / "networks", tensors=told, facts=facts)
    shift = number_rows.shift_of(ask(checkout, "numbers", work / "shift", tensors=number_rows.given(), facts={"noises": {}}).tensors)
    found = [Row("single file of ours, opened there", "equal", "every tensor found, none left over", "none", "its own loader refuses anything else")]
    found += [_resaved(checkout, work, facts, file, configs), _vae(checkout, work, facts, file)]  # before ours is in memory too
    found += _encoders(config, file, data, theirs)
    found += _steps(file, step, theirs, names, shift)
    return found


def _runs() -> list[dict[str, Any]]:
    """The trainer's runs: one in fp32, two in each half type that differ in nothing but rounding."""
    runs: list[dict[str, Any]] = [{"name": "fp32", "dtype": DTYPES["fp32"], "order": ORDER, "threads": 2, "scale": 1.0}]
    for precision in HALVES:
        scale = SCALE if precision == "fp16" else 1.0
        for suffix, order, threads in (("", ORDER, 2), (" again", ORDER[::-1], 1)):
            name = f"{precision}{suffix}"
            runs.append({"name": name, "dtype": DTYPES[precision], "order": order, "threads": threads, "scale": scale})
    return runs


def _single_names(configs: sdxl.Configs) -> dict[str, str]:
    """Canonical name to the trainer's name within its network: the U-Net's is the single file's, the encoders' their own."""
    singles = {link.folder[0]: link.single for link in sdxl.links(configs, ("unet",))}
    prefix = sdxl.PREFIXES["unet"]
    return {name: singles[name].removeprefix(prefix) if name in singles else name.partition(".")[2] for name in WANTED}


def _open(file: Path, shift: int | None) -> Networks:
    """Our networks as the trainer has them: its projection and its shift, checkpointed, the wanted tensors trained."""
    components = networks.build(source.resolve(ModelConfig(init_from=str(file)), hashed=False), with_vae=False)
    mine = Networks(
        components, train_text_encoders=True, context="stitched", pooled_projection="sd_scripts",
        timestep_embedding="sd_scripts" if shift == 1 else "correct",
    )  # fmt: skip
    mine.requires_grad_(False)
    set_checkpointing(mine.unet, "full")
    for encoder in (mine.text_encoder, mine.text_encoder_2):
        set_text_checkpointing(encoder, True)
    set_train_mode(mine)
    return mine


def _encoders(config: Switches, file: Path, data: data_rows.Data, theirs: Answer) -> list[Row]:
    components = networks.build(source.resolve(ModelConfig(init_from=str(file)), hashed=False), with_vae=False)
    with torch.no_grad():
        context, pooled = text.encode(
            components.text_encoder, components.text_encoder_2, data.ids_1, data.ids_2,
            context=config.model.context, pooled_projection=config.model.pooled_projection,
        )  # fmt: skip
    del components
    gc.collect()
    width = theirs.tensors["hidden_1"].shape[-1]
    mine = {"hidden_1": context[..., :width], "hidden_2": context[..., width:], "pooled": pooled}
    named = {"hidden_1": "hidden states, encoder 1", "hidden_2": "hidden states, encoder 2", "pooled": "pooled vector"}
    reason = "fp32 sums in another order, 12 to 32 layers deep"
    return [
        verdicts.row(name, verdicts.relative(mine[key], theirs.tensors[key]), 1e-5, reason, note=f"{len(data.ids_1)} lengths")
        for key, name in named.items()
    ]


def our_step(mine: Networks, step: Mapping[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """Prediction, losses and gradients of the wanted tensors, as a stage takes its step."""
    wanted = {networks.canonical_name(name): p for name, p in mine.named_parameters()}
    for name in WANTED:
        wanted[name].grad = None
        wanted[name].requires_grad_(True)
    scale = SCALE if precision == "fp16" else 1.0
    caught: list[torch.Tensor] = []
    hook = mine.register_forward_hook(lambda module, given, out: caught.append(out.detach()))
    rows = np.arange(2)
    batch = Batch(
        latents_BCHW=step["latents"] * sdxl.STANDARD["vae"]["scaling_factor"], noise_BCHW=step["noise"],
        input_noise_BCHW=step["noise"], timesteps_B=step["timesteps"], ids_1_BN77=step["ids_1"], ids_2_BN77=step["ids_2"],
        size_B6=step["sizes"], slots_B=torch.arange(2), step=0,
        tile=Tile(8 * inputs.LATENT[2], 8 * inputs.LATENT[1], 0, rows, rows.astype(np.uint64), np.zeros_like(rows)), tags_dropped=0,
    )  # fmt: skip
    diffusion = Diffusion(alphas_cumprod(), NoiseConfig(dtype="compute"), LossConfig(), precision)
    with quick_halves(getattr(torch, DTYPES[precision])):
        losses = image_losses(mine, batch, diffusion)
        hook.remove()
        (losses.mean() * scale).backward()
    gradients = {f"gradient.{name}": grad / scale for name in WANTED if (grad := wanted[name].grad) is not None}
    return {"prediction": caught[0].float(), "losses": losses.detach(), **gradients}


def _steps(file: Path, step: Mapping[str, torch.Tensor], theirs: Answer, names: Mapping[str, str], shift: int | None) -> list[Row]:
    mine, found = _open(file, shift), []
    by_run = {run["name"]: _run_of(theirs, run["name"], names) for run in _runs()}
    own = our_step(mine, step, "fp32")
    full = _distances(own, by_run["fp32"])
    found += [
        verdicts.row("prediction, fp32", full["prediction"], 1e-5, "fp32 sums in another order"),
        verdicts.row("loss of each image, fp32", full["losses"], 1e-6, "fp32 sums in another order"),
        verdicts.row(f"gradients of {len(WANTED)} tensors, fp32", full["worst gradient"], 1e-4, "fp32 sums in another order, there and back"),
    ]
    for precision in HALVES:
        half = our_step(mine, step, precision)
        apart = _distances(half, by_run[precision])
        rounding = _distances(by_run[precision], by_run["fp32"])
        spread = _distances(by_run[f"{precision} again"], by_run[precision])
        for key in ("prediction", "losses"):
            # A loss is a mean of some thousand products with the prediction's rounding: a tenth of it is much.
            tolerance = ROUNDINGS * rounding["prediction"] if key == "prediction" else rounding["prediction"] / 10
            note = f"trainer's two runs {spread[key]:.2g} apart, its {precision} from its fp32 {rounding[key]:.2g}"
            reason = f"{ROUNDINGS} times what rounding to {precision} takes the trainer's prediction from its fp32; of losses a tenth of that distance"
            found.append(verdicts.row(f"{key}, {precision} autocast", apart[key], tolerance, reason, note=note))
        times = {name: apart[f"gradient.{name}"] / max(rounding[f"gradient.{name}"], 1e-12) for name in WANTED}
        worst = max(times, key=times.__getitem__)
        note = f"times its own rounding, worst: {worst}; trainer's two runs up to {spread['worst gradient']:.2g} apart"
        reason = f"each tensor at most {ROUNDINGS} times as far as rounding to {precision} takes the trainer's own from fp32"
        found.append(verdicts.row(f"gradients, {precision} autocast", times[worst], ROUNDINGS, reason, note=note))
    del mine
    gc.collect()
    return found


def _run_of(theirs: Answer, run: str, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The trainer's step of one run under our names."""
    key = {name: f"{run}.gradient.{name.partition('.')[0]}.{names[name]}" for name in WANTED}
    gradients = {f"gradient.{name}": theirs.tensors[key[name]] for name in WANTED}
    # read from the file without transposing it, as docs/as_run.md says: so is its gradient
    gradients[f"gradient.{PROJECTION}"] = gradients[f"gradient.{PROJECTION}"].t()
    return {"prediction": theirs.tensors[f"{run}.prediction"], "losses": theirs.tensors[f"{run}.losses"], **gradients}


def _distances(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative distances of prediction, losses and every gradient, and the largest of the gradients'."""
    apart = {name: verdicts.relative(value, theirs[name]) for name, value in mine.items()}
    worst = max(value for name, value in apart.items() if name.startswith("gradient."))
    return {**apart, "worst gradient": worst}


def _resaved(checkout: Checkout, work: Path, facts: Mapping[str, Any], file: Path, configs: sdxl.Configs) -> Row:
    """The trainer's own file of the same weights, opened here: complete, and every tensor the same bits."""
    again = work / "again.safetensors"
    ask(checkout, "resave", work / "resave", facts={**facts, "out": str(again)})
    theirs = tensor_files.open_file(again)
    reading = layouts.single_weights(theirs, configs)
    before = layouts.single_weights(tensor_files.open_file(file), configs)
    wrong = [name for name, blob in before.weights.items() if not _same(blob, reading.weights[name])]
    again.unlink()
    return verdicts.counted("single file of the trainer, opened here", wrong, len(before.weights), "fp16 both times; " + "; ".join(reading.notes))


def _same(one: Blob, other: Blob) -> bool:
    return one.dtype == other.dtype and zlib.crc32(one.read()) == zlib.crc32(other.read())


def _vae(checkout: Checkout, work: Path, facts: Mapping[str, Any], file: Path) -> Row:
    picture = torch.from_numpy(inputs.pictures()["as it is"][:96, :160].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    theirs = ask(checkout, "vae", work / "vae", tensors={"scaled": picture}, facts=facts).tensors["moments"]
    local = source.resolve(ModelConfig(init_from=str(file)), hashed=False)
    encoder = networks.fill("vae", local.configs["vae"], local.weights, file)
    with torch.no_grad():
        mine = encoder.encode(picture).latent_dist.parameters  # type: ignore[operator]
    return verdicts.row("VAE: mean and log-variance", verdicts.relative(mine, theirs), 1e-5, "fp32 sums in another order")
