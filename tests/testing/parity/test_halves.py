"""fp16 products on a CPU: summed in fp32 and rounded once, forwards and backwards."""

from __future__ import annotations

import torch

from train.testing.parity.child.halves import quick_halves


def test_a_product_of_halves_is_the_fp32_product_rounded_once() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 257, generator=draw).half().requires_grad_() for _ in range(2))
    up = (torch.randn(3, 3, generator=draw) / 8).half()
    with quick_halves(torch.float16):
        out = a @ b.t()
        out.backward(up)
    assert out.dtype == torch.float16 and a.grad is not None and a.grad.dtype == torch.float16
    assert torch.equal(out, (a.float() @ b.float().t()).half())
    assert torch.equal(a.grad, (up.float() @ b.float()).half())


def test_other_types_run_as_they_are() -> None:
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    with quick_halves(torch.bfloat16):
        assert torch.equal(a @ a, a.clone() @ a)
