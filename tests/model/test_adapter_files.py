"""Adapters' files: both forms and back, the names that trainers write, what stock diffusers makes of ours, and what is refused."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import tinysdxl
import torch
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.model import layouts, sdxl
from train.model.adapters import layers, names, reading, writing
from train.model.adapters.reading import open_adapter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinysdxl.write(tmp_path_factory.mktemp("base") / "model", "like SDXL", clip=False)


@pytest.fixture(scope="module")
def configs(base: Path) -> sdxl.Configs:
    return layouts.read_configs(base)


@pytest.fixture(scope="module")
def known(configs: sdxl.Configs) -> names.Names:
    return names.names_of(configs)


@pytest.fixture(scope="module")
def usual(known: names.Names) -> list[str]:
    return [name for name, module in known.modules.items() if module.usual]


def test_both_forms_and_back_lose_nothing(usual: list[str], known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    """Convolutions, both encoders, a rank and an alpha of its own for some."""
    tensors = adapters.kohya(known, usual, rank=3, alpha=1.5) | adapters.kohya(known, usual[::7], rank=2, alpha=7.0)
    tensors = {name: value.half() if not name.endswith("alpha") else value for name, value in tensors.items()}
    first, folder, second = tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "b.safetensors"
    save_file(tensors, first, {"ss_comment": "x", "ss_network_dim": "3"})
    read = open_adapter(first, configs)
    writing.write_diffusers(folder, read.layers, configs, read.metadata)
    writing.write_kohya(second, open_adapter(folder, configs).layers, configs, open_adapter(folder, configs).metadata)
    again = load_file(second)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in tensors.items())
    said = open_adapter(second, configs).metadata
    assert said["ss_comment"] == "x" and said["ss_network_module"] == "networks.lora"
    assert open_adapter(second, configs).layers[usual[0]].rank == 2 and open_adapter(second, configs).layers[usual[0]].alpha == 7.0


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_lycoris_files_come_back_as_they_went(kind: str, configs: sdxl.Configs, tmp_path: Path) -> None:
    """From peft's own layers through LyCORIS' names: the same differences."""
    unet = adapters.injected(tinysdxl.build("like SDXL").unet, "lora" if kind == "dora" else kind, **({"use_dora": True} if kind == "dora" else {"r": 1}))
    first = open_adapter(adapters.peft_folder(tmp_path / "unet", unet), configs)
    writing.write_kohya(tmp_path / "a.safetensors", first.layers, configs, {})
    keys = load_file(tmp_path / "a.safetensors").keys()
    ends = {key.partition(".")[2] for key in keys}
    assert ends <= {
        "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
        "lokr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
        "dora": {"lora_down.weight", "lora_up.weight", "dora_scale", "alpha"},
    }[kind]
    back = open_adapter(tmp_path / "a.safetensors", configs)
    assert back.metadata["ss_network_module"] == "lycoris.kohya"
    base = torch.ones(1)
    for name, layer in first.layers.items():
        weight = base.expand(layer.shape)
        torch.testing.assert_close(layers.delta(back.layers[name], weight), layers.delta(layer, weight))


SPELLINGS: dict[str, Callable[[names.Module, str, str], str]] = {
    "kohya": lambda m, key, part: f"{m.kohya}.lora_{part}.weight",
    "OneTrainer, older kohya": lambda m, key, part: f"{m.kohya.split('_')[0]}_{_network(m, 'unet', 'te1', 'te2')}_{key.replace('.', '_')}.lora_{part}.weight",
    "ai-toolkit": lambda m, key, part: f"lora_{_network(m, 'unet', 'te1', 'te2')}_{key.replace('.', '_')}.lora_{part}.weight",
    "diffusers": lambda m, key, part: f"{m.name}.lora_{'A' if part == 'down' else 'B'}.weight",
    "diffusers with the adapter's name": lambda m, key, part: f"{m.name}.lora_{'A' if part == 'down' else 'B'}.default_0.weight",
    "diffusers before peft": lambda m, key, part: f"{m.name}.lora.{part}.weight" if m.name.startswith("unet") else f"{m.name}.lora_linear_layer.{part}.weight",
    "peft of a pipeline": lambda m, key, part: f"base_model.model.{m.name}.lora_{'A' if part == 'down' else 'B'}.weight",
    "dots": lambda m, key, part: f"lora_{_network(m, 'unet', 'te1', 'te2')}.{key}.lora_{part}.weight",
}


def _network(module: names.Module, *told: str) -> str:
    return told[names.NETWORKS.index(module.name.partition(".")[0])]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_adapter(spelling: str, usual: list[str], known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    tensors = adapters.kohya(known, usual, alpha=None)
    renamed = {}
    for name in usual:
        module = known.modules[name]
        for part in ("down", "up"):
            renamed[SPELLINGS[spelling](module, name.partition(".")[2], part)] = tensors[f"{module.kohya}.lora_{part}.weight"]
    save_file(tensors, tmp_path / "kohya.safetensors")
    save_file(renamed, tmp_path / "other.safetensors")
    one, two = (open_adapter(tmp_path / f"{name}.safetensors", configs) for name in ("kohya", "other"))
    assert one.layers.keys() == two.layers.keys() == set(usual)
    assert all(torch.equal(layers.delta(one.layers[name]), layers.delta(two.layers[name])) for name in usual[::9])
    assert reading.is_adapter(tmp_path / "other.safetensors")
    assert "state no alpha" in two.notes[0]


@pytest.mark.parametrize("trainer", ["OneTrainer", "OneTrainer, OMI", "ai-toolkit"])
def test_doras_as_other_trainers_write_them(
    trainer: str, usual: list[str], known: names.Names, configs: sdxl.Configs, base: Path, tmp_path: Path
) -> None:
    """OneTrainer (modules/module/LoRAModule.py): a scale of the columns, [1, I, ...], of square matrices too, with an alpha; its OMI names are
    the single file's with their dots. ai-toolkit (toolkit/models/DoRA.py): a vector `magnitude` of the rows, of matrices alone, no alpha."""
    words = {name: link.single for link in sdxl.links(configs, names.NETWORKS) for name in link.folder}
    source = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    tensors, wanted = {}, {}
    by_rows, generator = trainer == "ai-toolkit", torch.Generator().manual_seed(5)
    for name in (one for one in usual if not by_rows or len(known.modules[one].shape) == 2):
        module, (network, _, key) = known.modules[name], name.partition(".")
        values = adapters.kohya(known, [name], alpha=None if by_rows else 1.0)
        prefix = f"lora_{_network(module, 'unet', 'te1', 'te2')}_{key.replace('.', '_')}"
        if trainer == "OneTrainer, OMI":
            inner = words[f"{name}.weight"].removeprefix(sdxl.PREFIXES["unet"]).removesuffix(".weight") if network == "unet" else key
            prefix = f"{_network(module, 'unet', 'clip_l', 'clip_g')}.{inner}"
        tensors |= {f"{prefix}{end.removeprefix(module.kohya)}": value for end, value in values.items()}
        sides = module.shape[0] if by_rows else module.shape[1]
        scale = torch.rand(sides, generator=generator) + 0.5
        tensors[f"{prefix}.{'magnitude' if by_rows else 'dora_scale'}"] = scale if by_rows else scale.reshape(1, sides, *[1] * len(module.shape[2:]))
        wanted[name] = scale
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_adapter(tmp_path / "a.safetensors", configs).layers
    assert found.keys() == wanted.keys()
    squares = 0
    for name, layer in found.items():
        if not name.startswith("unet."):
            continue
        weight = source[f"{name.removeprefix('unet.')}.weight"].float()
        whole = weight + layers.delta(layer, weight)
        lengths = (whole if by_rows else whole.transpose(0, 1)).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, wanted[name], rtol=1e-4, atol=1e-5)
        squares += weight.shape[0] == weight.shape[1]
    assert squares > 10
    writing.write_kohya(tmp_path / "b.safetensors", found, configs, {})
    again = open_adapter(tmp_path / "b.safetensors", configs).layers
    assert all(again[name].by_input is not by_rows for name in found)
    if by_rows:
        writing.write_diffusers(tmp_path / "folder", found, configs, {})
    else:
        with pytest.raises(Halt, match="DoRA scale by its inputs"):
            writing.write_diffusers(tmp_path / "folder", found, configs, {})


