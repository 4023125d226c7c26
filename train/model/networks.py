"""The networks of one stage: loading, the one module that accelerate wraps, and what of it is trained.

Shape legend: B images, C latent channels, H W latent rows and columns, N text chunks, L context vectors, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from train.base.errors import ExitCode, Halt
from train.model import clip_tokens, text
from train.model.other_kinds import some
from train.model.sdxl import NETWORKS, STANDARD, canonical, canonical_name, folder_shapes, make
from train.model.source import LocalModel
from train.recipe import groups
from train.recipe.optimizer_state import state_bytes
from train.storage import tensor_files
from train.storage.state_files import to_tensor
from train.storage.tensor_files import Blob

if TYPE_CHECKING:
    from train.config.derived import Running
    from train.config.stage import GroupConfig

TimestepEmbedding = Literal["correct", "sd_scripts"]
_UNUSED = ("text_encoder.text_model.encoder.layers.11.", "text_encoder.text_model.final_layer_norm.")  # of SDXL itself: `_freeze_unused`
TOKENIZERS_KEY = "Name the model's own folder with tokenizer/ and tokenizer_2/ (model.tokenizers, or --tokenizers)"


@dataclass(frozen=True)
class Components:
    """Everything an SDXL model holds, in fp32 on the CPU. `vae` is None where only the denoiser is needed."""

    unet: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    vae: Any


def build(model: LocalModel, *, with_vae: bool = True, empty: bool = False) -> Components:
    """Networks with exactly the model's weights. Raises Halt(MISMATCH) naming tensors that are not finite.

    `empty`: U-Net and encoders without memory, for `receive` to fill.
    """
    tokenizers = text.load_tokenizers(model.tokenizers)
    refuse_vocabulary(model, tokenizers)
    wanted = [name for name in NETWORKS if with_vae or name != "vae"]
    networks = {
        name: _hollow(name, model.configs[name]).eval()
        if empty and name != "vae"
        else fill(name, model.configs[name], model.weights, model.path)
        for name in wanted
    }
    return Components(
        unet=networks["unet"],
        text_encoder=networks["text_encoder"],
        text_encoder_2=networks["text_encoder_2"],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        vae=networks.get("vae"),
    )


def refuse_vocabulary(model: LocalModel, tokenizers: Sequence[Any]) -> None:
    """Halt(MISMATCH) where a tokenizer gives ids that an encoder's embedding has no row for."""
    if model.tokenizers is None and (why := clip_tokens.unlike(model.configs)):
        raise Halt(ExitCode.MISMATCH, f"{model.path} carries no tokenizers, and the shipped ones do not go with it: {why}. {TOKENIZERS_KEY}")
    for tokenizer, encoder in zip(tokenizers, groups.NETWORKS[1:], strict=True):
        rows = model.configs[encoder].get("vocab_size", clip_tokens.ROWS)
        if len(tokenizer) > rows:
            raise Halt(
                ExitCode.MISMATCH,
                f"{model.tokenizers}: its tokenizer has {len(tokenizer)} tokens, {encoder} of {model.path} {rows} rows: "
                f"they are of two models. {TOKENIZERS_KEY}",
            )


def fill(network: str, config: Mapping[str, Any], weights: Mapping[str, Blob], whose: Path) -> nn.Module:
    """One network in fp32, evaluation mode, without random weights at any time. Raises Halt(MISMATCH) naming tensors that are not finite.

    What the file lacks is an error, not a surprise (KeyError; who opened it has proved that nothing is).
    """
    bad: list[str] = []

    def finite(name: str) -> torch.Tensor:
        tensor = to_tensor(weights[name])
        if not bool(torch.isfinite(tensor).all()):
            bad.append(tensor_files.named(name, weights[name]))
        return tensor

    module = holding(network, config, finite)
    if bad:
        raise Halt(
            ExitCode.MISMATCH, f"{whose} holds weights that are not finite in {len(bad)} tensors: {some(bad)}"
        )
    return module


def holding(network: str, config: Mapping[str, Any], tensor_of: Callable[[str], torch.Tensor]) -> nn.Module:
    """One network in evaluation mode that holds these tensors, by canonical name, themselves."""
    module = _hollow(network, config)
    keys = (key for key in module.state_dict() if not key.endswith("position_ids"))
    module.load_state_dict({key: tensor_of(canonical(network, key)) for key in keys}, strict=False, assign=True)
    return module.eval()


