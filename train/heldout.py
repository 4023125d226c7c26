"""Held-out loss of a stage under way: which images, how often, and where the record goes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from train.config import LossConfig, NoiseConfig, StageConfig
from train.dataset import Batch
from train.index import Index
from train.latents import ShardReader
from train.models import Networks
from train.noise import alphas_cumprod
from train.sampling import without_training
from train.signals import StopFlag
from train.text import TagTokenizer
from train.tracking import Tracker
from train.update import Diffusion, Place, image_losses
from train.validation import Making, chosen, evaluate

log = logging.getLogger("anix")


class HeldOut:
    """Owner of the images that never train. `measure` must be called by every process alike."""

    def __init__(
        self,
        config: StageConfig,
        index: Index,
        tokens: TagTokenizer,
        networks: Networks,
        place: Place,
        *,
        scaling: float,
    ) -> None:
        self.index = index.select(chosen(index.uids, config.validation.images))
        if config.validation.every_steps and len(self.index) == 0:
            log.warning("validation.share %g holds out no image of this selection", config.validation.share)
        self.reader = ShardReader(config.data.path)
        self.tokens, self.networks, self.place = tokens, networks, place
        self.micro = config.batch.micro
        self.making = Making(scaling, config.data.max_tokens, config.data.crop_conditioning)
        # Neither weights nor offset of the stage's own loss: the stages are compared with one measure.
        self.diffusion = Diffusion(
            alphas_cumprod(config.noise.zero_terminal_snr).to(place.device),
            NoiseConfig(),
            replace(LossConfig(), prediction=config.loss.prediction),
            config.precision,
            attention=config.model.attention,
        )

    def measure(self, step: int, update: int, tracker: Tracker, stop: StopFlag) -> None:
        """Measure the weights of now and write a line of validation.jsonl; no random state is touched."""
        if len(self.index) == 0:
            return
        with without_training((self.networks,)):
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
            )
        if record is not None:
            tracker.validation({"step": step, "update": update, **record})

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        return image_losses(self.networks, batch, self.diffusion)
