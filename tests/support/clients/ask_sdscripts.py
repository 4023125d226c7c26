"""sd-scripts: loads a single file as its trainers do, encodes token ids, two Euler steps of its own U-Net.

What the network predicts is an argument there (--v_parameterization), never read from the file.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, ".")
import asking

ASKED, OUT = asking.request(), sys.argv[2]
sys.argv = ["sdxl_train.py"]

import torch
from library import sdxl_model_util, sdxl_train_util, strategy_sdxl


@torch.inference_mode()
def main() -> None:
    """Load, encode, sample. Its text_projection is not transposed (docs/as_run.md), so the pooled vector is another."""
    heard = asking.listen()
    encoder, encoder_2, _, unet, *_ = sdxl_model_util.load_models_from_sdxl_checkpoint(
        sdxl_model_util.MODEL_VERSION_SDXL_BASE_V1_0, ASKED["file"], "cpu", torch.bfloat16
    )
    said = [line for line in heard.lines if line.startswith(("U-Net:", "text encoder", "VAE:")) and "All keys matched" not in line]
    told = sum("All keys matched" in line for line in heard.lines)
    tokenizer = SimpleNamespace(model_max_length=77, eos_token_id=49407)
    ids = [torch.tensor(ASKED[name])[None] for name in ("ids_1", "ids_2")]
    strategy: Any = strategy_sdxl.SdxlTextEncodingStrategy()
    hidden_1, hidden_2, pooled = strategy.encode_tokens(
        SimpleNamespace(tokenizer1=tokenizer, tokenizer2=tokenizer), [encoder.float(), encoder_2.float()], ids
    )
    del encoder, encoder_2
    gc.collect()
    context = torch.cat([hidden_1, hidden_2], dim=2)
    side = ASKED["side_px"] // 8
    size = torch.tensor([[ASKED["side_px"]] * 2])
    sizes = sdxl_train_util.get_size_embeddings(size, torch.zeros(1, 2), size, "cpu")
    vector = torch.cat([pooled, sizes.to(pooled)], dim=1)
    sample = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)) * 14.6
    for now, later, t in ((14.6, 1.0, 999), (1.0, 0.0, 250)):
        given = (sample / (now**2 + 1) ** 0.5).bfloat16()
        sample = sample + unet(given, torch.tensor([t]), context.bfloat16(), vector.bfloat16()).float() * (later - now)
    facts = {
        "architecture": "SDXL" if told == 4 else f"{told} of 4 networks",
        "left_over": [],
        "missing": said,
        "finite": bool(torch.isfinite(sample).all()),
    }
    asking.answer(facts, {"context": context, "pooled_untransposed": pooled, "sample": sample}, OUT)


main()
