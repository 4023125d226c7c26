"""Pictures for the judges of a model with and without adapters: drawn here, from the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.config import shipped
from train.config.prompts import load_prompts
from train.model.adapters import reading
from train.observe.inference import draw, name_of, open_model
from train.observe.pictures import require_folder, write_pictures
from train.observe.runs import Picture, read_pictures


def with_and_without(
    model: str, loras: Sequence[str], prompts: Path | None, folder: Path, *, device: str, tokenizers: str | None = None
) -> dict[str, list[Picture]]:
    """{name: pictures} of `model`, then of it with `loras` (FILE or FILE:weight), written into folders below `folder`.

    Raises Halt: USAGE (no such path, a bad prompts file), MISMATCH (damaged files, an adapter of another model), CANNOT_WRITE.
    """
    settings = load_prompts(prompts or shipped.folder() / "prompts.yaml")
    pairs = [reading.given(text) for text in loras]
    for path, _ in pairs:  # before the first picture is drawn
        reading.file_of(path)
    whole = " + ".join([name_of(model), *(f"{path.stem} x {weight:g}" for path, weight in pairs)])
    found: dict[str, list[Picture]] = {}
    for name, place, added in ((name_of(model), folder / "without", ()), (whole, folder / "with", loras)):
        require_folder(place)
        opened = open_model(model, device=device, tokenizers=tokenizers, loras=added)
        write_pictures({"": draw(opened, settings)}, settings, place, model_name=opened.name, model_hash=opened.sha256)
        found[name] = read_pictures(place, [])
    return found
