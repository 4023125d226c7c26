"""The networks of a stage: what is trained, what is frozen, how parameters are called, what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import tinysdxl
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from train.base.errors import ExitCode, Halt
from train.model import text
from train.model.networks import (
    Components,
    Networks,
    TimestepEmbedding,
    cast_frozen,
    embedding_as,
    overlay,
    parameter_groups,
    set_train_mode,
    trained_parameters,
)
from train.model.sdxl import canonical_name


@pytest.fixture
def components(base_model: Path) -> Components:
    return tinysdxl.load_components(base_model)


def networks_of(components: Components, *, train: bool) -> Networks:
    return Networks(components, train_text_encoders=train, context="stitched", pooled_projection="correct")


def inputs(batch: int = 2, chunks: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (batch, chunks, 77), generator=generator)
    ids[:, :, -1] = 520
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([3, 900]), ids, ids.clone(), sizes


def stored(base_model: Path, network: str) -> dict[str, torch.Tensor]:
    file = "model" if network.startswith("text") else "diffusion_pytorch_model"
    return load_file(base_model / network / f"{file}.safetensors")


@pytest.mark.parametrize("network", ["unet", "text_encoder", "text_encoder_2", "vae"])
def test_every_weight_is_the_files(network: str, components: Components, base_model: Path) -> None:
    theirs = stored(base_model, network)
    own = getattr(components, network).state_dict()
    known = {name if name in own else name.removeprefix("text_model."): t for name, t in theirs.items()}
    assert {name for name in own if not name.endswith("position_ids")} == set(known)
    assert all(torch.equal(own[name], tensor) for name, tensor in known.items())
    assert all(tensor.dtype == torch.float32 for tensor in own.values() if tensor.is_floating_point())


def test_pretraining_trains_what_has_a_gradient_and_nothing_else(components: Components) -> None:
    networks = networks_of(components, train=True)
    set_train_mode(networks)
    networks(*inputs()).square().mean().backward()
    for name, parameter in networks.named_parameters():
        has_gradient = parameter.grad is not None
        assert parameter.requires_grad == has_gradient, name
        if has_gradient and "position_embedding" not in name and "token_embedding" not in name:
            # a key's bias adds the same to every score of a query, and a bias before a norm is taken out again
            assert bool(parameter.grad.any()) or "k_proj.bias" in name or "conv" in name, name  # type: ignore[union-attr]
    frozen = {n for n, p in networks.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(n.startswith("text_encoder.") and ("layers.2." in n or "final_layer_norm" in n) for n in frozen)


def test_finetuning_trains_the_unet_alone(components: Components) -> None:
    networks = networks_of(components, train=False)
    set_train_mode(networks)
    networks(*inputs()).square().mean().backward()
    assert all(p.grad is not None for p in networks.unet.parameters())
    encoders = [*networks.text_encoder.parameters(), *networks.text_encoder_2.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in encoders)
    assert set(parameter_groups(networks)) == {"unet"}
    assert networks.unet.training
    assert not networks.text_encoder.training


def test_groups_share_out_all_trained_parameters(components: Components) -> None:
    networks = networks_of(components, train=True)
    groups = parameter_groups(networks)
    assert list(groups) == ["unet", "text_encoder", "text_encoder_2"]
    assert {name for group in groups.values() for name in group} == set(trained_parameters(networks))
    assert sum(len(group) for group in groups.values()) == len(trained_parameters(networks))


def test_the_vae_is_never_a_part(components: Components) -> None:
    networks = networks_of(components, train=True)
    assert not any("vae" in name for name, _ in networks.named_parameters())


@pytest.mark.parametrize(("name", "wanted"), [
    ("unet.conv_in.weight", "unet.conv_in.weight"),
    ("text_encoder.encoder.layers.0.mlp.fc1.bias", "text_encoder.text_model.encoder.layers.0.mlp.fc1.bias"),
    ("text_encoder.text_model.embeddings.x", "text_encoder.text_model.embeddings.x"),
    ("text_encoder_2.text_projection.weight", "text_encoder_2.text_projection.weight"),
    ("text_encoder_2.text_model.final_layer_norm.bias", "text_encoder_2.text_model.final_layer_norm.bias"),
])  # fmt: skip
def test_names_are_those_of_the_files(name: str, wanted: str) -> None:
    assert canonical_name(name) == wanted
    assert canonical_name(wanted) == wanted


def test_canonical_names_are_the_folders(components: Components, base_model: Path) -> None:
    names = set(trained_parameters(networks_of(components, train=True)))
    for network in ("unet", "text_encoder", "text_encoder_2"):
        keys = {n if n.startswith(("text_model.", "text_projection")) or network == "unet" else f"text_model.{n}"
                for n in stored(base_model, network)}  # fmt: skip
        assert {n for n in names if n.startswith(f"{network}.")} <= {f"{network}.{key}" for key in keys}


def test_overlay_changes_named_tensors_in_place(components: Components) -> None:
    networks = networks_of(components, train=True)
    pointers = {name: p.data_ptr() for name, p in networks.named_parameters()}
    new = {"unet.conv_in.bias": torch.full((8,), 3.0)}
    overlay(networks, new, Path("there"))
    assert networks.unet.conv_in.bias.tolist() == [3.0] * 8
    assert pointers == {name: p.data_ptr() for name, p in networks.named_parameters()}


@pytest.mark.parametrize(("name", "shape"), [("unet.conv_in.bias", (9,)), ("unet.conv_on.bias", (8,))])
def test_overlay_of_another_model_changes_nothing(name: str, shape: tuple[int, ...], components: Components) -> None:
    networks = networks_of(components, train=True)
    before = networks.unet.conv_out.bias.clone()
    with pytest.raises(Halt, match=name) as halted:
        overlay(networks, {"unet.conv_out.bias": torch.ones(4), name: torch.zeros(shape)}, Path("there"))
    assert halted.value.code == ExitCode.MISMATCH
    assert torch.equal(networks.unet.conv_out.bias, before)


def test_frozen_encoders_take_the_compute_type_and_trained_weights_stay_fp32(components: Components) -> None:
    frozen = networks_of(components, train=False)
    cast_frozen(frozen, torch.bfloat16)
    assert {p.dtype for p in frozen.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in frozen.unet.parameters()} == {torch.float32}


def test_trained_encoders_are_not_cast(components: Components) -> None:
    networks = networks_of(components, train=True)
    cast_frozen(networks, torch.bfloat16)
    assert {p.dtype for p in networks.parameters()} == {torch.float32}


def test_the_forward_pass_is_the_stock_unets(components: Components, base_model: Path) -> None:
    networks = networks_of(components, train=False).eval()
    noisy, timesteps, ids_1, ids_2, sizes = inputs()
    context, pooled = text.encode(networks.text_encoder, networks.text_encoder_2, ids_1, ids_2)
    stock = UNet2DConditionModel.from_pretrained(base_model / "unet")
    wanted = stock(
        noisy, timesteps, encoder_hidden_states=context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
    ).sample
    assert torch.equal(networks(noisy, timesteps, ids_1, ids_2, sizes), wanted)


@pytest.mark.parametrize(("embedding", "shift"), [("correct", 0), ("sd_scripts", 1)])
def test_timesteps_are_embedded_with_the_released_runs_shift_or_without(
    components: Components, base_model: Path, embedding: TimestepEmbedding, shift: int
) -> None:
    networks = Networks(components, train_text_encoders=False, context="stitched", pooled_projection="correct",
                        timestep_embedding=embedding).eval()  # fmt: skip
    half = networks.unet.config.block_out_channels[0] // 2
    angles = [700 * math.exp(-math.log(10000) * i / (half - shift)) for i in range(half)]
    wanted = torch.tensor([*(math.cos(a) for a in angles), *(math.sin(a) for a in angles)])
    torch.testing.assert_close(networks.unet.time_proj(torch.tensor([700]))[0], wanted, rtol=0, atol=1e-4)
    assert networks.unet.config.freq_shift == 0, "what is exported is what every consumer computes"

    noisy, timesteps, ids_1, ids_2, sizes = inputs()
    context, pooled = text.encode(networks.text_encoder, networks.text_encoder_2, ids_1, ids_2)
    stock = UNet2DConditionModel.from_pretrained(base_model / "unet", freq_shift=shift)
    stock.add_time_proj.downscale_freq_shift = 0  # the config's shift would move the six sizes too; the trainer's did not
    added = {"text_embeds": pooled, "time_ids": sizes}
    assert torch.equal(
        networks(noisy, timesteps, ids_1, ids_2, sizes),
        stock(noisy, timesteps, encoder_hidden_states=context, added_cond_kwargs=added).sample,
    )


def test_drawing_otherwise_leaves_the_training_as_it_was(components: Components) -> None:
    networks = Networks(components, train_text_encoders=False, context="stitched", pooled_projection="correct",
                        timestep_embedding="sd_scripts")  # fmt: skip
    with contextlib.suppress(ZeroDivisionError), embedding_as(networks.unet, "correct"):
        assert networks.unet.time_proj.downscale_freq_shift == 0
        raise ZeroDivisionError
    assert networks.unet.time_proj.downscale_freq_shift == 1


def changed(base_model: Path, folder: Path, network: str, key: str, value: object) -> Path:
    shutil.copytree(base_model, folder)
    path = folder / network / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return folder


@pytest.mark.parametrize(("network", "key"), [("unet", "dropout"), ("text_encoder_2", "attention_dropout")])
def test_dropout_is_refused(network: str, key: str, base_model: Path, tmp_path: Path) -> None:
    model = changed(base_model, tmp_path / "model", network, key, 0.1)
    networks = networks_of(tinysdxl.load_components(model), train=True)
    with pytest.raises(Halt, match="dropout"):
        set_train_mode(networks)


def test_weights_that_are_not_finite_are_named(base_model: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "model")
    path = tmp_path / "model/text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("fc1.bias"))
    tensors[name][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(Halt, match=r"fc1\.bias"):
        tinysdxl.load_components(tmp_path / "model")


def test_a_missing_weight_is_an_error_not_a_random_number(base_model: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "model")
    path = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path)
    with pytest.raises(Halt, match=r"unet\.conv_out\.bias") as halted:
        tinysdxl.load_components(tmp_path / "model")
    assert halted.value.code == ExitCode.MISMATCH


def test_a_stage_without_previews_needs_no_vae(base_model: Path) -> None:
    assert tinysdxl.load_components(base_model, with_vae=False).vae is None


def test_loading_draws_no_random_number(base_model: Path) -> None:
    before = torch.get_rng_state()
    tinysdxl.load_components(base_model)
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_are_one_module(components: Components) -> None:
    assert isinstance(networks_of(components, train=True), nn.Module)
    names = [name for name, _ in networks_of(components, train=True).named_children()]
    assert names == ["unet", "text_encoder", "text_encoder_2"]
