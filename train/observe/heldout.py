"""Held-out loss of a stage under way: which images, how often, and where the record goes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from train.base.errors import Halt
from train.base.files import replace_file
from train.base.signals import StopFlag
from train.config.derived import Watching
from train.config.stage import LossConfig, NoiseConfig, load_stage
from train.data.index import Index
from train.data.shards import ShardReader
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.diffusion.sampling import without_training
from train.model.networks import Networks
from train.model.text import TagTokenizer
from train.model.vae_file import LatentScale
from train.observe.tracker import Tracker
from train.observe.validation import Making, chosen, evaluate, fixed_timesteps, strata_of
from train.optim.collectives import Place

log = logging.getLogger("anix")
FILE = "held_out.json"  # in the run directory: which images never trained, and the strata of each


class HeldOut:
    """Owner of the images that never train. `measure` must be called by every process alike."""

    def __init__(
        self,
        watching: Watching,
        folder: str,
        index: Index,
        tokens: TagTokenizer,
        networks: Networks,
        place: Place,
        *,
        diffusion: Diffusion,
        scale: LatentScale,
        together: bool = False,
    ) -> None:
        self.index = index.select(chosen(index.uids, watching.held_out_images))
        share, told = watching.held_out_share, watching.trained_as
        if watching.held_out_every_steps and len(self.index) == 0:
            log.warning("validation.share %g holds out no image of this selection", share)
        if watching.held_out_every_steps and place.is_main and (leaky := leak(Path(watching.origin), share)):
            log.warning(leaky)
        self.reader = ShardReader(folder)
        self.tokens, self.networks, self.place = tokens, networks, place
        self.micro, self.together = watching.tile_images, together  # a forward is a collective
        self.skip_unreadable = watching.skip_unreadable
        self.making = Making(scale, told.max_tokens, watching.crop_conditioning)
        # Neither weights nor offset of the stage's own loss: the stages are compared with one measure.
        self.diffusion = replace(
            diffusion, noise=NoiseConfig(), loss=replace(LossConfig(), prediction=told.prediction)
        )

    def remember(self, run_path: Path) -> None:
        """Write which images are held out beside the run's other files."""
        if len(self.index):
            try:
                replace_file(run_path / FILE, members(self.index))
            except OSError as error:  # a report without strata is not worth the run
                log.warning("%s: cannot be written: %s", FILE, error)

    def measure(self, step: int, update: int, tracker: Tracker, stop: StopFlag) -> None:
        """Measure the weights of now and write a line of validation.jsonl; no random state is touched."""
        if len(self.index) == 0:
            return
        with self.diffusion.kernels(), without_training((self.networks,)):
            record = evaluate(
                self._loss_of,
                self.index,
                self.reader,
                self.tokens,
                self.making,
                micro=self.micro,
                device=self.place.device,
                rank=self.place.rank,
                world=self.place.world,
                stop=lambda: stop.asked,
                skip_unreadable=self.skip_unreadable,
                together=self.together,
            )
        if record is not None:
            if missing := record.get("unreadable"):
                first = self.index.named(int(np.flatnonzero(self.index.uids == np.uint64(int(missing[0], 16)))[0]))
                tracker.alert(f"held-out loss without {len(missing)} images whose latents cannot be read: {first} ...")
            tracker.validation({"step": step, "update": update, **record})

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        return image_losses(self.networks, batch, self.diffusion)


def leak(parent: Path, share: float) -> str | None:
    """What to say when a predecessor, from `parent` on, held out less than this stage's `share`, so that it trained on some of its images."""
    seen = set[Path]()
    while (file := _config_of(parent)) is not None and parent not in seen:
        seen.add(parent)
        try:
            before = load_stage([file])
        except Halt:
            return None  # another version's: nothing is known
        if (theirs := before.images.held_out_share) < share:
            return (
                f"{parent} was trained with validation.share {theirs:g}, this stage holds out "
                f"{share:g}: the held-out loss is measured on images that it saw. "
                "Give every stage the same share"
            )
        parent = Path(before.origin.path)
    return None


def _config_of(model: Path) -> Path | None:
    """The config that a run, its exported folder or its single file was made with; None where none lies there."""
    beside = model.parent / "config.yaml" if model.is_file() else model / "training.yaml"
    return next((file for file in (model / "config.yaml", beside) if file.is_file()), None)


def members(index: Index) -> str:
    """JSON text {uid: {"key", "strata"}}: what a report needs to compare two runs stratum by stratum."""
    times = fixed_timesteps(index.uids).tolist()
    found = {
        f"{uid:016x}": {"key": index.key(row), "strata": strata_of(index.labels(row), times[row])}
        for row, uid in enumerate(index.uids.tolist())
    }
    return json.dumps(found, ensure_ascii=False, indent=0) + "\n"
