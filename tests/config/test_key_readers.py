"""Every key is read where it acts, and a key that acts in more than one room says why (tests/support/keyreads.py: how it is seen)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import keyreads
import pytest

from train.config import derived
from train.config.dataset import DatasetConfig
from train.config.prompts import PromptsFile
from train.config.schema import keys_of
from train.config.stage import StageConfig

ROOT = Path(__file__).resolve().parents[2]
# Keys that a function of config/ hands on, by the name that others use. Those of a stage: `train/config/derived.py`.
HANDED_ON = {"root": "dataset_dir"}
RECORDS = ("config.derived", "config.stage")  # rooms that make a stage's records of its keys

# Keys of a stage that more than one room reads, by reason. Take one off when its value is handed on; the list may shrink.
SHARED = {
    "a command loads a stage and looks into its folder": ("output_dir",),
    "the arguments that an optimizer takes are a section of their own": ("optimizer.name",),
    "when something is due: the loop asks, its owner and the dry run prepare for it": (
        "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.background",
    ),
    "rules by pattern are handed on whole: which group a tensor is in and what its rate is are two questions of one list": (
        "optimizer.groups", "optimizer.groups[].lr", "optimizer.groups[].match",
    ),
    "the size of the export in the dry run": ("export.dtype", "export.merged"),
}  # fmt: skip
MOST_SHARED = 12
# Who loads a stage's config by itself and may read its keys; everybody else takes sections and records.
COMMANDS = ("run", "tools.stages", "tools.show.run")


@pytest.fixture(scope="module")
def seen() -> dict[str, set[str]]:
    return keyreads.reads(ROOT)


def outside(rooms: Iterable[str]) -> set[str]:
    return {room for room in rooms if not room.startswith("config.")}


@pytest.mark.slow
@pytest.mark.parametrize("schema", [StageConfig, DatasetConfig, PromptsFile])
def test_no_key_is_dead(seen: dict[str, set[str]], schema: type) -> None:
    text = "\n".join(path.read_text() for path in ROOT.glob("train/**/*.py") if path.parent.name != "config")
    unread = {key for key, one in keys_of(schema).items() if not outside(seen.get(one.declared, ()))}
    unread -= {key for key in unread if not seen.get(keys_of(schema)[key].declared, set()).isdisjoint(RECORDS)}
    dead = {key for key in unread if key not in HANDED_ON or not re.search(rf"\b{HANDED_ON[key]}\b", text)}
    assert dead == set(), "no room outside config/ reads them"


@pytest.mark.slow
def test_what_is_handed_on_is_used(seen: dict[str, set[str]]) -> None:
    records = [one for one in vars(derived).values() if dataclasses.is_dataclass(one) and one.__module__ == derived.__name__]
    fields = {f"{derived.__name__}.{one.__name__}.{field.name}" for one in records for field in dataclasses.fields(one)}  # type: ignore[union-attr]
    assert len(fields) > 50
    assert {field for field in fields if not outside(seen.get(field, ()))} == set(), "no room reads them: leave them out"
    shared = {field: sorted(outside(seen[field])) for field in sorted(fields) if len(outside(seen[field])) > 1}
    print(f"{len(shared)} of {len(fields)} values that are handed on go to more than one room")


@pytest.mark.slow
def test_a_key_that_several_rooms_read_says_why(seen: dict[str, set[str]]) -> None:
    several = {key: sorted(outside(seen.get(one.declared, ()))) for key, one in keys_of(StageConfig).items()}
    several = {key: rooms for key, rooms in several.items() if len(rooms) > 1}
    listed = [key for keys in SHARED.values() for key in keys]
    print(f"{len(several)} of {len(keys_of(StageConfig))} keys are read in more than one room, at most {MOST_SHARED}")
    assert len(listed) == len(set(listed)) <= MOST_SHARED
    assert {key: rooms for key, rooms in several.items() if key not in listed} == {}, "hand the value on, or say why here"
    assert set(listed) - set(several) == set(), "read in one room only: take them off"


@pytest.mark.slow
def test_only_run_config_and_commands_handle_a_whole_stage(seen: dict[str, set[str]]) -> None:
    """Others may take a record of a config that they load (of an earlier run, say), never a key or a section."""
    records = {name for name, one in vars(StageConfig).items() if isinstance(one, property)}
    found: dict[str, set[str]] = {}
    for use, rooms in seen.items():
        if use.startswith(f"{StageConfig.__module__}.StageConfig.") and (name := use.rpartition(".")[2]) not in records:
            for room in outside(rooms):
                if room not in COMMANDS and not room.startswith("tools.commands."):
                    found.setdefault(room, set()).add(name)
    assert found == {}


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
