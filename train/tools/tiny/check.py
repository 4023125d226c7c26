"""Does a tiny model follow its tags? Samples 48 pictures and names the hair colour of each.

The prompts ask for combinations of hair, eyes and backdrop that the world never shows. Where the hair is, is known
from the drawing; its name is the palette's nearest colour, so chance is one in the number of hair colours. Also the
table that the quickstart prints at its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from train.base.console import run_cli
from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, replace_file
from train.config.prompts import PromptsFile, load_prompts
from train.diffusion import sampling
from train.model import networks, prediction, text
from train.observe import anymodel
from train.observe.metrics import read_metrics
from train.observe.pictures import grid
from train.recipe import captions
from train.tools.tiny.character import character_prompts
from train.tools.tiny.draw import HAIR, NEW_HAIR, Colour, hair_boxes
from train.tools.tiny.posts import CheckPrompt, check_prompts

# Shape legend: B pictures of one size, S noise draws, C H W latent channels, rows, columns.
SETTINGS = Path(__file__).resolve().parents[3] / "configs" / "tiny" / "prompts.yaml"
STAGES = ("pretrain", "ft1", "ft2")
MAX_TOKENS = 75  # as the tiny configs train
SHEET_COLUMNS = 12
_LOSS_WINDOW = 50  # updates


@dataclass(frozen=True)
class Agreement:
    """How many pictures have the hair that their prompt asks for; `wrong` counts "asked -> seen"."""

    right: int
    total: int
    wrong: dict[str, int]

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.right / self.total


def hair_of(image: Image.Image, palette: Mapping[str, Colour] = HAIR) -> str:
    """The palette name nearest to the median colour of the strands beside the cheeks, in RGB."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    strands = [pixels[top:bottom, left:right].reshape(-1, 3) for left, top, right, bottom in hair_boxes(*image.size)]
    median = np.median(np.concatenate(strands), axis=0)
    return min(palette, key=lambda name: float(((np.array(palette[name]) - median) ** 2).sum()))


def agreement(images: Sequence[Image.Image], prompts: Sequence[CheckPrompt], palette: Mapping[str, Colour] = HAIR) -> Agreement:
    """Compare pictures with what their prompts ask for."""
    seen = [(prompt.hair, hair_of(image, palette)) for image, prompt in zip(images, prompts, strict=True)]
    wrong = Counter(f"{asked} -> {found}" for asked, found in seen if asked != found)
    return Agreement(len(prompts) - wrong.total(), len(prompts), dict(sorted(wrong.items())))


def check_model(folder: Path, settings: PromptsFile | None = None, out: Path | None = None) -> Agreement:
    """Sample the 48 check prompts from a diffusers folder; with `out`, keep the pictures and a sheet of them.

    Raises Halt(USAGE) when `folder` is no model folder.
    """
    from diffusers import StableDiffusionXLPipeline

    if not (folder / "model_index.json").is_file():
        raise Halt(ExitCode.USAGE, f"{folder} is not a diffusers folder (no model_index.json)")
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder), local_files_only=True, add_watermarker=False)
    pipeline.to(dtype=torch.float32)
    prompts = check_prompts()
    images = sample(pipeline, prompts, settings or load_prompts(SETTINGS))
    if out is not None:
        _keep(images, out)
    return agreement(images, prompts)


def check_character(model: Path, loras: Sequence[str] = (), out: Path | None = None) -> Agreement:
    """Sample the 48 prompts with the new character's name from any model, adapters added, with the check's own settings.

    Raises the Halts of `anymodel.open_any`.
    """
    local = anymodel.with_adapters(anymodel.open_any(model), loras)
    parts = SimpleNamespace(**vars(networks.build(local)), scheduler=SimpleNamespace(config=local.configs["scheduler"]))
    prompts = character_prompts()
    images = sample(parts, prompts, load_prompts(SETTINGS))
    if out is not None:
        _keep(images, out)
    return agreement(images, prompts, HAIR | NEW_HAIR)


