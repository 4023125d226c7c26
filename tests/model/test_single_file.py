"""Single file <-> diffusers folder: names, bits, what stock diffusers reads, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinysdxl
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.model import folder as model_folder
from train.model import layouts, sdxl, single_file
from train.storage import tensor_files

# diffusers 0.42's own schedulers on numpy 2.4
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Tensors = dict[str, torch.Tensor]
POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module", params=list(tinysdxl.VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinysdxl.write(tmp_path_factory.mktemp("model") / "folder", request.param)


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    out = folder.parent / "model.safetensors"
    single_file.to_single_file(folder, out, metadata={"modelspec.license": "CC0", "note": "straße"})
    return out


@pytest.fixture(scope="module")
def back(single: Path) -> Path:
    out = single.parent / "back"
    single_file.to_folder(single, out, tokenizers=single.parent / "folder")
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, with its single file beside it, for what does not depend on the architecture."""
    folder = tinysdxl.write(tmp_path_factory.mktemp("plain") / "folder")
    single_file.to_single_file(folder, folder.parent / "model.safetensors", metadata={"modelspec.license": "CC0"})
    return folder


def same(one: Tensors, two: Tensors) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert tensor.shape == two[name].shape, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), two[name].view(-1).view(torch.uint8)), name


def networks(folder: Path) -> Tensors:
    found: Tensors = {}
    for network, file in layouts.FILES.items():
        tensors = load_file(folder / network / file)
        found |= {sdxl.canonical(network, name): value for name, value in tensors.items()}
    return found


