"""Held-out loss of any model files on one prepared set: the same images, noise and timesteps, differences in pairs.

A model is measured under its own conventions (prediction, tokens, context, crop numbers), one after the other.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from train.base.errors import ExitCode, Halt
from train.config.derived import Owners
from train.config.stage import LossConfig, NoiseConfig
from train.data.index import Index
from train.data.selection import held_out, once, refuse_missing_shards
from train.data.shards import ShardReader
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Diffusion, image_losses
from train.diffusion.sampling import TrainedAs
from train.model import networks, single_file, text
from train.model.source import LocalModel, vae_identity
from train.model.vae_file import LatentScale
from train.observe import anymodel
from train.observe.inference import name_of, open_device
from train.observe.validation import Making, chosen, evaluate, fixed_timesteps, mean_and_interval, strata_of, t_975
from train.storage.state_files import PRECISIONS
from train.tools.report.heldout import in_order

VERSION = 1

log = logging.getLogger("anix")


@dataclass(frozen=True)
class Images:
    """What is measured: held-out images of a selection, the strata of each by its uid."""

    index: Index
    selection: str
    share: float
    strata: Mapping[str, list[str]]
    timesteps: Mapping[str, int]


@dataclass(frozen=True)
class Running:
    """How a forward runs."""

    device: torch.device
    precision: str
    micro: int
    tokenizers: str | None  # of single files, which carry none


def measure(
    models: Sequence[str],
    data: Path,
    *,
    select: str | None = None,
    share: float | None = None,
    images: int = 256,
    device: str = "auto",
    precision: str | None = None,
    micro: int = 4,
    tokenizers: str | None = None,
    loras: Sequence[str] = (),
) -> dict[str, Any]:
    """The record: each model's mean loss with its standard error, in all and by stratum, every image's loss, and the
    differences from the first model on the same images. loras: adapters (FILE or FILE:weight), with which the first model is
    measured once more.

    Raises Halt: USAGE (no such model, selection or image), MISMATCH (damaged model or set).
    """
    paths = named(models)
    for path in paths.values():  # the last one's mistake before the first one's hours
        anymodel.open_any(path, hashed=False)
    anymodel.with_adapters(anymodel.open_any(next(iter(paths.values())), hashed=False), loras)
    stages = {name: anymodel.stage_of(path) for name, path in paths.items()}
    found = open_images(data, select, share, images, stages)
    notes = _what_was_seen(found, stages)
    place = open_device(device)
    running = Running(place, precision or ("fp16" if place.type == "cuda" else "fp32"), micro, tokenizers)
    measured = {name: _measured(name, path, stages[name], data, found, running, notes) for name, path in paths.items()}
    if loras:
        first = next(iter(paths))
        name = " + ".join([first, *(Path(given.rpartition("/")[2]).name for given in loras)])
        measured[name] = _measured(name, paths[first], stages[first], data, found, running, notes, loras)
    first, *others = measured
    changes = [_change(first, other, measured, found, notes) for other in others]
    return {
        "version": VERSION,
        "data": str(data),
        "selection": found.selection,
        "share": found.share,
        "images": len(found.index),
        "precision": running.precision,
        "models": measured,
        "changes": [change for change in changes if change is not None],
        "notes": notes,
    }


def named(models: Sequence[str]) -> dict[str, Path]:
    """Name to path: `NAME=PATH`, or a path under its own name. Raises Halt(USAGE) for a name given twice."""
    paths: dict[str, Path] = {}
    for one in models:
        # A path of that very name comes first: a run may be called lr=1e-5.
        name, equals, path = one.partition("=") if not Path(one).exists() else (one, "", "")
        if not equals:
            name, path = name_of(one), one
            name = one if name in paths else name
        if name in paths:
            raise Halt(ExitCode.USAGE, f"{one}: two models are called {name}; call one NAME=PATH")
        paths[name] = Path(path)
    return paths


def open_images(
    data: Path, select: str | None, share: float | None, count: int, stages: Mapping[str, Owners | None]
) -> Images:
    """The images to measure: those that every model of a known `validation.share` held out; all where none did."""
    configs = [config for config in stages.values() if config is not None]
    selection = select or _selection(data, configs)
    index = Index.open(data, selection)
    if share is None:
        share = min((c.images.held_out_share for c in configs if c.images.held_out_share), default=0.0)
    held = once(index.select(held_out(index.uids, share, index.images))) if share else once(index)
    held = held.select(chosen(held.uids, count))
    if len(held) == 0:
        raise Halt(ExitCode.USAGE, f"--share {share:g} holds out no image of selection {selection} of {data}: raise it")
    refuse_missing_shards(str(data), held.shards())
    names = [f"{uid:016x}" for uid in held.uids.tolist()]
    times = dict(zip(names, fixed_timesteps(held.uids).tolist(), strict=True))
    strata = {name: strata_of(held.labels(row), times[name]) for row, name in enumerate(names)}
    return Images(held, selection, share, strata, times)


def _selection(data: Path, configs: Sequence[Owners]) -> str:
    known = sorted(path.stem.removeprefix("index_") for path in data.glob("index_*.arrow"))
    wanted = [config.images.held_out_selection for config in configs]
    fitting = [name for name in reversed(wanted) if name in known] or (known if len(known) == 1 else [])
    if known and not fitting:
        raise Halt(ExitCode.USAGE, f"--data {data} has the selections {', '.join(known)}: name one of them with --select")
    return fitting[0] if fitting else ""  # what is wrong with the folder says who opens it


def _what_was_seen(found: Images, stages: Mapping[str, Owners | None]) -> list[str]:
    """What is not known, or known to be wrong, about these images being new to the models."""
    if not found.share:
        return [
            f"no model says which images it never saw (validation.share), and --share names none: {len(found.index)} images "
            f"of selection {found.selection} are measured, seen in training or not"
        ]
    unknown = [name for name, config in stages.items() if config is None]
    seen = [name for name, config in stages.items() if config is not None and config.images.held_out_share < found.share]
    notes = [f"{', '.join(unknown)}: no config lies beside it, so whether it saw these images is not known"] if unknown else []
    if seen:
        notes.append(f"{', '.join(seen)}: trained with a validation.share below {found.share:g}, so it may have seen some of these images")
    return notes


def _measured(
    name: str, path: Path, stage: Owners | None, data: Path, found: Images, running: Running, notes: list[str],
    loras: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """One model's losses. Its networks are gone afterwards."""
    local = anymodel.open_any(path, tokenizers=running.tokenizers if path.is_file() else None)
    local = anymodel.with_adapters(local, loras)
    single_file.tell(local.path, local.notes)
    if found.index.vae_id and vae_identity(local) != found.index.vae_id:
        notes.append(f"{name}: its VAE is another than the one that the set's latents were made with")
    told = anymodel.conventions(path, local)
    crop = stage.observers.crop_conditioning if stage else "actual"
    log.info("%s: %d images", name, len(found.index))
    losses = _losses(local, told, Making(LatentScale.of(local.configs["vae"]), told.max_tokens, crop), data, found, running)
    gc.collect()  # before the next model is loaded: SDXL's networks hold cycles
    return {
        "path": str(path),
        "sha256": local.sha256,
        **vars(told),
        "crop_conditioning": crop,
        **summed(losses, found.strata),
        "losses": losses,
    }


