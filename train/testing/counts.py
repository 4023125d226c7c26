"""Counts FLOPs and bytes kept for backward without a GPU: the real SDXL modules on the meta device, no arithmetic done.

The numbers in `train.model.memory` come from here, and tests hold them to the last digit. Also the tiny U-Net on which
speed options are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # diffusers means the number of heads here
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET: dict[str, Any] = SDXL_UNET | {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 2, 4),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "norm_num_groups": 8,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's topology and conditioning at 32 to 64 channels, seeded, on the CPU."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**TINY_UNET)


def unet_inputs(
    unet: Any, batch: int, width_px: int, height_px: int, context: int, *, text_grad: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of one U-Net call, on its device. text_grad: context and pooled vector carry gradient."""
    config, device = unet.config, next(unet.parameters()).device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(batch, 4, height_px // 8, width_px // 8, **options),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch, context, config.cross_attention_dim, **options).requires_grad_(
            text_grad
        ),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, **options).requires_grad_(text_grad),
            "time_ids": torch.full((batch, 6), 512.0, device=device, dtype=dtype),
        },
    }


def tiny_inputs(batch: int = 2) -> dict[str, Any]:
    """Inputs of `tiny_unet` on the CPU in fp32: latents of 16x8, five context vectors with gradient."""
    torch.manual_seed(1)
    unet = tiny_unet()
    return unet_inputs(unet, batch, 64, 128, 5, text_grad=True, dtype=torch.float32)


def loss_and_gradients(unet: Any, kwargs: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean square of the output, and every parameter's gradient plus that of the context, as copies."""
    context = kwargs["encoder_hidden_states"]
    unet.zero_grad(set_to_none=True)
    context.grad = None
    loss = unet(**kwargs).sample.square().mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return loss.item(), found | {"context": context.grad.clone()}


def sdxl_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The full-size U-Net on the meta device: shapes and autograd, no storage."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET).to(dtype).train()


def count_flops(forward: Callable[[], torch.Tensor], *, backward: bool) -> int:
    """FLOPs (multiply and add count 2; products, convolutions, attention) of one forward, or forward + backward."""
    with FlopCounterMode(display=False) as counter:
        out = forward()
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


class _FlashLike(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: q, k, v, the output and one log-sum-exp per query."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = q.shape
        out = q.new_empty(batch, length, heads, width).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _out, _lse = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class LikeAutocast(TorchFunctionMode):
    """Casts as 16-bit autocast on a GPU would, because autocast does nothing on the meta device.

    Linear, convolution and attention in 16 bit (weights cast, the copy kept); norms in fp32.
    """

    low = torch.bfloat16

    def __init__(self, active: bool = True) -> None:
        super().__init__()
        self.active = active

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _FlashLike.apply(*(self._cast(x, self.low) for x in args[:3]))
        if self.active and func in (F.linear, F.conv2d, torch.conv2d):
            args, kwargs = self._all(args, kwargs, self.low)
        elif self.active and func in (F.group_norm, F.layer_norm):
            args, kwargs = self._all(args, kwargs, torch.float32)
        return func(*args, **kwargs)

    def _all(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        return tuple(self._cast(x, dtype) for x in args), {n: self._cast(x, dtype) for n, x in kwargs.items()}

    @staticmethod
    def _cast(x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the distinct storages, parameters aside, that one forward of `model` keeps for its backward."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        key = x.untyped_storage()._cdata
        if key not in weights:
            kept[key] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
        return sum(x.untyped_storage().nbytes() for x in kept.values())


def unet_saved_bytes(
    unet: Any, width_px: int, height_px: int, context: int, *, text_grad: bool, autocast: bool
) -> tuple[int, int]:
    """(bytes per image, fixed bytes) the U-Net keeps for backward, from batches of 1 and 2."""
    dtype = torch.float32 if autocast else LikeAutocast.low
    found = []
    for batch in (1, 2):
        kwargs = unet_inputs(unet, batch, width_px, height_px, context, text_grad=text_grad, dtype=dtype)
        with LikeAutocast(autocast):
            found.append(saved_bytes(unet, partial(unet, return_dict=False, **kwargs)))
    return found[1] - found[0], 2 * found[0] - found[1]


def text_encoders() -> nn.ModuleList:
    """Both full-size text encoders on the meta device, in train mode."""
    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG))
    return nn.ModuleList([first, second]).train()


def text_forward(encoders: nn.ModuleList, batch: int, *, pooled: bool) -> torch.Tensor:
    """Penultimate states of `batch` captions of three chunks (and the pooled vectors' sum), for counting only."""
    ids = torch.zeros(3 * batch, 77, dtype=torch.long, device="meta")
    first = encoders[0](ids, output_hidden_states=True).hidden_states[11]
    second = encoders[1](ids, output_hidden_states=True)
    context = torch.cat([first, second.hidden_states[-2]], -1)
    return context.sum() + second.text_embeds.sum() if pooled else context


def text_saved_bytes(encoders: nn.ModuleList) -> tuple[int, int]:
    """(bytes per image, fixed bytes) both trained encoders keep for backward, from batches of 1 and 2."""
    found = []
    for batch in (1, 2):
        with LikeAutocast():
            found.append(saved_bytes(encoders, partial(text_forward, encoders, batch, pooled=True)))
    return found[1] - found[0], 2 * found[0] - found[1]


def parameters(model: nn.Module) -> int:
    """Number of values in a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def adafactor_state_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of Adafactor's factored second moments: rows and columns of the last two dimensions, in fp32."""
    sizes = [p.shape for p in parameters]
    factored = sum(s.numel() // s[-1] + s.numel() // s[-2] for s in sizes if len(s) >= 2)
    return 4 * (factored + sum(s.numel() for s in sizes if len(s) < 2))
