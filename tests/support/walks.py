"""Which rooms of the house a start, an update and a save walk through: calls from file to file, by `sys.setprofile`."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import train

HOUSE = str(Path(train.__file__).parent) + "/"


@dataclass
class Walk:
    """Calls that entered another file of `train/` than the nearest caller's: (from, to) -> how often."""

    moves: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def files(self) -> set[str]:
        """Every file that was entered or left."""
        return {name for pair in self.moves for name in pair}

    def __str__(self) -> str:
        return f"{len(self.files)} files, {len(self.moves)} pairs, {self.moves.total()} moves"


class Walker:
    """Follows a run in the main thread: its start up to the first update, its third update, its last save."""

    def __init__(self) -> None:
        self.start, self.update, self.save = Walk(), Walk(), Walk()
        self._now: Walk | None = self.start
        self._updates = 0

    def follow(self, run: Callable[[], Any]) -> Any:
        """What `run()` returns. Rooms are loaded before, so that loading them counts for nothing."""
        for name in ("loop", "session", "setup", "handoff", "trial", "processes", "refusals"):
            importlib.import_module(f"train.engine.{name}")
        sys.setprofile(self._event)
        try:
            return run()
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not path.startswith(HOUSE) or event not in ("call", "return"):
            return
        if path.endswith("engine/loop.py"):
            self._phase(name, event)
        if event == "call" and self._now is not None and name != "<module>":
            caller = frame.f_back
            while caller is not None and not caller.f_code.co_filename.startswith(HOUSE):
                caller = caller.f_back
            if caller is not None and caller.f_code.co_filename != path:
                self._now.moves[caller.f_code.co_filename.removeprefix(HOUSE), path.removeprefix(HOUSE)] += 1

    def _phase(self, name: str, event: str) -> None:
        if name == "run_updates":
            self._now = None
        elif name == "after_update" and event == "return":
            self._updates += 1
            self._now = self.update if self._updates == 2 else None  # the third: those before open what they keep
        elif name == "save":
            if event == "call":
                self.save = Walk()
            self._now = self.save if event == "call" else None
