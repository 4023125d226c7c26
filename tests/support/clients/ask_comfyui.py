"""ComfyUI: loads a single file as its checkpoint node does, encodes a text, samples two steps."""

from __future__ import annotations

import ast
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, ".")
import asking

ASKED, OUT = asking.request(), sys.argv[2]
sys.argv = ["main.py", "--cpu", "--bf16-unet", "--fp32-text-enc", "--fp32-vae"]  # one U-Net of 5 GB, encoders as exact as they go

import comfy.options

comfy.options.enable_args_parsing()
import comfy.sample
import comfy.sd
import torch


def load(heard: asking.Heard, **parts: bool) -> tuple[Any, set[str], list[str]]:
    """(what the loader gives, keys it left over, what it said is missing or unexpected)."""
    heard.lines.clear()
    found = comfy.sd.load_checkpoint_guess_config(ASKED["file"], **parts)
    left = [line for line in heard.lines if line.startswith("left over keys")]
    keys = set(ast.literal_eval(left[0].partition("dict_keys(")[2][:-1])) if left else set()
    return found, keys, [line for line in heard.lines if "missing" in line or "unexpected" in line]


@torch.inference_mode()
def main() -> None:
    """Encoders first, then the U-Net: both together would need 9 GB."""
    heard = asking.listen()
    (_, clip, _, _), left, said = load(heard, output_model=False, output_vae=False)
    encode = clip.encode_from_tokens
    (context, pooled), (empty, empty_pooled) = (encode(clip.tokenize(text), return_pooled=True) for text in (ASKED["text"], ""))
    del clip
    gc.collect()
    (model, _, vae, _), left_2, said_2 = load(heard, output_clip=False)
    side = ASKED["side_px"] // 8
    latent = torch.zeros(1, 4, side, side)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    positive, negative = [[context, {"pooled_output": pooled}]], [[empty, {"pooled_output": empty_pooled}]]
    sample = comfy.sample.sample(model, noise, 2, 5.0, "euler", "normal", positive, negative, latent, seed=0)
    sampling = model.model.model_sampling
    facts = {
        "architecture": type(model.model.model_config).__name__,
        "prediction": model.model.model_type.name,
        "zero_terminal_snr": bool(getattr(sampling, "zsnr", False)),
        "sigma_max": float(sampling.sigma_max),
        "left_over": sorted(left & left_2),
        "missing": said + said_2,
        "finite": bool(torch.isfinite(sample).all() and torch.isfinite(vae.decode(sample)).all()),
    }
    asking.answer(facts, {"context": context, "pooled": pooled, "sample": sample}, OUT)


main()
