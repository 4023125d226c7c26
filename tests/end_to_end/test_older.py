"""What earlier versions made goes on: their prepared sets, their checkpoints, their finished runs, their configs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from stages import clean_process
from synthetic import metrics

from train import run
from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings
from train.config.stage import load_stage
from train.data.index import Index
from train.storage import manifest
from train.storage.checkpoint import open_checkpoint

FIRST = Path(__file__).parents[1] / "fixtures" / "c93b03a"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: nothing of a fixture is written to."""
    folder = tmp_path_factory.mktemp("old") / "c93b03a"
    shutil.copytree(FIRST, folder)
    return folder


def start(old: Path, name: str, *more: str) -> int:
    places = (f"output_dir={old / name}", f"model.init_from={old / 'model'}", f"data.path={old / 'set'}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with clean_process({}):
            return int(run.main(["--config", str(old / "stage.yaml"), *places, *more]))
    finally:
        torch.set_num_threads(threads)


def final(old: Path, name: str, group: str = "model") -> dict[str, torch.Tensor]:
    return open_checkpoint(old / name / "checkpoints" / "step-00000006").tensors(group)


def machine() -> dict[str, str]:
    """What decides the last bits: torch, and the processor, whose kernels it chooses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return {"torch": torch.__version__, "processor": hashlib.sha256("\n".join(processor).encode()).hexdigest()}


def sealed(run: Path) -> manifest.Manifest:
    return manifest.verify(run / "checkpoints" / "step-00000006")


def must_equal_the_straight_run(old: Path, name: str) -> None:
    """Traces are equal anywhere; weights to the bit where torch and processor are those of the fixture, else closely."""
    assert (old / name / "trace.txt").read_text() == (old / "finished" / "trace.txt").read_text()
    wanted, found = final(FIRST, "finished"), final(old, name)
    assert found.keys() == wanted.keys()
    for tensor in wanted:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-4, atol=1e-6)
    if machine() == json.loads((FIRST / "machine.json").read_text()):
        digests = [m.files["model.safetensors"].sha256 for m in (sealed(old / name), sealed(FIRST / "finished"))]
        assert digests[0] == digests[1]
    for ours, theirs in zip(metrics(old / name), metrics(FIRST / "finished"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert {key: ours[key] for key in ("step", "update", "images", "lr_unet")} == {
            key: theirs[key] for key in ("step", "update", "images", "lr_unet")
        }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [(), ("data.separator=null",)])
def test_a_run_of_the_first_schema_is_resumed_and_equals_its_straight_run(
    more: tuple[str, ...], old: Path, tmp_path: Path
) -> None:
    shutil.copytree(FIRST, tmp_path / "c")
    assert start(tmp_path / "c", "run", *more) == ExitCode.DONE
    must_equal_the_straight_run(tmp_path / "c", "run")
    assert json.loads((tmp_path / "c/run/DONE").read_text())["step"] == 6


@pytest.mark.filterwarnings("ignore")
def test_a_set_of_the_first_schema_trains_as_it_did(old: Path) -> None:
    index = Index.open(old / "set", "pretrain")
    assert len(index) == 15
    assert index.caption(0)[0] and index.caption(0)[1]
    assert start(old, "anew") == ExitCode.DONE
    must_equal_the_straight_run(old, "anew")


def test_a_resume_of_the_first_schema_still_refuses_what_it_refused(old: Path) -> None:
    with pytest.raises(Halt, match=r"optimizer\.unet_lr") as halted:
        start(old, "run", "optimizer.unet_lr=2e-3")
    assert halted.value.code == ExitCode.MISMATCH


def test_a_finished_run_of_the_first_schema_is_recognised(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(old, "finished") == ExitCode.DONE
    assert "already done" in capsys.readouterr().err
    with pytest.raises(Halt, match=r"noise\.offset"):
        start(old, "finished", "noise.offset=0.1")


@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_of_the_first_schema_goes_on_and_is_a_parent(old: Path, tmp_path: Path) -> None:
    shutil.copytree(FIRST, tmp_path / "c")
    child = ("stage=ft1", f"model.init_from={tmp_path / 'c/finished'}", "max_updates=1", "batch.effective=2")
    assert start(tmp_path / "c", "ft1", *child) == ExitCode.DONE
    assert start(tmp_path / "c", "finished", "max_updates=7") == ExitCode.DONE
    lineage = json.loads((tmp_path / "c/finished/lineage.json").read_text())
    assert lineage["extended"] == ["finished after update 6, then max_updates: checkpoint 6, now 7"]
    assert (tmp_path / "c/finished/pretrain.safetensors").is_file()


def test_configs_of_the_first_schema_load(old: Path) -> None:
    for name in ("stage.yaml", "run/config.yaml", "finished/config.yaml", "finished/model/training.yaml"):
        assert load_stage([old / name]).data.separator == "|||", name
    assert load_settings([old / "dataset.yaml"]).separator == "|||"
