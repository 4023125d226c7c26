"""The seams between stages: opening the predecessor, and finishing so that the next one can start."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.config.derived import Origin
from train.config.stage import ModelConfig
from train.engine import usable
from train.engine.processes import Watch
from train.engine.refusals import refuse_source
from train.engine.session import Session
from train.model import networks, prediction
from train.model import source as model_source
from train.model.adapters import runs
from train.model.networks import Components
from train.model.source import LocalModel
from train.storage import checkpoint

log = logging.getLogger("anix")


def open_source(origin: Origin, watch: Watch | None = None) -> tuple[LocalModel, Components]:
    """The model a stage starts from, checked, and its networks. The licence is settled before anything is spent.

    `watch`: of the processes that open it together; a process by itself needs none. Several get networks that are
    empty, for the weights that the main process alone reads (`networks.receive`); an adapter is set into ones that are there.
    """
    faults.at("handoff")
    watch = watch or Watch(None, 0, 1)
    source = _hashed(origin.model, watch)
    if origin.adapter is not None:
        source = runs.continued(source)
    refuse_source(origin, source)
    prediction.conversion(origin.trained_as, source, convert=origin.convert)
    model_source.license_of(origin.export, source)
    for note in (prediction.unstated(origin.trained_as, source), source.note):
        if note and os.environ.get("RANK", "0") == "0":
            log.info("%s", note)
    # The VAE serves the pictures, which the main process alone draws.
    with_vae = origin.with_vae and watch.rank == 0
    return source, networks.build(source, with_vae=with_vae, empty=watch.world > 1 and origin.adapter is None)


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


def finish(session: Session) -> None:
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
    told = {key: run.state[key] for key in ("accepted", "extended")}  # this start's too, where the checkpoint is an earlier one's
    usable.write_all(run.folder.path, run.files, replace(final, state={**final.state, **told}), poll)
    done = {"stage": run.files.identity.stage, "step": progress.step}
    run.folder.write_done({**done, "updates": progress.updates, "images": progress.images})