def _losses(
    local: LocalModel, told: TrainedAs, making: Making, data: Path, found: Images, running: Running
) -> dict[str, float]:
    """Every image's loss by uid: plain noise, no weights, in the model's own prediction."""
    model = networks.Networks(
        networks.build(local, with_vae=False),
        train_text_encoders=False,
        context=told.context,
        pooled_projection=told.pooled_projection,
        timestep_embedding=told.timestep_embedding,
    )
    networks.cast_frozen(model, PRECISIONS[running.precision])
    model.to(running.device).eval()
    loss = LossConfig(prediction=cast(Any, told.prediction))
    alphas_T = alphas_cumprod(told.zero_terminal_snr).to(running.device)
    diffusion = Diffusion(alphas_T, NoiseConfig(), loss, running.precision)
    record = evaluate(
        lambda batch: image_losses(model, batch, diffusion),
        found.index,
        ShardReader(str(data)),
        text.load_tag_tokenizer(local.tokenizers),
        making,
        micro=running.micro,
        device=running.device,
    )
    assert record is not None, "nobody was told to stop"
    return dict(record["losses"])


def summed(values: Mapping[str, float], strata: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{"images", "loss", "se", "interval", "strata": {name: the same}} over the images of `values`."""
    groups: dict[str, list[float]] = {}
    for uid, value in values.items():
        for name in strata[uid]:
            groups.setdefault(name, []).append(value)
    by_stratum = {name: _with_error(mean_and_interval(groups[name])) for name in in_order(set(groups))}
    return {**_with_error(mean_and_interval(list(values.values()))), "strata": by_stratum}


def _with_error(one: dict[str, Any]) -> dict[str, Any]:
    """Mean and interval with the standard error that the interval was made from."""
    interval = one["interval"]
    return {**one, "se": None if interval is None else interval / t_975(one["images"] - 1)}


def _change(
    before: str, after: str, measured: Mapping[str, Mapping[str, Any]], found: Images, notes: list[str]
) -> dict[str, Any] | None:
    """What each image's loss does from one model to the other; None where their losses are of two noise schedules.

    An epsilon loss is a(t) times the v loss of the same output: eps' - eps = sqrt(a) (v' - v). So a pair of the two
    kinds is compared as epsilon losses.
    """
    one, two = measured[before], measured[after]
    if one["zero_terminal_snr"] != two["zero_terminal_snr"]:
        notes.append(
            f"{before} -> {after}: no difference is shown, for only one of them has zero terminal SNR: the same timestep "
            "is another amount of noise"
        )
        return None
    kinds = {one["prediction"], two["prediction"]}
    if len(kinds) > 1 and "flow" in kinds:
        notes.append(
            f"{before} -> {after}: no difference is shown, for only one of them predicts flow: the same timestep is another "
            "amount of noise"
        )
        return None
    if len(kinds) > 1:
        notes.append(f"{before} -> {after}: predict {one['prediction']} and {two['prediction']}; compared as epsilon losses, a(t) x the v loss")
    a, b = (_as_epsilon(model, found) if len(kinds) > 1 else model["losses"] for model in (one, two))
    return {"from": before, "to": after, **summed({uid: b[uid] - a[uid] for uid in a}, found.strata)}


def _as_epsilon(model: Mapping[str, Any], found: Images) -> dict[str, float]:
    alphas_T = alphas_cumprod(bool(model["zero_terminal_snr"]))
    factor = {uid: float(alphas_T[t]) if model["prediction"] == "v" else 1.0 for uid, t in found.timesteps.items()}
    return {uid: loss * factor[uid] for uid, loss in model["losses"].items()}


def as_text(record: Mapping[str, Any]) -> str:
    """The table that the script prints: mean ± standard error (images)."""
    seen = f"held out with share {record['share']:g}" if record["share"] else "of all"
    lines = [f"{record['data']}, selection {record['selection']}: {record['images']} images {seen}, {record['precision']}; mean ± standard error (images)"]
    for name, model in record["models"].items():
        ends = ", zero terminal SNR" if model["zero_terminal_snr"] else ""
        lines += [f"{name} ({model['prediction']}{ends})", *_rows(model, signed=False)]
    for change in record["changes"]:
        lines += [f"{change['from']} -> {change['to']}, image by image", *_rows(change, signed=True)]
    return "\n".join([*lines, *(f"note: {note}" for note in record["notes"])])


def _rows(one: Mapping[str, Any], *, signed: bool) -> list[str]:
    return [f"  {name:<28}{_cell(found, signed)}" for name, found in {"all": one, **one["strata"]}.items()]


def _cell(found: Mapping[str, Any], signed: bool) -> str:
    spread = "" if found["se"] is None else f" ± {found['se']:.5f}"
    return f"{found['loss']:{'+' if signed else ''}.5f}{spread} ({found['images']})"
