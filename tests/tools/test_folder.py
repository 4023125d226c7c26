"""recipe.py DIR: what is left out, what a stop and a failure leave, and what the last lines name; overrides of one stage."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage, overrides_of
from train.tools import folder as recipe_folder
from train.tools import stages
from train.tools.commands import recipe
from train.tools.estimate import estimate
from train.tools.estimate import recipe as plan_recipe
from train.tools.folder import Folder, run_folder

ROOT = Path(__file__).resolve().parents[2]
TINY = [ROOT / f"configs/tiny/{stage}.yaml" for stage in ("pretrain", "ft1", "ft2")]


@pytest.fixture
def own(tmp_path: Path, base_model: Path) -> Path:
    """A folder as new.py leaves it, nothing prepared."""
    path = tmp_path / "own"
    path.mkdir()
    (path / "dataset.yaml").write_text(f"name: set\nroot: {path}\nseed: 1\nsources: [{{name: own, adapter: sidecar, path: {tmp_path}/pictures}}]\n"
                                       f"select: {{pretrain: {{}}}}\nlatents: {{vae: {base_model}/vae}}\ntokenizers: {base_model}\n")  # fmt: skip
    synthetic.stage_yaml(path / "train.yaml", data=path / "set", model=base_model, output=path / "run", stage="own")
    (path / "prompts.yaml").write_text("prompts: [{text: 1girl, width: 64, height: 64, seed: 1}, {text: 1boy, width: 64, height: 64, seed: 2}]\n")
    return path


class Parts:
    """In the place of the processes: what was started, in order, and how each ends."""

    def __init__(self, path: Path, ends: dict[str, int] | None = None) -> None:
        self.path, self.ends, self.started = path, ends or {}, []  # type: ignore[var-annotated]
        self.stop: Callable[[], None] | None = None

    def run(self, stops: stages.Stops, command: list[str], environment: Any, done: Any) -> int:
        words = command[3:]
        name = words[0] + (f" {Path(words[words.index('--out') + 1]).name}" if words[0] == "sample" else "")
        self.started.append(name)
        if self.ends.get(name, 0) == 0 and words[0] == "sample":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            for picture in ("00", "01", "grid"):
                (out / f"{picture}.png").touch()
        if words[0] == "report":
            Path(words[words.index("--out") + 1]).touch()
        if self.stop is not None and name in self.ends:
            stops.name = "SIGTERM"
        return self.ends.get(name, 0)

    def train(self, config: Path, overrides: Any, stage: Any, launcher: Any, stops: Any) -> int:
        self.started.append(f"train {' '.join(overrides)}".strip())
        if self.ends.get("train", 0) == 0:
            run = Path(stage.identity.output_dir)
            (run / "model").mkdir(parents=True, exist_ok=True)
            (run / "own.safetensors").touch()
            if not (run / "DONE").exists():
                (run / "DONE").write_text('{"step": 9}')
        return self.ends.get("train", 0)


def started(own: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, int] | None = None, *overrides: str, stop: bool = False) -> tuple[int, list[str]]:
    parts = Parts(own, ends)
    parts.stop = (lambda: None) if stop else None
    with monkeypatch.context() as patch:
        patch.setattr(stages.Stops, "run", lambda stops, *more: parts.run(stops, *more))
        patch.setattr(recipe_folder, "run_unless_done", parts.train)
        return run_folder(own, overrides, None, 1), parts.started


ALL = ["prepare", "sample before", "train", "sample after", "report"]


def test_everything_once_and_what_is_there_not_again(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(own, monkeypatch) == (0, ALL)
    told = capsys.readouterr().out
    for place in ("run/model", "run/own.safetensors", "samples/before/grid.png", "samples/after/grid.png", "report.html"):
        assert f"{own}/{place}\n" in told, place
    assert "Next:" in told
    assert "adapter" not in told, "only what is there"
    assert started(own, monkeypatch) == (0, ["prepare", "train", "report"]), "prepare and the trainer know by themselves"
    (own / "prompts.yaml").write_text((own / "prompts.yaml").read_text().replace("1boy", "1other"))
    assert started(own, monkeypatch) == (0, ALL), "other prompts: both are drawn anew"
    (own / "run/DONE").write_text('{"step": 18}')
    (own / "samples/before/00.png").unlink()
    assert started(own, monkeypatch) == (0, ALL), "trained on, and a picture was thrown away"


@pytest.mark.parametrize("part", ALL)
def test_a_part_that_fails_ends_it_with_its_code_and_the_same_command_goes_on(own: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ALL[: ALL.index(part)]
    assert started(own, monkeypatch, {part: 7}) == (7, [*before, part])
    left_out = {"sample before"} if "sample before" in before else set()
    if part == "report":
        left_out.add("sample after")
    assert started(own, monkeypatch) == (0, [one for one in ALL if one not in left_out])


@pytest.mark.parametrize("code", [-signal.SIGTERM, 85])
def test_a_stop_is_85_whatever_the_part_makes_of_it(own: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert started(own, monkeypatch, {"sample before": code}, stop=True) == (85, ["prepare", "sample before"])
    assert "the same command goes on" in capsys.readouterr().err
    assert not Folder(own).drawn.exists()


def test_a_signal_that_nobody_asked_for_is_a_failure(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(own, monkeypatch, {"sample before": -signal.SIGKILL})[0] == ExitCode.UNEXPECTED


def test_mistakes_come_before_anything_is_done(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Halt, match="epoks"):
        started(own, monkeypatch, None, "epoks=3")
    for name, text in (("prompts.yaml", "prompts: 3"), ("dataset.yaml", "naem: x"), ("train.yaml", None)):
        kept = (own / name).read_text()
        (own / name).unlink()
        if text is not None:
            (own / name).write_text(text)
        with pytest.raises(Halt) as halted:
            started(own, monkeypatch)
        assert halted.value.code == ExitCode.USAGE
        assert text is not None or "it holds no train.yaml" in halted.value.message
        (own / name).write_text(kept)
    assert started(own, monkeypatch, None, "epochs=7")[1][2] == "train epochs=7"


def test_a_child_is_anix_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with stages.Stops() as stops:
        assert recipe_folder._command(stops, "plan", "--nonsense") == ExitCode.USAGE
        assert "anix plan" in capfd.readouterr().err
        stops.name = "SIGTERM"
        assert recipe_folder._command(stops, "plan", "--help") == ExitCode.STOPPED


@pytest.mark.parametrize(
    ("words", "code"), [([], 2), (["a", "b"], 2), (["a", "--configs", "b"], 2), (["x=1"], 2), (["absent"], 2), (["--configs", "a=1"], 2)]
)
def test_what_the_command_line_refuses(words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    with pytest.raises((SystemExit, Halt)) as left:
        recipe.main()
    assert int(left.value.code) == code  # type: ignore[union-attr]


def test_overrides_of_one_stage_come_after_those_of_all() -> None:
    assert overrides_of(TINY, []) == [[], [], []]
    given = ["seed=5", "ft1:seed=7", "ft1:optimizer.groups=[{match: 'unet.*', lr: 0}]", "pretrain:export.title=a:b=c", "epochs=2"]
    own = overrides_of(TINY, given)
    assert own == [["seed=5", "epochs=2", "export.title=a:b=c"], ["seed=5", "epochs=2", "seed=7", given[2][4:]], ["seed=5", "epochs=2"]]
    loaded = [load_stage([config], its) for config, its in zip(TINY, own, strict=True)]
    assert [(stage.seed, stage.epochs, stage.export.title) for stage in loaded] == [(5, 2, "a:b=c"), (7, 2, "tiny finetune 1"), (5, 2, "tiny finetune 2")]
    with pytest.raises(Halt, match=r"ft3:seed=1: no config is of the stage 'ft3'; did you mean ft\d\? There are pretrain, ft1, ft2"):
        overrides_of(TINY, ["ft3:seed=1"])
    renamed = overrides_of(TINY[:1], ["stage=first", "first:seed=9", "model.init_from=s3://a:b/c=d"])
    assert renamed == [["stage=first", "model.init_from=s3://a:b/c=d", "seed=9"]]


def test_stages_are_priced_together() -> None:
    request = estimate.Request(gpu="H200", images_per_s=10.0, price_per_hour=3.0, disk_gb=1500)
    starts = [load_stage([ROOT / f"configs/{stage}.yaml"]).start for stage in ("pretrain", "ft1", "ft2")]
    plans = plan_recipe.plan_stages(starts, request)
    found = plan_recipe.total(plans)
    assert found["stages"] == ["pretrain", "ft1", "ft2"]
    assert found["total_updates"] == sum(plan["total_updates"] for plan in plans) == 90_990 + 2_850 + 4_275
    assert found["gpu_hours"] == pytest.approx((873_504 // 96 * 96 * 10 + 13_680 * 25) / 36_000)
    assert found["cost"] == pytest.approx(3 * found["gpu_hours"])
    assert found["latents_bytes"] == plans[0]["disk"]["latents_bytes"], "one set, counted once"
    parts = [plan["disk"]["checkpoints_bytes"] + plan["disk"]["export_bytes"] for plan in plans]
    assert found["disk_bytes"] == sum(parts) + found["latents_bytes"]
    assert found["memory_gib"] == max(plan["memory"]["total_gib"] for plan in plans)
    assert found["fits"]
    assert plan_recipe.problems(found) == []
    tight = plan_recipe.total(plan_recipe.plan_stages(starts, estimate.Request(gpu="H200", disk_gb=(max(parts) + 1e9) / 1e9)))
    assert not tight["fits"], "each alone would fit"
    assert "all stages together need" in plan_recipe.problems(tight)[0]
    json.dumps(found)


def test_a_stage_of_a_tiny_model_that_is_not_trained_yet_is_known_to_be_tiny(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    first = synthetic.stage_yaml(tmp_path / "a.yaml", data=dataset, model=base_model, output=tmp_path / "a", stage="pretrain")
    second = synthetic.stage_yaml(tmp_path / "b.yaml", data=dataset, model=tmp_path / "a", output=tmp_path / "b", stage="ft1")
    more = ["batch.micro=2", "batch.effective=8", "data.max_tokens=75", "export.every_epochs=1"]
    plans = plan_recipe.plan_stages([load_stage([one], more).start for one in (first, second)], estimate.Request(gpu="H200"))
    assert [plan["memory"]["fits"] for plan in plans] == [None, None]
    assert plan_recipe.total(plans)["disk_bytes"] is None
    assert [plan["disk"]["epoch_files"] for plan in plans] == [2, 2]
    with pytest.raises(Halt, match="share an output_dir"):
        plan_recipe.plan_stages([load_stage([first], more).start] * 2, estimate.Request(gpu="H200"))
