"""Pictures and losses of a model with adapters added when it is asked for: as stock diffusers draws them, as a merge gives them."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import adapters
import numpy as np
import pytest
import tinysdxl
import torch
from PIL import Image
from safetensors.torch import save_file
from stages import Stage, opened

from train.base.errors import Halt
from train.config.prompts import Prompt, PromptsFile, checked
from train.engine import loop
from train.model import layouts, sdxl
from train.model.adapters import layers, names, reading, writing
from train.observe.inference import draw, name_of, open_model
from train.observe.runs import read_pictures
from train.tools.commands import quality
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


@pytest.mark.parametrize("changes", [pytest.param((), marks=pytest.mark.long), ("adapter.type=lora", "adapter.rank=2")], ids=["full", "adapter"])
def test_previews_with_adapters_added_and_weights_that_stay(changes: tuple[str, ...], dataset: Path, tmp_path: Path) -> None:
    base = tinysdxl.write(tmp_path / "model", "least")
    configs = layouts.read_configs(base)
    known = names.names_of(configs)
    save_file(adapters.kohya(known, [name for name, one in known.modules.items() if one.usual], rank=2, alpha=2.0), tmp_path / "x.safetensors")
    made = reading.open_adapter(tmp_path / "x.safetensors", configs).layers
    (tmp_path / "prompts.yaml").write_text("steps: 2\nprompts: [{text: smile, width: 64, height: 64}]\n")
    stage = Stage(tmp_path, dataset, base)
    shown = ("sampling.every_steps=1", f"sampling.prompts={tmp_path}/prompts.yaml")
    with opened(stage, *changes, *shown, f"sampling.loras=[{tmp_path}/x.safetensors:0.5]") as session:
        before = {name: p.detach().clone() for name, p in session.trained.gradients.model.named_parameters()}
        drawn = session.observers.previews._variants(None)[""]
        twin = {sdxl.canonical("unet", name.replace(".base_layer.", ".")): p for name, p in drawn.unet.named_parameters()}
        for name, layer in made.items():
            if name.startswith("unet."):
                own = next(p for n, p in before.items() if n.replace(".base_layer.", ".") == f"{name}.weight")
                torch.testing.assert_close(twin[f"{name}.weight"], own + 0.5 * layers.delta(layer), rtol=1e-5, atol=1e-6)
        loop.look(session, True, False)
        assert all(torch.equal(p, before[name]) for name, p in session.trained.gradients.model.named_parameters())
        (picture,) = session.run.folder.path.glob("samples/*/00.png")
        with Image.open(picture) as image:
            assert "x x 0.5" in image.info["parameters"]
    with pytest.raises(Halt, match=r"sampling\.loras: .*nowhere.* does not exist"), opened(stage, *shown, "sampling.loras=[nowhere.safetensors]"):
        pass


def test_judges_of_a_model_with_and_without_adapters(base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is the drawn world's rule; what it says does not matter here, but that both were drawn alike and judged in pairs."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("steps: 2\nprompts:\n" + "".join(f"  - {{text: '1girl, {hair} hair', width: 64, height: 64}}\n" for hair in ("red", "blue")))
    out = tmp_path / "quality.json"
    words = ["quality.py", "--tagger", "tiny_world", "--model", str(base), "--lora", f"{lora}:0.5", "--prompts", str(prompts), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    quality.main()
    own = name_of(base)
    record = json.loads(out.read_text())
    assert {name: one["pictures"] for name, one in record["stages"].items()} == {own: 2, f"{own} + one x 0.5": 2}
    assert [(one["from"], one["to"], one["pictures"]) for one in record["changes"]] == [(own, f"{own} + one x 0.5", 2)]
    one, two = (read_pictures(tmp_path / "quality-samples" / name, []) for name in ("without", "with"))
    assert [picture.same for picture in one] == [picture.same for picture in two]
    assert one[0].path.read_bytes() != two[0].path.read_bytes()
    for wrong, told in ((words[:5], "--model and --lora"), (words[:3], "name a STAGE"), ([*words[:6], "nowhere.safetensors"], "does not exist")):
        monkeypatch.setattr(sys, "argv", wrong)
        with pytest.raises(Halt, match=told):
            quality.main()
