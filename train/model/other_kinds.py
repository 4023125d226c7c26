"""What a file or folder is that is not SDXL's, or only nearly, and what its owner can do about it.

Nothing is read here but names, shapes and configs. Every refusal says what the thing is and the way on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.model import sdxl
from train.storage import tensor_files
from train.storage.tensor_files import Blob

NAMED = 8  # of a long list of tensors, so many are named
FEW = 2  # where the sentence before has already said what is wrong
ORIGINAL = "start from the fp16 or fp32 original"
_QUANT_MARKS = (
    "comfy_quant", "scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".absmax", ".quant_map", "quant_state",
    ".qweight", ".qzeros",
)  # fmt: skip

_SCHEDULE = (
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
)  # fmt: skip
# Left by trainers and other programs; none is read when a picture is made, and none is a weight of SDXL.
# Held against a name with and without its network's prefix: only of names that nothing wanted has.
LEFTOVERS = {
    "model_ema.*": r"model_ema\..*",
    "sigmas": r"(denoiser\.|model_sampling\.)?(log_)?sigmas",
    "noise schedule": "|".join(_SCHEDULE),
    "loss.*": r"loss\..*",
    "embedding_manager": r"embedding_manager(\..*)?",
    "position_ids": r"(.*\.)?position_ids",
    "logit_scale": r"(.*\.)?logit_(scale|bias)",
    "attn_mask": r"(.*\.)?attn_mask",
    "image encoder of CLIP": r"(visual|visual_projection|vision_model)(\..*)?",
    "counters": r"global_step|epoch",
}
PROJECTION_1 = "text_projection of encoder 1"  # SDXL's encoder 1 has none; that of CLIP's whole model is left behind


def some(names: Sequence[str], most: int = NAMED) -> str:
    """The first of many names, and how many more."""
    # file contents are untrusted: control characters must not reach a terminal
    shown = [ascii(name)[1:-1][:200] for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class Names:
    """Names and shapes of a file's tensors, asked in the words of the table below."""

    blobs: Mapping[str, Blob]

    def starts(self, *prefixes: str) -> bool:
        """Some name starts so."""
        return any(name.startswith(prefixes) for name in self.blobs)

    def holds(self, *parts: str) -> bool:
        """Some name holds one of the parts."""
        return any(part in name for name in self.blobs for part in parts)

    def only(self, *prefixes: str) -> bool:
        """Every name starts so."""
        return bool(self.blobs) and all(name.startswith(prefixes) for name in self.blobs)

    @property
    def channels(self) -> int | None:
        """Channels that the U-Net reads, where the file has one."""
        blob = self.blobs.get("model.diffusion_model.input_blocks.0.0.weight")
        return blob.shape[1] if blob is not None and len(blob.shape) == 4 else None


@dataclass(frozen=True)
class Kind:
    """A kind of file by its names: what it is, and what to do with it."""

    test: Callable[[Names], bool]
    what: str
    do: str


