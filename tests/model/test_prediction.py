"""What a model predicts: said by its files, held against the stage, told to whoever opens the export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import tinysdxl
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from stages import Stage

from train.base.errors import ExitCode, Halt
from train.config.derived import TrainedAs
from train.config.prompts import Prompt
from train.config.stage import ExportConfig, ModelConfig, load_stage, to_yaml
from train.diffusion.sampling import _condition, picture_noise, sample_images
from train.engine import export
from train.model import layouts, prediction, sdxl, single_file
from train.model import source as model_source
from train.model.prediction import Objective
from train.model.source import LocalModel
from train.model.text import TagTokenizer
from train.observe.inference import open_model
from train.recipe import buckets

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
V_ZERO = ("loss.prediction=v", "noise.zero_terminal_snr=true")


@pytest.fixture(scope="module")
def v_run(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One update of v-prediction with zero terminal SNR from an epsilon model."""
    stage = Stage(tmp_path_factory.mktemp("v"), dataset, base_model)
    assert stage.run(*V_ZERO, "max_updates=1") == ExitCode.MISMATCH
    assert "was trained to predict epsilon, this stage trains v with zero terminal SNR" in stage.message
    assert stage.run(*V_ZERO, "max_updates=1", "loss.convert=true") == 0, stage.message
    return stage.output


FLOW = ("loss.prediction=flow", "noise.shift=2.5", "noise.law=logit_normal", "noise.stratified=true")


