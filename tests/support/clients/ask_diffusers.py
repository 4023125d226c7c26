"""Stock diffusers with its transformers: opens a folder, or a single file as users do (without `config=`), draws two steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import asking
import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline


def opened(asked: dict[str, Any], dtype: torch.dtype) -> tuple[Any, list[str]]:
    """(pipeline, what the libraries said of keys)."""
    diffusers.utils.logging.enable_propagation()
    transformers.utils.logging.enable_propagation()
    heard = asking.listen()
    if "folder" in asked:
        pipe = StableDiffusionXLPipeline.from_pretrained(asked["folder"], torch_dtype=dtype, add_watermarker=False)
    else:
        pipe = StableDiffusionXLPipeline.from_single_file(asked["file"], torch_dtype=dtype, add_watermarker=False)
    words = ("not used", "newly initialized", "missing", "unexpected", "not initialized")
    return pipe, [line for line in heard.lines if any(word in line.lower() for word in words)]


@torch.inference_mode()
def drawn(asked: dict[str, Any], pipe: Any, said: list[str], out: str, **facts: Any) -> None:
    """Encode a text and draw two steps; the U-Net in bf16 where the model is SDXL's size."""
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.float()
    pipe.text_encoder_2.float()
    context, empty, pooled, empty_pooled = pipe.encode_prompt(asked["text"], device="cpu", do_classifier_free_guidance=True, negative_prompt="")
    big = "file" in asked
    if big:
        pipe.unet.to(torch.bfloat16)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: one.to(pipe.unet.dtype) for name, one in zip(names, (context, empty, pooled, empty_pooled), strict=True)}
    scheduler = dict(pipe.scheduler.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=big):  # some schedulers give fp32 back
        sample = pipe(
            **given, num_inference_steps=2, width=asked["side_px"], height=asked["side_px"], output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    all_facts = {
        "architecture": type(pipe).__name__,
        "prediction": scheduler.get("prediction_type"),
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
        "left_over": [],
        "missing": said,
        "finite": bool(torch.isfinite(sample.float()).all()),
        "versions": f"diffusers {diffusers.__version__}, transformers {transformers.__version__}",
        **facts,
    }
    asking.answer(all_facts, {"context": context, "pooled": pooled, "sample": sample}, out)


if __name__ == "__main__":
    ASKED = asking.request()
    drawn(ASKED, *opened(ASKED, torch.float32 if "folder" in ASKED else torch.float16), sys.argv[2])