_VAE_ALONE = "a VAE alone"
_BASE = "name the SDXL model it belongs to in model.init_from"
# The first that fits speaks; so the particular comes before the general.
_ADDITIONS = (
    Kind(lambda n: n.holds("lora_", ".lora", "hada_w", "lokr_", "dora_scale", "oft_blocks", "oft_diag"),
         "a LoRA or another adapter (a set of differences, no model)", "merge it into its base (convert.py merge BASE LORA OUT) and start from that, or " + _BASE),
    Kind(lambda n: n.starts("emb_params", "string_to_param", "<") or n.only("clip_l", "clip_g", "clip_h"),
         "a textual inversion (a few word vectors, no model)", _BASE),
    Kind(lambda n: n.holds("control_model.", "controlnet_", "zero_convs.", "input_hint_block.", "control_net"),
         "a ControlNet", _BASE),
    Kind(lambda n: n.starts("image_proj", "ip_adapter") or n.holds(".to_k_ip."), "an IP-Adapter", _BASE),
)  # fmt: skip
_MODELS = (
    Kind(lambda n: n.holds("joint_blocks.", "double_blocks.", "transformer_blocks.0.norm1_context", "double_stream_", "x_embedder.proj"),
         "a diffusion transformer (SD3, Flux or the like)", "another architecture, which this recipe does not train"),
    Kind(lambda n: n.starts("cond_stage_model.model."), "a Stable Diffusion 2 model", "the recipe trains SDXL"),
    Kind(lambda n: n.starts("cond_stage_model."), "a Stable Diffusion 1 model", "the recipe trains SDXL"),
    Kind(lambda n: n.starts("conditioner.embedders.0.model."),
         "an SDXL refiner (one text encoder, another U-Net)", "the recipe trains the base model: start from that"),
    Kind(lambda n: n.channels == 9, "an SDXL inpainting model (its U-Net reads 9 channels, the base model's 4)",
         "start from the model that it was made from"),
    Kind(lambda n: n.channels == 8, "a model that edits pictures (its U-Net reads 8 channels, the base model's 4)",
         "start from the model that it was made from"),
    Kind(lambda n: n.holds("time_embedding.cond_proj"),
         "a distilled model with the guidance built in (LCM)", "start from the model that it was distilled from"),
    Kind(lambda n: bool({"edm_mean", "edm_std", "edm_vpred.sigma_max"} & set(n.blobs)),
         "a model of another noise schedule (EDM, as Playground 2.5)", "the recipe trains epsilon and v models of SDXL's schedule"),
)  # fmt: skip
_PARTS = (
    Kind(lambda n: n.only("first_stage_model.") or n.only("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.", "model_ema."),
         _VAE_ALONE, "it goes into model.vae (convert.py: --vae); model.init_from names a whole model"),
    Kind(lambda n: n.starts("taesd_", "0.weight", "1.conv.0.weight"), "a tiny preview VAE (TAESD)", _BASE),
    Kind(lambda n: n.starts("down_blocks.", "mid_block."),
         "one network of a diffusers folder", "give the folder itself, the one with model_index.json"),
    Kind(lambda n: n.starts("model.diffusion_model.", "diffusion_model.", "input_blocks.")
         and not n.starts("conditioner.", "first_stage_model.", "text_encoder", "vae."),
         "a U-Net alone (no text encoders, no VAE)",
         "put it into a whole SDXL checkpoint with the program that saved it, and start from that"),
    Kind(lambda n: n.starts("text_model.", "transformer.resblocks.", "encoder.block.", "embeddings.token_embedding"),
         "a text encoder alone, one network of a diffusers folder", "give the folder itself, or a whole checkpoint"),
)  # fmt: skip


def refuse_other_kinds(path: Path, blobs: Mapping[str, Blob]) -> None:
    """Halt(MISMATCH) naming what the file is, when it is no whole SDXL model."""
    names = Names(blobs)
    for kind in (*_ADDITIONS, *_MODELS, *_PARTS):
        if kind.test(names):
            raise Halt(ExitCode.MISMATCH, f"{path} is {kind.what}, not an SDXL single file: {kind.do}")
    refuse_quantised(path, blobs)
    if not names.starts("model.diffusion_model.", "model.model.diffusion_model.", "unet.", "model.unet."):
        first = some(sorted(blobs)[:3]) or "none"
        raise Halt(
            ExitCode.MISMATCH,
            f"{path} is no diffusion model (first tensors: {first}), not an SDXL single file: download the "
            "checkpoint that holds U-Net, text encoders and VAE",
        )


def refuse_as_vae(path: Path, blobs: Mapping[str, Blob], asked_by: str) -> None:
    """Halt(MISMATCH) naming what the file is, when it holds no VAE of SDXL's kind."""
    names = Names(blobs)
    whole = names.starts("first_stage_model.", "vae.", "model.first_stage_model.")  # the VAE of a refiner is SDXL's
    kinds = [kind for kind in _MODELS if "Stable Diffusion" in kind.what] if whole else (*_ADDITIONS, *_MODELS, *_PARTS)
    for kind in kinds:
        if kind.what != _VAE_ALONE and kind.test(names):
            raise Halt(
                ExitCode.MISMATCH,
                f"{asked_by} {path} is {kind.what}, and holds no VAE of SDXL: name SDXL's VAE, its folder or its file",
            )
    channels = [blob.shape[1] for name, blob in blobs.items() if name.endswith("decoder.conv_in.weight") and len(blob.shape) == 4]
    if channels and channels[0] != 4:
        raise Halt(
            ExitCode.MISMATCH, f"{asked_by} {path} is a VAE of {channels[0]} channels (SD3's and Flux's have 16); SDXL's has 4"
        )
    if not names.holds("decoder.conv_in", "encoder.conv_in"):  # text encoders have an `encoder.` too
        raise Halt(
            ExitCode.MISMATCH,
            f"{asked_by} {path} holds no VAE (first tensors: {some(sorted(blobs)[:3]) or 'none'}): name SDXL's VAE",
        )


