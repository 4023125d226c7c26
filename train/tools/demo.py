"""A page to draw with: the card's presets, its nine shapes, the stages of a recipe side by side. Needs gradio.

Everything stays on this machine: no analytics, system fonts, and a policy that forbids the page to load from
elsewhere. The PNGs in the gallery carry the parameters text that A1111 reads.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.prompts import CARD_SIZES, NEGATIVE, QUALITY_PREFIX, SAMPLER_TITLES, Prompt, PromptsFile, checked
from train.diffusion.sampling import captions_text
from train.model import source
from train.observe.inference import Model, draw, name_of, open_model
from train.observe.pictures import parameters_text, require_folder, save_png
from train.recipe.tag_policy import AESTHETIC_TAGS, QUALITY_TAGS, RATING_TAGS, YEAR_RANGES
from train.storage import tensor_files

NOTHING = "(none)"
QUALITY = {  # card: Special tags, and its quality prefix
    "card's prefix": QUALITY_PREFIX,
    **{tag: tag for tag in QUALITY_TAGS},
    NOTHING: "",
}  # fmt: skip
RATING = {NOTHING: "", **{tags[0]: ", ".join(tags) for tags in RATING_TAGS.values()}}
YEAR = {NOTHING: "", **{tag: tag for tag, _, _ in reversed(YEAR_RANGES)}}
AESTHETIC = {NOTHING: "", **{tag: tag for tag in AESTHETIC_TAGS}}
ORDER_HINT = "1girl/1boy, character, series, everything else in any order"
EXAMPLE = "1girl, original, solo, smile, looking at viewer, outdoors"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:"
)
SEEDS = 2**32  # what the seed box takes


@dataclass(frozen=True)
class Wish:
    """What the page asks for."""

    model: str
    prompt: str
    negative: str
    quality: str
    rating: str
    year: str
    aesthetic: str
    size: str
    sampler: str
    steps: float | None
    guidance: float | None
    seed: float | None  # None = the box was emptied, as for the other numbers
    guidance_rescale: float | None = 0.0


class Studio:
    """Owner of the loaded model (one at a time) and of the folder the pictures go to."""

    def __init__(self, models: Sequence[str], *, device: str, tokenizers: str | None, out: Path, small: bool | None = None,
                 loras: Sequence[str] = ()) -> None:  # fmt: skip
        self.paths = _titled(models)
        self.device, self.tokenizers, self.out, self.small, self.loras = device, tokenizers, out, small, loras
        require_folder(out)
        self._open: tuple[str, Model] | None = None
        for path in self.paths.values():  # a bad path is refused before the page opens, whichever it is
            require_model(path)
        self.model(next(iter(self.paths)))

    def model(self, title: str) -> Model:
        """The model of that title; loading it lets go of the one before."""
        if self._open is None or self._open[0] != title:
            self._open = None
            found = open_model(self.paths[title], device=self.device, tokenizers=self.tokenizers, small=self.small, loras=self.loras)
            self._open = (title, found)
        return self._open[1]

    def generate(self, wish: Wish) -> tuple[Path, str]:
        """Draw one picture; (PNG file, its parameters text). Raises Halt(USAGE) for a value out of range."""
        model = self.model(wish.model)
        settings = settings_of(wish)
        (image,) = draw(model, settings)
        return self._save(image, settings, model)

    def _save(self, image: Image.Image, settings: PromptsFile, model: Model) -> tuple[Path, str]:
        prompt = settings.prompts[0]
        shown = captions_text(prompt.text, settings.quality_prefix)
        record = parameters_text(prompt, shown, settings, model_name=model.name, model_hash=model.sha256)
        taken = [int(path.name[:5]) for path in self.out.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
        number = max(taken, default=-1) + 1  # not their count: somebody may have thrown some away
        return save_png(image, self.out / f"{number:05d}-{prompt.seed}.png", record), record


def require_model(path: str) -> None:
    """Raises Halt for what is certainly no model, without reading one."""
    found = source.find(path)
    if found.is_file():
        tensor_files.open_file(found)
    elif not (found / "DONE").exists():
        source.refuse_no_model(found)


def settings_of(wish: Wish) -> PromptsFile:
    """The wish as a prompts file of one prompt: quality first, then the prompt, then rating, year and aesthetic."""
    extra = [RATING[wish.rating], YEAR[wish.year], AESTHETIC[wish.aesthetic]]
    text = ", ".join(part for part in (wish.prompt.strip(" ,\n"), *extra) if part)
    width, _, height = wish.size.partition("x")
    if wish.seed is None or wish.steps is None or wish.guidance is None or wish.guidance_rescale is None:
        raise Halt(ExitCode.USAGE, "seed, steps, CFG scale and CFG rescale need a number each")
    seed = int(wish.seed) if wish.seed >= 0 else random.SystemRandom().randrange(SEEDS)
    return checked(
        PromptsFile(
            sampler=next(name for name, title in SAMPLER_TITLES.items() if title == wish.sampler),
            steps=int(wish.steps),
            guidance=float(wish.guidance),
            guidance_rescale=float(wish.guidance_rescale),
            negative=wish.negative.strip(),
            quality_prefix=QUALITY[wish.quality],
            prompts=[Prompt(text=text.replace("\n", " "), width=int(width), height=int(height), seed=seed)],
        )
    )


def sizes_for(model: Model) -> list[str]:
    """The card's nine sizes, the portrait first; for a model trained small, the nine shapes at its size."""
    components = model.components
    factor = 2 ** (len(components.vae.config.block_out_channels) - 1)
    side = int(components.unet.config.sample_size or 128) * factor
    scale = min(side / 1024, 1.0)
    shapes = [(832, 1216), *(size for size in CARD_SIZES if size != (832, 1216))]
    made = [tuple(max(round(pixels * scale / factor), 4) * factor for pixels in shape) for shape in shapes]
    return list(dict.fromkeys(f"{width}x{height}" for width, height in made))