def test_layout_of_the_published_model() -> None:
    """Counts and total as measured on the released files."""
    shapes = {link.single: link.shape for link in sdxl.links(sdxl.STANDARD)} | {sdxl.LOGIT_SCALE: ()}
    counts = {prefix: sum(name.startswith(prefix) for name in shapes) for prefix in sdxl.PREFIXES.values()}
    assert list(counts.values()) == [1680, 196, 390, 248]
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 3_468_837_868
    places = {  # typed from the released file
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.logit_scale": (),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    }
    assert {name: shapes.get(name) for name in places} == places


def test_round_trip_is_bit_equal(folder: Path, single: Path, back: Path) -> None:
    same(networks(folder), networks(back))
    again = single.parent / "again.safetensors"
    single_file.to_single_file(back, again)
    same(load_file(single), load_file(again))
    assert tensor_files.open_file(again).metadata == tensor_files.open_file(single).metadata
    again.unlink()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tinysdxl.write(tmp_path / "source", dtype=dtype)
    single_file.to_single_file(source, tmp_path / "file.safetensors")
    single_file.to_folder(tmp_path / "file.safetensors", tmp_path / "back", config=source)
    same(networks(source), networks(tmp_path / "back"))


def test_logit_scale_and_foreign_metadata_survive(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain.parent / "model.safetensors")
    assert tensors[sdxl.LOGIT_SCALE].item() == pytest.approx(4.6052)
    tensors[sdxl.LOGIT_SCALE] = torch.tensor(3.25, dtype=torch.float16)
    tensors[POSITION_IDS] = torch.arange(77)[None]  # some files have it; it is no weight
    metadata = tensor_files.open_file(plain.parent / "model.safetensors").metadata
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    single_file.to_folder(tmp_path / "in.safetensors", tmp_path / "folder")
    single_file.to_single_file(tmp_path / "folder", tmp_path / "out.safetensors")
    del tensors[POSITION_IDS]
    same(tensors, load_file(tmp_path / "out.safetensors"))
    assert tensor_files.open_file(tmp_path / "out.safetensors").metadata == metadata


def picture(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "1girl, k-on!", height=32, width=32, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip


def test_stock_diffusers_reads_both(folder: Path, single: Path, back: Path) -> None:
    """Same pictures from the first folder, from ours, and from the single file with a local config."""
    wanted = picture(StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    assert np.array_equal(wanted, picture(StableDiffusionXLPipeline.from_pretrained(back, add_watermarker=False)))
    loaded = StableDiffusionXLPipeline.from_single_file(
        str(single), config=str(back), local_files_only=True, add_watermarker=False
    )
    assert np.array_equal(wanted, picture(loaded))


def test_our_folder_keeps_the_prefix_of_encoder_1_and_the_slow_vocabulary(back: Path) -> None:
    names = load_file(back / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    for name in model_folder.TOKENIZERS:
        vocabulary = json.loads((back / name / "vocab.json").read_text())
        merges = (back / name / "merges.txt").read_text().splitlines()
        assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1
        assert merges[:3] == ["#version: 0.2", "! ,</w>", "g i"]


def test_asymmetric_projection_comes_out_as_open_clip_reads_it(folder: Path, single: Path) -> None:
    linear = networks(folder)["text_encoder_2.text_projection.weight"]
    in_file = load_file(single)["conditioner.embedders.1.model.text_projection"]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(linear, linear.T)
    torch.testing.assert_close(x @ in_file, torch.nn.functional.linear(x, linear), rtol=1e-6, atol=1e-6)


def test_joined_projections_are_q_k_v_in_this_order(folder: Path, single: Path) -> None:
    weights, file = networks(folder), load_file(single)
    stem = "text_encoder_2.text_model.encoder.layers.1.self_attn."
    joined = file["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(joined, torch.cat([weights[f"{stem}{letter}_proj.weight"] for letter in "qkv"]))


def test_other_vae_takes_the_place_of_the_models_own(plain: Path, tmp_path: Path) -> None:
    other = tinysdxl.write(tmp_path / "other", seed=9)
    single_file.to_single_file(plain, tmp_path / "out.safetensors", vae=other / "vae")
    name = "first_stage_model.quant_conv.weight"
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], networks(other)["vae.quant_conv.weight"])
    single_file.to_single_file(plain, tmp_path / "own.safetensors")
    single_file.to_folder(tmp_path / "own.safetensors", tmp_path / "folder", vae=other)
    same(networks(tmp_path / "folder"), load_all(plain, other))


def load_all(model: Path, vae: Path) -> dict[str, torch.Tensor]:
    """Tensors of a folder, its VAE's from another."""
    own = {name: tensor for name, tensor in networks(vae).items() if name.startswith("vae.")}
    return networks(model) | own


def test_a_vae_file_takes_the_place_of_the_models_own(plain: Path, tmp_path: Path) -> None:
    links = [link for link in sdxl.links(sdxl.STANDARD) if link.single.startswith("first_stage_model.")]
    save_file({link.single: torch.full(link.shape, 0.5, dtype=torch.float16) for link in links}, tmp_path / "vae.safetensors")
    told = {"anix.vae_sha256": "that of another", "anix.stage": "ft1"}
    single_file.to_single_file(plain, tmp_path / "out.safetensors", vae=tmp_path / "vae.safetensors", metadata=told)
    opened = tensor_files.open_file(tmp_path / "out.safetensors")
    assert {opened.blobs[link.single].shape for link in links} == {link.shape for link in links}
    assert layouts.record_in(opened.metadata) == {"stage": "ft1"}
    layouts.single_weights(opened, layouts.configs_in(opened))  # whole, with the configs it carries


def test_sharded_folder_and_fp16_variant(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    for number, part in ((1, names[::2]), (2, names[1::2])):
        save_file(
            {n: tensors[n] for n in part}, file.with_name(f"diffusion_pytorch_model-0000{number}-of-00002.safetensors")
        )
    file.unlink()
    vae = tmp_path / "model/vae"
    os.rename(vae / "diffusion_pytorch_model.safetensors", vae / "diffusion_pytorch_model.fp16.safetensors")
    for network in ("text_encoder", "text_encoder_2"):  # one shard or two: the library names them alike
        whole = tmp_path / "model" / network / "model.safetensors"
        os.rename(whole, whole.with_name("model.fp16-00001-of-00001.safetensors"))
    single_file.to_single_file(tmp_path / "model", tmp_path / "out.safetensors")
    single_file.to_single_file(plain, tmp_path / "want.safetensors")
    same(load_file(tmp_path / "want.safetensors"), load_file(tmp_path / "out.safetensors"))


def test_a_network_by_its_own_name_goes_before_a_variant_beside_it(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file.with_suffix(".ema.safetensors"))
    assert layouts.weight_files(file.parent) == [file]


def test_v_prediction_is_marked_for_other_programs_and_read_back(plain: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(plain, model)
    path = model / "scheduler/scheduler_config.json"
    told = {**json.loads(path.read_text()), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(told))
    single_file.to_single_file(model, tmp_path / "v.safetensors", metadata={})
    tensors = load_file(tmp_path / "v.safetensors")
    assert (tensors["v_pred"].shape, tensors["ztsnr"].shape) == ((0,), (0,))
    bare = tensor_files.Tensors(tmp_path, {}, tensor_files.open_file(tmp_path / "v.safetensors").blobs)
    for configs in (layouts.configs_in(bare), layouts.read_configs(model)):
        assert configs["scheduler"]["prediction_type"] == "v_prediction"
        assert configs["scheduler"]["rescale_betas_zero_snr"] is True
    single_file.to_folder(tmp_path / "v.safetensors", tmp_path / "back")
    same(networks(model), networks(tmp_path / "back"))


def test_file_mode_follows_the_umask(single: Path, back: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (single, back / "unet/diffusion_pytorch_model.safetensors", back / "unet/config.json"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def broken(change: Callable[[Tensors], None]) -> Callable[[Path, Path], None]:
    def make(single: Path, out: Path) -> None:
        tensors = load_file(single)
        change(tensors)
        save_file(tensors, out, tensor_files.open_file(single).metadata)

    return make


def lora(single: Path, out: Path) -> None:
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 4)}, out)


def stable_diffusion_1(single: Path, out: Path) -> None:
    save_file(
        {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4),
            "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(4),
        },
        out,
    )


def refiner(single: Path, out: Path) -> None:
    save_file(
        {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4),
            "conditioner.embedders.0.model.ln_final.weight": torch.zeros(4),
        },
        out,
    )


def truncated(single: Path, out: Path) -> None:
    out.write_bytes(single.read_bytes()[:-100])


def truncated_header(single: Path, out: Path) -> None:
    out.write_bytes(single.read_bytes()[:100])


def empty(single: Path, out: Path) -> None:
    out.write_bytes(b"")


def noise(single: Path, out: Path) -> None:
    out.write_bytes(bytes(range(200, 256)) * 10)


def pickled(single: Path, out: Path) -> None:
    torch.save({"a": torch.zeros(2)}, out)


def longer(single: Path, out: Path) -> None:
    out.write_bytes(single.read_bytes() + b"12345678")


NAN = "model.diffusion_model.middle_block.1.proj_in.weight"
REFUSED = {
    "lora": (lora, "LoRA"),
    "sd1": (stable_diffusion_1, "Stable Diffusion 1"),
    "refiner": (refiner, "refiner"),
    "truncated": (truncated, "truncated"),
    "truncated header": (truncated_header, "truncated"),
    "empty": (empty, "0 bytes"),
    "no safetensors": (noise, "no safetensors file"),
    "pickle": (pickled, "pickle"),
    "foreign bytes": (longer, "foreign bytes"),
    "nan": (broken(lambda t: t[NAN].view(-1)[3:4].fill_(float("nan"))), rf"bad.safetensors: unet\.mid_block\.attentions\.0\.proj_in\.weight .there: {re.escape(NAN)}. holds .* not finite"),
    "nan scale": (broken(lambda t: t.update({sdxl.LOGIT_SCALE: torch.tensor(float("nan"))})), r"logit_scale is not finite"),
    "missing": (broken(lambda t: t.pop(NAN)), f"1 tensors are missing: {NAN}"),
    "foreign": (broken(lambda t: t.update({"newly.x": torch.zeros(1)})), "1 tensors are foreign: newly.x.*not dropped in silence"),
    "shape": (broken(lambda t: t.update({NAN: torch.zeros(3, 3)})), rf"{NAN} is \[3, 3\], not"),
    "type": (broken(lambda t: t.update({NAN: t[NAN].to(torch.float8_e4m3fn)})), "quantised"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_reason(kind: str, plain: Path, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    file = tmp_path / "bad.safetensors"
    make(plain.parent / "model.safetensors", file)
    with pytest.raises(Halt, match=message) as caught:
        single_file.to_folder(file, tmp_path / "out", config=plain)
    assert caught.value.code == ExitCode.MISMATCH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors"]  # nothing left behind


def test_pickled_folder_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(Halt, match="pickle"):
        single_file.to_single_file(tmp_path / "model", tmp_path / "out.safetensors")


def test_nothing_is_written_over(plain: Path, tmp_path: Path) -> None:
    for out in (plain.parent / "model.safetensors", plain):
        with pytest.raises(Halt, match="exists") as caught:
            single_file.to_single_file(plain, out)
        assert caught.value.code == ExitCode.USAGE


def test_what_a_user_calls_tmp_stays(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "back.tmp").mkdir()
    for mine in (tmp_path / "back.tmp/mine", tmp_path / "out.safetensors.tmp"):
        mine.write_text("mine")
    single_file.to_single_file(plain, tmp_path / "out.safetensors")
    single_file.to_folder(tmp_path / "out.safetensors", tmp_path / "back")
    assert (tmp_path / "back.tmp/mine").read_text() == (tmp_path / "out.safetensors.tmp").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": span} for name, span in (("a", [0, 4]), ("b", [0, 4]))
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(Halt, match="overlap"):
        tensor_files.open_file(tmp_path / "x.safetensors")


def blob_of(tensor: torch.Tensor, piece_bytes: int = 8) -> tensor_files.Blob:
    data = memoryview(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    pieces = [data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes)]
    return tensor_files.Blob(names[tensor.dtype], tuple(tensor.shape), lambda: iter(pieces))


@given(values=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=9))
def test_casts_equal_torchs(values: list[float]) -> None:
    exact = torch.tensor(values)
    for source in (exact, exact.to(torch.bfloat16).clamp(-6e4, 6e4), exact.half()):
        for name, dtype in (("F16", torch.float16), ("F32", torch.float32)):
            got = np.frombuffer(tensor_files.cast(blob_of(source), name, "x").read(), dtype=np.uint8)
            assert got.tobytes() == source.to(dtype).view(torch.uint8).numpy().tobytes()


def test_weight_too_large_for_fp16_is_named() -> None:
    with pytest.raises(Halt, match=r"unet\.x .*fp32") as caught:
        tensor_files.cast(blob_of(torch.tensor([1.0, 70000.0])), "F16", "unet.x").read()
    assert caught.value.code == ExitCode.NON_FINITE


@given(bits=st.integers(0, 2**16 - 1), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_finite_equals_torchs(bits: int, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1, bits], dtype=torch.uint16).view(dtype)
    assert tensor_files.finite(blob_of(tensor).read(), blob_of(tensor).dtype) == bool(torch.isfinite(tensor).all())


@given(parts=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 5), piece=st.sampled_from([4, 8, 64]))
def test_rows_and_concatenation_undo_each_other(parts: int, height: int, width: int, piece: int) -> None:
    tensor = torch.arange(parts * height * width, dtype=torch.float32).reshape(parts * height, width)
    whole = blob_of(tensor, piece)
    split = [tensor_files.rows(whole, i, parts) for i in range(parts)]
    assert [blob.read() for blob in split] == [t.numpy().tobytes() for t in tensor.split(height)]
    joined = tensor_files.concatenated(split)
    assert (joined.shape, joined.read()) == (whole.shape, whole.read())
    assert tensor_files.transposed(tensor_files.transposed(whole)).read() == whole.read()


@pytest.mark.parametrize(("network", "key", "value", "words"), [
    ("text_encoder", "num_hidden_layers", 10**7, "num_hidden_layers of its text_encoder config is absurd"),
    ("unet", "transformer_layers_per_block", [10**6, 1], "transformer_layers_per_block of its unet config is absurd"),
    ("unet", "block_out_channels", [10**9, 10**9], "cannot be built"),
    ("unet", "down_block_types", ["Nope", "Nope"], "cannot be built .*Nope"),
    ("unet", "block_out_channels", None, "its unet config has no block_out_channels"),
    ("vae", "norm_num_groups", 0, "cannot be built"),
])  # fmt: skip
def test_configs_that_describe_nothing_are_refused(
    network: str, key: str, value: Any, words: str, plain: Path, tmp_path: Path
) -> None:
    """In a file's metadata and in a folder alike: a number of layers must not keep us busy for ever."""
    single = plain.parent / "model.safetensors"
    metadata = tensor_files.open_file(single).metadata
    configs = json.loads(metadata[sdxl.CONFIGS_KEY])
    configs[network] |= {key: value}
    if value is None:
        del configs[network][key]
    save_file(load_file(single), tmp_path / "x.safetensors", {**metadata, sdxl.CONFIGS_KEY: json.dumps(configs)})
    shutil.copytree(plain, tmp_path / "folder")
    (tmp_path / "folder" / network / "config.json").write_text(json.dumps(configs[network]))
    with pytest.raises(Halt, match=f"x.safetensors is no SDXL model: .*{words}") as caught:
        single_file.to_folder(tmp_path / "x.safetensors", tmp_path / "out")
    assert caught.value.code == ExitCode.MISMATCH
    with pytest.raises(Halt, match=f"folder is no SDXL model: .*{words}") as caught:
        single_file.to_single_file(tmp_path / "folder", tmp_path / "out.safetensors")
    assert caught.value.code == ExitCode.MISMATCH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.safetensors"]


def test_names_from_files_cannot_steer_the_terminal(tmp_path: Path) -> None:
    save_file({"a\x1b[31mred": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(Halt, match=r"first tensors: a\\x1b\[31mred") as caught:
        single_file.to_folder(tmp_path / "x.safetensors", tmp_path / "out")
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("stored", ['{"hex": "zz", "dtype": "F32"}', '{"hex": "00", "dtype": "F32"}', '{"hex": "0000c07f", "dtype": "F32"}', '{"hex": "00000000"}', "5"])
def test_a_damaged_sidecar_or_scheduler_is_refused(stored: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    (tmp_path / "model/single_file.json").write_text(f'{{"metadata": {{}}, "logit_scale": {stored}}}')
    with pytest.raises(Halt, match="logit_scale is damaged"):
        single_file.to_single_file(tmp_path / "model", tmp_path / "x.safetensors")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text("[]")
    with pytest.raises(Halt, match=r"scheduler_config\.json is damaged"):
        single_file.to_single_file(tmp_path / "model", tmp_path / "x.safetensors")


def test_a_link_is_not_written_over(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to("elsewhere")
    with pytest.raises(Halt, match="exists"):
        single_file.to_single_file(plain, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").is_symlink()
