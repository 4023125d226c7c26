"""Sample pictures on disk: PNGs that say how they were made, and grids of them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.files import replacing
from train.config.derived import TrainedAs
from train.config.prompts import OUR_MARKS, SAMPLER_TITLES, Prompt, PromptsFile
from train.diffusion.sampling import RECIPE, captions_text, sample_file
from train.recipe import captions
from train.recipe.captions import plain_tags

NUMBERED = re.compile(r"\d\d+(-ema)?\.png")
CELL_PX = 384  # longest side of a picture in a grid
GAP_PX = 8


def write_previews(
    variants: Mapping[str, Any],
    settings: PromptsFile,
    run_dir: str | Path,
    update: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    model_name: str,
    trained_as: TrainedAs = RECIPE,
    stop: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Sample every prompt and write `samples/step-XXXXXXXX/NN.png` and `grid.png`; returns the files written.

    `variants` maps a suffix to components: {"": raw} or {"": raw, "-ema": averaged}, which stand side by side in
    the grid. A preview that was stopped writes what is finished. Main process only; touches no random state.
    """
    faults.at("sample", update)
    rows: dict[str, list[Image.Image]] = {}
    for suffix, components in variants.items():
        rows[suffix] = sample_file(components, settings, device=device, dtype=dtype, trained_as=trained_as, stop=stop)
    folder = Path(run_dir) / "samples" / f"step-{update:08d}"
    return write_pictures(rows, settings, folder, model_name=model_name, update=update)


def require_folder(folder: str | Path) -> None:
    """Make the folder and a file in it, before anything is drawn. Raises Halt(CANNOT_WRITE) naming --out."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"--out {folder}: sample pictures cannot be written: {error}") from error


def write_pictures(
    rows: Mapping[str, Sequence[Image.Image]],
    settings: PromptsFile,
    folder: str | Path,
    *,
    model_name: str,
    model_hash: str = "",
    update: int | None = None,
) -> list[Path]:
    """`NN<suffix>.png` for each row's pictures and `grid.png`. Raises Halt(CANNOT_WRITE) naming the folder.

    Pictures that an earlier call with more prompts left in the folder go: reports would take them for this model's.
    """
    folder = Path(folder)
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, images in rows.items():
            for number, (image, prompt) in enumerate(zip(images, settings.prompts, strict=False)):
                shown = captions_text(prompt.text, settings.quality_prefix)
                facts = replace(prompt, width=image.width, height=image.height)
                record = parameters_text(
                    facts, shown, settings, model_name=model_name + suffix, model_hash=model_hash, update=update
                )
                files.append(save_png(image, folder / f"{number:02d}{suffix}.png", record))
        shown_rows = [list(images) for images in rows.values() if images]
        if shown_rows:
            files.append(save_png(grid(shown_rows), folder / "grid.png", ""))
        for old in _of_earlier_calls(folder, files):
            old.unlink()
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{folder}: sample pictures cannot be written: {error}") from error
    return files


def _of_earlier_calls(folder: Path, written: Sequence[Path]) -> list[Path]:
    """Numbered pictures in the folder that were made here, as their text says, but not now."""
    others = sorted(path for path in set(folder.glob("*.png")) - set(written) if NUMBERED.fullmatch(path.name))
    return [path for path in others if _made_here(path)]


def _made_here(path: Path) -> bool:
    """Whether the text ends as ours does: others write "parameters" as well, and number their files too."""
    try:
        with Image.open(path) as image:
            text = str(image.info.get("parameters", ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever it is, it is not ours
        return False
    return all(mark in text.rpartition("\n")[2] for mark in OUR_MARKS)


def save_png(image: Image.Image, path: Path, parameters: str) -> Path:
    """Write one PNG under a temporary name and rename it; `parameters` is the text that A1111 reads back."""
    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters)  # becomes iTXt (UTF-8) where Latin-1 does not do
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def grid(rows: Sequence[Sequence[Image.Image]], columns: int | None = None) -> Image.Image:
    """One picture of rows of pictures, each fitted into a cell of at most CELL_PX, white between them.

    A single row is broken into rows of `columns` (default: about a square).
    """
    if len(rows) == 1:
        one, width = rows[0], columns or max(1, round(len(rows[0]) ** 0.5 + 0.3))
        rows = [one[start : start + width] for start in range(0, len(one), width)]
    small = [[_fit(image) for image in row] for row in rows]
    cell_w = max(image.width for row in small for image in row)
    cell_h = max(image.height for row in small for image in row)
    across, down = max(len(row) for row in small), len(small)
    canvas = Image.new("RGB", (across * (cell_w + GAP_PX) + GAP_PX, down * (cell_h + GAP_PX) + GAP_PX), "white")
    for y, row in enumerate(small):
        for x, image in enumerate(row):
            left = GAP_PX + x * (cell_w + GAP_PX) + (cell_w - image.width) // 2
            top = GAP_PX + y * (cell_h + GAP_PX) + (cell_h - image.height) // 2
            canvas.paste(image, (left, top))
    return canvas


def _fit(image: Image.Image) -> Image.Image:
    scale = CELL_PX / max(image.size)
    if scale >= 1:
        return image
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def parameters_text(
    prompt: Prompt,
    text: str,
    settings: PromptsFile,
    *,
    model_name: str,
    model_hash: str = "",
    update: int | None = None,
) -> str:
    """The text A1111 keeps under "parameters" in a PNG: prompt, negative prompt, one line of settings."""
    facts = {
        "Steps": settings.steps,
        "Sampler": SAMPLER_TITLES[settings.sampler],
        "CFG scale": f"{settings.guidance:g}",
        **({"CFG rescale": f"{settings.guidance_rescale:g}"} if settings.guidance_rescale else {}),
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
    }
    if model_hash:
        facts["Model hash"] = model_hash[:10]
    facts["Model"] = "".join(" " if character in ',:"\n' else character for character in model_name)
    facts["RNG"] = "Philox"
    facts["Noise index"] = prompt.index
    if update is not None:
        facts["Update"] = update
    line = ", ".join(f"{key}: {value}" for key, value in facts.items())
    # On one line each: the tokenizer takes a line break for a space, readers of this text for the next part.
    # The negative prompt as it is encoded; `text` is given so.
    wanted, unwanted = (" ".join(part.split()) for part in (text, captions.join(plain_tags(settings.negative))))
    negative = [f"Negative prompt: {unwanted}"] if unwanted else []
    return "\n".join([wanted, *negative, line])