def build(studio: Studio) -> Any:
    """The page (gradio Blocks)."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gradio as gr

    first = next(iter(studio.paths))
    sizes = sizes_for(studio.model(first))
    with gr.Blocks(title="Draw", analytics_enabled=False, fill_width=True) as page:
        gallery_state = gr.State([])
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Dropdown(list(studio.paths), value=first, label="Model", elem_id="model")
                prompt = gr.Textbox(EXAMPLE, label="Prompt", info=ORDER_HINT, lines=3, elem_id="prompt")
                with gr.Row():
                    quality = gr.Dropdown(list(QUALITY), value="card's prefix", label="Quality")
                    rating = gr.Dropdown(list(RATING), value=NOTHING, label="Rating")
                    year = gr.Dropdown(list(YEAR), value=NOTHING, label="Year")
                    aesthetic = gr.Dropdown(list(AESTHETIC), value=NOTHING, label="Aesthetic")
                negative = gr.Textbox(NEGATIVE, label="Negative prompt", lines=3)
                with gr.Row():
                    size = gr.Dropdown(sizes, value=sizes[0], label="Size", elem_id="size")
                    sampler = gr.Dropdown(list(SAMPLER_TITLES.values()), value="Euler a", label="Sampler")
                    seed = gr.Number(0, label="Seed", info="-1 = another one each time", precision=0)
                steps = gr.Slider(1, 50, 28, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(1, 15, 7, step=0.5, label="CFG scale")
                rescale = gr.Slider(0, 1, 0, step=0.05, label="CFG rescale", info="0.7 for v-prediction with zero terminal SNR")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    label="Pictures, the newest first", columns=2, format="png", object_fit="contain", elem_id="gallery"
                )
                record = gr.Textbox(label="Parameters of the newest, as in its PNG", lines=6, elem_id="record")

        def run(kept: list[str], *values: Any) -> tuple[list[str], list[str], str]:
            try:
                file, text = studio.generate(Wish(*values))
            except Halt as halt:
                raise gr.Error(halt.message) from halt
            pictures = [str(file), *kept]
            return pictures, pictures, text

        wishes = [model, prompt, negative, quality, rating, year, aesthetic, size, sampler, steps, guidance, seed, rescale]
        button.click(run, [gallery_state, *wishes], [gallery_state, gallery, record], concurrency_limit=1)
    return page


def serve(
    models: Sequence[str], *, host: str, port: int, device: str, tokenizers: str | None, out: str | None, small: bool | None = None,
    loras: Sequence[str] = (),
) -> None:  # fmt: skip
    """Open the page and serve it until interrupted. Raises Halt(USAGE) without gradio or with the port taken."""
    try:
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI
    except ImportError as error:
        raise Halt(ExitCode.USAGE, f'{error.name} is not installed: pip install -e ".[demo]"') from error
    require_port(host, port)
    folder = Path(out) if out else Path(tempfile.mkdtemp(prefix="pictures-"))
    studio = Studio(models, device=device, tokenizers=tokenizers, out=folder, small=small, loras=loras)
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), build(studio), path="/", theme=theme,
        allowed_paths=[str(folder.resolve())], footer_links=[], ssr_mode=False,
    )  # fmt: skip

    @app.middleware("http")
    async def stay_home(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    print(f"http://{host}:{port}  (pictures in {folder}; Ctrl-C ends)", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")


def require_port(host: str, port: int) -> None:
    """Raises Halt(USAGE) where the page could not listen, before a model is loaded."""
    if not 1 <= port <= 65535:
        raise Halt(ExitCode.USAGE, f"--port {port} is not one of 1 to 65535")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Halt(ExitCode.USAGE, f"--port {port} is taken on {host}: choose another one") from error
        raise Halt(ExitCode.USAGE, f"--host {host}, --port {port}: {error}") from error


def _titled(models: Sequence[str]) -> dict[str, str]:
    """Title to path, in the order given, each place once; equal names get as much of their paths as tells them apart."""
    paths: dict[Path, str] = {}
    for path in models:
        paths.setdefault(Path(path).resolve(), path)
    possible = {where: _titles(where) for where in paths}
    titles = {}
    for where, path in paths.items():
        others = {title for other, its in possible.items() if other != where for title in its}
        titles[next(title for title in possible[where] if title not in others)] = path
    return titles


def _titles(where: Path) -> list[str]:
    """What a model may be called, the shortest first: ends of its path in short (`runs/ft2`) and in full.

    The whole path, which comes last, is nobody else's: it alone starts with a slash.
    """
    whole = where.parts[1:]
    short = (*(whole[:-2] if where.name == "model" else whole[:-1]), name_of(where))
    ends = [short[-length:] for length in range(1, len(short) + 1)]
    ends += [whole[-length:] for length in range(2, len(whole) + 1)]
    return [*("/".join(parts) for parts in ends), str(where)]
