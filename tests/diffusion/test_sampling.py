"""Samplers against diffusers and against an exact solution; previews touch no random state; PNGs say how made."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cliptokens import small_tokenizer
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from train.base.errors import ExitCode, Halt
from train.config.derived import TrainedAs
from train.config.prompts import (
    CARD_SIZES,
    NEGATIVE,
    QUALITY_PREFIX,
    Prompt,
    PromptsFile,
    checked,
    load_prompts,
)
from train.diffusion.noise import alphas_cumprod
from train.diffusion.sampling import (
    captions_text,
    decode,
    denoise,
    picture_noise,
    sample_images,
    scheduler_of,
    step_generator,
)
from train.model import text
from train.observe.pictures import grid, parameters_text, require_folder, save_png, write_pictures, write_previews

NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Tiny:
    unet: Any
    text_encoder: Any
    text_encoder_2: Any
    vae: Any
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    tokenizer = small_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"num_attention_heads": 2, "num_hidden_layers": 2, **ids}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), use_linear_projection=True, cross_attention_dim=48,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 48,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.13025,
        )  # fmt: skip
        one = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=32, projection_dim=16, **shape))
        two = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, **shape)
        )
    return Tiny(unet.eval(), one.eval(), two.eval(), vae.eval(), tokenizer, small_tokenizer("!"))


def prompt(**changes: Any) -> Prompt:
    return replace(Prompt(text="1girl, girl", width=48, height=32, seed=5, index=0), **changes)


def linear(x: Tensor, timestep: float) -> Tensor:
    return 0.3 * x + 0.0001 * timestep


def start(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 4, 6, 8)).astype(np.float32))


@pytest.mark.parametrize("sampler", ["euler_a", "euler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("zero", [False, True])
def test_euler_is_what_the_papers_say(sampler: str, prediction: str, zero: bool) -> None:
    """Karras et al. 2022, algorithm 2, with k-diffusion's ancestral churn, written here in float64."""
    alphas = alphas_cumprod(zero).numpy()
    alphas[-1] = max(alphas[-1], 2.0**-24)
    timesteps = [999 - 111 * n for n in range(9)] + [0] if not zero else [999 - 100 * n for n in range(10)]
    sigmas = [*np.sqrt((1 - alphas[timesteps]) / alphas[timesteps]), 0.0]
    generator = torch.Generator().manual_seed(4)
    x = start().numpy().astype(float) * sigmas[0]
    for now, after, timestep in zip(sigmas, sigmas[1:], timesteps, strict=False):
        predicted = 0.3 * x / (now**2 + 1) ** 0.5 + 0.0001 * timestep
        clean = x - now * predicted
        if prediction == "v":
            clean = x / (now**2 + 1) - predicted * now / (now**2 + 1) ** 0.5
        up = (after**2 * (now**2 - after**2) / now**2) ** 0.5 if sampler == "euler_a" else 0.0
        x = x + (x - clean) / now * ((after**2 - up**2) ** 0.5 - now)
        if sampler == "euler_a":
            x = x + up * torch.randn(1, 4, 6, 8, generator=generator).numpy()
    ours = denoise(
        linear, start(), steps=10, sampler=sampler, prediction=prediction, zero_terminal_snr=zero,
        generators=[torch.Generator().manual_seed(4)],
    )  # fmt: skip
    assert ours is not None
    np.testing.assert_allclose(ours.numpy(), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("sampler", "least_order"), [("euler", 0.8), ("dpmpp_2m", 1.5)])
def test_order_of_convergence(sampler: str, least_order: float) -> None:
    """Data N(0, s^2): the network is known and so is where the flow ends, x(0) = x(sigma) s / sqrt(s^2 + sigma^2)."""
    spread = 0.7

    def exact(x: Tensor, timestep: float) -> Tensor:
        sigma = float(np.interp(timestep, range(1000), all_sigmas))
        return x * (sigma**2 + 1) ** 0.5 * sigma / (spread**2 + sigma**2)

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    all_sigmas = ((1 - alphas) / alphas) ** 0.5
    errors = []
    for steps in (80, 160):
        end = denoise(exact, start(), steps=steps, sampler=sampler)
        assert end is not None
        sigma = all_sigmas[-1]
        # diffusers starts DPM++ from the noise alone, where the flow has sqrt(sigma^2 + 1) of it
        whole = (sigma**2 + 1) ** 0.5 if sampler == "dpmpp_2m" else sigma
        truth = start() * whole * spread / (spread**2 + sigma**2) ** 0.5
        errors.append(float((end - truth).abs().max()))
    assert errors[1] < 0.1
    assert np.log2(errors[0] / errors[1]) > least_order


