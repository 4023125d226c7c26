"""`anix` and the room of each command: what it lists, what it refuses, shipped configs from any folder."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.base.errors import ExitCode, Halt
from train.config import shipped
from train.config.prompts import load_prompts
from train.config.stage import load_stage
from train.tools import anix, stages

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "torch", "diffusers", "transformers", "accelerate"


def installed(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`anix WORDS` in `folder`; its code is 99 where a heavy library was loaded."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['anix', *{list(words)!r}]\n"
        "from train.tools.anix import entry\n"
        f"try: entry()\nfinally:\n if any(name in sys.modules for name in {HEAVY!r}): sys.exit(99)"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_help_lists_every_command_and_every_command_is_a_script(tmp_path: Path) -> None:
    done = installed(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(anix.COMMANDS)
    rooms = {path.stem for path in (ROOT / "train/tools/commands").glob("*.py")} - {"__init__"}
    assert rooms == set(anix.COMMANDS)
    for name in rooms - {"train"}:  # run.py is the script of that one
        script = (ROOT / f"scripts/{name}.py").read_text()
        assert f"from train.tools.commands.{name} import main\n" in script
        first = (importlib.import_module(f"train.tools.commands.{name}").__doc__ or "").splitlines()[0]
        assert f'"""{first}"""' in script


@pytest.mark.parametrize("name", anix.COMMANDS)
def test_each_command_names_itself(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["anix", name, "--help"])
    with pytest.raises(SystemExit) as left:
        anix.main()
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: anix {name} ")


def test_no_command_and_unknown_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["anix"])
    assert anix.main() == ExitCode.USAGE
    assert "usage: anix COMMAND" in capsys.readouterr().err
    for word, told in (("plann", "did you mean plan?"), ("Train", "did you mean train?"), ("xyz", "There are new, prepare, plan")):
        monkeypatch.setattr(sys, "argv", ["anix", word])
        with pytest.raises(Halt) as caught:
            anix.main()
        assert caught.value.code == ExitCode.USAGE
        assert told in caught.value.message


def test_plan_from_any_folder_without_torch(tmp_path: Path) -> None:
    done = installed(tmp_path, "plan", "--config", "ft1.yaml", "--images", "1000", "--gpu", "H200", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_updates"] == 200
    assert done.stderr.count("ft1.yaml: no such file here, the shipped") == 1


def test_shipped_configs_stand_in_for_files_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped._say.cache_clear()
    ours = load_stage([ROOT / "configs/tiny/ft1.yaml"])
    assert capsys.readouterr().err == ""
    assert load_stage(["configs/tiny/ft1.yaml"]) == load_stage(["tiny/ft1.yaml"]) == load_stage(["tiny/ft1.yaml"]) == ours
    assert load_prompts(ours.sampling.prompts) == load_prompts(ROOT / ours.sampling.prompts)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["config configs/tiny/ft1.yaml", "config tiny/ft1.yaml", f"config {ours.sampling.prompts}"]
    (tmp_path / "ft1.yaml").write_text("epochs: 77")
    assert load_stage(["configs/ft1.yaml", "ft1.yaml"]).epochs == 77, "the user's own wins"
    for absent in ("nope.yaml", "configs/nope.yaml", "../configs/ft1.yaml", str(tmp_path / "ft2.yaml"), "configs", "tiny"):
        with pytest.raises(Halt, match=f"config file {absent} does not exist"):
            load_stage([absent])


@pytest.mark.parametrize(("notes", "code"), [({0: 2, 1: 7}, 2), ({1: 7, 2: 2}, 7), ({}, 1)])
def test_a_stage_ends_with_the_code_of_the_lowest_rank_that_left_one(
    notes: dict[int, int], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun ends the main process when another one has left, which may be before it has left its own."""

    def run(self: stages.Stops, command: list[str], environment: dict[str, str], done: object) -> int:
        for rank, said in notes.items():
            Path(f"{environment['ANIX_EXIT_NOTE']}.{rank}").write_text(str(said))
        return 1

    monkeypatch.setattr(stages.Stops, "run", run)
    with stages.Stops() as stops:
        assert stages.launch_stage([ROOT / "configs/tiny/ft1.yaml"], [], ["launch"], tmp_path / "out", stops) == code


def test_train_hands_everything_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs, overrides and the launcher's own options, each in its place; the trainer's own code comes back."""
    called: list[list[str]] = []

    def run(self: stages.Stops, command: list[str], environment: dict[str, str], done: object) -> int:
        called.append(command)
        Path(environment["ANIX_EXIT_NOTE"] + ".0").write_text("7")
        return 1

    monkeypatch.setattr(stages.Stops, "run", run)
    monkeypatch.chdir(tmp_path)
    ours = ["--config", "ft1.yaml", f"output_dir={tmp_path}/out", "--config", "memory/24gb.yaml", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["anix", "train", *ours, "--launch", "launch/two_gpus.yaml", "--", "--main_process_port", "0"])
    assert anix.main() == ExitCode.MISMATCH
    at = called[0].index(str(ROOT / "train/run.py"))
    configs = ROOT / "configs"
    assert called[0][2:at] == ["accelerate", "--config_file", str(configs / "launch/two_gpus.yaml"), "--main_process_port", "0"]
    files = ["--config", str(configs / "ft1.yaml"), "--config", str(configs / "memory/24gb.yaml")]
    assert called[0][at + 1 :] == [*files, f"output_dir={tmp_path}/out", "seed=3"]
    for refused in (["--config", "ft1.yaml", "--processes", "0"], ["--config", "ft1.yaml", "sead=1"]):
        monkeypatch.setattr(sys, "argv", ["anix", "train", *refused])
        with pytest.raises(Halt) as caught:
            anix.main()
        assert caught.value.code == ExitCode.USAGE
    assert len(called) == 1


@pytest.mark.slow
def test_train_ends_with_the_code_of_the_contract(tmp_path: Path) -> None:
    """Through accelerate itself, which makes a 1 of every worker's code."""
    words = ["train", "--config", "tiny/ft1.yaml", f"model.init_from={tmp_path}/absent", f"output_dir={tmp_path}/out"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['anix', *{words!r}]\n" \
           "from train.tools.anix import entry\nentry()"  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr
