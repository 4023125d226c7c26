"""The tiny SDXL: stock classes load it, every build has the same bytes, its VAE keeps colours."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from train.base.errors import ExitCode, Halt
from train.model.text import TagTokenizer, load_tokenizer
from train.tools.tiny import model as tiny_model
from train.tools.tiny.check import hair_of
from train.tools.tiny.draw import draw
from train.tools.tiny.posts import make_post
from train.tools.tiny.tokenizer import BOS, EOS, build_vocabulary, byte_letters

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    assert tiny_model.write_model(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def pixels_of(number: int) -> tuple[torch.Tensor, str]:
    """A drawn picture as float [1, 3, 160, 128] in -1..1, and its hair colour."""
    post = make_post(1, number, 640)
    image = draw(post.look, 256, 320, number).resize((128, 160))
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 160, 128, 3)
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1, post.look.hair


def test_every_build_is_the_same_and_leaves_the_global_generator_alone(model: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    tiny_model.write_model(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert hashes(tmp_path / "model") == hashes(model)
    assert not tiny_model.write_model(model)


def test_another_model_in_the_folder_is_refused(model: Path) -> None:
    before = hashes(model)
    with pytest.raises(Halt, match="another model") as caught:
        tiny_model.write_model(model, seed=6)
    assert caught.value.code == ExitCode.MISMATCH
    assert hashes(model) == before


def test_stock_pipeline_makes_a_picture(model: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(str(model), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("1girl, red hair", width=128, height=160, num_inference_steps=2).images[0]
    assert image.size == (128, 160)
    unet = pipeline.unet.config
    assert unet.addition_embed_type == "text_time"
    widths = pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size
    assert unet.cross_attention_dim == sum(widths)
    pooled = pipeline.text_encoder_2.config.projection_dim
    assert unet.projection_class_embeddings_input_dim == pooled + 6 * unet.addition_time_embed_dim


def test_weights_carry_prefix_licence_and_usual_mode(model: Path) -> None:
    for path in model.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["modelspec.license"] == "Apache-2.0"
            if path.parent.name.startswith("text_encoder"):
                assert all(name.startswith(("text_model.", "text_projection.")) for name in file.keys())  # noqa: SIM118
        assert path.stat().st_mode & stat.S_IRUSR
    files = {path.name for path in (model / "tokenizer").iterdir()}
    assert files >= {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}


def test_vocabulary_has_clips_shape() -> None:
    vocabulary, merges = build_vocabulary()
    assert vocabulary["!"] == 0
    assert vocabulary["!</w>"] == 256
    assert (vocabulary[BOS], vocabulary[EOS]) == (len(vocabulary) - 2, len(vocabulary) - 1)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(set(byte_letters())) == 256
    assert len(vocabulary) == 512 + len({a + b for a, b in merges}) + 2


def test_tokenizers_behave_like_clips(model: Path) -> None:
    first, second = (load_tokenizer(model / name) for name in ("tokenizer", "tokenizer_2"))
    assert first.tokenize("Red HAIR, k-on!") == ["red</w>", "hair</w>", ",</w>", "k</w>", "-</w>", "o", "n</w>", "!</w>"]
    ids = first("red hair").input_ids
    assert (ids[0], ids[-1]) == (first.bos_token_id, first.eos_token_id)
    assert (first.pad_token_id, second.pad_token_id) == (first.eos_token_id, 0)
    assert json.loads((model / "tokenizer/vocab.json").read_text()) == first.get_vocab()
    tokens = TagTokenizer(first, second)
    for number in range(0, 640, 40):
        tags = make_post(1, number, 640).fields["tag_string"].replace("_", " ").split(" ")
        joined = first(", ".join(tags), add_special_tokens=False).input_ids
        assert tokens.content_ids(tags) == joined
        assert first.unk_token_id not in joined


def test_vae_is_small_and_keeps_hair_colours(model: Path) -> None:
    from diffusers import AutoencoderKL

    from train.diffusion.sampling import decode

    assert tiny_model.VAE_WEIGHTS.stat().st_size <= 1_000_000
    vae = AutoencoderKL.from_pretrained(str(model / "vae")).eval()
    right, latents = 0, []
    with torch.no_grad():
        for number in range(20):
            pixels, hair = pixels_of(number)
            latents.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
            right += hair_of(decode(vae, latents[-1])[0]) == hair
    assert right >= 19
    channels = torch.cat(latents).transpose(0, 1).flatten(1)
    assert channels.mean(dim=1).abs().max() < 0.3
    assert 0.7 < channels.std(dim=1).min() <= channels.std(dim=1).max() < 1.3


def test_file_bytes_do_not_depend_on_the_order_of_metadata() -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    one = tiny_model.deterministic_file(tensors, {"x": "1", "y": "2"})
    assert one == tiny_model.deterministic_file(tensors, {"y": "2", "x": "1"})
    assert (len(one) - 8 - int.from_bytes(one[:8], "little")) == 28
