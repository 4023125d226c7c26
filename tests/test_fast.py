"""Speed options change no number beyond their tolerance, and refuse what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from train import fast
from train.buckets import make_buckets
from train.exits import ExitCode, Halt
from train.tools.bench_counts import loss_and_gradients, tiny_inputs, tiny_unet, unet_inputs


def test_pin_attention_sets_the_kernels_and_restores_them() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with fast.pin_attention("math"):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    with fast.pin_attention("flash"):
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.FLASH_ATTENTION.value
    with fast.pin_attention("auto", "cuda"):
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.CUDNN_ATTENTION.value
    assert torch.backends.cuda.flash_sdp_enabled() == before


@pytest.mark.parametrize(("name", "device"), [("xformers", "cuda"), ("cudnn", "cpu")])
def test_pin_attention_refuses(name: str, device: str) -> None:
    with pytest.raises(Halt, match=r"model\.attention") as halt:
        fast.pin_attention(name, device)
    assert halt.value.code == ExitCode.USAGE


def test_attention_math_and_flash_agree_through_a_checkpointed_backward() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    unet.enable_gradient_checkpointing()
    with fast.pin_attention("math"):
        loss, reference = loss_and_gradients(unet, kwargs)
    with fast.pin_attention("flash"):
        loss_now, found = loss_and_gradients(unet, kwargs)
    assert loss_now == pytest.approx(loss, rel=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


def test_attention_dtypes_are_those_of_autocast() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    assert fast.attention_dtypes(unet, lambda: unet(**kwargs)) == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = fast.attention_dtypes(unet, lambda: unet(**kwargs))
    assert seen == {torch.bfloat16}
    fast.check_attention_dtypes(seen, "flash")
    fast.check_attention_dtypes({torch.float32}, "auto")
    with pytest.raises(Halt, match="float32"):
        fast.check_attention_dtypes({torch.float32, torch.float16}, "flash")


def test_channels_last_equals_plain_to_1e5() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    loss, reference = loss_and_gradients(unet, kwargs)
    fast.to_channels_last(unet)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    kwargs["sample"] = fast.as_channels_last(kwargs["sample"])  # type: ignore[arg-type]
    loss_now, found = loss_and_gradients(unet, kwargs)
    assert loss_now == pytest.approx(loss, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo hides it itself, unless warnings are errors
def test_compiled_blocks_equal_plain_and_keep_the_state_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    loss, reference = loss_and_gradients(unet, kwargs)
    keys = list(unet.state_dict())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    # 17 resnets, 17 transformer blocks. aot_eager: traced and partitioned graphs without a C++ compiler run
    assert fast.compile_blocks(unet, tmp_path, backend="aot_eager") == 17 + 17
    loss_now, found = loss_and_gradients(unet, kwargs)
    torch._dynamo.reset()
    assert list(unet.state_dict()) == keys
    assert torch._dynamo.config.recompile_limit >= 64
    assert torch._dynamo.config.accumulated_recompile_limit >= 1024
    assert loss_now == pytest.approx(loss, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


def test_float8_takes_large_linears_on_image_tokens_only() -> None:
    linear = torch.nn.Linear
    block = "down_blocks.1.attentions.0.transformer_blocks.0."
    assert fast.float8_linear(linear(640, 640), block + "attn1.to_k")
    assert fast.float8_linear(linear(640, 640), block + "attn2.to_q")
    assert fast.float8_linear(linear(640, 5120), block + "ff.net.0.proj")
    assert not fast.float8_linear(linear(2048, 640), block + "attn2.to_k")
    assert not fast.float8_linear(linear(2048, 640), block + "attn2.to_v")
    assert not fast.float8_linear(linear(2816, 1280), "add_embedding.linear_1")
    assert not fast.float8_linear(linear(1280, 320), "down_blocks.0.resnets.0.time_emb_proj")
    assert not fast.float8_linear(linear(640, 630), block + "ff.net.2")
    assert not fast.float8_linear(torch.nn.Conv2d(16, 16, 1), "conv_in")


def test_float8_without_hopper_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Halt, match="Hopper") as halt:
        fast.to_float8(tiny_unet())
    assert halt.value.code == ExitCode.MISMATCH


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_two_graphs_per_area_and_no_limit_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 transformer graphs for the 33 buckets' 12 areas; the default limit of 8 would stop at the fifth."""
    graphs = []

    def counting(module: torch.fx.GraphModule, _inputs: object) -> object:
        graphs.append(module)
        return module.forward

    unet = tiny_unet()
    monkeypatch.setattr(torch.nn.Module, "compile", _transformers_only(torch.nn.Module.compile))
    torch._dynamo.reset()
    fast.compile_blocks(unet, backend=counting)  # type: ignore[arg-type]
    areas = {w * h: (w, h) for w, h in make_buckets()}.values()
    assert len(areas) == 12
    for width, height in areas:
        kwargs = unet_inputs(unet, 1, width, height, 5, text_grad=False, dtype=torch.float32)
        with torch.no_grad():
            unet(**kwargs)
    torch._dynamo.reset()
    assert len(graphs) == 24


def _transformers_only(compile_: Callable[..., None]) -> Callable[..., None]:
    """Resnets have graphs of their own; here only the transformer blocks are counted."""

    def chosen(module: torch.nn.Module, *args: object, **kwargs: object) -> None:
        if type(module).__name__ == "BasicTransformerBlock":
            compile_(module, *args, **kwargs)

    return chosen
