"""The seams between stages: opening the predecessor, and finishing so that the next one can start."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.config.derived import Identity, Origin
from train.config.stage import ModelConfig
from train.data.index import Index
from train.engine import export
from train.engine.processes import Watch
from train.engine.refusals import refuse_source
from train.engine.restore import versions
from train.engine.session import Session
from train.model import networks, prediction
from train.model import source as model_source
from train.model.adapters import bases, runs, training
from train.model.networks import Components
from train.model.source import LocalModel
from train.optim import schedule_free
from train.recipe import buckets
from train.storage import checkpoint, tensor_files

log = logging.getLogger("anix")
COUNTED_IMAGES, SHOWN_TAGS = 100_000, 2_000  # for the tag frequencies of an adapter's file


def open_source(origin: Origin, watch: Watch | None = None) -> tuple[LocalModel, Components]:
    """The model a stage starts from, checked, and its networks. The licence is settled before anything is spent.

    `watch`: of the processes that open it together; a process by itself needs none.
    """
    faults.at("handoff")
    source = _hashed(origin.model, watch or Watch(None, 0, 1))
    if origin.adapter is not None:
        source = runs.continued(source)
    refuse_source(origin, source)
    prediction.conversion(origin.trained_as, source, convert=origin.convert)
    model_source.license_of(origin.export, source)
    for note in (prediction.unstated(origin.trained_as, source), source.note):
        if note and os.environ.get("RANK", "0") == "0":
            log.info("%s", note)
    return source, networks.build(source, with_vae=origin.with_vae)


def _hashed(settings: ModelConfig, watch: Watch) -> LocalModel:
    """The model with its hashes, for which the main process alone reads the files: 14 GB, which all would read at once.

    A hash that the config pins is held against every process's own files (`model_source.look`).
    """
    opened: list[LocalModel] = []

    def digests() -> str:
        opened.append(model_source.resolve(settings))
        return json.dumps({"sha256": opened[0].sha256, "vae_sha256": opened[0].vae_sha256})

    said = watch.from_main("hashes of the model", digests)
    return opened[0] if opened else replace(model_source.resolve(settings, hashed=False), **json.loads(said))


def finish(
    identity: Identity, origin: Origin, session: Session, source: LocalModel, dataset_fingerprint: str
) -> None:
    """Export, lineage, DONE; on the main process. Each step may be repeated after a kill.

    Raises Halt(STOPPED) when asked to stop under way: the next start makes the export, no update.
    """
    run, progress, told = session.run, session.run.progress, origin.trained_as
    if not run.place.is_main:
        return

    def poll() -> None:
        if run.stop.asked:
            raise Halt(ExitCode.STOPPED, "stopped by a signal during the export: the same command makes it anew")

    final = checkpoint.of_step(run.folder.path, progress.step)
    record = export.lineage_record(
        stage=identity.stage,
        source=source,
        dataset_fingerprint=dataset_fingerprint,
        config_hash=identity.hash,
        seed=identity.seed,
        updates=progress.updates,
        images=progress.images,
        versions=versions(),
        license=model_source.license_of(origin.export, source),
        weights_sha256=final.manifest.files["model.safetensors"].sha256,
        conditioning={
            "max_tokens": told.max_tokens,
            "context": told.context,
            "pooled_projection": told.pooled_projection,
            "timestep_embedding": told.timestep_embedding,
        },
        accepted=run.state["accepted"],
        conversion=prediction.conversion(told, source, convert=origin.convert),
        extended=run.state["extended"],
    )
    if schedule_free.is_one(session.trained.optimizer):
        record["weights"] = "the average of schedule-free AdamW"
    if origin.adapter is not None:
        record["adapter"] = {**training.record(origin.adapter), "base": bases.known_as(source.base or source)}
    _export(identity, origin, session, source, record, final, poll)
    done = {"stage": identity.stage, "step": progress.step}
    run.folder.write_done({**done, "updates": progress.updates, "images": progress.images})


def _export(
    identity: Identity, origin: Origin, session: Session, source: LocalModel, record: Mapping[str, Any],
    final: checkpoint.Loaded, poll: Callable[[], None],
) -> None:  # fmt: skip
    """The files of a stage: the model, or what was trained beside it, or both."""
    run, told, adapter = session.run, origin.trained_as, origin.adapter
    trained, average = final.path / "model.safetensors", final.path / "ema.safetensors" if "ema" in final.groups else None
    side_px, timesteps = buckets.square_of(session.data.plan.buckets), session.data.law.ends
    if adapter is not None:
        metadata = export.metadata_of(record, origin.export, told.prediction, timesteps, side_px or 1024, told.flow_shift)
        metadata |= _said_of_training(session.data.loader.dataset.index, identity, run.progress.updates)
        export.export_adapter(
            run.folder.path, trained, source, record, origin.export, adapter, metadata=metadata, average=average, poll=poll
        )
        if not origin.export.merged:
            return
        source, average = runs.summed(source, tensor_files.open_file(trained).blobs, adapter, trained), None
    export.export_stage(
        run.folder.path,
        trained if adapter is None else None,
        source,
        record,
        origin.export,
        prediction=told.prediction,
        zero_terminal_snr=told.zero_terminal_snr,
        flow_shift=told.flow_shift,
        timesteps=timesteps,
        side_px=side_px,
        average=average,
        poll=poll,
    )


def _said_of_training(index: Index, identity: Identity, updates: int) -> dict[str, str]:
    """The `ss_*` fields of sd-scripts that programs show of a training: how often each tag was trained, under the stage's name.

    Of very many images every n-th is counted. No path and no file's name goes along.
    """
    every = -(-len(index) // COUNTED_IMAGES)
    found: Counter[str] = Counter()
    for i in range(0, len(index), max(every, 1)):
        fixed, flex = index.caption(i)[:2]
        found.update([*fixed, *flex])
    common = {tag: count * max(every, 1) for tag, count in found.most_common(SHOWN_TAGS)}
    return {
        "ss_tag_frequency": json.dumps({identity.stage: common}, ensure_ascii=False),
        "ss_dataset_dirs": json.dumps({identity.stage: {"n_repeats": 1, "img_count": len(index)}}),
        "ss_num_train_images": str(len(index)),
        "ss_steps": str(updates),
        "ss_seed": str(identity.seed),
    }
