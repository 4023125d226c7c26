"""A page to draw with: the base's words and prompts, nine shapes, the stages of a recipe side by side. Needs gradio.

Everything stays on this machine: no analytics, system fonts, and a policy that forbids the page to load from
elsewhere. The PNGs in the gallery carry the parameters text that A1111 reads.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config import shipped
from train.config.prompts import CARD_SIZES, SAMPLER_TITLES, Prompt, PromptsFile, checked, load_prompts
from train.config.vocabulary import Vocabulary, load_vocabulary
from train.diffusion.sampling import captions_text
from train.model import source
from train.observe import anymodel
from train.observe.inference import Model, draw, name_of, open_model
from train.observe.pictures import parameters_text, require_folder, save_png
from train.observe.runs import read_run
from train.storage import tensor_files

NOTHING = "(none)"
PREFIX = "as usual"
ORDER_HINT = "1girl/1boy, character, series, everything else in any order"
OWN = "(of my own)"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:"
)
SEEDS = 2**32  # what the seed box takes


@dataclass(frozen=True)
class Words:
    """What the page's lists offer: what is shown, and what of it comes into the prompt."""

    quality: Mapping[str, str]
    rating: Mapping[str, str]
    year: Mapping[str, str]
    aesthetic: Mapping[str, str]


