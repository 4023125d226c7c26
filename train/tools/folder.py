"""A folder of new.py from pictures to a finished page: prepare, draw before, train, draw after, report.

Each part is a command of its own in a process of its own, and is left out where it was done with what lies there now; so
the same command goes on after a stop or a kill anywhere.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, write_json
from train.config.dataset import load_settings
from train.config.derived import Start
from train.config.prompts import load_prompts
from train.config.stage import load_stage
from train.storage.rundir import read_done
from train.tools.stages import Stops, launch_command, run_unless_done

FILES = ("dataset.yaml", "train.yaml", "prompts.yaml")
_ROOT = Path(__file__).resolve().parents[2]
_ANIX = f"import sys; sys.path[0] = {str(_ROOT)!r}; from train.tools.anix import entry; entry()"


@dataclass(frozen=True)
class Folder:
    """Where everything of one recipe lies."""

    path: Path

    @property
    def before(self) -> Path:
        """Pictures of the base."""
        return self.path / "samples" / "before"

    @property
    def after(self) -> Path:
        """The same of the result."""
        return self.path / "samples" / "after"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def drawn(self) -> Path:
        """What the pictures were drawn from."""
        return self.path / "cache" / "drawn.json"


def run_folder(path: Path, overrides: Sequence[str], launch: Path | None, processes: int, sample: str = "anix sample") -> int:
    """Everything that is left to do in the folder; 0, or the code of the part that did not end well; 85 after a stop.

    `overrides` are of the stage; `sample` is how sample.py is called here. Raises Halt: USAGE (no such folder, a mistake in one of its files, told before
    anything is done), MISMATCH (finished under other settings).
    """
    folder, missing = Folder(path), [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise Halt(ExitCode.USAGE, f"{path} is no folder of new.py: it holds no {', '.join(missing)}; new.py PICTURES --out {path} makes one")
    load_settings([path / "dataset.yaml"])
    load_prompts(path / "prompts.yaml")
    stage, launcher = load_stage([path / "train.yaml"], overrides).start, launch_command(launch, processes)
    with Stops() as stops:
        code = (
            _command(stops, "prepare", "all", "--config", path / "dataset.yaml")
            or _draw(stops, folder, folder.before, stage.origin.path, stage)
            or run_unless_done(path / "train.yaml", overrides, stage, launcher, stops)
            or _draw(stops, folder, folder.after, stage.identity.output_dir, stage)
            or _report(stops, folder, stage)
        )
    if code == ExitCode.STOPPED:
        print("stopped: the same command goes on", file=sys.stderr)
    elif code == ExitCode.DONE:
        print("\n".join(ending(folder, stage, sample)))
    return code


def ending(folder: Folder, stage: Start, sample: str) -> list[str]:
    """What lies where, and what to do next."""
    run, name = Path(stage.identity.output_dir), stage.identity.stage
    places = {
        "model": run / "model", "single file": run / f"{name}.safetensors", "adapter": run / f"{name}-lora.safetensors",
        "its folder": run / "lora", "average": run / f"{name}-ema.safetensors", "before": folder.before / "grid.png",
        "after": folder.after / "grid.png", "report": folder.report, "the set's page": Path(stage.images.folder) / "report.html",
    }  # fmt: skip
    lines = ["", f"{name} is finished:", *(f"  {title:<15} {place}" for title, place in places.items() if place.exists())]
    epochs = sorted(run.glob(f"{name}*-e[0-9][0-9][0-9][0-9].safetensors"))
    if epochs:
        lines.append(f"  {'of its epochs':<15} {epochs[0]}{f' to {epochs[-1].name}' if len(epochs) > 1 else ''}")
    use = "with its base, --lora FILE:weight" if (run / f"{name}-lora.safetensors").is_file() else "in diffusers, ComfyUI, A1111"
    return [
        *lines,
        "Next:",
        f"  look            open {folder.report} in a browser: the same prompts before and after",
        f'  draw            {sample} --model {run} --prompts {folder.path}/prompts.yaml --prompt "..." --out {folder.path}/samples/mine',
        f"  use it          the {'adapter' if 'base' in use else 'single file'} {use}",
        f"  more            raise epochs in {folder.path}/train.yaml and run this again; add pictures or correct captions: see the set's page",
    ]


def _draw(stops: Stops, folder: Folder, out: Path, model: str, stage: Start) -> int:
    """The folder's prompts drawn from `model`, unless that was done with these prompts and these weights."""
    key, wanted = out.name, _drawn_from(folder, model)
    told, made = dict(read_json(folder.drawn) or {}), len(list(out.glob("[0-9]*.png")))
    if told.get(key) == wanted and made >= len(load_prompts(folder.path / "prompts.yaml").prompts):
        return ExitCode.DONE
    words: list[str | Path] = ["--model", model, "--prompts", folder.path / "prompts.yaml", "--out", out]
    if out == folder.before and (tokenizers := stage.reads.get("model.tokenizers")):  # a result has its own
        words += ["--tokenizers", tokenizers]
    code = _command(stops, "sample", *words)
    if code == ExitCode.DONE:
        folder.drawn.parent.mkdir(parents=True, exist_ok=True)
        write_json(folder.drawn, {**told, key: wanted})
    return code


def _drawn_from(folder: Folder, model: str) -> str:
    """What decides the pictures: the prompts' text, the model's name, and the end of its training where it has one."""
    parts = [(folder.path / "prompts.yaml").read_text(encoding="utf-8"), model, json.dumps(read_done(model)), json.dumps(read_json(Path(model) / "lineage.json"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _report(stops: Stops, folder: Folder, stage: Start) -> int:
    """The page, made anew each time: it is quick, and what it tells may have changed."""
    samples = ["--samples", f"base={folder.before}"]
    if not any(Path(stage.identity.output_dir).glob("samples/step-*")):  # else the run's last previews are those pictures
        samples += ["--samples", f"{stage.identity.stage}={folder.after}"]
    return _command(stops, "report", stage.identity.output_dir, *samples, "--out", folder.report)


def _command(stops: Stops, *words: str | Path) -> int:
    """One of anix's commands in a process of its own; its code, 85 where a stop ended it."""
    if stops.name is not None:
        return ExitCode.STOPPED
    print(f"-- {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    code = stops.run([sys.executable, "-c", _ANIX, *map(str, words)], None, lambda: True)
    if stops.name is not None and code != ExitCode.DONE:
        return ExitCode.STOPPED
    return code if 0 <= code < 128 else int(ExitCode.UNEXPECTED)
