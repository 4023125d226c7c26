"""fp16 on a CPU as a graphics card computes it: products of halves summed in fp32 and rounded once.

A CPU without fp16 units multiplies halves one by one, hours for a step. Both sides run in this, so that neither has an
advantage; bf16 products are the processor's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class _InFp32(TorchDispatchMode):
    """Takes every product of halves, forwards and backwards."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's result; in half where its inputs were."""
        if func.overloadpacket.__name__ not in _PRODUCTS or not any(_is_half(one) for one in args):
            return func(*args, **(kwargs or {}))
        up = tree_map(lambda one: one.float() if _is_half(one) else one, (args, kwargs or {}))
        return tree_map(lambda one: one.half() if isinstance(one, torch.Tensor) else one, func(*up[0], **up[1]))


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float16


@contextlib.contextmanager
def quick_halves(dtype: torch.dtype) -> Iterator[None]:
    """Forward and backward of a step in `dtype`; anything but fp16 runs as it is."""
    if dtype != torch.float16:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), _InFp32():  # the fused kernel multiplies halves by itself
        yield
