"""The demo page: presets become the prompt that is drawn, and a browser gets from page load to a picture."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.prompts import CARD_SIZES, NEGATIVE, QUALITY_PREFIX, load_prompts
from train.config.vocabulary import load_vocabulary
from train.observe.inference import name_of
from train.tools.demo import (
    NOTHING,
    PREFIX,
    Studio,
    Wish,
    _titled,
    prompts_for,
    require_port,
    settings_of,
    sizes_for,
    with_seed,
    words_of,
)

ROOT = Path(__file__).resolve().parents[2]
WORDS = words_of(load_vocabulary("animagine31"), QUALITY_PREFIX)
WISH = Wish(
    prompt="1girl, smile,\n", negative=NEGATIVE, quality=PREFIX, rating="explicit", year="newest",
    aesthetic=NOTHING, size="64x96", sampler="Euler a", steps=2, guidance=7, seed=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train.tools.tiny.model import write_model

    made = tmp_path_factory.mktemp("demo") / "model"
    write_model(made)
    return made


def test_presets_are_the_cards_tags() -> None:
    assert WORDS.quality[PREFIX] == "masterpiece, best quality, very aesthetic, absurdres"
    assert len(WORDS.quality) == 1 + 7 + 1
    assert WORDS.rating["explicit"] == "explicit, nsfw"
    assert list(WORDS.year.values()) == ["", "newest", "recent", "mid", "early", "oldest"]
    assert list(WORDS.aesthetic.values()) == ["", "very aesthetic", "aesthetic", "displeasing", "very displeasing"]


def test_another_base_has_its_own_words() -> None:
    pony = words_of(load_vocabulary("pony"), "score_9, score_8_up")
    assert list(pony.quality)[:3] == [PREFIX, "score_9", "score_8_up"]
    assert pony.rating == {NOTHING: "", "rating_safe": "rating_safe", "rating_questionable": "rating_questionable", "rating_explicit": "rating_explicit"}
    assert pony.year == pony.aesthetic == {NOTHING: ""}
    asked = replace(WISH, rating="rating_safe", year=NOTHING, quality="score_9")
    assert (settings_of(asked, pony).quality_prefix, settings_of(asked, pony).prompts[0].text) == ("score_9", "1girl, smile, rating_safe")


def test_prompts_are_those_given_else_the_first_runs_else_the_shipped_ones(tmp_path: Path) -> None:
    own, given = tmp_path / "own.yaml", tmp_path / "given.yaml"
    for path, text in ((own, "a red hat"), (given, "a blue hat")):
        path.write_text(f"guidance: 4.5\nnegative: bad\nprompts:\n  - {{text: {text}, width: 64, height: 96, seed: 9}}\n")
    run, other = tmp_path / "ft1", tmp_path / "model"
    for folder in (run, other):
        folder.mkdir()
    config = (ROOT / "configs/ft1.yaml").read_text()
    (run / "config.yaml").write_text(f"{config}\nsampling:\n  every_steps: 5\n  prompts: {own}\n")
    models = [str(other), str(run)]
    assert prompts_for(models, str(given)).prompts[0].text == "a blue hat"
    assert (prompts_for(models, None).prompts[0].text, prompts_for(models, None).guidance) == ("a red hat", 4.5)
    assert prompts_for([str(other)], None) == load_prompts(ROOT / "configs/prompts.yaml")
    own.unlink()
    assert prompts_for(models, None) == load_prompts(ROOT / "configs/prompts.yaml")


def test_wish_becomes_a_prompt() -> None:
    settings = settings_of(WISH, WORDS)
    assert settings.prompts[0].text == "1girl, smile, explicit, nsfw, newest"
    assert (settings.prompts[0].width, settings.prompts[0].height, settings.prompts[0].seed) == (64, 96, 5)
    assert (settings.quality_prefix, settings.negative, settings.sampler) == (QUALITY_PREFIX, NEGATIVE, "euler_a")
    assert (settings.guidance_rescale, settings_of(replace(WISH, guidance_rescale=0.7), WORDS).guidance_rescale) == (0, 0.7)
    with pytest.raises(Halt, match="CFG rescale need a number"):
        settings_of(replace(WISH, guidance_rescale=None), WORDS)


def test_a_seed_of_minus_one_is_another_one_each_time() -> None:
    seeds = {settings_of(replace(WISH, seed=-1), WORDS).prompts[0].seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_out_of_range_wishes_name_the_key() -> None:
    with pytest.raises(Halt, match="steps is 0"):
        settings_of(replace(WISH, steps=0), WORDS)


def test_equal_names_are_told_apart() -> None:
    assert list(_titled(["runs/a/ft2/model", "runs/b/ft2", "x/ft1.safetensors"])) == ["a/ft2", "b/ft2", "ft1"]
    three = ["a/ft1/model", "b/ft1/model", "b/c/ft1/model"]
    assert _titled(three) == dict(zip(("a/ft1", "b/ft1", "c/ft1"), three, strict=True))
    three = ["a/x/ft1", "b/x/ft1", "b/y/ft1"]
    assert _titled(three) == dict(zip(("a/x/ft1", "b/x/ft1", "y/ft1"), three, strict=True))
    assert _titled(["/ft2", "/ft2/model", "/ft2.safetensors", "/ft2"]) == {
        "/ft2": "/ft2", "ft2/model": "/ft2/model", "/ft2.safetensors": "/ft2.safetensors"
    }  # fmt: skip


def test_a_directory_has_no_file_type() -> None:
    assert list(_titled(["models/animagine-xl-3.1", "models/animagine-xl-3.1.safetensors", "m/xl-3.1/model"])) == [
        str(Path("models/animagine-xl-3.1").resolve()), "models/animagine-xl-3.1.safetensors", "xl-3.1",
    ]  # fmt: skip
    assert name_of("runs/v2.5") == name_of("runs/v2.5/model") == name_of("v2.5.safetensors") == "v2.5"


def test_studio_writes_a_picture_with_its_record(model: Path, tmp_path: Path) -> None:
    studio = Studio([str(model)], WORDS, device="cpu", tokenizers=None, out=tmp_path / "out")
    (title,) = studio.paths
    assert sizes_for(studio.model(title)) == [  # the card's nine at 64 px, rounded to latents, the portrait first
        "48x80", "64x64", "72x56", "56x72", "80x48", "96x40", "40x96",
    ]  # fmt: skip
    assert len(CARD_SIZES) == 9
    ((_, file, record),) = studio.generate(WISH, [title])
    with Image.open(file) as image:
        assert image.size == (64, 96)
        assert image.info["parameters"] == record
    assert record.startswith(f"{QUALITY_PREFIX}, 1girl, smile, explicit, nsfw, newest\nNegative prompt: nsfw, lowres")
    ((_, again, _),) = studio.generate(WISH, [title])
    assert again != file
    with Image.open(file) as one, Image.open(again) as two:
        assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("name", ["prompt", "negative"])
def test_text_that_is_no_utf8_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    studio = Studio([str(model)], WORDS, device="cpu", tokenizers=None, out=tmp_path / "out")
    with pytest.raises(Halt, match="cannot be written as UTF-8") as caught:
        list(studio.generate(replace(WISH, **{name: "a\udcff b"}), list(studio.paths)))
    assert caught.value.code == ExitCode.USAGE
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["seed", "steps", "guidance"])
def test_an_emptied_box_is_told(name: str) -> None:
    with pytest.raises(Halt, match="need a number") as caught:
        settings_of(replace(WISH, **{name: None}), WORDS)
    assert caught.value.code == ExitCode.USAGE


def test_no_picture_is_overwritten(model: Path, tmp_path: Path) -> None:
    studio = Studio([str(model)], WORDS, device="cpu", tokenizers=None, out=tmp_path / "out")
    files = [file for _ in range(2) for _, file, _ in studio.generate(WISH, list(studio.paths))]
    files[0].unlink()
    assert next(studio.generate(WISH, list(studio.paths)))[1] not in files


def test_stages_stand_side_by_side_from_one_seed(model: Path, tmp_path: Path) -> None:
    """Equal models give equal pictures, under their own names, also from a seed that was drawn; no model is told."""
    shutil.copytree(model, tmp_path / "ft1")
    shutil.copytree(model, tmp_path / "ft2")
    studio = Studio([str(tmp_path / "ft1"), str(tmp_path / "ft2")], WORDS, device="cpu", tokenizers=None, out=tmp_path / "out")
    wish = with_seed(replace(WISH, seed=-1))
    assert wish.seed is not None
    assert wish.seed >= 0
    made = list(studio.generate(wish, list(studio.paths)))
    assert [title for title, _, _ in made] == ["ft1", "ft2"]
    pixels = []
    for title, file, record in made:
        assert f"Seed: {int(wish.seed)}" in record
        assert f"Model: {title}" in record
        with Image.open(file) as image:
            pixels.append(image.tobytes())
    assert pixels[0] == pixels[1]
    with pytest.raises(Halt, match="no model is chosen"):
        list(studio.generate(wish, []))


@pytest.mark.parametrize("second", ["nowhere", "file.safetensors", "empty"])
def test_the_second_model_is_looked_at_as_well(second: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(bytes(8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Halt, match=second):
        Studio([str(model), str(tmp_path / second)], WORDS, device="cpu", tokenizers=None, out=tmp_path / "out")


def test_where_nobody_can_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Halt, match="taken"):
        require_port("127.0.0.1", taken.getsockname()[1])
    for host, port in (("127.0.0.1", 99999), ("203.0.113.1", 7860)):
        with pytest.raises(Halt, match=f"--port {port}") as caught:
            require_port(host, port)
        assert caught.value.code == ExitCode.USAGE
    require_port("127.0.0.1", free_port())


def test_a_bad_model_is_refused_before_the_page_opens(tmp_path: Path) -> None:
    with pytest.raises(Halt, match="does not exist") as caught:
        Studio(["nowhere"], WORDS, device="cpu", tokenizers=None, out=tmp_path)
    assert caught.value.code == ExitCode.USAGE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_server(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300  # on busy cores
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the page never opened: {log.read_text()}")


@pytest.mark.slow
@pytest.mark.long
def test_from_page_load_to_picture_in_a_browser(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    find_chromium()
    address, log = f"http://127.0.0.1:{(port := free_port())}", tmp_path / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    stages = [shutil.copytree(model, tmp_path / name) for name in ("ft1", "ft2")]
    (tmp_path / "prompts.yaml").write_text(
        "steps: 2\nquality_prefix: best\nprompts:\n  - {text: a red hat, width: 64, height: 96, seed: 9}\n"
        "  - {text: a blue hat, width: 96, height: 64, seed: 3}\n"
    )
    with open(log, "wb") as output:
        command = [sys.executable, str(ROOT / "scripts/demo.py"), "--model", *map(str, stages), "--port", str(port)]
        command += ["--prompts", str(tmp_path / "prompts.yaml"), "--device", "cpu", "--out", str(tmp_path / "out")]
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    browser: Any = None
    try:
        wait_for_server(address, server, log)
        browser = Browser(tmp_path / "profile")
        browser.call("Page.navigate", url=address)
        browser.wait_for("!!document.querySelector('button#generate')")
        assert "1girl/1boy, character, series" in browser.evaluate("document.body.innerText")
        assert browser.evaluate("document.querySelector('#prompt textarea').value") == "a red hat"
        assert browser.evaluate("[...document.querySelectorAll('#models input')].map(e => e.checked)") == [True, True]
        browser.evaluate("document.querySelector('button#generate').click()")
        shown = "[...document.querySelectorAll('#gallery .grid-container img, #gallery .thumbnails img')]"
        browser.wait_for(f"{shown}.filter(i => i.complete && i.naturalWidth > 0).length >= 2", 300)
        text = browser.evaluate("document.querySelector('#gallery').innerText")
        assert "ft1, seed 9" in text
        assert "ft2, seed 9" in text
        assert browser.evaluate("document.querySelector('#record textarea').value").startswith("best, a red hat")
        pictures = []
        for file in sorted((tmp_path / "out").glob("*.png")):
            with Image.open(file) as image:
                assert "Steps: 2, Sampler: Euler a" in image.info["parameters"]
                assert image.size == (64, 96)
                pictures.append(image.tobytes())
        assert len(pictures) == 2
        assert pictures[0] == pictures[1], "one seed, equal models"
        for width in (360, 1400):
            for scheme in ("light", "dark"):
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.call("Emulation.setDeviceMetricsOverride", width=width, height=1500, deviceScaleFactor=1, mobile=False)
                time.sleep(1.0)
                assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme)
                picture = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
                (tmp_path / f"page-{width}-{scheme}.png").write_bytes(picture)
        outside = [url for url in browser.requests if not url.startswith((address, "data:", "blob:", "about:"))]
        assert not outside, "the page asks for something outside this machine"
        assert browser.errors == []
    finally:
        if browser is not None:
            browser.close()
        server.terminate()
        server.wait(20)
