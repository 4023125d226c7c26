"""The seams between stages: opening the predecessor, and finishing so that the next one can start."""

from __future__ import annotations

import logging
import os

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.config.stage import StageConfig, config_hash
from train.engine import export
from train.engine.refusals import refuse_source
from train.engine.restore import versions
from train.engine.session import Session
from train.model import networks, prediction
from train.model import source as model_source
from train.model.networks import Components
from train.model.source import LocalModel
from train.recipe import buckets
from train.storage import checkpoint

log = logging.getLogger("anix")


def open_source(config: StageConfig, *, with_vae: bool) -> tuple[LocalModel, Components]:
    """The model a stage starts from, checked, and its networks. The licence is settled before anything is spent."""
    faults.at("handoff")
    source = model_source.resolve(config.model)
    refuse_source(config.model, config.export, source)
    prediction.conversion(config, source)
    export.license_of(config.export, source)
    for note in (prediction.unstated(config, source), source.note):
        if note and os.environ.get("RANK", "0") == "0":
            log.info("%s", note)
    return source, networks.build(source, with_vae=with_vae)


def finish(config: StageConfig, session: Session, source: LocalModel, dataset_fingerprint: str) -> None:
    """Export, lineage, DONE; on the main process. Each step may be repeated after a kill.

    Raises Halt(STOPPED) when asked to stop under way: the next start makes the export, no update.
    """
    run, progress = session.run, session.run.progress
    if not run.place.is_main:
        return

    def poll() -> None:
        if run.stop.asked:
            raise Halt(ExitCode.STOPPED, "stopped by a signal during the export: the same command makes it anew")

    final = checkpoint.of_step(run.folder.path, progress.step)
    record = export.lineage_record(
        stage=config.stage,
        source=source,
        dataset_fingerprint=dataset_fingerprint,
        config_hash=config_hash(config),
        seed=config.seed,
        updates=progress.updates,
        images=progress.images,
        versions=versions(),
        license=export.license_of(config.export, source),
        weights_sha256=final.manifest.files["model.safetensors"].sha256,
        conditioning={
            "max_tokens": config.data.max_tokens,
            "context": config.model.context,
            "pooled_projection": config.model.pooled_projection,
            "timestep_embedding": config.model.timestep_embedding,
        },
        accepted=run.state["accepted"],
        conversion=prediction.conversion(config, source),
        extended=run.state["extended"],
    )
    export.export_stage(
        run.folder.path,
        final.path / "model.safetensors",
        source,
        record,
        config.export,
        prediction=config.loss.prediction,
        zero_terminal_snr=config.noise.zero_terminal_snr,
        timesteps=config.noise.timesteps,
        side_px=buckets.square_of(session.data.plan.buckets),
        average=final.path / "ema.safetensors" if "ema" in final.groups else None,
        poll=poll,
    )
    done = {"stage": config.stage, "step": progress.step}
    run.folder.write_done({**done, "updates": progress.updates, "images": progress.images})