def _hollow(network: str, config: Mapping[str, Any]) -> nn.Module:
    """One network whose parameters have no memory; what is no parameter is there."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module: nn.Module = make(network, config)
    return module


Cut = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (a whole tensor, the parameter): the part of it that lies here


@torch.no_grad()
def receive(networks: Networks, model: LocalModel, device: torch.device, cut: Cut) -> None:
    """Fill networks that were built `empty`, on their way to the device: the main process reads, the others receive.

    Call it on all processes. One tensor at a time is whole beside what stays. The bits are those of `build`.
    Raises Halt(MISMATCH) on all of them when tensors are not finite; the main process names them.
    """
    main, bad = dist.get_rank() == 0, []
    kept = {name: buffer.clone() for name, buffer in networks.named_buffers()}
    networks.to_empty(device=device)
    for name, buffer in networks.named_buffers():
        buffer.copy_(kept[name])
    for name, parameter in networks.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if main:
            blob = model.weights[canonical_name(name)]
            tensor = to_tensor(blob)
            if not bool(torch.isfinite(tensor).all()):
                bad.append(tensor_files.named(canonical_name(name), blob))
            whole.copy_(tensor)
        dist.broadcast(whole, 0)
        parameter.copy_(cut(whole, parameter))
    count = torch.tensor([len(bad)], device=device)
    dist.broadcast(count, 0)
    if count.item():
        told = f": {some(bad)}" if main else ", as the main process says"
        raise Halt(ExitCode.MISMATCH, f"{model.path} holds weights that are not finite in {int(count)} tensors{told}")


class Networks(nn.Module):
    """U-Net and both text encoders as one module, so that DDP sees one model and syncs once per update."""

    def __init__(
        self,
        components: Components,
        *,
        train_text_encoders: bool,
        context: text.Context,
        pooled_projection: text.PooledProjection,
        timestep_embedding: TimestepEmbedding = "correct",
    ) -> None:
        super().__init__()
        self.unet = components.unet
        self.text_encoder = components.text_encoder
        self.text_encoder_2 = components.text_encoder_2
        self.train_text_encoders = train_text_encoders
        self.context = context
        self.pooled_projection = pooled_projection
        _shift_timesteps(self.unet, timestep_embedding)
        self.requires_grad_(False)
        self.unet.requires_grad_(True)
        if train_text_encoders:
            self.text_encoder.requires_grad_(True)
            self.text_encoder_2.requires_grad_(True)
            _freeze_unused(self.text_encoder)

    def forward(
        self,
        noisy_BCHW: torch.Tensor,
        timesteps_B: torch.Tensor,
        ids_1_BN77: torch.Tensor,
        ids_2_BN77: torch.Tensor,
        size_B6: torch.Tensor,
    ) -> torch.Tensor:
        """The U-Net's prediction [B,C,H,W] for noisy latents, timesteps, token ids and the six size numbers."""
        with torch.set_grad_enabled(self.train_text_encoders and torch.is_grad_enabled()):
            context_BLD, pooled_BP = text.encode(
                self.text_encoder,
                self.text_encoder_2,
                ids_1_BN77,
                ids_2_BN77,
                context=self.context,
                pooled_projection=self.pooled_projection,
            )
        added = {"text_embeds": pooled_BP, "time_ids": size_B6}
        return self.unet(
            noisy_BCHW, timesteps_B, encoder_hidden_states=context_BLD, added_cond_kwargs=added, return_dict=False
        )[0]


def _shift_timesteps(unet: Any, embedding: TimestepEmbedding) -> None:
    """Angles t * 10000^(-i / (half - shift)), half = 160 in SDXL; the config stays as it is, so what is exported says 0.

    The released run's trainer left the shift at its function's default of 1 (repaired there on 2024-03-15).
    """
    unet.time_proj.downscale_freq_shift = 1 if embedding == "sd_scripts" else unet.config.freq_shift


