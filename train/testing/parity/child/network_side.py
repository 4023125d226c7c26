"""The trainer's side of the networks: its loader and saver of single files, its encoders, one step of its loop."""

from __future__ import annotations

from typing import Any

import torch

from train.testing.parity.child import numbers_side
from train.testing.parity.child.halves import quick_halves
from train.testing.parity.child.options import of_notebook
from train.testing.parity.loader import Peer

Answer = tuple[dict[str, torch.Tensor], dict[str, Any]]


def load(peer: Peer, given: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The networks of a single file by the trainer's own loader; `tiny` shrinks the constants that it builds from."""
    util, unet, model = (peer.module(name) for name in ("sdxl_model_util", "sdxl_original_unet", "model_util"))
    if tiny := given["tiny"]:
        unet.MODEL_CHANNELS, unet.TIME_EMBED_DIM = tiny["channels"], 4 * tiny["channels"]
        model.VAE_PARAMS_CH = tiny["vae_channels"]
        original = util.CLIPTextConfig
        util.CLIPTextConfig = lambda **said: original(**{**said, **tiny["encoders"][str(said["hidden_size"])]})
    names = ("text_encoder", "text_encoder_2", "vae", "unet", "logit_scale", "info")
    found = util.load_models_from_sdxl_checkpoint(util.MODEL_VERSION_SDXL_BASE_V1_0, given["file"], "cpu", dtype)
    return dict(zip(names, found, strict=True))


def resave(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Opens our single file and writes it again by the trainer's saver, in fp16."""
    parts = load(peer, given, torch.float16)
    count = peer.module("sdxl_model_util").save_stable_diffusion_checkpoint(
        given["out"], parts["text_encoder"], parts["text_encoder_2"], parts["unet"], 0, 0, parts["info"], parts["vae"],
        parts["logit_scale"], {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, torch.float16,
    )  # fmt: skip
    return {}, {"tensors": int(count)}


def vae(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Mean and log-variance of scaled pictures [B,3,H,W], in fp32."""
    encoder = load(peer, given)["vae"].float().eval()
    with torch.no_grad():
        return {"moments": encoder.encode(tensors["scaled"]).latent_dist.parameters}, {}


def networks(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Encoders' outputs of `ids_*`, then the step of every run in `runs`: prediction, losses, gradients of `wanted`."""
    parts = load(peer, given)
    del parts["vae"]
    unet = parts["unet"]
    unet.set_use_sdpa(True)
    unet.enable_gradient_checkpointing()
    encoders = parts["text_encoder"].train(), parts["text_encoder_2"].train()
    for encoder in encoders:
        encoder.gradient_checkpointing_enable()
    for module in (*encoders, unet):
        module.requires_grad_(False)
    wanted = {}
    for network, name in given["wanted"]:
        wanted[f"{network}.{name}"] = _parameter(parts[network], name)
        wanted[f"{network}.{name}"].requires_grad_(True)
    with torch.no_grad():
        hidden_1, hidden_2, pooled = _encode(peer, encoders, tensors["ids_1"], tensors["ids_2"], given["tokenizers"])
    out = {"hidden_1": hidden_1, "hidden_2": hidden_2, "pooled": pooled}
    unet.train()
    for run in given["runs"]:
        chosen = {name: tensor[run["order"]] for name, tensor in tensors.items() if name.startswith("step.")}
        torch.set_num_threads(run["threads"])
        with quick_halves(getattr(torch, run["dtype"])):
            out |= _step(peer, encoders, unet, wanted, chosen, run, given["tokenizers"])
    return out, {}


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter:
    return module.get_parameter(name)


def _encode(peer: Peer, encoders: tuple[Any, Any], ids_1: torch.Tensor, ids_2: torch.Tensor, tokenizers: str) -> Any:
    """(hidden states of encoder 1, of encoder 2, pooled vector) by the trainer's own function."""
    if (peer.path / "library/strategy_sdxl.py").is_file():
        strategy = peer.module("strategy_sdxl")
        tokens = strategy.SdxlTokenizeStrategy(225, tokenizers)
        return strategy.SdxlTextEncodingStrategy().encode_tokens(tokens, [*encoders], [ids_1, ids_2])
    pair = peer.module("sdxl_train_util").load_tokenizers(of_notebook(tokenizer_cache_dir=tokenizers))
    return peer.module("train_util").get_hidden_states_sdxl(225, ids_1, ids_2, *pair, *encoders, None)


class Prepared(torch.nn.Module):
    """A network as accelerate prepares it: forward under autocast, outputs in fp32.

    Restated, because accelerate refuses fp16 without a GPU; what autocast casts is torch's matter.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.compute = module, dtype

    def __getattr__(self, name: str) -> Any:
        """Everything else is the network's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *given: Any, **named: Any) -> Any:
        """The network's outputs, floating ones in fp32."""
        with torch.autocast("cpu", self.compute, enabled=self.compute != torch.float32):
            return _in_fp32(self.module(*given, **named))


def _in_fp32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_in_fp32(one) for one in value)
    if hasattr(value, "keys"):
        for key in list(value.keys()):
            value[key] = _in_fp32(value[key])
    return value


def _step(
    peer: Peer,
    encoders: tuple[Any, Any],
    unet: Any,
    wanted: dict[str, torch.nn.Parameter],
    step: dict[str, torch.Tensor],
    run: dict[str, Any],
    tokenizers: str,
) -> dict[str, torch.Tensor]:
    """One micro-batch as sdxl_train.py's loop goes through it, in its words; `order` is undone in what comes out."""
    dtype = getattr(torch, run["dtype"])
    prepared = [Prepared(one, dtype) for one in (*encoders, unet)]
    for parameter in wanted.values():
        parameter.grad = None
    latents = step["step.latents"].to(dtype) * peer.module("sdxl_model_util").VAE_SCALE_FACTOR
    one, two, pooled = _encode(peer, (prepared[0], prepared[1]), step["step.ids_1"], step["step.ids_2"], tokenizers)
    sizes = step["step.sizes"]
    embedded = peer.module("sdxl_train_util").get_size_embeddings(sizes[:, :2], sizes[:, 2:4], sizes[:, 4:], "cpu").to(dtype)
    vector = torch.cat([pooled, embedded], dim=1).to(dtype)
    context = torch.cat([one, two], dim=2).to(dtype)
    with numbers_side.drawing(step["step.noise"], step["step.noise"][:, :, :1, :1], step["step.timesteps"]):
        noise, noisy, timesteps = peer.module("train_util").get_noise_noisy_latents_and_timesteps(
            of_notebook(), numbers_side.scheduler_of(peer), latents
        )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        predicted = prepared[2](noisy.to(dtype), timesteps, context, vector)
    losses = torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="none").mean([1, 2, 3])
    (losses.mean() * run["scale"]).backward()
    back = torch.tensor(run["order"]).argsort()
    gradients = {f"{run['name']}.gradient.{name}": p.grad.clone() / run["scale"] for name, p in wanted.items() if p.grad is not None}
    return {f"{run['name']}.prediction": predicted.detach()[back], f"{run['name']}.losses": losses.detach()[back], **gradients}
