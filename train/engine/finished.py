"""What a finished stage answers to another start: already done, goes on to further updates, or made otherwise.

Nothing is written. Torch is loaded only where a path of the model is another one: what lies there is read then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.config.derived import Start
from train.config.stage import ModelConfig, load_stage
from train.data.selection import Selection, open_selection, vae_mark
from train.model import source as model_source
from train.storage import manifest, resume
from train.storage.resume import LENGTH, Comparison, Expectations
from train.storage.rundir import read_done

_MODEL = ("model.init_from", "model.vae", "model.tokenizers", "model.init_sha256", "model.vae_sha256")


@dataclass(frozen=True)
class Answer:
    """`goes_on`: updates are left to do; `text` says which, or that none are."""

    goes_on: bool
    text: str


def answer(start: Start) -> Answer | None:
    """What the finished stage in `output_dir` answers to `start`; None where no finished one lies there.

    Raises Halt(MISMATCH) with the keys that differ when it was made under other settings, from another parent or from
    other images, and where more updates cannot follow on those that were applied.
    """
    path = Path(start.identity.output_dir)
    done = read_done(path)
    if done is None:
        return None
    name, step = f"stage {start.identity.stage}", done.get("step")
    state = _state(path, step)
    if state is None:
        return Answer(False, f"{name} is already done: {path} (nothing there says under which settings)")
    try:
        selection = open_selection(start.images)
    except Halt:  # a set that was cleared away does not undo what was made of it
        selection = None
    found = _compared(start, state, selection)
    longer = [difference for difference in found.warned + found.accepted if difference.key in LENGTH]
    if longer and not found.refused and type(step) is int:
        selection = selection or open_selection(start.images)  # to go on, it is needed: this says what is wrong with it
        if selection.plan.total_updates > step:
            if not (path / "checkpoints" / f"step-{step:08d}").is_dir():
                told = f"{path} was finished after update {step}, and its checkpoint of that update is gone"
                raise Halt(ExitCode.MISMATCH, f"{told}: choose another output_dir")
            told = ", ".join(f"{d.key} {d.saved} is now {d.now}" for d in longer)
            return Answer(True, f"{name} was finished after update {step} and goes on to {selection.plan.total_updates}: {told}")
    if found.refused or found.warned:
        hint = "; epochs or max_updates may be raised, for more updates than were made" if longer else ""
        raise Halt(
            ExitCode.MISMATCH,
            f"{name} is finished, and was made under other settings: {path}\n{replace(found, free=()).table()}\n"
            f"Restore these settings, choose another output_dir, or name what you accept in resume.accept{hint}",
        )
    others = "".join(f"\n  {difference}" for difference in found.free if difference.key != "output_dir")
    note = f"; what differs changes nothing that was trained:{others}" if others else ""
    return Answer(False, f"{name} is already done: {path}{note}")


def went_on(step: int, done: Mapping[str, Any] | None, comparison: Comparison) -> list[str]:
    """What lineage tells of a run that is taken up at `step`, after it was finished as `done` says."""
    if done is None or type(done.get("step")) is not int or step > done["step"]:
        return []
    return [f"finished after update {done['step']}, then {d}" for d in comparison.warned + comparison.accepted if d.key in LENGTH]


def _state(path: Path, step: Any) -> dict[str, Any] | None:
    """What the last checkpoint says of itself, else what the config beside it says; None where neither can be read."""
    if type(step) is int:
        state = read_json(path / "checkpoints" / f"step-{step:08d}" / "state.json")
        if state is not None and isinstance(state.get("config"), dict):
            return state
    try:
        before = load_stage([path / "config.yaml"]).identity
    except Halt:
        return None
    return {"stage": before.stage, "config": resume.without_secrets(before.flat)}


def _compared(start: Start, state: Mapping[str, Any], selection: Selection | None) -> Comparison:
    """As a resume compares. What a path holds is looked at where that is quick, and where the path is another one."""
    identity, flat = start.identity, resume.without_secrets(start.identity.flat)
    resume.check_accept(identity.accept, identity.flat)
    held, facts = dict(state.get("held", {})), dict(state.get("facts", {}))
    if selection is not None:
        facts |= {"dataset": selection.kept.fingerprint} if "dataset" in facts else {}
        held["data.path"] = f"{selection.kept.fingerprint}/{selection.kept.selection_hash}"
    elif state["config"].get("data.path") != flat["data.path"]:
        held.pop("data.path", None)
    parent = _run_sha256(Path(start.origin.path))  # a run may have gone on since
    if any(state["config"].get(key) != flat[key] for key in _MODEL if key in held):
        now = _held_by_model(start.origin.model)
        held |= {key: now[key] for key in _MODEL if key in held}
        parent = now["model.init_from"]
    if parent is not None and "parent" in facts:
        facts["parent"] = parent
    expected = Expectations(identity.stage, flat, held, facts, accept=identity.accept, defaults=identity.defaults)
    return resume.compare(state, expected)


def _run_sha256(path: Path) -> str | None:
    """Of the weights that a finished run ended with; None for what is none."""
    step = (read_done(path) or {}).get("step")
    try:
        return manifest.read(path / "checkpoints" / f"step-{step:08d}").files["model.safetensors"].sha256
    except (manifest.Damaged, OSError, KeyError, TypeError, ValueError):
        return None


def _held_by_model(model: ModelConfig) -> dict[str, str]:
    """What the paths of `model` hold, as a checkpoint of this start would say it."""
    from train.model.text import load_tag_tokenizer  # loads torch

    source = model_source.resolve(model)
    words = load_tag_tokenizer(source.tokenizers).identity() if source.tokenizers is not None else ""
    return dict(zip(_MODEL, (source.sha256, vae_mark(source), words, source.sha256, vae_mark(source)), strict=True))
