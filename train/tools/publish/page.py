"""The card of what is published, made from lineage and the run's own records; docs/clients.md has the longer story."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.base.files import read_json
from train.model import layouts
from train.observe import card
from train.observe.card import plain
from train.observe.runs import Run, finite, read_run
from train.storage import tensor_files
from train.tools.publish import licences
from train.tools.publish.gather import Publication
from train.tools.report.heldout import in_order


def text_of_run(found: Publication, to: str) -> str:
    """README.md of a published model or adapter; `to` is the page's name."""
    run, record = read_run(found.source), read_json(found.source / "lineage.json") or {}
    if found.kind == "model":
        metadata = layouts.metadata_of_folder(found.source / "model")
        vae, usage = read_json(found.source / "model/vae/config.json") or {}, card.opening(to, found.stage)
    else:
        metadata = dict(tensor_files.open_file(found.source / f"{found.stage}-lora.safetensors").metadata)
        vae, usage = {}, _opening_of_adapter(found, record, to)
    return card.text(
        record, metadata, prediction=metadata.get("modelspec.prediction_type", "epsilon"),
        zero_terminal_snr=bool(run.config.get("noise.zero_terminal_snr")), vae=vae, usage=usage,
        head=_head(found, [tag.strip() for tag in metadata.get("modelspec.tags", "").split(",") if tag.strip()]),
        sections=[*_samples(found), *_data(run, record), *_held_out(run)],
    )  # fmt: skip


def _head(found: Publication, tags: Sequence[str] = ()) -> str:
    """The block that a hub reads. JSON's strings are YAML's."""
    fields: dict[str, Any] = dict(licences.fields(found.license))
    if found.kind == "dataset":
        fields |= {"tags": ["anix", *tags]}
    else:
        own = ["lora"] if found.kind == "adapter" else []
        fields |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["stable-diffusion-xl", "text-to-image", *own, *tags]}
        if found.pictures:
            fields["thumbnail"] = found.pictures[0][0]
    return "\n".join(["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---"])


def _opening_of_adapter(found: Publication, record: Mapping[str, Any], to: str) -> tuple[str, ...]:
    parent = record.get("parent")
    title = plain(parent.get("title")) if isinstance(parent, Mapping) else ""
    said = record.get("adapter")
    adapter = said if isinstance(said, Mapping) else {}
    base = adapter.get("base")
    digest = plain(base.get("sha256"))[:12] if isinstance(base, Mapping) else ""
    file = next((name for name in found.files if name.endswith("pytorch_lora_weights.safetensors")), None)
    lines = [
        f"An adapter ({plain(adapter.get('type'))}, rank {plain(adapter.get('rank'))}) for the base `{title}`"
        f"{f', whose weights have sha256 {digest}...' if digest else ''}; with another base pictures differ."
    ]
    if file is not None:
        folder, _, name = file.rpartition("/")
        where = f', subfolder="{folder}"' if folder else ""
        lines.append(
            "```python\nfrom diffusers import StableDiffusionXLPipeline\n\npipe = StableDiffusionXLPipeline.from_pretrained(\"path/to/the/base\")\n"
            f'pipe.load_lora_weights("{to}"{where}, weight_name="{name}")\n```'
        )
    lines.append(f"ComfyUI and Forge load `{found.stage}-lora.safetensors`.")
    return tuple(lines)


def _samples(found: Publication) -> Iterator[str]:
    if not found.pictures:
        return
    yield "## Samples"
    rows = ["| | prompt | seed, settings |", "|---|---|---|"]
    for name, picture, told in found.pictures:
        settings = ", ".join(f"{key.lower()} {plain(picture.facts[key])}" for key in ("Seed", "Steps", "CFG scale", "Sampler", "Size") if key in picture.facts)
        rows.append(f"| ![]({name}) | {_cell(picture.prompt) if told else 'not shown: its set has captions like it'} | {_cell(settings)} |")
    yield "\n".join(rows)
    yield "Drawn by the model; no picture of its training set is shown here or lies beside."


def _data(run: Run, record: Mapping[str, Any]) -> Iterator[str]:
    """How much this stage saw. Of the stages before, lineage's table tells; no caption and no source is named."""
    kept, seen = _images_of(run.path), record.get("images")
    yield "## Data"
    said = f"Stage `{plain(record.get('stage'))}` was shown {plain(seen)} images"
    if kept:
        passes = f", {float(seen) / kept:.3g} passes over its set of {kept:,}" if isinstance(seen, int) else ""
        said += f"{passes}{f', with {len(run.held):,} more held out' if run.held else ''}"
    print_ = str(record.get("dataset_fingerprint") or "")[:12]
    yield f"{said}{f' (fingerprint `{plain(print_)}`)' if print_ else ''}. Neither its pictures nor its captions are published here."


def _images_of(run: Path) -> int:
    file = run / "selection.safetensors"
    blobs = tensor_files.open_file(file).blobs if file.is_file() else {}
    return blobs["uid"].shape[0] if "uid" in blobs else 0


def _held_out(run: Run) -> Iterator[str]:
    """The table by stratum of the last measurement, beside the first."""
    if not run.validation:
        return
    first, last = run.validation[0], run.validation[-1]
    yield "## Held-out loss"
    names = in_order(set(last["strata"]))
    rows = [f"| | at update {plain(first.get('update'))} | at update {plain(last.get('update'))} |", "|---|---|---|"]
    rows.append(f"| all | {_loss(first)} | {_loss(last)} |")
    rows += [f"| {_cell(name.replace('/', ' '))} | {_loss(first['strata'].get(name, {}))} | {_loss(last['strata'].get(name, {}))} |" for name in names]
    yield "\n".join(rows)
    yield "On images that no stage trains on, with fixed noise and timesteps: mean ± half-width of the 95 % interval over images (number of images)."


def _loss(record: Mapping[str, Any]) -> str:
    loss, interval = record.get("loss"), record.get("interval")
    if not finite(loss):
        return "–"
    return f"{loss:.4f}{f' ± {interval:.4f}' if finite(interval) else ''} ({record.get('images', '?')})"


def _cell(text: str) -> str:
    return plain(text).replace("|", "/")


def text_of_set(found: Publication) -> str:
    """README.md of a published prepared set."""
    said = read_json(found.source / "dataset.json") or {}
    select = said.get("select")
    rows = ["| stage | images |", "|---|---|"]
    for stage, one in sorted(select.items()) if isinstance(select, dict) else ():
        counts = one.get("counts") if isinstance(one, dict) else None
        rows.append(f"| {_cell(str(stage))} | {_cell(str(counts[-1][1])) if isinstance(counts, list) and counts else '?'} |")
    latents = said.get("latents")
    made = latents if isinstance(latents, dict) else {}
    parts = [
        _head(found),
        f"# {plain(found.stage)}",
        "A prepared training set: labels, buckets and latents. The pictures themselves are not part of it.",
        "\n".join(rows) if len(rows) > 2 else "",
        f"Latents: {plain(made.get('images'))} images, {plain(made.get('dtype'))}, VAE `{plain(made.get('vae_id'))[:12]}`. "
        f"Fingerprint `{plain(said.get('fingerprint'))}`.",
        "## Use it",
        "Fetch the whole page into a folder and name that in `data.path`; a model with the same VAE is needed (`model.vae`).",
        "## Licence",
        plain(found.license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