def _keep(images: Sequence[Image.Image], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(out / f"{number:02d}.png")
    grid([images], SHEET_COLUMNS).save(out / "sheet.png")


@torch.no_grad()
def sample(components: Any, prompts: Sequence[CheckPrompt], settings: PromptsFile) -> list[Image.Image]:
    """One picture per prompt, those of one size together: eight times faster on a CPU than one by one."""
    for module in (components.unet, components.text_encoder, components.text_encoder_2, components.vae):
        module.eval()
    images: dict[int, Image.Image] = {}
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_size[prompt.width, prompt.height].append(number)
    for numbers in by_size.values():
        latents_BCHW = _denoised(components, [prompts[number] for number in numbers], settings)
        images |= zip(numbers, sampling.decode(components.vae, latents_BCHW), strict=True)
    return [images[number] for number in range(len(prompts))]


def _denoised(components: Any, prompts: Sequence[CheckPrompt], settings: PromptsFile) -> torch.Tensor:
    width, height = prompts[0].width, prompts[0].height
    told = [settings.negative] * len(prompts)
    told += [sampling.captions_text(prompt.text, settings.quality_prefix) for prompt in prompts]
    tokens = text.TagTokenizer(components.tokenizer, components.tokenizer_2)
    pairs = [tokens.chunk_ids(tokens.fit([], captions.split(one)[1], MAX_TOKENS)[0], MAX_TOKENS) for one in told]
    ids_1_BN77, ids_2_BN77 = (torch.from_numpy(np.stack(ids)) for ids in zip(*pairs, strict=True))
    context_BLD, pooled_BP = text.encode(components.text_encoder, components.text_encoder_2, ids_1_BN77, ids_2_BN77)
    size_B6 = torch.tensor([text.size_vector(width, height, 0, 0, width, height)] * len(told), dtype=torch.float32)
    added = {"text_embeds": pooled_BP, "time_ids": size_B6}

    def predict(scaled_BCHW: torch.Tensor, timestep: float) -> torch.Tensor:
        both = components.unet(
            torch.cat([scaled_BCHW, scaled_BCHW]), torch.full((len(told),), timestep),
            encoder_hidden_states=context_BLD, added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip
        negative_BCHW, positive_BCHW = both.chunk(2)
        guided: torch.Tensor = negative_BCHW + settings.guidance * (positive_BCHW - negative_BCHW)
        return guided

    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    start_BCHW = torch.cat([torch.randn(1, 4, height // 8, width // 8, generator=generator) for generator in generators])
    how: dict[str, Any] = {"steps": settings.steps, "sampler": settings.sampler, "generators": generators}
    latents = sampling.denoise(predict, start_BCHW, **how, **prediction.sampled_as(components.scheduler.config))
    assert latents is not None  # only a stop() makes it None
    return latents


def first_and_last_loss(metrics: Path, window: int = _LOSS_WINDOW) -> tuple[int, float, float]:
    """(updates, mean loss of the first `window`, of the last); raises Halt(USAGE) when there are none."""
    losses = [float(line["loss"]) for line in read_metrics(metrics) if "loss" in line]
    if not losses:
        raise Halt(ExitCode.USAGE, f"{metrics} holds no losses: train the stage first")
    return len(losses), float(np.mean(losses[:window])), float(np.mean(losses[-window:]))


def summary(runs: Path) -> str:
    """The quickstart's table: loss of first and last 50 updates of each stage, tag following after the last.

    The tag following of a model is kept beside it, so that printing the table again samples nothing.
    """
    lines = [f"{'stage':<10}{'updates':>8}{'first 50':>10}{'last 50':>10}{'falls':>8}"]
    for stage in STAGES:
        if (runs / stage / "metrics.jsonl").is_file():
            updates, first, last = first_and_last_loss(runs / stage / "metrics.jsonl")
            lines.append(f"{stage:<10}{updates:>8}{first:>10.4f}{last:>10.4f}{first / last:>7.1f}x")
    folder = runs / STAGES[-1] / "model"
    if folder.is_dir():
        found = _kept_agreement(runs / "tag_following.json", folder)
        lines.append(f"hair colour follows the tag after {STAGES[-1]}: {found.right} of {found.total} prompts for "
                     f"combinations never drawn (chance: 1 in {len(HAIR)})")
        lines += [f"  asked -> seen: {pair} ({count})" for pair, count in found.wrong.items()]
    return "\n".join(lines)


def _kept_agreement(path: Path, folder: Path) -> Agreement:
    weights = next((folder / "unet").glob("*.safetensors"), None)
    if weights is None:
        raise Halt(ExitCode.MISMATCH, f"{folder / 'unet'} holds no .safetensors file")
    digest = file_sha256(weights)
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept.pop("model_sha256", None) == digest:
            return Agreement(**kept)
    found = check_model(folder)
    replace_file(path, (json.dumps(asdict(found) | {"model_sha256": digest}, indent=1) + "\n").encode())
    return found


def main() -> None:
    """Command line: python -m train.tools.tiny.check --model runs/tiny/ft2/model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder of a tiny model; with --character any model")
    parser.add_argument("--character", action="store_true", help="prompts with the name of tiny_world.py --character")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:weight]", help="with --character: adapter to add")
    parser.add_argument("--out", type=Path, help="keep the pictures here")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    found = check_character(options.model, options.lora, options.out) if options.character else check_model(options.model, out=options.out)
    if options.json:
        print(json.dumps(asdict(found)))
    else:
        print(f"hair colour agrees in {found.right} of {found.total} prompts; wrong: {found.wrong or 'none'}")
    sys.stdout.flush()


if __name__ == "__main__":
    run_cli(main)