@dataclass(frozen=True)
class Wish:
    """What the page asks for."""

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

    def __init__(self, models: Sequence[str], words: Words, *, device: str, tokenizers: str | None, out: Path,
                 small: bool | None = None, loras: Sequence[str] = ()) -> None:  # fmt: skip
        self.paths, self.words = _titled(models), words
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

    def generate(self, wish: Wish, titles: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
        """Draw one picture with each model, all from one seed: (title, PNG file, its parameters text) as each is ready.

        Raises Halt(USAGE) for a value out of range, and without a model.
        """
        if not titles:
            raise Halt(ExitCode.USAGE, "no model is chosen")
        settings = settings_of(wish, self.words)
        for title in titles:
            model = self.model(title)
            (image,) = draw(model, settings)
            yield title, *self._save(image, settings, model)

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
    if anymodel.checkpoint_file(found) is not None:
        return
    if found.is_file():
        tensor_files.open_file(found)
    elif not (found / "DONE").exists():
        source.refuse_no_model(found)


def words_of(vocabulary: Vocabulary, prefix: str) -> Words:
    """The lists of a base's words; `prefix`: what stands before every prompt of its own."""
    quality, time = [word for word in vocabulary.quality.words if word], [one.tag for one in vocabulary.time.ranges]
    return Words(
        {PREFIX: prefix, **{word: word for word in quality}, NOTHING: ""},
        {NOTHING: "", **{tags[0]: ", ".join(tags) for tags in vocabulary.rating.values() if tags}},
        {NOTHING: "", **{tag: tag for tag in reversed(time)}},
        {NOTHING: "", **{word: word for word in vocabulary.aesthetic.words if word}},
    )


def settings_of(wish: Wish, words: Words) -> PromptsFile:
    """The wish as a prompts file of one prompt: quality first, then the prompt, then rating, year and aesthetic."""
    extra = [words.rating[wish.rating], words.year[wish.year], words.aesthetic[wish.aesthetic]]
    text = ", ".join(part for part in (wish.prompt.strip(" ,\n"), *extra) if part)
    width, _, height = wish.size.partition("x")
    if wish.seed is None or wish.steps is None or wish.guidance is None or wish.guidance_rescale is None:
        raise Halt(ExitCode.USAGE, "seed, steps, CFG scale and CFG rescale need a number each")
    return checked(
        PromptsFile(
            sampler=next(name for name, title in SAMPLER_TITLES.items() if title == wish.sampler),
            steps=int(wish.steps),
            guidance=float(wish.guidance),
            guidance_rescale=float(wish.guidance_rescale),
            negative=wish.negative.strip(),
            quality_prefix=words.quality[wish.quality],
            prompts=[Prompt(text=text.replace("\n", " "), width=int(width), height=int(height), seed=int(with_seed(wish).seed or 0))],
        )
    )


def sizes_for(model: Model, prompts: Sequence[Prompt] = ()) -> list[str]:
    """The sizes of the prompts, then the card's nine, the portrait first; for a model trained small, the nine shapes at its size."""
    components = model.components
    factor = 2 ** (len(components.vae.config.block_out_channels) - 1)
    side = int(components.unet.config.sample_size or 128) * factor
    scale = min(side / 1024, 1.0)
    shapes = [(832, 1216), *(size for size in CARD_SIZES if size != (832, 1216))]
    made = [tuple(max(round(pixels * scale / factor), 4) * factor for pixels in shape) for shape in shapes]
    return list(dict.fromkeys([*(size_of(prompt) for prompt in prompts), *(f"{width}x{height}" for width, height in made)]))


def size_of(prompt: Prompt) -> str:
    """`832x1216`."""
    return f"{prompt.width}x{prompt.height}"


def prompts_for(models: Sequence[str], given: str | None) -> PromptsFile:
    """The prompts file that is `given`, else the one that the first run among the models draws, else the shipped one.

    A file that a run names and that is gone is passed over.
    """
    if given is not None:
        return load_prompts(given)
    for model in models:
        named = read_run(model).config.get("sampling.prompts") if (Path(model) / "config.yaml").is_file() else None
        if named is not None and Path(named).is_file():
            return load_prompts(named)
    return load_prompts(shipped.folder() / "prompts.yaml")


def build(studio: Studio, usual: PromptsFile) -> Any:
    """The page (gradio Blocks): everything as in `usual` at first, its prompts to pick from."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gradio as gr

    titles, words, first = list(studio.paths), studio.words, usual.prompts[0]
    sizes = sizes_for(studio.model(titles[0]), usual.prompts)
    picks = {f"{number}: {prompt.text}": prompt for number, prompt in enumerate(usual.prompts, 1)}
    with gr.Blocks(title="Draw", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                models = gr.CheckboxGroup(titles, value=titles, label="Models, side by side from one seed", elem_id="models", visible=len(titles) > 1)
                pick = gr.Dropdown([OWN, *picks], value=next(iter(picks)), label="Prompts of the base", elem_id="pick")
                prompt = gr.Textbox(first.text, label="Prompt", info=ORDER_HINT, lines=3, elem_id="prompt")
                with gr.Row():
                    quality = gr.Dropdown(list(words.quality), value=PREFIX, label="Quality", min_width=120)
                    lists = [gr.Dropdown(list(offered), value=NOTHING, label=label, visible=len(offered) > 1, min_width=120)
                             for label, offered in (("Rating", words.rating), ("Year", words.year), ("Aesthetic", words.aesthetic))]  # fmt: skip
                negative = gr.Textbox(usual.negative, label="Negative prompt", lines=3)
                with gr.Row():
                    size = gr.Dropdown(sizes, value=size_of(first), label="Size", elem_id="size", min_width=120)
                    sampler = gr.Dropdown(list(SAMPLER_TITLES.values()), value=SAMPLER_TITLES[usual.sampler], label="Sampler", min_width=120)
                    seed = gr.Number(first.seed, label="Seed", info="-1 = another one each time", precision=0, elem_id="seed", min_width=120)
                steps = gr.Slider(1, 50, min(usual.steps, 50), step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(1, 15, min(max(usual.guidance, 1.0), 15.0), step=0.5, label="CFG scale")
                rescale = gr.Slider(0, 1, usual.guidance_rescale, step=0.05, label="CFG rescale", info="0.7 for v-prediction with zero terminal SNR")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=3, min_width=300):
                gallery = gr.Gallery(label="The newest first", columns=min(max(len(titles), 2), 4), format="png",
                                     object_fit="contain", elem_id="gallery")  # fmt: skip
                record = gr.Textbox(label="Parameters of the newest, as in its PNG", lines=6, elem_id="record")
        kept = gr.State([])

        def run(before: list[Any], chosen: list[str], *values: Any) -> Iterator[tuple[list[Any], list[Any], str]]:
            row: list[Any] = []
            try:
                wish = with_seed(Wish(*values))
                for title, file, text in studio.generate(wish, chosen):
                    row.append((str(file), f"{title}, seed {int(wish.seed or 0)}"))
                    yield [*row, *before], [*row, *before], text
            except Halt as halt:
                raise gr.Error(halt.message) from halt

        def picked(name: str) -> list[Any]:
            one = picks.get(name)
            return [gr.skip()] * 3 if one is None else [one.text, size_of(one), one.seed]

        pick.change(picked, [pick], [prompt, size, seed])
        wishes = [prompt, negative, quality, *lists, size, sampler, steps, guidance, seed, rescale]
        button.click(run, [kept, models, *wishes], [kept, gallery, record], concurrency_limit=1)
    return page


def with_seed(wish: Wish) -> Wish:
    """The wish with a number for the seed that is drawn where -1 stands: every model begins from the same noise."""
    return wish if wish.seed is None or wish.seed >= 0 else replace(wish, seed=random.SystemRandom().randrange(SEEDS))


def serve(
    models: Sequence[str], *, host: str, port: int, device: str, tokenizers: str | None, out: str | None, small: bool | None = None,
    loras: Sequence[str] = (), prompts: str | None = None, vocabulary: str = "animagine31",
) -> None:  # fmt: skip
    """Open the page and serve it until interrupted. Raises Halt(USAGE) without gradio or with the port taken."""
    usual = prompts_for(models, prompts)
    words = words_of(load_vocabulary(vocabulary), usual.quality_prefix)
    try:
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI
    except ImportError as error:
        raise Halt(ExitCode.USAGE, f'{error.name} is not installed: pip install -e ".[demo]"') from error
    require_port(host, port)
    folder = Path(out) if out else Path(tempfile.mkdtemp(prefix="pictures-"))
    studio = Studio(models, words, device=device, tokenizers=tokenizers, out=folder, small=small, loras=loras)
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), build(studio, usual), path="/", theme=theme,
        allowed_paths=[str(folder.resolve())], footer_links=[], ssr_mode=False,
        css=".dark{color-scheme:dark}",  # bars to scroll with
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