@pytest.mark.parametrize("sampler", ["euler_a", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("zero", [False, True])
def test_steps_begin_at_the_end_of_the_trained_range(sampler: str, zero: bool) -> None:
    """One network call a step, from t = 999 down, also where diffusers' own spacing would give other numbers."""
    for steps in (1, 2, 28, 61, 999, 1000):
        asked: list[float] = []

        def predict(x: Tensor, timestep: float, asked: list[float] = asked) -> Tensor:
            asked.append(timestep)
            return linear(x, timestep)

        end = denoise(predict, start(), steps=steps, sampler=sampler, zero_terminal_snr=zero,
                      generators=[torch.Generator().manual_seed(1)])  # fmt: skip
        assert end is not None
        assert torch.isfinite(end).all()
        assert asked[0] == 999
        assert len(asked) == steps
        assert asked == sorted(asked, reverse=True)
        assert asked[-1] >= 0
    scheduler = scheduler_of(sampler, 28, zero_terminal_snr=zero)
    assert scheduler.sigmas[-1] == 0
    assert float(scheduler.sigmas[0]) == pytest.approx(4096 if zero else (0.99534 / 0.004660) ** 0.5, rel=1e-3)


@NUMPY_2
def test_equals_the_stock_pipeline(tiny: Tiny) -> None:
    """Same conditioning, guidance, sizes and decoding as StableDiffusionXLPipeline, given the same noise."""
    from diffusers import StableDiffusionXLPipeline

    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    one = prompt()
    tokens = text.TagTokenizer(tiny.tokenizer, tiny.tokenizer_2)

    def encoded(tags: list[str]) -> tuple[Tensor, Tensor]:
        ids = [torch.from_numpy(part)[None] for part in tokens.chunk_ids(tokens.content_ids(tags))]
        with torch.no_grad():
            return text.encode(tiny.text_encoder, tiny.text_encoder_2, *ids)

    positive, negative = encoded(["girl", "1girl", "girl"]), encoded(["bad"])
    pipeline = StableDiffusionXLPipeline(
        tiny.vae, tiny.text_encoder, tiny.text_encoder_2, tiny.tokenizer, tiny.tokenizer_2, tiny.unet, scheduler,
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=positive[0], pooled_prompt_embeds=positive[1], negative_prompt_embeds=negative[0],
        negative_pooled_prompt_embeds=negative[1], latents=picture_noise(one, tiny.vae),
        num_inference_steps=4, guidance_scale=3.0, width=48, height=32, generator=step_generator(one),
    ).images[0]  # fmt: skip
    (ours,) = sample_images(tiny, [one], steps=4, guidance=3.0, negative="bad", prefix="girl")
    assert ours.size == (48, 32)
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_no_random_state_is_touched_and_modes_return(tiny: Tiny) -> None:
    tiny.unet.train()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    first = sample_images(tiny, [prompt()], steps=2)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    assert before == after
    assert tiny.unet.training
    assert tiny.unet.down_blocks[0].training
    assert not tiny.vae.training
    tiny.unet.eval()
    torch.manual_seed(99)  # another global state changes nothing either
    assert first[0].tobytes() == sample_images(tiny, [prompt()], steps=2)[0].tobytes()


def test_a_picture_depends_on_its_own_prompt_alone(tiny: Tiny) -> None:
    several = [prompt(), prompt(text="k-on!", index=1), prompt(index=2)]
    pictures = sample_images(tiny, several, steps=2)
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert sample_images(tiny, several[1:2], steps=2)[0].tobytes() == pictures[1].tobytes()


def test_noise_is_a_function_of_seed_and_index(tiny: Tiny) -> None:
    assert picture_noise(prompt(), tiny.vae).shape == (1, 4, 8, 12)
    drawn = {}
    for seed, index in ((5, 0), (6, 0), (5, 1)):
        one = prompt(seed=seed, index=index)
        pair = (picture_noise(one, tiny.vae), torch.randn(3, generator=step_generator(one)))
        assert torch.equal(pair[1], torch.randn(3, generator=step_generator(one)))
        drawn[tuple(pair[0].flatten()[:3].tolist()), tuple(pair[1].tolist())] = one
    assert len({noise for noise, _ in drawn}) == len({draws for _, draws in drawn}) == 3


@pytest.mark.parametrize(("prefix", "shown"), [("", "1girl, girl"), ("best quality", "best quality, 1girl, girl")])
def test_prefix_comes_first(prefix: str, shown: str, tiny: Tiny) -> None:
    assert captions_text("1girl ||| girl", prefix) == shown


def test_no_separator_takes_anything_away(tiny: Tiny) -> None:
    """Whatever stands before a second `|||`, or before one in the negative prompt or the prefix, is drawn and told."""
    assert captions_text("1girl ||| smile,||| outdoors |||", "masterpiece ||| best quality") == (
        "masterpiece, best quality, 1girl, smile, outdoors"
    )
    assert captions_text("3|4 view, a||b", "") == "3|4 view, a||b"
    drawn = {
        (text, negative): sample_images(tiny, [prompt(text=text)], steps=2, negative=negative)[0].tobytes()
        for text in ("1girl ||| girl ||| bad", "1girl, girl, bad", "bad")
        for negative in ("worse ||| bad", "worse, bad", "bad")
    }
    assert drawn["1girl ||| girl ||| bad", "worse ||| bad"] == drawn["1girl, girl, bad", "worse, bad"]
    assert len(set(drawn.values())) == 4
    record = parameters_text(prompt(), "1girl", settings(negative="worse|||bad"), model_name="m")
    assert record.split("\n")[1] == "Negative prompt: worse, bad"


def test_options_of_the_training_reach_the_network(tiny: Tiny) -> None:
    base = TrainedAs()
    made = [
        sample_images(tiny, [prompt()], steps=2, trained_as=changed)[0].tobytes()
        for changed in (
            base, replace(base, max_tokens=75), replace(base, context="chunks"), replace(base, prediction="v"),
            replace(base, pooled_projection="sd_scripts"), replace(base, timestep_embedding="sd_scripts"),
        )
    ]  # fmt: skip
    assert len(set(made)) == 6
    assert sample_images(tiny, [prompt()], steps=2)[0].tobytes() == made[0], "the networks are left as they were"


def test_guidance_one_needs_no_negative(tiny: Tiny) -> None:
    with_one = sample_images(tiny, [prompt()], steps=2, guidance=1.0, negative="bad")[0]
    near_one = sample_images(tiny, [prompt()], steps=2, guidance=1.0 + 1e-9, negative="bad")[0]
    assert np.abs(np.asarray(with_one, int) - np.asarray(near_one, int)).max() <= 1


def test_half_precision_autocast(tiny: Tiny) -> None:
    full = sample_images(tiny, [prompt()], steps=2)[0]
    half = sample_images(tiny, [prompt()], steps=2, dtype=torch.bfloat16)[0]
    assert next(tiny.unet.parameters()).dtype == torch.float32
    assert np.abs(np.asarray(full, int) - np.asarray(half, int)).mean() < 8


def test_stop_is_asked_before_every_network_call(tiny: Tiny) -> None:
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 6

    made = sample_images(tiny, [prompt(), prompt(index=1), prompt(index=2)], steps=3, stop=stop)
    assert len(made) == 1  # 1 + 3 questions for the first, then it stops inside the second
    assert len(asked) == 7


def test_long_prompts_are_cut_with_a_warning(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    sample_images(tiny, [prompt(text=", ".join(["girl"] * 200), index=7)], steps=1)
    assert "prompt 7" in caplog.text
    assert "225 tokens" in caplog.text


def test_decode_repairs_what_is_not_finite(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        (picture,) = decode(tiny.vae, torch.full((1, 4, 8, 8), float("nan")))
    assert picture.getextrema() == ((0, 0),) * 3
    assert "not finite" in caplog.text


def test_size_must_fit_the_vae(tiny: Tiny) -> None:
    with pytest.raises(Halt, match=r"prompts\[0\].*50x32.*factor 4") as caught:
        sample_images(tiny, [prompt(width=50)], steps=1)
    assert caught.value.code == ExitCode.USAGE


# --- prompts file ---


def test_shipped_prompts_are_the_cards() -> None:
    shipped = load_prompts(ROOT / "configs/prompts.yaml")
    assert (shipped.sampler, shipped.steps, shipped.guidance) == ("euler_a", 28, 7.0)
    assert shipped.quality_prefix == QUALITY_PREFIX == "masterpiece, best quality, very aesthetic, absurdres"
    assert shipped.negative == NEGATIVE
    assert len(NEGATIVE.split(", ")) == 23
    assert {(p.width, p.height) for p in shipped.prompts} == set(CARD_SIZES)
    assert [p.index for p in shipped.prompts] == list(range(9))


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("prompts: [{text: a, widht: 64}]", r"unknown key prompts\[0\].widht"),
        ("samper: euler\nprompts: [{text: a}]", "samper.*sampler"),
        ("sampler: ddim\nprompts: [{text: a}]", "sampler is 'ddim'"),
        ("steps: 0\nprompts: [{text: a}]", "steps is 0"),
        ("prompts: []", "prompts holds 0"),
        ("prompts: [{width: 64}]", r"prompts\[0\].text"),
        ("prompts: [{text: a, width: 100}]", r"prompts\[0\].width is 100"),
        ("prompts: [{text: a, height: 70000}]", r"prompts\[0\].height is 70000"),
        ("prompts: [{text: a, seed: -1}]", r"prompts\[0\].seed is -1"),
        ("prompts: [{text: 5}]", r"prompts\[0\].text is 5"),
        ("prompts: {a: b}", "prompts"),
    ],
)
def test_bad_prompts_files_name_the_key(body: str, names: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(body)
    with pytest.raises(Halt, match=names) as caught:
        load_prompts(path)
    assert caught.value.code == ExitCode.USAGE
    assert str(path) in caught.value.message


# --- files ---


def settings(**changes: Any) -> PromptsFile:
    prompts = [prompt(text="1girl, girl"), prompt(text="héro, 猫", index=1, seed=6)]
    return checked(replace(PromptsFile(prompts=prompts, steps=2, negative="bad, worse"), **changes))  # type: ignore[arg-type]


def read_as_a1111(path: Path) -> dict[str, str]:
    """The parameters text split as A1111's parser does: last line settings, a line for the negative prompt."""
    with Image.open(path) as image:
        lines = image.info["parameters"].strip().split("\n")
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', lines.pop()))
    negative = [line for line in lines if line.startswith("Negative prompt:")]
    return {"prompt": lines[0], "negative": negative[0].partition(": ")[2], **found}


def test_previews_on_disk(tiny: Tiny, tmp_path: Path) -> None:
    shown = checked(replace(settings(), prompts=[prompt(width=64, height=64), prompt(width=96, height=64, index=1)]))
    arguments: Any = {"device": "cpu", "dtype": torch.float32, "model_name": "ft1: raw, new"}
    files = write_previews({"": tiny, "-ema": tiny}, shown, tmp_path, 120, **arguments)
    folder = tmp_path / "samples" / "step-00000120"
    assert sorted(p.name for p in folder.iterdir()) == [
        "00-ema.png", "00.png", "01-ema.png", "01.png", "grid.png"
    ]  # fmt: skip
    assert sorted(files) == sorted(folder.iterdir())
    read = read_as_a1111(folder / "01.png")
    assert read["prompt"] == QUALITY_PREFIX + ", 1girl, girl"
    assert read["negative"] == "bad, worse"
    assert read["Steps"] == "2"
    assert read["Sampler"] == "Euler a"
    assert read["CFG scale"] == "7"
    assert read["Seed"] == "5"
    assert read["Size"] == "96x64"
    assert read["Update"] == "120"
    assert read["Model"].startswith("ft1")
    again = write_previews({"": tiny, "-ema": tiny}, shown, tmp_path, 120, **arguments)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in files]


def test_line_breaks_do_not_split_the_record() -> None:
    shown = settings(negative="bad,\nworse")
    record = parameters_text(shown.prompts[0], "1girl\nNegative prompt: x\nSteps: 3", shown, model_name="m")
    prompt, negative, facts = record.split("\n")
    assert prompt == "1girl Negative prompt: x Steps: 3"
    assert negative == "Negative prompt: bad, worse"
    assert facts.startswith("Steps: 2, ")


def test_other_alphabets_in_the_record(tmp_path: Path) -> None:
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "red")]
    write_pictures({"": images}, settings(quality_prefix=""), tmp_path, model_name="m")
    assert read_as_a1111(tmp_path / "01.png")["prompt"] == "héro, 猫"