def refuse_quantised(path: Path, blobs: Mapping[str, Blob]) -> None:
    """Halt(MISMATCH) for a copy whose weights are stored in fewer bits, by the scales that lie beside them."""
    marks = sorted(name for name in blobs if any(mark in name for mark in _QUANT_MARKS))
    if marks:
        raise Halt(
            ExitCode.MISMATCH,
            f"{path} is quantised (fp8, nf4 or int8, with scales beside the weights, as {some(marks, 1)}): rounded "
            f"weights cannot be trained on; {ORIGINAL}",
        )


def refuse_types(path: Path, blobs: Mapping[str, Blob]) -> None:
    """Halt(MISMATCH) for weights that are not fp32, fp16 or bf16."""
    other = Counter(blob.dtype for blob in blobs.values() if blob.dtype not in tensor_files.EXPONENTS)
    if other:
        counts = ", ".join(f"{count} of {dtype}" for dtype, count in sorted(other.items()))
        example = next(name for name, blob in sorted(blobs.items()) if blob.dtype in other)
        raise Halt(
            ExitCode.MISMATCH,
            f"{path} holds quantised or integer weights ({counts}, as {some([example])}): {ORIGINAL}",
        )


def refuse_unlike(
    path: Path, missing: Sequence[str], unknown: Sequence[str], wrong: Sequence[str], links: Sequence[sdxl.Link]
) -> None:
    """Halt(MISMATCH) saying what a file lacks or has too much of SDXL's tensors `links`, and what that means."""
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {some(sorted(missing), FEW)}")
    if unknown:
        problems.append(f"{len(unknown)} tensors are foreign: {some(sorted(unknown), FEW)}")
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape: {some(sorted(wrong), FEW)}")
    if problems:
        raise Halt(
            ExitCode.MISMATCH,
            f"{path} is no SDXL model of this architecture: {'; '.join(problems)}. {_advice(missing, unknown, wrong, links)}",
        )


def _advice(missing: Sequence[str], unknown: Sequence[str], wrong: Sequence[str], links: Sequence[sdxl.Link]) -> str:
    """What the three lists together mean, and the way on."""
    lacking = Counter(network_of(name) for name in missing)
    whole = Counter(network_of(link.single) for link in links)
    if not missing and not wrong:
        return (
            "All of SDXL is there, and something more that is not on the list of known leftovers: it may belong to "
            "another architecture, so it is not dropped in silence. Save the file without it, or start from the original"
        )
    if not unknown and not wrong:
        gone = [network for network in lacking if lacking[network] >= whole[network]]
        if gone == ["vae"] and len(lacking) == 1:
            return "It is SDXL without a VAE: set model.vae (convert.py: --vae) to SDXL's VAE, a folder or a file"
        if gone and set(gone) == set(lacking):
            return f"It is SDXL without {', '.join(gone)}: start from a file that holds all of it"
        if set(lacking) == {"unet"} and len(missing) > 50:
            return "Its U-Net has fewer blocks than SDXL's, as distilled relatives do (SSD-1B, Vega): start from SDXL itself"
        return "It is nearly SDXL: cut or badly merged. Download or save it again"
    return "Its sizes or names are those of another architecture, or it was damaged: start from an SDXL base model or a descendant"


def network_of(name: str) -> str:
    """The network of a tensor by its name in the single file, or canonical."""
    found = (network for network, prefix in sdxl.PREFIXES.items() if name.startswith((prefix, f"{network}.")))
    return next(found, "unet")


def refuse_unet(config: Mapping[str, Any], whose: str) -> None:
    """Halt(MISMATCH) for a U-Net that reads or gives other than SDXL's four channels."""
    channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != (4, 4):
        kind = {9: "an inpainting model: ", 8: "a model that edits pictures: "}.get(channels[0], "")
        raise Halt(
            ExitCode.MISMATCH,
            f"{whose} is {kind}its U-Net reads {channels[0]} channels and gives {channels[1]}, SDXL's base model 4 and "
            "4: start from the model that it was made from",
        )
