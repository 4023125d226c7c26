"""Forge: recognises and loads a single file as its model list does, encodes a text, samples two steps.

Its own launcher must have run once, so that `repositories/huggingface_guess` is there.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
sys.path[:0] = [".", "repositories/huggingface_guess", "packages_3rdparty"]
import asking

ASKED, OUT = asking.request(), sys.argv[2]
sys.argv = ["webui.py", "--always-cpu", "--unet-in-bf16", "--clip-in-fp32", "--vae-in-fp32", "--skip-torch-cuda-test"]

import torch
from modules import shared_init

shared_init.initialize()
from backend import loader
from k_diffusion import sampling


@torch.inference_mode()
def main() -> None:
    """Load, encode, sample."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        engine = loader.forge_loader(ASKED["file"])
    said = [line for line in printed.getvalue().splitlines() if "Missing" in line or "Unexpected" in line]
    context_1 = engine.text_processing_engine_l([ASKED["text"]])
    context_2, pooled = engine.text_processing_engine_g([ASKED["text"]])
    context = torch.cat([context_1, context_2], dim=-1)
    model = engine.forge_objects.unet.model
    side = ASKED["side_px"] // 8
    sizes = torch.cat([engine.embedder(torch.tensor([float(v)])) for v in (*[ASKED["side_px"]] * 2, 0, 0, *[ASKED["side_px"]] * 2)])
    vector = torch.cat([pooled, sizes.flatten()[None].to(pooled)], dim=-1)
    top = float(model.predictor.sigma_max)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)) * top
    sample = sampling.sample_euler(
        lambda x, sigma: model.apply_model(x, sigma, c_crossattn=context, y=vector), noise, torch.tensor([top, 1.0, 0.0]), disable=True
    )
    guess = engine.model_config
    facts = {
        "architecture": type(guess).__name__,
        "prediction": guess.model_type.name,
        "sampled_as": model.predictor.prediction_type,
        "zero_terminal_snr": bool(guess.ztsnr),
        "left_over": [],
        "missing": said,
        "finite": bool(torch.isfinite(sample).all()),
    }
    asking.answer(facts, {"context": context, "pooled": pooled, "sample": sample}, OUT)


main()
