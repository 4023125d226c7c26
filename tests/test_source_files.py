"""What lies in a source's folder beside sound pictures: every one is met, none stops the walk."""

from __future__ import annotations

from pathlib import Path

from train.prepare.files import walk
from train.prepare.records import Quarantine
from train.prepare.settings import SourceConfig


def source(path: Path) -> SourceConfig:
    return SourceConfig(name="s", adapter="sidecar", path=str(path))


def test_a_link_to_itself_is_reported_and_the_walk_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    (tmp_path / "b.png").symlink_to("c.png")
    (tmp_path / "c.png").symlink_to("b.png")
    (tmp_path / "d.png").write_bytes(b"x")
    found = list(walk(source(tmp_path), tmp_path))
    assert found[3] == "d.png"
    assert [entry.key for entry in found[:3] if isinstance(entry, Quarantine)] == ["s:a.png", "s:b.png", "s:c.png"]
