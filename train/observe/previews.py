"""Preview pictures of a stage under way: the raw weights and, with EMA, the average beside them.

The main process draws them; the others wait for it outside any collective, so no timeout runs. Nothing random is
shared with the training, and the weights are only read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from train.base.errors import Halt
from train.base.signals import StopFlag
from train.config.derived import Watching
from train.config.prompts import PromptsFile, load_prompts
from train.diffusion.objective import Diffusion
from train.model.adapters import bases, merging
from train.model.adapters.merging import Weighted
from train.model.adapters.reading import Adapter
from train.model.networks import Components, Networks, holding
from train.model.sdxl import canonical
from train.model.source import LocalModel
from train.observe.pictures import write_previews
from train.observe.tracker import Tracker
from train.optim.collectives import Place
from train.optim.ema import Ema
from train.recipe.groups import NETWORKS
from train.storage.state_files import PRECISIONS

log = logging.getLogger("anix")
Gathered = Mapping[str, Mapping[str, torch.Tensor]]  # "model" and, with an average, "ema": whole tensors by canonical name


class Previews:
    """Owner of the prompts and the VAE; `write` makes the pictures of one update. A failure is only reported."""

    def __init__(
        self, watching: Watching, components: Components, networks: Networks, place: Place, diffusion: Diffusion,
        source: LocalModel,
    ) -> None:  # fmt: skip
        self.watching, self.components, self.networks, self.place = watching, components, networks, place
        self.kernels, self.dtype, self.configs = diffusion.kernels, PRECISIONS[diffusion.precision], source.configs
        self.settings: PromptsFile | None = None
        self.loras = _opened(watching.preview_loras, source) if place.is_main else []
        if watching.prompts is not None:
            self.settings = load_prompts(watching.prompts)  # a bad file is refused before the first update

    def write(
        self, update: int, ema: Ema | None, tracker: Tracker, stop: StopFlag, gathered: Gathered | None = None
    ) -> None:
        """`samples/step-N/`; the rank-0 process only. `gathered`: what the networks hold where they lie in shards."""
        if self.settings is None or not self.place.is_main:
            return
        try:
            with self.kernels():
                files = write_previews(
                    self._variants(ema) if gathered is None else self._twins(gathered),
                    self.settings,
                    self.watching.identity.output_dir,
                    update,
                    device=self.place.device,
                    dtype=self.dtype,
                    model_name=" + ".join([self.watching.identity.stage, *(f"{adapter.path.stem} x {weight:g}" for adapter, weight in self.loras)]),
                    trained_as=self.watching.trained_as,
                    stop=lambda: stop.asked,
                )
            tracker.images(update, files)
        except Exception as error:  # pictures are never worth the run
            tracker.alert(f"no previews at update {update}: {type(error).__name__}: {error}")

    def _variants(self, ema: Ema | None) -> Mapping[str, Any]:
        vae = self.components.vae.to(self.place.device)
        parts = {
            "unet": self.networks.unet,
            "text_encoder": self.networks.text_encoder,
            "text_encoder_2": self.networks.text_encoder_2,
        }
        shown = {"": parts}
        if ema is not None:
            shown["-ema"] = {name: with_average(module, name, ema) for name, module in parts.items()}
        return {suffix: replace(self.components, vae=vae, **{name: with_adapters(module, name, self.loras) for name, module in found.items()})
                for suffix, found in shown.items()}  # fmt: skip

    def _twins(self, gathered: Gathered) -> Mapping[str, Any]:
        """Whole networks beside those in shards, as autocast would see them; "" and, with an average, "-ema"."""
        dtype, vae = self.dtype, self.components.vae.to(self.place.device)
        model, average = gathered["model"], gathered.get("ema")
        variants = {"": model} if average is None else {"": model, "-ema": {**model, **average}}
        return {
            suffix: replace(self.components, vae=vae, **{
                name: with_adapters(holding(name, self.configs[name], tensors.__getitem__).to(self.place.device, dtype), name, self.loras)
                for name in NETWORKS
            })
            for suffix, tensors in variants.items()
        }  # fmt: skip


def _opened(given: Sequence[str], source: LocalModel) -> list[tuple[Adapter, float]]:
    """The adapters of `sampling.loras`, for the model that the stage starts from. Raises Halt naming the key."""
    try:
        found, told = bases.opened(list(given), source)
    except Halt as halt:
        raise Halt(halt.code, f"sampling.loras: {halt.message}") from halt
    for line in told:
        log.warning("sampling.loras: %s", line)
    return found


@torch.no_grad()
def with_adapters(module: Any, name: str, adapters: Weighted) -> Any:
    """A copy of one network with the adapters added to its weights; the network itself where they reach nothing of it."""
    reached = merging.reached(adapters)
    places = {inner: canonical(name, inner.replace(".base_layer.", ".")) for inner, _ in module.named_parameters()}  # peft's wrapping of an adapter in training
    if reached.isdisjoint(places.values()):
        return module
    twin = copy.deepcopy(module)
    for inner, parameter in twin.named_parameters():
        if places[inner] in reached:
            parameter.copy_(merging.added(places[inner], parameter.detach().float().cpu(), adapters))
    return twin


@torch.no_grad()
def with_average(module: Any, name: str, ema: Ema) -> Any:
    """A copy of one network that holds the averaged weights; the network itself where it is not trained."""
    averages = {inner: ema.average.get(canonical(name, inner)) for inner, _ in module.named_parameters()}
    if not any(average is not None for average in averages.values()):
        return module
    twin = copy.deepcopy(module)
    for inner, parameter in twin.named_parameters():
        average = averages[inner]
        if average is not None:
            parameter.copy_(average)
    return twin
