"""Every key is read where it acts, and a key that acts in more than one room says why (tests/support/keyreads.py: how it is seen)."""

from __future__ import annotations

import re
from pathlib import Path

import keyreads
import pytest

from train.config.dataset import DatasetConfig
from train.config.prompts import PromptsFile
from train.config.schema import keys_of
from train.config.stage import StageConfig

ROOT = Path(__file__).resolve().parents[2]
# Keys that a function or property of config/ hands on, by the name that others use.
HANDED_ON = {"data.select": "selection", "root": "dataset_dir"}

# Keys of a stage that more than one room reads, by reason. Take one off when its value is handed on; the list may shrink.
SHARED = {
    "names the stage in files, records and messages": ("stage", "output_dir"),
    "each random stream is a function of it": ("seed",),
    "length of the run: the plan is made from it, and the dry run must count without a dataset": ("epochs", "max_updates"),
    "shape of an update: the plan is made from it, its fingerprint says it, the dry run counts with it": (
        "batch.micro", "batch.effective", "batch.remainder", "batch.min_bucket",
    ),
    "a refusal names the path before anything is opened": (
        "model.init_from", "model.vae", "model.tokenizers", "data.path", "sampling.prompts", "model.train_text_encoders",
    ),
    "a switch of the engine whose limits, speed or memory the dry run tells": (
        "precision", "model.compile", "model.channels_last", "model.attention", "model.float8", "model.weights",
        "batch.split", "batch.determinism", "optimizer.name", "export.dtype",
    ),
    "how the weights were conditioned: training does it, the export says it, previews do the same": (
        "model.pooled_projection", "model.timestep_embedding", "model.context", "data.max_tokens",
    ),
    "what the network predicts: the loss reads it, the export says it, held-out loss and previews do the same": (
        "loss.prediction", "noise.zero_terminal_snr", "noise.timesteps",
    ),
    "the held-out loss reads the set as training does": ("data.crop_conditioning", "data.on_read_error"),
    "a stage that goes on asks whether its past would have been another": ("data.token_warmup_steps",),
    "bytes of a checkpoint: before the start, in the dry run, at the save": ("ema.decay", "checkpoint.keep"),
    "when something is due: the loop asks, its owner and the dry run prepare for it": (
        "checkpoint.every_steps", "checkpoint.background", "sampling.every_steps",
        "validation.every_steps", "validation.share",
    ),
    "accepted differences: a finished stage and a resume compare alike, a refusal checks the names": ("resume.accept",),
    "the curve's title and table": ("schedule.name", "schedule.unit"),
    "a note says how pictures weigh": ("loss.average",),
}  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict[str, set[str]]:
    return keyreads.reads(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("schema", [StageConfig, DatasetConfig, PromptsFile])
def test_no_key_is_dead(seen: dict[str, set[str]], schema: type) -> None:
    outside = "\n".join(path.read_text() for path in ROOT.glob("train/**/*.py") if path.parent.name != "config")
    unread = {key for key, one in keys_of(schema).items() if not seen.get(one.declared)}
    dead = {key for key in unread if key not in HANDED_ON or not re.search(rf"\b{HANDED_ON[key]}\b", outside)}
    assert dead == set(), "no room outside config/ reads them"


@pytest.mark.slow
def test_a_key_that_several_rooms_read_says_why(seen: dict[str, set[str]]) -> None:
    several = {key: sorted(seen.get(one.declared, ())) for key, one in keys_of(StageConfig).items()}
    several = {key: rooms for key, rooms in several.items() if len(rooms) > 1}
    listed = [key for keys in SHARED.values() for key in keys]
    assert len(listed) == len(set(listed))
    assert {key: rooms for key, rooms in several.items() if key not in listed} == {}, "hand the value on, or say why here"
    assert set(listed) - set(several) == set(), "read in one room only: take them off"


@pytest.mark.slow
def test_what_only_looks_like_a_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "train/config").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.mypy]\n")
    section = "from dataclasses import dataclass\n@dataclass\nclass Section:\n    mark: str = ''\n    other: str = ''\n    dead: str = ''\n"
    (tmp_path / "train/config/one.py").write_text(section)
    room = ("from train.config.one import Section\nclass Foreign:\n    dead: str = ''\n"
            "def f(section: Section, foreign: Foreign, many: list[Section]) -> list[str]:\n"
            "    section.dead = 'written'\n    held = section\n    return [held.mark, foreign.dead, *(one.other for one in many)]\n")  # fmt: skip
    (tmp_path / "train/room.py").write_text(room)
    for package in ("train", "train/config"):
        (tmp_path / package / "__init__.py").write_text("")
    found = keyreads.reads(tmp_path)
    assert found == {"train.config.one.Section.mark": {"room"}, "train.config.one.Section.other": {"room"}}
