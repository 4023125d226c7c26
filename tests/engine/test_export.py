"""Opening models of every kind, exporting a finished stage, and what the files then say about themselves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinysdxl
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256
from train.config.derived import TrainedAs
from train.config.stage import CheckpointConfig, ExportConfig, ModelConfig
from train.engine import export
from train.model import folder as model_folder
from train.model import layouts, sdxl, single_file
from train.model import source as model_source
from train.model.layouts import FAIPL
from train.model.source import LocalModel
from train.observe import inference
from train.storage import checkpoint, rundir
from train.storage.checkpoint import Progress
from train.storage.resume import Expectations
from train.tools.show import model as show_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinysdxl.write(tmp_path_factory.mktemp("base") / "base", dtype=torch.float16)


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, torch.Tensor]:
    """A U-Net of fp32 values that fp16 cannot hold."""
    tensors = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    return {f"unet.{name}": value.float() + 1e-5 for name, value in tensors.items()}


def finish(path: Path, source: LocalModel, trained: dict[str, torch.Tensor], **export_settings: Any) -> Path:
    """A finished run: last checkpoint, export, DONE, as a stage leaves it."""
    opened = rundir.open_run_dir(path, "ft1")
    settings = ExportConfig(license="CC0-1.0", **export_settings)
    try:
        opened.write_config(f"output_dir: {Path.home()}/runs\n")
        state = Expectations(stage="ft1", config={"seed": 31}, facts={"plan": "p", "dataset": "d"}).to_state()
        tensors = {"model": trained, "optimizer": {}}
        checkpoint.save(opened, Progress(5, 5, 0, 240), tensors, state, CheckpointConfig(), permanent=True)
        final = checkpoint.of_step(path, 5)
        record = export.lineage_record(
            stage="ft1", source=source, dataset_fingerprint="f" * 64, config_hash="c" * 64, seed=31, updates=5,
            images=240, versions={"torch": torch.__version__}, license=model_source.license_of(settings, source),
            weights_sha256=final.manifest.files["model.safetensors"].sha256,
            conditioning={"max_tokens": 75, "context": "chunks", "pooled_projection": "sd_scripts",
                          "timestep_embedding": "sd_scripts"},
        )  # fmt: skip
        export.export_stage(path, final.path / "model.safetensors", source, record, settings)
        opened.write_done({"stage": "ft1"})
    finally:
        opened.close()
    return path


@pytest.fixture(scope="module")
def run(base: Path, trained: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = model_source.resolve(ModelConfig(init_from=str(base)))
    return finish(tmp_path_factory.mktemp("runs") / "ft1", source, trained)


def test_exported_files_agree_and_hold_the_trained_weights(
    run: Path, base: Path, trained: dict[str, torch.Tensor]
) -> None:
    unet = load_file(run / "model/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(unet[name.removeprefix("unet.")], value.half()) for name, value in trained.items())
    encoder = load_file(run / "model/text_encoder/model.safetensors")
    first = load_file(base / "text_encoder/model.safetensors")
    assert {sdxl.canonical("text_encoder", name): value.tolist() for name, value in first.items()} == {
        f"text_encoder.{name}": value.tolist() for name, value in encoder.items()
    }
    single_file.to_single_file(run / "model", run / "again.safetensors")
    digests = [
        hashlib.sha256((run / name).read_bytes()).hexdigest() for name in ("ft1.safetensors", "again.safetensors")
    ]
    os.unlink(run / "again.safetensors")
    assert digests[0] == digests[1]


def test_stock_diffusers_makes_the_same_picture_from_both(run: Path) -> None:
    """Loaded without a dtype, as newcomers do, although the files are fp16."""

    def picture(pipeline: StableDiffusionXLPipeline) -> list[float]:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        out = pipeline("1girl", height=32, width=32, num_inference_steps=2, output_type="np", generator=generator)
        return out.images.tolist()

    folder = StableDiffusionXLPipeline.from_pretrained(run / "model", add_watermarker=False)
    single = StableDiffusionXLPipeline.from_single_file(
        str(run / "ft1.safetensors"), config=str(run / "model"), local_files_only=True, add_watermarker=False
    )
    assert picture(folder) == picture(single)


def test_metadata_tells_the_truth(run: Path, base: Path) -> None:
    metadata = export.read_metadata(run / "ft1.safetensors")
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.license"] == "CC0-1.0"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.timestep_range"] == "0,1000"
    record = layouts.record_in(metadata)
    assert record["parent"]["sha256"] == model_source.model_sha256(base)
    assert (record["stage"], record["seed"], record["updates"], record["images"]) == ("ft1", 31, 5, 240)
    assert (record["dataset_fingerprint"], record["config_hash"]) == ("f" * 64, "c" * 64)
    assert record["code_revision"]
    lineage = json.loads((run / "lineage.json").read_text())
    assert {key: lineage[key] for key in record} == record
    assert str(Path.home()) not in (run / "model/training.yaml").read_text()
    assert str(Path.home()) not in json.dumps(metadata)


def test_the_card_lies_in_the_folder(run: Path) -> None:
    text = (run / "model/README.md").read_text()
    assert 'license_name: "CC0-1.0"' in text
    assert "| ft1 |" in text
    assert "untransposed" in text, "what the record says of the training"


def test_a_copy_inside_another_project_has_no_revision(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.invalid"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    shutil.copytree(Path(export.__file__).parents[1], tmp_path / "copied/train", ignore=shutil.ignore_patterns("__pycache__"))
    ask = "import train.engine.export as e, sys; print(e.__file__, e.code_revision())"
    said = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path / "copied", capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(tmp_path / "copied/train/engine/export.py"), "unknown"]


def test_files_are_readable_by_umask(run: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (run / "ft1.safetensors", run / "model/unet/diffusion_pytorch_model.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_next_stage_reads_fp32_and_extends_the_lineage(
    run: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    source = model_source.resolve(ModelConfig(init_from=str(run)))
    assert source.kind == "run"
    assert all(source.weights[name].dtype == "F32" for name in trained)
    assert source.weights["text_encoder.text_model.final_layer_norm.weight"].dtype == "F16"
    assert source.license == "CC0-1.0"
    second = finish(tmp_path / "ft2", source, trained)
    lineage = json.loads((second / "lineage.json").read_text())
    assert lineage["parent"] == {"stage": "ft1", "sha256": source.sha256, "title": "ft1"}
    assert [ancestor["stage"] for ancestor in lineage["ancestors"]] == ["ft1"]


def test_a_parents_logit_scale_is_rounded_in_the_folder_too(
    base: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    single_file.to_single_file(base, tmp_path / "plain.safetensors")
    tensors = load_file(tmp_path / "plain.safetensors") | {sdxl.LOGIT_SCALE: torch.tensor(4.3219)}
    save_file(tensors, tmp_path / "base.safetensors", export.read_metadata(tmp_path / "plain.safetensors"))
    start = ModelConfig(init_from=str(tmp_path / "base.safetensors"), tokenizers=str(base))
    run = finish(tmp_path / "ft1", model_source.resolve(start), trained)
    single_file.to_single_file(run / "model", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (run / "ft1.safetensors").read_bytes()
    assert load_file(run / "ft1.safetensors")[sdxl.LOGIT_SCALE] == torch.tensor(4.3219).half()


def test_the_lineage_goes_on_through_an_exported_file_or_folder(run: Path, tmp_path: Path) -> None:
    """The original handed its stages on as files; whoever does so again must not lose where they came from."""
    single_file.to_folder(run / "ft1.safetensors", tmp_path / "converted", tokenizers=run / "model")
    lineage = json.loads((run / "lineage.json").read_text())
    for start in (run / "ft1.safetensors", run / "model", tmp_path / "converted"):
        source = model_source.resolve(ModelConfig(init_from=str(start)))
        record = export.lineage_record(
            stage="ft2", source=source, dataset_fingerprint="", config_hash="", seed=1, updates=1, images=1, versions={},
            license="CC0-1.0", weights_sha256="", conditioning={},
        )  # fmt: skip
        assert (record["parent"]["stage"], record["parent"]["sha256"]) == ("ft1", source.sha256)
        assert [ancestor["stage"] for ancestor in record["ancestors"]] == ["ft1"]
        assert record["ancestors"][0]["parent"] == lineage["parent"]


def test_a_moved_file_is_drawn_as_it_was_trained(run: Path, tmp_path: Path) -> None:
    """Away from its run directory a file has no config beside it, only its own record; a foreign one has neither."""
    shutil.copy(run / "ft1.safetensors", tmp_path / "moved.safetensors")
    (tmp_path / "foreign").mkdir()
    moved = inference.open_model(tmp_path / "moved.safetensors", device="cpu", tokenizers=str(run / "model"))
    assert moved.trained_as == TrainedAs(
        max_tokens=75, context="chunks", pooled_projection="sd_scripts", timestep_embedding="sd_scripts"
    )
    foreign = tmp_path / "foreign/model"
    shutil.copytree(run / "model", foreign)
    for name in ("training.yaml", "lineage.json", "single_file.json"):
        (foreign / name).unlink()
    assert inference.open_model(foreign, device="cpu").trained_as == TrainedAs()
    scheduler = json.loads((foreign / "scheduler/scheduler_config.json").read_text())
    scheduler |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (foreign / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    assert inference.open_model(foreign, device="cpu").trained_as == TrainedAs(prediction="v", zero_terminal_snr=True)


def test_export_may_be_repeated_and_writes_the_average_beside(
    run: Path, base: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "ft1")
    before = (tmp_path / "ft1/ft1.safetensors").read_bytes()
    record = json.loads((run / "model/lineage.json").read_text())
    final = next(run.glob("checkpoints/*/model.safetensors"))
    save_file({name: value * 0.5 for name, value in trained.items()}, tmp_path / "ema.safetensors")
    source = model_source.resolve(ModelConfig(init_from=str(base)))
    export.export_stage(tmp_path / "ft1", final, source, record, ExportConfig(), average=tmp_path / "ema.safetensors")
    assert (tmp_path / "ft1/ft1.safetensors").read_bytes() == before
    averaged = load_file(tmp_path / "ft1/ft1-ema.safetensors")["model.diffusion_model.out.2.weight"]
    assert torch.equal(averaged, (trained["unet.conv_out.weight"] * 0.5).half())
    told = export.read_metadata(tmp_path / "ft1/ft1-ema.safetensors")
    assert told["modelspec.title"] == "ft1 (EMA)"
    assert told["anix.weights_sha256"] == file_sha256(tmp_path / "ema.safetensors")


def test_show_prints_the_record(run: Path) -> None:
    for path, kind in ((run, "run"), (run / "model", "folder"), (run / "ft1.safetensors", "single_file")):
        report = show_model.report(path)
        assert (report["kind"], report["license"], report["training"]["stage"]) == (kind, "CC0-1.0", "ft1")
        assert report["training"]["parent"]["sha256"]


def test_vae_identity_survives_the_export(base: Path, run: Path) -> None:
    models = [model_source.resolve(ModelConfig(init_from=str(p))) for p in (base, run, run / "ft1.safetensors")]
    assert len({model_source.vae_identity(model) for model in models}) == 1


def test_fp32_export_is_exact(base: Path, trained: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = model_source.resolve(ModelConfig(init_from=str(base)))
    path = finish(tmp_path / "ft1", source, trained, dtype="fp32")
    unet = load_file(path / "model/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(unet[name.removeprefix("unet.")], value) for name, value in trained.items())


def unfinished(run: Path) -> None:
    (run / "DONE").unlink()


def no_lineage(run: Path) -> None:
    (run / "lineage.json").unlink()


def flipped_checkpoint(run: Path) -> None:
    flip(next(run.glob("checkpoints/*/model.safetensors")))


def gone_checkpoint(run: Path) -> None:
    shutil.rmtree(next(run.glob("checkpoints/*")))


def flipped_encoder(run: Path) -> None:
    flip(run / "model/text_encoder/model.safetensors")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def other_checkpoint(run: Path) -> None:
    lineage = json.loads((run / "lineage.json").read_text())
    (run / "lineage.json").write_text(json.dumps({**lineage, "weights_sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unfinished, "not finished"),
        (no_lineage, "lineage.json is missing"),
        (flipped_checkpoint, r"changed since it was finished: checkpoints/step-\d+/model\.safetensors"),
        (gone_checkpoint, "checkpoint of its last step is gone"),
        (flipped_encoder, "model/ has sha256"),
        (other_checkpoint, "changed since it was finished"),
    ],
)
def test_a_changed_parent_is_refused(change: Callable[[Path], None], words: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "ft1")
    change(tmp_path / "ft1")
    with pytest.raises(Halt, match=words) as caught:
        model_source.resolve(ModelConfig(init_from=str(tmp_path / "ft1")))
    assert caught.value.code == ExitCode.MISMATCH


def test_pins_are_checked(base: Path, run: Path) -> None:
    single = run / "ft1.safetensors"
    for path in (base, run, single):
        good = model_source.resolve(ModelConfig(init_from=str(path))).sha256
        assert model_source.resolve(ModelConfig(init_from=str(path), init_sha256=good)).sha256 == good
        with pytest.raises(Halt, match=r"model\.init_sha256") as caught:
            model_source.resolve(ModelConfig(init_from=str(path), init_sha256="0" * 64))
        assert caught.value.code == ExitCode.MISMATCH
    assert model_source.resolve(ModelConfig(init_from=str(single))).sha256 == hashlib.sha256(single.read_bytes()).hexdigest()
    with pytest.raises(Halt, match=r"model\.vae_sha256"):
        model_source.resolve(ModelConfig(init_from=str(base), vae=str(base / "vae"), vae_sha256="0" * 64))


def test_another_vae_replaces_the_models_own(base: Path, tmp_path: Path) -> None:
    other = tinysdxl.write(tmp_path / "other", seed=4)
    wanted = load_file(other / "vae/diffusion_pytorch_model.safetensors")["quant_conv.weight"]
    for vae in (other / "vae", other):
        model = model_source.resolve(ModelConfig(init_from=str(base), vae=str(vae)))
        assert model.weights["vae.quant_conv.weight"].read() == wanted.numpy().tobytes()
        assert model.vae_sha256 == file_sha256(other / "vae/diffusion_pytorch_model.safetensors")


def test_the_record_names_the_vae_from_stage_to_stage(
    base: Path, trained: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    vae = tinysdxl.write(tmp_path / "other", seed=4) / "vae"
    run = finish(tmp_path / "ft1", model_source.resolve(ModelConfig(init_from=str(base), vae=str(vae))), trained)
    expected = file_sha256(vae / "diffusion_pytorch_model.safetensors")
    for path in (run, run / "model", run / "ft1.safetensors"):
        assert show_model.report(path)["training"]["vae_sha256"] == expected
        assert model_source.resolve(ModelConfig(init_from=str(path))).vae_sha256 == expected
    assert model_source.resolve(ModelConfig(init_from=str(base))).vae_sha256 is None


def test_single_vae_file_must_be_sdxls(base: Path, tmp_path: Path) -> None:
    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(Halt, match="247 tensors are missing"):
        model_source.resolve(ModelConfig(init_from=str(base), vae=str(tmp_path / "vae.safetensors")))


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("nowhere/at-all", "does not exist", ExitCode.USAGE),
        ("owner/name@main", "40-digit commit", ExitCode.USAGE),
        ("elsewhere/a.safetensors", "does not exist: give", ExitCode.USAGE),
        ("model.ckpt", "pickle", ExitCode.MISMATCH),
    ],
)
def test_names_that_lead_nowhere(name: str, words: str, code: ExitCode) -> None:
    with pytest.raises(Halt, match=words) as caught:
        model_source.find(name)
    assert caught.value.code == code


def test_a_pinned_hub_model_comes_from_the_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--cagliostrolab--animagine-xl-3.0/snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    (snapshot / "README.md").write_text(
        "---\nlicense: other\nlicense_name: faipl-1.0-sd\n---\n# a model\nlicense: no\n"
    )
    model = model_source.resolve(ModelConfig(init_from=f"cagliostrolab/animagine-xl-3.0@{COMMIT}"))
    assert model.path == snapshot
    assert model.license == FAIPL
    with pytest.raises(Halt, match="cannot be fetched") as caught:
        model_source.find(f"cagliostrolab/other@{COMMIT}")
    assert caught.value.code == ExitCode.MISMATCH


def test_without_a_network_the_cache_serves(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens: refused at once
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name/snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    assert model_source.find(f"owner/name@{COMMIT}") == snapshot
    with pytest.raises(Halt, match=r"owner/other.* cannot be fetched") as caught:
        model_source.find(f"owner/other@{COMMIT}")
    assert caught.value.code == ExitCode.MISMATCH


def declared(license: str | None, path: str = "m", title: str = "") -> LocalModel:
    stated = {"modelspec.license": license} if license else {}
    return LocalModel("single_file", Path(path), "0", sdxl.STANDARD, {}, None, {**stated, "modelspec.title": title})


def test_licence_is_inherited_stated_or_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert model_source.license_of(ExportConfig(), declared("MIT")) == "MIT"
    assert model_source.license_of(ExportConfig(license="CC0"), declared(None)) == "CC0"
    assert model_source.license_of(ExportConfig(), declared(None, "models/animagine-xl-3.0-base.safetensors")) == FAIPL
    assert model_source.license_of(ExportConfig(), declared(None, title="Animagine XL 3.1")) == FAIPL
    assert not caplog.records
    assert model_source.license_of(ExportConfig(license="MIT"), declared(FAIPL)) == "MIT"
    assert FAIPL in caplog.text
    for nobody in (declared(None), declared("  ")):
        with pytest.raises(Halt, match=r"export\.license") as caught:
            model_source.license_of(ExportConfig(license=" "), nobody)
        assert caught.value.code == ExitCode.USAGE


def test_a_licence_in_prose_is_not_a_declaration(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    for text, license in (("# a model\nlicense: as I said\n", None), ("---\r\nlicense: mit\r\n---\r\n", "mit")):
        (model / "README.md").write_text(text)
        assert model_source.resolve(ModelConfig(init_from=str(model))).license == license


def test_tokenizers_must_be_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"model\.tokenizers"):
        model_folder.write_tokenizers(tmp_path, tmp_path)
