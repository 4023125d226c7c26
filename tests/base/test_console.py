"""What a process leaves for the command that started it."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.base.console import EXIT_NOTE, noted_codes, run_cli


def test_every_process_leaves_its_code_by_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "code"
    assert noted_codes(note) == {}
    monkeypatch.setenv(EXIT_NOTE, str(note))
    for rank, code in ((11, 7), (2, 2)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            run_cli(lambda code=code: code)  # type: ignore[misc]
    assert list(noted_codes(note).items()) == [(2, 2), (11, 7)], "in the order of ranks"
    note.with_name("code.0").write_text("")  # killed while it wrote
    assert noted_codes(note) == {2: 2, 11: 7}
