"""ComfyUI: reads adapters as its LoRA node does, against SDXL's own networks without their memory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, ".")
import asking

ASKED, OUT = asking.request(), sys.argv[2]
sys.argv = ["main.py", "--cpu"]

import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.sdxl_clip
import comfy.supported_models
import comfy.utils
import torch

UNET = {
    "adm_in_channels": 2816, "context_dim": 2048, "in_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
    "use_linear_in_transformer": True, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64,
    "num_heads": -1, "use_temporal_attention": False, "use_temporal_resblock": False, "image_size": 32, "out_channels": 4,
    "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential", "dtype": torch.float32,
}  # fmt: skip


def main() -> None:
    """Every file's keys that no weight takes, and how many weights it changes."""
    config = comfy.supported_models.SDXL(UNET)
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SDXL(config, device="meta")
    clip = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float32)
    keys = comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(model, {}))
    heard, facts = asking.listen(), {}
    for name, file in ASKED["files"].items():
        heard.lines.clear()
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(file, safe_load=True)), keys)
        facts[name] = {"left_over": [line for line in heard.lines if "not loaded" in line], "weights": len(loaded)}
    asking.answer(facts, {}, OUT)


main()
