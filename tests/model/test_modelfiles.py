"""Model files as they lie on people's disks: leftovers, other spellings, VAEs in every layout, and what is refused how."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tinysdxl
import torch
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.config.stage import ModelConfig
from train.model import layouts, other_kinds, sdxl, single_file, source, vae_file
from train.model.networks import fill
from train.prepare.encoding.encoder import find_vae
from train.storage import tensor_files

Tensors = dict[str, torch.Tensor]
UNET, ONE, TWO, VAE = sdxl.PREFIXES.values()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its single file beside it as model.safetensors."""
    folder = tinysdxl.write(tmp_path_factory.mktemp("model") / "folder", "least")
    single_file.to_single_file(folder, folder.parent / "model.safetensors", metadata={"modelspec.license": "CC0"})
    return folder


def weights_of(path: Path, vae: Path | None = None) -> tuple[dict[str, bytes], source.LocalModel]:
    model = source.resolve(ModelConfig(init_from=str(path), vae=None if vae is None else str(vae)))
    return {name: blob.read() for name, blob in model.weights.items()}, model


def written(folder: Path, out: Path, change: Callable[[Tensors], None]) -> Path:
    """The single file of `folder` with its tensors changed."""
    single = folder.parent / "model.safetensors"
    tensors = load_file(single)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out, tensor_files.open_file(single).metadata)
    return out


LEFT = {
    "denoiser.sigmas": torch.zeros(1000),
    "model_ema.decay": torch.tensor(0.5),
    "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
    "model_ema.diffusion_modeltime_embed0weight": torch.zeros(4, 4),
    f"{VAE}model_ema.decay": torch.tensor(0.5),
    f"{VAE}loss.logvar": torch.tensor(0.5),
    f"{VAE}loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
    f"{ONE}text_model.embeddings.position_ids": torch.arange(77)[None],
    f"{ONE}text_projection.weight": torch.zeros(4, 4),
    f"{ONE}logit_scale": torch.tensor(1.0),
    "conditioner.embedders.0.logit_scale": torch.tensor(1.0),
    f"{TWO}visual.proj": torch.zeros(4, 4),
    f"{TWO}attn_mask": torch.zeros(77, 77),
    "alphas_cumprod": torch.full((1000,), float("nan")),
    "betas": torch.zeros(1000),
    "log_one_minus_alphas_cumprod": torch.zeros(1000),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
    "embedding_manager.x": torch.tensor(0.5),
    "global_step": torch.tensor(7),
}


