"""What a base is, from its files: size, objective, the words it knows, licence. Headers and configs only; nothing is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.stage import ExportConfig, ModelConfig
from train.model import prediction, source
from train.storage import hub, revision
from train.tools.new.facts import Base

# Marks of the bases whose words are known (configs/vocabularies), the more special name first.
_MARKS = (
    ("animagine40", r"animagine[ _-]?xl[ _-]?v?4|animagine[ _-]?4"), ("animagine30", r"animagine[ _-]?xl[ _-]?v?3[._-]?0|animagine[ _-]?3[._-]0"),
    ("animagine31", r"animagine[ _-]?xl[ _-]?v?3(?:[._-]?1)?|animagine[ _-]?3[._-]?1|animagine31"),
    ("noobai", r"noob[ _-]?ai|noob[ _-]?xl|\bnoob"), ("pony", r"\bpony|pony[ _-]?diffusion|ponyxl"), ("kohaku", r"kohaku"),
    ("illustrious", r"illustrious|\bilxl\b"),
)  # fmt: skip
_V_NAME = re.compile(r"v[ _-]?pred", re.IGNORECASE)
_CONDITIONING = {"max_tokens": "data.max_tokens", "context": "model.context", "pooled_projection": "model.pooled_projection",
                 "timestep_embedding": "model.timestep_embedding"}  # fmt: skip


def look(asked: str, path: Path, commit: str | None = None) -> Base:
    """The facts of the model at `path`. Raises the Halts of `source.resolve`."""
    model = source.resolve(ModelConfig(init_from=str(path)), hashed=False)
    unet, told = model.configs["unet"], prediction.stated(model)
    vocabulary, mark = _vocabulary(asked, path, model)
    name, zero = told.prediction, told.zero_terminal_snr
    if name is None and _V_NAME.search(path.name):
        name = "v"
    if name == "v" and zero is None and vocabulary == "noobai":
        zero = True  # its card: the v-prediction line has zero terminal SNR
    lineage = model.lineage or {}
    told_so = lineage.get("conditioning")
    conditioning = told_so if isinstance(told_so, dict) else {}
    return Base(
        path=str(path), asked=asked, side_px=int(unet.get("sample_size") or 128) * 8,
        standard=list(unet.get("block_out_channels", [])) == [320, 640, 1280],
        prediction=name, zero_terminal_snr=zero, vocabulary=vocabulary, vocabulary_mark=mark,
        license=source.stated_license(ExportConfig(), model), tokenizers=str(model.tokenizers.resolve()) if model.tokenizers else None,
        conditioning={key: conditioning[name] for name, key in _CONDITIONING.items() if name in conditioning}, commit=commit,
    )  # fmt: skip


def _vocabulary(asked: str, path: Path, model: source.LocalModel) -> tuple[str | None, str]:
    """(name of a shipped vocabulary, what says so): the record of a run, then names and titles, then the card."""
    lineage: Any = model.lineage or {}
    if isinstance(told := lineage.get("vocabulary"), str):
        return told, "its lineage"
    titles = [value for key, value in model.metadata.items() if key.startswith("modelspec.") and key != "modelspec.license"]
    titles += [str(one.get("title")) for one in (lineage.get("parent"), *(a.get("parent") for a in lineage.get("ancestors") or ())) if isinstance(one, dict)]
    card = path / "README.md" if path.is_dir() else path.with_name("README.md")
    texts = [("its name", f"{asked} {path.name}"), ("its title", " ".join(titles)), ("its card", _head(card))]
    for where, text in texts:
        for name, mark in _MARKS:
            if re.search(mark, text, re.IGNORECASE):
                return name, where
    if lineage:
        return "animagine31", "a run of this project, whose own words these are"
    return None, ""


def _head(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:20_000] if file.is_file() else ""
    except OSError:
        return ""


def find(asked: str) -> tuple[Path, str | None]:
    """(the base's place on this machine, its commit where it came from the hub), found here or fetched. Raises Halt saying which file to put where."""
    path = Path(asked)
    if path.exists():
        return path.resolve(), revision.commit_in(revision.record_beside(path))
    if hub.named(asked) is None:
        raise Halt(ExitCode.USAGE, f"--base {asked} does not exist here: give a .safetensors file, a diffusers folder, a finished run, or owner/name[@REVISION] of the hub")
    place, commit = hub.resolve(asked, "--base")
    return place.absolute(), commit  # not resolved: in the library's cache that is a name without an ending