@pytest.fixture(scope="module")
def flow_run(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rectified flow from an epsilon model: killed after two updates and gone on with."""
    stage = Stage(tmp_path_factory.mktemp("flow"), dataset, base_model)
    assert stage.run(*FLOW, "max_updates=3") == ExitCode.MISMATCH
    assert "was trained to predict epsilon, this stage trains flow" in stage.message
    more = (*FLOW, "max_updates=3", "loss.convert=true", "tracking.trace=true")
    assert stage.run(*more, ANIX_FAULT="control@2:term") == ExitCode.STOPPED
    assert stage.run(*more) == 0, stage.message
    whole = Stage(tmp_path_factory.mktemp("flow_whole"), dataset, base_model)
    assert whole.run(*more, "batch.split=2") == 0, whole.message
    assert (whole.output / "trace.txt").read_text() == (stage.output / "trace.txt").read_text()
    return stage.output


def trained_as(*overrides: str) -> TrainedAs:
    return load_stage([ROOT / "configs/ft1.yaml"], overrides).trained_as


def source_with(path: Path, scheduler: dict[str, Any], **more: Any) -> LocalModel:
    return replace(model_source.resolve(ModelConfig(init_from=str(path)), hashed=False), configs={"scheduler": scheduler}, **more)


def test_a_conversion_stands_in_the_lineage_and_a_child_goes_on(v_run: Path, dataset: Path, tmp_path: Path) -> None:
    record = json.loads((v_run / "lineage.json").read_text())
    assert record["conversion"] == {
        "from": {"prediction": "epsilon", "zero_terminal_snr": False},
        "to": {"prediction": "v", "zero_terminal_snr": True},
    }
    told = export.read_metadata(v_run / "pretrain.safetensors")
    assert told["modelspec.prediction_type"] == "v" and json.loads(told["anix.conversion"]) == record["conversion"]
    child = Stage(tmp_path, dataset, v_run, "ft1")
    for wrong, words in ((("loss.prediction=epsilon",), "v with zero terminal SNR, this stage trains epsilon: set loss.prediction"
                          " and noise.zero_terminal_snr"), (("loss.prediction=v",), "set noise.zero_terminal_snr as")):
        assert child.run(*wrong, "data.select=pretrain") == ExitCode.MISMATCH
        assert words in child.message and "loss.convert=true" in child.message
    assert child.run(*V_ZERO, "max_updates=1", "data.select=pretrain") == 0, child.message
    assert "conversion" not in json.loads((child.output / "lineage.json").read_text())


def test_every_reader_of_the_export_is_told(v_run: Path, tmp_path: Path) -> None:
    single = v_run / "pretrain.safetensors"
    assert {sdxl.V_MARK, sdxl.ZERO_SNR_MARK} <= load_file(single).keys()  # what ComfyUI and its relatives look for
    single_file.to_folder(single, tmp_path / "converted")
    for folder in (v_run / "model", tmp_path / "converted"):
        scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        scheduler.set_timesteps(28)
        assert scheduler.config.prediction_type == "v_prediction" and scheduler.timesteps[0] == 999
        assert scheduler.sigmas[0] > 4000
    for path in (v_run, v_run / "model", single, tmp_path / "converted"):
        assert prediction.stated(model_source.resolve(ModelConfig(init_from=str(path)))) == Objective("v", True), path


def test_every_reader_of_a_flow_export_is_told(flow_run: Path, tmp_path: Path) -> None:
    single = flow_run / "pretrain.safetensors"
    told = export.read_metadata(single)
    assert told["modelspec.prediction_type"] == "flow" and not {sdxl.V_MARK, sdxl.ZERO_SNR_MARK} & load_file(single).keys()
    assert json.loads(told["anix.conversion"])["to"] == {"prediction": "flow", "zero_terminal_snr": False}
    assert "Single files have no mark for rectified flow" in (flow_run / "model/README.md").read_text()
    single_file.to_folder(single, tmp_path / "converted")
    for folder in (flow_run / "model", tmp_path / "converted"):
        scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        assert scheduler["_class_name"] == "DPMSolverMultistepScheduler" and scheduler["prediction_type"] == "flow_prediction"
        assert (scheduler["use_flow_sigmas"], scheduler["flow_shift"]) == (True, 2.5)
    for path in (flow_run, flow_run / "model", single, tmp_path / "converted"):
        assert prediction.stated(model_source.resolve(ModelConfig(init_from=str(path)))) == Objective("flow", False), path
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(single.read_bytes())
    found = open_model(lone, device="cpu", tokenizers=str(flow_run / "model")).trained_as
    assert (found.prediction, found.flow_shift) == ("flow", 2.5)


COMBINATIONS = {  # of marks: what is trained, the marks of its single file, what they alone say, and what a folder's scheduler says
    "epsilon": (Objective("epsilon", False), set(), Objective(None, None), {"prediction_type": "epsilon"}),
    "v": (Objective("v", False), {"v_pred"}, Objective("v", None), {"prediction_type": "v_prediction"}),
    "v zero": (Objective("v", True), {"v_pred", "ztsnr"}, Objective("v", True),
               {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    "flow": (Objective("flow", False), set(), Objective(None, None),
             {"prediction_type": "flow_prediction", "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 2.5}),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model exported as each of the four; its weights mean nothing."""
    source, found = model_source.resolve(ModelConfig(init_from=str(base_model))), {}
    for kind, (objective, *_) in COMBINATIONS.items():
        found[kind] = tmp_path_factory.mktemp("marks")
        yaml = synthetic.stage_yaml(found[kind] / "stage.yaml", data=base_model, model=base_model, output=found[kind])
        told = [f"loss.prediction={objective.prediction}", f"noise.zero_terminal_snr={str(objective.zero_terminal_snr).lower()}", "noise.shift=2.5"]
        (found[kind] / "config.yaml").write_text(to_yaml(load_stage([yaml], told)))
        record = export.lineage_record(
            stage="s", source=source, dataset_fingerprint="d", config_hash="c", seed=0, updates=1, images=1, versions={}, license="x",
            weights_sha256="w", conditioning={},
        )  # fmt: skip
        export.export_stage(
            found[kind], None, source, record, ExportConfig(), prediction=str(objective.prediction),
            zero_terminal_snr=bool(objective.zero_terminal_snr), flow_shift=2.5,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_four_combinations_of_marks_are_told_and_read(kind: str, exported: dict[str, Path], tmp_path: Path) -> None:
    objective, marks, by_marks, told = COMBINATIONS[kind]
    single = exported[kind] / "s.safetensors"
    tensors, metadata = load_file(single), export.read_metadata(single)
    assert {sdxl.V_MARK, sdxl.ZERO_SNR_MARK} & tensors.keys() == marks
    assert metadata["modelspec.prediction_type"] == objective.prediction
    tokenizers = str(exported[kind] / "model")
    single_file.to_folder(single, tmp_path / "converted", tokenizers=tokenizers)
    for path in (exported[kind] / "model", single, tmp_path / "converted"):
        assert prediction.stated(model_source.resolve(ModelConfig(init_from=str(path)))) == objective, path
        sampled = open_model(path, device="cpu", tokenizers=tokenizers if path == single else None).trained_as
        assert (sampled.prediction, sampled.zero_terminal_snr) == (objective.prediction, bool(objective.zero_terminal_snr))
        assert sampled.flow_shift == (2.5 if kind == "flow" else 1.0)
    # Of a file that lost all but its marks they are what is left; with what modelspec says beside them the rest is known too.
    for kept, said in (({}, by_marks), ({k: v for k, v in metadata.items() if k.startswith(("modelspec", "anix.flow"))}, None)):
        scheduler = prediction.configs_of(kept, tensors.keys(), "a")["scheduler"]
        found = prediction.stated(replace(model_source.resolve(ModelConfig(init_from=str(single)), hashed=False), lineage=None, metadata=kept,
                                          configs={"scheduler": scheduler}))  # fmt: skip
        assert found == said if said is not None else found.prediction == objective.prediction
    for folder in (exported[kind] / "model", tmp_path / "converted"):  # as stock diffusers opens it
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        assert {key: pipeline.scheduler.config.get(key, type(pipeline.scheduler).__name__) for key in told} == told
        pipeline.scheduler.set_timesteps(28)
        assert bool(pipeline.scheduler.config.get("rescale_betas_zero_snr")) == (kind == "v zero")
        assert kind not in ("v zero", "flow") or float(pipeline.scheduler.timesteps[0]) > 990  # from noise alone, as trained


def test_flow_in_other_programs_words_and_the_way_back() -> None:
    matching = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert prediction.sampled_as(matching) == {"prediction": "flow", "flow_shift": 3.0}
    first = dict(sdxl.STANDARD["scheduler"])
    there = prediction.told_scheduler(first, v=False, zero_terminal_snr=False, flow_shift=3.0)
    assert prediction.told_scheduler(there, v=False, zero_terminal_snr=False) == first
    assert prediction.told_scheduler(there, v=True, zero_terminal_snr=True)["prediction_type"] == "v_prediction"
    for shift, kept in (("2.5", 2.5), ("x", 1.0), ("-1", 1.0), ("nan", 1.0), ("", 1.0)):
        metadata = {"modelspec.prediction_type": "flow", prediction.FLOW_SHIFT_KEY: shift}
        assert prediction.configs_of(metadata, (), "a")["scheduler"]["flow_shift"] == kept


def test_the_way_back_to_epsilon_takes_the_spacing_along() -> None:
    first = dict(sdxl.STANDARD["scheduler"])
    there = prediction.told_scheduler(first, v=True, zero_terminal_snr=True)
    assert (there["rescale_betas_zero_snr"], there["timestep_spacing"]) == (True, "trailing")
    assert prediction.told_scheduler(there, v=False, zero_terminal_snr=False) == first
    assert prediction.told_scheduler(first, v=True, zero_terminal_snr=False) == {**first, "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("scheduler", "metadata", "lineage", "said"),
    [
        ({"prediction_type": "epsilon", "beta_start": 1.0}, {}, None, Objective("epsilon", False)),
        ({"prediction_type": "v_prediction"}, {}, None, Objective("v", None)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}, {}, None, Objective("v", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}, None, Objective("v", True)),
        ({"prediction_type": "v_prediction"}, {}, {"stage": "ours"}, Objective("v", False)),
        (dict(sdxl.STANDARD["scheduler"]), {}, None, Objective(None, None)),
        (dict(sdxl.STANDARD["scheduler"]), {"modelspec.prediction_type": "epsilon"}, None, Objective("epsilon", False)),
        (dict(sdxl.STANDARD["scheduler"]), {}, {"stage": "ours"}, Objective("epsilon", False)),
    ],
)
def test_what_files_say(
    base_model: Path, scheduler: dict[str, Any], metadata: dict[str, str], lineage: Any, said: Objective
) -> None:
    assert prediction.stated(source_with(base_model, scheduler, metadata=metadata, lineage=lineage)) == said


def test_a_single_file_of_another_maker(tmp_path: Path) -> None:
    """No marks: nothing is said, one line tells what is taken. `v_pred` alone leaves zero terminal SNR open."""
    folder = tinysdxl.write(tmp_path / "folder", "least")
    single_file.to_single_file(folder, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    configs = json.loads(export.read_metadata(tmp_path / "a.safetensors")[sdxl.CONFIGS_KEY])
    for marks, metadata, scheduler, own, words in (
        ((), {}, {}, (), "does not say what it predicts: taken as loss.prediction says, epsilon"),
        ((), {}, {}, V_ZERO, "taken as loss.prediction says, v with zero terminal SNR"),
        (("v_pred",), {}, {"prediction_type": "v_prediction"}, V_ZERO, "does not say whether to zero terminal SNR"),
        (("v_pred", "ztsnr"), {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, V_ZERO, None),
        ((), {"modelspec.prediction_type": "epsilon"}, {}, (), None),
    ):
        # SDXL's own size carries no configs; this one says in them what `configs_in` reads out of the marks there.
        stored = {**configs, "scheduler": {**sdxl.STANDARD["scheduler"], **scheduler}}
        file = tmp_path / "b.safetensors"
        save_file({**tensors, **{mark: torch.empty(0) for mark in marks}}, file,
                  {**metadata, sdxl.CONFIGS_KEY: json.dumps(stored)})  # fmt: skip
        source = model_source.resolve(ModelConfig(init_from=str(file)))
        assert prediction.conversion(trained_as(*own), source, convert=False) is None
        said = prediction.unstated(trained_as(*own), source)
        assert said is None if words is None else words in str(said)


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr"), ("ztsnr",)])
def test_marks_of_a_full_size_file(marks: tuple[str, ...], tmp_path: Path) -> None:
    from train.storage import tensor_files

    save_file({"x": torch.zeros(1), **{mark: torch.empty(0) for mark in marks}}, tmp_path / "a.safetensors",
              {"modelspec.resolution": "768x768"})  # fmt: skip
    configs = layouts.configs_in(tensor_files.open_file(tmp_path / "a.safetensors"))
    assert (configs["scheduler"]["prediction_type"] == "v_prediction") == ("v_pred" in marks)
    assert configs["scheduler"].get("rescale_betas_zero_snr", False) == ({"v_pred", "ztsnr"} <= set(marks))
    assert configs["unet"]["sample_size"] == 96


def test_min_snr_would_never_teach_the_terminal_step() -> None:
    with pytest.raises(Halt, match=r"loss.min_snr_gamma gives the terminal step weight 0 with noise.zero_terminal_snr") as caught:
        trained_as(*V_ZERO, "loss.min_snr_gamma=5")
    assert caught.value.code == ExitCode.USAGE
    trained_as("loss.prediction=v", "loss.min_snr_gamma=5")
    trained_as(*V_ZERO, "loss.debiased=true")


@pytest.mark.parametrize("kind", ["v", "v, not to zero", "epsilon", "flow"])
def test_stock_diffusers_draws_what_we_draw(kind: str, v_run: Path, flow_run: Path, straight: Path, exported: dict[str, Path]) -> None:
    """Sampler euler, same starting latents, same embeddings. Epsilon keeps SDXL's "leading" spacing in its files, which
    starts elsewhere: there stock draws under the spacing of A1111 and ours."""
    run = {"v": v_run, "v, not to zero": exported["v"], "epsilon": straight, "flow": flow_run}[kind]
    model = open_model(run if (run / "DONE").exists() else run / "model", device="cpu")
    assert model.trained_as.zero_terminal_snr == (kind == "v")
    parts, prompt, told = model.components, Prompt("1girl, smile", 64, 64, 3), model.trained_as
    sampler: Any = "dpmpp_2m" if kind == "flow" else "euler"
    ours = sample_images(parts, [prompt], sampler=sampler, steps=28, guidance=5.0, negative="bad", trained_as=told)[0]
    pipeline = StableDiffusionXLPipeline.from_pretrained(run / "model", add_watermarker=False)
    spacing = {} if kind == "v" else {"timestep_spacing": "linspace"}
    if kind != "flow":  # whose export names the scheduler to draw with
        pipeline.scheduler = EulerDiscreteScheduler.from_pretrained(run / "model", subfolder="scheduler", **spacing)
    pipeline.set_progress_bar_config(disable=True)
    tokens = TagTokenizer(parts.tokenizer, parts.tokenizer_2)
    with torch.no_grad():
        condition = _condition(
            tokens, (parts.text_encoder, parts.text_encoder_2), ["bad", "1girl, smile"], prompt, torch.device("cpu"), told
        )
        texts, pooled = condition.context_BLD, condition.added["text_embeds"]
        theirs = pipeline(
            prompt_embeds=texts[1:], negative_prompt_embeds=texts[:1], pooled_prompt_embeds=pooled[1:],
            negative_pooled_prompt_embeds=pooled[:1], latents=picture_noise(prompt, parts.vae), width=64, height=64,
            num_inference_steps=28, guidance_scale=5.0,
        ).images[0]  # fmt: skip
    apart = np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float))
    assert np.asarray(ours).std() > 2, "a picture of one colour proves nothing"
    assert apart.mean() < 2


def test_a_call_without_sizes_draws_what_was_trained(straight: Path) -> None:
    """The set holds 64x64, 64x96 and 96x64; the parent's config says 32 px."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(straight / "model", add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("1girl", num_inference_steps=1).images[0].size == (64, 64)
    single = straight / "pretrain.safetensors"
    assert export.read_metadata(single)["modelspec.resolution"] == "64x64"
    assert model_source.resolve(ModelConfig(init_from=str(single))).configs["unet"]["sample_size"] == 16  # this VAE's factor is 4
    assert export.metadata_of({"stage": "x", "date": "d", "license": "l"}, ExportConfig(), "epsilon", (0, 1000))[
        "modelspec.resolution"] == "1024x1024"  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        (buckets.make_buckets(), 1024),
        ([(832, 1216), (1216, 832)], 1024),
        ([(768, 1344)], 1024),
        ([(512, 1856)], 960),
        (buckets.make_buckets(6144, 64, 128, 32), 64),
        (buckets.make_buckets(832 * 1216), 960),
        ([(512, 512), (832, 1216)], 1024),
        ([(64, 96)], 64),
    ],
)
def test_the_square_that_was_trained(sizes: Any, side: int) -> None:
    assert buckets.square_of(sizes) == side
