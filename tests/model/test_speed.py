"""Speed options change no number beyond their tolerance, and refuse what they cannot do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from stages import Stage
from torch.nn.attention import SDPBackend

from train.base.errors import ExitCode, Halt
from train.model import speed
from train.model.recomputation import set_checkpointing
from train.recipe.buckets import make_buckets
from train.testing.counts import loss_and_gradients, tiny_inputs, tiny_unet, unet_inputs


def test_pin_attention_sets_the_kernels_and_restores_them() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with speed.pin_attention("math"):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    with speed.pin_attention("flash"):
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch._C._get_sdp_priority_order()[0] == SDPBackend.FLASH_ATTENTION.value
    own = torch._C._get_sdp_priority_order()
    with speed.pin_attention("auto", "cuda"):
        assert torch._C._get_sdp_priority_order() == own
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    with speed.pin_attention("auto", "cuda", deterministic=True):
        assert torch._C._get_sdp_priority_order() == own
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before


@pytest.mark.parametrize(("name", "device"), [("xformers", "cuda"), ("cudnn", "cpu")])
def test_pin_attention_refuses(name: str, device: str) -> None:
    with pytest.raises(Halt, match=r"model\.attention") as halt:
        speed.pin_attention(name, device)
    assert halt.value.code == ExitCode.USAGE


def test_attention_math_and_flash_agree_through_a_checkpointed_backward() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    unet.enable_gradient_checkpointing()
    with speed.pin_attention("math"):
        loss, reference = loss_and_gradients(unet, kwargs)
    with speed.pin_attention("flash"):
        loss_now, found = loss_and_gradients(unet, kwargs)
    assert loss_now == pytest.approx(loss, rel=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


def test_attention_receives_what_autocast_gives_and_a_mask_is_seen() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    assert speed.attention_inputs(unet, lambda: unet(**kwargs)) == {"float32"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert speed.attention_inputs(unet, lambda: unet(**kwargs)) == {"bfloat16"}
        context = kwargs["encoder_hidden_states"]
        mask = torch.ones(context.shape[:2], dtype=torch.bool)  # type: ignore[attr-defined]
        seen = speed.attention_inputs(unet, lambda: unet(**kwargs, encoder_attention_mask=mask))
        assert "a mask" in seen and "bfloat16" in seen
    outside = speed.attention_inputs(unet, lambda: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(2, 2)] * 3))
    assert outside == set(), "the text encoders' attention is not the U-Net's"


def test_a_fast_kernel_is_refused_for_what_it_cannot_take() -> None:
    speed.check_attention({"float16", "bfloat16"}, "flash")
    speed.check_attention({"float32", "a mask"}, "auto")
    for seen, word in (({"float32", "float16"}, "receives float32"), ({"float16", "a mask"}, "receives a mask")):
        for name in ("flash", "cudnn"):
            with pytest.raises(Halt, match=word) as halt:
                speed.check_attention(seen, name)
            assert halt.value.code == ExitCode.USAGE


def test_a_stage_refuses_a_pin_that_would_be_passed_over(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("model.attention=flash", "precision=fp32") == ExitCode.USAGE
    assert "model.attention: flash" in stage.message and "float32" in stage.message
    assert not list((stage.output / "checkpoints").glob("*"))
    assert stage.run("model.attention=flash", "precision=bf16", "max_updates=1", "data.max_tokens=225") == 0, stage.message


def test_channels_last_equals_plain_to_1e5() -> None:
    unet, kwargs = tiny_unet(), tiny_inputs()
    loss, reference = loss_and_gradients(unet, kwargs)
    speed.to_channels_last(unet)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    kwargs["sample"] = speed.as_channels_last(kwargs["sample"])  # type: ignore[arg-type]
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
    assert speed.compile_blocks(unet, tmp_path, backend="aot_eager") == 17 + 17
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
    assert speed.float8_linear(linear(640, 640), block + "attn1.to_k")
    assert speed.float8_linear(linear(640, 640), block + "attn2.to_q")
    assert speed.float8_linear(linear(640, 5120), block + "ff.net.0.proj")
    assert not speed.float8_linear(linear(2048, 640), block + "attn2.to_k")
    assert not speed.float8_linear(linear(2048, 640), block + "attn2.to_v")
    assert not speed.float8_linear(linear(2816, 1280), "add_embedding.linear_1")
    assert not speed.float8_linear(linear(1280, 320), "down_blocks.0.resnets.0.time_emb_proj")
    assert not speed.float8_linear(linear(640, 630), block + "ff.net.2")
    assert not speed.float8_linear(torch.nn.Conv2d(16, 16, 1), "conv_in")


def test_float8_without_hopper_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Halt, match="Hopper") as halt:
        speed.to_float8(tiny_unet())
    assert halt.value.code == ExitCode.MISMATCH


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_two_graphs_per_area_and_no_limit_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 transformer graphs for the 33 buckets' 12 areas; the default limit of 8 would stop at the fifth."""
    unet, graphs = counted_unet(monkeypatch)
    areas = {w * h: (w, h) for w, h in make_buckets()}.values()
    assert len(areas) == 12
    for width, height in areas:
        kwargs = unet_inputs(unet, 1, width, height, 5, text_grad=False, dtype=torch.float32)
        with torch.no_grad():
            unet(**kwargs)
    torch._dynamo.reset()
    assert len(graphs) == 24


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_recomputation_in_autograds_own_thread_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA backward runs there, and from torch 2.13 on that thread sees the compiler's default limit of 8 graphs."""
    unet, graphs = counted_unet(monkeypatch)
    set_checkpointing(unet, "full")
    for height in range(64, 224, 32):
        kwargs = unet_inputs(unet, 1, 64, height, 5, text_grad=False, dtype=torch.float32)
        loss = unet(**kwargs).sample.square().mean()
        before, failed = len(graphs), []

        def backward(loss: torch.Tensor = loss, failed: list[BaseException] = failed) -> None:
            try:
                loss.backward()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert not failed
        assert len(graphs) == before
    torch._dynamo.reset()
    assert len(graphs) > 8


def counted_unet(monkeypatch: pytest.MonkeyPatch) -> tuple[UNet2DConditionModel, list[torch.fx.GraphModule]]:
    """A tiny U-Net whose transformer blocks are compiled, and the graphs made so far."""
    graphs = []

    def counting(module: torch.fx.GraphModule, _inputs: object) -> object:
        graphs.append(module)
        return module.forward

    unet = tiny_unet()
    monkeypatch.setattr(torch.nn.Module, "compile", _transformers_only(torch.nn.Module.compile))
    torch._dynamo.reset()
    speed.compile_blocks(unet, backend=counting)  # type: ignore[arg-type]
    return unet, graphs


def _transformers_only(compile_: Callable[..., None]) -> Callable[..., None]:
    """Resnets have graphs of their own; here only the transformer blocks are counted."""

    def chosen(module: torch.nn.Module, *args: object, **kwargs: object) -> None:
        if type(module).__name__ == "BasicTransformerBlock":
            compile_(module, *args, **kwargs)

    return chosen
