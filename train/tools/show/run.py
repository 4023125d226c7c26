"""Looking into a run: a checkpoint's verified manifest; the tiles, images, timesteps and losses of one update.

`step --recompute` replays the run from the checkpoint before the update, without writing anything into it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.storage.rundir import RunDir

if TYPE_CHECKING:
    from train.config.stage import StageConfig

RANK_OF_A_GUEST = 1  # not the main process: such a rank writes neither metrics nor checkpoints nor bad_step.json


def checkpoint(path: Path) -> dict[str, Any]:
    """Manifest and state of a `step-*` directory, or of a run's newest, after verifying every byte.

    Raises Halt(NO_CHECKPOINT) with the reason for one that is missing or damaged.
    """
    from train.storage import checkpoint, manifest, state_files

    folder = path
    if (path / "checkpoints").is_dir():
        names = [p for p in (path / "checkpoints").iterdir() if manifest.step_of(p.name) is not None]
        if not names:
            raise Halt(ExitCode.NO_CHECKPOINT, f"{path}: holds no checkpoint")
        folder = max(names, key=lambda p: manifest.step_of(p.name) or 0)
    if not folder.is_dir():
        raise Halt(ExitCode.NO_CHECKPOINT, f"{folder}: no such directory")
    try:
        loaded = checkpoint.open_checkpoint(folder.absolute())
    except manifest.Damaged as damage:
        raise Halt(ExitCode.NO_CHECKPOINT, f"{folder} must not be used: {damage}") from damage
    groups = {}
    for group in loaded.groups:
        specs = state_files.read_specs(folder / f"{group}.safetensors")
        dtypes = Counter(str(spec.dtype).removeprefix("torch.") for spec in specs.values())
        values = sum(math.prod(spec.shape) for spec in specs.values())
        groups[group] = {"tensors": len(specs), "values": values, "dtypes": dict(dtypes)}
    state = loaded.state
    return {
        "path": str(folder),
        "verified": True,
        "stage": state.get("stage"),
        "step": loaded.progress.step,
        "updates": loaded.progress.updates,
        "skipped": loaded.progress.skipped,
        "images": loaded.progress.images,
        "run_id": loaded.manifest.run_id,
        "permanent": loaded.manifest.permanent,
        "bytes": loaded.manifest.total_bytes,
        "groups": groups,
        "files": {name: record.sha256 for name, record in sorted(loaded.manifest.files.items())},
        "facts": state.get("facts", {}),
        "history_step_world": state.get("history", []),
        "scaler": state.get("scaler"),
        "config_hash": state.get("config_hash"),
        "versions": state.get("notes", {}).get("versions"),
    }


def step(path: Path, update: int, *, recompute: bool = False) -> dict[str, Any]:
    """Tiles, images, timesteps and losses of plan step `update` (counted from 0) of a run.

    Losses are those of `bad_step.json` if it speaks of this update; with `recompute` they are computed again.
    Raises Halt: USAGE for an update the run does not have, MISMATCH where data or model are not the run's any more.
    """
    from train.config.stage import load_stage
    from train.engine import handoff, setup
    from train.recipe.timesteps import Law

    settings = path / "config.yaml"
    if not settings.is_file():
        raise Halt(ExitCode.USAGE, f"{path} is not a run directory: it has no config.yaml")
    quiet = ("sampling.every_steps=0", "validation.every_steps=0", "data.workers=0", "tracking.wandb=disabled")
    config = load_stage([settings], [*quiet, "tracking.tensorboard=false", f"output_dir={path}"])
    feeding = config.owners.data
    source, components = handoff.open_source(config.origin)
    data = setup.open_data(config.images, source)
    if not 0 <= update < data.plan.total_updates:
        raise Halt(ExitCode.USAGE, f"--update {update}: the run has updates 0 to {data.plan.total_updates - 1}")
    tiles = data.plan.update(update)
    bad = read_json(path / "bad_step.json") or {}
    known = [slot["loss"] for slot in bad.get("slots", [])] if bad.get("step") == update else None
    report: dict[str, Any] = {"run": str(path), "update": update}
    losses = known
    if recompute:
        again = _recompute(path, config, source, components, data, update)
        losses = again.pop("losses")
        report |= again
        if known is not None:
            report["equal_to_bad_step"] = [a == b for a, b in zip(known, losses, strict=True)].count(True)
    metrics = _logged(path, update)
    slots: list[dict[str, Any]] = []
    times = Law.of(feeding.noise).timesteps(feeding.seed, tiles)
    for number, tile in enumerate(tiles):
        for row, uid, epoch in zip(tile.rows.tolist(), tile.uids.tolist(), tile.epochs.tolist(), strict=True):
            slot = {"tile": number, "bucket": f"{tile.width}x{tile.height}", "key": data.index.key(row)}
            slot |= {"uid": f"{uid:016x}", "epoch": epoch, "t": int(times[len(slots)])}
            slots.append(slot | ({"loss": losses[len(slots)]} if losses is not None else {}))
    return report | {"loss": metrics.get("loss"), "grad_norm": metrics.get("grad_norm"), "slots": slots}


def _recompute(path: Path, config: StageConfig, source: Any, components: Any, data: Any, update: int) -> dict[str, Any]:
    """Replay from the newest checkpoint at or before `update`; the losses of that update, in plan order."""
    from train.base import files
    from train.base.signals import StopFlag
    from train.engine import loop, session, setup
    from train.engine.step import compute_update

    machine = setup.open_machine(config.batch, config.launch)
    machine = replace(machine, place=replace(machine.place, rank=RANK_OF_A_GUEST))
    run = RunDir(path.absolute(), config.identity.stage, RANK_OF_A_GUEST)
    run.look_up_to = update
    model = setup.open_model(config.running, config.objective, machine, data.plan, source, components)
    running = session.open_session(config.owners, run, StopFlag(), machine, data, model)
    start = running.run.progress.step
    running.run.last_step = update
    with session.closing(running):
        loop.run_updates(running)
        tiles = data.plan.update(update)
        outcome = compute_update(
            running.trained.gradients,
            running.data.loader.next_update(),
            diffusion=running.trained.diffusion,
            scale=running.trained.scale,
            images=sum(len(tile.rows) for tile in tiles),
            tiles_here=len(running.data.loader.tiles),
            tiles_in_update=len(tiles),
            step=update,
            max_grad_norm=running.trained.max_grad_norm,
            stop_asked=lambda: False,
        )
    return {
        "replayed_from": start,
        "recomputed_loss": files.json_number(outcome.mean_loss),
        "recomputed_grad_norm": files.json_number(outcome.grad_norm),
        "losses": [files.json_number(loss) for loss in outcome.losses_G.tolist()],
    }


def _logged(path: Path, update: int) -> dict[str, Any]:
    """The line of metrics.jsonl that was written after this update, {} when there is none."""
    import json

    metrics = path / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if record.get("step") == update + 1:
            return dict(record)
    return {}