def test_unwritable_folder_is_a_clear_stop(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    with pytest.raises(Halt) as caught:
        write_pictures({"": [Image.new("RGB", (64, 64))]}, settings(), tmp_path / "samples", model_name="m")
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert "samples" in caught.value.message


def test_a_folder_is_tried_before_anything_is_drawn(tmp_path: Path) -> None:
    require_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(Halt, match=re.escape(f"--out {out}")) as caught:
            require_folder(out)
        assert caught.value.code == ExitCode.CANNOT_WRITE
    if os.geteuid() == 0:
        return  # for whom nothing is read-only
    (tmp_path / "new").chmod(0o500)
    with pytest.raises(Halt, match="new") as caught:
        require_folder(tmp_path / "new")
    assert caught.value.code == ExitCode.CANNOT_WRITE


def test_grid_places_every_picture() -> None:
    colours = ["red", "green", "blue", "black", "yellow"]
    made = grid([[Image.new("RGB", (100, 200), colour) for colour in colours]])
    found = {colour for _, colour in made.getcolors(made.width * made.height) or []}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0), (255, 255, 255)} == found
    assert max(grid([[Image.new("RGB", (2000, 1000))]]).size) == 384 + 16


def test_pictures_of_an_earlier_call_do_not_mix_with_those_of_now(tmp_path: Path) -> None:
    prompts = [Prompt(f"number {n}", 64, 64, n) for n in range(3)]
    picture = Image.new("RGB", (64, 64))
    write_pictures({"": [picture] * 3}, settings(prompts=prompts), tmp_path, model_name="before")
    picture.save(tmp_path / "07.png")  # not made here: a file of the user's
    (tmp_path / "10 things.png").write_bytes((tmp_path / "02.png").read_bytes())
    write_pictures({"": [picture]}, settings(prompts=prompts[:1]), tmp_path, model_name="now")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00.png", "07.png", "10 things.png", "grid.png"]


@pytest.mark.parametrize("written", [
    "1girl\nSteps: 28, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Model: m, RNG: Philox, Version: v1.10.1",
    "RNG: Philox, Noise index: 0\nSteps: 28, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Model: m",
])  # fmt: skip
def test_pictures_of_other_programs_stay(written: str, tmp_path: Path) -> None:
    """A1111 numbers its files and writes the same text; ours is known by its last line."""
    save_png(Image.new("RGB", (64, 64)), tmp_path / "00042.png", written)
    (tmp_path / "2024-holiday.png").write_bytes(b"no picture")
    (tmp_path / "43.png").write_bytes(b"no picture either")
    (tmp_path / "44.png").mkdir()
    shown = settings(prompts=[prompt()])
    write_pictures({"": [Image.new("RGB", (64, 64))]}, shown, tmp_path, model_name="now")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "00.png", "00042.png", "2024-holiday.png", "43.png", "44.png", "grid.png",
    ]  # fmt: skip
