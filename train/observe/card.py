"""The model card that lies in an exported folder: what the model is, what programs that open it cannot know, what made it.

Made from the record alone, so that whoever has the files can make it again. docs/clients.md has the longer story.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STANDARD_SCALING = 0.13025  # of SDXL's VAE; what a program takes for a single file


def text(
    record: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    prediction: str,
    zero_terminal_snr: bool,
    vae: Mapping[str, Any],
    head: str = "",
    usage: Sequence[str] = (),
    sections: Sequence[str] = (),
) -> str:
    """README.md of the folder. `metadata` is the single file's, `vae` the VAE's config.

    Of a page that is published `head`, how it is opened (`usage`) and what stands before the licence (`sections`) are its own.
    """
    title, stage = (plain(value) for value in (metadata.get("modelspec.title", record["stage"]), record["stage"]))
    objective = {"v": "v", "flow": "the velocity of rectified flow, noise - picture"}.get(prediction, "the noise (epsilon)") + (" under zero terminal SNR" if zero_terminal_snr else "")
    about = [plain(metadata[key]) for key in ("modelspec.description", "modelspec.author") if metadata.get(key)]
    parts = [
        head or _head(record, metadata),
        f"# {title}",
        *about,
        f"SDXL, stage `{stage}`, {record.get('updates', '?')} updates over {record.get('images', '?')} images. It predicts {objective}. "
        f"Trained at {plain(metadata.get('modelspec.resolution', '1024x1024'))} and sizes of that area.",
        "## Open it",
        *(usage or opening("path/to/this/folder", stage)),
        *_bullets(_cannot_know(prediction, zero_terminal_snr, vae)),
        *_bullets(_trained_otherwise(record.get("conditioning"))),
        *sections,
        "## Licence",
        f"{plain(record['license'])}. It goes on to whatever is made from these weights.",
        "## What made it",
        "\n".join(_lineage(record)),
        "`lineage.json` is the whole record, `training.yaml` the settings of the stage.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def opening(where: str, stage: str) -> tuple[str, ...]:
    """How a model is opened that lies at `where`, a folder or a page."""
    return (
        f'```python\nfrom diffusers import StableDiffusionXLPipeline\n\npipe = StableDiffusionXLPipeline.from_pretrained("{where}")\n```',
        f"ComfyUI and Forge open the single file, `{stage}.safetensors`.",
    )


def _head(record: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The block that a hub reads. JSON's strings are YAML's."""
    tags = ["stable-diffusion-xl", "text-to-image", *(tag.strip() for tag in metadata.get("modelspec.tags", "").split(",") if tag.strip())]
    fields = {
        "license": "other", "license_name": plain(record["license"]), "library_name": "diffusers",
        "pipeline_tag": "text-to-image", "tags": tags,
    }  # fmt: skip
    return "\n".join(["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---"])


def _cannot_know(prediction: str, zero_terminal_snr: bool, vae: Mapping[str, Any]) -> Iterator[str]:
    """What stands in this folder and is unknown to a program that opens the single file."""
    if prediction == "v":
        marks = "`v_pred` and `ztsnr`" if zero_terminal_snr else "`v_pred`"
        yield f"The single file is marked {marks}, which ComfyUI and Forge read."
        yield "InvokeAI takes every SDXL single file for one that predicts epsilon: give it this folder, or set the prediction type to `v_prediction` by hand."
        yield "diffusers' `from_single_file` takes SDXL's own scheduler (epsilon) unless `config=` names this folder."
    if prediction == "flow":
        yield "Single files have no mark for rectified flow: a program takes this one for a model that predicts epsilon and draws noise. Only the metadata say it (`modelspec.prediction_type: flow`)."
        yield "ComfyUI: behind the checkpoint loader a node ModelSamplingSD3 with the shift named in `scheduler/scheduler_config.json` (`flow_shift`)."
        yield "diffusers: this folder as it is; its scheduler is `DPMSolverMultistepScheduler` with flow sigmas, for `FlowMatchEulerDiscreteScheduler` does not run in SDXL's pipeline."
    if zero_terminal_snr:
        yield "Samplers must start at the last timestep (`timestep_spacing: trailing`), as this folder's scheduler does."
    scaling, shift = vae.get("scaling_factor", STANDARD_SCALING), vae.get("shift_factor")
    if scaling != STANDARD_SCALING or shift:
        told = f"scaling_factor {scaling}" + (f" and shift_factor {shift}" if shift else "")
        yield f"Its VAE has {told}; programs that open the single file take {STANDARD_SCALING} and no shift."


def _trained_otherwise(conditioning: Any) -> Iterator[str]:
    """Conventions of the training that no program shares."""
    known = conditioning if isinstance(conditioning, Mapping) else {}
    if known.get("pooled_projection") == "sd_scripts":
        yield "Trained with the text projection untransposed, as the original trainer does; every program computes it transposed."
    if known.get("timestep_embedding") == "sd_scripts":
        yield "Trained with the timestep embedding's frequencies shifted by one, as the original trainer did; every program computes them unshifted."


def _bullets(lines: Iterator[str]) -> list[str]:
    found = [f"- {line}" for line in lines]
    return ["\n".join(found)] if found else []


def _lineage(record: Mapping[str, Any]) -> Iterator[str]:
    """A table, this stage last."""
    yield "| stage | started from | updates | images | weights |"
    yield "|---|---|---|---|---|"
    ancestors = record.get("ancestors")
    for one in (*(ancestors if isinstance(ancestors, list) else []), record):
        if isinstance(one, Mapping):  # from a file that anybody may have written
            parent = one.get("parent")
            start = parent.get("title") if isinstance(parent, Mapping) else None
            cells = (one.get("stage"), start, one.get("updates"), one.get("images"), str(one.get("weights_sha256") or "")[:12])
            yield f"| {' | '.join(plain(cell).replace('|', '/') for cell in cells)} |"


def plain(value: Any) -> str:
    """One line of text, which can neither end a table nor start markup."""
    shown = "" if value is None else str(value)
    return "".join(" " if c in "\r\n\t`<>" else c for c in shown if c.isprintable() or c in "\r\n\t").strip()
