"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from train.base.files import file_sha256, replace_file, replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, "one")
    with pytest.raises(KeyError), replacing(path) as tmp:
        raise KeyError(tmp.write_text("half"))
    assert path.read_text() == "one"
    with replacing(path) as tmp:
        assert not tmp.exists()
        tmp.write_text("two")
        assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "two"


def test_what_a_killed_writer_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_text("left over")
    with replacing(tmp_path / "a") as tmp, open(tmp, "xb") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_peers_may_clear_away_what_they_have_finished(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    with replacing(path, peers=True) as mine, replacing(path, peers=True) as theirs:
        assert mine != theirs
        theirs.write_text("same")
        mine.write_text("same")
        mine.unlink()  # a peer that has finished sweeps
    assert path.read_text() == "same"
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "other", peers=True):
        pass  # nobody wrote anything


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", b"x" * 300_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"x" * 300_000).hexdigest()
