"""Scale and shift of a VAE's latents: the arithmetic, and what stock diffusers makes of the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tinysdxl
import torch
from diffusers import StableDiffusionXLPipeline

from train.config.stage import ModelConfig
from train.diffusion.sampling import decode
from train.model import single_file, source
from train.model.vae_file import LatentScale

EQ = {"scaling_factor": 0.1406, "shift_factor": -0.4743}  # an EQ-VAE that people tune SDXL with


@pytest.mark.parametrize(
    ("config", "latent", "seen"),
    [
        ({"scaling_factor": 0.5}, [1.0, 2.0, 3.0, -4.0], [0.5, 1.0, 1.5, -2.0]),
        ({"scaling_factor": 0.5, "shift_factor": -1.0}, [1.0, 2.0, 3.0, -4.0], [1.0, 1.5, 2.0, -1.5]),
        ({"scaling_factor": 0.5, "latents_mean": [0, 1, 2, 3], "latents_std": [1, 2, 1, 4]}, [1.0, 2.0, 3.0, -4.0], [0.5, 0.25, 0.5, -0.875]),
    ],
)
def test_latents_as_the_unet_sees_them(config: dict[str, object], latent: list[float], seen: list[float]) -> None:
    scale, latent_B411 = LatentScale.of(config), torch.tensor(latent).view(1, 4, 1, 1)
    assert scale.to_model(latent_B411).flatten().tolist() == seen
    assert scale.to_vae(scale.to_model(latent_B411)).flatten().tolist() == latent


def test_without_a_shift_the_bits_and_the_mark_are_those_of_before() -> None:
    scale, latents_BCHW = LatentScale.of({"scaling_factor": 0.13025, "shift_factor": None}), torch.randn(2, 4, 3, 3)
    assert torch.equal(scale.to_model(latents_BCHW), latents_BCHW * 0.13025)
    assert torch.equal(scale.to_vae(latents_BCHW), latents_BCHW / 0.13025)
    assert scale.mark() == "0.13025"  # as checkpoints written before shifts were read say it
    assert LatentScale.of(EQ).mark() == "0.1406/-0.4743,-0.4743,-0.4743,-0.4743"


@pytest.mark.filterwarnings("ignore")
def test_stock_diffusers_decodes_a_shifted_model_as_we_do(tmp_path: Path) -> None:
    folder = tinysdxl.write(tmp_path / "folder", "least")
    shutil.copytree(folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | EQ))
    file, exported = tmp_path / "model.safetensors", tmp_path / "exported"
    single_file.to_single_file(folder, file, vae=tmp_path / "vae")
    single_file.to_folder(file, exported, tokenizers=folder)
    model = source.resolve(ModelConfig(init_from=str(file)))
    assert "scaling_factor 0.1406, shift_factor -0.4743" in "; ".join(model.notes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(exported, add_watermarker=False)
    assert LatentScale.of(pipeline.vae.config) == LatentScale.of(model.configs["vae"]) != LatentScale(0.1406)
    latents_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"prompt": "1girl", "num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "latents": latents_BCHW}
    drawn = [pipeline(**call, generator=torch.Generator().manual_seed(2), output_type=kind).images for kind in ("np", "latent")]
    mine = np.asarray(decode(pipeline.vae, drawn[1])[0])
    assert np.abs(mine - drawn[0][0] * 255).max() <= 0.51
