"""Speed options of the training step, each off by default: attention kernels, memory format, compile, float8.

None may change what is trained. channels_last and compile agree with the plain path to 1e-5 in fp32; float8 changes
numerics, which is why it is opt-in and never a default.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from train.base.errors import ExitCode, Halt

ATTENTION = ("auto", "flash", "cudnn", "math")
# One graph per block and shape: 33 buckets have 12 areas, 2 graphs each for the transformer blocks; buckets with fewer
# images than a tile have sizes of their own, two where a split does not divide them: at most 132. The default limit of 8
# turns the ninth shape into a hard error under fullgraph.
RECOMPILE_LIMIT = 144
ACCUMULATED_RECOMPILE_LIMIT = 1024
FLOAT8_MULTIPLE = 16  # what the float8 GEMM needs of both dimensions
HOPPER = (9, 0)

_FALLBACK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the text encoders' causal masks may need them
_PRIORITY = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, *_FALLBACK],
    "flash": [SDPBackend.FLASH_ATTENTION, *_FALLBACK],
    "math": [SDPBackend.MATH],
}
# The backward of the others adds with atomics, or does not promise an order: batch.determinism: strict leaves them out.
_ORDERED = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def pin_attention(
    name: str, device_type: str | None = None, *, deterministic: bool = False
) -> AbstractContextManager[None]:
    """A context in which scaled-dot-product attention tries the named kernel first. `auto` leaves torch its own order.

    deterministic: only kernels whose backward adds in one order (flash, math), for runs that promise their bits.

    Keep forward AND backward inside: a checkpointed block runs its attention again in backward, and another kernel
    there would save other tensors. A kernel that cannot take its inputs (fp32, a mask) is passed over silently, so
    check once with `attention_inputs`. `unet.set_attention_backend` would not do: SDXL's processor ignores it.
    """
    if name not in ATTENTION:
        raise Halt(ExitCode.USAGE, f"model.attention is {name!r}; choose one of {', '.join(ATTENTION)}")
    on_gpu = (device_type or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if name == "cudnn" and not on_gpu:
        raise Halt(ExitCode.USAGE, "model.attention: cudnn needs a CUDA device; use auto")
    if name == "auto":  # torch knows which kernel suits which card: cuDNN's comes first on Hopper only
        return sdpa_kernel(_ORDERED) if deterministic and on_gpu else nullcontext()
    kernels = [kernel for kernel in _PRIORITY[name] if kernel in _ORDERED or not deterministic]
    return sdpa_kernel(kernels, set_priority=True)


def uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled blocks run as they were written.

    For forwards outside the training: each of their shapes would cost graphs of the training's own blocks, minutes in
    all, and at `RECOMPILE_LIMIT` the run would end.
    """
    compiler = sys.modules.get("torch._dynamo")  # not loaded: nothing is compiled, and loading it takes a second
    return torch.compiler.set_stance("force_eager") if compiler is not None else nullcontext()


class _Attention(TorchFunctionMode):
    """Notes what reaches scaled-dot-product attention while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.seen = False, set[str]()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.on and function is nn.functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.seen |= {str(t.dtype).removeprefix("torch.") for t in (*args[:3], *kwargs.values()) if _is_query(t)}
            self.seen |= {"a mask"} if mask is not None else set()
        return function(*args, **kwargs)


def _is_query(value: Any) -> bool:
    """Queries, keys and values are floating; a boolean mask is not."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def attention_inputs(unet: nn.Module, forward: Callable[[], object]) -> set[str]:
    """What the U-Net gives to attention during one call of `forward`: dtypes such as "float16", and "a mask".

    Run it once on a small input before `compile_blocks`. Attention outside the U-Net is not looked at: the text
    encoders' causal mask keeps them from the fast kernels anyway, and they are 1.6 % of the work.
    """
    mode = _Attention()
    hooks = [
        unet.register_forward_pre_hook(lambda *_: setattr(mode, "on", True)),
        unet.register_forward_hook(lambda *_: setattr(mode, "on", False)),
    ]
    try:
        with torch.no_grad(), mode:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return mode.seen


def check_attention(seen: set[str], name: str) -> None:
    """Halt(USAGE) when a fast kernel is asked for and something it cannot take reaches the U-Net's attention.

    The kernels pass such a call on silently, and the run would be slow for no visible reason.
    """
    slow = sorted(seen - {"float16", "bfloat16"})
    if slow and name in ("flash", "cudnn"):
        raise Halt(
            ExitCode.USAGE,
            f"model.attention: {name} takes 16-bit values without a mask only, but the U-Net's attention receives "
            f"{', '.join(slow)}; set precision to fp16 or bf16, or model.attention to auto",
        )


def to_channels_last(unet: Any) -> Any:
    """The same module with 4-d weights in channels_last; give it latents through `as_channels_last`."""
    return unet.to(memory_format=torch.channels_last)


def as_channels_last(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """`latents_BCHW` with channels innermost in memory; values and shape unchanged."""
    return latents_BCHW.contiguous(memory_format=torch.channels_last)


def compile_blocks(unet: Any, cache_dir: Path | None = None, backend: str = "inductor") -> int:
    """Compile the repeated blocks of a diffusers U-Net in place; the number of compiled modules. State keys stay.

    Transformer blocks get static graphs (2 per bucket area). Resnet blocks would need 13 graphs per shape, so they
    are compiled with automatic dynamic shapes: 14 graphs in all. Set checkpointing first: changing it recompiles.
    cache_dir: where inductor keeps its kernels between runs, unless TORCHINDUCTOR_CACHE_DIR says so already.
    """
    if cache_dir is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir.resolve()))
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, ACCUMULATED_RECOMPILE_LIMIT)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    repeated = set(unet._repeated_blocks)
    resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    for module in resnets:
        module.compile(dynamic=None, backend=backend)
    return len(resnets) + sum(type(m).__name__ in repeated for m in unet.modules())


def float8_linear(module: nn.Module, name: str) -> bool:
    """Whether a module of the U-Net becomes a float8 linear: the large ones on image tokens, and nothing else.

    Left out: keys and values of the text context (few tokens), time and size embeddings, odd dimensions.
    """
    if not isinstance(module, nn.Linear):
        return False
    if "embed" in name or "time_emb" in name or name.endswith(("attn2.to_k", "attn2.to_v")):
        return False
    return module.in_features % FLOAT8_MULTIPLE == 0 and module.out_features % FLOAT8_MULTIPLE == 0


def to_float8(unet: Any, recipe: str = "tensorwise") -> int:
    """Swap the U-Net's large linears for float8 training ones in place; their number. Needs Hopper, torchao, compile.

    Weights stay fp32 parameters under the same names. recipe: torchao's "tensorwise" or "rowwise".
    Raises Halt(USAGE) without torchao, Halt(MISMATCH) on a card without float8.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < HOPPER:
        raise Halt(ExitCode.MISMATCH, "model.float8 needs an NVIDIA Hopper card (compute capability 9.0) or newer")
    return swap_float8(unet, recipe)


def swap_float8(unet: Any, recipe: str = "tensorwise", *, emulate: bool = False) -> int:
    """`to_float8` without asking for the card. emulate: rounds to float8 and multiplies in fp32, on any device."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise Halt(ExitCode.USAGE, "model.float8 needs torchao: pip install -e '.[fast]'") from error
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True)
    # Padded: the gradient of a weight sums over images x tokens, which is no multiple of 16 for every bucket and split.
    convert_to_float8_training(unet, module_filter_fn=float8_linear, config=config)
    return sum(type(module).__name__ == "Float8Linear" for module in unet.modules())