def test_attention_processors_of_old_diffusers_files(known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    module = next(name for name in known.modules if name.endswith("attn1.to_out.0"))
    place, values = module.removesuffix(".to_out.0"), adapters.kohya(known, [module])
    flat = known.modules[module].kohya
    save_file(
        {f"{place}.processor.to_out_lora.{part}.weight": values[f"{flat}.lora_{part}.weight"] for part in ("down", "up")}, tmp_path / "a.safetensors"
    )
    assert list(open_adapter(tmp_path / "a.safetensors", configs).layers) == [module]


def drawn(pipeline: Any, scale: float | None = None) -> torch.Tensor:
    """The U-Net's answer and both encoders', of a stock pipeline."""
    with torch.no_grad():
        context = [encoder(torch.arange(77)[None] % 40, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
        states = torch.cat([c.hidden_states[-2] for c in context], -1)
        time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        added = {"text_embeds": context[1].text_embeds, "time_ids": time_ids}
        return pipeline.unet(latents, torch.tensor([400]), encoder_hidden_states=states, added_cond_kwargs=added).sample


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_stock_diffusers_loads_what_is_written(form: str, usual: list[str], known: names.Names, configs: sdxl.Configs, base: Path, tmp_path: Path) -> None:
    """`load_lora_weights` over U-Net, convolutions and both encoders gives the same as weights merged here."""
    from diffusers import StableDiffusionXLPipeline

    from train.model.adapters import merging
    from train.storage.state_files import to_tensor

    other = 2.0 if form == "kohya" else 3.0  # of a file in kohya's names it reads one alpha a network (get_peft_kwargs)
    tensors = adapters.kohya(known, usual, rank=4, alpha=2.0) | adapters.kohya(known, usual[::5], rank=2, alpha=other, seed=1)
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = open_adapter(tmp_path / "in.safetensors", configs)
    out = tmp_path / ("out.safetensors" if form == "kohya" else "out")
    (writing.write_kohya if form == "kohya" else writing.write_diffusers)(out, adapter.layers, configs, {})
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    plain = drawn(stock)
    stock.load_lora_weights(str(out) if form == "diffusers" else str(out.parent), **({"weight_name": out.name} if form == "kohya" else {}))
    merged = StableDiffusionXLPipeline.from_pretrained(base)
    from train.model.source import open_folder

    weights = merging.merged(open_folder(base, hashed=False).weights, [(adapter, 1.0)])
    for network in names.NETWORKS:
        own = {sdxl.canonical(network, n): p for n, p in getattr(merged, network).named_parameters()}
        for name, parameter in own.items():
            parameter.data = to_tensor(weights[name])
    assert (drawn(stock) - plain).abs().mean() > 1e-3
    torch.testing.assert_close(drawn(stock), drawn(merged), rtol=1e-4, atol=1e-5)


# --- refused by name -----------------------------------------------------------------------------------


def write_bytes(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def some_tensors(known: names.Names) -> Tensors:
    return adapters.kohya(known, [name for name in known.modules if ".attn1." in name][:4] + ["text_encoder.text_model.encoder.layers.0.mlp.fc1"])


ONE = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
# What is wrong: a change to sound tensors, and a word of the refusal.
BROKEN: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "up missing": (lambda t: t.pop(next(k for k in t if "lora_up" in k)), "without up"),
    "down missing": (lambda t: t.pop(next(k for k in t if "lora_down" in k)), "without down"),
    "alpha alone": (lambda t: [t.pop(k) for k in list(t) if "fc1" in k and "alpha" not in k], "no weights beside"),
    "foreign module": (lambda t: t.update({"lora_unet_nowhere_to_q.lora_down.weight": torch.ones(2, 3)}), "lora_unet_nowhere"),
    "foreign ending": (lambda t: t.update({f"{ONE}.lora_left.weight": torch.ones(2, 3)}), "lora_left"),
    "no name at all": (lambda t: t.update({"": torch.ones(1)}), "belong to no module"),
    "shape": (lambda t: t.update({next(k for k in t if "lora_up" in k): torch.ones(3, 2)}), "make no"),
    "ranks differ": (lambda t: t.update({next(k for k in t if "lora_up" in k): torch.ones(32, 5)}), "make no"),
    "no rank": (lambda t: t.update({next(k for k in t if "lora_down" in k): torch.ones(0, 32)}), "empty"),
    "scalar down": (lambda t: t.update({next(k for k in t if "lora_down" in k): torch.tensor(1.0)}), "without sides"),
    "alpha NaN": (lambda t: t.update({next(k for k in t if "alpha" in k): torch.tensor(float("nan"))}), "not finite"),
    "alpha infinite": (lambda t: t.update({next(k for k in t if "alpha" in k): torch.tensor(float("inf"))}), "not finite"),
    "alpha huge": (lambda t: t.update({next(k for k in t if "alpha" in k): torch.tensor(1e30)}), "alpha 1"),
    "alpha of many": (lambda t: t.update({next(k for k in t if "alpha" in k): torch.ones(3)}), "not one number"),
    "alpha empty": (lambda t: t.update({next(k for k in t if "alpha" in k): torch.ones(0)}), "not one number"),
    "quantised": (lambda t: t.update({next(k for k in t if "lora_up" in k): torch.ones(32, 2, dtype=torch.int8)}), "integer weights"),
    "fp8": (lambda t: t.update({next(k for k in t if "lora_up" in k): torch.ones(32, 2).to(torch.float8_e4m3fn)}), "quantised"),
    "twice": (lambda t: t.update({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 32)}), "twice"),
    "two kinds": (lambda t: t.update({next(k for k in t if "lora_up" in k).replace("lora_up.weight", "hada_w1_a"): torch.ones(32, 2)}), "two kinds"),
    "half a loha": (lambda t: (t.clear(), t.update({f"{ONE}.hada_w1_a": torch.ones(32, 2)})), "without w1_b"),
    "half a lokr": (lambda t: (t.clear(), t.update({f"{ONE}.lokr_w1": torch.ones(4, 4)})), "needs w2"),
    "lokr of other sizes": (lambda t: (t.clear(), t.update({f"{ONE}.lokr_w1": torch.ones(4, 4), f"{ONE}.lokr_w2": torch.ones(4, 4)})), "make no"),
    "lokr both": (lambda t: (t.clear(), t.update({f"{ONE}.lokr_w1": torch.ones(4, 4), f"{ONE}.lokr_w1_a": torch.ones(4, 1), f"{ONE}.lokr_w1_b": torch.ones(1, 4), f"{ONE}.lokr_w2": torch.ones(8, 8)})), "needs w1"),
    "dora scale": (lambda t: t.update({next(k for k in t if "lora_up" in k).replace("lora_up.weight", "dora_scale"): torch.ones(5, 1)}), "dora scale"),
    "whole difference": (lambda t: (t.clear(), t.update({f"{ONE}.diff": torch.ones(3, 3)})), "a difference"),
    "bias of what has none": (lambda t: t.update({f"{ONE}.diff_b": torch.ones(32)}), "has no bias"),
    "bias of another size": (lambda t: t.update({f"{ONE.replace('to_q', 'to_out_0')}.diff_b": torch.ones(5)}), "for a bias"),
    "norm of another size": (lambda t: t.update({"lora_unet_out_0.w_norm": torch.ones(5)}), "a difference"),
    "lora of a norm": (lambda t: t.update({"lora_unet_out_0.lora_down.weight": torch.ones(2, 16), "lora_unet_out_0.lora_up.weight": torch.ones(16, 2)}), "of a norm"),
    "OFT": (lambda t: (t.clear(), t.update({f"{ONE}.oft_blocks": torch.ones(4, 4, 4)})), "OFT"),
    "IA3": (lambda t: (t.clear(), t.update({f"{ONE}.weight": torch.ones(32, 1), f"{ONE}.on_input": torch.tensor(1.0)})), "IA3"),
    "GLoRA": (lambda t: (t.clear(), t.update({f"{ONE}.a1.weight": torch.ones(4, 4)})), "GLoRA"),
    "embedding of OneTrainer": (lambda t: t.update({"bundle_emb.word.string_to_param": torch.ones(1, 8)}), "bundle_emb"),
    "Flux": (lambda t: (t.clear(), t.update({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 8)})), "diffusion transformer"),
    "Flux of diffusers": (lambda t: (t.clear(), t.update({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8)})), "diffusion transformer"),
    "SD 1": (lambda t: (t.clear(), t.update({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)})), "Stable Diffusion 1"),
    "Cascade": (lambda t: (t.clear(), t.update({"lora_prior_unet_x.lora_down.weight": torch.ones(2, 8)})), "prior"),
    "a model": (lambda t: (t.clear(), t.update({"model.diffusion_model.out.2.weight": torch.ones(2, 8)})), "belong to no module"),
    "nothing": (lambda t: t.clear(), "no tensor of an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_adapters_are_refused_by_name(what: str, known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    tensors = some_tensors(known)
    change, word = BROKEN[what]
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(Halt, match=word) as halt:
        open_adapter(tmp_path / "a.safetensors", configs)
    assert halt.value.code == ExitCode.MISMATCH and str(tmp_path) in halt.value.message


def opened(path: Path, configs: sdxl.Configs) -> tuple[Halt | None, reading.Adapter | None]:
    try:
        return None, open_adapter(path, configs)
    except Halt as halt:
        return halt, None


def test_damaged_bytes_are_refused_or_read_as_they_were(known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    """A hundred files with a byte changed, cut or added in the header: never anything but a Halt, or the same layers."""
    tensors = some_tensors(known)
    save_file(tensors, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    length, draw = struct.unpack("<Q", whole[:8])[0], random.Random(0)
    refused = 0
    for number in range(150):
        data, at = bytearray(whole), draw.randrange(8 + length)
        if number % 3 == 0:
            data[at] = draw.randrange(256)
        elif number % 3 == 1:
            del data[at : at + draw.randrange(1, 40)]
        else:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 40)))
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        halted, read = opened(path, configs)
        refused += halted is not None
        if halted is not None:
            assert halted.code in (ExitCode.MISMATCH, ExitCode.USAGE) and str(path) in halted.message
        else:
            assert read is not None and all(layers.problem(layer) is None for layer in read.layers.values())
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("a.safetensors", b"", "empty"),
        ("a.safetensors", b"\x80\x02cos\nsystem\nq\x00.", "pickle"),
        ("a.pt", b"PK\x03\x04", "pickle"),
        ("a.ckpt", b"anything", "pickle"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("a.safetensors", struct.pack("<Q", 1 << 62) + b"{}", "no header length"),
        ("a.safetensors", struct.pack("<Q", 4) + b"[[[[", "damaged header"),
    ],
)
def test_other_files_are_refused(name: str, data: bytes, word: str, configs: sdxl.Configs, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Halt, match=word):
        open_adapter(tmp_path / name, configs)