@contextmanager
def embedding_as(unet: Any, embedding: TimestepEmbedding) -> Iterator[None]:
    """The U-Net's timesteps embedded as named for a while; a training finds it as it left it."""
    before = unet.time_proj.downscale_freq_shift
    _shift_timesteps(unet, embedding)
    try:
        yield
    finally:
        unet.time_proj.downscale_freq_shift = before


def _freeze_unused(text_encoder: nn.Module) -> None:
    """Encoder 1 is read before its last layer, so that layer and the final norm get no gradient."""
    names = [name for name, _ in text_encoder.named_parameters() if "layers." in name]
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in names)
    for name, parameter in text_encoder.named_parameters():
        if f"layers.{last}." in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


def trained_parameters(networks: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, trained ones only, in module order."""
    return {canonical_name(n): p for n, p in networks.named_parameters() if p.requires_grad}


def freeze(networks: nn.Module, rules: Sequence[GroupConfig]) -> None:
    """Take out of what trains the tensors that `rules` give the rate 0. Raises Halt(USAGE) for a pattern that decides nothing."""
    trained = trained_parameters(networks)
    groups.decided(trained, rules)
    for name, parameter in trained.items():
        if not groups.trains(name, rules):
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class Saving:
    """What freezing the tensors of one pattern spares: values by network, bytes of optimizer state and of gradients."""

    values: dict[str, int]
    state_bytes: int
    gradient_bytes: int


def saves(running: Running) -> dict[str, Saving]:
    """Pattern of `optimizer.groups` to what it spares on SDXL's own size; none where nothing is frozen. Halt(USAGE) as `groups.decided`."""
    networks = groups.NETWORKS if running.trains_text else groups.NETWORKS[:1]
    shapes = {n: s for n, s in folder_shapes(STANDARD, networks=networks).items() if not n.startswith(_UNUSED)}
    found = {}
    for pattern, names in groups.decided(shapes, running.groups).items():
        if not groups.trains(names[0], running.groups):
            own = {network: sum(math.prod(shapes[n]) for n in names if n.startswith(f"{network}.")) for network in networks}
            state = state_bytes(running.optimizer, (shapes[name] for name in names))
            found[pattern] = Saving(own, state, sum(own.values()) * (2 if running.weights == "bf16" else 4))
    return found


def parameter_groups(networks: nn.Module, rules: Sequence[GroupConfig] = ()) -> dict[str, dict[str, nn.Parameter]]:
    """Trained parameters by group of the optimizer, those of the networks first; groups without any are left out."""
    grouped: dict[str, dict[str, nn.Parameter]] = {network: {} for network in groups.NETWORKS}
    for name, parameter in trained_parameters(networks).items():
        grouped.setdefault(groups.group_of(name, rules), {})[name] = parameter
    return {group: parameters for group, parameters in grouped.items() if parameters}


def overlay(networks: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy named fp32 tensors (a checkpoint's model file) over the loaded parameters, in place."""
    own = {canonical_name(name): parameter for name, parameter in networks.named_parameters()}
    foreign = sorted(set(tensors) - set(own))
    wrong = sorted(n for n, t in tensors.items() if n in own and t.shape != own[n].shape)
    if foreign or wrong:
        raise Halt(ExitCode.MISMATCH, f"{source} is of another model: foreign {foreign[:5]}, wrong shape {wrong[:5]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def cast_frozen(networks: Networks, dtype: torch.dtype) -> None:
    """Frozen encoders run in the compute dtype; trained weights stay fp32 masters."""
    if not networks.train_text_encoders:
        networks.text_encoder.to(dtype)
        networks.text_encoder_2.to(dtype)


def set_train_mode(networks: Networks) -> None:
    """Trained parts in train mode; refuses dropout, because it would draw from the global generator."""
    networks.eval()
    networks.unet.train()
    if networks.train_text_encoders:
        networks.text_encoder.train()
        networks.text_encoder_2.train()
    dropping = [name for name, probability in _dropouts(networks) if probability > 0]
    if dropping:
        raise Halt(ExitCode.MISMATCH, f"the model uses dropout in {dropping[:3]}: set it to 0 in its config.json")


def _dropouts(networks: nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in networks.named_modules():
        if isinstance(module, nn.Dropout):
            yield name, module.p
        config: Any = getattr(module, "config", None)
        if getattr(config, "attention_dropout", 0.0):
            yield name, float(config.attention_dropout)
