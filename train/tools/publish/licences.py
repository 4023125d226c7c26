"""Whether what was made may be passed on under the licence that it states. Our reading of licences, no legal advice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.model import layouts, source
from train.observe.runs import read_run
from train.storage import revision, tensor_files

# Short names that a hub knows, by the other ways of writing them. What is missing here is passed on by its own words.
_KNOWN = {
    "apache-2.0": ("apache 2.0", "apache license 2.0"), "mit": ("mit license",), "bsd-3-clause": (), "bsd-2-clause": (), "isc": (), "unlicense": (),
    "cc0-1.0": ("cc0", "cc0 1.0"), "cc-by-4.0": ("cc by 4.0",), "cc-by-sa-4.0": ("cc by-sa 4.0",), "cc-by-nc-4.0": ("cc by-nc 4.0",),
    "openrail++": ("creativeml open rail++-m", "openrail++-m", "creativeml openrail++-m"), "creativeml-openrail-m": ("creativeml open rail-m",),
}  # fmt: skip
_SHORT = {other: short for short, others in _KNOWN.items() for other in (short, *others)}
# What is made of these may be under another licence; every other one goes on to what is made from it.
_LETS_GO = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "isc", "unlicense", "cc0-1.0")
_FAIPL_SHORT, _FAIPL_TEXT = "faipl-1.0-sd", "https://freedevproject.org/faipl-1.0-sd/"


def short(license: str) -> str:
    """One name for each licence, however it is written."""
    name = " ".join(license.lower().split())
    if name.startswith(_FAIPL_SHORT) or name == layouts.FAIPL.lower():
        return _FAIPL_SHORT
    return _SHORT.get(name, name)


def fields(license: str) -> dict[str, str]:
    """What a page's head says of it."""
    name = short(license)
    if name in _KNOWN:
        return {"license": name}
    link = {"license_link": _FAIPL_TEXT} if name == _FAIPL_SHORT else {}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+]+", "-", name).strip("-"), **link}


def of_run(run: Path) -> str:
    """The licence that a finished run's result is published under. Raises the Halts of `refuse_conflicts`."""
    init_from = read_run(run).config.get("model.init_from")
    return refuse_conflicts(read_json(run / "lineage.json") or {}, str(init_from) if init_from else None)


def refuse_conflicts(record: Mapping[str, Any], init_from: str | None) -> str:
    """The licence of a run's result. Halt(MISMATCH) naming each ancestor whose licence goes on and is another; USAGE where none is stated.

    `record`: its lineage. `init_from`: what it started from, asked where it still lies on this machine.
    """
    own = str(record.get("license") or "").strip()
    if not own:
        raise Halt(ExitCode.USAGE, "lineage.json states no licence: set export.license, remove the run's DONE and start the stage again, which only makes its files anew")
    found = {
        f"{who} is under {stated}": None for who, stated in _inherited(record, init_from)
        if short(stated) != short(own) and short(stated) not in _LETS_GO
    }  # fmt: skip
    if found:
        raise Halt(
            ExitCode.MISMATCH,
            f"{record.get('stage')} states {own}, but {'; '.join(found)}, which goes on to what is made from it: nothing is published. "
            "Set export.license to that licence, remove the run's DONE and start the stage again, which only makes its files anew",
        )
    return own


def _inherited(record: Mapping[str, Any], init_from: str | None) -> Iterator[tuple[str, str]]:
    """(whose, licence) of everything that the result was made from, as far as it is known here."""
    ancestors = record.get("ancestors")
    for one in (*(ancestors if isinstance(ancestors, list) else ()), record):
        if not isinstance(one, Mapping):
            continue
        if one is not record and one.get("license"):
            yield f"stage {one.get('stage')}", str(one["license"])
        several = one.get("parents")
        for parent in (one.get("parent"), *(several if isinstance(several, list) else ())):
            if isinstance(parent, Mapping):
                title = str(parent.get("title") or "")
                stated = parent.get("license") or source.license_of_family(title)
                if stated:
                    yield title or str(parent.get("stage")), str(stated)
    if init_from and (stated := _of_start(Path(init_from))) is not None:
        yield Path(init_from).name, stated


def _of_start(path: Path) -> str | None:
    """The licence of a folder or single file that a stage started from; of a run lineage tells."""
    if (beside := revision.license_beside(path)) is not None:
        return beside
    try:
        if (path / "model_index.json").is_file():
            return layouts.metadata_of_folder(path).get("modelspec.license")
        if path.is_file():
            return tensor_files.open_file(path).metadata.get("modelspec.license")
    except (Halt, OSError):
        return None  # it is gone, or another model lies there now: nothing is known of it then
    return None