def config_changes() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "no U-Net": lambda c: c.pop("unet"),
        "a list": lambda c: c.update(unet=[1]),
        "absurdly deep": lambda c: c["unet"].update(layers_per_block=10**9),
        "nothing to build": lambda c: c["unet"].update(block_out_channels=["x"]),
        "negative": lambda c: c["text_encoder"].update(hidden_size=-4),
        "other blocks": lambda c: c["unet"].update(down_block_types=["AttnDownBlock2D"] * 3),
        "other attention": lambda c: c["unet"].update(mid_block_type="UNetMidBlock2DSimpleCrossAttn"),
        "nine channels": lambda c: c["unet"].update(in_channels=9),
        "no scheduler": lambda c: c.pop("scheduler"),
    }


@pytest.mark.parametrize("what", config_changes())
def test_configs_in_an_adapters_metadata_are_not_trusted(what: str, known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    """Refused with the file's name, or read as what they are where they describe something: never another error."""
    told = json.loads(json.dumps({name: dict(configs[name]) for name in configs}))
    config_changes()[what](told)
    path = tmp_path / "a.safetensors"
    save_file(some_tensors(known), path, {sdxl.CONFIGS_KEY: json.dumps(told)})
    if what in ("nine channels", "other attention"):  # of which this adapter touches nothing
        assert open_adapter(path, reading.stored_configs(path)).layers
    else:
        with pytest.raises(Halt, match=re.escape(str(path))):
            open_adapter(path, reading.stored_configs(path))


PEFT_WRONG: dict[str, tuple[Any, str]] = {
    "no json": (b"{", "damaged"), "a list": (b"[]", "damaged"), "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "whole modules": ({"peft_type": "LORA", "modules_to_save": ["conv_in"]}, "modules_to_save"), "biases": ({"bias": "all"}, "bias"),
    "alpha of text": ({"r": 2, "lora_alpha": "__import__('os')"}, "no number"), "alpha true": ({"r": 2, "lora_alpha": True}, "no number"),
    "alpha infinite": (b'{"r": 2, "lora_alpha": Infinity}', "alpha inf"),
}  # fmt: skip


@pytest.mark.parametrize("what", PEFT_WRONG)
def test_pefts_configs_are_not_trusted(what: str, known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    config, word = PEFT_WRONG[what]
    module = "unet.conv_out"
    values = adapters.kohya(known, [module])
    flat = known.modules[module].kohya
    save_file(
        {f"base_model.model.conv_out.lora_{x}.weight": values[f"{flat}.lora_{p}.weight"] for x, p in (("A", "down"), ("B", "up"))},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    with pytest.raises(Halt, match=word):
        open_adapter(tmp_path, configs)


def test_a_pattern_of_alphas_is_taken_as_names_not_as_expressions(known: names.Names, configs: sdxl.Configs, tmp_path: Path) -> None:
    module = "unet.conv_out"
    values, flat = adapters.kohya(known, [module]), known.modules["unet.conv_out"].kohya
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"(a+)+$": 9, "conv_out": 6}}
    save_file(
        {f"unet.conv_out.lora_{x}.weight": values[f"{flat}.lora_{p}.weight"] for x, p in (("A", "down"), ("B", "up"))},
        tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)},
    )
    assert open_adapter(tmp_path / "a.safetensors", configs).layers[module].alpha == 6.0
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", {"lora_adapter_metadata": "[" * 100_000})
    with pytest.raises(Halt, match="damaged"):
        open_adapter(tmp_path / "b.safetensors", configs)


def test_file_and_weight_of_a_command_line(tmp_path: Path) -> None:
    assert reading.given("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert reading.given("a.safetensors:-0.5") == (Path("a.safetensors"), -0.5)
    (tmp_path / "b:2").touch()
    assert reading.given(str(tmp_path / "b:2")) == (tmp_path / "b:2", 1.0)
    with pytest.raises(Halt, match="not between"):
        reading.given("a.safetensors:nan")
