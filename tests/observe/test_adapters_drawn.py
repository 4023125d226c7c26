"""Pictures and losses of a model with adapters added when it is asked for: as stock diffusers draws them, as a merge gives them."""

from __future__ import annotations

import logging
from pathlib import Path

import adapters
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from train.base.errors import Halt
from train.config.prompts import Prompt, PromptsFile, checked
from train.model import layouts, sdxl
from train.model.adapters import names, reading, writing
from train.observe.inference import draw, open_model
from train.tools.quality import loss

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SETTINGS = checked(PromptsFile(prompts=[Prompt(text="smile", seed=3, width=64, height=64)], steps=4, guidance=5.0, sampler="euler"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train.tools.tiny.model import write_model

    made = tmp_path_factory.mktemp("base") / "model"
    write_model(made)
    return made


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In kohya's names, with the configs of its base; beside it the folder of the same adapter."""
    folder = tmp_path_factory.mktemp("lora")
    configs = layouts.read_configs(base)
    known = names.names_of(configs)
    usual = [name for name, module in known.modules.items() if module.usual]
    save_file(adapters.kohya(known, usual, rank=3, alpha=3.0), folder / "raw.safetensors")
    made = reading.open_adapter(folder / "raw.safetensors", configs).layers
    writing.write_kohya(folder / "one.safetensors", made, configs, {})
    writing.write_diffusers(folder / "one", made, configs, {})
    return folder / "one.safetensors"


def pixels(model: Path, *loras: str) -> np.ndarray:
    (image,) = draw(open_model(model, device="cpu", loras=loras), SETTINGS)
    return np.asarray(image, dtype=np.float32) / 255


def test_both_forms_draw_the_same_and_weights_count(base: Path, lora: Path) -> None:
    plain, one, folder = pixels(base), pixels(base, str(lora)), pixels(base, str(lora.with_suffix("")))
    assert np.abs(one - plain).mean() > 1 / 255
    assert np.array_equal(one, folder)
    assert np.array_equal(pixels(base, f"{lora}:0"), plain)
    assert np.abs(pixels(base, f"{lora}:0.5", f"{lora}:0.5") - one).mean() < 0.2 / 255


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_stock_diffusers_draws_our_picture(form: str, base: Path, lora: Path) -> None:
    """Its own pipeline with `load_lora_weights`, on the latents, prompt and sampler of ours."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from train.observe import anymodel
    from train.storage.state_files import to_tensor

    stock = StableDiffusionXLPipeline.from_pretrained(base)
    place = lora if form == "kohya" else lora.with_suffix("")
    stock.load_lora_weights(str(place.parent) if form == "kohya" else str(place), **({"weight_name": place.name} if form == "kohya" else {}))
    merged = StableDiffusionXLPipeline.from_pretrained(base)
    ours = anymodel.with_adapters(anymodel.open_any(base), [str(place)])
    for network in names.NETWORKS:
        for name, parameter in getattr(merged, network).named_parameters():
            parameter.data = to_tensor(ours.weights[sdxl.canonical(network, name)])
    found = []
    for pipeline in (stock, merged, StableDiffusionXLPipeline.from_pretrained(base)):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found.append(pipeline("smile", width=64, height=64, num_inference_steps=4, generator=generator, output_type="np").images[0])
    assert np.abs(found[0] - found[1]).mean() < 1 / 255 < np.abs(found[0] - found[2]).mean()


def test_the_record_names_model_and_adapters(base: Path, lora: Path) -> None:
    model, plain = open_model(base, device="cpu", loras=[f"{lora}:0.5"]), open_model(base, device="cpu")
    assert model.name.endswith("one:0.5") and model.sha256 != plain.sha256
    assert model.sha256 != open_model(base, device="cpu", loras=[f"{lora}:0.6"]).sha256


def test_another_base_is_told(base: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    configs = layouts.read_configs(base)
    made = reading.open_adapter(lora, configs).layers
    writing.write_kohya(tmp_path / "other.safetensors", made, configs, {"anix.base_sha256": "f" * 64, "ss_sd_model_name": "another"})
    with caplog.at_level(logging.WARNING, logger="anix"):
        open_model(base, device="cpu", loras=[str(tmp_path / "other.safetensors")])
    assert "was made for the base ffffffffffff (another)" in caplog.text
    with pytest.raises(Halt, match="does not exist"):
        open_model(base, device="cpu", loras=[str(tmp_path / "nowhere.safetensors")])


def test_the_held_out_loss_with_and_without(base: Path, lora: Path, dataset: Path) -> None:
    record = loss.measure([f"base={base}"], dataset, select="pretrain", images=4, device="cpu", loras=[f"{lora}:0.5"])
    assert list(record["models"]) == ["base", "base + one.safetensors:0.5"]
    one, two = record["models"].values()
    assert one["losses"].keys() == two["losses"].keys() and one["losses"] != two["losses"]
    assert len(record["changes"]) == 1
