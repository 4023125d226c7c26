"""What a terminal shows beside our own words: nothing of launchers, and of libraries only what somebody can act on."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from stages import Stage

from train.base import quiet
from train.config.stage import ScheduleConfig
from train.recipe import schedule
from train.tools import launcher, stages

ROOT = Path(__file__).resolve().parents[2]


def test_warnings_nobody_can_act_on_are_dropped_and_others_heard() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet.install()
        warnings.warn("This DataLoader will create 4 worker processes in total. Our suggested max", UserWarning, stacklevel=1)
        warnings.warn("This DataLoader will fail", UserWarning, stacklevel=1)
        warnings.warn("something else", DeprecationWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["This DataLoader will fail", "something else"]


@pytest.mark.parametrize(
    ("name", "dropped", "heard"),
    [
        ("transformers.utils.import_utils", "`ViTImageProcessor` requires torchvision (not installed); falling back to `X`",
         "`VideoProcessor` requires torchvision"),
        ("diffusers.models.modeling_utils", "There are modules in A that should be kept in float32: []. Casting",
         "There are modules in A that should be kept in float32: ['norm']. Casting"),
    ],
)  # fmt: skip
def test_of_a_logger_only_the_one_message(name: str, dropped: str, heard: str, caplog: pytest.LogCaptureFixture) -> None:
    quiet.install()
    quiet.install()
    for text in (dropped, heard):
        logging.getLogger(name).warning(text)
    told = [record.getMessage() for record in caplog.records if record.name == name]
    assert told in ([heard], []), "the library's logger may not propagate"
    log = logging.getLogger(name)
    made = [log.makeRecord(name, logging.WARNING, "f", 1, text, (), None) for text in (dropped, heard)]
    assert [bool(log.filter(record)) for record in made] == [False, True]


def test_the_messages_are_those_of_the_installed_libraries() -> None:
    import diffusers.models.modeling_utils
    import transformers.utils.import_utils

    assert "requires torchvision (not installed); falling back" in Path(transformers.utils.import_utils.__file__).read_text()
    assert "that should be kept in float32: {fp32_modules}" in Path(diffusers.models.modeling_utils.__file__).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_last_word_is_ours(processes: int, tmp_path: Path) -> None:
    """A stage that is refused: one message, the recipe's line below it, and no launcher's traceback."""
    command = [sys.executable, str(ROOT / "scripts/recipe.py"), "--configs", str(ROOT / "configs/tiny/pretrain.yaml"),
               "--processes", str(processes), "data.path=nowhere", f"output_dir={tmp_path / 'run'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2  # the model is not there either
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr and "elastic" not in done.stderr
    assert lines[-1] == "stage pretrain ended with code 2; the stages after it were not started"
    assert "data.path nowhere is not a prepared dataset" in done.stderr


def test_a_launcher_that_cannot_start_says_so_in_a_line(tmp_path: Path) -> None:
    command = [*stages.launch_command(tmp_path / "absent.yaml", 1), "x.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: accelerate cannot start the trainer: The passed configuration file")
    assert "Traceback" not in done.stderr


def test_codes_that_a_launchers_exception_speaks_of() -> None:
    failures = {0: SimpleNamespace(exitcode=-9), 1: SimpleNamespace(exitcode=7)}
    gone = type("ChildFailedError", (Exception,), {"failures": failures})
    assert launcher.codes_of(gone()) == [-9, 7]
    assert launcher.codes_of(subprocess.CalledProcessError(-11, "x")) == [-11]
    assert launcher.codes_of(type("SignalException", (Exception,), {})()) == []
    assert launcher.codes_of(ValueError("no such file")) is None


@pytest.mark.parametrize(
    ("warmup", "updates", "unit", "told"),
    [
        (100, 45, "optimizer_step", "schedule.warmup_steps 100 is longer than the run, 45 updates: the learning rate gets to 44 %"),
        (100, 101, "optimizer_step", None),
        (100, 100, "optimizer_step", "99 %"),
        (100, 51, "process_step", None),
        (0, 1, "optimizer_step", None),
    ],
)  # fmt: skip
def test_a_warmup_longer_than_the_run(warmup: int, updates: int, unit: str, told: str | None) -> None:
    config = ScheduleConfig(name="constant_with_warmup", warmup_steps=warmup, unit=unit, processes=2 if unit[0] == "p" else 1)
    said = schedule.long_warmup(config, total_updates=updates)
    assert said is None if told is None else told.replace(" %", "%") in str(said)


def test_a_long_warmup_is_warned_of_by_the_run(
    base_model: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    warm = ("schedule.name=constant_with_warmup", "schedule.warmup_steps=10", "schedule.min_lr=0", "schedule.decay=1",
            "schedule.cycles=null", "max_updates=2")  # fmt: skip
    assert stage.run(*warm) == 0, stage.message
    assert "schedule.warmup_steps 10 is longer than the run, 2 updates: the learning rate gets to 10%" in caplog.text


@pytest.mark.slow
def test_importing_the_pipelines_says_nothing() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from train.base.console import log_to_stderr; log_to_stderr()\n"
        "import bitsandbytes\nfrom diffusers import StableDiffusionXLPipeline\n"
        "from transformers import CLIPImageProcessor"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