def test_leftovers_are_passed_over_and_named_in_one_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "anix")
    file = written(folder, tmp_path / "x.safetensors", lambda tensors: tensors.update(LEFT))
    assert weights_of(file)[0] == weights_of(folder.parent / "model.safetensors")[0]
    single_file.to_folder(file, tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(lines) == 1
    assert f"x.safetensors: passed over {len(LEFT)} tensors" in lines[0]
    for name in ("model_ema.* (4)", "loss.* (2)", "noise schedule (4)", "position_ids", "image encoder of CLIP", "embedding_manager"):
        assert name in lines[0], name


@pytest.mark.parametrize("name", ["model_emax.decay", "lossy.weight", "alphas", "visually.x", f"{UNET}input_blocks.99.0.weight",
                                  f"{VAE}encoder.extra.weight", "betas.weight"])  # fmt: skip
def test_what_is_not_on_the_list_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    file = written(folder, tmp_path / "x.safetensors", lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(Halt, match=rf"1 tensors are foreign: {name}\. All of SDXL is there.*not dropped in silence") as caught:
        weights_of(file)
    assert caught.value.code == ExitCode.MISMATCH


def renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def linear_projection(tensors: Tensors) -> None:
    tensors[f"{TWO}text_projection.weight"] = tensors.pop(f"{TWO}text_projection").T


def matrices(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".attn_1." in name and tensors[name].ndim == 4]:
        tensors[name] = tensors[name][:, :, 0, 0]


def huggingface_names(prefix: str) -> Callable[[Tensors], None]:
    """Encoder 2 under transformers' names, q, k and v apart, as a folder's."""

    def change(tensors: Tensors) -> None:
        links = [link for link in sdxl.links(tinysdxl_configs()) if link.single.startswith(TWO)]
        for link in links:
            data = memoryview(tensors.pop(link.single).numpy().tobytes())
            whole = tensor_files.Blob("F32", link.shape, partial(iter, [data]))
            for name, part in layouts.from_single(link, whole):
                data = torch.frombuffer(bytearray(part.read()), dtype=torch.float32).reshape(part.shape)
                tensors[prefix + name.removeprefix("text_encoder_2.")] = data

    return change


def tinysdxl_configs() -> sdxl.Configs:
    return layouts.configs_in(tensor_files.open_file(huggingface_names.single))  # type: ignore[attr-defined]


SPELLINGS = {
    "encoder 1 without text_model.": (renamed(f"{ONE}text_model.", ONE), "text_encoder: tensors under other names"),
    "text_projection as a linear layer's": (linear_projection, "text_projection in its other layout"),
    "the VAE's attention as matrices": (matrices, "matrices that are 1x1 convolutions there"),
    "everything behind model.": (renamed("", "model."), "unet: tensors under other names"),
    "the VAE behind vae.": (renamed(VAE, "vae."), "vae: tensors under other names"),
    "encoder 2 in transformers' names": (huggingface_names(TWO), "text_encoder_2: tensors under other names"),
    "encoder 2 as a second transformer": (huggingface_names("conditioner.embedders.1.transformer."), "text_encoder_2: tensors under other names"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_other_spellings_are_read_and_named(kind: str, folder: Path, tmp_path: Path) -> None:
    change, words = SPELLINGS[kind]
    huggingface_names.single = folder.parent / "model.safetensors"  # type: ignore[attr-defined]
    weights, model = weights_of(written(folder, tmp_path / "x.safetensors", change))
    assert weights == weights_of(folder.parent / "model.safetensors")[0]
    assert words in "; ".join(model.notes)
    assert not weights_of(folder.parent / "model.safetensors")[1].notes


def test_a_tensor_in_two_spellings_is_one_too_many(folder: Path, tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        tensors[f"{ONE}embeddings.position_embedding.weight"] = torch.zeros(77, 16)
        tensors["vae.encoder.mid_block.attentions.0.to_q.weight"] = torch.zeros(16, 16)

    with pytest.raises(Halt, match=r"2 tensors are foreign: .*embeddings\.position_embedding\.weight, vae\.encoder\.mid_block"):
        weights_of(written(folder, tmp_path / "x.safetensors", twice))


def test_a_file_without_vae_needs_one(folder: Path, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(VAE)]:
            del tensors[name]

    file = written(folder, tmp_path / "x.safetensors", without)
    with pytest.raises(Halt, match=r"SDXL without a VAE: set model\.vae"):
        weights_of(file)
    with pytest.raises(Halt, match=r"latents\.vae .*x\.safetensors holds no VAE .*name SDXL's VAE"):
        find_vae(str(file))
    other = tinysdxl.write(tmp_path / "other", "least", seed=3)
    want = {**weights_of(folder)[0], **{n: w for n, w in weights_of(other)[0].items() if n.startswith("vae.")}}
    assert weights_of(file, other / "vae")[0] == want
    single_file.to_folder(file, tmp_path / "out", vae=other)
    assert weights_of(tmp_path / "out")[0] == want
    shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/vae")
    with pytest.raises(Halt, match=r"bare has no VAE: set model\.vae"):
        weights_of(tmp_path / "bare")
    assert weights_of(tmp_path / "bare", other)[0] == want
    source.look(ModelConfig(init_from=str(tmp_path / "bare"), vae=str(other)))
    single_file.to_single_file(tmp_path / "bare", tmp_path / "y.safetensors", vae=other / "vae")
    assert weights_of(tmp_path / "y.safetensors")[0] == want


# --- folders --------------------------------------------------------------------------------------------------------


def split(file: Path, name: str, parts: int = 2) -> list[Path]:
    """The file's tensors in `parts` shards; the file goes."""
    tensors = load_file(file)
    paths = [file.with_name(name.replace("*", f"{number:05d}")) for number in range(1, parts + 1)]
    for number, path in enumerate(paths):
        save_file({n: tensors[n] for n in sorted(tensors)[number::parts]}, path)
    file.unlink()
    return paths


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-*-of-00002.safetensors", "diffusion_pytorch_model.fp16-*-of-00002.safetensors",
                                  "diffusion_pytorch_model-*-of-00002.fp16.safetensors"])  # fmt: skip
def test_shards_are_read_and_a_stray_set_is_not(name: str, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    file = model / "unet/diffusion_pytorch_model.safetensors"
    paths = split(file, name)
    (file.parent / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    weights, opened = weights_of(model)
    assert weights == weights_of(folder)[0]
    assert not opened.notes
    stray = file.with_name("diffusion_pytorch_model-00003-of-00007.safetensors")
    shutil.copy(paths[0], stray)
    assert weights_of(model)[0] == weights
    shutil.copy(folder / "unet" / file.name, file)  # saved anew as one file; the shards stay behind
    again, opened = weights_of(model)
    assert again == weights
    assert "unet: passed over files beside diffusion_pytorch_model.safetensors" in opened.notes[0]
    for left in (*paths, stray, file.parent / "diffusion_pytorch_model.safetensors.index.json"):
        assert left.name in opened.notes[0]
    file.unlink()
    paths[1].unlink()
    stray.unlink()
    with pytest.raises(Halt, match="holds 1 of 2 shards"):
        weights_of(model)


def test_two_whole_sets_of_shards_are_asked_about(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    file = model / "unet/diffusion_pytorch_model.safetensors"
    for parts in (2, 3):
        shutil.copy(folder / "unet" / file.name, file)
        split(file, f"diffusion_pytorch_model-*-of-{parts:05d}.safetensors", parts)
    with pytest.raises(Halt, match="several copies of its weights"):
        weights_of(model)


def test_leftovers_in_a_folders_files(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    for file, extra in (("vae/diffusion_pytorch_model", "model_ema.decay"), ("text_encoder/model", "vision_model.x"),
                        ("text_encoder_2/model", "logit_scale"), ("text_encoder/model", "text_projection.weight")):  # fmt: skip
        path = model / f"{file}.safetensors"
        save_file({**load_file(path), extra: torch.tensor(0.5)}, path)
    path = model / "text_encoder_2/model.safetensors"
    tensors = load_file(path)
    tensors["text_projection"] = tensors.pop("text_projection.weight").T.contiguous()
    save_file(tensors, path)
    weights, opened = weights_of(model)
    assert weights == weights_of(folder)[0]
    told = "; ".join(opened.notes)
    for words in ("vae: passed over 1", "text_encoder: passed over 2", "text_encoder_2: passed over 1", "text_projection in its other"):
        assert words in told, told


def test_mixed_precisions_join_without_loss(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    path = model / "text_encoder_2/model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".k_proj." in name:
            tensors[name] = tensors[name].bfloat16()
        elif ".v_proj." in name:
            tensors[name] = tensors[name].half()
    save_file(tensors, path)
    single_file.to_single_file(model, tmp_path / "x.safetensors")
    reading = weights_of(tmp_path / "x.safetensors")[1].weights
    names = {sdxl.canonical("text_encoder_2", name): tensor for name, tensor in tensors.items() if "_proj.weight" in name}
    for name, tensor in names.items():
        assert reading[name].read() == tensor.float().numpy().tobytes(), name


# --- VAEs -----------------------------------------------------------------------------------------------------------


def vae_layouts(folder: Path, out: Path) -> dict[str, Path]:
    """The VAE of `folder` in every layout, each with leftovers where files have them."""
    original = {name: tensor for name, tensor in load_file(folder.parent / "model.safetensors").items() if name.startswith(VAE)}
    bare = {name.removeprefix(VAE): tensor for name, tensor in original.items()}
    left = {"model_ema.decay": torch.tensor(0.5), "loss.logvar": torch.tensor(0.5)}
    configs = tensor_files.open_file(folder.parent / "model.safetensors").metadata
    files = {"bare": {**bare, **left}, "prefixed": {**original, **{VAE + name: tensor for name, tensor in left.items()}}}
    for name, tensors in files.items():
        save_file(tensors, out / f"{name}.safetensors", configs)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    shutil.copytree(folder / "vae", out / "old")
    tensors = load_file(out / "old/diffusion_pytorch_model.safetensors")
    for name in list(tensors):
        for new, former in old.items():
            if f".{new}." in name:
                value = tensors.pop(name)
                tensors[name.replace(f".{new}.", f".{former}.")] = value[:, :, None, None] if value.ndim == 2 else value
    save_file(tensors, out / "old/diffusion_pytorch_model.safetensors")
    return {
        "a model folder": folder, "the folder": folder / "vae", "the file in it": folder / "vae/diffusion_pytorch_model.safetensors",
        "a whole checkpoint": folder.parent / "model.safetensors", "old names": out / "old",
        **{name: out / f"{name}.safetensors" for name in files},
    }  # fmt: skip


def test_a_vae_is_the_same_in_every_layout_and_place(folder: Path, tmp_path: Path) -> None:
    want = {name: blob for name, blob in weights_of(folder)[0].items() if name.startswith("vae.")}
    other = tinysdxl.write(tmp_path / "other", "least", seed=3)
    ids = set()
    for kind, path in vae_layouts(folder, tmp_path).items():
        vae = find_vae(str(path))
        ids.add(vae_file.identity(vae.weights))
        assert {name: blob.read() for name, blob in vae.weights.items()} == want, kind
        network = fill("vae", vae.config, vae.weights, vae.file)
        assert torch.equal(network.quant_conv.weight, load_file(folder / "vae/diffusion_pytorch_model.safetensors")["quant_conv.weight"])
        replaced, _ = weights_of(other, path)
        assert {name: blob for name, blob in replaced.items() if name.startswith("vae.")} == want, kind
        single_file.to_single_file(other, tmp_path / f"{kind} in.safetensors", vae=path)
        assert weights_of(tmp_path / f"{kind} in.safetensors")[0] == replaced, kind
    assert len(ids) == 1


def test_a_bare_vae_file_takes_the_sizes_of_the_model_it_goes_into(folder: Path, tmp_path: Path) -> None:
    path = vae_layouts(folder, tmp_path)["bare"]
    save_file(load_file(path), tmp_path / "nothing.safetensors")  # no config anywhere
    weights, model = weights_of(folder, tmp_path / "nothing.safetensors")
    assert weights == weights_of(folder)[0]
    assert model.configs["vae"]["block_out_channels"] == [8, 8, 16]
    with pytest.raises(Halt, match="no SDXL model of this architecture"):  # nobody knows its sizes here
        find_vae(str(tmp_path / "nothing.safetensors"))


CONFIGS = {
    "shift_factor": ({"shift_factor": "0.1159"}, "shift_factor is no number"),
    "latents_mean": ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "latents_mean and latents_std are given together"),
    "latents_std": ({"latents_mean": [0.1] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std must be 4 numbers above 0"),
    "three means": ({"latents_mean": [0.1] * 3, "latents_std": [1.0] * 4}, "latents_mean must be 4 numbers"),
    "two shifts": ({"shift_factor": 0.1, "latents_mean": [0.2] * 4, "latents_std": [1.0] * 4}, "say two things"),
    "sixteen channels": ({"latent_channels": 16}, "16 channels"),
    "no factor": ({"scaling_factor": None}, "no positive number"),
    "another class": ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vae_nobody_could_apply_is_refused_in_every_place(kind: str, folder: Path, tmp_path: Path) -> None:
    change, words = CONFIGS[kind]
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    path = model / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for place in (
        lambda: find_vae(str(model / "vae")), lambda: find_vae(str(model), "npz_vae of a"),
        lambda: weights_of(folder, model / "vae"), lambda: weights_of(model),
        lambda: single_file.to_single_file(model, tmp_path / "x.safetensors"),
        lambda: single_file.to_single_file(folder, tmp_path / "x.safetensors", vae=model),
    ):  # fmt: skip
        with pytest.raises(Halt, match=words) as caught:
            place()
        assert caught.value.code == ExitCode.MISMATCH
    assert weights_of(model, folder / "vae")[0] == weights_of(folder)[0]  # another in its place is well


def test_the_vae_of_stable_diffusion_1_does_not_take_sdxls_place(folder: Path, tmp_path: Path) -> None:
    """Same shapes, other latents: only its scaling_factor tells, which its older configs do not name."""
    shutil.copytree(folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    config = json.loads(path.read_text())
    for factor in ({"scaling_factor": 0.18215}, {}):
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "scaling_factor"} | factor))
        for place in (lambda: weights_of(folder, tmp_path / "vae"),
                      lambda: single_file.to_single_file(folder, tmp_path / "x.safetensors", vae=tmp_path / "vae")):  # fmt: skip
            with pytest.raises(Halt, match=r"Stable Diffusion 1's VAE; the model's own is 0\.13025"):
                place()
        assert find_vae(str(tmp_path / "vae")).config["scaling_factor"] == 0.18215  # alone it is what it is


def test_a_shift_of_zero_and_an_unusual_factor_are_taken(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift_factor": 0.0, "latents_mean": None, "scaling_factor": 0.2}))
    model = weights_of(folder, tmp_path / "vae")[1]
    assert model.configs["vae"]["scaling_factor"] == 0.2
    assert "scaling_factor 0.2; other programs take 0.13025" in "; ".join(model.notes)


# --- what is no SDXL model ------------------------------------------------------------------------------------------

FIRST = f"{UNET}input_blocks.0.0.weight"
KINDS: dict[str, tuple[Tensors, str]] = {
    "LoRA": ({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, "LoRA.*merge it"),
    "LyCORIS": ({"lycoris_x.hada_w1_a": torch.zeros(4, 8)}, "LoRA"),
    "embedding": ({"clip_g": torch.zeros(4, 8), "clip_l": torch.zeros(4, 8)}, "textual inversion"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": torch.zeros(4)}, "ControlNet"),
    "refiner": ({FIRST: torch.zeros(4, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": torch.zeros(4)}, "refiner"),
    "inpainting": ({FIRST: torch.zeros(4, 9, 3, 3), f"{ONE}x": torch.zeros(4)}, "inpainting.*9 channels.*start from"),
    "editing": ({FIRST: torch.zeros(4, 8, 3, 3), f"{ONE}x": torch.zeros(4)}, "edits pictures"),
    "SD 1": ({FIRST: torch.zeros(4, 4, 3, 3), "cond_stage_model.transformer.x": torch.zeros(4)}, "Stable Diffusion 1"),
    "SD 2": ({FIRST: torch.zeros(4, 4, 3, 3), "cond_stage_model.model.x": torch.zeros(4)}, "Stable Diffusion 2"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.x": torch.zeros(4)}, "diffusion transformer"),
    "Flux": ({"double_blocks.0.img_attn.proj.weight": torch.zeros(4)}, "diffusion transformer"),
    "VAE": ({f"{VAE}decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, "a VAE alone.*model.vae"),
    "U-Net": ({FIRST: torch.zeros(4, 4, 3, 3)}, "U-Net alone"),
    "a folder's U-Net": ({"down_blocks.0.x": torch.zeros(4)}, "one network of a diffusers folder"),
    "encoder": ({"text_model.x": torch.zeros(4)}, "text encoder alone"),
    "fp8 with scales": ({FIRST: torch.zeros(4, 4, 3, 3), f"{ONE}x": torch.zeros(4), f"{UNET}out.2.comfy_quant": torch.zeros(4)}, "quantised"),
    "Playground": ({FIRST: torch.zeros(4, 4, 3, 3), f"{ONE}x": torch.zeros(4), "edm_mean": torch.zeros(4)}, "EDM"),
    "nothing known": ({"conv_first.weight": torch.zeros(4)}, "no diffusion model .*first tensors: conv_first.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_sdxl_says_what_it_is_and_what_to_do(kind: str, tmp_path: Path) -> None:
    tensors, words = KINDS[kind]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(Halt, match=words) as caught:
        source.resolve(ModelConfig(init_from=str(tmp_path / "x.safetensors")))
    assert caught.value.code == ExitCode.MISMATCH
    assert len(caught.value.message) < 600
    if kind != "VAE":
        with pytest.raises(Halt, match=r"no VAE|no SDXL"):
            vae_file.open_vae(tmp_path / "x.safetensors", "model.vae")


HEADS = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 69\n", "Git LFS pointer.*git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><head></head></html>", "web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "error in JSON": (b'{"error":"Access to model x is restricted"}', "server's error message"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF.*quantised"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip archive.*unpack"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "archive"),
    "pickle": (b"\x80\x02}q\0.", "pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_what_is_no_safetensors_says_what_it_is(kind: str, tmp_path: Path) -> None:
    data, words = HEADS[kind]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(Halt, match=words) as caught:
        source.resolve(ModelConfig(init_from=str(tmp_path / "x.safetensors")))
    assert caught.value.code == ExitCode.MISMATCH


def test_a_distilled_relative_and_a_cut_file_are_told_apart() -> None:
    links = sdxl.links(sdxl.STANDARD, ("unet", "text_encoder"))
    unet = [link.single for link in links if link.single.startswith(UNET)]
    for missing, words in ((unet[:60], "distilled relatives"), (unet[:2], "nearly SDXL"), (unet, "SDXL without unet")):
        with pytest.raises(Halt, match=words):
            other_kinds.refuse_unlike(Path("x"), missing, [], [], links)


def test_folders_that_are_nearly_a_model(folder: Path, tmp_path: Path) -> None:
    unet = {**json.loads((folder / "unet/config.json").read_text()), "in_channels": 9}
    shutil.copytree(folder, tmp_path / "inpaint")
    (tmp_path / "inpaint/unet/config.json").write_text(json.dumps(unet))
    shutil.copytree(folder, tmp_path / "sd1")
    (tmp_path / "sd1/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    shutil.rmtree(tmp_path / "sd1/text_encoder_2")
    shutil.copytree(folder, tmp_path / "refiner")
    shutil.rmtree(tmp_path / "refiner/text_encoder")
    (tmp_path / "one").mkdir()
    shutil.copy(folder.parent / "model.safetensors", tmp_path / "one/mine.safetensors")
    cases = {"inpaint": "inpainting", "sd1": "folder of StableDiffusionPipeline", "refiner": "refiner", "one": "one/mine.safetensors",
             "inpaint/unet": "one network of a folder; name the folder"}  # fmt: skip
    for name, words in cases.items():
        with pytest.raises(Halt, match=words):
            weights_of(tmp_path / name)


def test_a_hub_name_without_commit_gets_the_line_to_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Halt, match="owner/name@<40-digit commit>") as caught:
        source.find("owner/name")
    assert caught.value.code == ExitCode.USAGE
    refs = tmp_path / "models--owner--name/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    for name in ("owner/name", "owner/name@main"):
        with pytest.raises(Halt, match=f"model.init_from=owner/name@{'a' * 40}"):
            source.find(name)


def test_the_usual_files_of_a_folder(folder: Path) -> None:
    assert [path.name for path in layouts.weight_files(folder / "vae")] == ["diffusion_pytorch_model.safetensors"]
